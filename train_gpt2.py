"""Shards to checkpoints: train GPT-2.

python train_gpt2.py                                      (one device; on a CPU, a small model in minutes)

torchrun --standalone --nproc_per_node=8 train_gpt2.py    (the 124M reproduction on eight GPUs)

python train_gpt2.py --resume                             (continue after an interruption)
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fineweb
import hellaswag
import plot
import recipes
import sample
from common import checkpoint, monitor, script
from common.batches import Batch, Batches
from common.checkpoint import Snapshot, TrainingState
from common.device import device_name, explain_out_of_memory, keep_freed_memory, peak_flops
from common.files import claim
from common.huggingface import load_gpt, read_config, read_gpt
from common.log import Clock, Log, Tracker
from common.muon import Muon
from common.prefetch import prefetch
from common.processes import World, start_processes, stop_signals
from common.reference import Comparison
from common.script import DataError, UsageError
from common.sharding import gather, gather_gpt, wrap
from common.shards import SAMPLE_DATA, Shard, Shards, load_manifest, open_shards
from common.tokenizer import END_OF_TEXT, decode, encode
from model import GPT, PRESETS, GPTConfig
from recipes import TrainConfig, batch_tokens, learning_rate

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ATTENTION = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}

# ---- data ------------------------------------------------------------------------------------------------------------


def load_shards(config: TrainConfig, world: World) -> Shards:
    """Open the shards of --data_dir, once the sample's are built; raises DataError if they cannot be used."""
    directory = Path(config.data_dir)
    if directory == Path(SAMPLE_DATA) and world.is_main and not (load_manifest(directory) or {}).get("complete"):
        world.print(f"building {SAMPLE_DATA} from Python's documentation")
        fineweb.build(fineweb.FinewebConfig(sample=True, encoder="tiktoken", workers=1))
    world.barrier()  # until they are built
    shards = open_shards(directory)
    if not world.agree(repr(shards.identity)):
        raise DataError(f"--data_dir {directory} does not hold the same shards on every machine")
    if len(shards.val) <= config.block_size:
        raise UsageError(f"--data_dir {directory} has too few val tokens for one row: lower --block_size")
    if sum(map(len, shards.train)) <= config.total_batch_size:
        raise UsageError(f"--data_dir {directory} holds too few tokens for one batch: lower --total_batch_size")
    return shards


def read_batches(trainer: Trainer, shards: Shards) -> Iterator[Batch]:
    """This process's part of the batches to come; the next one is read by a thread while one is trained on."""
    config, state = trainer.config, trainer.state
    batches = Batches(shards.train, config.block_size, config.seed, config.shuffle)
    return prefetch(batches.read(state.position, config.batch_size, partial(batch_tokens, config), trainer.world), 1)


# ---- optimizer, training step ----------------------------------------------------------------------------------------


