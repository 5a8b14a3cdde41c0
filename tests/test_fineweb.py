"""Shards hold exactly the source's tokens, whatever the documents, the sizes, the processes and the interruptions."""

import contextlib
import importlib.util
import json
import math
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, WORDS, run_script

import fineweb
from common.files import sha256
from common.script import DataError, UsageError
from common.shards import shard_name
from common.tokenizer import END_OF_TEXT, decode, encode

STRANGE = [
    "An ordinary document.",
    "",
    "A document with <|endoftext|> written in it, twice: <|endoftext|>",
    None,
    "Ünïcödé, 你好, 🙂🙂, and a lone surrogate \ud83d.",
    "\n\n  \t   spaces   \r\n",
    "long " * 3000,
    "'s 're 've 'll it's IT'S 12345678901234567890 !!!???",
]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text, "url": "x"}) + "\n" for text in texts), encoding="utf-8")
    return path


def write_parquet(path, texts, row_group_size=3):
    table = pyarrow.table({"url": ["x"] * len(texts), "text": pyarrow.array(texts, pyarrow.string())})
    pyarrow.parquet.write_table(table, path, row_group_size=row_group_size)
    return path


def expected_tokens(texts):
    return [token for text in texts if text is not None for token in [END_OF_TEXT, *encode(text)]]


def read_directory(directory):
    manifest = json.loads((directory / "manifest.json").read_text())
    return manifest, [np.load(directory / shard["name"]) for shard in manifest["shards"]]


def build(*flags):
    fineweb.main(["--workers", "1", *map(str, flags)])


