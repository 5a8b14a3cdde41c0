"""The loop computes what it says: the same batches, losses and updates however the work is divided or interrupted."""

import functools
import gc
import json
import math
import platform
import resource
import shutil
import sysconfig
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch.nn.attention import SDPBackend

import fineweb
import plot
import sample
import tokenizer
import train_gpt2
from common import DataError, UsageError
from model import GPT, PRESETS, GPTConfig
from train_gpt2 import Batches, TrainConfig, World, batch_tokens, learning_rate, share, train

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)


@pytest.fixture(autouse=True)
def small_preset(monkeypatch):
    """The debug model, smaller."""
    monkeypatch.setitem(PRESETS, "debug", GPTConfig(block_size=32, n_layer=2, n_head=2, n_embd=16))


@pytest.fixture
def config(make_shards):
    """Settings of a run of seconds."""
    return TrainConfig(
        model="debug",
        data_dir=str(make_shards(tokens=3000, shard_size=500)),
        device="cpu",
        dtype="float32",
        batch_size=2,
        block_size=16,
        total_batch_size=128,
        max_steps=8,
        warmup_steps=2,
        max_lr=1e-2,
        eval_every=4,
        sample_every=0,
        save_every=4,
        keep=10,
    )


def records(directory, key):
    return {record["step"]: record[key] for record in plot.read_log(directory / "log.jsonl") if key in record}


def weights(directory):
    return GPT.from_pretrained(directory).state_dict()


def same(first, second):
    return all(torch.equal(weight, second[name]) for name, weight in first.items())


def stream(*lengths):
    tokens = np.arange(sum(lengths)).astype(np.uint16)
    return np.split(tokens, np.cumsum(lengths)[:-1])


