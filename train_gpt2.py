"""Shards to checkpoints: train GPT-2.

python train_gpt2.py                                      # one device; on a CPU, a small model in minutes
torchrun --standalone --nproc_per_node=8 train_gpt2.py    # the 124M reproduction on eight GPUs
python train_gpt2.py --resume                             # go on after an interruption
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import signal
import threading
import time
import uuid
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch._functorch.config
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

import fineweb
import hellaswag
import plot
import sample
import tokenizer
from common import (
    DataError,
    Flags,
    UsageError,
    choose_device,
    flag,
    flush,
    keep_freed_memory,
    locked,
    naming_remedy,
    parse_flags,
    replacing,
    run,
    sha256,
    write_json,
)
from model import GPT, PRESETS, SOURCES, GPTConfig, find_file, load_tensors, read_config, save_tensors

# ---- configuration ---------------------------------------------------------------------------------------------------

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
COMPILE_MODES = ("default", "max-autotune-no-cudagraphs")
FULL_DATA, SAMPLE_DATA = "edu_fineweb10B", "sample_shards"


class Recipe(NamedTuple):
    """The defaults that depend on the model."""

    batch_size: int
    total_batch_size: int
    max_steps: int
    warmup_steps: int
    max_lr: float
    val_tokens: int = 20 * 2**19
    eval_every: int = 250
    hellaswag_every: int = 250
    sample_every: int = 250
    save_every: int = 250


# Total batches and learning rates are GPT-3's for these sizes (Brown et al., 2020, table 2.1), the warm-up its 375
# million tokens, the length one pass over 10 billion
RECIPES = {
    "debug": Recipe(4, 2048, 120, 12, 3e-3, 2**15, eval_every=30, hellaswag_every=0, sample_every=60, save_every=30),
    "gpt2": Recipe(32, 2**19, 19_073, 715, 6e-4),
    "gpt2-medium": Recipe(16, 2**19, 19_073, 715, 3e-4),
    "gpt2-large": Recipe(8, 2**19, 19_073, 715, 2.5e-4),
    "gpt2-xl": Recipe(4, 2**20, 9_536, 357, 2e-4),
}


def by_model(name: str, help: str, **metadata: object) -> Any:
    """Declare a flag whose default is the recipe's."""
    defaults = {model: getattr(recipe, name) for model, recipe in RECIPES.items()}
    if len(set(defaults.values())) <= 2:
        defaults = {"debug": defaults["debug"], "others": defaults["gpt2"]}
    return flag(None, f"{help} (default: {', '.join(f'{m} {v}' for m, v in defaults.items())})", **metadata)


@dataclass(frozen=True)
class TrainConfig(Flags):
    """What a run does. A field marked `fixed` alters its results beyond rounding: a resumed run must keep it."""

    init_from: str | None = flag(None, f"start from this {SOURCES} (default: from random weights)", fixed=True)
    model: str | None = flag(None, "size (default: gpt2 on a CUDA device, else debug)", choices=[*PRESETS], fixed=True)
    data_dir: str | None = flag(None, f"shards (default: {FULL_DATA}; for debug without it, {SAMPLE_DATA})")
    out_dir: str = flag("log", "directory of the checkpoints, log.jsonl and loss.png")
    resume: bool = flag(False, "go on from the newest checkpoint in out_dir, if there is one")

    batch_size: int | None = by_model("batch_size", "sequences in a micro-batch; fewer if memory runs out", least=1)
    block_size: int | None = flag(None, "tokens in a sequence (default: the model's, the most)", fixed=True, least=1)
    total_batch_size: int | None = by_model("total_batch_size", "tokens in an optimizer step", fixed=True, least=1)
    initial_batch_size: int | None = flag(None, "total_batch_size at first (default: no ramp)", fixed=True, least=1)
    batch_ramp_tokens: int = flag(0, "tokens over which steps grow to total_batch_size; 0: no ramp", fixed=True)
    shuffle: bool = flag(False, "visit the rows in random order in the first epoch too", fixed=True)
    seed: int = flag(1337, "seed of the initial weights and the order of the rows", fixed=True)

    max_steps: int | None = by_model("max_steps", "optimizer steps of the whole run", least=1)
    warmup_steps: int | None = by_model("warmup_steps", "optimizer steps of linear warm-up", fixed=True)
    max_lr: float | None = by_model("max_lr", "learning rate after warm-up; a tenth with init_from", fixed=True)
    min_lr: float | None = flag(None, "learning rate at the end (default: a tenth of max_lr)", fixed=True)
    optimizer: str = flag("adamw", "the optimizer", choices=["adamw"], fixed=True)
    beta1: float = flag(0.9, "decay of AdamW's mean of gradients", fixed=True)
    beta2: float = flag(0.95, "decay of AdamW's mean of squared gradients", fixed=True)
    weight_decay: float = flag(0.1, "decay of matrices; biases and norms have none", fixed=True)
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0: any", fixed=True)

    eval_every: int | None = by_model("eval_every", "optimizer steps between validations; 0: none")
    val_tokens: int | None = by_model("val_tokens", "tokens of the val shard to validate on, at most", least=1)
    hellaswag_every: int | None = by_model("hellaswag_every", "optimizer steps between HellaSwag scores; 0: none")
    sample_every: int | None = by_model("sample_every", "optimizer steps between samples of text; 0: none")
    save_every: int | None = by_model("save_every", "optimizer steps between checkpoints; 0: at the end only")
    keep: int = flag(2, "newest checkpoints to keep", least=1)
    milestone_every: int = flag(0, "optimizer steps between checkpoints that are kept for ever; 0: none")
    log_every: int = flag(1, "optimizer steps between lines of the log", least=1)
    tracker: str = flag("none", "where else to log", choices=["none", "tensorboard", "wandb", "trackio"])
    max_skipped: int = flag(10, "steps in a row without a finite loss and gradient that the run survives")
    timeout: int = flag(600, "seconds that a process waits for the others", least=1)

    device: str = flag("auto", "auto, cpu, mps, cuda or cuda:N")
    dtype: str = flag("auto", "of autocast; auto: bfloat16 where the device computes it", choices=["auto", *DTYPES])
    compile: bool | None = flag(None, "compile the model (default: true on a CUDA device, else false)")
    compile_mode: str = flag("default", "how torch.compile searches for speed", choices=COMPILE_MODES)


