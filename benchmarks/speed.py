"""How long each kind of work in a training run takes on this machine, for check.py."""

from __future__ import annotations

import contextlib
import gc
import io
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch.nn import functional as F

import hellaswag
import sample
import train_gpt2
from benchmarks.fixed import train_steps
from benchmarks.train import median_seconds
from common import checkpoint
from common.batches import Batches
from common.device import explain_out_of_memory
from common.processes import World
from common.script import DataError, UsageError
from common.shards import Shard, open_shards
from model import GPT, PRESETS
from recipes import TrainConfig
from train_gpt2 import ATTENTION, DTYPES, Trainer

EVALUATIONS = {"validation": "eval_every", "HellaSwag": "hellaswag_every", "samples": "sample_every"}
HELLASWAG_QUESTIONS = 2 * 10_042  # one for each scoring


def on_ranks(world: World, value: float) -> list[float]:
    """The value of each process, on all."""
    values = torch.zeros(world.size, dtype=torch.float64)
    values[world.rank] = value
    return world.sum(values).tolist()


def parameters(config: TrainConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in GPT(PRESETS[config.model]).parameters())


def matrix_product(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device).to(dtype)
    return 2 * n**3 / median_seconds(lambda: (a @ a)[0, 0].item(), times=10, warmup=3)


