"""Points in several processes give the selection of one process, however they are split."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, multiprocessing

from anomalib_exdd.coreset import Shard, greedy_k_center

TOTAL, COUNT = 600, 80


def points(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if kind == "grid":  # ties and duplicates everywhere
        return torch.randint(-3, 4, (TOTAL, 3), generator=generator).float()
    return torch.randn(TOTAL, 8, generator=generator)


def split(kind: str, process: int) -> Tensor:
    """Return which points a process has."""
    everyone = torch.arange(TOTAL)
    if kind == "nothing for the second":
        return everyone[: TOTAL * (1 - process)]
    return everyone[process::2] if kind == "alternating" else everyone[process * 10 : 10 + process * TOTAL]


def select(process: int, folder: str) -> None:
    """Select in one of two processes, and write the choices down."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=process, world_size=2)
    found = {}
    for kind in ("normal", "grid"):
        all_points = points(kind)
        mean = all_points.double().mean(dim=0).float()
        for way in ("alternating", "unequal", "nothing for the second"):
            index = split(way, process)
            shard = Shard(index, TOTAL, mean)
            found[f"{kind} {way}"] = greedy_k_center(all_points[index], COUNT, candidates=16, shard=shard)
    torch.save(found, Path(folder) / f"{process}.pt")
    distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_available(), reason="this torch cannot run several processes")
def test_two_processes_select_what_one_does(tmp_path: Path) -> None:
    multiprocessing.spawn(select, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{process}.pt", weights_only=True) for process in range(2))
    assert len(first) == 6
    for name, chosen in first.items():
        assert torch.equal(chosen, second[name]), name
        all_points = points(name.split()[0])
        alone = greedy_k_center(all_points, COUNT, candidates=16)
        if name.startswith("normal"):
            assert torch.equal(chosen, alone), name
        else:  # ties may be broken otherwise: the radius is the same
            assert len(set(chosen.tolist())) == COUNT
            radii = [torch.cdist(all_points, all_points[found]).amin(dim=1).max() for found in (chosen, alone)]
            torch.testing.assert_close(radii[0], radii[1])
