"""A run that is stopped, by whatever, is continued to the uninterrupted run's end."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
from conftest import ROOT, flags_of, records, run_script, tiny_config

import train_gpt2
from common.checkpoint import checkpoints, newest_checkpoint
from common.files import sha256
from common.processes import World, start_processes, stop_signals
from common.script import DataError

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
RESTARTS = ENVIRONMENT | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # as in the README's command
SETTINGS = {"total_batch_size": 64, "max_lr": 3e-3, "save_every": 10}
with_and_without_shard = pytest.mark.parametrize("shard", [False, True], ids=["whole", "shard"])


@pytest.fixture
def shards(make_shards):
    """More tokens than the runs of seconds here read."""
    return make_shards(tokens=6000, shard_size=1000)


def flags(**changes):
    return flags_of(tiny_config(**(SETTINGS | changes)))


def start(launcher=(sys.executable,), environment=ENVIRONMENT, **changes):
    """Start the trainer; returns the process, whose output goes to the files `out` and `err`."""
    with open("out", "w") as out, open("err", "w") as err:
        command = [*launcher, str(ROOT / "train_gpt2.py"), *flags(**changes)]
        return subprocess.Popen(command, stdout=out, stderr=err, env=environment)


def run_whole(tmp_path, processes=0, **changes):
    """An uninterrupted run to compare with; returns its directory."""
    finished = run_script("train_gpt2.py", *flags(out_dir="whole", **changes), processes=processes, timeout=600)
    assert finished.returncode == 0, finished.stderr
    return tmp_path / "whole"


def logged(directory, key="loss"):
    try:
        return records(directory, key)
    except DataError:  # not there yet
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


def assert_same_end(first, second, step):
    """Two runs ended with the same weights, moments, losses and batches."""
    for name in ("model.safetensors", "optimizer.safetensors"):
        paths = [directory / f"step_{step:06d}" / name for directory in (first, second)]
        assert sha256(paths[0]) == sha256(paths[1]), name
    for key in ("loss", "val_loss", "norm", "batch", "position"):
        assert logged(first, key) == logged(second, key), key


# ---- one process, within seconds -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_debug")
def test_the_evaluation_of_the_step_that_a_signal_ended_is_made_up_for(shards, tmp_path, monkeypatch, capsys):
    step = train_gpt2.training_step

    def signalled(trainer, rows):
        if trainer.state.step == 3:
            signal.raise_signal(signal.SIGTERM)
        return step(trainer, rows)

    config = tiny_config(max_steps=6, save_every=10)
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt2, "training_step", signalled)
        train_gpt2.train(config)
    assert "stopped by a signal; continue with --resume" in capsys.readouterr().out
    assert list(logged(tmp_path / "log", "val_loss")) == [0] and max(logged(tmp_path / "log")) == 4
    train_gpt2.train(replace(config, resume=True))
    assert list(logged(tmp_path / "log", "val_loss")) == [0, 4, 6]


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_two_signals_are_collected_a_third_ends_at_once_and_the_handler_is_put_back(kind):
    before = signal.getsignal(kind)
    with stop_signals() as received:
        signal.raise_signal(kind)
        signal.raise_signal(kind)
        assert received == [kind, kind]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(kind)
    assert signal.getsignal(kind) == before


@pytest.mark.usefixtures("small_debug")
def test_a_signal_to_another_process_stops_this_one_too(shards, monkeypatch, capsys):
    any_rank = World.any_rank
    monkeypatch.setattr(World, "any_rank", lambda world, c: isinstance(c, list) or any_rank(world, c))
    train_gpt2.train(tiny_config())
    assert "stopped by a signal" in capsys.readouterr().out


# ---- several processes -----------------------------------------------------------------------------------------------


def test_the_timeout_is_that_of_the_process_group(monkeypatch):
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    given = {}
    monkeypatch.setattr("torch.distributed.rendezvous", lambda url, timeout: iter([("store", 0, 2)]))
    monkeypatch.setattr("torch.distributed.init_process_group", lambda backend, **settings: given.update(settings))
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: None)
    with start_processes("cpu", timeout=7):
        assert given["timeout"] == timedelta(seconds=7)
    asked = []

    def recorded(device, timeout):
        asked.append(timeout)
        raise DataError("enough")

    monkeypatch.setattr(train_gpt2, "start_processes", recorded)
    with pytest.raises(DataError, match="enough"):
        train_gpt2.train(tiny_config(timeout=7))
    assert asked == [7]


WORLD = """
import os, sys
sys.path.insert(0, {root!r})
import torch
from common.processes import start_processes
with start_processes("cpu", timeout=60) as world:
    numbers = torch.tensor([1.0, world.rank])
    assert world.sum(numbers).tolist() == [2.0, 1.0]
    assert numbers.tolist() == [1.0, world.rank]
    assert world.broadcast(7 + world.rank) == 7 and world.broadcast(-1) == -1
    assert world.any_rank(world.rank == 1) is True and world.any_rank(False) is False and world.any_rank([3]) is True
    assert world.agree("same") is True and world.agree("same" if world.rank else "other") is False
    world.barrier()
    world.print("agreed")
