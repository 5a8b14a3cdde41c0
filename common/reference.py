"""Others' runs of the 124M reproduction, beside which a run with their settings and data shows its scores."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from common.shards import Shards

FILE = Path(__file__).with_name("reference.json")
SCORES = ("val_loss", "hellaswag_nanogpt_acc_norm")  # by their names in log.jsonl

# A score is far from the others' beyond this many of their standard deviations. Their GPUs, numbers of GPUs and kernels
# differ, so the deviation holds what these do; but that of five runs may be 2.9 times too small (chi-square, 97.5%),
# and six of the seven runs share a seed. So two true standard deviations may be six of these
FAR = 6


@dataclass(frozen=True)
class Band:
    """A score of others' runs at one step: its mean and standard deviation, and how far from the mean is far."""

    mean: float
    sd: float
    limit: float


def read_reference() -> dict:
    return json.loads(FILE.read_text(encoding="utf-8"))


def bands(score: str) -> dict[int, Band]:
    """The others' band at each step at which they have the score."""
    rows = read_reference()[score]
    typical = statistics.median(sd for _, _, sd in rows)  # an sd below it is luck
    return {step: Band(mean, sd, FAR * max(sd, typical)) for step, mean, sd in rows}


class Comparison:
    """A run beside the others', if it has their settings and data; else its scores are shown alone."""

    def __init__(self, config: object, shards: Shards) -> None:
        reference = read_reference()
        settings = {name: getattr(config, name) for name in reference["settings"]}
        settings["min_lr"] = round(settings["min_lr"], 9)  # a tenth of max_lr is 6e-5 to rounding
        data = reference["data"]
        self.applies = (
            settings == reference["settings"]
            and data["source"].items() <= (shards.source or {}).items()
            and len(shards.val) == data["val_tokens"]
            and math.isclose(sum(map(len, shards.train)), data["train_tokens"], rel_tol=0.01)
        )
        self.bands = {score: bands(score) for score in SCORES} if self.applies else {}
        self.warned: set[str] = set()

    def describe(self, step: int, scores: dict[str, float]) -> str:
        """The scores as text, and a line more the first time that one is far from the others'."""
        parts, warnings = [], []
        for name, score in scores.items():
            band = self.bands.get(name, {}).get(step)
            label = name.replace("val_loss", "validation loss")
            parts.append(f"{label} {score:.4f}" + (f" (others: {band.mean:.3f} ± {band.sd:.3f})" if band else ""))
            near = band is None or abs(score - band.mean) <= band.limit  # NaN is not
            if not near and name not in self.warned:
                self.warned.add(name)
                warnings.append(
                    f"warning: {label} {score:.3f} is far from the {band.mean:.3f} of others' runs with these settings "
                    f'and data: see "My loss looks different" in docs/operations.md, and run python check.py'
                )
        return "\n".join([" | ".join(parts), *warnings])
