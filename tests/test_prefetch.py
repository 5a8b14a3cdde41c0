"""A thread prepares items ahead, in order, and ends with whoever uses them."""

import threading
import time

import pytest

from common.prefetch import prefetch


def test_prefetch_keeps_the_order_makes_few_items_ahead_and_passes_errors_on():
    made = []

    def items():
        for number in range(5):
            made.append(number)
            yield number
        raise ZeroDivisionError

    received = []
    with pytest.raises(ZeroDivisionError):
        for number in prefetch(items(), 2):
            received.append(number)
            time.sleep(0.05)
            assert len(made) <= number + 3  # this one, and two more
    assert received == [0, 1, 2, 3, 4]


def test_prefetch_leaves_no_thread_behind_when_it_is_no_longer_asked():
    before = threading.active_count()
    numbers = prefetch(iter(range(1000)), 2)
    assert next(numbers) == 0 and threading.active_count() == before + 1
    numbers.close()
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before
