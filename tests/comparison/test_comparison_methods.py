"""What each method gets: the same for all where the models allow it, and a note where not."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from anomalib.data import InferenceBatch
from anomalib.data.utils import LabelName
from anomalib.models import Padim, Supersimplenet

from anomalib_exdd.comparison.config import ComparisonConfig, MethodConfig
from anomalib_exdd.comparison.data import DataFiles, build_data, without_defective_training_images
from anomalib_exdd.comparison.methods import ResolvedMethod, build_model, resolve_method
from anomalib_exdd.comparison.worker import QUICK, trainer_settings
from made_up_surfaces import make_surfaces

SHARED: dict[str, Any] = {"image_size": (64, 48), "backbone": "resnet18", "seeds": [3]}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_surfaces(tmp_path_factory.mktemp("data") / "surfaces")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of weights that nobody else has."""
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.manual_seed(7)
    torch.save(timm.create_model("resnet18", pretrained=False).state_dict(), path)
    return path


def settings(root: Path, **changes: Any) -> ComparisonConfig:
    arguments: dict[str, Any] = {
        "data": {"class_path": "KSDD2", "init_args": {"root": str(root), "num_workers": 0}},
        "methods": [MethodConfig("some", "ExDD")],
        "output": root.parent / "out",
        **SHARED,
    }
    return ComparisonConfig(**{**arguments, **changes})


def prepared(root: Path, method: dict[str, Any], **changes: Any) -> ResolvedMethod:
    return resolve_method(MethodConfig.from_dict({"name": "it", **method}), settings(root, **changes))


def test_all_get_the_same_size_and_backbone(root: Path) -> None:
    for model in ("ExDD", "Patchcore", "Padim", "Supersimplenet", "anomalib_exdd.ExDD"):
        found = prepared(root, {"class_path": model})
        assert found.described.arguments["backbone"] == "resnet18"
        assert found.image_size == (64, 48)
        assert not any("instead of" in note for note in found.described.notes)


def test_notes_say_what_is_different(root: Path) -> None:
    draem = prepared(root, {"class_path": "Draem", "image_size": [96, 64], "data": {"train_batch_size": 8}})
    assert draem.described.notes == [
        "Input 96 x 64 instead of 64 x 48.",
        "Network of its own, without the shared backbone.",
        "Without the defective training images.",
        "Data with train_batch_size 8.",
    ]
    padim = prepared(root, {"class_path": "Padim", "init_args": {"backbone": "resnet34", "pre_trained": False}})
    assert padim.described.notes[:2] == ["Backbone resnet34 instead of resnet18.", "Backbone without trained weights."]
    assert prepared(root, {"class_path": "ExDD"}).described.notes == []
    dinomaly = prepared(root, {"class_path": "Dinomaly", "image_size": [448, 448]})
    assert "Crops images (CenterCrop(size=(392, 392))); pixel metrics are of what is left." in dinomaly.described.notes


def test_defects_are_for_those_that_use_them(root: Path) -> None:
    uses = {
        "ExDD": prepared(root, {"class_path": "ExDD"}),
        "one-class": prepared(root, {"class_path": "Supersimplenet"}),
        "supervised": prepared(root, {"class_path": "Supersimplenet", "init_args": {"supervised": True}}),
        "told": prepared(root, {"class_path": "ExDD", "uses_defects": False}),
    }
    assert [name for name, method in uses.items() if method.uses_defects] == ["ExDD", "supervised"]
    assert "With the defective training images and their masks." in uses["supervised"].described.notes


def test_one_class_models_see_normal_training_images_only(root: Path) -> None:
    described = prepared(root, {"class_path": "Padim"}).run_settings(settings(root), 3)["data"]
    whole, normal = build_data(described), without_defective_training_images(build_data(described))
    for data in (whole, normal):
        data.setup()
    assert (whole.train_data.samples["label_index"] == LabelName.ABNORMAL).sum() > 0
    kept = whole.train_data.samples["label_index"] == LabelName.NORMAL
    assert list(normal.train_data.samples["image_path"]) == list(whole.train_data.samples["image_path"][kept])
    assert list(normal.val_data.samples["image_path"]) == list(whole.val_data.samples["image_path"])
    assert list(normal.test_data.samples["image_path"]) == list(whole.test_data.samples["image_path"])
    assert normal.train_data.task == whole.train_data.task
    labels = torch.cat([batch.gt_label for batch in normal.train_dataloader()])
    assert not labels.any()


def test_seeds_are_the_same_for_all(root: Path) -> None:
    runs = [
        prepared(root, {"class_path": model, **more}).run_settings(settings(root), 3)
        for model, more in (("ExDD", {}), ("Padim", {"data": {"eval_batch_size": 2}}))
    ]
    assert runs[0]["model"]["init_args"]["seed"] == 3
    files = DataFiles()
    assert files.images(runs[0]["data"]) == files.images(runs[1]["data"])
    fixed = prepared(root, {"class_path": "ExDD", "init_args": {"seed": 9}}).run_settings(settings(root), 3)
    assert fixed["model"]["init_args"]["seed"] == 9


