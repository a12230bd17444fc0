"""Telling states of a model apart."""

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def fingerprint(values: Iterable[Any]) -> str:
    """Return the SHA-256 of the bytes of all tensors among the values, of any dtype, in hexadecimal."""
    content = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            content.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return content.hexdigest()
