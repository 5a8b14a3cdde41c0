"""The vocabulary is OpenAI's, is read from the repository, and is not fetched from anywhere."""

import os
import random
import socket

import pytest

import tokenizer


def test_text_survives_and_the_ids_are_gpt2s():
    text = "Hello world, naïve 你好 🙂 <|endoftext|>"
    tokens = tokenizer.encode(text)
    assert tokens[:2] == [15496, 995] and tokenizer.decode(tokens) == text
    assert tokenizer.END_OF_TEXT not in tokens
    assert tokenizer.encoding().n_vocab == tokenizer.N_TOKENS
    assert tokenizer.encoding().eot_token == tokenizer.END_OF_TEXT


def test_a_stream_of_ids_gives_the_text_in_whole_characters():
    generator = random.Random(0)
    for _ in range(200):
        tokens = generator.choices(range(tokenizer.N_TOKENS), k=20)  # many of which end inside a character
        assert "".join(tokenizer.decode_stream(tokens)) == tokenizer.decode(tokens)
    tokens = tokenizer.encode("你好🙂")
    assert len(tokens) > 4 and {*tokenizer.decode_stream(tokens)} == {"", "你", "好", "🙂"}


def test_nothing_is_downloaded_and_the_environment_stays(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    tokenizer.encoding.cache_clear()
    before = dict(os.environ)
    assert tokenizer.encode("Hello") == [15496]
    assert dict(os.environ) == before


def test_a_damaged_vocabulary_is_refused_and_kept(tmp_path, monkeypatch):
    for path in tokenizer.VOCABULARY.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    name = tokenizer.FILES["merges.txt"][0]
    (tmp_path / name).write_bytes(b"#version: 0.2\n")
    monkeypatch.setattr(tokenizer, "VOCABULARY", tmp_path)
    tokenizer.encoding.cache_clear()
    with pytest.raises(ValueError, match=name):
        tokenizer.encoding()
    assert (tmp_path / name).exists()
    monkeypatch.undo()
