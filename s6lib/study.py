"""The one loop over conditions and seeds, and a reader for the folder that it fills."""

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from functools import cached_property, partial
from numbers import Integral
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from filelock import FileLock, Timeout
from joblib import Parallel, cpu_count, delayed
from joblib.parallel import LokyBackend, SequentialBackend, get_active_backend
from torch import nn

from s6lib.conditions import ALL_CONDITIONS, CONDITIONS, PLAIN, RECIPES, Condition, Recipe, build_model
from s6lib.data import load_mnist
from s6lib.files import DamagedFile, is_complete, read_about, read_checkpoint, read_result
from s6lib.progress import progress
from s6lib.run import Run, RunError, save_run, train_run

POOLS = 4  # one worker may die by chance; who loses this many has too little memory
WORKERS_DIE = (
    "worker processes were killed again and again, {runs} runs are not finished: is memory short (a worker needs about "
    "1 GB)? Every finished epoch is kept: give the same command again, with fewer jobs"
)


class StudyError(Exception):
    """A request that cannot be met; the message says what was wrong and what to do."""


class RunsFailed(Exception):
    """Some runs of a study failed, each named in the message; the others are complete."""


def run_study(
    recipe: Recipe = PLAIN,
    conditions: Sequence[Condition] = CONDITIONS,
    seeds: Sequence[int] = (1,),
    out: str | Path = "runs",
    *,
    jobs: int | None = None,
    device: str = "auto",
    show_progress: bool = True,
) -> "Study":
    """Train every condition with every seed into `out`/<recipe>/<condition>/seed-<k>/, and open the result.

    Runs that are complete are not repeated, and those that were stopped go on from their last whole epoch. On a CPU
    `jobs` processes (by default and at most one a core) train side by side, each with one thread; on a GPU the runs
    take turns, if `jobs` does not say otherwise.

    Inside `joblib.parallel_config(backend="dask")` or `"ray"` the runs go to that cluster instead, `jobs` of them at a
    time (by default as many as it has workers). Its workers need s6lib and the digits, but no disk shared with this
    process, which writes the folder; so a run there has no checkpoint, and one that is lost starts again.

    Raises, before anything is trained, StudyError if a seed is not a whole number, two conditions share a name, the
    device is missing, `out` cannot be written, another study is at work in it, it holds runs of this recipe name
    trained otherwise, or a link in it leads elsewhere; MnistError if the digits are missing; DamagedFile if a finished
    run is damaged. Raises RunsFailed after all runs that could finish have.
    """
    seeds, conditions = _distinct(list(seeds), conditions)
    local = isinstance(get_active_backend()[0], LokyBackend | SequentialBackend)
    if local:
        device = _resolve_device(device)
        jobs = min(jobs or (cpu_count() if device == "cpu" else 1), cpu_count())
    with _only_study_in(Path(out)):
        runs = [(condition, seed) for seed in seeds for condition in conditions]
        _refuse_links(Path(out), [run_folder(out, recipe, *run) for run in runs])
        _refuse_other_training(out, recipe, conditions)
        if local:
            load_mnist()  # downloaded and unpacked once, before many processes ask for it
        waiting = [run for run in runs if not is_complete(run_folder(out, recipe, *run))]
        with _shown(out, recipe, waiting) if show_progress else nullcontext():
            failures = _train_runs(out, recipe, waiting, device, jobs or -1, local)
    if failures:
        raise RunsFailed("\n".join(failures))
    return Study(out, recipe.name)


def _distinct(seeds: Sequence[int], conditions: Sequence[Condition]) -> tuple[list[int], list[Condition]]:
    """Each seed and condition once. Raises StudyError for what would give a run no folder of its own."""
    for seed in seeds:
        if not isinstance(seed, Integral) or isinstance(seed, bool) or seed < 0:
            raise StudyError(f"a seed is a whole number from 0, not {seed!r}")
    distinct = list(dict.fromkeys(conditions))
    slugs = [condition.slug for condition in distinct]
    if len(set(slugs)) < len(slugs):
        raise StudyError(f"two different conditions share the name of a folder: {', '.join(slugs)}; rename one")
    return list(dict.fromkeys(int(seed) for seed in seeds)), distinct


