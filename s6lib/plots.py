"""Figures for any study, one function each; each returns a `matplotlib.figure.Figure`, and `save` writes it."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from s6lib.data import ImageDataset
from s6lib.statistics import complete_table, condition_statistics, paired_comparisons, sign_flip_means, sign_flip_p
from s6lib.study import Study

History: TypeAlias = pd.DataFrame | Study | list[dict[str, Any]]

# Okabe and Ito's colours for colour-blind readers, and a dark brown. One colour has one meaning in every figure: a
# regulariser and the condition that uses it alone share theirs, and no colour of COLORS means anything else.
COLORS = {
    "bn": "#666666",  # no penalty, BatchNorm
    "l1-bn": "#0072B2",
    "l2-bn": "#E69F00",
    "l1-l2-bn": "#009E73",
    "gbn": "#D55E00",
    "l1-l2-gbn": "#CC79A7",
    "dropout": "#661100",
    "rotation": "#56B4E9",
}
COLORS |= {"l1": COLORS["l1-bn"], "l2": COLORS["l2-bn"], "ghosts": COLORS["gbn"]}
COLORS |= dict.fromkeys(("nothing", "no regularisation"), COLORS["bn"])
COLORS |= {"l1-l2": COLORS["l1-l2-bn"], "together": COLORS["l1-l2-gbn"]}  # every regulariser of a study at once
OTHER_COLORS = ("#332288", "#44AA99", "#999933", "#882255", "#117733", "#AA4499")  # of everything else, in this order
INK, QUIET = "#222222", "#AAAAAA"  # what stands out and what does not, where the colour means no condition
STYLE = {**sns.axes_style("whitegrid"), **sns.plotting_context("notebook"), "grid.color": "#E6E6E6"}
STYLE["axes.edgecolor"] = "#999999"
DOTS = "a dot is a run, a diamond the mean with its 95% interval"


def save(figure: Figure, path: str | Path) -> None:
    """Write a PNG at 200 dots an inch; the same figure gives the same bytes."""
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200, metadata={"Software": None})


def colors_of(names: Sequence[str]) -> dict[str, str]:
    """Choose a colour for each condition or other thing: the one in COLORS, or one that no other has.

    "300-l1" and "l1-0.006" have the colour of "l1", unless something before them has it.
    """
    more = iter([*OTHER_COLORS, *sns.color_palette("husl", len(names) + 1).as_hex()])
    colors = {name: COLORS[name] for name in names if name in COLORS}
    for name in names:
        known = COLORS.get(re.sub(r"^\d+-|-[\d.e+-]+$", "", str(name)))
        if name not in colors:
            colors[name] = next(more) if known is None or known in colors.values() else known
    return {name: colors[name] for name in names}


def plot_accuracy(history: History, title: str = "") -> Figure:
    """Plot the test accuracy of every condition by epoch, and the second half of training enlarged.

    Several seeds of a condition appear as their mean, and one grey bar shows how much the runs of one condition differ:
    bands of several conditions would cover each other.

    Args:
        history: a study, or its `history()`, one row per epoch: condition, label, seed, epoch, lr, test_accuracy.
    """
    return _plot_curves(history, "test_accuracy", join_words(title, ": ", "test accuracy"))


def plot_loss(history: History, title: str = "") -> Figure:
    """Plot the test cross-entropy (test_loss), without penalties, of every condition by epoch, as `plot_accuracy`."""
    return _plot_curves(history, "test_loss", join_words(title, ": ", "test loss, cross-entropy without penalty"))


def plot_learning_curves(history: History, title: str = "", epochs: int | None = None) -> Figure:
    """Plot training accuracy (dashed) and test accuracy (solid) by epoch, a panel per condition, with the gap shaded.

    Lines are means over the seeds, with bands from the lowest to the highest. Training accuracy is that logged during
    training, with dropout and augmentation. A notebook that trains can draw its figure anew after each epoch:

        rows = []
        view = display(plot_learning_curves(rows, epochs=20), display_id=True)
        for epoch in range(1, 21):
            ...
            rows.append({"epoch": epoch, "train_accuracy": training.accuracy, "test_accuracy": accuracy})
            view.update(plot_learning_curves(rows, epochs=20))

    Args:
        history: a study, its `history()`, or rows: epoch, train_accuracy and test_accuracy (0 to 1) and, for several
            runs, condition, label and seed.
        epochs: the last epoch on the axis; by default that of the history.
    """
    table = _read_history(history, ("epoch", "train_accuracy", "test_accuracy"))
    conditions = dict(list(table.groupby("condition", sort=False))) or {"": table}
    colors = colors_of(list(conditions))
    lowest = min([0.98, *table["train_accuracy"], *table["test_accuracy"]]) if len(table) else 0
    with rc_context(STYLE):
        grid = panels(9 if len(conditions) > 1 else 6.5, 3, len(conditions), title)
        for axes, (slug, rows) in zip(grid, conditions.items(), strict=True):
            axes.set(xlabel="epoch", xlim=(0.8, max(2, epochs or 0, *table["epoch"])))
            axes.set(ylabel="accuracy (dashed: training)", ylim=(math.floor(50 * lowest) / 50, 1.01))
            axes.set_title(next(iter(rows["label"]), ""), loc="left")
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axes.label_outer()
            if len(rows):
                _draw_gap(axes, rows, colors[slug])
    return grid[0].figure.figure


def _draw_gap(axes: Axes, rows: pd.DataFrame, color: str) -> None:
    """Draw training and test accuracy of one condition, shade what is between them, and name all three inside."""
    for column in ("train_accuracy", "test_accuracy"):
        seeds = rows.groupby("epoch")[column]
        axes.fill_between(seeds.min().index, seeds.min(), seeds.max(), color=color, alpha=0.15, linewidth=0)
    training = _draw_line(axes, rows, "train_accuracy", color, "--")
    test = _draw_line(axes, rows, "test_accuracy", color)
    axes.fill_between(test.index, training, test, color=color, alpha=0.12, linewidth=0)
    high, low = training.iloc[-1], test.iloc[-1]
    digits = 1 if abs(high - low) >= 0.01 else 2  # so that the gap is the difference of the two
    gap = f"gap {signed(100 * (high - low), digits).lstrip('+')} points"
    texts = [(f"test {low:.{digits}%}", color), (gap, INK), (f"training {high:.{digits}%}", color)]
    first = 0.05 if min(high, low) > sum(axes.get_ylim()) / 2 else 0.5  # below the ends of the lines, or above
    for row, (text, tone) in enumerate(texts if low <= high else texts[::-1]):
        axes.text(0.97, first + 0.085 * row, text, transform=axes.transAxes, ha="right", fontsize=11, color=tone)


def _draw_line(axes: Axes, rows: pd.DataFrame, what: str, color: str, dash: str = "-") -> pd.Series:
    """Draw and return the mean over the seeds by epoch."""
    mean = rows.groupby("epoch")[what].mean()
    axes.plot(mean.index, mean, dash, color=color, linewidth=2, marker="o" if len(mean) == 1 else None)
    return mean


def _read_history(history: History, columns: Sequence[str]) -> pd.DataFrame:
    """Return a history with condition, label and seed. Raises ValueError if a column of `columns` is missing."""
    table = pd.DataFrame(history) if isinstance(history, pd.DataFrame | list) else history.history()
    if len(table) and (missing := [column for column in columns if column not in table]):
        raise ValueError(f"a history to draw has the columns {', '.join(columns)}; this one lacks {', '.join(missing)}")
    defaults = {**dict.fromkeys(columns), "condition": "", "seed": 1, "label": table.get("condition", "")}
    return table.assign(**{name: value for name, value in defaults.items() if name not in table})


def label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write the name of each line right of the panel, at the height of its end or below the name above.

    Args:
        ends: value, text and colour of each line.
    """
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    step = (high - low) * min(0.072, 1 / len(ends))
    place = high + step
    for below, (value, text, color) in reversed(list(enumerate(sorted(ends, key=lambda end: end[0])))):
        place = max(low + below * step, min(value, place - step))
        axes.text(1.015, place, text, transform=axes.get_yaxis_transform(), va="center", fontsize=10.5, color=color)


