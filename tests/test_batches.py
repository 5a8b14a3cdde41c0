"""Batches are the stream's next tokens, however they are divided among processes and micro-batches."""

import hashlib

import numpy as np
import pytest
import torch

from common.batches import Batches, permutation, rank_slice
from common.prefetch import prefetch
from common.processes import World
from common.script import DataError

CPU = torch.device("cpu")


class MemoryShard(list):
    """A shard's tokens, without a file; `reads` counts what was read."""

    reads = 0

    def read(self, start, stop):
        MemoryShard.reads += max(0, stop - start)
        return np.array(self[start:stop], dtype=np.uint16)


def stream(*lengths):
    """Shards of these lengths, whose tokens count up."""
    starts = np.cumsum([0, *lengths])
    return [MemoryShard(range(start, start + length)) for start, length in zip(starts, lengths, strict=False)]


def rows_at(batches, position, tokens):
    """The rows of the batch at a position, and the position after it."""
    starts, after = batches.row_starts(position, tokens)
    return batches.read_rows(starts).astype(int), after


@pytest.mark.parametrize("lengths", [(1000,), (1, 1, 7, 500, 491), (333, 333, 334), tuple([10] * 100)])
def test_an_epoch_is_the_stream_in_order_across_shards(lengths):
    batches, position, seen = Batches(stream(*lengths), block_size=8, seed=0, shuffle=False), 0, []
    for _ in range(999 // 32):
        rows, position = rows_at(batches, position, 32)
        assert rows.shape == (4, 9)
        assert np.array_equal(rows[:, 1:], rows[:, :-1] + 1)  # the labels are the next tokens
        seen += rows[:, :-1].flatten().tolist()
    assert seen == list(range(len(seen))) and position == len(seen)
    assert 999 - len(seen) < 32


@pytest.mark.parametrize("shuffle", [False, True])
def test_every_epoch_visits_each_row_once_and_later_ones_in_other_orders(shuffle):
    batches, position, epochs = Batches(stream(100, 157), block_size=8, seed=3, shuffle=shuffle), 0, []
    for epoch in range(3):
        starts = []
        while position < (epoch + 1) * 256:
            rows, position = rows_at(batches, position, 64)
            assert np.array_equal(rows, rows[:, :1] + np.arange(9))
            starts += rows[:, 0].tolist()
        epochs.append(starts)
    ordered = list(range(0, 256, 8))
    assert all(sorted(starts) == ordered for starts in epochs)
    assert (epochs[0] == ordered) != shuffle
    assert epochs[1] != ordered and epochs[1] != epochs[2] and epochs[0] != epochs[2]


def test_the_last_partial_batch_of_an_epoch_is_passed_over():
    batches = Batches(stream(257), block_size=8, seed=0, shuffle=False)  # 32 rows
    rows, position = rows_at(batches, 30 * 8, 32)  # 4 rows, where 2 are left
    assert position == 32 * 8 + 32
    expected, _ = rows_at(batches, 32 * 8, 32)
    assert np.array_equal(rows, expected)


def test_a_position_alone_determines_the_batch():
    first = Batches(stream(300, 300), block_size=8, seed=5, shuffle=True)
    for position in (0, 64, 512, 640, 64, 0):
        again = Batches(stream(300, 300), block_size=8, seed=5, shuffle=True)
        assert np.array_equal(rows_at(first, position, 64)[0], rows_at(again, position, 64)[0])
    other = Batches(stream(300, 300), block_size=8, seed=6, shuffle=True)
    assert not np.array_equal(rows_at(first, 0, 64)[0], rows_at(other, 0, 64)[0])


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("processes", "batch_size"), [(1, 1), (1, 24), (2, 3), (3, 4), (4, 6), (8, 1)])
def test_the_tokens_of_a_step_do_not_depend_on_processes_or_micro_batch(processes, batch_size, shuffle):
    batches = Batches(stream(250, 250), block_size=8, seed=0, shuffle=shuffle)
    expected, after = rows_at(batches, 0, 24 * 8)
    parts = [
        next(batches.read(0, batch_size, lambda position: 24 * 8, World(rank, processes, CPU)))
        for rank in range(processes)
    ]
    shape = (24 // batch_size // processes, batch_size, 9)
    assert {part.micro_batches.shape for part in parts} == {shape} and {part.next_position for part in parts} == {after}
    together = torch.stack([part.micro_batches for part in parts], dim=1).reshape(24, 9)  # step by step, rank by rank
    assert np.array_equal(together, expected)


def test_only_the_main_process_reads_and_hashes_the_whole_batch():
    shards = stream(2000)
    digests, tokens_read = [], []
    for rank in range(4):
        MemoryShard.reads = 0
        batch = next(Batches(shards, 8, seed=0, shuffle=False).read(0, 2, lambda position: 512, World(rank, 4, CPU)))
        digests.append(batch.digest)
        tokens_read.append(MemoryShard.reads)
    rows, _ = rows_at(Batches(shards, 8, seed=0, shuffle=False), 0, 512)
    assert digests == [hashlib.sha256(rows.astype(np.uint16)).hexdigest()[:16], None, None, None]
    assert tokens_read[0] == 513 and max(tokens_read[1:]) <= 8 * (2 * 8 + 1)


def test_batches_read_ahead_are_those_that_are_read_one_by_one():
    def size_at(position):  # a ramp
        return 64 if position < 500 else 128

    def read(position):
        return Batches(stream(300, 300), 8, seed=0, shuffle=True).read(position, 4, size_at, World(0, 1, CPU))

    position, ahead = 0, prefetch(read(0), 1)
    for _ in range(20):  # over several epochs
        batch, alone = next(ahead), next(read(position))
        assert torch.equal(batch.micro_batches, alone.micro_batches) and batch.digest == alone.digest
        position = batch.next_position
        assert position == alone.next_position
    ahead.close()


def test_an_error_of_reading_ahead_reaches_the_reader():
    class Damaged(MemoryShard):
        def read(self, start, stop):
            if stop > 400:
                raise DataError("a wrong token")
            return super().read(start, stop)

    batches = prefetch(
        Batches([Damaged(range(1000))], 8, 0, shuffle=False).read(0, 4, lambda p: 64, World(0, 1, CPU)), 1
    )
    read = [next(batches).next_position for _ in range(6)]
    assert read == [64, 128, 192, 256, 320, 384]
    with pytest.raises(DataError, match="a wrong token"):
        next(batches)


def test_processes_draw_the_same_permutation():
    first = permutation(1000, 7, 2)
    permutation.cache_clear()
    assert np.array_equal(first, permutation(1000, 7, 2)) and sorted(first) == list(range(1000))


def test_a_rank_gets_the_rows_of_its_turn_in_each_accumulation_step():
    assert rank_slice(np.arange(12), 2, World(1, 3, CPU)).tolist() == [[2, 3], [8, 9]]
