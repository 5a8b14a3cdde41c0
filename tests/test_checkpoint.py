"""What a run saves, and that it goes on from there to the uninterrupted run's end, whatever happened to the files."""

import errno
import functools
import json
import os
import platform
import resource
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import records, tiny_config

import plot
import train_gpt2
from common import checkpoint, files, log
from common.checkpoint import checkpoints, find_checkpoint, newest_checkpoint
from common.files import claim, sha256
from common.log import read_log
from common.processes import World
from common.script import DataError, UsageError
from recipes import MUST_MATCH, TrainConfig, default_config, parse_config
from train_gpt2 import train

ALONE = World(0, 1, torch.device("cpu"))
CLOCK = ("ms", "tokens_per_second", "mfu", "seconds")
CONSTANT = {"min_lr": 1e-2, "warmup_steps": 0}  # a learning rate that does not depend on max_steps

pytestmark = pytest.mark.usefixtures("small_debug", "shards")


def quick_config(**changes):
    """The settings of a run of half a second, with one micro-batch a step."""
    return tiny_config(**({"batch_size": 4, "total_batch_size": 64} | changes))


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """Drawing would take longer than these runs."""
    monkeypatch.setattr(plot, "draw", lambda directory: None)


@pytest.fixture
def shards(make_shards):
    """2,500 train tokens in five shards, and 500 to validate on."""
    return make_shards(tokens=3000, shard_size=500)


@pytest.fixture(scope="session")
def finished_run(built_shards, tmp_path_factory):
    """A finished run with checkpoints at steps 2, 4, 6 and 8, for all tests to copy."""
    import model

    out_dir = tmp_path_factory.mktemp("run") / "log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plot, "draw", lambda directory: None)
        patch.setitem(model.PRESETS, "debug", model.GPTConfig(block_size=32, n_layer=2, n_head=2, n_embd=16))
        train(quick_config(data_dir=str(built_shards(3000, 500)), out_dir=str(out_dir), save_every=2))
    return out_dir


@pytest.fixture
def run(finished_run, tmp_path):
    """A copy of that run in the test's own directory, as `log`."""
    return shutil.copytree(finished_run, tmp_path / "log")


def interrupt(run, step, copy=None):
    """Leave a run, or a copy of it, as if it had been killed before it saved what came after this step."""
    directory = shutil.copytree(run, run.with_name(copy)) if copy else run
    for number, path in checkpoints(directory).items():
        if number > step:
            shutil.rmtree(path)
    return directory


def log_of(directory):
    """A run's log, without what the clock says and where the run was started."""
    runs = [record for record in read_log(directory) if "processes" not in record]
    return [{key: value for key, value in record.items() if key not in CLOCK} for record in runs]


def assert_same_end(first, second, step):
    """Two runs have the same log, and end in the same weights and optimizer state, bit for bit."""
    assert log_of(first) == log_of(second)
    for name in ("model.safetensors", "optimizer.safetensors"):
        paths = [directory / f"step_{step:06d}" / name for directory in (first, second)]
        assert paths[0].read_bytes() == paths[1].read_bytes(), name
    ends = [checkpoint.read_record(directory / f"step_{step:06d}") for directory in (first, second)]
    for key in ("tokens", "position", "scores", "skipped", "scaler", "optimizer", "param_groups"):
        assert ends[0][key] == ends[1][key], key


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def contents(directory):
    """All that is in a directory, and when it was changed."""
    return {path: path.stat().st_mtime_ns for path in [directory, *directory.rglob("*")]}


# ---- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [False, True])
def test_n_plus_n_steps_equal_2n_bit_for_bit(tmp_path, shuffle):
    """Across the end of an epoch (19 batches), inside the ramp, and in any order of the rows."""
    config = quick_config(
        total_batch_size=128,
        initial_batch_size=64,
        batch_ramp_tokens=1500,
        max_steps=28,
        save_every=8,
        eval_every=8,
        shuffle=shuffle,
    )
    train(config)
    for step in (8, 24):
        again = interrupt(tmp_path / "log", step, copy=f"log{step}")
        train(replace(config, out_dir=f"log{step}", resume=True))
        assert_same_end(tmp_path / "log", again, 28)
        assert [record["step"] for record in read_log(again) if "processes" in record] == [0, step]


