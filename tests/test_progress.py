import re
from dataclasses import replace

import pandas as pd
import pytest
from conftest import GBN, TINY

import s6lib.lab.progress
from s6lib.lab.progress import progress
from s6lib.lab.record import COLUMNS
from s6lib.recipes import Run

RUNS = [Run(replace(TINY, epochs=4), GBN, seed) for seed in (1, 2, 3)]


def write(out, seed, *accuracies):
    rows = [
        dict.fromkeys(COLUMNS, 0) | {"epoch": n, "val_accuracy": accuracy} for n, accuracy in enumerate(accuracies, 1)
    ]
    folder = RUNS[seed - 1].folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows, columns=COLUMNS).to_csv(folder / "history.csv", index=False)


@pytest.fixture
def out(tmp_path):
    """A folder with three runs of four epochs: one stopped after its first epoch, two not begun."""
    write(tmp_path, 1, 0.98)
    return tmp_path


def test_lines_in_a_pipe(out, capsys):
    with progress(RUNS, out):
        write(out, 1, 0.98, 0.985, 0.99, 0.9944)
        write(out, 2)
    with progress(RUNS, out):
        write(out, 2, 0.97)
    assert re.fullmatch(
        r"GBN \(gbn\), seed 1: epoch 4/4, accuracy 99.44%; 4/12 epochs, \d\d:\d\d left\n"
        r"GBN \(gbn\), seed 2: epoch 1/4, accuracy 97.00%; 5/12 epochs, \d\d:\d\d left\n",
        capsys.readouterr().err,
    )


def test_a_run_that_fell_back_is_counted_as_it_is(out, capsys):
    """As when a checkpoint is damaged: with nothing gained, the time left is unknown, and not negative."""
    write(out, 1, 0.98, 0.985)
    with progress(RUNS, out):
        write(out, 1, 0.98)
    assert capsys.readouterr().err == "GBN (gbn), seed 1: epoch 1/4, accuracy 98.00%; 1/12 epochs, ? left\n"


def test_one_bar_in_a_terminal_moves_before_an_epoch_ends(out, capsys, monkeypatch):
    monkeypatch.setattr(s6lib.lab.progress.sys.stderr, "isatty", lambda: True, raising=False)
    with progress(RUNS, out):
        pass
    bars = [bar for bar in capsys.readouterr().err.split("\r") if bar.strip()]
    assert len(bars) >= 3  # as it begins, half a second later or at the end, and as it closes
    assert all(re.search(r"all runs: .* 1/12 \[\d\d:\d\d<\?", bar) for bar in bars)
    with progress(RUNS, out):
        write(out, 1, 0.98, 0.985, 0.99, 0.9944)
    printed = capsys.readouterr().err
    assert re.search(r"all runs: .* 4/12 .*GBN \(gbn\), seed 1: epoch 4/4, accuracy 99.44%", printed)
    assert printed.count("\n") == 1


@pytest.mark.parametrize("why", ["no console", "TQDM_DISABLE"])
def test_where_nothing_is_to_be_shown_the_block_runs(out, capsys, monkeypatch, why):
    """Under pythonw, sys.stderr is None; in a notebook, tqdm would show its bar in spite of TQDM_DISABLE."""
    if why == "no console":
        monkeypatch.setattr(s6lib.lab.progress.sys, "stderr", None)
    else:
        monkeypatch.setenv("TQDM_DISABLE", "1")
    with progress(RUNS, out):
        write(out, 1, 0.98, 0.985)
    assert capsys.readouterr().err == ""
