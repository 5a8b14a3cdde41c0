"""The vocabulary is OpenAI's, is read from the repository, and is not fetched from anywhere."""

import json
import os
import pydoc_data.topics
import random
import socket

import pytest
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext import openai_public

from common import tokenizer
from common.script import DataError
from common.tokenizer import END_OF_TEXT, N_TOKENS, VOCABULARY, decode, decode_stream, encode, encoding, save_tokenizer

TEXT = "Hello world, naïve 你好 🙂 \u00a0\u00ad\n\n\t  <|endoftext|>  it's 3.14"


def files(directory):
    return {path.relative_to(directory): path.stat().st_mtime_ns for path in directory.rglob("*")}


@pytest.fixture
def fresh():
    """Let the encoding be built anew, now and afterwards."""
    encoding.cache_clear()
    yield
    encoding.cache_clear()


def test_the_encoding_is_tiktokens_own_gpt2(monkeypatch):
    def ranks(vocab_bpe_file, encoder_json_file, **hashes):
        local = {"vocab.bpe": "merges.txt", "encoder.json": "vocab.json"}
        paths = [VOCABULARY / local[url.split("/")[-1]] for url in (vocab_bpe_file, encoder_json_file)]
        return data_gym_to_mergeable_bpe_ranks(*map(str, paths), **hashes)

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # keep no copy
    monkeypatch.setattr(openai_public, "data_gym_to_mergeable_bpe_ranks", ranks)
    theirs = tiktoken.Encoding(**openai_public.gpt2())
    assert encoding().n_vocab == theirs.n_vocab == N_TOKENS
    assert encoding().eot_token == theirs.eot_token == END_OF_TEXT
    assert encoding().token_byte_values() == theirs.token_byte_values()
    for text in [TEXT, *pydoc_data.topics.topics.values()]:
        assert encode(text) == theirs.encode_ordinary(text)


def test_text_survives_and_the_ids_are_gpt2s():
    tokens = encode(TEXT)
    assert tokens[:2] == [15496, 995] and decode(tokens) == TEXT


def test_the_characters_of_end_of_text_are_ordinary_text():
    assert END_OF_TEXT not in encode(TEXT)
    assert decode([END_OF_TEXT]) == "<|endoftext|>" == decode(encode("<|endoftext|>"))


@pytest.mark.parametrize("character", [" ", "\n", "x", "1", "!"])
def test_a_character_repeated_a_million_times_survives_or_is_refused(character):
    text = character * 1_000_000
    try:
        tokens = encode(text)
    except ValueError:
        return
    assert decode(tokens) == text


def test_every_byte_sequence_survives():
    generator = random.Random(0)
    for _ in range(100):
        content = generator.randbytes(50)
        text = content.decode("latin-1")
        assert decode(encode(text)) == text


@pytest.mark.parametrize("token", [-1, N_TOKENS, 50303])
def test_an_id_out_of_vocabulary_is_refused(token):
    with pytest.raises(ValueError, match=str(token)):
        decode([1, token])


def test_no_ids_are_no_text():
    assert decode([]) == "" == "".join(decode_stream([]))


def test_a_stream_of_ids_gives_the_text():
    generator = random.Random(0)
    for _ in range(200):
        tokens = generator.choices(range(N_TOKENS), k=20)  # many of which end inside a character
        assert "".join(decode_stream(tokens)) == decode(tokens)


def test_a_stream_shows_characters_whole_and_as_soon_as_they_are():
    tokens = encode("你好🙂")
    pieces = list(decode_stream(tokens))
    assert len(tokens) > 4 and len(pieces) == len(tokens) + 1 and {*pieces} == {"", "你", "好", "🙂"}
    assert pieces[-1] == "" and pieces[-2] == "🙂"


def test_a_stream_that_ends_inside_a_character_shows_so():
    assert "".join(decode_stream(encode("🙂")[:-1])) == "\ufffd"


def test_a_stream_is_read_no_further_than_it_is_shown():
    def tokens():
        yield from encode("One")
        raise AssertionError("read too far")

    assert next(decode_stream(tokens())) == "One"


def test_nothing_is_downloaded_written_or_set(fresh, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where tiktoken would keep its copies
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    before = dict(os.environ), files(VOCABULARY)
    assert encode("Hello") == [15496]
    assert (dict(os.environ), files(VOCABULARY)) == before and not files(tmp_path)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
@pytest.mark.parametrize("damage", ["flipped", "cut off", "absent"])
def test_a_damaged_vocabulary_is_refused_by_file_and_kept(fresh, tmp_path, monkeypatch, name, damage):
    for path in VOCABULARY.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content if damage == "flipped" else content[:-1])
    if damage == "absent":
        path.unlink()
    before = files(tmp_path)
    monkeypatch.setattr(tokenizer, "VOCABULARY", tmp_path)
    with pytest.raises(DataError, match=f"{name}.*git checkout"):
        encoding()
    assert files(tmp_path) == before


def test_the_tokenizers_files_are_the_repositorys_own(tmp_path):
    save_tokenizer(tmp_path, block_size=64)
    assert {path.name for path in tmp_path.iterdir()} == {"vocab.json", "merges.txt", "tokenizer_config.json"}
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["pad_token"] == settings["eos_token"] == "<|endoftext|>"
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / name).read_bytes() == (VOCABULARY / name).read_bytes()