class CountingMomentum(torch.optim.Optimizer):
    """Momentum that slows down by counts in its state and in its groups, where AdamW has no plain numbers."""

    def __init__(self, groups):
        super().__init__(groups, {"lr": 1e-2, "calls": 0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["calls"] += 1
            for parameter in group["params"]:
                self.update(parameter, group)

    def update(self, parameter, group):
        state = self.state[parameter]
        state["count"] = state.get("count", 0) + 1
        state["damping"] = 0.5 * state.get("damping", 1.0)
        state.setdefault("momentum_buffer", torch.zeros_like(parameter)).mul_(0.9).add_(parameter.grad)
        parameter -= group["lr"] / (group["calls"] + state["count"] + state["damping"]) * state["momentum_buffer"]


def counting_momentum(gpt, config, world):
    return CountingMomentum(gpt.parameters())


def two_groups(gpt, config, world):
    """The last parameters first, with a learning rate of their own."""
    first, *rest = gpt.parameters()
    return CountingMomentum([{"params": rest, "lr": 1e-3}, {"params": [first]}])


def plain_sgd(gpt, config, world):
    return torch.optim.SGD(gpt.parameters(), lr=config.max_lr)


class NoisySGD(torch.optim.SGD):
    """Langevin dynamics (Welling and Teh, 2011): steps with noise from torch's global generator."""

    @torch.no_grad()
    def step(self):
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter += 1e-3 * torch.randn_like(parameter)


def noisy_sgd(gpt, config, world):
    return NoisySGD(gpt.parameters(), lr=config.max_lr)


def adagrad(gpt, config, world):
    return torch.optim.Adagrad(gpt.parameters(), lr=config.max_lr, lr_decay=0.1)


@pytest.mark.parametrize("optimizer", [counting_momentum, two_groups, plain_sgd, noisy_sgd, adagrad])
def test_every_optimizers_state_is_resumed_bit_for_bit(tmp_path, monkeypatch, optimizer):
    monkeypatch.setattr(train_gpt2, "make_optimizer", optimizer)
    config = quick_config(max_steps=6, save_every=3, eval_every=0)
    train(config)
    again = interrupt(tmp_path / "log", 3, copy="again")
    train(replace(config, out_dir="again", resume=True))
    assert_same_end(tmp_path / "log", again, 6)
    ends = [json.loads((log / "step_000006" / "trainer.json").read_text()) for log in (tmp_path / "log", again)]
    for key in ("optimizer", "param_groups"):
        assert ends[0][key] == ends[1][key]


def change_json(directory, file, **changes):
    """Change what a file of a checkpoint says, and its hash with it."""
    path = directory / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    manifest = json.loads((directory / "MANIFEST.json").read_text())
    manifest[file] = sha256(path)
    (directory / "MANIFEST.json").write_text(json.dumps(manifest))


def test_a_checkpoint_without_a_setting_that_a_newer_torch_has_is_resumed_bit_for_bit(tmp_path):
    train(quick_config())
    again = interrupt(tmp_path / "log", 4, copy="again")
    groups = json.loads((again / "step_000004" / "trainer.json").read_text())["param_groups"]
    for group in groups:
        del group["decoupled_weight_decay"]
    change_json(again / "step_000004", "trainer.json", param_groups=groups)
    train(quick_config(out_dir="again", resume=True))
    assert_same_end(tmp_path / "log", again, 8)


def test_fp16_trains_with_a_scaler_and_resumes_bit_for_bit(tmp_path, monkeypatch):
    quickly_growing = functools.partial(torch.amp.GradScaler, growth_interval=3)  # so that its state matters
    monkeypatch.setattr(torch.amp, "GradScaler", quickly_growing)
    config = quick_config(dtype="float16", batch_size=2, total_batch_size=32)
    train(config)
    again = interrupt(tmp_path / "log", 4, copy="again")
    train(replace(config, out_dir="again", resume=True))
    assert_same_end(tmp_path / "log", again, 8)
    scalers = [
        json.loads((log / "step_000008" / "trainer.json").read_text())["scaler"] for log in (tmp_path / "log", again)
    ]
    assert scalers[0] == scalers[1] and scalers[0]["scale"] != 65536


@pytest.mark.parametrize("step", [2, 4, 6])
def test_an_interrupted_runs_log_has_the_records_of_the_uninterrupted_one(run, finished_run, step):
    """At step 4 with an evaluation, which is done again, and at 2 and 6 without."""
    interrupt(run, step)
    train(quick_config(save_every=2, resume=True))
    assert_same_end(finished_run, run, 8)


def test_an_evaluation_that_is_due_by_itself_is_in_the_resumed_log_once(tmp_path, monkeypatch):
    evaluations = [
        train_gpt2.Evaluation("val", "eval_every", lambda *_: True, lambda *_: {"val_loss": 5.0}),
        train_gpt2.Evaluation("hellaswag", "hellaswag_every", lambda *_: True, lambda *_: {"hellaswag_acc": 0.25}),
    ]
    monkeypatch.setattr(train_gpt2, "EVALUATIONS", evaluations)
    config = quick_config(hellaswag_every=2, save_every=2)
    train(config)
    again = interrupt(tmp_path / "log", 2, copy="again")
    train(replace(config, out_dir="again", resume=True))
    assert log_of(again) == log_of(tmp_path / "log")


def test_what_was_evaluated_at_the_checkpoint_and_is_not_again_stays_in_the_log(tmp_path):
    config = quick_config(monitor_every=4)
    train(config)
    again = interrupt(tmp_path / "log", 4, copy="again")
    train(replace(config, out_dir="again", resume=True, monitor_every=0))
    assert list(records(again, "attention_logit")) == [0, 4] and list(records(again, "val_loss")) == [0, 4, 8]


def test_the_last_evaluation_of_a_run_that_is_prolonged_stays_in_the_log(tmp_path):
    config = quick_config(**CONSTANT, eval_every=3, monitor_every=4)
    train(config)
    train(replace(config, max_steps=12, resume=True))
    assert list(records(tmp_path / "log", "val_loss")) == [0, 3, 6, 8, 9, 12]


def test_the_schedule_may_be_prolonged_where_the_steps_done_stay_as_they_were(run, tmp_path):
    config = quick_config(**CONSTANT, out_dir="constant")
    train(config)
    train(replace(config, max_steps=12, resume=True))
    train(replace(config, max_steps=12, out_dir="whole"))
    ends = [tmp_path / log / "step_000012" / "model.safetensors" for log in ("constant", "whole")]
    assert ends[0].read_bytes() == ends[1].read_bytes()
    with pytest.raises(UsageError, match="--max_steps"):
        train(quick_config(max_steps=12, resume=True))


def test_a_kill_while_an_old_checkpoint_is_removed_leaves_no_part_of_it(run, monkeypatch):
    def killed(directory, ignore_errors):
        if directory.exists():
            (directory / "config.json").unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.prune(run, keep=1, milestone_every=0)
    assert not any(files.changed_files(directory, checkpoint.NEEDED) for directory in checkpoints(run).values())
    monkeypatch.undo()
    checkpoint.prune(run, keep=1, milestone_every=0)
    assert [path.name for path in run.iterdir() if path.is_dir()] == ["step_000008"]


def test_resuming_nothing_starts_a_run(tmp_path):
    train(quick_config(max_steps=1, resume=True))
    assert list(records(tmp_path / "log")) == [1]


def test_a_finished_run_is_left_alone(run, capsys):
    before = contents(run)
    train(quick_config(resume=True))
    assert contents(run).keys() == before.keys()
    assert all(contents(run)[path] == time for path, time in before.items() if path.is_file())
    assert "finished" in capsys.readouterr().out


def test_a_run_that_has_gone_further_than_max_steps_is_finished(tmp_path, monkeypatch, capsys):
    train(quick_config(**CONSTANT))
    monkeypatch.setattr(train_gpt2, "training_step", None)
    train(quick_config(**CONSTANT, max_steps=4, resume=True))
    assert list(checkpoints(tmp_path / "log")) == [8, 4] and "8 of 4 steps" in capsys.readouterr().out


def test_a_directory_in_use_is_refused_and_the_process_that_holds_it_named(tmp_path):
    with claim(tmp_path / "log"):
        with pytest.raises(UsageError, match=rf"log is in use by another process \({os.getpid()} on [^;]*$"):
            train(quick_config())
    train(quick_config(max_steps=1))
    assert not list((tmp_path / "log").glob(".*"))


def test_on_a_disk_without_locks_a_claim_outlives_its_process_only_until_the_next_start(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOSYS, "no locks")

    monkeypatch.setattr("fcntl.flock", unsupported)
    ended = subprocess.Popen(["true"])
    ended.wait()
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / ".lock").write_text(f"{ended.pid}\n{platform.node()}\n")
    with claim(tmp_path / "log"):
        with pytest.raises(UsageError, match=rf"process \({os.getpid()} on .*; if that has ended, delete"):
            with claim(tmp_path / "log"):
                pass
    (tmp_path / "log" / ".lock").write_text("4711\nanother-machine\n")
    with pytest.raises(UsageError, match=r"\(4711 on another-machine\); if that has ended, delete .*\.lock"):
        with claim(tmp_path / "log"):
            pass


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.EIO])
def test_a_directory_that_cannot_be_locked_is_refused_in_a_line(tmp_path, monkeypatch, error):
    def refuse(*_):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(OSError, match=rf"log/\.lock cannot be locked, as on some network disks: {os.strerror(error)}"):
        with claim(tmp_path / "log"):
            pass


