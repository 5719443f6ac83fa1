"""Every figure, one function each. They return a `matplotlib.figure.Figure`; `save` writes it as a PNG at 2x."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from s6lib.analysis import condition_statistics, misclassified, outcomes, paired_comparisons
from s6lib.data import CLASS_NAMES, Split
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
    return _plot_curves(study, "val_loss", "validation loss (cross-entropy without penalty)", "{:.4f}".format)


def _plot_curves(study: Study, column: str, name: str, formatted: Callable[[float], str]) -> Figure:
    epochs = study.recipe.epochs
    figure = Figure(figsize=(10, 5), layout="constrained")
    with rc_context(STYLE):
        whole, close = figure.subplots(1, 2, width_ratios=(3, 2))
        _draw_curves(whole, study, study.history, column)
        _draw_curves(close, study, study.history.query("epoch > @epochs // 2"), column)
        first = epochs // 2 + 1
        for axes, start, title in ((whole, 1, f"all {epochs} epochs"), (close, first, f"epochs {first} to {epochs}")):
            axes.set(title=title, xlabel="epoch (lines: a new learning rate)", ylabel="")
            axes.set_xticks([epoch for epoch in range(1, epochs + 1, study.recipe.decay_epochs) if epoch >= start])
            axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
            if column.endswith("accuracy"):
                axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=2))
        last = study.history.query("epoch == @epochs").groupby("condition")[column].mean()
        labels = [f"{study.conditions[slug].label}\n{formatted(last[slug])}" for slug in study.conditions]
        legend = {"loc": "outside lower center", "ncols": min(6, len(labels)), "frameon": False}
        figure.legend(whole.get_lines(), labels, title="condition, and its value at the last epoch", **legend)
        figure.suptitle(f"{study.recipe.network}: {name}")
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


def plot_digits(images: Tensor, titles: Sequence[str], columns: int, title: str = "") -> Figure:
    """Grey-level images (N, 28, 28) in a grid, ink on paper, each under its own title."""
    rows = -(-len(images) // columns)
    lines = 1 + max(text.count("\n") for text in titles)
    figure = Figure(
        figsize=(1.6 * columns, rows * (1.35 + 0.2 * lines) + 0.35 * title.count("\n") + 0.4), layout="constrained"
    )
    with rc_context(STYLE):
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in grid:
            axes.axis("off")
        for axes, image, text in zip(grid, images, titles, strict=False):
            axes.imshow(image.numpy(), cmap="gray_r", vmin=0, vmax=255)
            axes.set_title(text, fontsize=10)
        figure.suptitle(title)
    return figure


def plot_misclassified(study: Study, test: Split, condition: str = "gbn", seed: int = 1, count: int = 25) -> Figure:
    """The first `count` test images that a saved model gets wrong: actual and predicted class, and its confidence."""
    wrong = misclassified(study.model(condition, seed), test)
    shown = wrong.head(count)
    titles = [f"{row.actual}, taken for\n{row.predicted} ({row.confidence:.0%})" for row in shown.itertuples()]
    title = (
        f"{study.recipe.network}, {study.conditions[condition].label}: {len(shown)} of its {len(wrong)} errors "
        f"on {len(test.labels):,} test digits\nactual class, taken for predicted class (confidence)"
    )
    return plot_digits(test.images[shown["image"].tolist()], titles, columns=5, title=title)


def plot_class_balance(train: Split, test: Split) -> Figure:
    """How many digits of each class the two splits hold."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    with rc_context(STYLE):
        for axes, split, name in zip(figure.subplots(1, 2), (train, test), ("training", "test"), strict=True):
            axes.bar(CLASS_NAMES, split.labels.bincount().numpy(), color=COLORS["l1-bn"])
            axes.set(title=f"{len(split.labels):,} {name} digits", ylabel="digits of the class")
            axes.tick_params("x", rotation=45)
            axes.grid(visible=False, axis="x")
    return figure


def plot_ghost_means(activations: Tensor, splits: Sequence[int] = (1, 4, 16)) -> Figure:
    """The noise of ghost statistics: means of ghost batches around that of the whole batch, in its SDs, by channel.

    Args:
        activations: (N, C, H, W), the input of a normalisation layer.
        splits: numbers of ghost batches to compare.
    """
    center, scale = activations.mean((0, 2, 3)), activations.std((0, 2, 3))
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    with rc_context(STYLE):
        panels = figure.subplots(1, len(splits), sharey=True, squeeze=False)[0]
        for axes, count in zip(panels, splits, strict=True):
            ghosts = activations.tensor_split(count)
            for ghost in ghosts:
                noise = (ghost.mean((0, 2, 3)) - center) / scale
                axes.plot(noise.numpy(), "o", color=COLORS["gbn"], alpha=0.6, markersize=5)
            size = f"{len(ghosts[0])} images each"
            axes.set(title=f"{count} split{'s' if count > 1 else ''}, {size}", xlabel="channel")
        panels[0].set_ylabel("ghost mean minus batch mean\n(SDs of the channel)")
    return figure


