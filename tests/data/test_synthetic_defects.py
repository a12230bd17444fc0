"""Synthetic defects join the training images of another data module, and nothing else."""

import copy
import inspect
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from anomalib import TaskType
from anomalib.cli import AnomalibCLI
from anomalib.data import ImageBatch, get_datamodule
from anomalib.engine import Engine
from anomalib.models import Padim
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.fabric.utilities import move_data_to_device
from torchvision.transforms.v2 import RandomHorizontalFlip, RandomVerticalFlip

from anomalib_exdd.data import KSDD2, DefectFolder
from anomalib_exdd.data.base import DefectDataModule
from anomalib_exdd.data.dataset import DefectBatch
from anomalib_exdd.data.synthetic_defects import SyntheticDefects
from anomalib_exdd.synthesis.manifest import Record, write_manifest
from made_up_images import invert, save_mask, save_pairs
from reading_back import ready_folder, split_counts

Sources = Sequence[tuple[str, str | None]]


def base_of(root: Path, **arguments: Any) -> KSDD2:
    return KSDD2(root, **{"num_workers": 0, "train_batch_size": 4, "val_split_ratio": 0.25, **arguments})


def training_images(data: KSDD2, label: int) -> list[str]:
    data.setup()
    samples = data.train_data.samples
    return samples.image_path[samples.label_index == label].tolist()


def save_synthetic(
    root: Path, sources: Sources, rejected: Sequence[int] = (), told: Mapping[int, str] = MappingProxyType({})
) -> Path:
    """Write a synthetic folder with its manifest: from what each image was made, in which nothing came out, kinds."""
    records = []
    for number, (source, defect) in enumerate(sources):
        folder = "rejected" if number in rejected else "train"
        (image_id,) = save_pairs(root / folder, number, [True])
        content: dict[str, Any] = dict.fromkeys((each.name for each in fields(Record)), "")
        content |= {"index": number, "image": f"{folder}/{image_id}.png", "mask": f"{folder}/{image_id}_GT.png"}
        content |= {"source": source, "defect": defect, "accepted": number not in rejected}
        content |= {"change": {}, "details": {"kind": told[number]} if number in told else {}}
        records.append(Record(**content))
    write_manifest(root, {"settings": {}, "versions": {}}, records)
    return root


@pytest.fixture
def root(make_ksdd2: Callable[..., Path]) -> Path:
    return make_ksdd2(train=(12, 8), test=(3, 2))


@pytest.fixture
def synthetic(root: Path, tmp_path: Path) -> Path:
    """Six synthetic images, made from training images only."""
    base = base_of(root)
    normal, defective = training_images(base, 0), training_images(base, 1)
    sources = [(normal[number % len(normal)], defective[number % 3]) for number in range(5)]
    return save_synthetic(tmp_path / "synthetic", [*sources, (normal[-1], None)])


def ready(base: KSDD2 | DefectFolder, synthetic: Path, **arguments: Any) -> SyntheticDefects:
    data = SyntheticDefects(base, synthetic, **arguments)
    data.setup()
    return data


def names_of(data: SyntheticDefects) -> set[str]:
    samples = data.train_data.samples
    return {Path(path).name for path in samples.image_path[samples.is_synthetic]}


def test_only_training_gets_synthetic_images(root: Path, synthetic: Path) -> None:
    base, data = base_of(root), ready(base_of(root), synthetic)
    base.setup()

    assert split_counts(base) == {"train": (9, 8), "val": (3, 0), "test": (3, 2)}
    assert split_counts(data) == {"train": (9, 14), "val": (3, 0), "test": (3, 2)}
    assert data.val_data.samples.equals(base.val_data.samples)
    assert data.test_data.samples.equals(base.test_data.samples)
    train = data.train_data.samples
    real = train[~train.is_synthetic].reset_index(drop=True)
    assert real.equals(base.train_data.samples)
    assert not data.val_data.samples.is_synthetic.any()
    assert not data.test_data.samples.is_synthetic.any()
    assert names_of(data) == {f"{number:05d}.png" for number in range(6)}
    assert data.task == TaskType.SEGMENTATION


