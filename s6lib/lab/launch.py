"""run_study, the one loop over conditions and seeds."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import combinations
from numbers import Integral
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from filelock import FileLock, Timeout

from s6lib.errors import RunsFailed, Stopped, StudyError
from s6lib.lab.device import CPU, reproducible
from s6lib.lab.files import is_complete, read_about, read_checkpoint, run_folders, write_results
from s6lib.lab.progress import progress
from s6lib.lab.record import differences, identity, read_condition, require_same
from s6lib.lab.run import Data, set_up
from s6lib.lab.trial import error_prefix, first_steps
from s6lib.lab.workers import Outcome, Task, resolve_device, train_here, train_with
from s6lib.recipes import ALL_CONDITIONS, CONDITIONS, PLAIN, RECIPES, Condition, Recipe, Run, load_images, short
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
    default, and at most, one per core) train in parallel, each with one thread. On a GPU the default is one. With one
    job, the runs take turns in this process.

    An `executor`, any of concurrent.futures, trains the runs instead, `jobs` at a time (by default all). Its workers
    need s6lib and the data set; your own code is sent to them. This process writes the folder, so they need no shared
    disk. If they share it, their runs resume from their last complete epoch too.

    The recipe and the conditions may be the names of built-in ones, and `seeds` may be a single number.

    Before training, the first steps of each condition with your own code are tried on the CPU and compared with those
    of the runs in the folder. This raises StudyError or SettingError if a seed is not a whole number, two conditions
    share a name, a condition cannot be trained, the device is missing, `out` cannot be written, another study is using
    it, it holds runs of this name that were trained differently, or a link in it leads elsewhere; DataError if the data
    set is missing; DamagedFile if the run.json of a finished run is damaged. Raises RunsFailed if some runs fail, once
    all others are complete, and Stopped, a KeyboardInterrupt, if it is interrupted.
    """
    chosen: Recipe = _built_in(recipe, RECIPES, Recipe)
    if isinstance(conditions, str) or not isinstance(conditions, Iterable):
        conditions = [conditions]
    asked: list[Condition] = [_built_in(condition, ALL_CONDITIONS, Condition) for condition in conditions]
    distinct = {condition.slug: condition for condition in asked}
    if twice := [condition.slug for condition in asked if condition != distinct[condition.slug]]:
        raise StudyError(f"two conditions share the name {twice[0]}; rename one")
    seeds = [_whole_number("a seed", seed, 0) for seed in (seeds if isinstance(seeds, Iterable) else [seeds])]
    runs = [Run(chosen, condition, seed) for seed in dict.fromkeys(seeds) for condition in distinct.values()]
    if not runs:
        raise StudyError("conditions and seeds must name at least one each, such as CONDITIONS and (1, 2, 3), not none")
    out, jobs = Path(out).expanduser(), None if jobs is None else _whole_number("jobs", jobs, 1)
    if executor is None:
        device = resolve_device(device)
    elif not isinstance(executor, Executor):
        raise StudyError(f"executor must be a concurrent.futures.Executor, not {short(executor)}")
    load_images.cache_clear()
    try:
        with reproducible(CPU):
            data = load_images(chosen.data, chosen.held_out)
        with _only_study_in(out) as token:
            _require_one_training(out, runs, data)
            waiting = [run for run in runs if not is_complete(run.folder(out))]
            if not waiting and show_progress:
                print(f"all {len(runs)} runs are there" if len(runs) > 1 else "the run is there", file=sys.stderr)
            # Before training, since the user may edit a file meanwhile; once a condition, since seeds share all else.
            one_each = {run.condition.slug: run for run in waiting}
            entries = {slug: identity(run) for slug, run in one_each.items()}
            task = Task(waiting, entries, token, str(device))
            with progress(waiting, out) if waiting and show_progress else nullcontext():
                outcomes = train_here(task, jobs) if executor is None else train_with(executor, task, jobs)
                reasons = [_save(run.folder(out), run, outcome) for run, outcome in outcomes]
    except KeyboardInterrupt:
        kept = "epoch" if executor is None else "run"
        raise Stopped(f"every finished {kept} is kept: run the cell again to go on") from None
    if any(reasons):
        raise RunsFailed("\n".join(filter(None, reasons)))
    return Study(out, chosen, distinct.values(), seeds)


