"""The table of predictions: both files hold the rows that were written, whatever is in them."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from anomalib_exdd.models.callbacks.prediction_row import PredictionRow
from anomalib_exdd.models.callbacks.predictions import CSV_NAME, JSON_NAME, Summary, partial_path, write_tables
from anomalib_exdd.models.regions import Region

ROW = PredictionRow(
    path='a, "b"\nü.png',
    score=0.1,
    raw_score=-3.25,
    probability=None,
    decision="review",
    reason="known",
    kind="scratch",
    kind_share=0.75,
    label="normal",
    threshold=0.5,
    num_regions=1,
    regions=[Region((1, 2, 3, 4), 9, 0.75, "known", None)],
    seconds=0.5,
)
ROWS = [
    [ROW, PredictionRow("broken.png", error="The image cannot be decoded.")],
    [],
    [replace(ROW, path="c\udce4.png", decision="reject", label="defective", seconds=1.5, regions=None)],
]


@pytest.fixture
def partials(tmp_path: Path) -> list[Path]:
    paths = [partial_path(tmp_path, process) for process in range(len(ROWS))]
    for path, rows in zip(paths, ROWS, strict=True):
        path.write_text("".join(json.dumps(row.to_dict()) + "\n" for row in rows))
    return paths


def test_both_files_hold_the_rows_of_all_processes_in_order(partials: list[Path], tmp_path: Path) -> None:
    partial_path(tmp_path, 12).write_text("left behind")
    write_tables(tmp_path, len(partials), Summary(masks_left_out=4))
    assert sorted(path.name for path in tmp_path.iterdir()) == [CSV_NAME, JSON_NAME]
    content = json.loads((tmp_path / JSON_NAME).read_text())
    expected = [json.loads(json.dumps(row.to_dict())) for rows in ROWS for row in rows]
    assert content["predictions"] == expected
    assert expected[0]["regions"] == [{"box": [1, 2, 3, 4], "area": 9, "value": 0.75, "reason": "known", "kind": None}]

    with (tmp_path / CSV_NAME).open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        table = csv.DictReader(file)
        found = list(table)
        assert list(table.fieldnames or [])[-3:] == ["kind", "kind_share", "normal_distance"]
    for row, values in zip(found, expected, strict=True):
        assert row["regions"] == ("" if values["regions"] is None else json.dumps(values["regions"]))
        for name, value in values.items():
            if name != "regions":
                assert row[name] == ("" if value is None else str(value))


def test_summary_counts(partials: list[Path], tmp_path: Path) -> None:
    summary = Summary(masks_left_out=4)
    write_tables(tmp_path, len(partials), summary)
    assert (summary.images, summary.unreadable, summary.seconds) == (2, ["The image cannot be decoded."], 2.0)
    assert summary.decisions == {"review": 1, "reject": 1}
    assert summary.labels == {"normal": 1, "defective": 1}
    assert summary.slowest == ("c\udce4.png", 1.5)
    line = str(summary).replace("\udce4", "ae")
    assert line == (
        "2 images: 0 accept, 1 review, 1 reject; 1.000 s per image, slowest 1.500 s (cae.png); "
        "1 unreadable; 4 masks left out"
    )
    stored = json.loads((tmp_path / JSON_NAME).read_text())["summary"]
    assert stored["slowest"] == ["c\udce4.png", 1.5]
    assert stored["decisions"] == summary.decisions
    assert stored["unreadable"] == 1


def test_nothing_is_replaced_before_all_is_written(partials: list[Path], tmp_path: Path) -> None:
    (tmp_path / CSV_NAME).write_text("old")
    with partials[2].open("a") as file:
        file.write("{broken\n")
    with pytest.raises(json.JSONDecodeError):
        write_tables(tmp_path, len(partials), Summary())
    assert (tmp_path / CSV_NAME).read_text() == "old"
    assert not (tmp_path / JSON_NAME).exists()