# ---- what must match -------------------------------------------------------------------------------------------------

RESUME = "--resume --data_dir shards --device cpu --dtype float32 --batch_size 4".split()
INTERVALS = "--eval_every 4 --val_tokens 128 --save_every 2 --sample_every 0 --keep 10".split()

CHANGES = {
    "model": "gpt2-medium",
    "init_from": "elsewhere",
    "block_size": 32,
    "total_batch_size": 128,
    "initial_batch_size": 32,
    "batch_ramp_tokens": 100,
    "shuffle": True,
    "seed": 1,
    "optimizer": "muon",
    "schedule": "linear",
    "decay_fraction": 0.5,
    "warmup_steps": 3,
    "max_lr": 2e-4,
    "min_lr": 2e-4,
    "muon_lr": 2e-4,
    "beta1": 0.8,
    "beta2": 0.9,
    "weight_decay": 0.0,
    "grad_clip": 0.5,
}


def test_a_resumed_run_takes_what_must_match_from_its_checkpoint(tmp_path):
    config = quick_config(save_every=2, seed=7, shuffle=True, beta2=0.9, weight_decay=0.2, grad_clip=0.7)
    train(config)
    again = interrupt(tmp_path / "log", 4, copy="again")
    train_gpt2.main([*RESUME, *INTERVALS, "--out_dir", "again"])
    assert_same_end(tmp_path / "log", again, 8)


