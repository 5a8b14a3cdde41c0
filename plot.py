"""Log to picture: what log.jsonl holds, how it is written, and how it is drawn as loss.png.

python plot.py log
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import DataError, Parser, flush, replacing, run

GPT2_HELLASWAG = 0.2955  # acc_norm of OpenAI's 124M model


def read_log(path: Path) -> list[dict]:
    """The records of a log; a last line that was cut off is left out."""
    if not path.exists():
        raise DataError(f"{path.parent} holds no run: there is no {path.name}")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            records.append({"step": int(record["step"])} | record)
        except (ValueError, TypeError, KeyError):
            if number < len(lines):
                raise DataError(f"{path}, line {number}, is damaged: delete the line") from None
    return records


class Log:
    """log.jsonl, with the same numbers on the terminal and in a tracker; without a tracker, it writes nothing at all.

    Lines past the first record's step, from which the run goes on, are dropped, and that step's evaluation unless it is
    `evaluated`. Where the log cannot be written, it says so once, and the run goes on.
    """

    def __init__(self, directory: Path, tracker: Tracker | None, start: dict, evaluated: bool) -> None:
        self.path, self.tracker, self.failed = directory / "log.jsonl", tracker, False
        if tracker is None:
            return
        records = read_log(self.path) if start["step"] and self.path.exists() else []
        last = start["step"] if evaluated else start["step"] - 1
        kept = [some for some in records if some["step"] <= last or (some["step"] <= start["step"] and "loss" in some)]
        with replacing(self.path) as temporary:
            text = "".join(json.dumps(record) + "\n" for record in [*kept, start])
            temporary.write_text(text, encoding="utf-8")

    def write(self, text: str, **record: Any) -> None:
        """Append a record, and print its text; JSON has no number that is not finite, so such a one becomes null."""
        if self.tracker is None:
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
        if self.tracker is not None:
            self.attempt(flush, self.path)

    def draw(self) -> None:
        if self.tracker is not None:
            self.attempt(draw, self.path.parent)

    def attempt(self, action: Callable[..., object], *args: object) -> None:
        try:
            action(*args)
        except (OSError, DataError) as error:
            if not self.failed:
                print(f"warning: {self.path} or its picture cannot be written: {error}; training goes on", flush=True)
            self.failed = True

    def close(self) -> None:
        if self.tracker is not None:
            self.tracker.close()


class Tracker:
    """TensorBoard, Weights & Biases or trackio, or none; one that fails says so once, and is left out from then on."""

    def __init__(self, name: str, directory: str, settings: dict, step: int) -> None:
        self.name, self.send, self.end = name, lambda record: None, lambda: None
        opening = {"none": lambda *_: None, "tensorboard": self.open_tensorboard}.get(name, self.open_library)
        self.attempt(opening, directory, settings, step)

    def open_tensorboard(self, directory: str, settings: dict, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(directory, purge_step=step + 1)
        writer.add_text("settings", json.dumps(settings))

        def send(record: dict) -> None:
            for key, value in numbers(record).items():
                writer.add_scalar(key, value, record["step"])
            writer.flush()

        self.send, self.end = send, writer.close

    def open_library(self, directory: str, settings: dict, step: int) -> None:
        library = importlib.import_module(self.name)  # wandb, and trackio, which has the same functions
        library.init(project="gpt2", name=Path(directory).name, config=settings)
        self.send, self.end = lambda record: library.log(numbers(record), step=record["step"]), library.finish

    def attempt(self, action: Callable[..., object], *args: object) -> None:
        try:
            action(*args)
        except Exception as error:  # whatever it is, the run is worth more
            self.send, self.end = lambda record: None, lambda: None
            print(f"warning: --tracker {self.name} is left out from here: {error!r}", flush=True)

    def log(self, record: dict) -> None:
        self.attempt(self.send, record)

    def close(self) -> None:
        self.attempt(self.end)


def numbers(record: dict) -> dict[str, float]:
    """What a tracker can draw of a record."""
    return {key: v for key, v in record.items() if key != "step" and isinstance(v, int | float)}


def draw(directory: Path) -> Path:
    """Draw the losses over steps, and HellaSwag's acc_norm where there is any; returns the picture's path."""
    from matplotlib.figure import Figure  # not pyplot, which would open windows and keep every figure

    records = read_log(directory / "log.jsonl")
    curves = {
        key: [(record["step"], record[key]) for record in records if record.get(key) is not None]
        for key in ("loss", "val_loss", "hellaswag_nanogpt_acc_norm")
    }
    unigram = next((record["unigram_loss"] for record in records if record.get("unigram_loss")), None)
    panels = 2 if curves["hellaswag_nanogpt_acc_norm"] else 1
    figure = Figure(figsize=(7 * panels, 5), layout="constrained")
    loss, *rest = figure.subplots(1, panels, squeeze=False)[0]
    for key, label in (("loss", "train"), ("val_loss", "validation")):
        loss.plot(*zip(*curves[key], strict=True) if curves[key] else ([], []), label=label)
    if unigram:
        loss.axhline(unigram, color="gray", linestyle="--", label=f"unigram {unigram:.2f}")
    loss.set(xlabel="step", ylabel="loss (nats a token)")
    loss.legend()
    for accuracy in rest:
        accuracy.plot(*zip(*curves["hellaswag_nanogpt_acc_norm"], strict=True), marker=".", label="this run")
        accuracy.axhline(GPT2_HELLASWAG, color="gray", linestyle="--", label=f"OpenAI GPT-2 124M {GPT2_HELLASWAG}")
        accuracy.set(xlabel="step", ylabel="HellaSwag acc_norm (nanogpt)")
        accuracy.legend()
    with replacing(directory / "loss.png") as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return directory / "loss.png"


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    help = "the run's output directory, which holds log.jsonl (default: log)"
    parser.add_argument("directory", nargs="?", default="log", help=help)
    print(draw(Path(parser.parse_args(argv).directory)))


if __name__ == "__main__":
    run(main)
