"""The classifier as an Anomalib model: trained by gradients from image labels, selected on validation images."""

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from anomalib.data import ImageBatch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn

from anomalib_exdd.models.callbacks.checkpoint import Inspection
from anomalib_exdd.models.pre_processor import AntialiasedPreProcessor
from anomalib_exdd.models.settings import check_at_least, checkpoint_settings, default_arguments

from .loss import LabelLoss, PositiveWeight
from .post_processor import ProbabilityPostProcessor, decide_at_even_odds
from .presets import OptimizerName, PresetName, in_force
from .selection import (
    SELECTION,
    ResumePoint,
    ValidationRecord,
    best_checkpoint,
    carry_over_best,
    check_monitors,
    checkpoint_keeper,
    keep_best,
)
from .torch_model import DefectClassifierModel, predictions

logger = logging.getLogger(__name__)

NO_LIMIT = 1000
"""What Lightning makes of a number of epochs that nobody gave."""
TRAINED_WITH = "defect_classifier_training"
"""Where a checkpoint keeps the settings of its training, those of data module and trainer included."""

_MAP_REACH = "map_reach"  # name of the logged value: the largest absolute log-odds in an epoch's maps
_FIXED = frozenset({"backbone", "image_size", "optimizer", "learning_rate", "momentum", "weight_decay"})
_TRAINING = ("image_size", "optimizer", "learning_rate", "momentum", "weight_decay")


