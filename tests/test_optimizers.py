"""Muon's updates are torch.optim.Muon's, and a run with it is divided, saved and resumed as any other."""

import copy
import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import transformers
from conftest import assert_moved_alike, flags_of, random_ids, records, run_script, small_gpt, tiny_config

import plot
import train_gpt2
from benchmarks import recipes as benchmark
from common import monitor
from common.huggingface import load_gpt
from common.muon import orthogonalize_across_processes, orthogonalized
from common.processes import World
from common.script import DataError, UsageError
from common.shards import open_shards
from model import GPT
from recipes import MUON_RECIPES, RECIPES, TUNED_GPT2, TrainConfig, fill_defaults, learning_rate, parse_config
from train_gpt2 import make_optimizer, train, training_step

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
MUON = TrainConfig(optimizer="muon", weight_decay=0.05)


def muon_config(**changes):
    """The settings of a run of seconds with Muon."""
    return tiny_config(**({"optimizer": "muon", "schedule": "linear"} | changes))


def block_matrices(gpt):
    return [p for name, p in gpt.named_parameters() if ".h." in name and p.dim() == 2]


def parts_of(matrix):
    """The query's, the key's and the value's projections of c_attn; another matrix by itself."""
    rows, columns = matrix.shape
    return matrix.chunk(3) if rows == 3 * columns else (matrix,)


