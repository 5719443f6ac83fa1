"""Figures that only one notebook draws. Figures for any study are in s6lib.plots."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter, StrMethodFormatter
from torch import Tensor

from s6lib.data import CLASS_NAMES, ImageDataset
from s6lib.plots import (
    COLORS,
    DOTS,
    INK,
    OTHER_COLORS,
    QUIET,
    STYLE,
    colors_of,
    join_words,
    label_ends,
    label_of,
    label_rows,
    panel,
    panels,
    signed,
)
from s6lib.statistics import condition_statistics, mean_interval, power, seeds_needed

THOUSANDS = StrMethodFormatter("{x:,.0f}")


def _mark_sizes(axes: Axes, ticks: Sequence[float], **look: object) -> None:
    """Make the x axis logarithmic, with these ticks alone."""
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:,g}" for tick in ticks], **look)
    axes.xaxis.set_minor_locator(NullLocator())


def plot_penalties(l1: float, l2: float) -> Figure:
    """Draw both penalties of one weight, and the size of their gradients, which pull it towards zero."""
    sizes = np.linspace(-2, 2, 401)
    curves = {
        "l1-bn": ("L1", l1 * np.abs(sizes), np.full(401, l1)),
        "l2-bn": ("L2", l2 * sizes**2, 2 * l2 * np.abs(sizes)),
    }
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    with rc_context(STYLE):
        left, right = figure.subplots(1, 2)
        for slug, (name, penalty, pull) in curves.items():
            left.plot(sizes, penalty, color=COLORS[slug], label=name, linewidth=2.5)
            right.plot(sizes, pull, color=COLORS[slug], label=name, linewidth=2.5)
        left.set(title=f"penalty: {l1:g} |w| and {l2:g} w²", xlabel="weight w", ylabel="added to the loss")
        right.set(title="pull towards zero", xlabel="weight w", ylabel="size of the gradient")
        crossing = l1 / (2 * l2)
        right.annotate(
            f"alike at |w| = {crossing:g}", (crossing, l1), (0.37, 0.9), textcoords="axes fraction",
            arrowprops={"arrowstyle": "->", "color": "#666666"}, fontsize=10,
        )  # fmt: skip
        left.legend(frameon=False)
        for axes in (left, right):
            axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    return figure


def plot_limits(best: tuple[float, float], limit: float = 1.0) -> Figure:
    """Draw rings of equal loss of two weights, and the best point within the limit of L1 and within that of L2.

    Args:
        best: the two weights with the smallest loss; it grows with the square of the distance from them.
        limit: the largest |w1| + |w2|, and the radius of the circle.
    """
    angles = np.linspace(0, 2 * np.pi, 3601)
    circle = np.stack([np.cos(angles), np.sin(angles)])
    edges = {
        "l1-bn": ("L1: a diamond", limit * circle / np.abs(circle).sum(0)),
        "l2-bn": ("L2: a circle", limit * circle),
    }
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    with rc_context(STYLE):
        for axes, (slug, (name, edge)) in zip(figure.subplots(1, 2), edges.items(), strict=True):
            distances = np.hypot(edge[0] - best[0], edge[1] - best[1])
            touched = edge[:, distances.argmin()]
            for radius in distances.min() * np.array([0.35, 0.7, 1.0]):
                axes.plot(best[0] + radius * circle[0], best[1] + radius * circle[1], color="#999999", linewidth=1)
            axes.fill(*edge, color=COLORS[slug], alpha=0.25)
            axes.plot(*edge, color=COLORS[slug], linewidth=2)
            axes.plot(*best, "x", color="#333333", markersize=9, markeredgewidth=2)
            axes.plot(*touched, "o", color=COLORS[slug], markeredgecolor="#333333", markersize=9)
            place = " and ".join(f"{abs(weight):.2f}" for weight in touched)
            axes.set(title=f"{name}\nbest weights within it: {place}", xlabel="weight 1", ylabel="weight 2")
            axes.set(xlim=(-1.2, 2.4), ylim=(-1.2, 1.6), aspect="equal")
    return figure


def plot_class_balance(train: ImageDataset, test: ImageDataset) -> Figure:
    """Draw the number of images of each class, for training and for test."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    with rc_context(STYLE):
        for axes, images, name in zip(figure.subplots(1, 2), (train, test), ("training", "test"), strict=True):
            counts = images.labels.bincount(minlength=len(images.class_names))
            axes.bar(images.class_names, counts.numpy(), color=OTHER_COLORS[0])
            axes.set(title=f"{len(images.labels):,} {name} images", ylabel="images of the class")
            axes.tick_params("x", rotation=45)
            axes.yaxis.set_major_formatter(THOUSANDS)
            axes.grid(visible=False, axis="x")
    return figure


