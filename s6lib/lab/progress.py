"""Progress of a study, read from its run folders: live bars in a terminal or a notebook, plain lines in a pipe."""

import csv
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tqdm.auto import tqdm

FIRST_LINE = 30.0  # seconds without a finished epoch before a line gives a lower bound of the time left


class Snapshot(NamedTuple):
    """A history.csv when it was last read: its time of writing, and number and accuracy of its last epoch."""

    written: int
    epoch: int
    accuracy: float


NOT_BEGUN = Snapshot(0, -1, 0.0)


class Change(NamedTuple):
    """A run's step from one epoch to another; if the two are equal, it has just started or resumed."""

    label: str
    before: int
    epoch: int
    accuracy: float


@contextmanager
def progress(histories: dict[str, Path], epochs: dict[str, int]) -> Iterator[None]:
    """Show the progress of runs during a block, given each label's history.csv and total number of epochs.

    It reads the files that workers write when a run starts and an epoch ends; the workers do nothing else for it. It
    shows nothing without a stderr, as in a program without a console, or if TQDM_DISABLE is set, which tqdm itself
    ignores in a notebook.
    """
    if sys.stderr is None or os.environ.get("TQDM_DISABLE", "0") not in ("", "0"):
        yield
        return
    finished = threading.Event()
    snapshots = {label: _read(path) for label, path in histories.items()}
    done = sum(max(0, history.epoch) for history in snapshots.values())
    watcher = threading.Thread(
        target=_show_bars if sys.stderr.isatty() or _in_notebook() else _show_lines,
        args=(_changes(histories, snapshots, epochs, finished), done, epochs),
        daemon=True,
    )
    watcher.start()
    try:
        yield
    finally:
        finished.set()
        watcher.join()


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    return ipython is not None and ipython.get_ipython() is not None


def _read(history: Path) -> Snapshot:
    """Read the last epoch of a history.csv; return NOT_BEGUN if it cannot be read."""
    try:
        written, rows = history.stat().st_mtime_ns, list(csv.DictReader(history.read_text().splitlines()))
        last = (int(rows[-1]["epoch"]), float(rows[-1]["val_accuracy"])) if rows else (0, 0.0)
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        return NOT_BEGUN
    return Snapshot(written, *last)


def _changes(
    histories: dict[str, Path], snapshots: dict[str, Snapshot], epochs: dict[str, int], finished: threading.Event
) -> Iterator[list[Change]]:
    """Yield the changes twice a second, and once more at the end."""
    while True:
        last = finished.wait(0.5)
        changes = []
        for label, path in histories.items():
            before = snapshots[label].epoch
            if before < epochs[label] and (now := _read(path)) not in (snapshots[label], NOT_BEGUN):
                snapshots[label] = now
                changes.append(Change(label, max(0, before), now.epoch, now.accuracy))
        yield changes
        if last:
            return


class _FirstEpochs:
    """A lower bound of the time left until the first epoch ends.

    Each running run has trained for part of one epoch so far, so every epoch takes at least that long.
    """

    def __init__(self) -> None:
        self._running: set[str] = set()
        self._start = 0.0
        self.ended = False

    def see(self, changes: Iterable[Change]) -> None:
        for change in changes:
            if not self._running:
                self._start = time.monotonic()
            self._running.add(change.label)
            self.ended |= change.epoch > change.before

    @property
    def waited(self) -> float:
        """Seconds since the first run started; 0 before that, and once an epoch has ended."""
        return time.monotonic() - self._start if self._running and not self.ended else 0.0

    def time_left(self, epochs: int) -> str:
        """Describe the least time that this many epochs take; empty if it is unknown or below a second."""
        seconds = self.waited * (epochs / max(1, len(self._running)) - 1)
        return f"more than {tqdm.format_interval(seconds)} left" if seconds >= 1 else ""


def _show_bars(updates: Iterator[list[Change]], done: int, epochs: dict[str, int]) -> None:
    bars: dict[str, tqdm] = {}
    first = _FirstEpochs()
    # No smoothing, since parallel runs finish their epochs in bursts.
    with tqdm(total=sum(epochs.values()), initial=done, desc="all runs", unit="epoch", smoothing=0) as overall:
        for changes in updates:
            first.see(changes)
            for label, before, epoch, accuracy in changes:
                if label not in bars:
                    bars[label] = tqdm(total=epochs[label], initial=before, desc=label, unit="epoch", leave=False)
                bars[label].set_postfix_str(f"accuracy {accuracy:.2%}" if epoch else "", refresh=False)
                bars[label].update(epoch - before)
                overall.update(epoch - before)
                if epoch == epochs[label]:
                    bars[label].close()
            overall.set_postfix_str(first.time_left(overall.total - overall.n), refresh=False)
            overall.refresh()  # the time left changes between epochs too
        for bar in bars.values():
            bar.close()


def _show_lines(updates: Iterator[list[Change]], done: int, epochs: dict[str, int]) -> None:
    start, done_before, total = time.monotonic(), done, sum(epochs.values())
    first, next_line = _FirstEpochs(), FIRST_LINE
    for changes in updates:
        first.see(changes)
        if first.waited >= next_line:
            next_line *= 2
            _print_line(f"no epoch has ended yet; {first.time_left(total - done)}")
        for label, before, epoch, accuracy in changes:
            done += epoch - before
            if epoch == before or not epoch:
                continue
            seconds = (time.monotonic() - start) / max(1, done - done_before) * (total - done)
            line = f"{label}: epoch {epoch}/{epochs[label]}, accuracy {accuracy:.2%}"
            _print_line(f"{line}; {done}/{total} epochs, {tqdm.format_interval(seconds)} left")


def _print_line(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