def _train_runs(
    out: str | Path, recipe: Recipe, runs: list[tuple[Condition, int]], device: str, jobs: int, local: bool
) -> list[str]:
    """The loop: train each run, wherever joblib sends it, and save it when it comes back. Returns what failed."""
    follow = {"initializer": _follow, "initargs": (os.getpid(),)} if local else {}
    parallel = partial(Parallel, n_jobs=jobs, batch_size=1, return_as="generator_unordered", **follow)
    failures: list[str] = []
    waiting = list(runs)
    for pools_left in reversed(range(POOLS)):
        try:
            for condition, seed, run in parallel()(
                delayed(_try_run)(recipe, *run, device, run_folder(out, recipe, *run) if local else None)
                for run in tuple(waiting)
            ):
                waiting.remove((condition, seed))
                failures += _saved(run_folder(out, recipe, condition, seed), recipe, condition, seed, run)
            break
        except BrokenExecutor:  # a worker was killed, and joblib ended the others with it
            if pools_left:
                print("a worker process was killed; its runs go on in a new one", file=sys.stderr, flush=True)
            else:
                failures.append(WORKERS_DIE.format(runs=len(waiting)))
    return failures


def _saved(folder: Path, recipe: Recipe, condition: Condition, seed: int, run: Run | str) -> list[str]:
    """Save a run, and return the reasons why it failed, if it did."""
    if isinstance(run, str):
        return [run]
    try:
        save_run(folder, recipe, condition, seed, run)
    except OSError as error:
        return [_failure(condition, seed, error)]
    return []


def _shown(out: str | Path, recipe: Recipe, runs: list[tuple[Condition, int]]) -> AbstractContextManager[None]:
    histories = {f"{c.label}, seed {seed}": run_folder(out, recipe, c, seed) / "history.csv" for c, seed in runs}
    return progress(histories, recipe.epochs)


def run_folder(out: str | Path, recipe: Recipe, condition: Condition, seed: int) -> Path:
    """Where a run is kept."""
    return Path(out) / recipe.name / condition.slug / f"seed-{seed}"


def _try_run(
    recipe: Recipe, condition: Condition, seed: int, device: str, folder: Path | None
) -> tuple[Condition, int, Run | str]:
    """A run, or the reason why it failed: an exception would end the other runs too.

    It keeps its checkpoints in the folder. Without one it is on another machine, which has a device of its own.
    """
    try:
        return condition, seed, train_run(recipe, condition, seed, folder, _resolve_device(device))
    except RunError as error:
        return condition, seed, str(error)
    except Exception as error:
        return condition, seed, _failure(condition, seed, error)


def _failure(condition: Condition, seed: int, error: Exception) -> str:
    return f"{condition.label} ({condition.slug}), seed {seed}: {type(error).__name__}: {error}"


def _follow(driver: int) -> None:
    """From now on, in a worker process: leave Ctrl-C to the driver, and end when the driver is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == driver:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _resolve_device(device: str) -> str:
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return next(name for name in ("cuda", "mps", "cpu") if available[name])
    if not available.get(device):
        usable = ", ".join(name for name in available if available[name])
        raise StudyError(f"device {device!r} is not available here; use auto or one of: {usable}")
    return device


@contextmanager
def _only_study_in(out: Path) -> Iterator[None]:
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / ".lock").acquire(timeout=0)
    except Timeout:
        raise StudyError(f"another study is at work in {out}; wait until it ends or choose another folder") from None
    except OSError as error:
        raise StudyError(f"cannot write in {out} ({error.strerror}); choose another folder") from error
    with lock:
        yield


def _refuse_links(out: Path, folders: list[Path]) -> None:
    """Raise StudyError if a symbolic link under `out`, perhaps a stranger's, would have a run written elsewhere."""
    for folder in folders:
        if not folder.resolve().is_relative_to(out.resolve()):
            raise StudyError(f"{folder} leads out of {out}, to {folder.resolve()}; remove the link")


def _refuse_other_training(out: str | Path, recipe: Recipe, conditions: Sequence[Condition]) -> None:
    """Raise StudyError if a run under `out` was trained by other settings than those now asked for."""
    asked = {condition.slug: asdict(condition) for condition in conditions}
    for folder in sorted((Path(out) / recipe.name).glob("*/seed-*")):
        if is_complete(folder):
            run = _described(folder)
            about = {"recipe": asdict(run.recipe), "condition": asdict(run.condition)}
        elif (about := read_checkpoint(folder)) is None:
            continue
        wanted = {**asdict(recipe), **asked.get(folder.parent.name, about["condition"])}
        found = {**about["recipe"], **about["condition"]}
        different = [
            f"{name} = {found.get(name)!r}, not {wanted[name]!r}" for name in wanted if found.get(name) != wanted[name]
        ]
        if different:
            raise StudyError(f"{folder} was trained with {'; '.join(different)}; ask for that, or for another folder")


class _Described(NamedTuple):
    folder: Path
    recipe: Recipe
    condition: Condition
    seed: int


