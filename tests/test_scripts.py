"""The scripts as a person runs them: flags, messages, exit statuses, several processes."""

import ast
import dataclasses
import io
import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run_script

import common
import fineweb
import hellaswag
import plot
import sample
import tokenizer
import train_gpt2
from model import GPT, GPTConfig

SCRIPTS = {
    "fineweb.py": fineweb.FinewebConfig,
    "train_gpt2.py": train_gpt2.TrainConfig,
    "hellaswag.py": hellaswag.HellaswagConfig,
    "sample.py": sample.SampleConfig,
}
TINY_RUN = [
    *"--model debug --device cpu --dtype float32 --block_size 16 --batch_size 2 --total_batch_size 64".split(),
    *"--max_steps 4 --warmup_steps 2 --data_dir shards --eval_every 2 --save_every 2 --sample_every 0".split(),
]


def losses(directory, key="loss"):
    return {record["step"]: record[key] for record in plot.read_log(directory / "log.jsonl") if key in record}


@pytest.fixture
def inside(capsys):
    """Run a script within this process, which is quicker; returns its exit status, output and errors."""

    def run_inside(name, *flags):
        main = __import__(name.removesuffix(".py")).main
        with pytest.raises(SystemExit) as end:
            common.run(lambda: main([str(flag) for flag in flags]))
        return end.value.code, *capsys.readouterr()

    return run_inside


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_lists_every_field_with_its_meaning_and_default(inside, name):
    status, printed, _ = inside(name, "--help")
    words = " ".join(printed.split())
    assert status == 0
    for field in dataclasses.fields(SCRIPTS[name]):
        assert field.name in words
        assert " ".join(field.metadata["help"].split()) in words, field.name
        assert field.default in (None, (), dataclasses.MISSING) or f"(default: {field.default})" in words, field.name


@pytest.mark.parametrize(
    ("name", "flag", "suggestion"),
    [
        ("train_gpt2.py", "--batchsize", "--batch_size"),
        ("train_gpt2.py", "--max_step=3", "--max_steps"),
        ("train_gpt2.py", "--batch-size", "--batch_size"),
        ("fineweb.py", "--shard", "--shard_size"),
        ("hellaswag.py", "--modle", "--model"),
        ("sample.py", "--topk", "--top_k"),
        ("sample.py", "--xyzzy", "--help"),
    ],
)
def test_an_unknown_or_abbreviated_flag_suggests_the_right_one(inside, name, flag, suggestion):
    status, _, said = inside(name, flag, "3")
    assert status == 2 and suggestion in said and flag.split("=")[0] in said
    assert len(said.strip().splitlines()) == 1


