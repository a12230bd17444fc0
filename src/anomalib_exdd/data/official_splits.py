"""KSDD2's published choices of which defective training images have masks (``split_weakly_N.pyb``).

The files are pickles of ``(train_samples, test_samples)``, each a list of ``(image id, mask may be used)``. A pickle
can run any code when it is read, and these come from a download: the reader here builds lists, tuples, numbers, strings
and booleans, and refuses everything else.
"""

from __future__ import annotations

import io
import pickle
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

OFFICIAL_SPLITS: tuple[int, ...] = (0, 16, 53, 126, 246)

_MAX_ID = 99_999
_MAX_BYTES = 16_000_000  # the published files hold some 3,300 pairs
_UNPICKLING_ERRORS = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    OverflowError,
    MemoryError,
)


@dataclass(frozen=True)
class OfficialSplit:
    """One published split.

    Attributes:
        train_ids: Ids of all training images.
        released_ids: Ids of the training images whose masks may be used.
        test_ids: Ids of all test images.
    """

    train_ids: frozenset[str]
    released_ids: frozenset[str]
    test_ids: frozenset[str]


def split_path(root: Path, num_segmented: int) -> Path:
    """Name the file of a published split.

    Args:
        root: Folder of the data set.
        num_segmented: Number of defective training images with masks.

    Returns:
        Its path.
    """
    return root / f"split_weakly_{num_segmented}.pyb"


def read_official_split(path: Path) -> OfficialSplit:
    """Read a published split without running anything it contains.

    Args:
        path: A ``split_weakly_N.pyb`` file.

    Returns:
        The ids that it lists.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file holds anything but two lists of pairs of an id and a truth value.
    """
    if not path.is_file():
        msg = (
            f"There is no `{path}`. Argument `official_split` needs the file that comes with the official KSDD2; "
            "for a folder of your own use `num_defects` instead."
        )
        raise FileNotFoundError(msg)
    if path.stat().st_size > _MAX_BYTES:
        _refuse(path, f"it has {path.stat().st_size} bytes, more than {_MAX_BYTES}")
    try:
        content = _PlainUnpickler(io.BytesIO(path.read_bytes())).load()
    except _UNPICKLING_ERRORS as error:
        _refuse(path, str(error) or type(error).__name__)
    if not (isinstance(content, (tuple, list)) and len(content) == 2):
        _refuse(path, "it holds no pair of training and test images")
    train = _read_pairs(path, content[0])
    test = _read_pairs(path, content[1])
    released = frozenset(image_id for image_id, is_released in train.items() if is_released)
    return OfficialSplit(frozenset(train), released, frozenset(test))


class _PlainUnpickler(pickle.Unpickler):
    """Builds plain containers, strings, numbers and booleans; every other object would have to be looked up here."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        msg = f"it asks for `{module_name}.{global_name}`, and only lists, numbers and strings are allowed"
        raise pickle.UnpicklingError(msg)


def _read_pairs(path: Path, samples: Any) -> dict[str, bool]:
    if not isinstance(samples, list):
        _refuse(path, f"a list of images is expected, but it holds a {type(samples).__name__}")
    pairs: dict[str, bool] = {}
    for sample in samples:
        if not _is_pair(sample):
            # reprlib: a pickle of a few bytes may nest lists whose full text never ends
            _refuse(path, f"pairs of an image id and a truth value are expected, but it holds {reprlib.repr(sample)}")
        image_id, is_released = sample
        name = f"{image_id:05d}" if isinstance(image_id, int) else image_id
        if name in pairs:
            _refuse(path, f"it lists the image {reprlib.repr(name)} twice")
        pairs[name] = bool(is_released)
    return pairs


def _is_pair(sample: Any) -> bool:
    if not (isinstance(sample, (tuple, list)) and len(sample) == 2):
        return False
    image_id, is_released = sample
    known_id = isinstance(image_id, str) or (type(image_id) is int and 0 <= image_id <= _MAX_ID)
    return known_id and isinstance(is_released, int) and is_released in {0, 1}


def _refuse(path: Path, reason: str) -> NoReturn:
    msg = f"The file `{path}` is no KSDD2 split: {reason}. Extract it again from the archive of the data set."
    raise ValueError(msg)
