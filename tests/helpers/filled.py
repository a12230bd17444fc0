"""A model with banks, boundary and thresholds of its own random features: exports need no training."""

from typing import Any

import torch

from anomalib_exdd import ExDD
from anomalib_exdd.models.exdd.boundary import BoundaryData
from anomalib_exdd.models.exdd.memory_bank import BankContent

SIZE = (96, 64)


def learn(model: ExDD, images: torch.Tensor) -> None:
    """Learn boundary and refinement from the banks and from cells of images that are called defect at random."""
    banks = (model.model.negative_bank, model.model.positive_bank)
    features = torch.cat([bank.vectors for bank in banks])
    fine = model.model.extract(images)[1]
    parts = [(model.model.boundary, features, torch.arange(len(features)) >= len(banks[0]))]
    if fine is not None:
        cells = fine.permute(0, 2, 3, 1).flatten(0, 2)[:400]
        parts.append((model.model.refinement, cells, torch.arange(len(cells)) % 3 == 0))
    for module, rows, defective in parts:
        held_out = torch.zeros(1, 2, dtype=torch.bool)
        module.fit(BoundaryData(rows, defective, torch.zeros(len(rows)).long(), torch.ones(1), held_out))


def filled(scoring: str, image_scoring: str = "auto", *, positive: bool = True, **arguments: Any) -> ExDD:
    """Return a model with banks of its own features of random images, and with thresholds."""
    model = ExDD(pre_trained=False, image_size=SIZE, scoring=scoring, image_scoring=image_scoring, **arguments)
    rng = torch.Generator().manual_seed(0)
    for bank, seed in ((model.model.negative_bank, 1), (model.model.positive_bank, 2)):
        if bank is model.model.positive_bank and not positive:
            continue
        images = torch.rand(4, 3, *SIZE, generator=torch.Generator().manual_seed(seed)) * 2
        features = model.model.embed(images).flatten(2).transpose(1, 2).flatten(0, 1)
        chosen = torch.randperm(len(features), generator=rng)[:150]
        bank.fill(BankContent(features[chosen], torch.zeros(150).long(), torch.zeros(150, 2).long(), ["a.png"]))
    if positive:
        learn(model, images)
    calibration = model.model.calibration
    calibration.known_weights = torch.tensor([0.1, 1.0, 2.0, 0.5, 0.4, 0.3])
    calibration.known_bias = torch.tensor(-1.0)
    calibration.unknown_slope = torch.tensor(0.2)
    calibration.slope = torch.tensor(0.3)
    scores = model.eval().model(torch.randn(4, 3, *SIZE, generator=rng))
    post = model.post_processor
    post.image_min.copy_(scores.pred_score.min() * 0.5)
    post.image_max.copy_(scores.pred_score.max() * 1.5)
    post.pixel_min.copy_(scores.anomaly_map.min() * 0.5)
    post.pixel_max.copy_(scores.anomaly_map.max() * 1.5)
    post._image_threshold.copy_(scores.pred_score.mean())  # noqa: SLF001  Anomalib has no other way to set it
    post._pixel_threshold.copy_(scores.anomaly_map.mean())  # noqa: SLF001
    return model
