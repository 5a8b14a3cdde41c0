"""How many tokens each recipe needs for a loss, on a GPT-2 small enough for two CPU cores and on shards of your own.

python -m benchmarks.recipes --data_dir SHARDS

Each run's result is a line of --out, and what is there is not run again: the command continues where it stopped. What
is run next depends on what is known by then, in this order of priority: each method's learning rates are doubled and
halved until all neighbors of the best are worse; the best have runs of four and two times the tokens (Muon of half and
a quarter of them too), each with a schedule of its own length; the linear AdamW and Muon are run with one thing
changed, Muon with two seeds.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

import train_gpt2
from common.batches import Batches
from common.processes import World
from common.script import DataError, Positive, UsageError, check_settings, parse_flags, run
from common.shards import FULL_DATA, Shard, open_shards
from common.tokenizer import N_TOKENS
from model import GPT, GPTConfig
from recipes import TrainConfig, auto_dtype, fill_defaults
from train_gpt2 import Trainer

CPU = torch.device("cpu")


@dataclass(frozen=True)
class BenchmarkConfig:
    data_dir: str = FULL_DATA  # shards
    out: str = "recipes.jsonl"  # file of the results; the curves are drawn beside it
    tokens: Positive[int] = 2**21  # tokens of most runs; the others have two and four times as many, or a part of them
    batch: Positive[int] = 8192  # tokens in an optimizer step
    vocabulary: Positive[int] = 8192  # tokens that are told apart: the most frequent, and one for all others
    n_layer: Positive[int] = 6  # layers
    n_embd: Positive[int] = 256  # channels, 64 to a head
    block_size: Positive[int] = 256  # tokens in a sequence
    workers: Positive[int] = 2  # runs at a time, each in a process of one thread


@dataclass(frozen=True)
class Run:
    """A training run: what tells it from the others."""

    method: str
    max_lr: float
    tokens: int
    muon_lr: float = 0.0
    warmup: float = 0.05  # share of the run
    seed: int = 0
    change: str = ""


METHODS = {
    "AdamW, cosine": {"optimizer": "adamw", "schedule": "cosine"},
    "AdamW, linear": {"optimizer": "adamw", "schedule": "linear"},
    "Muon": {"optimizer": "muon", "schedule": "linear", "weight_decay": 0.05},
}
# Where each method's sweep of the learning rates begins. AdamW's best rates need the longer warm-up: with 0.05, which
# is 12 steps, 2.4e-3 was worse than 1.2e-3
BEGINNINGS = {
    "AdamW, cosine": {"max_lr": 2.4e-3, "warmup": 0.1875},
    "AdamW, linear": {"max_lr": 2.4e-3, "warmup": 0.1875},
    "Muon": {"max_lr": 3e-3, "muon_lr": 0.02, "warmup": 0.05},
}

# ---- what is changed in a method, a thing at a time ------------------------------------------------------------------


def qkv_together(trainer: Trainer) -> None:
    for group in trainer.state.optimizer.param_groups:
        if "parts" in group:
            group["parts"] = 1


def zero_projections(trainer: Trainer) -> None:
    if trainer.state.step == 0:
        for block in trainer.state.gpt.transformer.h:
            torch.nn.init.zeros_(block.attn.c_proj.weight)
            torch.nn.init.zeros_(block.mlp.c_proj.weight)


def warm_up_momentum(trainer: Trainer) -> None:
    done = min(trainer.state.step / (0.1 * trainer.config.max_steps), 1.0)
    for group in trainer.state.optimizer.param_groups:
        if "momentum" in group:
            group["momentum"] = 0.85 + 0.1 * done


def faster_embeddings(trainer: Trainer) -> None:
    """Give AdamW's embeddings, of which one is the output layer too, a higher rate and no decay, as Muon's have."""
    optimizer, gpt = trainer.state.optimizer, trainer.state.gpt
    if trainer.state.step == 0:
        matrices, embeddings = optimizer.param_groups[0], [gpt.transformer.wte.weight, gpt.transformer.wpe.weight]
        matrices["params"] = [p for p in matrices["params"] if p not in set(embeddings)]
        own = {"params": embeddings, "weight_decay": 0.0, "initial_lr": 4 * matrices["initial_lr"]}
        optimizer.add_param_group(matrices | own)


CHANGED_SETTINGS = {
    ("AdamW, linear", "warm-up of 0.3, not 0.1875"): lambda settings: replace(
        settings, warmup_steps=int(0.3 * settings.max_steps)
    ),
    ("Muon", "no weight decay"): lambda settings: replace(settings, weight_decay=0.0),
    ("Muon", "weight decay 0.1"): lambda settings: replace(settings, weight_decay=0.1),
    ("Muon", "constant for 75%, not 25%"): lambda settings: replace(settings, decay_fraction=0.25),
}
BEFORE_EACH_STEP = {
    ("AdamW, linear", "embeddings without decay, at 4 times the learning rate"): faster_embeddings,
    ("Muon", "q, k, v together"): qkv_together,
    ("Muon", "c_proj from zero"): zero_projections,
    ("Muon", "momentum from 0.85 to 0.95 over the first tenth"): warm_up_momentum,
}

# ---- one run ---------------------------------------------------------------------------------------------------------


class RemappedShard:
    """The tokens of shards under new numbers, in memory."""

    def __init__(self, shards: list[Shard], numbers: np.ndarray) -> None:
        self.tokens = np.concatenate([numbers[shard.read(0, len(shard))] for shard in shards])

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.tokens[start:stop]


@lru_cache(maxsize=1)
def remapped_shards(data_dir: str, vocabulary: int) -> tuple[RemappedShard, RemappedShard]:
    """The train and the val tokens, numbered by frequency, the last number for all that are rarer."""
    shards = open_shards(Path(data_dir))
    counts = sum(np.bincount(shard.read(0, len(shard)), minlength=N_TOKENS) for shard in shards.train)
    numbers = np.full(N_TOKENS, vocabulary - 1, dtype=np.uint16)
    numbers[np.argsort(-counts, kind="stable")[: vocabulary - 1]] = np.arange(vocabulary - 1)
    return RemappedShard(shards.train, numbers), RemappedShard([shards.val], numbers)


def train(config: BenchmarkConfig, training: Run) -> dict:
    """Train once; returns the run and its result."""
    torch.set_num_threads(1)
    torch.manual_seed(training.seed)
    sizes = GPTConfig(config.block_size, config.vocabulary, config.n_layer, config.n_embd // 64, config.n_embd)
    settings = train_config(config, training, sizes)
    trainer = train_gpt2.make_trainer(settings, World(0, 1, CPU), GPT(sizes))
    train_shard, val_shard = remapped_shards(config.data_dir, config.vocabulary)
    rows = Batches([train_shard], config.block_size, training.seed, shuffle=True)
    batches = rows.read(0, settings.batch_size, lambda position: config.batch, trainer.world)
    before_each_step = BEFORE_EACH_STEP.get((training.method, training.change), lambda trainer: None)
    losses, seconds, state = [], [], trainer.state
    while state.step < settings.max_steps:
        before_each_step(trainer)
        micro_batches = next(batches).micro_batches
        began = time.process_time()
        losses.append(train_gpt2.training_step(trainer, micro_batches)[0])
        seconds.append(time.process_time() - began)
    return asdict(training) | {
        "val_loss": round(train_gpt2.validation_loss(trainer, val_shard)["val_loss"], 4),
        "losses": [round(float(np.mean(tenth)), 4) for tenth in np.array_split(losses, 10)],  # while training
        "cpu_seconds_a_step": round(statistics.median(seconds), 3),
        "skipped": state.skipped,
    }


def setting(config: BenchmarkConfig) -> dict:
    """What all results in a file have in common; raises UsageError for shards of fewer tokens than the longest run.

    Other METHODS are not noticed: they need another file.
    """
    shards = open_shards(Path(config.data_dir))
    if sum(map(len, shards.train)) <= 4 * config.tokens:
        longest = f"the longest run ({4 * config.tokens:,})"
        raise UsageError(f"--data_dir {config.data_dir} has too few train tokens for {longest}: lower --tokens")
    names = ("batch", "vocabulary", "n_layer", "n_embd", "block_size")
    digest = hashlib.sha256(json.dumps(shards.identity).encode()).hexdigest()
    return {name: getattr(config, name) for name in names} | {"dtype": auto_dtype(CPU), "shards": digest}


def train_config(config: BenchmarkConfig, training: Run, sizes: GPTConfig) -> TrainConfig:
    steps = training.tokens // config.batch
    settings = TrainConfig(
        model="debug",  # any name would do: the sizes are given
        batch_size=math.gcd(config.batch // config.block_size, 8),
        total_batch_size=config.batch,
        max_steps=steps,
        warmup_steps=max(1, int(training.warmup * steps)),
        val_tokens=2**17,
    )
    rates = {"max_lr": training.max_lr, "muon_lr": training.muon_lr}
    settings = replace(settings, **METHODS[training.method] | rates)
    change = CHANGED_SETTINGS.get((training.method, training.change), lambda settings: settings)
    return fill_defaults(change(settings), CPU, sizes)


# ---- all runs --------------------------------------------------------------------------------------------------------

Results = dict[Run, dict]


def read_results(config: BenchmarkConfig, expected: dict) -> Results:
    """The results in --out; raises DataError if they are those of other sizes, shards or another type."""
    path = Path(config.out)
    try:
        results = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    except ValueError:
        raise DataError(f"--out {path} has a line that was cut off: delete it") from None
    if any(result["setting"] != expected for result in results):
        raise DataError(f"--out {path} holds results of other sizes, shards or another type: choose another file")
    return {Run(**{field.name: result[field.name] for field in fields(Run)}): result for result in results}


def best(config: BenchmarkConfig, results: Results, method: str) -> Run:
    """The best of a method's sweep so far."""
    first = Run(method, tokens=config.tokens, **BEGINNINGS[method])
    swept = [r for r in results if r == replace(first, max_lr=r.max_lr, muon_lr=r.muon_lr)]
    finite = [r for r in swept if math.isfinite(results[r]["val_loss"])]
    return min(finite, key=lambda r: results[r]["val_loss"], default=first)