def plot_ghost_scatter(scatter: pd.DataFrame, title: str = "") -> Figure:
    """Draw how far the means of ghost batches scatter, by the depth of the layer: a line for each number of splits.

    Args:
        scatter: as `ghost_scatter` gives it: a row a layer, a column a number of splits.
    """
    with rc_context(STYLE):
        axes = panel((8, 3.8))
        for alpha, splits in zip(np.linspace(0.4, 1, scatter.shape[1]), scatter, strict=True):
            look = {"color": COLORS["gbn"], "marker": "o", "alpha": alpha, "linewidth": 2}
            axes.plot(scatter.index, scatter[splits], label=f"{splits} splits", **look)
        axes.set_xticks(list(scatter.index))
        axes.set(
            xlabel="normalisation layer", ylabel="scatter of the ghosts' means\n(SDs of the channel)", ylim=(0, None)
        )
        axes.legend(frameon=False)
        axes.set_title(title)
    return axes.figure


def plot_grey_levels(images: Mapping[str, Tensor]) -> Figure:
    """Draw the frequency of each level of ink, for named images (N, H, W), without the background."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    with rc_context(STYLE):
        axes = figure.subplots()
        for (name, grey), color in zip(images.items(), OTHER_COLORS, strict=False):
            ink = grey[grey > 0].float().numpy()
            axes.hist(ink, np.arange(0, 257, 8), histtype="step", label=name, color=color, linewidth=1.8)
        axes.yaxis.set_major_formatter(THOUSANDS)
        axes.set(xlabel="grey level (255: full ink)", ylabel="pixels")
        axes.legend(frameon=False, loc="upper center")
    return figure


def plot_winners(outcomes: pd.DataFrame, labels: Mapping[str, str] | None = None) -> Figure:
    """Draw, for each seed, the accuracies of one run of each condition, with the best one ringed.

    Args: as in `plot_replication`.
    """
    colors, best = colors_of(list(outcomes)), outcomes.eq(outcomes.max(axis=1), axis=0)
    with rc_context(STYLE):
        axes = panel((10, 4.4))
        for place, slug in enumerate(outcomes):
            aside = np.arange(len(outcomes)) + 0.11 * (place - (outcomes.shape[1] - 1) / 2)
            axes.plot(aside, outcomes[slug], "o", color=colors[slug], markersize=6, label=label_of(slug, labels))
            ring = {"markersize": 13, "markerfacecolor": "none", "markeredgecolor": "#222222"}
            axes.plot(aside[best[slug]], outcomes.loc[best[slug], slug], "o", **ring)
        axes.set_xticks(range(len(outcomes)), outcomes.index)
        axes.grid(visible=False, axis="x")
        for seed in range(1, len(outcomes)):
            axes.axvline(seed - 0.5, color="#E6E6E6", linewidth=1)
        axes.yaxis.set_major_formatter(PercentFormatter(100, decimals=2))
        axes.set(xlabel="seed: one study of one run each", ylabel="test accuracy at the last epoch")
        axes.figure.legend(loc="outside lower center", ncols=min(6, outcomes.shape[1]), frameon=False)
        winners = f"{best.any().sum()} of {outcomes.shape[1]} conditions win, or share a win (ringed)"
        axes.set_title(f"{len(outcomes)} studies: {winners}")
    return axes.figure


def plot_answers(
    answers: pd.DataFrame,
    margin: float,
    questions: Mapping[str, str] | None = None,
    title: str = "",
) -> Figure:
    """Draw the preregistered answers: mean differences with 90% (thick) and 95% t intervals, and the margin in grey.

    Args:
        answers: a row a question: question, n, mean, low_90, high_90, low_95, high_95, said.
        margin: in points, the largest difference that does not matter.
        questions: their wording; by default their names in the table.
    """
    with rc_context(STYLE):
        axes = panel((10, 1.6 + 0.5 * len(answers)))
        axes.axvspan(-margin, margin, color="#EEEEEE", linewidth=0)
        axes.axvline(0, color="#333333", linewidth=1)
        for row in answers.reset_index(drop=True).itertuples():
            axes.plot([row.low_95, row.high_95], [row.Index] * 2, color=INK, linewidth=1.5)
            axes.plot([row.low_90, row.high_90], [row.Index] * 2, color=INK, linewidth=5, solid_capstyle="butt")
            axes.plot(row.mean, row.Index, "D", color=INK, markeredgecolor="white", markersize=9)
        names = [f"{label_of(row.question, questions)} (n = {row.n})" for row in answers.itertuples()]
        label_rows(axes, names, list(answers["said"]))
        axes.set_xlabel(
            f"difference in test accuracy, in points; grey: within \N{PLUS-MINUS SIGN}{margin:g}, "
            "thick: 90%, thin: 95% interval"
        )
        axes.set_title(title)
    return axes.figure


def plot_split_sweep(outcomes: pd.DataFrame, splits: Mapping[str, int], batch_size: int, title: str = "") -> Figure:
    """Draw accuracy by the number of ghost batches (1 is BatchNorm): every run, and means with their 95% intervals.

    Args:
        outcomes: accuracies in percent, a row a seed, a column a condition.
        splits: the number of ghost batches of each condition.
        batch_size: images in a batch.

    Raises ValueError if a condition is not in splits.
    """
    if missing := [slug for slug in outcomes if slug not in splits]:
        raise ValueError(f"splits lacks the number of ghost batches of {', '.join(missing)}: give 1 for BatchNorm")
    statistics = condition_statistics(outcomes)
    statistics["splits"] = statistics["condition"].map(splits)
    statistics = statistics.sort_values("splits", ignore_index=True)
    with rc_context(STYLE):
        axes = panel((8, 4.2))
        for row in statistics.itertuples():
            dots = {"color": COLORS["gbn"], "alpha": 0.45, "markersize": 6}
            axes.plot([0.93 * row.splits] * row.n, outcomes[row.condition], "o", **dots)  # left of the interval
        error = [statistics["mean"] - statistics["low"], statistics["high"] - statistics["mean"]]
        axes.errorbar(statistics["splits"], statistics["mean"], error, color=COLORS["gbn"], marker="D", capsize=4)
        axes.set_xscale("log", base=2)
        axes.set_xticks(statistics["splits"], [f"{count}\n({batch_size // count})" for count in statistics["splits"]])
        axes.set_xlabel("splits of the batch (images in each ghost batch); 1 is BatchNorm")
        axes.set_ylabel("test accuracy at the last epoch")
        axes.yaxis.set_major_formatter(PercentFormatter(100, decimals=2))
        axes.set_title(join_words(title, ", ", f"{len(outcomes)} seeds: {DOTS}"))
    return axes.figure


def plot_power(sd: float, difference: float, questions: Sequence[int], title: str = "") -> Figure:
    """Draw how often a t test finds a true difference, by the number of seeds: a line for each number of questions.

    Args:
        sd: SD of the paired differences, in points.
        difference: the true difference, in points.
        questions: numbers of comparisons that a correction must cover; 1 for no correction.
    """
    with rc_context(STYLE):
        axes = panel((8, 3.8))
        needed = [seeds_needed(sd, difference, count) for count in questions]
        seeds = np.unique(np.linspace(3, 2 * max(needed), 100).astype(int))
        axes.axhline(0.8, color="#333333", linewidth=1, linestyle="--")
        for count, enough, grey in zip(questions, needed, np.linspace(0.1, 0.7, len(questions)), strict=True):
            name = "the only question" if count == 1 else f"one of {count} questions"
            shares = [power(sd, difference, n, count) for n in seeds]
            axes.plot(seeds, shares, color=str(grey), linewidth=2.2, label=f"{name}: {enough} seeds for 80%")
            axes.plot(enough, power(sd, difference, enough, count), "o", color=str(grey), markersize=8)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set(xlabel="seeds", ylabel="studies that find it", ylim=(0, 1.02))
        axes.legend(loc="lower right", frameon=False)
        axes.set_title(join_words(title, ": ", f"how often a t test finds a true difference of {difference:g} points"))
    return axes.figure


def plot_frontier(runs: pd.DataFrame, reported: pd.DataFrame, goal: float, title: str = "") -> Figure:
    """Draw accuracy by number of parameters: every run, means with 95% intervals, and what others reported.

    Args:
        runs: a row a run: network, parameters, accuracy (percent).
        reported: a row a report, of one run: parameters, accuracy (percent), kind ("last" or "best" epoch, "claim").
        goal: an accuracy in percent, drawn as a line.
    """
    with rc_context(STYLE):
        axes = panel((9.5, 5.4))
        axes.axhline(goal, color="#333333", linewidth=1, linestyle="--")
        axes.text(0.005, goal, f"{goal:g}%", transform=axes.get_yaxis_transform(), va="bottom", fontsize=10)
        markers = {
            "last": ("s", "reported, one run, last epoch"),
            "best": ("^", "reported, best epoch or best run"),
            "claim": ("x", "claimed, without a log"),
        }
        for kind, (marker, label) in markers.items():
            rows = reported[reported["kind"] == kind]
            axes.plot(rows["parameters"], rows["accuracy"], marker, color=INK, label=label, alpha=0.5)
        colors = colors_of(list(runs["network"].unique()))
        for network, rows in runs.groupby("network", sort=False):
            _draw_sizes(axes, rows, rows["parameters"], colors[network])
            smallest = rows.groupby("parameters")["accuracy"].mean().head(1)
            look = {"fontsize": 12, "weight": "bold", "color": colors[network], "ha": "right", "va": "bottom"}
            axes.annotate(network, (smallest.index[0], smallest.iloc[0]), (-9, 6), textcoords="offset points", **look)
        _enlarge(axes, runs[runs["parameters"] > 0.95 * runs["parameters"].max()], colors)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        axes.xaxis.set_major_formatter(THOUSANDS)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(PercentFormatter(100, decimals=1))
        axes.set(xlabel="parameters", ylabel="test accuracy", title=join_words(title, "\n", DOTS))
        axes.legend(loc="lower left", fontsize=10)
    return axes.figure


def _draw_sizes(axes: Axes, runs: pd.DataFrame, places: pd.Series, color: str) -> None:
    """Draw one network's runs as dots, and the mean of each size with its 95% interval over them."""
    axes.plot(places, runs["accuracy"], "o", color=color, alpha=0.3, markersize=6, markeredgewidth=0)
    sizes = runs["accuracy"].groupby(places)
    means, ends = sizes.mean(), np.array([mean_interval(accuracies) for _, accuracies in sizes])
    error = np.abs(ends.T - means.to_numpy())
    look = {"color": color, "marker": "D", "markeredgecolor": "white", "elinewidth": 2.5, "linewidth": 1.2}
    axes.errorbar(means.index, means, error, **look)


