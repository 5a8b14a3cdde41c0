"""How long the training loop waits for its batches: read when they are asked for, against one read ahead by a thread.

python -m benchmarks.batches

A step is played by a pause of --step_ms, as the host waits for a GPU. Asked for, each process reads the whole batch and
hashes it; ahead, the main process does so, and the others read their own part.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.batches import Batches, rank_slice
from common.prefetch import prefetch
from common.processes import World
from common.script import Positive, check_settings, parse_flags, run
from common.shards import open_shards, write_shard
from common.tokenizer import N_TOKENS

T, BATCH_SIZE, TOKENS = 1024, 32, 2**19


@dataclass(frozen=True)
class BenchmarkConfig:
    processes: Positive[int] = 8  # that share a batch of 524,288 tokens, 32 rows in a micro-batch
    steps: Positive[int] = 20  # optimizer steps to time; their median counts
    step_ms: Positive[int] = 140  # length of a step; others' figure for the 124M model on eight H100


def read_when_asked(batches: Batches, world: World) -> Iterator[torch.Tensor]:
    position = 0
    while True:
        starts, position = batches.row_starts(position, TOKENS)
        rows = batches.read_rows(starts)
        hashlib.sha256(rows).hexdigest()
        yield torch.from_numpy(rank_slice(rows, BATCH_SIZE, world).astype(np.int64))


def waiting_ms(batches: Iterator, config: BenchmarkConfig) -> float:
    """The median of the milliseconds for which a step waits for its batch."""
    waits = []
    for _ in range(config.steps + 2):
        began = time.perf_counter()
        next(batches)
        waits.append(1000 * (time.perf_counter() - began))
        time.sleep(config.step_ms / 1000)
    batches.close()
    return statistics.median(waits[2:])


def measure(config: BenchmarkConfig) -> None:
    """Print the waits of the main and of another process, in order and shuffled, and, last, a line of JSON."""
    check_settings(config)
    generator = np.random.default_rng(0)
    figures = {}
    with tempfile.TemporaryDirectory() as directory:
        for number in range(3):
            write_shard(Path(directory), number, generator.integers(N_TOKENS, size=20_000_000, dtype=np.uint16))
        shards = open_shards(Path(directory)).train
        for shuffle in (False, True):
            for rank in range(min(2, config.processes)):
                world = World(rank, config.processes, torch.device("cpu"))
                batches = Batches(shards, T, seed=0, shuffle=shuffle)
                asked = waiting_ms(read_when_asked(batches, world), config)
                ahead = waiting_ms(prefetch(batches.read(0, BATCH_SIZE, lambda position: TOKENS, world), 1), config)
                name = f"rank {rank}, {'shuffled' if shuffle else 'in order'}"
                figures[name] = {"asked_ms": asked, "ahead_ms": ahead}
                print(f"{name}: {asked:.2f} ms when asked for, {ahead:.2f} ms ahead", flush=True)
    print(json.dumps(figures))


def main(argv: list[str] | None = None) -> None:
    measure(parse_flags(BenchmarkConfig, argv, __doc__))


if __name__ == "__main__":
    run(main)
