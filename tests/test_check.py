"""The check of a machine: a machine that is right passes, and a fault in each of its parts is found."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run_script

import check
import train_gpt2
from benchmarks import fixed, speed
from common.processes import World
from common.script import UsageError
from model import PRESETS
from recipes import RECIPES, fill_defaults, recipe


@pytest.fixture
def debug_check(tmp_path):
    """A check of `debug` in float32 on a CPU."""
    device = torch.device("cpu")
    recipe = fill_defaults(replace(RECIPES["debug"], dtype="float32"), device, PRESETS["debug"])
    return check.Check(recipe, World(0, 1, device), tmp_path, fixed.synthetic_tokens(tmp_path), dollars_per_hour=3.0)


def change_a_weight(monkeypatch):
    right = fixed.fixed_gpt

    def wrong(*arguments, **settings):
        gpt = right(*arguments, **settings)
        gpt.transformer.h[1].mlp.c_fc.weight.data[3, 5] += 0.5
        return gpt

    monkeypatch.setattr(fixed, "fixed_gpt", wrong)


def test_loss_and_gradient_of_each_attention_backend_are_those_that_are_stored(debug_check):
    findings = list(check.exactness(debug_check))
    assert [finding.seen.split(":")[0].split()[-1] for finding in findings] == ["flash", "math"]  # a CPU has no more
    assert not any(finding.remedy for finding in findings)


def test_a_wrong_weight_is_found(debug_check, monkeypatch):
    change_a_weight(monkeypatch)
    findings = list(check.exactness(debug_check))
    assert findings and all("wrong on ranks [0]" in finding.remedy for finding in findings)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_attention_that_returns_nan_is_found_and_named_with_its_flag(debug_check, monkeypatch, where):
    right = torch.nn.functional.scaled_dot_product_attention

    def attention(q, *arguments, **settings):
        y = right(q, *arguments, **settings)
        if torch.backends.cuda.flash_sdp_enabled() or not q.requires_grad:
            return y
        if where == "backward":
            y.register_hook(lambda gradient: gradient * math.nan)
        return y if where == "backward" else y * math.nan

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    remedies = {finding.seen.split(":")[0]: finding.remedy for finding in check.exactness(debug_check)}
    assert [flags.split()[-1] for flags, remedy in remedies.items() if remedy] == ["math"]


FAULTS = {
    "one rank has another weight": ("fixed.fixed_gpt = wrong if os.environ['RANK'] == '1' else right", [1]),
    "gradients are not summed": ("sharding.DistributedDataParallel = lambda model, **settings: model", [0, 1]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_rank_that_differs_is_found(fault, tmp_path):
    line, wrong_ranks = FAULTS[fault]
    program = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import check
from benchmarks import fixed
from common import script, sharding
right = fixed.fixed_gpt
def wrong(*arguments, **settings):
    gpt = right(*arguments, **settings)
    gpt.transformer.h[1].mlp.c_fc.weight.data[3, 5] += 0.5
    return gpt
{line}
check.PARTS = (check.exactness,)
check.ATTENTION = ["flash"]
script.run(check.main)
"""
    (tmp_path / "faulty.py").write_text(program)
    finished = run_script(tmp_path / "faulty.py", "--device", "cpu", "--model", "debug", processes=2, timeout=600)
    assert finished.returncode == 1
    assert f"wrong on ranks {wrong_ranks}" in finished.stdout and "--shard: off by" in finished.stdout
    assert "exactness" in json.loads(finished.stdout.splitlines()[-1])["wrong"]


@pytest.mark.parametrize(("free", "wrong"), [(10**7, True), (10**12, False)])
def test_a_disk_too_small_for_the_shards_and_checkpoints_is_found(debug_check, monkeypatch, free, wrong):
    monkeypatch.setattr(check.shutil, "disk_usage", lambda path: type("Usage", (), {"free": free}))
    disks = [finding for finding in check.machine(debug_check) if finding.name == "disk"]
    assert disks and all(bool(finding.remedy) == wrong for finding in disks)
    assert "--out_dir" in disks[0].remedy or not wrong


def test_a_backend_whose_kernel_fails_is_found_and_the_others_are_checked(debug_check, monkeypatch):
    right = fixed.loss_and_gradient

    def failing(config, *arguments):
        if config.attention == "flash":
            raise RuntimeError("no kernel image is available")
        return right(config, *arguments)

    monkeypatch.setattr(fixed, "loss_and_gradient", failing)
    assert [bool(finding.remedy) for finding in check.exactness(debug_check)] == [True, False]
    assert debug_check.wrong_attention == {"flash", "auto"}


