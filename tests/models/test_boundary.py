"""The learnt boundary: who sees which image, what is learnt, and that it is the same whoever learns it."""

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from anomalib_exdd.models.exdd import boundary as boundary_module
from anomalib_exdd.models.exdd.boundary import MAX_FOLDS, BoundaryData, Folds, LearntBoundary, boundary_data

NAMES = ("weight_in", "bias_in", "weight_out", "bias_out")


@st.composite
def training_sets(draw: st.DrawFn) -> tuple[list[str], list[str], dict[str, list[str]]]:
    """Normal images, defective ones, and what those of them that are synthetic were made from."""
    normal = [f"/data/good/{number:03d}.png" for number in range(draw(st.integers(1, 12)))]
    real = [f"/data/bad/d{number:03d}.png" for number in range(draw(st.integers(0, 9)))]
    made = [f"/data/made/s{number:03d}.png" for number in range(draw(st.integers(0, 6)))]
    origins = {}
    for name in made:
        of_defect = draw(st.lists(st.sampled_from(real), max_size=1)) if real else []
        origins[name] = draw(st.permutations([draw(st.sampled_from([*normal, "/data/unknown.png"])), *of_defect]))
    return normal, real + made, origins


class TestFolds:
    @settings(deadline=None, max_examples=200)
    @given(training_sets(), st.booleans())
    def test_no_network_that_an_image_is_measured_by_has_seen_it_or_its_kin(
        self, images: tuple[list[str], list[str], dict[str, list[str]]], synthetic_count: bool
    ) -> None:
        normal, defective, origins = images
        folds = Folds(normal, defective, origins, synthetic_count=synthetic_count)
        real = [path for path in defective if path not in origins]
        assert folds.count == min(MAX_FOLDS, len(real) or (len(defective) if synthetic_count else 0))
        if folds.count == 0:
            return
        for path in (*normal, *defective):
            made_of_it = [name for name, made_from in origins.items() if path in made_from]
            of_defect = [origin for origin in origins.get(path, ()) if origin in real]
            for each in (path, *made_of_it, *of_defect):
                assert folds.held_out(each)[folds.of(path)]
        for path in (*normal, *real):
            assert sum(folds.held_out(path)) == 1
        for path, made_from in origins.items():
            if of_defect := [origin for origin in made_from if origin in real]:
                assert folds.of(path) == folds.of(of_defect[0])
        for paths in (normal, real):  # folds of equal sizes
            sizes = np.bincount([folds.of(path) for path in paths], minlength=folds.count)
            assert not len(paths) or sizes.max() - sizes.min() <= 1

    @settings(deadline=None)
    @given(training_sets(), st.randoms(use_true_random=False))
    def test_order_and_folder_do_not_matter(
        self, images: tuple[list[str], list[str], dict[str, list[str]]], chance: random.Random
    ) -> None:
        normal, defective, origins = images
        folds = Folds(normal, defective, origins)

        def moved(path: str) -> str:
            return path.replace("/data", "C:\\else where").replace("/", "\\")

        shuffled = [chance.sample(paths, len(paths)) for paths in (normal, defective)]
        made_from = {moved(path): [moved(origin) for origin in paths] for path, paths in origins.items()}
        elsewhere = Folds(*([moved(path) for path in paths] for paths in shuffled), made_from)
        for path in (*normal, *defective):
            assert elsewhere.of(moved(path)) == folds.of(path)
            assert elsewhere.held_out(moved(path)) == folds.held_out(path)

    def test_an_unknown_image_has_been_seen_by_none(self) -> None:
        folds = Folds(["a"], ["b", "c"], {})
        assert folds.held_out("unknown") == [False, False]
        assert folds.of("unknown") == 0


