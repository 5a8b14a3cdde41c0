"""How long a checkpoint takes to save, against only writing and flushing the same bytes; as a ratio in one run.

python -m benchmarks.checkpoint
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import train_gpt2
from common.checkpoint import TrainingState, prune, save_checkpoint, take_snapshot
from common.files import flush
from common.processes import World
from common.script import Positive, UsageError, check_settings, parse_flags, run
from model import GPT, PRESETS
from recipes import RECIPES, Size, fill_defaults


@dataclass(frozen=True)
class BenchmarkConfig:
    model: Size = "gpt2"  # size; its weights are random
    repeat: Positive[int] = 3  # times to save; their median counts
    out_dir: str | None = None  # where to write; None: the system's directory of temporary files


def training_state(model: str) -> TrainingState:
    """A run on the CPU whose optimizer has the state of one step."""
    device = torch.device("cpu")
    config = fill_defaults(RECIPES[model], device, PRESETS[model])
    state = train_gpt2.make_trainer(config, World(0, 1, device), GPT(PRESETS[model])).state
    for parameter in state.gpt.parameters():
        parameter.grad = torch.randn_like(parameter)
    state.optimizer.step()
    return state


def save(state: TrainingState, out_dir: Path) -> None:
    """Save as training does, keeping the newest checkpoint alone."""
    snapshot = take_snapshot(state, World(0, 1, torch.device("cpu")))
    save_checkpoint(out_dir, snapshot, record={}, card="")
    prune(out_dir, keep=1, milestone_every=0)


def write(contents: dict[str, bytes], directory: Path) -> None:
    """Write and flush each file, and the directory."""
    directory.mkdir()
    for name, content in contents.items():
        (directory / name).write_bytes(content)
        flush(directory / name)
    flush(directory)


def seconds(action: Callable[[], None]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def measure(state: TrainingState, directory: Path, repeat: int) -> tuple[int, dict[str, list[float]]]:
    """The bytes of a checkpoint, and the seconds that each way took, by turns."""
    save(state, directory)
    contents = {path.name: path.read_bytes() for path in (directory / f"step_{state.step:06d}").iterdir()}
    times: dict[str, list[float]] = {"save": [], "write": []}
    for _ in range(repeat):
        times["write"].append(seconds(lambda: write(contents, directory / "plain")))
        shutil.rmtree(directory / "plain")
        state.step += 1
        times["save"].append(seconds(lambda: save(state, directory)))
    return sum(map(len, contents.values())), times


def compare(config: BenchmarkConfig) -> None:
    """Measure both ways; prints their medians and, last, a line of JSON with all figures."""
    check_settings(config)
    if config.out_dir is not None and not Path(config.out_dir).is_dir():
        raise UsageError(f"--out_dir {config.out_dir} is no directory: choose one that exists")
    with tempfile.TemporaryDirectory(dir=config.out_dir) as directory:
        size, times = measure(training_state(config.model), Path(directory), config.repeat)
    medians = {way: statistics.median(values) for way, values in times.items()}
    print(f"{size / 1e9:.2f} GB: saved in {medians['save']:.2f} s, written and flushed in {medians['write']:.2f} s")
    figures = asdict(config) | {
        "torch": torch.__version__,
        "bytes": size,
        "seconds": times,
        "ratio": medians["save"] / medians["write"],
    }
    print(json.dumps(figures))


def main(argv: list[str] | None = None) -> None:
    compare(parse_flags(BenchmarkConfig, argv, __doc__))


if __name__ == "__main__":
    run(main)
