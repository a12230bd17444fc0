"""Arithmetic that does not depend on the machine's settings or the trainer's precision."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_BLOCK_ROWS = 4096  # rows converted to float64 at a time


class _Precision:
    """The process's precision of float32 products, and how many threads want all of it just now."""

    lock = threading.Lock()
    wanted = 0
    outside = "highest"


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Run with true float32 products: no autocast, no TF32, no bf16 matrix units.

    Reduced precision would make neighbours and coresets depend on the machine, and would void the error bounds that
    make the searches exact. The setting is one for all threads: the first that wants it makes it, the last restores it.
    """
    with _Precision.lock:
        if _Precision.wanted == 0:
            _Precision.outside = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
        _Precision.wanted += 1
    try:
        with torch.autocast(device_type=device.type, enabled=False):
            yield
    finally:
        with _Precision.lock:
            _Precision.wanted -= 1
            if _Precision.wanted == 0:
                torch.set_float32_matmul_precision(_Precision.outside)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch's products in one thread: sums, and what is learnt by them, are the same on any number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threadpoolctl does not reach MKL, of which torch sets the number for each thread
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def mean_of_rows(points_ND: Tensor) -> Tensor:
    """Return the mean, float32, shape (D,), the same for any number of threads.

    It is summed in float64, except on devices that have none.
    """
    wide = torch.float64 if points_ND.device.type in {"cpu", "cuda"} else torch.float32
    sums = [block_ND.sum(dim=0, dtype=wide) for block_ND in points_ND.split(_BLOCK_ROWS)]
    return (torch.stack(sums).sum(dim=0) / len(points_ND)).float()


class Float32Buffers(nn.Module):
    """A module whose floating-point buffers stay as they are when the model is moved to another precision.

    Half-precision trainers convert every floating-point buffer. Memory banks would lose what tells neighbours apart,
    and save nothing in a search that computes in float32.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Float32Buffers":
        before = {name: buffer for name, buffer in self.named_buffers() if buffer.is_floating_point()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            path, _, leaf = name.rpartition(".")
            module = self.get_submodule(path)
            moved: Tensor = getattr(module, leaf)
            if moved.dtype != buffer.dtype:
                setattr(module, leaf, buffer.to(moved.device))
        return self
