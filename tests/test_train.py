"""The loop computes what it says: the same batches, losses and updates however the work is divided."""

import contextlib
import copy
import functools
import json
import math
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, records, tiny_config
from safetensors.torch import load_file

import fineweb
import hellaswag
import plot
import sample
import train_gpt2
from common import reference, tokenizer
from common.batches import Batch, Batches
from common.huggingface import load_gpt, save_gpt
from common.processes import World
from common.script import DataError, UsageError
from common.shards import load_manifest, open_shards, save_manifest
from model import GPT, MLP, PRESETS, GPTConfig
from recipes import (
    RECIPES,
    TrainConfig,
    batch_tokens,
    default_data_dir,
    fill_defaults,
    learning_rate,
    parse_config,
)
from train_gpt2 import train

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
SIZES = GPTConfig(block_size=16, n_layer=2, n_head=2, n_embd=16)
ROWS = torch.randint(50257, (8, 17), generator=torch.Generator().manual_seed(0))  # a batch of 128 tokens
DRAW = plot.draw

pytestmark = pytest.mark.usefixtures("small_debug")

COMPILES = shutil.which("g++") and Path(sysconfig.get_path("include"), "Python.h").exists()
needs_compiler = pytest.mark.skipif(not COMPILES, reason="on a CPU, torch.compile needs g++ and Python's headers")


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """Drawing would take longer than these runs."""
    monkeypatch.setattr(plot, "draw", lambda directory: None)


@pytest.fixture
def shards(make_shards):
    """2,500 train tokens in five shards, and 500 to validate on."""
    return make_shards(tokens=3000, shard_size=500)


def new_trainer(**changes):
    """A trainer as at the start of a run."""
    torch.manual_seed(0)
    config = fill_defaults(tiny_config(**changes), CPU, SIZES)
    return train_gpt2.make_trainer(config, ALONE, GPT(SIZES))


def training_step(trainer, rows):
    """The trainer's own, on rows (N, T + 1) of a process that is alone."""
    return train_gpt2.training_step(trainer, rows.unflatten(0, (-1, trainer.config.batch_size)))


def bits_of(directory):
    """The weights in a checkpoint, as they are on the disk."""
    return (Path(directory) / "model.safetensors").read_bytes()


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
    gpt = GPT(SIZES)
    decay = {}
    for group in train_gpt2.make_optimizer(gpt, TrainConfig(max_lr=1e-3), ALONE).param_groups:
        decay.update({id(parameter): group["weight_decay"] for parameter in group["params"]})
    for name, parameter in gpt.named_parameters():
        matrix = name.endswith("weight") and "ln_" not in name
        assert decay[id(parameter)] == (0.1 if matrix else 0.0), name


def sgd(gpt, config, world):
    """Momentum that no scaler knows of."""
    return torch.optim.SGD(gpt.parameters(), lr=config.max_lr, momentum=0.9)


def two_rates(gpt, config, world):
    """A base learning rate for the embeddings, and a tenth of it for the rest."""
    embeddings = list(gpt.transformer.wte.parameters()) + list(gpt.transformer.wpe.parameters())
    rest = list(gpt.transformer.h.parameters()) + list(gpt.transformer.ln_f.parameters())
    groups = [{"params": embeddings, "lr": config.max_lr}, {"params": rest, "lr": config.max_lr / 10}]
    return torch.optim.SGD(groups, momentum=0.9)


def test_the_schedule_scales_each_groups_own_learning_rate(monkeypatch):
    monkeypatch.setattr(train_gpt2, "make_optimizer", two_rates)
    trainer = new_trainer(max_steps=6, warmup_steps=2)
    for step in range(6):
        training_step(trainer, ROWS)
        first, second = [group["lr"] for group in trainer.state.optimizer.param_groups]
        assert first == pytest.approx(learning_rate(trainer.config, step), rel=1e-12)
        assert second == pytest.approx(first / 10, rel=1e-12)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize("change", [lambda parameters: parameters[1:], lambda parameters: parameters + parameters[:1]])
def test_an_optimizer_that_leaves_a_parameter_out_or_has_it_twice_is_refused(monkeypatch, change):
    def incomplete(gpt, config, world):
        return torch.optim.SGD(change(list(gpt.parameters())), lr=config.max_lr)

    monkeypatch.setattr(train_gpt2, "make_optimizer", incomplete)
    with pytest.raises(AssertionError, match="exactly one group"):
        new_trainer()


# ---- the training step -----------------------------------------------------------------------------------------------


def step_gradients(rows, **changes):
    """The gradients that one optimizer step on these rows works with, and the loss and norm that it reports."""
    trainer = new_trainer(**changes)
    gradients = []
    trainer.state.optimizer.step = lambda: gradients.extend(p.grad.clone() for p in trainer.state.gpt.parameters())
    loss, norm = training_step(trainer, rows)
    return gradients, loss, norm


