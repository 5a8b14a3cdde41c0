"""Text to shards: tokenize FineWeb-Edu, or text of your own, into .npy files of uint16 tokens.

    python fineweb.py                                     # FineWeb-Edu's sample of 10 billion tokens
    python fineweb.py --input 'books/*.parquet' --out books
    python fineweb.py --sample                            # Python's own documentation: small, no download
    python fineweb.py --verify edu_fineweb10B             # read every shard again, against the manifest

The first shard is for validation, the others for training. Every document is preceded by <|endoftext|> and runs on
across shards. Run again after an interruption, the same command goes on after the last complete shard.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import glob
import hashlib
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import platform
import queue
import random
import re
import shutil
import signal
import sys
import sysconfig
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from tqdm import tqdm

from common import (
    DataError,
    Flags,
    UsageError,
    flag,
    locked,
    parse_flags,
    progress_bar,
    replacing,
    run,
    sha256,
    write_json,
)
from tokenizer import END_OF_TEXT, N_TOKENS, encoding

LONGEST_TEXT = 1 << 20  # bytes; longer documents are encoded in parts
# Up to the last space or line feed that follows neither white space nor what Unicode calls so: no token of GPT-2
# reaches across its beginning
LAST_BREAK = re.compile(
    rb".*[^\s\x1c-\x1f](?<!\xc2\x85|\xc2\xa0)(?<!\xe1\x9a\x80|\xe2\x80[\x80-\x8a\xa8\xa9\xaf]|\xe2\x81\x9f|\xe3\x80\x80)"
    rb"(?=[ \n])",
    re.DOTALL,
)
BATCH_BYTES = {"gigatoken": 1 << 25, "tiktoken": 1 << 20}
BATCHES_A_CACHE = 256  # gigatoken remembers every word that it has seen, so it is loaded anew now and then
SHARD_NAME = re.compile(r"edufineweb_(val|train)_(\d{6})\.npy")

Item = TypeVar("Item")
Document = bytes | Iterable[bytes] | None  # a text in UTF-8, its parts in order, or null


@dataclass(frozen=True)
class FinewebConfig(Flags):
    dataset: str = flag("HuggingFaceFW/fineweb-edu", "data set on the Hugging Face Hub")
    name: str = flag("sample-10BT", "the data set's configuration")
    revision: str = flag("87f09149ef4734204d70ed1d046ddc9ca3f2b8f9", "the data set's commit, of 40 hexadecimal digits")
    input: tuple[str, ...] = flag((), "local files instead: paths or globs of .parquet, .jsonl, .txt (one document)")
    sample: bool = flag(False, "the documentation that comes with Python instead")
    text_column: str = flag("text", "the column, or JSON key, that holds the text")
    out: str | None = flag(None, "directory of the shards (default: edu_fineweb10B, or sample_shards with --sample)")
    shard_size: int | None = flag(None, "tokens in a shard (default: 100000000, or 65536 with --sample)", least=1)
    max_tokens: int | None = flag(None, "stop after this many tokens (default: at the end of the source)", least=1)
    encoder: str = flag("auto", "auto: gigatoken if it is installed", choices=["auto", "gigatoken", "tiktoken"])
    workers: int | None = flag(None, "processes, or gigatoken's threads (default: one a processor)", least=1)
    keep_downloads: bool = flag(False, "leave what comes from the Hub in its own cache, for other programs")
    verify: str | None = flag(None, "only read this directory's shards again, against their manifest (default: build)")

    def __post_init__(self) -> None:
        if self.sample and self.input:
            raise UsageError("--sample and --input are two sources: choose one")
        if not re.fullmatch("[0-9a-f]{40}", self.revision):
            raise UsageError(
                f"--revision {self.revision} is not a commit of 40 hexadecimal digits, which never changes"
            )
        if self.dataset != FinewebConfig.dataset and self.revision == FinewebConfig.revision:
            raise UsageError(f"--dataset {self.dataset} needs its own --revision")
        if self.max_tokens and self.max_tokens <= self.tokens_per_shard:
            raise UsageError(f"--max_tokens {self.max_tokens} fill no second shard: choose a --shard_size below it")
        super().__post_init__()

    @property
    def directory(self) -> Path:
        return Path(self.out or ("sample_shards" if self.sample else "edu_fineweb10B"))

    @property
    def tokens_per_shard(self) -> int:
        return self.shard_size or (65_536 if self.sample else 100_000_000)


# ---- sources ---------------------------------------------------------------------------------------------------------


class File(NamedTuple):
    """A file of a source: what messages call it, and a function that reads its documents, some at a time."""

    name: str
    read: Callable[[], Iterable[list[Document]]]


class Source(NamedTuple):
    """What identifies a source in the manifest, how to list its files, and how to drop those before a number."""

    identity: dict[str, object]
    files: Callable[[], list[File]]
    drop: Callable[[float], object] = lambda before: None


def open_source(config: FinewebConfig) -> Source:
    """The source that the flags name."""
    if config.sample:
        return sample_source()
    return local_source(config) if config.input else hub_source(config)


def sample_source() -> Source:
    """The topics of Python's help() and the docstrings of its standard library, a document each, shuffled."""
    from pydoc_data.topics import topics

    library = Path(sysconfig.get_path("stdlib"))
    modules = [library / f"{name}.py" for name in sorted(sys.stdlib_module_names)]
    for name in sorted(sys.stdlib_module_names):
        modules += sorted((library / name).rglob("*.py"))
    tests = {"test", "tests", "idle_test"}
    modules = [path for path in modules if path.is_file() and not tests & set(path.relative_to(library).parts)]
    documents = [topics[name] for name in sorted(topics)] + [docstrings(path) for path in modules]
    documents = [utf8(text) for text in documents if text]
    random.Random(0).shuffle(documents)  # so that the val shard is like the others
    name = f"the documentation of Python {platform.python_version()}"
    return Source({"sample": name}, lambda: [File(name, lambda: [documents])])


