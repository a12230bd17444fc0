import pytest
from hypothesis import given
from hypothesis import strategies as st

from anomalib_exdd.data.splits import draw, held_out_count, key_of, share, validation_counts

key_lists = st.lists(st.text("abc/ö01", min_size=1, max_size=6), unique=True, max_size=40)
seeds = st.integers(-5, 2**40)


@given(keys=key_lists, seed=seeds, data=st.data())
def test_draw_does_not_depend_on_the_order_of_the_keys(keys: list[str], seed: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(keys)))
    shuffled = data.draw(st.permutations(keys))

    drawn = {keys[position] for position in draw(keys, count, seed=seed, purpose="p")}

    assert len(drawn) == count
    assert drawn == {shuffled[position] for position in draw(shuffled, count, seed=seed, purpose="p")}


@given(keys=key_lists, seed=seeds, data=st.data())
def test_smaller_draw_is_contained_in_the_larger(keys: list[str], seed: int, data: st.DataObject) -> None:
    large = data.draw(st.integers(0, len(keys)))
    small = data.draw(st.integers(0, large))
    assert set(draw(keys, small, seed=seed, purpose="p")) <= set(draw(keys, large, seed=seed, purpose="p"))


def test_seed_and_purpose_change_the_draw() -> None:
    keys = [str(number) for number in range(100)]
    draws = {tuple(draw(keys, 50, seed=seed, purpose=purpose)) for seed in range(5) for purpose in "ab"}
    assert len(draws) == 10


def test_draw_is_fair() -> None:
    keys = [f"train/{number:05d}.png" for number in range(20)]
    hits = [0] * len(keys)
    for seed in range(1000):
        for position in draw(keys, 5, seed=seed, purpose="p"):
            hits[position] += 1
    assert min(hits) > 180  # 250 expected, standard deviation 14
    assert max(hits) < 320


def test_draw_is_the_same_in_every_release() -> None:
    # Published results name a seed: these images must stay those images.
    keys = [f"train/{number}.png" for number in range(10)]
    assert draw(keys, 3, seed=0, purpose="validation NORMAL") == [0, 3, 5]


@given(
    normal=st.integers(3, 3000),
    defective=st.integers(0, 500),
    ratio=st.floats(0.001, 0.999),
)
def test_validation_counts_leave_enough_to_train_with(normal: int, defective: int, ratio: float) -> None:
    val_normal, val_defective = validation_counts(normal, defective, ratio)

    assert 1 <= val_normal <= normal - 2
    assert val_defective == 0 or 3 <= val_defective <= defective - 1
    if val_normal not in {1, normal - 2}:
        assert abs(val_normal - normal * ratio) <= 0.5


@pytest.mark.parametrize(("defective", "expected"), [(0, 0), (12, 0), (13, 3), (16, 3), (100, 20), (246, 49)])
def test_few_defective_images_stay_in_training(defective: int, expected: int) -> None:
    assert validation_counts(600, defective, 0.2) == (120, expected)


@given(normal=st.integers(2, 3000), defective=st.integers(0, 500))
def test_without_validation_every_image_is_trained_with(normal: int, defective: int) -> None:
    assert validation_counts(normal, defective, 0.0) == (0, 0)


@pytest.mark.parametrize(
    ("normal", "ratio", "needed"),
    [
        (0, 0.2, r"at least 3 are needed to train and validate \(`val_split_ratio`\) with"),
        (2, 0.2, "at least 3 are needed"),
        (1, 0.0, "at least 2 are needed to train and to set the threshold with"),
    ],
)
def test_too_few_normal_images(normal: int, ratio: float, needed: str) -> None:
    with pytest.raises(ValueError, match=f"{normal} normal training images, besides those held out .* but {needed}"):
        validation_counts(normal, 5, ratio)


@given(count=st.integers(2, 500), ratio=st.floats(0.001, 0.999))
def test_held_out_count_is_the_share_and_leaves_one(count: int, ratio: float) -> None:
    held_out = held_out_count(count, ratio)
    assert 1 <= held_out <= count - 1
    if held_out not in {1, count - 1}:
        assert abs(held_out - count * ratio) <= 0.5


def test_a_single_image_is_not_held_out() -> None:
    assert [held_out_count(count, 0.2) for count in (0, 1, 2)] == [0, 0, 1]


def test_halves_are_rounded_upwards() -> None:
    assert [share(count, 0.5) for count in (1, 2, 3, 5)] == [1, 1, 2, 3]


def test_key_is_relative_to_the_root() -> None:
    assert key_of("/a/data/train/1.png", "/a/data") == "train/1.png"
    assert key_of("elsewhere/data/train/1.png", "elsewhere/data") == "train/1.png"
    assert key_of("/a/other/1.png", "/a/data") == "../other/1.png"
