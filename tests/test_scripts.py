"""The scripts as a person runs them: flags, messages, exit statuses, several processes."""

import dataclasses
import inspect
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
import torch
from conftest import ROOT, flags_of, records, run_script, small_gpt, tiny_config

import fineweb
import hellaswag
import plot
import sample
import train_gpt2
from common import script
from common.checkpoint import read_record
from common.huggingface import save_gpt
from common.script import DataError, UsageError
from common.tokenizer import END_OF_TEXT, encode
from recipes import RECIPES, TrainConfig, parse_config, recipe

CONFIGS = {
    "fineweb.py": fineweb.FinewebConfig,
    "train_gpt2.py": TrainConfig,
    "hellaswag.py": hellaswag.HellaswagConfig,
    "sample.py": sample.SampleConfig,
    "plot.py": plot.PlotConfig,
}
MAINS = {name: __import__(name.removesuffix(".py")).main for name in CONFIGS}
EXAMPLE = {
    "ctx": "A man sits. he",
    "ctx_a": "A man sits.",
    "ctx_b": "he",
    "activity_label": "Sitting",
    "endings": ["is wet.", "sings.", "is.", "runs away."],
    "label": 1,
}


@pytest.fixture
def run_here(capsys, monkeypatch):
    """Run a script within this process, without a GPU, which is quicker; returns its exit status, output and errors."""
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("common.device.NVIDIA_DRIVER", Path("no driver"))

    def run(name, *flags):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
        with pytest.raises(SystemExit) as end:
            script.run(MAINS[name])
        return end.value.code, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def trained(built_shards, tmp_path_factory):
    """The directory of a run of four steps, with its shards beside it; for reading only."""
    directory = tmp_path_factory.mktemp("trained")
    shutil.copytree(built_shards(4000, 1000), directory / "shards")
    train_gpt2.train(tiny_run(directory, out_dir=str(directory / "log")))
    return directory


@pytest.fixture(scope="session")
def trained_by_two(built_shards, tmp_path_factory):
    """The same run by two processes; for reading only. Its `printed` file holds what they printed."""
    directory = tmp_path_factory.mktemp("trained_by_two")
    shutil.copytree(built_shards(4000, 1000), directory / "shards")
    flags = flags_of(tiny_run(directory, out_dir=str(directory / "log")))
    finished = run_script("train_gpt2.py", *flags, processes=2)
    assert finished.returncode == 0, finished.stderr
    (directory / "printed").write_text(finished.stdout)
    return directory


@pytest.fixture(scope="session")
def resumed_by_two(trained, tmp_path_factory):
    """`trained` resumed by two processes, which save at the end only, and validate on one row."""
    directory = copy_run(trained, tmp_path_factory.mktemp("resumed_by_two"), without="step_000004")
    flags = flags_of(tiny_run(directory, out_dir=str(directory / "log"), resume=True, save_every=0, val_tokens=16))
    finished = run_script("train_gpt2.py", *flags, processes=2)
    assert finished.returncode == 0, finished.stderr
    finished.directory = directory
    return finished


def tiny_run(directory, **changes):
    """Four steps, each of two micro-batches for each of two processes, with a checkpoint at every other."""
    settings = {"max_steps": 4, "total_batch_size": 64, "eval_every": 2, "save_every": 2}
    return tiny_config(data_dir=str(directory / "shards"), **settings | changes)


def copy_run(run, tmp_path, without=None):
    """A copy of a run's directory and shards here, without one of its checkpoints."""
    shutil.copytree(run / "log", tmp_path / "log")
    shutil.copytree(run / "shards", tmp_path / "shards")
    if without:
        shutil.rmtree(tmp_path / "log" / without)
    return tmp_path


def same_values(first, second):
    """Whether what a log says agrees at each step, to rounding."""
    return first.keys() == second.keys() and all(second[n] == pytest.approx(first[n], rel=2e-5) for n in first)


# ---- flags -----------------------------------------------------------------------------------------------------------