def docstrings(path: Path) -> str:
    """The docstrings of a module, its classes and its functions, in the order of the file."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, kinds)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return "\n\n".join(filter(None, map(ast.get_docstring, nodes)))


def local_paths(names: tuple[str, ...]) -> list[Path]:
    """The files that --input names, each once; a glob's in the order of their names."""
    found = [sorted(glob.glob(name, recursive=True)) if not Path(name).exists() else [name] for name in names]
    for name, paths in zip(names, found, strict=True):
        if not paths:
            raise UsageError(f"--input {name}: no such file")
    paths = list(dict.fromkeys(Path(path) for paths in found for path in paths))
    for path in paths:
        if path.suffix not in READERS or not path.is_file():
            raise UsageError(f"--input {path}: give files whose names end in {', '.join(READERS)}")
    return paths


def local_source(config: FinewebConfig) -> Source:
    """The files that --input names."""
    paths = local_paths(config.input)
    with ThreadPoolExecutor() as threads:
        hashes = threads.map(sha256, paths)
    names = [path.name for path in paths]
    identity = {"files": [*map(list, zip(names, hashes, strict=True))], "text_column": config.text_column}
    files = [File(str(path), partial(READERS[path.suffix], path, config.text_column)) for path in paths]
    return Source(identity, lambda: files)


def hub_source(config: FinewebConfig) -> Source:
    """The train files of a data set on the Hub, each downloaded while the one before it is read."""
    identity = {name: getattr(config, name) for name in ("dataset", "name", "revision", "text_column")}
    cache = None if config.keep_downloads else config.directory / "downloads"
    downloads: dict[int, Apart] = {}
    finished = threading.Event()

    def list_files() -> list[File]:
        urls = Apart(list_urls, config, cache).result()
        return [File(url, partial(read, urls, number)) for number, url in enumerate(urls)]

    def read(urls: list[str], number: int) -> Iterable[list[Document]]:
        if finished.is_set():
            return []
        if number not in downloads:
            downloads[number] = Apart(download, urls[number], cache)
        path = downloads[number].result()
        if number + 1 < len(urls):
            downloads[number + 1] = Apart(download, urls[number + 1], cache)
        return READERS[path.suffix](path, config.text_column)

    def drop(before: float) -> None:
        done = [downloads.pop(number) for number in sorted(downloads) if number < before]
        if before == math.inf:  # all that is wanted is in shards; a download may be under way
            finished.set()
            for one in done:
                one.stop()
            shutil.rmtree(config.directory / "downloads", ignore_errors=True)
        elif cache:
            for path in [one.result() for one in done]:
                path.resolve().unlink(missing_ok=True)
                path.unlink(missing_ok=True)  # where the cache has links, it was one

    return Source(identity, list_files, drop)


