"""Short computations that come to the same on every machine, and what they come to: common/check.json, for check.py.

python -m benchmarks.fixed    (writes it anew: on a CPU, in float32, not compiled; five minutes on two cores)

The weights are drawn by NumPy's RandomState, whose numbers never change (NEP 19), and the tokens made by integers.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import recipes
import train_gpt2
from common.batches import Batches
from common.files import read_json, write_json
from common.processes import World
from common.script import run
from common.sharding import gather
from common.shards import Shard, open_shard, shard_name, write_shard
from model import GPT, PRESETS, GPTConfig
from recipes import RECIPES, Size, TrainConfig
from train_gpt2 import Trainer

FILE = Path(__file__).resolve().parent.parent / "common" / "check.json"
BLOCK_SIZE = 256  # tokens in a row
SMALL = GPTConfig(block_size=BLOCK_SIZE, n_layer=2, n_head=2, n_embd=128)
STEPS = {"debug": 20, "gpt2": 10}
ROWS = 8  # in a batch, which the processes divide
# The largest relative difference from the file that is right. Eager and compiled, by two attention backends, up to 3e-7
# was seen in float32 on a CPU, which other machines add in another order, and up to 3e-3 in bfloat16; float16 rounds
# eight times finer
TOLERANCE = {"float32": 1e-5, "float32 on a GPU": 1e-4, "float16": 1e-3, "bfloat16": 8e-3}
CURVE_TOLERANCE = 0.01  # nats


def synthetic_tokens(directory: Path) -> Shard:
    """Tokens, each one of the four that can follow the one before it; they repeat after 2**17."""
    tokens, token, random = [], 0, 1
    for _ in range(2**17):
        random = (1103515245 * random + 12345) % 2**31  # a linear congruential generator
        token = (5 * token + random // 2**29) % 509
        tokens.append(97 * token)
    write_shard(directory, 1, np.resize(np.array(tokens, dtype=np.uint16), 2**21 + 1))
    return open_shard(directory / shard_name(1))


def fixed_gpt(sizes: GPTConfig, scale: float = 0.035) -> GPT:
    """A network with uniform weights, LayerNorm's around 1, all others around 0."""
    gpt, random = GPT(sizes), np.random.RandomState(0)
    with torch.no_grad():
        for name, parameter in gpt.named_parameters():
            mean = 1.0 if ".ln_" in name and name.endswith("weight") else 0.0
            parameter.copy_(torch.from_numpy(random.uniform(mean - scale, mean + scale, tuple(parameter.shape))))
    return gpt


def fixed_config(model: Size, config: TrainConfig, world: World) -> TrainConfig:
    """A size's recipe with small batches and its schedule in a few steps, in the type and the way of `config`."""
    way = {name: getattr(config, name) for name in ("dtype", "compile", "attention", "shard", "data_dir")}
    tokens = {"block_size": BLOCK_SIZE, "total_batch_size": ROWS * BLOCK_SIZE, "val_tokens": ROWS * BLOCK_SIZE}
    steps, batch_size = STEPS[model], max(1, ROWS // 2 // world.size)
    fixed = replace(RECIPES[model], batch_size=batch_size, max_steps=steps, warmup_steps=steps // 2, **tokens, **way)
    return recipes.fill_defaults(replace(fixed, max_lr=6e-4), world.device, PRESETS[model])


def train_steps(trainer: Trainer, tokens: Shard, steps: int, batch_tokens: int) -> list[float]:
    """The losses of some steps, on the tokens from the first."""
    config = trainer.config
    rows = Batches([tokens], config.block_size, config.seed, shuffle=False)
    batches = rows.read(0, config.batch_size, lambda position: batch_tokens, trainer.world)
    return [train_gpt2.training_step(trainer, batch.micro_batches)[0] for batch in itertools.islice(batches, steps)]


def loss_and_gradient(config: TrainConfig, world: World, tokens: Shard) -> dict[str, float]:
    """The small network's loss, and for each parameter the norm of its gradient; raises UsageError for --attention."""
    config = fixed_config("debug", config, world)
    rows = Batches([tokens], BLOCK_SIZE, config.seed, shuffle=False)
    batch = next(rows.read(0, config.batch_size, lambda position: config.total_batch_size, world))
    torch.compiler.reset()
    with train_gpt2.attention_backend(config, world.device), without_tf32():
        trainer = train_gpt2.make_trainer(config, world, fixed_gpt(SMALL, scale=0.2))
        loss = train_gpt2.accumulate_gradients(trainer, batch.micro_batches.to(world.device))
    trainer.state.scaler.unscale_(trainer.state.optimizer)
    gradients = {name: parameter.grad for name, parameter in trainer.state.gpt.named_parameters()}
    norms = {name: float(gather(gradient.norm(), world.device)) for name, gradient in gradients.items()}
    return {"loss": float(world.sum(loss) / world.size)} | norms


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Multiply in full float32: TF32's error depends on the GPU."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def short_run(model: Size, config: TrainConfig, world: World, tokens: Shard) -> tuple[list[float], float]:
    """Train a size for a few steps; returns the losses, the last of them the validation loss, and the weights' sum."""
    config = fixed_config(model, config, world)
    torch.compiler.reset()
    trainer = train_gpt2.make_trainer(config, world, fixed_gpt(PRESETS[model]))
    losses = train_steps(trainer, tokens, config.max_steps, config.total_batch_size)
    losses.append(train_gpt2.validation_loss(trainer, tokens)["val_loss"])
    return losses, sum(float(parameter.detach().cpu().double().sum()) for parameter in trainer.state.gpt.parameters())


def curve_distance(model: Size, losses: list[float]) -> float:
    """How far a short run's losses are from the file's, NaN if one is not finite."""
    distances = [abs(loss - expected) for loss, expected in zip(losses, read_json(FILE)[model], strict=True)]
    return max(distances) if all(map(math.isfinite, distances)) else math.nan


def gradient_distance(config: TrainConfig, world: World, tokens: Shard) -> tuple[float, float]:
    """How far this process's loss and gradient are from the file's, NaN if they are not finite; and how far may be.

    An error of a kernel or the compiler is printed, and is infinitely far; raises UsageError for --attention.
    """
    expected = read_json(FILE)["small"]
    on_gpu = config.dtype == "float32" and world.device.type != "cpu"
    tolerance = TOLERANCE["float32 on a GPU" if on_gpu else config.dtype]
    try:
        figures = loss_and_gradient(config, world, tokens)
    except RuntimeError as error:
        if world.size > 1:  # the others may be waiting for this process, which torchrun must end
            raise
        print(f"{type(error).__name__}: {error}")
        return math.inf, tolerance
    distances = [abs(figures[name] / expected[name] - 1) for name in expected]
    return max(distances) if all(map(math.isfinite, distances)) else math.nan, tolerance


def main() -> None:
    config, world = replace(RECIPES["debug"], dtype="float32", compile=False), World(0, 1, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as directory:
        tokens = synthetic_tokens(Path(directory))
        figures = {"small": loss_and_gradient(config, world, tokens)}
        for model in STEPS:
            figures[model], _ = short_run(model, config, world, tokens)
    write_json(FILE, figures)


if __name__ == "__main__":
    run(main)