def _plot_curves(history: History, column: str, title: str) -> Figure:
    table = _read_history(history, ("epoch", "lr", column))
    if not len(table):
        raise ValueError("this history has no epoch to draw: train one first")
    epochs = int(table["epoch"].max())
    first, colors = epochs // 2 + 1, colors_of(list(table["condition"].unique()))
    second_half = f"epochs {first} to {epochs}, enlarged" if first < epochs else f"epoch {epochs}"
    last = table.sort_values("epoch", kind="stable").groupby(["condition", "seed"], sort=False).last()
    ends = last.groupby("condition", sort=False)
    fewest, most = ends.size().min(), ends.size().max()
    means, labels, sd = ends[column].mean(), ends["label"].first(), ends[column].var().mean() ** 0.5
    with rc_context(STYLE):
        figure = Figure(figsize=(10, 4.4), layout="constrained")
        whole, close = figure.subplots(1, 2, width_ratios=(3, 2))
        for axes, start, name in ((whole, 1, "all epochs"), (close, first, second_half)):
            for slug, rows in table[table["epoch"] >= start].groupby("condition", sort=False):
                _draw_line(axes, rows, column, colors[slug])
            axes.set(title=name, xlabel="epoch")
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))  # two decimals say each tick exactly
            if column == "test_accuracy":
                axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=2))
            _mark_new_rates(axes, table, start)
        whole.set_ylabel(f"{column.replace('_', ' ')} (the axis does not start at 0)")
        if sd > 0:
            close.errorbar(1.02 * epochs, means.mean(), sd, fmt="none", ecolor="#888888", elinewidth=4)
            close.set_title(f"{second_half}\ngrey bar: \N{PLUS-MINUS SIGN}1 SD of runs of one condition")
        number = "{:.2%}  {}" if column == "test_accuracy" else "{:.4f}  {}"
        label_ends(close, [(mean, number.format(mean, labels[slug]), colors[slug]) for slug, mean in means.items()])
        seeds = f"{fewest} to {most}" if fewest < most else most
        figure.suptitle(f"{title} (mean of {seeds} seeds)" if most > 1 else f"{title} (1 seed)")
    return figure


