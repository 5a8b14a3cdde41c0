"""What every script does alike: flags from a dataclass, a user's mistake in one line, devices, progress bars."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import typeguard
import tyro
from tqdm import tqdm

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
        return tyro.cli(config_class, args=argv, use_underscores=True, add_help=False, return_unknown_args=True)[0]


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
        try:
            typeguard.check_type(value, hint)
        except typeguard.TypeCheckError:
            kind = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
            raise UsageError(f"--{name} {value!r} is not of type {kind}") from None


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
    except Exception:
        if rank is None:
            raise
        traceback.print_exc()
        status = 1
    sys.stdout.spare = sys.stderr.spare = True  # nothing that is left to print may change the status
    if message:
        print(f"{Path(sys.argv[0]).name}: error: {escape(message)}", file=sys.stderr)
    if rank is not None:  # a process group's threads may abort or hang an interpreter that exits as usual
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