def documented_fields(config_class):
    """What stands beside or below each field of the class in its source: a comment or a docstring."""
    texts, field = {}, None
    source = inspect.getsource(config_class)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if match := re.match(r"    (\w+): ", token.line):
            field = match[1]
        if field and token.type == tokenize.COMMENT:
            texts[field] = token.string.lstrip("# ")
        if field and token.type == tokenize.STRING and token.line.lstrip().startswith('"""'):
            texts[field] = token.string.strip('"')
    return texts


def described_flags(printed):
    """The text that --help prints for each flag, its default included."""
    options = printed.split("show this help message and exit")[1]
    words = " ".join(re.sub("[│╰─╯]|-{9,}", " ", options).split())
    return {match[1]: match[2] for match in re.finditer(r"--(\w+)(?:,| |\{)(.*?\(default: .*?\))(?= --|$| *$)", words)}


@pytest.mark.parametrize("name", CONFIGS)
def test_help_shows_every_field_with_its_meaning_and_default(run_here, name):
    status, printed, _ = run_here(name, "--help")
    shown = described_flags(printed)
    documented = documented_fields(CONFIGS[name])
    defaults = recipe("debug", None) if name == "train_gpt2.py" else CONFIGS[name]()
    assert status == 0
    assert [*shown] == [*documented] == [field.name for field in dataclasses.fields(CONFIGS[name])]
    for field, text in documented.items():
        assert " ".join(text.split()) in shown[field]
        assert f"(default: {getattr(defaults, field)})" in shown[field]


@pytest.mark.parametrize("model", RECIPES)
def test_help_shows_the_defaults_of_the_size_that_is_asked_for(run_here, model):
    _, printed, _ = run_here("train_gpt2.py", "--model", model, "--help")
    shown = described_flags(printed)
    for field, value in vars(recipe(model, None)).items():
        assert f"(default: {value})" in shown[field]


def test_help_begins_with_what_the_script_does(run_here):
    for name in CONFIGS:
        _, printed, _ = run_here(name, "--help")
        assert MAINS[name].__globals__["__doc__"].splitlines()[0] in printed


@pytest.mark.parametrize(
    ("name", "flag", "suggestion"),
    [
        ("train_gpt2.py", "--batchsize", "--batch_size"),
        ("train_gpt2.py", "--max_step=3", "--max_steps"),
        ("fineweb.py", "--shard", "--shard_size"),
        ("fineweb.py", "--out", "--out_dir"),
        ("hellaswag.py", "--chekpoint", "--checkpoint"),
        ("sample.py", "--topk", "--top_k"),
        ("plot.py", "--outdir", "--out_dir"),
    ],
)
def test_an_unknown_or_abbreviated_flag_is_an_error_that_suggests_the_right_one(run_here, name, flag, suggestion):
    status, printed, error = run_here(name, flag, "3")
    assert status == 2 and not printed
    assert flag in error and re.search(rf"{suggestion}\b", error)


def test_a_flag_like_no_other_points_to_help(run_here):
    status, _, error = run_here("sample.py", "--xyzzy")
    assert status == 2 and "--xyzzy" in error and "sample.py --help" in error


@pytest.mark.parametrize("flags", [["--batch_size", "3"], ["--batch-size", "3"], ["--batch_size=3"]])
def test_flags_may_be_typed_with_underscores_or_hyphens(flags):
    assert parse_config(["--device", "cpu", *flags], None) == dataclasses.replace(
        recipe("debug", None), device="cpu", batch_size=3
    )


