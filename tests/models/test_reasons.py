"""Why an image is not accepted, against computations by loops."""

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.special import logit

from anomalib_exdd.models.exdd.calibration import Calibration, ImagePatches, resemblance_limit
from anomalib_exdd.models.exdd.decisions import Decisions
from anomalib_exdd.models.exdd.explanation import ImageReasons, reasons_of
from anomalib_exdd.models.exdd.kind_table import confusion_table, taken_for
from anomalib_exdd.models.exdd.memory_bank import BankContent
from anomalib_exdd.models.exdd.torch_model import ExDDModel, ScoredImages
from anomalib_exdd.models.regions import Reason, find_regions
from anomalib_exdd.models.transforms import Part
from anomalib_exdd.models.visualization import add_caption

DIMENSION, GRID, SIZE = 4, (5, 7), (33, 50)  # features, patches, pixels
PATCHES = GRID[0] * GRID[1]
TOP = 4  # of these patches make an image's score
KINDS = {"a": "scratch", "b": "dent", "c": ""}


def made_up(defective: int, synthetic: int, seed: int) -> ImagePatches:
    """Normal, defective and synthetic images with 4 patches kept for their score and 1 to 10 in the sample."""
    rng = np.random.default_rng(seed)
    images = 3 + defective + synthetic
    counts = rng.integers(1, 11, images)
    image = np.repeat(np.arange(images), counts + 4)
    sampled = np.concatenate([np.arange(count + 4) >= 4 for count in counts])
    logs = [torch.from_numpy(rng.normal(size=(len(image), 2))) for _ in range(2)]
    return ImagePatches(
        logs[0],
        logs[1],
        None,
        torch.from_numpy(image),
        torch.from_numpy(sampled),
        torch.arange(images) >= 3,
        torch.full((images,), 20),
        torch.full((images,), 20),
        torch.arange(images) >= 3 + defective,
    )


@settings(deadline=None)
@given(st.integers(2, 12), st.integers(0, 3), st.integers(0, 10_000))
def test_nine_tenths_of_the_defect_patches_are_within_the_limit(defective: int, synthetic: int, seed: int) -> None:
    """The limit is the lowest ratio below which nine tenths lie, averaged over the real defective images."""
    patches = made_up(defective, synthetic, seed)
    assert patches.log_positive is not None
    ratio = patches.log_positive[:, 0] - patches.log_negative[:, 0]
    by_image = [
        [
            r
            for r, i, s in zip(ratio.tolist(), patches.image.tolist(), patches.sampled.tolist(), strict=True)
            if s and i == n
        ]
        for n in range(3, 3 + defective)
    ]
    for limit in sorted(value for values in by_image for value in values):
        shares = [Fraction(sum(value <= limit for value in values), len(values)) for values in by_image]
        if sum(shares) >= Fraction(9, 10) * defective:
            break
    assert resemblance_limit(patches) == limit


@pytest.mark.parametrize(("defective", "synthetic"), [(0, 0), (0, 4), (1, 0), (1, 4)])
def test_fewer_than_two_defects_set_no_limit(defective: int, synthetic: int) -> None:
    patches = made_up(defective, synthetic, 0)
    assert resemblance_limit(patches) == 0
    assert resemblance_limit(made_up(5, 0, 0)._replace(log_positive=None)) == 0


def test_the_limit_is_fitted_and_saved_with_the_calibration() -> None:
    patches = made_up(6, 0, 1)
    calibration, other = Calibration(), Calibration()
    calibration.fit(patches, 0.1)
    other.load_state_dict(calibration.state_dict())
    assert float(other.resemblance) == pytest.approx(resemblance_limit(patches))
    calibration.fit(patches._replace(log_positive=None), 0.1)
    assert float(calibration.resemblance) == 0


def model_of(limit: float, *, positive: bool, seed: int = 0) -> ExDDModel:
    """A model that scores patches by their distance to normal, with random banks."""
    rng = torch.Generator().manual_seed(seed)
    model = ExDDModel("test_resnet", ["layer2", "layer3"], pre_trained=False, top_fraction=TOP / PATCHES)
    for bank, count in ((model.negative_bank, 20), (model.positive_bank, 9 * positive)):
        if count:
            source = torch.arange(count) % 3
            features = torch.randn(count, DIMENSION, generator=rng)
            bank.fill(BankContent(features, source, torch.zeros(count, 2).long(), ["a", "b", "c"], KINDS))
    model.calibration.resemblance = torch.tensor(limit)
    return model


