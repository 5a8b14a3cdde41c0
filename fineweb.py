"""Text to shards: tokenize FineWeb-Edu, or text of your own, into .npy files of uint16 tokens.

    python fineweb.py                                     # FineWeb-Edu's sample of 10 billion tokens
    python fineweb.py --input 'books/*.parquet' --out_dir books
    python fineweb.py --sample                            # Python's own documentation: small, no download
    python fineweb.py --verify edu_fineweb10B             # read every shard again, against the manifest

The first shard is for validation, the others for training. Every document is preceded by <|endoftext|> and runs on
across shards. Run again after an interruption, the same command continues after the last complete shard.
"""

from __future__ import annotations

import ast
import glob
import importlib.util
import itertools
import json
import os
import platform
import random
import re
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from common import hub, shards
from common.files import lock, make_directory, sha256
from common.prefetch import prefetch
from common.script import DataError, Positive, UsageError, check_settings, escape, parse_flags, progress_bar, run
from common.tokenizer import END_OF_TEXT, VOCABULARY, encoding, utf8

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
FINEWEB_EDU_REVISION = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"
DOWNLOADS = ".downloads"
BATCH_BYTES = 1 << 25
RELOAD_EVERY = 256  # batches; gigatoken remembers every word that it has seen, so it is loaded anew now and then
WHITE_BLOCK = 250_000  # characters; tiktoken fails at a million of white space in a row, which fill at least one block


@dataclass(frozen=True)
class FinewebConfig:
    dataset: str = FINEWEB_EDU  # data set on the Hugging Face Hub
    name: str = "sample-10BT"  # the data set's configuration
    revision: str = FINEWEB_EDU_REVISION  # the data set's commit, of 40 hexadecimal digits
    input: tuple[str, ...] | None = None  # local files instead: paths or globs of .parquet, .jsonl, .txt (one document)
    sample: bool = False  # the documentation that comes with Python instead
    text_column: str = "text"  # the column, or JSON key, that holds the text
    out_dir: str | None = None  # directory of the shards: edu_fineweb10B unless given, or sample_shards with --sample
    shard_size: Positive[int | None] = None  # tokens in a shard: 100,000,000 unless given, or 65,536 with --sample
    max_tokens: Positive[int | None] = None  # stop after this many tokens, instead of at the end of the source
    encoder: Literal["auto", "gigatoken", "tiktoken"] = "auto"  # auto: gigatoken if it is installed
    workers: Positive[int | None] = None  # threads that encode: one for each processor unless given
    keep_downloads: bool = False  # leave what comes from the Hub in its own cache, for other programs
    verify: str | None = None  # only read this directory's shards again, against their manifest

    @property
    def directory(self) -> Path:
        return Path(self.out_dir or (shards.SAMPLE_DATA if self.sample else shards.FULL_DATA))

    @property
    def tokens_per_shard(self) -> int:
        return self.shard_size or (65_536 if self.sample else 100_000_000)


def check_config(config: FinewebConfig) -> None:
    """Raise UsageError for settings that cannot be used."""
    check_settings(config)
    if config.sample and config.input:
        raise UsageError("--sample and --input are two sources: choose one")
    if not re.fullmatch("[0-9a-f]{40}", config.revision):
        raise UsageError(f"--revision {config.revision} is not a commit of 40 hexadecimal digits, which never changes")
    if config.dataset != FINEWEB_EDU and config.revision == FINEWEB_EDU_REVISION:
        raise UsageError(f"--dataset {config.dataset} needs its own --revision")
    if config.max_tokens and config.max_tokens <= config.tokens_per_shard:
        raise UsageError(f"--max_tokens {config.max_tokens} do not fill a second shard: choose a smaller --shard_size")


# ---- sources ---------------------------------------------------------------------------------------------------------


def source_identity(config: FinewebConfig) -> dict[str, object]:
    """What the manifest says of the source, so that no other is taken for it."""
    if config.sample:
        return {"sample": f"the documentation of Python {platform.python_version()}"}
    if config.input:
        hashes = [[Path(name).name, sha256(Path(name))] for name in config.input]
        return {"files": hashes, "text_column": config.text_column}
    return {key: getattr(config, key) for key in ("dataset", "name", "revision", "text_column")}