def test_the_flags_of_a_config_give_it_back():
    config = tiny_config(resume=True, shuffle=True, min_lr=1e-5, compile=False, initial_batch_size=64)
    assert parse_config(flags_of(config), None) == config


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("train_gpt2.py", ["--batch_size", "many"]),
        ("train_gpt2.py", ["--compile", "maybe"]),
        ("train_gpt2.py", ["--model", "gpt3"]),
        ("train_gpt2.py", ["--max_steps"]),
        ("train_gpt2.py", ["--dtype", "int8"]),
        ("fineweb.py", ["--encoder", "fast"]),
        ("sample.py", ["--seed", "1.5"]),
    ],
)
def test_a_value_of_another_kind_is_an_error_that_names_the_flag(run_here, name, flags):
    status, printed, error = run_here(name, *flags)
    assert status == 2 and flags[0] in error and not printed


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.fixture
def places(tmp_path):
    """Files and directories to make mistakes with."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "spaces.txt").write_text(" " * 3_000_000 + "x")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "log.jsonl").write_text("")
    save_gpt(small_gpt(), tmp_path / "small")


MISTAKES = [
    (2, "--batch_size", "train_gpt2.py", "--batch_size", "0"),
    (2, "--max_lr", "train_gpt2.py", "--max_lr", "nan"),
    (2, "--total_batch_size", "train_gpt2.py", "--total_batch_size", "100"),
    (2, "--resume", "train_gpt2.py", "--out_dir", "used"),
    (2, "--out_dir", "train_gpt2.py", "--out_dir", "blank.txt"),
    (2, "--device", "train_gpt2.py", "--device", "tpu"),
    (2, "--device", "train_gpt2.py", "--device", "cuda"),
    (1, "fineweb.py", "train_gpt2.py", "--data_dir", "empty"),
    (1, "empty", "train_gpt2.py", "--init_from", "empty"),
    (2, "--model", "train_gpt2.py", "--init_from", "small", "--model", "gpt2"),
    (2, "nothing.parquet", "fineweb.py", "--input", "nothing.parquet"),
    (2, "--revision", "fineweb.py", "--dataset", "some/other"),
    (2, "--shard_size", "fineweb.py", "--max_tokens", "1"),
    (1, "no run in log", "sample.py", "--prompt", "a"),
    (1, "empty", "sample.py", "--checkpoint", "empty"),
    (1, "no/such/directory", "sample.py", "--checkpoint", "no/such/directory"),
    (1, "50257", "sample.py", "--checkpoint", "small", "--prompt", "a"),
    (2, "--temperature", "sample.py", "--temperature", "-1"),
    (2, "--num_samples", "sample.py", "--num_samples", "0"),
    (2, "--top_p", "sample.py", "--top_p", "0"),
    (2, "--top_p", "sample.py", "--top_p", "nan"),
    (2, "--prompt", "sample.py", "--prompt", ""),
    (2, "--file", "sample.py", "--prompt", "a", "--file", "blank.txt"),
    (2, "blank.txt", "sample.py", "--file", "blank.txt"),
    (2, "nowhere.txt", "sample.py", "--file", "nowhere.txt"),
    (2, "empty", "sample.py", "--file", "empty"),
    (1, "latin.txt is not UTF-8", "sample.py", "--file", "latin.txt"),
    (1, "--prompt is not UTF-8", "sample.py", "--prompt", os.fsdecode(b"\xff")),
    (1, "no run in log", "hellaswag.py", "--data", "blank.txt"),
    (1, "empty", "hellaswag.py", "--checkpoint", "empty", "--data", "blank.txt"),
    (1, "50257", "hellaswag.py", "--checkpoint", "small", "--data", "blank.txt"),
    (2, "--data", "hellaswag.py", "--data", "nowhere.jsonl"),
    (2, "--batch_tokens", "hellaswag.py", "--batch_tokens", "0"),
    (2, "--limit", "hellaswag.py", "--limit", "0"),
    (1, "log.jsonl", "plot.py"),
    (1, "log.jsonl", "plot.py", "--out_dir", "empty"),
]


@pytest.mark.parametrize(("status", "words", "name", "flags"), [(s, w, n, flags) for s, w, n, *flags in MISTAKES])
def test_a_mistake_ends_in_its_status_and_one_line(run_here, places, tmp_path, status, words, name, flags):
    before = sorted(tmp_path.rglob("*"))
    actual, printed, error = run_here(name, *flags)
    assert actual == status and words in error, error
    assert name == "fineweb.py" or not printed
    assert error.startswith(f"{name}: error: ") and len(error.strip().splitlines()) == 1, error
    assert sorted(tmp_path.rglob("*")) == before


def test_a_prompt_too_odd_to_encode_is_one_line(run_here, places, trained):
    status, _, error = run_here("sample.py", "--checkpoint", trained / "log", "--file", "spaces.txt")
    assert status == 1 and len(error.strip().splitlines()) == 1, error


def test_a_python_user_gets_the_mistake_as_a_value_error_without_a_command_line():
    with pytest.raises(ValueError, match="--batch_tokens"):
        hellaswag.evaluate(hellaswag.HellaswagConfig(batch_tokens=0))
    with pytest.raises(ValueError, match="--batch_size"):
        train_gpt2.train(tiny_config(batch_size=0))
    with pytest.raises(ValueError, match="--shard_size"):
        fineweb.build(fineweb.FinewebConfig(sample=True, shard_size=0))


@pytest.mark.parametrize(
    ("name", "value"), [("model", "gpt3"), ("dtype", "int8"), ("attention", "fast"), ("tracker", "paper")]
)
def test_a_python_users_choice_is_checked_as_that_of_the_command_line(name, value):
    with pytest.raises(UsageError, match=f"--{name} {value} is not one of"):
        train_gpt2.train(tiny_config(**{name: value}))


def test_a_missing_prompt_is_a_mistake_before_the_model_is_loaded(run_here, monkeypatch):
    monkeypatch.setattr(sample, "load_gpt", lambda *_: pytest.fail("the model was loaded"))
    status, _, error = run_here("sample.py", "--prompt", "")
    assert status == 2 and "--prompt is empty" in error


@pytest.mark.parametrize(
    ("error", "status"),
    [(UsageError("x"), 2), (DataError("x"), 1), (OSError("x"), 1), (MemoryError("x"), 1), (MemoryError(), 1)],
)
def test_each_kind_of_error_has_its_status_and_is_said_in_one_line(capsys, error, status):
    def fail():
        raise error

    with pytest.raises(SystemExit) as end:
        script.run(fail)
    assert end.value.code == status and capsys.readouterr().err.endswith(f"error: {str(error) or 'MemoryError'}\n")


def test_an_error_of_the_program_itself_keeps_its_traceback():
    def fail():
        raise AssertionError("an invariant")

    with pytest.raises(AssertionError, match="an invariant"):
        script.run(fail)


def test_ctrl_c_is_one_word(capsys):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        script.run(interrupt)
    assert end.value.code == 130 and capsys.readouterr().err.endswith("error: interrupted\n")


def test_a_reader_that_goes_away_ends_the_script_without_a_word():
    program = "import sys; sys.path.insert(0, sys.argv[1]); from common import script\n"
    program += "script.run(lambda: [print('text', flush=True) for _ in range(100_000)])"
    command = [sys.executable, "-c", program, str(ROOT)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def run_redirected(redirection, script, *flags):
    """Run a script with its streams as a shell's redirection says; returns the finished process."""
    command = [
        "bash",
        "-o",
        "pipefail",
        "-c",
        f'"$@" {redirection}',
        "bash",
        sys.executable,
        str(ROOT / script),
        *flags,
    ]
    buffered = os.environ | {"PYTHONUNBUFFERED": ""}
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=120, env=buffered)


