"""What the scripts share: flags made from a dataclass, errors of one line, files that are whole or absent."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import difflib
import fcntl
import hashlib
import json
import os
import re
import sys
import threading
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

if typing.TYPE_CHECKING:
    import torch

Config = typing.TypeVar("Config")


class UsageError(ValueError):
    """A flag's value cannot be used: the script ends with status 2."""


class DataError(ValueError):
    """A file's content cannot be used: the script ends with status 1."""


required = dataclasses.MISSING


def flag(default: object, help: str, **metadata: object) -> typing.Any:
    """Declare a dataclass field that is also a flag; where the default is None, the help text says what follows.

    A default of `required` makes it one that must be given. In the metadata, `choices` are argparse's, and
    `least` is the smallest number allowed (0 unless it is given).
    """
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


@dataclasses.dataclass(frozen=True)
class Flags:
    """A script's settings; raises UsageError for a number that is less than its field's `least`, or beyond all use."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), field.metadata.get("least", 0)
            if isinstance(value, int | float) and not least <= value < 2**63:  # nan is refused too
                raise UsageError(f"--{field.name} must be a number from {least} on, not {value}")


def boolean(text: str) -> bool:
    """Read what people type after a switch, as in --compile=False."""
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return words[text.lower()]


def flag_options(field: dataclasses.Field, annotation: typing.Any) -> dict[str, typing.Any]:
    """Translate a dataclass field, such as `int | None`, into argparse's words."""
    kind = next((part for part in typing.get_args(annotation) if part is not type(None)), annotation)
    options = {"default": field.default, "choices": field.metadata.get("choices"), "type": kind}
    if typing.get_origin(annotation) is tuple:
        options.update(nargs="+", action="extend", default=None)
    elif kind is bool:
        options.update(nargs="?", const=True, type=boolean, metavar="true|false")
    shown = "" if field.default in (None, (), required) else f" (default: {field.default})"
    return options | {"help": (field.metadata["help"] + shown).replace("%", "%%")}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors take one line."""

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_flags(config_class: type[Config], argv: list[str] | None, description: str | None) -> Config:
    """Read the flags into the dataclass; an unknown or abbreviated one is an error that suggests the right one."""
    keep_lines = argparse.RawDescriptionHelpFormatter
    parser = Parser(usage="%(prog)s [flags]", description=description, formatter_class=keep_lines, allow_abbrev=False)
    annotations = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        parser.add_argument(f"--{field.name}", **flag_options(field, annotations[field.name]))
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        typed = unknown[0].split("=")[0].lstrip("-").replace("-", "_").lower()
        close = [name for name in annotations if name.startswith(typed)]
        close += difflib.get_close_matches(typed, annotations)
        hint = f"did you mean --{close[0]}?" if close else "--help lists the flags"
        parser.error(f"unknown argument {unknown[0]}: {hint}")
    for field in dataclasses.fields(config_class):
        if getattr(values, field.name) is required:
            parser.error(f"--{field.name} is required: {field.metadata['help']}")
    return config_class(**{name: value for name, value in vars(values).items() if value is not None})


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of that name, `auto` being a CUDA GPU, then Apple's MPS, then the CPU; each process its own GPU."""
    import torch  # here, because fineweb.py needs no torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, found in available.items() if found)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name} is not a device: choose auto, cpu, mps, cuda or cuda:N") from None
    if not available.get(device.type):
        raise UsageError(f"--device {name} is not available here: choose from {[k for k, v in available.items() if v]}")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", local_rank)
    last = max(device.index, int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1) if device.type == "cuda" else 0
    if device.type == "cuda" and last >= torch.cuda.device_count():
        raise UsageError(f"cuda:{last} does not exist: this machine has {torch.cuda.device_count()} GPUs")
    return device


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Let glibc, where it is the C library, keep freed memory for the next tensors.

    By default it gives large blocks back to the system, which has to clear each page that is asked for again. This
    cannot be undone: until it ends, the process holds the most memory that it needed at once.
    """
    c_library = ctypes.CDLL(None)
    if hasattr(c_library, "mallopt"):
        c_library.mallopt(M_MMAP_MAX, 0)  # no blocks of their own, which are given back one by one
        c_library.mallopt(M_TRIM_THRESHOLD, -1)  # never give back the heap's end


@contextlib.contextmanager
def naming_remedy(flag: str) -> Iterator[None]:
    """Turn torch's errors for a lack of memory into a MemoryError that names the flag to lower."""
    try:
        yield
    except RuntimeError as error:
        lacking = re.search("out of memory|ALLOC_FAILED|can't allocate memory", str(error), re.IGNORECASE)
        if lacking or type(error).__name__ == "OutOfMemoryError":
            reason = next(
                (line for line in str(error).splitlines() if lacking and lacking[0] in line), "no memory left"
            )
            raise MemoryError(f"out of memory: try a smaller {flag} ({reason})") from None
        raise


def progress_bar(shown: bool = True, **options: typing.Any) -> tqdm:
    """A bar, if standard error is a terminal, with a lock that ends with its process, as tqdm's own would not."""
    tqdm.set_lock(threading.RLock())
    return tqdm(disable=None if shown else True, **options)


def run(main: Callable[[], object]) -> typing.NoReturn:
    """Run a script's main; a user's mistake ends in one line.

    Where torchrun started several processes, a wrong flag is the same for all, so the first of a machine says it.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a character must not end a run
    rank, first = os.environ.get("RANK"), os.environ.get("LOCAL_RANK", "0") == "0"
    status, message = 0, ""
    try:
        main()
    except UsageError as error:
        status, message = 2, str(error) if first else ""
    except (DataError, OSError, MemoryError) as error:
        status, message = 1, str(error) if rank is None else f"{error} (rank {rank})"
    except KeyboardInterrupt:
        status, message = 130, "interrupted" if first else ""
    if message:
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    if rank is not None:  # a process group's threads may abort or hang an interpreter that ends in its own way
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def flush(path: Path) -> None:
    """Wait until a file's bytes, or a directory's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(directory: Path, wait: bool = True) -> Iterator[None]:
    """Hold a directory; the lock goes when its holder ends, however it ends.

    Where another process holds it, wait, saying so, or raise UsageError.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise UsageError(f"{directory} is in use by another process that runs now") from None
            print(f"waiting for another process that writes to {directory}", flush=True)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; what the block wrote there is flushed, then takes the name `path`."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: object) -> None:
    """Write a whole JSON file, or leave the one that was there."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
