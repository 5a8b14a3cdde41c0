"""A run's log: log.jsonl, the same numbers on the terminal, and trackers."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import math
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common.files import atomic_write, flush
from common.reference import Comparison
from common.script import DataError


def read_log(directory: Path, until: float = math.inf) -> list[dict]:
    """The records of a run's log; raises DataError for a damaged line that a record of a step up to `until` follows.

    So by default a last line that was cut off is passed over.
    """
    path = directory / "log.jsonl"
    if not path.is_file():
        raise DataError(f"{directory} holds no run: there is no {path.name}")
    records, damaged = [], 0
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            record = read_record(line)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            damaged = damaged or number
            continue
        if damaged and record["step"] <= until:
            raise DataError(f"{path}, line {damaged}, is damaged: delete the line")
        records.append(record)
    return records


def read_record(line: str) -> dict:
    """The record in a line of the log; raises ValueError or the like where there is none."""
    record = json.loads(line)
    if not all(type(step) is int and 0 <= step < 2**63 for step in (record["step"], record.get("sent", 0))):
        raise ValueError("no step")
    if not all(abs(value) < 1e300 for value in numbers(record).values()):
        raise ValueError("a number that JSON does not have")
    return record


class Log:
    """Where one process of a run, the main one, writes; the others' are not enabled, and write nothing."""

    def __init__(self, directory: Path, tracker: Tracker, comparison: Comparison, clock: Clock, enabled: bool) -> None:
        self.path, self.tracker, self.enabled = directory / "log.jsonl", tracker, enabled
        self.comparison, self.clock = comparison, clock
        self.failing: set[str] = set()  # what fails at present, and has been warned of

    def start(self, step: int, redo: list[str], **record: Any) -> None:
        """Begin at a step, 0 or a checkpoint's: drop what lies past it, and what will be evaluated there again.

        The names of those numbers begin with one of `redo`.
        """
        if not self.enabled:
            return
        # a power cut may leave a hole behind the checkpoint, before which the log was flushed
        records = read_log(self.path.parent, until=step) if step and self.path.exists() else []
        own = [r for r in records if r["step"] == step and "run" not in r]  # but for an earlier start from here
        kept = [r for r in records if r["step"] < step]
        kept += [r for r in own if not any(key.startswith(tuple(redo)) for key in r)]
        run = next((r["run"] for r in records if "run" in r), uuid.uuid4().hex)
        sent = max([r.get("sent", r["step"]) for r in records], default=0)  # the steps before were sent to a tracker
        kept.append({"step": step, "run": run, "sent": sent} | record)
        with atomic_write(self.path) as temporary:
            temporary.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
        self.tracker.start(kept)

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
        """Do what the run can spare: where it begins to fail, warn, and go on."""
        if not self.enabled:
            return
        try:
            action(*args)
            self.failing.discard(action.__name__)
        except Exception as error:  # whatever it is, the run is worth more
            if action.__name__ not in self.failing:
                print(f"warning: {self.path} or its picture cannot be written: {error}; training continues", flush=True)
            self.failing.add(action.__name__)

    def write_seconds(self, step: int, finished: bool) -> None:
        """Append where the time went, and as `sent` the first step that `close` leaves unsent."""
        seconds = self.clock.seconds()
        parts = ", ".join(f"{part} {seconds[part]:.1f} s" for part in seconds)
        text = f"step {step:5d} | {sum(seconds.values()):.1f} s in all: {parts}"
        self.write(text, step=step, sent=step + finished, seconds=seconds)

    def close(self, finished: bool) -> None:
        self.tracker.close(finished)


class Tracker:
    """TensorBoard, Weights & Biases or trackio, or none; one that fails says so once, and is disabled from then on.

    A step is sent whole, once the next one begins. So a tracker has all of it or nothing, and on resuming it is sent,
    from the log, what follows the last step that it has; TensorBoard the whole log, in place of what it has.
    """

    def __init__(self, name: str, directory: Path, settings: dict) -> None:
        self.name, self.directory, self.settings = name, directory, settings
        self.first = 0  # the first step that it lacks
        self.unsent: dict = {}  # what is known of the step under way
        self.send: Callable[[dict, int], object] = lambda values, step: None
        self.finish: Callable[[], object] = lambda: None

    def start(self, records: list[dict]) -> None:
        """Open the tracker, and send it what it lacks of these, the run's log."""
        if self.name == "tensorboard":
            self.attempt(self.open_tensorboard)
        elif self.name != "none":
            self.attempt(self.open_library, records[-1]["run"], records[-1]["sent"])
        for record in records:
            self.log(record)

    def open_tensorboard(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(self.directory, purge_step=0, flush_secs=1)
        writer.add_text("settings", json.dumps(self.settings))
        self.send = lambda values, step: [writer.add_scalar(key, value, step) for key, value in values.items()]
        self.finish = writer.close

    def open_library(self, run: str, sent: int) -> None:
        """Open wandb or trackio at the run of an earlier process, or, for a run's first or its copy, at a new one."""
        library = importlib.import_module(self.name)
        name = self.directory.resolve().name
        identity = hashlib.sha256(f"{name} {run}".encode()).hexdigest()[:8]
        options = {"project": "gpt2", "name": f"{name}-{identity}", "resume": "allow", "config": self.settings}
        if self.name == "trackio":  # it finds a run by its name
            self.first = library.init(**options)._next_step
        else:
            tracked = library.init(id=identity, **options)
            self.first = sent if tracked.offline else tracked.step  # offline, it cannot know
        self.send, self.finish = library.log, library.finish

    def attempt(self, action: Callable[..., object], *args: Any) -> None:
        try:
            action(*args)
        except Exception as error:  # whatever it is, the run is worth more
            self.send, self.finish = lambda values, step: None, lambda: None
            print(f"warning: --tracker {self.name} is disabled from here on: {error!r}", flush=True)

    def log(self, record: dict) -> None:
        if self.unsent and record["step"] > self.unsent["step"]:
            self.send_step()
        if record["step"] >= self.first:
            self.unsent |= record

    def send_step(self) -> None:
        values, self.unsent = self.unsent, {}
        self.attempt(self.send, numbers(values), values["step"])

    def close(self, finished: bool) -> None:
        """End; the last step of a run that was stopped is sent on resuming, since it lacks its evaluation."""
        if finished and self.unsent:
            self.send_step()
        self.attempt(self.finish)


def numbers(record: dict) -> dict[str, float]:
    """What can be drawn of a record."""
    return {key: v for key, v in record.items() if key not in ("step", "sent") and type(v) in (int, float)}


class Clock:
    """Divides all wall time since it was made into named parts; what is not measured is `other`."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.measured: Counter[str] = Counter()

    @contextlib.contextmanager
    def measure(self, part: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.measured[part] += time.perf_counter() - began

    def seconds(self) -> dict[str, float]:
        """The parts, up to now."""
        return {"other": time.perf_counter() - self.began - self.measured.total(), **self.measured}