# ---- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(1000,), (1, 1, 7, 500, 491), (333, 333, 334), tuple([10] * 100)])
def test_an_epoch_is_the_stream_in_order_across_shards(lengths):
    batches, position, seen = Batches(stream(*lengths), block_size=8, seed=0, shuffle=False), 0, []
    for _ in range(999 // 32):
        rows, position = batches.at(position, 32)
        assert rows.shape == (4, 9)
        assert torch.equal(rows[:, 1:], rows[:, :-1] + 1)  # the labels are the next tokens
        seen += rows[:, :-1].flatten().tolist()
    assert seen == list(range(len(seen))) and position == len(seen)
    assert 999 - len(seen) < 32


@pytest.mark.parametrize("shuffle", [False, True])
def test_every_epoch_visits_each_row_once_and_later_ones_in_other_orders(shuffle):
    batches, position, epochs = Batches(stream(100, 157), block_size=8, seed=3, shuffle=shuffle), 0, []
    for epoch in range(3):
        starts = []
        while position < (epoch + 1) * 256:
            rows, position = batches.at(position, 64)
            starts += rows[:, 0].tolist()
        epochs.append(starts)
    ordered = list(range(0, 256, 8))
    assert all(sorted(starts) == ordered for starts in epochs)
    assert (epochs[0] == ordered) != shuffle
    assert epochs[1] != ordered and epochs[1] != epochs[2] and epochs[0] != epochs[2]


def test_the_last_partial_batch_of_an_epoch_is_passed_over():
    batches = Batches(stream(257), block_size=8, seed=0, shuffle=False)  # 32 rows
    rows, position = batches.at(30 * 8, 32)  # 2 rows are left, 4 are wanted
    assert position == 32 * 8 + 32
    expected, _ = batches.at(32 * 8, 32)
    assert torch.equal(rows, expected)


def test_a_position_alone_determines_the_batch():
    first = Batches(stream(300, 300), block_size=8, seed=5, shuffle=True)
    for position in (0, 64, 512, 640, 64, 0):
        again = Batches(stream(300, 300), block_size=8, seed=5, shuffle=True)
        assert torch.equal(first.at(position, 64)[0], again.at(position, 64)[0])
    assert not torch.equal(first.at(0, 64)[0], Batches(stream(300, 300), 8, seed=6, shuffle=True).at(0, 64)[0])


@pytest.mark.parametrize(("processes", "batch_size"), [(1, 1), (1, 24), (2, 3), (3, 4), (4, 6), (8, 1)])
def test_the_tokens_of_a_step_do_not_depend_on_processes_or_micro_batch(processes, batch_size):
    rows = torch.arange(24 * 9).view(24, 9)
    shares = [share(rows, batch_size, World(rank, processes, CPU)) for rank in range(processes)]
    assert {part.shape for part in shares} == {(24 // batch_size // processes, batch_size, 9)}
    together = torch.stack(shares, dim=1).reshape(24, 9)  # step by step, rank by rank
    assert torch.equal(together, rows)


# ---- schedules and optimizer -----------------------------------------------------------------------------------------


def test_the_learning_rate_at_the_corners_of_its_schedule():
    config = TrainConfig(max_lr=6e-4, min_lr=6e-5, warmup_steps=715, max_steps=19_073)
    assert learning_rate(config, 0) == pytest.approx(6e-4 / 715)
    assert learning_rate(config, 714) == pytest.approx(6e-4)
    assert learning_rate(config, 715) == pytest.approx(6e-4)
    assert learning_rate(config, (715 + 19_073) // 2) == pytest.approx((6e-4 + 6e-5) / 2)
    assert learning_rate(config, 19_073) == pytest.approx(6e-5)
    assert learning_rate(config, 30_000) == pytest.approx(6e-5)
    rates = [learning_rate(config, step) for step in range(715, 19_073)]
    assert rates == sorted(rates, reverse=True)
    assert learning_rate(replace(config, warmup_steps=0, max_steps=1), 0) == pytest.approx(6e-4)


def test_the_batch_grows_linearly_in_whole_units_to_its_full_size():
    config = TrainConfig(initial_batch_size=32, total_batch_size=512, batch_ramp_tokens=4800)
    sizes = [batch_tokens(config, position) for position in range(0, 6000, 10)]
    assert sizes[0] == 32 and sizes == sorted(sizes) and set(sizes) == set(range(32, 513, 32))
    assert batch_tokens(config, 4799) == 480 and batch_tokens(config, 4800) == 512
    for position in range(0, 4800, 10):
        linear = 32 + (512 - 32) * position / 4800
        assert linear - 32 < batch_tokens(config, position) <= linear
    assert batch_tokens(TrainConfig(initial_batch_size=512, total_batch_size=512), 0) == 512


def test_matrices_decay_and_biases_and_norms_do_not():
    gpt = GPT(PRESETS["debug"])
    decay = {}
    for group in train_gpt2.make_optimizer(gpt, TrainConfig(max_lr=1e-3)).param_groups:
        decay.update({id(parameter): group["weight_decay"] for parameter in group["params"]})
    assert len(decay) == len(list(gpt.parameters()))
    for name, parameter in gpt.named_parameters():
        matrix = name.endswith("weight") and "ln_" not in name
        assert decay[id(parameter)] == (0.1 if matrix else 0.0), name


def gradients_of(config, rows):
    """The gradients that one optimizer step on these rows works with, and the loss and norm that it reports."""
    torch.manual_seed(0)
    trainer = train_gpt2.make_trainer(config, ALONE, GPT(PRESETS["debug"]))
    caught = []
    trainer.optimizer.step = lambda: caught.extend(p.grad.clone() for p in trainer.gpt.parameters())
    loss, norm = train_gpt2.training_step(trainer, rows)
    return caught, float(loss), float(norm)


def test_gradients_of_four_micro_batches_equal_those_of_one(config):
    rows = torch.randint(50257, (8, 17), generator=torch.Generator().manual_seed(0))
    config = replace(train_gpt2.resolve(config, CPU), grad_clip=1e9)
    four, four_loss, four_norm = gradients_of(replace(config, batch_size=2), rows)
    one, one_loss, one_norm = gradients_of(replace(config, batch_size=8), rows)
    assert four_loss == pytest.approx(one_loss, abs=1e-5) and four_norm == pytest.approx(one_norm, rel=1e-4)
    for first, second in zip(four, one, strict=True):
        assert torch.allclose(first, second, rtol=1e-3, atol=1e-6)


def test_gradients_are_reduced_once_a_step_with_the_last_micro_batch(config):
    trainer = train_gpt2.make_trainer(train_gpt2.resolve(config, CPU), ALONE, GPT(PRESETS["debug"]))
    reduced = []
    trainer.gpt.register_forward_pre_hook(lambda *_: reduced.append(trainer.model.require_backward_grad_sync))
    train_gpt2.training_step(trainer, torch.zeros(8, 17, dtype=torch.long))
    assert reduced == [False, False, False, True]  # what DistributedDataParallel reads as its forward pass begins


def test_gradients_are_clipped_to_the_norm_and_the_norm_before_is_reported(config):
    rows = torch.randint(50257, (8, 17), generator=torch.Generator().manual_seed(0))
    config = train_gpt2.resolve(config, CPU)
    free, _, norm = gradients_of(replace(config, grad_clip=1e9), rows)
    clipped, _, reported = gradients_of(replace(config, grad_clip=norm / 10), rows)
    assert reported == pytest.approx(norm, rel=1e-5)
    assert math.sqrt(sum(g.square().sum().item() for g in clipped)) == pytest.approx(norm / 10, rel=1e-3)
    for before, after in zip(free, clipped, strict=True):
        assert torch.allclose(before / 10, after, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_skipped_and_counted(config, dtype, value):
    config = replace(train_gpt2.resolve(config, CPU), dtype=dtype)
    trainer = train_gpt2.make_trainer(config, ALONE, GPT(PRESETS["debug"]))
    rows = torch.randint(50257, (8, 17), generator=torch.Generator().manual_seed(0))

    def state():
        return {k: v.clone() for k, v in (trainer.gpt.state_dict() | train_gpt2.state_tensors(trainer)).items()}

    while trainer.scaler.is_enabled() and not trainer.optimizer.state:  # the scale that fp16 begins with is too large
        train_gpt2.training_step(trainer, rows)
        if trainer.skipped[1]:
            trainer.optimizer.state.clear()
    train_gpt2.training_step(trainer, rows)
    before, (skipped, _, most) = state(), trainer.skipped.tolist()
    hook = trainer.gpt.transformer.ln_f.bias.register_hook(lambda gradient: gradient * value)
    for times in (1, 2):
        _, norm = train_gpt2.training_step(trainer, rows)
        assert not norm.isfinite() and same(before, state())
        assert trainer.skipped.tolist()[:2] == [skipped + times, times]
    hook.remove()
    train_gpt2.training_step(trainer, rows)
    assert trainer.skipped.tolist() == [skipped + 2, 0, max(2, most)] and not same(before, state())


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_learns_and_leaves_a_checkpoint_a_log_and_a_picture(config, tmp_path, capsys):
    train(replace(config, max_steps=24, eval_every=8, sample_every=24))
    losses, val = records(tmp_path / "log", "loss"), records(tmp_path / "log", "val_loss")
    assert list(losses) == list(range(1, 25)) and list(val) == [0, 8, 16, 24]
    assert abs(losses[1] - math.log(50304)) < 0.2 and losses[24] < losses[1] - 2 and val[24] < val[8] < val[0]
    assert (tmp_path / "log" / "loss.png").read_bytes().startswith(b"\x89PNG")
    names = {path.name for path in (tmp_path / "log" / "step_000024").iterdir()}
    assert names == {
        *("config.json", "model.safetensors", "vocab.json", "merges.txt", "tokenizer_config.json", "README.md"),
        *("optimizer.safetensors", "trainer.json", "MANIFEST.json"),
    }
    printed = capsys.readouterr().out
    decayed = sum(w.numel() for w in GPT(GPTConfig(16, n_layer=2, n_head=2, n_embd=16)).parameters() if w.dim() > 1)
    for words in (
        "cpu",
        "float32",
        "4 accumulation steps",
        f"{decayed:,}",
        "10.8258",
        "--model",
        "n/a",
        "Hello, I'm a",
    ):
        assert words in printed, words


@pytest.mark.parametrize("shuffle", [False, True])
def test_n_plus_n_steps_equal_2n_bit_for_bit(config, tmp_path, shuffle):
    """Across the end of an epoch (19 batches), inside the ramp, and in any order of the rows."""
    config = replace(config, initial_batch_size=64, batch_ramp_tokens=1500, max_steps=32, save_every=8, shuffle=shuffle)
    train(config)
    for begun in (8, 24):
        shutil.copytree(tmp_path / "log", tmp_path / f"log{begun}")
        for step, directory in train_gpt2.checkpoints(tmp_path / f"log{begun}").items():
            if step > begun:
                shutil.rmtree(directory)
        train(replace(config, out_dir=f"log{begun}", resume=True))
        logs = [plot.read_log(tmp_path / log / "log.jsonl") for log in ("log", f"log{begun}")]
        starts = [[record["step"] for record in log if "launch" in record] for log in logs]
        assert starts == [[0], [0, begun]]
        first, second = ([record for record in log if "launch" not in record] for log in logs)
        for key in ("step", "loss", "val_loss", "norm", "lr", "position", "batch"):
            assert [record.get(key) for record in first] == [record.get(key) for record in second], key
        for name in ("optimizer.safetensors", "model.safetensors"):
            first, second = (tmp_path / log / "step_000032" / name for log in ("log", f"log{begun}"))
            assert first.read_bytes() == second.read_bytes()


def test_the_schedule_may_be_prolonged_where_the_steps_done_stay_as_they_were(config, tmp_path):
    constant = replace(config, min_lr=1e-2, warmup_steps=0)
    train(constant)
    train(replace(constant, max_steps=12, resume=True))
    train(replace(constant, max_steps=12, out_dir="whole"))
    assert same(weights(tmp_path / "log" / "step_000012"), weights(tmp_path / "whole" / "step_000012"))
    train(replace(config, out_dir="cosine"))
    with pytest.raises(UsageError, match="--max_steps"):
        train(replace(config, out_dir="cosine", max_steps=12, resume=True))


def test_fp16_trains_with_a_scaler_and_resumes_bit_for_bit(config, tmp_path, monkeypatch):
    quickly_growing = functools.partial(torch.amp.GradScaler, growth_interval=3)  # so that its state matters
    monkeypatch.setattr(torch.amp, "GradScaler", quickly_growing)
    config = replace(config, dtype="float16")
    train(config)
    shutil.copytree(tmp_path / "log", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "step_000008")
    train(replace(config, out_dir="again", resume=True))
    assert records(tmp_path / "log", "loss") == records(tmp_path / "again", "loss")
    states = [json.loads((tmp_path / log / "step_000008" / "trainer.json").read_text()) for log in ("log", "again")]
    assert states[0]["scaler"] == states[1]["scaler"] and states[0]["scaler"]["scale"] != 65536
    assert same(weights(tmp_path / "log" / "step_000008"), weights(tmp_path / "again" / "step_000008"))


def test_resuming_nothing_starts_and_a_finished_run_is_left_alone(config, tmp_path, capsys):
    train(replace(config, resume=True))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "log").rglob("*")}
    train(replace(config, resume=True))
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "log").rglob("*")}
    assert "finished" in capsys.readouterr().out


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "trainer.json", "MANIFEST.json"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_taken(config, tmp_path, capsys, file):
    train(config)
    expected = weights(tmp_path / "log" / "step_000008")
    path = tmp_path / "log" / "step_000008" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    train(replace(config, resume=True))
    printed = capsys.readouterr().out
    assert "passing over the checkpoint log/step_000008" in printed and "resuming from log/step_000004" in printed
    assert (
        same(expected, weights(tmp_path / "log" / "step_000008")) and list(records(tmp_path / "log", "loss"))[-1] == 8
    )
    for directory in train_gpt2.checkpoints(tmp_path / "log").values():
        (directory / file).unlink()
    for _ in range(2):
        with pytest.raises(DataError, match="whole"):
            train(replace(config, resume=True))


def test_only_the_newest_checkpoints_are_kept(config, tmp_path):
    train(replace(config, save_every=2, keep=2))
    assert sorted(path.name for path in (tmp_path / "log").glob("step_*")) == ["step_000006", "step_000008"]
    assert not list((tmp_path / "log").glob(".*"))


def test_a_damaged_newer_checkpoint_never_costs_a_good_one(config, tmp_path):
    train(replace(config, save_every=2))
    for step in (4, 6, 8):
        (tmp_path / "log" / f"step_{step:06d}" / "model.safetensors").write_bytes(b"")
    train(replace(config, save_every=5, keep=2, resume=True))
    assert list(train_gpt2.checkpoints(tmp_path / "log")) == [8, 5]
    assert all(train_gpt2.damage(path) is None for path in train_gpt2.checkpoints(tmp_path / "log").values())


def test_milestones_are_kept_for_ever(config, tmp_path):
    train(replace(config, save_every=2, keep=1, milestone_every=3))
    assert list(train_gpt2.checkpoints(tmp_path / "log")) == [8, 6, 3]


def test_copies_of_checkpoints_and_other_files_are_left_alone(config, tmp_path):
    train(replace(config, save_every=2, keep=1))
    others = ["step_000008.bak", "step_000008_2", "step_8"]
    for name in others:
        shutil.copytree(tmp_path / "log" / "step_000008", tmp_path / "log" / name)
    (tmp_path / "log" / "step_000010").write_text("a file")
    (tmp_path / "log" / "step_000008" / "MANIFEST.json").unlink()
    (tmp_path / "log" / "step_000008").rename(tmp_path / "log" / "step_000006")
    shutil.copytree(tmp_path / "log" / "step_8", tmp_path / "log" / "step_000004")
    train(replace(config, resume=True))
    assert all((tmp_path / "log" / name).exists() for name in [*others, "step_000010"])


def test_a_disk_that_fills_while_saving_leaves_the_last_checkpoint_and_no_remains(config, tmp_path):
    config = replace(config, min_lr=1e-2, warmup_steps=0)
    train(replace(config, max_steps=4))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, before[1]))  # optimizer.safetensors is larger
    try:
        with pytest.raises(DataError, match="step 8 could not be saved.*optimizer.safetensors.*--resume"):
            train(replace(config, resume=True))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "log").glob(".*"))
    train(replace(config, resume=True))
    assert list(train_gpt2.checkpoints(tmp_path / "log")) == [8, 4]