def _enlarge(axes: Axes, runs: pd.DataFrame, colors: Mapping[str, str]) -> None:
    """Draw networks of almost one size side by side in a corner, if there are several."""
    networks = list(runs.groupby(["network", "parameters"], sort=False))
    if len(networks) < 2:
        return
    corner = axes.inset_axes((0.74, 0.13, 0.245, 0.36))
    for place, ((network, _), rows) in enumerate(networks):
        _draw_sizes(corner, rows, pd.Series(place, rows.index), colors[network])
    names = [f"{network}\n{parameters:,}" for (network, parameters), _ in networks]
    corner.set_xticks(range(len(networks)), names, fontsize=9)
    corner.tick_params("y", labelsize=9)
    corner.yaxis.set_major_formatter(PercentFormatter(100, decimals=2))
    corner.set(xlim=(-0.6, len(networks) - 0.4))
    corner.set_title("the largest, side by side", fontsize=10)


def plot_gains(gains: pd.DataFrame, title: str = "") -> Figure:
    """Draw the gain of each change: a row per mean difference with its 95% interval, from the top.

    Args:
        gains: a row a change: label, group, n (pairs), mean, low, high (points).
    """
    with rc_context(STYLE):
        axes = panel((9.5, 1.5 + 0.36 * len(gains)))
        axes.axvline(0, color="#333333", linewidth=1)
        for row in gains.reset_index(drop=True).itertuples():
            axes.plot([row.low, row.high], [row.Index] * 2, color=INK, linewidth=2)
            axes.plot(row.mean, row.Index, "D", color=INK, markeredgecolor="white", markersize=8)
        for row in np.flatnonzero(gains["group"] != gains["group"].shift())[1:]:  # a line between two groups
            axes.axhline(row - 0.5, color="#999999", linewidth=0.8)
        beside = [f"{signed(row.mean)}  (n = {row.n})" for row in gains.itertuples()]
        label_rows(axes, list(gains["label"]), beside)
        axes.set_xlabel("gain in test accuracy, in points: mean of paired differences, 95% interval")
        axes.set_title(title)
    return axes.figure


