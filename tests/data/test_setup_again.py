"""Data modules set up again, and in another order."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
from lightning.pytorch.trainer.states import TrainerFn
from torchvision.transforms.v2 import RandomHorizontalFlip

from anomalib_exdd.data import KSDD2

STAGES = (TrainerFn.TESTING, TrainerFn.FITTING, None, TrainerFn.PREDICTING, TrainerFn.FITTING)
Tables = dict[str, list[str]]


def tables(data: KSDD2) -> Tables:
    """Return the images of every subset, and check that it has the augmentation once."""
    subsets = {name: getattr(data, f"{name}_data") for name in ("train", "val", "test")}
    assert all(isinstance(subset.augmentations, RandomHorizontalFlip) for subset in subsets.values())
    return {name: subset.samples["image_path"].tolist() for name, subset in subsets.items()}


def make(root: Path, seed: int = 0) -> KSDD2:
    flip = RandomHorizontalFlip()
    return KSDD2(root, num_defects=4, val_split_ratio=0.25, seed=seed, num_workers=0, augmentations=flip)


def test_every_setup_gives_the_same_images(make_ksdd2: Callable[..., Path]) -> None:
    root = make_ksdd2()
    data, other = make(root), make(root, seed=1)
    data.setup(TrainerFn.FITTING)
    expected = tables(data)
    assert [len(paths) for paths in expected.values()] == [13, 3, 5]
    other.setup()
    assert tables(other) != expected
    again = make(root)
    for stage in STAGES:
        again.teardown(str(stage))  # before the first setup, too
        again.prepare_data()
        again.setup(stage)
        assert tables(again) == expected
        for each in (copy.deepcopy(again), pickle.loads(pickle.dumps(again))):  # noqa: S301  our own
            each.setup(stage)
            assert tables(each) == expected


def test_a_setup_that_failed_can_be_tried_again(make_ksdd2: Callable[..., Path]) -> None:
    root = make_ksdd2()
    expected = make(root)
    expected.setup()
    mask = root / "train" / "10003_GT.png"
    content, data = mask.read_bytes(), make(root)
    mask.unlink()
    with pytest.raises(FileNotFoundError, match="10003"):
        data.setup(TrainerFn.FITTING)
    mask.write_bytes(content)
    data.setup(TrainerFn.FITTING)
    assert tables(data) == tables(expected)