def attention_seconds(config: TrainConfig, device: torch.device) -> dict[str, float]:
    """One layer's attention over a micro-batch, forward and backward, by each backend that the device has room for."""
    B, T, C, H = config.batch_size, config.block_size, PRESETS[config.model].n_embd, PRESETS[config.model].n_head
    qkv = torch.randn(B, T, 3 * C, device=device).to(DTYPES[config.dtype]).requires_grad_()  # in memory as in model.py
    upstream = torch.randn(B, T, C, device=device).to(DTYPES[config.dtype])
    seconds = {}

    def attend() -> float:
        q, k, v = (x.view(B, T, H, C // H).transpose(1, 2) for x in qkv.split(C, dim=2))  # (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, C)
        (gradient,) = torch.autograd.grad(y, qkv, upstream)
        return gradient[0, 0, 0].item()  # waits for the device

    for name in ("auto", *ATTENTION):
        with contextlib.suppress(UsageError, torch.OutOfMemoryError):
            with train_gpt2.attention_backend(replace(config, attention=name), device):
                seconds[name] = median_seconds(attend, times=5, warmup=2)
    return seconds


def fresh_trainer(config: TrainConfig, world: World) -> Trainer:
    """One with random weights, in the memory of the one before, and not compiled yet."""
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()
    return train_gpt2.make_trainer(config, world, GPT(PRESETS[config.model]))


def step_seconds(trainer: Trainer, tokens: Shard) -> float:
    """An optimizer step, from those of one and of two micro-batches; raises RuntimeError if the model is recompiled."""
    config = trainer.config
    micro_batch = config.batch_size * config.block_size * trainer.world.size
    train_steps(trainer, tokens, 3, micro_batch)  # compiles; DDP arranges its buckets after the first
    with torch.compiler.set_stance("fail_on_recompile"):
        one = median_seconds(lambda: train_steps(trainer, tokens, 1, micro_batch), times=3, warmup=0)
        two = median_seconds(lambda: train_steps(trainer, tokens, 1, 2 * micro_batch), times=3, warmup=0)
    return one + (config.total_batch_size // micro_batch - 1) * max(two - one, 0.0)


def tokens_per_second(config: TrainConfig, world: World, tokens: Shard) -> float:
    """The rate of training; 0 where memory runs out, or steps are skipped, which takes less time."""
    try:
        with explain_out_of_memory("--batch_size"):
            trainer = fresh_trainer(config, world)
            rate = config.total_batch_size / step_seconds(trainer, tokens)
            return 0.0 if trainer.state.skipped_in_a_row else rate
    except MemoryError:
        return 0.0


def batch_sizes(config: TrainConfig, world: World, tokens: Shard) -> dict[int, float]:
    """A process's tokens/s by micro-batch, 0 where it fails: halved from the recipe's until one fits.

    On a GPU, doubled while it fits, where the recipe's does.
    """
    alone, rates, size = replace(world, rank=0, size=1), {}, config.batch_size
    largest = config.total_batch_size // (config.block_size * world.size)
    largest = largest if world.device.type == "cuda" else min(largest, size)
    while size not in rates and 1 <= size:
        size = min(size, largest)
        rate = tokens_per_second(replace(config, batch_size=size), alone, tokens)
        rates[size] = min(on_ranks(world, rate))
        size = min(2 * size, largest) if rates[size] else size // 2
    return rates


def each_way(config: TrainConfig, world: World, tokens: Shard) -> Iterator[tuple[TrainConfig, bool, float, int]]:
    """Train eagerly, compiled, and, with several processes, without DDP's splitting of the graph.

    Yields the settings, whether DDP splits, tokens/s, and how many graphs were compiled.
    """
    ways = [(False, True), (True, True), (True, False)] if config.compile else [(False, True)]
    for compile, split in ways[:2] if world.size == 1 else ways:
        way, counters = replace(config, compile=compile), torch._dynamo.utils.counters["aot_autograd"]
        # alone first: if one process ran out of memory in the midst of a step, the others would hang
        alone, known = replace(world, rank=0, size=1), world.size == 1 or compile == config.compile  # by batch_sizes
        fits = known or min(on_ranks(world, tokens_per_second(way, alone, tokens))) > 0
        before = counters["total"]
        with torch._dynamo.config.patch(optimize_ddp=split):  # neither this nor the counters have a public name
            rate = tokens_per_second(way, world, tokens) if fits else 0.0
        yield way, split, min(on_ranks(world, rate)), counters["total"] - before


def reading_seconds(config: TrainConfig, world: World) -> float:
    """Reading and hashing a batch; raises DataError if --data_dir holds no shards, or too few."""
    shards = open_shards(Path(config.data_dir)).train
    if sum(map(len, shards)) <= config.total_batch_size:
        raise DataError(f"--data_dir {config.data_dir} holds less than a batch of {config.total_batch_size} tokens")
    rows = Batches(shards, config.block_size, config.seed, config.shuffle)
    batches = rows.read(0, config.batch_size, lambda position: config.total_batch_size, world)
    return median_seconds(lambda: next(batches), times=5, warmup=1)


def reduction_seconds(world: World, n_bytes: int) -> float:
    """The sum of that many bytes of gradients over all processes."""
    gradient = torch.zeros(n_bytes // 4, device=world.device)
    return median_seconds(lambda: world.sum(gradient)[0].item(), times=5, warmup=2)


def seconds_once(config: TrainConfig, world: World, tokens: Shard, directory: Path) -> dict[str, float]:
    """Each kind of work beside the steps, once, as all processes share it."""
    val_tokens = min(config.val_tokens, 2**18 if world.device.type == "cuda" else 2**14)
    trainer = fresh_trainer(replace(config, val_tokens=val_tokens), world)
    train_steps(trainer, tokens, 1, config.batch_size * config.block_size * world.size)  # makes the moments
    text = tokens.read(0, 47 + 4 * 29).tolist()  # as long as HellaSwag's are on average
    endings = [text[start : start + 29] for start in range(47, len(text), 29)]
    questions = [hellaswag.Question("nanogpt", text[:47], endings, [29] * 4, 0)] * 50

    def score() -> None:
        with trainer.autocast(), train_gpt2.attention_backend(config, world.device, masked=True):
            hellaswag.count_correct(trainer.state.gpt, questions)

    def write() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            train_gpt2.write_samples(trainer, sample.PROMPT)

    validation = median_seconds(lambda: train_gpt2.validation_loss(trainer, tokens), times=1, warmup=1)
    scoring = median_seconds(score, times=1, warmup=1)
    seconds = {
        "validation": validation * config.val_tokens / val_tokens,
        "HellaSwag": scoring * HELLASWAG_QUESTIONS / len(questions) / world.size,
        "samples": median_seconds(write, times=1, warmup=1),
        "saving": median_seconds(lambda: save(trainer, directory), times=1, warmup=0),
    }
    world.barrier()
    return seconds


def save(trainer: Trainer, directory: Path) -> None:
    snapshot = checkpoint.take_snapshot(trainer.state, trainer.world)
    if trainer.world.is_main:
        checkpoint.save_checkpoint(directory, snapshot, {"config": asdict(trainer.config), "data": []}, card="")


def run_hours(config: TrainConfig, seconds: dict[str, float]) -> dict[str, float]:
    """The hours of a whole run by kind of work, from the seconds of each once."""
    times = {"steps": config.max_steps, "saving": 1}
    if config.save_every:
        times["saving"] = math.ceil(config.max_steps / config.save_every)
    for kind, name in EVALUATIONS.items():
        every = getattr(config, name)
        times[kind] = 1 + math.ceil(config.max_steps / every) if every else 0  # at the start and the end too
    return {kind: times[kind] * seconds[kind] / 3600 for kind in times}
