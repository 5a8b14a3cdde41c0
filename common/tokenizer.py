"""GPT-2's tokens: text to ids and back, by tiktoken, with the vocabulary in `vocabulary/`."""

from __future__ import annotations

import codecs
import functools
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str  # GPT-2's pattern, which splits a text into words

from common.files import first_difference, is_unchanged, read_json, read_text, write_json
from common.script import DataError

N_TOKENS = 50257
END_OF_TEXT = 50256

VOCABULARY = Path(__file__).resolve().parent.parent / "vocabulary"
SHA256 = {
    "vocab.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "merges.txt": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


@functools.cache
def encoding() -> tiktoken.Encoding:
    """GPT-2's encoding; raises DataError if a file of the vocabulary is missing or changed."""
    for name, digest in SHA256.items():
        if not is_unchanged(VOCABULARY / name, digest):
            raise DataError(f"{VOCABULARY / name} is missing or damaged: restore it with `git checkout vocabulary`")
    bytes_of = byte_alphabet()
    ids = json.loads((VOCABULARY / "vocab.json").read_text(encoding="utf-8"))
    ranks = {bytes(bytes_of[c] for c in text): id for text, id in ids.items() if id != END_OF_TEXT}
    special = {"<|endoftext|>": END_OF_TEXT}
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)


def byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in vocab.json: itself where it is printable, else one from U+0100 on."""
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def encode(text: str) -> list[int]:
    """The ids of a text, in which the characters `<|endoftext|>` are ordinary; raises ValueError for one too odd."""
    # encode_ordinary would panic over very long runs of white space
    return encoding().encode_to_numpy(utf8(text).decode(), disallowed_special=()).tolist()


def utf8(text: str) -> bytes:
    """The text's bytes; half a surrogate pair, which has none, is replaced as tiktoken's encode_ordinary does."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def decode(tokens: list[int]) -> str:
    """The text of ids; raises ValueError for one that is out of vocabulary."""
    if tokens and not 0 <= min(tokens) <= max(tokens) < N_TOKENS:
        raise ValueError(f"token ids go from 0 to {N_TOKENS - 1}; got {min(tokens)} to {max(tokens)}")
    return encoding().decode(tokens)


def decode_stream(tokens: Iterable[int]) -> Iterator[str]:
    """The text of ids as they come; a character whose bytes are split among tokens comes with the last of them."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        yield decoder.decode(encoding().decode_single_token_bytes(token))
    yield decoder.decode(b"", final=True)


def save_tokenizer(directory: Path, block_size: int) -> None:
    """Write the tokenizer's files into a checkpoint directory, as transformers' AutoTokenizer reads them."""
    for name in SHA256:
        shutil.copyfile(VOCABULARY / name, directory / name)
    settings = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": block_size, "add_prefix_space": False}
    settings |= dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    write_json(directory / "tokenizer_config.json", settings)


def require_gpt2_tokenizer(directory: Path) -> None:
    """Raise DataError, which names a difference, if a model's directory has a tokenizer that is not GPT-2's."""
    expected = {name: read_vocabulary(VOCABULARY / name) for name in SHA256}
    expected["tokenizer.json"] = expected["vocab.json"] | expected["merges.txt"]
    for name, vocabulary in expected.items():
        path = directory / name
        difference = path.exists() and first_difference(read_vocabulary(path), vocabulary)
        if difference:
            raise DataError(f"{path} is not GPT-2's ({difference}): its model cannot be used here")


def read_vocabulary(path: Path) -> dict[str, object]:
    """The ids of a file's tokens and the ranks of its merges, which have a space inside; raises DataError."""
    if path.name == "merges.txt":
        lines = read_text(path).split("\n")
        return ranks(line for line in lines if line and not line.startswith("#version"))
    content = read_json(path)
    added = path.with_name("added_tokens.json")
    if path.name == "vocab.json":
        return content | (read_json(added) if added.exists() else {})
    try:
        model = content["model"]
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        return model["vocab"] | ranks(merges) | {token["content"]: token["id"] for token in content["added_tokens"]}
    except (TypeError, KeyError) as error:
        raise DataError(f"{path} is not a tokenizer of GPT-2's kind: {error!r}") from None


def ranks(merges: Iterable[str]) -> dict[str, int]:
    return {merge: rank for rank, merge in enumerate(merges)}
