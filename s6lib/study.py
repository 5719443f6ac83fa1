"""Study, which reads the runs in a study's folder."""

import re
from collections.abc import Collection, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import nn

from s6lib.data import ImageDataset
from s6lib.errors import DamagedFile, SettingError, StudyError
from s6lib.lab.device import CPU, keep_freed_memory, reproducible, seed_everything
from s6lib.lab.files import RESULTS, is_complete, read_about, read_result, run_folders
from s6lib.lab.record import (
    COLUMNS,
    DIFFERENT_TRAINING,
    differences,
    has_user_code,
    read_condition,
    read_recipe,
    settings_of,
)
from s6lib.recipes import (
    ALL_CONDITIONS,
    RECIPES,
    SLUG,
    Condition,
    Recipe,
    Run,
    build_model,
    load_images,
    name_of,
)
from s6lib.train import predict

CHECKED = 1_000  # saved predictions that a model with the user's code must reproduce


def recipes_in(folder: str | Path) -> list[str]:
    """List the names of the recipes with a complete run in a folder, the built-in ones first."""
    folders = (path for path in Path(folder).glob("*") if re.fullmatch(SLUG, path.name))
    names = {path.name for path in folders if any(is_complete(run) for run in run_folders(path))}
    return [name for name in RECIPES if name in names] + sorted(names - RECIPES.keys())


class _Record(NamedTuple):
    """A complete run: its folder, the entries of its run.json, and the run that they describe."""

    folder: Path
    about: dict[str, Any]
    run: Run


