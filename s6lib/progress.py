"""How far a study is, read from its run folders: live bars in a terminal or a notebook, plain lines in a pipe."""

import csv
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm.auto import tqdm

Change = tuple[str, int, float]  # a run's label, its last epoch (0 when it has just begun), its validation accuracy


@contextmanager
def progress(histories: dict[str, Path], epochs: int) -> Iterator[None]:
    """While the block lasts, show how runs of `epochs` epochs get on: a label each, and the history.csv that it grows.

    Nothing is asked of the workers: what it shows is the files that they write when an epoch ends.
    """
    finished = threading.Event()
    live = sys.stderr.isatty() or "ipykernel" in sys.modules
    before = sum(max(0, _last_epoch(path)[0]) for path in histories.values())
    watcher = threading.Thread(
        target=_show_bars if live else _show_lines,
        args=(_updates(histories, epochs, finished), before, epochs, len(histories)),
        daemon=True,
    )
    watcher.start()
    try:
        yield
    finally:
        finished.set()
        watcher.join()


def _last_epoch(history: Path) -> tuple[int, float]:
    """Number and validation accuracy of the last epoch in a history; epoch -1 for a run not begun."""
    if not history.exists():
        return -1, 0.0
    rows = list(csv.DictReader(history.read_text().splitlines()))
    return (int(rows[-1]["epoch"]), float(rows[-1]["val_accuracy"])) if rows else (0, 0.0)


def _updates(histories: dict[str, Path], epochs: int, finished: threading.Event) -> Iterator[list[Change]]:
    """Twice a second, and once more when all is finished, what has changed since."""
    seen = {label: _last_epoch(path) for label, path in histories.items()}
    while True:
        last = finished.wait(0.5)
        changes = []
        for label, path in histories.items():
            if seen[label][0] < epochs and (now := _last_epoch(path)) != seen[label]:
                seen[label] = now
                changes.append((label, *now))
        yield changes
        if last:
            return


def _show_bars(updates: Iterator[list[Change]], before: int, epochs: int, runs: int) -> None:
    bars: dict[str, tqdm] = {}
    with tqdm(total=runs * epochs, initial=before, desc="all runs", unit="epoch") as overall:
        for changes in updates:
            for label, epoch, accuracy in changes:
                if label not in bars:
                    bars[label] = tqdm(total=epochs, initial=max(0, epoch - 1), desc=label, unit="epoch", leave=False)
                bar = bars[label]
                steps = epoch - bar.n
                bar.set_postfix_str(f"validation accuracy {accuracy:.2%}" if epoch else "first epoch", refresh=False)
                bar.update(steps)
                overall.update(steps)
                if epoch == epochs:
                    bar.close()
            overall.refresh()  # the time left goes on between epochs
        for bar in bars.values():
            bar.close()


def _show_lines(updates: Iterator[list[Change]], before: int, epochs: int, runs: int) -> None:
    begun, total = time.monotonic(), runs * epochs
    done = before
    for changes in updates:
        for label, epoch, accuracy in changes:
            if not epoch:
                continue
            done += 1
            left = tqdm.format_interval((time.monotonic() - begun) / (done - before) * (total - done))
            line = f"{label}: epoch {epoch}/{epochs}, validation accuracy {accuracy:.2%}"
            print(f"{line}; {done}/{total} epochs, {left} left", file=sys.stderr, flush=True)