def test_a_disk_that_fills_for_a_while_does_not_stop_training(config, tmp_path, monkeypatch, capsys):
    save_tensors, attempts = train_gpt2.save_tensors, []

    def fail_once(path, tensors):
        attempts.append(path)
        if len(attempts) == 2:
            path.write_bytes(b"some")
            raise OSError("No space left on device")
        save_tensors(path, tensors)

    monkeypatch.setattr(train_gpt2, "save_tensors", fail_once)
    train(replace(config, save_every=2))
    assert "warning: step 4 could not be saved: No space left" in capsys.readouterr().out
    assert list(train_gpt2.checkpoints(tmp_path / "log")) == [8, 6, 2] and not list((tmp_path / "log").glob(".*"))


def test_a_loss_that_is_not_finite_is_null_in_the_log(tmp_path):
    plot.Log(tmp_path, plot.Tracker("none", "", {}, 0), {"step": 0}, True).write(
        "", step=1, loss=math.nan, norm=math.inf, lr=0.1
    )
    assert plot.read_log(tmp_path / "log.jsonl") == [{"step": 0}, {"step": 1, "loss": None, "norm": None, "lr": 0.1}]
    plot.draw(tmp_path)


def test_the_validation_loss_does_not_depend_on_the_micro_batch(config):
    config = train_gpt2.resolve(config, CPU)
    val = np.load(f"{config.data_dir}/edufineweb_val_000000.npy")
    torch.manual_seed(0)
    gpt = GPT(PRESETS["debug"])
    for limit in (160, 10**6):
        count = min(limit, len(val) - 1) // 16
        rows = torch.from_numpy(val[: count * 16 + 1].astype(np.int64))
        _, expected = gpt(rows[:-1].view(-1, 16), rows[1:].view(-1, 16))
        for batch_size in (1, 3, 7, 64):
            trainer = train_gpt2.make_trainer(replace(config, batch_size=batch_size, val_tokens=limit), ALONE, gpt)
            assert train_gpt2.validation_loss(trainer, val) == pytest.approx(expected.item(), abs=1e-5)


