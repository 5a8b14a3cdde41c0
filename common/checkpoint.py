"""Checkpoints: what a run saves and resumes, and how a damaged one is passed over.

A checkpoint is a directory, `step_001000`: a model that Hugging Face's tools load, and beside it what resuming needs.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from common.files import MANIFEST, changed_files, flush, read_json, sha256, write_json
from common.huggingface import gpt2_shapes, load_tensors, save_gpt, save_tensors
from common.processes import World
from common.script import DataError, UsageError
from common.sharding import divide_like, gather, gather_gpt
from common.tokenizer import save_tokenizer

NEEDED = ("config.json", "model.safetensors", "optimizer.safetensors", "trainer.json")  # to resume


@dataclass
class TrainingState:
    """What a run changes as it goes, all of which a checkpoint holds."""

    gpt: nn.Module  # model.py's GPT
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0  # optimizer steps taken, those that were skipped among them
    tokens: int = 0  # trained on
    position: int = 0  # in the data
    skipped: int = 0  # steps whose loss or gradient was not finite
    skipped_in_a_row: int = 0
    scores: dict[str, list] = field(default_factory=dict)  # the latest of each: its step, its value


def checkpoints(out_dir: Path) -> dict[int, Path]:
    """The checkpoints of a run by their step, the newest first."""
    paths = [path for path in out_dir.glob("step_*") if re.fullmatch("step_[0-9]{6,18}", path.name) and path.is_dir()]
    return dict(sorted(((int(path.name[5:]), path) for path in paths), reverse=True))


def locate(source: str) -> str:
    """The checkpoint that a --checkpoint or --init_from means: of a run's directory, the newest."""
    if source == "log" and not Path(source).exists():  # the default, and no model's name on the Hub
        raise DataError("there is no run in log: train one with train_gpt2.py, or choose another")
    return str(next(iter(checkpoints(Path(source)).values()), source))


# ---- saving ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds of a run's state, whole on the main process."""

    gpt: nn.Module
    tensors: dict[str, Tensor]  # the optimizer's and the random generators'
    record: dict  # for trainer.json


def take_snapshot(state: TrainingState, world: World) -> Snapshot:
    """The state to save, which all processes gather; what was divided among them is on the main one's CPU."""
    destination = torch.device("cpu" if world.is_main else "meta")
    gpt = gather_gpt(state.gpt, destination)  # first: it leaves in the network the parameters that the optimizer has
    optimizer = {name: gather(value, destination) for name, value in optimizer_state(state).items()}
    tensors = {name: value.contiguous() for name, value in optimizer.items() if isinstance(value, Tensor)}
    tensors["random.cpu"] = torch.get_rng_state()
    if world.device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(world.device)
    record = {
        "step": state.step,
        "tokens": state.tokens,
        "position": state.position,
        "scores": state.scores,
        "skipped": [state.skipped, state.skipped_in_a_row],
        "scaler": state.scaler.state_dict(),
        "optimizer": {name: value for name, value in optimizer.items() if name not in tensors},
        "param_groups": state.optimizer.state_dict()["param_groups"],
        "versions": versions(),
    }
    return Snapshot(gpt, tensors, record)