def _built_in(given: Any, choices: Mapping[str, Any], kind: type) -> Any:
    """Return a recipe or a condition, or the built-in one of this name. Raises StudyError if there is none."""
    found = choices.get(given) if isinstance(given, str) else given
    if not isinstance(found, kind):
        raise StudyError(
            f"{short(given)} is neither a {kind.__name__} nor the name of a built-in one: {', '.join(choices)}"
        )
    return found


def _whole_number(name: str, value: Any, least: int) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise StudyError(f"{name} must be a whole number from {least}, not {value!r}")
    return int(value)


def _save(folder: Path, run: Run, outcome: Outcome) -> str | None:
    """Save a run; return the reason if it failed or cannot be written."""
    if isinstance(outcome, str):
        return outcome
    try:
        write_results(folder, *outcome)
    except OSError as error:
        return f"{run}: {type(error).__name__}: {error}"
    return None


@contextmanager
def _only_study_in(out: Path) -> Iterator[Path]:
    """Lock a folder, and yield the path of a file in it, by which workers recognise a shared disk."""
    with ExitStack() as held:
        try:
            out.mkdir(parents=True, exist_ok=True)
            token = out.resolve() / f".study-{uuid4().hex}"
            held.enter_context(FileLock(out / ".lock").acquire(timeout=0))
            for leftover in out.glob(".study-*"):  # of a study that was killed
                leftover.unlink(missing_ok=True)
            held.callback(token.unlink, missing_ok=True)
            token.touch()
        except Timeout:
            raise StudyError(f"another study is using {out}; wait until it ends or choose another folder") from None
        except OSError as error:
            raise StudyError(f"cannot write in {out} ({error.strerror}); choose another folder") from None
        yield token


def _require_one_training(out: Path, runs: list[Run], data: Data) -> None:
    """Compare the runs in a recipe's folder, complete or not, with those that are requested, and try the new ones.

    Settings identify a run; with the user's code, its first steps do too, of one seed of each condition. Raises
    StudyError if a run was trained with different settings, or if a symbolic link, perhaps a stranger's, would lead a
    run's files out of the folder; and SettingError if a condition cannot be trained.
    """
    recipe, conditions = runs[0].recipe, {run.condition.slug: run.condition for run in runs}
    for place in {run.folder(out) for run in runs}:
        if not place.resolve().is_relative_to(out.resolve()):
            raise StudyError(f"{place} leads out of {out}, to {place.resolve()}; remove the link")
    recorded: dict[str, tuple[Path, dict[str, Any]]] = {}
    for folder in run_folders(out / recipe.name):
        about = read_about(folder) if is_complete(folder) else read_checkpoint(folder)
        if about is not None:
            condition = conditions.get(folder.parent.name) or read_condition(about["condition"])
            require_same(folder, about, identity(Run(recipe, condition, about["seed"])))
            recorded.setdefault(folder.parent.name, (folder, about))
    tried: dict[str, dict[str, Any]] = {}
    for slug, condition in conditions.items():
        folder, about = recorded.get(slug, (out, {"seed": runs[0].seed}))
        run = Run(recipe, condition, about["seed"])
        if run.is_built_in and slug not in recorded:
            with reproducible(CPU), error_prefix(f"{condition} cannot be trained"):
                set_up(run, data, CPU)
        steps = None if run.is_built_in else first_steps(run, data)
        entry = identity(run, steps)
        if "first_steps" in about:
            require_same(folder, about, entry)
        tried[slug] = {**entry, "condition": {**entry["condition"], "slug": ""}, "seed": 0}
    for (first, one), (second, other) in combinations(tried.items(), 2):
        if not differences(one, other):
            print(
                f"{first} and {second} train alike, as far as settings and first steps show; if a lambda in a loop "
                "reads the loop's variable, give it a default, as in `lambda model, weight=weight: ...`",
                file=sys.stderr,
                flush=True,
            )
