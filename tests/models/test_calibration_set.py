"""What is kept of the training images, what is measured of it, and which patches may be among the highest."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_exdd import ExDD
from anomalib_exdd.coreset import greedy_k_center
from anomalib_exdd.models.exdd.boundary import HIDDEN, Folds, LearntBoundary
from anomalib_exdd.models.exdd.calibration import Calibration
from anomalib_exdd.models.exdd.calibration_set import (
    SAMPLED_PATCHES,
    CalibrationSet,
    KeptPatches,
    choose_images,
    others_distances,
)
from anomalib_exdd.models.exdd.candidate_selection import CandidateSelection, highest_rows
from anomalib_exdd.models.exdd.memory_bank import BankContent, MemoryBank
from anomalib_exdd.models.exdd.patches import Outline, outline_cells
from anomalib_exdd.models.exdd.scoring import top_count


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(2, 5), st.integers(1, 6), st.integers(0, 10_000))
def test_others_distances_leave_sources_out(entries: int, sources: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    source = np.r_[np.arange(sources), rng.integers(sources, size=entries)]
    bank = rng.normal(size=(len(source), 5)).astype(np.float32)
    left_out = [sorted(rng.choice(sources, rng.integers(sources), replace=False).tolist()) for _ in range(4)]
    image = np.repeat(rng.permutation(4), 3)
    query = np.concatenate([bank[rng.integers(len(bank), size=2)], rng.normal(size=(len(image) - 2, 5))])
    query = query.astype(np.float32)
    found = others_distances(
        torch.from_numpy(query), torch.from_numpy(image), left_out, torch.from_numpy(bank), torch.from_numpy(source), k
    )
    for row, (patch, number) in enumerate(zip(query, image, strict=True)):
        others = [entry for entry, s in zip(bank, source, strict=True) if s not in left_out[number]]
        expected = sorted(math.dist(patch, entry) for entry in others)[:k]
        expected += expected[-1:] * (k - len(expected))
        np.testing.assert_allclose(found[row].numpy(), expected, rtol=1e-5, atol=1e-6)


class TestKeeping:
    @pytest.mark.parametrize(("patches", "defects"), [(50, None), (50, 40), (50, 5), (7, None), (7, 0)])
    def test_the_high_patches_and_an_even_sample_are_kept(self, patches: int, defects: int | None) -> None:
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(patches, 7, generator=generator)
        of_defects = None if defects is None else torch.randn(defects, 7, generator=generator)
        kept = KeptPatches.of("a", features, torch.tensor([3, 5]), of_defects)
        population = features if of_defects is None else of_defects
        count = min(SAMPLED_PATCHES, len(population))
        sample = [population[math.floor((each + 0.5) * len(population) / count)] for each in range(count)]
        assert torch.equal(kept.features, torch.stack([features[3], features[5], *sample]).half())
        assert kept.sampled.tolist() == [False] * 2 + [True] * count
        assert (kept.defective, kept.patches, kept.population) == (defects is not None, patches, len(population))

    def test_an_outline_holds_the_features_of_its_cells(self) -> None:
        fine = torch.randn(5, 16, 12, generator=torch.Generator().manual_seed(0))
        mask = torch.zeros(32, 24)
        mask[5:9, 10:17] = 1
        outline = Outline.of(fine, mask)
        cells, defective = outline_cells(mask, (16, 12))
        assert torch.equal(outline.features, torch.stack([fine[:, c // 12, c % 12] for c in cells.tolist()]).half())
        assert torch.equal(outline.defective, defective)


def kept_image(name: str, seed: int) -> KeptPatches:
    """Some patches of an image; a third of the images has an outline, and some have a defect."""
    rng = np.random.default_rng(seed)
    outline = None
    if seed % 3 == 0:
        cells = int(rng.integers(1, 5))
        outline = Outline(
            torch.from_numpy(rng.normal(size=(cells, 3))).half(), torch.from_numpy(rng.random(cells) < 0.5)
        )
    count = int(rng.integers(1, 6))
    features = torch.from_numpy(rng.normal(size=(count, 4))).half()
    sampled = torch.from_numpy(rng.random(count) < 0.5)
    return KeptPatches(name, features, sampled, bool(rng.random() < 0.5), *rng.integers(1, 99, 2).tolist(), outline)


def check(found: CalibrationSet, expected: dict[str, KeptPatches]) -> None:
    """Compare with the images that should be there, in their order."""
    assert found.sources == list(expected)
    assert len(found) == len(expected)
    images = list(expected.values())
    assert found.image.tolist() == [row for row, each in enumerate(images) for _ in each.features]
    assert found.features.tolist() == [patch for each in images for patch in each.features.tolist()]
    assert found.sampled.tolist() == [value for each in images for value in each.sampled.tolist()]
    for name in ("defective", "patches", "population"):
        assert getattr(found, name).tolist() == [getattr(each, name) for each in images]
    outlines = [(row, each.outline) for row, each in enumerate(images) if each.outline is not None]
    assert found.outline_image.tolist() == [row for row, each in outlines for _ in each.defective]
    assert found.outline_features.tolist() == [cell for _, each in outlines for cell in each.features.tolist()]
    assert found.outline_defective.tolist() == [value for _, each in outlines for value in each.defective.tolist()]
    assert (found.features.dtype, found.outline_features.dtype) == (torch.float16, torch.float16)


actions = st.lists(
    st.one_of(
        st.tuples(st.just("remove"), st.sampled_from("abcdef")),
        st.tuples(
            st.just("add"),
            st.lists(
                st.tuples(st.sampled_from("abcdef"), st.integers(0, 99)), max_size=3, unique_by=lambda each: each[0]
            ),
        ),
        st.tuples(st.just("clear"), st.none()),
        st.tuples(st.just("save"), st.none()),
    ),
    max_size=12,
)


@settings(deadline=None, max_examples=100)
@given(actions)
def test_images_are_added_replaced_removed_and_saved(steps: list[tuple[str, object]]) -> None:
    found, expected = CalibrationSet(), {}
    for action, value in steps:
        if action == "remove":
            found.remove(value)
            expected.pop(value, None)
        elif action == "add":
            images = [kept_image(name, seed) for name, seed in value]
            found.add(images)
            for image in images:
                expected.pop(image.path, None)
            expected |= {image.path: image for image in images}
        elif action == "clear":
            found.clear()
            expected.clear()
        else:
            saved, found = found.state_dict(), CalibrationSet()
            found.load_state_dict(saved)
        check(found, expected)


def test_samples_and_outlines_are_those_of_the_images() -> None:
    images = [kept_image(name, seed) for name, seed in zip("abcdef", (0, 1, 2, 3, 4, 6), strict=True)]
    assert {image.defective for image in images} == {False, True}
    everything = CalibrationSet()
    everything.add(images)
    for defective in (False, True):
        features, names = everything.sample_of(defective=defective)
        expected = [
            (image.path, patch)
            for image in images
            if image.defective == defective
            for patch, sampled in zip(image.features.tolist(), image.sampled.tolist(), strict=True)
            if sampled
        ]
        assert list(zip(names, features.tolist(), strict=True)) == expected
    data = everything.outline_data({"d": 0.25}, 2)
    assert torch.equal(data.features, everything.outline_features.float())
    assert torch.equal(data.defective, everything.outline_defective)
    assert torch.equal(data.image, everything.outline_image)
    assert data.weight.tolist() == [1, 1, 1, 0.25, 1, 1]
    assert data.held_out.shape == (6, 2)
    assert not data.held_out.any()


class TestMeasure:
    """Two normal images, three real defects, and a synthetic defect made from the second normal image and "y"."""

    PATHS = ("m", "n", "x", "y", "z", "made")

    def banks(self) -> tuple[MemoryBank, MemoryBank]:
        rng = np.random.default_rng(0)
        banks = []
        for paths in (["m", "n"], ["x", "y", "z", "made"]):
            bank = MemoryBank(1, "torch")
            features = torch.from_numpy(rng.normal(size=(5 * len(paths), 4))).float()
            source = torch.arange(len(paths)).repeat(5)
            bank.fill(BankContent(features, source, torch.zeros(len(source), 2).long(), paths))
            banks.append(bank)
        banks[1].origins = {"made": ["n", "y"]}
        return banks[0], banks[1]

    def test_evidence_is_from_what_does_not_know_the_image(self) -> None:
        negative, positive = self.banks()
        kept = CalibrationSet()
        kept.add([kept_image(name, seed)._replace(defective=name not in "mn") for seed, name in enumerate(self.PATHS)])
        folds = Folds(negative.sources, positive.sources, positive.origins)
        assert folds.count == 3
        boundary = LearntBoundary()
        generator = torch.Generator().manual_seed(0)
        shapes = {"weight_in": (4, 3 * HIDDEN), "bias_in": (3 * HIDDEN,), "weight_out": (3, HIDDEN), "bias_out": (3,)}
        for name, shape in shapes.items():
            boundary.register_buffer(name, torch.randn(*shape, generator=generator))
        found = kept.measure(negative, positive, boundary, folds)
        assert found is not None
        assert found.log_positive is not None
        assert found.log_odds is not None
        kin = {"n": {"n", "made"}, "y": {"y", "made"}, "made": {"made", "n", "y"}}
        for row, image in enumerate(kept.image.tolist()):
            path = self.PATHS[image]
            patch = kept.features[row].float()
            for bank, logs in ((negative, found.log_negative), (positive, found.log_positive)):
                distances = sorted(
                    math.dist(patch, entry)
                    for entry, source in zip(bank.features, bank.source.tolist(), strict=True)
                    if bank.sources[source] not in kin.get(path, {path})
                )
                expected = [math.log(distances[0]), math.log(distances[2])]
                np.testing.assert_allclose(logs[row].numpy(), expected, rtol=1e-4, atol=1e-5)
            (log_odds,) = boundary.of_fold(patch[None], folds.of(path)).tolist()
            assert float(found.log_odds[row]) == pytest.approx(log_odds, rel=1e-4, abs=1e-4)
        assert found.synthetic.tolist() == [False] * 5 + [True]
        for name in ("image", "sampled", "defective", "patches", "population"):
            assert torch.equal(getattr(found, name), getattr(kept, name))

    def test_what_cannot_be_measured_is_none(self) -> None:
        negative, positive = self.banks()
        kept = CalibrationSet()
        kept.add([kept_image(name, seed) for seed, name in enumerate("mx")])
        folds = Folds(negative.sources, positive.sources, positive.origins)
        for path in ("y", "z", "made"):
            positive.remove(path)
        found = kept.measure(negative, positive, LearntBoundary(), folds)
        assert found is not None
        assert found.log_positive is None
        assert found.log_odds is None
        negative.remove("n")
        assert kept.measure(negative, positive, LearntBoundary(), folds) is None


def test_images_are_chosen_by_name_alone() -> None:
    paths = [f"/somewhere/{index:04d}.png" for index in range(500)]
    chosen = choose_images(paths, 50)
    assert len(chosen) == 50
    assert chosen == choose_images(paths[::-1], 50)
    moved = choose_images([path.replace("/somewhere", "C:\\elsewhere") for path in paths], 50)
    assert [path[-8:] for path in moved] == [path[-8:] for path in chosen]


def test_rows_hold_the_highest_by_both_rankings() -> None:
    negative, positive = torch.zeros(200), torch.full((200,), 1.0)
    negative[[7, 90]] = 2.0
    positive[[11, 13]] = -4.0
    rows = highest_rows(negative, positive, 4)
    assert {7, 90, 11, 13} <= set(rows.tolist())
    assert len(rows) <= 8


def test_candidates_hold_the_highest_patches_of_a_large_bank() -> None:
    """Their mean is that of an exact search: misses would make good training images look better than new ones."""
    generator = torch.Generator().manual_seed(3)
    patches = torch.randn(12_000, 64, generator=generator) / (1 + torch.arange(64))
    entries = greedy_k_center(patches, 6000, seed=0)
    image = torch.arange(12_000) // 1000
    negative, sources = MemoryBank(), [f"{number}.png" for number in range(12)]
    negative.fill(BankContent(patches[entries], image[entries], torch.zeros(6000, 2).long(), sources))
    model: Any = SimpleNamespace(
        negative_bank=negative, positive_bank=MemoryBank(), calibration=Calibration(), boundary=LearntBoundary()
    )
    selection = CandidateSelection(model, 48, seed=0)
    for number, source in enumerate(sources):
        own = patches[image == number]
        others = patches[entries[image[entries] != number]]
        distance = torch.cdist(own.double(), others.double()).amin(dim=1)
        kept = selection.candidates(source, own)
        assert len(kept) <= 2 * 10
        assert distance[kept].topk(10).values.mean() > distance.topk(10).values.mean() - 0.05 * distance.std()


def test_candidates_hold_what_is_far_from_normal_or_near_to_defects(trained: tuple[ExDD, Path]) -> None:
    model = trained[0]
    negative, positive = model.model.negative_bank, model.model.positive_bank
    selection = CandidateSelection(model.model, model.settings.projected_dimension, model.settings.seed)
    generator = torch.Generator().manual_seed(5)
    wanted = top_count(400, model.hparams.top_fraction)
    spread = negative.features.std(dim=0)
    for path in [*negative.sources[:3], *positive.sources[:3], "unknown.png"]:
        own = positive.source == (positive.sources.index(path) if path in positive.sources else -1)
        defects = positive.features[~own]
        patches = negative.features[torch.randint(len(negative), (400,), generator=generator)]
        patches = patches + 0.1 * spread * torch.randn(patches.shape, generator=generator)
        patches[:wanted] += 6 * spread * torch.randn(wanted, patches.shape[1], generator=generator)
        patches[-wanted:] = defects[torch.randint(len(defects), (wanted,), generator=generator)]
        kept = selection.candidates(path, patches).tolist()
        assert {*range(wanted), *range(400 - wanted, 400)} <= set(kept)
        assert len(kept) <= 6 * wanted  # by two rankings by distances, and one by the boundary