def test_gradients_of_four_micro_batches_equal_those_of_one():
    four, four_loss, four_norm = step_gradients(ROWS, batch_size=2, grad_clip=0.0)
    one, one_loss, one_norm = step_gradients(ROWS, batch_size=8, grad_clip=0.0)
    assert four_loss == pytest.approx(one_loss, abs=1e-5) and four_norm == pytest.approx(one_norm, rel=1e-4)
    for first, second in zip(four, one, strict=True):
        assert torch.allclose(first, second, rtol=1e-3, atol=1e-6)


def test_gradients_are_reduced_once_a_step_with_the_last_micro_batch():
    trainer = new_trainer()
    reduced = []
    trainer.state.gpt.register_forward_pre_hook(lambda *_: reduced.append(trainer.model.require_backward_grad_sync))
    training_step(trainer, ROWS)
    assert reduced == [False, False, False, True]  # what DistributedDataParallel reads as its forward pass begins


def test_gradients_are_clipped_to_the_norm_and_the_norm_before_is_reported():
    free, _, norm = step_gradients(ROWS, grad_clip=0.0)
    clipped, _, reported = step_gradients(ROWS, grad_clip=norm / 10)
    assert reported == pytest.approx(norm, rel=1e-5)
    assert math.sqrt(sum(g.square().sum().item() for g in clipped)) == pytest.approx(norm / 10, rel=1e-3)
    for before, after in zip(free, clipped, strict=True):
        assert torch.allclose(before / 10, after, rtol=1e-3, atol=1e-8)