needs_dev_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux alone has a device that is full")


@pytest.mark.parametrize(
    "redirection", [pytest.param(">/dev/full 2>&1", marks=needs_dev_full), ">&- 2>&- <&-", "| true"]
)
def test_a_training_run_goes_on_where_nothing_can_be_printed(trained, tmp_path, redirection):
    finished = run_redirected(redirection, "train_gpt2.py", *flags_of(tiny_run(trained, out_dir="log")))
    assert finished.returncode == 0 and not finished.stderr
    assert records(tmp_path / "log") == records(trained / "log")
    expected = (trained / "log" / "step_000004" / "model.safetensors").read_bytes()
    assert (tmp_path / "log" / "step_000004" / "model.safetensors").read_bytes() == expected


@needs_dev_full
@pytest.mark.parametrize("name", ["sample.py", "hellaswag.py", "plot.py"])
def test_where_the_output_is_what_was_asked_for_a_full_disk_is_one_line(trained, tmp_path, name):
    (tmp_path / "examples.jsonl").write_text(json.dumps(EXAMPLE) + "\n")
    shutil.copytree(trained / "log", tmp_path / "log")
    flags = {"sample.py": ["--prompt", "a"], "hellaswag.py": ["--data", "examples.jsonl"], "plot.py": []}
    finished = run_redirected(">/dev/full", name, *flags[name])
    assert finished.returncode == 1
    assert finished.stderr == f"{name}: error: the output cannot be written: [Errno 28] No space left on device\n"