def test_damaged_shards_are_found_and_absent_ones_are_not_an_error(debug_check, make_shards):
    def data():
        return next(finding for finding in check.machine(debug_check) if finding.name == "data")

    assert data().remedy == ""
    debug_check.config = replace(debug_check.config, data_dir=str(make_shards()), total_batch_size=2048)
    assert data().remedy == "" and "ms to read" in data().seen
    next(make_shards(name="damaged").glob("*train*")).write_bytes(b"")
    debug_check.config = replace(debug_check.config, data_dir="damaged")
    assert "build it again" in data().remedy


@pytest.mark.parametrize(("change", "wrong"), [(0.005, False), (0.02, True), (math.nan, True)])
def test_a_curve_beyond_its_tolerance_is_found(debug_check, monkeypatch, change, wrong):
    losses = json.loads(fixed.FILE.read_text())["debug"]
    losses[7] += change
    monkeypatch.setattr(fixed, "short_run", lambda *arguments: (losses, 0.0))
    (finding,) = check.curve(debug_check)
    assert bool(finding.remedy) == wrong


@pytest.mark.slow
def test_an_optimizer_with_another_learning_rate_is_found(debug_check, monkeypatch):
    right = train_gpt2.learning_rate
    monkeypatch.setattr(train_gpt2, "learning_rate", lambda config, step: 0.9 * right(config, step))
    (finding,) = check.curve(debug_check)
    assert finding.remedy


def test_the_micro_batch_is_halved_until_it_fits_in_memory(small_debug, debug_check, monkeypatch):
    right = train_gpt2.training_step

    def step(trainer, rows):
        if trainer.config.batch_size > 1:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        return right(trainer, rows)

    monkeypatch.setattr(train_gpt2, "training_step", step)
    config = replace(debug_check.config, block_size=32)
    rates = speed.batch_sizes(config, debug_check.world, debug_check.tokens)
    assert list(rates) == [4, 2, 1]
    assert rates[4] == rates[2] == 0 < rates[1]


def test_what_a_run_takes_is_the_sum_of_its_parts(small_debug, debug_check):
    debug_check.config = replace(debug_check.config, block_size=32)
    findings = [*check.kernels(debug_check), *check.training(debug_check), *check.whole_run(debug_check)]
    assert not any(finding.remedy for finding in findings)
    assert findings[-1].seen.startswith("--batch_size 4 --attention ")
    figures = debug_check.figures
    assert figures["hours"].keys() == figures["seconds"].keys() == {*speed.EVALUATIONS, "steps", "saving"}
    assert min(figures["seconds"].values()) > 0
    assert figures["dollars"] == pytest.approx(3 * sum(figures["hours"].values()))
    assert list(debug_check.directory.glob("step_*"))  # in a directory that the check removes


def test_the_hours_of_a_run_follow_its_intervals():
    config = replace(RECIPES["gpt2"], sample_every=0)
    seconds = {"steps": 0.14, "validation": 2.0, "HellaSwag": 3.0, "samples": 1.0, "saving": 4.0}
    hours = speed.run_hours(config, seconds)
    times = {kind: round(3600 * hours[kind] / seconds[kind]) for kind in seconds}
    assert times == {"steps": 19_073, "validation": 40, "HellaSwag": 21, "samples": 0, "saving": 20}


def test_all_but_the_steps_of_the_reproduction_takes_at_most_5_percent():
    """On eight H100, by the estimates in benchmarks/README.md."""
    seconds = {"steps": 0.14, "validation": 0.93, "HellaSwag": 1.0, "samples": 0.3, "saving": 3.5}
    hours = speed.run_hours(RECIPES["gpt2"], seconds)
    assert sum(hours.values()) - hours["steps"] < 0.05 * hours["steps"]


