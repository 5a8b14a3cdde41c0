"""What comes from the Hub is the pinned revision's train files, whole, whatever happens to the connection."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time

import hub_server
import numpy as np
import pyarrow.parquet
import pytest
from conftest import ROOT, run_script

import fineweb
from common.tokenizer import END_OF_TEXT, encode

CONFIG = fineweb.FinewebConfig()
TEXTS = [f"document {number}" for number in range(1200)]
FIRST, SECOND, THIRD = (f"sample/10BT/00{number}_00000.parquet" for number in range(3))


def parquet(texts):
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "url": ["x"] * len(texts)}), buffer)
    return buffer.getvalue()


def card(name, path):
    return f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {path}\n"


FILES = {
    "README.md": f"---\nconfigs:\n{card('default', 'data/*')}{card('sample-10BT', 'sample/10BT/*')}---\n".encode(),
    "data/0.parquet": parquet(["not this"] * 100),
    FIRST: parquet(TEXTS[:500]),
    SECOND: parquet(TEXTS[500:1000]),
    THIRD: parquet(TEXTS[1000:]),
}


@pytest.fixture
def hub(tmp_path):
    with hub_server.serve(f"datasets/{CONFIG.dataset}", CONFIG.revision, dict(FILES)) as server:
        server.env = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "cache")}
        server.script = tmp_path / "quick_to_retry.py"
        server.script.write_text(QUICK_TO_RETRY.format(root=str(ROOT)))
        yield server


QUICK_TO_RETRY = """
import sys
sys.path.insert(0, {root!r})
import common.hub
import fineweb
common.hub.RETRY_SECONDS = (0.1,)
fineweb.run(fineweb.main)
"""


def build(hub, *flags):
    return run_script(hub.script, "--shard_size", "1000", "--workers", "1", *flags, env=hub.env)


def shards(directory):
    manifest = json.loads((directory / "manifest.json").read_text())
    return manifest, np.concatenate([np.load(directory / shard["name"]) for shard in manifest["shards"]]).tolist()


def fails_in_one_line(finished, *words):
    assert finished.returncode == 1 and len(finished.stderr.strip().splitlines()) == 1, finished.stderr
    assert all(word in finished.stderr for word in words), finished.stderr


def downloads_of(hub, name):
    return [path for method, path in hub.requests if method == "GET" and path.endswith(name)]


def test_the_full_data_set_comes_from_the_hub_at_its_pinned_revision(tmp_path, hub):
    finished = build(hub)
    assert finished.returncode == 0, finished.stderr
    manifest, tokens = shards(tmp_path / "edu_fineweb10B")
    assert tokens == [token for text in TEXTS for token in [END_OF_TEXT, *encode(text)]]
    assert manifest["source"]["revision"] == CONFIG.revision and len(CONFIG.revision) == 40
    assert "1,200 documents" in finished.stdout
    assert not list(tmp_path.rglob("*.parquet")) and not (tmp_path / "edu_fineweb10B" / ".downloads").exists()


def test_downloads_are_kept_in_the_hubs_own_cache_on_request(tmp_path, hub):
    assert build(hub, "--keep_downloads").returncode == 0
    kept = {path.name: path.read_bytes() for path in (tmp_path / "cache" / "hub").rglob("*.parquet")}
    assert kept == {name.split("/")[-1]: FILES[name] for name in (FIRST, SECOND, THIRD)}


def test_a_connection_that_breaks_is_taken_up_again(tmp_path, hub):
    hub.breaks = 2
    finished = build(hub)
    assert finished.returncode == 0, finished.stderr
    assert (
        not finished.stderr
        and hub.breaks == 0
        and shards(tmp_path / "edu_fineweb10B")[1][:2] == [END_OF_TEXT, *encode("document 0")][:2]
    )


def test_a_file_with_another_hash_is_refused_and_the_run_goes_on_when_it_is_mended(tmp_path, hub):
    hub.wrong = {SECOND}
    fails_in_one_line(build(hub), "cannot download", SECOND, "SHA-256 mismatch", "run the same command again")
    directory = tmp_path / "edu_fineweb10B"
    written = {path.name: path.read_bytes() for path in directory.glob("*.npy")}
    assert written and not json.loads((directory / "manifest.json").read_text())["complete"]
    hub.wrong = set()
    assert build(hub).returncode == 0
    assert all((directory / name).read_bytes() == content for name, content in written.items())
    assert shards(directory)[1] == [token for text in TEXTS for token in [END_OF_TEXT, *encode(text)]]


def test_a_download_that_fails_is_tried_again_with_a_notice(tmp_path, hub):
    hub.damaged_once = {SECOND}
    finished = build(hub)
    assert finished.returncode == 0, finished.stderr
    assert f"trying again in 0.1 s: {SECOND} could not be had: SHA-256 mismatch" in finished.stdout
    assert len(downloads_of(hub, SECOND)) == 2 and not hub.damaged_once
    assert shards(tmp_path / "edu_fineweb10B")[1] == [token for text in TEXTS for token in [END_OF_TEXT, *encode(text)]]


def test_parts_of_downloads_that_were_killed_do_not_pile_up(tmp_path, hub):
    left = tmp_path / "edu_fineweb10B" / ".downloads" / ".cache" / "huggingface" / "part.12345678.incomplete"
    left.parent.mkdir(parents=True)
    left.touch()
    hub.wrong = {THIRD}
    fails_in_one_line(build(hub), THIRD)
    assert (tmp_path / "edu_fineweb10B" / ".downloads").exists() and not left.exists()
    hub.wrong = set()
    assert build(hub, "--keep_downloads").returncode == 0
    assert not (tmp_path / "edu_fineweb10B" / ".downloads").exists()


def test_files_that_are_in_shards_are_not_downloaded_again(hub, tmp_path):
    hub.wrong = {THIRD}
    fails_in_one_line(build(hub), THIRD)
    hub.wrong, hub.requests = set(), []
    assert build(hub).returncode == 0
    assert not downloads_of(hub, FIRST) and downloads_of(hub, THIRD)


def test_only_files_that_can_be_read_are_taken(hub):
    hub.files["sample/10BT/003.jsonl.gz"] = b"x"
    fails_in_one_line(build(hub), "003.jsonl.gz")
    del hub.files["sample/10BT/003.jsonl.gz"]
    hub.files[FIRST] = b"x" * 10_000
    fails_in_one_line(build(hub), "000_00000.parquet", "not a whole parquet file")


def test_without_a_network_the_hub_is_one_line_and_nothing_is_lost(tmp_path):
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    fails_in_one_line(run_script("fineweb.py", env=env), "HuggingFaceFW/fineweb-edu", "--input")


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached_or_fails_is_one_line_without_the_libraries_warnings(hub):
    for broken in ("README.md", FIRST):  # the libraries try for 25 seconds each
        hub.broken = {broken}
        fails_in_one_line(build(hub), "HuggingFaceFW/fineweb-edu", "run the same command again, or give local files")
    hub.env["HF_ENDPOINT"] = "http://127.0.0.1:1"  # where nothing listens
    hub.env["HF_HOME"] += "/empty"
    fails_in_one_line(build(hub), "HuggingFaceFW/fineweb-edu", "run the same command again, or give local files")


def test_ctrl_c_does_not_wait_for_a_download(tmp_path, hub):
    hub.stalls = threading.Event()
    command = [sys.executable, ROOT / "fineweb.py", "--shard_size", "1000"]
    env = os.environ | hub.env
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env)
    while not downloads_of(hub, FIRST):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    hub.stalls.set()
    assert process.returncode == 130 and errors == "fineweb.py: error: interrupted\n"


def test_a_build_that_stops_at_max_tokens_leaves_no_download(tmp_path, hub):
    finished = build(hub, "--max_tokens", "1001")  # the first file has more
    assert finished.returncode == 0 and not finished.stderr, finished.stderr
    assert len(shards(tmp_path / "edu_fineweb10B")[1]) == 1001
    assert not (tmp_path / "edu_fineweb10B" / ".downloads").exists()


def test_only_what_comes_from_the_hub_is_removed(tmp_path, hub):
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "a.jsonl").write_text('{"text": "one"}\n' * 100)
    flags = ["--input", "downloads/a.jsonl", "--out_dir", ".", "--shard_size", "50"]
    assert run_script("fineweb.py", *flags).returncode == 0
    assert (tmp_path / "downloads" / "a.jsonl").exists()


@pytest.mark.slow
def test_a_build_killed_while_it_downloads_ends_in_the_same_bytes(tmp_path, hub):
    assert build(hub, "--out_dir", "whole").returncode == 0
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    hub.env["HF_HOME"] = str(tmp_path / "other")
    command = [sys.executable, ROOT / "fineweb.py", "--shard_size", "1000", "--workers", "1", "--out_dir", "torn"]
    for number in range(1, 7):
        process = subprocess.Popen(command, env=os.environ | hub.env, stdout=subprocess.DEVNULL)
        hub.requests = []
        while process.poll() is None and len(hub.requests) < 5 * number:
            time.sleep(0.001)
        process.kill()
        process.wait()
    assert build(hub, "--out_dir", "torn").returncode == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "torn").iterdir()} == whole