def list_files(config: FinewebConfig) -> list[str]:
    """The names of the source's files; the sample is read as if it were one."""
    if config.sample:
        return ["Python's documentation"]
    if config.input:
        return list(config.input)
    return hub.list_train_files(config.dataset, config.name, config.revision, tuple(READERS))


def download_dir(config: FinewebConfig) -> Path | None:
    """Where files of the Hub lie until their documents are in shards; None if there are none, or they are to stay."""
    return None if config.sample or config.input or config.keep_downloads else config.directory / DOWNLOADS


def read_file(config: FinewebConfig, name: str) -> Iterable[bytes]:
    """The documents of one of the source's files, in UTF-8, once it is here."""
    if config.sample:
        return sample_documents()
    path = Path(name) if config.input else hub.fetch_file(config.dataset, name, config.revision, download_dir(config))
    return READERS[path.suffix](path, config.text_column)


def sample_documents() -> list[bytes]:
    """The topics of Python's help() and the docstrings of its standard library, a document each, shuffled."""
    from pydoc_data.topics import topics

    library = Path(sysconfig.get_path("stdlib"))
    names = sorted(sys.stdlib_module_names)
    modules = [library / f"{name}.py" for name in names]
    for name in names:
        modules += sorted((library / name).rglob("*.py"))
    tests = {"test", "tests", "idle_test"}
    modules = [path for path in modules if path.is_file() and not tests & set(path.relative_to(library).parts)]
    texts = [topics[name] for name in sorted(topics)] + [docstrings(path) for path in modules]
    documents = [utf8(text) for text in texts if text]
    random.Random(0).shuffle(documents)  # so that the val shard is like the others
    return documents


def docstrings(path: Path) -> str:
    """The docstrings of a module, its classes and its functions, in the order of the file."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, kinds)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return "\n\n".join(filter(None, map(ast.get_docstring, nodes)))


def list_local(patterns: Iterable[str]) -> list[str]:
    """The files that --input names, each once; a glob's in the order of their names."""
    names: list[str] = []
    for pattern in patterns:
        matches = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise UsageError(f"--input {pattern}: no such file")
        names += [str(Path(match)) for match in matches]
    for name in names:
        if Path(name).suffix not in READERS or not Path(name).is_file():
            raise UsageError(f"--input {name} is not a file whose name ends in {', '.join(READERS)}")
    return list(dict.fromkeys(names))


# ---- files to documents ----------------------------------------------------------------------------------------------


def read_parquet(path: Path, column: str) -> Iterator[bytes]:
    """The texts of a column; nulls are passed over."""
    import pyarrow
    from pyarrow import parquet

    try:
        # without pre_buffer, pages are read as they are needed, and not a row group at once
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            check_column(path, column, file.schema_arrow)
            rows = file.iter_batches(64, columns=[column])
            yield from itertools.chain.from_iterable(map(row_texts, rows))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a whole parquet file ({error}): get it again") from None


def row_texts(rows: Any) -> list[bytes]:
    """The texts of some rows of one column; raises pyarrow's error where they are not UTF-8."""
    import pyarrow

    texts = rows.column(0).cast(pyarrow.large_string()).drop_null()
    texts.validate(full=True)
    return texts.cast(pyarrow.large_binary()).to_pylist()


def check_column(path: Path, column: str, schema: Any) -> None:
    """Raise DataError unless exactly one column has that name, and holds text."""
    count = schema.names.count(column)
    if count != 1:
        raise DataError(f"{path} has {count or 'no'} columns {column!r}: choose --text_column from {schema.names}")
    kind = str(schema.field(column).type)
    if not re.fullmatch(r"(dictionary<values=)?(large_)?(string|string_view|null)\b.*", kind):
        raise DataError(f"{path}: {column!r} holds {kind}, not text: choose another --text_column")


