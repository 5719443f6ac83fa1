import re
from pathlib import Path

import pytest

import s6lib.lab.progress
from s6lib.lab.progress import progress
from s6lib.lab.run import COLUMNS


def write(path: Path, *accuracies: float) -> None:
    other = ",0" * (len(COLUMNS) - 2)
    header = ["epoch", "val_accuracy", *(name for name in COLUMNS if name not in ("epoch", "val_accuracy"))]
    rows = [f"{epoch},{accuracy}{other}" for epoch, accuracy in enumerate(accuracies, 1)]
    path.write_text("\n".join([",".join(header), *rows]) + "\n")


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
    assert re.fullmatch(
        r"GBN, seed 1: epoch 4/4, accuracy 99.44%; 4/12 epochs, \d\d:\d\d left\n"
        r"GBN, seed 2: epoch 1/4, accuracy 97.00%; 5/12 epochs, \d\d:\d\d left\n",
        capsys.readouterr().err,
    )


def test_a_run_that_fell_back_is_counted_as_it_is(histories, capsys):
    """As when a checkpoint is damaged: with nothing gained, the time left is unknown, and not negative."""
    write(histories["GBN, seed 1"], 0.98, 0.985)
    with progress(histories, dict.fromkeys(histories, 4)):
        write(histories["GBN, seed 1"], 0.98)
    assert capsys.readouterr().err == "GBN, seed 1: epoch 1/4, accuracy 98.00%; 1/12 epochs, ? left\n"


def test_one_bar_in_a_terminal_moves_before_an_epoch_ends(histories, capsys, monkeypatch):
    monkeypatch.setattr(s6lib.lab.progress.sys.stderr, "isatty", lambda: True, raising=False)
    with progress(histories, dict.fromkeys(histories, 4)):
        pass
    bars = [bar for bar in capsys.readouterr().err.split("\r") if bar.strip()]
    assert len(bars) >= 3  # as it begins, half a second later or at the end, and as it closes
    assert all(re.search(r"all runs: .* 1/12 \[\d\d:\d\d<\?", bar) for bar in bars)
    with progress(histories, dict.fromkeys(histories, 4)):
        write(histories["GBN, seed 1"], 0.98, 0.985, 0.99, 0.9944)
    printed = capsys.readouterr().err
    assert re.search(r"all runs: .* 4/12 .*GBN, seed 1: epoch 4/4, accuracy 99.44%", printed)
    assert printed.count("\n") == 1


def test_it_ends_with_an_error_in_the_block(histories):
    with pytest.raises(KeyboardInterrupt), progress(histories, dict.fromkeys(histories, 4)):
        raise KeyboardInterrupt


@pytest.mark.parametrize("why", ["no console", "TQDM_DISABLE"])
def test_where_nothing_is_to_be_shown_the_block_runs(histories, capsys, monkeypatch, why):
    """Under pythonw, sys.stderr is None; in a notebook, tqdm would show its bar in spite of TQDM_DISABLE."""
    if why == "no console":
        monkeypatch.setattr(s6lib.lab.progress.sys, "stderr", None)
    else:
        monkeypatch.setenv("TQDM_DISABLE", "1")
    with progress(histories, dict.fromkeys(histories, 4)):
        write(histories["GBN, seed 1"], 0.98, 0.985)
    assert capsys.readouterr().err == ""
