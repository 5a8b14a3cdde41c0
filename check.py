"""Is this machine ready? Check that it trains right, how fast, and what a whole run will take.

python check.py

torchrun --standalone --nproc_per_node=8 check.py    (all GPUs of a machine)
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import recipes
from benchmarks import fixed, memory, speed
from common import script
from common.device import device_name, peak_flops
from common.files import existing_directory
from common.processes import World, start_processes
from common.script import DataError, UsageError
from common.shards import FULL_DATA, Shard
from model import PRESETS
from train_gpt2 import ATTENTION, DTYPES


@dataclass(frozen=True)
class CheckConfig:
    model: recipes.Size | None = None  # size whose recipe is checked; None: gpt2 on a CUDA device, else debug
    optimizer: recipes.Optimizer | None = None  # whose recipe is checked; None: muon for debug, else adamw
    device: str = "auto"  # auto, cpu, mps, cuda or cuda:N
    compile: bool | None = None  # check the compiled model too; None: where training would compile it
    data_dir: str | None = None  # shards; None: those that training would take
    out_dir: str = "log"  # directory of a run, on whose disk a checkpoint is written and removed
    dollars_per_hour: float = 0.0  # what the machine costs


@dataclass(frozen=True)
class Finding:
    name: str
    seen: str
    remedy: str = ""  # nothing where all is well


@dataclass
class Check:
    """What the parts of the check share."""

    config: recipes.TrainConfig  # the recipe; from `training` on, in the fastest way
    world: World
    directory: Path  # temporary
    tokens: Shard  # the same on every machine
    dollars_per_hour: float
    figures: dict[str, Any] = field(default_factory=dict)
    wrong_attention: set[str] = field(default_factory=set)


# ---- the machine -----------------------------------------------------------------------------------------------------


def machine(check: Check) -> Iterator[Finding]:
    """Versions, processors, memory, open files, data and disks."""
    world, config, parameters = check.world, check.config, speed.parameters(check.config)
    yield Finding("torch", f"{torch.__version__}, CUDA {torch.version.cuda}, {world.size} process(es), {config.dtype}")
    if world.device.type == "cuda":
        yield gpu(check)
    ram, needed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), world.size * (2e9 + 4 * parameters)
    yield Finding("memory", f"{ram / 1e9:.1f} GB", "" if ram > needed else f"too little for {world.size} processes")
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield Finding("open files", f"at most {files}", "" if files >= 256 else "raise the limit: ulimit -n 4096")
    needs = {config.out_dir: 12 * parameters * (config.keep + 1)}  # weights and two moments
    try:
        reading = speed.reading_seconds(config, world)
        yield Finding("data", f"{1000 * reading:.1f} ms to read a batch from {config.data_dir}")
    except DataError as error:
        needs[config.data_dir] = 25e9 if config.data_dir == FULL_DATA else 1e8  # with files that are being downloaded
        damaged = str(error) if Path(config.data_dir).exists() else ""
        yield Finding("data", f"{config.data_dir} cannot be read yet", damaged)
    yield from disks(needs)


def gpu(check: Check) -> Finding:
    device, driver = check.world.device, Path("/proc/driver/nvidia/version")
    free, total = torch.cuda.mem_get_info(device)
    version = driver.read_text().splitlines()[0] if driver.exists() else "driver unknown"
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    in_use = [rank for rank, share in enumerate(speed.on_ranks(check.world, free / total)) if share < 0.9]
    remedy = f"another program uses the memory of GPUs {in_use}: see nvidia-smi" if in_use else ""
    return Finding("GPU", f"{device_name(device)}, {capability}, {total / 1e9:.0f} GB, {version}", remedy)


def disks(needs: dict[str, float]) -> Iterator[Finding]:
    """Whether the disk of each directory has room for what comes there."""
    on_disk: dict[int, list[str]] = {}
    for path in needs:
        on_disk.setdefault(existing_directory(path).stat().st_dev, []).append(path)
    for paths in on_disk.values():
        needed, free = sum(needs[path] for path in paths), shutil.disk_usage(existing_directory(paths[0])).free
        seen = f"{free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB needed for {' and '.join(paths)}"
        yield Finding("disk", seen, "" if free > needed else "make room, or choose --out_dir or --data_dir elsewhere")


# ---- is it right? ----------------------------------------------------------------------------------------------------


def exactness(check: Check) -> Iterator[Finding]:
    """A small network's loss and gradient: on each process in every way of computing them, and on all together."""
    alone, types = replace(check.world, rank=0, size=1), dict.fromkeys(["float32", check.config.dtype])
    compiled = [False, True] if check.config.compile else [False]
    for dtype, compile, attention in itertools.product(types, compiled, ATTENTION):
        way = replace(check.config, dtype=dtype, compile=compile, attention=attention)
        with contextlib.suppress(UsageError):  # the device does not have this backend
            yield compare(check, way, alone)
    if check.world.size > 1:
        yield from (compare(check, replace(check.config, shard=shard), check.world) for shard in (False, True))


