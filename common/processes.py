"""The processes that train together: their places, what they agree upon, and how they end."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from common.device import choose_device
from common.script import DataError, UsageError

Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """The processes that train together, and this one's place among them; one process is a world of one."""

    rank: int
    size: int
    device: torch.device
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, the same on all; gloo adds what is on the CPU, NCCL what is on GPUs."""
        total = values.clone()
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def broadcast(self, number: int) -> int:
        """The main process's number, on all."""
        return int(self.sum(torch.tensor(number if self.is_main else 0)))

    def any_rank(self, condition: object) -> bool:
        """Whether the condition holds on one process or more, the same on all."""
        return bool(self.sum(torch.tensor(int(bool(condition)))))

    def agree(self, text: str) -> bool:
        """Whether all processes have the same text."""
        number = int(hashlib.sha256(text.encode()).hexdigest()[:14], 16)
        return not self.any_rank(number != self.broadcast(number))

    def barrier(self) -> None:
        self.any_rank(False)

    def on_main(self, work: Callable[[], Result]) -> Result | None:
        """Work on the main process alone, for which the others wait beyond --timeout, unless it hangs.

        It works in a thread, so that it can tell them twice a second that it is alive. Its result, or the error that
        it raises, is the main process's alone.
        """
        if self.size == 1:
            return work()
        future = ThreadPoolExecutor(1).submit(work) if self.is_main else None
        while not self.any_rank(future and future.done()):
            if future:
                wait([future], timeout=0.5)
        return future.result() if future else None

    def print(self, text: str) -> None:
        if self.is_main:
            print(text, flush=True)


@contextlib.contextmanager
def start_processes(device_name: str, timeout: int) -> Iterator[World]:
    """Join the processes that torchrun started, or be the only one; none waits for another longer than `timeout` s."""
    rank, size, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = choose_device(device_name, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32
    if size <= 1:
        yield World(0, 1, device)
        return
    if not all(os.environ.get(name) for name in ("RANK", "MASTER_ADDR", "MASTER_PORT")):
        raise UsageError("WORLD_SIZE is set, but not by torchrun: start several processes with torchrun")
    if device.type == "mps" or device_name.startswith("cuda:"):
        raise UsageError(f"--device {device_name} takes one process: choose cuda, or cpu")
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    limit = timedelta(seconds=timeout)
    startup = max(limit, timedelta(minutes=1))  # some processes take longer to start
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        store, *_ = next(dist.rendezvous("env://", timeout=startup))
        dist.init_process_group(backend, timeout=limit, store=store, rank=rank, world_size=size)
        yield World(rank, size, device, local_rank)
    except RuntimeError as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        if re.search("timed out|timeout|connect|peer", reason, re.IGNORECASE):
            lost = f"another process ended, or did not answer within --timeout {timeout} s"
            unset = size > local_size and not dist.is_initialized()
            remedy = "; GLOO_SOCKET_IFNAME may be needed (docs/operations.md)" if unset else ""
            raise DataError(f"{lost}: {reason}{remedy}") from None
        raise
    dist.destroy_process_group()  # not after an error: the others may wait in a collective, and torchrun ends them


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM, SIGINT and SIGUSR1 in a list, for the run to end after the step that is under way."""
    received: list[int] = []

    def receive(number: int, frame: object) -> None:
        received.append(number)
        if len(received) > 2:  # under torchrun, Ctrl-C comes twice
            raise KeyboardInterrupt

    before = {kind: signal.signal(kind, receive) for kind in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        yield received
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler or signal.SIG_DFL)  # None: one that Python has not set