# Of docs/preregistration_when.md, by name: what the figures call it, and what its strength is.
REGULARISERS = {
    "rotation": ("rotation", "largest angle, degrees"),
    "l2": ("L2", "weight of the penalty"),
    "dropout": ("dropout", "share dropped"),
    "ghosts": ("ghost batches", "ghosts in a batch"),
    "l1": ("L1", "weight of the penalty"),
}


def plot_worth(table: pd.DataFrame, title: str = "") -> Figure:
    """Draw test errors by the number of training images, and beside them how many times the images each is worth.

    Args:
        table: rows by name ("nothing" and REGULARISERS) and size, with `error`, in percent, and `worth`, each with its
            interval as `_low` and `_high`, as lesson_tables.worth_by_size gives it. An interval without an end is drawn
            to the edge of the figure.
    """
    limits = (0.6, 4.0)
    looks = {name: {"color": COLORS[name], "label": label} for name, (label, _) in REGULARISERS.items()}
    looks = {"nothing": {"color": COLORS["nothing"], "label": "no regularisation", "zorder": 3}, **looks}
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    with rc_context(STYLE):
        left, right = figure.subplots(1, 2)
        for aside, (name, look) in zip(np.linspace(-1, 1, len(looks)), looks.items(), strict=True):
            _draw_by_size(left, table.loc[name], "error", 1.09**aside, look)
            if name != "nothing":
                _draw_by_size(right, table.loc[name].clip(*limits), "worth", 1.09**aside, look)
        for axes in (left, right):
            _mark_sizes(axes, list(table.loc["rotation"]["error" if axes is left else "worth"].dropna().index))
            axes.grid(visible=False, axis="x")
            axes.set(yscale="log", xlabel="training images")
        left.set_yticks((0.5, 1, 2, 5, 10, 20), ("0.5%", "1%", "2%", "5%", "10%", "20%"))
        left.set_ylabel("test images wrong (logarithmic)")
        left.legend(frameon=False)
        right.set_yticks((0.7, 1, 1.5, 2, 3), ("0.7 times", "1", "1.5 times", "2 times", "3 times"))
        right.set(ylim=limits, ylabel="worth so many times the images (logarithmic)")
        right.axhline(1, color=INK, linewidth=1)
        for axes in (left, right):
            axes.yaxis.set_minor_locator(NullLocator())
        figure.suptitle(join_words(title, "\n", "means over seeds, with their 95% intervals"))
    return figure