class DefectClassifier(Inspection, AnomalibModule):  # type: ignore[misc]  # Anomalib's to_onnx differs from Lightning's
    """Supervised baseline: a classifier of normal and defective images, from image labels alone.

    The fair answer to "why not just train a classifier?". It needs defective training images, real or synthetic (data
    module ``SyntheticDefects``). The epoch that is kept, the end of the training and the threshold come from the
    validation images (``--data.val_split_ratio 0.2``); without any, all epochs are trained, the last one is kept, and
    the threshold is a probability of 0.5. The image score is a probability; the map is the classifier's own (class
    activation). Sources: In&Out, arXiv:2406.00501, and DIAG, arXiv:2407.03961.

    The number of epochs is the preset's (50) unless ``--trainer.max_epochs`` is given, and the batch size is the data
    module's (``--data.train_batch_size``).

    Args:
        backbone: Name of a timm model with feature maps, such as resnet50, resnet18 or convnext_tiny.
        preset: Published settings to train with. "in_and_out": SGD with learning rate 0.01, batches of 5, 600 x 200
            pixels. "diag": Adam with learning rate 0.0001, batches of 32, 704 x 256 pixels. Both: 50 epochs. What is
            given below replaces the preset's value.
        pre_trained: Start from timm's ImageNet weights (downloaded once, then cached). False: from scratch.
        weights: Local file with the backbone's weights instead: .safetensors, or .pth read without running code. Layers
            at the end that it lacks are learned from scratch; a line says which.
        image_size: Height and width that images are resized to; null: the preset's. A ``pre_processor`` of your own
            replaces it.
        optimizer: "sgd" or "adam"; null: the preset's.
        learning_rate: Learning rate, constant; null: the preset's.
        momentum: Momentum of SGD; null: the preset's, none.
        weight_decay: Weight decay; null: the preset's, none.
        pos_weight: How many times as much as a normal image a defective one counts in the loss. "balanced": so many
            that both kinds count the same together; probabilities are then those for equally many good and bad parts.
            1: no weights, as published.
        patience: Stop after so many epochs without a better average precision on validation images; null: never.
            Without defective validation images training never stops early, and the last epoch is kept.
        freeze_batch_norm: Keep the statistics of loaded batch norms. For small batches, and for files of weights whose
            batch norms are folded into the convolutions.
        seed: Seed of the weights that are learned from scratch. The order of the images is ``--seed_everything``'s.
        pre_processor: Anomalib's pre-processor; true for the default one at ``image_size``.
        post_processor: Anomalib's post-processor; true for one that finds the threshold and leaves the scores
            probabilities.
        evaluator: Anomalib's evaluator (metrics).
        visualizer: Anomalib's visualizer (pictures).

    Raises:
        ValueError: If an argument is out of its range.
    """

    model: DefectClassifierModel
    loss: LabelLoss
    validation: ValidationRecord
    scores_are_probabilities = True

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
        given = {name: value for name, value in locals().items() if name not in {"self", "__class__"}}
        settings = in_force(given)
        if patience is not None:
            check_at_least("patience", patience, 1)
        if pos_weight != "balanced" and not float(pos_weight) > 0:
            msg = f'Argument `pos_weight` has to be "balanced" or a positive number, but got {pos_weight}.'
            raise ValueError(msg)
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
        self._own_visualizer = visualizer is True
        self.trained_with: dict[str, Any] = {}
        self._build_model()

    @property
    def settings(self) -> Any:
        """The settings in force as attributes: the arguments, completed by the preset."""
        return SimpleNamespace(**{**self.hparams, **asdict(in_force(self.hparams))})

    def _build_model(self) -> None:
        """Build the torch model, and what depends on the settings, from the hyper-parameters."""
        settings = self.settings
        self._shape_pictures(settings.image_size)
        self.model = DefectClassifierModel(
            settings.backbone,
            pre_trained=settings.pre_trained,
            weights=settings.weights,
            freeze_batch_norm=settings.freeze_batch_norm,
            seed=settings.seed,
        )
        self.loss = LabelLoss(settings.pos_weight)
        self.validation = ValidationRecord(self.loss)

    @classmethod
    def configure_pre_processor(cls, image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Resize to ``image_size`` (height, width), by default that of In&Out, and normalise as ImageNet."""
        return super().configure_pre_processor(image_size or in_force({"preset": "in_and_out"}).image_size)

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
        """Add the end of the training, unless the user has one, and the point to resume at."""
        callbacks = [*super().configure_callbacks(), ResumePoint()]
        present = [] if self._trainer is None else cast("Any", self.trainer).callbacks
        if self.settings.patience is not None and not any(isinstance(each, EarlyStopping) for each in present):
            callbacks.append(EarlyStopping(SELECTION, patience=self.settings.patience, mode="max"))
        return callbacks

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """No validation before training; epochs and devices are the user's."""
        return {"num_sanity_val_steps": 0}

    def setup(self, stage: str) -> None:
        """Choose the checkpoint that is kept, before Lightning looks for its state in one to resume from."""
        super().setup(stage)
        if stage == TrainerFn.FITTING:
            keep_best(checkpoint_keeper(self.trainer))

    def on_fit_start(self) -> None:
        """Set the number of epochs, and load the backbone's weights where no checkpoint has brought them.

        Raises:
            ValueError: If the trainer has trained before, and goes on from no checkpoint.
        """
        loop = self.trainer.fit_loop
        if self.trainer.current_epoch and self._fitting_from is None:
            msg = (
                "The trainer has trained before: it would compare this training's epochs with those of that one, and "
                "train fewer of them or none. The model stays as it was. Train with a new Engine, or go on from a "
                "checkpoint (`ckpt_path`)."
            )
            raise ValueError(msg)
        if loop.max_epochs == NO_LIMIT:
            loop.max_epochs = self.settings.max_epochs
        self.model.load_weights()
        self.train()

    def on_train_start(self) -> None:
        """Weigh the classes by the number of their training images, and say what is in force.

        Raises:
            ValueError: If the training images are of one kind only, or their labels are not known before training; if a
                callback waits for a validation, and there are no validation images.
        """
        super().on_train_start()
        if not self.validates:
            check_monitors(cast("Any", self.trainer).callbacks)
            logger.warning(
                "There are no validation images: all epochs are trained, the last one is kept, and the threshold is a "
                "probability of 0.5. For the best epoch and a threshold of its own, give `--data.val_split_ratio 0.2`."
            )
        loader: Any = self.trainer.train_dataloader
        samples = getattr(getattr(loader, "dataset", None), "samples", None)
        if samples is None:
            msg = (
                "A classifier counts its training images by label, in the table `samples` of Anomalib's data sets. "
                "Train with a data module of Anomalib or of this package."
            )
            raise ValueError(msg)
        defective = int((samples["label_index"] == 1).sum())
        self.loss.count(len(samples) - defective, defective)
        settings = self.settings
        for callback in cast("Any", self.trainer).early_stopping_callbacks:
            if callback.monitor == SELECTION:  # its state, restored from a checkpoint, has the patience of that one
                callback.patience = math.inf if settings.patience is None else settings.patience
        batch_size = loader.batch_size * self.trainer.world_size * self.trainer.accumulate_grad_batches
        self.trained_with = {
            **{name: getattr(settings, name) for name in ("backbone", "preset", *_TRAINING)},
            "batch_size": batch_size,
            "max_epochs": self.trainer.max_epochs,
            "label_weights": self.loss.weights,
        }
        logger.info(
            "Training %s (preset %s): %s, learning rate %g, momentum %g, weight decay %g, batches of %d, at most %d "
            "epochs, images of %d x %d; %d normal images count %.3g each, %d defective ones %.3g.",
            *(settings.backbone, settings.preset, settings.optimizer, settings.learning_rate, settings.momentum),
            *(settings.weight_decay, batch_size, self.trainer.max_epochs, *settings.image_size),
            *(len(samples) - defective, self.loss.weights[0], defective, self.loss.weights[1]),
        )
        if batch_size != settings.batch_size:
            logger.warning(
                "The preset %s was published with batches of %d images, but a step takes %d. For the published size: "
                "`--data.train_batch_size %d`%s.",
                *(settings.preset, settings.batch_size, batch_size, settings.batch_size),
                ", divided by the number of processes" if self.trainer.world_size > 1 else "",
            )

    def training_step(self, batch: ImageBatch, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss of a batch."""
        activation = self.model.activation(cast("Tensor", batch.image))
        logits = activation.mean(dim=(1, 2))
        loss: Tensor = self.loss(logits, batch.gt_label)
        epoch: Any = {"on_step": False, "on_epoch": True, "batch_size": len(logits), "sync_dist": True}
        self.log("train_loss", loss.detach(), prog_bar=True, **epoch)
        if not self.validates:
            self.log(_MAP_REACH, activation.detach().abs().amax(), reduce_fx="max", logger=False, **epoch)
        return loss

    def on_train_epoch_end(self) -> None:
        """Where nothing is validated, decide at even odds, and make later epochs better ones."""
        super().on_train_epoch_end()
        if self.validates:
            return
        # Of all processes. It has to be logged: the first process's progress bar reads what was logged before this, and
        # another exchange between processes here would wait for that one for ever.
        reach = float(cast("Any", self.trainer).callback_metrics[_MAP_REACH])
        if isinstance(self.post_processor, PostProcessor):
            decide_at_even_odds(self.post_processor, reach)
        self.log(SELECTION, float(self.current_epoch), sync_dist=True)

    def validation_step(self, batch: ImageBatch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Predict a batch for threshold and normalisation, and take it into the record of the epoch."""
        images = cast("Tensor", batch.image)
        activation = self.model.activation(images)
        self.validation.update(activation.mean(dim=(1, 2)), cast("Tensor", batch.gt_label))
        found = predictions(activation, (images.shape[-2], images.shape[-1]))
        return cast("STEP_OUTPUT", batch.update(**found._asdict()))

    def on_validation_epoch_end(self) -> None:
        """Log what the epochs are compared by."""
        values = self.validation.compute(self.current_epoch)
        shown = {name: value for name, value in values.items() if name != SELECTION}
        if not shown and self.current_epoch == 0:
            logger.warning(
                "The validation images are of one kind only: training does not stop early, and the last epoch is kept."
            )
        self.log_dict(shown, prog_bar=True, sync_dist=True)  # the same in all processes already
        self.log(SELECTION, values[SELECTION], sync_dist=True)

    def on_fit_end(self) -> None:
        """Go on with the weights and the threshold of the best epoch: the engine tests the model as it is."""
        best = best_checkpoint(checkpoint_keeper(self.trainer))
        if best is None:
            return
        content = torch.load(best, map_location=self.device, weights_only=True)
        self.load_state_dict(content["state_dict"])
        logger.info("Epoch %d is kept, of %d.", content["epoch"] + 1, self.trainer.current_epoch)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the settings in force, whatever a preset may mean one day."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["hyper_parameters"] |= {name: getattr(self.settings, name) for name in _TRAINING}
        checkpoint[TRAINED_WITH] = self.trained_with

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what the model was trained with."""
        super().on_load_checkpoint(checkpoint)
        self.trained_with = dict(checkpoint.get(TRAINED_WITH, {}))

    def _adopted(self, given: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
        return checkpoint_settings(given, default_arguments(DefectClassifier), saved, _FIXED)

    def _fit_from(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the next epoch, and know the best one so far."""
        carry_over_best(checkpoint, checkpoint_keeper(self.trainer))
