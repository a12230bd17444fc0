"""Kinds of defects from training to the tables of a test and of a prediction."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from anomalib.engine import Engine
from PIL import Image

from anomalib_exdd import DefectFolder, ExDD
from anomalib_exdd.images.reading import read_image
from anomalib_exdd.models.visualization import add_caption

Make = Callable[..., Any]
HEIGHT, WIDTH = 96, 64
KNOWN = ["bright", "dark"]


def save_surface(folder: Path, number: int, kind: str = "") -> Path:
    """Draw a grey surface with a square of a kind: bright, dark, or fine stripes of the surface's own brightness."""
    rng = np.random.default_rng((number, len(kind)))
    image = rng.normal(120, 6, (HEIGHT, WIDTH))
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    if kind:
        top, left = rng.integers(10, 50), rng.integers(6, 26)
        mask[top : top + rng.integers(20, 32), left : left + 28] = True
        stripes = np.where(np.arange(WIDTH) % 4 < 2, 1.0, -1.0)
        image += mask * rng.uniform(40, 80) * {"bright": 1.0, "dark": -1.0, "stripes": stripes}[kind]
    path = folder / (kind or "good") / f"{number}.png"
    for place, shown in ((path, np.clip(image, 0, 255)), (folder / "masks" / f"{kind}{number}.png", mask * 255.0)):
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(shown.astype(np.uint8)).save(place)
    return path


@pytest.fixture(scope="module")
def surfaces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV file of surfaces: in training two kinds of defects, in the test a third one too."""
    root = tmp_path_factory.mktemp("surfaces")
    rows = []
    for split, numbers, kinds in (("train", range(24), ["", *KNOWN]), ("test", range(24, 30), ["", *KNOWN, "stripes"])):
        for kind in kinds:
            for number in numbers if not kind else numbers[:16]:
                path = save_surface(root, number, kind)
                mask = root / "masks" / f"{kind}{number}.png" if kind else ""
                rows.append([path, mask, "bad" if kind else "good", split, kind])
    with (root / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "mask", "label", "split", "kind"], *rows])
    return root


@pytest.fixture(scope="module")
def trained_on_kinds(surfaces: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ExDD, DefectFolder]:
    model = ExDD(backbone="filter_bank", image_size=(HEIGHT, WIDTH), top_fraction=0.05, explain=1)
    data = DefectFolder("surfaces", csv=surfaces / "table.csv", num_workers=0)
    root = tmp_path_factory.mktemp("trained")
    Engine(default_root_dir=root, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False).fit(
        model, data
    )
    return model, data


def test_known_kinds_are_named_and_a_new_one_is_unfamiliar(
    trained_on_kinds: tuple[ExDD, DefectFolder], engine: Make, tmp_path: Path
) -> None:
    model, data = trained_on_kinds
    engine().test(model, data)
    (path,) = tmp_path.rglob("kinds.csv")
    assert (path.parent / "images").is_dir()
    with path.open(newline="") as file:
        table = {row.pop("kind"): {name: int(count) for name, count in row.items()} for row in csv.DictReader(file)}
    assert list(table) == ["good", *KNOWN, "stripes"]
    assert {tuple(row) for row in table.values()} == {(*KNOWN, "unfamiliar", "accepted")}
    assert all(sum(row.values()) == 6 for row in table.values())
    assert table["good"]["accepted"] >= 5
    assert table["bright"]["bright"] >= 5
    assert table["dark"]["dark"] >= 5
    assert table["stripes"]["unfamiliar"] >= 5


def test_predictions_pictures_and_explanations_give_the_same_reasons(
    trained_on_kinds: tuple[ExDD, DefectFolder], engine: Make, tmp_path: Path
) -> None:
    model = trained_on_kinds[0]
    folder = tmp_path / "photos"
    folder.mkdir()
    for kind in ("", "bright", "stripes"):
        save_surface(tmp_path / "drawn", 77, kind).rename(folder / f"{kind or 'good'}.png")
    predictions = {Path(each.image_path[0]).stem: each for each in engine().predict(model, data_path=folder)}
    (path,) = tmp_path.rglob("predictions.json")
    rows = {Path(row["path"]).stem: row for row in json.loads(path.read_text())["predictions"]}
    reasons = {name: (row["reason"], row["kind"], row["kind_share"]) for name, row in rows.items()}
    share = reasons["bright"][2]
    assert 0.5 < share <= 1
    assert reasons == {
        "good": (None, None, None), "bright": ("known", "bright", share), "stripes": ("unfamiliar", None, None)
    }  # fmt: skip
    assert rows["good"]["decision"] == "accept"
    for name in ("bright", "stripes"):
        assert rows[name]["num_regions"] >= 1
        highest = rows[name]["regions"][0]
        assert (highest["reason"], highest["kind"]) == reasons[name][:2]

    for name, words in {
        "good": "",
        "bright": f"; resembles bright ({100 * share:.0f} %)",
        "stripes": "; unfamiliar",
    }.items():
        (line,) = predictions[name].explanation
        assert line.endswith(f"){words}")
        with Image.open(path.parent / "images" / "photos" / f"{name}.png") as picture:
            caption = np.asarray(picture)[-24:]
        assert (caption == np.asarray(add_caption(Image.new("RGB", (caption.shape[1], 1)), line))[-24:]).all()
        explanation = model.explain(read_image(folder / f"{name}.png"), name)
        assert explanation.decision == line
        assert line in str(explanation)
        stored = json.loads((path.parent / "explanations" / f"{name}.json").read_text())
        assert (stored["reason"], stored["kind"], stored["kind_share"]) == reasons[name]
        assert stored["decision"] == line
