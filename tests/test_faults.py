"""A run that is stopped, by whatever, is continued to the uninterrupted run's end."""

import importlib.util
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, run_script

import common
import fineweb
import plot
import train_gpt2

RUN = [
    *"--model debug --device cpu --dtype float32 --block_size 16 --batch_size 2 --total_batch_size 64".split(),
    *"--warmup_steps 2 --data_dir shards --eval_every 4 --sample_every 0 --save_every 10 --out_dir log".split(),
]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def start(*flags, launcher=(sys.executable,)):
    """Start the trainer; returns the process, whose output goes to the files `out` and `err`."""
    with open("out", "w") as out, open("err", "w") as err:
        command = [*launcher, str(ROOT / "train_gpt2.py"), *RUN, *map(str, flags)]
        return subprocess.Popen(command, stdout=out, stderr=err, env=ENVIRONMENT)


def logged(directory, key="loss"):
    try:
        return {record["step"]: record[key] for record in plot.read_log(directory / "log.jsonl") if key in record}
    except common.DataError:  # not there yet
        return {}


def wait_until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.01)


def workers_of(process):
    """The trainers that a torchrun has started."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    return sorted(int(pid) for pid, parent in map(str.split, listed.splitlines()) if int(parent) == process.pid)


def same_end(first, second, step):
    """Two runs ended with the same weights, moments, losses and batches."""
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert common.sha256(first / step / name) == common.sha256(second / step / name)
    for key in ("loss", "val_loss", "norm", "batch", "position"):
        assert logged(first, key) == logged(second, key), key


@pytest.fixture
def whole(make_shards, tmp_path):
    """An uninterrupted run of some steps, on one or two processes: whole(steps, processes) returns its directory."""

    def run(steps, *flags, processes=0):
        make_shards(tokens=6000, shard_size=1000)
        flags = [*RUN, "--max_steps", steps, "--out_dir", "whole", *flags]
        finished = run_script("train_gpt2.py", *flags, processes=processes)
        assert finished.returncode == 0, finished.stderr
        return tmp_path / "whole"

    return run


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_the_run_after_a_step_that_is_saved(tmp_path, whole, kind):
    directory = whole(steps=30)
    process = start("--max_steps", 30, "--save_every", 0)
    wait_until(lambda: 7 in logged(tmp_path / "log"))
    process.send_signal(kind)
    assert process.wait(60) == 0
    (step,) = train_gpt2.checkpoints(tmp_path / "log")
    assert 7 <= step < 30
    assert (tmp_path / "out").read_text().splitlines()[-1].startswith("stopped by a signal; continue with --resume")
    assert start("--max_steps", 30, "--resume").wait(120) == 0
    same_end(directory, tmp_path / "log", "step_000030")


def test_the_evaluation_of_the_step_that_a_signal_ended_is_made_up_for(make_shards, tmp_path, monkeypatch):
    make_shards(tokens=3000, shard_size=500)
    step = train_gpt2.training_step

    def signalled(trainer, rows):
        if trainer.step == 3:
            signal.raise_signal(signal.SIGTERM)
        return step(trainer, rows)

    config = common.parse_flags(train_gpt2.TrainConfig, [*RUN, "--max_steps", "6"], None)
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt2, "training_step", signalled)
        train_gpt2.train(config)
    assert list(logged(tmp_path / "log", "val_loss")) == [0] and max(logged(tmp_path / "log")) == 4
    train_gpt2.main([*RUN, "--max_steps", "6", "--resume"])
    assert list(logged(tmp_path / "log", "val_loss")) == [0, 4, 6]


def test_too_many_skipped_steps_in_a_row_end_the_run_with_the_last_good_checkpoint(make_shards, tmp_path, monkeypatch):
    make_shards(tokens=3000, shard_size=500)
    make = train_gpt2.make_trainer

    def poisoned(*args):
        trainer = make(*args)

        def spoil(gradient):
            return gradient * float("nan") if trainer.step in (1, 3, 4) or trainer.step > 5 else gradient

        trainer.gpt.transformer.ln_f.bias.register_hook(spoil)
        return trainer

    monkeypatch.setattr(train_gpt2, "make_trainer", poisoned)
    flags = [*RUN, "--max_steps", "20", "--save_every", "6", "--max_skipped", "2"]
    with pytest.raises(common.DataError, match="step 9: 3 steps in a row.*log/step_000006"):
        train_gpt2.main(flags)
    assert logged(tmp_path / "log", "skipped") == {1: 0, 2: 1, 3: 1, 4: 2, 5: 3, 6: 3, 7: 4, 8: 5, 9: 6}
    assert [step for step, loss in logged(tmp_path / "log", "norm").items() if loss is None] == [2, 4, 5, 7, 8, 9]


def test_lines_are_logged_as_often_as_asked_and_nothing_else_changes(make_shards, tmp_path):
    make_shards(tokens=3000, shard_size=500)
    train_gpt2.main([*RUN, "--max_steps", "7"])
    train_gpt2.main([*RUN, "--max_steps", "7", "--log_every", "3", "--out_dir", "seldom"])
    often, seldom = logged(tmp_path / "log"), logged(tmp_path / "seldom")
    assert seldom == {step: often[step] for step in (3, 6, 7)}
    assert logged(tmp_path / "log", "val_loss") == logged(tmp_path / "seldom", "val_loss")


def test_a_log_that_cannot_be_written_is_left_whole_and_does_not_stop_training(make_shards, tmp_path, capsys):
    make_shards(tokens=3000, shard_size=500)
    train_gpt2.main([*RUN, "--max_steps", "3", "--min_lr", "6e-4", "--max_lr", "6e-4", "--warmup_steps", "0"])
    log = plot.Log(tmp_path / "log", plot.Tracker("none", "", {}, 3), {"step": 3}, True)
    before, limit = resource.getrlimit(resource.RLIMIT_FSIZE), log.path.stat().st_size + 25
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        for step in (4, 5):
            log.write(f"step {step}", step=step, loss=0.123456789)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    log.write("step 6", step=6, loss=1.0)
    assert list(logged(tmp_path / "log")) == [1, 2, 3, 6]
    assert capsys.readouterr().out.count("cannot be written") == 1


@pytest.mark.slow
@pytest.mark.parametrize("file", [*sorted(train_gpt2.NEEDED), "MANIFEST.json"])
@pytest.mark.parametrize("harm", ["cut", "empty", "flip", "remove"])
def test_each_harm_to_each_file_is_named_and_the_checkpoint_before_is_taken(whole, tmp_path, capsys, file, harm):
    shutil.copytree(checkpoints_of_a_run(whole), tmp_path / "log")
    path = tmp_path / "log" / "step_000004" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    if harm != "remove":
        path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "flip": content}[harm])
    world = train_gpt2.World(0, 1, train_gpt2.torch.device("cpu"))
    assert train_gpt2.newest_checkpoint(tmp_path / "log", world).name == "step_000002"
    printed = capsys.readouterr().out
    assert "passing over" in printed and "step_000004" in printed and (file in printed or file == "MANIFEST.json")


RUNS = {}


def checkpoints_of_a_run(whole):
    """The directory of one short run that all tests share."""
    if "directory" not in RUNS:
        RUNS["directory"] = whole(4, "--save_every", 2)
    return RUNS["directory"]


def test_a_manifest_that_lists_nothing_vouches_for_nothing(whole, tmp_path):
    shutil.copytree(checkpoints_of_a_run(whole), tmp_path / "log")
    (tmp_path / "log" / "step_000004" / "MANIFEST.json").write_text("{}")
    assert "optimizer.safetensors" in train_gpt2.damage(tmp_path / "log" / "step_000004")


def test_a_tracker_gets_the_numbers_and_never_stops_training(make_shards, tmp_path, monkeypatch, capsys):
    make_shards(tokens=3000, shard_size=500)
    sent = []

    class Library:
        __spec__ = "not None"

        def init(self, project, name, config):
            assert config["max_steps"] == 6 and name == "log"

        def log(self, numbers, step):
            sent.append((step, numbers.get("loss"), numbers.get("val_loss")))
            if step == 3:
                raise RuntimeError("no connection")

        def finish(self):
            sent.append("finish")

    monkeypatch.setitem(sys.modules, "wandb", Library())
    train_gpt2.main([*RUN, "--max_steps", "6", "--tracker", "wandb"])
    losses, val = logged(tmp_path / "log"), logged(tmp_path / "log", "val_loss")
    assert sent == [(0, None, val[0]), *((step, losses[step], None) for step in (1, 2, 3))] and len(losses) == 6
    assert capsys.readouterr().out.count("--tracker wandb is left out from here: RuntimeError('no connection')") == 1
    if importlib.util.find_spec("trackio") is None:
        with pytest.raises(common.UsageError, match="--tracker trackio is not installed"):
            train_gpt2.main([*RUN, "--max_steps", "6", "--tracker", "trackio", "--out_dir", "other"])


def test_tensorboard_shows_the_losses(make_shards, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    make_shards(tokens=3000, shard_size=500)
    train_gpt2.main([*RUN, "--max_steps", "4", "--tracker", "tensorboard"])
    events = EventAccumulator(str(tmp_path / "log")).Reload()
    drawn = {event.step: event.value for event in events.Scalars("loss")}
    assert drawn == pytest.approx(logged(tmp_path / "log"), rel=1e-6)


def test_a_shard_of_another_size_is_refused_at_start(make_shards, tmp_path):
    directory = make_shards(tokens=3000, shard_size=500)
    shard = directory / fineweb.shard_name(2)
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(common.DataError, match=shard.name):
        train_gpt2.main([*RUN, "--max_steps", "4"])


# ---- several processes, and minutes ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_torchrun_restarts_continue_by_themselves(tmp_path, whole):
    directory = whole(steps=40, processes=2)
    process = start("--max_steps", 40, launcher=[*TORCHRUN, "--max_restarts=3"])
    wait_until(lambda: 12 in logged(tmp_path / "log"))
    os.kill(workers_of(process)[1], signal.SIGKILL)
    assert process.wait(180) == 0, (tmp_path / "err").read_text()
    assert "resuming from" in (tmp_path / "out").read_text()
    same_end(directory, tmp_path / "log", "step_000040")


@pytest.mark.slow
def test_a_restart_never_continues_a_run_that_another_torchrun_began(tmp_path, whole):
    whole(steps=4)
    shutil.copytree(tmp_path / "whole", tmp_path / "log")
    before = (tmp_path / "log" / "log.jsonl").read_bytes()
    process = start("--max_steps", 40, launcher=[*TORCHRUN, "--max_restarts=1"])
    assert process.wait(120) != 0 and "holds a run" in (tmp_path / "err").read_text()
    assert (tmp_path / "log" / "log.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_signal_to_torchrun_stops_all_processes_together(tmp_path, whole):
    directory = whole(steps=40, processes=2)
    process = start("--max_steps", 40, "--save_every", 0, launcher=TORCHRUN)
    wait_until(lambda: 5 in logged(tmp_path / "log"))
    process.terminate()
    process.wait(60)
    assert "stopped by a signal" in (tmp_path / "out").read_text()
    assert start("--max_steps", 40, "--resume", launcher=TORCHRUN).wait(120) == 0
    same_end(directory, tmp_path / "log", "step_000040")


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_run_within_the_timeout(tmp_path, whole):
    whole(steps=2)
    process = start("--max_steps", 100_000, "--timeout", 5, launcher=TORCHRUN)
    wait_until(lambda: 5 in logged(tmp_path / "log"))
    stopped = workers_of(process)[1]
    os.kill(stopped, signal.SIGSTOP)
    began = time.monotonic()
    assert process.wait(120) != 0
    assert time.monotonic() - began < 60  # 5 seconds, and torchrun's own 30 to end the one that hangs
    assert "--timeout 5 s" in (tmp_path / "err").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_20_kills_at_random_moments_end_in_the_uninterrupted_runs_parameters(tmp_path, whole, processes):
    generator, kills, inside_saving = random.Random(processes), 0, 0
    saving = tmp_path / "log" / ".checkpoint.tmp"
    directory = whole(400, "--save_every", 0, processes=0 if processes == 1 else 2)
    launcher = [sys.executable] if processes == 1 else TORCHRUN
    step = 0
    while kills < 20:
        process = start("--max_steps", 400, "--save_every", 3, "--resume", launcher=launcher)
        newest = max(train_gpt2.checkpoints(tmp_path / "log"), default=0)
        target = newest + generator.randrange(2, 12)
        wait_until(lambda target=target: target in logged(tmp_path / "log"))
        if kills % 2:  # inside saving, as often as it can be hit
            wait_until(saving.exists)
            time.sleep(generator.uniform(0, 0.02))
            inside_saving += saving.exists()
        else:
            time.sleep(generator.uniform(0, 0.1))
        assert process.poll() is None, (tmp_path / "err").read_text()
        victims = [process.pid] if processes == 1 else [*workers_of(process), process.pid]
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        process.wait()
        kills += 1
        step = max(train_gpt2.checkpoints(tmp_path / "log"), default=0)
    assert inside_saving >= 3 and 0 < step < 400
    assert start("--max_steps", 400, "--resume", launcher=launcher).wait(300) == 0, (tmp_path / "err").read_text()
    same_end(directory, tmp_path / "log", "step_000400")


@pytest.mark.slow
def test_nan_in_one_processs_gradient_is_skipped_by_all(tmp_path, make_shards):
    make_shards(tokens=3000, shard_size=500)
    script = tmp_path / "poisoned.py"
    script.write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport train_gpt2\nmake = train_gpt2.make_trainer\n"
        "def poisoned(*args):\n"
        "    trainer = make(*args)\n"
        "    bias = trainer.gpt.transformer.ln_f.bias\n"
        "    bad = lambda: os.environ['RANK'] == '1' and trainer.step == 2\n"
        "    bias.register_hook(lambda gradient: gradient * float('nan') if bad() else gradient)\n"
        "    return trainer\n"
        "train_gpt2.make_trainer = poisoned\n"
        "train_gpt2.run(train_gpt2.main)\n"
    )
    command = [*TORCHRUN, str(script), *RUN, "--max_steps", "6"]
    finished = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert finished.returncode == 0, finished.stderr
    assert logged(tmp_path / "log", "skipped") == {1: 0, 2: 0, 3: 1, 4: 1, 5: 1, 6: 1}
    assert all(loss is not None for loss in logged(tmp_path / "log").values())


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounts a small file system")
def test_a_disk_that_is_really_full_leaves_good_checkpoints_and_training_goes_on(tmp_path, whole):
    whole(steps=2)
    small = tmp_path / "small"
    small.mkdir()
    size = sum(path.stat().st_size for path in (tmp_path / "whole" / "step_000002").iterdir())
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(1.5 * size)}", "tmpfs", small])
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        process = start("--max_steps", 5, "--save_every", 2, "--out_dir", small)
        assert process.wait(120) == 1  # the last checkpoint could not be saved
        assert (tmp_path / "out").read_text().count("could not be saved") == 1  # at step 4; the error is for step 5
        assert "step 5 could not be saved" in (tmp_path / "err").read_text()
        assert list(train_gpt2.checkpoints(small)) == [2] and train_gpt2.damage(small / "step_000002") is None
        assert {path.name for path in small.iterdir()} == {"step_000002", "log.jsonl", "loss.png"}
        assert list(logged(small)) == [1, 2, 3, 4, 5]
    finally:
        subprocess.run(["umount", small], check=True)