def make_optimizer(gpt: GPT, config: TrainConfig, world: World) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, 2019) with weight decay on matrices, none on biases and norms.

    With --optimizer muon, Muon updates the matrices of the blocks, and only these have weight decay.
    """
    defaults = {"lr": config.max_lr, "betas": (config.beta1, config.beta2), "eps": 1e-8, "fused": True}
    matrices = [p for p in gpt.parameters() if p.dim() >= 2]
    others = {"params": [p for p in gpt.parameters() if p.dim() < 2], "weight_decay": 0.0}
    if config.optimizer != "muon":
        return torch.optim.AdamW([{"params": matrices, "weight_decay": config.weight_decay}, others], **defaults)
    blocks = gpt.transformer.h
    embeddings = [gpt.transformer.wte.weight, gpt.transformer.wpe.weight]
    settings = {"lr": config.muon_lr, "weight_decay": config.weight_decay, "momentum": 0.95}
    groups = [
        {"params": embeddings, "weight_decay": 0.0},
        others,
        {"params": [block.attn.c_attn.weight for block in blocks], "parts": 3, **settings},  # query, key and value
        {"params": [block.attn.c_proj.weight for block in blocks], "parts": 1, **settings},
        {"params": [block.mlp.c_fc.weight for block in blocks], "parts": 1, **settings},
        {"params": [block.mlp.c_proj.weight for block in blocks], "parts": 1, **settings},
    ]
    return Muon(groups, world, **defaults)


@dataclass
class Trainer:
    """A run in memory. `state.gpt` owns the weights, and is saved, sampled and scored; `model` computes its loss."""

    config: TrainConfig
    world: World
    state: TrainingState
    model: nn.Module

    def autocast(self) -> torch.autocast:
        dtype = DTYPES[self.config.dtype]
        return torch.autocast(self.world.device.type, dtype, enabled=dtype != torch.float32)

    def set_gradient_sync(self, enabled: bool) -> None:
        """Whether the next backward pass adds up the gradients of all processes."""
        if hasattr(self.state.gpt, "set_requires_gradient_sync"):  # FSDP
            self.state.gpt.set_requires_gradient_sync(enabled)
        else:
            self.model.require_backward_grad_sync = enabled  # read by DDP in the forward pass


def make_trainer(config: TrainConfig, world: World, gpt: GPT) -> Trainer:
    """Put the network on the device, wrapped, and give it an optimizer."""
    if world.device.type == "cpu":
        keep_freed_memory()
    model = wrap(gpt, world, config.compile, config.shard, config.activation_checkpointing)
    optimizer = make_optimizer(gpt, config, world)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]  # the schedule scales each group's own
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(map(id, gpt.parameters())), "every parameter belongs in exactly one group"
    scaler = torch.amp.GradScaler(world.device.type, enabled=config.dtype == "float16")
    trainer = Trainer(config, world, TrainingState(gpt, optimizer, scaler), model)
    if world.size > 1:
        # DDP arranges its buckets after a first pass: else a resumed run's first step would add in another order
        rows = torch.zeros(1, config.batch_size, config.block_size + 1, dtype=torch.long, device=world.device)
        accumulate_gradients(trainer, rows)
        model.zero_grad(set_to_none=False)
    return trainer


def training_step(trainer: Trainer, micro_batches: Tensor) -> tuple[float, float]:
    """One optimizer step on this process's micro-batches (N, B, T + 1); returns the loss and the gradient's norm.

    Both are the whole batch's. Where one of them is not finite, all processes skip the update.
    """
    config, world, state = trainer.config, trainer.world, trainer.state
    factor = learning_rate(config, state.step) / config.max_lr
    for group in state.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    loss = accumulate_gradients(trainer, micro_batches.to(world.device))
    state.scaler.unscale_(state.optimizer)
    norm = nn.utils.clip_grad_norm_(state.gpt.parameters(), config.grad_clip or math.inf)
    # the norm is the same on all processes, but what is not finite on one must count on all
    sums = world.sum(torch.stack([loss, gather(norm, world.device)]))
    loss, norm = (sums / world.size).tolist()  # the only wait for the gradients
    if math.isfinite(loss) and math.isfinite(norm):
        state.skipped_in_a_row = 0
        state.optimizer.step()
    else:
        state.skipped += 1
        state.skipped_in_a_row += 1
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=world.size == 1)  # under DDP, gradients stay views of its buckets
    state.step += 1
    state.tokens += micro_batches[..., 1:].numel() * world.size
    return loss, norm


def accumulate_gradients(trainer: Trainer, micro_batches: Tensor) -> Tensor:
    """Leave the gradient of the mean loss of micro-batches (N, B, T + 1) in the parameters; returns that loss."""
    loss = torch.zeros((), device=trainer.world.device)
    for number, micro_batch in enumerate(micro_batches):
        trainer.set_gradient_sync(number == len(micro_batches) - 1)
        with trainer.autocast():
            mean = trainer.model(micro_batch[:, :-1], micro_batch[:, 1:])
        trainer.state.scaler.scale(mean / len(micro_batches)).backward()
        loss += mean.detach() / len(micro_batches)
    return loss


@contextlib.contextmanager
def attention_backend(config: TrainConfig, device: torch.device, masked: bool = False) -> Iterator[None]:
    """Enable --attention's backend alone, but for masks and single queries on a GPU those that may support them."""
    fallback = [SDPBackend.MATH] if masked and device.type == "cuda" else []
    if config.attention == "auto" and not fallback:
        yield
        return
    # cuDNN is not among them: it prepares a plan for each new shape, of which HellaSwag and samples have hundreds
    names = ["flash", "efficient"] if fallback and config.attention != "math" else [config.attention]
    # without a tag, torch's cache would take a model that was compiled for another backend
    cache_tag = torch.compiler.config.patch(cache_key_tag=f"attention {config.attention}")
    with cache_tag, sdpa_kernel([ATTENTION[name] for name in names] + fallback):
        q = torch.zeros(1, 1, 8, 64, dtype=DTYPES[config.dtype], device=device)  # (B, H, T, D)
        try:
            F.scaled_dot_product_attention(q, q, q, is_causal=True)
        except RuntimeError:
            raise UsageError(f"--attention {config.attention} is not supported on {device} in {config.dtype}") from None
        yield


