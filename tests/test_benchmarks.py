"""The benchmarks: each ends in a line of JSON with its figures, and the predicted memory is what a step takes."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from benchmarks import batches, checkpoint, generate, memory, muon, train
from common.script import UsageError
from common.sharding import Loss, recompute_blocks
from common.tokenizer import N_TOKENS
from model import GPT, PRESETS, GPTConfig

SIZES = GPTConfig(block_size=128, n_layer=3, n_head=2, n_embd=64)

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="on a CPU, torch.compile needs a C++ compiler")


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def run_benchmark(*command):
    """Run a module as README says, from the top of the repository; returns its last line's figures."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    finished = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


def test_cached_generation_writes_the_tokens_of_the_uncached(small_debug, capsys):
    generate.main(["--model", "debug", "--new_tokens", "40", "--device", "cpu"])
    figures = last_line(capsys)
    assert figures["model"] == "debug" and figures["device"] == "cpu"
    assert figures["same_tokens"] is True
    rates = figures["tokens_per_second"]
    assert figures["ratio"] == pytest.approx(rates["cached"] / rates["uncached"])


def test_the_muon_benchmark_does_all_work_of_one_process_in_either_way(monkeypatch, capsys):
    sizes, orthogonalize = [], muon.orthogonalize_across_processes
    monkeypatch.setattr(
        muon, "orthogonalize_across_processes", lambda m, world: (sizes.append(m.numel()), orthogonalize(m, world))[1]
    )
    muon.main(["--model", "debug", "--repeat", "1", "--device", "cpu"])
    figures = last_line(capsys)
    assert figures["processes"] == 1
    assert figures["ratio"] == pytest.approx(figures["seconds"]["repeated"] / figures["seconds"]["divided"])
    C = PRESETS["debug"].n_embd
    assert sum(sizes) == 4 * 12 * C * C * PRESETS["debug"].n_layer  # twice, and twice to warm up


def test_the_batches_benchmark_waits_less_for_what_was_read_ahead(capsys):
    batches.main(["--processes", "2", "--steps", "3", "--step_ms", "50"])
    figures = last_line(capsys)
    assert list(figures) == [f"rank {rank}, {order}" for order in ("in order", "shuffled") for rank in (0, 1)]
    assert figures["rank 0, shuffled"]["ahead_ms"] < figures["rank 0, shuffled"]["asked_ms"]