def choose_model(config: TrainConfig, device: torch.device) -> tuple[str, GPTConfig]:
    """The name of the recipe, and the network's sizes; raises UsageError for a model that cannot be trained."""
    if config.init_from is None:
        model = config.model or ("gpt2" if device.type == "cuda" else "debug")
        return model, PRESETS[model]
    if config.model:
        raise UsageError(f"--init_from {config.init_from} brings its own size: leave out --model {config.model}")
    sizes = sizes_to_train(config)
    if sizes.vocab_size < tokenizer.N_TOKENS:
        raise UsageError(f"--init_from {config.init_from} has {sizes.vocab_size} tokens, fewer than GPT-2")
    as_large = [name for name, p in PRESETS.items() if p.n_layer >= sizes.n_layer and p.n_embd >= sizes.n_embd]
    return [*as_large, "gpt2-xl"][0], sizes


def sizes_to_train(config: TrainConfig) -> GPTConfig:
    """The sizes of what was made from --init_from, which may be gone when a run is resumed, or its own."""
    sources, problem = [*checkpoints(Path(config.out_dir)).values(), config.init_from], None
    for source in sources:
        try:
            return read_config(find_file(source, "config.json"))
        except DataError as error:
            problem = error
    raise problem


def resolve(config: TrainConfig, device: torch.device) -> TrainConfig:
    """Fill in the defaults that depend on the device and the model."""
    model, sizes = choose_model(config, device)
    if config.block_size and config.block_size > sizes.block_size:
        raise UsageError(f"--block_size {config.block_size} is beyond the model's: at most {sizes.block_size}")
    recipe = RECIPES[model]
    if config.init_from:
        recipe = recipe._replace(max_lr=recipe.max_lr / 10)
    full = True
    if model == "debug" and config.data_dir is None:
        manifest = fineweb.load_manifest(Path(FULL_DATA)) or {"complete": any(Path(FULL_DATA).glob("*.npy"))}
        full = manifest["complete"]
    defaults = recipe._asdict() | {
        "model": model,
        "data_dir": FULL_DATA if full else SAMPLE_DATA,
        "block_size": sizes.block_size,
        "initial_batch_size": config.total_batch_size or recipe.total_batch_size,
        "min_lr": 0.1 * (recipe.max_lr if config.max_lr is None else config.max_lr),
        "compile": device.type == "cuda",
    }
    dtype = auto_dtype(device) if config.dtype == "auto" else config.dtype
    return replace(config, dtype=dtype, **{name: v for name, v in defaults.items() if getattr(config, name) is None})