def test_each_mistake_ends_in_one_line_and_its_status(inside, make_shards, tmp_path, capsys):
    make_shards()
    capsys.readouterr()
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "log.jsonl").write_text("")
    mistakes = [
        (2, "--batch_size", "train_gpt2.py", "--batch_size", "many"),
        (2, "--compile", "train_gpt2.py", "--compile=maybe"),
        (2, "total_batch_size", "train_gpt2.py", *TINY_RUN, "--total_batch_size", "100"),
        (2, "--resume", "train_gpt2.py", *TINY_RUN, "--out_dir", "held"),
        (1, "fineweb.py", "train_gpt2.py", *TINY_RUN, "--data_dir", "empty"),
        (2, "nothing.parquet", "fineweb.py", "--input", "nothing.parquet"),
        (2, "--checkpoint", "sample.py"),
        (1, "empty", "sample.py", "--checkpoint", "empty"),
        (2, "--data", "hellaswag.py", "--model", "empty", "--data", "nowhere.jsonl"),
        (2, "--revision", "fineweb.py", "--dataset", "some/other"),
        (2, "--shard_size", "fineweb.py", "--max_tokens", "1"),
        (2, "--temperature", "sample.py", "--checkpoint", "empty", "--temperature", "-1"),
        (2, "--prompt", "sample.py", "--checkpoint", "empty", "--prompt", ""),
        (2, "blank.txt", "sample.py", "--checkpoint", "empty", "--file", "blank.txt"),
        (2, "--file", "sample.py", "--checkpoint", "empty", "--prompt", "a", "--file", "blank.txt"),
        (2, "nowhere.txt", "sample.py", "--checkpoint", "empty", "--file", "nowhere.txt"),
        (1, "UTF-8", "sample.py", "--checkpoint", "empty", "--file", "latin.txt"),
        (2, "--top_p", "sample.py", "--checkpoint", "empty", "--top_p", "0"),
        (1, "no/such/directory", "sample.py", "--checkpoint", "no/such/directory"),
        (1, "empty", "train_gpt2.py", "--init_from", "empty"),
        (2, "--model", "train_gpt2.py", "--init_from", "empty", "--model", "gpt2"),
        (1, "empty", "hellaswag.py", "--model", "empty", "--data", "blank.txt"),
        (2, "--batch_tokens", "hellaswag.py", "--model", "empty", "--batch_tokens", "0"),
        (2, "--model", "hellaswag.py"),
        (1, "log.jsonl", "plot.py", "empty"),
        (1, "log.jsonl", "plot.py"),
    ]
    for status, words, *command in mistakes:
        ended, _, said = inside(*command)
        assert ended == status, (command, said)
        assert words in said and len(said.strip().splitlines()) == 1, (command, said)
    assert not (tmp_path / "log").exists()


def test_importing_any_file_has_no_effect(tmp_path):
    program = """
import os, random, sys, threading
sys.path.insert(0, sys.argv[1])
import matplotlib, numpy, torch
def state():
    return (sorted(os.listdir()), dict(os.environ), threading.active_count(), random.getstate(),
            os.times().children_user, torch.get_rng_state().tolist(), torch.get_num_threads(),
            torch.get_float32_matmul_precision(),
            str(numpy.random.get_state()), torch.cuda.is_initialized(), torch.distributed.is_initialized())
before = state()
import common, fineweb, hellaswag, model, plot, sample, tokenizer, train_gpt2
assert state() == before
assert tokenizer.encoding.cache_info().currsize == 0
"""
    finished = subprocess.run([sys.executable, "-c", program, str(ROOT)], capture_output=True, text=True)
    assert finished.returncode == 0 and not finished.stdout and not finished.stderr, finished.stderr


def test_no_pickle_is_written_or_read():
    for path in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert called not in {"torch.save", "torch.load", "pickle.dump", "pickle.load", "exec", "eval"}, path.name


def test_two_processes_give_the_losses_of_one_and_resume_each_other(make_shards, tmp_path):
    make_shards()
    for processes in (0, 2):
        finished = run_script("train_gpt2.py", *TINY_RUN, "--out_dir", f"log{processes}", processes=processes)
        assert finished.returncode == 0, finished.stderr
        assert finished.stdout.count("expected first loss") == 1  # one process prints
    one, two = tmp_path / "log0", tmp_path / "log2"
    for key in ("loss", "val_loss", "norm"):
        first, second = losses(one, key), losses(two, key)
        assert first.keys() == second.keys() and len(first) >= 3
        assert all(second[step] == pytest.approx(first[step], rel=2e-5) for step in first), (key, first, second)
    assert losses(one, "position") == losses(two, "position")
    # the other number of processes goes on from step 2
    for directory, processes in ((one, 2), (two, 0)):
        expected = losses(directory)
        shutil.rmtree(directory / "step_000004")
        finished = run_script("train_gpt2.py", *TINY_RUN, "--out_dir", directory, "--resume", processes=processes)
        assert finished.returncode == 0, finished.stderr
        again = losses(directory)
        assert all(again[step] == pytest.approx(expected[step], rel=2e-5) for step in expected)