def _described(folder: Path) -> _Described:
    """What run.json says, if it is the run that the folder's name says; another's would be a damaged study."""
    about = read_about(folder)
    try:
        run = _Described(folder, Recipe(**about["recipe"]), Condition(**about["condition"]), about["seed"])
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedFile(f"{folder / 'run.json'} describes no run that this version knows: {error}") from error
    found = run.condition.slug, f"seed-{run.seed}"
    if found != (folder.parent.name, folder.name):
        raise DamagedFile(f"{folder} holds another run: {', '.join(found)}")
    return run


class Study:
    """The complete runs of one recipe in a folder, opened for reading.

    Args:
        folder: what `run_study` was given as `out`.
        recipe: name of the recipe.
        conditions, seeds: look at these alone; by default at all.

    Raises StudyError if there is no such run, or the runs are of different recipes; DamagedFile if a file is not what
    was written.
    """

    def __init__(
        self,
        folder: str | Path = "runs",
        recipe: str = PLAIN.name,
        conditions: Collection[Condition] | None = None,
        seeds: Collection[int] | None = None,
    ) -> None:
        if not re.fullmatch("[a-z0-9-]+", recipe):
            raise StudyError(f"{recipe!r} is not the name of a recipe; there are: {', '.join(RECIPES)}")
        runs = [_described(path.parent) for path in (Path(folder) / recipe).glob("*/seed-*/run.json")]
        runs = [run for run in runs if conditions is None or run.condition in conditions]
        runs = [run for run in runs if seeds is None or run.seed in seeds]
        if not runs:
            raise StudyError(f"no complete {recipe} run in {folder}; train some: python -m s6lib run --recipe {recipe}")
        for run in runs:
            if run.recipe != runs[0].recipe:
                raise StudyError(f"{run.folder} and {runs[0].folder} are not of one study: their recipes differ")
        order = list(dict.fromkeys([*ALL_CONDITIONS, *sorted(run.condition.slug for run in runs)]))
        runs.sort(key=lambda run: (order.index(run.condition.slug), run.seed))
        self.recipe = runs[0].recipe
        self.conditions = {run.condition.slug: run.condition for run in runs}
        self.folders = {(run.condition.slug, run.seed): run.folder for run in runs}

    @cached_property
    def history(self) -> pd.DataFrame:
        """A row an epoch of every run: condition, seed, and the columns of history.csv (accuracies from 0 to 1)."""
        tables = {run: pd.read_csv(read_result(folder, "history.csv")) for run, folder in self.folders.items()}
        return pd.concat(tables, names=["condition", "seed"]).reset_index(["condition", "seed"]).reset_index(drop=True)

    def summary(self) -> pd.DataFrame:
        """A row a run: last-epoch accuracy, the best epoch beside it, training accuracy and seconds.

        The last epoch is the result. The best one was chosen on the test images, and so flatters.
        """
        runs = self.history.groupby(["condition", "seed"], sort=False)
        last = runs.last()
        best = self.history.loc[runs["val_accuracy"].idxmax()].set_index(["condition", "seed"])
        table = pd.DataFrame(
            {
                "label": [self.conditions[slug].label for slug, _ in last.index],
                "accuracy": last["val_accuracy"],
                "loss": last["val_loss"],
                "best_accuracy": best["val_accuracy"],
                "best_epoch": best["epoch"],
                "train_accuracy": last["train_accuracy"],
                "seconds": runs["seconds"].sum(),
            }
        )
        return table.reset_index()

    def model(self, condition: str, seed: int = 1) -> nn.Module:
        """The saved model of a run, on the CPU, in evaluation mode."""
        path = self._folder(condition, seed) / "weights.pt"
        model = build_model(self.recipe, self.conditions[condition])
        content = read_result(path.parent, path.name)
        try:
            model.load_state_dict(torch.load(content, map_location="cpu", weights_only=True))
        except Exception as error:  # a dozen kinds, by what the file is instead
            raise DamagedFile(f"{path} is not a state_dict of {self.recipe.network}, and is not trusted") from error
        return model.eval()

    def predictions(self, condition: str, seed: int = 1) -> np.ndarray:
        """The saved class of each test image, uint8 (10000,)."""
        path = self._folder(condition, seed) / "predictions.npy"
        try:
            return np.load(read_result(path.parent, path.name), allow_pickle=False)
        except Exception as error:
            raise DamagedFile(f"{path} is not an array of numbers, and is not trusted") from error

    def _folder(self, condition: str, seed: int) -> Path:
        if (condition, seed) not in self.folders:
            known = ", ".join(f"{slug} {k}" for slug, k in self.folders)
            raise StudyError(f"no complete run of condition {condition!r}, seed {seed}; there are: {known}")
        return self.folders[condition, seed]