# ---- evaluation ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def validation_loss(trainer: Trainer, val: Shard) -> dict[str, float]:
    """The mean loss over the first val_tokens of the val shard, for any micro-batch and number of processes alike."""
    config, world = trainer.config, trainer.world
    T, B = config.block_size, config.batch_size
    count = max(1, min(config.val_tokens, len(val) - 1) // T)
    tokens = torch.from_numpy(val.read(0, count * T + 1).astype(np.int64))
    rows = tokens.unfold(0, T + 1, T)[world.rank :: world.size]  # (N, T + 1), this rank's
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, math.ceil(count / world.size), B):  # as often on each rank, since all gather the weights
        batch = rows[start : start + B]
        missing = (0, 0, 0, B - len(batch))  # filled up, so that a compiled model sees one shape
        x = F.pad(batch[:, :-1], missing).to(world.device)  # (B, T)
        y = F.pad(batch[:, 1:], missing, value=-100).to(world.device)  # (B, T); -100 does not count
        with trainer.autocast():
            loss = trainer.model(x, y)
        total += float(loss) * len(batch) if len(batch) else 0.0
    return {"val_loss": float(world.sum(total)) / count}


def load_hellaswag(config: TrainConfig, world: World, shards: Shards) -> list[hellaswag.Question] | None:
    """This process's share of HellaSwag; prints a notice and returns None on all if a machine cannot have the file."""
    failed = False
    if config.hellaswag_every and world.local_rank == 0:
        try:
            hellaswag.download()
        except DataError as error:
            print(f"HellaSwag is skipped: {error}", flush=True)
            failed = True
    if world.any_rank(failed) or not config.hellaswag_every:
        return None
    return hellaswag.load(hellaswag.FILE, slice(world.rank, None, world.size))


def score_hellaswag(trainer: Trainer, questions: list[hellaswag.Question]) -> dict[str, float]:
    """The accuracies by their names, over the questions of all processes."""
    world, error = trainer.world, None
    gpt = gather_gpt(trainer.state.gpt, world.device)
    with trainer.autocast(), attention_backend(trainer.config, world.device, masked=True):
        try:
            correct = hellaswag.count_correct(gpt, questions, progress=world.is_main)
        except FloatingPointError as reason:
            error = reason
    if world.any_rank(error is not None):
        raise FloatingPointError(f"HellaSwag is skipped: {error or 'another process has no finite losses'}")
    count = int(world.sum(torch.tensor(len(questions))))
    return {f"hellaswag_{name}": v for name, v in hellaswag.accuracies(world.sum(correct), count).items()}


def write_samples(trainer: Trainer, prompt: str) -> dict[str, float]:
    """Print four texts by the model as it is now, sampled as one batch."""
    state, device = trainer.state, trainer.world.device
    gpt = gather_gpt(state.gpt, device if trainer.world.is_main else torch.device("meta"))
    if trainer.world.is_main:
        idx = torch.tensor([encode(prompt)] * 4, device=device)  # (B, T)
        generator = torch.Generator(device).manual_seed(trainer.config.seed)
        with trainer.autocast(), attention_backend(trainer.config, device, masked=True):  # cuDNN may refuse T = 1
            tokens = gpt.generate(idx, max_new_tokens=32, top_k=50, generator=generator)
        for row in tokens.tolist():
            text = decode(list(itertools.takewhile(lambda token: token != END_OF_TEXT, row)))
            trainer.world.print(f"step {state.step:5d} | {text!r}")
    return {}


def attention_logit(trainer: Trainer, val: Shard) -> dict[str, float]:
    """The largest attention logit on the val shard's first row."""
    gpt = gather_gpt(trainer.state.gpt, trainer.world.device)
    row = torch.from_numpy(val.read(0, trainer.config.block_size).astype(np.int64))[None]  # (1, T)
    with trainer.autocast():
        return {"attention_logit": monitor.largest_attention_logit(gpt, row.to(trainer.world.device))}