def test_two_processes_resume_bit_for_bit(make_shards, tmp_path):
    make_shards()
    assert run_script("train_gpt2.py", *TINY_RUN, processes=2).returncode == 0
    whole = (tmp_path / "log" / "step_000004" / "model.safetensors").read_bytes()
    expected = losses(tmp_path / "log")
    shutil.rmtree(tmp_path / "log" / "step_000004")
    assert run_script("train_gpt2.py", *TINY_RUN, "--resume", processes=2).returncode == 0
    assert losses(tmp_path / "log") == expected
    assert (tmp_path / "log" / "step_000004" / "model.safetensors").read_bytes() == whole


def test_two_processes_finish_when_the_only_checkpoint_is_the_last(make_shards, tmp_path):
    make_shards()
    flags = [*TINY_RUN, "--save_every", "0", "--val_tokens", "16"]  # one row to validate on, for two processes
    finished = run_script("train_gpt2.py", *flags, processes=2)
    assert finished.returncode == 0, finished.stderr
    assert "finished: log/step_000004" in finished.stdout
    assert run_script("train_gpt2.py", *flags, "--out_dir", "one").returncode == 0
    two, one = losses(tmp_path / "log", "val_loss"), losses(tmp_path / "one", "val_loss")
    assert one and all(two[step] == pytest.approx(one[step], rel=2e-5) for step in one)


def test_a_machine_without_the_shared_disk_is_refused(make_shards, tmp_path):
    """Two machines, as two processes in directories of their own, of which only the first has the checkpoint."""
    make_shards()
    assert run_script("train_gpt2.py", *TINY_RUN).returncode == 0
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "shards").symlink_to(tmp_path / "shards")
    shutil.rmtree(tmp_path / "log" / "step_000004")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = []
    for rank, directory in enumerate([tmp_path, tmp_path / "second"]):
        env = os.environ | place | {"RANK": str(rank), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(ROOT / "train_gpt2.py"), *TINY_RUN, "--resume"]
        started.append(subprocess.Popen(command, cwd=directory, env=env, stderr=subprocess.PIPE, text=True))
    for process in started:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 1 and "--out_dir log must be on a disk that all machines share" in said, said


def test_a_terminal_without_the_characters_does_not_end_a_run(make_shards):
    make_shards()
    env = {"PYTHONIOENCODING": "ascii"}
    finished = run_script("train_gpt2.py", *TINY_RUN, "--sample_every", "1", env=env)
    assert finished.returncode == 0, finished.stderr
    assert run_script("sample.py", "--checkpoint", "log/step_000004", "--prompt", "日本", env=env).returncode == 0


def test_two_runs_may_build_the_sample_at_once(tmp_path):
    command = [sys.executable, str(ROOT / "fineweb.py"), "--sample", "--workers", "1"]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    ends = [output.splitlines()[-1] for output, _ in said]
    assert ends[0] == ends[1] and "documents" in ends[0]
    assert sum("waiting for another process" in output for output, _ in said) <= 1


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="on a CPU, torch.compile needs a C++ compiler")
def test_two_compiled_processes_give_the_losses_of_one_eager(make_shards, tmp_path):
    make_shards()
    assert run_script("train_gpt2.py", *TINY_RUN, "--out_dir", "eager").returncode == 0
    finished = run_script("train_gpt2.py", *TINY_RUN, "--compile", processes=2, timeout=600)
    assert finished.returncode == 0, finished.stderr
    eager, compiled = losses(tmp_path / "eager"), losses(tmp_path / "log")
    assert eager and all(compiled[step] == pytest.approx(eager[step], abs=1e-3) for step in eager)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="on a CPU, torch.compile needs a C++ compiler")
@pytest.mark.parametrize("processes", [0, 2])
def test_the_training_benchmark_ends_in_the_figures_of_each_way(processes):
    flags = ["--model", "debug", "--batch_size", "1", "--steps", "1", "--warmup", "1", "--device", "cpu"]
    finished = run_script("benchmarks/train.py", *flags, processes=processes, timeout=600)
    assert finished.returncode == 0, finished.stderr
    figures = json.loads(finished.stdout.splitlines()[-1])
    ways = {"transformers", "transformers_compiled", "eager", "compiled", "default"}
    assert figures["device"] == "cpu" and figures["ceiling_flops_per_second"] > 0
    for key in ("tokens_per_second", "peak_memory_bytes"):
        assert figures[key].keys() == ways and min(figures[key].values()) > 0


