"""Every figure, one function each. They return a `matplotlib.figure.Figure`; `save` writes it as a PNG at 2x."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import seaborn as sns
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from s6lib.analysis import misclassified
from s6lib.data import Split
from s6lib.study import Study

# Okabe and Ito's palette, told apart by colour-blind readers; a condition has its colour in every figure.
COLORS = {
    "l1-bn": "#0072B2",
    "l2-bn": "#E69F00",
    "l1-l2-bn": "#009E73",
    "gbn": "#D55E00",
    "l1-l2-gbn": "#CC79A7",
    "bn": "#666666",
}
STYLE = {
    **sns.axes_style("whitegrid"),
    **sns.plotting_context("notebook"),
    "grid.color": "#E6E6E6",
    "axes.edgecolor": "#999999",
}


def save(figure: Figure, path: str | Path) -> None:
    """Write a PNG at 200 dots an inch; the same figure gives the same bytes."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200, metadata={"Software": None})


def plot_accuracy(study: Study) -> Figure:
    """Validation accuracy of every condition by epoch, with the second half of the training closer up.

    Several seeds of a condition appear as their mean, in a band from the lowest to the highest.
    """
    return _plot_curves(study, "val_accuracy", "validation accuracy", "{:.2%}".format)


def plot_loss(study: Study) -> Figure:
    """Validation cross-entropy, without penalties, of every condition by epoch, as in `plot_accuracy`."""
    return _plot_curves(study, "val_loss", "validation loss (cross-entropy)", "{:.4f}".format)


def _plot_curves(study: Study, column: str, name: str, formatted: Callable[[float], str]) -> Figure:
    epochs = study.recipe.epochs
    figure = Figure(figsize=(10, 5), layout="constrained")
    with rc_context(STYLE):
        whole, close = figure.subplots(1, 2, width_ratios=(3, 2))
        _draw_curves(whole, study, study.history, column)
        _draw_curves(close, study, study.history.query("epoch > @epochs // 2"), column)
        for axes, title in ((whole, f"all {epochs} epochs"), (close, f"closer: epochs {epochs // 2 + 1} to {epochs}")):
            axes.set(title=title, xlabel="epoch", ylabel="")
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
            if column.endswith("accuracy"):
                axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
        last = study.history.query("epoch == @epochs").groupby("condition")[column].mean()
        labels = [f"{study.conditions[slug].label}\n{formatted(last[slug])}" for slug in study.conditions]
        figure.legend(whole.get_lines(), labels, loc="outside lower center", ncols=len(labels), frameon=False)
        figure.suptitle(f"{study.recipe.network}: {name} (below: at the last epoch)")
    return figure


def _draw_curves(axes: Axes, study: Study, history: pd.DataFrame, column: str) -> None:
    for slug, condition in study.conditions.items():
        sns.lineplot(
            history[history["condition"] == slug],
            x="epoch",
            y=column,
            color=COLORS.get(slug),
            linestyle="-" if condition.num_splits is None else "--",
            linewidth=1.8,
            errorbar=("pi", 100),
            ax=axes,
        )


def plot_misclassified(study: Study, test: Split, condition: str = "gbn", seed: int = 1, count: int = 25) -> Figure:
    """The first `count` test images that a saved model gets wrong: actual and predicted class, and its confidence."""
    wrong = misclassified(study.model(condition, seed), test)
    figure = Figure(figsize=(8, 9.5), layout="constrained")
    with rc_context(STYLE):
        grid = figure.subplots(-(-count // 5), 5).ravel()
        for axes in grid:
            axes.axis("off")
        for axes, row in zip(grid, wrong.head(count).itertuples(), strict=False):
            axes.imshow(test.images[row.image].numpy(), cmap="gray_r")
            axes.set_title(f"{row.actual}, taken for\n{row.predicted} ({row.confidence:.0%})", fontsize=10)
        shown = min(count, len(wrong))
        figure.suptitle(
            f"{study.recipe.network}, {study.conditions[condition].label}: {shown} of its {len(wrong)} errors "
            f"on {len(test.labels):,} test digits\nactual class, taken for predicted class (confidence)"
        )
    return figure
