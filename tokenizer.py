"""GPT-2's tokens: text to ids and back, by tiktoken, with the vocabulary that lies beside this file."""

from __future__ import annotations

import codecs
import functools
import os
import shutil
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path

from common import DataError, replacing, sha256, write_json

if typing.TYPE_CHECKING:
    import tiktoken

N_TOKENS = 50257
END_OF_TEXT = 50256

VOCABULARY = Path(__file__).resolve().parent / "vocabulary"
# Hugging Face's name of each file: its name in tiktoken's cache, and its sha256
FILES = {
    "vocab.json": (
        "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
        "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    ),
    "merges.txt": (
        "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    ),
}


@functools.cache
def encoding() -> tiktoken.Encoding:
    """GPT-2's encoding, read from `vocabulary/`; raises DataError where a file is missing or changed."""
    import tiktoken

    for name, digest in FILES.values():  # tiktoken would delete a file whose hash is wrong, and download it
        path = VOCABULARY / name
        if not path.exists() or sha256(path) != digest:
            raise DataError(f"{path} is missing or damaged: restore it with `git checkout vocabulary`")
    before = os.environ.get("TIKTOKEN_CACHE_DIR")
    os.environ["TIKTOKEN_CACHE_DIR"] = str(VOCABULARY)
    try:
        return tiktoken.get_encoding("gpt2")
    finally:
        del os.environ["TIKTOKEN_CACHE_DIR"]
        if before is not None:
            os.environ["TIKTOKEN_CACHE_DIR"] = before


def encode(text: str) -> list[int]:
    """The ids of a text; the characters `<|endoftext|>` in it are ordinary text."""
    return encoding().encode_ordinary(text)


def decode(tokens: list[int]) -> str:
    """The text of some ids; raises ValueError for one that only pads the vocabulary."""
    if tokens and not 0 <= min(tokens) <= max(tokens) < N_TOKENS:
        raise ValueError(f"token ids go from 0 to {N_TOKENS - 1}; got {min(tokens)} to {max(tokens)}")
    return encoding().decode(tokens)


def decode_stream(tokens: Iterable[int]) -> Iterator[str]:
    """The text of ids as they come; a character whose bytes are split among tokens comes with the last of them."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        yield decoder.decode(encoding().decode_single_token_bytes(token))
    yield decoder.decode(b"", final=True)


def save_pretrained(directory: Path, block_size: int) -> None:
    """Write the tokenizer's files into a checkpoint directory, as transformers' AutoTokenizer reads them."""
    for name, (cached, _) in FILES.items():
        with replacing(directory / name) as temporary:
            shutil.copyfile(VOCABULARY / cached, temporary)
    end = encoding().decode([END_OF_TEXT])
    settings = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": block_size, "add_prefix_space": False}
    settings |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), end)
    write_json(directory / "tokenizer_config.json", settings)