sys.stdout.flush()
os._exit(0)  # as `run` does: a process group's threads may abort an interpreter that exits as usual
"""


def test_processes_sum_without_changing_the_argument_broadcast_and_agree(tmp_path):
    (tmp_path / "world.py").write_text(WORLD.format(root=str(ROOT)))
    finished = run_script(tmp_path / "world.py", processes=2)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == "agreed\n"


def test_the_sum_of_one_process_is_not_its_argument():
    numbers = torch.ones(2)
    total = World(0, 1, torch.device("cpu")).sum(numbers)
    total += 1
    assert numbers.tolist() == [1.0, 1.0]


PATIENT = """
import os, sys, time
sys.path.insert(0, {root!r})
from common.processes import start_processes
with start_processes("cpu", timeout=2) as world:
    began = time.monotonic()
    saved = world.on_main(lambda: time.sleep(6) or "saved")
    print(f"{{world.rank}} {{saved}} {{time.monotonic() - began > 5.9}}\\n", end="", flush=True)
    world.barrier()
sys.stdout.flush()
os._exit(0)  # as `run` does: a process group's threads may abort an interpreter that exits as usual
"""


def test_processes_wait_for_the_main_one_beyond_the_timeout_and_it_alone_works(tmp_path):
    (tmp_path / "patient.py").write_text(PATIENT.format(root=str(ROOT)))
    finished = run_script(tmp_path / "patient.py", processes=2)
    assert finished.returncode == 0, finished.stderr
    assert sorted(finished.stdout.splitlines()) == ["0 saved True", "1 None True"]


GRADIENTS = """
import os, sys
sys.path.insert(0, {root!r})
import torch
import train_gpt2
from common.processes import start_processes
from conftest import tiny_config
from model import GPT, GPTConfig
with start_processes("cpu", timeout=60) as world:
    config = tiny_config(block_size=16, total_batch_size=128, min_lr=0.0, initial_batch_size=128)
    gpt = GPT(GPTConfig(block_size=16, n_layer=2, n_head=2, n_embd=16))
    trainer = train_gpt2.make_trainer(config, world, gpt)
    rows = torch.zeros(2, 2, 17, dtype=torch.long)
    for _ in range(3):
        train_gpt2.training_step(trainer, rows)
    train_gpt2.accumulate_gradients(trainer, rows)
    gradients = [parameter.grad for parameter in gpt.parameters()]
    storages = {{gradient.untyped_storage().data_ptr(): gradient.untyped_storage().nbytes() for gradient in gradients}}
    assert sum(storages.values()) == 4 * sum(gradient.numel() for gradient in gradients)
    world.print(f"{{len(gradients)}} {{len(storages)}}")
sys.stdout.flush()
os._exit(0)  # as `run` does: a process group's threads may abort an interpreter that exits as usual
"""


def test_gradients_of_several_processes_are_views_of_few_buckets(tmp_path):
    """Between accumulation steps too: apart from the buckets, they would take their memory twice."""
    (tmp_path / "gradients.py").write_text(GRADIENTS.format(root=str(ROOT)))
    finished = run_script(tmp_path / "gradients.py", processes=2, env={"PYTHONPATH": str(ROOT / "tests")})
    assert finished.returncode == 0, finished.stderr
    gradients, buckets = map(int, finished.stdout.split())
    assert gradients == 28 and buckets <= 3


POISONED = """
import os, sys
sys.path.insert(0, {root!r})
import train_gpt2
accumulate = train_gpt2.accumulate_gradients
def poisoned(trainer, micro_batches):
    loss = accumulate(trainer, micro_batches)
    if os.environ["RANK"] == "1" and trainer.state.step == 2:
        trainer.state.gpt.lm_head.weight.grad.mul_(float("nan"))
    return loss