def test_shards_hold_the_documents_in_order_each_after_end_of_text(tmp_path):
    build("--input", write_jsonl(tmp_path / "a.jsonl", STRANGE), "--shard_size", 1000, "--out_dir", "out")
    manifest, shards = read_directory(tmp_path / "out")
    expected = expected_tokens(STRANGE)
    assert np.concatenate(shards).tolist() == expected
    assert all(shard.dtype == np.uint16 and shard.ndim == 1 for shard in shards)
    assert [len(shard) for shard in shards] == [1000] * (len(expected) // 1000) + [len(expected) % 1000]
    names = [shard["name"] for shard in manifest["shards"]]
    assert names[:2] == ["edufineweb_val_000000.npy", "edufineweb_train_000001.npy"] and len(set(names)) == len(names)
    assert manifest["documents"] == 7 and manifest["tokens"] == len(expected) and manifest["complete"]
    for shard in manifest["shards"]:
        assert shard["sha256"] == sha256(tmp_path / "out" / shard["name"])


def test_random_documents_survive_any_shard_size(tmp_path):
    generator = random.Random(0)
    for attempt in range(10):
        alphabet = generator.choice(["ab \n", "aé你🙂 .", "0123 '", "".join(map(chr, range(32, 500)))])
        texts = [
            "".join(generator.choices(alphabet, k=generator.randrange(80))) for _ in range(generator.randrange(2, 40))
        ]
        expected = expected_tokens(texts)
        size = generator.randrange(1, len(expected))
        build("--input", write_jsonl(tmp_path / "a.jsonl", texts), "--shard_size", size, "--out_dir", f"out{attempt}")
        _, shards = read_directory(tmp_path / f"out{attempt}")
        assert np.concatenate(shards).tolist() == expected
        assert {len(shard) for shard in shards[:-1]} == {size} and 1 <= len(shards[-1]) <= size
        documents = np.split(np.concatenate(shards), np.flatnonzero(np.concatenate(shards) == END_OF_TEXT))[1:]
        assert [decode(document[1:].tolist()) for document in documents] == texts


def test_a_document_may_be_longer_than_several_shards(tmp_path):
    texts = ["short", "word " * 5000, "short"]
    build("--input", write_jsonl(tmp_path / "a.jsonl", texts), "--shard_size", 300, "--out_dir", "out")
    _, shards = read_directory(tmp_path / "out")
    assert len(shards) > 10 and np.concatenate(shards).tolist() == expected_tokens(texts)


def test_every_kind_of_file_gives_the_same_shards(tmp_path):
    texts = [f"Document {number}, " + "text " * number for number in range(600)]
    sources = {
        "jsonl": [write_jsonl(tmp_path / "a.jsonl", texts)],
        "parquet": [
            write_parquet(tmp_path / "part_0.parquet", texts[:250]),
            write_parquet(tmp_path / "part_1.parquet", texts[250:]),
        ],
        "glob": ["*.parquet"],
        "txt": [],
    }
    for number, text in enumerate(texts):
        (tmp_path / f"{number:04d}.txt").write_text(text)
    sources["txt"] = ["????.txt"]
    for kind, paths in sources.items():
        build("--input", *paths, "--shard_size", 10_000, "--out_dir", kind)
    hashes = [[(s["name"], s["sha256"]) for s in read_directory(tmp_path / kind)[0]["shards"]] for kind in sources]
    assert hashes[0] == hashes[1] == hashes[2] == hashes[3]
    assert np.concatenate(read_directory(tmp_path / "jsonl")[1]).tolist() == expected_tokens(texts)


def test_another_column_can_hold_the_text(tmp_path):
    table = pyarrow.table({"text": ["no"] * 50, "body": ["yes it is"] * 50})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    build("--input", "a.parquet", "--text_column", "body", "--shard_size", 100, "--out_dir", "out")
    assert np.concatenate(read_directory(tmp_path / "out")[1]).tolist() == expected_tokens(["yes it is"] * 50)


def test_any_number_of_workers_writes_the_same_bytes(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", STRANGE * 300)
    for encoder in ("tiktoken", "gigatoken"):
        for workers in (1, 3):
            flags = ["--input", "a.jsonl", "--shard_size", "20000", "--encoder", encoder]
            fineweb.main([*flags, "--workers", str(workers), "--out_dir", f"{encoder}{workers}"])
    assert contents(tmp_path / "tiktoken1") == contents(tmp_path / "tiktoken3")
    assert contents(tmp_path / "tiktoken1") == contents(tmp_path / "gigatoken1")
    assert contents(tmp_path / "tiktoken1") == contents(tmp_path / "gigatoken3")


def test_max_tokens_cuts_the_stream(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", STRANGE)
    expected = expected_tokens(STRANGE)
    for limit in (1001, 2000, len(expected), 10 * len(expected)):
        build("--input", "a.jsonl", "--shard_size", 1000, "--max_tokens", limit, "--out_dir", f"out{limit}")
        assert np.concatenate(read_directory(tmp_path / f"out{limit}")[1]).tolist() == expected[:limit]


def contents(directory):
    """The files of a directory, with their hashes."""
    return {path.name: sha256(path) for path in directory.iterdir()}


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("moment", range(1, 10))
@pytest.mark.parametrize("renamed", [False, True])
def test_an_interrupted_build_ends_in_the_same_bytes(tmp_path, monkeypatch, moment, renamed):
    write_jsonl(tmp_path / "a.jsonl", STRANGE[:5])
    write_jsonl(tmp_path / "b.jsonl", STRANGE[4:] * 2)
    flags = ["--input", "a.jsonl", "b.jsonl", "--shard_size", 1500]
    build(*flags, "--out_dir", "whole")
    replace, calls = os.replace, []

    def interrupting(source, target):
        calls.append(target)
        if len(calls) < moment or renamed:
            replace(source, target)
        if len(calls) == moment:  # just before, or just after, the moment-th file gets its name
            raise Interrupted

    monkeypatch.setattr(os, "replace", interrupting)
    with pytest.raises(Interrupted):
        build(*flags, "--out_dir", "torn")
    monkeypatch.setattr(os, "replace", replace)
    build(*flags, "--out_dir", "torn")
    assert contents(tmp_path / "torn") == contents(tmp_path / "whole")


@pytest.mark.parametrize("encoder", ["gigatoken", "tiktoken"])
def test_a_killed_build_leaves_nothing_outside_its_directory_and_ends_in_the_same_bytes(tmp_path, encoder):
    write_jsonl(tmp_path / "a.jsonl", STRANGE * 1000)
    command = [sys.executable, ROOT / "fineweb.py", "--input", "a.jsonl", "--shard_size", "100000", "--workers", "2"]
    command += ["--encoder", encoder]
    (tmp_path / "tmp").mkdir()
    environment = os.environ | {"TMPDIR": str(tmp_path / "tmp")}
    process = subprocess.Popen([*command, "--out_dir", "torn"], stdout=subprocess.DEVNULL, env=environment)
    while not (tmp_path / "torn" / shard_name(2)).exists():
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not list((tmp_path / "tmp").iterdir())
    assert not json.loads((tmp_path / "torn" / "manifest.json").read_text())["complete"]
    build(*command[2:], "--out_dir", "torn")
    build(*command[2:], "--out_dir", "whole")
    assert contents(tmp_path / "torn") == contents(tmp_path / "whole")


@pytest.mark.parametrize("encoder", ["gigatoken", "tiktoken"])
def test_ctrl_c_ends_a_build_at_once_in_one_line(tmp_path, encoder):
    write_jsonl(tmp_path / "a.jsonl", STRANGE * 4000)
    command = [sys.executable, ROOT / "fineweb.py", "--input", "a.jsonl", "--shard_size", "50000"]
    command += ["--encoder", encoder, "--out_dir", "out"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "out" / shard_name(2)).exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130 and errors == "fineweb.py: error: interrupted\n"


def test_a_finished_directory_is_left_alone(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", STRANGE)
    build("--input", "a.jsonl", "--shard_size", 1000, "--out_dir", "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    build("--input", "a.jsonl", "--shard_size", 1000, "--out_dir", "out")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}


def test_the_unigram_loss_is_the_smoothed_cross_entropy_of_val_under_train(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", STRANGE)
    build("--input", "a.jsonl", "--shard_size", 500, "--out_dir", "out")
    manifest, shards = read_directory(tmp_path / "out")
    counts, total = Counter(np.concatenate(shards[1:]).tolist()), sum(map(len, shards[1:]))
    losses = [-math.log((counts[token] + 1) / (total + 50257)) for token in shards[0].tolist()]
    assert manifest["unigram_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-9)


def test_the_sample_is_pythons_documentation(tmp_path):
    build("--sample")
    manifest, shards = read_directory(tmp_path / "sample_shards")
    assert {len(shard) for shard in shards[:-1]} == {65_536} and len(shards) >= 5
    assert "JSON (JavaScript Object Notation)" in decode(np.concatenate(shards).tolist())
    assert manifest["source"]["sample"].startswith("the documentation of Python 3.")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--input", "nothing*.parquet"], "nothing*.parquet"),
        (["--input", "a.jsonl", "--sample"], "--sample"),
        (["--input", "a.csv"], "a.csv"),
        (["--input", "a.jsonl", "--shard_size", "100000"], "--shard_size"),
        (["--input", "a.jsonl", "--shard_size", "0"], "--shard_size"),
        (["--input", "a.jsonl", "--shard_size", "9", "--max_tokens", "0"], "--max_tokens"),
        (["--input", "a.jsonl", "--shard_size", "9", "--max_tokens", "9"], "--max_tokens"),
        (["--input", "a.jsonl", "--shard_size", "9", "--workers", "0"], "--workers"),
        (["--input", ""], "--input is empty"),
        (["--input"], "--input is empty"),
        (["--verify", ""], "--verify is empty"),
        (["--dataset", "another/one"], "--revision"),
        (["--revision", "main"], "--revision"),
    ],
)
def test_bad_flags_are_refused_by_name_and_nothing_is_written(tmp_path, flags, says):
    write_jsonl(tmp_path / "a.jsonl", STRANGE)
    (tmp_path / "a.csv").write_text("text\n")
    with pytest.raises(UsageError) as error:
        build(*flags, "--out_dir", "out")
    assert says in str(error.value) and not list(tmp_path.glob("out/*.npy"))


def test_settings_are_checked_without_the_command_line_too(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", STRANGE)
    for wrong in ({"out_dir": ""}, {"shard_size": 0}, {"workers": 0}, {"input": ("a.jsonl", "")}, {"sample": True}):
        with pytest.raises(UsageError, match=f"--{next(iter(wrong))}"):
            fineweb.build(fineweb.FinewebConfig(**{"input": ("a.jsonl",)} | wrong))
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_source_that_fits_one_shard_can_be_built_again_in_smaller_ones(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", STRANGE)
    total = len(expected_tokens(STRANGE))
    with pytest.raises(UsageError, match="--shard_size"):
        build("--input", "a.jsonl", "--shard_size", total, "--out_dir", "out")
    build("--input", "a.jsonl", "--shard_size", total - 1, "--out_dir", "out")
    assert [len(shard) for shard in read_directory(tmp_path / "out")[1]] == [total - 1, 1]


def test_damaged_sources_are_refused_by_name(tmp_path):
    whole = write_parquet(tmp_path / "whole.parquet", ["text"] * 1000).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / "other.jsonl").write_text('{"body": "fine"}\n')
    (tmp_path / "deep.jsonl").write_text("[" * 100_000 + "\n")
    broken_text = pyarrow.array([b"\xff\xfe"] * 9, pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": broken_text}), tmp_path / "bytes.parquet")
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"] * 9)] * 2, names=["text", "text"])
    pyarrow.parquet.write_table(twice, tmp_path / "twice.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": [["a"]] * 9}), tmp_path / "list.parquet")
    (tmp_path / "number.jsonl").write_text('{"text": 1}\n')
    (tmp_path / "null.jsonl").write_text('{"text": null}\n')
    cases = {
        "cut.parquet": "cut.parquet",
        "latin.txt": "UTF-8",
        "broken.jsonl": "line 2",
        "other.jsonl": "line 1",
        "number.jsonl": "text_column",
        "null.jsonl": "no text",
        "twice.parquet": "2 columns 'text'",
        "list.parquet": "text_column",
        "deep.jsonl": "line 1",
        "bytes.parquet": "bytes.parquet",
    }
    for name, says in cases.items():
        with pytest.raises(DataError, match=says):
            build("--input", name, "--shard_size", 10, "--out_dir", "out")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UsageError, match="1 tokens fill no second shard.*more text"):
        build("--input", "empty.txt", "--shard_size", 10, "--out_dir", "out")
    with pytest.raises(DataError, match="--text_column"):
        build("--input", "whole.parquet", "--text_column", "body", "--shard_size", 10, "--out_dir", "out")


def test_blank_lines_byte_order_marks_and_nulls_are_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('\n{"text": "one"}\n\n  \n{"text": null}\n{"text": "two"}\n\n')
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfthree")
    write_parquet(tmp_path / "c.parquet", [None, "four", None])
    values = pyarrow.DictionaryArray.from_arrays([None, 0], ["five"])
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), tmp_path / "d.parquet")
    names = ["a.jsonl", "b.txt", "./a.jsonl", "*.jsonl", "*.parquet"]  # each file once
    build("--input", *names, "--shard_size", 2, "--out_dir", "out")
    expected = expected_tokens(["one", "two", "three", "four", "five"])
    assert np.concatenate(read_directory(tmp_path / "out")[1]).tolist() == expected


def test_a_file_that_changed_since_an_interruption_is_refused(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["one"] * 100)
    build("--input", "a.jsonl", "--shard_size", 50, "--out_dir", "out")
    write_jsonl(tmp_path / "a.jsonl", ["two"] * 100)
    with pytest.raises(UsageError, match="source"):
        build("--input", "a.jsonl", "--shard_size", 50, "--out_dir", "out")


def test_an_interrupted_build_stops_at_max_tokens_too(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", STRANGE)
    flags = ["--input", "a.jsonl", "--shard_size", 500, "--max_tokens", 1700]
    build(*flags, "--out_dir", "whole")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(fineweb.shards, "summary", lambda counts: 1 / 0)
        build(*flags, "--out_dir", "torn")
    build(*flags, "--out_dir", "torn")
    assert contents(tmp_path / "torn") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("flag", "value", "named"), [("--max_tokens", 2000, "max_tokens"), ("--text_column", "url", "source")]
)
def test_a_directory_is_not_taken_for_one_of_another_length_or_column(tmp_path, flag, value, named):
    write_jsonl(tmp_path / "a.jsonl", STRANGE)
    flags = ["--input", "a.jsonl", "--shard_size", 1000, "--out_dir", "out"]
    build(*flags)
    with pytest.raises(UsageError, match=f"begun with {named}"):
        build(*flags, flag, value)


def test_a_begun_directory_keeps_its_settings_and_its_shards(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", STRANGE)
    build("--input", "a.jsonl", "--shard_size", 1000, "--out_dir", "out")
    with pytest.raises(UsageError, match="shard_size"):
        build("--input", "a.jsonl", "--shard_size", 1001, "--out_dir", "out")
    write_jsonl(tmp_path / "b.jsonl", STRANGE)
    with pytest.raises(UsageError, match="source"):
        build("--input", "b.jsonl", "--shard_size", 1000, "--out_dir", "out")
    (tmp_path / "out" / "manifest.json").unlink()
    with pytest.raises(UsageError, match="manifest"):
        build("--input", "a.jsonl", "--shard_size", 1000, "--out_dir", "out")


def test_a_manifest_that_was_changed_by_hand_is_refused(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", STRANGE)
    build("--input", "a.jsonl", "--shard_size", 1000, "--out_dir", "out")
    path = tmp_path / "out" / "manifest.json"
    whole = path.read_text()
    moved = re.sub(r'"token": (\d+)', lambda found: f'"token": {int(found[1]) + 1}', whole, count=1)
    for damaged in ("", "[]", '{"shards": 3', "{}", whole[:-20], moved, "[" * 100_000, "null", '{"a":' * 100_000):
        path.write_text(damaged)
        for flags in (["--verify", "out"], ["--input", "a.jsonl", "--shard_size", 1000, "--out_dir", "out"]):
            with pytest.raises(DataError, match=r"manifest\.json is not as it was written"):
                build(*flags)
    path.write_text(whole)
    build("--verify", "out")


def test_verify_reads_every_shard_again(tmp_path, capsys):
    write_jsonl(tmp_path / "a.jsonl", STRANGE)
    build("--input", "a.jsonl", "--shard_size", 1000, "--out_dir", "out")
    shard = tmp_path / "out" / "edufineweb_train_000002.npy"
    whole = shard.read_bytes()
    build("--verify", "out")
    assert capsys.readouterr().out.splitlines()[-1].startswith("out: 7 documents")
    flipped = bytearray(whole)
    flipped[1000] ^= 1
    for content in (bytes(flipped), whole[:-2], b"", None):
        shard.unlink()
        if content is not None:
            shard.write_bytes(content)
        with pytest.raises(DataError, match="edufineweb_train_000002.npy"):
            build("--verify", "out")
    shard.write_bytes(whole)
    (tmp_path / "out" / "edufineweb_train_000009.npy").write_bytes(whole)
    with pytest.raises(DataError, match="edufineweb_train_000009.npy"):
        build("--verify", "out")
    with pytest.raises(DataError, match=r"no manifest\.json"):
        build("--verify", ".")


def test_an_unfinished_directory_does_not_verify_and_a_changed_shard_in_it_is_refused(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", STRANGE)
    flags = ["--input", "a.jsonl", "--shard_size", 1000, "--out_dir", "out"]
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(fineweb.shards, "summary", lambda counts: 1 / 0)
        build(*flags)
    with pytest.raises(DataError, match="not complete"):
        build("--verify", "out")
    shard = tmp_path / "out" / "edufineweb_train_000001.npy"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + b"x")
    with pytest.raises(DataError, match="edufineweb_train_000001.npy"):
        build(*flags)
    shard.write_bytes(whole)
    build(*flags)
    build("--verify", "out")


@pytest.mark.parametrize(("largest", "shards"), [(1000, 0), (1200, 3)])  # bytes: no shard fits, or no fourth entry
def test_a_disk_that_takes_no_more_is_one_line_and_leaves_the_shards_before_it(tmp_path, largest, shards):
    write_jsonl(tmp_path / "a.jsonl", STRANGE)
    flags = ["--input", "a.jsonl", "--shard_size", 500]
    build(*flags, "--out_dir", "whole")
    whole = contents(tmp_path / "whole")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, limits[1]))
    try:
        with pytest.raises(DataError, match="cannot build torn.*File too large.*same command again"):
            build(*flags, "--out_dir", "torn")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    torn = contents(tmp_path / "torn")
    assert len(json.loads((tmp_path / "torn" / "manifest.json").read_text())["shards"]) == shards
    assert torn.keys() <= whole.keys() and all(torn[name] == whole[name] for name in torn if name.endswith(".npy"))
    build(*flags, "--out_dir", "torn")
    assert contents(tmp_path / "torn") == whole


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", STRANGE)
    (tmp_path / "file").write_text("")
    for out in ("file", "/dev/null", "file/inside", "/proc/inside"):
        finished = run_script("fineweb.py", "--input", "a.jsonl", "--shard_size", 1000, "--out_dir", out)
        assert finished.returncode == 2 and len(finished.stderr.splitlines()) == 1
        assert f"--out_dir {out} cannot be a directory" in finished.stderr


def test_only_regular_files_are_taken_as_input_as_manifest_and_as_shard(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", STRANGE)
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "endless.txt").symlink_to("/dev/zero")
    (tmp_path / "directory.txt").mkdir()
    for name in ("pipe.jsonl", "endless.txt", "directory.txt", "*.txt"):
        with pytest.raises(UsageError, match=r"--input .* is not a file"):
            build("--input", name, "--shard_size", 1000, "--out_dir", "out")
    flags = ["--input", "a.jsonl", "--shard_size", 1000, "--out_dir", "out"]
    build(*flags)
    for name in (shard_name(1), "manifest.json"):
        path = tmp_path / "out" / name
        path.rename(tmp_path / "kept")
        for replace in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
            replace(path)
            with pytest.raises(DataError, match=name):
                build("--verify", "out")
            path.unlink()
        (tmp_path / "kept").rename(path)


@pytest.mark.parametrize("encoder", ["gigatoken", "tiktoken"])
def test_either_encoder_gives_the_tokens_of_encode_ordinary(tmp_path, encoder):
    write_jsonl(tmp_path / "a.jsonl", STRANGE)
    build("--input", "a.jsonl", "--shard_size", 1000, "--out_dir", "out", "--encoder", encoder)
    assert np.concatenate(read_directory(tmp_path / "out")[1]).tolist() == expected_tokens(STRANGE)


def test_auto_takes_gigatoken_where_it_is_installed(tmp_path, monkeypatch, capsys):
    write_jsonl(tmp_path / "a.jsonl", STRANGE)
    build("--input", "a.jsonl", "--shard_size", 1000, "--out_dir", "with")
    assert "encoding with gigatoken" in capsys.readouterr().out
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    build("--input", "a.jsonl", "--shard_size", 1000, "--out_dir", "without")
    assert "encoding with tiktoken" in capsys.readouterr().out
    assert contents(tmp_path / "with") == contents(tmp_path / "without")
    with pytest.raises(UsageError, match="--encoder gigatoken is not installed"):
        build("--input", "a.jsonl", "--shard_size", 1000, "--out_dir", "refused", "--encoder", "gigatoken")


@pytest.mark.parametrize("document", [0, 4, 6])
def test_a_token_that_tiktoken_would_not_give_stops_the_run_and_names_the_document(tmp_path, monkeypatch, document):
    texts = [f"The text of document {number}" for number in range(8)]
    texts[4] += " is the longest of all"  # the first of every few is checked too
    write_jsonl(tmp_path / "a.jsonl", texts)
    load = fineweb.load_gigatoken

    class Wrong:
        def encode_batch(self, texts):
            encoded = load().encode_batch(texts)
            encoded.layout.content.data[encoded.layout.offsets.data[document]] += 1
            return encoded

    monkeypatch.setattr(fineweb, "load_gigatoken", Wrong)
    with pytest.raises(DataError, match=rf"document {document} of a\.jsonl.*--encoder tiktoken"):
        build("--input", "a.jsonl", "--shard_size", 10, "--out_dir", "out", "--encoder", "gigatoken")
    build("--input", "a.jsonl", "--shard_size", 10, "--out_dir", "out", "--encoder", "tiktoken")
    assert np.concatenate(read_directory(tmp_path / "out")[1]).tolist() == expected_tokens(texts)


@pytest.mark.parametrize("space", [" ", "\n", "\u3000", "\t\xa0"])
@pytest.mark.parametrize("encoder", ["gigatoken", "tiktoken"])
def test_a_text_that_tiktoken_cannot_take_is_named_by_either_encoder(tmp_path, space, encoder):
    texts = ["fine"] * 20
    texts[3] = "a" + space * (1_000_000 // len(space)) + "b"
    texts[7] = "the longest of all " * 250_000  # which is checked in any case
    write_jsonl(tmp_path / "a.jsonl", texts)
    with pytest.raises(DataError, match=r"tiktoken cannot encode document 3 of a\.jsonl.*white space"):
        build("--input", "a.jsonl", "--shard_size", 10, "--out_dir", "out", "--encoder", encoder)
    texts[3] = "a" + space * (990_000 // len(space)) + "b"
    write_jsonl(tmp_path / "b.jsonl", texts)
    build("--input", "b.jsonl", "--shard_size", 1_000_000, "--out_dir", "out", "--encoder", encoder)
    assert read_directory(tmp_path / "out")[0]["documents"] == 20


@pytest.mark.slow
def test_25_kills_at_random_moments_end_in_the_same_bytes(tmp_path):
    generator = random.Random(0)
    write_parquet(tmp_path / "a.parquet", [" ".join(generator.choices(WORDS, k=400)) for _ in range(20_000)])
    command = [sys.executable, ROOT / "fineweb.py", "--input", "a.parquet", "--shard_size", "40000"]
    began = time.monotonic()
    subprocess.run([*command, "--out_dir", "whole"], check=True, stdout=subprocess.DEVNULL)
    longest = time.monotonic() - began
    kills = {"gigatoken": 0, "tiktoken": 0}
    attempt = 0
    while min(kills.values()) < 25:
        encoder = min(kills, key=kills.get)
        process = subprocess.Popen([*command, "--out_dir", f"torn{attempt}", "--encoder", encoder])
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(generator.uniform(0, longest))
        process.kill()
        if process.wait() == 0:  # only a run that ended by itself has put everything in order
            assert contents(tmp_path / f"torn{attempt}") == contents(tmp_path / "whole")
            attempt += 1
        else:
            assert process.returncode == -signal.SIGKILL
            kills[encoder] += 1
    subprocess.run([*command, "--out_dir", f"torn{attempt}"], check=True, stdout=subprocess.DEVNULL)
    assert contents(tmp_path / f"torn{attempt}") == contents(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_memory_stays_under_2_gib(tmp_path):
    """With 100M-token shards, and documents of 4 MB in one row group."""
    generator = random.Random(0)
    text = "\n".join(" ".join(generator.choices(WORDS, k=50)) for _ in range(20_000))
    write_parquet(tmp_path / "a.parquet", [text] * (1_200_000_000 // len(text)), row_group_size=1000)
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import fineweb; fineweb.main(); "
    script += "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    for encoder in ("gigatoken", "tiktoken"):
        command = [sys.executable, "-c", script, "--input", "a.parquet", "--out_dir", encoder, "--encoder", encoder]
        finished = subprocess.run(command, check=True, capture_output=True, text=True)
        assert int(finished.stdout.split()[-1]) < 2 * 2**20  # KiB; getrusage's would count this process's memory too
    assert contents(tmp_path / "gigatoken") == contents(tmp_path / "tiktoken")