class Apart:
    """Work in a process of its own; gigatoken and the Hub's library have hung together in one."""

    def __init__(self, work: Callable[..., object], *args: object) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.receiver, sender = spawn.Pipe(duplex=False)
        self.process = spawn.Process(target=send_result, args=(sender, work, args), daemon=True)
        self.process.start()
        sender.close()
        self.outcome: object = None

    def result(self) -> Any:
        """Wait for what the work returns; raises the DataError that it raised."""
        if self.outcome is None:
            try:
                self.outcome = self.receiver.recv()
            except EOFError:
                self.outcome = DataError("the process that downloads was killed: run the same command again")
        if isinstance(self.outcome, DataError):
            raise self.outcome
        return self.outcome

    def stop(self) -> None:
        self.process.kill()
        self.process.join()


def send_result(sender: Any, work: Callable[..., object], args: tuple) -> None:
    """Send what the work returns, or the DataError that it raises."""
    end_with_parent()
    try:
        sender.send(work(*args))
    except DataError as error:
        sender.send(error)


def end_with_parent() -> None:
    """Leave Ctrl-C to the parent process, and end when it is gone, however it ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def quiet_hub(cache: Path | None) -> None:
    """Make the Hub's library keep its files in `cache`, if one is given, and its retries to itself."""
    if cache:
        os.environ["HF_HUB_CACHE"] = str(cache.resolve())  # it is read when the library is imported
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()
    disable_progress_bars()
    tqdm.set_lock(threading.RLock())  # its own would outlive a process that is killed


def list_urls(config: FinewebConfig, cache: Path | None) -> list[str]:
    """The addresses of a data set's train files; raises DataError where they cannot be had, or not be read."""
    quiet_hub(cache)
    import datasets

    try:
        builder = datasets.load_dataset_builder(config.dataset, config.name, revision=config.revision)
    except Exception as error:  # the library promises no particular ones
        listing = f"list --dataset {config.dataset} --name {config.name} at --revision {config.revision}"
        raise hub_error(listing, error) from None
    urls = [str(url) for url in (builder.config.data_files or {}).get("train", [])]
    if not urls:
        raise DataError(f"--dataset {config.dataset} --name {config.name} has no files to train on")
    for url in urls:
        if Path(url).suffix not in READERS:
            raise DataError(f"{url}: this program reads {', '.join(READERS)}; convert it, and give it with --input")
    return urls


def download(url: str, cache: Path | None) -> Path:
    """Where a file of the Hub lies, once it is here and has the hash that the Hub lists; tries three times."""
    quiet_hub(cache)
    import datasets
    from huggingface_hub import HfFileSystem

    for pause in (1, 5, None):
        try:
            path = Path(datasets.DownloadManager().download(url))
            listed = HfFileSystem(endpoint=datasets.config.HF_ENDPOINT).info(url).get("lfs")
            if not listed or sha256(path) == listed["sha256"]:
                return path
            path.resolve().unlink()
            raise DataError("what came has not the hash that the Hub lists")
        except Exception as error:
            if pause is None:
                raise hub_error(f"download {url}", error) from None
        time.sleep(pause)


def hub_error(attempt: str, error: Exception) -> DataError:
    """What failed, and the remedy, in one line."""
    reason = " ".join(str(error).split()) or type(error).__name__
    remedy = "run the same command again to go on from here, or give local files with --input"
    return DataError(f"cannot {attempt}: {reason}; {remedy}")