def test_local_weights_reach_every_backbone(root: Path, weights: Path) -> None:
    """Supersimplenet has no argument for untrained weights: it must not try to download any either."""
    expected = torch.load(weights, weights_only=True)["layer2.0.conv1.weight"]
    for model in ("ExDD", "Padim", "Supersimplenet"):
        method = prepared(root, {"class_path": model}, weights=weights)
        built = build_model(method.run_settings(settings(root, weights=weights), 0))
        extractor = built.model.feature_extractor
        if model == "ExDD":
            extractor.load_weights()
        loaded = [value for name, value in extractor.state_dict().items() if name.endswith("layer2.0.conv1.weight")]
        assert len(loaded) == 1
        assert torch.equal(loaded[0], expected)
        assert built.input_size == (64, 48)
        assert built.evaluator is built.visualizer is None
        raw = InferenceBatch(pred_score=torch.tensor([7.0]), anomaly_map=torch.full((1, 2, 2), 9.0))
        assert built.post_processor(raw) == raw
    stfpm = build_model(prepared(root, {"class_path": "Stfpm"}, weights=weights).run_settings(settings(root), 0)).model
    teacher, student = (each.state_dict() for each in (stfpm.teacher_model, stfpm.student_model))
    name = next(name for name in teacher if name.endswith("layer2.0.conv1.weight"))
    assert torch.equal(teacher[name], expected)
    assert not torch.equal(student[name], expected)
    other = prepared(root, {"class_path": "Padim", "init_args": {"backbone": "resnet34"}}, weights=weights)
    assert other.weights == ""
    assert any("resnet18.pth is of resnet18" in note for note in other.described.notes)


def test_quick_shortens_trainings_but_fills_memory_banks(root: Path) -> None:
    run = prepared(root, {"class_path": "Padim", "trainer": {"log_every_n_steps": 5}}).run_settings(
        settings(root, quick=True), 0
    )
    padim = Padim(backbone="resnet18", pre_trained=False)
    assert trainer_settings(padim, run) == {"log_every_n_steps": 5}

    class Trained(Supersimplenet):  # its schedule without its network
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.norm_clip_val = 0

    assert trainer_settings(Trained(), {**run, "trainer": {"max_epochs": 2, "max_steps": 9}}) == {
        "max_epochs": 2,
        "limit_train_batches": QUICK["limit_train_batches"],
    }
    assert trainer_settings(Trained(), {**run, "trainer": {"max_epochs": 2}, "quick": False}) == {"max_epochs": 2}


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"class_path": "Padimm"}, "There is no AnomalibModule called 'Padimm': known are .* Padim,"),
        ({"class_path": "no_such.Model"}, "There is no AnomalibModule called 'no_such.Model'"),
        ({"class_path": "ExDD", "init_args": {"scorin": "paper"}}, "scorin"),
        ({"class_path": "ExDD", "init_args": {"scoring": "best"}}, "Method 'it', ExDD: .*scoring.*best"),
        ({"class_path": "ExDD", "init_args": {"visualizer": False}}, "'it': `init_args` cannot give `visualizer`"),
        ({"class_path": "ExDD", "trainer": {"max_epoch": 1}}, "`trainer` of method 'it'.*max_epoch"),
        ({"class_path": "ExDD", "trainer": {"devices": 2}}, "cannot give `devices`"),
        ({"class_path": "ExDD", "speed": 1}, "Method 'it': Option 'speed' is not accepted"),
        ({}, "Method 'it': .*'class_path' is required"),
        ({"class_path": "ExDD", "notes": "one"}, "Method 'it': argument .notes.: .*list.* Got value: one"),
        ({"class_path": "ExDD", "image_size": 224}, "Method 'it': argument .image_size.: .*224"),
        ({"class_path": "ExDD", "published": {"image_AUROC": 94.2}}, "from 0 to 1.*94.2"),
    ],
)
def test_mistakes_in_a_method_are_named_in_one_line(root: Path, method: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        prepared(root, method)
    assert "\n" not in str(caught.value)


def test_mistakes_in_the_data_are_named(root: Path) -> None:
    comparison = settings(root)
    method = prepared(root, {"class_path": "ExDD", "data": {"batches": 3}})
    with pytest.raises(ValueError, match=r"`data` of method 'it'.*batches"):
        method.run_settings(comparison, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": []}, "at least one method"),
        ({"methods": [MethodConfig(name, "ExDD") for name in ("a", "a")]}, r"rename all but one of \['a', 'a'\]"),
        (
            {"methods": [MethodConfig(name, "ExDD") for name in ("a b", "a_b")]},
            r"rename all but one of \['a b', 'a_b'\]",
        ),
        ({"baseline": "Best"}, "one of the methods, \\['some'\\], but got 'Best'"),
        ({"seeds": []}, "`seeds` has to be a list of different numbers"),
        ({"seeds": [1, 1]}, "`seeds` has to be a list of different numbers"),
        ({"weights": Path("nowhere.pth")}, "there is none at nowhere.pth"),
        ({"resamples": 1}, "`resamples` has to be at least 100"),
    ],
)
def test_mistakes_in_the_settings_are_named(root: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(root, **changes)
