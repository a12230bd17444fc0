"""What every model of this package adds to Anomalib's own: the same predictions, folders and checkpoints for all."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from anomalib import LearningType
from anomalib.metrics import Evaluator
from anomalib.visualization import ImageVisualizer
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torchmetrics import Metric

from anomalib_exdd.images.reading import WHITE_LEVEL
from anomalib_exdd.models.metrics import default_evaluator
from anomalib_exdd.models.visualization import LABEL_SIZE, SeenImageVisualizer, panel_size
from anomalib_exdd.models.weights import WithoutInitialValues, fingerprint

from .cropping import Cropping
from .distributed import check_post_processor, check_strategy, join_processes, warn_of_repeats
from .predictions import Decisions, Predictions, RawScores
from .results import report_results

_OPSET = 18  # what torch writes

if TYPE_CHECKING:  # every class that it is mixed into is one
    from anomalib.models.components import AnomalibModule as _Module
else:
    _Module = ABC


_WHITE_LEVEL = "white_level"
"""Where a checkpoint keeps it."""


class Inspection(_Module):  # type: ignore[misc]  # Anomalib's to_onnx differs from Lightning's
    """Mixed into a model: a table of its predictions, one folder of results, and checkpoints that keep their meaning.

    The command line builds a model from its own arguments and then loads a checkpoint into it. Arguments that were left
    at their defaults are taken from the checkpoint; those that were given stay, as long as its content allows it.

    It is no base class, because Anomalib knows the direct subclasses of its own module only, and it has to come before
    that module.

    A model builds its torch model in :meth:`_build_model`, from :attr:`settings` alone, and calls it at the end of its
    constructor.

    Attributes:
        white_level: The number that is white in images of more than 8 bits, as the data of the training have it.
        validates: Whether the training has validation images to find thresholds on.
    """

    white_level = WHITE_LEVEL
    validates = True
    _own_visualizer = False
    _fitting_from: str | None = None
    _fitted_from: str | None = None
    _taken: Mapping[str, tuple[Any, Any]] = MappingProxyType({})  # own and present value of what a checkpoint changed

    @property
    @abstractmethod
    def settings(self) -> Any:
        """The arguments in force as attributes."""

    @abstractmethod
    def _build_model(self) -> None:
        """Build the torch model, and what depends on the settings."""

    @abstractmethod
    def _adopted(self, given: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
        """Tell which arguments change to those that a checkpoint was trained with.

        Args:
            given: The arguments, without what another checkpoint has changed.
            saved: The checkpoint's.

        Raises:
            ValueError: If a given argument contradicts the checkpoint.
        """

    @abstractmethod
    def _fit_from(self, checkpoint: dict[str, Any]) -> None:
        """Prepare a checkpoint that a fit starts from; it is restored afterwards."""

    @property
    def learning_type(self) -> LearningType:
        """One-class for the engine, which then fits, validates and tests, whether there are defects or not."""
        return LearningType.ONE_CLASS

    @property
    def decisions(self) -> Decisions | None:
        """The thresholds of accept, review and reject, for a model that has them."""
        return None

    @property
    def scores_are_probabilities(self) -> bool:
        """Whether an image's score, before Anomalib's normalisation, is the probability that it is defective."""
        return self.decisions is not None

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """Report ranking and F1 of images and pixels."""
        return default_evaluator()

    @classmethod
    def configure_visualizer(cls) -> ImageVisualizer:
        """Draw the images as the model sees them."""
        return SeenImageVisualizer()

    def configure_callbacks(self) -> list[Callback]:
        """Add the table of predictions, and what is said of crops, to Anomalib's callbacks."""
        raw = RawScores()  # first, because Anomalib's post-processor overwrites the scores
        return [raw, *cast("Sequence[Callback]", super().configure_callbacks()), Cropping(), Predictions(raw)]

    def setup(self, stage: str) -> None:
        """Prepare for several processes.

        Raises:
            ValueError: If the strategy would give a process parts of the model only, or if the trainer would change
                this model's scores by another model's thresholds.
        """
        check_strategy(self.trainer, self.name)
        check_post_processor(self.trainer, self.post_processor)
        super().setup(stage)
        join_processes(self.trainer)
        if stage == TrainerFn.FITTING:
            self._fitting_from = self._fitted_from = None
            # There is nothing to check before training: Lightning's own trainer, unlike the engine, would try.
            cast("Any", self.trainer).num_sanity_val_steps = 0

    def on_train_start(self) -> None:
        """Find out how images are read, and whether there are validation images."""
        super().on_train_start()
        trainer: Any = self.trainer
        self.white_level = _white_level_of(trainer)
        self.validates = _has_validation_images(trainer)
        if not self.validates:
            trainer.check_val_every_n_epoch = 1  # else Lightning saves checkpoints after validations only

    def on_test_start(self) -> None:
        """Warn where images count twice."""
        super().on_test_start()
        warn_of_repeats(self.trainer)

    def on_validation_epoch_start(self) -> None:
        """Start counting anew, also after an exception."""
        super().on_validation_epoch_start()
        self._reset_metrics()

    def on_test_epoch_start(self) -> None:
        """Start counting anew, also after an exception."""
        super().on_test_epoch_start()
        self._reset_metrics()

    def _reset_metrics(self) -> None:
        for part in self.modules():
            if isinstance(part, Metric):
                part.reset()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save how images are read."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[_WHITE_LEVEL] = self.white_level

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make a checkpoint that the trainer restores mean what its user expects.

        Raises:
            ValueError: If a given argument contradicts what the checkpoint was trained with.
        """
        super().on_load_checkpoint(checkpoint)
        white_level = checkpoint.get(_WHITE_LEVEL, WHITE_LEVEL)
        if self._trainer is None:  # load_from_checkpoint has built this model from the checkpoint's arguments
            self.white_level = white_level
            return
        self._adopt(checkpoint.get("hyper_parameters", {}))
        trainer: Any = self.trainer
        if trainer.datamodule is not None:
            trainer.datamodule.setup(trainer.state.fn)  # its resize follows the pre-processor, which has just changed
        if trainer.state.fn == TrainerFn.FITTING:
            self._fit_from(checkpoint)
            self._fitting_from = fingerprint(checkpoint["state_dict"].values())
            return
        if trainer.state.fn == TrainerFn.TESTING and self._was_fitted_from(checkpoint):
            # Anomalib's engine tests the checkpoint that a fit started from; what was asked for is a test of the model
            # that has just been trained.
            checkpoint["state_dict"] = self.state_dict()
            self.on_save_checkpoint(checkpoint)
            checkpoint.pop("callbacks", None)  # which would name the old best checkpoint again
        else:
            self._fitted_from = None
            self.white_level = white_level
        if trainer.datamodule is not None and self.white_level != _white_level_of(trainer):
            msg = (
                f"The model was trained with `white_level` {self.white_level}, but the data module has "
                f"{_white_level_of(trainer)}. Give it the same: `--data.white_level {self.white_level}`."
            )
            raise ValueError(msg)

    def to_onnx(  # type: ignore[override]
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Path:
        """Export to ONNX as Anomalib does, in the operator set that torch writes.

        Anomalib asks for an older one, to which the model cannot be converted: what came of that was a traceback, and
        the model as it was.

        Args:
            export_root: Folder to write to.
            model_file_name: Name of the file, without suffix.
            input_size: Height and width of the images; any by default.
            kwargs: Further arguments of ``torch.onnx.export``.

        Returns:
            The file.
        """
        kwargs.setdefault("opset_version", _OPSET)
        return super().to_onnx(export_root, model_file_name, input_size, **kwargs)

    def teardown(self, stage: str) -> None:
        """Say where the results are."""
        super().teardown(stage)
        if stage == TrainerFn.FITTING:
            self._fitted_from = self._fitting_from  # not before: a fit that fails has fitted nothing
        report_results(self.trainer, self.visualizer, stage)

    def _was_fitted_from(self, checkpoint: Mapping[str, Any]) -> bool:
        return self._fitted_from is not None and self._fitted_from == fingerprint(checkpoint["state_dict"].values())

    def _adopt(self, saved: Mapping[str, Any]) -> None:
        """Take over the arguments of a checkpoint that were left at their defaults, whatever checkpoint came before."""
        present = dict(self.hparams)
        given = present | {name: own for name, (own, value) in self._taken.items() if present[name] == value}
        changes = self._adopted(given, saved)
        self._taken = {name: (given[name], value) for name, value in changes.items()}
        if changed := {name: value for name, value in (given | changes).items() if present[name] != value}:
            self._rebuild(changed)

    def _rebuild(self, changes: Mapping[str, Any]) -> None:
        """Build the torch model anew, with other arguments and for weights that are restored next."""
        self.hparams.update(changes)
        with WithoutInitialValues():
            self._build_model()
        self.model.to(self.device)

    def _shape_pictures(self, image_size: Sequence[int]) -> None:
        """Give the pictures the shape of the images, unless the user brought a visualizer."""
        if self._own_visualizer and isinstance(self.visualizer, ImageVisualizer):
            self.visualizer.field_size = panel_size(image_size)
            self.visualizer.text_config["size"] = LABEL_SIZE


def _has_validation_images(trainer: Any) -> bool:
    """Tell whether a trainer that starts to train will validate, in this epoch or in a later one."""
    if not trainer.enable_validation:
        return False
    trainer.fit_loop.epoch_loop.val_loop.setup_data()  # Lightning has done it if it validates in this epoch
    return sum(trainer.num_val_batches) > 0


def _white_level_of(trainer: Any) -> int:
    """Return the white level of a trainer's data, which only this package's data modules know."""
    return getattr(trainer.datamodule, _WHITE_LEVEL, WHITE_LEVEL)
