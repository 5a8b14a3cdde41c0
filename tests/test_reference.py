"""A run of the reproduction shows where it lies among others' runs, and says once that it is far from them."""

import random
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import fineweb
import recipes
from common.log import Clock, Log, Tracker, read_log
from common.reference import SCORES, Comparison, bands, read_reference
from common.shards import Shard, Shards
from model import PRESETS

CONFIG = recipes.fill_defaults(replace(recipes.RECIPES["gpt2"], data_dir="s"), torch.device("cpu"), PRESETS["gpt2"])
SOURCE = {key: getattr(fineweb.FinewebConfig(), key) for key in ("dataset", "name", "revision", "text_column")}
ALONE = "validation loss 4.1530"
BESIDE = "validation loss 4.1530 (others: 4.151 ± 0.005)"


def make_shards(source=SOURCE, val_tokens=10**8, train_tokens=9_853_989_344):
    return Shards(Shard(Path("val"), val_tokens), [Shard(Path("train"), train_tokens)], [], None, source)


def run(directory, scores):
    """Write the log of a run with these scores by step, as training does."""
    log = Log(directory, Tracker("none", directory, {}), comparison=None, clock=Clock(), enabled=True)
    comparison = Comparison(CONFIG, make_shards())
    log.start(0, [], reference=comparison.applies)
    for step, at_step in scores.items():
        log.write(f"step {step} | {comparison.describe(step, at_step)}", step=step, **at_step)


def noisy(seed, shift=0):
    """The others' scores with noise of their typical standard deviation, shifted by some of these."""
    draw, curves = random.Random(seed), {score: bands(score) for score in SCORES}
    sds = {score: statistics.median(band.sd for band in curve.values()) for score, curve in curves.items()}
    return {
        step: {score: curves[score][step].mean + (shift + draw.gauss(0, 1)) * sds[score] for score in SCORES}
        for step in curves["val_loss"]
    }


# ---- which runs ------------------------------------------------------------------------------------------------------


def test_the_default_run_of_gpt2_on_the_default_source_shows_where_it_lies():
    comparison = Comparison(CONFIG, make_shards())
    assert comparison.applies and comparison.describe(1000, {"val_loss": 4.153}) == BESIDE
    assert comparison.describe(1001, {"val_loss": 4.153}) == ALONE
    scores = {"hellaswag_nanogpt_acc": 0.25, "hellaswag_nanogpt_acc_norm": 0.2551}
    beside = "hellaswag_nanogpt_acc 0.2500 | hellaswag_nanogpt_acc_norm 0.2551 (others: 0.255 ± 0.002)"
    assert comparison.describe(1000, scores) == beside


def test_the_others_settings_are_the_recipe_of_gpt2_in_all_that_alters_a_run():
    names = [*recipes.MUST_MATCH, "max_steps", "val_tokens"]
    assert read_reference()["settings"] == pytest.approx({name: getattr(CONFIG, name) for name in names})


@pytest.mark.parametrize(
    "change",
    [{"batch_size": 8}, {"dtype": "float16"}, {"compile": True}, {"attention": "math"}, {"min_lr": 6e-5}],
)
def test_what_alters_a_run_by_rounding_alone_does_not_matter(change):
    assert Comparison(replace(CONFIG, **change), make_shards()).applies


@pytest.mark.parametrize(
    "change",
    [
        {"max_lr": 1.2e-3},
        {"warmup_steps": 0},
        {"max_steps": 5000},
        {"total_batch_size": 2**18},
        {"seed": 1},
        {"shuffle": True},
        {"init_from": "gpt2"},
        {"model": "gpt2-medium"},
        {"val_tokens": 327_680},
    ],
)
def test_other_recipes_show_nothing(change):
    comparison = Comparison(replace(CONFIG, **change), make_shards())
    assert not comparison.applies and comparison.describe(1000, {"val_loss": 4.153}) == ALONE
    assert comparison.describe(1000, {"val_loss": 9.0}) == "validation loss 9.0000"


@pytest.mark.parametrize(
    "data",
    [
        {"source": None},
        {"source": {"sample": "the documentation of Python"}},
        {"source": SOURCE | {"name": "sample-100BT"}},
        {"train_tokens": 10**9},
        {"val_tokens": 10**6},
    ],
)
def test_other_data_show_nothing(data):
    comparison = Comparison(CONFIG, make_shards(**data))
    assert not comparison.applies and comparison.describe(1000, {"val_loss": 4.153}) == ALONE


# ---- within and outside the band -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [-2, 0, 2])
@pytest.mark.parametrize("seed", range(5))
def test_a_run_within_the_others_noise_is_shown_beside_them_without_a_warning(tmp_path, capsys, seed, shift):
    scores = noisy(seed, shift)
    run(tmp_path, scores)
    printed = capsys.readouterr().out
    assert "warning" not in printed and printed.count("(others: ") == 2 * len(scores) == 2 * 77
    assert read_log(tmp_path)[0]["reference"] is True


KNOWN_MISTAKES = {
    "no warm-up": {1000: 4.860, 5000: 3.499, 10_000: 3.296, 19_073: 3.1681},
    "gradients not synchronized": {1000: 4.49, 5000: 3.63, 10_000: 3.43, 19_073: 3.264},
    "diverged": {1000: 4.15, 5000: float("nan"), 10_000: 11.0},
    "validated on 0.33 million tokens": {19_073: 3.0316},
}


@pytest.mark.parametrize("mistake", KNOWN_MISTAKES)
def test_a_known_mistake_is_said_once_with_what_to_look_at(tmp_path, capsys, mistake):
    run(tmp_path, {step: {"val_loss": loss} for step, loss in KNOWN_MISTAKES[mistake].items()})
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert "validation loss" in warning and "docs/operations.md" in warning and "check.py" in warning


@pytest.mark.parametrize("step", [1000, 5000, 10_000, 19_073])
@pytest.mark.parametrize("mistake", ["no warm-up", "gradients not synchronized"])
def test_a_known_mistake_is_seen_at_each_of_its_known_steps(mistake, step):
    text = Comparison(CONFIG, make_shards()).describe(step, {"val_loss": KNOWN_MISTAKES[mistake][step]})
    assert text.count("\nwarning: ") == 1


def test_hellaswag_has_its_own_warning_once(tmp_path, capsys):
    scores = noisy(0)
    for at_step in scores.values():
        at_step["hellaswag_nanogpt_acc_norm"] = 0.25  # as by chance
    run(tmp_path, scores)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1 and "hellaswag_nanogpt_acc_norm 0.250" in warnings[0]


# ---- the file --------------------------------------------------------------------------------------------------------


def test_the_file_names_its_sources_and_what_they_do_not_say():
    reference = read_reference()
    assert len(reference["sources"]) == 7 and all("github.com" in source["log"] for source in reference["sources"])
    assert all(word in " ".join(reference["cautions"]) for word in ("seed", "val shard", "step"))


def test_the_readme_shows_the_files_figures():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    val, hellaswag = (bands(score) for score in SCORES)
    for step in (500, 1000, 5000, 10_000, 19_073):
        figures = (f"{band[step].mean:.4f} ± {band[step].sd:.4f}" for band in (val, hellaswag))
        (line,) = [line for line in readme.splitlines() if line.startswith(f"| {step:,}")]
        assert f"| {' | '.join(figures)} |" in line


def test_the_default_shards_are_those_of_the_others():
    assert fineweb.FinewebConfig().tokens_per_shard == read_reference()["data"]["val_tokens"]
