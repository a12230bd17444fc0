"""Synthetic defects in the banks and in the calibration: they never count as real ones, nor as independent of them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_exdd import ExDD
from anomalib_exdd.models.exdd.calibration import ImagePatches
from anomalib_exdd.models.exdd.memory_bank import Origins, SharedSources
from anomalib_exdd.models.exdd.training import BankBuilder

GRID = (6, 5)


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(0, 8))
def test_sources_that_share_an_image_are_found(seed: int, real: int, made: int) -> None:
    rng = np.random.default_rng(seed)
    reals = [f"real{i}" for i in range(real)]
    origins: Origins = {
        f"made{i}": rng.choice(reals, rng.integers(1, real + 1), replace=False).tolist() for i in range(made)
    }
    sources = [*reals, *origins]
    shared = SharedSources(sources, origins)
    for path in [*sources, "unknown"]:
        content = {path, *origins.get(path, ())}
        expected = [row for row, source in enumerate(sources) if content & {source, *origins.get(source, ())}]
        assert shared.rows(path) == expected


def features(seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(8, *GRID, generator=torch.Generator().manual_seed(seed)) + shift


def built(real: int, synthetic: int, *, weight: float = 0.1, copies: bool = False) -> ExDD:
    """Build banks of made-up features: 12 normal images, real defects, and synthetic ones made from them."""
    model = ExDD(
        backbone="filter_bank", image_size=(48, 40), synthetic_weight=weight, top_fraction=0.1, visualizer=False
    )
    builder = BankBuilder(model.model, model.settings)
    image, mask = torch.zeros(3, 48, 40), torch.zeros(48, 40)
    mask[:16, :16] = 1
    for number in range(12):
        builder.add_normal(f"normal{number}", image, features(number))
    for number in range(real):
        shown = features(100 + number)
        shown[:, :2, :2] += 3
        builder.add_defective(f"real{number}", image, shown, mask)
    for number in range(synthetic):
        source = f"real{number % real}" if real else None
        shown = features(200 + number)
        shown[:, :2, :2] = features(100 + number % real)[:, :2, :2] + 3 if copies and real else shown[:, :2, :2] + 3
        builder.origins[f"made{number}"] = [f"normal{number % 12}", *([source] if source else [])]
        builder.add_defective(f"made{number}", image, shown, mask)
    builder.build()
    model.calibrate()
    return model


def measure(model: ExDD) -> ImagePatches | None:
    parts = model.model
    folds = parts.folds(model.settings.synthetic_weight)
    return parts.calibration_set.measure(parts.negative_bank, parts.positive_bank, parts.boundary, folds)


def test_synthetic_defects_do_not_crowd_real_ones_out() -> None:
    alone, together = built(3, 0).model.positive_bank, built(3, 20).model.positive_bank
    of_real = torch.tensor([path.startswith("real") for path in together.sources])[together.source]
    assert torch.equal(together.features[of_real], alone.features)
    assert set(together.origins) == {f"made{number}" for number in range(20)}


def test_without_real_defects_they_are_no_evidence_unless_asked() -> None:
    alone, together = built(0, 0).model.calibration, built(0, 20, weight=0.9).model.calibration
    for name in ("known_weights", "known_bias", "unknown_slope", "slope", "offset", "training_probability"):
        torch.testing.assert_close(getattr(together, name), getattr(alone, name))
    asked = built(0, 20, weight=1.0).model
    assert float(asked.calibration.known_weights.sum()) > 0
    assert asked.boundary.is_fitted


def test_thresholds_come_from_real_images() -> None:
    calibration = built(4, 20).model.calibration
    assert calibration.training_defective.tolist() == [False] * 12 + [True] * 4


def test_copies_of_a_defect_do_not_make_it_look_known() -> None:
    """Copies of the real defects lie in the bank; measured without them, real defects are as far away as ever."""
    alone, copied = built(4, 0), built(4, 24, copies=True)
    measured = [measure(model) for model in (alone, copied)]
    logs = []
    for each, model in zip(measured, (alone, copied), strict=True):
        assert each is not None
        assert each.log_positive is not None
        real = torch.tensor([path.startswith("real") for path in model.model.calibration_set.sources])
        logs.append(each.log_positive[real[each.image], 0].amin())
    assert logs[1] > logs[0] - 0.5  # a copy would be at log(1e-6)


def test_one_defect_and_its_copies_say_nothing_of_others() -> None:
    patches = measure(built(1, 10, copies=True))
    assert patches is not None
    assert patches.log_positive is None
    assert patches.log_odds is None


def test_forgetting_an_image_forgets_what_was_made_of_it() -> None:
    model = built(4, 8)
    dropped = model.forget("real1")
    left = set(model.model.positive_bank.sources)
    assert left == {"real0", "real2", "real3", *(f"made{n}" for n in range(8) if n % 4 != 1)}
    assert dropped == 4 * (1 + 2)
    assert set(model.model.positive_bank.origins) == {path for path in left if path.startswith("made")}


def test_checkpoints_keep_the_origins() -> None:
    model = built(2, 4)
    other = ExDD(backbone="filter_bank", image_size=(48, 40), top_fraction=0.1, visualizer=False)
    other.load_state_dict(model.state_dict())
    assert other.model.positive_bank.origins == model.model.positive_bank.origins


@pytest.mark.parametrize("weight", [-0.1, 1.5])
def test_weights_out_of_range_are_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="synthetic_weight"):
        ExDD(backbone="filter_bank", synthetic_weight=weight)
