import os

# before torch is imported: two processes on two cores crawl if each starts two threads
os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

WORDS = (
    "the of and a to in is you that it he was for on are as with his they I at be this have from or one had by".split()
)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes, and is run by `make test-slow`")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Each test runs in an empty directory of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def make_shards(tmp_path):
    """Build shards of random words: make_shards(tokens=..., shard_size=...) returns their directory."""
    import fineweb

    def make(tokens=4000, shard_size=1000, out="shards"):
        generator = random.Random(0)
        source = tmp_path / "source.jsonl"
        with open(source, "w") as file:
            for _ in range(tokens // 20):
                text = " ".join(generator.choices(WORDS, k=generator.randrange(1, 60)))
                file.write(json.dumps({"text": text}) + "\n")
        flags = ["--input", str(source), "--out", out, "--shard_size", str(shard_size), "--workers", "1"]
        fineweb.main([*flags, "--max_tokens", str(tokens)])
        return tmp_path / out

    return make


def run_script(script, *flags, processes=0, env=None, timeout=180, input=None):
    """Run a script as a person does, under torchrun if processes are given; returns the finished process."""
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""} | (env or {})
    command = [*launcher, str(ROOT / script), *map(str, flags)]
    source = {"stdin": subprocess.DEVNULL} if input is None else {"input": input}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout, **source)


@pytest.fixture
def script():
    return run_script