def save_checkpoint(out_dir: Path, snapshot: Snapshot, record: dict, card: str) -> None:
    """Write a checkpoint, complete or absent, with `record` in its trainer.json; raises OSError if the disk is full."""
    temporary = out_dir / ".checkpoint.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        save_gpt(snapshot.gpt, temporary)
        save_tokenizer(temporary, snapshot.gpt.config.block_size)
        (temporary / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")  # names of files
        save_tensors(snapshot.tensors, temporary / "optimizer.safetensors")
        write_json(temporary / "trainer.json", record | snapshot.record)
        write_json(temporary / MANIFEST, {path.name: sha256(path) for path in sorted(temporary.iterdir())})
        for path in temporary.iterdir():
            flush(path)
        flush(temporary)
        os.replace(temporary, out_dir / f"step_{snapshot.record['step']:06d}")
        flush(out_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def optimizer_state(state: TrainingState) -> dict[str, Tensor | float]:
    """The optimizer's tensors and numbers, each as KEY.PARAMETER; whatever keys an optimizer has."""
    values = {}
    names = parameter_names(state)
    for index, entries in state.optimizer.state_dict()["state"].items():
        for key, value in entries.items():
            assert "." not in key and isinstance(value, Tensor | int | float), f"{key} cannot be saved"
            values[f"{key}.{names[index]}"] = value
    return values


def parameter_names(state: TrainingState) -> list[str]:
    """The names of the optimizer's parameters, in the order in which its state_dict numbers them."""
    names = {id(parameter): name for name, parameter in state.gpt.named_parameters()}
    return [names[id(parameter)] for group in state.optimizer.param_groups for parameter in group["params"]]


def prune(out_dir: Path, keep: int, milestone_every: int) -> None:
    """Remove all but the newest `keep` checkpoints and those at multiples of `milestone_every`."""
    for step, directory in list(checkpoints(out_dir).items())[keep:]:
        if not (milestone_every and step % milestone_every == 0):
            with contextlib.suppress(OSError):  # renamed first: a kill must not leave a part of a checkpoint
                os.replace(directory, out_dir / f".{directory.name}.removed")
    for removed in out_dir.glob(".step_*.removed"):
        shutil.rmtree(removed, ignore_errors=True)


def versions() -> dict[str, str]:
    return {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()}


MODEL_CARD = Path(__file__).with_name("model_card.md").read_text(encoding="utf-8")  # now: a later one may not fit


def model_card(state: TrainingState, init_from: str | None, max_steps: int, source: dict) -> str:
    """README.md as the Hugging Face Hub shows it: how the model was made, how good it is, how to load it."""
    return MODEL_CARD.format(
        **asdict(state.gpt.config),
        datasets=f"datasets: {json.dumps([source['dataset']])}\n" if "dataset" in source else "",
        parameters=sum(map(math.prod, gpt2_shapes(state.gpt.config).values())),
        init_from=init_from or "random weights",
        step=state.step,
        max_steps=max_steps,
        tokens=state.tokens,
        source="\n".join(f"- {key}: {source_entry(value)}" for key, value in source.items()),
        scores="\n".join(f"| {name} | {step} | {value:.4f} |" for name, (step, value) in state.scores.items()),
    )


def source_entry(value: str | list[list[str]]) -> str:
    """What the model card says of a source: a text, or the names of files, which have their hashes beside them."""
    return value if isinstance(value, str) else ", ".join(name for name, _ in value)


# ---- resuming --------------------------------------------------------------------------------------------------------


def newest_checkpoint(out_dir: Path, names: Sequence[str] = NEEDED) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint in which the files of these names are whole, and what is wrong with newer ones."""
    errors = {}
    for directory in checkpoints(out_dir).values():
        try:
            changed = changed_files(directory, names)
            if not changed:
                return directory, errors
            errors[directory] = f"{', '.join(changed)} changed since it was written"
        except (DataError, OSError) as error:  # of a damaged manifest, or a disk that cannot be read
            errors[directory] = str(error)
    return None, errors


def find_checkpoint(out_dir: Path, resume: bool, world: World) -> Path | None:
    """The checkpoint to resume from, the same on all ranks, or None to begin; sets newer, damaged ones aside.

    Raises UsageError if a run would be overwritten, or not all processes resume; DataError if all checkpoints are
    damaged, or not all processes see the one that the main process chose.
    """
    if not world.agree(repr(resume)):
        raise UsageError("--resume is not given on all machines: give it on each, or on none")
    if world.is_main and not resume and (checkpoints(out_dir) or (out_dir / "log.jsonl").exists()):
        raise UsageError(f"--out_dir {out_dir} holds a run: continue it with --resume, or choose another directory")
    newest, errors = (world.on_main(lambda: newest_checkpoint(out_dir)) if resume else None) or (None, {})
    if errors and newest is None:
        raise DataError(f"no checkpoint in --out_dir {out_dir} is whole: choose another directory to start anew")
    for directory, error in errors.items():
        print(f"passing over the checkpoint {directory}: {error}", flush=True)
        damaged = directory.with_name(f"{directory.name}.damaged")  # no longer resumed from, or counted among `keep`
        shutil.rmtree(damaged, ignore_errors=True)
        os.replace(directory, damaged)
    step = world.broadcast(int(newest.name[5:]) if newest else -1)
    directory = out_dir / f"step_{step:06d}" if step >= 0 else None
    if world.any_rank(directory and not directory.is_dir()):
        raise DataError(f"--out_dir {out_dir} must be on a disk that all machines share: not all see {directory}")
    if world.any_rank(resume and step < 0 and checkpoints(out_dir)):
        raise DataError(f"--out_dir {out_dir} must be on a disk that all machines share: the main process sees no run")
    return directory


def saved_settings(out_dir: Path) -> dict:
    """The settings in the newest checkpoint whose trainer.json is unchanged, if there is one; raises DataError."""
    newest, _ = newest_checkpoint(out_dir, ["trainer.json"])
    return read_record(newest)["config"] if newest else {}


def read_record(directory: Path) -> dict:
    """The content of trainer.json; raises DataError if a run at this step cannot have saved it."""
    record = read_json(directory / "trainer.json")
    try:
        require_types(record, {"skipped": [], "scores": {}, "scaler": {}, "config": {}, "data": [], "versions": {}})
        for score in record["scores"].values():
            require_types(score, [0, 0.0])
        skipped, skipped_in_a_row = record["skipped"][:2]
        counts = [skipped_in_a_row, skipped, record["step"], record["tokens"], record["position"]]
        require_types(counts, [0] * 5)
        growing = [0, *counts, 2 * record["tokens"], 2**63]  # an epoch's end passes over less than it trains on
        if record["step"] != int(directory.name[5:]) or growing != sorted(growing):
            raise ValueError("its step, skipped, tokens and position cannot be")
    except (LookupError, TypeError, ValueError) as error:
        raise DataError(f"{directory / 'trainer.json'} is not a run's record: {error!r}") from None
    return record


def require_types(content: object, example: object) -> None:
    """Raise TypeError or LookupError unless JSON has the types, keys and items of an example; it may have more."""
    if isinstance(example, tuple):
        example = list(example)
    if type(content) is not type(example):
        raise TypeError(f"{content!r:.40} is not like {example!r:.40}")
    if isinstance(example, dict | list):
        for key in example if isinstance(example, dict) else range(len(example)):
            require_types(content[key], example[key])


def restore(state: TrainingState, directory: Path, record: dict) -> None:
    """Put back what a checkpoint holds, but for the model's weights; raises DataError if it does not fit."""
    tensors = load_tensors(directory / "optimizer.safetensors")
    device = state.gpt.lm_head.weight.device
    try:
        torch.set_rng_state(tensors.pop("random.cpu"))
        cuda = tensors.pop("random.cuda", None)
        if cuda is not None and device.type == "cuda":
            torch.cuda.set_rng_state(cuda, device)
        restore_optimizer(state, tensors | record.get("optimizer", {}), record.get("param_groups"))
        if state.scaler.is_enabled() and record["scaler"]:
            require_types(record["scaler"], state.scaler.state_dict())
            state.scaler.load_state_dict(record["scaler"])
    except torch.OutOfMemoryError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise DataError(f"{directory} does not fit this run: {error!r}") from None
    state.step, state.tokens, state.position = record["step"], record["tokens"], record["position"]
    state.skipped, state.skipped_in_a_row = record["skipped"][:2]
    state.scores = record["scores"]


def restore_optimizer(state: TrainingState, values: dict[str, Tensor | float], groups: list[dict] | None) -> None:
    """Give the optimizer the state that `optimizer_state` has taken from one; old checkpoints have no groups."""
    parameters = dict(state.gpt.named_parameters())
    indices = {name: index for index, name in enumerate(parameter_names(state))}
    entries: dict[int, dict] = {}
    for full_name, value in values.items():
        key, name = full_name.split(".", 1)
        entries.setdefault(indices[name], {})[key] = divide_like(value, parameters[name])
    before = state.optimizer.state_dict()["param_groups"]
    groups = [new | old for new, old in zip(before, groups or before, strict=True)]  # a newer torch may have more keys
    require_types(groups, before)
    state.optimizer.load_state_dict({"state": entries, "param_groups": groups})
