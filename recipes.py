"""What a training run does: its settings, and their values for each size of the network."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch

from common import checkpoint, script
from common.device import can_compile, choose_device, has_bfloat16
from common.huggingface import read_config
from common.script import DataError, Positive, UsageError, Value
from common.shards import FULL_DATA, SAMPLE_DATA, load_manifest
from common.tokenizer import N_TOKENS
from model import PRESETS, GPTConfig

Size = Literal["debug", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]
AttentionBackend = Literal["auto", "flash", "cudnn", "efficient", "math"]
Optimizer = Literal["adamw", "muon"]
MustMatch = Annotated[Value, "must match on resume"]  # a setting that alters a run's results beyond rounding


@dataclass(frozen=True)
class TrainConfig:
    """What a run does. The defaults are the 124M reproduction's; below are those of each size.

    By the arithmetic in benchmarks/README.md, what is not a step takes less than 5% of the time on eight H100.
    """

    model: MustMatch[Size | None] = None  # size; None: gpt2 on a CUDA device, else debug
    init_from: MustMatch[str | None] = None  # checkpoint, run or Hub model to start from; None: random weights
    data_dir: str | None = None  # shards; None: edu_fineweb10B, or for debug, without it, sample_shards
    out_dir: str = "log"  # directory of the checkpoints, log.jsonl and loss.png
    resume: bool = False  # continue from the newest checkpoint in out_dir, if there is one

    batch_size: Positive[int] = 32  # sequences in a micro-batch; lower it if memory runs out
    block_size: MustMatch[Positive[int | None]] = None  # tokens in a sequence; None: as many as the model has positions
    total_batch_size: MustMatch[Positive[int]] = 2**19  # tokens in an optimizer step
    initial_batch_size: MustMatch[Positive[int | None]] = None  # tokens in a step at the ramp's start; None: no ramp
    batch_ramp_tokens: MustMatch[int] = 0  # tokens over which the batch grows to total_batch_size; 0: no ramp
    shuffle: MustMatch[bool] = False  # visit the rows in random order in the first epoch too
    seed: MustMatch[int] = 1337  # seed of the initial weights and the order of the rows

    max_steps: Positive[int] = 19_073  # optimizer steps of the whole run
    optimizer: MustMatch[Optimizer | None] = None  # muon is for the blocks' matrices; the default for a new debug alone
    schedule: MustMatch[Literal["cosine", "linear"]] = "cosine"  # decay of the learning rate after warm-up
    decay_fraction: MustMatch[float] = 0.75  # share of the run, at its end, over which the linear schedule decays
    warmup_steps: MustMatch[int] = 715  # optimizer steps of linear warm-up
    max_lr: MustMatch[float] = 6e-4  # learning rate after warm-up; with Muon, of all but the blocks' matrices
    min_lr: MustMatch[float | None] = None  # learning rate at the end; None: 0 if linear, else a tenth of max_lr
    muon_lr: MustMatch[float] = 0.02  # Muon's learning rate after warm-up; scheduled in proportion to max_lr
    beta1: MustMatch[float] = 0.9  # AdamW's decay of the first moment
    beta2: MustMatch[float] = 0.95  # AdamW's decay of the second moment
    weight_decay: MustMatch[float] = 0.1  # of matrices, with Muon of the blocks' alone; biases and norms have none
    grad_clip: MustMatch[float] = 1.0  # largest norm of the gradient; 0: no clipping

    eval_every: int = 500  # optimizer steps between validations (and before the first, and at the end); 0: none
    val_tokens: Positive[int] = 20 * 2**19  # tokens of the val shard to validate on, at most
    hellaswag_every: int = 1000  # optimizer steps between HellaSwag scores; 0: none
    sample_every: int = 2000  # optimizer steps between samples of text; 0: none
    monitor_every: int = 0  # steps between records of the largest attention logit and update of a matrix; 0: none
    save_every: int = 1000  # optimizer steps between checkpoints; 0: at the end only
    keep: Positive[int] = 2  # newest checkpoints to keep
    milestone_every: int = 0  # optimizer steps between checkpoints that are kept for good; 0: none
    log_every: Positive[int] = 1  # optimizer steps between lines of the log
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"  # where else to log
    max_skipped: int = 10  # skipped steps in a row, without a finite loss and gradient, to tolerate
    timeout: Positive[int] = 600  # seconds that a process waits for the others

    device: str = "auto"  # auto, cpu, mps, cuda or cuda:N
    dtype: Dtype = "auto"  # of autocast; auto: bfloat16, or without it float16 on CUDA, else float32
    attention: AttentionBackend = "auto"  # training's backend of scaled_dot_product_attention; auto: torch's own choice
    shard: bool = False  # divide weights, gradients and moments among the processes (FSDP), which saves memory
    activation_checkpointing: bool = False  # keep only each block's input and recompute the rest: saves more memory
    compile: bool | None = None  # compile the model; None: on a CUDA device where that works


# From gpt2 on: total batches and learning rates are GPT-3's for these sizes (Brown et al., 2020, table 2.1), the
# warm-up its 375 million tokens, the length about one pass over 10 billion. For gpt2, 6e-4 is build-nanogpt's: 3.072 at
# the end on FineWeb-Edu (five runs by others)
RECIPES = {
    "debug": TrainConfig(
        model="debug",
        optimizer="adamw",
        batch_size=4,
        total_batch_size=2048,
        max_steps=120,
        warmup_steps=12,
        max_lr=3e-3,
        eval_every=30,
        val_tokens=2**15,
        hellaswag_every=0,
        sample_every=60,
        save_every=30,
    ),
    "gpt2": TrainConfig(model="gpt2", optimizer="adamw"),
    "gpt2-medium": TrainConfig(model="gpt2-medium", optimizer="adamw", batch_size=16, max_lr=3e-4),
    "gpt2-large": TrainConfig(model="gpt2-large", optimizer="adamw", batch_size=8, max_lr=2.5e-4),
    "gpt2-xl": TrainConfig(
        model="gpt2-xl",
        optimizer="adamw",
        batch_size=4,
        total_batch_size=2**20,
        max_steps=9_536,
        warmup_steps=357,
        max_lr=2e-4,
    ),
}

# gpt2 with --max_lr 1.2e-3: 3.045 at the end, on the same model and data (one run by others; 3.044 with 2e-3)
TUNED_GPT2 = replace(RECIPES["gpt2"], max_lr=1.2e-3)

# With Muon. debug: the best of what was tried and takes less than two minutes on two cores. gpt2: never run as it
# stands; 3.6e-3 is modded-nanogpt's of 2024-10-10, whose GPT-2 124M with rotary positions needed 3.25 billion tokens
# for the loss that a tuned AdamW with learned positions reached after 6.44 billion; muon_lr is Jordan's; the weight
# decay, the warm-up, a constant momentum, and one rate for embeddings, biases and norms are this program's choice. The
# runs of 256 steps in benchmarks/README.md prefer 7 times this max_lr and twice muon_lr, which says little about 7,500.
# Of the larger sizes nothing is known
MUON = {"optimizer": "muon", "schedule": "linear", "max_lr": 3.6e-3, "weight_decay": 0.05, "warmup_steps": 250}
MUON_RECIPES = {size: replace(recipe, **MUON) for size, recipe in RECIPES.items()} | {
    "debug": replace(
        replace(RECIPES["debug"], **MUON),
        shuffle=True,
        max_steps=150,
        warmup_steps=12,
        max_lr=1e-2,
        beta2=0.99,
        eval_every=50,
        sample_every=75,
        save_every=50,
    ),
    "gpt2": replace(RECIPES["gpt2"], **MUON, max_steps=7_500),
}

MUST_MATCH = script.marked_fields(TrainConfig, "must match on resume")


def parse_config(argv: list[str] | None, description: str | None) -> TrainConfig:
    """The command line's settings; their defaults depend on the size, and on the run that is resumed.

    Raises UsageError for what differs from its default, but would have no effect.
    """
    default = default_config(script.parse_known_flags(TrainConfig, argv))
    config = script.parse_flags(TrainConfig, argv, description, default)
    for name, setting, needed in (("muon_lr", "optimizer", "muon"), ("decay_fraction", "schedule", "linear")):
        if getattr(config, name) != getattr(default, name) and getattr(config, setting) != needed:
            raise UsageError(f"--{name} has no effect without --{setting} {needed}")
    return config


def default_config(flags: TrainConfig) -> TrainConfig:
    """The recipe of the size that is asked for, or of the run that is resumed with what must match on resuming."""
    saved = checkpoint.saved_settings(Path(flags.out_dir)) if flags.resume else {}
    if isinstance(saved.get("model"), str) and saved["model"] in RECIPES:
        names = [name for name in [*MUST_MATCH, "max_steps", "data_dir", "keep", "milestone_every"] if name in saved]
        begun = recipe(saved["model"], saved.get("optimizer", "adamw"))
        settings = replace(begun, **{name: saved[name] for name in names})
        script.check_settings(settings)  # a trainer.json that was altered may hold any
        return settings
    if flags.init_from and flags.model:
        raise UsageError(f"--init_from {flags.init_from} brings its own size: leave out --model {flags.model}")
    if flags.init_from:
        sizes = read_config(checkpoint.locate(flags.init_from))
        as_large = (name for name, p in PRESETS.items() if p.n_layer >= sizes.n_layer and p.n_embd >= sizes.n_embd)
        whole = recipe(next(as_large, "gpt2-xl"), flags.optimizer or "adamw")
        return replace(whole, max_lr=whole.max_lr / 10, muon_lr=whole.muon_lr / 10)  # the weights are good already
    return recipe(flags.model or default_model(choose_device(flags.device)), flags.optimizer)


def recipe(model: str, optimizer: str | None) -> TrainConfig:
    """A size's settings with an optimizer, which for debug is Muon if it is left open."""
    if optimizer is None:
        optimizer = "muon" if model == "debug" else "adamw"
    return (MUON_RECIPES if optimizer == "muon" else RECIPES)[model]


