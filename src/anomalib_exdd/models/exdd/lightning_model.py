"""ExDD as an Anomalib model: builds the banks during one pass over the training images."""

import inspect
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from anomalib import LearningType
from anomalib.data import ImageBatch
from anomalib.deploy import CompressionType
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule, MemoryBankMixin
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn

from anomalib_exdd.images.reading import WHITE_LEVEL
from anomalib_exdd.models.callbacks import start_run, with_shared_callbacks
from anomalib_exdd.models.callbacks.checkpoint import WHITE_LEVEL_KEY, CheckpointState, restore_checkpoint
from anomalib_exdd.models.callbacks.distributed import GradientAnchor
from anomalib_exdd.models.metrics import default_evaluator
from anomalib_exdd.models.pre_processor import ONNX_OPSET, AntialiasedPreProcessor
from anomalib_exdd.models.visualization import LABEL_SIZE
from anomalib_exdd.search import SearchBackend

from . import bank_editing
from .arguments import adopted_settings, check_settings
from .calibration_set import normal_distance, training_distances
from .decisions import Decisions, Thresholds
from .explanation import Explanation, explain_image, reasons_of
from .explanation_pictures import DecisionVisualizer
from .export import compress, export_metadata, write_metadata
from .kind_table import KindTable
from .memory_bank import BankPrecision
from .scoring import ScoringName
from .torch_model import ExDDModel
from .training import BankBuilder, BankSettings, PositivePatches
from .training_stores import FeatureStoreName, ReleaseStores, TrainingStores, features_identity

logger = logging.getLogger(__name__)

_HISTORY_KEY = "exdd_history"  # where a checkpoint keeps what was done to the banks after training


