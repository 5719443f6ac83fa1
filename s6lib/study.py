"""Study, which reads the runs in a study's folder."""

import re
from collections.abc import Callable, Collection, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
import torch
from torch import nn

from s6lib.data import ImageDataset
from s6lib.errors import DamagedFile, SettingError, StudyError
from s6lib.lab.device import CPU, keep_freed_memory, reproducible, seed_everything
from s6lib.lab.files import RESULTS, is_complete, read_about, read_result, run_folders
from s6lib.lab.record import COLUMNS, has_user_code, identity, read_condition, read_recipe, require_same
from s6lib.recipes import ALL_CONDITIONS, RECIPES, SLUG, Condition, Recipe, Run, build_model, load_images, name_of
from s6lib.train import predict

CHECKED = 1_000  # saved predictions that a model with the user's code must reproduce


def recipes_in(folder: str | Path) -> list[str]:
    """List the names of the recipes with a complete run in a folder, the built-in ones first."""
    paths = [path for path in sorted(Path(folder).expanduser().glob("*")) if re.fullmatch(SLUG, path.name)]
    names = [path.name for path in paths if any(map(is_complete, run_folders(path)))]
    return sorted(names, key=[*RECIPES, *names].index)


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
        recipe; conditions and labels, by slug; runs, pairs of slug and seed, by condition; seeds, in order.
    """

    def __init__(
        self,
        folder: str | Path = "runs",
        recipe: str | Recipe | None = None,
        conditions: Condition | str | Collection[Condition | str] | None = None,
        seeds: Iterable[int] | int | None = None,
    ) -> None:
        self.folder = Path(folder).expanduser()
        names = recipes_in(self.folder)
        if recipe is None and len(names) != 1:
            there = f"it has those of {', '.join(names)}: name one of them" if names else "train some with run_study"
            raise StudyError(f"no recipe is named, and {folder} does not hold the runs of exactly one; {there}")
        name = names[0] if recipe is None else getattr(recipe, "name", recipe)
        if isinstance(conditions, Condition | str):
            conditions = [conditions]
        given = {getattr(one, "slug", one): one for one in ([] if conditions is None else conditions)}
        wanted = {f"seed-{seed}" for seed in (seeds if isinstance(seeds, Iterable) else [seeds])}

        paths = [path for path in run_folders(self.folder / name) if is_complete(path)] if name in names else []
        order = [*given, *ALL_CONDITIONS, *(path.parent.name for path in paths)]
        paths.sort(key=lambda path: (order.index(path.parent.name), len(path.name), path.name))  # seed-9, then seed-10
        named = [path for path in paths if conditions is None or path.parent.name in given]
        records = [_read_run(path) for path in named if seeds is None or path.name in wanted]
        if not records:
            others = (f"runs of {name}" for name in names)
            there = ", ".join(dict.fromkeys(path.parent.name for path in paths) or others) or "none"
            raise StudyError(
                f"no complete {name} run of those asked for in {folder} (there are: {there}); train some with "
                "run_study or python -m s6lib run"
            )
        self.recipe = recipe if isinstance(recipe, Recipe) else records[0][0].recipe
        self.conditions = {run.condition.slug: run.condition for run, _ in records}
        chosen = [one for one in given.values() if isinstance(one, Condition) and one.slug in self.conditions]
        self.conditions |= {one.slug: one for one in chosen}
        self._about = {(run.condition.slug, run.seed): about for run, about in records}
        asked = {slug: identity(self._run(slug)) for slug in self.conditions}
        first: dict[Any, list[int]] = {}
        for (slug, seed), about in self._about.items():
            run = self._run(slug, seed)
            require_same(run.folder(self.folder), about, {**asked[slug], "seed": seed})
            sums = (about.get("first_steps") or {}).get("data", {}).get("checksums", [])
            drawn = run.settings.train_images, seed if run.settings.draw_images else None
            for part, found in ((drawn, sums[:2]), ("test", sums[2:])):
                if found and first.setdefault(part, found) != found:
                    raise StudyError(
                        f"the runs of {self.recipe.name} in {folder} have different images or labels: `data` must give "
                        "the same each time, so seed what it draws and sort what it lists"
                    )
        self.labels = {slug: condition.label for slug, condition in self.conditions.items()}
        self.runs = list(self._about)
        self.seeds = sorted({seed for _, seed in self.runs})

    def history(self) -> pd.DataFrame:
        """One row per epoch of every run: condition, label, seed, and the columns of history.csv."""
        return self._history.copy()

    @cached_property
    def _history(self) -> pd.DataFrame:
        def read(file: BinaryIO) -> pd.DataFrame:
            return pd.read_csv(file)[list(COLUMNS)].rename(columns=lambda column: column.replace("val_", "test_"))

        tables = {run: self._read(self._run(*run), "history.csv", read, "a history of a run") for run in self.runs}
        table = pd.concat(tables, names=["condition", "seed"]).reset_index(["condition", "seed"]).reset_index(drop=True)
        table.insert(1, "label", table["condition"].map(self.labels))
        return table

    def summary(self) -> pd.DataFrame:
        """One row per run: last-epoch accuracy, best-epoch accuracy, training accuracy and seconds.

        The last epoch is the result. The best epoch is chosen on the test images, so its accuracy is too high.
        """
        runs = self._history.set_index("epoch").groupby(["condition", "seed"], sort=False, as_index=False)
        return runs.agg(
            label=("label", "last"),
            test_accuracy=("test_accuracy", "last"),
            test_loss=("test_loss", "last"),
            best_accuracy=("test_accuracy", "max"),
            best_epoch=("test_accuracy", "idxmax"),
            train_accuracy=("train_accuracy", "last"),
            seconds=("seconds", "sum"),
        )

    def outcomes(self) -> pd.DataFrame:
        """Test accuracy at the last epoch in percent: one row per seed, one column per condition.

        Raises SettingError, a ValueError, if a condition lacks a seed that another has: comparisons are paired by seed.
        """
        runs = [(slug, seed) for seed in self.seeds for slug in self.conditions]
        missing = [f"{slug} seed {seed}" for slug, seed in runs if (slug, seed) not in self._about]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise SettingError(
                f"comparisons are paired by seed, and these runs are missing: {', '.join(missing[:3])}{more}; train "
                "them, or choose conditions or seeds that are complete"
            )
        table = self.summary().pivot(index="seed", columns="condition", values="test_accuracy")[list(self.conditions)]
        return (100 * table).round(8)  # 99.55, not 99.55000000000001

    def about(self) -> pd.DataFrame:
        """One row per run with the entries of run.json: device, processor, versions, seconds and so on."""
        runs = [{**about, "condition": slug} for (slug, _), about in self._about.items()]
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
        run = self._run(condition, seed)
        train, test = self.data if has_user_code(run) else (None, None)
        with reproducible(CPU):
            seed_everything(run.seed, 0, CPU)  # as before training: a constant may be drawn
            model = build_model(run.recipe, run.condition, train)

        def load(file: BinaryIO) -> None:
            model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))

        self._read(run, "weights.pt", load, f"a state_dict of {name_of(run.recipe.network)}")
        if test is not None:
            saved = self.predictions(condition, run.seed)[:CHECKED]
            different = int((predict(model, test.part(slice(CHECKED))).numpy() != saved).sum())
            if different > 3:  # on another processor, two nearly equal logits may change places
                raise StudyError(
                    f"the model of {run.folder(self.folder)} does not give the predictions saved with it for "
                    f"{different} of {len(saved)} images: its code has changed since; give the code that was trained"
                )
        model.eval()
        return model

    def predictions(self, condition: str | Condition, seed: int | None = None) -> np.ndarray:
        """Load the predicted class of each test image, uint8 (10000,), by default of the condition's first seed."""
        return self._read(self._run(condition, seed), "predictions.npy", np.load, "an array of numbers")

    def check(self) -> None:
        """Read every file of every run. Raises DamagedFile if one is missing or does not match its checksum."""
        for run in self.runs:
            for name in RESULTS:
                read_result(self._run(*run).folder(self.folder), name)

    def _run(self, condition: str | Condition, seed: int | None = None) -> Run:
        """Return a run, by default of the condition's first seed. Raises StudyError if the study does not have it."""
        slug = condition.slug if isinstance(condition, Condition) else condition
        seeds = [k for name, k in self._about if name == slug and seed in (None, k)]
        if not seeds:
            request = repr(slug) if seed is None else f"{slug!r}, seed {seed}"
            runs = ", ".join(f"{slug} {k}" for slug, k in self._about)
            raise StudyError(f"no complete run of condition {request}; there are: {runs}")
        return Run(self.recipe, self.conditions[slug], seeds[0])

    def _read(self, run: Run, name: str, load: Callable[[BinaryIO], Any], kind: str) -> Any:
        """Load the content of one of a run's files. Raises DamagedFile unless it is of that kind, as it was written."""
        file = read_result(run.folder(self.folder), name)
        try:
            return load(file)
        except Exception:  # a dozen kinds, depending on what the file is
            path = run.folder(self.folder) / name
            raise DamagedFile(f"{path} is not {kind}, and is not trusted") from None


def _read_run(folder: Path) -> tuple[Run, dict[str, Any]]:
    """Read the run.json of a folder. Raises DamagedFile if it describes another run than the folder's name."""
    about = read_about(folder)
    try:
        run = Run(read_recipe(about["recipe"]), read_condition(about["condition"]), about["seed"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedFile(f"{folder / 'run.json'} describes no run that this version knows: {error}") from None
    if run.folder(folder.parents[2]) != folder:
        raise DamagedFile(f"{folder} holds another run: {run.recipe.name}, {run.condition.slug}, seed-{run.seed}")
    return run, about