def test_a_resumed_run_keeps_the_checkpoints_that_it_was_to_keep(tmp_path):
    train(quick_config(save_every=2, keep=1, milestone_every=4))
    interrupt(tmp_path / "log", 4)
    train_gpt2.main([*RESUME, *"--eval_every 0 --sample_every 0 --save_every 1".split()])
    assert list(checkpoints(tmp_path / "log")) == [8, 4]


def test_a_resumed_run_takes_its_shards_from_its_checkpoint(run):
    data_dir = checkpoint.read_record(run / "step_000008")["config"]["data_dir"]
    assert parse_config(["--resume"], None).data_dir == data_dir != "shards"


def test_every_setting_that_alters_the_results_must_match():
    assert set(CHANGES) == set(MUST_MATCH)


@pytest.mark.parametrize(("name", "value"), CHANGES.items())
def test_a_flag_that_changes_a_resumed_run_is_refused_by_its_own_name(run, name, value):
    before = contents(run)
    with pytest.raises(UsageError, match=f"--{name} {value}.* was begun with"):
        train(replace(parse_config(RESUME, None), **{name: value}))
    assert contents(run).keys() == before.keys()


def test_flags_that_change_a_resumed_run_are_refused_on_the_command_line_too(run):
    for flags in ("--total_batch_size 128", "--max_lr 1e-4", "--shuffle"):
        with pytest.raises(UsageError, match=f"{flags.split()[0]} .* was begun with"):
            train_gpt2.main([*RESUME, *flags.split()])


