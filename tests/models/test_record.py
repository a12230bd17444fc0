"""The record: everything is on disk at once, in order, and comes out as it went in."""

import csv
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from anomalib_exdd.models.record import Record


def test_events_come_back_as_they_went_in(tmp_path: Path) -> None:
    record = Record(tmp_path / "record.db")
    added = [
        ("prediction", "v1", "a.png", {"path": "a.png", "probability": 0.25, "regions": [{"box": [1, 2, 3, 4]}]}),
        ("answer", "v1", "a.png", {"answer": "defect", "kind": "Kratzer, tief"}),
        ("prediction", "v2", "\udce4.png", {"path": "\udce4.png", "probability": None, "regions": None}),
    ]
    for event in added:
        record.add(*event)
    found = list(record.events())
    assert [event.content for event in found] == [event[3] for event in added]
    assert [event[1:3] for event in found] == [event[:2] for event in added]
    assert [event.path for event in found] == ["a.png", "a.png", "?.png"]
    assert sorted(event.time for event in found) == [event.time for event in found]
    assert [event.action for event in record.events("answer", "teach")] == ["answer"]

    record.write_csv(tmp_path / "record.csv")
    with (tmp_path / "record.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["action"] for row in rows] == ["prediction", "answer", "prediction"]
    assert json.loads(rows[0]["regions"]) == [{"box": [1, 2, 3, 4]}]
    assert (rows[0]["probability"], rows[2]["probability"], rows[1]["kind"]) == ("0.25", "", "Kratzer, tief")


def test_several_threads_and_openings_share_a_record(tmp_path: Path) -> None:
    records = [Record(tmp_path / "record.db") for _ in range(2)]

    def add(number: int) -> None:
        records[number % 2].add("prediction", "v1", f"{number}.png", {"number": number})

    with ThreadPoolExecutor(8) as executor:
        list(executor.map(add, range(200)))
    assert sorted(event.content["number"] for event in records[0].events()) == list(range(200))
    reading = records[0].events()
    next(reading)
    add(200)  # nobody waits, and who reads sees one state
    assert sum(1 for _ in reading) == 199
    assert sum(1 for _ in records[1].events()) == 201


def test_nothing_is_lost_when_the_process_is_killed(tmp_path: Path) -> None:
    script = (
        "import sys; from anomalib_exdd.models.record import Record; record = Record(sys.argv[1])\n"
        "for number in range(10**9):\n"
        "    record.add('prediction', 'v1', 'a.png', {'number': number}); print(number, flush=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "record.db")], stdout=subprocess.PIPE)
    assert process.stdout is not None
    told = [process.stdout.readline() for _ in range(50)]
    os.kill(process.pid, signal.SIGKILL if os.name != "nt" else signal.SIGTERM)
    told += process.stdout.readlines()
    process.wait()
    record = Record(tmp_path / "record.db")
    found = [event.content["number"] for event in record.events()]
    assert found == list(range(len(found)))
    assert len(found) >= len([line for line in told if line.endswith(b"\n")]) >= 50


def test_another_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(b"\x89PNG no data base" * 100)
    with pytest.raises(ValueError, match=r"photo\.png is no record of predictions"):
        Record(path)
    assert path.read_bytes() == b"\x89PNG no data base" * 100
