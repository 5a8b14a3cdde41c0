"""How long a step of Muon takes to make its matrices orthogonal: divided among the processes, and repeated by each.

torchrun --standalone --nproc_per_node=8 -m benchmarks.muon
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from common.device import has_bfloat16
from common.muon import orthogonalize_across_processes
from common.processes import World, start_processes
from common.script import Positive, check_settings, parse_flags, run
from model import PRESETS
from recipes import Size


@dataclass(frozen=True)
class BenchmarkConfig:
    model: Size = "gpt2"  # size
    repeat: Positive[int] = 3  # times that each way is measured, of which the fastest counts
    device: str = "auto"  # auto, cpu or cuda


def matrices_of(config: BenchmarkConfig, device: torch.device) -> list[Tensor]:
    """Random gradients of the blocks' matrices, those of one shape together: (N, rows, columns)."""
    L, C = PRESETS[config.model].n_layer, PRESETS[config.model].n_embd
    dtype = torch.bfloat16 if has_bfloat16(device) else torch.float32
    shapes = ((3 * L, C, C), (L, C, C), (L, 4 * C, C), (L, C, 4 * C))
    return [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]


def seconds(matrices: list[Tensor], sharing: World, world: World) -> float:
    """Seconds until all processes are done, with the work divided among those of `sharing`."""
    world.barrier()
    began = time.perf_counter()
    for stacked in matrices:
        float(orthogonalize_across_processes(stacked, sharing)[-1, -1, -1])  # waits for the device
    world.barrier()
    return time.perf_counter() - began


def compare(config: BenchmarkConfig) -> None:
    """Measure both ways by turns; prints a line of JSON with all figures."""
    check_settings(config)
    with start_processes(config.device, timeout=600) as world:
        matrices = matrices_of(config, world.device)
        ways = {"divided": world, "repeated": World(0, 1, world.device)}
        times = [{way: seconds(matrices, w, world) for way, w in ways.items()} for _ in range(config.repeat + 1)]
        least = {way: min(measured[way] for measured in times[1:]) for way in ways}  # the first time warms up
        about = {"processes": world.size, "device": world.device.type, "torch": torch.__version__}
        ratio = least["repeated"] / least["divided"]
        world.print(json.dumps(asdict(config) | about | {"seconds": least, "ratio": ratio}))


def main(argv: list[str] | None = None) -> None:
    compare(parse_flags(BenchmarkConfig, argv, __doc__))


if __name__ == "__main__":
    run(main)
