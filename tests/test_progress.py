import re
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

import s6lib.lab.progress
from s6lib.lab.progress import Change, _show_bars, _show_lines, progress
from s6lib.lab.run import COLUMNS


def write(path: Path, *accuracies: float) -> None:
    rows = [f"{epoch},0,0,0,0,0,{accuracy},0" for epoch, accuracy in enumerate(accuracies, 1)]
    path.write_text("\n".join([",".join(COLUMNS), *rows]) + "\n")


@pytest.fixture
def histories(tmp_path):
    """Three runs of four epochs: one stopped after its first epoch, two not begun."""
    paths = {f"GBN, seed {seed}": tmp_path / f"{seed}.csv" for seed in (1, 2, 3)}
    write(paths["GBN, seed 1"], 0.98)
    return paths


def test_lines_in_a_pipe(histories, capsys):
    with progress(histories, dict.fromkeys(histories, 4)):
        write(histories["GBN, seed 1"], 0.98, 0.985, 0.99, 0.9944)
        write(histories["GBN, seed 2"])
    with progress(histories, dict.fromkeys(histories, 4)):
        write(histories["GBN, seed 2"], 0.97)
    printed = capsys.readouterr().err
    assert re.fullmatch(
        r"GBN, seed 1: epoch 4/4, accuracy 99.44%; 4/12 epochs, \d\d:\d\d left\n"
        r"GBN, seed 2: epoch 1/4, accuracy 97.00%; 5/12 epochs, \d\d:\d\d left\n",
        printed,
    )


def test_the_count_of_epochs_follows_a_run_that_fell_back(capsys):
    """From epoch 2 to the one before, as when a checkpoint is damaged, and to none, as when it is deleted."""
    falls = [[Change("GBN", before, epoch, 0.98)] for before, epoch in pairwise((2, 1, 2, 0, 1))]
    _show_lines(iter(falls), done=2, epochs={"GBN": 4})
    lines = capsys.readouterr().err.splitlines()
    assert [re.search(r"(\d)/4 epochs, \d\d:\d\d left", line)[1] for line in lines] == ["1", "2", "1"]


def test_bars_in_a_terminal(histories, capsys, monkeypatch):
    monkeypatch.setattr(s6lib.lab.progress.sys.stderr, "isatty", lambda: True, raising=False)
    with progress(histories, dict.fromkeys(histories, 4)):
        write(histories["GBN, seed 1"], 0.98, 0.985, 0.99, 0.9944)
        write(histories["GBN, seed 3"])
    printed = capsys.readouterr().err
    assert "all runs" in printed
    assert "4/12" in printed
    assert "GBN, seed 3" in printed
    assert "GBN, seed 2" not in printed


def test_nothing_to_do_prints_no_line(capsys):
    with progress({}, {}):
        pass
    assert capsys.readouterr().err == ""


def test_it_ends_with_an_error_in_the_block(histories):
    with pytest.raises(KeyboardInterrupt), progress(histories, dict.fromkeys(histories, 4)):
        raise KeyboardInterrupt


def test_without_a_console_it_shows_nothing_and_the_block_runs(histories, monkeypatch):
    """As under pythonw, where sys.stderr is None."""
    monkeypatch.setattr(s6lib.lab.progress.sys, "stderr", None)
    ran = []
    with progress(histories, dict.fromkeys(histories, 4)):
        ran.append(True)
    assert ran


def test_it_shows_nothing_where_tqdm_is_told_to(histories, capsys, monkeypatch):
    """In a notebook, tqdm would show its bars all the same."""
    monkeypatch.setenv("TQDM_DISABLE", "1")
    with progress(histories, dict.fromkeys(histories, 4)):
        write(histories["GBN, seed 1"], 0.98, 0.985)
    assert capsys.readouterr().err == ""


BEGUN = [Change("GBN", 0, 0, 0.0), Change("BN", 2, 2, 0.98)]  # one anew, one where it was stopped


def at(times: dict[float, list[Change]], monkeypatch) -> Iterator[list[Change]]:
    """The changes, with the clock set to their times."""
    for seconds, changes in times.items():
        monkeypatch.setattr(s6lib.lab.progress.time, "monotonic", lambda seconds=seconds: seconds)
        yield changes


def test_bars_have_an_estimate_before_the_first_epoch_ends(capsys, monkeypatch):
    """Two runs side by side, 18 epochs to go: nine rounds, of which one has taken as long as was waited."""
    ended = [Change("GBN", 0, 1, 0.97)]
    updates = at({5: BEGUN, 20: [], 35: ended, 36: []}, monkeypatch)
    _show_bars(updates, done=2, epochs={"GBN": 10, "BN": 10})
    shown = capsys.readouterr().err.replace("\n", "\r").split("\r")
    bounds = [found[1] for line in shown if (found := re.search(r"all runs.*more than (\d\d:\d\d) left", line))]
    assert bounds == ["02:00"]
    assert "3/20" in [line for line in shown if "all runs" in line][-1]


def test_lines_have_an_estimate_before_the_first_epoch_ends(capsys, monkeypatch):
    ended = [Change("GBN", 0, 1, 0.97)]
    monkeypatch.setattr(s6lib.lab.progress.time, "monotonic", lambda: 0)
    updates = at({5: BEGUN, 20: [], 35: [], 36: [], 65: [], 66: ended, 300: []}, monkeypatch)
    _show_lines(updates, done=2, epochs={"GBN": 10, "BN": 10})
    assert capsys.readouterr().err.splitlines() == [
        "no epoch has ended yet; more than 04:00 left",
        "no epoch has ended yet; more than 08:00 left",
        "GBN: epoch 1/10, accuracy 97.00%; 3/20 epochs, 18:42 left",
    ]


def test_a_run_that_goes_on_counts_as_one_at_work(histories, capsys, monkeypatch):
    """Its history.csv is written again when it goes on, with the rows that it had."""
    monkeypatch.setattr(s6lib.lab.progress.sys.stderr, "isatty", lambda: True, raising=False)
    with progress(histories, dict.fromkeys(histories, 4)):
        write(histories["GBN, seed 1"], 0.98)
        time.sleep(1.2)
    assert "GBN, seed 1:  25%" in capsys.readouterr().err