def read_parquet(path: Path, column: str) -> Iterator[list[Document]]:
    """The texts of a parquet file, some rows at a time."""
    import pyarrow
    from pyarrow import parquet

    try:
        # without pre_buffer, pages are read as they are needed, and not a row group at once
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            if column not in file.schema_arrow.names:
                raise DataError(f"{path} has no column {column!r}: choose --text_column from {file.schema_arrow.names}")
            kind = file.schema_arrow.field(column).type
            if (kind.value_type if pyarrow.types.is_dictionary(kind) else kind) not in TEXT_TYPES:
                raise not_text(path, column, kind)
            for group in range(file.num_row_groups):
                size = rows_at_once(file.metadata.row_group(group), column)
                rows = file.iter_batches(size, row_groups=[group], columns=[column], use_threads=False)
                yield from map(row_texts, rows)  # and not a loop, whose variable would keep the rows before
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a whole parquet file ({error}): get it again") from None


def row_texts(rows: Any) -> list[Document]:
    """The texts of some rows that have one column; raises pyarrow's error where they are not UTF-8."""
    import pyarrow

    texts = rows.column(0).cast(pyarrow.large_string())
    texts.validate(full=True)
    return texts.cast(pyarrow.large_binary()).to_pylist()


def rows_at_once(group: Any, column: str) -> int:
    """How many rows of a parquet row group to read together: 64, or as many as come to 64 MiB of text."""
    columns = [group.column(number) for number in range(group.num_columns)]
    texts = next(some for some in columns if some.path_in_schema == column)
    longest = texts.total_uncompressed_size / max(1, group.num_rows)
    if texts.has_dictionary_page:  # any row may be as long as the whole dictionary
        share = (texts.data_page_offset - texts.dictionary_page_offset) / max(1, texts.total_compressed_size)
        longest = max(longest, share * texts.total_uncompressed_size)
    return max(1, min(64, int((64 << 20) / max(1, longest))))


def read_jsonl(path: Path, column: str) -> Iterator[list[Document]]:
    """The texts of a file with one JSON object a line; blank lines are passed over."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[column]
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise DataError(f"{path}, line {number}: no JSON object with the text {column!r} ({error})") from None
            if not isinstance(text, str | None):
                raise not_text(path, column, type(text).__name__)
            yield [None if text is None else utf8(text)]


def utf8(text: str) -> bytes:
    """The text's bytes; half a surrogate pair, which has none, is replaced as tiktoken's encode_ordinary does."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def read_txt(path: Path, column: str) -> Iterator[list[Document]]:
    """A whole text file as one document, in parts."""
    yield [text_parts(path)]