def sweep(config: BenchmarkConfig, results: Results) -> Iterator[Run]:
    """The best of each method so far, and its neighbors."""
    for method in METHODS:
        yield best(config, results, method)
    for method in reversed(METHODS):  # Muon, which has the most neighbors, first
        center = best(config, results, method)
        for times in (0.5, 2.0):
            yield replace(center, max_lr=times * center.max_lr)
            if center.muon_lr:
                yield replace(center, muon_lr=times * center.muon_lr)


def contestants(config: BenchmarkConfig, results: Results) -> dict[str, Run]:
    """AdamW at the rate of the 124M recipe, and the best of each method."""
    untuned = Run("AdamW, cosine", TrainConfig().max_lr, config.tokens)
    return {"AdamW, recipe": untuned} | {method: best(config, results, method) for method in METHODS}


def lengths(config: BenchmarkConfig, results: Results) -> Iterator[Run]:
    """Each contestant's runs of several lengths; Muon has shorter ones too, which reach the others' losses."""
    everyone = contestants(config, results)
    for multiple, seed, names in (  # the longest first, so that at the end no process waits long for the other
        (4, 0, METHODS),
        (2, 0, everyone),
        (2, 1, METHODS),
        (2, 2, METHODS),
        (1, 0, everyone),
        (0.5, 0, ["Muon"]),
        (0.25, 0, ["Muon"]),
    ):
        for name in names:
            yield replace(everyone[name], tokens=int(multiple * config.tokens), seed=seed)


