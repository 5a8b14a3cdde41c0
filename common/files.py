"""Files that are whole or absent, their hashes, and locks."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
from collections.abc import Iterable, Iterator
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from common.script import DataError, UsageError, escape

MANIFEST = "MANIFEST.json"  # of a checkpoint: the SHA-256 of each of its files


def flush(path: Path) -> None:
    """Wait until a file's bytes, or a directory's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def existing_directory(path: str) -> Path:
    """The path, or the nearest directory above it that exists."""
    place = Path(path).absolute()
    return next(directory for directory in (place, *place.parents) if directory.exists())


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; what the block wrote there is flushed, then renamed to `path`."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: object) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_text(path: Path) -> str:
    """The text in a file; raises DataError, which names the file, where there is none."""
    try:
        if not path.is_file():  # a pipe or a device might never end
            raise ValueError("there is no such regular file")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def read_json(path: Path) -> dict:
    """The object in a JSON file; raises DataError, which names the file, where there is none."""
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} cannot be read: it holds no JSON object")
    return content


def first_difference(content: dict, expected: dict) -> str | None:
    """The first key whose value is not the expected one, with both values; None if there is no such key."""
    for key in expected | content:
        value, right = content.get(key, "missing"), expected.get(key, "nothing")
        if value != right:
            return f"{key!r} is {value}, expected {right}"
    return None


def sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def changed_files(directory: Path, names: Iterable[str]) -> list[str]:
    """Those of a checkpoint's files whose SHA-256 is not the one in its manifest; raises DataError without one."""
    manifest = read_json(directory / MANIFEST)
    return [name for name in names if not is_unchanged(directory / name, manifest.get(name))]


def is_unchanged(path: Path, digest: object) -> bool:
    return path.is_file() and sha256(path) == digest


@contextlib.contextmanager
def lock(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold the lock file `path`; the system releases it when the process ends, however that happens.

    If another process holds it, wait, with a notice, or raise UsageError; raises OSError where nothing can be locked.
    """
    file_lock = FileLock(path)
    try:
        file_lock.acquire(timeout=1)  # not 0: on a disk without locks, filelock takes over from a dead process by then
    except Timeout:
        if not wait:
            holder = " on ".join(path.read_text().split()[:2]) or "not known"
            # filelock turns into a SoftFileLock on a disk without locks, where the file may outlive its process
            remedy = f"; if that has ended, delete {path}" if isinstance(file_lock, SoftFileLock) else ""
            raise UsageError(f"{path.parent} is in use by another process ({holder}){remedy}") from None
        print(f"waiting for another process that writes to {escape(str(path.parent))}", flush=True)
        file_lock.acquire()
    except OSError as error:
        raise OSError(f"{path} cannot be locked, as on some network disks: {error.strerror}") from None
    try:
        with contextlib.suppress(OSError):  # a full disk, on which the holder cannot be named
            if not path.read_text():  # else filelock, where the disk has no locks, has written the same
                path.write_text(f"{os.getpid()}\n{platform.node()}\n")
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: filelock sees that, and locks a new file
        file_lock.release()


@contextlib.contextmanager
def claim(out_dir: Path) -> Iterator[None]:
    """Hold a run's directory for this process alone; one that was made for it and stays empty is removed."""
    is_new = not out_dir.exists()
    make_directory(out_dir)
    try:
        with lock(out_dir / ".lock", wait=False):
            yield
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # it is no longer empty
                out_dir.rmdir()


def make_directory(out_dir: Path) -> None:
    """Make the directory unless it is there; raises UsageError, which names the flag, if it cannot be."""
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out_dir {out_dir} cannot be a directory ({error.strerror}): choose another") from None