def test_settings_that_alter_nothing_may_change_on_resuming(run, finished_run):
    interrupt(run, 4)
    train(quick_config(batch_size=2, log_every=2, save_every=0, val_tokens=64, timeout=9, max_skipped=1, resume=True))
    expected = {step: loss for step, loss in records(finished_run).items() if step <= 4 or step % 2 == 0}
    assert records(run) == pytest.approx(expected, abs=1e-4)


def test_a_run_is_resumed_on_its_own_shards_only(run, make_shards):
    make_shards(tokens=3000, shard_size=600, name="other")
    interrupt(run, 4)
    with pytest.raises(UsageError, match="--data_dir other"):
        train(quick_config(data_dir="other", resume=True))


def test_a_run_is_never_overwritten(run):
    before = contents(run)
    with pytest.raises(UsageError, match="log holds a run.*--resume"):
        train(quick_config())
    interrupt(run, 0)
    with pytest.raises(UsageError, match="log holds a run.*--resume"):
        train(quick_config())
    assert (run / "log.jsonl").stat().st_mtime_ns == before[run / "log.jsonl"]


# ---- a run that was begun with another's weights ---------------------------------------------------------------------


@pytest.fixture
def tuned(run, tmp_path):
    """A run that was begun with another's weights, which are gone."""
    flags = "--init_from log --out_dir tuned --total_batch_size 64 --max_steps 8 --warmup_steps 2".split()
    train_gpt2.main([*RESUME[1:], *INTERVALS, *flags])
    shutil.rmtree(run)
    return tmp_path / "tuned"


def test_a_run_with_other_weights_resumes_bit_for_bit_without_their_source(tuned):
    again = interrupt(tuned, 4, copy="again")
    train_gpt2.main([*RESUME, *INTERVALS, "--out_dir", "again"])
    assert_same_end(tuned, again, 8)


@pytest.mark.parametrize(
    ("file", "before", "after"),
    [
        ("config.json", '"n_layer": 2', '"n_layer": 3'),
        ("config.json", '"n_layer": 2', '"n_layer": \x12'),
        ("trainer.json", '"seed": 1337', '"seed": 1336'),
        ("trainer.json", '"seed": 1337', '"seed": 133w'),
    ],
)
def test_a_flipped_bit_in_the_sizes_or_settings_of_such_a_run_costs_one_checkpoint(tuned, capsys, file, before, after):
    again = shutil.copytree(tuned, tuned.with_name("again"))
    path = again / "step_000008" / file
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))
    train_gpt2.main([*RESUME, *INTERVALS, "--out_dir", "again"])
    assert "resuming from again/step_000006" in capsys.readouterr().out
    assert_same_end(tuned, again, 8)


# ---- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", [*checkpoint.NEEDED, "MANIFEST.json"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_taken(run, finished_run, capsys, file):
    flip_a_bit(run / "step_000008" / file)
    train(quick_config(save_every=2, resume=True))
    printed = capsys.readouterr().out
    assert "passing over the checkpoint log/step_000008" in printed and "resuming from log/step_000006" in printed
    assert_same_end(finished_run, run, 8)


@pytest.mark.parametrize("file", ["trainer.json", "model.safetensors"])
def test_a_newest_checkpoint_that_the_disk_cannot_read_is_passed_over(run, finished_run, monkeypatch, capsys, file):
    def sha256_of_readable(path):
        if path == Path("log", "step_000008", file):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return sha256(path)

    monkeypatch.setattr(files, "sha256", sha256_of_readable)
    train_gpt2.main([*RESUME, *INTERVALS])
    printed = capsys.readouterr().out
    assert "passing over the checkpoint log/step_000008: [Errno 5] Input/output error" in printed
    assert "resuming from log/step_000006" in printed
    assert_same_end(finished_run, run, 8)


