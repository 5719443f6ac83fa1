"""What notebooks 04, 05 and 09 need beside the lesson: the runs of a folder, and a slider over seeds."""

from pathlib import Path

import ipywidgets
import pandas as pd

from s6lib import CONDITIONS, CONTROL, S6Error, Study
from s6lib.data import PROJECT
from s6lib.recipes import name_of
from s6lib.study import recipes_in


def is_published(folder: str | Path) -> bool:
    """Return whether a folder is that of the published runs."""
    return Path(folder).expanduser().resolve() == (PROJECT / "results").resolve()


def open_studies(folder: str | Path) -> dict[str, Study]:
    """Open the studies in a folder by name, such as "plain (PlainNet)", those of built-in recipes first.

    Of the published runs, only seeds 1 to 10 of the six conditions are read. Raises S6Error if there are no runs.
    """
    chosen = {"conditions": (*CONDITIONS, CONTROL), "seeds": range(1, 11)} if is_published(folder) else {}
    studies = [Study(folder, recipe, **chosen) for recipe in recipes_in(Path(folder).expanduser())]
    if not studies:
        raise S6Error("no runs yet: train some in 03, or set FOLDER")
    return {f"{study.recipe.name} ({name_of(study.recipe.network)})": study for study in studies}


def open_comparison(folder: str | Path) -> tuple[str, Study]:
    """Open the first study of a folder, with its name. Raises S6Error if it has too few runs to compare conditions."""
    name, study = next(iter(open_studies(folder).items()))
    if min(len(study.seeds), len(study.conditions)) < 2:
        raise S6Error(
            f"{study.recipe.name} has too few runs to compare: train two conditions or more, with two seeds or more"
        )
    return name, study


class SeedSlider(ipywidgets.VBox):
    """A slider over seeds, with the accuracies of one run of each condition and the winner.

    Args:
        accuracies: one row per seed, one column per condition, in percent.
    """

    def __init__(self, accuracies: pd.DataFrame) -> None:
        slider = ipywidgets.SelectionSlider(options=list(accuracies.index), description="seed")
        table = ipywidgets.HTML()

        def redraw(_: object = None) -> None:
            run = accuracies.loc[slider.value].sort_values(ascending=False, kind="stable")
            rows = "".join(f"<tr><td>{label}</td><td>{accuracy:.2f}%</td></tr>" for label, accuracy in run.items())
            winners = " and ".join(run.index[run == run.max()])
            table.value = f"<table>{rows}</table><p>The winner: <b>{winners}</b></p>"

        slider.observe(redraw, "value")
        redraw()
        super().__init__([slider, table])

    def __repr__(self) -> str:  # what is shown until the cell is run
        return "Run this cell for a slider over the seeds. The picture below shows them all."