def text_parts(path: Path) -> Iterator[bytes]:
    """The text of a UTF-8 file, with its line ends as they are, without a byte order mark."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            while part := file.read(LONGEST_TEXT):
                yield part.encode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason}): convert it first") from None


READERS = {".parquet": read_parquet, ".jsonl": read_jsonl, ".txt": read_txt}
TEXT_TYPES = ("string", "large_string", "string_view", "null")


def not_text(path: Path, column: str, kind: object) -> DataError:
    return DataError(f"{path}: {column!r} holds {kind}, not text: choose another --text_column")


# ---- tokens ----------------------------------------------------------------------------------------------------------


class Position(NamedTuple):
    """A place in a source: a file, a document of it (nulls not counted), a token (0 is its end-of-text token)."""

    file: int = 0
    document: int = 0
    token: int = 0


class Batch(NamedTuple):
    """Texts of one file, the place of the first, and which of them begin a document and do not go on with one."""

    file_name: str
    start: Position
    texts: list[bytes]
    begins: list[bool]

    def name(self, index: int) -> str:
        """What messages call the document of texts[index]."""
        return f"document {self.start.document + sum(self.begins[1 : index + 1])} of {self.file_name}"


class Piece(NamedTuple):
    """The tokens of a batch, and its place; 50256 is only where a document begins."""

    start: Position
    tokens: np.ndarray

    def position(self, index: int, before: int) -> Position:
        """Where in the source tokens[index] lies, the first document having `before` tokens in earlier pieces."""
        begins = np.flatnonzero(self.tokens[: index + 1] == END_OF_TEXT)
        document = self.start.document + len(begins) - int(self.tokens[0] == END_OF_TEXT)
        return Position(self.start.file, document, index - int(begins[-1]) if len(begins) else before + index)


def read_batches(files: list[File], start: Position, size: int) -> Iterator[Batch]:
    """The documents from that of `start` on, in batches of at least `size` bytes."""
    for number, file in list(enumerate(files))[start.file :]:
        first = start.document if number == start.file else 0
        documents = (some for several in file.read() for some in several if some is not None)
        batch, held = Batch(file.name, Position(number, first), [], []), 0
        for text, begins in split_documents(itertools.islice(documents, first, None)):
            if held >= size:
                yield batch
                following = batch.start.document + sum(batch.begins[1:]) + begins
                batch, held = Batch(file.name, Position(number, following), [], []), 0
            batch.texts.append(text)
            batch.begins.append(begins)
            held += len(text) + 1
        if batch.texts:
            yield batch


def split_documents(documents: Iterable[Document]) -> Iterator[tuple[bytes, bool]]:
    """The documents, long ones in parts that encode to the same tokens; and of each text, whether it begins one."""
    for document in documents:
        if isinstance(document, bytes) and len(document) <= LONGEST_TEXT:
            yield document, True
        else:
            for number, text in enumerate(split_parts(parts_of(document))):
                yield text, number == 0


def parts_of(document: bytes | Iterable[bytes]) -> Iterator[bytes]:
    """The parts of a document, however it comes."""
    if not isinstance(document, bytes):
        yield from document
        return
    for at in range(0, len(document), LONGEST_TEXT):
        yield document[at : at + LONGEST_TEXT]


def split_parts(parts: Iterable[bytes]) -> Iterator[bytes]:
    """The same text, parted only where no token of GPT-2 reaches across."""
    held: list[bytes] = []
    seen = b""  # the end of what is held: a break may lie between it and the next part
    for part in parts:
        match = LAST_BREAK.match(seen + part)
        if match and match.end() >= len(seen):
            end = match.end() - len(seen)
            yield b"".join([*held, part[:end]])
            held, seen = [part[end:]], part[end:][-4:]
        else:
            held.append(part)
            seen = (seen + part)[-4:]
    yield b"".join(held)


def choose_encoder(config: FinewebConfig) -> str:
    """The encoder that `auto` stands for; raises UsageError where the one asked for is not installed."""
    installed = importlib.util.find_spec("gigatoken") is not None
    if config.encoder == "gigatoken" and not installed:
        raise UsageError("--encoder gigatoken is not installed: pip install -r requirements.txt, or choose tiktoken")
    return ("gigatoken" if installed else "tiktoken") if config.encoder == "auto" else config.encoder


def encode_batches(batches: Iterator[Batch], encoder: str, workers: int) -> Iterator[Piece]:
    """Encode the batches, in order, each document after an end-of-text token."""
    if encoder == "gigatoken":
        return encode_in_threads(batches, workers)
    return map(encode_batch, batches) if workers == 1 else encode_in_processes(batches, workers)


def encode_in_processes(batches: Iterator[Batch], workers: int) -> Iterator[Piece]:
    """Encode with tiktoken in parallel processes, a few batches ahead."""
    spawn = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks
    waiting: deque[Future[Piece]] = deque()
    try:
        with ProcessPoolExecutor(workers, spawn, initializer=end_with_parent) as pool:
            for batch in batches:
                waiting.append(pool.submit(encode_batch, batch))
                if len(waiting) > workers + 2:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    except BrokenProcessPool:
        raise DataError("a worker process was killed, perhaps for want of memory: try fewer --workers") from None


def encode_batch(batch: Batch) -> Piece:
    """Encode with tiktoken; an empty document is an end-of-text token alone."""
    parts = []
    for index, begins in enumerate(batch.begins):
        parts += ([END_OF_TEXT] if begins else []), encode_text(batch, index)
    return Piece(batch.start, np.concatenate(parts).astype(np.uint16))


def encode_text(batch: Batch, index: int) -> np.ndarray:
    """The same tokens as tiktoken's encode_ordinary, but faster; raises DataError for a text that it cannot take."""
    try:
        return encoding().encode_to_numpy(batch.texts[index].decode(), disallowed_special=())
    except ValueError as error:  # a very long run of white space
        raise DataError(f"tiktoken cannot encode {batch.name(index)}: {error}") from None


