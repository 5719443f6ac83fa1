"""Progress of a study, read from its run folders: a live bar in a terminal or a notebook, plain lines in a pipe."""

import csv
import io
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm.auto import tqdm

from s6lib.recipes import Run


@contextmanager
def progress(runs: list[Run], out: Path) -> Iterator[None]:
    """Show the progress of runs during a block.

    It reads the files that workers write in `out` when an epoch ends; the workers do nothing else for it. It shows
    nothing without a stderr, as in a program without a console, or if TQDM_DISABLE is set, which tqdm itself ignores in
    a notebook.
    """
    if sys.stderr is None or os.environ.get("TQDM_DISABLE", "0") not in ("", "0"):
        yield
        return
    finished, ended = threading.Event(), [_read(run.folder(out))[0] for run in runs]
    watcher = threading.Thread(target=_watch, args=(runs, out, ended, finished), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        finished.set()
        watcher.join()


def _watch(runs: list[Run], out: Path, ended: list[int], end: threading.Event) -> None:
    """Look for new epochs twice a second, and once more at the end."""
    ipython = sys.modules.get("IPython")
    live = sys.stderr.isatty() or (ipython is not None and ipython.get_ipython() is not None)
    file, line = (sys.stderr, None) if live else (io.StringIO(), "; {n}/{total} epochs, {remaining} left")
    # No smoothing, since parallel runs finish their epochs in bursts.
    settings = {"unit": "epoch", "smoothing": 0, "file": file, "bar_format": line, "disable": False}
    with tqdm(desc="all runs", total=sum(run.settings.epochs for run in runs), initial=sum(ended), **settings) as bar:
        last = False
        while not last:
            last = end.wait(0.5)
            for number, run in enumerate(runs):
                epoch, accuracy = _read(run.folder(out))
                if epoch == ended[number]:
                    continue
                bar.update(epoch - ended[number])
                bar.initial = min(bar.initial, bar.n)  # a run goes back if its checkpoint was damaged
                ended[number] = epoch
                news = f"{run}: epoch {epoch}/{run.settings.epochs}, accuracy {accuracy:.2%}"
                if live:
                    bar.set_postfix_str(news, refresh=False)
                elif epoch:
                    print(f"{news}{bar}", file=sys.stderr, flush=True)
            bar.refresh()  # the clock goes on before an epoch ends


def _read(folder: Path) -> tuple[int, float]:
    """Return the last epoch in a run's history.csv and its accuracy; zeros if there is none."""
    try:
        last = list(csv.DictReader((folder / "history.csv").read_text().splitlines()))[-1]
        return int(last["epoch"]), float(last["val_accuracy"])
    except (OSError, ValueError, LookupError, TypeError, csv.Error):
        return 0, 0.0
