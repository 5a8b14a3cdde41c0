"""The picture shows the run: its losses by step and token, and on the reproduction others' runs beside it."""

import json
import os
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest

import plot
from common.reference import SCORES, bands
from common.script import DataError


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draw a log of these records; returns the picture, and the axes that matplotlib drew."""
    from matplotlib.figure import Figure

    axes = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (axes.extend(self.axes), save(self, *args, **kw)))

    def draw(*records):
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return matplotlib.image.imread(plot.draw(tmp_path)), axes

    return draw


def curves(axes):
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}


def test_the_picture_has_the_losses_by_step_and_the_unigram_loss(drawn):
    image, (loss,) = drawn(
        {"step": 0, "unigram_loss": 7.5},
        {"step": 0, "val_loss": 11.0},
        {"step": 1, "loss": 10.0},
        {"step": 2, "loss": None},
        {"step": 3, "loss": 8.0},
        {"step": 3, "val_loss": 9.0},
    )
    assert curves(loss)["train"] == [(1, 10.0), (3, 8.0)]
    assert curves(loss)["validation"] == [(0, 11.0), (3, 9.0)]
    assert any("unigram 7.50" in label for label in curves(loss))
    assert image.shape[1] < 1000 and image.std() > 0


def test_hellaswag_has_a_panel_beside_openais_score_where_there_are_scores(drawn):
    image, (_, accuracy) = drawn({"step": 0, "loss": 1.0}, {"step": 250, "hellaswag_nanogpt_acc_norm": 0.25})
    assert (250, 0.25) in curves(accuracy)["this run"]
    assert any("OpenAI GPT-2 124M 0.2955" in label for label in curves(accuracy))
    assert image.shape[1] > 1000


def test_a_log_without_losses_is_drawn_too(drawn):
    image, _ = drawn()
    assert image.shape[2] in (3, 4)


@pytest.mark.parametrize("value", ["low", [1], {}, None])
def test_values_that_are_no_numbers_are_left_out_of_the_picture(drawn, value):
    record = {"step": 0, "loss": value, "unigram_loss": value, "hellaswag_nanogpt_acc_norm": value}
    _, axes = drawn(record, {"step": 1, "loss": 2.0})
    assert curves(axes[0])["train"] == [(1, 2.0)] and len(axes) == 1


def test_plot_refuses_a_directory_without_a_run_and_leaves_no_file(tmp_path):
    with pytest.raises(DataError, match="log holds no run"):
        plot.main([])
    assert not list(tmp_path.iterdir())


def test_the_script_draws_the_run_it_is_given_and_prints_the_pictures_path(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text('{"step": 0}\n')
    plot.main(["--out_dir", "run"])
    assert capsys.readouterr().out.strip() == "run/loss.png"
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_notebooks_backend_that_is_not_installed_is_no_matter(tmp_path):
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "log.jsonl").write_text('{"step": 0}\n')
    env = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    subprocess.run([sys.executable, plot.__file__], cwd=tmp_path, env=env, check=True)
    assert (tmp_path / "log" / "loss.png").exists()


# ---- long runs -------------------------------------------------------------------------------------------------------


def noisy_run(steps):
    """The losses of a run that falls from 11 to 3, with noise; a token is 1/1000 of a step."""
    noise = np.random.default_rng(0).normal(0, 0.05, steps + 1)
    return [{"step": s, "loss": 3 + 8 * 0.99**s + noise[s], "position": 1000 * s} for s in range(1, steps + 1)]


def test_the_training_loss_is_smoothed_without_lag_and_its_raw_points_lie_below(drawn):
    records = noisy_run(2000)
    _, (axes,) = drawn(*records)
    raw, line = axes.lines
    assert list(raw.get_ydata()) == [record["loss"] for record in records] and raw.get_zorder() < line.get_zorder()
    falling = 3 + 8 * 0.99 ** np.arange(1, 2001)
    assert np.abs(raw.get_ydata() - falling).max() > 0.15 > np.abs(line.get_ydata() - falling).max()


def test_the_first_fall_leaves_room_for_the_rest_and_a_later_rise_is_shown(drawn):
    records = noisy_run(2000)
    _, (axes,) = drawn(*records)
    assert axes.get_ylim()[1] < 8
    for record in records[1500:]:
        record["loss"] = 9.0
    _, (*_, axes) = drawn(*records)
    assert axes.get_ylim()[1] >= 9


def test_tokens_are_a_second_axis_true_to_a_batch_that_grows(drawn):
    positions = [(1, 10**6), (2, 2 * 10**6), (3, 6 * 10**6), (4, 10**7)]
    _, (axes,) = drawn(*({"step": step, "loss": 2.0, "position": position} for step, position in positions))
    (top,) = axes.child_axes
    assert top.get_xlabel() == "million tokens"
    ticks = dict(zip((label.get_text() for label in top.get_xticklabels()), top.get_xticks(), strict=True))
    assert ticks == {"0": 0, "2": 2, "4": 2.5, "6": 3, "8": 3.5, "10": 4}


# ---- others' runs ----------------------------------------------------------------------------------------------------


def band(axes, step):
    """The lowest and the highest loss of the band at a step."""
    (collection,) = axes.collections
    heights = [y for x, y in collection.get_paths()[0].vertices if x == step]
    return min(heights), max(heights)


def test_the_reproduction_has_others_runs_beside_it_as_a_band_as_far_as_it_has_come(drawn):
    _, panels = drawn({"step": 0, "reference": True}, {"step": 1000, "loss": 4.1})
    for axes, score in zip(panels, SCORES, strict=True):
        others = bands(score)[1000]
        assert band(axes, 1000) == pytest.approx((others.mean - others.limit, others.mean + others.limit))
        assert axes.collections[0].get_paths()[0].vertices[:, 0].max() == 1000
        assert any("others" in text.get_text() for text in axes.get_legend().get_texts())


@pytest.mark.parametrize("record", [{}, {"reference": False}, {"reference": None}])
def test_other_runs_have_no_band_and_no_empty_panel(drawn, record):
    _, (axes,) = drawn({"step": 0, "processes": 1} | record, {"step": 1000, "loss": 4.1})
    assert not axes.collections


def test_the_picture_of_the_reference_alone_can_be_drawn(drawn):
    image, panels = drawn({"step": 19_073, "position": 19_073 * 2**19, "reference": True})
    assert band(panels[0], 19_073)[0] > 3 and image.std() > 0