def ablations(config: BenchmarkConfig, results: Results) -> Iterator[Run]:
    """The best of a method, and the same with something changed."""
    for method, seed in (("AdamW, linear", 0), ("Muon", 0), ("Muon", 1)):
        unchanged = replace(best(config, results, method), seed=seed)
        yield unchanged
        for of, change in (*CHANGED_SETTINGS, *BEFORE_EACH_STEP):
            if of == method:
                yield replace(unchanged, change=change)


def measure(config: BenchmarkConfig) -> Results:
    """Run what --out does not have yet; returns all results."""
    shared = setting(config)
    results, running = read_results(config, shared), {}
    with ProcessPoolExecutor(config.workers, mp_context=get_context("spawn")) as pool:
        while True:
            planned = itertools.chain.from_iterable(stage(config, results) for stage in (sweep, lengths, ablations))
            missing = [r for r in dict.fromkeys(planned) if r not in results and r not in running.values()]
            running |= {pool.submit(train, config, r): r for r in missing[: config.workers - len(running)]}
            if not running:
                return results
            for finished in wait(running, return_when=FIRST_COMPLETED).done:
                result = results[running.pop(finished)] = finished.result() | {"setting": shared}
                line = json.dumps(result)
                print(line, flush=True)
                with open(config.out, "a") as file:
                    file.write(line + "\n")