def encode_in_threads(batches: Iterator[Batch], workers: int) -> Iterator[Piece]:
    """Encode with gigatoken, whose own threads share a batch, and check some of it against tiktoken."""
    os.environ["RAYON_NUM_THREADS"] = str(workers)  # gigatoken reads it when it encodes for the first time
    for batch, encoded in ahead(encode_all(batches), 1):
        tokens, bounds = np.asarray(encoded.content.data).astype(np.uint16), np.asarray(encoded.offsets.data)
        check_tokens(batch, tokens, bounds)
        yield Piece(batch.start, np.insert(tokens, bounds[:-1][batch.begins], END_OF_TEXT))


def encode_all(batches: Iterator[Batch]) -> Iterator[tuple[Batch, Any]]:
    """Each batch with gigatoken's tokens of it."""
    for number, batch in enumerate(batches):
        if number % BATCHES_A_CACHE == 0:
            tokenizer = load_gigatoken()
        yield batch, tokenizer.encode_batch(batch.texts).layout


def load_gigatoken() -> Any:
    """gigatoken with GPT-2's ranks, and no special tokens: the characters `<|endoftext|>` in a text are ordinary."""
    from gigatoken import Tokenizer

    with tempfile.NamedTemporaryFile() as ranks:
        for rank in range(END_OF_TEXT):
            ranks.write(b"%s %d\n" % (base64.b64encode(encoding().decode_single_token_bytes(rank)), rank))
        ranks.flush()
        return Tokenizer.from_tiktoken(ranks.name, "gpt2", {})


