"""The shipped configurations of the classifier can be built, and say what the papers' tables say."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from anomalib.cli import AnomalibCLI
from anomalib.data import AnomalibDataModule
from anomalib.models.components import AnomalibModule
from jsonargparse import ArgumentParser
from omegaconf import OmegaConf

from anomalib_exdd import KSDD2, SyntheticDefects
from anomalib_exdd.comparison.results import METRICS
from anomalib_exdd.models.defect_classifier.training import PRESETS

SHOTS = {"zero_shot": 0, "few_shot": 5, "full_shot": None}
SYNTHESIZERS = ("perlin", "dreambooth", "in_and_out", "diag")


def load(repository: Path, shot: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((repository / "configs" / "in_and_out" / f"{shot}.yaml").read_text())
    return content


def built(base: type, name: str, described: dict[str, Any]) -> Any:
    """Build a class as the command line does, from its name and arguments."""
    parser = ArgumentParser()
    parser.add_subclass_arguments(base, name)
    return parser.instantiate_classes(parser.parse_object({name: described}))[name]


@pytest.mark.parametrize(("shot", "num_defects"), SHOTS.items())
def test_every_cell_of_the_tables_can_be_built(
    shot: str, num_defects: int | None, repository: Path, tmp_path: Path
) -> None:
    content = load(repository, shot)
    expected = {f"{name} {count}" for name in SYNTHESIZERS for count in (80, 100, 120)}
    expected |= set() if shot == "zero_shot" else {"real only"}
    methods = {method["name"]: method for method in content["methods"]}
    assert len(methods) == len(content["methods"])
    assert set(methods) == expected
    assert content["baseline"] in methods
    roots = {"init_args": {"base": {"init_args": {"root": str(tmp_path)}}}}
    for name, method in methods.items():
        assert set(method) <= {"name", "class_path", "init_args", "data", "published", "published_source"}
        changes = {"init_args": method.get("data", {})}
        described = OmegaConf.to_container(OmegaConf.merge(content["data"], changes, roots))
        data = built(AnomalibDataModule, "data", described)
        assert isinstance(data, SyntheticDefects)
        assert isinstance(data.base, KSDD2)
        assert data.base.num_defects == num_defects
        synthesizer, _, count = name.rpartition(" ")
        assert data.count == (0 if name == "real only" else int(count))
        assert name == "real only" or data.synthetic_root.parts[-2:] == (shot, synthesizer)
        arguments = method["init_args"]
        assert method["class_path"] == "DefectClassifier"
        assert arguments["preset"] == ("diag" if synthesizer == "diag" else "in_and_out")
        assert data.train_batch_size == PRESETS[arguments["preset"]].batch_size
        assert set(method.get("published", {})) <= set(METRICS)
        assert bool(method.get("published")) == bool(method.get("published_source"))
    for arguments in {str(m["init_args"]): m["init_args"] for m in methods.values()}.values():
        model = built(AnomalibModule, "model", {"class_path": "DefectClassifier", "init_args": {**arguments, **TINY}})
        assert model.input_size == PRESETS[arguments["preset"]].image_size


TINY = {"backbone": "test_resnet"}  # instead of a ResNet-50, whose construction takes long


def test_a_zero_shot_cell_trains_as_written(repository: Path, tmp_path: Path) -> None:
    """Paths and the size of the network aside: the keys are those of the data modules and of the model."""
    content = load(repository, "zero_shot")
    cell = next(method for method in content["methods"] if method["name"] == "diag 80")
    data = OmegaConf.to_container(OmegaConf.merge(content["data"], {"init_args": cell["data"]}))
    config = {"model": {name: cell[name] for name in ("class_path", "init_args")}, "data": data}
    path = tmp_path / "cell.yaml"
    path.write_text(yaml.safe_dump(config))
    parsed = AnomalibCLI(["train", "--config", str(path), "--model.init_args.backbone", "test_resnet"], run=False)
    assert type(parsed.model).__name__ == "DefectClassifier"
    assert parsed.datamodule.train_batch_size == 32
    assert parsed.datamodule.synthetic_root == Path("synthetic/zero_shot/diag")


def test_the_single_training_is_the_preset(repository: Path) -> None:
    path = repository / "configs" / "defect_classifier.yaml"
    parsed = AnomalibCLI(["train", "--config", str(path), "--model.backbone", "test_resnet"], run=False)
    assert parsed.model.input_size == PRESETS["in_and_out"].image_size
    assert parsed.datamodule.train_batch_size == PRESETS["in_and_out"].batch_size
