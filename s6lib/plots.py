"""Figures for any study, one function each; each returns a `matplotlib.figure.Figure`, and `save` writes it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from s6lib.data import CLASS_NAMES, Digits
from s6lib.statistics import condition_statistics, paired_comparisons, sign_flip_means

# Okabe and Ito's palette for colour-blind readers; a condition has the same colour in every figure.
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
MOST_BANDS = 2  # the bands of more conditions cover each other
DOTS = "a dot is a run, a diamond the mean with its 95% interval"


def save(figure: Figure, path: str | Path) -> None:
    """Write a PNG at 200 dots an inch; the same figure gives the same bytes."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200, metadata={"Software": None})


def colors_of(slugs: Sequence[str]) -> dict[str, str]:
    """Choose a colour for each condition: the one in COLORS, or one that no other has."""
    more = iter(sns.color_palette("husl", max(1, len(slugs))).as_hex())
    return {slug: COLORS.get(slug) or next(more) for slug in slugs}


def plot_accuracy(history: pd.DataFrame, title: str = "") -> Figure:
    """Plot the test accuracy of every condition by epoch, and the second half of training enlarged.

    Several seeds of a condition appear as their mean. Up to two conditions have a band from the lowest seed to the
    highest; with more, one grey bar shows how much the runs of one condition differ.

    Args:
        history: one row per epoch, from `Study.history`: condition, label, epoch, lr, val_accuracy.
    """
    return _plot_curves(history, "val_accuracy", join_words(title, ": ", "test accuracy"), "{:.2%}".format)


def plot_loss(history: pd.DataFrame, title: str = "") -> Figure:
    """Plot the test cross-entropy (val_loss), without penalties, of every condition by epoch, as `plot_accuracy`."""
    name = join_words(title, ": ", "test loss (cross-entropy without penalty)")
    return _plot_curves(history, "val_loss", name, "{:.4f}".format)