class ExDD(MemoryBankMixin, AnomalibModule):  # type: ignore[misc]  # Anomalib's to_onnx differs from Lightning's
    """Dual memory banks: finds and locates defects by their distance to normal and to known defective patches.

    Training takes one pass: the patches of normal images fill the negative bank, the defect patches of defective images
    the positive one; each is reduced to a coreset. Without any defective training image ExDD works with the negative
    bank alone, like PatchCore. Source: Aqeel, Leonardi & Setti, arXiv:2507.15335.

    Args:
        backbone: Name of a timm model that supports ``features_only``; or "filter_bank", fixed filters that need no
            weights, for trying things out.
        layers: Layers of the backbone to take features from, the one with the finest grid first.
        pre_trained: Take timm's ImageNet weights (downloaded once, then cached). False: a fixed random network.
        weights: Local file with the backbone's weights instead: .safetensors, or .pth read without running code.
        image_size: Height and width that images are resized to. A ``pre_processor`` of your own replaces it.
        tile_size: For large images: height and width of the tiles in which the backbone sees them; null: as a whole.
        tile_overlap: Pixels that neighbouring tiles share. With enough of them the features are those of whole images.
        negative_ratio: Share of the normal patches that the negative bank keeps.
        positive_ratio: Share of the defect patches that the positive bank keeps.
        negative_minimum: Entries that the negative bank keeps at least, if there are as many patches.
        positive_minimum: Entries that the positive bank keeps at least, if there are as many patches.
        positive_patches: Where defect patches come from. "mask": the patches that the defect covers (paper), and of a
            box around a defect (annotation files) those that are less like normal ones than is usual. "crop": all
            patches of the bounding box around each defect, squashed to 128 x 128 (thesis and published code).
            "farthest": no masks needed; of every defective image the few patches that are least like normal ones. Use
            it where masks would cost more than the better localisation that they bring.
        min_coverage: With "mask", the share of a patch that must be defect for it to belong. Every defect keeps at
            least the patch that holds most of it.
        projected_dimension: Dimension of the Gaussian projection in which the coresets are selected.
        scoring: How the map is scored. "calibrated": the probability of a defect from the distances to both banks and a
            learnt boundary, weighted by the training images; without defects like "normal". "ratio": distance to normal
            over distance to defects, patch by patch. "normal": distance to normal alone (PatchCore). "paper": equations
            12-23 as printed. "published": as the published code computes them, its pooling without padding included.
            All but "calibrated" find Anomalib's threshold on validation images (``--data.val_split_ratio 0.2``).
        image_scoring: How images are scored, one of the same names; "auto" takes the rule that belongs to ``scoring``,
            and with "ratio" the one that did best on validation data, "normal". "calibrated" is a probability.
        top_fraction: With "calibrated", the share of an image's patches, the highest, whose mean makes its score.
        false_reject_rate: Share of good images that may be rejected. It sets the threshold ``reject``, from the
            training images, and may be changed after training.
        false_accept_rate: Share of defective images that may be accepted. It sets the threshold ``accept``; images
            between the two are for review.
        defect_rate: Share of defective images among those to come, for the probability; null: the training images'.
        unknown_rate: Share of the defects to come that are of a kind that training has not seen. The higher, the more
            counts how far an image is from normal ones, and the less whether it resembles known defects.
        synthetic_weight: How much a synthetic defect (data module ``SyntheticDefects``) counts as evidence for the
            calibration, 0 to 1; a real one counts 1. Without any real defect they count nothing, unless this is 1.
            Its patches are in the positive bank at any weight.
        explain: With ``predict``, explain so many of the highest patches of every image: their nearest normal and
            defect training patches, side by side, as pictures and JSON in the folder ``explanations``.
        record: With ``predict``, an SQLite file to write every prediction into as well; see ``docs/review.md``.
        num_neighbors: Size of the neighbourhood in the bank that the scores' weights depend on.
        sigma: Standard deviation of the map's Gaussian blur in pixels; null: the scoring's own (paper 2, others 4).
        search: Nearest-neighbour search: "torch", "faiss", or "auto" for one of them; all exact, with the same scores.
        bank_precision: How the banks are stored, "float32" or "float16": half the checkpoint, and scores that differ by
            rounding.
        feature_store: Where the features of the training images wait until the banks are selected: "memory"; "disk", in
            half precision, from where an interrupted training goes on; "auto": on disk from 2 GiB. The same patches are
            selected in either.
        feature_store_dir: Folder for "disk"; null: the user's cache.
        seed: Seed of the projection and of the coresets' first centres. The banks depend on nothing else that is
            random: not on the batch size, the number of workers or the order of the images.
        pre_processor: Anomalib's pre-processor; true for the default one at ``image_size``.
        post_processor: Anomalib's post-processor (thresholds, normalisation).
        evaluator: Anomalib's evaluator (metrics).
        visualizer: Anomalib's visualizer (pictures).

    Raises:
        ValueError: If an argument is out of its range.
    """

    model: ExDDModel
    white_level = WHITE_LEVEL  # of the training data: what is white in images of more than 8 bits
    validates = True  # whether the training has validation images to find thresholds on
    configure_evaluator = staticmethod(default_evaluator)
    pre_processor: Any
    history: list[dict[str, Any]]
    """What was done to the banks after training: action, source, entries, date and, if given, kind of each change."""

    def __init__(
        self,
        backbone: str = "wide_resnet50_2",
        layers: Sequence[str] = ("layer2", "layer3"),
        pre_trained: bool = True,
        weights: str | Path | None = None,
        image_size: tuple[int, int] = (632, 224),
        tile_size: int | None = None,
        tile_overlap: int = 256,
        negative_ratio: float = 0.02,
        positive_ratio: float = 0.1,
        negative_minimum: int = 1000,
        positive_minimum: int = 2000,
        positive_patches: PositivePatches = "mask",
        min_coverage: float = 0.25,
        projected_dimension: int = 128,
        scoring: ScoringName = "calibrated",
        image_scoring: ScoringName | Literal["auto"] = "auto",
        top_fraction: float = 0.01,
        false_reject_rate: float = 0.01,
        false_accept_rate: float = 0.05,
        defect_rate: float | None = None,
        unknown_rate: float = 0.1,
        synthetic_weight: float = 0.3,
        explain: int = 0,
        record: str | Path | None = None,
        num_neighbors: int = 3,
        sigma: float | None = None,
        search: SearchBackend = "auto",
        bank_precision: BankPrecision = "float32",
        feature_store: FeatureStoreName = "auto",
        feature_store_dir: str | Path | None = None,
        seed: int = 0,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        super().__init__(
            pre_processor=AntialiasedPreProcessor.of(
                self.configure_pre_processor((image_size[0], image_size[1])) if pre_processor is True else pre_processor
            ),
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.builder: BankBuilder | None = None
        self.history = []
        self.checkpoint_state = CheckpointState()
        self.gradient_anchor = GradientAnchor()
        self.build_model()

    @property
    def settings(self) -> BankSettings:
        """What banks and calibration set are built by, of the constructor's arguments."""
        return BankSettings.of(self.hparams)

    def build_model(self) -> None:
        """Build the torch model from the hyper-parameters."""
        if self.hparams["search"] == "approximate":  # a search that was removed; old checkpoints name it
            self.hparams["search"] = "auto"
        check_settings(ExDD, self.hparams)
        self.model = ExDDModel(**{name: self.hparams[name] for name in inspect.signature(ExDDModel).parameters})

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> "ExDD":  # type: ignore[override]
        """Load a model as Anomalib does, which knows no model's own type."""
        return cast("ExDD", super().load_from_checkpoint(*args, **kwargs))

    @property
    def learning_type(self) -> LearningType:
        """One-class for Anomalib's engine, which fits, validates and tests models of this type."""
        return LearningType.ONE_CLASS

    @classmethod
    def configure_visualizer(cls) -> DecisionVisualizer:
        """Draw the images as the model sees them, with the decision."""
        return DecisionVisualizer(text_config={"size": LABEL_SIZE})

    @classmethod
    def configure_pre_processor(cls, image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Resize to ``image_size`` (height, width), by default the paper's (632, 224), and normalise as ImageNet."""
        return super().configure_pre_processor(image_size or (632, 224))

    @staticmethod
    def configure_optimizers() -> None:
        """Return no optimizer: nothing is trained by gradients."""

    def configure_callbacks(self) -> list[Callback]:
        """Add the shared callbacks, what lets an interrupted training go on, and the table of kinds."""
        return [*with_shared_callbacks(super().configure_callbacks()), ReleaseStores(), KindTable()]

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """One pass over the training images, and no validation before it."""
        return {"gradient_clip_val": 0, "max_epochs": 1, "num_sanity_val_steps": 0, "check_val_every_n_epoch": 1}

    def setup(self, stage: str) -> None:
        """Plan one pass over the training images."""
        start_run(self, stage)
        if stage == TrainerFn.FITTING:
            loop: Any = self.trainer.fit_loop
            loop.max_epochs = loop.epoch_progress.current.processed + 1  # also if the trainer has trained before

    def on_fit_start(self) -> None:
        """Start from empty banks, also where the model was fitted before, and from a backbone with weights."""
        self.model.feature_extractor.load_weights()  # not in setup: a checkpoint may be restored in between
        self.clear()
        stores = TrainingStores(
            self.hparams["feature_store"],
            self.hparams["feature_store_dir"],
            lambda: 0 if self._trainer is None else len(cast("Any", self.trainer.train_dataloader).dataset),
            lambda: features_identity(self),
        )
        self.builder = BankBuilder(self.model, self.settings, stores)

    def clear(self) -> None:
        """Empty the banks, and drop what was learnt from them and what has been collected for them."""
        self._is_fitted = torch.tensor([False], device=self.device)
        model = self.model
        learnt = (model.boundary, model.refinement, model.calibration_set, model.calibration)
        for part in (model.negative_bank, model.positive_bank, *learnt):
            part.clear()
        for buffer in self._thresholds().values():
            buffer.fill_(math.nan)
        self.history = []
        self.builder = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what a fit collects, which may be in files: it belongs to its trainer."""
        return {**super().__getstate__(), "builder": None}

    def training_step(self, batch: ImageBatch, *args: Any, **kwargs: Any) -> Tensor:
        """Collect the patches of a batch: of normal images for the negative, of defects for the positive bank."""
        cast("BankBuilder", self.builder).add_batch(batch)
        return self.gradient_anchor()

    def fit(self) -> None:
        """Select the coresets, fill the banks, and calibrate.

        Raises:
            ValueError: If no normal image was seen.
        """
        if self.builder is None:
            msg = "There are no patches to build banks from: train the model, or load a trained checkpoint."
            raise RuntimeError(msg)
        self.builder.build()
        self.calibrate(learn_boundary=False)  # the builder has learnt it
        self.builder = None
        if not self.validates and any(threshold.isnan() for threshold in self._thresholds().values()):
            logger.warning(
                "There are no validation images to find thresholds on: predicted labels and masks mean nothing. Give "
                "`--data.val_split_ratio 0.2`, or let `--model.scoring calibrated` find them on the training images."
            )

    def calibrate(self, *, learn_boundary: bool = True) -> None:
        """Fit the calibrated score to the banks, and with ``learn_boundary`` first the boundary."""
        bank = self.model.positive_bank
        positives, negatives = len(bank.sources) - len(bank.origins), len(self.model.negative_bank.sources)
        if not bank.sources:
            logger.warning(
                "There are no defective training images: scores order images by their distance to normal ones, but are "
                "no probabilities."
            )
        # Rule of succession: a rate of zero does not follow from few images.
        rate = self.hparams["defect_rate"] or (positives + 1) / (positives + negatives + 2)
        weight = self.settings.synthetic_weight
        if learn_boundary:
            self.model.learn_boundary(weight, self.settings.seed)
        thresholds = self.model.calibrate(rate, self.hparams["unknown_rate"], weight)
        if thresholds is None:
            logger.warning("There is one normal training image only, too few to calibrate: scores are raw.")
        # Anomalib's post-processor finds those that no calibration gives on validation images.
        scorings = {"image": self.model.image_scoring, "pixel": self.model.scoring}
        for name, buffer in self._thresholds().items():
            if scorings[name.partition("_")[0]] == "calibrated":
                buffer.fill_(math.nan if thresholds is None else getattr(thresholds, name))
        if self.decisions is not None:
            logger.info("%s", self.decisions)

    def _thresholds(self) -> dict[str, Tensor]:
        """Return the buffers of Anomalib's post-processor by the names of :class:`Thresholds`; none without it."""
        if not isinstance(self.post_processor, PostProcessor):
            return {}
        names = {name: f"_{name}" if name.endswith("threshold") else name for name in Thresholds._fields}
        return {name: getattr(self.post_processor, buffer) for name, buffer in names.items()}

    @property
    def decisions(self) -> Decisions | None:
        """The thresholds of accept, review and reject; None if images are not scored by a fitted calibration."""
        if self.model.image_scoring != "calibrated" or not self.model.calibration.is_fitted:
            return None
        return self.model.calibration.decisions(self.hparams["false_reject_rate"], self.hparams["false_accept_rate"])

    info = bank_editing.bank_info
    teach = bank_editing.teach
    teach_good = bank_editing.teach_good
    forget = bank_editing.forget

    def facts(self) -> dict[str, Any]:
        """Return what a record keeps of this state of the model: thresholds, and how far training images are."""
        decisions, distances = self.decisions, training_distances(self.model)
        return {
            "decisions": None if decisions is None else decisions._asdict(),
            "training_distances": [] if distances is None else distances.tolist(),
        }

    def explain(self, image_CHW: Tensor, source: str, count: int = 3) -> Explanation:
        """Explain the score of an image by the training patches that are nearest to its highest patches.

        :func:`.draw_explanation` draws the explanation, given this model too; ``str()`` of it is in words.

        Args:
            image_CHW: The image, RGB, float32 in 0..1, shape (3, H, W), not yet resized.
            source: Its path, for the explanation's text and picture.
            count: Patches to explain, at most.
        """
        return explain_image(self.model, bank_editing.pre_processed(self, image_CHW)[0], source, count, self.decisions)

    def validation_step(self, batch: ImageBatch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Predict a batch, for thresholds and normalisation."""
        scored = self.model.score_images(cast("Tensor", batch.image))
        updated: Any = batch.update(pred_score=scored.scores.images, anomaly_map=scored.anomaly_map)
        updated.normal_distance = normal_distance(scored.scores.negative.nearest)
        if decisions := self.decisions:
            # Before Anomalib's post-processor replaces the scores by normalised ones.
            updated.reasons = reasons_of(self.model, scored, decisions)
            updated.explanation = [
                decisions.describe(probability, reasons.image)
                for probability, reasons in zip(scored.scores.images.tolist(), updated.reasons, strict=True)
            ]
        return cast("STEP_OUTPUT", updated)

    # Pictures, metrics and predictions show the same decisions.
    test_step = predict_step = validation_step  # type: ignore[assignment]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save how images are read, and what was done to the banks after training."""
        super().on_save_checkpoint(checkpoint)
        checkpoint.update({WHITE_LEVEL_KEY: self.white_level, _HISTORY_KEY: self.history})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the checkpoint's settings, and restore what was done to the banks after training."""
        super().on_load_checkpoint(checkpoint)
        restore_checkpoint(self, self._trainer, checkpoint)
        self.history = list(checkpoint.get(_HISTORY_KEY, []))

    adopt_settings = adopted_settings

    def prepare_fit_from(self, checkpoint: dict[str, Any]) -> None:
        """Drop the checkpoint's finished epochs: the banks are built anew."""
        logger.warning("Fitting from a checkpoint: its memory banks are dropped and built anew from the data.")
        checkpoint.pop("loops", None)
        checkpoint.update(epoch=0, global_step=0)

    def to_onnx(self, *args: Any, **kwargs: Any) -> Path:  # type: ignore[override]
        """Export to ONNX, which OpenVINO is made from too, with :func:`.export_metadata` in the file."""
        if self.hparams["tile_size"] is not None:
            msg = "ONNX and OpenVINO cannot express tiles: export with `--export_type torch`, or train without tiles."
            raise ValueError(msg)
        path = Path(super().to_onnx(*args, **{"opset_version": ONNX_OPSET} | kwargs))
        write_metadata(path, export_metadata(self))
        return path

    def _compress_ov_model(  # type: ignore[override]  # Anomalib passes all arguments, by position
        self, model: Any, kind: CompressionType, data: Any, metric: Any, task: Any, max_drop: float
    ) -> Any:
        """Compress the backbone alone, for Anomalib's ``to_openvino``; see :func:`.compress`."""
        return compress(model, CompressionType(kind), data, metric, max_drop)
