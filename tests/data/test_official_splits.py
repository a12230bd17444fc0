"""Reading the published splits, which are pickles from a download."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anomalib_exdd.data.ksdd2 import read_official_split


class RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch it_ran",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (([RunsCode()], []), r"asks for `(posix|nt)\.system`"),
        (np.zeros(2), r"asks for `numpy"),
        ([], "argument 2 is shorter"),
        ({"train": []}, "not enough values"),
        (([(1, True)], 5), "not iterable"),
        (([(1, True, 2)], []), "too many values to unpack"),
        (([([], True)], []), "unsupported format"),
    ],
)
def test_split_file_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "split_weakly_16.pyb"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=rf"split_weakly_16\.pyb` is no KSDD2 split \(.*{message}"):
        read_official_split(path)
    assert not (tmp_path / "it_ran").exists()


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x80\x04K", pickle.dumps(([], []))[:-1], b"(lp0\nI1\na"])
def test_broken_split_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "split_weakly_16.pyb"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"split_weakly_16\.pyb` is no KSDD2 split"):
        read_official_split(path)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_split_file_of_any_protocol(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "split_weakly_16.pyb"
    path.write_bytes(pickle.dumps([[(10000, True), ["10001", False]], [(20000, 1)]], protocol=protocol))
    assert read_official_split(path) == {"train": {"10000": True, "10001": False}, "test": {"20000": True}}
