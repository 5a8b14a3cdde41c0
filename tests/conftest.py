"""What the tests share: a directory of their own, shards of random words, and one way to run a tiny training."""

import os

# before torch is imported: two processes on two cores crawl if each starts two threads
os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import random
import shutil
import subprocess
import sys
from dataclasses import fields, replace
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
def own_directory(tmp_path, monkeypatch):
    """Each test runs in an empty directory of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def built_shards(tmp_path_factory):
    """Build shards of random words, each kind once a session: built_shards(tokens, shard_size) returns a directory."""
    import fineweb

    built = {}

    def build(tokens, shard_size):
        if (tokens, shard_size) not in built:
            generator = random.Random(0)
            directory = tmp_path_factory.mktemp("shards")
            texts = [" ".join(generator.choices(WORDS, k=generator.randrange(1, 60))) for _ in range(tokens // 20)]
            source = directory / "source.jsonl"
            source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
            fineweb.build(
                fineweb.FinewebConfig(
                    input=(str(source),),
                    out_dir=str(directory / "shards"),
                    shard_size=shard_size,
                    max_tokens=tokens,
                    encoder="tiktoken",
                    workers=1,
                )
            )
            built[tokens, shard_size] = directory / "shards"
        return built[tokens, shard_size]

    return build


@pytest.fixture
def make_shards(built_shards, tmp_path):
    """A copy of such shards in the test's own directory: make_shards(tokens, shard_size, name) returns its path."""

    def make(tokens=4000, shard_size=1000, name="shards"):
        return Path(shutil.copytree(built_shards(tokens, shard_size), tmp_path / name))

    return make


@pytest.fixture
def small_debug(monkeypatch):
    """Make the debug model smaller still, for runs within this process."""
    import model

    sizes = model.GPTConfig(block_size=32, n_layer=2, n_head=2, n_embd=16)
    monkeypatch.setitem(model.PRESETS, "debug", sizes)
    return sizes


def small_gpt(seed=0, **sizes):
    """A network of three small layers with random weights."""
    import torch

    from model import GPT, GPTConfig

    torch.manual_seed(seed)
    return GPT(GPTConfig(**({"block_size": 32, "vocab_size": 211, "n_layer": 3, "n_head": 4, "n_embd": 32} | sizes)))


def random_ids(*shape, vocab_size=211, seed=1):
    import torch

    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def tiny_config(**changes):
    """The settings of a run of seconds, on `make_shards`'s shards."""
    from recipes import RECIPES

    settings = {
        "data_dir": "shards",
        "device": "cpu",
        "dtype": "float32",
        "batch_size": 2,
        "block_size": 16,
        "total_batch_size": 128,
        "max_steps": 8,
        "warmup_steps": 2,
        "max_lr": 1e-2,
        "eval_every": 4,
        "val_tokens": 128,
        "sample_every": 0,
        "save_every": 4,
        "keep": 10,
    }
    return replace(RECIPES["debug"], **(settings | changes))


def flags_of(config):
    """The command line that gives these settings."""
    flags = []
    for field in fields(config):
        value = getattr(config, field.name)
        if "bool" in field.type and "None" not in field.type:
            flags.append(f"--{field.name}" if value else f"--no_{field.name}")
        elif value is not None:
            flags += [f"--{field.name}", str(value)]
    return flags


def run_script(script, *flags, processes=0, env=None, timeout=180, input=None):
    """Run a script as a person does, under torchrun if processes are given; returns the finished process."""
    launcher = [sys.executable]
    if processes:
        launcher += [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--local_addr=127.0.0.1",
            f"--nproc_per_node={processes}",
        ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""} | (env or {})
    command = [*launcher, str(ROOT / script), *map(str, flags)]
    source = {"stdin": subprocess.DEVNULL} if input is None else {"input": input}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout, **source)


def records(directory, key="loss"):
    """What a run's log says of `key`, by step."""
    from common.log import read_log

    return {record["step"]: record[key] for record in read_log(directory) if key in record}


def assert_moved_alike(directory, expected, seed, tolerance):
    """The weights of two checkpoints moved from those of the seed in the same way, but for a share of the distance."""
    import torch

    from common.huggingface import load_gpt
    from model import GPT

    gpt, theirs = load_gpt(directory), load_gpt(expected).state_dict()
    torch.manual_seed(seed)
    begun = GPT(gpt.config).state_dict()
    for name, weight in gpt.state_dict().items():
        assert (weight - theirs[name]).norm() < tolerance * (theirs[name] - begun[name]).norm(), name