def _mark_new_rates(axes: Axes, history: pd.DataFrame, start: int) -> None:
    """Draw a dotted line where the learning rate of every run changes after the epoch `start`, and explain it."""
    before = history.groupby(["condition", "seed"])["lr"].shift()
    changes = (before.notna() & (history["lr"] != before)).groupby(history["epoch"]).all()
    epochs = changes.index[changes]
    if 0 < len(epochs) <= len(changes) / 2:  # a rate that changes at every epoch has no steps to show
        places = [epoch - 0.5 for epoch in epochs if epoch > start]
        axes.vlines(places, 0, 1, "#888888", ":", transform=axes.get_xaxis_transform(), linewidth=1.2)
        axes.set_xlabel("epoch (dotted: new learning rate)")


def panels(width: float, height: float, count: int, title: str = "") -> list[Axes]:
    """Return the panels of a new figure of this width, each of this height (inches), up to three in a row."""
    columns = 2 if count == 4 else min(3, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(width, height * rows + 0.5), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes in grid[count:]:
        axes.axis("off")
    return list(grid[:count])


def plot_digits(images: Tensor, titles: Sequence[str], columns: int, title: str = "") -> Figure:
    """Draw grey-level images (N, H, W) in a grid, ink on paper, each under its title.

    Raises ValueError if there are not as many titles as images.
    """
    if len(titles) != len(images):
        raise ValueError(f"{len(images)} images need as many titles, not {len(titles)}")
    count = max(1, -(-len(images) // columns))
    lines = [line for text in titles for line in text.splitlines()]
    height, width = 1 + max((text.count("\n") for text in titles), default=0), min(1.6, 10 / columns)
    size = max(7.0, min(12.0, 125 * width / max([8, *map(len, lines)])))  # points: as large as the column allows
    high = count * (0.85 * width + 0.019 * size * height) + 0.35 * title.count("\n") + 0.5
    figure = Figure(figsize=(width * columns, high), layout="constrained")
    with rc_context(STYLE):
        bare: dict[str, Any] = {"frame_on": False, "xticks": [], "yticks": []}
        grid = figure.subplots(count, columns, squeeze=False, subplot_kw=bare).ravel()
        for axes, image, text in zip(grid, images, titles, strict=False):
            axes.imshow(image.numpy(), cmap="gray_r", vmin=0, vmax=255)
            axes.set_title(text, fontsize=size)
        figure.suptitle(title if len(images) else f"{title}\nno images to show".strip())
    return figure


def plot_misclassified(wrong: pd.DataFrame, images: ImageDataset, title: str = "", count: int = 25) -> Figure:
    """Draw the first `count` images that a model gets wrong: actual and predicted class, and its confidence.

    Args:
        wrong: one row per error of the model on `images`, from `misclassified`.
    """
    first = wrong.head(count)
    titles = [f"{row.actual}, taken for\n{row.predicted} ({row.confidence:.0%})" for row in first.itertuples()]
    share = f"{len(first)} of its {len(wrong)} errors on {len(images.labels):,} images (confidence in brackets)"
    return plot_digits(images.images[first["image"].tolist()], titles, columns=5, title=join_words(title, "\n", share))


def plot_weights(weights: Mapping[str, np.ndarray], labels: Mapping[str, str] | None = None, title: str = "") -> Figure:
    """Plot a histogram of the weights of each condition, with the share of weights that are almost zero.

    Args:
        weights: the weights (count,) of each condition by slug, from `convolution_weights`; those of several runs are
            concatenated. A slug may be followed by a space and more words, such as the epoch.
        labels: the conditions' names; by default their slugs.
    """
    slugs = [name.partition(" ")[0] for name in weights]
    colors, bins = colors_of(list(dict.fromkeys(slugs))), np.linspace(-0.3, 0.3, 61).tolist()
    with rc_context(STYLE):
        grid = panels(10, 2.3, len(weights), title)
        for axes, slug, (name, values) in zip(grid, slugs, weights.items(), strict=False):
            axes.hist(values, bins, weights=np.full(len(values), 1 / len(values)), color=colors[slug])
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axes.set_title(f"{label_of(name, labels)}: {np.mean(np.abs(values) < 0.001):.0%} within ±0.001")
        grid[0].figure.supxlabel("weight", fontsize=12)
        grid[0].figure.supylabel("share of the weights, in steps of 0.01", fontsize=12)
    return grid[0].figure.figure


def panel(size: tuple[float, float], ax: Axes | None = None) -> Axes:
    """Return the panel to draw on: `ax`, or the panel of a new figure."""
    return Figure(figsize=size, layout="constrained").subplots() if ax is None else ax


def plot_replication(
    outcomes: pd.DataFrame, labels: Mapping[str, str] | None = None, title: str = "", ax: Axes | None = None
) -> Figure:
    """Plot every run of every condition as a dot, and each condition's mean with its 95% t interval.

    Args:
        outcomes: accuracies in percent, one row per seed, one column per condition.
        labels: the conditions' names; by default those of the columns.
    """
    outcomes = complete_table(outcomes)
    statistics = condition_statistics(outcomes)
    colors = colors_of(list(outcomes))
    with rc_context(STYLE):
        axes = panel((10, 1.2 + 0.6 * len(statistics)), ax)
        for row in statistics.itertuples():
            color = colors[row.condition]
            below = row.Index + np.linspace(0.2, 0.38, row.n)  # one above the other, so that equal runs show
            axes.plot(outcomes[row.condition], below, "o", color=color, alpha=0.55, markersize=6, markeredgewidth=0)
            axes.plot([row.low, row.high], [row.Index] * 2, color=color, linewidth=3, solid_capstyle="butt")
            axes.plot(row.mean, row.Index, "D", color=color, markeredgecolor="white", markersize=9)
        axes.xaxis.set_major_formatter(PercentFormatter(100, decimals=2))
        axes.set_xlabel("test accuracy at the last epoch")
        means = [f"{row.mean:.2f}%  ({row.low:.2f} to {row.high:.2f})" for row in statistics.itertuples()]
        label_rows(axes, [label_of(slug, labels) for slug in outcomes], means)
        axes.set_title(join_words(title, "\n", f"{len(outcomes)} seeds: {DOTS}"))
    return axes.figure.figure


def plot_differences(
    outcomes: pd.DataFrame, labels: Mapping[str, str] | None = None, title: str = "", ax: Axes | None = None
) -> Figure:
    """Draw a forest plot of the paired differences, the largest on top.

    Differences that are significant after Holm's correction are black. The bars are uncorrected 95% t intervals,
    which match "p alone"; p after Holm's correction is beside it.

    Args: as in `plot_replication`.
    """
    comparisons = paired_comparisons(outcomes).sort_values("difference", ascending=False, ignore_index=True)
    names, beside = [], []
    with rc_context(STYLE):
        axes = panel((10, 1.5 + 0.36 * len(comparisons)), ax)
        axes.axvline(0, color="#333333", linewidth=1)
        for row in comparisons.itertuples():
            color = INK if row.p_holm <= 0.05 else QUIET
            axes.plot([row.low, row.high], [row.Index] * 2, color=color, linewidth=2)
            axes.plot(row.difference, row.Index, "s", color=color, markersize=6)
            names.append(f"{label_of(row.first, labels)}  minus  {label_of(row.second, labels)}")
            beside.append(f"{signed(row.difference)}    {row.p:.3f}    {row.p_holm:.2f}")
        label_rows(axes, names, beside, header=f"points    p alone    among {len(names)}")
        axes.set_xlabel("mean paired difference and 95% interval, points of accuracy (right of 0: the first is better)")
        count = (comparisons["p_holm"] <= 0.05).sum() or "none"
        what = f"{len(comparisons)} differences from {comparisons['n'].max()} seeds"
        said = join_words(title, ": ", f"{what}, {count} significant after correction")
        axes.set_title(said, pad=28)  # above the header
    return axes.figure.figure


def plot_sign_flips(differences: Sequence[float], title: str = "", ax: Axes | None = None) -> Figure:
    """Plot the means of paired differences under random signs, and the observed mean.

    Means at least as far from zero as the observed one are black: their share is the p-value of `sign_flip_p`.
    """
    flips, mean = sign_flip_means(differences), float(np.mean(differences))
    border = max(0.0, abs(mean) - 2e-6 * float(np.abs(differences).sum()))  # the means are rounded
    reach = max(1.02 * flips.index.max(), 1.01 * abs(mean)) or 1.0
    flips = flips.groupby((flips.index / reach).to_numpy().round(6)).sum()  # equal ones may differ in the last digits
    middles, shares, width = reach * flips.index, flips, reach * float(np.diff(flips.index).min(initial=1))
    if width < reach / 250:  # too many for a bar each, unlike those of accuracies, which are steps of one image
        width = 2 * reach / min(41, 2 * int(2 ** (len(differences) / 2 - 1)) + 1)  # few flips need wide bars
        outer = border + width * np.arange(2 + int((reach - border) / width))  # no narrower than the rest
        edges = np.unique([*-outer, *np.linspace(-border, border, 2 + int(2 * border / width)), *outer])
        shares, _ = np.histogram(middles, edges, weights=flips)
        middles, width = (edges[:-1] + edges[1:]) / 2, np.diff(edges)
    colors = [INK if abs(middle) >= border else QUIET for middle in middles]
    with rc_context(STYLE):
        axes = panel((9, 4), ax)
        axes.margins(y=0.2)
        axes.bar(middles, shares, width, color=colors, edgecolor="white", linewidth=0.5)
        axes.axvline(mean, color=INK, linewidth=1.5, linestyle="--", label=f"found: {signed(mean)}")
        axes.legend(frameon=False, loc="upper left" if mean > 0 else "upper right")
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set(xlabel="mean difference, in points, if a coin gives each seed its sign", ylabel="share of the flips")
        share = f"{sign_flip_p(differences):.1%} of all {2 ** len(differences):,} flips"
        axes.set_title(join_words(title, "\n", f"black: at least as far from 0 as the mean found, {share}"))
    return axes.figure.figure


def join_words(title: str, mark: str, text: str) -> str:
    return f"{title}{mark}{text}" if title else text


def signed(points: float, decimals: int = 3) -> str:
    return f"{round(points, decimals) + 0.0:+.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def label_of(slug: str, labels: Mapping[str, str] | None) -> str:
    return (labels or {}).get(slug, slug)


def label_rows(axes: Axes, names: Sequence[str], texts: Sequence[str], header: str = "") -> None:
    """Label each row, the first on top, with a name on the left and a text right of the panel, under a header."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    for row, text in enumerate([header, *texts], start=-1):
        axes.text(1.015, row, text, transform=axes.get_yaxis_transform(), va="center", fontsize=10)
