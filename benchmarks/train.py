"""How fast GPT-2 trains here, against transformers' GPT-2 in a plain loop; as ratios in one run, on random tokens.

python -m benchmarks.train

python -m benchmarks.train --profile    (where the time of this program goes)

torchrun --standalone --nproc_per_node=8 -m benchmarks.train --total_batch_size 524288

transformers: GPT2LMHeadModel with autocast and AdamW, as a user would write it

transformers_compiled: the same with torch.compile and fused AdamW

eager, compiled: this program without and with --compile; default: the one of them that is its default on the device;
default_adamw: the same with AdamW, beside another --optimizer

Each runs in processes of its own, without data to read or a log to write. The ceiling is the measured rate of a large
matrix product in the same type, with all cores of a CPU.
"""

from __future__ import annotations

import json
import math
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import train_gpt2
from common.batches import rank_slice
from common.device import can_compile, choose_device, device_name, explain_out_of_memory, keep_freed_memory
from common.huggingface import huggingface_config
from common.processes import World, start_processes
from common.script import DataError, Positive, check_settings, parse_flags, run
from common.tokenizer import N_TOKENS
from model import GPT, PRESETS
from recipes import AttentionBackend, Optimizer, Size, TrainConfig, fill_defaults, recipe, validate

WAYS = ("transformers", "transformers_compiled", "eager", "compiled")
Step = Callable[[Tensor], float]  # an optimizer step on rows (N, T + 1), which returns the loss


@dataclass(frozen=True)
class BenchmarkConfig:
    model: Size = "gpt2"  # size
    batch_size: Positive[int | None] = None  # sequences in a micro-batch; None: 1 on a CPU, else the recipe's
    total_batch_size: Positive[int | None] = None  # tokens in an optimizer step; None: one micro-batch of each process
    steps: Positive[int] = 5  # optimizer steps to time; their median counts
    warmup: Positive[int] = 2  # optimizer steps before them
    only: Literal["transformers", "transformers_compiled", "eager", "compiled"] | None = None  # way to measure alone
    profile: bool = False  # print where the time of --only, or of this program's default, goes
    optimizer: Optimizer = "adamw"  # of this program
    attention: AttentionBackend = "auto"  # backend of scaled_dot_product_attention; auto: torch's own choice
    device: str = "auto"  # auto, cpu, mps, cuda or cuda:N


def train_config(config: BenchmarkConfig, device: torch.device, processes: int, way: str) -> TrainConfig:
    """The settings of training; raises UsageError for those that cannot be used."""
    check_settings(config)
    sizes, defaults = PRESETS[config.model], recipe(config.model, config.optimizer)
    batch_size = config.batch_size or (1 if device.type == "cpu" else defaults.batch_size)
    compiled = way.endswith("compiled")
    settings = replace(
        defaults,
        batch_size=batch_size,
        total_batch_size=config.total_batch_size or batch_size * sizes.block_size * processes,
        attention=config.attention,
        compile=compiled,
    )
    settings = fill_defaults(settings, device, sizes)
    validate(settings, sizes, processes)
    return settings


def default_way(device: torch.device) -> str:
    return "compiled" if can_compile(device) else "eager"


# ---- one way, in all of its processes --------------------------------------------------------------------------------


def this_program(settings: TrainConfig, world: World) -> Step:
    with train_gpt2.attention_backend(settings, world.device):
        trainer = train_gpt2.make_trainer(settings, world, GPT(PRESETS[settings.model]))

    def step(rows: Tensor) -> float:
        with train_gpt2.attention_backend(settings, world.device):
            return train_gpt2.training_step(trainer, rank_slice(rows, settings.batch_size, world))[0]

    return step


def plain_loop(settings: TrainConfig, world: World) -> Step:
    """The optimizer step that a user of transformers would write."""
    import transformers

    sizes = transformers.GPT2Config(**huggingface_config(PRESETS[settings.model]))  # without dropout
    model = transformers.GPT2LMHeadModel(sizes).to(world.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.max_lr, fused=settings.compile or None)
    if settings.compile:
        model = torch.compile(model)
    if world.size > 1:
        model = DistributedDataParallel(model)
    dtype = train_gpt2.DTYPES[settings.dtype]

    def step(rows: Tensor) -> float:
        micro_batches = rank_slice(rows, settings.batch_size, world).to(world.device)
        for number, micro_batch in enumerate(micro_batches):
            model.require_backward_grad_sync = number == len(micro_batches) - 1
            idx = micro_batch[:, :-1]
            with torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32):
                loss = model(input_ids=idx, labels=idx).loss / len(micro_batches)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def measure(config: BenchmarkConfig, way: str) -> None:
    """Time one way of training, in all processes; the first prints its figures as a line of JSON."""
    with start_processes(config.device, timeout=600) as world:
        settings = train_config(config, world.device, world.size, way)
        torch.manual_seed(0)
        step = plain_loop(settings, world) if way.startswith("transformers") else this_program(settings, world)
        rows = torch.randint(N_TOKENS, (settings.total_batch_size // settings.block_size, settings.block_size + 1))
        seconds = median_seconds(lambda: step(rows), config.steps, config.warmup)
        if config.profile:
            print_profile(lambda: step(rows), world)
        figures = {
            "tokens_per_second": settings.total_batch_size / seconds,
            "peak_memory_bytes": peak_memory(world.device),
            "dtype": settings.dtype,
        }
        world.print(json.dumps(figures))


def median_seconds(action: Callable[[], object], times: int, warmup: int) -> float:
    seconds = []
    for _ in range(warmup + times):
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[warmup:])


def print_profile(step: Callable[[], object], world: World) -> None:
    """Print the operations that a step spends its time on."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if world.device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profile:
        step()
    key = "self_device_time_total" if world.device.type == "cuda" else "self_cpu_time_total"
    world.print(profile.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=60))


def peak_memory(device: torch.device) -> int | None:
    """The most bytes in use so far: on a GPU by tensors, on Linux by the process, else not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)