def _plot_curves(history: pd.DataFrame, column: str, title: str, formatted: Callable[[float], str]) -> Figure:
    epochs, accuracy = int(history["epoch"].max()), column.endswith("accuracy")
    first = epochs // 2 + 1
    second_half = f"epochs {first} to {epochs}" if first < epochs else f"epoch {epochs}"
    figure = Figure(figsize=(10, 5), layout="constrained")
    with rc_context(STYLE):
        whole, close = figure.subplots(1, 2, width_ratios=(3, 2))
        for axes, start, name in ((whole, 1, "all epochs"), (close, first, second_half)):
            _draw_curves(axes, history[history["epoch"] >= start], column)
            axes.set(title=name, xlabel="epoch", ylabel="")
            step = max(1, epochs // 5)
            axes.set_xticks([start, *range(step * (start // step + 1), epochs + 1, step)])
            axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
            if accuracy:
                axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=2))
        _mark_new_rates((whole, close), (1, first), history, height=0.12 if accuracy else 0.88)
        if history["condition"].nunique() > MOST_BANDS:
            _draw_spread(close, history[history["epoch"] == epochs], column)
        conditions = history.groupby("condition", sort=False)
        ends = conditions.apply(lambda rows: rows.loc[rows["epoch"] == rows["epoch"].max(), column].mean())
        labels = [f"{rows['label'].iloc[0]}\n{formatted(ends[slug])}" for slug, rows in conditions]
        seeds = _describe_seeds(history, bands=len(labels) <= MOST_BANDS)
        name = f"condition, and its value at the last epoch ({seeds})"
        columns = min(6 if len(labels) <= 6 else 5, len(labels))
        lines = whole.get_lines()[: len(labels)]
        figure.legend(lines, labels, title=name, loc="outside lower center", ncols=columns, frameon=False)
        figure.suptitle(title)
    return figure


def _draw_curves(axes: Axes, history: pd.DataFrame, column: str) -> None:
    colors = colors_of(list(history["condition"].unique()))
    bar = ("pi", 100) if len(colors) <= MOST_BANDS else None
    for slug, rows in history.groupby("condition", sort=False):
        line = {"color": colors[slug], "linestyle": "--" if "GBN" in rows["label"].iloc[0] else "-", "linewidth": 1.8}
        marker = "o" if rows["epoch"].nunique() == 1 else None
        band = {"alpha": 0.12, "linewidth": 0}
        sns.lineplot(rows, x="epoch", y=column, errorbar=bar, err_kws=band, marker=marker, ax=axes, **line)


def _draw_spread(axes: Axes, ends: pd.DataFrame, column: str) -> None:
    """Draw a bar right of the curves: one SD of the runs of one condition to both sides, as an interval of the middle.

    Args:
        ends: the rows of the last epoch.
    """
    runs = ends.groupby("condition")[column]
    middle, sd = runs.mean().mean(), runs.var().mean() ** 0.5
    if not sd > 0:  # one seed, or equal ones
        return
    low, high = axes.get_xlim()
    axes.set_xlim(low, high + 0.14 * (high - low))
    place = high + 0.03 * (high - low)
    axes.vlines(place, middle - sd, middle + sd, color="#888888", linewidth=4)
    text: dict[str, Any] = {"rotation": 90, "ha": "center", "va": "center", "fontsize": 10, "color": "#444444"}
    beside, name = high + 0.09 * (high - low), "runs of one condition: \N{PLUS-MINUS SIGN}1 SD"
    axes.text(beside, 0.5, name, transform=axes.get_xaxis_transform(), **text)


def _mark_new_rates(panels: Sequence[Axes], starts: Sequence[int], history: pd.DataFrame, height: float) -> None:
    """Draw a dotted line where the learning rate of every run changes, and explain it once, in the first panel.

    Args:
        starts: the first epoch of each panel.
        height: of the explanation, from 0 at the bottom of the panel to 1.
    """
    before = history.groupby(["condition", "seed"])["lr"].shift()
    changes = (before.notna() & (history["lr"] != before)).groupby(history["epoch"]).all()
    epochs = changes.index[changes]
    if not 0 < len(epochs) <= len(changes) / 2:  # a rate that changes at every epoch has no steps to show
        return
    for axes, start in zip(panels, starts, strict=True):
        places = [epoch - 0.5 for epoch in epochs if epoch > start]
        axes.vlines(places, 0, 1, "#888888", ":", transform=axes.get_xaxis_transform(), linewidth=1.2)
    factors = (history["lr"] / before)[history["epoch"].isin(epochs)].round(6).unique()
    change = f"learning rate \N{MULTIPLICATION SIGN} {factors[0]:g}" if len(factors) == 1 else "new learning rate"
    panels[0].annotate(
        f"dotted: {change}",
        (epochs[0] - 0.5, height),
        xytext=(22, 0),
        xycoords=panels[0].get_xaxis_transform(),
        textcoords="offset points",
        arrowprops={"arrowstyle": "->", "color": "#666666"},
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
        va="center",
        fontsize=10,
        color="#444444",
    )


def plot_digits(
    images: Tensor, titles: Sequence[str], columns: int, title: str = "", rows: Sequence[str] = ()
) -> Figure:
    """Draw grey-level images (N, H, W) in a grid, ink on paper, each under its title.

    `rows` names the rows. Raises ValueError if there are not as many titles as images.
    """
    if len(titles) != len(images):
        raise ValueError(f"{len(images)} images need as many titles, not {len(titles)}")
    count = max(1, -(-len(images) // columns))
    lines = 1 + max((text.count("\n") for text in titles), default=0)
    figure = Figure(
        figsize=(1.6 * columns, count * (1.35 + 0.2 * lines) + 0.35 * title.count("\n") + 0.4), layout="constrained"
    )
    with rc_context(STYLE):
        grid = figure.subplots(count, columns, squeeze=False).ravel()
        for axes in grid:
            axes.axis("off")
        for axes, name in zip(grid[::columns], rows, strict=False):
            axes.text(-0.1, 0.5, name, transform=axes.transAxes, ha="right", va="center", fontsize=10)
        for axes, image, text in zip(grid, images, titles, strict=False):
            axes.imshow(image.numpy(), cmap="gray_r", vmin=0, vmax=255)
            axes.set_title(text, fontsize=10)
        figure.suptitle(title if len(images) else f"{title}\nno images to show".strip())
    return figure


def plot_misclassified(wrong: pd.DataFrame, digits: Digits, title: str = "", count: int = 25) -> Figure:
    """Draw the first `count` images that a model gets wrong: actual and predicted class, and its confidence.

    Args:
        wrong: one row per error of the model on `digits`, from `misclassified`.
    """
    first = wrong.head(count)
    titles = [f"{row.actual}, taken for\n{row.predicted} ({row.confidence:.0%})" for row in first.itertuples()]
    share = f"{len(first)} of its {len(wrong)} errors on {len(digits.labels):,} images"
    heading = f"{join_words(title, ': ', share)}\nactual class, taken for predicted class (confidence)"
    return plot_digits(digits.images[first["image"].tolist()], titles, columns=5, title=heading)


def plot_weights(weights: Mapping[str, np.ndarray], labels: Mapping[str, str] | None = None, title: str = "") -> Figure:
    """Plot a histogram of the weights of each condition, with the share of weights that are almost zero.

    Args:
        weights: the weights (count,) of each condition by slug, from `convolution_weights`; those of several runs are
            concatenated. A slug may be followed by a space and more words, such as the epoch.
        labels: the conditions' names; by default their slugs.
    """
    slugs = [name.partition(" ")[0] for name in weights]
    colors, bins = colors_of(list(dict.fromkeys(slugs))), np.linspace(-0.3, 0.3, 61)
    columns = min(3, len(weights))
    rows = -(-len(weights) // columns)
    figure = Figure(figsize=(10, 0.6 + 2.3 * rows), layout="constrained")
    with rc_context(STYLE):
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
        for axes in grid[len(weights) :]:
            axes.axis("off")
        for axes, slug, (name, values) in zip(grid, slugs, weights.items(), strict=False):
            axes.hist(values, bins, weights=np.full(len(values), 1 / len(values)), color=colors[slug])
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axes.set_title(f"{label_of(name, labels)}: {np.mean(np.abs(values) < 0.001):.0%} below 0.001")
        figure.supxlabel("weight", fontsize=12)
        figure.supylabel("share of the weights, in steps of 0.01", fontsize=12)
        figure.suptitle(title)
    return figure


def plot_pruning(
    curve: pd.DataFrame, labels: Mapping[str, str] | None = None, title: str = "", ax: Axes | None = None
) -> Figure:
    """Plot accuracy by the share of convolution weights set to zero: the seeds' mean, lowest and highest.

    The shares are equally far apart, and the dots of one share stand side by side, so that equal conditions show.

    Args:
        curve: one row per run and share, from `pruning_curve`: condition, seed, share, accuracy.
        labels: the conditions' names; by default their slugs.
    """
    conditions = dict(list(curve.groupby("condition", sort=False)))
    colors = colors_of(list(conditions))
    asides = 0.5 * (np.arange(len(conditions)) - (len(conditions) - 1) / 2) / len(conditions)
    shares, ends = sorted(curve["share"].unique()), {}
    with rc_context(STYLE):
        axes = panel((8.5, 4.6), ax)
        for aside, (slug, rows) in zip(asides, conditions.items(), strict=True):
            by_share = rows.groupby("share")["accuracy"].agg(["mean", "min", "max"])
            ends[label_of(slug, labels)] = float(by_share["mean"].iloc[-1]), colors[slug]
            places, dash = np.arange(len(shares)) + aside, "--" if "gbn" in slug else "-"
            axes.plot(places, by_share["mean"], dash, color=colors[slug], linewidth=1, marker="o", markersize=6)
            axes.vlines(places, by_share["min"], by_share["max"], color=colors[slug], alpha=0.4, linewidth=4)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_xticks(range(len(shares)), [f"{share:.0%}" for share in shares])
        axes.set_xticks(np.arange(len(shares) - 1) + 0.5, minor=True)  # lines between the shares
        axes.grid(visible=False, axis="x", which="major")
        axes.grid(visible=True, axis="x", which="minor")
        axes.set(xlabel="share of the convolution weights set to zero, the smallest first", ylabel="test accuracy")
        _label_ends(axes, ends, "{:.0%}".format)
        axes.set_title(join_words(title, "\n", _describe_seeds(curve)))
    return _figure_of(axes)


def _label_ends(axes: Axes, ends: Mapping[str, tuple[float, str]], formatted: Callable[[float], str]) -> None:
    """Write the last value and the name of each line right of the panel, at its height or below the one above.

    Args:
        ends: the last value and the colour of each line, by name.
    """
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    place = high
    for name, (value, color) in sorted(ends.items(), key=lambda end: end[1][0], reverse=True):
        place = min(value, place - 0.062 * (high - low))
        text = f"{formatted(value)}  {name}"
        axes.text(1.015, place, text, transform=axes.get_yaxis_transform(), va="center", fontsize=11, color=color)


def plot_confusion(
    matrix: np.ndarray, title: str = "", class_names: Sequence[str] = CLASS_NAMES, ax: Axes | None = None
) -> Figure:
    """Plot the errors by actual and predicted class; the diagonal, correct predictions, stays blank."""
    with rc_context(STYLE):
        axes = panel((7, 5.6), ax)
        labels = {"xticklabels": class_names, "yticklabels": class_names, "cbar_kws": {"label": "errors"}}
        # Hide the diagonal and the zeros, so that only errors remain.
        hidden = np.eye(len(matrix), dtype=bool) | (matrix == 0)
        shades = {"cmap": "Blues", "vmin": 0, "vmax": max(1, matrix[~hidden].max(initial=0))}
        sns.heatmap(matrix, mask=hidden, annot=True, fmt="d", square=True, ax=axes, **shades, **labels)
        axes.grid(visible=False)
        axes.set(xlabel="predicted", ylabel="actual", title=title)
        axes.tick_params("x", rotation=45)
        axes.tick_params("y", rotation=0)
    return _figure_of(axes)


def panel(size: tuple[float, float], ax: Axes | None) -> Axes:
    """Return the panel to draw on: `ax`, or the panel of a new figure."""
    return Figure(figsize=size, layout="constrained").subplots() if ax is None else ax


def _figure_of(axes: Axes) -> Figure:
    """Return the figure that holds a panel, even a panel of a subfigure."""
    figure = axes.figure
    return figure if isinstance(figure, Figure) else figure.figure


def plot_replication(
    outcomes: pd.DataFrame, labels: Mapping[str, str] | None = None, title: str = "", ax: Axes | None = None
) -> Figure:
    """Plot every run of every condition as a dot, and each condition's mean with its 95% t interval.

    Args:
        outcomes: accuracies in percent, one row per seed, one column per condition.
        labels: the conditions' names; by default those of the columns.
    """
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
        axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(PercentFormatter(100, decimals=2))
        axes.set_xlabel("accuracy on the 10,000 test digits at the last epoch")
        means = [f"{row.mean:.2f}%  ({row.low:.2f} to {row.high:.2f})" for row in statistics.itertuples()]
        label_rows(axes, [label_of(slug, labels) for slug in outcomes], means)
        _draw_scale(axes)
        axes.set_title(join_words(title, "\n", f"{len(outcomes)} seeds: {DOTS}"))
    return _figure_of(axes)


def _draw_scale(axes: Axes) -> None:
    """Draw a bar as long as 5 of the 10,000 test digits at the lower left, or 50 or 500 if that were a mere dot."""
    low, high = axes.get_xlim()
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom + 0.5, top)
    start, middle = low + 0.02 * (high - low), bottom + 0.15
    axes.set_xlim(low, high)
    count = next((count for count in (5, 50) if count / 100 >= 0.02 * (high - low)), 500)
    end = start + count / 100
    axes.plot([start, end], [middle] * 2, color="#333333", linewidth=2, marker="|", markersize=8)
    name = f"{count} test digits"
    axes.text(end + 0.01 * (high - low), middle, name, va="center", fontsize=10, color="#333333")


def plot_differences(
    outcomes: pd.DataFrame,
    labels: Mapping[str, str] | None = None,
    title: str = "",
    groups: Mapping[str, str] | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw a forest plot of the paired differences, in groups and by size.

    Differences that are significant after Holm's correction are in colour. The bars are uncorrected 95% t intervals,
    which match "p alone"; p after Holm's correction is beside it.

    Args: as in `plot_replication`, and
        groups: the group of each condition. The pairs across two groups come first.
    """
    comparisons = _by_group(outcomes, groups or dict.fromkeys(outcomes, ""))
    with rc_context(STYLE):
        axes = panel((10, 1.5 + 0.36 * len(comparisons)), ax)
        axes.axvline(0, color="#333333", linewidth=1)
        for row in comparisons.itertuples():
            color = COLORS["gbn"] if row.p_holm <= 0.05 else COLORS["bn"]
            axes.plot([row.low, row.high], [row.Index] * 2, color=color, linewidth=2)
            axes.plot(row.difference, row.Index, "s", color=color, markersize=6)
        separate_groups(axes, comparisons["group"])
        names = [
            f"{label_of(row.first, labels)}  minus  {label_of(row.second, labels)}" for row in comparisons.itertuples()
        ]
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.set_xlabel("mean paired difference of accuracy, in points (right of 0: the first is better)")
        label_rows(axes, names, ())
        points = [f"{difference:+.3f}".replace("-", "\N{MINUS SIGN}") for difference in comparisons["difference"]]
        _write_column(axes, 50, "points", points)
        _write_column(axes, 105, "p alone", [f"{p:.3f}" for p in comparisons["p"]])
        _write_column(axes, 170, f"among {len(names)}", [f"{p:.2f}" for p in comparisons["p_holm"]])
        count = (comparisons["p_holm"] <= 0.05).sum()
        result = f"{len(outcomes)} seeds: {count} of {len(names)} differences stand (corrected p at most 0.05)"
        axes.set_title(join_words(title, ", ", result), pad=30)
    return _figure_of(axes)


def _write_column(axes: Axes, right: float, header: str, texts: Sequence[str]) -> None:
    """Write a header above the panel and a text beside each row, flush right, so many points right of the panel."""
    look: dict[str, Any] = {"ha": "right", "va": "center", "fontsize": 10, "textcoords": "offset points"}
    edge = axes.get_yaxis_transform()
    axes.annotate(header, (1, 1), (right, 10), xycoords="axes fraction", color="#555555", **look)
    for row, text in enumerate(texts):
        axes.annotate(text, (1, row), (right, 0), xycoords=edge, **look)


def _by_group(outcomes: pd.DataFrame, groups: Mapping[str, str]) -> pd.DataFrame:
    """Sort the comparisons: across groups first, then within each; in both, the largest difference first."""
    order = list(dict.fromkeys(groups.values()))
    comparisons = paired_comparisons(outcomes[sorted(outcomes, key=lambda slug: order.index(groups[slug]))])
    first, second = (comparisons[side].map(groups) for side in ("first", "second"))
    comparisons["group"] = np.where(first == second, first.map(order.index) + 1, 0)
    return comparisons.sort_values(["group", "difference"], ascending=[True, False], ignore_index=True)


def _describe_seeds(table: pd.DataFrame, bands: bool = True) -> str:
    seeds = table["seed"].nunique()
    if seeds == 1:
        return "1 seed"
    return f"{seeds} seeds: mean, lowest and highest" if bands else f"mean of {seeds} seeds"


def join_words(title: str, mark: str, text: str) -> str:
    return f"{title}{mark}{text}" if title else text


def label_of(slug: str, labels: Mapping[str, str] | None) -> str:
    return (labels or {}).get(slug, slug)


def label_rows(axes: Axes, names: Sequence[str], texts: Sequence[str]) -> None:
    """Label each row, the first on top, with a name on the left and a text right of the panel."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    for row, text in enumerate(texts):
        axes.text(1.015, row, text, transform=axes.get_yaxis_transform(), va="center", fontsize=10)


def separate_groups(axes: Axes, groups: pd.Series) -> None:
    """Draw a line between the rows of one group and the next."""
    for row in np.flatnonzero(groups != groups.shift())[1:]:
        axes.axhline(row - 0.5, color="#999999", linewidth=0.8)


def plot_sign_flips(differences: Sequence[float], title: str = "", ax: Axes | None = None) -> Figure:
    """Plot the means of paired differences under random signs, and the observed mean.

    Means at least as far from zero as the observed one are in colour: their share is the p-value of `sign_flip_p`.
    """
    flips, mean = sign_flip_means(differences), float(np.mean(differences))
    reach = 1.02 * max(abs(mean), flips.index.max())
    bins = min(41, 2 * int(2 ** (len(differences) / 2 - 1)) + 1)  # few flips need wide bars, or they make a comb
    edges = np.linspace(-reach, reach, bins + 1).tolist()
    far = np.abs(flips.index) >= abs(mean) - 2e-6 * np.abs(differences).sum()  # the means are rounded
    with rc_context(STYLE):
        axes = panel((9, 4), ax)
        parts = [flips.index[~far], flips.index[far]]
        axes.hist(parts, edges, weights=[flips[~far], flips[far]], stacked=True, color=["#BBBBBB", COLORS["gbn"]])
        axes.axvline(mean, color="#222222", linewidth=1.5)
        axes.annotate(
            f"found: {mean:+.3f}".replace("-", "\N{MINUS SIGN}"),
            (mean, 0.9),
            xytext=(-10 if mean > 0 else 10, 0),
            xycoords=axes.get_xaxis_transform(),
            textcoords="offset points",
            ha="right" if mean > 0 else "left",
        )
        axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set(xlabel="mean difference, in points, if a coin gives each seed its sign", ylabel="share of the flips")
        share = f"{flips[far].sum():.1%} of all {2 ** len(differences):,}"
        axes.set_title(join_words(title, "\n", f"in colour: at least as far from 0 as the mean found, {share}"))
    return _figure_of(axes)