def read_jsonl(path: Path, column: str) -> Iterator[bytes]:
    """The texts of a file with one JSON object a line; blank lines and nulls are passed over."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            text = json_text(line, column, f"{path}, line {number}") if line.strip() else None
            if text is not None:
                yield utf8(text)


def json_text(line: bytes, column: str, place: str) -> str | None:
    """The text in one line of JSON; raises DataError, naming the place, where there is none."""
    try:
        text = json.loads(line)[column]
        if not isinstance(text, str | None):
            raise TypeError(f"it is of type {type(text).__name__}")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"{place}: no text {column!r} ({error}): mend it, or choose --text_column") from None
    return text


def read_txt(path: Path, column: str) -> Iterator[bytes]:
    """A text file as one document, with its line ends as they are, without a byte order mark."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason}): convert it first") from None
    yield text.encode()


READERS = {".parquet": read_parquet, ".jsonl": read_jsonl, ".txt": read_txt}


# ---- documents to tokens ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A place in a source: a file, a document of it (nulls not counted), a token (0 is its end-of-text token)."""

    file: int = 0
    document: int = 0
    token: int = 0


@dataclass(frozen=True)
class Documents:
    """Documents of one file, and the place of the first."""

    file_name: str
    start: Place
    texts: list[bytes]

    def name(self, index: int) -> str:
        return f"document {self.start.document + index} of {self.file_name}"


def read_documents(config: FinewebConfig, names: list[str], start: Place) -> Iterator[Documents]:
    """The documents from that of `start` on; while a file is read, the next one is downloaded."""
    files = ((number, read_file(config, names[number])) for number in range(start.file, len(names)))
    for number, documents in prefetch(files, 1):
        first = start.document if number == start.file else 0
        for batch in group_by_bytes(itertools.islice(documents, first, None)):
            yield Documents(names[number], Place(number, first), batch)
            first += len(batch)


def group_by_bytes(texts: Iterable[bytes]) -> Iterator[list[bytes]]:
    """The texts in lists of at least BATCH_BYTES, except the last."""
    batch, total = [], 0
    for text in texts:
        batch.append(text)
        total += len(text) + 1  # so that empty texts count too
        if total >= BATCH_BYTES:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def choose_encoder(config: FinewebConfig) -> str:
    """The encoder that `auto` stands for; raises UsageError if the one asked for is not installed."""
    installed = importlib.util.find_spec("gigatoken") is not None
    if config.encoder == "gigatoken" and not installed:
        raise UsageError("--encoder gigatoken is not installed: pip install -r requirements.txt, or choose tiktoken")
    return "gigatoken" if installed and config.encoder != "tiktoken" else "tiktoken"


def encode_batches(batches: Iterable[Documents], encoder: str, workers: int) -> Iterator[tuple[Place, np.ndarray]]:
    """Each batch's place and its tokens, in which each document follows an end-of-text token."""
    encode = encode_with_gigatoken if encoder == "gigatoken" else encode_with_tiktoken
    separator = np.array([END_OF_TEXT], dtype=np.uint16)
    for batch, documents in encode(batches, workers):
        pieces = [separator] * (2 * len(documents))
        pieces[1::2] = documents
        yield batch.start, np.concatenate(pieces, dtype=np.uint16, casting="unsafe")


def encode_with_tiktoken(batches: Iterable[Documents], workers: int) -> Iterator[tuple[Documents, list[np.ndarray]]]:
    """Each batch with the tokens of its documents, which threads encode: tiktoken releases Python's global lock."""
    with ThreadPoolExecutor(workers) as threads:
        for batch in batches:
            yield batch, list(threads.map(encode_text, itertools.repeat(batch), range(len(batch.texts))))


def encode_text(batch: Documents, index: int) -> np.ndarray:
    """The same tokens as tiktoken's encode_ordinary, but faster; raises DataError for a text that it cannot take."""
    try:
        return encoding().encode_to_numpy(batch.texts[index].decode(), disallowed_special=())
    except ValueError as error:
        remedy = "shorten its runs of white space"
        raise DataError(f"tiktoken cannot encode {batch.name(index)} ({error}): {remedy}") from None


