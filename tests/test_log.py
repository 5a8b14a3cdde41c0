"""The log holds whole lines, whatever the disk does; trackers and pictures never cost a run."""

import importlib.util
import json
import math
import resource
import shutil
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import tiny_config

import plot
import train_gpt2
from common.log import Clock, Log, Tracker, read_log
from common.script import DataError, UsageError

NO_TRACKER = Tracker("none", None, {})


def open_log(directory, step=0, redo=(), enabled=True, tracker=NO_TRACKER):
    log = Log(directory, tracker, comparison=None, clock=Clock(), enabled=enabled)
    log.start(step, redo, processes=1)
    return log


def write_steps(log, steps):
    """What a run writes: a validation at each even step, a training loss at each step but the first."""
    for step in steps:
        if step > 0:
            log.write(f"step {step}", step=step, loss=10.0 - step)
        if step % 2 == 0:
            log.write(f"step {step}", step=step, val_loss=20.0 - step)


def values(directory, key):
    return {record["step"]: record[key] for record in read_log(directory) if key in record}


# ---- writing and reading ---------------------------------------------------------------------------------------------


def test_a_log_begins_with_the_process_group_and_gives_back_what_was_written(tmp_path):
    log = open_log(tmp_path)
    log.write("step 1", step=1, loss=0.1 + 0.2, batch="ab")
    start, written = read_log(tmp_path)
    assert start["step"] == 0 and start["processes"] == 1
    assert written == {"step": 1, "loss": 0.1 + 0.2, "batch": "ab"}
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == read_log(tmp_path)


def test_the_terminal_shows_the_text(tmp_path, capsys):
    open_log(tmp_path).write("step 1 | loss 3.0", step=1, loss=3.0)
    assert capsys.readouterr().out == "step 1 | loss 3.0\n"


def test_where_the_time_went_is_shown_with_its_sum_and_logged(tmp_path, capsys, monkeypatch):
    log = open_log(tmp_path)
    monkeypatch.setattr(log.clock, "seconds", lambda: {"other": 1.25, "steps": 2.0})
    log.write_seconds(7, finished=True)
    assert capsys.readouterr().out == "step     7 | 3.2 s in all: other 1.2 s, steps 2.0 s\n"
    assert read_log(tmp_path)[-1] == {"step": 7, "sent": 8, "seconds": {"other": 1.25, "steps": 2.0}}


def test_a_log_that_is_not_enabled_writes_and_prints_nothing(tmp_path, capsys):
    log = open_log(tmp_path, enabled=False)
    write_steps(log, range(4))
    log.flush()
    log.attempt(plot.draw, tmp_path)
    log.close(finished=True)
    assert not list(tmp_path.iterdir()) and capsys.readouterr() == ("", "")


def test_numbers_that_are_not_finite_are_null(tmp_path):
    open_log(tmp_path).write("", step=1, loss=math.nan, norm=math.inf, lr=0.1)
    assert read_log(tmp_path)[1:] == [{"step": 1, "loss": None, "norm": None, "lr": 0.1}]
    assert plot.draw(tmp_path).exists()


def test_a_last_line_that_was_cut_off_is_passed_over(tmp_path):
    write_steps(open_log(tmp_path), range(4))
    whole = read_log(tmp_path)
    path = tmp_path / "log.jsonl"
    content = path.read_bytes()
    for length in range(len(content) - 20, len(content) - 1):
        path.write_bytes(content[:length])
        assert read_log(tmp_path) == whole[:-1]