def features_of(seed: int, images: int = 6) -> torch.Tensor:
    return torch.randn(images, PATCHES, DIMENSION, generator=torch.Generator().manual_seed(100 + seed))


def scored_by(model: ExDDModel, seed: int, images: int = 6) -> ScoredImages:
    return ScoredImages(model.score(features_of(seed, images)), torch.zeros(images, 1, *SIZE), GRID)


def decisions_at(accept: float) -> Decisions:
    return Decisions(accept, 0.99, accept_backed=True, reject_backed=True)


def by_loops(model: ExDDModel, patches: list[list[float]]) -> Reason:
    """The reason of patches, highest first, from distances to every entry."""
    bank = model.positive_bank
    known, kinds = [], []
    for patch in patches:
        to_normal = min(math.dist(patch, entry) for entry in model.negative_bank.features.tolist())
        to_defect, nearest = min((math.dist(patch, entry), row) for row, entry in enumerate(bank.features.tolist()))
        kinds.append(KINDS[bank.sources[int(bank.source[nearest])]])
        if math.log(to_defect) - math.log(to_normal) <= float(model.calibration.resemblance):
            known.append(kinds[-1])
    if len(known) * 2 <= len(patches):
        return Reason("unfamiliar")
    most = max(Counter(known).values())
    kind = next(kind for kind in known if known.count(kind) == most)
    return Reason("known", kind, kinds.count(kind) / len(kinds)) if kind else Reason("known")


def assert_equal(found: Reason | None, expected: Reason) -> None:
    assert found is not None
    assert found[:2] == expected[:2]
    assert found.kind_share == pytest.approx(expected.kind_share)


@pytest.mark.parametrize("limit", [-0.4, 0.0, 0.4])
@pytest.mark.parametrize("seed", range(4))
def test_the_highest_patches_decide(limit: float, seed: int) -> None:
    model = model_of(limit, positive=True, seed=seed)
    scored = scored_by(model, seed)
    middle = float(scored.scores.images.sort().values[2:4].mean())
    for image, reasons in enumerate(reasons_of(model, scored, decisions_at(middle))):
        order = sorted(range(PATCHES), key=lambda patch: -float(scored.scores.patches[image, patch]))
        highest = [features_of(seed)[image, patch].tolist() for patch in order[:TOP]]
        if float(scored.scores.images[image]) < middle:
            assert reasons.image is None
        else:
            assert_equal(reasons.image, by_loops(model, highest))


def test_all_reasons_occur() -> None:
    found = set()
    for seed in range(6):
        model = model_of(0.0, positive=True, seed=seed)
        found |= {each.image and each.image[:2] for each in reasons_of(model, scored_by(model, seed), decisions_at(0))}
    assert found == {("unfamiliar", None), ("known", "scratch"), ("known", "dent"), ("known", None)}


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_a_region_is_decided_by_the_deciding_patches_in_its_box(data: st.DataObject) -> None:
    model = model_of(0.1, positive=True)
    seed = data.draw(st.integers(0, 5))
    scored = scored_by(model, seed, images=1)
    top, bottom = sorted(data.draw(st.sets(st.integers(0, SIZE[0]), min_size=2, max_size=2)))
    left, right = sorted(data.draw(st.sets(st.integers(0, SIZE[1]), min_size=2, max_size=2)))
    order = sorted(range(PATCHES), key=lambda patch: -float(scored.scores.patches[0, patch]))
    inside = []
    for patch in order:
        row, column = divmod(patch, GRID[1])
        y, y_end = Fraction(row * SIZE[0], GRID[0]), Fraction((row + 1) * SIZE[0], GRID[0])
        x, x_end = Fraction(column * SIZE[1], GRID[1]), Fraction((column + 1) * SIZE[1], GRID[1])
        if y < bottom and y_end > top and x < right and x_end > left:
            inside.append(patch)
    deciding = [patch for patch in inside if patch in order[:TOP]] or inside[:1]
    (reasons,) = reasons_of(model, scored, decisions_at(0.5))
    expected = by_loops(model, [features_of(seed, 1)[0, patch].tolist() for patch in deciding])
    assert_equal(reasons.of_box((left, top, right - left, bottom - top)), expected)