class Study:
    """The complete runs of one recipe in a folder, opened for reading.

    Args:
        folder: the `out` of `run_study`.
        recipe: the recipe or its name; by default the one that is there. `model` needs the recipe itself if it contains
            your own code.
        conditions: the conditions to read, or their slugs, in this order; by default all. `model` needs the condition
            itself if it contains your own code.
        seeds: the seeds, or the one seed, to read; by default all.

    Conditions and seeds without a complete run are left out. Raises StudyError if no run is left, or if runs of one
    name were trained differently from each other or from the recipe and conditions given here; DamagedFile if the
    content of a file does not match its checksum.

    Attributes:
        recipe, conditions (by slug), runs (pairs of slug and seed), seeds.
    """

    def __init__(
        self,
        folder: str | Path = "runs",
        recipe: str | Recipe | None = None,
        conditions: Condition | str | Collection[Condition | str] | None = None,
        seeds: Iterable[int] | int | None = None,
    ) -> None:
        self.folder = Path(folder).expanduser()
        name = _recipe_name(self.folder, recipe)
        if isinstance(conditions, Condition | str):
            conditions = [conditions]
        slugs = [_slug(condition) for condition in conditions or ()]
        chosen = set(seeds) if isinstance(seeds, Iterable) else {seeds}
        records = [_read_run(run) for run in run_folders(self.folder / name) if is_complete(run)]
        order = list(dict.fromkeys([*slugs, *ALL_CONDITIONS, *sorted(one.run.condition.slug for one in records)]))
        records.sort(key=lambda one: (order.index(one.run.condition.slug), one.run.seed))
        self._records = {
            (one.run.condition.slug, one.run.seed): one
            for one in records
            if (conditions is None or one.run.condition.slug in slugs) and (seeds is None or one.run.seed in chosen)
        }
        if not self._records:
            there = ", ".join(dict.fromkeys(one.run.condition.slug for one in records))
            there = there or ", ".join(f"runs of {other}" for other in recipes_in(self.folder)) or "none"
            raise StudyError(
                f"no complete {name} run of those asked for in {folder} (there are: {there}); train some with "
                "run_study or python -m s6lib run"
            )
        given = {condition.slug: condition for condition in conditions or () if isinstance(condition, Condition)}
        self.recipe = recipe if isinstance(recipe, Recipe) else next(iter(self._records.values())).run.recipe
        self.conditions = {slug: given.get(slug, record.run.condition) for (slug, _), record in self._records.items()}
        for (slug, seed), record in self._records.items():  # as the first of its condition, or as the caller's
            phrases = differences(record.about, settings_of(Run(self.recipe, self.conditions[slug], seed)))
            if phrases:
                raise StudyError(DIFFERENT_TRAINING.format(folder=record.folder, differences="; ".join(phrases[:3])))

    @property
    def runs(self) -> list[tuple[str, int]]:
        """Slug and seed of each run, by condition."""
        return list(self._records)

    @property
    def seeds(self) -> list[int]:
        """The seeds of the runs, in order."""
        return sorted({seed for _, seed in self._records})

    @property
    def labels(self) -> dict[str, str]:
        """The conditions' labels by slug."""
        return {slug: condition.label for slug, condition in self.conditions.items()}

    def history(self) -> pd.DataFrame:
        """One row per epoch of every run: condition, label, seed, and the columns of history.csv."""
        return self._history.copy()

    @cached_property
    def _history(self) -> pd.DataFrame:
        tables = {run: self._read_history(*run) for run in self._records}
        table = pd.concat(tables, names=["condition", "seed"]).reset_index(["condition", "seed"]).reset_index(drop=True)
        table.insert(1, "label", table["condition"].map(self.labels))
        return table

    def summary(self) -> pd.DataFrame:
        """One row per run: last-epoch accuracy, best-epoch accuracy, training accuracy and seconds.

        The last epoch is the result. The best epoch is chosen on the test images, so its accuracy is too high.
        """
        runs = self._history.groupby(["condition", "seed"], sort=False)
        last = runs.last()
        best = self._history.loc[runs["test_accuracy"].idxmax()].set_index(["condition", "seed"])
        table = pd.DataFrame(
            {
                "label": last["label"],
                "test_accuracy": last["test_accuracy"],
                "test_loss": last["test_loss"],
                "best_accuracy": best["test_accuracy"],
                "best_epoch": best["epoch"],
                "train_accuracy": last["train_accuracy"],
                "seconds": runs["seconds"].sum(),
            }
        )
        return table.reset_index()

    def outcomes(self) -> pd.DataFrame:
        """Test accuracy at the last epoch in percent: one row per seed, one column per condition.

        Raises SettingError, a ValueError, if a condition lacks a seed that another has: comparisons are paired by seed.
        """
        table = self.summary().pivot(index="seed", columns="condition", values="test_accuracy")[list(self.conditions)]
        missing = [f"{slug} seed {seed}" for seed in table.index for slug in table if np.isnan(table.loc[seed, slug])]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise SettingError(
                f"comparisons are paired by seed, and these runs are missing: {', '.join(missing[:3])}{more}; train "
                "them, or choose conditions or seeds that are complete"
            )
        return (100 * table).round(8)  # 99.55, not 99.55000000000001

    def about(self) -> pd.DataFrame:
        """One row per run with the entries of run.json: device, processor, versions, seconds and so on."""
        runs = [{**record.about, "condition": slug} for (slug, _), record in self._records.items()]
        return pd.DataFrame(runs).drop(columns=["recipe", "first_steps", "sha256"], errors="ignore")

    @cached_property
    def data(self) -> tuple[ImageDataset, ImageDataset]:
        """The training and the test images of the study, or the training and the held-out images with `held_out`.

        Raises StudyError if the data set is the user's and the recipe itself was not given.
        """
        with reproducible(CPU):
            return load_images(self.recipe.data, self.recipe.held_out)

    def model(self, condition: str | Condition, seed: int | None = None) -> nn.Module:
        """Load the model of a run, by default of the condition's first seed, on the CPU, in evaluation mode.

        Raises StudyError if it needs the user's code and that was not given, or no longer gives the saved predictions.
        """
        keep_freed_memory()  # the model is about to be evaluated: a third faster with it
        record = self._record(condition, seed)
        content = read_result(record.folder, "weights.pt")
        run = Run(self.recipe, self.conditions[record.run.condition.slug], record.run.seed)
        own = has_user_code(run)
        train = self.data[0] if own else None
        with reproducible(CPU):
            seed_everything(run.seed, 0, CPU)  # as before training: a constant may be drawn
            model = build_model(run.recipe, run.condition, train)
        try:
            model.load_state_dict(torch.load(content, map_location="cpu", weights_only=True))
        except Exception:  # a dozen kinds, depending on what the file is
            network = name_of(self.recipe.network)
            path = record.folder / "weights.pt"
            raise DamagedFile(f"{path} is not a state_dict of {network}, and is not trusted") from None
        if own:
            self._require_saved_predictions(model, record)
        return model.eval()

    def _require_saved_predictions(self, model: nn.Module, record: _Record) -> None:
        some = self.data[1].part(slice(CHECKED))
        saved = self.predictions(record.run.condition, record.run.seed)[:CHECKED]
        different = int((predict(model, some).numpy() != saved).sum())
        if different > 3:  # on another processor, two nearly equal logits may change places
            raise StudyError(
                f"the model of {record.folder} does not give the predictions saved with it for {different} of "
                f"{len(saved)} images: its code has changed since; give the code that was trained"
            )

    def predictions(self, condition: str | Condition, seed: int | None = None) -> np.ndarray:
        """Load the predicted class of each test image, uint8 (10000,), by default of the condition's first seed."""
        folder = self._record(condition, seed).folder
        try:
            return np.load(read_result(folder, "predictions.npy"), allow_pickle=False)
        except (ValueError, EOFError, OSError):
            raise DamagedFile(f"{folder / 'predictions.npy'} is not an array of numbers, and is not trusted") from None

    def check(self) -> None:
        """Read every file of every run. Raises DamagedFile if one is missing or does not match its checksum."""
        for record in self._records.values():
            for name in RESULTS:
                read_result(record.folder, name)

    def _read_history(self, condition: str, seed: int) -> pd.DataFrame:
        folder = self._records[condition, seed].folder
        try:
            table = pd.read_csv(read_result(folder, "history.csv"))
        except (pd.errors.ParserError, pd.errors.EmptyDataError):
            table = pd.DataFrame()
        if tuple(table.columns) != COLUMNS or table.empty:
            raise DamagedFile(f"{folder / 'history.csv'} is not a history of a run: {', '.join(COLUMNS)}")
        return table.rename(columns=lambda column: column.replace("val_", "test_"))

    def _record(self, condition: str | Condition, seed: int | None) -> _Record:
        slug = _slug(condition)
        seeds = [k for name, k in self._records if name == slug and seed in (None, k)]
        if not seeds:
            runs = ", ".join(f"{slug} {k}" for slug, k in self._records)
            request = repr(slug) if seed is None else f"{slug!r}, seed {seed}"
            raise StudyError(f"no complete run of condition {request}; there are: {runs}")
        return self._records[slug, seeds[0]]