@dataclass(frozen=True)
class Evaluation:
    """Something that is evaluated now and then."""

    name: str  # in the summary of time; its numbers are named NAME_...
    every: str  # the setting that says how often
    load: Callable[[TrainConfig, World, Shards], Any]  # its data, on each rank; None to leave it out
    score: Callable[[Trainer, Any], dict[str, float]]  # numbers for the log, on all ranks alike


EVALUATIONS = (
    Evaluation("val", "eval_every", lambda config, world, shards: shards.val, validation_loss),
    Evaluation("hellaswag", "hellaswag_every", load_hellaswag, score_hellaswag),
    Evaluation("attention", "monitor_every", lambda config, world, shards: shards.val, attention_logit),
    Evaluation("samples", "sample_every", lambda config, world, shards: sample.PROMPT, write_samples),
)


def evaluate(trainer: Trainer, data: dict[str, Any], log: Log, last: bool) -> None:
    """Run what is due at this step; an evaluation that the model's state does not allow is skipped with a warning."""
    config, state = trainer.config, trainer.state
    for evaluation in EVALUATIONS:
        if data[evaluation.name] is None or not is_due(getattr(config, evaluation.every), state.step, last):
            continue
        try:
            with log.clock.measure(evaluation.name):
                scores = evaluation.score(trainer, data[evaluation.name])
        except FloatingPointError as error:
            trainer.world.print(f"warning: step {state.step}: {error}")
            continue
        assert all(name.startswith(f"{evaluation.name}_") for name in scores), "else resuming would log it twice"
        if scores:
            text = log.comparison.describe(state.step, scores)
            log.write(f"step {state.step:5d} | {text}", step=state.step, **scores)
            state.scores |= {name: [state.step, float(v)] for name, v in scores.items() if math.isfinite(v)}
    if is_due(config.eval_every, state.step, last):
        with log.clock.measure("picture"):
            log.attempt(plot.draw, Path(config.out_dir))


def is_due(every: int, step: int, last: bool = False) -> bool:
    """Whether periodic work falls on this step; it always does on the last."""
    return every > 0 and (last or step % every == 0)


# ---- starting, saving, resuming --------------------------------------------------------------------------------------


def complete_config(config: TrainConfig, world: World, directory: Path | None) -> tuple[TrainConfig, GPTConfig]:
    """The settings with all defaults filled in, and the network's sizes; raises UsageError if they do not fit."""
    script.check_settings(config)
    config = replace(config, model=config.model or recipes.default_model(world.device))
    source = directory or (config.init_from and checkpoint.locate(config.init_from))
    sizes = read_config(source) if source else PRESETS[config.model]
    config = recipes.fill_defaults(config, world.device, sizes)
    if directory:
        recipes.refuse_changes(checkpoint.read_record(directory)["config"], config)
    recipes.validate(config, sizes, world.size)
    for name, value in asdict(config).items():
        if name not in ("data_dir", "out_dir") and not world.agree(repr(value)):
            raise UsageError(f"--{name} is not the same on all machines, here {value}: give it on each")
    return config, sizes


def start_run(config: TrainConfig, world: World, sizes: GPTConfig) -> Trainer:
    """A new run, from random weights or those of --init_from."""
    torch.manual_seed(config.seed)
    if config.init_from:
        return make_trainer(config, world, load_gpt(checkpoint.locate(config.init_from), config.block_size))
    return make_trainer(config, world, GPT(replace(sizes, block_size=config.block_size)))


def resume_run(config: TrainConfig, world: World, directory: Path, shards: Shards) -> Trainer:
    """The run that a checkpoint holds; raises UsageError if its data or past learning rates differ."""
    record = checkpoint.read_record(directory)
    before = replace(config, max_steps=record["config"].get("max_steps", config.max_steps))
    last = max(record["step"] - 1, 0)  # if schedules differ at any completed step, they differ at the last one
    if learning_rate(before, last) != learning_rate(config, last):
        raise UsageError(f"--max_steps {config.max_steps} changes learning rates of steps done with {before.max_steps}")
    if record["data"] != shards.identity:
        raise UsageError(f"the shards in --data_dir {config.data_dir} are not those the run was begun with")
    world.print(f"resuming from {directory}")
    if record["versions"] != checkpoint.versions():
        versions = f"{record['versions']}, now {checkpoint.versions()}"
        world.print(f"warning: saved with {versions}: losses may differ by rounding")
    trainer = make_trainer(config, world, read_gpt(directory))
    checkpoint.restore(trainer.state, directory, record)
    return trainer