def default_model(device: torch.device) -> str:
    return "gpt2" if device.type == "cuda" else "debug"


def fill_defaults(config: TrainConfig, device: torch.device, sizes: GPTConfig) -> TrainConfig:
    """Fill in what depends on the device and the network's sizes."""
    dtype = auto_dtype(device) if config.dtype == "auto" else config.dtype
    defaults = {
        "data_dir": None if config.data_dir else default_data_dir(config.model),
        "block_size": sizes.block_size,
        "initial_batch_size": config.total_batch_size,
        "optimizer": "adamw",  # a recipe has its own
        "min_lr": 0.0 if config.schedule == "linear" else 0.1 * config.max_lr,
        "compile": can_compile(device),
    }
    return replace(config, dtype=dtype, **{name: v for name, v in defaults.items() if getattr(config, name) is None})


def auto_dtype(device: torch.device) -> str:
    """The fastest type that the device computes without emulation."""
    if has_bfloat16(device):
        return "bfloat16"
    return "float16" if device.type == "cuda" else "float32"


def default_data_dir(model: str) -> str:
    """The full data, but for the debug model where there is none the sample."""
    manifest = load_manifest(Path(FULL_DATA)) or {"complete": any(Path(FULL_DATA).glob("*.npy"))}
    return FULL_DATA if model != "debug" or manifest["complete"] else SAMPLE_DATA