def plot_networks(table: pd.DataFrame, title: str = "") -> Figure:
    """Draw the share of the errors that each regulariser removes, a panel for each network and kind of labels.

    Args:
        table: rows: network, labels, size, name and `share`, in percent, with its interval as `_low` and `_high`, as
            lesson_tables.shares_by_network gives it.
    """
    names = list(table["name"].unique())
    with rc_context(STYLE):
        cells = dict(list(table.groupby(["network", "labels"], sort=False)))
        grid = panels(11, 3.1, len(cells), join_words(title, "\n", "means over seeds, with their 95% intervals"))
        for axes, (heading, rows) in zip(grid, cells.items(), strict=True):
            for aside, name in zip(np.linspace(-1, 1, len(names)), names, strict=True):
                look = {"color": COLORS[name], "label": REGULARISERS[name][0]}
                _draw_by_size(axes, rows[rows["name"] == name].set_index("size"), "share", 1.07**aside, look)
            _mark_sizes(axes, list(rows["size"].unique()))
            axes.set_title(", ".join(heading), loc="left")
            axes.set(xlabel="training images", ylabel="share of the errors removed")
            axes.yaxis.set_major_formatter(PercentFormatter(decimals=0))
            axes.axhline(0, color=INK, linewidth=1)
            axes.grid(visible=False, axis="x")
            axes.label_outer()
        grid[0].legend(frameon=False)
    return grid[0].figure.figure


def _draw_by_size(axes: Axes, rows: pd.DataFrame, column: str, aside: float, look: Mapping[str, object]) -> None:
    rows = rows.dropna(subset=column)
    low, mean, high = (rows[name].to_numpy() for name in (f"{column}_low", column, f"{column}_high"))
    bars = [mean - low, high - mean]
    axes.errorbar(aside * rows.index.to_numpy(), mean, bars, marker="o", capsize=3, linewidth=2, **look)


