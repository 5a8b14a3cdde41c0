"""How long a checkpoint takes to save, against only writing and flushing the same bytes; as a ratio in one run.

python benchmarks/checkpoint.py --model gpt2
"""

from __future__ import annotations

import os
import sys

sys.path[:1] = [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]

import json
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import train_gpt2
from common import Flags, flag, flush, parse_flags, run
from model import GPT, PRESETS


@dataclass(frozen=True)
class BenchmarkConfig(Flags):
    model: str = flag("gpt2", "size", choices=[*PRESETS])
    repeat: int = flag(3, "times to save", least=1)
    directory: str | None = flag(None, "where to write (default: the system's directory of temporary files)")


def make_trainer(model: str, out_dir: str) -> train_gpt2.Trainer:
    """A trainer on the CPU with moments as after a step."""
    config = train_gpt2.TrainConfig(model=model, device="cpu", out_dir=out_dir, keep=1)
    device = torch.device("cpu")
    config = train_gpt2.resolve(config, device)
    trainer = train_gpt2.make_trainer(config, train_gpt2.World(0, 1, device), GPT(PRESETS[model]))
    for parameter in trainer.gpt.parameters():
        parameter.grad = torch.randn_like(parameter)
    trainer.optimizer.step()
    return trainer


def write(contents: dict[str, bytes], directory: Path) -> None:
    """Write and flush each file, and the directory."""
    directory.mkdir()
    for name, content in contents.items():
        (directory / name).write_bytes(content)
        flush(directory / name)
    flush(directory)


def timed(action, *args) -> float:
    began = time.perf_counter()
    action(*args)
    return time.perf_counter() - began


def main() -> None:
    config = parse_flags(BenchmarkConfig, None, __doc__)
    with tempfile.TemporaryDirectory(dir=config.directory) as name:
        trainer, plain = make_trainer(config.model, name), Path(name) / "plain"
        shards = train_gpt2.Shards(val=np.empty(0), train=[], identity=[], unigram_loss=None, source=None)
        train_gpt2.save_checkpoint(trainer, shards)
        contents = {path.name: path.read_bytes() for path in (Path(name) / "step_000000").iterdir()}
        times: dict[str, list[float]] = {"save": [], "write": []}
        for step in range(1, config.repeat + 1):
            times["write"].append(timed(write, contents, plain))
            shutil.rmtree(plain)
            trainer.step = step
            times["save"].append(timed(train_gpt2.save_checkpoint, trainer, shards))
    size, medians = sum(map(len, contents.values())), {way: statistics.median(some) for way, some in times.items()}
    figures = {"model": config.model, "bytes": size, "torch": torch.__version__, "seconds": times}
    print(
        f"{size / 1e9:.2f} GB: saved in {medians['save']:.2f} s, only written and flushed in {medians['write']:.2f} s"
    )
    print(json.dumps(figures | {"ratio": medians["save"] / medians["write"]}))


if __name__ == "__main__":
    run(main)