def compare(check: Check, way: recipes.TrainConfig, world: World) -> Finding:
    distance, tolerance = fixed.gradient_distance(way, world, check.tokens)
    distances = speed.on_ranks(check.world, distance)
    wrong = [rank for rank, distance in enumerate(distances) if not distance <= tolerance]  # as NaN is not
    check.wrong_attention |= {way.attention, "auto"} if wrong else set()  # torch may choose it by itself
    flags = f"--dtype {way.dtype} --compile {way.compile} --attention {way.attention}" + " --shard" * way.shard
    seen = f"{world.size} process(es), {flags}: off by {', '.join(f'{distance:.0e}' for distance in distances)}"
    return Finding("exactness", seen, f"wrong on ranks {wrong}: train with other flags than these" if wrong else "")


def curve(check: Check) -> Iterator[Finding]:
    """The losses of a few steps, after which all processes have the same weights."""
    for model in fixed.STEPS if check.world.device.type == "cuda" else ["debug"]:
        losses, weights = fixed.short_run(model, check.config, check.world, check.tokens)
        distance = fixed.curve_distance(model, losses)
        right = distance <= fixed.CURVE_TOLERANCE and len(set(speed.on_ranks(check.world, weights))) == 1
        remedy = "" if right else "the optimizer or the sum over processes is wrong, unless exactness is already"
        seen = f"{model}: loss {losses[0]:.4f} to {losses[-2]:.4f}, validation {losses[-1]:.4f}"
        yield Finding("curve", f"{seen}, off by {distance:.4f}", remedy)


# ---- how fast? -------------------------------------------------------------------------------------------------------


def kernels(check: Check) -> Iterator[Finding]:
    """A large matrix product, attention by backend, and the sum of the gradients over all processes."""
    config, world, device = check.config, check.world, check.world.device
    rates = speed.on_ranks(world, speed.matrix_product(device, DTYPES[config.dtype]))
    peak = peak_flops(device)
    slow = device.type == "cuda" and min(rates) < max(0.8 * max(rates), 0.4 * (peak or 0))
    remedy = "a GPU is slow: see clocks and temperature with nvidia-smi -q" if slow else ""
    seen = f"{min(rates) / 1e12:.2f} to {max(rates) / 1e12:.2f} TFLOP/s, peak {(peak or math.nan) / 1e12:.0f}"
    yield Finding("matrix product", seen, remedy)
    seconds = speed.attention_seconds(config, device)
    yield Finding("attention", ", ".join(f"{name} {1000 * second:.2f} ms" for name, second in seconds.items()))
    gradients = 4 * speed.parameters(config)
    reduction = speed.reduction_seconds(world, gradients)
    yield Finding("all-reduce", f"{1000 * reduction:.1f} ms for {gradients / 1e9:.2f} GB of gradients")
    check.figures |= {"flops_per_second": rates, "attention_seconds": seconds, "reduction_seconds": reduction}