def test_a_mistake_under_torchrun_is_said_once(make_shards):
    make_shards()
    finished = run_script("train_gpt2.py", *TINY_RUN, "--batch_size", "3", processes=2)
    assert finished.returncode != 0
    assert finished.stderr.count("train_gpt2.py: error: --total_batch_size 64 is not a multiple of") == 1
    assert "2 process(es)" in finished.stderr and "UsageError" not in finished.stderr


def test_an_empty_standard_input_is_no_prompt(monkeypatch):
    monkeypatch.setattr(sample, "is_piped", lambda: True)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    with pytest.raises(ValueError, match="standard input is empty"):
        sample.read_prompt(sample.SampleConfig(checkpoint=""))


def test_a_checkpoint_can_be_sampled_scored_and_drawn(inside, make_shards, tmp_path, capsys):
    make_shards()
    capsys.readouterr()
    assert run_script("train_gpt2.py", *TINY_RUN, "--out_dir", "log").returncode == 0
    checkpoint = tmp_path / "log" / "step_000004"
    flags = ["--checkpoint", checkpoint, "--num_samples", "2", "--max_new_tokens", "5", "--device", "cpu"]
    first = run_script("sample.py", *flags, "--prompt", "The cat")
    assert first.returncode == 0 and first.stdout.count("The cat") == 2
    assert run_script("sample.py", *flags, input="The cat\n").stdout == first.stdout  # from standard input
    (tmp_path / "prompt.txt").write_text("The cat\n")
    for seed, same in ((42, True), (43, False)):
        _, said, _ = inside("sample.py", *flags, "--file", "prompt.txt", "--seed", seed)
        assert (said == first.stdout) == same
    example = {"ctx": "A man sits. he", "endings": ["is wet.", "sings.", "is.", "runs away."], "label": 1}
    example |= {"ctx_a": "A man sits.", "ctx_b": "he", "activity_label": "Sitting"}
    (tmp_path / "examples.jsonl").write_text(json.dumps(example) + "\n")
    scored = run_script("hellaswag.py", "--model", checkpoint, "--data", "examples.jsonl", "--device", "cpu")
    assert scored.returncode == 0 and scored.stdout.startswith("1 examples\nnanogpt  acc "), scored.stderr
    (tmp_path / "log" / "loss.png").unlink()
    drawn = run_script("plot.py", "log")
    assert drawn.returncode == 0 and drawn.stdout.strip() == "log/loss.png"
    assert (tmp_path / "log" / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def scripted(monkeypatch):
    """Let the model say these tokens, and no others."""

    def make(tokens):
        monkeypatch.setattr(sample.GPT, "stream", lambda *_: (torch.tensor([[token]]) for token in tokens))
        return GPT(GPTConfig(block_size=8, n_layer=1, n_head=1, n_embd=4))

    return make


def test_text_is_shown_as_it_comes_with_characters_whole(scripted):
    text = "naïve 你好 🙂!"
    tokens = tokenizer.encode(text)
    pieces = list(sample.continuation(scripted(tokens), sample.SampleConfig(checkpoint=""), "a"))
    assert "".join(pieces) == text and len(pieces) == len(tokens) + 1
    assert "" in pieces  # a token that ends inside a character shows nothing yet
    cut = tokenizer.encode("🙂")[:-1]
    assert "".join(sample.continuation(scripted(cut), sample.SampleConfig(checkpoint=""), "a")) == "\ufffd"


def test_text_stops_before_end_of_text(scripted):
    tokens = [*tokenizer.encode("One."), tokenizer.END_OF_TEXT, *tokenizer.encode(" Two.")]
    assert "".join(sample.continuation(scripted(tokens), sample.SampleConfig(checkpoint=""), "a")) == "One."