@pytest.mark.parametrize(
    "line",
    [
        *('{"step": 2, "lo', "", "[]", "3", "null", '{"loss": 1.0}', "[" * 10**5),
        *(f'{{"step": {step}}}' for step in ('"2"', 1.5, "Infinity", "true", "[1]", -1, 10**30, 10**400, "9" * 5000)),
        *(f'{{"step": 2, "sent": {step}}}' for step in ('"2"', -1, 10**30)),
        *(f'{{"step": 2, "loss": {loss}}}' for loss in ("NaN", "-Infinity", "1e999", 10**400)),
    ],
    ids=lambda line: line[:30],
)
def test_a_damaged_line_is_refused_by_file_and_number(tmp_path, line):
    (tmp_path / "log.jsonl").write_text(f'{{"step": 0}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(DataError, match="log.jsonl, line 2"):
        read_log(tmp_path)


def test_bytes_that_are_no_text_are_a_damaged_line(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 0}\n\xff\xfe\n{"step": 3}\n')
    with pytest.raises(DataError, match="line 2"):
        read_log(tmp_path)


def test_a_hole_past_the_checkpoint_does_not_keep_a_run_from_resuming(tmp_path):
    write_steps(open_log(tmp_path), range(7))
    lines = (tmp_path / "log.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "log.jsonl").write_bytes(b"".join([*lines[:-3], b"\0" * 4096, *lines[-2:]]))
    before_it = [lines[0], b"\0" * 4096, *lines[2:]]
    open_log(tmp_path, step=4)
    assert values(tmp_path, "loss") == {step: 10.0 - step for step in (1, 2, 3, 4)}
    (tmp_path / "log.jsonl").write_bytes(b"".join(before_it))
    with pytest.raises(DataError, match="line 2, is damaged"):
        open_log(tmp_path, step=4)


@pytest.mark.parametrize("name", ["nowhere", "empty", "directory"])
def test_a_directory_without_a_log_is_refused_by_name(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "directory" / "log.jsonl").mkdir(parents=True)
    with pytest.raises(DataError, match=f"{name} holds no run"):
        read_log(tmp_path / name)


# ---- resuming --------------------------------------------------------------------------------------------------------


def test_on_resuming_lines_past_the_checkpoint_are_dropped(tmp_path):
    write_steps(open_log(tmp_path), range(7))
    open_log(tmp_path, step=4)
    assert values(tmp_path, "loss") == {step: 10.0 - step for step in (1, 2, 3, 4)}
    assert values(tmp_path, "val_loss") == {0: 20.0, 2: 18.0, 4: 16.0}


def test_an_evaluation_that_will_be_made_again_is_dropped_and_the_steps_own_loss_is_not(tmp_path):
    write_steps(open_log(tmp_path), range(7))
    open_log(tmp_path, step=4, redo=["val_"])
    assert values(tmp_path, "loss") == {step: 10.0 - step for step in (1, 2, 3, 4)}
    assert values(tmp_path, "val_loss") == {0: 20.0, 2: 18.0}


@pytest.mark.parametrize("redo", [[], ["val_"]])
def test_a_run_resumed_twice_has_each_line_once(tmp_path, redo):
    write_steps(open_log(tmp_path), range(7))
    for step in (4, 2):
        log = open_log(tmp_path, step, redo)
        write_steps(log, range(step + (not redo), 7))
        evaluated = [record["step"] for record in read_log(tmp_path) if "val_loss" in record]
        trained = [record["step"] for record in read_log(tmp_path) if "loss" in record]
        assert evaluated == [0, 2, 4, 6]
        assert sorted(set(trained)) == [1, 2, 3, 4, 5, 6]


def test_the_log_of_a_run_that_begins_anew_is_begun_anew(tmp_path):
    write_steps(open_log(tmp_path), range(7))
    open_log(tmp_path)
    assert len(read_log(tmp_path)) == 1


def test_a_line_that_was_cut_off_does_not_spoil_the_next_on_resuming(tmp_path):
    write_steps(open_log(tmp_path), range(5))
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    open_log(tmp_path, step=4).write("", step=5, loss=5.0)
    assert values(tmp_path, "loss")[5] == 5.0


# ---- a disk that does not take it ------------------------------------------------------------------------------------


def test_a_line_that_does_not_fit_on_the_disk_leaves_the_log_whole_and_is_warned_of_once(tmp_path, capsys):
    log = open_log(tmp_path)
    log.write("step 1", step=1, loss=1.0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size + 25, before[1]))
    try:
        for step in (2, 3):
            log.write(f"step {step}", step=step, loss=0.123456789)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    log.write("step 4", step=4, loss=1.0)
    assert list(values(tmp_path, "loss")) == [1, 4]
    printed = capsys.readouterr().out
    assert printed.count("cannot be written") == 1 and "training continues" in printed and "step 3" in printed


def test_a_picture_that_cannot_be_drawn_is_warned_of_once_and_left_out(tmp_path, capsys):
    log = open_log(tmp_path)
    (tmp_path / "loss.png").mkdir()
    log.attempt(plot.draw, tmp_path)
    log.attempt(plot.draw, tmp_path)
    assert capsys.readouterr().out.count("warning: ") == 1
    assert not list(tmp_path.glob(".*"))


def test_each_thing_that_begins_to_fail_is_warned_of_whatever_the_error(tmp_path, capsys):
    log, fails = open_log(tmp_path), True

    def draw(directory):
        if fails:
            raise ValueError("no such backend")

    for fails in (True, True, False, True):  # noqa: B007
        log.attempt(draw, tmp_path)
    log.path.unlink()
    log.path.mkdir()
    log.write("step 1", step=1, loss=1.0)
    printed = capsys.readouterr().out
    assert printed.count("no such backend; training continues") == 2 and printed.count("Is a directory") == 1


# ---- trackers --------------------------------------------------------------------------------------------------------


class Library:
    """A library as wandb or trackio, which find a run by id or name, or as wandb offline, which appends unseen.

    It `fails` at step 3.
    """

    __spec__ = "not None"

    def __init__(self, kind):
        self.kind, self.runs, self.settings, self.finished, self.fails = kind, {}, [], 0, False

    def init(self, **settings):
        assert settings["resume"] == "allow" and ("id" in settings) == (self.kind != "trackio")
        self.settings.append(settings)
        self.rows = self.runs.setdefault(settings.get("id", settings["name"]), [])
        following = 1 + self.rows[-1][0] if self.rows and self.kind != "wandb offline" else 0
        if self.kind == "trackio":
            return SimpleNamespace(_next_step=following)
        return SimpleNamespace(step=following, offline=self.kind == "wandb offline")

    def log(self, values, step):
        if self.fails and step == 3:
            raise RuntimeError("no connection")
        self.rows.append((step, values))

    def finish(self):
        self.finished += 1


@pytest.fixture(params=["wandb", "wandb offline", "trackio"])
def library(request, monkeypatch):
    library = Library(request.param)
    monkeypatch.setitem(sys.modules, request.param.split()[0], library)
    return library


def track(library, directory, step=0, redo=()):
    """The log of a run that is tracked, begun or resumed at a step."""
    tracker = Tracker(library.kind.split()[0], directory, {"max_steps": 6})
    return open_log(directory, step, redo, tracker=tracker)


def assert_tracked(library, directory):
    """The tracker has one run, with what the log says of each step, in a row each."""
    (rows,) = library.runs.values()
    assert [step for step, _ in rows] == sorted({record["step"] for record in read_log(directory)})
    for key in ("loss", "val_loss"):
        assert {step: row[key] for step, row in rows if key in row} == values(directory, key)


def test_a_tracker_gets_the_settings_and_the_numbers_of_each_step(tmp_path, library):
    (tmp_path / "run").mkdir()
    log = track(library, tmp_path / "run")
    assert library.settings[0]["name"].startswith("run-") and library.settings[0]["config"] == {"max_steps": 6}
    log.write("", step=1, loss=2.0, mfu=None, norm=math.nan, batch="abc")
    log.write("", step=1, val_loss=3.0)
    log.close(finished=True)
    assert library.rows == [(0, {"processes": 1}), (1, {"loss": 2.0, "val_loss": 3.0})] and library.finished == 1


@pytest.mark.parametrize("redo", [[], ["val_"]])
@pytest.mark.parametrize("lost", [0, 1, 4])
def test_a_run_that_is_killed_and_resumed_is_one_run_with_each_step_once(tmp_path, library, lost, redo):
    write_steps(track(library, tmp_path), range(8))
    if library.kind != "wandb offline":  # which cannot know what it has lost
        del library.rows[len(library.rows) - lost :]
    write_steps(track(library, tmp_path, 4, redo), range(4 + (not redo), 7))
    log = track(library, tmp_path, 6)
    write_steps(log, range(7, 11))
    log.close(finished=True)
    assert_tracked(library, tmp_path)
    assert list(values(tmp_path, "loss")) == list(range(1, 11)) and list(values(tmp_path, "val_loss")) == [
        0,
        2,
        4,
        6,
        8,
        10,
    ]


def test_the_evaluation_that_a_stopped_run_makes_up_for_is_tracked(tmp_path, library):
    log = track(library, tmp_path)
    write_steps(log, range(4))
    log.write("", step=4, loss=6.0)
    log.close(finished=False)
    log = track(library, tmp_path, 4, redo=["val_"])
    log.write("", step=4, val_loss=16.0)
    log.close(finished=True)
    assert_tracked(library, tmp_path)
    assert library.rows[-1][1]["val_loss"] == 16.0


def test_a_finished_run_that_is_prolonged_is_tracked_with_each_step_once(tmp_path, library):
    log = track(library, tmp_path)
    write_steps(log, range(4))
    log.write_seconds(3, finished=True)
    log.close(finished=True)
    log = track(library, tmp_path, 3)
    write_steps(log, [4])
    log.close(finished=True)
    assert_tracked(library, tmp_path)


def test_a_copy_and_a_new_run_of_the_same_name_are_runs_of_their_own(tmp_path, library):
    for directory in (tmp_path / "first" / "log", tmp_path / "second" / "log"):
        directory.mkdir(parents=True)
        write_steps(track(library, directory), range(3))
    copy = shutil.copytree(directory, tmp_path / "copy")
    track(library, copy, 2).close(finished=True)
    assert len(library.runs) == 3
    assert library.kind == "wandb offline" or [step for step, _ in library.rows] == [0, 1, 2]


def test_a_tracker_that_is_added_on_resuming_gets_the_whole_log_unless_offline(tmp_path, library):
    write_steps(open_log(tmp_path), range(5))
    track(library, tmp_path, 4).close(finished=True)
    assert [step for step, _ in library.rows] == ([4] if library.kind == "wandb offline" else [0, 1, 2, 3, 4])


def test_a_tracker_that_fails_says_so_once_and_is_left_out_from_then_on(tmp_path, library, capsys):
    library.fails = True
    log = track(library, tmp_path)
    write_steps(log, range(6))
    log.close(finished=True)
    assert [step for step, _ in library.rows] == [0, 1, 2] and library.finished == 0
    assert list(values(tmp_path, "loss")) == [1, 2, 3, 4, 5]
    warning = f"--tracker {library.kind.split()[0]} is disabled from here on: RuntimeError('no connection')"
    assert capsys.readouterr().out.count(warning) == 1


def test_a_tracker_that_does_not_open_is_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    write_steps(open_log(tmp_path, tracker=Tracker("wandb", tmp_path, {})), range(6))
    assert list(values(tmp_path, "loss")) == [1, 2, 3, 4, 5]
    assert capsys.readouterr().out.count("--tracker wandb is disabled from here on") == 1


@pytest.mark.usefixtures("small_debug")
def test_a_training_run_that_is_killed_and_resumed_is_one_run_with_each_step_once(
    tmp_path, make_shards, library, monkeypatch
):
    make_shards(tokens=6000)
    config = tiny_config(max_steps=8, save_every=2, tracker=library.kind.split()[0])

    def kill(trainer):
        if trainer.state.step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_gpt2, "stop_if_diverged", kill)
        train_gpt2.train(config)
    train_gpt2.train(replace(config, resume=True))
    assert_tracked(library, tmp_path / "log")
    assert list(values(tmp_path / "log", "loss")) == list(range(1, 9))