def training(check: Check) -> Iterator[Finding]:
    """Tokens/s by micro-batch, and at the fastest one in each way."""
    config, world, speeds, fastest = check.config, check.world, {}, 0.0
    rates = speed.batch_sizes(config, world, check.tokens)
    best = max(rates, key=rates.get)
    room = ", ".join(f"{rate:,.0f} tokens/s at {size}" if rate else f"none at {size}" for size, rate in rates.items())
    if world.device.type == "cuda":
        gigabytes = torch.cuda.get_device_properties(world.device).total_memory / 1e9
        room += f"; {memory.predict(PRESETS[config.model]).largest_batch_size(gigabytes)} predicted to fit"
    yield Finding("batch_size", room)
    ways = speed.each_way(replace(config, batch_size=best), world, check.tokens) if rates[best] else []
    for way, split, rate, graphs in ways:
        name = f"--compile {way.compile}, optimize_ddp {split}"
        yield Finding("training", f"{name}: {rate:,.0f} tokens/s, {graphs} graphs")
        speeds[name] = rate
        if split and rate > fastest:  # no flag turns the splitting off
            check.config, fastest = way, rate
    if not fastest:
        cause = "too little memory, or no finite loss,"
        raise DataError(f"{cause} for --model {config.model} on {world.size} process(es)")
    check.figures |= {"batch_sizes": rates, "tokens_per_second": speeds, "fastest_tokens_per_second": fastest}


def whole_run(check: Check) -> Iterator[Finding]:
    """What the recipe takes here, and the flags to set."""
    config, figures = check.config, check.figures
    if "fastest_tokens_per_second" not in figures:  # training failed
        return
    seconds = {"steps": config.total_batch_size / figures["fastest_tokens_per_second"]}
    seconds |= speed.seconds_once(config, check.world, check.tokens, check.directory)
    hours = speed.run_hours(config, seconds)
    total = sum(hours.values())
    for kind, part in hours.items():
        yield Finding(kind, f"{seconds[kind]:.3f} s each, {part:.2f} hours in all, {part / total:.1%}")
    figures |= {"seconds": seconds, "hours": hours, "dollars": total * check.dollars_per_hour}
    yield Finding("a whole run", f"{total:.2f} hours for {config.max_steps} steps, {figures['dollars']:,.2f} dollars")
    attention = {name: s for name, s in figures["attention_seconds"].items() if name not in check.wrong_attention}
    attention["auto"] = 0.95 * attention.get("auto", math.inf)  # others have to be clearly faster
    flags = f"--batch_size {config.batch_size} --attention {min(attention, key=attention.get)}"
    yield Finding("flags", f"{flags} --compile {config.compile}")


PARTS = (machine, exactness, curve, kernels, training, whole_run)


def findings(part: Callable[[Check], Iterator[Finding]], check: Check) -> Iterator[Finding]:
    """What a part finds; that it fails is a finding too, unless other processes may be waiting for this one."""
    try:
        yield from part(check)
    except (RuntimeError, ValueError, ArithmeticError, OSError) as error:
        if check.world.size > 1:
            raise
        yield Finding(part.__name__, "failed", str(error).strip())


def run(config: CheckConfig) -> bool:
    """Print a line on each finding, and all figures as JSON; returns whether all is well."""
    script.check_settings(config)
    with start_processes(config.device, timeout=600) as world, contextlib.ExitStack() as stack:
        if fixed.ROWS % world.size:
            raise UsageError(f"{world.size} processes: start 1, 2, 4 or 8, on one machine at a time")
        recipe = recipes.recipe(config.model or recipes.default_model(world.device), config.optimizer)
        recipe = replace(recipe, data_dir=config.data_dir, out_dir=config.out_dir, compile=config.compile)
        recipe = recipes.fill_defaults(recipe, world.device, PRESETS[recipe.model])
        recipes.validate(recipe, PRESETS[recipe.model], world.size)
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=existing_directory(config.out_dir))))
        check = Check(recipe, world, directory, fixed.synthetic_tokens(directory), config.dollars_per_hour)
        wrong = []
        for finding in itertools.chain.from_iterable(findings(part, check) for part in PARTS):
            world.print(f"{finding.name:14} | {finding.seen} | {finding.remedy or 'ok'}")
            wrong += [finding.name] if finding.remedy else []
        world.print(json.dumps(check.figures | {"wrong": wrong}))
    return not wrong


def main(argv: list[str] | None = None) -> None:
    if not run(script.parse_flags(CheckConfig, argv, __doc__)):
        raise SystemExit(1)


if __name__ == "__main__":
    script.run(main)