def _read_run(folder: Path) -> _Record:
    """Read the run.json of a folder. Raises DamagedFile if it describes another run than the folder's name."""
    about = read_about(folder)
    try:
        run = Run(read_recipe(about["recipe"]), read_condition(about["condition"]), about["seed"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedFile(f"{folder / 'run.json'} describes no run that this version knows: {error}") from None
    place = run.recipe.name, run.condition.slug, f"seed-{run.seed}"
    if place != folder.parts[-3:]:
        raise DamagedFile(f"{folder} holds another run: {', '.join(place)}")
    return _Record(folder, about, run)


def _recipe_name(folder: Path, recipe: str | Recipe | None) -> str:
    """Return the name of the recipe to read. Raises StudyError if none is given, and there is not exactly one."""
    if recipe is None:
        names = recipes_in(folder)
        if len(names) != 1:
            there = f"it has those of {', '.join(names)}: name one of them" if names else "train some with run_study"
            raise StudyError(f"no recipe is named, and {folder} does not hold the runs of exactly one; {there}")
        return names[0]
    name = recipe.name if isinstance(recipe, Recipe) else recipe
    if not isinstance(name, str) or not re.fullmatch(SLUG, name):
        raise StudyError(f"a recipe is a Recipe or its name, such as 'plain', not {recipe!r}")
    return name


def _slug(condition: Condition | str) -> str:
    return condition.slug if isinstance(condition, Condition) else condition