def auto_dtype(device: torch.device) -> str:
    """The fastest type that the device computes without emulation."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    has_bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if device.type == "cpu" and has_bfloat16 else "float32"


def validate(config: TrainConfig, processes: int) -> None:
    """Raise UsageError for settings that do not fit together."""
    micro = config.batch_size * config.block_size * processes
    for name in ("total_batch_size", "initial_batch_size"):
        value = getattr(config, name)
        if value % micro:
            factors = f"--batch_size {config.batch_size} x --block_size {config.block_size} x {processes} process(es)"
            raise UsageError(f"--{name} {value} is not a multiple of {factors} = {micro}: change one of them")
    if config.initial_batch_size > config.total_batch_size:
        raise UsageError(f"--initial_batch_size {config.initial_batch_size} is more than --total_batch_size")
    if (config.initial_batch_size < config.total_batch_size) != (config.batch_ramp_tokens > 0):
        raise UsageError("--initial_batch_size and --batch_ramp_tokens make the ramp together: give both or neither")
    if config.compile_mode != "default" and not config.compile:
        raise UsageError(f"--compile_mode {config.compile_mode} needs --compile")
    if max(config.beta1, config.beta2) >= 1:
        raise UsageError(f"--beta1 {config.beta1} and --beta2 {config.beta2} must be below 1")
    if config.tracker != "none" and importlib.util.find_spec(config.tracker) is None:
        raise UsageError(f"--tracker {config.tracker} is not installed: pip install {config.tracker}")
    if config.min_lr > config.max_lr:
        raise UsageError(f"--min_lr {config.min_lr} is more than --max_lr {config.max_lr}")


# ---- processes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """The processes that train together, and this one's place among them; one process is a world of one."""

    rank: int
    size: int
    device: torch.device
    local_rank: int = 0

    @property
    def leader(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum of each process's values, the same on all; gloo adds what is on the CPU."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def wait(self) -> None:
        """Return when every process has come here."""
        self.sum(torch.zeros(1))

    def any(self, condition: object) -> bool:
        """Whether the condition holds on one process or more, the same on all."""
        return bool(self.sum(torch.tensor(int(bool(condition)))))

    def print(self, text: str) -> None:
        if self.leader:
            print(text, flush=True)


@contextlib.contextmanager
def start_processes(device_name: str, timeout: int) -> Iterator[World]:
    """Join the processes that torchrun started, or be the only one; none waits for another longer than `timeout` s."""
    # torchrun's variables, and what holds without it
    place = {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0}
    size, rank, local_rank = (int(os.environ.get(name, alone)) for name, alone in place.items())
    device = choose_device(device_name, local_rank)
    if size > 1 and "MASTER_ADDR" not in os.environ:
        raise UsageError("WORLD_SIZE is set, but not by torchrun: start several processes with torchrun")
    if size > 1 and (device.type == "mps" or device_name.startswith("cuda:")):
        raise UsageError(f"--device {device_name} takes one process: choose cuda, or cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32
    elif size > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(fair_threads(int(os.environ.get("LOCAL_WORLD_SIZE", size))))
    if size > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        limit = timedelta(seconds=timeout)
        patience = max(limit, timedelta(minutes=1))  # some processes take longer to start
        store = next(dist.rendezvous("env://", timeout=patience))[0]
        store = dist.PrefixStore(new_prefix(store, rank, size), store)
        dist.init_process_group(backend, timeout=limit, store=store, rank=rank, world_size=size)
    yield World(rank, size, device, local_rank)
    if size > 1:  # not after an error: the others may wait in a collective, and torchrun ends them
        dist.destroy_process_group()


def fair_threads(processes: int) -> int:
    """The threads of each process on this machine; torchrun sets one, however many processors there are."""
    has_affinity = hasattr(os, "sched_getaffinity")  # which not all systems have
    return max(1, (len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1) // processes)


def new_prefix(store: dist.Store, rank: int, size: int) -> str:
    """A name that the processes which are there now agree upon.

    torchrun keeps its store when it restarts. With the same keys, a process could find the address of one that is gone;
    so each asks under a name that nobody has used, and rank 0 answers until each has said that it knows.
    """
    mine, others = uuid.uuid4().hex, set(range(1, size))
    if rank:
        store.set(f"ask/{rank}", mine)
        prefix = store.get(f"answer/{mine}").decode()  # waits, as long as the store's timeout
        store.set(f"known/{prefix}/{rank}", "")
        return prefix
    deadline = time.monotonic() + store.timeout.total_seconds()
    while others and time.monotonic() < deadline:
        for other in [other for other in others if store.check([f"ask/{other}"])]:
            store.set(f"answer/{store.get(f'ask/{other}').decode()}", mine)
        others = {other for other in others if not store.check([f"known/{mine}/{other}"])}
        time.sleep(0.01)
    if others:
        raise DataError(f"the processes {sorted(others)} did not start within {store.timeout}")
    return mine


# ---- data ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shards:
    """The tokens on disk, and what identifies them."""

    val: np.ndarray
    train: list[np.ndarray]
    identity: list[list]
    unigram_loss: float | None
    source: dict | None


def build_sample(world: World) -> None:
    """Build the sample shards, once, unless they are there."""
    manifest = fineweb.load_manifest(Path(SAMPLE_DATA))
    if world.leader and not (manifest and manifest["complete"]):
        world.print(f"building {SAMPLE_DATA} from Python's documentation")
        fineweb.build(fineweb.FinewebConfig(sample=True, encoder="tiktoken", workers=1))
    world.wait()


def open_shards(config: TrainConfig, world: World) -> Shards:
    """Open the shards; raises DataError where one is missing or is not what the manifest says."""
    directory = Path(config.data_dir)
    if directory == Path(SAMPLE_DATA):
        build_sample(world)
    manifest = fineweb.load_manifest(directory) or {}
    if not manifest.get("complete", True):
        raise DataError(f"the shards in --data_dir {directory} are not complete: run the same fineweb.py command again")
    listed = {shard["name"]: shard for shard in manifest.get("shards", [])}
    present = [path.name for path in directory.glob("*.npy") if fineweb.SHARD_NAME.fullmatch(path.name)]
    names = list(listed) or sorted(present, key=lambda name: name[-10:])  # by number: val comes first
    if len(names) < 2:
        raise DataError(f"--data_dir {directory} holds no val and train shards: make them with fineweb.py")
    for number, name in enumerate(names):
        if name != fineweb.shard_name(number):
            raise DataError(f"{directory / fineweb.shard_name(number)} is missing: build the shards again")
    shards = [open_shard(directory / name, listed.get(name)) for name in names]
    hashes = [listed[name]["sha256"] if listed else None for name in names]
    identity = [[name, len(shard), digest] for name, shard, digest in zip(names, shards, hashes, strict=True)]
    if len(shards[0]) <= config.block_size or sum(map(len, shards[1:])) <= config.total_batch_size:
        raise UsageError(f"--data_dir {directory} holds too few tokens for one batch: lower --total_batch_size")
    return Shards(shards[0], shards[1:], identity, manifest.get("unigram_loss"), manifest.get("source"))


def open_shard(path: Path, listed: dict | None) -> np.ndarray:
    """Map one shard into memory."""
    try:
        tokens = np.load(path, mmap_mode="r")
        if not isinstance(tokens, np.ndarray) or tokens.dtype != np.uint16 or tokens.ndim != 1:
            raise ValueError("it holds something else")
        if listed and len(tokens) != listed["tokens"]:
            raise ValueError(f"it has {len(tokens)} tokens, not {listed['tokens']}")
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path} is not a whole shard of uint16 tokens ({error}): build it again") from None
    return tokens


def read_tokens(shard: np.ndarray, start: int, stop: int) -> np.ndarray:
    """A part of a shard; raises DataError for a token outside the vocabulary."""
    tokens = shard[start:stop]
    if len(tokens) and tokens.max() >= tokenizer.N_TOKENS:
        raise DataError(f"{shard.filename} holds the token {tokens.max()}, which GPT-2 has not: build it again")
    return tokens


class Batches:
    """The train shards as one stream of tokens, cut into rows of block_size, each with the label after its last token.

    A position counts tokens from the start of the first epoch; it is the whole state. The first epoch's rows come in
    order, the others' (with `shuffle` its own too) in a permutation drawn from the seed and the epoch. What an epoch
    has left after its last whole batch is passed over.
    """

    def __init__(self, shards: list[np.ndarray], block_size: int, seed: int, shuffle: bool) -> None:
        self.shards, self.block_size, self.seed, self.shuffle = shards, block_size, seed, shuffle
        self.starts = np.cumsum([0] + [len(shard) for shard in shards])
        self.rows = int(self.starts[-1] - 1) // block_size

    def at(self, position: int, tokens: int) -> tuple[Tensor, int]:
        """The batch of `tokens` tokens at a position: rows (tokens / T, T + 1), and the position after it."""
        epoch, first = divmod(position // self.block_size, self.rows)
        count = tokens // self.block_size
        if first + count > self.rows:
            epoch, first = epoch + 1, 0
        numbers = np.arange(first, first + count)
        if epoch > 0 or self.shuffle:
            numbers = permutation(self.rows, self.seed, epoch)[numbers]
        rows = np.stack([self.row(number) for number in numbers])
        return torch.from_numpy(rows.astype(np.int64)), (epoch * self.rows + first + count) * self.block_size

    def row(self, number: int) -> np.ndarray:
        """The tokens of a row and the one after it, from one shard or from several."""
        start, stop = number * self.block_size, (number + 1) * self.block_size + 1
        parts = []
        for shard in range(np.searchsorted(self.starts, start, side="right") - 1, len(self.shards)):
            begin, end = self.starts[shard : shard + 2]
            parts.append(read_tokens(self.shards[shard], max(start - begin, 0), stop - begin))
            if stop <= end:
                break
        return np.concatenate(parts)


@functools.lru_cache(maxsize=1)
def permutation(rows: int, seed: int, epoch: int) -> np.ndarray:
    """The row numbers in an order that every process draws alike."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


# ---- schedules and optimizer -----------------------------------------------------------------------------------------


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up to max_lr, then a cosine to min_lr at max_steps, for the step that follows `step` steps."""
    if step < config.warmup_steps:
        return config.max_lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return config.min_lr + (config.max_lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def batch_tokens(config: TrainConfig, position: int) -> int:
    """Tokens of the optimizer step at a position: GPT-3's linear ramp, in whole multiples of initial_batch_size.

    That unit holds whole micro-batches of every process, and depends on neither.
    """
    if position >= config.batch_ramp_tokens:
        return config.total_batch_size
    grown = (config.total_batch_size - config.initial_batch_size) * position // config.batch_ramp_tokens
    return config.initial_batch_size + grown // config.initial_batch_size * config.initial_batch_size


def make_optimizer(gpt: GPT, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, 2019) with weight decay on matrices, none on biases and norms."""
    parameters = list(gpt.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.max_lr, betas=(config.beta1, config.beta2), eps=1e-8, fused=True)


@dataclass
class Trainer:
    """A run in memory. `gpt` owns the weights, and is what is saved, sampled and scored; `model` is how it is run."""

    config: TrainConfig
    world: World
    gpt: GPT
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    skipped: Tensor  # steps without finite loss and gradient: in all, in a row up to now, most in a row since the start
    scores: dict[str, tuple[int, float]]  # the latest of each, and its step
    step: int = 0
    tokens: int = 0  # trained on
    position: int = 0  # in the data
    evaluated: bool = False  # at this step
    attention: str | None = None  # the kernel to prefer

    def autocast(self) -> torch.autocast:
        dtype = DTYPES[self.config.dtype]
        return torch.autocast(self.world.device.type, dtype, enabled=dtype != torch.float32)


def make_trainer(config: TrainConfig, world: World, gpt: GPT) -> Trainer:
    """Put the network on the device, and wrap it for speed and for several processes."""
    if world.device.type == "cpu":
        keep_freed_memory()
    gpt = gpt.to(world.device)
    model = torch.compile(gpt, fullgraph=True, dynamic=False, mode=config.compile_mode) if config.compile else gpt
    if world.size > 1:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    scaler = torch.amp.GradScaler(world.device.type, enabled=config.dtype == "float16")
    skipped = torch.zeros(3, dtype=torch.int64, device=world.device)
    return Trainer(config, world, gpt, model, make_optimizer(gpt, config), scaler, skipped, scores={})


def share(rows: Tensor, batch_size: int, world: World) -> Tensor:
    """This process's micro-batches (accumulation steps, B, T + 1) of a global batch of rows (N, T + 1).

    Each accumulation step takes the next B rows for every rank in turn.
    """
    return rows.view(-1, world.size, batch_size, rows.shape[1])[:, world.rank]


def training_step(trainer: Trainer, rows: Tensor) -> tuple[Tensor, Tensor]:
    """One optimizer step on a global batch of rows (N, T + 1); returns the mean loss and the gradient's norm.

    Both stay on the device, so that nothing waits for them. Where one is not finite, all processes skip the update.
    """
    config, world = trainer.config, trainer.world
    micro_batches = share(rows, config.batch_size, world).to(world.device)
    loss = torch.zeros((), device=world.device)
    for number, micro_batch in enumerate(micro_batches):
        # read by DDP in the forward pass: reduce the gradients once, with the last micro-batch
        trainer.model.require_backward_grad_sync = number == len(micro_batches) - 1
        with trainer.autocast():
            mean = trainer.model(micro_batch[:, :-1], micro_batch[:, 1:])[1]  # and the logits need not be kept
        trainer.scaler.scale(mean / len(micro_batches)).backward()
        loss += mean.detach() / len(micro_batches)
    for group in trainer.optimizer.param_groups:
        group["lr"] = learning_rate(config, trainer.step)
    loss = world.sum(loss) / world.size
    trainer.scaler.unscale_(trainer.optimizer)
    norm = nn.utils.clip_grad_norm_(trainer.gpt.parameters(), config.grad_clip or math.inf)
    bad = ~(norm.isfinite() & loss.isfinite())  # of the sum over all processes, so the same on each
    trainer.optimizer.found_inf = bad.float()  # by which a fused optimizer leaves weights and moments as they are
    trainer.optimizer.step()
    trainer.scaler.update()
    trainer.optimizer.zero_grad()
    in_a_row = (trainer.skipped[1] + 1) * bad
    trainer.skipped = torch.stack([trainer.skipped[0] + bad, in_a_row, trainer.skipped[2].maximum(in_a_row)])
    trainer.step, trainer.tokens, trainer.evaluated = trainer.step + 1, trainer.tokens + rows[:, 1:].numel(), False
    return loss, norm


# ---- evaluation ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def validation_loss(trainer: Trainer, val: np.ndarray) -> float:
    """The mean loss over the first val_tokens of the val shard, for any micro-batch and number of processes alike."""
    config, world = trainer.config, trainer.world
    B, T, mine = config.batch_size, config.block_size, slice(world.rank, None, world.size)
    count = max(1, min(config.val_tokens, len(val) - 1) // T)
    tokens = torch.from_numpy(read_tokens(val, 0, count * T + 1).astype(np.int64))
    total = 0.0
    for x, y in zip(tokens[:-1].view(-1, T)[mine].split(B), tokens[1:].view(-1, T)[mine].split(B), strict=True):
        if not len(x):
            break  # more processes than rows
        missing = (0, 0, 0, B - len(x))  # filled up, for a compiled model; targets of -100 do not count
        x_full, y_full = F.pad(x, missing), F.pad(y, missing, value=-100)
        with trainer.autocast():
            _, loss = trainer.model(x_full.to(world.device), y_full.to(world.device))
        total += float(loss) * y.numel()
    return float(world.sum(torch.tensor(total, dtype=torch.float64))) / (count * T)


def load_hellaswag(config: TrainConfig, world: World) -> list[hellaswag.Question] | None:
    """This process's share of HellaSwag; where a machine cannot have the file, a notice and None for all."""
    failed = torch.tensor(0)
    if config.hellaswag_every and world.local_rank == 0:
        try:
            hellaswag.download()
        except DataError as error:
            print(f"HellaSwag is left out: {error}", flush=True)
            failed += 1
    if world.sum(failed) or not config.hellaswag_every:
        return None
    return hellaswag.load(hellaswag.FILE, slice(world.rank, None, world.size))


def hellaswag_scores(trainer: Trainer, questions: list[hellaswag.Question]) -> dict[str, float]:
    """The accuracies by their names, over the questions of all processes."""
    world = trainer.world
    with trainer.autocast():
        correct = world.sum(hellaswag.count_correct(trainer.gpt, questions, progress=world.leader))
    count = int(world.sum(torch.tensor(len(questions))))
    return {f"hellaswag_{name}": value for name, value in hellaswag.accuracies(correct, count).items()}


def print_samples(trainer: Trainer) -> None:
    """A few texts by the model as it is now."""
    wanted = sample.SampleConfig(checkpoint=trainer.config.out_dir, max_new_tokens=32, seed=trainer.config.seed)
    for number in range(wanted.num_samples):
        with trainer.autocast():
            text = "".join(sample.continuation(trainer.gpt, wanted, sample.PROMPT, number))
        trainer.world.print(f"step {trainer.step:5d} | {sample.PROMPT + text!r}")


def evaluate(trainer: Trainer, log: plot.Log, shards: Shards, questions: list[hellaswag.Question] | None) -> None:
    """Whatever is due at this step: validation loss, HellaSwag, samples, the picture."""
    config, world, step = trainer.config, trainer.world, f"step {trainer.step:5d}"
    trainer.evaluated = True
    if due(config.eval_every, trainer):
        loss, unigram = validation_loss(trainer, shards.val), format_or_na(shards.unigram_loss, ".4f")
        log.write(f"{step} | validation loss {loss:.4f} (unigram {unigram})", step=trainer.step, val_loss=loss)
        trainer.scores["validation loss"] = trainer.step, loss
    # of many shapes, for each of which cuDNN's kernel would have to be prepared
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        if questions is not None and due(config.hellaswag_every, trainer):
            found = hellaswag_scores(trainer, questions)
            shown = " | ".join(f"{name} {value:.4f}" for name, value in found.items())
            log.write(f"{step} | {shown}", step=trainer.step, **found)
            trainer.scores |= {name: (trainer.step, value) for name, value in found.items()}
        if world.leader and due(config.sample_every, trainer):
            print_samples(trainer)
    if due(config.eval_every, trainer):
        log.draw()
        gc.collect()


def due(every: int, trainer: Trainer) -> bool:
    """Whether periodic work falls on this step; it always does on the last."""
    return every > 0 and (trainer.step % every == 0 or trainer.step == trainer.config.max_steps)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


NEEDED = {"config.json", "model.safetensors", "optimizer.safetensors", "trainer.json"}  # for resuming


def checkpoints(out_dir: Path) -> dict[int, Path]:
    """The checkpoints by their step, the newest first."""
    found = [path for path in out_dir.glob("step_*") if re.fullmatch(r"step_\d{6,}", path.name) and path.is_dir()]
    return dict(sorted(((int(path.name[5:]), path) for path in found), reverse=True))


def save_checkpoint(trainer: Trainer, shards: Shards) -> None:
    """Write a checkpoint that is either complete or absent, then remove older ones; raises OSError on a full disk."""
    out_dir, step = Path(trainer.config.out_dir), trainer.step
    temporary = out_dir / ".checkpoint.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        write_checkpoint(trainer, shards, temporary)
        os.replace(temporary, out_dir / f"step_{step:06d}")
        flush(out_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for step, path in list(checkpoints(out_dir).items())[trainer.config.keep :]:
        if not (trainer.config.milestone_every and step % trainer.config.milestone_every == 0):
            shutil.rmtree(path, ignore_errors=True)


def write_checkpoint(trainer: Trainer, shards: Shards, directory: Path) -> None:
    """Write a checkpoint's files, the manifest of their hashes last; threads overlap copying, flushing and hashing."""
    directory.mkdir(parents=True)
    state = {
        "step": trainer.step,
        "tokens": trainer.tokens,
        "position": trainer.position,
        "config": asdict(trainer.config),
        "data": shards.identity,
        "skipped": trainer.skipped.tolist(),
        "evaluated": trainer.evaluated,
        "attention": trainer.attention,
        "scores": trainer.scores,
        "scaler": trainer.scaler.state_dict(),
        "versions": versions(),
    }
    with ThreadPoolExecutor() as threads:
        optimizer = threads.submit(save_tensors, directory / "optimizer.safetensors", state_tensors(trainer))
        trainer.gpt.save_pretrained(directory)
        tokenizer.save_pretrained(directory, trainer.gpt.config.block_size)
        write_json(directory / "trainer.json", state)
        with replacing(directory / "README.md") as temporary:
            temporary.write_text(model_card(trainer, shards), encoding="utf-8")
        optimizer.result()
        paths = sorted(directory.iterdir())
        hashes = dict(zip([path.name for path in paths], threads.map(sha256, paths), strict=True))
    write_json(directory / "MANIFEST.json", hashes)


MODEL_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [gpt2]
datasets: {datasets}
---

# GPT-2 with {parameters:,} parameters

{n_layer} layers, {n_head} heads, {n_embd} channels, {block_size} positions, {vocab_size} token ids.
Begun with {begun}, trained for {step} of {max_steps} optimizer steps on {tokens:,} tokens from:

{source}

| score | step | value |
|---|---|---|
{scores}

Losses are in nats a token. HellaSwag's validation set is scored as build-nanogpt does (nanogpt), and as
lm-evaluation-harness does (lm_eval).

```python
from transformers import pipeline

pipeline("text-generation", model="PATH OF THIS DIRECTORY")("Hello, I'm a language model,")
```
"""


def model_card(trainer: Trainer, shards: Shards) -> str:
    """README.md as the Hugging Face Hub shows it: how the model was made, how good it is, how to load it."""
    config = trainer.config
    source = shards.source or {"shards": config.data_dir}
    return MODEL_CARD.format(
        **asdict(trainer.gpt.config),
        datasets=json.dumps([source["dataset"]] if "dataset" in source else []),
        parameters=sum(parameter.numel() for parameter in trainer.gpt.parameters()),
        begun=config.init_from or "random weights",
        step=trainer.step,
        max_steps=config.max_steps,
        tokens=trainer.tokens,
        source="\n".join(f"- {key}: {shortened(value)}" for key, value in source.items()),
        scores="\n".join(f"| {name} | {step} | {value:.4f} |" for name, (step, value) in trainer.scores.items()),
    )


def shortened(value: str | list[list[str]]) -> str:
    """A source's entry for the model card: a text, or files, each with its hash, of which a few are named."""
    if isinstance(value, str):
        return value
    more = f" and {len(value) - 5} more" if len(value) > 5 else ""
    return ", ".join(name for name, _ in value[:5]) + more


def versions() -> dict[str, str]:
    return {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()}


def state_tensors(trainer: Trainer) -> dict[str, Tensor]:
    """The optimizer's state, each tensor under its own name and its parameter's, and the random generators'."""
    state, device = trainer.optimizer.state, trainer.world.device
    tensors = {f"{key}.{name}": t for name, p in trainer.gpt.named_parameters() for key, t in state[p].items()}
    if device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(device)
    return tensors | {"random.cpu": torch.get_rng_state()}


def damage(directory: Path) -> str | None:
    """What is wrong with a checkpoint, if anything is."""
    try:
        manifest = json.loads((directory / "MANIFEST.json").read_text(encoding="utf-8"))
        if missing := NEEDED - manifest.keys():
            raise ValueError(f"MANIFEST.json lacks {', '.join(sorted(missing))}")
        wrong = [name for name, digest in manifest.items() if sha256(directory / name) != digest]
    except (OSError, ValueError, AttributeError) as error:
        return str(error)
    return f"{', '.join(wrong)} changed since it was written" if wrong else None


def newest_checkpoint(out_dir: Path, world: World) -> Path | None:
    """The newest checkpoint whose hashes hold; the leader chooses, and sets the damaged ones aside that are newer.

    Raises DataError where all are damaged, or where a process does not see the leader's choice.
    """
    chosen, damaged = -1, {}
    for step, directory in checkpoints(out_dir).items() if world.leader else ():
        if not (problem := damage(directory)):
            chosen = step
            break
        world.print(f"passing over the checkpoint {directory}: {problem}")
        damaged[directory] = directory.with_name(f"{directory.name}.damaged")
    if damaged and chosen < 0:
        raise DataError(f"no checkpoint in --out_dir {out_dir} is whole: choose another directory to start anew")
    for directory, aside in damaged.items():
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(directory, aside)
    chosen = int(world.sum(torch.tensor(chosen if world.leader else 0)))
    path = out_dir / f"step_{chosen:06d}" if chosen >= 0 else None
    if world.sum(torch.tensor(int(path is None or path.is_dir()))) < world.size:
        raise DataError(f"--out_dir {out_dir} must be on a disk that all machines share: not all see {path}")
    return path


def load_checkpoint(directory: Path, config: TrainConfig, world: World, data: list[list]) -> Trainer:
    """The run as it was; raises UsageError where a setting or the data would alter its mathematics."""
    state = json.loads((directory / "trainer.json").read_text(encoding="utf-8"))
    refuse_changes(state, config, data)
    if state["versions"] != versions():
        world.print(f"warning: begun with {state['versions']}, now {versions()}: losses may differ by rounding")
    trainer = make_trainer(config, world, GPT.from_pretrained(directory))
    tensors = load_tensors(directory / "optimizer.safetensors")
    for name, parameter in trainer.gpt.named_parameters():
        keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in tensors]
        trainer.optimizer.state[parameter] = {key: tensors[f"{key}.{name}"].to(world.device) for key in keys}
    torch.set_rng_state(tensors["random.cpu"])
    if world.device.type == "cuda" and "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"], world.device)
    if trainer.scaler.is_enabled() and state["scaler"]:
        trainer.scaler.load_state_dict(state["scaler"])
    for name in ("step", "tokens", "position", "evaluated", "scores"):
        setattr(trainer, name, state[name])
    trainer.attention = state.get("attention")
    skipped, in_a_row, _ = state["skipped"]
    trainer.skipped = torch.tensor([skipped, in_a_row, in_a_row], device=world.device)
    return trainer


def refuse_changes(state: dict, config: TrainConfig, data: list[list]) -> None:
    """Raise UsageError if the resumed run would not be the one that was stopped."""
    before = replace(config, **{name: value for name, value in state["config"].items() if hasattr(config, name)})
    for field in fields(TrainConfig):
        old, new = getattr(before, field.name), getattr(config, field.name)
        if field.metadata.get("fixed") and old != new:
            raise UsageError(f"--{field.name} {new}, but the run in --out_dir {config.out_dir} was begun with {old}")
    if state["data"] != data:
        raise UsageError(f"the shards in --data_dir {config.data_dir} are not those the run was begun with")
    if any(learning_rate(before, step) != learning_rate(config, step) for step in range(state["step"])):
        raise UsageError(f"--max_steps {config.max_steps} changes learning rates of steps done with {before.max_steps}")


# ---- the loop --------------------------------------------------------------------------------------------------------

# Dense bf16 (fp16 for the oldest) FLOP/s by the vendors' data sheets, found by a part of the device's name
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "RTX 4090": 165e12,
    "V100": 125e12,
}


def flops_per_token(gpt: GPT) -> int:
    """Forward and backward: 6 for each weight that multiplies, and 12 L C T for attention (PaLM, appendix B)."""
    config = gpt.config
    weights = sum(p.numel() for p in gpt.parameters()) - gpt.transformer.wpe.weight.numel()
    return 6 * weights + 12 * config.n_layer * config.n_embd * config.block_size


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def announce(trainer: Trainer, shards: Shards) -> None:
    """Print what the run is about to do."""
    config, world, vocab_size = trainer.config, trainer.world, trainer.gpt.config.vocab_size
    micro = config.batch_size * config.block_size * world.size
    ramp = f", from {config.initial_batch_size:,} at first" if config.batch_ramp_tokens else ""
    world.print(
        f"model {config.init_from or config.model} on {world.size} x {device_name(world.device)}, {config.dtype}, "
        f"compile {config.compile} (choose with --model or --init_from, --device, --dtype, --compile)\n"
        f"data {config.data_dir} (choose with --data_dir): {sum(map(len, shards.train)):,} train tokens, "
        f"{len(shards.val):,} val tokens, unigram loss {format_or_na(shards.unigram_loss, '.4f')}\n"
        f"batch of {config.total_batch_size:,} tokens{ramp}: {config.total_batch_size // micro} accumulation steps of "
        f"batch_size {config.batch_size} x block_size {config.block_size} x {world.size} process(es)"
    )
    for group in trainer.optimizer.param_groups:
        sizes = [parameter.numel() for parameter in group["params"]]
        world.print(f"weight decay {group['weight_decay']}: {len(sizes)} tensors, {sum(sizes):,} parameters")
    if not config.init_from:
        world.print(f"expected first loss: ln({vocab_size}) = {math.log(vocab_size):.4f}")


def format_or_na(value: float | None, how: str) -> str:
    return "n/a" if value is None else format(value, how)


def report(trainer: Trainer, log: plot.Log, clock: Clock, rows: Tensor, loss: Tensor, norm: Tensor) -> None:
    """Log the last optimizer step; raises DataError where too many in a row were skipped."""
    config, world, step = trainer.config, trainer.world, trainer.step
    loss, norm, (skipped, _, in_a_row) = float(loss), float(norm), trainer.skipped.tolist()  # waits for the device
    if math.isfinite(loss):
        trainer.scores["training loss"] = step, loss
    lr, (seconds, rate, left) = trainer.optimizer.param_groups[0]["lr"], clock.read(trainer)
    known = [flops for name, flops in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", device_name(world.device))]
    mfu = rate * flops_per_token(trainer.gpt) / (known[0] * world.size) if known else None
    batch = hashlib.sha256(rows.to(torch.uint16).numpy()).hexdigest()[:16]
    log.write(
        f"step {step:5d}/{config.max_steps} | loss {loss:.4f} | lr {lr:.2e} | norm {norm:.3f} | "
        f"{1000 * seconds:.0f} ms | {rate:,.0f} tokens/s | MFU {format_or_na(mfu, '.1%')} | "
        f"{timedelta(seconds=round(left))} left" + (f" | {skipped} skipped" if skipped else ""),
        **{"step": step, "loss": loss, "lr": lr, "norm": norm, "tokens": rows[:, 1:].numel(), "skipped": skipped},
        **{"position": trainer.position, "batch": batch},
        **{"ms": 1000 * seconds, "tokens_per_second": rate, "mfu": mfu},
    )
    if in_a_row > config.max_skipped:
        newest = next(iter(checkpoints(Path(config.out_dir)).values()), "none")
        raise DataError(
            f"step {step}: {in_a_row} steps in a row had no finite loss and gradient, and were skipped "
            f"(--max_skipped {config.max_skipped}); the last good checkpoint is {newest}"
        )


class Clock:
    """Times the steps between two lines of the log, without the evaluations and checkpoints between them."""

    def __init__(self, trainer: Trainer) -> None:
        self.began = self.since = self.paused = time.perf_counter()
        self.first = self.step = trainer.step
        self.tokens = trainer.tokens

    def pause(self) -> None:
        self.paused = time.perf_counter()

    def go_on(self) -> None:
        self.since += time.perf_counter() - self.paused

    def read(self, trainer: Trainer) -> tuple[float, float, float]:
        """Seconds a step and tokens a second since the last reading, and the seconds that the run has left."""
        now, step = time.perf_counter(), trainer.step
        elapsed, average = now - self.since, (now - self.began) / (step - self.first)
        seconds, rate = elapsed / (step - self.step), (trainer.tokens - self.tokens) / elapsed
        self.since, self.step, self.tokens = now, step, trainer.tokens
        return seconds, rate, average * (trainer.config.max_steps - step)


ATTENTION_KERNELS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")


def attention_seconds(trainer: Trainer, kernel: str) -> float:
    """How long torch's attention kernel takes for a micro-batch as the model lays it out; inf where it cannot."""
    config, sizes, seconds = trainer.config, trainer.gpt.config, []
    shape = (config.batch_size, config.block_size, 3, sizes.n_head, sizes.n_embd // sizes.n_head)  # (B, T, 3, H, D)
    qkv = torch.randn(shape, device=trainer.world.device, dtype=DTYPES[config.dtype], requires_grad=True)
    try:
        with sdpa_kernel(getattr(SDPBackend, kernel)), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(5):
                began = time.perf_counter()
                y = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), is_causal=True)  # (B, H, T, D)
                y.transpose(1, 2).reshape(*shape[:2], -1).square().sum().backward()
                float(qkv.grad[0, 0, 0, 0, 0])  # waits for the device
                seconds.append(time.perf_counter() - began)
    except RuntimeError:
        return math.inf
    return min(seconds)


@contextlib.contextmanager
def fastest_attention(trainer: Trainer) -> Iterator[None]:
    """Prefer the kernel that is fastest on the leader's GPU; a run that goes on prefers the one it began with."""
    world, choices = trainer.world, list(ATTENTION_KERNELS)
    if world.device.type != "cuda":
        yield
        return
    if trainer.attention is None:
        seconds = [attention_seconds(trainer, kernel) for kernel in choices] if world.leader else [0.0]
        trainer.attention = choices[int(world.sum(torch.tensor(seconds.index(min(seconds)))))]
        torch.cuda.empty_cache()
    world.print(f"attention by {trainer.attention}, the fastest where the run began")
    choices.sort(key=lambda kernel: kernel != trainer.attention)  # the others for what it cannot, such as masks
    torch._functorch.config.enable_autograd_cache = False  # it would take what was compiled with another kernel
    with sdpa_kernel([getattr(SDPBackend, kernel) for kernel in choices], set_priority=True):
        yield


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """Keep garbage collection, which would delay every process, out of steps; `evaluate` and `save` see to it."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM, SIGINT and SIGUSR1 in a list, for the run to end after the step that is under way."""
    received: list[int] = []
    kinds = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    if threading.current_thread() is not threading.main_thread():
        kinds = ()  # another thread cannot have handlers

    def receive(number: int, frame: object) -> None:
        received.append(number)
        if len(received) > 2:  # under torchrun, Ctrl-C comes twice
            raise KeyboardInterrupt

    before = {kind: signal.signal(kind, receive) for kind in kinds}
    try:
        yield received
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def launch() -> str | None:
    """What tells one start of torchrun from another; None without it."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"{run_id} {platform.node()} {os.getppid()}" if run_id else None


def continues(config: TrainConfig, world: World) -> bool:
    """Whether to go on with what is in out_dir: when asked to, or when torchrun restarts what it began itself."""
    path = Path(config.out_dir) / "log.jsonl"
    records = plot.read_log(path) if world.leader and launch() and path.exists() else []
    launches = [record["launch"] for record in records if "launch" in record]
    return config.resume or world.any(launch() in launches[-1:])


def start_or_resume(config: TrainConfig, world: World, data: list[list]) -> Trainer:
    """A new run, or the one in out_dir; raises UsageError where there is one that is not to be continued."""
    out_dir = Path(config.out_dir)
    goes_on = continues(config, world)
    if not goes_on and (checkpoints(out_dir) or (out_dir / "log.jsonl").exists()):
        raise UsageError(f"--out_dir {out_dir} holds a run: continue it with --resume, or choose another directory")
    world.wait()  # until all have looked
    if directory := newest_checkpoint(out_dir, world):
        world.print(f"resuming from {directory}")
        return load_checkpoint(directory, config, world, data)
    torch.manual_seed(config.seed)
    if config.init_from:
        gpt = GPT.from_pretrained(config.init_from, vocab_multiple=128, block_size=config.block_size)
    else:
        gpt = GPT(replace(PRESETS[config.model], block_size=config.block_size))
    return make_trainer(config, world, gpt)


def open_log(trainer: Trainer, shards: Shards) -> plot.Log:
    """The run's log, which begins with what this process group is."""
    config, world = trainer.config, trainer.world
    start = {"step": trainer.step, "launch": launch(), "processes": world.size, "unigram_loss": shards.unigram_loss}
    tracker = plot.Tracker(config.tracker, config.out_dir, asdict(config), trainer.step) if world.leader else None
    return plot.Log(Path(config.out_dir), tracker, start, trainer.evaluated)


def save(trainer: Trainer, log: plot.Log, shards: Shards, last: bool) -> None:
    """Save a checkpoint; a disk that does not take it ends the run only where there is no later one to come."""
    gc.collect()
    if not trainer.world.leader:
        return
    try:
        log.flush()
        save_checkpoint(trainer, shards)
    except OSError as error:
        if last:
            raise DataError(f"step {trainer.step} could not be saved: {error}; make room, and add --resume") from None
        print(f"warning: step {trainer.step} could not be saved: {error}; training goes on", flush=True)


def train(config: TrainConfig) -> None:
    """Train until max_steps, or until a signal; every process of the world calls this.

    Raises UsageError for settings that do not fit, DataError for shards or checkpoints that cannot be used.
    """
    with (
        start_processes(config.device, config.timeout) as world,
        stop_signals() as signals,
        contextlib.ExitStack() as held,
    ):
        config = resolve(config, world.device)
        validate(config, world.size)
        shards = open_shards(config, world)
        batches = Batches(shards.train, config.block_size, config.seed, config.shuffle)
        if world.leader:
            Path(config.out_dir).mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(Path(config.out_dir), wait=False))
        trainer = start_or_resume(config, world, shards.identity)
        announce(trainer, shards)
        held.enter_context(fastest_attention(trainer))
        held.enter_context(no_collections())
        if trainer.step >= config.max_steps:
            return world.print(f"the run in {config.out_dir} is finished: {trainer.step} of {config.max_steps} steps")
        questions, log = load_hellaswag(config, world), open_log(trainer, shards)
        if not trainer.evaluated:
            evaluate(trainer, log, shards, questions)
        clock, stopping = Clock(trainer), False
        while trainer.step < config.max_steps and not stopping:
            rows, trainer.position = batches.at(trainer.position, batch_tokens(config, trainer.position))
            loss, norm = training_step(trainer, rows)
            if due(config.log_every, trainer):
                report(trainer, log, clock, rows, loss, norm)
            stopping = world.any(signals) and trainer.step < config.max_steps
            clock.pause()
            if not stopping:  # else it is made up for on resuming
                evaluate(trainer, log, shards, questions)
            last = stopping or trainer.step == config.max_steps
            if last or due(config.save_every, trainer) or due(config.milestone_every, trainer):
                save(trainer, log, shards, last)
            clock.go_on()
        log.close()
        world.wait()  # for the leader to save
        how = "stopped by a signal; continue with --resume" if stopping else "finished"
        world.print(f"{how}: {config.out_dir}/step_{trainer.step:06d}")


def main(argv: list[str] | None = None) -> None:
    config = parse_flags(TrainConfig, argv, __doc__)
    try:
        with naming_remedy("--batch_size"):
            train(config)
    except RuntimeError as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        if "RANK" in os.environ and re.search("timed out|timeout|connection|peer", reason, re.IGNORECASE):
            told = f"another process ended, or did not answer within --timeout {config.timeout} s"
            raise DataError(f"{told}: {reason}") from None
        raise


if __name__ == "__main__":
    run(main)