def made_up(normal: int = 12, defective: int = 6, patches: int = 40, dimension: int = 64) -> tuple[BoundaryData, Folds]:
    """Patches that vary much in all directions but one, and only in that one differ defects."""
    rng = np.random.default_rng(0)
    paths = [[f"n{number}" for number in range(normal)], [f"d{number}" for number in range(defective)]]
    folds = Folds(*paths, {})
    parts = []
    for names, centre in zip(paths, (0.0, 1.5), strict=True):
        features = rng.normal(size=(len(names) * patches, dimension))
        features[:, 0] = centre + 0.2 * features[:, 0]
        images = [name for name in names for _ in range(patches)]
        parts.append((torch.from_numpy(features).float(), images, centre > 0))
    return boundary_data(parts, folds, {}), folds


def learnt(data: BoundaryData, seed: int = 0) -> LearntBoundary:
    boundary = LearntBoundary()
    boundary.fit(data, seed)
    return boundary


def same(first: LearntBoundary, second: LearntBoundary) -> bool:
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in NAMES)


@pytest.fixture(scope="module")
def example() -> tuple[BoundaryData, Folds, LearntBoundary]:
    data, folds = made_up()
    return data, folds, learnt(data)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def nearest_log_ratio(features: torch.Tensor, data: BoundaryData, seen: torch.Tensor) -> torch.Tensor:
    """Return what nearest neighbours make of patches, by the patches that a network has seen."""
    near = [
        torch.cdist(features, data.features[seen & (data.defective == kind)]).amin(1).log() for kind in (False, True)
    ]
    return near[0] - near[1]


def test_it_separates_held_out_patches_where_nearest_neighbours_fail(
    example: tuple[BoundaryData, Folds, LearntBoundary],
) -> None:
    data, folds, boundary = example
    assert boundary.folds == folds.count == MAX_FOLDS
    for fold in range(folds.count):
        held_out = data.held_out[data.image, fold]
        truth = data.defective[held_out]
        assert set(truth.tolist()) == {False, True}
        assert roc_auc_score(truth, boundary.of_fold(data.features[held_out], fold)) > 0.95
        assert roc_auc_score(truth, nearest_log_ratio(data.features[held_out], data, ~held_out)) < 0.85


def test_no_network_learns_from_its_fold() -> None:
    """Other features and labels in a fold change all networks but its own, whatever the scale is taken from."""
    data, _ = made_up(patches=8, dimension=4)
    first = learnt(data)
    held_out = data.held_out[data.image, 1] & data.defective
    second = learnt(data._replace(features=torch.where(held_out[:, None], 5.0, data.features)))
    changed = [
        not torch.equal(first.of_fold(data.features, fold), second.of_fold(data.features, fold)) for fold in range(5)
    ]
    assert changed == [True, False, True, True, True]


def test_the_score_is_the_mean_of_all_networks(example: tuple[BoundaryData, Folds, LearntBoundary]) -> None:
    data, folds, boundary = example
    of_folds = torch.stack([boundary.of_fold(data.features, fold) for fold in range(folds.count)])
    torch.testing.assert_close(boundary(data.features), of_folds.mean(dim=0), rtol=1e-4, atol=1e-4)
    grid = data.features[:60].reshape(3, 4, 5, -1)
    torch.testing.assert_close(boundary(grid).flatten(), boundary(data.features[:60]), rtol=1e-4, atol=1e-4)


def test_networks_are_those_of_their_equations(example: tuple[BoundaryData, Folds, LearntBoundary]) -> None:
    data, folds, boundary = example
    features = data.features[:20].double().numpy()
    weights = {name: getattr(boundary, name).double().numpy() for name in NAMES}
    units = len(weights["bias_in"]) // folds.count
    for fold in range(folds.count):
        own = slice(fold * units, (fold + 1) * units)
        hidden = features @ weights["weight_in"][:, own] + weights["bias_in"][own]
        expected = np.maximum(hidden, 0.2 * hidden) @ weights["weight_out"][fold] + weights["bias_out"][fold]
        np.testing.assert_allclose(boundary.of_fold(data.features[:20], fold).numpy(), expected, rtol=1e-3, atol=1e-4)


