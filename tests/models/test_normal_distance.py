"""How far images are from normal ones, and how far the training images were."""

from pathlib import Path

import torch

from anomalib_exdd import ExDD
from anomalib_exdd.images.reading import read_image
from anomalib_exdd.models.exdd.calibration_set import normal_distance, training_distances


def test_it_is_the_geometric_mean_of_every_third_patch() -> None:
    nearest = torch.rand(2, 96, generator=torch.Generator().manual_seed(0)) + 0.1
    expected = [float(torch.tensor(values)[1::3].log().mean().exp()) for values in nearest.tolist()]
    torch.testing.assert_close(normal_distance(nearest), torch.tensor(expected))


def test_training_images_are_measured_as_new_ones_but_without_their_own_entries(trained: tuple[ExDD, Path]) -> None:
    model = trained[0]
    bank, kept = model.model.negative_bank, model.model.calibration_set
    expected = []
    for path, defective in zip(kept.sources, kept.defective.tolist(), strict=True):
        if defective:
            continue
        with torch.inference_mode():
            features = model.model.embed(model.pre_processor(read_image(path)[None]))[0]  # type: ignore[misc]
        others = bank.vectors[bank.source != bank.sources.index(path)]
        nearest = torch.cdist(features.flatten(1).T, others, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1)
        expected.append(float(normal_distance(nearest.values[None])))
    distances = training_distances(model.model)
    assert distances is not None
    found = torch.from_numpy(distances)
    torch.testing.assert_close(found.float(), torch.tensor(expected), rtol=2e-3, atol=0)
    assert model.facts()["training_distances"] == distances.tolist()
