"""How fast GPT-2 trains here, against transformers' GPT-2 in a plain loop; as ratios in one run, on random tokens.

    python benchmarks/train.py
    python benchmarks/train.py --profile
    torchrun --standalone --nproc_per_node=8 benchmarks/train.py --total_batch_size 524288

transformers: GPT2LMHeadModel with autocast and AdamW, as a user would write it
transformers_compiled: the same with torch.compile and fused AdamW
eager, compiled: this program without and with --compile
default: this program as it trains by default on the device

Each runs in processes of its own, without data to read or a log to write. The ceiling is the measured rate of a large
matrix product in the same type.
"""

from __future__ import annotations

import os
import sys

sys.path[:1] = [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]

import contextlib
import json
import math
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import train_gpt2
from common import DataError, Flags, choose_device, flag, keep_freed_memory, naming_remedy, parse_flags, run
from model import GPT, PRESETS
from tokenizer import N_TOKENS
from train_gpt2 import TrainConfig, World

WAYS = ("transformers", "transformers_compiled", "eager", "compiled")
Step = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class BenchmarkConfig(Flags):
    model: str = flag("gpt2", "size", choices=[*PRESETS])
    batch_size: int | None = flag(None, "sequences in a micro-batch (default: 1 on a CPU, else the recipe's)", least=1)
    total_batch_size: int | None = flag(None, "tokens in an optimizer step (default: one micro-batch)", least=1)
    steps: int = flag(5, "optimizer steps to time; their median counts", least=1)
    warmup: int = flag(2, "optimizer steps before them", least=1)
    only: str | None = flag(None, "measure this way alone (default: all)", choices=WAYS)
    profile: bool = flag(False, "print where the time of this program's default goes, and no more")
    compile_mode: str = flag("default", "torch.compile's mode, for all", choices=train_gpt2.COMPILE_MODES)
    device: str = flag("auto", "auto, cpu, mps, cuda or cuda:N")


def train_config(config: BenchmarkConfig, device: torch.device, processes: int, compiled: bool) -> TrainConfig:
    batch_size = config.batch_size or (1 if device.type == "cpu" else train_gpt2.RECIPES[config.model].batch_size)
    total = config.total_batch_size or batch_size * PRESETS[config.model].block_size * processes
    settings = TrainConfig(
        model=config.model,
        batch_size=batch_size,
        total_batch_size=total,
        compile=compiled,
        compile_mode=config.compile_mode,
        data_dir="none",
    )
    settings = train_gpt2.resolve(settings, device)
    train_gpt2.validate(settings, processes)
    return settings


def this_program(settings: TrainConfig, world: World, held: contextlib.ExitStack) -> Step:
    trainer = train_gpt2.make_trainer(settings, world, GPT(PRESETS[settings.model]))
    held.enter_context(train_gpt2.fastest_attention(trainer))
    held.enter_context(train_gpt2.no_collections())
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
    return lambda rows: train_gpt2.training_step(trainer, rows)[0]


def plain_loop(settings: TrainConfig, world: World) -> Step:
    """The optimizer step that a user of transformers would write."""
    import transformers

    sizes = PRESETS[settings.model]
    without_dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)  # as in this program
    shape = {"n_positions": sizes.block_size, "n_embd": sizes.n_embd, "n_layer": sizes.n_layer, "n_head": sizes.n_head}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **without_dropout)).to(world.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.max_lr, fused=settings.compile or None)
    if settings.compile:
        model = torch.compile(model, mode=settings.compile_mode)
    if world.size > 1:
        model = DistributedDataParallel(model)

    def step(rows: Tensor) -> Tensor:
        micro_batches = train_gpt2.share(rows, settings.batch_size, world).to(world.device)
        for number, micro_batch in enumerate(micro_batches):
            model.require_backward_grad_sync = number == len(micro_batches) - 1
            with torch.autocast(world.device.type, train_gpt2.DTYPES[settings.dtype]):
                loss = model(input_ids=micro_batch[:, :-1], labels=micro_batch[:, :-1]).loss / len(micro_batches)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def median_seconds(action: Callable[[], object], times: int, warmup: int) -> float:
    seconds = []
    for _ in range(warmup + times):
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[warmup:])


def ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product: the most that a model of matrix products could reach."""
    torch.set_num_threads(train_gpt2.fair_threads(1))  # torchrun leaves one
    keep_freed_memory()
    n, products = (4096, 1) if device.type == "cpu" else (8192, 20)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    seconds = median_seconds(lambda: [a @ b for _ in range(products)][-1][0, 0].item(), times=10, warmup=3)
    return products * 2 * n**3 / seconds


def peak_memory(device: torch.device) -> int | None:
    """The most bytes held so far: on a GPU by tensors, on Linux by the process, else not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)


def measure(config: BenchmarkConfig, way: str) -> None:
    """Time one way of training, in all processes; the first prints its figures as a line of JSON."""
    with train_gpt2.start_processes(config.device, timeout=600) as world, contextlib.ExitStack() as held:
        settings = train_config(config, world.device, world.size, compiled=way.endswith("compiled"))
        torch.manual_seed(0)
        if way.startswith("transformers"):
            step = plain_loop(settings, world)
        else:
            step = this_program(settings, world, held)
        rows = torch.randint(N_TOKENS, (settings.total_batch_size // settings.block_size, settings.block_size + 1))
        seconds = median_seconds(lambda: step(rows).item(), config.steps, config.warmup)
        if config.profile:
            show_profile(lambda: step(rows).item(), world)
        figures = {
            "tokens_per_second": settings.total_batch_size / seconds,
            "peak_memory_bytes": peak_memory(world.device),
        }
        figures |= {"loss": step(rows).item(), "dtype": settings.dtype}
        world.print(json.dumps(figures))


def show_profile(step: Callable[[], object], world: World) -> None:
    """Print the operations that a step spends its time on."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if world.device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profile:
        step()
    key = "self_cuda_time_total" if world.device.type == "cuda" else "self_cpu_time_total"
    world.print(profile.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=60))


def in_processes_of_its_own(way: str, argv: list[str]) -> dict[str, float]:
    """What `measure` prints, or nothing if it fails; what comes before its line is printed again."""
    command = [sys.executable, __file__, *argv, "--only", way]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if finished.returncode:
        print(f"{way} failed with status {finished.returncode}")
        return {}
    *text, last = finished.stdout.splitlines() or ["{}"]
    print(*text, sep="\n", end="\n" if text else "")
    return json.loads(last)


def report(config: BenchmarkConfig, device: torch.device, default: str, found: dict[str, dict]) -> None:
    """Print a table of ratios, and all figures as one line of JSON."""
    if not found[default]:
        raise DataError("without this program's default there is nothing to compare")
    dtype, flops = found[default]["dtype"], train_gpt2.flops_per_token(GPT(PRESETS[config.model]))
    processes = int(os.environ.get("WORLD_SIZE", 1))
    most = ceiling(device, train_gpt2.DTYPES[dtype]) * (processes if device.type == "cuda" else 1)
    print(
        f"{processes} x {train_gpt2.device_name(device)}, {dtype}: a large matrix product has {most / 1e9:,.0f} GFLOP/s"
    )
    rows = {"default" if way == default == "compiled" else way: figures for way, figures in found.items()}
    rows["default"] = found[default]
    keys = ("tokens_per_second", "peak_memory_bytes")
    figures = {key: {way: row.get(key) for way, row in rows.items()} for key in keys}
    rates = {way: rate for way, rate in figures["tokens_per_second"].items() if rate}
    for way, rate in rates.items():
        ratio = rate / rates.get("transformers", math.nan)
        print(f"{way:22} {rate:10,.0f} tokens/s, {rate * flops / most:6.1%} of that, {ratio:5.2f} times transformers")
    settings = {"device": train_gpt2.device_name(device), "torch": torch.__version__, "model": config.model}
    print(json.dumps(settings | {"ceiling_flops_per_second": most, "flops_per_token": flops} | figures))


def main() -> None:
    config = parse_flags(BenchmarkConfig, None, __doc__)
    if config.only:
        with naming_remedy("--batch_size"):
            return measure(config, config.only)
    device = choose_device(config.device, int(os.environ.get("LOCAL_RANK", 0)))
    default = "compiled" if device.type == "cuda" else "eager"
    found = {way: in_processes_of_its_own(way, sys.argv[1:]) for way in ([default] if config.profile else WAYS)}
    if os.environ.get("RANK", "0") == "0" and not config.profile:
        report(config, device, default, found)


if __name__ == "__main__":
    run(main)
