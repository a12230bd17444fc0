"""The hyperparameters of a LoRA; the defaults are In&Out's (arXiv 2406.00501)."""

from dataclasses import dataclass

from anomalib_exdd.synthesis.base import check_range

ZERO_SHOT_NORMALS, PRIOR_NORMALS = 50, 200  # how many normal images In&Out learns from
FEW_DEFECTS = 50  # In&Out has 5 or all 246; its weight for few would be too strong for many


@dataclass(frozen=True)
class LoraSettings:
    """Everything that a LoRA depends on besides the base model and the images.

    Attributes:
        instance_prompt: The surface in words; a rare word among them gets its meaning from the training.
        defect_prompts: The surface with a defect in words; images of defects are learned under one of them each time.
        class_prompt: What kind of thing the surface is. Normal images learned under it keep the model from forgetting.
        rank: Rank of the changes to linear layers.
        alpha: Their scale; they count `alpha / rank`.
        conv_rank: Rank of the changes to convolutions; 0 for none.
        conv_alpha: Their scale.
        learning_rate: Greatest step of AdamW.
        max_steps: Steps of the training.
        batch_size: Images per step, half of them of the class.
        min_snr: Limit of the signal-to-noise ratio in the weights of the noise levels (arXiv 2303.09556).
        prior_weight: Weight of the images of the class; 0 for none.
        restarts: How often the learning rate falls along a cosine to zero.
        clip_skip: Layer of the text encoder that is read, counted from the end. SDXL always reads the second.
        working_size: Size at which the model learns and draws; see `working_size`.
        crop_padding: Pixels of surroundings around a defect at least; at most twice as many.
        seed: Seed of the training.
    """

    instance_prompt: str
    defect_prompts: tuple[str, ...]
    class_prompt: str = "background"
    rank: int = 32
    alpha: float = 16
    conv_rank: int = 4
    conv_alpha: float = 1
    learning_rate: float = 1e-5
    max_steps: int = 1000
    batch_size: int = 12
    min_snr: float = 5.0
    prior_weight: float = 1.0
    restarts: int = 3
    clip_skip: int = 2
    working_size: int | tuple[int, int] | None = 512
    crop_padding: int = 32
    seed: int = 1234

    def __post_init__(self) -> None:
        """Check the ranges of the numbers."""
        check_range(1, rank=self.rank, max_steps=self.max_steps, batch_size=self.batch_size)
        check_range(1, restarts=self.restarts, clip_skip=self.clip_skip)
        check_range(0, conv_rank=self.conv_rank, prior_weight=self.prior_weight, seed=self.seed)


def published_weight(defects: int) -> float:
    """Return the weight of a LoRA when drawing, by the number of defects it was trained on."""
    if defects == 0:
        return 0.60
    return 0.95 if defects <= FEW_DEFECTS else 0.80
