"""A shard is opened only if it is whole and what the manifest lists, and read without being kept open."""

import hashlib
import json
import os
import random
import resource

import numpy as np
import pytest

from common.script import DataError
from common.shards import load_manifest, open_shard, open_shards, shard_name


def write_shards(directory, count=3, tokens=100):
    """Shards as np.save writes them, without a manifest."""
    directory.mkdir()
    for number in range(count):
        content = np.arange(number, number + tokens, dtype=np.uint16)
        np.save(directory / shard_name(number), content)
    return directory


def write_manifest(directory, **changes):
    """A manifest of the shards, with these changes, and a hash of its own that fits."""
    shards = []
    for path in sorted(directory.glob("*.npy"), key=lambda path: path.name[-10:]):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        shards.append({"name": path.name, "tokens": len(np.load(path)), "sha256": digest, "next": None})
    manifest = {"source": {"sample": "x"}, "vocabulary": "gpt2", "shard_size": 100, "max_tokens": None}
    manifest |= {"complete": True, "shards": shards, "documents": 3, "tokens": 300, "unigram_loss": 10.5} | changes
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (directory / "manifest.json").write_text(json.dumps(manifest | {"sha256": digest}))
    return manifest


def test_a_part_of_a_shard_is_the_tokens_that_were_saved(tmp_path):
    directory = write_shards(tmp_path / "shards")
    shard = open_shards(directory).train[1]
    tokens = np.load(directory / shard_name(2))
    assert len(shard) == 100
    for start, stop in ((0, 100), (0, 0), (0, 1), (99, 100), (17, 64), (90, 1000), (100, 200)):
        part = shard.read(start, stop)
        assert part.dtype == np.uint16 and part.tolist() == tokens[start:stop].tolist()


def test_shards_are_known_by_name_tokens_and_hash_with_a_manifest_and_without(tmp_path):
    directory = write_shards(tmp_path / "shards")
    shards = open_shards(directory)
    assert shards.identity == [[shard_name(number), 100, None] for number in range(3)]
    assert shards.unigram_loss is None and shards.source is None
    manifest = write_manifest(directory)
    shards = open_shards(directory)
    assert shards.identity == [[entry["name"], 100, entry["sha256"]] for entry in manifest["shards"]]
    assert shards.unigram_loss == 10.5 and shards.source == {"sample": "x"}


def test_every_flipped_bit_of_a_header_is_refused_by_name(tmp_path):
    directory = write_shards(tmp_path / "shards")
    path = directory / shard_name(1)
    whole = path.read_bytes()
    for bit in range(128 * 8):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=path.name):
            open_shard(path)


def test_any_other_file_is_refused_by_name(tmp_path):
    directory = write_shards(tmp_path / "shards")
    path = directory / shard_name(1)
    whole, tokens = path.read_bytes(), np.load(path)
    contents = [b"", whole[:100], whole[:128], whole[:-1], whole[:-2], whole + b"\0", whole + b"\0\0"]
    for other in (tokens.astype(np.int32), tokens.astype(">u2"), tokens.reshape(2, -1), tokens.sum(), tokens > 5):
        np.save(tmp_path / "other.npy", other)
        contents.append((tmp_path / "other.npy").read_bytes())
    np.savez(tmp_path / "zip.npz", tokens)
    contents.append((tmp_path / "zip.npz").read_bytes())
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(DataError, match=path.name):
            open_shards(directory)


def test_a_whole_shard_of_another_length_than_the_manifest_lists_is_refused(tmp_path):
    directory = write_shards(tmp_path / "shards")
    write_manifest(directory)
    np.save(directory / shard_name(1), np.zeros(99, dtype=np.uint16))
    with pytest.raises(DataError, match="edufineweb_train_000001.*99 tokens, not 100"):
        open_shards(directory)


def test_only_regular_files_are_read(tmp_path):
    directory = write_shards(tmp_path / "shards")
    path = directory / shard_name(2)
    path.rename(tmp_path / "elsewhere.npy")
    for replace in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to("nowhere")):
        replace(path)
        with pytest.raises(DataError, match=path.name):
            open_shards(directory)
        path.unlink()
    path.symlink_to(tmp_path / "elsewhere.npy")
    assert len(open_shards(directory).train) == 2
    os.mkfifo(directory / "manifest.json")
    with pytest.raises(DataError, match=r"manifest\.json"):
        open_shards(directory)