def losses_of_a_plain_loop(config):
    """What `train` logs, by the definition: whole logits in fp32, AdamW without fusing, nothing compiled."""
    config = train_gpt2.resolve(config, CPU)
    shards = train_gpt2.open_shards(config, ALONE)
    batches = Batches(shards.train, config.block_size, config.seed, config.shuffle)
    torch.manual_seed(config.seed)
    gpt, position, losses = GPT(replace(PRESETS["debug"], block_size=config.block_size)), 0, {}
    groups = train_gpt2.make_optimizer(gpt, config).param_groups
    groups = [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in groups]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), foreach=False)
    for step in range(config.max_steps):
        rows, position = batches.at(position, config.total_batch_size)
        logits = gpt.lm_head(gpt.hidden(rows[:, :-1]))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), config.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.step()
        optimizer.zero_grad()
        losses[step + 1] = loss.item()
    return losses


@pytest.mark.parametrize(
    ("speed_ups", "tolerance"),
    [
        ({"dtype": "float32"}, 1e-4),
        ({"dtype": "float32", "compile": True}, 1e-4),
        ({"dtype": "bfloat16"}, 0.02),
        ({"dtype": "bfloat16", "compile": True}, 0.02),
    ],
)
def test_30_steps_with_the_speed_ups_have_the_losses_of_a_plain_loop(config, tmp_path, speed_ups, tolerance):
    compiler, headers = shutil.which("g++") or shutil.which("clang++"), Path(sysconfig.get_path("include"), "Python.h")
    if "compile" in speed_ups and not (compiler and headers.exists()):
        pytest.skip("on a CPU, torch.compile needs a C++ compiler and Python's headers")
    config = replace(config, max_steps=30, eval_every=30)
    plain = losses_of_a_plain_loop(config)
    train(replace(config, **speed_ups))
    fast = records(tmp_path / "log", "loss")
    assert plain[30] < plain[1] - 2 and fast.keys() == plain.keys()
    assert max(abs(fast[step] - plain[step]) for step in plain) < tolerance