@pytest.mark.parametrize("file", [*checkpoint.NEEDED, "MANIFEST.json"])
@pytest.mark.parametrize("harm", ["truncated", "empty", "flipped", "missing"])
def test_each_harm_to_each_file_is_named_and_costs_one_checkpoint(run, file, harm):
    path = run / "step_000008" / file
    content = path.read_bytes()
    flip_a_bit(path)
    if harm != "flipped":
        path.write_bytes(content[: len(content) // 2] if harm == "truncated" else b"")
    if harm == "missing":
        path.unlink()
    directory, errors = newest_checkpoint(run)
    assert directory == run / "step_000006" and list(errors) == [run / "step_000008"]
    assert file in errors[run / "step_000008"] or file == "MANIFEST.json"


@pytest.mark.parametrize("file", [*checkpoint.NEEDED, "MANIFEST.json"])
@pytest.mark.parametrize("kind", ["pipe", "device", "directory"])
def test_what_is_no_regular_file_is_not_waited_for_and_costs_one_checkpoint(run, file, kind):
    path = run / "step_000008" / file
    path.unlink()
    {"pipe": os.mkfifo, "device": lambda path: path.symlink_to("/dev/zero"), "directory": os.mkdir}[kind](path)
    directory, errors = newest_checkpoint(run)
    assert directory == run / "step_000006" and file in errors[run / "step_000008"]


@pytest.mark.parametrize(
    "changes",
    [
        {"step": -1},
        {"step": 0},
        {"step": 10**9},
        {"step": 10**9, "tokens": 10**12, "position": 10**12},
        {"step": "6"},
        {"step": True},
        {"step": None},
        {"tokens": 5},
        {"tokens": 10**30, "position": 10**30},
        {"position": -64},
        {"position": 10**6},
        {"skipped": []},
        {"skipped": [0, "1"]},
        {"skipped": [1, 2]},
        {"skipped": [7, 0]},
        {"scores": {"val_loss": 3.0}},
        {"scores": {"val_loss": [6, "3.0"]}},
        {"scores": {"val_loss": [6]}},
        {"config": []},
        {"data": "none"},
        {"versions": None},
        {"optimizer": {"step": 1}},
        {"optimizer": {"step.transformer.wte.bias": 1}},
        {"param_groups": 3},
        {"param_groups": [{}]},
        {"param_groups": [{"lr": 0.1, "betas": "x"}, {}]},
    ],
    ids=str,
)
def test_a_record_of_what_cannot_be_is_refused_in_a_line(run, changes):
    interrupt(run, 6)
    change_json(run / "step_000006", "trainer.json", **changes)
    with pytest.raises((DataError, UsageError), match="step_000006|--data_dir") as refusal:
        train(quick_config(resume=True))
    assert len(str(refusal.value).splitlines()) == 1


def test_another_number_of_heads_than_the_models_is_refused_although_the_weights_would_fit(run):
    interrupt(run, 6)
    change_json(run / "step_000006", "config.json", n_head=4)
    with pytest.raises(DataError, match="config.json does not have the sizes of --model debug"):
        train(quick_config(resume=True))


def test_where_no_checkpoint_is_whole_nothing_is_begun_anew(run):
    for directory in checkpoints(run).values():
        (directory / "model.safetensors").unlink()
    for _ in range(2):
        with pytest.raises(DataError, match="no checkpoint .* is whole"):
            train(quick_config(resume=True))
    assert list(checkpoints(run)) == [8, 6, 4, 2]


def test_a_manifest_that_lists_nothing_vouches_for_nothing(run):
    (run / "step_000008" / "MANIFEST.json").write_text("{}")
    newest, errors = newest_checkpoint(run)
    assert newest == run / "step_000006" and "optimizer.safetensors" in errors[run / "step_000008"]


@pytest.mark.parametrize("change", [lambda path: path.write_text("changed"), lambda path: path.unlink()])
@pytest.mark.parametrize("file", ["README.md", "vocab.json", "merges.txt", "tokenizer_config.json"])
def test_a_changed_model_card_or_tokenizer_is_no_damage(run, file, change):
    change(run / "step_000008" / file)
    assert newest_checkpoint(run) == (run / "step_000008", {})


def test_looking_for_a_checkpoint_changes_nothing_on_the_disk(run):
    flip_a_bit(run / "step_000008" / "model.safetensors")
    flip_a_bit(run / "step_000006" / "trainer.json")
    before = contents(run)
    newest, errors = newest_checkpoint(run)
    assert newest == run / "step_000004" and list(errors) == [run / "step_000008", run / "step_000006"]
    assert checkpoint.locate(str(run)) == str(run / "step_000008")
    assert default_config(TrainConfig(resume=True)).max_steps == 8
    assert contents(run) == before


def test_damaged_newer_checkpoints_are_set_aside_and_older_ones_left(run):
    for step in (2, 6, 8):
        flip_a_bit(run / f"step_{step:06d}" / "model.safetensors")
    assert find_checkpoint(run, True, ALONE) == run / "step_000004"
    assert sorted(path.name for path in run.glob("step_*")) == [
        *("step_000002", "step_000004", "step_000006.damaged", "step_000008.damaged")
    ]


def test_a_damaged_newer_checkpoint_never_costs_a_good_one(run):
    for step in (4, 6, 8):
        (run / f"step_{step:06d}" / "model.safetensors").write_bytes(b"")
    train(quick_config(save_every=5, keep=2, resume=True))
    assert list(checkpoints(run)) == [8, 5]
    assert newest_checkpoint(run) == (run / "step_000008", {})
    shutil.rmtree(run / "step_000008")
    assert newest_checkpoint(run) == (run / "step_000005", {})


# ---- on the disk -----------------------------------------------------------------------------------------------------


def test_a_file_is_flushed_before_it_gets_its_name_and_its_directory_after(tmp_path, monkeypatch):
    events, fsync, rename = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.fstat(fd).st_ino), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("renamed"), rename(a, b)))
    files.write_json(tmp_path / "a.json", {})
    assert events == [(tmp_path / "a.json").stat().st_ino, "renamed", tmp_path.stat().st_ino]