def test_synthetic_defects_are_of_the_kind_of_their_real_one(root: Path, tmp_path: Path) -> None:
    base = base_of(root)
    normal, defective = training_images(base, 0), training_images(base, 1)
    lines = [f"train,{Path(path).stem},{kind}" for path, kind in zip(defective, ["dent", "scratch"], strict=False)]
    (root / "sources.csv").write_text("\n".join(["split,id,kind", *lines]))
    made_of = [*defective[:3], None, "/gone/1.png", "/gone/1.png", defective[0], defective[2]]
    told = {5: "stain", 6: "stain", 7: "stain"}
    folder = save_synthetic(tmp_path / "synthetic", [(normal[0], path) for path in made_of], told=told)
    samples = ready(base_of(root), folder).train_data.samples
    kinds = {int(Path(row.image_path).stem): row.kind for row in samples[samples.is_synthetic].itertuples()}
    # What is known of the real image goes before what the manifest tells.
    assert kinds == {0: "dent", 1: "scratch", 2: "", 3: "", 4: "", 5: "stain", 6: "dent", 7: "stain"}

    save_pairs(tmp_path / "foreign" / "train", 0, [True])
    samples = ready(base_of(root), tmp_path / "foreign").train_data.samples
    assert samples.kind[samples.is_synthetic].tolist() == [""]


def test_settings_are_those_of_the_base(root: Path, synthetic: Path) -> None:
    base = base_of(root, num_defects=5, eval_batch_size=3)
    base.category = "bolts"
    data = SyntheticDefects(base, synthetic, seed=7)
    shared = ["train_batch_size", "eval_batch_size", "num_workers", "val_split_ratio", "num_defects", "root"]
    shared += ["name", "category", "train_augmentations", "val_augmentations", "test_augmentations"]
    assert [getattr(data, name) for name in shared] == [getattr(base, name) for name in shared]
    assert (data.name, data.category, data.seed, base.seed) == ("KSDD2", "bolts", 7, 0)


def test_validation_images_are_wanted_of_the_base(root: Path, synthetic: Path) -> None:
    data = ready(base_of(root, val_split_ratio=0), synthetic, count=0)
    assert data.val_split_ratio == 0
    assert split_counts(data) == {"train": (12, 8), "val": (0, 0), "test": (3, 2)}


def test_base_prepares_its_images(root: Path, synthetic: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[Path] = []
    monkeypatch.setattr(KSDD2, "prepare_data", lambda self: prepared.append(self.root))
    SyntheticDefects(base_of(root), synthetic).prepare_data()
    assert prepared == [root]


def test_none_are_wanted(root: Path, tmp_path: Path) -> None:
    data = ready(base_of(root), tmp_path / "not there yet", count=0)
    assert split_counts(data)["train"] == (9, 8)
    assert not data.train_data.samples.is_synthetic.any()


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 5), st.integers(1, 6), st.integers(0, 1000))
def test_small_draws_are_contained_in_larger_ones(root: Path, synthetic: Path, less: int, more: int, seed: int) -> None:
    small, large = (names_of(ready(base_of(root), synthetic, count=count, seed=seed)) for count in sorted((less, more)))
    assert small <= large
    assert (len(small), len(large)) == tuple(sorted((less, more)))


def test_seed_decides_the_draw(root: Path, synthetic: Path) -> None:
    draws = [names_of(ready(base_of(root), synthetic, count=3, seed=seed)) for seed in (0, 0, 1, 2, 3)]
    assert draws[0] == draws[1]
    assert any(draw != draws[0] for draw in draws)


def test_too_many_are_wanted(root: Path, tmp_path: Path) -> None:
    base = base_of(root)
    source = (training_images(base, 0)[0], None)
    leak = (base.val_data.samples.image_path[0], None)
    folder = save_synthetic(tmp_path / "few", [source, source, source, leak, source, source], rejected=[1, 4])
    (folder / "review.csv").write_text("image,decision\n00005.png,reject\n")
    message = r"has 2 usable .* `count` asks for 3: the others of 6 show no defect"
    with pytest.raises(ValueError, match=message):
        ready(base_of(root), folder, count=3)
    assert names_of(ready(base_of(root), folder)) == {"00000.png", "00002.png"}


