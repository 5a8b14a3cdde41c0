"""Which recipe reaches a loss with fewest tokens, on a GPT-2 small enough for two CPU cores and on your own shards.

python -m benchmarks.recipes --data_dir SHARDS

Every run's result is a line of --out, and a run that is there is not repeated, so that the command goes on where it
was. First the learning rates of each method are doubled and halved until the best has worse neighbors; then come runs
of two and four times the tokens with the best, each with a schedule of its own length, and last Muon with one thing
changed.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

import train_gpt2
from common.processes import World
from common.script import Positive, check_settings, parse_flags, run
from common.shards import FULL_DATA, Shard, open_shards
from common.tokenizer import N_TOKENS
from model import GPT, GPTConfig
from recipes import TrainConfig, fill_defaults
from train_gpt2 import Batches, Trainer

CPU = torch.device("cpu")


@dataclass(frozen=True)
class BenchmarkConfig:
    data_dir: str = FULL_DATA  # shards
    out: str = "benchmarks/recipes.jsonl"  # file of the results
    tokens: Positive[int] = 2**21  # tokens of the shortest runs; the others have two and four times as many
    batch: Positive[int] = 8192  # tokens in an optimizer step
    vocabulary: Positive[int] = 8192  # the most frequent tokens, the last standing for all others
    n_layer: Positive[int] = 6  # layers
    n_embd: Positive[int] = 256  # channels
    block_size: Positive[int] = 256  # tokens in a sequence
    workers: Positive[int] = 2  # runs at a time, each in a process of one thread


@dataclass(frozen=True)
class Run:
    """A training run; its result is the validation loss at its end."""

    method: str
    max_lr: float
    tokens: int
    muon_lr: float = 0.0
    seed: int = 0
    change: str = ""


METHODS = {
    "AdamW, cosine": {"schedule": "cosine"},
    "AdamW, linear": {"schedule": "linear"},
    "Muon": {"optimizer": "muon", "schedule": "linear", "weight_decay": 0.05},
}


def together(trainer: Trainer) -> None:
    for group in trainer.state.optimizer.param_groups:
        if "parts" in group:
            group["parts"] = 1


def zero_projections(trainer: Trainer) -> None:
    for block in trainer.state.gpt.transformer.h:
        torch.nn.init.zeros_(block.attn.c_proj.weight)
        torch.nn.init.zeros_(block.mlp.c_proj.weight)


def warm_up_momentum(trainer: Trainer) -> None:
    warmth = min(trainer.state.step / trainer.config.warmup_steps, 1.0)
    for group in trainer.state.optimizer.param_groups:
        if "momentum" in group:
            group["momentum"] = 0.85 + 0.1 * warmth


SETTINGS = {
    "no decay": {"weight_decay": 0.0},
    "decay 0.1": {"weight_decay": 0.1},
    "constant for 75%": {"decay_fraction": 0.25},
}
AT_START = {"q, k, v together": together, "c_proj from zero": zero_projections}
AT_EACH_STEP = {"momentum from 0.85": warm_up_momentum}

# ---- one run ---------------------------------------------------------------------------------------------------------


class RemappedShard:
    """The tokens of shards, numbered anew; in memory."""

    def __init__(self, shards: list[Shard], numbers: np.ndarray) -> None:
        self.tokens = np.concatenate([numbers[shard.read(0, len(shard))] for shard in shards])

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.tokens[start:stop]


@lru_cache(maxsize=1)
def remapped_shards(data_dir: str, vocabulary: int) -> tuple[RemappedShard, RemappedShard]:
    """The train tokens and the val tokens, numbered by their frequency; the last number stands for all rarer ones."""
    shards = open_shards(Path(data_dir))
    counts = sum(np.bincount(shard.read(0, len(shard)), minlength=N_TOKENS) for shard in shards.train)
    numbers = np.full(N_TOKENS, vocabulary - 1, dtype=np.uint16)
    numbers[np.argsort(-counts, kind="stable")[: vocabulary - 1]] = np.arange(vocabulary - 1)
    return RemappedShard(shards.train, numbers), RemappedShard([shards.val], numbers)


def train(config: BenchmarkConfig, training: Run) -> dict:
    """Train once; returns the run and what was measured."""
    torch.set_num_threads(1)
    torch.manual_seed(training.seed)
    sizes = GPTConfig(config.block_size, config.vocabulary, config.n_layer, config.n_embd // 64 or 1, config.n_embd)
    settings = train_config(config, training, sizes)
    trainer = train_gpt2.make_trainer(settings, World(0, 1, CPU), GPT(sizes))
    AT_START.get(training.change, lambda trainer: None)(trainer)
    train_shard, val_shard = remapped_shards(config.data_dir, config.vocabulary)
    batches = Batches([train_shard], config.block_size, training.seed, shuffle=True)
    losses, seconds, state = [], [], trainer.state
    while state.step < settings.max_steps:
        AT_EACH_STEP.get(training.change, lambda trainer: None)(trainer)
        rows, state.position = batches.at(state.position, config.batch)
        began = time.process_time()
        losses.append(train_gpt2.training_step(trainer, rows)[0])
        seconds.append(time.process_time() - began)
    tenths = np.array_split(losses, 10)
    return asdict(training) | {
        "val_loss": round(train_gpt2.validation_loss(trainer, val_shard)["val_loss"], 4),
        "losses": [round(float(np.mean(tenth)), 4) for tenth in tenths],  # of training, over each tenth of the run
        "cpu_seconds_a_step": round(statistics.median(seconds), 3),
        "skipped": state.skipped,
    }


def train_config(config: BenchmarkConfig, training: Run, sizes: GPTConfig) -> TrainConfig:
    steps = training.tokens // config.batch
    settings = TrainConfig(
        model="debug",
        batch_size=math.gcd(config.batch // config.block_size, 8),
        total_batch_size=config.batch,
        max_steps=steps,
        warmup_steps=max(1, steps // 20),
        max_lr=training.max_lr,
        muon_lr=training.muon_lr,
        val_tokens=2**17,
    )
    settings = replace(settings, **METHODS[training.method] | SETTINGS.get(training.change, {}))
    return fill_defaults(settings, CPU, sizes)


# ---- all runs --------------------------------------------------------------------------------------------------------


def read_results(path: Path) -> dict[Run, dict]:
    lines = path.read_text().splitlines() if path.exists() else []
    results = [json.loads(line) for line in lines]
    return {Run(**{name: result[name] for name in asdict(Run("", 0, 0))}): result for result in results}


def best(config: BenchmarkConfig, results: dict[Run, dict], method: str) -> Run:
    """The best run of the sweep, and before it began the rates to begin with."""
    swept = Run(method, 3e-3 if method == "Muon" else 1.2e-3, config.tokens, 0.02 if method == "Muon" else 0.0)
    tried = [r for r in results if r == replace(swept, max_lr=r.max_lr, muon_lr=r.muon_lr)]
    return min(tried, key=lambda r: results[r]["val_loss"], default=swept)


def sweep(config: BenchmarkConfig, results: dict[Run, dict]) -> Iterator[Run]:
    """The best of each method so far, and its neighbors."""
    centers = [best(config, results, method) for method in METHODS]
    yield from centers
    for center in reversed(centers):
        for factor in (0.5, 2.0):
            yield replace(center, max_lr=factor * center.max_lr)
            if center.muon_lr:
                yield replace(center, muon_lr=factor * center.muon_lr)


def contestants(config: BenchmarkConfig, results: dict[Run, dict]) -> dict[str, Run]:
    """AdamW as the recipe of GPT-2 124M has it, and the best of each method."""
    untuned = Run("AdamW, cosine", TrainConfig().max_lr, config.tokens)
    return {"AdamW, recipe": untuned} | {method: best(config, results, method) for method in METHODS}


def longer(config: BenchmarkConfig, results: dict[Run, dict]) -> Iterator[Run]:
    """Runs of one, two and four times the tokens, those of twice with three seeds."""
    runs = contestants(config, results).values()
    for factor, seed in ((1, 0), (2, 0), (2, 1), (2, 2), (4, 0)):
        yield from (replace(r, tokens=factor * config.tokens, seed=seed) for r in runs)


def ablations(config: BenchmarkConfig, results: dict[Run, dict]) -> Iterator[Run]:
    muon = best(config, results, "Muon")
    for seed in (0, 1):
        for change in ("", *SETTINGS, *AT_START, *AT_EACH_STEP):
            yield replace(muon, change=change, seed=seed)


def measure(config: BenchmarkConfig) -> dict[Run, dict]:
    """Run what --out does not have yet, stage by stage; returns all results."""
    out = Path(config.out)
    with ProcessPoolExecutor(config.workers, mp_context=get_context("spawn")) as pool:
        for stage in (sweep, longer, ablations):
            results = read_results(out)
            while pending := [r for r in dict.fromkeys(stage(config, results)) if r not in results]:
                for finished in as_completed([pool.submit(partial(train, config), r) for r in pending]):
                    with out.open("a") as file:
                        file.write(json.dumps(finished.result()) + "\n")
                    print(json.dumps(finished.result()), flush=True)
                results = read_results(out)
    return read_results(out)


# ---- the comparison --------------------------------------------------------------------------------------------------


def tokens_to_reach(loss: float, curve: dict[int, float]) -> float:
    """After how many tokens a curve has a loss, interpolated in the logarithm; NaN outside of what was measured."""
    tokens = sorted(curve)
    falling = [-curve[count] for count in tokens]
    return math.exp(np.interp(-loss, falling, np.log(tokens), left=math.nan, right=math.nan))


def report(config: BenchmarkConfig, results: dict[Run, dict]) -> None:
    """Print each contestant's losses, and how many times Muon's tokens it needs for Muon's losses."""
    runs = contestants(config, results)
    curves = {name: curve_of(r, results) for name, r in runs.items()}
    for name, r in runs.items():
        print(f"{name}: max_lr {r.max_lr:g}, muon_lr {r.muon_lr:g}, validation loss by tokens {curves[name]}")
        for muon in (m for m in results if replace(m, tokens=0, seed=0) == replace(runs["Muon"], tokens=0)):
            factor = tokens_to_reach(results[muon]["val_loss"], curves[name]) / muon.tokens
            print(f"  {factor:.2f} times Muon's tokens for its loss after {muon.tokens:,} (seed {muon.seed})")
    print(json.dumps({name: asdict(r) | {"val_loss": curves[name]} for name, r in runs.items()}))


def curve_of(contestant: Run, results: dict[Run, dict]) -> dict[int, float]:
    """Its validation loss by the tokens of the run, the mean over the seeds."""
    losses: dict[int, list[float]] = {}
    for r, result in results.items():
        if r == replace(contestant, tokens=r.tokens, seed=r.seed):
            losses.setdefault(r.tokens, []).append(result["val_loss"])
    return {tokens: statistics.mean(values) for tokens, values in sorted(losses.items())}


def main(argv: list[str] | None = None) -> None:
    config = parse_flags(BenchmarkConfig, argv, __doc__)
    check_settings(config)
    report(config, measure(config))


if __name__ == "__main__":
    run(main)
