"""ExDD as an Anomalib model: builds the banks during one pass over the training images."""

import hashlib
import inspect
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from anomalib import LearningType
from anomalib.data import ImageBatch
from anomalib.metrics import AUPR, AUROC, Evaluator, F1Score
from anomalib.models.components import AnomalibModule, MemoryBankMixin
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import ImageVisualizer, Visualizer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn

from anomalib_exdd.neighbors import SearchBackend

from .arguments import adopted, check_at_least, check_choice, check_ratio
from .patch_collector import PatchCollector
from .patches import CROP_SIZE, defect_crops, defect_patches, patch_centres
from .pictures import LABEL_SIZE, panel_size
from .scoring import ScoringName
from .torch_model import ExDDModel

logger = logging.getLogger(__name__)

PositivePatches = Literal["mask", "crop"]

_DEFAULT_IMAGE_SCORING: dict[str, ScoringName] = {
    "paper": "paper",
    "published": "published",
    "normal": "normal",
    "ratio": "normal",  # the best on validation images: benchmarks/results/image_scoring_validation.md
}


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
        negative_ratio: Share of the normal patches that the negative bank keeps.
        positive_ratio: Share of the defect patches that the positive bank keeps.
        negative_minimum: Entries that the negative bank keeps at least, if there are as many patches.
        positive_minimum: Entries that the positive bank keeps at least, if there are as many patches.
        positive_patches: Where defect patches come from. "mask": the patches that the defect covers (paper). "crop":
            all patches of the bounding box around each defect, squashed to 128 x 128 (thesis and published code).
        min_coverage: With "mask", the share of a patch that must be defect for it to belong. Every defect keeps at
            least the patch that holds most of it.
        projected_dimension: Dimension of the Gaussian projection in which the coresets are selected.
        scoring: How the map is scored. "ratio": distance to normal over distance to defects, patch by patch. "normal":
            distance to normal alone (PatchCore). "paper": equations 12-23 as printed. "published": as the published
            code computes them, its pooling without padding included.
        image_scoring: How images are scored, one of the same names; "auto" takes the rule that belongs to ``scoring``,
            and with "ratio" the one that did best on validation data, "normal".
        num_neighbors: Size of the neighbourhood in the bank that the scores' weights look at.
        sigma: Standard deviation of the map's Gaussian blur in pixels; null: the scoring's own (paper 2, others 4).
        search: Nearest-neighbour search: "faiss", "torch", or "auto" for the fastest that is installed. All of them are
            exact and give the same scores.
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

    def __init__(
        self,
        backbone: str = "wide_resnet50_2",
        layers: Sequence[str] = ("layer2", "layer3"),
        pre_trained: bool = True,
        weights: str | Path | None = None,
        image_size: tuple[int, int] = (632, 224),
        negative_ratio: float = 0.02,
        positive_ratio: float = 0.1,
        negative_minimum: int = 1000,
        positive_minimum: int = 1000,
        positive_patches: PositivePatches = "mask",
        min_coverage: float = 0.25,
        projected_dimension: int = 128,
        scoring: ScoringName = "ratio",
        image_scoring: ScoringName | Literal["auto"] = "auto",
        num_neighbors: int = 3,
        sigma: float | None = None,
        search: SearchBackend = "auto",
        seed: int = 0,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        check_ratio("negative_ratio", negative_ratio)
        check_ratio("positive_ratio", positive_ratio)
        check_ratio("min_coverage", min_coverage)
        check_at_least("negative_minimum", negative_minimum, 1)
        check_at_least("positive_minimum", positive_minimum, 1)
        check_at_least("projected_dimension", projected_dimension, 1)
        check_at_least("num_neighbors", num_neighbors, 1)
        check_choice("positive_patches", positive_patches, get_args(PositivePatches))
        check_choice("scoring", scoring, get_args(ScoringName))
        check_choice("search", search, get_args(SearchBackend))
        check_choice("image_scoring", image_scoring, (*get_args(ScoringName), "auto"))
        if len(image_size) != 2 or min(image_size) < 32:
            msg = f"Argument `image_size` has to be (height, width), both at least 32, but got {tuple(image_size)}."
            raise ValueError(msg)
        if sigma is not None and sigma <= 0:
            msg = f"Argument `sigma` has to be positive or null, but got {sigma}."
            raise ValueError(msg)
        super().__init__(
            pre_processor=self.configure_pre_processor((image_size[0], image_size[1]))
            if pre_processor is True
            else pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self._own_visualizer = visualizer is True
        self.collectors: tuple[PatchCollector, PatchCollector] | None = None
        self._rebuilt_from: str | None = None
        self._build_model()

    @property
    def settings(self) -> Any:
        """The constructor's arguments as attributes; they are the hyper-parameters that a checkpoint keeps."""
        return self.hparams

    def _build_model(self) -> None:
        """Build the torch model, and take over the settings of training, from the hyper-parameters."""
        settings = self.settings
        if self._own_visualizer and isinstance(self.visualizer, ImageVisualizer):
            self.visualizer.field_size = panel_size(settings.image_size)
            self.visualizer.text_config["size"] = LABEL_SIZE
        image_scoring = settings.image_scoring
        self.model = ExDDModel(
            settings.backbone,
            settings.layers,
            pre_trained=settings.pre_trained,
            weights=settings.weights,
            scoring=settings.scoring,
            image_scoring=_DEFAULT_IMAGE_SCORING[settings.scoring] if image_scoring == "auto" else image_scoring,
            num_neighbors=settings.num_neighbors,
            sigma=settings.sigma,
            search=settings.search,
        )

    @classmethod
    def configure_pre_processor(cls, image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Resize to ``image_size`` (height, width), by default the paper's (632, 224), and normalise as ImageNet."""
        return super().configure_pre_processor(image_size or (632, 224))

    @staticmethod
    def configure_post_processor() -> PostProcessor:
        """Use Anomalib's thresholds and normalisation."""
        return PostProcessor()

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """Report ranking and F1 of images and pixels; average precision too, because AUROC saturates."""
        image: dict[str, Any] = {"fields": ["pred_score", "gt_label"], "prefix": "image_"}
        pixel: dict[str, Any] = {"fields": ["anomaly_map", "gt_mask"], "prefix": "pixel_", "strict": False}
        return Evaluator(
            test_metrics=[
                AUROC(**image),
                AUPR(**image),
                F1Score(fields=["pred_label", "gt_label"], prefix="image_"),
                AUROC(**pixel),
                AUPR(**pixel),
                F1Score(fields=["pred_mask", "gt_mask"], prefix="pixel_", strict=False),
            ]
        )

    @staticmethod
    def configure_optimizers() -> None:
        """Return no optimizer: nothing is trained by gradients."""

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """One pass over the training images, and no validation before it."""
        return {"gradient_clip_val": 0, "max_epochs": 1, "num_sanity_val_steps": 0}

    @property
    def learning_type(self) -> LearningType:
        """One-class for the engine, which fits the model in one pass; defects are optional."""
        return LearningType.ONE_CLASS

    def setup(self, stage: str) -> None:
        """Refuse to train in several processes.

        Raises:
            ValueError: If the trainer has more than one.
        """
        if stage == TrainerFn.FITTING and self.trainer.world_size > 1:
            msg = (
                f"ExDD builds its banks in one process, but the trainer has {self.trainer.world_size}: every one of "
                "them would see a part of the images only. Train with `--trainer.devices 1`; prediction and test may "
                "use any number of devices."
            )
            raise ValueError(msg)

    def on_fit_start(self) -> None:
        """Start from empty banks, also where the model was fitted before, and from a backbone with weights."""
        self.model.feature_extractor.load_weights()  # here, not in setup: a checkpoint may have brought them since
        self._is_fitted = torch.tensor([False], device=self.device)
        self.model.negative_bank.clear()
        self.model.positive_bank.clear()
        dimension, seed = self.settings.projected_dimension, self.settings.seed
        self.collectors = (PatchCollector(dimension, seed), PatchCollector(dimension, seed))

    def training_step(self, batch: ImageBatch, *args: Any, **kwargs: Any) -> Tensor:
        """Collect the patches of a batch: of normal images for the negative, of defects for the positive bank.

        Raises:
            ValueError: If a defective image has no mask to find its defect patches by.
        """
        del args, kwargs
        if self.collectors is None:
            msg = "Patches are collected during fit only. Train through Anomalib's Engine or Lightning's Trainer."
            raise RuntimeError(msg)
        negative, positive = self.collectors
        images_BCHW = cast("Tensor", batch.image)
        features_BDhw = self.model.embed(images_BCHW)
        grid = (features_BDhw.shape[-2], features_BDhw.shape[-1])
        position_P2 = patch_centres(grid, (images_BCHW.shape[-2], images_BCHW.shape[-1]))
        for index in range(len(images_BCHW)):
            name = batch.image_path[index] if batch.image_path else f"image {negative.num_images + positive.num_images}"
            if batch.gt_label is None or not bool(batch.gt_label[index]):
                negative.add(name, features_BDhw[index].flatten(1).T, position_P2)
                continue
            mask_HW = _mask_of(batch, index, name)
            if self.settings.positive_patches == "crop":
                positive.add(name, *self._crop_patches(images_BCHW[index], mask_HW))
            else:
                belongs = defect_patches(mask_HW, grid, self.settings.min_coverage).flatten()
                positive.add(
                    name, features_BDhw[index].flatten(1).T[belongs.to(features_BDhw.device)], position_P2[belongs]
                )
        # Lightning wants a loss with a gradient; there is nothing to optimise.
        return torch.tensor(0.0, requires_grad=True, device=self.device)

    def _crop_patches(self, image_CHW: Tensor, mask_HW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features of all patches of all defect crops, and their positions in the whole image."""
        crops, boxes = defect_crops(image_CHW, mask_HW)
        features_NDhw = self.model.feature_extractor(crops).float()
        centre = patch_centres((features_NDhw.shape[-2], features_NDhw.shape[-1]), CROP_SIZE)
        size = torch.tensor(CROP_SIZE)
        positions = [torch.tensor([y, x]) + centre * torch.tensor([h, w]) // size for y, x, h, w in boxes]
        return features_NDhw.flatten(2).transpose(1, 2).flatten(0, 1), torch.cat(positions)

    def fit(self) -> None:
        """Select the coresets and fill the banks.

        Raises:
            ValueError: If no normal image was seen.
        """
        if self.collectors is None:
            msg = "There are no patches to build banks from: `fit` is called by the trainer after the training images."
            raise RuntimeError(msg)
        negative, positive = self.collectors
        if negative.num_images == 0:
            msg = "ExDD needs normal training images for its negative bank, but the training data has none."
            raise ValueError(msg)
        settings = self.settings
        content = negative.select(settings.negative_ratio, settings.negative_minimum, "Negative bank")
        self.model.negative_bank.fill(content)
        if positive.num_images:
            content = positive.select(settings.positive_ratio, settings.positive_minimum, "Positive bank")
            self.model.positive_bank.fill(content)
        else:
            logger.warning(
                "There are no defective training images: ExDD works with the negative bank alone and scores as "
                "'normal' (PatchCore's score)."
            )
        for name, bank, collector in (
            ("Negative", self.model.negative_bank, negative),
            ("Positive", self.model.positive_bank, positive),
        ):
            logger.info(
                "%s bank: %d of %d patches from %d images.",
                name,
                len(bank),
                collector.num_patches,
                collector.num_images,
            )
        self.collectors = None

    def validation_step(self, batch: ImageBatch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Predict a batch, for thresholds and normalisation."""
        del args, kwargs
        updated: STEP_OUTPUT = batch.update(**self.model(batch.image)._asdict())
        return updated

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make a checkpoint that the trainer restores mean what its user expects.

        The command line builds the model from its own arguments and then loads the checkpoint into it. Arguments that
        were left at their defaults are taken from the checkpoint; those that were given stay, as long as the banks
        allow it. A fit rebuilds the banks: what the checkpoint says of finished epochs is dropped.

        Raises:
            ValueError: If a given argument contradicts what the checkpoint's banks were built with.
        """
        super().on_load_checkpoint(checkpoint)
        if self._trainer is None:  # load_from_checkpoint has built this model from the checkpoint's arguments
            return
        defaults = {name: parameter.default for name, parameter in inspect.signature(ExDD).parameters.items()}
        changes = adopted(self.hparams, defaults, checkpoint.get("hyper_parameters", {}))
        if changes:
            self.hparams.update(changes)
            tiler = self.model.tiler
            self._build_model()
            self.model.tiler = tiler
            self.model.to(self.device)
        trainer: Any = self.trainer
        if trainer.datamodule is not None:
            trainer.datamodule.setup(trainer.state.fn)  # its resize follows the pre-processor, which has just changed
        if trainer.state.fn == TrainerFn.FITTING:
            logger.warning("Fitting from a checkpoint: its memory banks are dropped and built anew from the data.")
            checkpoint.pop("loops", None)
            checkpoint.update(epoch=0, global_step=0)
            self._rebuilt_from = _fingerprint(checkpoint)
        elif self._rebuilt_from is not None and self._rebuilt_from == _fingerprint(checkpoint):
            # Anomalib's engine tests the checkpoint that training started from; what was asked for is a test of the
            # banks that training has just built.
            checkpoint["state_dict"] = self.state_dict()

    def teardown(self, stage: str) -> None:
        """Say where the results are."""
        if stage not in {TrainerFn.TESTING, TrainerFn.PREDICTING} or not self.trainer.is_global_zero:
            return
        folder = getattr(self.visualizer, "output_dir", None)
        if folder is not None and Path(folder).is_dir():
            logger.info("Pictures with heat maps: %s", Path(folder).resolve())
        checkpoint = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
        if stage == TrainerFn.TESTING and checkpoint and Path(checkpoint).is_file():
            logger.info("Trained model: %s", Path(checkpoint).resolve())


def _mask_of(batch: ImageBatch, index: int, name: str) -> Tensor:
    """Return the mask of a defective training image.

    Raises:
        ValueError: If it has none, or an empty one.
    """
    if batch.gt_mask is None:
        msg = (
            f"The defective training image {name} has no mask, but ExDD takes the patches of defects by mask. Give the "
            "masks of defective training images to the data module (with DefectFolder: `--data.masks`), or leave the "
            "defective images out of training (`--data.num_defects 0`): ExDD then works with normal images alone."
        )
        raise ValueError(msg)
    mask_HW: Tensor = batch.gt_mask[index]
    if not bool((mask_HW != 0).any()):
        msg = (
            f"The mask of the defective training image {name} is empty after pre-processing. The image's label says "
            "that it is defective: correct the label or the mask, or leave the image out."
        )
        raise ValueError(msg)
    return mask_HW


def _fingerprint(checkpoint: dict[str, Any]) -> str:
    """Identify a checkpoint by its negative bank, whatever its file is called."""
    features: Tensor = checkpoint["state_dict"]["model.negative_bank.features"]
    return hashlib.sha256(features.cpu().numpy().tobytes()).hexdigest()
