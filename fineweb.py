"""Text to shards: tokenize FineWeb-Edu, or text of your own, into .npy files of uint16 tokens.

    python fineweb.py                                     # FineWeb-Edu's sample of 10 billion tokens
    python fineweb.py --input 'books/*.parquet' --out books
    python fineweb.py --sample                            # Python's own documentation: small, no download

The first shard is for validation, the others for training. Every document is preceded by <|endoftext|> and runs on
across shards. Run again after an interruption, the same command goes on after the last complete shard.
"""

from __future__ import annotations

import ast
import glob
import itertools
import json
import math
import multiprocessing
import os
import platform
import random
import re
import signal
import sys
import sysconfig
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from common import DataError, Flags, UsageError, flag, locked, parse_flags, replacing, run, sha256, write_json
from tokenizer import END_OF_TEXT, N_TOKENS, encoding

DOCUMENTS_AT_ONCE = 256
SHARD_NAME = re.compile(r"edufineweb_(val|train)_(\d{6})\.npy")

Texts = list[str | None]


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
    workers: int | None = flag(None, "processes that encode (default: as many as there are processors)", least=1)

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


class Source(NamedTuple):
    """What identifies a source in the manifest, and how to open it: a function for each file, in a fixed order."""

    identity: dict[str, object]
    open: Callable[[], list[Callable[[], Iterable[Texts]]]]


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
    documents = [text for text in documents if text]
    random.Random(0).shuffle(documents)  # so that the val shard is like the others
    return Source({"sample": f"the documentation of Python {platform.python_version()}"}, lambda: [lambda: [documents]])


def docstrings(path: Path) -> str:
    """The docstrings of a module, its classes and its functions, in the order of the file."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, kinds)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return "\n\n".join(filter(None, map(ast.get_docstring, nodes)))


def local_source(config: FinewebConfig) -> Source:
    """The files that --input names, each once; a glob's in the order of their names."""
    found = [sorted(glob.glob(name, recursive=True)) if not Path(name).exists() else [name] for name in config.input]
    for name, names in zip(config.input, found, strict=True):
        if not names:
            raise UsageError(f"--input {name}: no such file")
    paths = list(dict.fromkeys(Path(name) for names in found for name in names))
    for path in paths:
        if path.suffix not in READERS or not path.is_file():
            raise UsageError(f"--input {path}: give files whose names end in {', '.join(READERS)}")
    identity = {"files": [[path.name, sha256(path)] for path in paths], "text_column": config.text_column}
    return Source(identity, lambda: [partial(READERS[path.suffix], path, config.text_column) for path in paths])


def hub_source(config: FinewebConfig) -> Source:
    """The train files of a data set on the Hub, each downloaded to the cache of `datasets` when its turn comes."""
    identity = {name: getattr(config, name) for name in ("dataset", "name", "revision", "text_column")}

    def attempt(what: str, step: Callable[[], Any]) -> Any:
        try:
            return step()
        except Exception as error:  # the libraries below promise no particular ones
            remedy = "run the same command again to go on from here, or give local files with --input"
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"cannot {what}: {reason}; {remedy}") from None

    def open_files() -> list[Callable[[], Iterable[Texts]]]:
        import datasets
        from huggingface_hub.utils import logging

        logging.set_verbosity_error()  # of its retries; `attempt` says what they come to
        listing = f"list --dataset {config.dataset} --name {config.name} at --revision {config.revision}"
        load = partial(datasets.load_dataset_builder, config.dataset, config.name, revision=config.revision)
        urls = (attempt(listing, load).config.data_files or {}).get("train")
        if not urls:
            raise DataError(f"--dataset {config.dataset} --name {config.name} has no files to train on")
        return [partial(read, url, datasets.DownloadManager()) for url in urls]

    def read(url: str, manager: Any) -> Iterable[Texts]:
        if Path(url).suffix not in READERS:
            raise DataError(f"{url}: this program reads {', '.join(READERS)}; convert it, and give it with --input")
        path = Path(attempt(f"download {url}", partial(manager.download, url)))
        return READERS[Path(url).suffix](path, config.text_column)

    return Source(identity, open_files)


