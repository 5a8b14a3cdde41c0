"""A run's log: log.jsonl, the same numbers on the terminal, and trackers."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common.files import atomic_write, flush
from common.reference import Comparison
from common.script import DataError


def read_log(directory: Path) -> list[dict]:
    """The records of a run's log; raises DataError for a damaged line, but for a last one that was cut off."""
    path = directory / "log.jsonl"
    if not path.is_file():
        raise DataError(f"{directory} holds no run: there is no {path.name}")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if type(record["step"]) is not int:
                raise ValueError("no step")
            records.append(record)
        except (ValueError, TypeError, KeyError, RecursionError):
            if number < len(lines):
                raise DataError(f"{path}, line {number}, is damaged: delete the line") from None
    return records


class Log:
    """Where one process of a run, the main one, writes; the others' are not enabled, and write nothing."""

    def __init__(self, directory: Path, tracker: Tracker, comparison: Comparison, clock: Clock, enabled: bool) -> None:
        self.path, self.tracker, self.enabled = directory / "log.jsonl", tracker, enabled
        self.comparison, self.clock = comparison, clock
        self.warned = False

    def start(self, step: int, redo_evaluation: bool, **record: Any) -> None:
        """Begin at a step, 0 or a checkpoint's: drop what lies past it, and its evaluation if that will be redone."""
        if not self.enabled:
            return
        records = read_log(self.path.parent) if step and self.path.exists() else []
        last = step - 1 if redo_evaluation else step
        kept = [r for r in records if r["step"] <= last or (r["step"] == step and ("loss" in r or "seconds" in r))]
        lines = [json.dumps(r) + "\n" for r in [*kept, {"step": step} | record]]
        with atomic_write(self.path) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")

    def write(self, text: str, **record: Any) -> None:
        """Append a record, and print its text; a number that is not finite, which JSON lacks, becomes null."""
        if not self.enabled:
            return
        print(text, flush=True)
        record = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in record.items()}
        self.attempt(self.append, (json.dumps(record) + "\n").encode())
        self.tracker.log(record)

    def append(self, line: bytes) -> None:
        """Append the whole line, or nothing."""
        with open(self.path, "ab", buffering=0) as file:
            size = file.tell()
            try:
                if file.write(line) < len(line):
                    raise OSError("the disk is full")
            except OSError:
                file.truncate(size)
                raise

    def flush(self) -> None:
        """Wait until all that was written is on the disk."""
        self.attempt(flush, self.path)

    def attempt(self, action: Callable[..., object], *args: object) -> None:
        """Do what the run can spare: where it fails, warn once, and go on."""
        if not self.enabled:
            return
        try:
            action(*args)
        except (OSError, DataError) as error:
            if not self.warned:
                print(f"warning: {self.path} or its picture cannot be written: {error}; training continues", flush=True)
            self.warned = True

    def close(self) -> None:
        self.tracker.close()


class Tracker:
    """TensorBoard, Weights & Biases or trackio, or none; one that fails says so once, and is disabled from then on."""

    def __init__(self, name: str, directory: Path, settings: dict, step: int) -> None:
        self.name = name
        self.send: Callable[[dict], object] = lambda record: None
        self.finish: Callable[[], object] = lambda: None
        if name != "none":
            self.attempt(self.open, directory, settings, step)

    def open(self, directory: Path, settings: dict, step: int) -> None:
        if self.name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(directory, purge_step=step + 1, flush_secs=1)
            writer.add_text("settings", json.dumps(settings))
            self.send = lambda record: [writer.add_scalar(k, v, record["step"]) for k, v in numbers(record).items()]
            self.finish = writer.close
        else:
            library = importlib.import_module(self.name)  # wandb, and trackio, which has the same functions
            library.init(project="gpt2", name=directory.name, config=settings)
            self.send = lambda record: library.log(numbers(record), step=record["step"])
            self.finish = library.finish

    def attempt(self, action: Callable[..., object], *args: Any) -> None:
        try:
            action(*args)
        except Exception as error:  # whatever it is, the run is worth more
            self.send, self.finish = lambda record: None, lambda: None
            print(f"warning: --tracker {self.name} is disabled from here on: {error!r}", flush=True)

    def log(self, record: dict) -> None:
        self.attempt(self.send, record)

    def close(self) -> None:
        self.attempt(self.finish)


def numbers(record: dict) -> dict[str, float]:
    """What a tracker can draw of a record."""
    return {key: v for key, v in record.items() if key != "step" and isinstance(v, int | float)}


class Clock:
    """Divides all wall time since it was made into named parts; what is not measured is `other`."""

    def __init__(self) -> None:
        self.seconds = {"other": 0.0}
        self.part, self.since = "other", time.perf_counter()

    @contextlib.contextmanager
    def measure(self, part: str) -> Iterator[None]:
        outer = self.part
        self.switch(part)
        try:
            yield
        finally:
            self.switch(outer)

    def switch(self, part: str) -> None:
        """End the present part, and begin another."""
        now = time.perf_counter()
        self.seconds[self.part] = self.seconds.get(self.part, 0.0) + now - self.since
        self.part, self.since = part, now

    def summary(self) -> str:
        """The parts and their sum, up to now, as a text."""
        self.switch(self.part)
        parts = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in self.seconds.items())
        return f"{sum(self.seconds.values()):.1f} s in all: {parts}"