def test_a_token_out_of_vocabulary_is_refused_by_file(tmp_path):
    directory = write_shards(tmp_path / "shards")
    path = directory / shard_name(1)
    tokens = np.load(path)
    tokens[7] = 50257
    np.save(path, tokens)
    shard = open_shards(directory).train[0]
    assert len(shard.read(8, 100)) == 92
    with pytest.raises(DataError, match=f"{path.name}.*50257.*out of vocabulary"):
        shard.read(0, 8)


def test_a_shard_that_is_shortened_while_it_is_in_use_is_refused_by_name(tmp_path):
    directory = write_shards(tmp_path / "shards")
    shard = open_shards(directory).train[0]
    path = directory / shard_name(1)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match=path.name):
        shard.read(90, 100)


def test_missing_and_unfinished_shards_are_refused(tmp_path):
    with pytest.raises(DataError, match="nowhere.*fineweb.py"):
        open_shards(tmp_path / "nowhere")
    directory = write_shards(tmp_path / "shards", count=4)
    (directory / shard_name(2)).rename(directory / "edufineweb_train_2.npy")
    with pytest.raises(DataError, match="edufineweb_train_000002.*no such file"):
        open_shards(directory)
    (directory / "edufineweb_train_2.npy").rename(directory / shard_name(2))
    write_manifest(directory)
    (directory / shard_name(3)).unlink()
    with pytest.raises(DataError, match="edufineweb_train_000003"):
        open_shards(directory)
    np.save(directory / shard_name(3), np.zeros(100, dtype=np.uint16))
    manifest = write_manifest(directory)
    position = {"file": 0, "document": 1, "token": 1}
    entries = [entry | {"next": position} for entry in manifest["shards"]]
    write_manifest(directory, complete=False, shards=entries)
    with pytest.raises(DataError, match="not complete"):
        open_shards(directory)


def test_a_manifest_of_another_form_is_refused_whatever_its_hash(tmp_path):
    directory = write_shards(tmp_path / "shards")
    entries = write_manifest(directory)["shards"]
    wrong = [{"shards": value} for value in (None, {}, 3, "abc", [1, 2], [None] * 3, [{}] * 3, entries[::-1])]
    for key, values in {"name": (1, None, "../x.npy"), "tokens": ("9", None, 1.5), "sha256": (1, None)}.items():
        wrong += [{"shards": [entries[0] | {key: value}, *entries[1:]]} for value in values]
    wrong += [{"complete": False}, {"complete": 1}, {"source": "x"}, {"unigram_loss": "low"}, {"tokens": None}]
    position = {"file": 0, "document": 0, "token": 0}
    for key in position:
        places = [position | {key: value} for value in (-1, 10**30, "0", None)]
        wrong += [{"complete": False, "shards": [entry | {"next": place} for entry in entries]} for place in places]
    for changes in wrong:
        write_manifest(directory, **changes)
        with pytest.raises(DataError, match=r"manifest\.json is not as it was written") as error:
            load_manifest(directory)
        assert len(str(error.value).splitlines()) == 1
    for content in (b"", b"[]", b"null", b"3", b"\xff", b"[" * 100_000, b'{"shards": ' * 100_000, b"1" * 5000):
        (directory / "manifest.json").write_bytes(content)
        with pytest.raises(DataError, match=r"manifest\.json is not as it was written"):
            load_manifest(directory)


def test_more_shards_than_a_process_may_open_files_can_be_read(tmp_path):
    directory = write_shards(tmp_path / "shards", count=600, tokens=10)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    try:
        shards = open_shards(directory)
        firsts = [int(shard.read(0, 1)[0]) for shard in shards.train]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert firsts == list(range(1, 600))


def test_bytes_of_random_noise_never_pass_for_a_shard(tmp_path):
    generator = random.Random(0)
    for _ in range(50):
        (tmp_path / "noise.npy").write_bytes(generator.randbytes(generator.randrange(400)))
        with pytest.raises(DataError, match="noise.npy"):
            open_shard(tmp_path / "noise.npy")