def test_a_gpus_attention_is_the_leaders_fastest(config, monkeypatch, capsys):
    gpt = GPT(PRESETS["debug"])
    trainer = train_gpt2.make_trainer(train_gpt2.resolve(config, CPU), ALONE, gpt)
    able = {kernel: train_gpt2.attention_seconds(trainer, kernel) < math.inf for kernel in train_gpt2.ATTENTION_KERNELS}
    assert able == {"FLASH_ATTENTION": True, "CUDNN_ATTENTION": False, "EFFICIENT_ATTENTION": False, "MATH": True}
    x = torch.randint(50257, (2, 8))
    trainer.world = World(0, 1, torch.device("cuda"))  # for the choice alone, which needs no GPU
    seconds = {"FLASH_ATTENTION": 3.0, "CUDNN_ATTENTION": math.inf, "EFFICIENT_ATTENTION": 2.0, "MATH": 1.0}
    monkeypatch.setattr(train_gpt2, "attention_seconds", lambda _, kernel: seconds[kernel])
    with train_gpt2.fastest_attention(trainer):
        assert trainer.attention == "MATH" and gpt(x)[0].shape == (2, 8, 50304)
        assert torch._C._get_sdp_priority_order()[0] == SDPBackend.MATH.value
    others = World(1, 2, torch.device("cuda"))
    monkeypatch.setattr(World, "sum", lambda world, values: values + 2)  # the leader's choice
    trainer.world, trainer.attention = others, None
    with train_gpt2.fastest_attention(trainer):
        assert trainer.attention == "EFFICIENT_ATTENTION"