def test_review_is_honored(root: Path, tmp_path: Path) -> None:
    source = (training_images(base_of(root), 0)[0], None)
    folder = save_synthetic(tmp_path / "reviewed", [source] * 4, rejected=[2, 3])
    (folder / "review.csv").write_text("image,decision\n00000.png,reject\n00003.png,accept\n00001.png,\n")
    assert names_of(ready(base_of(root), folder)) == {"00001.png", "00003.png"}

    (folder / "review.csv").write_text("image,decision\n00000.png,reject\n00001.png,reject\n")
    with pytest.raises(ValueError, match="has 0 usable synthetic images, but at least one is needed"):
        ready(base_of(root), folder)


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("role", ["source", "defect"])
def test_images_made_from_held_out_ones_are_left_out(
    root: Path, tmp_path: Path, split: str, role: str, caplog: pytest.LogCaptureFixture
) -> None:
    base = base_of(root, val_split_ratio=0.4)
    normal, defective = training_images(base, 0), training_images(base, 1)
    held_out = {"val": base.val_data, "test": base.test_data}[split].samples
    taken = held_out.image_path[held_out.label_index == (role == "defect")].tolist()[0]
    leak = (taken, defective[0]) if role == "source" else (normal[0], taken)
    folder = save_synthetic(tmp_path / "leaking", [(normal[0], defective[0]), leak])

    data = ready(base_of(root, val_split_ratio=0.4), folder)

    assert names_of(data) == {"00000.png"}
    assert "1 of 2 synthetic images" in caplog.text
    assert "`val_split_ratio` (0.4)" in caplog.text