def encode_with_gigatoken(batches: Iterable[Documents], workers: int) -> Iterator[tuple[Documents, list[np.ndarray]]]:
    """Each batch with the tokens of its documents, of which tiktoken checks some."""
    os.environ["RAYON_NUM_THREADS"] = str(workers)  # gigatoken reads it when it encodes for the first time
    for batch, encoded in prefetch(tokenize_with_gigatoken(batches), 1):
        tokens = np.asarray(encoded.content.data).astype(np.uint16)
        documents = np.split(tokens, np.asarray(encoded.offsets.data)[1:-1])
        check_tokens(batch, documents)
        yield batch, documents


def tokenize_with_gigatoken(batches: Iterable[Documents]) -> Iterator[tuple[Documents, Any]]:
    """Each batch with gigatoken's own result, made while the one before it is checked."""
    for number, batch in enumerate(batches):
        if number % RELOAD_EVERY == 0:
            tokenizer = load_gigatoken()
        yield batch, tokenizer.encode_batch(batch.texts).layout


def load_gigatoken() -> Any:
    """gigatoken with GPT-2's merges, and no special tokens: the characters `<|endoftext|>` in a text are ordinary."""
    from gigatoken import Tokenizer

    vocabulary = json.loads((VOCABULARY / "vocab.json").read_text(encoding="utf-8"))
    words = {word: token for word, token in vocabulary.items() if token != END_OF_TEXT}
    merges = (VOCABULARY / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    settings = {
        "model": {"type": "BPE", "vocab": words, "merges": merges},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "decoder": {"type": "ByteLevel"},
    }
    return Tokenizer.from_json(json.dumps(settings))


def check_tokens(batch: Documents, documents: list[np.ndarray]) -> None:
    """Raise DataError unless tiktoken agrees on the longest text, a few others, and all with long white space."""
    texts = batch.texts
    longest = max(range(len(texts)), key=lambda index: len(texts[index]))
    unusual = [index for index, text in enumerate(texts) if has_long_white_space(text)]
    for index in sorted({longest, *unusual, *range(0, len(texts), len(texts) // 4 + 1)}):
        if not np.array_equal(documents[index], encode_text(batch, index)):
            raise DataError(f"gigatoken and tiktoken differ on {batch.name(index)}: add --encoder tiktoken")


def has_long_white_space(text: bytes) -> bool:
    """Whether a whole block of the text is white space, as in every text that tiktoken cannot take."""
    if len(text) < WHITE_BLOCK:
        return False
    characters = text.decode()
    blocks = (characters[start : start + WHITE_BLOCK] for start in range(0, len(characters), WHITE_BLOCK))
    return any(block.isspace() for block in blocks)


# ---- tokens to shards ------------------------------------------------------------------------------------------------


def pack_shards(
    batches: Iterable[tuple[Place, np.ndarray]], size: int, skip: int, limit: int, progress: Callable[[int], object]
) -> Iterator[tuple[np.ndarray, Place | None]]:
    """Pack the tokens after the first `skip`, up to `limit` of them, into arrays of `size`, the last one shorter.

    With each comes the place of the token after it, None after the last.
    """
    shard, filled = np.empty(size, dtype=np.uint16), 0
    for start, tokens in batches:
        at, end, skip = skip, min(len(tokens), skip + limit), 0
        limit -= end - at
        progress(end - at)
        while at < end:
            if filled == size:
                yield shard, place_of(at, start, tokens)
                shard, filled = np.empty(size, dtype=np.uint16), 0
            count = min(size - filled, end - at)
            shard[filled : filled + count] = tokens[at : at + count]
            filled, at = filled + count, at + count
        if not limit:
            break
    if filled:
        yield shard[:filled], None


def place_of(index: int, start: Place, tokens: np.ndarray) -> Place:
    """The place of tokens[index], in a batch that begins at `start`."""
    documents = np.flatnonzero(tokens[: index + 1] == END_OF_TEXT)
    return Place(start.file, start.document + len(documents) - 1, index - int(documents[-1]))


def build(config: FinewebConfig) -> dict:
    """Write the shards and their manifest, from where an interrupted run left off; returns the manifest."""
    check_config(config)
    if config.input:
        config = replace(config, input=tuple(list_local(config.input)))
    identity = source_identity(config)
    make_directory(config.directory)
    try:
        with lock(config.directory / ".lock"):
            manifest = open_manifest(config, identity)
            if not manifest["complete"]:
                write_shards(config, manifest)
            if not config.input:  # which may lie there
                shutil.rmtree(config.directory / DOWNLOADS, ignore_errors=True)
    except OSError as error:
        remedy = "finished shards are intact; fix the cause, and run the same command again"
        raise DataError(f"cannot build {config.directory} ({error}): {remedy}") from None
    return manifest


def open_manifest(config: FinewebConfig, identity: dict[str, object]) -> dict:
    """The manifest of an earlier run with the same settings, or one for a new run."""
    directory = config.directory
    settings = {"source": identity, "vocabulary": "gpt2"}
    settings |= {"shard_size": config.tokens_per_shard, "max_tokens": config.max_tokens}
    manifest = shards.load_manifest(directory)
    if manifest is None and shards.list_shards(directory):
        raise UsageError(f"--out_dir {directory} holds shards without a manifest.json: choose another directory")
    if manifest is None or not manifest["shards"]:
        return {**settings, "complete": False, "shards": []}
    for name, value in settings.items():
        if manifest.get(name) != value:
            begun = f"{directory} was begun with {name} {manifest.get(name)}, not {value}"
            raise UsageError(f"{begun}: delete it, or choose another directory with --out_dir")
    return manifest


def write_shards(config: FinewebConfig, manifest: dict) -> None:
    """Write the shards that the manifest lacks, and bring it up to date after each."""
    directory, entries = config.directory, manifest["shards"]
    shards.save_manifest(directory, manifest)  # a shard without one would be taken for somebody else's
    shards.verify(directory)
    written = [shards.open_shard(directory / entry["name"], entry["tokens"]) for entry in entries]
    counts = [shards.count_tokens(shard.read(0, shard.tokens)) for shard in written]
    names = list_files(config)
    if downloads := download_dir(config):
        for partial in downloads.rglob("*.incomplete"):  # left by a run that was killed; never continued
            partial.unlink(missing_ok=True)
    with progress_bar(total=config.max_tokens, unit=" tokens", unit_scale=True) as bar:
        bar.update(sum(entry["tokens"] for entry in entries))
        for tokens, following in make_shards(config, names, entries, bar.update):
            if following is None and not entries:
                raise UsageError(f"{len(tokens)} tokens fill no second shard: lower --shard_size, or give more text")
            counts.append(shards.count_tokens(tokens))
            entry = shards.write_shard(directory, len(entries), tokens)
            entries.append(entry | {"next": following and asdict(following)})
            if following is None:
                manifest.update(shards.summary(counts), complete=True)
            shards.save_manifest(directory, manifest)
            if following and downloads:
                for name in names[: following.file]:  # whose documents are in shards
                    (downloads / name).unlink(missing_ok=True)
    if not manifest["complete"]:
        raise DataError("the source holds no text")


def make_shards(
    config: FinewebConfig, names: list[str], written: list[dict], progress: Callable[[int], object]
) -> Iterator[tuple[np.ndarray, Place | None]]:
    """The shards after those that are written, read and encoded by threads while the caller writes; see pack_shards."""
    start = Place(**written[-1]["next"]) if written else Place()
    limit = (config.max_tokens or sys.maxsize) - sum(entry["tokens"] for entry in written)
    batches = prefetch(read_documents(config, names, start), 1)
    encoded = prefetch(encode_batches(batches, choose_encoder(config), config.workers or os.cpu_count() or 1), 8)
    return pack_shards(encoded, config.tokens_per_shard, start.token, limit, progress)


def main(argv: list[str] | None = None) -> None:
    config = parse_flags(FinewebConfig, argv, __doc__)
    check_config(config)
    if config.verify:
        directory, manifest = Path(config.verify), shards.verify(Path(config.verify))
        if not manifest["complete"]:
            raise DataError(f"{directory}: its shards are whole, but not complete: run the same command again")
    else:
        print(f"encoding with {choose_encoder(config)} (choose with --encoder)", flush=True)
        directory, manifest = config.directory, build(config)
    print(
        f"{escape(str(directory))}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens, "
        f"{len(manifest['shards'])} shards; unigram loss {manifest['unigram_loss']:.4f}"
    )


if __name__ == "__main__":
    run(main)