def test_a_checkpoint_and_the_log_before_it_are_flushed_before_it_gets_its_name(run, monkeypatch):
    interrupt(run, 6)
    events, rename = [], os.replace
    for module in (files, checkpoint, log):
        monkeypatch.setattr(module, "flush", lambda path: events.append(path.name))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(f"-> {Path(b).name}"), rename(a, b)))
    train(quick_config(save_every=0, resume=True))
    renamed = events.index("-> step_000008")
    names = {path.name for path in (run / "step_000008").iterdir()}
    assert names | {".checkpoint.tmp", "log.jsonl"} <= {*events[:renamed]}
    assert events[renamed + 1] == "log"


def test_other_processes_wait_while_a_checkpoint_is_looked_for_or_saved(monkeypatch):
    works, on_main = [], World.on_main
    monkeypatch.setattr(World, "on_main", lambda world, work: (works.append(work), on_main(world, work))[1])
    train(quick_config(max_steps=2, save_every=1, resume=True))
    assert len(works) == 3  # a search, two saves


# ---- what is kept ----------------------------------------------------------------------------------------------------


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    train(quick_config(save_every=2, keep=2))
    assert sorted(path.name for path in (tmp_path / "log").glob("step_*")) == ["step_000006", "step_000008"]
    assert not list((tmp_path / "log").glob(".*"))


def test_milestones_are_kept_for_ever(tmp_path):
    train(quick_config(save_every=2, keep=1, milestone_every=3))
    assert list(checkpoints(tmp_path / "log")) == [8, 6, 3]


def test_copies_of_checkpoints_and_other_files_are_left_alone(run):
    interrupt(run, 4)
    others = ["step_000004.bak", "step_000004_2", "step_4"]
    for name in others:
        shutil.copytree(run / "step_000004", run / name)
    (run / "step_000010").write_text("a file")
    train(quick_config(save_every=2, keep=1, resume=True))
    assert list(checkpoints(run)) == [8]
    assert all((run / name).exists() for name in [*others, "step_000010"])