def read_parquet(path: Path, column: str) -> Iterator[Texts]:
    """The texts of a parquet file, some rows at a time."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise DataError(f"{path} has no column {column!r}: choose --text_column from {file.schema_arrow.names}")
            for rows in file.iter_batches(DOCUMENTS_AT_ONCE, columns=[column]):
                yield checked(rows.column(0).to_pylist(), path, column)
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path} is not a whole parquet file ({error}): get it again") from None


def read_jsonl(path: Path, column: str) -> Iterator[Texts]:
    """The texts of a file with one JSON object a line; blank lines are passed over."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[column]
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise DataError(f"{path}, line {number}: no JSON object with the text {column!r} ({error})") from None
            yield checked([text], path, column)


def read_txt(path: Path, column: str) -> Iterator[Texts]:
    """A whole text file as one document."""
    try:
        yield [path.read_bytes().decode("utf-8-sig")]
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}): convert it first") from None


READERS = {".parquet": read_parquet, ".jsonl": read_jsonl, ".txt": read_txt}


def checked(texts: list[object], path: Path, column: str) -> Texts:
    """The texts as they are, once each is seen to be a string or null."""
    strange = next((text for text in texts if not isinstance(text, str | None)), None)
    if strange is not None:
        raise DataError(f"{path}: {column!r} holds {type(strange).__name__}, not text: choose another --text_column")
    return texts


# ---- tokens ----------------------------------------------------------------------------------------------------------


class Position(NamedTuple):
    """A place in a source: a file, a document of it (nulls not counted), a token (0 is its end-of-text token)."""

    file: int = 0
    document: int = 0
    token: int = 0


class Piece(NamedTuple):
    """The tokens of some documents of one file, and the place of the first; each begins with the only 50256 in it."""

    start: Position
    tokens: np.ndarray

    def position(self, index: int) -> Position:
        """Where in the source tokens[index] lies."""
        begins = np.flatnonzero(self.tokens[: index + 1] == END_OF_TEXT)
        return Position(self.start.file, self.start.document + len(begins) - 1, index - int(begins[-1]))


def read_batches(source: Source, start: Position) -> Iterator[tuple[Position, list[str]]]:
    """The source's documents from that of `start` on, in batches, with the place where each batch begins."""
    for file, read in list(enumerate(source.open()))[start.file :]:
        document = start.document if file == start.file else 0
        texts = (text for some in read() for text in some if text is not None)
        texts = itertools.islice(texts, document, None)
        while batch := list(itertools.islice(texts, DOCUMENTS_AT_ONCE)):
            yield Position(file, document), batch
            document += len(batch)


def encode_text(text: str) -> np.ndarray:
    """The same tokens as tiktoken's encode_ordinary, but faster."""
    try:
        return encoding().encode_to_numpy(text, disallowed_special=())  # <|endoftext|> in a text is ordinary text
    except UnicodeEncodeError:
        return np.array(encoding().encode_ordinary(text))  # which knows what to do with half a surrogate pair


def encode_batch(start: Position, texts: list[str]) -> Piece:
    """Encode documents, each after an end-of-text token; an empty one is that token alone."""
    tokens = np.concatenate([part for text in texts for part in ([END_OF_TEXT], encode_text(text))])
    return Piece(start, tokens.astype(np.uint16))


def encode_batches(batches: Iterator[tuple[Position, list[str]]], workers: int) -> Iterator[Piece]:
    """Encode batches in parallel processes, a few ahead, in order."""
    if workers == 1:
        yield from (encode_batch(*batch) for batch in batches)
        return
    spawn = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks
    ahead: deque[Future[Piece]] = deque()
    try:
        with ProcessPoolExecutor(workers, spawn, initializer=end_with_parent) as pool:
            for batch in batches:
                ahead.append(pool.submit(encode_batch, *batch))
                if len(ahead) > 2 * workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
    except BrokenProcessPool:
        raise DataError("a worker process was killed, perhaps for want of memory: try fewer --workers") from None