def check_tokens(batch: Batch, tokens: np.ndarray, bounds: np.ndarray) -> None:
    """Raise DataError unless the longest text, and a few others, have the tokens that tiktoken gives them."""
    longest = max(range(len(batch.texts)), key=lambda index: len(batch.texts[index]))
    for index in {longest, *range(0, len(batch.texts), len(batch.texts) // 4 + 1)}:
        if not np.array_equal(tokens[bounds[index] : bounds[index + 1]], encode_text(batch, index)):
            raise DataError(f"gigatoken and tiktoken differ on {batch.name(index)}: add --encoder tiktoken")


class Ended(NamedTuple):
    """What comes after the last item."""

    error: BaseException | None


def ahead(items: Iterator[Item], count: int) -> Iterator[Item]:
    """The same items, up to `count` of them made by a thread before they are asked for.

    Who stops asking does not wait for the item that is under way, which may be a long download.
    """
    made: queue.Queue[Any] = queue.Queue(count)
    closed = threading.Event()

    def make() -> None:
        try:
            for item in items:
                made.put(item)
                if closed.is_set():
                    return
            made.put(Ended(None))
        except BaseException as error:
            made.put(Ended(error))

    threading.Thread(target=make, daemon=True).start()
    try:
        while not isinstance(item := made.get(), Ended):
            yield item
        if item.error:
            raise item.error
    finally:
        closed.set()
        with contextlib.suppress(queue.Empty):
            while True:  # so that the thread can put its last item, and see that it is closed
                made.get_nowait()


def cut(
    pieces: Iterable[Piece], size: int, limit: float, skip: int, progress: Callable[[int], object]
) -> Iterator[tuple[np.ndarray, Position | None]]:
    """Cut the tokens, after the first `skip` and up to `limit` of them, into arrays of `size`, the last one shorter.

    With each comes the place of the token after it, None after the last. The array is filled anew for the next.
    """
    buffer, filled, before = np.empty(size, dtype=np.uint16), 0, 0
    for piece in pieces:
        taken = min(skip, len(piece.tokens))
        end = int(min(len(piece.tokens), taken + limit))
        skip, limit = skip - taken, limit - (end - taken)
        progress(end - taken)
        while taken < end:
            if filled == size:
                yield buffer, piece.position(taken, before)
                filled = 0
            count = min(size - filled, end - taken)
            buffer[filled : filled + count] = piece.tokens[taken : taken + count]
            filled, taken = filled + count, taken + count
        before = piece.position(len(piece.tokens), before).token
        if not limit:
            break
    if filled:
        yield buffer[:filled], None


# ---- shards ----------------------------------------------------------------------------------------------------------


def shard_name(number: int) -> str:
    return f"edufineweb_{'train' if number else 'val'}_{number:06d}.npy"


def digest(manifest: dict) -> str:
    """What the manifest says of itself, so that a change by hand is seen."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def load_manifest(directory: Path) -> dict | None:
    """The manifest beside the shards, if there is one; raises DataError where it is not as it was written."""
    path = directory / "manifest.json"
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest.pop("sha256") != digest(manifest):
            raise ValueError("changed")
    except (ValueError, TypeError, KeyError, AttributeError):
        raise DataError(f"{path} was changed since it was written: restore it, or build {directory} again") from None
    return manifest


def save_manifest(directory: Path, manifest: dict) -> None:
    write_json(directory / "manifest.json", manifest | {"sha256": digest(manifest)})


def open_manifest(directory: Path, settings: dict) -> dict:
    """The manifest of an earlier run with the same settings, or one for a new run."""
    manifest = load_manifest(directory)
    if manifest is None and directory.exists() and any(SHARD_NAME.fullmatch(path.name) for path in directory.iterdir()):
        raise UsageError(f"--out {directory} holds shards without a manifest.json: choose another directory")
    if manifest is None or not manifest["shards"]:
        return {**settings, "complete": False, "shards": []}
    for name, value in settings.items():
        if manifest.get(name) != value:
            begun = f"{directory} was begun with {name} {manifest.get(name)}, not {value}"
            raise UsageError(f"{begun}: delete it, or choose another directory with --out")
    return manifest


def write_shard(directory: Path, number: int, tokens: np.ndarray, following: Position | None) -> dict[str, object]:
    """Write one shard; returns what the manifest says of it."""
    path = directory / shard_name(number)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.save(file, tokens)
    following = following and following._asdict()
    return {"name": path.name, "tokens": len(tokens), "sha256": sha256(path), "next": following}


def read_shard(path: Path, shard: dict) -> np.ndarray:
    """The tokens of a shard that the manifest lists; raises DataError if the file is not the one that was written."""
    if not path.exists() or sha256(path) != shard["sha256"]:
        raise DataError(f"{path} is not the file that manifest.json lists: restore it, or build {path.parent} again")
    return np.load(path)


def count_tokens(tokens: np.ndarray) -> np.ndarray:
    """How often each token occurs, counted in parts because bincount widens its input to 8 bytes an element."""
    return sum(np.bincount(part, minlength=N_TOKENS) for part in np.split(tokens, range(2**20, len(tokens), 2**20)))


def summary(counts: list[np.ndarray]) -> dict[str, object]:
    """What the manifest says of the whole, from each shard's token counts.

    The unigram loss is the cross-entropy, in nats, of the val tokens under the train tokens' frequencies, add-one
    smoothed: until the validation loss is below it, the model has learned nothing but which tokens occur.
    """
    val, train = counts[0], sum(counts[1:])
    surprise = -np.log((train + 1) / (train.sum() + N_TOKENS))
    return {
        "documents": int(val[END_OF_TEXT] + train[END_OF_TEXT]),
        "tokens": int(val.sum() + train.sum()),
        "unigram_loss": float((val * surprise).sum() / val.sum()),
    }


def build(config: FinewebConfig) -> dict:
    """Write the shards and their manifest, from where an interrupted run left off; returns the manifest.

    Raises UsageError for settings other than that run's or a source that fills no second shard, DataError for a source
    or a shard that cannot be read.
    """
    directory, source = config.directory, open_source(config)
    directory.mkdir(parents=True, exist_ok=True)
    with locked(directory):
        settings = {"source": source.identity, "vocabulary": "gpt2", "shard_size": config.tokens_per_shard}
        manifest = open_manifest(directory, settings | {"max_tokens": config.max_tokens})
        try:
            if not manifest["complete"]:
                write_shards(config, source, manifest)
        except OSError as error:
            remedy = "the shards so far are whole; mend that, and run the same command again"
            raise DataError(f"cannot write to {directory} ({error}): {remedy}") from None
        source.drop(math.inf)
        return manifest


def write_shards(config: FinewebConfig, source: Source, manifest: dict) -> None:
    """Write the shards that the manifest lacks, and bring it up to date after each."""
    directory, shards = config.directory, manifest["shards"]
    save_manifest(directory, manifest)  # a shard without one would be taken for somebody else's
    counts = [count_tokens(read_shard(directory / shard["name"], shard)) for shard in shards]
    done = sum(shard["tokens"] for shard in shards)
    start = Position(**shards[-1]["next"]) if shards else Position()
    with progress_bar(total=config.max_tokens, initial=done, unit=" tokens", unit_scale=True) as bar:
        for tokens, following in make_shards(config, source, start, done, bar.update):
            if not shards and len(tokens) == 1 and following is None:
                break  # an empty document
            if not shards and following is None:
                size = config.tokens_per_shard
                raise UsageError(f"--shard_size {size} takes all {len(tokens)} tokens into one shard: choose a smaller")
            counts.append(count_tokens(tokens))
            shards.append(write_shard(directory, len(shards), tokens, following))
            if following is None:
                manifest.update(summary(counts), complete=True)
            save_manifest(directory, manifest)
            source.drop(following.file if following else 0)
    if not manifest["complete"]:
        raise DataError("the source holds no text")


def make_shards(
    config: FinewebConfig, source: Source, start: Position, done: int, progress: Callable[[int], object]
) -> Iterator[tuple[np.ndarray, Position | None]]:
    """The shards' tokens from `start` on, read and encoded by threads while the caller writes; see `cut`."""
    encoder, workers = choose_encoder(config), config.workers or os.cpu_count() or 1
    limit = config.max_tokens - done if config.max_tokens else math.inf
    batches = ahead(read_batches(source.files(), start, BATCH_BYTES[encoder]), 1)
    pieces = ahead(encode_batches(batches, encoder, workers), 8)
    return cut(pieces, config.tokens_per_shard, limit, start.token, progress)


def verify(directory: Path) -> dict:
    """The manifest, once every shard is read again; raises DataError naming those that are not as they were written."""
    manifest = load_manifest(directory)
    if manifest is None:
        raise DataError(f"--verify {directory} holds no manifest.json: it is no directory that fineweb.py made")
    listed = {shard["name"]: shard["sha256"] for shard in manifest["shards"]}
    present = {path.name: path for path in directory.iterdir() if SHARD_NAME.fullmatch(path.name)}
    bar = progress_bar(iterable=listed, unit=" shards")
    wrong = [name for name in bar if name not in present or sha256(present[name]) != listed[name]]
    if manifest["complete"]:  # a run that was killed may have written a shard more
        wrong += sorted(present.keys() - listed.keys())
    if wrong:
        raise DataError(f"{directory}: not as manifest.json lists: {', '.join(wrong)}; restore, or build again")
    if not manifest["complete"]:
        raise DataError(f"{directory}: {len(listed)} shards are whole, but not complete: run the same command again")
    return manifest


def main(argv: list[str] | None = None) -> None:
    config = parse_flags(FinewebConfig, argv, __doc__)
    if config.verify:
        directory, manifest = Path(config.verify), verify(Path(config.verify))
    else:
        print(f"encoding with {choose_encoder(config)} (choose with --encoder)", flush=True)
        directory, manifest = config.directory, build(config)
    print(
        f"{directory}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens, "
        f"{len(manifest['shards'])} shards; unigram loss {manifest['unigram_loss']:.4f}"
    )


if __name__ == "__main__":
    run(main)