def test_a_part_that_fails_is_a_finding_and_the_others_go_on(monkeypatch, capsys):
    def failing(check):
        raise RuntimeError("no kernel image is available")
        yield

    monkeypatch.setattr(check, "PARTS", (failing, check.machine))
    with pytest.raises(SystemExit, match="1"):
        check.main(["--device", "cpu", "--model", "debug"])
    lines = capsys.readouterr().out.splitlines()
    assert "no kernel image is available" in lines[0] and lines[1].startswith("torch")
    assert json.loads(lines[-1])["wrong"] == ["failing"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_recipe_of_the_optimizer_that_is_asked_for_is_checked(monkeypatch, capsys, optimizer):
    monkeypatch.setattr(check, "PARTS", (lambda checked: [check.Finding("recipe", repr(checked.config))],))
    check.main(["--device", "cpu", "--model", "debug", "--optimizer", optimizer])
    assert f"optimizer='{optimizer}', schedule='{recipe('debug', optimizer).schedule}'" in capsys.readouterr().out


def test_a_number_of_processes_that_does_not_divide_the_batch_is_refused(monkeypatch):
    import contextlib

    world = World(0, 3, torch.device("cpu"))
    monkeypatch.setattr(check, "start_processes", lambda *arguments, **settings: contextlib.nullcontext(world))
    with pytest.raises(UsageError, match="3 processes"):
        check.main(["--device", "cpu", "--model", "debug"])


@pytest.mark.slow
@pytest.mark.parametrize("processes", [0, 2])
def test_a_machine_that_is_right_passes_and_is_left_as_it_was(processes, tmp_path):
    flags = ["--device", "cpu", "--model", "debug", "--dollars_per_hour", 2]
    finished = run_script("check.py", *flags, processes=processes, timeout=1800)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    *lines, figures = finished.stdout.splitlines()
    assert all(line.endswith("| ok") for line in lines)
    figures = json.loads(figures)
    assert figures["wrong"] == [] and figures["dollars"] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_backend_that_is_wrong_is_not_recommended_however_fast(debug_check, monkeypatch):
    monkeypatch.setattr(speed, "seconds_once", lambda *_: dict.fromkeys([*speed.EVALUATIONS, "saving"], 1.0))
    seconds = {"auto": 1.0, "flash": 0.5, "math": 2.0}
    debug_check.figures = {"fastest_tokens_per_second": 1e4, "attention_seconds": seconds}
    debug_check.wrong_attention = {"flash", "auto"}
    assert "--attention math" in list(check.whole_run(debug_check))[-1].seen


def test_processes_that_end_with_other_weights_are_found(debug_check, monkeypatch):
    losses = json.loads(fixed.FILE.read_text())["debug"]
    monkeypatch.setattr(fixed, "short_run", lambda *_: (losses, 1.0))
    monkeypatch.setattr(speed, "on_ranks", lambda world, value: [value, value + 1])
    assert next(check.curve(debug_check)).remedy


def test_a_steps_time_is_that_of_one_micro_batch_and_what_each_more_adds(monkeypatch):
    config = replace(RECIPES["gpt2"], batch_size=8, block_size=1024)
    trainer = SimpleNamespace(config=config, world=World(0, 8, torch.device("cpu")))
    asked, seconds = [], iter([1.0, 1.25])
    monkeypatch.setattr(speed, "train_steps", lambda trainer, tokens, steps, size: asked.append(size))
    monkeypatch.setattr(speed, "median_seconds", lambda work, times, warmup: (work(), next(seconds))[1])
    assert speed.step_seconds(trainer, None) == 1 + 7 * 0.25 and asked == [2**16, 2**16, 2**17]


def test_what_is_timed_on_a_part_is_scaled_to_the_whole(small_debug, debug_check, monkeypatch):
    monkeypatch.setattr(speed, "median_seconds", lambda work, times, warmup: 1.0)
    config = replace(debug_check.config, block_size=32, val_tokens=2**20)
    seconds = speed.seconds_once(config, debug_check.world, debug_check.tokens, debug_check.directory)
    assert seconds == {"validation": 64.0, "HellaSwag": 20_084 / 50, "samples": 1.0, "saving": 1.0}


@pytest.mark.parametrize("eager_alone", [0.0, 5.0])
def test_several_processes_train_eagerly_only_if_one_has_the_memory(debug_check, monkeypatch, eager_alone):
    runs = []

    def rate(way, world, tokens):
        runs.append((way.compile, world.size))
        return eager_alone if world.size == 1 else 7.0

    monkeypatch.setattr(speed, "tokens_per_second", rate)
    monkeypatch.setattr(speed, "on_ranks", lambda world, value: [value, value])
    config, world = replace(debug_check.config, compile=True), replace(debug_check.world, size=2)
    rates = [rate for *_, rate, _ in speed.each_way(config, world, debug_check.tokens)]
    assert rates == [7.0 if eager_alone else 0.0, 7.0, 7.0]
    assert runs == [(False, 1), *([(False, 2)] if eager_alone else []), (True, 2), (True, 2)]


def test_float32_is_checked_without_tf32(debug_check, monkeypatch):
    seen, accumulate = [], train_gpt2.accumulate_gradients

    def watched(*arguments):
        seen.append(torch.get_float32_matmul_precision())
        return accumulate(*arguments)

    monkeypatch.setattr(train_gpt2, "accumulate_gradients", watched)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        fixed.loss_and_gradient(debug_check.config, debug_check.world, debug_check.tokens)
        assert seen == ["highest"] and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_way_whose_steps_are_skipped_is_not_taken_for_a_fast_one(debug_check, monkeypatch):
    def diverged(trainer, micro_batches):
        return accumulate(trainer, micro_batches) * math.nan

    accumulate = train_gpt2.accumulate_gradients
    config = replace(debug_check.config, total_batch_size=256, batch_size=1)
    assert speed.tokens_per_second(config, debug_check.world, debug_check.tokens) > 0
    monkeypatch.setattr(train_gpt2, "accumulate_gradients", diverged)
    assert speed.tokens_per_second(config, debug_check.world, debug_check.tokens) == 0