def plot_trials(
    trials: pd.DataFrame,
    size: int,
    name: str,
    strength: float,
    own: pd.DataFrame | None = None,
) -> Figure:
    """Draw training and held-out accuracy of one regulariser by its strength, and say them for one strength.

    Args:
        trials: one row per trial, also of "nothing": size, name, strength, train_accuracy, accuracy (percent).
        own: the reader's trials, drawn as crosses.
    """
    rows = trials[(trials["size"] == size) & (trials["name"] == name)]
    base = trials[(trials["size"] == size) & (trials["name"] == "nothing")]["accuracy"].mean()
    label, unit = REGULARISERS[name]
    training, held_out = rows[rows["strength"] == strength][["train_accuracy", "accuracy"]].mean()
    with rc_context(STYLE):
        axes = panel((8, 4))
        axes.axvline(strength, color=QUIET, linewidth=6, alpha=0.4)
        axes.axhline(base, color=COLORS["nothing"], linewidth=1.5, label="held-out images, no regularisation")
        for column, dash, face in (("train_accuracy", "--", "white"), ("accuracy", "-", COLORS[name])):
            look = {"color": COLORS[name], "markerfacecolor": face}
            means = rows.groupby("strength")[column].mean()
            kind = "training" if dash == "--" else "held-out"
            axes.plot(means.index, means, dash, label=f"{kind} images, {label}", **look)
            axes.plot(rows["strength"], rows[column], "o", **look)
            if own is not None:
                mine = own[(own["size"] == size) & (own["name"] == name)]
                axes.plot(mine["strength"], mine[column], "X", markersize=12, **(look | {"markeredgecolor": INK}))
        _mark_sizes(axes, sorted(set(rows["strength"])))
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_formatter(PercentFormatter(100, decimals=0))
        lowest = base - 1.2 * (101 - base)
        axes.set(ylim=(lowest, 101), xlabel=f"{label}: {unit}", ylabel="accuracy")
        axes.legend(frameon=False, loc="lower center", fontsize=10)
        below = ", below this panel" if held_out < lowest else ""
        said = f"training {training:.1f}%, held-out {held_out:.1f}%{below}, gap {training - held_out:.1f} points"
        axes.set_title(f"{size:,} images, {label} {strength:g}: {said}\nwithout regularisation: held-out {base:.1f}%")
    return axes.figure


def plot_strengths(trials: pd.DataFrame, title: str = "") -> Figure:
    """Draw the gain of each regulariser by its strength: a column each, a row for each number of images.

    A dot is a trial, a line joins the means, a star is the best mean of those with the most seeds. Each row has its own
    scale; trials that lose much more than the best gains are below the panel.

    Args:
        trials: a row a trial: name (of REGULARISERS), size, strength, seed, gain (points).
    """
    sizes = sorted(set(trials["size"]))
    figure = Figure(figsize=(12, 1.9 * len(sizes) + 0.6), layout="constrained")
    with rc_context(STYLE):
        panels = figure.subplots(len(sizes), len(REGULARISERS), sharex="col", sharey="row", squeeze=False)
        for row, size in zip(panels, sizes, strict=True):
            for axes, slug in zip(row, REGULARISERS, strict=True):
                _draw_strengths(axes, trials[(trials["name"] == slug) & (trials["size"] == size)], COLORS[slug])
            highest = max(0.2, trials.loc[trials["size"] == size, "gain"].max())
            row[0].set(ylim=(-0.8 * highest, 1.25 * highest), ylabel=f"{size:,} images\ngain, points")
        for column, (slug, (label, strength)) in zip(panels.T, REGULARISERS.items(), strict=True):
            strengths = sorted(set(trials.loc[trials["name"] == slug, "strength"]))
            column[0].set_title(label)
            _mark_sizes(column[-1], strengths, rotation=60, fontsize=10)
            column[-1].set_xlabel(strength, fontsize=11)
        figure.align_xlabels()
        figure.suptitle(join_words(title, "\n", "a dot is a trial, the line the mean, the star the best strength"))
    return figure


def _draw_strengths(axes: Axes, trials: pd.DataFrame, color: str) -> None:
    """Draw one regulariser on one number of images."""
    gains = trials.groupby("strength")["gain"]
    means, counts = gains.mean(), gains.count()
    best = means[counts == counts.max()].idxmax()
    axes.axhline(0, color="#333333", linewidth=1)
    axes.plot(trials["strength"], trials["gain"], "o", color=color, alpha=0.35, markersize=4)
    axes.plot(means.index, means, "-", color=color, linewidth=2)
    axes.plot(best, means[best], "*", color=color, markeredgecolor="#222222", markersize=14)


