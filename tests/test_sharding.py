"""With --shard a run computes, logs and saves what it does without, and each process holds its part alone."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT, assert_moved_alike, records, run_script, tiny_config

import hellaswag
import plot
from common import muon
from common.files import sha256
from common.huggingface import load_gpt
from model import GPT, PRESETS, GPTConfig
from train_gpt2 import train

SIZES = GPTConfig(block_size=32, n_layer=2, n_head=2, n_embd=16)
# a batch that grows, clipping, accumulation, and no number of rows that the processes share evenly in validation
SETTINGS = {
    "total_batch_size": 128,
    "initial_batch_size": 64,
    "batch_ramp_tokens": 1500,
    "max_steps": 30,
    "max_lr": 3e-3,
    "grad_clip": 0.5,
    "eval_every": 15,
    "val_tokens": 16 * 9,
    "hellaswag_every": 15,
    "sample_every": 15,
    "save_every": 15,
}

MUON = {
    "optimizer": "muon",
    "schedule": "linear",
    "total_batch_size": 64,
    "max_steps": 4,
    "eval_every": 2,
    "save_every": 2,
    "monitor_every": 3,  # the step after one with a validation alone, which leaves weights gathered
    "sample_every": 0,
    "hellaswag_every": 0,
}

RUNS = """
import contextlib, json, os, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from pathlib import Path
import hellaswag, model, plot, torch, train_gpt2
from common import muon
from common.processes import start_processes
from conftest import tiny_config
muon.has_bfloat16 = lambda device: False
model.PRESETS["debug"] = model.{sizes!r}
hellaswag.FILE = Path("examples.jsonl")
hellaswag.download = lambda: hellaswag.FILE
plot.draw = lambda directory: None
make_trainer = train_gpt2.make_trainer
trainers = []
def watched(*arguments):
    trainers.append(make_trainer(*arguments))
    return trainers[-1]
train_gpt2.make_trainer = watched
def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
torch._C._get_accelerator = lambda *_: torch.device("cuda")  # as in a build for CUDA on a machine without a GPU
set_gradient_sync, reduced = train_gpt2.Trainer.set_gradient_sync, []
def watched_reduction(trainer, enabled):
    gradients = [parameter.grad for parameter in trainer.state.gpt.parameters()]
    reduced.append(any(gradient is not None and bool(local(gradient).any()) for gradient in gradients))
    set_gradient_sync(trainer, enabled)
train_gpt2.Trainer.set_gradient_sync = watched_reduction
with start_processes("cpu", timeout=60) as world:
    train_gpt2.start_processes = lambda *_: contextlib.nullcontext(world)
    for changes in json.loads(sys.argv[1]):
        reduced.clear()
        train_gpt2.train(tiny_config(**changes))
        state = trainers[-1].state
        state.gpt.state_dict()
        parameters = list(state.gpt.parameters())
        tensors = parameters + [parameter.grad for parameter in parameters]
        tensors += [value for values in state.optimizer.state.values() for value in values.values()]
        Path(changes["out_dir"], f"bytes_{{world.rank}}").write_text(str(sum(local(t).nbytes for t in tensors)))
        Path(changes["out_dir"], "reduced").write_text(json.dumps(reduced))
sys.stdout.flush()
os._exit(0)  # as `run` does: a process group's threads may abort an interpreter that exits as usual
"""


def train_together(directory, processes, *runs):
    """Do these runs, one after the other, in the processes of one torchrun."""
    (directory / "runs.py").write_text(RUNS.format(root=str(ROOT), sizes=SIZES))
    finished = run_script(directory / "runs.py", json.dumps(runs), processes=processes, timeout=300)
    assert finished.returncode == 0, finished.stderr
    assert "Warning" not in finished.stderr
    return finished.stdout


def clip_in_double(parameters, max_norm):
    """Clipping by the definition: torch's norm in fp32 of an embedding's gradient is off by 1e-4 on a CPU."""
    gradients = [parameter.grad for parameter in parameters]
    norm = math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients))
    for gradient in gradients:
        gradient *= min(1.0, max_norm / norm)
    return torch.tensor(norm)


def train_alone(settings, **changes):
    """Train in this process, to compare with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plot, "draw", lambda directory: None)
        patch.setitem(PRESETS, "debug", SIZES)
        patch.setattr(muon, "has_bfloat16", lambda device: False)  # it would round as coarsely as an error might be
        patch.setattr(torch.nn.utils, "clip_grad_norm_", clip_in_double)
        patch.setattr(hellaswag, "FILE", Path("examples.jsonl"))
        patch.setattr(hellaswag, "download", lambda: hellaswag.FILE)
        train(tiny_config(**(settings | changes)))