def test_the_same_is_learnt_whatever_the_number_of_threads(threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boundary_module, "STEPS", 30)  # enough to differ where sums are split between threads
    data, _ = made_up(normal=4, defective=2, dimension=1024)
    found = []
    for count in (2, 1, 1):
        torch.set_num_threads(count)
        found.append(learnt(data))
        assert torch.get_num_threads() == count
    assert same(found[0], found[1])
    assert same(found[1], found[2])
    assert not same(found[2], learnt(data, seed=1))


def test_the_same_is_learnt_from_half_precision(example: tuple[BoundaryData, Folds, LearntBoundary]) -> None:
    data, _, boundary = example
    assert same(boundary, learnt(data._replace(features=data.features.half())))


def test_the_same_is_learnt_within_inference_mode(example: tuple[BoundaryData, Folds, LearntBoundary]) -> None:
    _, _, boundary = example
    with torch.inference_mode():
        found = learnt(made_up()[0])
    assert same(boundary, found)
    assert not any(getattr(found, name).requires_grad for name in NAMES)


def test_what_was_learnt_is_saved_and_forgotten(example: tuple[BoundaryData, Folds, LearntBoundary]) -> None:
    _, _, boundary = example
    other = LearntBoundary()
    assert not other.is_fitted
    other.load_state_dict(boundary.state_dict())
    assert other.is_fitted
    assert same(boundary, other)
    other.clear()
    assert not other.is_fitted
    assert other.folds == 0


class TestBoundaryData:
    def test_it_is_what_loops_put_together(self) -> None:
        rng = np.random.default_rng(0)
        origins = {"made": ["n1", "d0"]}
        folds = Folds(["n0", "n1", "n2"], ["d0", "d1", "made"], origins)
        parts = []
        for names, defective in ((("n0", "n1"), False), (("d0", "made"), True), (("n2", "n0"), False), (("d1",), True)):
            images = [name for name in names for _ in range(int(rng.integers(1, 5)))]
            parts.append((torch.from_numpy(rng.normal(size=(len(images), 3))).half(), images, defective))
        data = boundary_data(parts, folds, {"made": 0.25})
        row = 0
        names = sorted(["n0", "n1", "n2", "d0", "d1", "made"])
        for features, images, defective in parts:
            for patch, name in zip(features, images, strict=True):
                assert torch.equal(data.features[row], patch.float())
                assert bool(data.defective[row]) == defective
                assert names[data.image[row]] == name
                row += 1
        assert row == len(data.features)
        assert data.weight.tolist() == [0.25 if name == "made" else 1.0 for name in names]
        assert data.held_out.tolist() == [folds.held_out(name) for name in names]
        for fold in range(folds.count):
            seen = [not folds.held_out(names[image])[fold] for image in data.image.tolist()]
            shares = data.shares(fold)
            of_image = [0.0] * len(names)
            for place, image in enumerate(data.image.tolist()):
                normal, defect = float(shares[0][place]), float(shares[1][place])
                assert normal == (seen[place] and not data.defective[place])
                assert (defect > 0) == (seen[place] and bool(data.defective[place]))
                of_image[image] += defect
            for image, name in enumerate(names):  # however many patches it has
                expected = 0.0 if name.startswith("n") or folds.held_out(name)[fold] else float(data.weight[image])
                assert of_image[image] == pytest.approx(expected)

    def test_it_is_complete_where_every_network_sees_both_kinds(self) -> None:
        data, folds = made_up(normal=4, defective=2, patches=3, dimension=2)
        assert data.is_complete
        assert folds.count == 2
        without = data.image != 0  # images are sorted by name: "d0" is the first
        fewer = BoundaryData(data.features[without], data.defective[without], data.image[without], *data[3:])
        assert not fewer.is_complete  # nothing is left for the network that must not see "d1"
        assert not data._replace(weight=torch.tensor([1.0, 0, 1, 1, 1, 1])).is_complete
        only_defects = data.defective
        assert not BoundaryData(*(values[only_defects] for values in data[:3]), *data[3:]).is_complete
