"""The classifier as an Anomalib model: trained by gradients from image labels, selected on validation images."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from anomalib import LearningType
from anomalib.data import ImageBatch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn

from anomalib_exdd.images.reading import WHITE_LEVEL
from anomalib_exdd.models.callbacks import start_run, with_shared_callbacks
from anomalib_exdd.models.callbacks.checkpoint import WHITE_LEVEL_KEY, CheckpointState, restore_checkpoint
from anomalib_exdd.models.metrics import default_evaluator
from anomalib_exdd.models.pre_processor import ONNX_OPSET, AntialiasedPreProcessor
from anomalib_exdd.models.settings import check, check_at_least, checkpoint_settings
from anomalib_exdd.models.visualization import LABEL_SIZE, SeenImageVisualizer

from .post_processor import ProbabilityPostProcessor, decide_at_even_odds
from .selection import SELECTION, EpochSelection, ValidationRecord, checkpoint_keeper
from .torch_model import DefectClassifierModel, predictions
from .training import (
    PRESETS,
    OptimizerName,
    PositiveWeight,
    PresetName,
    TrainingSettings,
    label_loss,
    label_weights,
    training_settings,
)

logger = logging.getLogger(__name__)

_DEFAULT_MAX_EPOCHS = 1000  # Lightning's, where the user gave no number of epochs
_TRAINED_WITH_KEY = "defect_classifier_training"
"""Where a checkpoint keeps the settings of its training, those of data module and trainer included."""
_MAX_LOG_ODDS = "map_reach"  # name of the logged value: the largest absolute log-odds in an epoch's maps
_TRAINING = ("image_size", "optimizer", "learning_rate", "momentum", "weight_decay")


class DefectClassifier(AnomalibModule):  # type: ignore[misc]  # Anomalib's to_onnx differs from Lightning's
    """Supervised baseline: a classifier of normal and defective images, from image labels alone.

    It needs defective training images, real or synthetic (data module ``SyntheticDefects``). The epoch that is kept,
    the end of the training and the threshold come from the validation images (``--data.val_split_ratio 0.2``); without
    any, all epochs are trained, the last one is kept, and the threshold is a probability of 0.5. The image score is a
    probability; the map is the class activation. Sources: In&Out, arXiv:2406.00501, and DIAG, arXiv:2407.03961.

    The number of epochs is the preset's (50) unless ``--trainer.max_epochs`` is given, and the batch size is the data
    module's (``--data.train_batch_size``).

    Args:
        backbone: Name of a timm model with feature maps, such as resnet50, resnet18 or convnext_tiny.
        preset: Published settings to train with. "in_and_out": SGD with learning rate 0.01, batches of 5, 600 x 200
            pixels. "diag": Adam with learning rate 0.0001, batches of 32, 704 x 256 pixels. Both: 50 epochs. What is
            given below replaces the preset's value.
        pre_trained: Start from timm's ImageNet weights (downloaded once, then cached). False: from scratch.
        weights: Local file with the backbone's weights instead: .safetensors, or .pth read without running code. Layers
            at the end that it lacks are learned from scratch, and logged.
        image_size: Height and width that images are resized to; null: the preset's. A ``pre_processor`` of your own
            replaces it.
        optimizer: "sgd" or "adam"; null: the preset's.
        learning_rate: Learning rate, constant; null: the preset's.
        momentum: Momentum of SGD; null: the preset's, none.
        weight_decay: Weight decay; null: the preset's, none.
        pos_weight: Weight in the loss of a defective image relative to a normal one. "balanced": both kinds count the
            same together, and probabilities are those for equally many good and bad parts. 1: none, as published.
        patience: Stop after so many epochs without a better average precision on validation images; null: never.
            Without defective validation images training never stops early, and the last epoch is kept.
        freeze_batch_norm: Keep the statistics of loaded batch norms. For small batches, and for files of weights whose
            batch norms are folded into the convolutions.
        seed: Seed of the weights that are learned from scratch, and of the order and the augmentations of the images.
        pre_processor: Anomalib's pre-processor; true for the default one at ``image_size``.
        post_processor: Anomalib's post-processor; true for one that does not normalise the probabilities.
        evaluator: Anomalib's evaluator (metrics).
        visualizer: Anomalib's visualizer (pictures).

    Raises:
        ValueError: If an argument is out of its range.
    """

    model: DefectClassifierModel
    validation: ValidationRecord
    loss_weights = (1.0, 1.0)  # of a normal and of a defective image
    white_level = WHITE_LEVEL  # of the training data: what is white in images of more than 8 bits
    validates = True  # whether the training has validation images to find thresholds on
    scores_are_probabilities = True
    configure_evaluator = staticmethod(default_evaluator)

    def __init__(
        self,
        backbone: str = "resnet50",
        preset: PresetName = "in_and_out",
        pre_trained: bool = True,
        weights: str | Path | None = None,
        image_size: tuple[int, int] | None = None,
        optimizer: OptimizerName | None = None,
        learning_rate: float | None = None,
        momentum: float | None = None,
        weight_decay: float | None = None,
        pos_weight: PositiveWeight = "balanced",
        patience: int | None = 10,
        freeze_batch_norm: bool = False,
        seed: int = 0,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        settings = training_settings(locals())
        if patience is not None:
            check_at_least("patience", patience, 1)
        fits = pos_weight == "balanced" or pos_weight > 0
        check("pos_weight", pos_weight, '"balanced" or a positive number', fits=fits)
        if freeze_batch_norm and not (pre_trained or weights):
            msg = "Argument `freeze_batch_norm` keeps loaded statistics, but with `pre_trained` false none are loaded."
            raise ValueError(msg)
        super().__init__(
            pre_processor=AntialiasedPreProcessor.of(
                self.configure_pre_processor(settings.image_size) if pre_processor is True else pre_processor
            ),
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.checkpoint_state = CheckpointState()
        self.trained_with: dict[str, Any] = {}
        self.build_model()

    @property
    def settings(self) -> TrainingSettings:
        """The settings of the training: the preset's, replaced by the arguments that were given."""
        return training_settings(self.hparams)

    def build_model(self) -> None:
        """Build the torch model from the hyper-parameters."""
        names = ("backbone", "pre_trained", "weights", "freeze_batch_norm", "seed")
        self.model = DefectClassifierModel(**{name: self.hparams[name] for name in names})
        self.validation = ValidationRecord()

    @property
    def learning_type(self) -> LearningType:
        """One-class for Anomalib's engine, which fits, validates and tests models of this type."""
        return LearningType.ONE_CLASS

    @classmethod
    def configure_visualizer(cls) -> SeenImageVisualizer:
        """Draw the images as the model sees them."""
        return SeenImageVisualizer(text_config={"size": LABEL_SIZE})

    @classmethod
    def configure_pre_processor(cls, image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Resize to ``image_size`` (height, width), by default that of In&Out, and normalise as ImageNet."""
        return super().configure_pre_processor(image_size or PRESETS["in_and_out"].image_size)

    @staticmethod
    def configure_post_processor() -> ProbabilityPostProcessor:
        """Find the threshold on validation images; scores stay probabilities."""
        return ProbabilityPostProcessor()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Build the optimizer of all weights."""
        settings = self.settings
        rate, decay = settings.learning_rate, settings.weight_decay
        if settings.optimizer == "adam":
            return torch.optim.Adam(self.model.parameters(), rate, weight_decay=decay)
        return torch.optim.SGD(self.model.parameters(), rate, momentum=settings.momentum, weight_decay=decay)

    def configure_callbacks(self) -> list[Callback]:
        """Add the shared callbacks, the choice of the epoch, and early stopping unless the user has one."""
        callbacks = [*with_shared_callbacks(super().configure_callbacks()), EpochSelection()]
        present = [] if self._trainer is None else cast("Any", self.trainer).callbacks
        patience = self.hparams["patience"]
        if patience is not None and not any(isinstance(each, EarlyStopping) for each in present):
            callbacks.append(EarlyStopping(SELECTION, patience=patience, mode="max"))
        return callbacks

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """No validation before training; epochs and devices are the user's."""
        return {"num_sanity_val_steps": 0}

    def setup(self, stage: str) -> None:
        """Check and prepare the trainer."""
        start_run(self, stage)

    def on_fit_start(self) -> None:
        """Set the number of epochs, and load the backbone's weights if no checkpoint was restored."""
        loop = self.trainer.fit_loop
        if self.trainer.current_epoch and self.checkpoint_state.fitting_from is None:
            msg = "The trainer has trained before: use a new Engine, or go on from a checkpoint (`ckpt_path`)."
            raise ValueError(msg)
        if loop.max_epochs == _DEFAULT_MAX_EPOCHS:
            loop.max_epochs = self.settings.max_epochs
        self.model.load_weights()
        self.train()
        # Anomalib 2.7's command line reads `--seed_everything` and does not apply it.
        torch.manual_seed(self.hparams["seed"])

    def on_train_epoch_start(self) -> None:
        """Let order and augmentations depend on ``seed`` and epoch alone."""
        super().on_train_epoch_start()
        if self.current_epoch > 0:  # Lightning has begun with the images of the first one before
            torch.manual_seed(self.hparams["seed"] + self.current_epoch)

    def on_train_start(self) -> None:
        """Set the weights of the classes by the number of their training images, and log the settings."""
        super().on_train_start()
        if not self.validates:
            logger.warning(
                "There are no validation images: the last epoch is kept, and the threshold is a probability of 0.5. "
                "For the best epoch and a threshold of its own, give `--data.val_split_ratio 0.2`."
            )
        loader: Any = self.trainer.train_dataloader
        samples = loader.dataset.samples
        defective = int((samples["label_index"] == 1).sum())
        normal = len(samples) - defective
        self.loss_weights = label_weights(normal, defective, self.hparams["pos_weight"])
        patience = self.hparams["patience"]
        for callback in cast("Any", self.trainer).early_stopping_callbacks:
            if callback.monitor == SELECTION:  # its state, restored from a checkpoint, has the patience of that one
                callback.patience = math.inf if patience is None else patience
        settings = self.settings
        batch_size = loader.batch_size * self.trainer.world_size * self.trainer.accumulate_grad_batches
        self.trained_with = {
            "backbone": self.hparams["backbone"],
            "preset": self.hparams["preset"],
            **{name: getattr(settings, name) for name in _TRAINING},
            "batch_size": batch_size,
            "max_epochs": self.trainer.max_epochs,
            "label_weights": self.loss_weights,
        }
        logger.info(
            "Training with %s; %d normal images count %.3g each, %d defective ones %.3g.",
            ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in self.trained_with.items()),
            *(normal, self.loss_weights[0], defective, self.loss_weights[1]),
        )
        if batch_size != settings.batch_size:
            message = "The preset %s was published with batches of %d images, but a step takes %d (train_batch_size)."
            logger.warning(message, self.hparams["preset"], settings.batch_size, batch_size)

    def training_step(self, batch: ImageBatch, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss of a batch."""
        activation = self.model.activation(cast("Tensor", batch.image))
        logits = activation.mean(dim=(1, 2))
        loss = label_loss(logits, cast("Tensor", batch.gt_label), self.loss_weights)
        epoch: Any = {"on_step": False, "on_epoch": True, "batch_size": len(logits), "sync_dist": True}
        self.log("train_loss", loss.detach(), prog_bar=True, **epoch)
        if not self.validates:
            self.log(_MAX_LOG_ODDS, activation.detach().abs().amax(), reduce_fx="max", logger=False, **epoch)
        return loss

    def on_train_epoch_end(self) -> None:
        """Without validation images, set the threshold to a probability of 0.5, and select the last epoch."""
        super().on_train_epoch_end()
        if self.validates:
            return
        # The maximum of all processes. It has to be logged: the first process's progress bar reads the values logged
        # before this, and another exchange between processes here would deadlock with that.
        max_log_odds = float(cast("Any", self.trainer).callback_metrics[_MAX_LOG_ODDS])
        if isinstance(self.post_processor, PostProcessor):
            decide_at_even_odds(self.post_processor, max_log_odds)
        self.log(SELECTION, float(self.current_epoch), sync_dist=True)

    def validation_step(self, batch: ImageBatch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Predict a batch for threshold and normalisation, and add it to the record of the epoch."""
        images = cast("Tensor", batch.image)
        activation = self.model.activation(images)
        logits, labels = activation.mean(dim=(1, 2)), cast("Tensor", batch.gt_label)
        self.validation.update(logits, labels, label_loss(logits, labels, self.loss_weights))
        return cast("STEP_OUTPUT", batch.update(**predictions(activation, images)._asdict()))

    def on_validation_epoch_end(self) -> None:
        """Log the values by which epochs are compared."""
        values = self.validation.compute(self.current_epoch)
        shown = {name: value for name, value in values.items() if name != SELECTION}
        if not shown and self.current_epoch == 0:
            logger.warning("Validation images of one kind: training does not stop early, and the last epoch is kept.")
        self.log_dict(shown, prog_bar=True, sync_dist=True)  # the same in all processes already
        self.log(SELECTION, values[SELECTION], sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the settings of the training, which a later version's preset may not have, and how images are read."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["hyper_parameters"] |= {name: getattr(self.settings, name) for name in _TRAINING}
        checkpoint.update({WHITE_LEVEL_KEY: self.white_level, _TRAINED_WITH_KEY: self.trained_with})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the checkpoint's settings."""
        super().on_load_checkpoint(checkpoint)
        restore_checkpoint(self, self._trainer, checkpoint)
        self.trained_with = dict(checkpoint.get(_TRAINED_WITH_KEY, {}))

    def adopt_settings(self, given: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments that change to those that a checkpoint was trained with."""
        return checkpoint_settings(DefectClassifier, given, saved, fixed={"backbone", *_TRAINING})

    def prepare_fit_from(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the next epoch, and let the checkpoint callback know the best one so far, in another folder."""
        keeper = checkpoint_keeper(self.trainer)
        for state in checkpoint.get("callbacks", {}).values():
            if isinstance(state, dict) and state.get("monitor") == SELECTION and keeper is not None:
                # Lightning forgets the scores of another folder.
                state.update(dirpath=keeper.dirpath, last_model_path="")

    def to_onnx(self, *args: Any, **kwargs: Any) -> Path:  # type: ignore[override]
        """Export to ONNX, which OpenVINO is made from too."""
        return super().to_onnx(*args, **{"opset_version": ONNX_OPSET} | kwargs)