def test_a_resumed_run_keeps_the_attention_kernel_it_began_with(config, monkeypatch):
    make = train_gpt2.make_trainer
    seen = []

    def with_a_choice(*given):
        seen.append(make(*given))
        if len(seen) == 1:
            seen[0].attention = "MATH"
        return seen[-1]

    monkeypatch.setattr(train_gpt2, "make_trainer", with_a_choice)
    train(replace(config, max_steps=4))
    train(replace(config, max_steps=4, resume=True))
    assert len(seen) == 2 and seen[1].attention == "MATH"


def test_no_garbage_is_collected_within_a_step_and_all_is_at_an_evaluation(config, monkeypatch):
    step, enabled, collected = train_gpt2.training_step, [], []
    monkeypatch.setattr(train_gpt2, "training_step", lambda *given: (enabled.append(gc.isenabled()), step(*given))[1])
    monkeypatch.setattr(train_gpt2.gc, "collect", lambda: collected.append(len(enabled)))
    train(config)
    assert enabled == [False] * 8 and {0, 4, 8} <= {*collected} and gc.isenabled()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such settings")
def test_the_memory_of_a_step_on_a_cpu_is_kept_for_the_next(config):
    config = train_gpt2.resolve(replace(config, batch_size=16, total_batch_size=512), CPU)
    trainer = train_gpt2.make_trainer(config, ALONE, GPT(PRESETS["debug"]))
    rows, faults = torch.randint(50257, (16, 33)), [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
    for _ in range(8):
        train_gpt2.training_step(trainer, rows)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    assert min(np.diff(faults)) < 20  # with huge pages too, the logits alone would have more


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("backend raised:\nOutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_running_out_of_memory_names_the_flag_in_one_line(monkeypatch, error):
    def run_out(_):
        raise error

    monkeypatch.setattr(train_gpt2, "train", run_out)
    with pytest.raises(MemoryError, match="--batch_size .*(out of memory|ALLOC_FAILED|allocate)") as raised:
        train_gpt2.main([])
    assert "\n" not in str(raised.value)


def test_a_checkpoint_loads_in_transformers_and_says_the_same(config, tmp_path):
    train(replace(config, block_size=32))
    directory, prompt = tmp_path / "log" / "step_000008", "he was on the"
    theirs, gpt = transformers.AutoModelForCausalLM.from_pretrained(directory), GPT.from_pretrained(directory)
    ids = transformers.AutoTokenizer.from_pretrained(directory)(prompt, return_tensors="pt")["input_ids"]
    assert ids.tolist() == [tokenizer.encode(prompt)]
    with torch.no_grad():
        assert (theirs(ids).logits - gpt(ids)[0]).abs().max() < 1e-4
    settings = sample.SampleConfig(checkpoint=str(directory), temperature=0, max_new_tokens=20)
    write = transformers.pipeline("text-generation", model=str(directory))
    written = write(prompt, max_new_tokens=20, do_sample=False)[0]["generated_text"]
    assert written == prompt + "".join(sample.continuation(gpt, settings, prompt))
    assert json.loads((directory / "config.json").read_text())["n_ctx"] == 32  # for llama.cpp's converter


def test_a_model_card_tells_how_the_model_was_made_and_how_good_it_is(config, tmp_path):
    train(replace(config, total_batch_size=1024))  # of which two make an epoch, and the rest of it is passed over
    card = (tmp_path / "log" / "step_000008" / "README.md").read_text()
    _, head, body = card.split("---\n", 2)
    loss, val = (records(tmp_path / "log", key)[8] for key in ("loss", "val_loss"))
    assert "library_name: transformers" in head and f"| validation loss | 8 | {val:.4f} |" in body
    assert f"| training loss | 8 | {loss:.4f} |" in body and "8,192 tokens" in body and "random weights" in body
    assert "source.jsonl" in body and "from transformers import pipeline" in body


# ---- fine-tuning -----------------------------------------------------------------------------------------------------


@pytest.fixture
def tuning(config):
    """Settings of a run that begins with another's weights."""
    return replace(config, model=None, init_from="log/step_000008", out_dir="tuned", max_lr=None, block_size=None)


def test_training_begins_with_the_weights_of_another_run_and_resumes_bit_for_bit(config, tuning, tmp_path, capsys):
    train(config)
    capsys.readouterr()
    train(tuning)
    val, loss = (records(tmp_path / "tuned", key) for key in ("val_loss", "loss"))
    assert val[0] == records(tmp_path / "log", "val_loss")[8] and val[8] < val[0]
    lr = [record["lr"] for record in plot.read_log(tmp_path / "tuned" / "log.jsonl") if "lr" in record]
    assert max(lr) == train_gpt2.RECIPES["debug"].max_lr / 10
    printed = capsys.readouterr().out
    assert "model log/step_000008 on" in printed and "expected first loss" not in printed
    assert "Begun with log/step_000008" in (tmp_path / "tuned" / "step_000008" / "README.md").read_text()
    expected = weights(tmp_path / "tuned" / "step_000008")
    shutil.rmtree(tmp_path / "tuned" / "step_000008")
    shutil.rmtree(tmp_path / "log")  # the source is no longer needed
    train(replace(tuning, resume=True))
    assert records(tmp_path / "tuned", "loss") == loss and same(weights(tmp_path / "tuned" / "step_000008"), expected)


def test_what_transformers_saved_is_padded_and_cropped_for_training(tuning, tmp_path):
    sizes = {"n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(tmp_path / "theirs")
    train(replace(tuning, init_from="theirs", block_size=16))
    made = GPT.from_pretrained(tmp_path / "tuned" / "step_000008").config
    assert made == GPTConfig(block_size=16, vocab_size=50304, n_layer=1, n_head=2, n_embd=16)


# ---- wrong input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"total_batch_size": 100}, "--total_batch_size 100 .*--batch_size 2 x --block_size 16 x 1"),
        ({"block_size": 64}, "--block_size 64 .* 32"),
        ({"batch_size": 0}, "--batch_size"),
        ({"grad_clip": math.nan}, "--grad_clip"),
        ({"max_lr": math.inf}, "--max_lr"),
        ({"seed": 2**64}, "--seed"),
        ({"beta2": 1.0}, "--beta2"),
        ({"min_lr": 1.0}, "--min_lr"),
        ({"initial_batch_size": 96, "batch_ramp_tokens": 100, "batch_size": 4}, "--initial_batch_size 96"),
        ({"initial_batch_size": 64}, "--batch_ramp_tokens"),
        ({"batch_ramp_tokens": 64}, "--initial_batch_size"),
        ({"total_batch_size": 32 * 1000}, "--total_batch_size"),
        ({"device": "gpu"}, "--device"),
        ({"compile_mode": "max-autotune-no-cudagraphs"}, "--compile_mode"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_flag_before_anything_is_written(config, tmp_path, change, says):
    with pytest.raises(UsageError, match=says):  # some as soon as they are given
        train(replace(config, **change))
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [({"block_size": 64}, "--block_size 64 .* 32"), ({"model": "debug"}, "--model debug"), ({}, "211")],
)
def test_a_model_that_cannot_be_trained_on_is_refused(tuning, tmp_path, change, says):
    GPT(GPTConfig(block_size=32, vocab_size=50304 if change else 211, n_layer=1, n_head=2, n_embd=16)).save_pretrained(
        "other"
    )
    with pytest.raises(UsageError, match=says):
        train(replace(tuning, init_from="other", **change))
    assert not (tmp_path / "tuned").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"total_batch_size": 64},
        {"max_lr": 2e-2},
        {"warmup_steps": 3},
        {"shuffle": True},
        {"block_size": 32},
    ],
)
def test_a_resumed_run_refuses_a_change_of_its_mathematics(config, change):
    train(replace(config, max_steps=4))
    with pytest.raises(UsageError, match=f"--{next(iter(change))} "):
        train(replace(config, max_steps=4, resume=True, **change))