def test_nothing_but_leaks_is_an_error(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = base_of(root)
    base.setup()
    folder = save_synthetic(tmp_path / "leaking", [(path, None) for path in base.test_data.samples.image_path])
    with pytest.raises(ValueError, match="has 0 usable synthetic images, but at least one is needed"):
        ready(base_of(root), folder)
    assert "5 of 5 synthetic images" in caplog.text
    assert "Synthesize with the settings of `base`: `seed` (0)" in caplog.text


def test_sources_are_found_where_the_data_have_moved(root: Path, synthetic: Path, tmp_path: Path) -> None:
    moved = root.rename(tmp_path / "moved")
    data = ready(base_of(moved), synthetic)
    real = set(data.train_data.samples.image_path[~data.train_data.samples.is_synthetic])
    assert {path for origins in data.train_data.samples.origins for path in origins} <= real

    base = base_of(moved)
    base.setup()
    leak = str(root / Path(base.val_data.samples.image_path[0]).relative_to(moved))
    folder = save_synthetic(tmp_path / "leaking", [(leak.replace("/", "\\"), None)])
    with pytest.raises(ValueError, match="has 0 usable synthetic images"):
        ready(base_of(moved), folder)


def test_unknown_sources_are_used_with_a_warning(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_pairs(tmp_path / "foreign" / "train", 0, [True, True])
    data = ready(base_of(root), tmp_path / "foreign")
    train = data.train_data.samples
    assert train.origins[train.is_synthetic].tolist() == [(path,) for path in train.image_path[train.is_synthetic]]
    assert "2 of 2 synthetic images" in caplog.text

    caplog.clear()
    few = base_of(root, num_defects=0)
    folder = save_synthetic(tmp_path / "of_all", [(training_images(few, 0)[0], training_images(base_of(root), 1)[0])])
    assert split_counts(ready(few, folder))["train"] == (9, 1)
    assert "1 of 1 synthetic images" in caplog.text


def test_no_warning_where_all_is_well(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = base_of(root, val_split_ratio=0.4)  # enough defects for validation
    folder = save_synthetic(tmp_path / "one", [(training_images(data, 0)[0], training_images(data, 1)[0])])
    ready(data, folder)
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == []


def test_real_images_are_not_taken_for_synthetic_ones(root: Path) -> None:
    with pytest.raises(ValueError, match="is already an image of KSDD2"):
        ready(base_of(root), root)


def test_masks_are_checked(root: Path, synthetic: Path) -> None:
    save_mask(synthetic / "train" / "00003_GT.png", defect=False)
    with pytest.raises(ValueError, match=r"00003_GT\.png` of a synthetic defect is all black"):
        ready(base_of(root), synthetic)
    save_mask(synthetic / "train" / "00003_GT.png", defect=True, size=(5, 5))
    with pytest.raises(ValueError, match=r"00003_GT\.png` is 5 x 5"):
        ready(base_of(root), synthetic)


def test_inverted_masks_are_named_all_at_once(root: Path, synthetic: Path, caplog: pytest.LogCaptureFixture) -> None:
    inverted = [str(invert(synthetic / "train" / f"0000{number}_GT.png")) for number in (0, 3)]
    ready(base_of(root), synthetic)
    (warning,) = [record.getMessage() for record in caplog.records if "swapped" in record.getMessage()]
    assert sorted(name for name in warning.split("`") if "_GT" in name) == inverted


def test_wrong_arguments(root: Path, synthetic: Path) -> None:
    with pytest.raises(ValueError, match="`count` has to be at least 0, but got -1"):
        SyntheticDefects(base_of(root), synthetic, count=-1)
    with pytest.raises(TypeError, match=r"`base` has to be a data module of anomalib-exdd.* but got str"):
        SyntheticDefects("KSDD2", synthetic)  # type: ignore[arg-type]


def test_a_base_may_be_described(root: Path, synthetic: Path) -> None:
    """As `anomalib benchmark` gives it, which resolves the outermost class only."""
    base = {"class_path": "KSDD2", "init_args": {"root": str(root), "num_workers": 0, "val_split_ratio": 0.25}}
    data = get_datamodule(
        {
            "class_path": "SyntheticDefects",
            "init_args": {"base": base, "synthetic_root": str(synthetic), "count": 2},
        }
    )
    assert isinstance(data, SyntheticDefects)
    data.setup()
    assert data.train_data.samples.is_synthetic.sum() == 2


def test_two_folders_join_one_after_the_other(root: Path, synthetic: Path, tmp_path: Path) -> None:
    other = save_synthetic(tmp_path / "other", [(training_images(base_of(root), 0)[0], None)])
    data = ready(SyntheticDefects(base_of(root), synthetic, count=2), other)  # type: ignore[arg-type]
    samples = data.train_data.samples
    assert samples.is_synthetic.sum() == 3
    assert split_counts(data) == {"train": (9, 11), "val": (3, 0), "test": (3, 2)}
    with pytest.raises(ValueError, match="is already an image of KSDD2"):
        ready(SyntheticDefects(base_of(root), synthetic), synthetic)  # type: ignore[arg-type]


def origins_by_path(data: SyntheticDefects, loader: str = "train_dataloader") -> dict[str, list[str]]:
    return {
        path: origins
        for batch in getattr(data, loader)()
        for path, origins in zip(batch.image_path, batch.origins, strict=True)
    }


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_say_what_synthetic_images_were_made_from(root: Path, synthetic: Path, num_workers: int) -> None:
    data = ready(base_of(root, num_workers=num_workers), synthetic)
    samples = data.train_data.samples
    assert origins_by_path(data) == dict(zip(samples.image_path, map(list, samples.origins), strict=True))
    assert not any(origins_by_path(data, "test_dataloader").values())


@pytest.fixture
def batch(root: Path, synthetic: Path) -> DefectBatch:
    """One batch of all training images."""
    return next(iter(ready(base_of(root, train_batch_size=99), synthetic).train_dataloader()))


def test_origins_survive_what_happens_to_a_batch(batch: DefectBatch) -> None:
    origins = batch.origins
    assert (len(origins), sum(map(bool, origins))) == (23, 6)
    for other in (
        move_data_to_device(batch, torch.device("meta")),
        pickle.loads(pickle.dumps(batch)),  # noqa: S301 (from a worker process)
        copy.deepcopy(batch),
        batch.update(image=torch.zeros(23, 3, 4, 4), pred_score=torch.zeros(23)),
    ):
        assert other.origins == origins


def test_anomalib_sees_ordinary_batches(batch: DefectBatch) -> None:
    assert isinstance(batch, ImageBatch)
    assert batch.to_numpy().gt_label.sum() == 14
    assert ImageBatch.collate(batch.items).image.shape == batch.image.shape


def test_real_defects_without_masks(folders: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = DefectFolder("parts", folders, normal="good", defective="bad", num_workers=0, train_batch_size=99)
    source = ready_folder(folders, normal="good", defective="bad").train_data.samples.image_path.iloc[-1]
    data = ready(base, save_synthetic(tmp_path / "synthetic", [(source, None)] * 2))

    assert data.train_data.task == TaskType.SEGMENTATION
    assert data.val_data.task == data.test_data.task == TaskType.CLASSIFICATION
    (batch,) = data.train_dataloader()
    marked = batch.gt_mask.flatten(1).any(1)
    assert marked.tolist() == [bool(origins) for origins in batch.origins]
    assert "have no masks" in caplog.text


@pytest.mark.parametrize("num_defects", [0, None])
def test_other_models_train(root: Path, synthetic: Path, tmp_path: Path, num_defects: int | None) -> None:
    model = Padim(backbone="resnet18", layers=["layer1"], pre_trained=False, n_features=4, visualizer=False)
    engine = Engine(
        default_root_dir=tmp_path / "results",
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = SyntheticDefects(base_of(root, num_defects=num_defects), synthetic, count=3 if num_defects is None else 1)
    engine.fit(model, datamodule=data)
    (results,) = engine.test(model, datamodule=data)
    assert "image_AUROC" in results
    assert next(Path(tmp_path / "results" / "Padim").iterdir()).name == "KSDD2"


def test_settings_of_the_loader_are_those_given_or_else_the_bases(root: Path, synthetic: Path) -> None:
    turned, mirrored = RandomVerticalFlip(), RandomHorizontalFlip()
    base = base_of(root, eval_batch_size=3, train_augmentations=mirrored, val_augmentations=mirrored)
    data = ready(base, synthetic, train_batch_size=2, augmentations=turned, val_augmentations=mirrored)
    assert len(next(iter(data.train_dataloader())).image) == 2
    assert len(next(iter(data.val_dataloader())).image) == 3
    assert (base.train_batch_size, base.eval_batch_size, data.num_workers) == (2, 3, 0)
    for each in (data, base):
        assert each.train_augmentations is each.test_augmentations is turned
        assert each.val_augmentations is mirrored
    settings = ["num_workers", "train_batch_size", "eval_batch_size"]
    settings += ["train_augmentations", "val_augmentations", "test_augmentations", "augmentations"]
    assert {*settings} <= {*inspect.signature(SyntheticDefects).parameters} & {
        *inspect.signature(DefectDataModule).parameters
    }


MODEL = ["--model", "ExDD", "--model.backbone", "filter_bank", "--model.image_size", "[48, 32]"]


def test_command_line_trains(root: Path, synthetic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = ["--data.base", "KSDD2", "--data.base.root", str(root), "--data.base.num_workers", "0"]
    chosen = ["--data", "SyntheticDefects", *base, "--data.synthetic_root", str(synthetic), "--data.count", "4"]
    command = AnomalibCLI(["train", *MODEL, *chosen])
    data = command.datamodule
    assert isinstance(data, SyntheticDefects)
    assert (type(data.base), data.base.root) == (KSDD2, root)
    train = data.train_data.samples
    expected = {row.image_path: list(row.origins) for row in train[train.is_synthetic].itertuples()}
    assert len(expected) == 4
    assert command.model.model.positive_bank.origins == expected
    assert (tmp_path / "results" / "ExDD" / "KSDD2" / "latest" / "weights").is_dir()


def test_configuration_names_the_base(root: Path, synthetic: Path, tmp_path: Path) -> None:
    config = tmp_path / "data.yaml"
    config.write_text(
        f"""
        data:
          class_path: SyntheticDefects
          init_args:
            synthetic_root: {synthetic}
            count: 2
            seed: 3
            base:
              class_path: KSDD2
              init_args: {{root: {root}, num_defects: 5}}
        """
    )
    loader = ["--data.train_batch_size", "5", "--data.num_workers", "1"]
    data = AnomalibCLI(["train", *MODEL, "--config", str(config), "--data.count", "3", *loader], run=False).datamodule
    assert isinstance(data, SyntheticDefects)
    assert isinstance(data.base, KSDD2)
    assert (data.base.num_defects, data.count, data.seed) == (5, 3, 3)
    assert (data.train_batch_size, data.eval_batch_size, data.num_workers) == (5, 32, 1)


def test_command_line_explains(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        AnomalibCLI(["train", "--data.help", "SyntheticDefects"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--data.base" in shown
    assert "known subclasses" in shown
    assert "drawn with ``seed``; a small draw is contained in a larger one" in shown
