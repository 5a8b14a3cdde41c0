"""Log to picture: draw a run's losses and HellaSwag scores from its log.jsonl as loss.png."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.files import atomic_write
from common.log import read_log
from common.script import parse_flags, run

GPT2_HELLASWAG = 0.2955  # acc_norm of OpenAI's 124M model, scored as build-nanogpt does


@dataclass(frozen=True)
class PlotConfig:
    out_dir: str = "log"  # a run's directory, which holds log.jsonl


def draw(directory: Path) -> Path:
    """Draw a run's curves; returns the picture's path, and raises DataError if there is no run."""
    from matplotlib.figure import Figure  # not pyplot, which would open windows and keep every figure

    records = read_log(directory)
    hellaswag = curve(records, "hellaswag_nanogpt_acc_norm")
    panels = 2 if hellaswag else 1
    figure = Figure(figsize=(7 * panels, 5), layout="constrained")
    loss, *accuracy = figure.subplots(1, panels, squeeze=False)[0]
    loss.plot(*columns(curve(records, "loss")), label="train")
    loss.plot(*columns(curve(records, "val_loss")), label="validation")
    for _, unigram in curve(records, "unigram_loss")[:1]:
        loss.axhline(unigram, color="gray", linestyle="--", label=f"unigram {unigram:.2f}")
    loss.set(xlabel="step", ylabel="loss (nats per token)")
    loss.legend()
    for axes in accuracy:
        axes.plot(*columns(hellaswag), marker=".", label="this run")
        axes.axhline(GPT2_HELLASWAG, color="gray", linestyle="--", label=f"OpenAI GPT-2 124M {GPT2_HELLASWAG}")
        axes.set(xlabel="step", ylabel="HellaSwag acc_norm (nanogpt)")
        axes.legend()
    with atomic_write(directory / "loss.png") as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return directory / "loss.png"


def curve(records: list[dict], key: str) -> list[tuple[int, float]]:
    """The steps and values of the records that hold one."""
    return [(r["step"], r[key]) for r in records if isinstance(r.get(key), int | float)]


def columns(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def main(argv: list[str] | None = None) -> None:
    config = parse_flags(PlotConfig, argv, __doc__)
    print(draw(Path(config.out_dir)))


if __name__ == "__main__":
    run(main)