def test_without_known_defects_everything_is_unfamiliar() -> None:
    model = model_of(9.0, positive=False)
    scored = scored_by(model, 0)
    middle = float(scored.scores.images.median())
    for image, reasons in enumerate(reasons_of(model, scored, decisions_at(middle))):
        accepted = float(scored.scores.images[image]) < middle
        assert reasons.image == (None if accepted else Reason("unfamiliar"))
        assert reasons.of_box((3, 3, 9, 9)) == Reason("unfamiliar")


def test_regions_of_other_rules_follow_the_patches_that_make_the_image_score() -> None:
    """With two rules, those patches decide that are the highest by the images' rule."""
    model = model_of(0.0, positive=True)
    model.scoring = "ratio"
    scored = scored_by(model, 0)
    assert not torch.equal(scored.scores.patches, scored.scores.deciding)
    top = scored.scores.deciding.topk(TOP, dim=1).values.mean(dim=1)
    odds = torch.from_numpy(logit(scored.scores.images.double().numpy())).float()
    assert torch.equal(odds.argsort(), top.argsort())
    for order, each in zip(
        scored.scores.deciding.argsort(dim=1, descending=True), reasons_of(model, scored, decisions_at(0)), strict=True
    ):
        assert each.order.tolist() == order.tolist()


def test_regions_ask_with_their_box_in_the_mask() -> None:
    """Whatever part of the original image the mask shows."""
    mask = np.zeros((20, 30), dtype=bool)
    mask[2:5, 10:17] = True
    asked = []

    def reason_of(box: tuple[int, int, int, int]) -> Reason:
        asked.append(box)
        return Reason("known", "dent", 0.5)

    part = Part(Fraction(100), Fraction(50), Fraction(60), Fraction(90))
    (region,) = find_regions(mask, np.ones((20, 30), np.float32), (200, 200), part, reason_of)
    assert asked == [(10, 2, 7, 3)]
    assert region.box != asked[0]
    assert region[3:] == ("known", "dent")


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        (Reason("known", "scratch", 0.834), "resembles scratch (83 %)"),
        (Reason("known"), "resembles known defects"),
        (Reason("unfamiliar"), "unfamiliar"),
    ],
)
def test_the_caption_states_the_reason(reason: Reason, words: str) -> None:
    decisions = decisions_at(0.1)
    assert decisions.describe(0.994, reason) == f"{decisions.describe(0.994)}; {words}"
    assert decisions.describe(0.994).endswith("reject from 0.990)")


@pytest.mark.parametrize("kind", ["dent", "a very long name of a kind of defect in a narrow picture"])
def test_the_caption_fits_below_the_picture(kind: str) -> None:
    line = decisions_at(0.1).describe(0.994, Reason("known", kind, 0.5))
    caption = np.asarray(add_caption(Image.new("RGB", (400, 50)), line))[50:]
    ground = caption[0, 0]
    written = (caption != ground).any(axis=(0, 2)).nonzero()[0]
    assert written.min() >= 3
    assert 300 < written.max() < 397


def test_kinds_are_counted_by_what_they_are_taken_for() -> None:
    dent, scratch, other, unfamiliar = map(
        taken_for, (Reason("known", "dent", 0.7), Reason("known", "scratch"), Reason("known"), Reason("unfamiliar"))
    )
    cases = [
        *[("good", taken_for(None))] * 20,
        ("good", dent),
        *[("dent", dent)] * 7,
        *[("dent", scratch)] * 2,
        *[("accepted", taken_for(None))] * 3,
        *[("accepted", unfamiliar)] * 4,
    ]
    table = confusion_table(cases, {"scratch", "dent"})
    assert list(table.columns) == ["dent", "scratch", "unfamiliar", "accepted"]
    assert list(table.index) == ["good", "accepted", "dent"]
    assert table.to_numpy().tolist() == [[1, 0, 0, 20], [0, 0, 4, 3], [7, 2, 0, 0]]
    table = confusion_table([*[("kind not known", other)] * 5, ("dent", dent)], {"dent"})
    assert list(table.columns) == ["dent", "kind not known", "unfamiliar", "accepted"]
    assert list(table.index) == ["good", "dent", "kind not known"]
    assert table.to_numpy().tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [0, 5, 0, 0]]


def test_of_equally_common_kinds_the_higher_patch_decides() -> None:
    reasons = ImageReasons(
        np.array([2, 0, 1, 3]),
        4,
        np.array([True, True, True, False]),
        np.array(["b", "c", "a", "a"]),
        (2, 2),
        (8, 8),
        accepted=False,
    )
    assert reasons.image == Reason("known", "a", 0.5)
