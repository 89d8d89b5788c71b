"""Counts what real processes hand to torch.distributed in one loss and one step; `test_scale_model.py` judges it.

    TRITON_INTERPRET=1 python collective_ranks.py FOLDER ROWS DIM PARAMETERS

The parent imports torch once and forks two ranks, then four. FOLDER/WORLD.json says what rank 0 counted.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from bench import quick_interpreter
from bench.scale_model import counted_collectives
from fastclap.losses import info_nce
from fastclap.train.distributed import Gradients, World


def rank_main(rank: int, world: int, rows: int, dim: int, parameters: int, file: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}.store", rank=rank, world_size=world)
    counts = {}
    for engine in ("torch", "triton"):
        for ids in (True, False):
            torch.manual_seed(rank)
            a, b = (torch.randn(rows // world, dim, requires_grad=True) for _ in range(2))
            scale = torch.tensor(10.0, requires_grad=True)
            own = torch.arange(rows // world) if ids else None
            options = {"a_ids": own, "b_ids": own, "process_group": dist.group.WORLD, "backend": engine}
            calls = {}
            for once in (
                False,
                True,
                True,
            ):  # counts the second with `agree_once`: the first may be the one that agrees
                with counted_collectives() as found:
                    info_nce(a, b, scale, **options, agree_once=once).backward()
                calls[once] = list(found)
            counts[f"{engine} {'with' if ids else 'without'} ids"] = [calls[False], calls[True]]
    layers = [nn.Parameter(torch.zeros(parameters // 4)) for _ in range(4)]
    gradients = Gradients(layers, World(rank, world, torch.device("cpu"), dist.group.WORLD))
    with counted_collectives() as found:
        sum((layer.sum() for layer in layers), torch.zeros(())).backward()
        gradients.finish(torch.zeros(2))
    counts["gradients"] = list(found)
    if rank == 0:
        file.write_text(json.dumps(counts))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    folder, rows, dim, parameters = Path(sys.argv[1]), *map(int, sys.argv[2:])
    assert os.environ.get("TRITON_INTERPRET") == "1"
    quick_interpreter.install()
    context = multiprocessing.get_context("fork")
    failed = False
    for world in (2, 4):
        arguments = (world, rows, dim, parameters, folder / f"{world}.json")
        ranks = [context.Process(target=rank_main, args=(rank, *arguments)) for rank in range(world)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(120)
            if process.is_alive():
                process.kill()
                process.join()
            failed |= process.exitcode != 0
    sys.exit(failed)


if __name__ == "__main__":
    main()
