"""Shards to batches: the train shards as one stream of tokens, of which each process reads its part."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from common.processes import World
from common.shards import Shard

Array = TypeVar("Array", np.ndarray, Tensor)


@dataclass(frozen=True)
class Batch:
    """One process's part of a batch, and the position of the next batch."""

    micro_batches: Tensor  # (accumulation steps, B, T + 1)
    next_position: int
    digest: str | None  # of the whole batch, on the main process only


class Batches:
    """The train shards as one stream of tokens, in rows of block_size, each with one token more, its last label.

    A position counts tokens from the start of the first epoch; it is the whole state. The first epoch's rows come in
    order, the others' (with `shuffle` its own too) in a permutation drawn from the seed and the epoch. What an epoch
    has left after its last whole batch is passed over.
    """

    def __init__(self, shards: list[Shard], block_size: int, seed: int, shuffle: bool) -> None:
        self.shards, self.block_size, self.seed, self.shuffle = shards, block_size, seed, shuffle
        self.shard_starts = np.cumsum([0] + [len(shard) for shard in shards])
        self.rows = int(self.shard_starts[-1] - 1) // block_size  # in an epoch

    def read(self, position: int, batch_size: int, batch_tokens: Callable[[int], int], world: World) -> Iterator[Batch]:
        """This process's part of each batch from a position on, without end; that at p has `batch_tokens(p)` tokens."""
        while True:
            starts, position = self.row_starts(position, batch_tokens(position))
            if world.is_main:  # the log has the whole batch's hash
                batch = self.read_rows(starts)
                digest, rows = hashlib.sha256(batch).hexdigest()[:16], rank_slice(batch, batch_size, world)
            else:
                own = rank_slice(starts, batch_size, world)
                digest, rows = None, self.read_rows(own.flatten()).reshape(*own.shape, -1)
            yield Batch(torch.from_numpy(rows.astype(np.int64)), position, digest)

    def row_starts(self, position: int, tokens: int) -> tuple[np.ndarray, int]:
        """Where the rows of the batch of `tokens` tokens at a position start (N), and the position after it."""
        epoch, first = divmod(position // self.block_size, self.rows)
        count = tokens // self.block_size
        if first + count > self.rows:
            epoch, first = epoch + 1, 0
        numbers = np.arange(first, first + count)
        if epoch or self.shuffle:
            numbers = permutation(self.rows, self.seed, epoch)[numbers]
        return numbers * self.block_size, (epoch * self.rows + first + count) * self.block_size

    def read_rows(self, starts: np.ndarray) -> np.ndarray:
        """The rows (N, T + 1) that start at `starts` (N), of which neighbors are read together."""
        T = self.block_size
        stretches = np.split(starts, np.flatnonzero(np.diff(starts) != T) + 1)
        parts = [self.read_tokens(stretch[0], stretch[-1] + T + 1) for stretch in stretches]
        return np.concatenate([sliding_window_view(part, T + 1)[::T] for part in parts])

    def read_tokens(self, start: int, stop: int) -> np.ndarray:
        """The tokens from `start` to `stop` of the stream, from one shard or from several."""
        parts = []
        number = int(np.searchsorted(self.shard_starts, start, side="right")) - 1
        while start < stop:
            begin, end = self.shard_starts[number : number + 2]
            parts.append(self.shards[number].read(start - begin, min(stop, end) - begin))
            start, number = end, number + 1
        return np.concatenate(parts)


@functools.lru_cache(maxsize=1)
def permutation(rows: int, seed: int, epoch: int) -> np.ndarray:
    """The row numbers in an order that every process draws alike."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


def rank_slice(rows: Array, batch_size: int, world: World) -> Array:
    """This process's part (accumulation steps, B, ...) of what a batch has for each row (N, ...).

    Each accumulation step takes the next B rows for every rank in turn.
    """
    return rows.reshape(-1, world.size, batch_size, *rows.shape[1:])[:, world.rank]
