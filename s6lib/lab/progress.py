"""How far a study is, read from its run folders: live bars in a terminal or a notebook, plain lines in a pipe."""

import csv
import itertools
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tqdm.auto import tqdm

NOT_BEGUN = (-1, 0.0)


class Change(NamedTuple):
    """A run has come from one epoch to another; epoch 0 means begun, and the accuracy is then 0."""

    label: str
    before: int
    epoch: int
    accuracy: float


@contextmanager
def progress(histories: dict[str, Path], epochs: dict[str, int]) -> Iterator[None]:
    """While the block lasts, show how runs get on: for each label, the history.csv that grows, and its epochs in all.

    Nothing is asked of the workers: what it shows is the files that they write when an epoch ends.
    Where there is no stderr, as in a program without a console, it shows nothing.
    """
    if sys.stderr is None:
        yield
        return
    finished = threading.Event()
    seen = {label: _last_epoch(path) for label, path in histories.items()}
    done = sum(max(0, epoch) for epoch, _ in seen.values())
    watcher = threading.Thread(
        target=_show_bars if sys.stderr.isatty() or _in_notebook() else _show_lines,
        args=(_changes(histories, seen, epochs, finished), done, epochs),
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


def _last_epoch(history: Path) -> tuple[int, float]:
    """Number and accuracy of the last epoch in a history; NOT_BEGUN if there is none to read."""
    try:
        rows = list(csv.DictReader(history.read_text().splitlines()))
        return (int(rows[-1]["epoch"]), float(rows[-1]["val_accuracy"])) if rows else (0, 0.0)
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        return NOT_BEGUN


def _changes(
    histories: dict[str, Path], seen: dict[str, tuple[int, float]], epochs: dict[str, int], finished: threading.Event
) -> Iterator[list[Change]]:
    """Twice a second, and once more when all is finished, what has changed since."""
    while True:
        last = finished.wait(0.5)
        changes = []
        for label, path in histories.items():
            before, _ = seen[label]
            if before < epochs[label] and (now := _last_epoch(path)) not in (seen[label], NOT_BEGUN):
                seen[label] = now
                changes.append(Change(label, max(0, before), *now))
        yield changes
        if last:
            return


def _show_bars(updates: Iterator[list[Change]], done: int, epochs: dict[str, int]) -> None:
    bars: dict[str, tqdm] = {}
    with tqdm(total=sum(epochs.values()), initial=done, desc="all runs", unit="epoch") as overall:
        for changes in updates:
            for label, before, epoch, accuracy in changes:
                if label not in bars:
                    bars[label] = tqdm(total=epochs[label], initial=before, desc=label, unit="epoch", leave=False)
                bars[label].set_postfix_str(f"accuracy {accuracy:.2%}" if epoch else "", refresh=False)
                bars[label].update(epoch - before)
                overall.update(epoch - before)
                if epoch == epochs[label]:
                    bars[label].close()
            overall.refresh()  # the time left goes on between epochs
        for bar in bars.values():
            bar.close()


def _show_lines(updates: Iterator[list[Change]], done: int, epochs: dict[str, int]) -> None:
    begun, done_before, total = time.monotonic(), done, sum(epochs.values())
    for label, before, epoch, accuracy in itertools.chain.from_iterable(updates):
        done += epoch - before
        if not epoch:
            continue
        seconds = (time.monotonic() - begun) / max(1, done - done_before) * (total - done)
        line = f"{label}: epoch {epoch}/{epochs[label]}, accuracy {accuracy:.2%}"
        left = f"{done}/{total} epochs, {tqdm.format_interval(seconds)} left"
        print(f"{line}; {left}", file=sys.stderr, flush=True)
