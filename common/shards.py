"""Shards: files of tokens, and the manifest beside them that lists their hashes and where they came from."""

from __future__ import annotations

import hashlib
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.files import atomic_write, is_unchanged, read_json, sha256, write_json
from common.script import DataError, progress_bar
from common.tokenizer import END_OF_TEXT, N_TOKENS

SHARD_NAME = re.compile(r"edufineweb_(val|train)_\d{6}\.npy")
HEADER_BYTES = 128
FULL_DATA, SAMPLE_DATA = "edu_fineweb10B", "sample_shards"  # the directories that are built by default


@dataclass(frozen=True)
class Shard:
    """One file of tokens, which is opened for each read: there may be more shards than a process may open files."""

    path: Path
    tokens: int

    def __len__(self) -> int:
        return self.tokens

    def read(self, start: int, stop: int) -> np.ndarray:
        """The uint16 tokens from `start` up to `stop`, or to the shard's end; raises DataError for a wrong one."""
        count = max(0, min(stop, self.tokens) - start)
        tokens = np.fromfile(self.path, "<u2", count, offset=HEADER_BYTES + 2 * start)
        if len(tokens) < count:
            raise DataError(f"{self.path} was shortened while it was in use: build it again")
        if count and tokens.max() >= N_TOKENS:
            raise DataError(f"{self.path} holds the token {tokens.max()}, which is out of vocabulary: build it again")
        return tokens


@dataclass(frozen=True)
class Shards:
    """A directory's shards; `identity` holds the name, tokens and SHA-256 (None without a manifest) of each."""

    val: Shard
    train: list[Shard]
    identity: list[list]
    unigram_loss: float | None
    source: dict | None


def shard_name(number: int) -> str:
    return f"edufineweb_{'train' if number else 'val'}_{number:06d}.npy"


def list_shards(directory: Path) -> list[str]:
    """The names of the shards that are there, by number."""
    names = [path.name for path in directory.glob("*.npy") if SHARD_NAME.fullmatch(path.name)]
    return sorted(names, key=lambda name: name[-10:])


def open_shards(directory: Path) -> Shards:
    """Open shards to train on; raises DataError if one is missing or is not what the manifest, if any, lists."""
    manifest = load_manifest(directory) or {}
    if not manifest.get("complete", True):
        raise DataError(f"the shards in --data_dir {directory} are not complete: run the same fineweb.py command again")
    count = len(list_shards(directory))
    entries = manifest.get("shards") or [{"name": shard_name(number)} for number in range(count)]
    if len(entries) < 2:
        raise DataError(f"--data_dir {directory} holds no val and train shards: make them with fineweb.py")
    shards = [open_shard(directory / entry["name"], entry.get("tokens")) for entry in entries]
    hashes = [entry.get("sha256") for entry in entries]
    identity = [[shard.path.name, shard.tokens, digest] for shard, digest in zip(shards, hashes, strict=True)]
    return Shards(shards[0], shards[1:], identity, manifest.get("unigram_loss"), manifest.get("source"))


def open_shard(path: Path, tokens: int | None = None) -> Shard:
    """Check that a file is a whole shard, of `tokens` tokens if that is known; raises DataError if it is not."""
    try:
        if not path.is_file():
            raise ValueError("no such file")
        size = path.stat().st_size
        shard = Shard(path, (size - HEADER_BYTES) // 2)
        with open(path, "rb") as file:
            header = file.read(HEADER_BYTES)
        if header != shard_header(shard.tokens) or size % 2:
            raise ValueError("its header does not fit its size")
        if tokens not in (None, shard.tokens):
            raise ValueError(f"it has {shard.tokens} tokens, not {tokens}")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a whole shard of uint16 tokens ({error}): build it again") from None
    return shard


def shard_header(tokens: int) -> bytes:
    """The bytes with which np.save begins the file of an array of so many uint16 numbers."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<u2", "fortran_order": False, "shape": (tokens,)})
    return header.getvalue()


def write_shard(directory: Path, number: int, tokens: np.ndarray) -> dict[str, object]:
    """Write one shard; returns its entry for the manifest."""
    path = directory / shard_name(number)
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        file.write(shard_header(len(tokens)))
        file.write(tokens.astype("<u2", copy=False))
    return {"name": path.name, "tokens": len(tokens), "sha256": sha256(path)}


def load_manifest(directory: Path) -> dict | None:
    """The manifest beside the shards, if there is one; raises DataError if it is not as it was written."""
    path = directory / "manifest.json"
    if not path.exists():
        return None
    try:
        manifest = read_json(path)
        check_manifest(manifest)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not as it was written ({error}): restore it, or build {directory} again") from None
    return {key: value for key, value in manifest.items() if key != "sha256"}


def save_manifest(directory: Path, manifest: dict) -> None:
    write_json(directory / "manifest.json", manifest | {"sha256": manifest_digest(manifest)})


def manifest_digest(manifest: dict) -> str:
    """The manifest's own SHA-256: those of the shards do not cover where the next begins, nor the source."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_manifest(manifest: object) -> None:
    """Raise ValueError unless this is a manifest as save_manifest writes it."""
    check_types(manifest, source=dict, vocabulary=str, shard_size=int, complete=bool, shards=list)
    if manifest.get("sha256") != manifest_digest(manifest):
        raise ValueError("SHA-256 mismatch")
    if manifest["complete"]:
        check_types(manifest, documents=int, tokens=int, unigram_loss=float)
    for number, entry in enumerate(manifest["shards"]):
        check_types(entry, name=str, tokens=int, sha256=str)
        if entry["name"] != shard_name(number):
            raise ValueError(f"{entry['name']} is not shard {number}")
        if not manifest["complete"]:
            check_types(entry.get("next"), file=int, document=int, token=int)


def check_types(content: object, **types: type) -> None:
    """Raise ValueError unless this is a dictionary in which each of the keys has a value of its type."""
    for key, kind in types.items():
        value = content.get(key) if isinstance(content, dict) else None
        if not isinstance(value, kind) or (kind is int and not 0 <= value < 2**63):
            raise ValueError(f"it has no {key!r} of type {kind.__name__}")


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


def verify(directory: Path) -> dict:
    """The manifest, once every shard is read again; raises DataError naming those that are not as they were written."""
    manifest = load_manifest(directory)
    if manifest is None:
        raise DataError(f"{directory} holds no manifest.json: fineweb.py did not make this directory")
    hashes = {entry["name"]: entry["sha256"] for entry in manifest["shards"]}
    bar = progress_bar(iterable=hashes, unit=" shards")
    damaged = [name for name in bar if not is_unchanged(directory / name, hashes[name])]
    if manifest["complete"]:  # a run that was killed may have written a shard more
        damaged += [name for name in list_shards(directory) if name not in hashes]
    if damaged:
        raise DataError(f"{directory}: not as manifest.json lists: {', '.join(damaged)}; restore, or build again")
    return manifest