def end_with_parent() -> None:
    """Leave Ctrl-C to the parent process, and end when it is gone, however it ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def cut(
    pieces: Iterable[Piece], size: int, limit: float, skip: int, progress: Callable[[int], object]
) -> Iterator[tuple[np.ndarray, Position | None]]:
    """Cut the tokens, after the first `skip` and up to `limit` of them, into arrays of `size`, the last one shorter.

    With each comes the place of the token after it, None after the last. The array is filled anew for the next.
    """
    buffer, filled = np.empty(size, dtype=np.uint16), 0
    for piece in pieces:
        taken, end = skip, int(min(len(piece.tokens), skip + limit))
        limit, skip = limit - (end - taken), 0
        progress(end - taken)
        while taken < end:
            if filled == size:
                yield buffer, piece.position(taken)
                filled = 0
            count = min(size - filled, end - taken)
            buffer[filled : filled + count] = piece.tokens[taken : taken + count]
            filled, taken = filled + count, taken + count
        if not limit:
            break
    if filled:
        yield buffer[:filled], None


# ---- shards ----------------------------------------------------------------------------------------------------------


def shard_name(number: int) -> str:
    return f"edufineweb_{'train' if number else 'val'}_{number:06d}.npy"


def load_manifest(directory: Path) -> dict | None:
    """The manifest beside the shards, if there is one; raises DataError where it is damaged."""
    path = directory / "manifest.json"
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        begun = manifest["shards"][:-1] if manifest["complete"] else manifest["shards"]
        positions = [Position(**{name: int(number) for name, number in shard["next"].items()}) for shard in begun]
        for number, shard in enumerate(manifest["shards"]):
            whole = int(shard["tokens"]) > 0 and re.fullmatch("[0-9a-f]{64}", shard["sha256"])
            if shard["name"] != shard_name(number) or not whole or len(positions) < len(begun):
                raise ValueError(shard["name"])
        if manifest["complete"]:
            float(manifest["unigram_loss"]), int(manifest["tokens"]), int(manifest["documents"])
    except (ValueError, TypeError, KeyError, AttributeError):
        raise DataError(f"{path} is damaged: delete {directory} and build it again") from None
    return manifest


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
        raise DataError(f"{path} is not the file that manifest.json lists: delete {path.parent} and build it again")
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
        if not manifest["complete"]:
            write_shards(config, source, manifest)
        return manifest


def write_shards(config: FinewebConfig, source: Source, manifest: dict) -> None:
    """Write the shards that the manifest lacks, and bring it up to date after each."""
    directory, size, shards = config.directory, config.tokens_per_shard, manifest["shards"]
    write_json(directory / "manifest.json", manifest)  # a shard without one would be taken for somebody else's
    counts = [count_tokens(read_shard(directory / shard["name"], shard)) for shard in shards]
    done = sum(shard["tokens"] for shard in shards)
    limit = config.max_tokens - done if config.max_tokens else math.inf
    start = Position(**shards[-1]["next"]) if shards else Position()
    pieces = encode_batches(read_batches(source, start), config.workers or os.cpu_count() or 1)
    with tqdm(total=config.max_tokens, initial=done, unit=" tokens", unit_scale=True, disable=None) as bar:
        for tokens, following in cut(pieces, size, limit, start.token, bar.update):
            if not shards and len(tokens) == 1 and following is None:
                break  # an empty document
            if not shards and following is None:
                raise UsageError(f"--shard_size {size} takes all {len(tokens)} tokens into one shard: choose a smaller")
            counts.append(count_tokens(tokens))
            shards.append(write_shard(directory, len(shards), tokens, following))
            if following is None:
                manifest.update(summary(counts), complete=True)
            write_json(directory / "manifest.json", manifest)
    if not manifest["complete"]:
        raise DataError("the source holds no text")


def main(argv: list[str] | None = None) -> None:
    config = parse_flags(FinewebConfig, argv, __doc__)
    manifest = build(config)
    print(
        f"{config.directory}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens, "
        f"{len(manifest['shards'])} shards; unigram loss {manifest['unigram_loss']:.4f}"
    )


if __name__ == "__main__":
    run(main)