def test_the_checkpoint_benchmark_ends_in_its_figures_and_leaves_nothing_behind(small_debug, tmp_path, capsys):
    checkpoint.main(["--model", "debug", "--repeat", "2", "--out_dir", str(tmp_path)])
    figures = last_line(capsys)
    weights = 4 * sum(parameter.numel() for parameter in GPT(small_debug).parameters())
    assert figures["bytes"] > 2.9 * weights  # and as much for each of two moments, all without the padding
    assert [len(figures["seconds"][way]) for way in ("save", "write")] == [2, 2]
    assert figures["ratio"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("work", "config", "flag"),
    [
        (generate.compare, generate.BenchmarkConfig(new_tokens=0), "--new_tokens"),
        (generate.compare, generate.BenchmarkConfig(device="abacus"), "--device abacus"),
        (muon.compare, muon.BenchmarkConfig(repeat=0), "--repeat"),
        (checkpoint.compare, checkpoint.BenchmarkConfig(repeat=0), "--repeat"),
        (checkpoint.compare, checkpoint.BenchmarkConfig(out_dir="nowhere"), "--out_dir nowhere"),
        (train.compare, train.BenchmarkConfig(device="cpu", steps=0), "--steps"),
        (train.compare, train.BenchmarkConfig(device="cpu", total_batch_size=1000), "--total_batch_size 1000"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named_before_anything_is_measured(work, config, flag):
    with pytest.raises(UsageError, match=flag):
        work(config)


def has_peak_memory(peak):
    return peak > 0 if sys.platform == "linux" else peak is None


def test_a_single_way_of_training_ends_in_its_figures_with_a_profile_before(small_debug, capsys):
    train.main(["--model", "debug", "--only", "eager", "--profile", "--steps", "1", "--warmup", "1", "--device", "cpu"])
    output = capsys.readouterr().out
    figures = json.loads(output.splitlines()[-1])
    assert figures["tokens_per_second"] > 0 and has_peak_memory(figures["peak_memory_bytes"])
    assert "aten::mm" in output or "aten::addmm" in output


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("launcher", [[], ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]])
def test_the_training_benchmark_ends_in_the_figures_of_each_way(launcher):
    flags = ["--model", "debug", "--batch_size", "1", "--steps", "1", "--warmup", "1", "--device", "cpu"]
    figures = run_benchmark(*launcher, "benchmarks.train", *flags, "--optimizer", "muon")
    assert figures["device"] == "cpu" and figures["model"] == "debug"
    assert figures["ceiling_flops_per_second"] > 0 and figures["flops_per_token"] > 0
    for key in ("tokens_per_second", "peak_memory_bytes"):
        assert figures[key].keys() == {*train.WAYS, "default", "default_adamw"}
    assert min(figures["tokens_per_second"].values()) > 0
    assert all(map(has_peak_memory, figures["peak_memory_bytes"].values()))


def test_the_memory_benchmark_ends_in_the_largest_batches(small_debug, capsys):
    memory.main(["--model", "debug"])
    figures = last_line(capsys)
    ways = [f"debug, {way}" for way in ("whole", "shard 2", "shard 4", "shard 8")]
    assert list(figures) == ways + [f"{way}, recomputed" for way in ways]
    for memory_of_way in figures.values():
        batches = memory_of_way["largest_batch_size"]
        assert batches.keys() == {"24", "40", "80"}
        for gigabytes, rows in batches.items():
            needed = memory_of_way["fixed_bytes"] + rows * memory_of_way["bytes_per_row"]
            assert needed <= 0.9e9 * int(gigabytes) < needed + memory_of_way["bytes_per_row"]


def test_shard_divides_16_bytes_a_parameter_and_adds_gradients_embeddings_and_three_blocks():
    sizes = PRESETS["gpt2-xl"]
    whole = memory.Memory(fixed_bytes=30 * 10**9, bytes_per_row=10**9)
    shapes = {name: weight.numel() for name, weight in on_meta(sizes).named_parameters()}
    block = sum(size for name, size in shapes.items() if ".h.0." in name)
    rest = sum(size for name, size in shapes.items() if ".h." not in name)
    for cards in (2, 8):
        parameters = sum(shapes.values())
        added = 4 * parameters + 4 * rest + 12 * block
        expected = 30 * 10**9 - 16 * parameters * (cards - 1) / cards + added
        assert memory.with_shard(whole, sizes, cards).fixed_bytes == pytest.approx(expected, abs=1)


def on_meta(sizes):
    with torch.device("meta"):
        return GPT(sizes)


def test_no_batch_fits_where_the_fixed_bytes_do_not():
    assert memory.Memory(fixed_bytes=10**11, bytes_per_row=1).largest_batch_size(80) == 0


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("recompute", [False, True])
def test_a_compiled_step_takes_the_predicted_memory(tmp_path, recompute):
    rows = 3
    parameters = sum(parameter.numel() for parameter in GPT(SIZES).parameters())
    predicted = memory.predict(SIZES, recompute)
    allocated = predicted.fixed_bytes - 16 * parameters + rows * predicted.bytes_per_row
    peak = peak_of_a_step(SIZES, rows, recompute, tmp_path / "trace.json")
    assert peak == pytest.approx(allocated, rel=0.01)  # of which 0.8% are workspaces


def peak_of_a_step(sizes, batch_size, recompute, trace):
    """The most bytes that a compiled forward and backward pass has allocated at a time, gradients aside."""
    torch.compiler.reset()
    gpt = GPT(sizes)
    if recompute:
        recompute_blocks(gpt)
    model = torch.compile(Loss(gpt), fullgraph=True, dynamic=False)
    rows = torch.randint(N_TOKENS, (batch_size, sizes.block_size + 1))

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(rows[:, :-1], rows[:, 1:])
        loss.backward()

    step()  # afterwards the gradients are there
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    profile.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    in_use = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        in_use += event["args"]["Bytes"]
        peak = max(peak, in_use)
    return peak