def test_a_run_is_not_overwritten_without_resume_nor_resumed_on_other_shards(config, tmp_path, make_shards):
    train(config)
    with pytest.raises(UsageError, match="--resume"):
        train(config)
    other = make_shards(tokens=3000, shard_size=600, out="other")
    with pytest.raises(UsageError, match="--data_dir"):
        train(replace(config, data_dir=str(other), resume=True))


def test_missing_and_damaged_shards_are_named(config, tmp_path):
    with pytest.raises(DataError, match="nowhere.*fineweb.py"):
        train(replace(config, data_dir="nowhere"))
    shard = tmp_path / "shards" / "edufineweb_train_000002.npy"
    content = shard.read_bytes()

    def refused(new_content):
        shard.write_bytes(new_content)
        with pytest.raises(DataError, match="edufineweb_train_000002"):
            train(replace(config, resume=True))

    refused(b"")
    refused(content[:100])
    refused(content[:-10])
    np.savez(tmp_path / "zip.npz", np.zeros(3, dtype=np.uint16))
    refused((tmp_path / "zip.npz").read_bytes())
    tokens = np.load(tmp_path / "shards" / "edufineweb_train_000003.npy")
    for wrong in (tokens[:50], tokens.astype(np.int32), tokens.reshape(2, -1), tokens.sum()):
        np.save(shard, wrong)
        refused(shard.read_bytes())
    tokens[7] = 50257
    np.save(shard, tokens)
    refused(shard.read_bytes())
    shard.unlink()
    with pytest.raises(DataError, match="edufineweb_train_000002"):
        train(replace(config, resume=True))


def test_incomplete_shards_are_refused(config, tmp_path):
    manifest = fineweb.load_manifest(tmp_path / "shards")
    manifest["shards"][-1]["next"] = {"file": 0, "document": 1, "token": 1}
    fineweb.save_manifest(tmp_path / "shards", manifest | {"complete": False})
    with pytest.raises(DataError, match="not complete"):
        train(config)


def test_shards_without_a_manifest_can_be_trained_on(config, tmp_path):
    (tmp_path / "shards" / "manifest.json").unlink()
    train(config)
    assert len(records(tmp_path / "log", "loss")) == 8
    (tmp_path / "shards" / "edufineweb_train_000001.npy").unlink()
    with pytest.raises(DataError, match="edufineweb_train_000001"):
        train(replace(config, out_dir="other"))