@pytest.fixture
def spoil_steps(monkeypatch):
    """Make the gradients of the steps that follow these not finite."""
    accumulate = train_gpt2.accumulate_gradients

    def choose(is_spoiled):
        def accumulate_spoiled(trainer, micro_batches):
            loss = accumulate(trainer, micro_batches)
            if is_spoiled(trainer.state.step):
                trainer.state.gpt.lm_head.weight.grad[0, 0] = float("nan")
            return loss

        monkeypatch.setattr(train_gpt2, "accumulate_gradients", accumulate_spoiled)

    return choose


def test_too_many_skipped_steps_in_a_row_end_the_run_with_the_last_good_checkpoint(tmp_path, spoil_steps):
    spoil_steps(lambda step: step in (1, 3, 4) or step > 5)
    with pytest.raises(DataError, match="step 9: 3 steps in a row.*last good checkpoint is log/step_000006"):
        train(quick_config(max_steps=20, save_every=6, max_skipped=2))
    assert records(tmp_path / "log", "skipped") == {1: 0, 2: 1, 3: 1, 4: 2, 5: 3, 6: 3, 7: 4, 8: 5, 9: 6}
    assert [step for step, norm in records(tmp_path / "log", "norm").items() if norm is None] == [2, 4, 5, 7, 8, 9]


def test_checkpoints_within_a_streak_of_skipped_steps_cost_none_from_before_it(tmp_path, spoil_steps):
    spoil_steps(lambda step: step >= 4)
    with pytest.raises(DataError, match="last good checkpoint is log/step_000004"):
        train(quick_config(max_steps=20, save_every=1, keep=2, max_skipped=5))
    assert {3, 4} <= set(checkpoints(tmp_path / "log")) and newest_checkpoint(tmp_path / "log")[0].name == "step_000009"


def test_a_streak_of_skipped_steps_is_counted_on_after_resuming(tmp_path, spoil_steps):
    spoil_steps(lambda step: step >= 1)
    train(quick_config(**CONSTANT, max_steps=3))
    with pytest.raises(DataError, match="step 5: 4 steps in a row"):
        train(quick_config(**CONSTANT, max_steps=8, max_skipped=3, resume=True))


def test_a_run_that_was_interrupted_after_skipped_steps_counts_them_as_before(tmp_path, spoil_steps):
    spoil_steps(lambda step: step in (1, 2, 5))
    config = quick_config(save_every=2)
    train(config)
    again = interrupt(tmp_path / "log", 4, copy="again")
    train(replace(config, out_dir="again", resume=True))
    assert_same_end(tmp_path / "log", again, 8)
    assert records(again, "skipped")[8] == 3


# ---- a disk that fills -----------------------------------------------------------------------------------------------


def test_a_disk_that_fills_while_saving_leaves_the_last_checkpoint_and_no_remains(run):
    interrupt(run, 4)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, before[1]))  # optimizer.safetensors is larger
    try:
        with pytest.raises(DataError, match="step 8 could not be saved.*optimizer.safetensors.*--resume"):
            train(quick_config(save_every=0, resume=True))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(run.glob(".*"))
    train(quick_config(save_every=0, resume=True))
    assert list(checkpoints(run)) == [8, 4, 2]


def test_a_disk_that_fills_for_a_while_does_not_stop_training(tmp_path, monkeypatch, capsys):
    save_tensors, attempts = checkpoint.save_tensors, []

    def fail_once(tensors, path):
        attempts.append(path)
        if len(attempts) == 2:
            path.write_bytes(b"some")
            raise OSError("No space left on device")
        save_tensors(tensors, path)

    monkeypatch.setattr(checkpoint, "save_tensors", fail_once)
    train(quick_config(save_every=2))
    assert "warning: step 4 could not be saved: No space left" in capsys.readouterr().out
    assert list(checkpoints(tmp_path / "log")) == [8, 6, 2] and not list((tmp_path / "log").glob(".*"))
