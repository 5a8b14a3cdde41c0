"""What every script does alike: flags from a dataclass, a user's mistake in one line, devices, progress bars."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import tyro
from tqdm import tqdm

if TYPE_CHECKING:  # fineweb.py needs no torch
    import torch

Value = TypeVar("Value")
Positive = Annotated[Value, "at least 1"]  # a setting's type, for check_settings


class UsageError(ValueError):
    """A setting cannot be used: the script ends with status 2."""


class DataError(ValueError):
    """A file's content cannot be used: the script ends with status 1."""


def parse_flags(
    config_class: type[Value], argv: list[str] | None, description: str | None, default: Value | None = None
) -> Value:
    """Read the flags into a dataclass, whose fields' comments are their help; exits with status 2 on a mistake."""
    with output_of_local_main():
        default = config_class() if default is None else default
        return tyro.cli(config_class, default=default, args=argv, description=description, use_underscores=True)


def parse_known_flags(config_class: type[Value], argv: list[str] | None) -> Value:
    """Parse only the known flags, leaving --help and the others to `parse_flags`."""
    with output_of_local_main():
        config, _ = tyro.cli(config_class, args=argv, use_underscores=True, add_help=False, return_unknown_args=True)
        return config


@contextlib.contextmanager
def output_of_local_main() -> Iterator[None]:
    """Leave it to a machine's first process to print what is the same for all that torchrun started."""
    if is_local_main():
        yield
        return
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def is_local_main() -> bool:
    """Whether this is a machine's first process, or its only one."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def marked_fields(config_class: type, mark: str) -> list[str]:
    """The names of the fields whose types are annotated with the mark."""
    hints = get_type_hints(config_class, include_extras=True)
    return [name for name, hint in hints.items() if mark in getattr(hint, "__metadata__", ())]


def check_settings(config: Any) -> None:
    """Raise UsageError for a value that its field's type excludes: tyro checks those of the command line alone.

    A number is at least 1 if it is Positive, else 0, and finite; a text is not empty; a Literal is one of its choices.
    """
    positive = marked_fields(type(config), "at least 1")
    for name, hint in get_type_hints(type(config)).items():
        value, least = getattr(config, name), 1 if name in positive else 0
        if isinstance(value, int | float) and not least <= value < 2**63:  # NaN is refused too
            raise UsageError(f"--{name} must be at least {least}, and finite, not {value}")
        if value in ("", ()) or (isinstance(value, tuple) and "" in value):
            raise UsageError(f"--{name} is empty")
        choices = [get_args(part) for part in (hint, *get_args(hint)) if get_origin(part) is Literal]
        if choices and value is not None and value not in choices[0]:
            raise UsageError(f"--{name} {value} is not one of {', '.join(choices[0])}")


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of that name; `auto` is a CUDA GPU, one for each process, else Apple's MPS, else the CPU."""
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in available if available[kind])
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name} is not a device: choose auto, cpu, mps, cuda or cuda:N") from None
    if not available.get(device.type):
        raise UsageError(f"--device {name} is not available here: choose from {[k for k in available if available[k]]}")
    if device.type != "cuda":
        return device
    if device.index is None:
        device = torch.device("cuda", local_rank)
    last = max(device.index, int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1)
    if last >= torch.cuda.device_count():
        raise UsageError(f"cuda:{last} does not exist: this machine has {torch.cuda.device_count()} GPUs")
    return device


# Dense bf16 (fp16 for the oldest) FLOP/s by the vendors' data sheets, found by a part of the device's name
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "RTX 4090": 165e12,
    "V100": 125e12,
}


def device_name(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_flops(device: torch.device) -> float | None:
    """The device's peak FLOP/s, None where it is not known."""
    return next((v for name, v in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", device_name(device))), None)


def keep_freed_memory() -> None:
    """Let glibc, where it is the C library, keep freed memory for the next tensors.

    By default it returns large blocks to the system, which has to clear each page that is asked for again: half of a
    CPU's training time over `transformers` was that. Until it ends, the process holds its peak memory.
    """
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
    c_library = ctypes.CDLL(None)
    if hasattr(c_library, "mallopt"):
        c_library.mallopt(M_MMAP_MAX, 0)
        c_library.mallopt(M_TRIM_THRESHOLD, -1)


@contextlib.contextmanager
def explain_out_of_memory(flag: str) -> Iterator[None]:
    """Turn torch's errors for a lack of memory into a MemoryError that names the flag to lower."""
    try:
        yield
    except RuntimeError as error:
        message = re.search(r".*(out of memory|ALLOC_FAILED|can't allocate memory).*", str(error), re.IGNORECASE)
        if message or type(error).__name__ == "OutOfMemoryError":
            reason = message[0].strip() if message else "no memory left"
            raise MemoryError(f"out of memory: try a smaller {flag} ({reason})") from None
        raise


def progress_bar(visible: bool = True, **options: Any) -> tqdm:
    """A bar, if standard error is a terminal."""
    tqdm.set_lock(threading.RLock())  # its default is a semaphore of the system, which outlives a killed process
    return tqdm(disable=None if visible else True, **options)


class Output:
    """Standard output or error; if it can be spared, what cannot be written is lost, and the script goes on."""

    def __init__(self, stream: Any, spare: bool) -> None:
        self.stream = stream or open(os.devnull, "w")  # None where it is closed, as by `>&-`
        self.stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a character must not end a run
        self.spare = spare

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self.attempt(self.stream.flush)

    def attempt(self, action: Callable[..., object], *args: str) -> None:
        try:
            action(*args)
        except OSError as error:
            if not self.spare:
                raise type(error)(f"the output cannot be written: {error}") from None


def escape(text: str) -> str:
    """The text on one line, without characters that a terminal would obey."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def run(main: Callable[[], object], spare_output: bool = False) -> NoReturn:
    """Run a script's main and exit; a user's mistake ends in one line, with status 2 (usage) or 1 (data)."""
    sys.stdout, sys.stderr = Output(sys.stdout, spare_output), Output(sys.stderr, spare_output)
    rank = os.environ.get("RANK")
    status, message = 0, ""
    try:
        main()
        sys.stdout.flush()
    except SystemExit as ended:  # tyro's, for --help or a mistake that it has printed
        status = ended.code
    except UsageError as error:
        status, message = 2, str(error) if is_local_main() else ""
    except BrokenPipeError:  # whoever read the output has seen enough, as in `sample.py | head`
        pass
    except (DataError, OSError, MemoryError) as error:
        status, message = 1, str(error) or type(error).__name__
        message += f" (rank {rank})" if rank else ""
    except KeyboardInterrupt:
        status, message = 130, "interrupted" if is_local_main() else ""
    sys.stdout.spare = sys.stderr.spare = True  # nothing that is left to print may change the status
    if message:
        print(f"{Path(sys.argv[0]).name}: error: {escape(message)}", file=sys.stderr)
    if rank is not None:  # a process group's threads may abort or hang an interpreter that exits as usual
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