# ---- the comparison --------------------------------------------------------------------------------------------------


def curve(contestant: Run, results: Results) -> dict[int, float]:
    """The validation losses of the first seed, by the tokens of the run."""
    same = sorted(r.tokens for r in results if r == replace(contestant, tokens=r.tokens))
    return {tokens: results[replace(contestant, tokens=tokens)]["val_loss"] for tokens in same}


def tokens_to_reach(loss: float, falling: dict[int, float]) -> float:
    """After how many tokens a curve is at a loss, interpolated in the logarithm; NaN outside of what was measured."""
    rising = [-value for value in falling.values()]
    return math.exp(np.interp(-loss, rising, np.log(list(falling)), left=math.nan, right=math.nan))


def factor(run: Run, muon: Run, results: Results) -> float | None:
    """How many times Muon's tokens a run took for its loss; None outside of Muon's curve.

    Runs of one seed begin with the same weights and see the same batches. So with another seed than the curve's,
    the curve is shifted to Muon's own run of that seed.
    """
    middle = replace(muon, tokens=2 * muon.tokens)
    shift = results[replace(middle, seed=run.seed)]["val_loss"] - results[middle]["val_loss"]
    tokens = tokens_to_reach(results[run]["val_loss"] - shift, curve(muon, results))
    return None if math.isnan(tokens) else run.tokens / tokens


def describe(run: Run, muon: Run, results: Results) -> str:
    times = factor(run, muon, results)
    compared = f"{times:.2f} times Muon's tokens" if times else "beyond Muon's curve"
    return f"{run.tokens:,} tokens, seed {run.seed}: {results[run]['val_loss']}, {compared}"


def report(config: BenchmarkConfig, results: Results) -> None:
    """Print each contestant's losses, how many times Muon's tokens they took, and the ablations; draw the curves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    runs = contestants(config, results)
    curves = {name: curve(contestant, results) for name, contestant in runs.items()}
    figures: dict[str, dict] = {}
    for name, contestant in runs.items():
        seconds = results[contestant]["cpu_seconds_a_step"]
        print(f"{name}, max_lr {contestant.max_lr:g}, muon_lr {contestant.muon_lr:g}: {seconds} CPU seconds a step")
        own = [r for r in results if r == replace(contestant, tokens=r.tokens, seed=r.seed)]
        for r in own:
            print(f"    {describe(r, runs['Muon'], results)}")
        factors = {tokens: factor(replace(contestant, tokens=tokens), runs["Muon"], results) for tokens in curves[name]}
        spread = [factor(r, runs["Muon"], results) for r in own if r.tokens == 2 * config.tokens]
        if name != "Muon" and len(spread) > 1 and all(spread):
            mean, sd = statistics.mean(spread), statistics.stdev(spread)
            print(f"    {2 * config.tokens:,} tokens, {len(spread)} seeds: {mean:.2f} ± {sd:.2f} times Muon's tokens")
        axes.plot(list(curves[name]), list(curves[name].values()), marker=".", label=name)
        figures[name] = asdict(contestant) | {"val_loss": curves[name], "factor": factors, "seeds": spread}
    for r in ablations(config, results):
        print(f"{r.method}, max_lr {r.max_lr:g}, {r.change or 'as it is'}: {describe(r, runs['Muon'], results)}")
    axes.set(xscale="log", xlabel="tokens of the run", ylabel="validation loss (nats per token)")
    axes.legend()
    figure.savefig(Path(config.out).with_suffix(".png"))
    print(json.dumps(figures))


def main(argv: list[str] | None = None) -> None:
    config = parse_flags(BenchmarkConfig, argv, __doc__)
    check_settings(config)
    if config.batch % config.block_size or config.n_embd % 64:
        raise UsageError("--batch must be a multiple of --block_size, and --n_embd of 64")
    if config.tokens < 4 * config.batch:
        raise UsageError("--tokens must be at least four times --batch, since Muon is run for a quarter of them too")
    open(config.out, "a").close()  # now, not after the first run, if it cannot be
    report(config, measure(config))


if __name__ == "__main__":
    run(main)
