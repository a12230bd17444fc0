"""What the processes of a distributed training exchange; a single process gets back what it gives."""

from typing import TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")


def world_size() -> int:
    """Return the number of processes."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Return the number of this process."""
    return distributed.get_rank() if world_size() > 1 else 0


def gather_objects(value: T) -> list[T]:
    """Return the value of every process, in their order; all of them have to call."""
    if world_size() == 1:
        return [value]
    gathered: list[T | None] = [None] * world_size()
    distributed.all_gather_object(gathered, value)
    return gathered  # type: ignore[return-value]


def gather_tensors(value: Tensor) -> Tensor:
    """Concatenate the tensors of all processes along their first dimension, on the device of ``value``."""
    if world_size() == 1:
        return value
    # NCCL takes tensors of the GPU only, gloo those of the CPU.
    device = torch.device("cuda", torch.cuda.current_device()) if distributed.get_backend() == "nccl" else "cpu"
    local = value.to(device).contiguous()
    lengths = [int(length) for length in gather_objects(len(local))]
    padded = local.new_zeros(max(lengths), *local.shape[1:])
    padded[: len(local)] = local
    gathered = [torch.empty_like(padded) for _ in lengths]
    distributed.all_gather(gathered, padded)
    return torch.cat([part[:length] for part, length in zip(gathered, lengths, strict=True)]).to(value.device)
