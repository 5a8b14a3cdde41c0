"""Log to picture: draw a run's log.jsonl as loss.png.

python plot.py log
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from common import DataError, Parser, replacing, run

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


def draw(directory: Path) -> Path:
    """Draw the losses over steps, and HellaSwag's acc_norm where there is any; returns the picture's path."""
    from matplotlib.figure import Figure  # not pyplot, which would open windows and keep every figure

    records = read_log(directory / "log.jsonl")
    curves = {
        key: [(record["step"], record[key]) for record in records if record.get(key) is not None]
        for key in ("loss", "val_loss", "hellaswag_acc_norm")
    }
    unigram = next((record["unigram_loss"] for record in records if record.get("unigram_loss")), None)
    panels = 2 if curves["hellaswag_acc_norm"] else 1
    figure = Figure(figsize=(7 * panels, 5), layout="constrained")
    loss, *rest = figure.subplots(1, panels, squeeze=False)[0]
    for key, label in (("loss", "train"), ("val_loss", "validation")):
        loss.plot(*zip(*curves[key], strict=True) if curves[key] else ([], []), label=label)
    if unigram:
        loss.axhline(unigram, color="gray", linestyle="--", label=f"unigram {unigram:.2f}")
    loss.set(xlabel="step", ylabel="loss (nats a token)")
    loss.legend()
    for accuracy in rest:
        accuracy.plot(*zip(*curves["hellaswag_acc_norm"], strict=True), marker=".", label="this run")
        accuracy.axhline(GPT2_HELLASWAG, color="gray", linestyle="--", label=f"OpenAI GPT-2 124M {GPT2_HELLASWAG}")
        accuracy.set(xlabel="step", ylabel="HellaSwag acc_norm")
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