def plot_confusion(matrix: np.ndarray, title: str = "") -> Figure:
    """Errors by actual and predicted class; the correct predictions, on the diagonal, are left blank."""
    figure = Figure(figsize=(7, 5.6), layout="constrained")
    with rc_context(STYLE):
        axes = figure.subplots()
        labels = {"xticklabels": CLASS_NAMES, "yticklabels": CLASS_NAMES, "cbar_kws": {"label": "errors"}}
        # Nothing on the diagonal, and no zeros: what remains to be read is the errors.
        hidden = np.eye(10, dtype=bool) | (matrix == 0)
        sns.heatmap(matrix, mask=hidden, annot=True, fmt="d", cmap="Blues", vmin=0, square=True, ax=axes, **labels)
        axes.set(xlabel="predicted", ylabel="actual", title=title)
        axes.tick_params("x", rotation=45)
        axes.tick_params("y", rotation=0)
    return figure


def plot_replication(study: Study) -> Figure:
    """Every run of every condition as a dot, and the mean of each condition with its 95% interval."""
    table, statistics = outcomes(study) / 100, condition_statistics(study)
    figure = Figure(figsize=(10, 1.2 + 0.6 * len(statistics)), layout="constrained")
    with rc_context(STYLE):
        axes = figure.subplots()
        for row in statistics.itertuples():
            color = COLORS.get(row.condition, f"C{row.Index}")
            below = row.Index + np.linspace(0.2, 0.38, row.n)  # one above the other, so that equal runs show
            axes.plot(table[row.condition], below, "o", color=color, alpha=0.55, markersize=6, markeredgewidth=0)
            axes.plot([row.low, row.high], [row.Index] * 2, color=color, linewidth=3, solid_capstyle="butt")
            axes.plot(row.mean, row.Index, "D", color=color, markeredgecolor="white", markersize=9)
        axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(PercentFormatter(100, decimals=2))
        axes.set_xlabel("accuracy on the 10,000 test digits at the last epoch")
        means = [f"{row.mean:.2f}%  ({row.low:.2f} to {row.high:.2f})" for row in statistics.itertuples()]
        _label_rows(axes, statistics["label"], means)
        n = statistics["n"].iloc[0]
        axes.set_title(f"{study.recipe.network}, {n} seeds: a dot is a run, a diamond the mean with its 95% interval")
    return figure


def plot_differences(study: Study) -> Figure:
    """Forest plot of the paired differences between all conditions, those that Holm's correction leaves in colour."""
    comparisons = paired_comparisons(study)
    labels = {slug: condition.label for slug, condition in study.conditions.items()}
    figure = Figure(figsize=(10, 1.2 + 0.36 * len(comparisons)), layout="constrained")
    with rc_context(STYLE):
        axes = figure.subplots()
        axes.axvline(0, color="#333333", linewidth=1)
        for row in comparisons.itertuples():
            color = COLORS["gbn"] if row.p_holm <= 0.05 else COLORS["bn"]
            axes.plot([row.low, row.high], [row.Index] * 2, color=color, linewidth=2)
            axes.plot(row.difference, row.Index, "s", color=color, markersize=6)
        names = [f"{labels[row.first]}  minus  {labels[row.second]}" for row in comparisons.itertuples()]
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.set_xlabel("mean paired difference of accuracy, in points (right of 0: the first is better)")
        beside = [f"{row.difference:+.3f}   p = {row.p_holm:.2f}" for row in comparisons.itertuples()]
        _label_rows(axes, names, [text.replace("-", "\N{MINUS SIGN}") for text in beside])
        n, found = comparisons["n"].iloc[0], (comparisons["p_holm"] <= 0.05).sum()
        axes.set_title(
            f"{study.recipe.network}, {n} seeds: {found} of {len(names)} differences stand (corrected p at most 0.05)"
        )
    return figure


def _label_rows(axes: Axes, names: Sequence[str], texts: Sequence[str]) -> None:
    """One row a name, the first on top, and a text right of the panel beside each."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    for row, text in enumerate(texts):
        axes.text(1.015, row, text, transform=axes.get_yaxis_transform(), va="center", fontsize=10)


def plot_split_sweep(study: Study) -> Figure:
    """Accuracy by the number of ghost batches, 1 being BatchNorm: every run, and the means with their 95% intervals."""
    statistics = condition_statistics(study)
    statistics["splits"] = [study.conditions[slug].num_splits or 1 for slug in statistics["condition"]]
    statistics = statistics.sort_values("splits", ignore_index=True)
    table, batch = outcomes(study) / 100, study.recipe.batch_size
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    with rc_context(STYLE):
        axes = figure.subplots()
        for row in statistics.itertuples():
            axes.plot([row.splits] * row.n, table[row.condition], "o", color=COLORS["gbn"], alpha=0.45, markersize=6)
        error = [statistics["mean"] - statistics["low"], statistics["high"] - statistics["mean"]]
        axes.errorbar(statistics["splits"], statistics["mean"], error, color=COLORS["gbn"], marker="D", capsize=4)
        axes.set_xscale("log", base=2)
        axes.set_xticks(statistics["splits"], [f"{splits}\n({batch // splits})" for splits in statistics["splits"]])
        axes.set_xlabel("splits of the batch (images in each ghost batch); 1 is BatchNorm")
        axes.set_ylabel("test accuracy at the last epoch")
        axes.yaxis.set_major_formatter(PercentFormatter(100, decimals=2))
        n = statistics["n"].iloc[0]
        axes.set_title(f"{study.recipe.network}, {n} seeds: a dot is a run, a diamond the mean with its 95% interval")
    return figure