def test_tensorboard_shows_the_whole_log_and_not_what_was_past_the_checkpoint(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write_steps(open_log(tmp_path), range(3))  # without it
    for start, steps in ((2, range(3, 7)), (4, range(5, 6))):
        log = open_log(tmp_path, start, tracker=Tracker("tensorboard", tmp_path, {"seed": 1}))
        write_steps(log, steps)
        log.close(finished=True)
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    for key in ("loss", "val_loss"):
        shown = [(event.step, event.value) for event in events.Scalars(key)]
        assert shown == [(step, pytest.approx(value)) for step, value in values(tmp_path, key).items()]
    assert list(values(tmp_path, "loss")) == [1, 2, 3, 4, 5]


def test_a_tracker_that_is_not_installed_is_refused_before_the_run(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "trackio" else find(name))
    with pytest.raises(UsageError, match="--tracker trackio is not installed"):
        train_gpt2.train(tiny_config(tracker="trackio"))


def test_the_clocks_parts_sum_to_all_time(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock = Clock()
    now += 1
    with clock.measure("steps"):
        now += 2
    now += 4
    with clock.measure("saving"):
        now += 8
    with pytest.raises(KeyError), clock.measure("steps"):
        now += 16
        raise KeyError
    now += 32
    assert clock.seconds() == {"other": 37.0, "steps": 18.0, "saving": 8.0}