def interrupt(run, copy):
    """A copy of a run as if it had been killed before it saved its last checkpoint."""
    shutil.copytree(run, copy)
    shutil.rmtree(max(copy.glob("step_*")))


def write_hellaswag(path):
    """Three examples, of which two processes have two and one."""
    endings = ["is wet.", "sings a song.", "is.", "runs away."]
    example = {"ctx": "A man sits. he", "ctx_a": "A man sits.", "ctx_b": "he", "activity_label": "Sitting"}
    lines = [json.dumps(example | {"endings": endings, "label": number}) for number in range(3)]
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def runs(built_shards, tmp_path_factory):
    """The same run by one process and by two with --shard, and each resumed halfway as the other."""
    directory = tmp_path_factory.mktemp("runs")
    shutil.copytree(built_shards(6000, 1000), directory / "shards")
    write_hellaswag(directory / "examples.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        train_alone(SETTINGS, out_dir="one")
        train_alone(MUON, out_dir="one_muon")
        interrupt(directory / "one", directory / "divided_from_one")
        interrupt(directory / "one_muon", directory / "divided_muon_from_one")
        divided = SETTINGS | {"shard": True}
        printed = train_together(
            directory,
            2,
            divided | {"out_dir": "divided", "activation_checkpointing": True},
            divided | {"out_dir": "divided_from_one", "resume": True, "sample_every": 0},
            MUON | {"out_dir": "divided_muon", "shard": True},
            MUON | {"out_dir": "divided_muon_from_one", "shard": True, "resume": True},
            SETTINGS | {"out_dir": "whole", "max_steps": 1, "sample_every": 0, "hellaswag_every": 0},
        )
        (directory / "printed").write_text(printed)
        interrupt(directory / "divided", directory / "one_from_divided")
        train_alone(SETTINGS, out_dir="one_from_divided", resume=True)
        interrupt(directory / "divided_muon", directory / "one_muon_from_divided")
        train_alone(MUON, out_dir="one_muon_from_divided", resume=True)
    return directory


LOGGED = ("loss", "val_loss", "norm", "hellaswag_nanogpt_acc_norm", "hellaswag_lm_eval_acc")


def assert_same_run(run, expected, keys=LOGGED):
    """The same batches, and losses and norms that differ by rounding."""
    assert records(run, "batch") == records(expected, "batch")
    for key in keys:
        assert len(records(run, key)) >= 3
        assert records(run, key) == pytest.approx(records(expected, key), abs=1e-4), key


def test_losses_and_norms_of_30_steps_equal_those_of_one_process(runs):
    assert_same_run(runs / "divided", runs / "one")


@pytest.mark.parametrize("run", ["divided_muon", "divided_muon_from_one", "one_muon_from_divided"])
def test_muon_trains_as_in_one_process(runs, run):
    for key in ("loss", "attention_logit", "update"):
        expected = records(runs / "one_muon", key)
        assert expected and records(runs / run, key) == pytest.approx(expected, abs=1e-4), key
    assert_moved_alike(runs / run / "step_000004", runs / "one_muon" / "step_000004", tiny_config().seed, 1e-3)


@pytest.mark.parametrize("resumed", ["divided_from_one", "one_from_divided"])
def test_a_run_is_resumed_with_or_without_shard_whichever_it_was_saved_with(runs, resumed):
    assert_same_run(runs / resumed, runs / "one")


def test_each_process_holds_its_part_of_the_weights_gradients_and_moments(runs):
    whole = 16 * sum(parameter.numel() for parameter in GPT(SIZES).parameters())
    for rank in (0, 1):
        assert int((runs / "divided" / f"bytes_{rank}").read_text()) == pytest.approx(whole / 2, rel=0.001)
        assert int((runs / "whole" / f"bytes_{rank}").read_text()) == pytest.approx(whole, rel=0.001)


def test_the_main_process_alone_writes_samples(runs):
    assert (runs / "printed").read_text().count("m a language model,") == 3 * 4  # at steps 0, 15 and 30


def test_gradients_are_reduced_with_the_last_micro_batch_alone(runs):
    """As each micro-batch begins, of which some steps have two, a process's part of the reduced gradients is zero."""
    reduced = json.loads((runs / "divided" / "reduced").read_text())
    assert len(reduced) > 30 and not any(reduced)


def test_the_files_of_a_checkpoint_are_those_of_a_run_without_shard(runs):
    one, divided = (runs / run / "step_000030" for run in ("one", "divided"))
    assert {path.name for path in divided.iterdir()} == {path.name for path in one.iterdir()}
    for name in ("config.json", "vocab.json", "merges.txt", "tokenizer_config.json"):
        assert sha256(divided / name) == sha256(one / name)
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (divided / name).stat().st_size == (one / name).stat().st_size
    keys = [json.loads((directory / "trainer.json").read_text()).keys() for directory in (one, divided)]
    assert keys[0] == keys[1]


def test_a_checkpoint_has_the_logits_of_the_undivided_run_in_transformers(runs):
    idx = torch.arange(16)[None]  # (1, T)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(runs / "divided" / "step_000030")
    with torch.no_grad():
        logits = theirs(idx).logits
        assert (logits - load_gpt(runs / "divided" / "step_000030")(idx)[0]).abs().max() < 1e-4
        assert (logits - load_gpt(runs / "one" / "step_000030")(idx)[0]).abs().max() < 1e-3


@pytest.mark.slow
def test_a_run_goes_through_one_two_and_four_processes_with_and_without_shard(built_shards, tmp_path):
    """Killed after each checkpoint, it has the batches and losses of one process that was never stopped."""
    shutil.copytree(built_shards(6000, 1000), tmp_path / "shards")
    settings = {"batch_size": 1, "save_every": 5, "sample_every": 0, "hellaswag_every": 0, "resume": True}
    train_alone(SETTINGS | settings, out_dir="one")
    stages = [(4, True), (2, True), (4, False), (2, True), (1, False), (4, True)]
    for number, (processes, shard) in enumerate(stages, 1):
        changes = settings | {"out_dir": "log", "shard": shard}
        if processes == 1:
            train_alone(SETTINGS | changes)
        else:
            train_together(tmp_path, processes, SETTINGS | changes)
        if number == 1:
            assert_same_run(tmp_path / "log", tmp_path / "one", ("loss", "val_loss", "norm"))
        for later in range(5 * number + 5, 31, 5):
            shutil.rmtree(tmp_path / "log" / f"step_{later:06d}")
    assert_same_run(tmp_path / "log", tmp_path / "one", ("loss", "val_loss"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "shard", "activation_checkpointing", "tolerance"),
    [("float32", True, False, 1e-4), ("bfloat16", True, True, 0.02), ("float32", False, True, 1e-4)],
)
def test_more_compiled_blocks_than_a_function_may_be_compiled_for_give_the_losses_of_one_process(
    built_shards, tmp_path, monkeypatch, dtype, shard, activation_checkpointing, tolerance
):
    monkeypatch.setitem(globals(), "SIZES", replace(SIZES, n_layer=10))
    assert torch._dynamo.config.recompile_limit < SIZES.n_layer
    shutil.copytree(built_shards(6000, 1000), tmp_path / "shards")
    settings = {"sample_every": 0, "hellaswag_every": 0}
    train_alone(SETTINGS | settings, out_dir="one")
    changes = {"shard": shard, "activation_checkpointing": activation_checkpointing, "dtype": dtype, "compile": True}
    train_together(tmp_path, 2, SETTINGS | settings | changes | {"out_dir": "divided"})
    for key in ("loss", "val_loss"):
        assert records(tmp_path / "divided", key) == pytest.approx(records(tmp_path / "one", key), abs=tolerance)
