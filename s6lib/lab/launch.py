"""run_study, the one loop over conditions and seeds."""

import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager, nullcontext
from itertools import combinations
from numbers import Integral
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from filelock import FileLock, Timeout

from s6lib.errors import RunsFailed, Stopped, StudyError
from s6lib.lab.files import is_complete, read_about, read_checkpoint
from s6lib.lab.progress import progress
from s6lib.lab.record import (
    DIFFERENT_TRAINING,
    differences,
    read_condition,
    run_folders,
    settings_of,
)
from s6lib.lab.run import save_run
from s6lib.lab.trial import first_steps
from s6lib.lab.workers import JobSettings, Outcome, resolve_device, train_here, train_with
from s6lib.recipes import ALL_CONDITIONS, CONDITIONS, PLAIN, RECIPES, Condition, Recipe, Run, forget_images, load_images
from s6lib.study import Study


def run_study(
    recipe: Recipe | str = PLAIN,
    conditions: Iterable[Condition | str] | Condition | str = CONDITIONS,
    seeds: int | Iterable[int] = (1,),
    out: str | Path = "runs",
    *,
    jobs: int | None = None,
    device: str | torch.device = "auto",
    executor: Executor | None = None,
    show_progress: bool = True,
) -> Study:
    """Train every condition with every seed into `out`/<recipe>/<condition>/seed-<k>/, and open these runs.

    Complete runs are not repeated; stopped runs resume from their last complete epoch. On a CPU, `jobs` processes (by
    default, and at most, one per core) train in parallel, each with one thread. On a GPU, or with one job, the runs
    take turns in this process.

    An `executor`, any of concurrent.futures, trains the runs instead, `jobs` at a time (by default all). Its workers
    need s6lib and the data set; your own code is sent to them. This process writes the folder, so they need no shared
    disk. If they share it, their runs resume from their last complete epoch too.

    The recipe and the conditions may be the names of built-in ones, and `seeds` may be a single number.

    Before training, the first steps of each condition with your own code are tried on the CPU and compared with those
    of the runs in the folder. This raises StudyError or SettingError if a seed is not a whole number, two conditions
    share a name, a condition cannot be trained, the device is missing, `out` cannot be written, another study is using
    it, it holds runs of this name that were trained differently, or a link in it leads elsewhere; DataError if the data
    set is missing; DamagedFile if a finished run is damaged. Raises RunsFailed if some runs fail, once all others are
    complete, and Stopped, a KeyboardInterrupt, if it is interrupted.
    """
    recipe, conditions, seeds = _recipe(recipe), _conditions(conditions), _seeds(seeds)
    runs = [Run(recipe, condition, seed) for seed in seeds for condition in conditions]
    out, jobs = Path(out).expanduser(), _jobs(jobs)
    if executor is None:
        device = resolve_device(device)
    forget_images()
    with _only_study_in(out) as token:
        _refuse_links(out, [run.folder(out) for run in runs])
        _require_one_training(out / recipe.name, runs)
        waiting = [run for run in runs if not is_complete(run.folder(out))]
        settings = JobSettings(out.resolve(), token, str(device), jobs)
        if not waiting and show_progress:
            print(f"all {len(runs)} runs are there" if len(runs) > 1 else "the run is there", file=sys.stderr)
        histories = {str(run): run.folder(out) / "history.csv" for run in waiting}
        epochs = {str(run): run.settings.epochs for run in waiting}
        with progress(histories, epochs) if waiting and show_progress else nullcontext():
            try:
                outcomes = (
                    train_here(waiting, settings) if executor is None else train_with(executor, waiting, settings)
                )
                reasons = [_save(run.folder(out), run, outcome) for run, outcome in outcomes]
            except KeyboardInterrupt:
                raise Stopped("every finished epoch is kept: run the cell again to go on") from None
    if any(reasons):
        raise RunsFailed("\n".join(filter(None, reasons)))
    return Study(out, recipe, conditions, seeds)


def _recipe(recipe: Recipe | str) -> Recipe:
    """Return a recipe, or the built-in one of this name. Raises StudyError if there is none."""
    if isinstance(recipe, str) and recipe in RECIPES:
        return RECIPES[recipe]
    if not isinstance(recipe, Recipe):
        raise StudyError(f"a recipe is a Recipe or the name of a built-in one, {' or '.join(RECIPES)}, not {recipe!r}")
    return recipe


def _jobs(jobs: int | None) -> int | None:
    """Return jobs as an int. Raises StudyError if it is not a number of processes."""
    if jobs is not None and (not isinstance(jobs, Integral) or isinstance(jobs, bool) or jobs < 1):
        raise StudyError(f"jobs must be a whole number from 1, or None for one per core, not {jobs!r}")
    return None if jobs is None else int(jobs)