@pytest.mark.parametrize(("flag", "status"), [("--help", 0), ("--xyzzy", 2)])
def test_no_script_minds_closed_output(run_here, monkeypatch, flag, status):
    for name in MAINS:
        monkeypatch.setattr(sys, "stdout", None)
        monkeypatch.setattr(sys, "stderr", None)
        assert run_here(name, flag)[0] == status


@pytest.mark.parametrize("odd", ["\x1b[31m", "\n", "\r", "\x7f", "\x9b", "\u2028", "\u202e", "\udcff"])
def test_what_a_terminal_would_obey_is_shown_escaped_on_one_line(run_here, odd):
    _, _, error = run_here("plot.py", "--out_dir", f"a{odd}b")
    assert f"a{odd[0]!r}".replace("'", "") in error and odd not in error.removesuffix("\n")


def test_a_terminal_without_the_characters_does_not_end_a_run(trained, tmp_path, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    with pytest.raises(SystemExit) as end:
        script.run(
            lambda: sample.main(["--checkpoint", str(trained / "log"), "--prompt", "日本", "--num_samples", "1"])
        )
    terminal.flush()
    assert end.value.code == 0 and terminal.buffer.getvalue().startswith(rb"\u65e5\u672c")


# ---- a checkpoint in use ---------------------------------------------------------------------------------------------


@pytest.fixture
def sampled(run_here):
    """Sample two short texts; returns what was printed."""

    def run(*flags):
        short = ["--num_samples", "2", "--max_new_tokens", "5", "--device", "cpu"]
        status, printed, error = run_here("sample.py", *short, *flags)
        assert status == 0 and not error, error
        return printed

    return run


def test_each_continuation_begins_with_the_prompt_and_has_its_own_seed(trained, sampled):
    prompt = ["--checkpoint", trained / "log", "--prompt", "The cat"]
    first = sampled(*prompt)
    texts = first.split("\n\n")
    assert len(texts) == 2 and all(text.startswith("The cat") for text in texts)
    assert texts[0].strip() != texts[1].strip()
    assert sampled(*prompt) == first
    shifted = sampled(*prompt, "--seed", "43").split("\n\n")
    assert shifted[0].strip() == texts[1].strip()


def test_the_prompt_may_come_from_a_file_or_from_standard_input(trained, tmp_path, sampled):
    checkpoint = ["--checkpoint", trained / "log"]
    expected = sampled(*checkpoint, "--prompt", "The cat")
    (tmp_path / "prompt.txt").write_text("The cat\n")
    assert sampled(*checkpoint, "--file", "prompt.txt") == expected
    flags = [*checkpoint, "--num_samples", "2", "--max_new_tokens", "5", "--device", "cpu"]
    piped = run_script("sample.py", *flags, input="The cat\n")
    assert piped.returncode == 0 and piped.stdout == expected and not piped.stderr


def test_an_empty_standard_input_is_no_prompt(monkeypatch):
    monkeypatch.setattr(sample, "is_piped", lambda: True)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    with pytest.raises(UsageError, match="standard input is empty"):
        sample.read_prompt(sample.SampleConfig())


def test_sample_takes_a_checkpoint_a_runs_directory_or_by_default_log(trained, sampled, monkeypatch):
    newest = sampled("--checkpoint", trained / "log" / "step_000004", "--prompt", "The cat")
    older = sampled("--checkpoint", trained / "log" / "step_000002", "--prompt", "The cat")
    assert newest != older
    assert sampled("--checkpoint", trained / "log", "--prompt", "The cat") == newest
    monkeypatch.chdir(trained)
    assert sampled("--prompt", "The cat") == newest


def test_hellaswag_takes_a_checkpoint_a_runs_directory_or_by_default_log(trained, run_here, tmp_path, monkeypatch):
    (tmp_path / "examples.jsonl").write_text(json.dumps(EXAMPLE) + "\n")
    flags = ["--data", tmp_path / "examples.jsonl", "--device", "cpu"]
    monkeypatch.chdir(trained)
    loaded, load = [], hellaswag.load_gpt
    monkeypatch.setattr(hellaswag, "load_gpt", lambda source: (loaded.append(str(source)), load(source))[1])
    for choice in (["--checkpoint", "log/step_000004"], ["--checkpoint", "log"], []):
        status, printed, error = run_here("hellaswag.py", *choice, *flags)
        assert status == 0, error
        assert re.match(r"1 examples\nnanogpt  acc \d.0000 \(\d right\), acc_norm", printed)
    assert loaded == ["log/step_000004"] * 3


def test_a_models_name_on_the_hub_may_stand_in_place_of_a_checkpoint(run_here, monkeypatch, tmp_path):
    save_gpt(small_gpt(vocab_size=50257), tmp_path / "cache")
    monkeypatch.setattr("common.hub.fetch_model", lambda name: tmp_path / "cache" if name == "gpt2" else None)
    status, printed, error = run_here("sample.py", "--checkpoint", "gpt2", "--prompt", "a", "--max_new_tokens", 2)
    assert status == 0 and printed.count("a") >= 4, error


def test_the_picture_of_a_run_can_be_drawn_again(trained, run_here, tmp_path):
    copy_run(trained, tmp_path)
    (tmp_path / "log" / "loss.png").unlink()
    assert run_here("plot.py")[:2] == (0, "log/loss.png\n")
    assert (tmp_path / "log" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_that_has_diverged_is_one_line_that_names_it(run_here, tmp_path):
    gpt = small_gpt(vocab_size=50257)
    gpt.transformer.ln_f.weight.data.fill_(float("nan"))
    save_gpt(gpt, tmp_path / "diverged")
    (tmp_path / "examples.jsonl").write_text(json.dumps(EXAMPLE) + "\n")
    for name, *flags in (["sample.py", "--prompt", "a"], ["hellaswag.py", "--data", "examples.jsonl"]):
        status, _, error = run_here(name, "--checkpoint", "diverged", "--device", "cpu", *flags)
        assert status == 1 and "diverged" in error and len(error.strip().splitlines()) == 1, error


@pytest.fixture
def scripted(monkeypatch):
    """A model that says these tokens, and no others."""

    def make(tokens):
        monkeypatch.setattr(sample.GPT, "stream", lambda *_, **__: (torch.tensor([[token]]) for token in tokens))
        return small_gpt(n_layer=1)

    return make


def test_text_is_shown_as_it_comes_with_characters_whole(scripted):
    text = "naïve 你好 🙂!"
    tokens = encode(text)
    pieces = list(sample.continuation(scripted(tokens), sample.SampleConfig(), "a"))
    assert "".join(pieces) == text and len(pieces) == len(tokens) + 1
    assert "" in pieces  # a token that ends inside a character shows nothing yet


def test_a_character_that_does_not_end_is_shown_as_such(scripted):
    broken_off = encode("🙂")[:-1]
    assert "".join(sample.continuation(scripted(broken_off), sample.SampleConfig(), "a")) == "\ufffd"


def test_text_stops_before_end_of_text(scripted):
    tokens = [*encode("One."), END_OF_TEXT, *encode(" Two.")]
    assert "".join(sample.continuation(scripted(tokens), sample.SampleConfig(), "a")) == "One."


# ---- several processes -----------------------------------------------------------------------------------------------


def test_two_processes_give_the_losses_of_one(trained, trained_by_two):
    for key in ("loss", "val_loss", "norm"):
        one, two = records(trained / "log", key), records(trained_by_two / "log", key)
        assert len(one) >= 3 and same_values(one, two), (key, one, two)
    for key in ("position", "batch", "tokens"):
        assert records(trained / "log", key) == records(trained_by_two / "log", key)


def test_of_two_processes_one_prints(trained_by_two):
    printed = (trained_by_two / "printed").read_text()
    assert printed.count("expected first loss") == 1 and printed.count("step     4/4 |") == 1


def test_two_processes_resume_bit_for_bit(trained_by_two, tmp_path):
    directory = copy_run(trained_by_two, tmp_path, without="step_000004")
    finished = run_script("train_gpt2.py", *flags_of(tiny_run(directory, resume=True)), processes=2)
    assert finished.returncode == 0, finished.stderr
    assert records(directory / "log") == records(trained_by_two / "log")
    for name in ("model.safetensors", "optimizer.safetensors"):
        whole = (trained_by_two / "log" / "step_000004" / name).read_bytes()
        assert (directory / "log" / "step_000004" / name).read_bytes() == whole


def test_one_process_goes_on_where_two_stopped(trained_by_two, tmp_path):
    directory = copy_run(trained_by_two, tmp_path, without="step_000004")
    train_gpt2.train(tiny_run(directory, resume=True))
    assert same_values(records(directory / "log"), records(trained_by_two / "log"))
    assert records(directory / "log", "batch") == records(trained_by_two / "log", "batch")


def test_two_processes_go_on_where_one_stopped(trained, resumed_by_two):
    assert "log/step_000004" in resumed_by_two.stdout
    assert same_values(records(resumed_by_two.directory / "log"), records(trained / "log"))


def test_two_processes_finish_when_the_only_checkpoint_is_the_last(resumed_by_two):
    assert {path.name for path in (resumed_by_two.directory / "log").glob("step_*")} == {"step_000002", "step_000004"}


def test_two_processes_validate_on_a_single_row_as_one_does(resumed_by_two, trained, tmp_path):
    directory = copy_run(trained, tmp_path, without="step_000004")
    train_gpt2.train(tiny_run(directory, resume=True, val_tokens=16))
    one, two = (records(run / "log", "val_loss") for run in (directory, resumed_by_two.directory))
    assert same_values(one, two) and one[4] != records(trained / "log", "val_loss")[4]


def test_two_processes_count_what_one_counts(trained, trained_by_two):
    one, two = (read_record(run / "log" / "step_000004") for run in (trained, trained_by_two))
    for key in ("step", "tokens", "position", "skipped"):
        assert one[key] == two[key], key


@pytest.fixture
def rendezvous():
    """The environment of two processes that meet on a free port, but for their ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return os.environ | place | {"OMP_NUM_THREADS": "1"}


def assert_both_refuse(configs, places, environment, reason, status=1):
    """Train on two machines, as two processes with settings and in directories of their own."""
    started = []
    for rank, (config, place) in enumerate(zip(configs, places, strict=True)):
        command, env = [sys.executable, ROOT / "train_gpt2.py", *flags_of(config)], environment | {"RANK": str(rank)}
        started.append(subprocess.Popen(command, cwd=place, env=env, stderr=subprocess.PIPE, text=True))
    for process in started:
        _, error = process.communicate(timeout=120)
        assert process.returncode == status and reason in error, error


@pytest.mark.parametrize("order", [1, -1])
def test_machines_without_a_shared_disk_are_refused(trained, tmp_path, rendezvous, order):
    config = tiny_run(copy_run(trained, tmp_path, without="step_000004"), resume=True)
    (tmp_path / "second").mkdir()  # which does not have the checkpoint
    reason = "--out_dir log must be on a disk that all machines share"
    assert_both_refuse([config] * 2, [tmp_path, tmp_path / "second"][::order], rendezvous, reason)


@pytest.mark.parametrize(("name", "values"), [("max_lr", (1e-3, 1e-4)), ("resume", (True, False))])
def test_machines_with_different_settings_are_refused(trained, rendezvous, name, values):
    configs = [tiny_run(trained, out_dir="new", **{name: value}) for value in values]
    assert_both_refuse(configs, [trained] * 2, rendezvous, f"--{name} is not", status=2)


@pytest.mark.parametrize("missing", ["RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_processes_that_torchrun_did_not_start_are_refused(monkeypatch, missing):
    place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    with pytest.raises(UsageError, match="start several processes with torchrun"):
        train_gpt2.train(tiny_run(Path(), device="cpu"))


def test_machines_with_different_shards_are_refused(built_shards, tmp_path, rendezvous):
    for number, place in enumerate(("first", "second"), 1):
        shutil.copytree(built_shards(4000, 1000 * number), tmp_path / place / "shards")
    reason = "--data_dir shards does not hold the same shards on every machine"
    assert_both_refuse([tiny_run(Path())] * 2, [tmp_path / "first", tmp_path / "second"], rendezvous, reason)


def test_a_mistake_under_torchrun_is_said_once(trained):
    flags = flags_of(tiny_run(trained, out_dir="new", batch_size=3))
    finished = run_script("train_gpt2.py", *flags, processes=2)
    assert finished.returncode != 0
    assert finished.stderr.count("train_gpt2.py: error: --total_batch_size 64 is not a multiple of") == 1
    assert "2 process(es)" in finished.stderr and "UsageError" not in finished.stderr


def test_of_several_processes_the_first_alone_says_what_is_wrong_with_a_flag(run_here, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run_here("train_gpt2.py", "--batchsize", "3") == (2, "", "")
    assert run_here("train_gpt2.py", "--batch_size", "many") == (2, "", "")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert "--batch_size" in run_here("train_gpt2.py", "--batchsize", "3")[2]


def test_two_runs_may_build_the_sample_at_once():
    command = [sys.executable, str(ROOT / "fineweb.py"), "--sample", "--workers", "1"]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], printed
    ends = [output.splitlines()[-1] for output, _ in printed]
    assert ends[0] == ends[1] and "documents" in ends[0]
    assert sum("waiting for another process" in output for output, _ in printed) <= 1


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="on a CPU, torch.compile needs a C++ compiler")
def test_two_compiled_processes_give_the_losses_of_one_eager(trained, tmp_path):
    directory = copy_run(trained, tmp_path)
    flags = flags_of(tiny_run(directory, out_dir="compiled", compile=True))
    finished = run_script("train_gpt2.py", *flags, processes=2, timeout=600)
    assert finished.returncode == 0, finished.stderr
    eager, compiled = records(trained / "log"), records(directory / "compiled")
    assert eager and all(compiled[step] == pytest.approx(eager[step], abs=1e-3) for step in eager)


@pytest.mark.parametrize(("top_k", "passed"), [(7, 7), (0, None)])
def test_the_sampling_flags_reach_the_model(monkeypatch, top_k, passed):
    asked = {}

    def stream(gpt, idx, count, **sampling):
        asked.update(sampling, count=count)
        return iter(())

    monkeypatch.setattr(sample.GPT, "stream", stream)
    config = sample.SampleConfig(temperature=0.7, top_k=top_k, top_p=0.9, max_new_tokens=5, seed=3)
    list(sample.continuation(small_gpt(n_layer=1), config, "a", number=1))
    assert asked.pop("generator").initial_seed() == 4
    assert asked == {"temperature": 0.7, "top_k": passed, "top_p": 0.9, "count": 5}