# ---- all ways --------------------------------------------------------------------------------------------------------


def measure_in_subprocess(config: BenchmarkConfig, way: str, port: int) -> dict[str, Any]:
    """The figures that `measure` prints in a process of its own, on the first rank; none if it fails."""
    settings = asdict(replace(config, only=way))
    flags = [f"--{name}={value}" for name, value in settings.items() if value is not None and name != "profile"]
    # not torchrun's own store, in which the processes would find the addresses of those that measured another way
    environment = os.environ | {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(port)}
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks.train", *flags],
        env=environment,
        cwd=Path(__file__).resolve().parent.parent,
        stdout=subprocess.PIPE,
        text=True,
    )
    if finished.returncode:
        print(f"{way} failed with status {finished.returncode}", flush=True)
        return {}
    lines = finished.stdout.splitlines()
    return json.loads(lines[-1]) if lines else {}


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product: the most that a model of matrix products could reach."""
    torch.set_num_threads(available_cores())  # torchrun leaves one
    keep_freed_memory()
    n, products = (4096, 1) if device.type == "cpu" else (8192, 20)
    a = torch.randn(n, n, device=device).to(dtype)
    b = torch.randn(n, n, device=device).to(dtype)

    def multiply() -> float:
        for _ in range(products):
            product = a @ b
        return product[0, 0].item()  # waits for the device

    return products * 2 * n**3 / median_seconds(multiply, times=10, warmup=3)


def available_cores() -> int:
    """Those that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def compare(config: BenchmarkConfig) -> None:
    """Measure every way; the main process prints a table of ratios and, last, a line of JSON with all figures.

    Raises UsageError for settings that cannot be used, DataError where this program itself cannot be measured.
    """
    with start_processes("cpu", timeout=3600) as world:
        device = choose_device(config.device, world.local_rank)
        settings = train_config(config, device, world.size, "eager")
        ways = {way: measure_in_subprocess(config, way, world.broadcast(free_port())) for way in WAYS}
        if config.optimizer != "adamw":
            adamw, port = replace(config, optimizer="adamw"), world.broadcast(free_port())
            ways["default_adamw"] = measure_in_subprocess(adamw, default_way(device), port)
    if not world.is_main:
        return
    ways["default"] = ways[default_way(device)]
    if not ways["default"]:
        raise DataError("without this program's default way there is nothing to compare")
    flops = ceiling(device, train_gpt2.DTYPES[settings.dtype]) * (world.size if device.type == "cuda" else 1)
    hardware = f"{world.size} x {device_name(device)}, {settings.dtype}"
    print(f"{hardware}: a large matrix product has {flops / 1e9:,.0f} GFLOP/s")
    figures = {
        "device": device_name(device),
        "torch": torch.__version__,
        "model": config.model,
        "ceiling_flops_per_second": flops,
        "flops_per_token": GPT(PRESETS[config.model]).flops_per_token(),
    }
    for key in ("tokens_per_second", "peak_memory_bytes"):
        figures[key] = {way: measured.get(key) for way, measured in ways.items()}
    print_table(figures["tokens_per_second"], flops / figures["flops_per_token"])
    print(json.dumps(figures))


def print_table(rates: dict[str, float | None], most: float) -> None:
    """Print each way's tokens/s, as a share of `most` and as a ratio."""
    for way, rate in rates.items():
        if rate:
            ratio = rate / (rates["transformers"] or math.nan)
            print(f"{way:22} {rate:10,.0f} tokens/s, {rate / most:6.1%} of that, {ratio:5.2f} times transformers")


def main(argv: list[str] | None = None) -> None:
    config = parse_flags(BenchmarkConfig, argv, __doc__)
    if config.only or config.profile:
        with explain_out_of_memory("--batch_size"):
            measure(config, config.only or default_way(choose_device(config.device)))
    else:
        compare(config)


if __name__ == "__main__":
    run(main)