def open_log(trainer: Trainer, shards: Shards, clock: Clock, data: dict[str, Any]) -> Log:
    """The run's log, which begins with what this process group is."""
    config, world, step, out_dir = trainer.config, trainer.world, trainer.state.step, Path(trainer.config.out_dir)
    tracker = Tracker(config.tracker, out_dir, asdict(config))
    log = Log(out_dir, tracker, Comparison(config, shards), clock, enabled=world.is_main)
    redo = [f"{e.name}_" for e in EVALUATIONS if data[e.name] is not None and is_due(getattr(config, e.every), step)]
    log.start(step, redo, processes=world.size, unigram_loss=shards.unigram_loss, reference=log.comparison.applies)
    return log


def save(trainer: Trainer, log: Log, shards: Shards, last: bool) -> None:
    """Save a checkpoint, which the main process writes."""
    with log.clock.measure("saving"):
        snapshot = checkpoint.take_snapshot(trainer.state, trainer.world)
        trainer.world.on_main(lambda: write_checkpoint(trainer, snapshot, log, shards, last))


def write_checkpoint(trainer: Trainer, snapshot: Snapshot, log: Log, shards: Shards, last: bool) -> None:
    """Write a checkpoint; a failed write ends the run only if no later save will follow."""
    config, state, out_dir = trainer.config, trainer.state, Path(trainer.config.out_dir)
    log.flush()
    record = {"config": asdict(config), "data": shards.identity}
    source = shards.source or {"shards": config.data_dir}
    card = checkpoint.model_card(state, config.init_from, config.max_steps, source)
    try:
        checkpoint.save_checkpoint(out_dir, snapshot, record, card)
    except OSError as error:
        if last:
            raise DataError(f"step {state.step} could not be saved: {error}; make room, and add --resume") from None
        print(f"warning: step {state.step} could not be saved: {error}; training continues", flush=True)
    if not state.skipped_in_a_row:  # a run that diverges must not cost the checkpoints from before
        checkpoint.prune(out_dir, config.keep, config.milestone_every)


# ---- the loop --------------------------------------------------------------------------------------------------------


def print_summary(trainer: Trainer, shards: Shards) -> None:
    """Print what the run is about to do."""
    config, world, gpt = trainer.config, trainer.world, trainer.state.gpt
    steps = config.total_batch_size // (config.batch_size * config.block_size * world.size)
    ramp = f", from {config.initial_batch_size:,} at first" if config.batch_ramp_tokens else ""
    unigram = "n/a" if shards.unigram_loss is None else f"{shards.unigram_loss:.4f}"
    world.print(
        f"model {config.init_from or config.model} on {world.size} x {device_name(world.device)}, "
        f"{config.dtype}, compile {config.compile} (choose with --model or --init_from, --device, --dtype, --compile)\n"
        f"data {config.data_dir} (choose with --data_dir): {sum(map(len, shards.train)):,} train tokens, "
        f"{len(shards.val):,} val tokens, unigram loss {unigram}\n"
        f"batch of {config.total_batch_size:,} tokens{ramp}: {steps} accumulation steps of "
        f"batch_size {config.batch_size} x block_size {config.block_size} x {world.size} process(es)"
    )
    for group in trainer.state.optimizer.param_groups:
        sizes = [parameter.numel() for parameter in group["params"]]
        rates = f"learning rate {group['initial_lr']:g}, weight decay {group.get('weight_decay', 0.0)}"
        world.print(f"{rates}: {len(sizes)} tensors, {sum(sizes):,} parameters")
    if not config.init_from:
        world.print(f"expected first loss: ln({gpt.config.vocab_size}) = {math.log(gpt.config.vocab_size):.4f}")


def log_step(
    trainer: Trainer, log: Log, batch: Batch, loss: float, norm: float, seconds: float, **update: float
) -> None:
    config, state = trainer.config, trainer.state
    tokens = batch.micro_batches[..., 1:].numel() * trainer.world.size
    rate, peak = tokens / seconds, peak_flops(trainer.world.device)
    mfu = rate * state.gpt.flops_per_token() / (peak * trainer.world.size) if peak else None
    lr = state.optimizer.param_groups[0]["lr"]
    hours_left = seconds * (config.max_steps - state.step) / 3600
    log.write(
        f"step {state.step:5d}/{config.max_steps} | loss {loss:.4f} | lr {lr:.2e} | norm {norm:.3f} | "
        f"{1000 * seconds:.0f} ms | {rate:,.0f} tokens/s | MFU {'n/a' if mfu is None else f'{mfu:.1%}'} | "
        f"{hours_left:.2f} h left" + (f" | {state.skipped} skipped" if state.skipped else ""),
        step=state.step,
        loss=loss,
        lr=lr,
        norm=norm,
        tokens=tokens,
        skipped=state.skipped,
        position=state.position,
        batch=batch.digest,
        ms=1000 * seconds,
        tokens_per_second=rate,
        mfu=mfu,
        **update,
    )
    if math.isfinite(loss):
        state.scores["training loss"] = [state.step, loss]