def validate(config: TrainConfig, sizes: GPTConfig, processes: int) -> None:
    """Raise UsageError for settings that do not fit together, DataError for a checkpoint that does not fit them."""
    preset = PRESETS[config.model]
    if not config.init_from and (sizes.n_layer, sizes.n_head) != (preset.n_layer, preset.n_head):
        # of a checkpoint that was changed with its hashes; the weights' shapes do not show n_head
        raise DataError(f"the checkpoint's config.json does not have the sizes of --model {config.model}")
    if sizes.vocab_size < N_TOKENS:
        raise UsageError(f"--init_from {config.init_from} has {sizes.vocab_size} tokens, fewer than GPT-2's {N_TOKENS}")
    if config.block_size > sizes.block_size:
        raise UsageError(f"--block_size {config.block_size} is beyond the model's: at most {sizes.block_size}")
    micro = config.batch_size * config.block_size * processes
    for name in ("total_batch_size", "initial_batch_size"):
        if getattr(config, name) % micro:
            factors = f"--batch_size {config.batch_size} x --block_size {config.block_size} x {processes} process(es)"
            change = "lower --batch_size" if getattr(config, name) < micro else f"change --batch_size or --{name}"
            raise UsageError(f"--{name} {getattr(config, name)} is not a multiple of {factors} = {micro}: {change}")
    if config.initial_batch_size > config.total_batch_size:
        raise UsageError(f"--initial_batch_size {config.initial_batch_size} is more than --total_batch_size")
    if (config.initial_batch_size < config.total_batch_size) != (config.batch_ramp_tokens > 0):
        raise UsageError("--initial_batch_size and --batch_ramp_tokens make the ramp together: give both or neither")
    if max(config.beta1, config.beta2) >= 1:
        raise UsageError(f"--beta1 {config.beta1} and --beta2 {config.beta2} must be below 1")
    if config.decay_fraction > 1:
        raise UsageError(f"--decay_fraction {config.decay_fraction} is a share of the run: at most 1")
    if not config.max_lr:
        raise UsageError("--max_lr 0 must be above 0: all learning rates are scheduled in proportion to it")
    if config.min_lr > config.max_lr:
        raise UsageError(f"--min_lr {config.min_lr} is more than --max_lr {config.max_lr}")
    if config.tracker != "none" and importlib.util.find_spec(config.tracker) is None:
        raise UsageError(f"--tracker {config.tracker} is not installed: pip install {config.tracker}")