def _seeds(seeds: int | Iterable[int]) -> list[int]:
    """Return each seed once. Raises StudyError for an invalid seed, or for none."""
    given = [seeds] if isinstance(seeds, Integral) or not isinstance(seeds, Iterable) else list(seeds)
    for seed in given:
        if not isinstance(seed, Integral) or isinstance(seed, bool) or seed < 0:
            raise StudyError(f"a seed is a whole number from 0, not {seed!r}")
    if not given:
        raise StudyError("seeds must name at least one, such as (1, 2, 3), not none")
    return list(dict.fromkeys(int(seed) for seed in given))


def _conditions(conditions: Iterable[Condition | str] | Condition | str) -> list[Condition]:
    """Return each condition once. Raises StudyError for an invalid one, for none, or for two with one folder."""
    distinct: list[Condition] = []
    for condition in [conditions] if isinstance(conditions, Condition | str) else conditions:
        if isinstance(condition, str) and condition not in ALL_CONDITIONS:
            raise StudyError(f"{condition!r} is no built-in condition; there are: {', '.join(ALL_CONDITIONS)}")
        if isinstance(condition, str):
            condition = ALL_CONDITIONS[condition]
        if not isinstance(condition, Condition):
            raise StudyError(f"a condition is a Condition or the slug of a built-in one, not {condition!r}")
        if condition not in distinct:
            distinct.append(condition)
    slugs = [condition.slug for condition in distinct]
    if len(set(slugs)) < len(slugs):
        raise StudyError(f"two different conditions share the name of a folder: {', '.join(slugs)}; rename one")
    if not distinct:
        raise StudyError("conditions must name at least one, such as CONDITIONS, not none")
    return distinct


def _save(folder: Path, run: Run, outcome: Outcome) -> str | None:
    """Save a run; return the reason if it failed or cannot be written."""
    if isinstance(outcome, str):
        return outcome
    try:
        save_run(folder, run, outcome)
    except OSError as error:
        return f"{run}: {type(error).__name__}: {error}"
    return None


@contextmanager
def _only_study_in(out: Path) -> Iterator[str]:
    """Lock a folder, and yield the name of a file in it, by which workers recognise a shared disk."""
    token = out / f".study-{uuid4().hex}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / ".lock").acquire(timeout=0)
        for leftover in out.glob(".study-*"):  # of a study that was killed
            leftover.unlink(missing_ok=True)
        token.touch()
    except Timeout:
        raise StudyError(f"another study is using {out}; wait until it ends or choose another folder") from None
    except OSError as error:
        raise StudyError(f"cannot write in {out} ({error.strerror}); choose another folder") from None
    with lock:
        try:
            yield token.name
        finally:
            token.unlink(missing_ok=True)


def _refuse_links(out: Path, folders: list[Path]) -> None:
    """Raise StudyError if a symbolic link under `out`, perhaps a stranger's, would redirect a run's files."""
    for folder in folders:
        if not folder.resolve().is_relative_to(out.resolve()):
            raise StudyError(f"{folder} leads out of {out}, to {folder.resolve()}; remove the link")


def _require_one_training(folder: Path, runs: list[Run]) -> None:
    """Compare the runs in a recipe's folder, complete or not, with those that are requested, and try the new ones.

    Settings identify a run; with the user's code, its first steps do too, of one seed of each condition. Raises
    StudyError if a run was trained with different settings, and SettingError if a condition cannot be trained.
    """
    conditions = {run.condition.slug: run.condition for run in runs}
    recorded: dict[str, tuple[Path, dict[str, Any]]] = {}
    for other in run_folders(folder):
        about = read_about(other) if is_complete(other) else read_checkpoint(other)
        if about is not None:
            condition = conditions.get(other.parent.name) or read_condition(about["condition"])
            _require_same(other, about, settings_of(Run(runs[0].recipe, condition, about["seed"])))
            recorded.setdefault(other.parent.name, (other, about))
    tried: dict[str, dict[str, Any]] = {}
    for slug, condition in conditions.items():
        other, about = recorded.get(slug, (folder, {"seed": runs[0].seed}))
        run = Run(runs[0].recipe, condition, about["seed"])
        tried[slug] = settings_of(run)
        if not run.is_built_in:
            tried[slug]["first_steps"] = first_steps(run, load_images(run.recipe))
        if "first_steps" in about:
            _require_same(other, about, tried[slug])
    _name_equal_conditions(tried)


def _require_same(folder: Path, recorded: dict[str, Any], requested: dict[str, Any]) -> None:
    if phrases := differences(recorded, requested):
        raise StudyError(DIFFERENT_TRAINING.format(folder=folder, differences="; ".join(phrases[:3])))


def _name_equal_conditions(tried: dict[str, dict[str, Any]]) -> None:
    """Print which conditions cannot be told apart by their settings, their code and their first steps."""
    for (first, one), (second, other) in combinations(tried.items(), 2):
        renamed = {**other, "condition": {**other["condition"], "slug": first}}
        if not differences(one, renamed):
            print(
                f"{first} and {second} train alike, as far as their first steps show: does a lambda in a loop read the "
                "loop's variable? Give it a default, as in `lambda model, weight=weight: ...`",
                file=sys.stderr,
                flush=True,
            )
