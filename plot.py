"""Log to picture: draw a run's losses and HellaSwag scores from its log.jsonl as loss.png."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.files import atomic_write
from common.log import read_log
from common.reference import FAR, bands
from common.script import parse_flags, run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GPT2_HELLASWAG = 0.2955  # acc_norm of OpenAI's 124M model, scored as build-nanogpt does
LABELS = {"val_loss": "validation", "hellaswag_nanogpt_acc_norm": "this run"}  # a panel each


@dataclass(frozen=True)
class PlotConfig:
    out_dir: str = "log"  # a run's directory, which holds log.jsonl


def draw(directory: Path) -> Path:
    """Draw a run's curves; returns the picture's path, and raises DataError if there is no run."""
    os.environ.pop("MPLBACKEND", None)  # a notebook's, which matplotlib may refuse outside of it
    from matplotlib.figure import Figure  # not pyplot, which would open windows and keep every figure

    records = read_log(directory)
    compared = any(record.get("reference") is True for record in records)
    panels = 2 if compared or curve(records, "hellaswag_nanogpt_acc_norm")[0] else 1
    figure = Figure(figsize=(7 * panels, 5), layout="constrained")
    loss, *accuracy = figure.subplots(1, panels, squeeze=False)[0]
    for axes, (score, label) in zip(figure.axes, LABELS.items(), strict=False):
        if compared:
            draw_others(axes, score, last_step=max(record["step"] for record in records))
        steps, scores = curve(records, score)
        if steps:
            axes.plot(steps, scores, color="C1", marker=".", markersize=3, linewidth=1, label=label)
        axes.set(xlabel="step")
        add_token_axis(axes, *curve(records, "position"))
    draw_losses(loss, records)
    for axes in accuracy:
        axes.axhline(GPT2_HELLASWAG, color="gray", linestyle="--", label=f"OpenAI GPT-2 124M {GPT2_HELLASWAG}")
        axes.set(ylabel="HellaSwag acc_norm (nanogpt)")
    for axes in figure.axes:
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    with atomic_write(directory / "loss.png") as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return directory / "loss.png"


def draw_losses(axes: Axes, records: list[dict]) -> None:
    """Draw the training loss, each step's and smoothed, and the unigram loss."""
    steps, losses = curve(records, "loss")
    for unigram in curve(records, "unigram_loss")[1][:1]:
        axes.axhline(unigram, color="gray", linestyle="--", label=f"unigram {unigram:.2f}")
    axes.set(ylabel="loss (nats per token)")
    if losses:
        axes.plot(steps, losses, ".", color="lightsteelblue", markersize=1.5, zorder=0)
        axes.plot(steps, smooth(losses), color="C0", label="train")
        axes.margins(y=0.01)
        axes.set_ylim(top=np.quantile(losses, 0.97))  # the fall at first would leave the rest no room


def smooth(losses: list[float]) -> np.ndarray:
    """The mean of each loss and its neighbors, a hundredth of all on either side; fewer at the ends."""
    index = np.arange(len(losses))
    reach = np.minimum(len(losses) // 100, index)
    start, stop = index - reach, np.minimum(index + reach + 1, len(losses))
    sums = np.cumsum([0.0, *losses])
    return (sums[stop] - sums[start]) / (stop - start)


def draw_others(axes: Axes, score: str, last_step: int) -> None:
    """Draw others' runs, up to this one's last step, as a band: outside of it a score is far from theirs."""
    others = {step: band for step, band in bands(score).items() if step <= last_step}
    lower = [band.mean - band.limit for band in others.values()]
    upper = [band.mean + band.limit for band in others.values()]
    axes.fill_between(list(others), lower, upper, color="C2", alpha=0.3, linewidth=0, label=f"others' runs ± {FAR} sd")


def add_token_axis(axes: Axes, steps: list[int], tokens: list[int]) -> None:
    """Show at the top how many million tokens the steps have passed."""
    from matplotlib.ticker import MaxNLocator

    steps, tokens = [0, *steps], [0, *tokens]
    ticks = [tick for tick in MaxNLocator(6).tick_values(0, tokens[-1]) if 0 <= tick <= tokens[-1]]
    top = axes.secondary_xaxis("top", xlabel="million tokens")
    top.set_xticks(np.interp(ticks, tokens, steps), [f"{tick / 1e6:,g}" for tick in ticks])


def curve(records: list[dict], key: str) -> tuple[list[int], list[float]]:
    """The steps and values of the records that hold a number."""
    points = [(r["step"], r[key]) for r in records if isinstance(r.get(key), int | float)]
    return [step for step, _ in points], [value for _, value in points]


def main(argv: list[str] | None = None) -> None:
    config = parse_flags(PlotConfig, argv, __doc__)
    print(draw(Path(config.out_dir)))


if __name__ == "__main__":
    run(main)