def plot_gap(accuracies: pd.DataFrame, title: str = "") -> Figure:
    """Draw training and test accuracy by the number of training images; the gap is what regularisation can close.

    Args:
        accuracies: one row per number of images (the index); "training", "nothing" and "rotation", in percent. The
            first two are of training and test images without regularisation, the last of test images with rotation.
    """
    lines = {
        "training": ("o--", COLORS["nothing"], "training images, no regularisation"),
        "rotation": ("o-", COLORS["rotation"], "test images, rotation"),
        "nothing": ("o-", COLORS["nothing"], "test images, no regularisation"),
    }
    with rc_context(STYLE):
        axes = panel((8, 4.6))
        for column, (style, color, label) in lines.items():
            axes.plot(accuracies.index, accuracies[column], style, color=color, label=label, linewidth=2)
        axes.fill_between(accuracies.index, accuracies["training"], accuracies["nothing"], color="#EEEEEE")
        _mark_sizes(axes, list(accuracies.index))
        axes.yaxis.set_major_formatter(PercentFormatter(100, decimals=0))
        axes.set(xlabel="training images", ylabel="accuracy at the last epoch", title=title)
        axes.legend(frameon=False, loc="lower right")
    return axes.figure


def plot_pruning(curve: pd.DataFrame, labels: Mapping[str, str] | None = None, title: str = "") -> Figure:
    """Plot accuracy by the share of convolution weights set to zero: every run as a dot, and the mean of the seeds.

    Args:
        curve: one row per run and share, from `pruning_curve`: condition, seed, share, accuracy.
        labels: the conditions' names; by default their slugs.
    """
    colors, ends = colors_of(list(curve["condition"].unique())), []
    with rc_context(STYLE):
        axes = panel((9, 4.8))
        sizes = np.linspace(12, 5, len(colors))  # so that no mean hides another
        for size, (slug, rows) in zip(sizes, curve.groupby("condition", sort=False), strict=True):
            means = rows.groupby("share")["accuracy"].mean()
            axes.plot(rows["share"], rows["accuracy"], "o", color=colors[slug], alpha=0.35, markersize=4)
            axes.plot(means.index, means, ":", color=colors[slug], linewidth=1.2)
            axes.plot(means.index, means, "D", color=colors[slug], mec="white", mew=0.5, markersize=size)
            ends.append((means.iloc[-1], f"{means.iloc[-1]:.0%}  {label_of(slug, labels)}", colors[slug]))
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_xticks(sorted(curve["share"].unique()))
        axes.set(xlabel="share of the convolution weights set to zero, the smallest first", ylabel="test accuracy")
        label_ends(axes, ends)
        spread = curve.groupby(["condition", "share"])["accuracy"].agg(["min", "max"])
        (slug, share), (low, high) = (widest := (spread["max"] - spread["min"]).idxmax()), spread.loc[widest]
        seeds = f"a dot is a run, a diamond the mean of {curve['seed'].nunique()} seeds"
        said = f"{label_of(slug, labels)} at {share:.0%}: {low:.0%} to {high:.0%} by seed"
        axes.set_title(join_words(title, "\n", f"{seeds}; {said}"))
    return axes.figure


def plot_confusion(matrix: np.ndarray, title: str = "", class_names: Sequence[str] = CLASS_NAMES) -> Figure:
    """Plot the errors by actual and predicted class; the diagonal, correct predictions, stays blank."""
    with rc_context(STYLE):
        axes = panel((7, 5.6))
        labels = {"xticklabels": class_names, "yticklabels": class_names, "cbar_kws": {"label": "errors"}}
        # Hide the diagonal and the zeros, so that only errors remain.
        hidden = np.eye(len(matrix), dtype=bool) | (matrix == 0)
        shades = {"cmap": "Blues", "vmin": 0, "vmax": max(1, matrix[~hidden].max(initial=0))}
        sns.heatmap(matrix, mask=hidden, annot=True, fmt="d", square=True, ax=axes, **shades, **labels)
        axes.grid(visible=False)
        axes.set(xlabel="predicted", ylabel="actual", title=title)
        axes.tick_params("x", rotation=45)
        axes.tick_params("y", rotation=0)
    return axes.figure