# ---- the update ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("in_bfloat16", "tolerance"), [(True, 1e-3), (False, 2e-3)])
def test_20_updates_of_the_blocks_matrices_are_those_of_torch_optim_muon(monkeypatch, in_bfloat16, tolerance):
    monkeypatch.setattr("common.muon.has_bfloat16", lambda device: in_bfloat16)
    gpt, generator = small_gpt(), torch.Generator().manual_seed(0)
    ours = make_optimizer(gpt, replace(MUON, weight_decay=1.0), ALONE)
    copies = [part.detach().clone() for matrix in block_matrices(gpt) for part in parts_of(matrix)]
    theirs = torch.optim.Muon(copies, lr=MUON.muon_lr, weight_decay=1.0)
    for _ in range(20):
        for parameter in gpt.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        gradients = [part for matrix in block_matrices(gpt) for part in parts_of(matrix.grad)]
        for part, gradient in zip(copies, gradients, strict=True):
            part.grad = gradient.clone()
        ours.step()
        theirs.step()
    updated = [part for matrix in block_matrices(gpt) for part in parts_of(matrix)]
    assert len(updated) == 6 * gpt.config.n_layer
    for part, expected in zip(updated, copies, strict=True):
        torch.testing.assert_close(part, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("in_bfloat16", [True, False])
def test_matrices_are_not_multiplied_in_a_type_that_the_device_emulates(monkeypatch, in_bfloat16):
    multiply, types = torch.baddbmm, set()

    def recorded(*matrices, **factors):
        types.update(matrix.dtype for matrix in matrices)
        return multiply(*matrices, **factors)

    monkeypatch.setattr("common.muon.has_bfloat16", lambda device: in_bfloat16)
    monkeypatch.setattr(torch, "baddbmm", recorded)
    gpt = small_gpt()
    gpt(random_ids(2, 8), random_ids(2, 8, seed=2))[1].backward()
    make_optimizer(gpt, MUON, ALONE).step()
    assert types == {torch.bfloat16 if in_bfloat16 else torch.float32}


@pytest.mark.parametrize("shape", [(32, 32), (32, 128), (128, 32)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_updates_singular_values_are_near_1_and_its_singular_vectors_the_gradients(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(size, 32, generator=generator))[0] for size in shape)
    gradient = left @ torch.diag(torch.logspace(0, -2.43, 32)) @ right.T
    (update,) = orthogonalized(gradient[None].to(dtype)).float()
    values = torch.linalg.svdvals(update)
    assert 0.6 < values.min() and values.max() < 1.3
    in_their_basis = left.T @ update @ right
    assert (in_their_basis - torch.diag(in_their_basis.diag())).abs().max() < 0.1


@pytest.mark.parametrize("matrices", [2, 4, 6])
def test_the_shares_of_any_number_of_processes_make_up_the_whole(matrices):
    class OneOfFour(World):
        def sum(self, values):
            return values  # its own share alone

    gradients = torch.randn(matrices, 8, 16, generator=torch.Generator().manual_seed(0))
    shares = [orthogonalize_across_processes(gradients, OneOfFour(rank, 4, CPU)) for rank in range(4)]
    torch.testing.assert_close(sum(shares), orthogonalized(gradients), rtol=0, atol=1e-6)
    busy = [share.flatten(1).any(dim=1).sum() for share in shares]
    assert sum(busy) == matrices and max(busy) <= math.ceil(matrices / 4)


def test_embeddings_biases_and_norms_are_updated_by_adamw_without_decay():
    gpt = small_gpt()
    others = {name: p for name, p in gpt.named_parameters() if ".h." not in name or p.dim() < 2}
    copies = [parameter.detach().clone().requires_grad_() for parameter in others.values()]
    theirs = torch.optim.AdamW(copies, lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    optimizer = make_optimizer(gpt, replace(MUON, max_lr=0.1), ALONE)
    for _ in range(3):
        gpt(random_ids(2, 8), random_ids(2, 8, seed=2))[1].backward()
        for parameter, copied in zip(others.values(), copies, strict=True):
            copied.grad = parameter.grad.clone()
        optimizer.step()
        optimizer.zero_grad()
        theirs.step()
    for (name, parameter), expected in zip(others.items(), copies, strict=True):
        torch.testing.assert_close(parameter, expected, msg=name)


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(make_shards, small_debug, monkeypatch):
    """2,500 train tokens in five shards, and a smaller model; no picture, which would take longer than a run."""
    monkeypatch.setattr(plot, "draw", lambda directory: None)
    return make_shards(tokens=3000, shard_size=500)


@pytest.mark.parametrize(
    ("dtype", "compile"),
    [
        ("float32", False),
        ("float16", False),
        ("bfloat16", False),
        pytest.param("float32", True, marks=pytest.mark.slow),
        pytest.param("bfloat16", True, marks=pytest.mark.slow),
    ],
)
def test_n_plus_n_steps_with_muon_equal_2n_bit_for_bit(shards, tmp_path, dtype, compile):
    config = muon_config(dtype=dtype, compile=compile)
    train(config)
    shutil.copytree(tmp_path / "log", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "step_000008")
    train(replace(config, out_dir="again", resume=True))
    for name in ("model.safetensors", "optimizer.safetensors"):
        ends = [(tmp_path / log / "step_000008" / name).read_bytes() for log in ("log", "again")]
        assert ends[0] == ends[1], name
    losses = records(tmp_path / "log")
    assert losses == records(tmp_path / "again") and losses[8] < losses[1] - 0.5
    train(replace(config, compile=False, out_dir="eager"))
    assert losses == pytest.approx(records(tmp_path / "eager"), abs=1e-3 if dtype == "float32" else 0.02)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_step_that_is_not_finite_leaves_weights_and_moments_as_they_were(small_debug, monkeypatch, dtype):
    config = fill_defaults(muon_config(dtype=dtype), CPU, small_debug)
    trainer = train_gpt2.make_trainer(config, ALONE, GPT(small_debug))
    rows, state = random_ids(4, 2, 17), trainer.state
    while not state.optimizer.state:  # the scale that fp16 begins with is too large
        training_step(trainer, rows)
    before = copy.deepcopy([state.gpt.state_dict(), state.optimizer.state_dict()["state"]])
    accumulate = train_gpt2.accumulate_gradients

    def spoiled(trainer, micro_batches):
        loss = accumulate(trainer, micro_batches)
        state.gpt.transformer.h[0].mlp.c_fc.weight.grad[0, 0] = math.nan
        return loss

    monkeypatch.setattr(train_gpt2, "accumulate_gradients", spoiled)
    skipped = state.skipped
    training_step(trainer, rows)
    assert state.skipped == skipped + 1
    after = [state.gpt.state_dict(), state.optimizer.state_dict()["state"]]
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_the_checkpoint_of_a_run_with_muon_has_the_same_logits_in_transformers(shards, tmp_path):
    train(muon_config(max_steps=2, block_size=32))
    directory, ids = tmp_path / "log" / "step_000002", random_ids(2, 20)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        torch.testing.assert_close(load_gpt(directory)(ids)[0], theirs(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_two_processes_train_with_muon_as_one_does(make_shards, tmp_path, dtype):
    make_shards()
    config = muon_config(max_steps=4, total_batch_size=64, dtype=dtype)
    for processes in (0, 2):
        flags = flags_of(replace(config, out_dir=f"by{processes}"))
        finished = run_script("train_gpt2.py", *flags, processes=processes)
        assert finished.returncode == 0, finished.stderr
    alone, together = records(tmp_path / "by0"), records(tmp_path / "by2")
    assert list(alone) == [1, 2, 3, 4] and together == pytest.approx(alone, abs=1e-3)
    assert_moved_alike(tmp_path / "by2" / "step_000004", tmp_path / "by0" / "step_000004", config.seed, 0.02)


def test_the_largest_attention_logit_is_logged_on_request(shards, tmp_path):
    train(muon_config(max_steps=2, monitor_every=2))
    logged = records(tmp_path / "log", "attention_logit")
    assert list(logged) == [0, 2]
    directory = tmp_path / "log" / "step_000002"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory)
    ids, logits = torch.from_numpy(open_shards(shards).val.read(0, 16).astype(int))[None], []
    for block in theirs.transformer.h:
        block.attn.c_attn.register_forward_hook(lambda module, inputs, output: logits.append(output))
    with torch.no_grad():
        theirs(ids)
    largest = -math.inf
    for projections in logits:
        q, k, _ = (part.view(16, 2, 8) for part in projections[0].split(16, dim=1))
        for head in range(2):
            for row in range(16):
                largest = max(largest, float((k[: row + 1, head] @ q[row, head]).max()) / math.sqrt(8))
    assert logged[2] == pytest.approx(largest, rel=1e-4) and not logged[0] == logged[2]


@torch.no_grad()
def test_the_largest_attention_logit_may_be_negative_and_shows_one_that_is_nan():
    gpt = small_gpt()
    for block in gpt.transformer.h:
        q, k, _ = block.attn.c_attn.weight.chunk(3)
        k.copy_(-q)
        block.attn.c_attn.bias.zero_()
    gpt.transformer.wpe.weight.zero_()
    same = random_ids(1, 1).repeat(1, 4)  # without positions, each query is opposite to every key
    assert monitor.largest_attention_logit(gpt, same) < 0
    gpt.transformer.h[-1].attn.c_attn.weight[0] = math.nan
    assert math.isnan(monitor.largest_attention_logit(gpt, same))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_largest_change_of_a_matrix_is_logged_on_request(shards, tmp_path, optimizer):
    train(tiny_config(optimizer=optimizer, max_steps=4, monitor_every=2, log_every=3, save_every=1, keep=4))
    logged = records(tmp_path / "log", "update")
    assert list(logged) == [2, 4] and not logged[2] == logged[4]
    before, after = (load_gpt(tmp_path / "log" / f"step_00000{step}").state_dict() for step in (1, 2))
    ratios = {name: float((after[name] - before[name]).norm() / before[name].norm()) for name in after}
    assert logged[2] == pytest.approx(max(ratios[name] for name in after if after[name].dim() == 2), rel=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_that_is_monitored_ends_in_the_same_weights(shards, tmp_path, optimizer):
    ends = []
    for monitor_every in (0, 1):
        log = f"by{monitor_every}"
        train(tiny_config(optimizer=optimizer, max_steps=3, monitor_every=monitor_every, out_dir=log))
        ends.append((tmp_path / log / "step_000003" / "model.safetensors").read_bytes())
    assert ends[0] == ends[1]


@pytest.mark.parametrize("model", RECIPES)
def test_the_choice_of_an_optimizer_brings_its_settings_for_each_size(model):
    assert parse_config(["--model", model, "--optimizer", "muon"], None) == MUON_RECIPES[model]
    assert parse_config(["--model", model, "--optimizer", "adamw"], None) == RECIPES[model]
    changed = parse_config(["--model", model, "--optimizer", "muon", "--max_steps", "7"], None)
    assert changed == replace(MUON_RECIPES[model], max_steps=7)


@pytest.mark.parametrize(
    ("flags", "needed"),
    [("--muon_lr 0.05", "--optimizer muon"), ("--optimizer muon --schedule cosine --decay_fraction 0.5", "linear")],
)
def test_a_setting_that_would_have_no_effect_is_refused(flags, needed):
    with pytest.raises(UsageError, match=f"no effect without .*{needed}"):
        parse_config(["--model", "gpt2", *flags.split()], None)


def test_muon_trains_gpt2_for_3_9_billion_tokens_of_which_the_last_three_quarters_decay_to_zero():
    config = parse_config(["--model", "gpt2", "--optimizer", "muon"], None)
    assert config.max_steps * config.total_batch_size == pytest.approx(3.9e9, rel=0.01)
    assert (config.schedule, config.decay_fraction, config.warmup_steps) == ("linear", 0.75, 250)
    assert (config.max_lr, config.muon_lr, config.weight_decay) == (3.6e-3, 0.02, 0.05)


def test_without_a_choice_gpt2_is_trained_with_adamw_and_debug_with_muon():
    assert parse_config(["--model", "gpt2"], None) == RECIPES["gpt2"]
    assert parse_config(["--model", "gpt2", "--max_lr", "1.2e-3"], None) == TUNED_GPT2
    assert parse_config(["--model", "debug"], None) == MUON_RECIPES["debug"]


def test_a_resumed_run_keeps_its_optimizer(shards):
    for optimizer in ("adamw", "muon"):
        config = muon_config(max_steps=2, optimizer=optimizer, out_dir=optimizer)
        train(config)
        resumed = parse_config(["--resume", "--out_dir", optimizer], None)
        assert (resumed.optimizer, resumed.max_lr, resumed.max_steps) == (optimizer, config.max_lr, 2)


# ---- the linear schedule ---------------------------------------------------------------------------------------------


def test_the_linear_schedule_is_constant_until_the_last_part_of_the_run():
    config = TrainConfig(
        schedule="linear", decay_fraction=0.4, max_lr=1e-3, min_lr=1e-4, max_steps=100, warmup_steps=10
    )
    assert learning_rate(config, 0) == pytest.approx(1e-4)
    assert {learning_rate(config, step) for step in range(9, 61)} == {1e-3}
    assert learning_rate(config, 80) == pytest.approx((1e-3 + 1e-4) / 2)
    assert learning_rate(config, 100) == learning_rate(config, 200) == pytest.approx(1e-4)
    whole = replace(config, decay_fraction=1.0)  # begins when the warm-up ends
    assert learning_rate(whole, 10) == pytest.approx(1e-3)
    assert learning_rate(whole, 55) == pytest.approx((1e-3 + 1e-4) / 2)
    assert learning_rate(replace(config, decay_fraction=0.0), 99) == pytest.approx(1e-3)


def test_the_linear_schedule_ends_at_zero_by_default_and_the_cosine_at_a_tenth(small_debug):
    config = fill_defaults(TrainConfig(model="debug", max_lr=1e-3), CPU, small_debug)
    linear = fill_defaults(TrainConfig(model="debug", max_lr=1e-3, schedule="linear"), CPU, small_debug)
    assert (config.min_lr, linear.min_lr) == (pytest.approx(1e-4), 0.0)


def test_a_run_may_be_prolonged_from_its_constant_part_and_not_from_its_decay(shards, tmp_path):
    config = muon_config(decay_fraction=0.5, save_every=2)
    train(config)
    in_decay = shutil.ignore_patterns("step_000006", "step_000008")
    shutil.copytree(tmp_path / "log", tmp_path / "constant", ignore=in_decay)
    train(replace(config, out_dir="constant", max_steps=12, resume=True))
    train(replace(config, out_dir="whole", max_steps=12))
    assert records(tmp_path / "constant") == records(tmp_path / "whole")
    with pytest.raises(UsageError, match="--max_steps"):
        train(replace(config, max_steps=12, resume=True))


def test_a_decay_longer_than_the_run_is_refused(shards):
    with pytest.raises(UsageError, match=r"--decay_fraction 1\.5"):
        train(muon_config(decay_fraction=1.5))


# ---- the benchmark of recipes ----------------------------------------------------------------------------------------

LONGER_RUNS = ((2, 0), (2, 1), (2, 2), (4, 0))  # multiples of --tokens, seeds


def test_the_benchmark_of_recipes_brackets_the_best_rates_and_runs_nothing_twice(monkeypatch, capsys):
    trained = []

    def pretend(config, training):
        trained.append(training)
        best = {"AdamW, cosine": 5e-3, "AdamW, linear": 5e-4, "Muon": 3e-3}[training.method]
        loss = 5 + math.log(training.max_lr / best) ** 2 - math.log2(training.tokens) / 10
        loss += math.log(training.muon_lr / 0.08) ** 2 - 0.1 if training.muon_lr else 0.0
        loss += 0.01 * training.seed  # of which the comparison of two runs of one seed sees nothing
        return asdict(training) | {"val_loss": loss, "cpu_seconds_a_step": 1.0}

    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(workers))
    monkeypatch.setattr(benchmark, "train", pretend)
    monkeypatch.setattr(benchmark, "setting", lambda config: {})
    benchmark.main(["--out", "results.jsonl"])
    best = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {name: (run["max_lr"], run["muon_lr"]) for name, run in best.items()} == {
        "AdamW, recipe": (6e-4, 0.0),
        "AdamW, cosine": (4.8e-3, 0.0),
        "AdamW, linear": (6e-4, 0.0),
        "Muon": (3e-3, 0.08),
    }
    for name in benchmark.METHODS:  # a tenth of a nat for each doubling of the tokens
        excess = best[name]["val_loss"][str(2**22)] - best["Muon"]["val_loss"][str(2**22)]
        assert best[name]["seeds"] == pytest.approx([2 ** (10 * excess)] * 3)
        assert best[name]["factor"][str(2**22)] == best[name]["seeds"][0]
    assert best["AdamW, recipe"]["factor"][str(2**22)] is None  # beyond Muon's curve
    assert len(trained) == len(set(trained))
    unswept = {(r.method, r.change, r.tokens / 2**21, r.seed) for r in trained if r.tokens != 2**21 or r.seed}
    changes = {*benchmark.CHANGED_SETTINGS, *benchmark.BEFORE_EACH_STEP}
    longer = {(method, "", multiple, seed) for method in benchmark.METHODS for multiple, seed in LONGER_RUNS}
    again = {("Muon", change, 1, 1) for method, change in changes | {("Muon", "")} if method == "Muon"}
    assert unswept == longer | again | {("Muon", "", 0.5, 0), ("Muon", "", 0.25, 0)}
    assert {(r.method, r.change) for r in trained if r.change and not r.seed} == changes
    trained.clear()
    lines = Path("results.jsonl").read_text().splitlines()
    Path("results.jsonl").write_text("".join(line + "\n" for line in lines[:-1]))
    benchmark.main(["--out", "results.jsonl"])
    assert [asdict(r).items() <= json.loads(lines[-1]).items() for r in trained] == [True]
    monkeypatch.setattr(benchmark, "setting", lambda config: {"n_layer": config.n_layer})
    with pytest.raises(DataError, match=r"--out results\.jsonl holds results of other sizes"):
        benchmark.main(["--out", "results.jsonl"])
    Path("results.jsonl").write_text(lines[0][:20])
    with pytest.raises(DataError, match=r"--out results\.jsonl has a line that was cut off"):
        benchmark.main(["--out", "results.jsonl"])


def test_results_of_other_data_or_another_type_are_not_mixed(make_shards, monkeypatch):
    config = benchmark.BenchmarkConfig(data_dir=str(make_shards()), tokens=32, batch=8, block_size=8)
    before = benchmark.setting(config)
    assert benchmark.setting(replace(config, tokens=64)) == before
    monkeypatch.setattr(benchmark, "auto_dtype", lambda device: "float16")
    assert benchmark.setting(config) != before
    other = make_shards(shard_size=2000, name="other")
    assert benchmark.setting(replace(config, data_dir=str(other)))["shards"] != before["shards"]
    with pytest.raises(UsageError, match="too few train tokens"):
        benchmark.setting(replace(config, tokens=10**6))


def test_the_distance_between_curves_is_interpolated_in_the_logarithm():
    falling = {2**20: 5.0, 2**22: 4.0}
    assert benchmark.tokens_to_reach(4.5, falling) == pytest.approx(2**21)
    assert math.isnan(benchmark.tokens_to_reach(3.9, falling)) and math.isnan(benchmark.tokens_to_reach(5.1, falling))


def test_a_run_of_the_benchmark_of_recipes_learns_with_every_change(make_shards):
    config = benchmark.BenchmarkConfig(
        **{"data_dir": str(make_shards()), "vocabulary": 16, "n_layer": 1, "n_embd": 64, "block_size": 32, "batch": 64}
    )
    changes = [("Muon", ""), ("AdamW, linear", ""), *benchmark.CHANGED_SETTINGS, *benchmark.BEFORE_EACH_STEP]
    runs = [benchmark.Run(method, 1e-2, 1280, 0.02, change=change) for method, change in changes]
    results = [benchmark.train(config, training) for training in runs]
    assert len({str(result["losses"]) for result in results}) == len(changes)
    assert all(result["val_loss"] < math.log(16) - 0.1 for result in results)