def refuse_changes(saved: dict, config: TrainConfig) -> None:
    """Raise UsageError if a run that was saved with other settings would not be the same if it were resumed."""
    for name in MUST_MATCH:
        if getattr(config, name) != saved.get(name, getattr(config, name)):
            begun = f"the run in --out_dir {config.out_dir} was begun with {saved[name]}"
            raise UsageError(f"--{name} {getattr(config, name)}, but {begun}")


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of the step that follows `step` steps: linear warm-up to max_lr, later a decay to min_lr at max_steps.

    The decay is a cosine over all that follows the warm-up, or linear over the last decay_fraction of the run.
    """
    if step < config.warmup_steps:
        return config.max_lr * (step + 1) / config.warmup_steps
    decay_steps = config.max_steps - config.warmup_steps
    if config.schedule == "linear":
        decay_steps = min(decay_steps, config.decay_fraction * config.max_steps)
    left = min(max(config.max_steps - step, 0) / max(1, decay_steps), 1.0)
    above_min = left if config.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left))
    return config.min_lr + (config.max_lr - config.min_lr) * above_min


def batch_tokens(config: TrainConfig, position: int) -> int:
    """Tokens of the optimizer step at a position: GPT-3's linear ramp, in whole multiples of initial_batch_size.

    With that unit the ramp is the same for any micro-batch and number of processes.
    """
    if position >= config.batch_ramp_tokens:
        return config.total_batch_size
    grown = (config.total_batch_size - config.initial_batch_size) * position // config.batch_ramp_tokens
    return config.initial_batch_size + grown // config.initial_batch_size * config.initial_batch_size
