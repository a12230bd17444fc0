"""Checkpoints that a trainer restores: the model takes over their settings, and knows which one it was fitted from.

The command line builds a model from its own arguments and then restores a checkpoint into it. Arguments that were left
at their defaults are taken from the checkpoint; those that were given stay, as long as its content allows it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.trainer.states import TrainerFn

from anomalib_exdd.images.reading import WHITE_LEVEL
from anomalib_exdd.models.weights import WithoutInitialValues, fingerprint
from anomalib_exdd.utils.files import write_atomically

WHITE_LEVEL_KEY = "white_level"
"""Where a checkpoint keeps the white level of the training images."""


@dataclass
class CheckpointState:
    """What a model remembers of the checkpoints that were restored into it."""

    adopted: dict[str, tuple[Any, Any]] = field(default_factory=dict)  # arguments: own value, and the checkpoint's
    fitting_from: str | None = None  # fingerprint of the weights that the running fit started from, if from any
    fitted_from: str | None = None  # the same of the last completed fit


class FitRecorder(Callback):
    """Records on the model what a fit depends on: how images are read, validation images, and a checkpoint."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Record the white level, and whether there are validation images."""
        pl_module.white_level = _white_level_of(trainer)
        if trainer.enable_validation:
            trainer.fit_loop.epoch_loop.val_loop.setup_data()  # if Lightning does not validate in this epoch
        pl_module.validates = trainer.enable_validation and sum(trainer.num_val_batches) > 0
        if not pl_module.validates:
            trainer.check_val_every_n_epoch = 1  # else Lightning saves checkpoints after validations only

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Record the checkpoint that the fit started from; a fit that fails does not get here."""
        if stage == TrainerFn.FITTING:
            pl_module.checkpoint_state.fitted_from = pl_module.checkpoint_state.fitting_from


def restore_checkpoint(model: Any, trainer: Any, checkpoint: dict[str, Any]) -> None:
    """Prepare a model for a checkpoint that is loaded into it next; called from its ``on_load_checkpoint``.

    The model's ``adopt_settings(given, saved)`` returns the arguments that change to the checkpoint's, its method
    ``build_model()`` builds the torch model, and ``prepare_fit_from(checkpoint)`` changes what a fit starts from. There
    is no trainer while ``load_from_checkpoint`` builds the model from the checkpoint's arguments.

    Raises:
        ValueError: If a given argument, or the data module's ``white_level``, contradicts the checkpoint.
    """
    white_level = checkpoint.get(WHITE_LEVEL_KEY, WHITE_LEVEL)
    if trainer is None:
        model.white_level = white_level
        return
    _adopt_settings(model, checkpoint.get("hyper_parameters", {}))
    state = model.checkpoint_state
    if trainer.datamodule is not None:
        trainer.datamodule.setup(trainer.state.fn)  # its resize follows the pre-processor, which has just changed
    if trainer.state.fn == TrainerFn.FITTING:
        model.prepare_fit_from(checkpoint)
        state.fitting_from = fingerprint(checkpoint["state_dict"].values())
        return
    is_testing = trainer.state.fn == TrainerFn.TESTING and state.fitted_from is not None
    if is_testing and state.fitted_from == fingerprint(checkpoint["state_dict"].values()):
        # Anomalib's engine tests the checkpoint that a fit started from; what was asked for is a test of the model
        # that has just been trained.
        checkpoint["state_dict"] = model.state_dict()
        model.on_save_checkpoint(checkpoint)
        checkpoint.pop("callbacks", None)  # which would name the old best checkpoint again
    else:
        state.fitted_from = None
        model.white_level = white_level
    found = _white_level_of(trainer)
    if trainer.datamodule is not None and model.white_level != found:
        msg = f"The checkpoint needs `--data.white_level {model.white_level}`, but the data module has {found}."
        raise ValueError(msg)


def save_changed(model: LightningModule, checkpoint: str | Path, output: str | Path | None = None) -> Path:
    """Write a changed model's state into a copy of its checkpoint, by default over it; return the written file."""
    output = Path(output or checkpoint)
    content: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
    content["state_dict"] = model.state_dict()
    model.on_save_checkpoint(content)
    output.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(output) as partial:
        torch.save(content, partial)
    return output


def _adopt_settings(model: Any, saved: Mapping[str, Any]) -> None:
    """Take over the arguments of a checkpoint that were left at their defaults; those of an earlier one are undone."""
    state, present = model.checkpoint_state, dict(model.hparams)
    given = present | {name: own for name, (own, value) in state.adopted.items() if present[name] == value}
    changes = model.adopt_settings(given, saved)
    state.adopted = {name: (given[name], value) for name, value in changes.items()}
    if changed := {name: value for name, value in (given | changes).items() if present[name] != value}:
        model.hparams.update(changed)
        with WithoutInitialValues():  # the weights are restored next
            model.build_model()
        model.model.to(model.device)


def _white_level_of(trainer: Any) -> int:
    """Return the white level of a trainer's data, which only this package's data modules know."""
    return getattr(trainer.datamodule, WHITE_LEVEL_KEY, WHITE_LEVEL)