train_gpt2.accumulate_gradients = poisoned
train_gpt2.script.run(train_gpt2.main)
"""


@pytest.mark.slow
@with_and_without_shard
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_nan_in_one_processs_gradient_is_skipped_by_all(shards, tmp_path, shard, optimizer):
    (tmp_path / "poisoned.py").write_text(POISONED.format(root=str(ROOT)))
    settings = {"max_steps": 6, "save_every": 1, "keep": 6, "shard": shard, "optimizer": optimizer}
    finished = run_script(tmp_path / "poisoned.py", *flags(**settings), processes=2)
    assert finished.returncode == 0, finished.stderr
    assert logged(tmp_path / "log", "skipped") == {1: 0, 2: 0, 3: 1, 4: 1, 5: 1, 6: 1}
    assert all(loss is not None for loss in logged(tmp_path / "log").values())
    for name in ("model.safetensors", "optimizer.safetensors"):
        before, after, later = ((tmp_path / "log" / f"step_00000{step}" / name).read_bytes() for step in (2, 3, 4))
        assert before == after != later, name


# ---- kills, signals, full disks; minutes -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_the_run_after_a_step_that_is_saved(shards, tmp_path, kind):
    directory = run_whole(tmp_path, max_steps=30)
    process = start(max_steps=30, save_every=0)
    wait_until(lambda: 7 in logged(tmp_path / "log"))
    process.send_signal(kind)
    assert process.wait(60) == 0
    (step,) = checkpoints(tmp_path / "log")
    assert 7 <= step < 30
    assert (tmp_path / "out").read_text().splitlines()[-1].startswith("stopped by a signal; continue with --resume")
    assert start(max_steps=30, resume=True).wait(120) == 0
    assert_same_end(directory, tmp_path / "log", 30)


@pytest.mark.slow
@with_and_without_shard
def test_a_signal_to_torchrun_stops_all_processes_together(shards, tmp_path, shard):
    directory = run_whole(tmp_path, processes=2, max_steps=40, shard=shard)
    process = start(TORCHRUN, max_steps=40, save_every=0, shard=shard)
    wait_until(lambda: 5 in logged(tmp_path / "log"))
    process.terminate()
    process.wait(60)
    assert "stopped by a signal" in (tmp_path / "out").read_text()
    assert start(TORCHRUN, max_steps=40, resume=True, shard=shard).wait(120) == 0
    assert_same_end(directory, tmp_path / "log", 40)


@pytest.mark.slow
@with_and_without_shard
def test_torchrun_goes_on_by_itself_with_resume_in_the_command_of_the_readme(shards, tmp_path, shard):
    directory = run_whole(tmp_path, processes=2, max_steps=60, shard=shard)
    process = start([*TORCHRUN, "--max_restarts=3"], RESTARTS, max_steps=60, resume=True, shard=shard)
    for step in (12, 32):
        wait_until(lambda step=step: step in logged(tmp_path / "log"))
        os.kill(workers_of(process)[1], signal.SIGKILL)
    assert process.wait(180) == 0, (tmp_path / "err").read_text()
    assert (tmp_path / "out").read_text().count("resuming from") == 2
    assert_same_end(directory, tmp_path / "log", 60)


@pytest.mark.slow
def test_torchrun_never_goes_on_by_itself_without_resume(shards, tmp_path):
    process = start([*TORCHRUN, "--max_restarts=1"], RESTARTS, max_steps=10_000)
    wait_until(lambda: 12 in logged(tmp_path / "log"))
    os.kill(workers_of(process)[1], signal.SIGKILL)
    assert process.wait(180) != 0
    assert (tmp_path / "err").read_text().count("holds a run: continue it with --resume") == 1
    assert "resuming from" not in (tmp_path / "out").read_text()


@pytest.mark.slow
def test_a_main_process_that_hangs_while_it_saves_ends_the_run_within_the_timeout(tmp_path):
    (tmp_path / "patient.py").write_text(PATIENT.format(root=str(ROOT)).replace("time.sleep(6)", "time.sleep(600)"))
    with open("err", "w") as err:
        process = subprocess.Popen([*TORCHRUN, "patient.py"], stderr=err, env=ENVIRONMENT)
    wait_until(lambda: len(workers_of(process)) == 2)
    time.sleep(10)  # they are well past the timeout
    assert process.poll() is None
    os.kill(workers_of(process)[0], signal.SIGSTOP)
    assert process.wait(120) != 0
    assert "did not answer within --timeout 2 s" in (tmp_path / "err").read_text()


@pytest.mark.slow
@with_and_without_shard
def test_a_process_that_hangs_ends_the_run_within_the_timeout(shards, tmp_path, shard):
    process = start(TORCHRUN, max_steps=100_000, timeout=5, shard=shard)
    wait_until(lambda: 5 in logged(tmp_path / "log"))
    os.kill(workers_of(process)[1], signal.SIGSTOP)
    began = time.monotonic()
    assert process.wait(120) != 0
    assert time.monotonic() - began < 60  # 5 seconds, and torchrun's own 30 to end the one that hangs
    assert "--timeout 5 s" in (tmp_path / "err").read_text()


def kill_at_random(process, out_dir, generator, while_saving):
    """Kill a run and its workers some steps on, while it saves if it can be hit; returns whether that was."""
    target = max(checkpoints(out_dir), default=0) + generator.randrange(2, 12)
    wait_until(lambda: target in logged(out_dir))
    saving = out_dir / ".checkpoint.tmp"
    if while_saving:
        wait_until(saving.exists)
    time.sleep(generator.uniform(0, 0.02 if while_saving else 0.1))
    hit = saving.exists()
    assert process.poll() is None, "the run ended by itself"
    for victim in [*workers_of(process), process.pid]:
        os.kill(victim, signal.SIGKILL)
    process.wait()
    return hit


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "settings"), [(1, {}), (2, {"optimizer": "muon"}), (2, {"optimizer": "muon", "shard": True})]
)
def test_20_kills_at_random_moments_end_in_the_uninterrupted_runs_parameters(shards, tmp_path, processes, settings):
    settings = {"max_steps": 400, "eval_every": 20, "optimizer": "adamw"} | settings
    directory = run_whole(tmp_path, processes=0 if processes == 1 else 2, save_every=0, **settings)
    launcher = [sys.executable] if processes == 1 else TORCHRUN
    generator, hits = random.Random(processes), 0
    for number in range(20):
        process = start(launcher, save_every=3, keep=2, resume=True, **settings)
        hits += kill_at_random(process, tmp_path / "log", generator, while_saving=number % 2 == 1)
    assert hits >= 3 and 0 < max(checkpoints(tmp_path / "log")) < 400
    assert start(launcher, save_every=0, resume=True, **settings).wait(300) == 0, (tmp_path / "err").read_text()
    assert_same_end(directory, tmp_path / "log", 400)


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_a_run_of_four_processes_is_resumed_bit_for_bit(shards, tmp_path, shard):
    """Unlike that of two processes, a sum of four depends on the order in which it is added."""
    settings = {"batch_size": 1, "max_steps": 6, "save_every": 3, "shard": shard}
    directory = run_whole(tmp_path, processes=4, **settings)
    shutil.copytree(directory, tmp_path / "log")
    shutil.rmtree(tmp_path / "log" / "step_000006")
    finished = run_script("train_gpt2.py", *flags(resume=True, **settings), processes=4)
    assert finished.returncode == 0, finished.stderr
    assert_same_end(directory, tmp_path / "log", 6)


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system of so many bytes: small_disk(size) returns its directory."""
    directory = tmp_path / "small"
    directory.mkdir()

    def mount(size):
        if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", directory]).returncode:
            pytest.skip("mounting is not allowed here")
        return directory

    yield mount
    subprocess.run(["umount", directory])


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounts a small file system")
def test_a_disk_that_is_really_full_leaves_good_checkpoints_and_training_goes_on(shards, tmp_path, small_disk):
    whole = run_whole(tmp_path, max_steps=2)
    small = small_disk(int(1.5 * sum(path.stat().st_size for path in (whole / "step_000002").iterdir())))
    process = start(max_steps=5, save_every=2, out_dir=small)
    assert process.wait(120) == 1  # the last checkpoint could not be saved
    assert (tmp_path / "out").read_text().count("could not be saved") == 1  # at step 4; the error is for step 5
    assert "step 5 could not be saved" in (tmp_path / "err").read_text()
    assert list(checkpoints(small)) == [2] and newest_checkpoint(small) == (small / "step_000002", {})
    assert {path.name for path in small.iterdir()} == {"step_000002", "log.jsonl", "loss.png"}
    assert list(logged(small)) == [1, 2, 3, 4, 5]