def kept_numbers(**changes):
    """How many numbers a forward pass keeps for the backward pass, weights aside."""
    trainer, kept = new_trainer(batch_size=8, **changes), {}
    weights = {weight.data_ptr() for weight in trainer.state.gpt.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        loss = trainer.model(ROWS[:, :-1], ROWS[:, 1:])
    assert loss.requires_grad
    return sum(tensor.numel() for address, tensor in kept.items() if address not in weights)


def test_recomputed_blocks_give_the_same_bits_and_keep_their_inputs_alone():
    plain, recomputing = (step_gradients(ROWS, activation_checkpointing=value) for value in (False, True))
    assert plain[1:] == recomputing[1:]
    assert all(torch.equal(first, second) for first, second in zip(plain[0], recomputing[0], strict=True))
    less = kept_numbers() - kept_numbers(activation_checkpointing=True)
    activations = 8 * 16 * SIZES.n_embd  # of one layer
    assert less >= SIZES.n_layer * 10 * activations


@pytest.fixture
def spoil(monkeypatch):
    """Make a step's loss or a gradient not finite while the list it returns holds a factor, nan or inf."""
    factors = []
    accumulate = train_gpt2.accumulate_gradients

    def accumulate_spoiled(trainer, micro_batches, of):
        loss = accumulate(trainer, micro_batches)
        for factor in factors:
            spoiled = loss if of == "loss" else trainer.state.gpt.transformer.ln_f.bias.grad
            spoiled *= factor
        return loss

    def start(of):
        monkeypatch.setattr(train_gpt2, "accumulate_gradients", functools.partial(accumulate_spoiled, of=of))
        return factors

    return start


@pytest.mark.parametrize(
    ("optimizer", "dtype"),
    [(train_gpt2.make_optimizer, "float32"), (train_gpt2.make_optimizer, "float16"), (sgd, "float32")],
)
@pytest.mark.parametrize("of", ["loss", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing_with_any_optimizer(monkeypatch, spoil, optimizer, dtype, of, value):
    monkeypatch.setattr(train_gpt2, "make_optimizer", optimizer)
    trainer, factors = new_trainer(dtype=dtype), spoil(of)
    state = trainer.state
    while not state.optimizer.state:  # the scale that fp16 begins with is too large
        training_step(trainer, ROWS)

    def snapshot():
        return copy.deepcopy([state.gpt.state_dict(), state.optimizer.state_dict()["state"]])

    before, skipped = snapshot(), state.skipped
    factors.append(value)
    for times in (1, 2):
        loss, norm = training_step(trainer, ROWS)
        assert not (math.isfinite(loss) and math.isfinite(norm))
        assert (state.skipped, state.skipped_in_a_row) == (skipped + times, times)
    torch.testing.assert_close(snapshot(), before, rtol=0, atol=0)
    factors.clear()
    training_step(trainer, ROWS)
    assert (state.skipped, state.skipped_in_a_row) == (skipped + 2, 0)
    assert not torch.equal(state.gpt.lm_head.weight, before[0]["lm_head.weight"])


def test_the_padding_of_the_vocabulary_stays_zero_in_weights_and_moments():
    trainer = new_trainer(weight_decay=0.1)
    for _ in range(4):
        training_step(trainer, ROWS)
    embedding = trainer.state.gpt.lm_head.weight
    moments = trainer.state.optimizer.state[embedding]
    assert len(embedding) == 50304 and embedding[:50257].any()
    for tensor in (embedding, moments["exp_avg"], moments["exp_avg_sq"]):
        assert not tensor[50257:].any()


# ---- attention -------------------------------------------------------------------------------------------------------


BACKENDS = ("flash_sdp_enabled", "mem_efficient_sdp_enabled", "math_sdp_enabled", "cudnn_sdp_enabled")


def enabled_backends():
    return tuple(name for name in BACKENDS if getattr(torch.backends.cuda, name)())


def write_hellaswag(path, count=4):
    """A file of examples whose right ending is the first."""
    endings = ["is wet.", "sings a song.", "is.", "runs away."]
    example = {"ctx": "A man sits. he", "ctx_a": "A man sits.", "ctx_b": "he", "activity_label": "Sitting"}
    lines = [json.dumps(example | {"endings": endings, "label": 0, "ind": number}) for number in range(count)]
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture
def hellaswag_file(tmp_path, monkeypatch):
    """A few examples in place of HellaSwag's."""
    write_hellaswag(tmp_path / "examples.jsonl")
    monkeypatch.setattr(hellaswag, "FILE", tmp_path / "examples.jsonl")
    monkeypatch.setattr(hellaswag, "download", lambda: hellaswag.FILE)


@pytest.mark.parametrize("attention", ["flash", "math"])
def test_only_the_chosen_attention_backend_is_enabled_in_training_and_evaluation(
    shards, hellaswag_file, monkeypatch, attention
):
    seen = set()
    hidden = GPT.hidden

    def watched(gpt, idx, positions=None, mask=None, caches=None):
        work = "training" if torch.is_grad_enabled() else "validation"
        work = "hellaswag" if mask is not None else "samples" if caches else work
        seen.add((work, enabled_backends()))
        return hidden(gpt, idx, positions, mask, caches)

    monkeypatch.setattr(GPT, "hidden", watched)
    before = enabled_backends()
    train(tiny_config(attention=attention, max_steps=2, hellaswag_every=2, sample_every=2))
    works = ("training", "validation", "hellaswag", "samples")
    assert seen == {(work, (f"{attention}_sdp_enabled",)) for work in works}
    assert enabled_backends() == before


def test_masks_and_single_queries_are_announced_to_the_choice_of_a_backend(shards, hellaswag_file, monkeypatch):
    announced = []

    def recorded(config, device, masked=False):
        announced.append(masked)
        return contextlib.nullcontext()

    monkeypatch.setattr(train_gpt2, "attention_backend", recorded)
    train(tiny_config(max_steps=1, eval_every=0, hellaswag_every=1, sample_every=1))
    assert announced == [False, True, True, True, True]  # the run, and HellaSwag and samples before and after the step


@pytest.mark.parametrize("attention", ["auto", "cudnn", "math"])
def test_on_a_gpu_cudnn_is_not_used_where_shapes_vary(monkeypatch, attention):
    zeros, gpu = torch.zeros, torch.device("cuda")
    monkeypatch.setattr(torch, "zeros", lambda *shape, dtype, device: zeros(*shape, dtype=dtype))  # not on the GPU
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *_, **__: None)  # nor cuDNN
    config = tiny_config(attention=attention, dtype="float32")
    in_training = enabled_backends() if attention == "auto" else (f"{attention}_sdp_enabled",)
    with train_gpt2.attention_backend(config, gpu):
        assert enabled_backends() == in_training
    names = ("math",) if attention == "math" else ("flash", "mem_efficient", "math")
    with train_gpt2.attention_backend(config, gpu, masked=True):
        assert enabled_backends() == tuple(f"{name}_sdp_enabled" for name in names)


def test_a_model_that_was_compiled_for_another_backend_is_not_taken_from_the_cache():
    with train_gpt2.attention_backend(tiny_config(attention="math"), CPU):
        assert torch.compiler.config.cache_key_tag == "attention math"


def test_the_choice_of_a_backend_ends_with_the_run(shards):
    before = torch.compiler.config.cache_key_tag
    train(tiny_config(attention="math", max_steps=2))
    assert torch.compiler.config.cache_key_tag == before


def test_every_attention_backend_gives_the_same_losses_and_may_be_changed_on_resuming(shards, tmp_path):
    for attention in ("flash", "math"):
        train(tiny_config(attention=attention, out_dir=attention))
    expected, losses = records(tmp_path / "flash"), records(tmp_path / "math")
    assert losses == pytest.approx(expected, abs=1e-4)
    shutil.rmtree(tmp_path / "math" / "step_000008")
    train(tiny_config(attention="flash", out_dir="math", resume=True))
    assert records(tmp_path / "math") == pytest.approx(expected, abs=1e-4)


def test_an_attention_backend_that_the_device_lacks_is_refused(shards, tmp_path):
    with pytest.raises(UsageError, match="--attention cudnn .* cpu"):
        train(tiny_config(attention="cudnn"))
    assert not (tmp_path / "log").exists()


PROFILED_RUN = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import model, torch, train_gpt2
from conftest import tiny_config
model.PRESETS["debug"] = model.GPTConfig(block_size=32, n_layer=1, n_head=2, n_embd=16)
with torch.profiler.profile() as profile:
    train_gpt2.train(tiny_config(attention={attention!r}, out_dir={attention!r}, max_steps=2, compile=True))
print("flash" if any("flash_attention" in event.key for event in profile.key_averages()) else "no flash")
"""


@pytest.mark.slow
@needs_compiler
def test_a_compiled_model_is_never_the_one_that_was_compiled_for_another_backend(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))  # as empty as on a new machine
    for attention, kernel in (("flash", "flash"), ("math", "no flash"), ("flash", "flash")):
        shutil.rmtree(tmp_path / attention, ignore_errors=True)
        program = PROFILED_RUN.format(root=str(ROOT), attention=attention)
        finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
        assert finished.returncode == 0, finished.stderr
        assert finished.stdout.splitlines()[-1] == kernel


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_learns_and_leaves_a_checkpoint_a_log_and_a_picture(shards, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plot, "draw", DRAW)
    train(tiny_config(max_steps=24, eval_every=8, sample_every=24, save_every=0))
    losses, val = records(tmp_path / "log"), records(tmp_path / "log", "val_loss")
    assert list(losses) == list(range(1, 25)) and list(val) == [0, 8, 16, 24]
    assert abs(losses[1] - math.log(50257)) < 0.2 and losses[24] < losses[1] - 2 and val[24] < val[8] < val[0]
    assert (tmp_path / "log" / "loss.png").read_bytes().startswith(b"\x89PNG")
    names = {path.name for path in (tmp_path / "log" / "step_000024").iterdir()}
    assert names == {
        *("config.json", "model.safetensors", "vocab.json", "merges.txt", "tokenizer_config.json", "README.md"),
        *("generation_config.json", "optimizer.safetensors", "trainer.json", "MANIFEST.json"),
    }
    assert len(load_file(tmp_path / "log" / "step_000024" / "model.safetensors")["transformer.wte.weight"]) == 50257
    printed = capsys.readouterr().out
    decayed = sum(weight.numel() for weight in GPT(SIZES).parameters() if weight.dim() > 1)
    for words in ("1 x cpu", "float32", "4 accumulation steps", f"{decayed:,}", "10.8249", "--model", "Hello, I'm a"):
        assert words in printed, words


def test_the_log_and_the_end_of_a_run_account_for_all_its_time(shards, tmp_path, capsys):
    began = time.perf_counter()
    train(tiny_config(max_steps=8, sample_every=8))
    whole = time.perf_counter() - began
    (seconds,) = records(tmp_path / "log", "seconds").values()
    assert list(seconds) == ["other", "val", "samples", "picture", "steps", "saving"]
    assert all(part >= 0 for part in seconds.values()) and sum(seconds.values()) == pytest.approx(whole, abs=0.2)
    logged = sum(records(tmp_path / "log", "ms").values()) / 1000
    assert seconds["steps"] == pytest.approx(logged, abs=0.1)
    assert f"steps {seconds['steps']:.1f} s" in capsys.readouterr().out


def test_settings_from_python_need_no_model(shards, tmp_path):
    train(replace(tiny_config(max_steps=1), model=None))
    assert load_gpt(tmp_path / "log" / "step_000001").config == SIZES


def test_lines_are_logged_as_often_as_asked_and_nothing_else_changes(shards, tmp_path):
    train(tiny_config(max_steps=7))
    train(tiny_config(max_steps=7, log_every=3, out_dir="seldom"))
    often, seldom = records(tmp_path / "log"), records(tmp_path / "seldom")
    assert seldom == {step: often[step] for step in (3, 6, 7)}
    assert records(tmp_path / "log", "val_loss") == records(tmp_path / "seldom", "val_loss")


def test_the_validation_loss_does_not_depend_on_the_micro_batch(shards):
    val = open_shards(shards).val
    gpt = new_trainer().state.gpt
    for val_tokens in (160, 10**6):
        count = min(val_tokens, len(val) - 1) // 16
        rows = torch.from_numpy(val.read(0, count * 16 + 1).astype(np.int64))
        _, expected = gpt(rows[:-1].view(-1, 16), rows[1:].view(-1, 16))
        for batch_size in (1, 3, 7, 64):
            config = fill_defaults(tiny_config(batch_size=batch_size, val_tokens=val_tokens), CPU, SIZES)
            trainer = train_gpt2.make_trainer(config, ALONE, gpt)
            scores = train_gpt2.validation_loss(trainer, val)
            assert scores == {"val_loss": pytest.approx(expected.item(), abs=1e-5)}


def losses_of_a_plain_loop(config, shards):
    """What `train` logs, by the definition: whole batches in fp32, AdamW without fusing, nothing compiled."""
    batches = Batches(open_shards(shards).train, config.block_size, config.seed, config.shuffle)
    torch.manual_seed(config.seed)
    gpt, position, losses = GPT(SIZES), 0, {}
    groups = train_gpt2.make_optimizer(gpt, config, ALONE).param_groups
    groups = [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in groups]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), foreach=False)
    for step in range(config.max_steps):
        starts, position = batches.row_starts(position, config.total_batch_size)
        rows = torch.from_numpy(batches.read_rows(starts).astype(np.int64))
        logits = gpt.logits(gpt.hidden(rows[:, :-1]))
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
    ("dtype", "compile", "tolerance"),
    [
        ("float32", False, 1e-4),
        ("bfloat16", False, 0.02),
        pytest.param("float32", True, 1e-4, marks=[pytest.mark.slow, needs_compiler]),
        pytest.param("bfloat16", True, 0.02, marks=[pytest.mark.slow, needs_compiler]),
    ],
)
def test_20_steps_with_the_speed_ups_have_the_losses_of_a_plain_loop(shards, tmp_path, dtype, compile, tolerance):
    config = fill_defaults(tiny_config(max_steps=20, eval_every=20, save_every=0), CPU, SIZES)
    plain = losses_of_a_plain_loop(config, shards)
    train(replace(config, dtype=dtype, compile=compile))
    fast = records(tmp_path / "log")
    assert plain[20] < plain[1] - 1.5 and fast.keys() == plain.keys()
    assert max(abs(fast[step] - plain[step]) for step in plain) < tolerance


@pytest.mark.parametrize(
    ("script", "work", "flag"), [(train_gpt2, "train", "--batch_size"), (sample, "write", "--checkpoint")]
)
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("backend raised:\nOutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_running_out_of_memory_names_the_flag_in_one_line(monkeypatch, script, work, flag, error):
    def run_out(config):
        raise error

    monkeypatch.setattr(script, work, run_out)
    with pytest.raises(MemoryError, match=f"{flag} .*(out of memory|ALLOC_FAILED|allocate)") as raised:
        script.main([])
    assert "\n" not in str(raised.value)


def test_a_checkpoint_loads_in_transformers_and_says_the_same(shards, tmp_path):
    train(tiny_config(block_size=32))
    directory, prompt = tmp_path / "log" / "step_000008", "he was on the"
    theirs, gpt = transformers.AutoModelForCausalLM.from_pretrained(directory), load_gpt(directory)
    ids = transformers.AutoTokenizer.from_pretrained(directory)(prompt, return_tensors="pt")["input_ids"]
    assert ids.tolist() == [tokenizer.encode(prompt)]
    with torch.no_grad():
        assert (theirs(ids).logits - gpt(ids)[0]).abs().max() < 1e-4
    settings = sample.SampleConfig(temperature=0, max_new_tokens=20)
    write = transformers.pipeline("text-generation", model=str(directory))
    written = write(prompt, max_new_tokens=20, do_sample=False)[0]["generated_text"]
    assert written == prompt + "".join(sample.continuation(gpt, settings, prompt))
    assert json.loads((directory / "config.json").read_text())["n_ctx"] == 32  # for llama.cpp's converter


def test_a_model_card_tells_how_the_model_was_made_and_how_good_it_is(shards, tmp_path):
    train(tiny_config(total_batch_size=1024))  # of which two make an epoch, and the rest of it is passed over
    card = (tmp_path / "log" / "step_000008" / "README.md").read_text()
    _, head, body = card.split("---\n", 2)
    loss, val = (records(tmp_path / "log", key)[8] for key in ("loss", "val_loss"))
    assert "library_name: transformers" in head and f"| val_loss | 8 | {val:.4f} |" in body
    assert f"| training loss | 8 | {loss:.4f} |" in body and "8,192 tokens" in body and "random weights" in body
    parameters = sum(weight.numel() for weight in GPT(SIZES).parameters()) - 47 * SIZES.n_embd
    assert f"{parameters:,} parameters" in body  # without the 47 rows of padding
    assert "source.jsonl" in body and "from transformers import pipeline" in body


def test_a_source_whose_name_is_not_utf_8_does_not_keep_a_run_from_saving(small_debug, tmp_path):
    name = os.fsdecode(b"caf\xe9.txt")
    source = tmp_path / name
    source.write_text("Tea and cake. " * 500)
    fineweb.main(["--input", str(source), "--out_dir", "cafe", "--shard_size", "1000", "--encoder", "tiktoken"])
    train(tiny_config(data_dir="cafe"))
    assert "caf\\udce9.txt" in (tmp_path / "log" / "step_000008" / "README.md").read_text()


# ---- fine-tuning -----------------------------------------------------------------------------------------------------

TUNING = [
    *"--init_from log --out_dir tuned --data_dir shards --device cpu --dtype float32 --batch_size 2".split(),
    *"--total_batch_size 128 --max_steps 8 --warmup_steps 2 --eval_every 4 --val_tokens 128".split(),
    *"--save_every 4 --sample_every 0".split(),
]


def test_training_begins_with_the_weights_of_another_runs_newest_checkpoint(shards, tmp_path, capsys):
    train(tiny_config())
    capsys.readouterr()
    train_gpt2.main(TUNING)
    val = records(tmp_path / "tuned", "val_loss")
    assert val[0] == records(tmp_path / "log", "val_loss")[8] and val[8] < val[0]
    assert max(records(tmp_path / "tuned", "lr").values()) == pytest.approx(RECIPES["debug"].max_lr / 10)
    printed = capsys.readouterr().out
    assert "model log on" in printed and "expected first loss" not in printed
    assert "Initialized from log" in (tmp_path / "tuned" / "step_000008" / "README.md").read_text()


def test_what_transformers_saved_is_padded_and_cropped_for_training(shards, tmp_path):
    sizes = {"n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(tmp_path / "theirs")
    train_gpt2.main([*TUNING, "--init_from", "theirs", "--block_size", "16"])
    made = load_gpt(tmp_path / "tuned" / "step_000008").config
    assert made == GPTConfig(block_size=16, n_layer=1, n_head=2, n_embd=16)


# ---- wrong input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"total_batch_size": 100}, "--total_batch_size 100 .*--batch_size 2 x --block_size 16 x 1"),
        ({"block_size": 64}, "--block_size 64 .* 32"),
        ({"batch_size": 0}, "--batch_size"),
        ({"grad_clip": math.nan}, "--grad_clip"),
        ({"max_lr": math.inf}, "--max_lr"),
        ({"max_lr": 0.0}, "--max_lr"),
        ({"seed": 2**64}, "--seed"),
        ({"beta2": 1.0}, "--beta2"),
        ({"min_lr": 1.0}, "--min_lr"),
        ({"initial_batch_size": 96, "batch_ramp_tokens": 100, "batch_size": 4}, "--initial_batch_size 96"),
        ({"initial_batch_size": 256, "batch_ramp_tokens": 100}, "--initial_batch_size 256"),
        ({"initial_batch_size": 64}, "--batch_ramp_tokens"),
        ({"batch_ramp_tokens": 64}, "--initial_batch_size"),
        ({"total_batch_size": 32 * 1000}, "--total_batch_size"),
        ({"device": "gpu"}, "--device"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_flag_before_anything_is_written(shards, tmp_path, change, message):
    with pytest.raises(UsageError, match=message):
        train(tiny_config(**change))
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize(
    ("flags", "vocab_size", "message"),
    [
        (["--block_size", "64"], 50257, "--block_size 64 .* 32"),
        (["--model", "debug"], 50257, "--model debug"),
        ([], 211, "211"),
    ],
)
def test_a_model_that_cannot_be_trained_on_is_refused(shards, tmp_path, flags, vocab_size, message):
    sizes = GPTConfig(block_size=32, vocab_size=vocab_size, n_layer=1, n_head=2, n_embd=16)
    save_gpt(GPT(sizes), tmp_path / "other")
    with pytest.raises(UsageError, match=message):
        train_gpt2.main([*TUNING, "--init_from", "other", *flags])
    assert not (tmp_path / "tuned").exists()


def test_a_larger_models_recipe_is_taken_for_its_weights(tmp_path):
    save_gpt(GPT(GPTConfig(block_size=32, n_layer=3, n_head=2, n_embd=16)), tmp_path / "deeper")
    config = parse_config(["--init_from", "deeper"], None)
    whole = RECIPES["gpt2"]
    assert config == replace(whole, init_from="deeper", max_lr=whole.max_lr / 10, muon_lr=whole.muon_lr / 10)


def test_missing_and_damaged_shards_are_named(shards, tmp_path):
    with pytest.raises(DataError, match="nowhere.*fineweb.py"):
        train(tiny_config(data_dir="nowhere"))
    shard = shards / "edufineweb_train_000002.npy"
    content = shard.read_bytes()

    def refuse(new_content):
        shard.write_bytes(new_content)
        with pytest.raises(DataError, match="edufineweb_train_000002"):
            train(tiny_config(resume=True))

    refuse(b"")
    refuse(content[:100])
    refuse(content[:-10])
    refuse(content[:-2])
    np.savez(tmp_path / "zip.npz", np.zeros(3, dtype=np.uint16))
    refuse((tmp_path / "zip.npz").read_bytes())
    tokens = np.load(shards / "edufineweb_train_000003.npy")
    for wrong in (tokens[:50], tokens.astype(np.int32), tokens.reshape(2, -1), tokens.sum()):
        np.save(shard, wrong)
        refuse(shard.read_bytes())
    tokens[7] = 50257
    np.save(shard, tokens)
    refuse(shard.read_bytes())
    shard.unlink()
    with pytest.raises(DataError, match="edufineweb_train_000002"):
        train(tiny_config(resume=True))


def test_a_val_shard_with_a_token_out_of_vocabulary_ends_the_run(shards):
    tokens = np.load(shards / "edufineweb_val_000000.npy")
    tokens[7] = 50257
    np.save(shards / "edufineweb_val_000000.npy", tokens)
    with pytest.raises(DataError, match="edufineweb_val_000000.npy .* 50257"):
        train(tiny_config())


def test_incomplete_shards_are_refused(shards):
    manifest = load_manifest(shards)
    for entry in manifest["shards"]:
        entry["next"] = {"file": 0, "document": 1, "token": 1}
    save_manifest(shards, manifest | {"complete": False})
    with pytest.raises(DataError, match="not complete"):
        train(tiny_config())


def test_shards_without_a_manifest_can_be_trained_on(shards, tmp_path):
    (shards / "manifest.json").unlink()
    train(tiny_config())
    assert len(records(tmp_path / "log")) == 8
    (shards / "edufineweb_train_000001.npy").unlink()
    with pytest.raises(DataError, match="edufineweb_train_000001"):
        train(tiny_config(out_dir="other"))


@pytest.mark.parametrize(("max_lr", "beside"), [(1e-2, [4, 8]), (2e-2, [])])
def test_a_run_with_the_others_settings_shows_and_draws_them_beside_its_own(
    shards, tmp_path, capsys, monkeypatch, max_lr, beside
):
    data = {"source": load_manifest(shards)["source"], "val_tokens": 500, "train_tokens": 2500}
    rows = [[4, 1.5, 0.1], [8, 1.4, 0.1]]
    reference_file = {"settings": {"max_lr": 1e-2, "min_lr": 1e-3}, "data": data}
    reference_file |= dict.fromkeys(reference.SCORES, rows)
    monkeypatch.setattr(reference, "read_reference", lambda: reference_file)
    train(tiny_config(max_lr=max_lr))
    printed = capsys.readouterr().out.splitlines()
    shown = [line for line in printed if "(others: " in line]
    assert [int(line.split()[1]) for line in shown] == beside
    assert sum("is far from" in line for line in printed) == bool(beside)
    assert list(records(tmp_path / "log", "reference").values()) == [bool(beside)]


# ---- settings reach what they set ------------------------------------------------------------------------------------


@pytest.mark.parametrize("compile", [False, True])
def test_the_model_is_compiled_if_that_is_asked_for(monkeypatch, compile):
    disabled = []
    monkeypatch.setattr(torch, "compile", lambda model, disable, **_: disabled.append(disable) or model)
    new_trainer(compile=compile)
    assert disabled == [not compile]


def test_all_work_is_done_in_the_type_that_is_asked_for(shards, hellaswag_file, monkeypatch):
    seen, forward = set(), MLP.forward

    def watched(mlp, x):
        y = forward(mlp, x)
        seen.add((torch.is_grad_enabled(), y.dtype))
        return y

    monkeypatch.setattr(MLP, "forward", watched)
    every = dict.fromkeys(("eval_every", "hellaswag_every", "sample_every", "monitor_every"), 1)
    train(tiny_config(dtype="bfloat16", max_steps=1, **every))
    assert seen == {(True, torch.bfloat16), (False, torch.bfloat16)}


@pytest.mark.parametrize(("optimizer", "rates"), [("adamw", {1e-3}), ("muon", {1e-3, 3e-3})])
def test_the_optimizer_has_the_settings_that_are_asked_for(optimizer, rates):
    settings = {"max_lr": 1e-3, "muon_lr": 3e-3, "beta1": 0.7, "beta2": 0.8, "weight_decay": 0.3}
    groups = train_gpt2.make_optimizer(GPT(SIZES), TrainConfig(optimizer=optimizer, **settings), ALONE).param_groups
    assert {group["lr"] for group in groups} == rates
    assert {group["betas"] for group in groups} == {(0.7, 0.8)}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.3}


def first_batch(shards, **changes):
    with contextlib.closing(train_gpt2.read_batches(new_trainer(**changes), open_shards(shards))) as batches:
        return next(batches)


def test_batches_have_the_order_and_the_size_that_are_asked_for(shards):
    plain, shuffled = first_batch(shards), first_batch(shards, shuffle=True)
    assert len({plain.digest, shuffled.digest, first_batch(shards, shuffle=True, seed=1).digest}) == 3
    ramp = first_batch(shards, initial_batch_size=64, batch_ramp_tokens=1000)
    assert [batch.micro_batches[..., 1:].numel() for batch in (plain, ramp)] == [128, 64]


def test_a_steps_line_has_the_rate_the_share_of_all_devices_peak_and_the_hours_left(monkeypatch):
    with torch.device("meta"):
        weights = 124_439_808 + 47 * 768 - 1024 * 768  # with the embedding's padding, without positions
        assert GPT(PRESETS["gpt2"]).flops_per_token() == 6 * weights + 12 * 12 * 768 * 1024
    trainer, logged = new_trainer(max_steps=8), {}
    trainer.world, trainer.state.step = World(0, 2, CPU), 2
    monkeypatch.setattr(train_gpt2, "peak_flops", lambda device: trainer.state.gpt.flops_per_token())
    log = SimpleNamespace(write=lambda text, **record: logged.update(record, text=text))
    batch = Batch(torch.zeros(4, 2, 17), 0, "")  # 128 tokens on each of two processes
    train_gpt2.log_step(trainer, log, batch, 3.0, 1.0, seconds=600.0)
    assert logged["tokens_per_second"] == pytest.approx(256 / 600)
    assert logged["mfu"] == pytest.approx(256 / 600 / 2)
    assert "| 600000 ms |" in logged["text"] and "| 1.00 h left" in logged["text"]


# ---- data ------------------------------------------------------------------------------------------------------------


def test_the_sample_is_built_once_by_the_main_process_for_which_the_others_wait(make_shards, monkeypatch):
    ready, built = make_shards(name="ready"), []

    def build(config):
        built.append(config.sample)
        shutil.copytree(ready, config.directory)

    monkeypatch.setattr(fineweb, "build", build)
    config = fill_defaults(tiny_config(data_dir=None), CPU, SIZES)
    with monkeypatch.context() as patch:
        patch.setattr(World, "agree", lambda world, text: True)
        patch.setattr(World, "barrier", lambda world: shutil.copytree(ready, "sample_shards"))  # by the main process
        train_gpt2.load_shards(config, World(1, 2, CPU))
    assert not built
    shutil.rmtree("sample_shards")
    for _ in range(2):
        train_gpt2.load_shards(config, ALONE)
    assert built == [True]


def test_the_full_shards_are_debugs_default_only_where_they_are_complete(make_shards):
    def defaults():
        return [default_data_dir(model) for model in ("gpt2", "debug")]

    assert defaults() == ["edu_fineweb10B", "sample_shards"]
    directory = make_shards(name="edu_fineweb10B")
    assert defaults() == ["edu_fineweb10B"] * 2
    manifest = load_manifest(directory)
    for entry in manifest["shards"]:
        entry["next"] = {"file": 0, "document": 1, "token": 1}
    save_manifest(directory, manifest | {"complete": False})
    assert defaults() == ["edu_fineweb10B", "sample_shards"]


@pytest.mark.parametrize(
    ("change", "flag"), [({}, "--block_size"), ({"block_size": 8, "total_batch_size": 384}, "--total_batch_size")]
)
def test_shards_that_lack_one_token_are_refused_with_the_flag_to_lower(make_shards, change, flag):
    make_shards(tokens=400, shard_size=16, name="few")  # 16 val and 384 train tokens
    with pytest.raises(UsageError, match=f"few .*lower {flag}"):
        train(tiny_config(data_dir="few", **change))


# ---- HellaSwag on several processes ----------------------------------------------------------------------------------


def test_where_another_processs_losses_are_not_finite_this_one_has_no_score_either(monkeypatch):
    monkeypatch.setattr(hellaswag, "count_correct", lambda *_, **__: torch.ones(2, 2, dtype=torch.long))
    monkeypatch.setattr(World, "any_rank", lambda world, condition: True)
    with pytest.raises(FloatingPointError, match="another process"):
        train_gpt2.score_hellaswag(new_trainer(), [])


def test_right_answers_are_summed_over_the_processes(monkeypatch):
    monkeypatch.setattr(hellaswag, "count_correct", lambda *_, **__: torch.tensor([[1, 2], [3, 4]]))
    monkeypatch.setattr(World, "sum", lambda world, values: 2 * values)  # another process has the same
    scores = train_gpt2.score_hellaswag(new_trainer(), [None] * 8)
    assert list(scores.values()) == [0.25, 0.5, 0.75, 1.0]  # of 16 questions, two for each example
