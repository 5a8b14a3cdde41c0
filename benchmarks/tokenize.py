"""Text to shards, three ways: how peers do it, with tiktoken, and with gigatoken; as ratios in one run.

    python -m benchmarks.tokenize --input 'texts/*.parquet'

Each way runs in a process of its own, and is timed from that process's start to its end, with all shards on disk. The
files are read --repeat times over, so that a few of them show what a long run does, and not only how it starts.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

import fineweb
from common.files import sha256
from common.script import DataError, Positive, UsageError, check_settings, parse_flags, run
from common.shards import list_shards, open_shard, shard_name
from common.tokenizer import END_OF_TEXT, encode


@dataclass(frozen=True)
class BenchmarkConfig:
    input: tuple[str, ...] = ()
    """parquet files: paths or globs"""
    repeat: Positive[int] = 24
    """times to read the files"""
    shard_size: Positive[int] = 10_000_000
    """tokens in a shard"""
    workers: Positive[int] = os.cpu_count() or 1
    """threads of tiktoken and of gigatoken"""


def plain_documents(paths: list[Path]) -> Iterator[str]:
    from pyarrow import parquet

    for path in paths:
        with parquet.ParquetFile(path) as file:
            for rows in file.iter_batches(columns=["text"]):
                yield from rows.column(0).to_pylist()


def plain_encode(text: str) -> np.ndarray:
    """One document's tokens as peers make them: a list, an array of it, two checks, and the narrow array."""
    wide = np.array([END_OF_TEXT, *encode(text)])
    assert (0 <= wide).all() and (wide < 2**16).all()
    return wide.astype(np.uint16)


def plain(paths: list[Path], out_dir: Path, shard_size: int, workers: int) -> None:
    """A pool of processes that takes and returns one document at a time, and np.save for each shard."""
    shard, filled, number = np.empty(shard_size, dtype=np.uint16), 0, 0
    out_dir.mkdir()
    with multiprocessing.Pool(workers) as pool:
        for tokens in pool.imap(plain_encode, plain_documents(paths)):
            while filled + len(tokens) > shard_size:
                room = shard_size - filled
                shard[filled:] = tokens[:room]
                tokens = tokens[room:]
                np.save(out_dir / shard_name(number), shard)
                filled, number = 0, number + 1
            shard[filled : filled + len(tokens)] = tokens
            filled += len(tokens)
    np.save(out_dir / shard_name(number), shard[:filled])


def build(way: str, paths: list[Path], out_dir: Path, shard_size: int, workers: int) -> None:
    """Build the shards one way, in this process."""
    if way == "plain":
        return plain(paths, out_dir, shard_size, workers)
    names = tuple(str(path) for path in paths)
    config = fineweb.FinewebConfig(
        input=names, out_dir=str(out_dir), shard_size=shard_size, encoder=way, workers=workers
    )
    fineweb.build(config)


def memory(process: psutil.Process) -> int:
    """Bytes that a process and all that it has started hold now."""
    total = 0
    for member in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += member.memory_info().rss
    return total


def measure(way: str, paths: list[Path], out_dir: Path, shard_size: int, workers: int) -> dict[str, Any]:
    """Build the shards one way in a new process; returns its figures, and the shards' hashes."""
    spawn = multiprocessing.get_context("spawn")
    process = spawn.Process(target=build, args=(way, paths, out_dir, shard_size, workers))
    began, peak = time.perf_counter(), 0
    process.start()
    with contextlib.suppress(psutil.NoSuchProcess):
        while process.exitcode is None:
            peak = max(peak, memory(psutil.Process(process.pid)))
            process.join(0.05)
    process.join()
    seconds = time.perf_counter() - began
    if process.exitcode:
        raise SystemExit(process.exitcode)
    shards = [out_dir / name for name in list_shards(out_dir)]
    tokens = sum(len(open_shard(path)) for path in shards)
    hashes = [sha256(path) for path in shards]
    shutil.rmtree(out_dir)
    rate = tokens / seconds
    figures = {"workers": workers, "seconds": seconds, "tokens": tokens, "peak_memory_bytes": peak}
    return figures | {"tokens_per_second": rate, "hashes": hashes}


def repeat_files(paths: list[Path], directory: Path, repeat: int) -> list[Path]:
    """Links to the files, the whole set `repeat` times over."""
    links = []
    for turn, path in itertools.product(range(repeat), paths):
        links.append(directory / f"{turn:04d}_{path.name}")
        links[-1].symlink_to(path.resolve())
    return links


def compare(config: BenchmarkConfig) -> None:
    """Build the shards each way, print a row for each, and end with one JSON line of all figures."""
    check_settings(config)
    if not config.input:
        raise UsageError("--input is missing: give parquet files")
    paths = [Path(name) for name in fineweb.list_local(config.input)]
    size = config.repeat * sum(len(text.encode()) for text in plain_documents(paths))
    cores = os.cpu_count() or 1
    ways = {"plain": cores // 2 or 1, "tiktoken_1": 1, "tiktoken": config.workers, "gigatoken": config.workers}
    results: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as directory:
        links = repeat_files(paths, Path(directory), config.repeat)
        for name, workers in ways.items():
            result = measure(name.split("_")[0], links, Path(directory) / name, config.shard_size, workers)
            results[name] = result
            result["bytes_per_second"] = size / result["seconds"]
            result["ratio"] = result["tokens_per_second"] / results["plain"]["tokens_per_second"]
            print_row(name, result)
    hashes = [result.pop("hashes") for result in results.values()]
    if any(shards != hashes[0] for shards in hashes):
        raise DataError("the ways did not write the same shards")
    versions = {name: importlib.metadata.version(name) for name in ("numpy", "pyarrow", "tiktoken", "gigatoken")}
    settings = {"cores": cores, "python": platform.python_version(), "versions": versions, "repeat": config.repeat}
    print(json.dumps(settings | {"ways": results}))


def print_row(name: str, result: dict[str, Any]) -> None:
    print(
        f"{name:12s} {result['workers']} worker(s) {result['seconds']:8.2f} s "
        f"{result['tokens_per_second']:14,.0f} tokens/s {result['bytes_per_second'] / 1e6:8.1f} MB/s "
        f"{result['peak_memory_bytes'] / 2**20:8.0f} MiB {result['ratio']:6.2f} times plain",
        flush=True,
    )


if __name__ == "__main__":
    run(lambda: compare(parse_flags(BenchmarkConfig, None, __doc__)))
