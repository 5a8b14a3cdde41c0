"""Items that a thread prepares while those before them are used."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")


def prefetch(items: Iterator[Item], count: int) -> Iterator[Item]:
    """Yield the items, of which a thread prepares up to `count` ahead.

    A consumer that stops early does not wait for the item in progress, which may be a long download.
    """
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()
    room = threading.Semaphore(count)
    closed = threading.Event()

    def produce() -> None:
        try:
            while room.acquire() and not closed.is_set():
                results.put(next(items))
        except BaseException as error:  # StopIteration after the last item
            results.put(error)

    threading.Thread(target=produce, daemon=True).start()
    try:
        while not isinstance(item := results.get(), BaseException):
            room.release()
            yield item
        if not isinstance(item, StopIteration):
            raise item
    finally:
        closed.set()
        room.release()