def take_step(trainer: Trainer, log: Log, batches: Iterator[Batch]) -> None:
    """Train on the next batch, and log it, with how much it changed the weights where that is due."""
    config, state = trainer.config, trainer.state
    last = state.step + 1 == config.max_steps
    monitored = is_due(config.monitor_every, state.step + 1, last)
    before = monitor.copy_matrices(state.gpt) if monitored else {}
    began = time.perf_counter()
    batch = next(batches)
    state.position = batch.next_position
    loss, norm = training_step(trainer, batch.micro_batches)
    seconds = time.perf_counter() - began
    update = {"update": monitor.largest_update(state.gpt, before, trainer.world.device)} if monitored else {}
    if monitored or is_due(config.log_every, state.step, last):
        log_step(trainer, log, batch, loss, norm, seconds, **update)


def stop_if_diverged(trainer: Trainer) -> None:
    """Raise DataError, naming the last good checkpoint, where too many steps in a row were skipped."""
    config, state = trainer.config, trainer.state
    if state.skipped_in_a_row > config.max_skipped:
        good = state.step - state.skipped_in_a_row
        saved = checkpoint.checkpoints(Path(config.out_dir))
        newest = next((path for step, path in saved.items() if step <= good), "none")
        raise DataError(
            f"step {state.step}: {state.skipped_in_a_row} steps in a row had no finite loss and gradient, and were "
            f"skipped (--max_skipped {config.max_skipped}); the last good checkpoint is {newest}; "
            f"if neither the data nor --max_lr is to blame, try another --attention than {config.attention}"
        )


def train(config: TrainConfig) -> None:
    """Train until max_steps, or until a signal; every process of the world calls this.

    Raises UsageError for settings that do not fit, DataError for shards or checkpoints that cannot be used.
    """
    clock = Clock()
    with (
        start_processes(config.device, config.timeout) as world,
        stop_signals() as signals,
        contextlib.ExitStack() as stack,
    ):
        if world.is_main:
            stack.enter_context(claim(Path(config.out_dir)))
        directory = checkpoint.find_checkpoint(Path(config.out_dir), config.resume, world)
        config, sizes = complete_config(config, world, directory)
        shards = load_shards(config, world)
        stack.enter_context(attention_backend(config, world.device))
        trainer = resume_run(config, world, directory, shards) if directory else start_run(config, world, sizes)
        state, first_step = trainer.state, trainer.state.step
        print_summary(trainer, shards)
        if first_step >= config.max_steps:
            world.print(f"the run in {config.out_dir} is finished: {first_step} of {config.max_steps} steps")
            return
        data = {evaluation.name: evaluation.load(config, world, shards) for evaluation in EVALUATIONS}
        batches = stack.enter_context(contextlib.closing(read_batches(trainer, shards)))
        log = open_log(trainer, shards, clock, data)
        while True:
            finished = state.step >= config.max_steps
            stopping = world.any_rank(signals) and not finished
            if not stopping:  # a run that is stopped makes up for it on resuming
                evaluate(trainer, data, log, finished)
            due = is_due(config.save_every, state.step) or is_due(config.milestone_every, state.step)
            if state.step > first_step and (finished or stopping or due):
                save(trainer, log, shards, last=finished or stopping)
            if finished or stopping:
                break
            with clock.measure("steps"):
                take_step(trainer, log, batches)
            stop_if_diverged(trainer)
        log.write_seconds(state.step, finished)
        log.close(finished)
        world.barrier()  # for the main process to save
        how = f"finished: {config.out_dir}/step_{state.step:06d}"
        world.print(how if finished else f"stopped by a signal; continue with --resume: step {state.step}")


def main(argv: list[str] | None = None) -> None:
    with explain_out_of_memory("--batch_size"):
        train(recipes.parse_config(argv, __doc__))


if __name__ == "__main__":
    script.run(main, spare_output=True)
