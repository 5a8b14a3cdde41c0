"""Text to shards, three ways: how peers do it, with tiktoken, and with gigatoken; as ratios in one run.

    python benchmarks/tokenize.py --input 'texts/*.parquet'

Each way runs in a process of its own, and is timed from that process's start to its end, with all shards on disk. The
files are read --repeat times over, so that a few of them show what a long run does, and not only how it starts.
"""

from __future__ import annotations

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:1] = [ROOT]  # not this folder, where this file would be taken for the standard library's tokenize

import contextlib
import importlib.metadata
import itertools
import json
import multiprocessing
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

import fineweb
import tokenizer
from common import DataError, Flags, flag, parse_flags, required, run, sha256


@dataclass(frozen=True)
class BenchmarkConfig(Flags):
    input: tuple[str, ...] = flag(required, "parquet files: paths or globs")
    repeat: int = flag(24, "times to read the files", least=1)
    shard_size: int = flag(10_000_000, "tokens in a shard", least=1)
    workers: int = flag(os.cpu_count() or 1, "tiktoken's processes, and gigatoken's threads", least=1)


def plain_documents(paths: list[Path]) -> Iterator[str]:
    from pyarrow import parquet

    for path in paths:
        with parquet.ParquetFile(path) as file:
            for rows in file.iter_batches(columns=["text"]):
                yield from rows.column(0).to_pylist()


def plain_encode(text: str) -> np.ndarray:
    """One document's tokens as peers make them: a list, an array of it, two checks, and the narrow array."""
    tokens = [tokenizer.END_OF_TEXT]
    tokens.extend(tokenizer.encoding().encode_ordinary(text))
    wide = np.array(tokens)
    assert (0 <= wide).all() and (wide < 2**16).all()
    return wide.astype(np.uint16)


def plain(paths: list[Path], out: Path, shard_size: int, workers: int) -> None:
    """A pool that takes and gives back one document at a time, and np.save for each shard."""
    shard, filled, number = np.empty(shard_size, dtype=np.uint16), 0, 0
    out.mkdir()
    with multiprocessing.Pool(workers) as pool:
        for tokens in pool.imap(plain_encode, plain_documents(paths)):
            while filled + len(tokens) > shard_size:
                room = shard_size - filled
                shard[filled:], tokens = tokens[:room], tokens[room:]
                np.save(out / fineweb.shard_name(number), shard)
                filled, number = 0, number + 1
            shard[filled : filled + len(tokens)] = tokens
            filled += len(tokens)
    np.save(out / fineweb.shard_name(number), shard[:filled])


def work(way: str, paths: list[Path], out: Path, shard_size: int, workers: int) -> None:
    """Do one way, in this process."""
    if way == "plain":
        plain(paths, out, shard_size, workers)
    else:
        settings = {"input": tuple(map(str, paths)), "out": str(out), "shard_size": shard_size}
        fineweb.build(fineweb.FinewebConfig(**settings, encoder=way, workers=workers))


def memory(process: psutil.Process) -> int:
    """Bytes that a process and all that it has started hold now."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += one.memory_info().rss
    return total


def measure(way: str, paths: list[Path], out: Path, shard_size: int, workers: int) -> dict:
    """Do one way in a new process; returns its figures, and its shards' hashes."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=(way, paths, out, shard_size, workers))
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
    shards = sorted(out.glob("*.npy"), key=lambda path: path.name[-10:])
    tokens, hashes = sum(len(np.load(shard, mmap_mode="r")) for shard in shards), [sha256(shard) for shard in shards]
    shutil.rmtree(out)
    return {"workers": workers, "seconds": seconds, "tokens": tokens, "peak_memory_bytes": peak, "hashes": hashes}


def compare(config: BenchmarkConfig) -> None:
    """Do all ways, print a row for each, and end with one JSON line of all figures."""
    source = fineweb.local_paths(config.input)
    size, cores = sum(len(text.encode()) for text in plain_documents(source)), os.cpu_count() or 1
    ways = {"plain": cores // 2 or 1, "tiktoken_1": 1, "tiktoken": config.workers, "gigatoken": config.workers}
    results: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as directory:
        paths = []
        for turn, path in itertools.product(range(config.repeat), source):
            paths.append(Path(directory) / f"{turn:04d}_{path.name}")
            paths[-1].symlink_to(path.resolve())
        for name, workers in ways.items():
            result = measure(name.split("_")[0], paths, Path(directory) / name, config.shard_size, workers)
            rate = result["tokens"] / result["seconds"]
            result["tokens_per_second"], result["bytes_per_second"] = rate, config.repeat * size / result["seconds"]
            results[name] = result
            result["ratio"] = rate / results["plain"]["tokens_per_second"]
            print(
                f"{name:12s} {workers} worker(s) {result['seconds']:8.2f} s {rate:14,.0f} tokens/s "
                f"{result['bytes_per_second'] / 1e6:8.1f} MB/s {result['peak_memory_bytes'] / 2**20:8.0f} MiB "
                f"{result['ratio']:6.2f} times plain",
                flush=True,
            )
    hashes = [result.pop("hashes") for result in results.values()]
    if any(some != hashes[0] for some in hashes):
        raise DataError("the ways did not write the same shards")
    versions = {name: importlib.metadata.version(name) for name in ("numpy", "pyarrow", "tiktoken", "gigatoken")}
    settings = {"cores": cores, "python": platform.python_version(), "versions": versions, "repeat": config.repeat}
    print(json.dumps(settings | {"ways": results}))


if __name__ == "__main__":
    run(lambda: compare(parse_flags(BenchmarkConfig, None, __doc__)))
