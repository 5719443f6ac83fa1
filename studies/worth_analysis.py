"""The analysis that docs/preregistration_worth.md fixed before its runs: how much data is a regulariser worth?

    python studies/worth_analysis.py results/worth

It reads the histories and two tables of studies/worth.py itself and imports no part of the library, so that no later
change alters an answer. Errors are compared by their logarithms, seed by seed: a log ratio of error rates says which
share of the errors is gone, whatever the size. No question is answered before all of its runs are complete.
"""

import csv
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats

Row = dict[str, Any]
SEEDS = range(31, 41)
SIZES = (100, 300, 1_000, 3_000, 10_000, 30_000)  # images of nothing: the curve
REGULARISED = (100, 300, 1_000, 3_000, 10_000)  # images of each regulariser alone; and, in part two, ALL of them
REGULARISERS = ("rotation", "l2", "l1", "ghosts", "dropout")
SMALL, LARGE, ALL = 300, 10_000, 60_000
LONGER, LONG = ("rotation", "l2"), "-longer"  # with four times the steps, on SMALL and LARGE images
NETWORKS = ("plain", "mlp")  # a recipe each, and each has one with wrong labels
NETWORK_SIZES = (300, 3_000, 10_000)
ON_BOTH = ("rotation", "l2", "l1", "dropout")  # the MLP has no normalisation, so no ghosts
FACTORS = np.exp(np.linspace(math.log(0.005), math.log(200), 10_600))  # neighbours are a thousandth apart
SHARES = np.linspace(-1, 3, 4_001)
WITHIN = 1.5  # two factors are the same if neither is this many times the other

# --- reading ----------------------------------------------------------------------------------------------------------


def errors(folder: str | Path, recipe: str, condition: str, seeds: Sequence[int] = SEEDS) -> np.ndarray:
    """Test errors at the last epoch, in percent, one for each seed.

    Raises ValueError if a run is missing or not complete.
    """
    runs = [Path(folder) / recipe / condition / f"seed-{seed}" for seed in seeds]
    if missing := [run for run in runs if not (run / "run.json").exists()]:
        raise ValueError(f"{len(missing)} of {len(runs)} runs are not complete, the first of them {missing[0]}")
    return np.array([100 - 100 * float(read_rows(run / "history.csv")[-1]["val_accuracy"]) for run in runs])


def read_pair(
    folder: str | Path, size: int, name: str, recipe: str = "plain", suffix: str = ""
) -> tuple[np.ndarray, np.ndarray]:
    """Test errors on so many images without and with a regulariser, each (seeds,)."""
    without, with_it = (errors(folder, recipe, f"{size}-{one}{suffix}") for one in ("nothing", name))
    return without, with_it


def read_log_ratio(folder: str | Path, size: int, name: str, recipe: str = "plain", suffix: str = "") -> np.ndarray:
    """The log of the errors without a regulariser over those with it, seed by seed: above 0 if it removes errors."""
    without, with_it = read_pair(folder, size, name, recipe, suffix)
    return np.log(without / with_it)


def read_curve(
    folder: str | Path, recipe: str, seeds: Sequence[int] = SEEDS, sizes: Sequence[int] = SIZES
) -> np.ndarray:
    """The log errors of nothing by number of images, (seeds, sizes)."""
    return np.log([errors(folder, recipe, f"{size}-nothing", seeds) for size in sizes]).T


def read_gap(folder: str | Path, condition: str) -> np.ndarray:
    """Accuracy of the finished networks on their own training images minus that on test images, in points, (seeds,).

    clean.csv holds the former: in evaluation mode, on images that are not rotated.
    """
    clean = {
        int(row["seed"]): float(row["accuracy"])
        for row in read_rows(Path(folder) / "clean.csv")
        if (row["recipe"], row["condition"]) == ("plain", condition)
    }
    if missing := [seed for seed in SEEDS if seed not in clean]:
        raise ValueError(f"clean.csv has no seed {missing[0]} of {condition}")
    return np.array([clean[seed] for seed in SEEDS]) - (100 - errors(folder, "plain", condition))


def read_rows(file: Path) -> list[dict[str, str]]:
    """The rows of a table. Raises ValueError if it is not there."""
    if not file.exists():
        raise ValueError(f"there is no {file} yet")
    with open(file, newline="") as lines:
        return list(csv.DictReader(lines))


# --- statistics -------------------------------------------------------------------------------------------------------


def mean_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The t interval of a mean."""
    half = scipy.stats.t.ppf((1 + level) / 2, len(values) - 1) * scipy.stats.sem(values)
    return float(values.mean() - half), float(values.mean() + half)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction (1979): the smallest p times their number, the next times one less, never below the last."""
    ranks = np.argsort(p_values, kind="stable")
    steps = np.asarray(p_values)[ranks] * np.arange(len(ranks), 0, -1)
    corrected = np.empty(len(ranks))
    corrected[ranks] = np.minimum(1, np.maximum.accumulate(steps))
    return corrected.tolist()


def not_rejected(grid: np.ndarray, table: np.ndarray, level: float = 0.95) -> tuple[float, float, float]:
    """The value of a grid that fits best, and the lowest and the highest that a t test does not reject.

    For a ratio of two means this is Fieller's interval (1954). A bound is infinite if the last value of the grid is not
    rejected either; if all are rejected, both bounds are the best value.

    Args:
        grid: the values.
        table: what has a mean of 0 if a value is the true one, (seeds, values).
    """
    means = table.mean(0)
    limit = scipy.stats.t.ppf((1 + level) / 2, len(table) - 1) * scipy.stats.sem(table)
    best = int(np.argmin(np.abs(means)))
    kept = np.append(np.flatnonzero(np.abs(means) <= limit), best)
    low = -math.inf if kept.min() == 0 else float(grid[kept.min()])
    high = math.inf if kept.max() == len(grid) - 1 else float(grid[kept.max()])
    return float(grid[best]), low, high


def worth(
    curve: np.ndarray, with_it: np.ndarray, size: int, sizes: Sequence[int] = SIZES, level: float = 0.95
) -> tuple[float, float, float]:
    """How many times the images nothing needs to make as few errors, with its interval over seeds.

    A paired t test decides whether it can be f: the log errors with the regulariser on `size` images against those of
    nothing on f times as many, which are interpolated for each seed between the logs of two sizes.

    Args:
        curve: log errors of nothing (seeds, sizes).
        with_it: log errors with the regulariser on `size` images (seeds,).
    """
    logs, images = np.log(sizes), np.log(size * FACTORS)
    inside = (images >= logs[0] - 1e-9) & (images <= logs[-1] + 1e-9)
    nothing = np.array([np.interp(images[inside], logs, one) for one in curve])
    return not_rejected(FACTORS[inside], with_it[:, np.newaxis] - nothing, level)


def log_worth(curve: np.ndarray, with_it: np.ndarray, size: int, sizes: Sequence[int] = SIZES) -> float:
    """The log of the same factor, from means over seeds; beyond the curve's ends it goes on in a straight line.

    Raises ValueError if the mean errors of nothing do not fall from each size to the next.
    """
    logs, means, target = np.log(sizes), curve.mean(0), with_it.mean()
    if (np.diff(means) >= 0).any():
        raise ValueError("nothing does not make fewer errors with each size, so that no factor can be read from it")
    line = int(np.clip(np.searchsorted(-means, -target) - 1, 0, len(logs) - 2))
    steps = (means[line] - target) / (means[line] - means[line + 1])
    return float(logs[line] + steps * (logs[line + 1] - logs[line]) - math.log(size))


def jackknife(statistic: Callable[[np.ndarray], float], n: int) -> np.ndarray:
    """The pseudo-values of a statistic of seeds (given by their places), one for each seed left out (Tukey 1958)."""
    seeds = np.arange(n)
    whole = statistic(seeds)
    return np.array([n * whole - (n - 1) * statistic(np.delete(seeds, seed)) for seed in seeds])


def describe(subject: str, values: np.ndarray) -> Row:
    """Mean, 95% interval and two-sided p of a t test of the mean against zero."""
    low, high = mean_interval(values)
    p = float(scipy.stats.ttest_1samp(values, 0).pvalue)
    return {"subject": subject, "n": len(values), "mean": float(values.mean()), "low": low, "high": high, "p": p}


# --- sentences --------------------------------------------------------------------------------------------------------

Say = Callable[[Row], str]


def conclude(rows: list[Row], more: Say, less: Say, neither: Say) -> list[Row]:
    """Add p after Holm's correction over these rows, and the sentence: `more` or `less` where p is at most 5%."""
    for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = p
        row["said"] = (neither if p > 0.05 else more if row["mean"] > 0 else less)(row)
    return rows


def share(log_ratio: float) -> float:
    """The share of the errors that is gone, in percent."""
    return 100 * (1 - math.exp(-log_ratio))


def number(value: float, digits: int = 2) -> str:
    """Format a number without a sign before zero."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def _describe_shares(row: Row, sign: int = 1) -> str:
    """The share that is removed, or added if the sign is -1, with its interval, and the gain or the cost in points."""
    mean, *bounds = (number(sign * share(row[name]), 0) for name in ("mean", "low", "high"))
    low, high = bounds[::sign]
    return f"{mean}% of the errors ({low} to {high}%), {number(sign * row['points'])} points"


def conclude_removed(rows: list[Row]) -> list[Row]:
    """Say of each row of log ratios which share of the errors is removed, after Holm's correction over the rows."""
    return conclude(
        rows,
        lambda row: f"removes {_describe_shares(row)}",
        lambda row: f"adds {_describe_shares(row, -1)}",
        lambda row: f"not shown to remove or add errors: removes {_describe_shares(row)}",
    )


def describe_removed(subject: str, without: np.ndarray, with_it: np.ndarray) -> Row:
    """Describe the log ratio of errors without and with a regulariser, and the gain in points."""
    return describe(subject, np.log(without / with_it)) | {"points": float((without - with_it).mean())}


def say_worth(factor: float, low: float, high: float) -> str:
    """The sentence about a factor with its interval."""
    if math.isinf(low) and math.isinf(high):
        return "how much data it is worth cannot be told at this n"
    if math.isinf(high):
        return f"worth at least {low:.2f} times the data"
    if math.isinf(low):
        return f"worth at most {high:.2f} times the data"
    words = f"worth {factor:.2f} times the data ({low:.2f} to {high:.2f})"
    return words if low > 1 or high < 1 else f"{words}: not shown to be worth more or less than itself"


# --- questions --------------------------------------------------------------------------------------------------------


def removes(folder: str | Path) -> list[Row]:
    """Question 1: which share of the errors does each regulariser remove? Paired t tests, Holm over the five."""
    return [row for size in REGULARISED for row in describe_size(folder, "plain", size, REGULARISERS)]


def describe_size(folder: str | Path, recipe: str, size: int, names: Sequence[str]) -> list[Row]:
    """Say which share of the errors each regulariser removes on so many images, after Holm's correction over them."""
    pairs = {name: read_pair(folder, size, name, recipe) for name in names}
    where = f"{size:,} images" if recipe == "plain" else f"{recipe}, {size:,} images"
    return conclude_removed([describe_removed(f"{name}, {where}", *pairs[name]) for name in pairs])


def data(folder: str | Path) -> list[Row]:
    """Question 2: how many times the images are needed without it? By paired t tests along nothing's curve."""
    return describe_data(folder, "plain", REGULARISED, REGULARISERS)


def describe_data(folder: str | Path, recipe: str, sizes: Sequence[int], names: Sequence[str]) -> list[Row]:
    """Say of each regulariser, on each number of images, how many times the data it is worth."""
    curve, rows = read_curve(folder, recipe), []
    for size in sizes:
        for name in names:
            factor, low, high = worth(curve, np.log(errors(folder, recipe, f"{size}-{name}")), size)
            row = {"subject": f"{name}, {size:,} images", "n": len(curve), "mean": factor, "low": low, "high": high}
            rows.append(row | {"said": say_worth(factor, low, high)})
    return rows


def fall(folder: str | Path) -> list[Row]:
    """Question 3: is that factor smaller on 10,000 images than on 300? Jackknife t tests, Holm over five."""
    curve, rows = read_curve(folder, "plain"), []
    for name in REGULARISERS:
        small, large = (np.log(errors(folder, "plain", f"{size}-{name}")) for size in (SMALL, LARGE))
        values = fall_values(curve, small, large)
        low, high = mean_interval(values, 0.90)
        factors = {"few": math.exp(log_worth(curve, small, SMALL)), "many": math.exp(log_worth(curve, large, LARGE))}
        same = -math.log(WITHIN) < low < high < math.log(WITHIN)
        rows.append(describe(name, values) | factors | {"same": same})
    return conclude(
        rows,
        lambda row: f"falls {_factors(row)}",
        lambda row: f"grows {_factors(row)}",
        lambda row: f"{'the same to within a half' if row['same'] else 'cannot be told at this n'}: {_factors(row)}",
    )


def fall_values(curve: np.ndarray, small: np.ndarray, large: np.ndarray) -> np.ndarray:
    """The jackknife's pseudo-values, (seeds,), of the log of the factor on SMALL images over that on LARGE images."""

    def log_ratio(seeds: np.ndarray) -> float:
        return log_worth(curve[seeds], small[seeds], SMALL) - log_worth(curve[seeds], large[seeds], LARGE)

    return jackknife(log_ratio, len(curve))


def _factors(row: Row) -> str:
    bounds = f"{math.exp(row['low']):.2f} to {math.exp(row['high']):.2f}"
    return f"from {row['few']:.2f} to {row['many']:.2f}, a ratio of {math.exp(row['mean']):.2f} ({bounds})"


def gap(folder: str | Path) -> list[Row]:
    """Question 4: how much better are finished networks on their own training images? t tests, Holm over the sizes."""
    return describe_gaps(folder, SIZES)


def describe_gaps(folder: str | Path, sizes: Sequence[int]) -> list[Row]:
    """Say how much better nothing is on its own training images than on test images, after Holm's correction."""
    return conclude(
        [describe(f"nothing, {size:,} images", read_gap(folder, f"{size}-nothing")) for size in sizes],
        lambda row: f"{row['mean']:.2f} points better ({row['low']:.2f} to {row['high']:.2f})",
        lambda row: f"{-row['mean']:.2f} points worse ({-row['high']:.2f} to {-row['low']:.2f})",
        lambda row: f"no gap shown: {row['mean']:.2f} points ({row['low']:.2f} to {row['high']:.2f})",
    )


def own(folder: str | Path) -> list[Row]:
    """Question 5: what is left of strengths chosen on a fifth of one's own 300 images? t tests, Holm over five."""
    chosen = {(row["name"], int(row["seed"])): row["condition"] for row in read_rows(Path(folder) / "own.csv")}
    rows = []
    for name in REGULARISERS:
        if missing := [seed for seed in SEEDS if (name, seed) not in chosen]:
            raise ValueError(f"own.csv has no choice of {name} for seed {missing[0]}")
        without, best = read_pair(folder, SMALL, name)
        with_it = np.concatenate([errors(folder, "plain", chosen[name, seed], [seed]) for seed in SEEDS])
        gains = (np.log(without / one)[:, np.newaxis] for one in (with_it, best))
        kept, low, high = not_rejected(SHARES, np.subtract(next(gains), SHARES * next(gains)))
        bounded = not math.isinf(low) and not math.isinf(high)
        words = f"keeps {100 * kept:.0f}% of the gain ({100 * low:.0f} to {100 * high:.0f}%)" if bounded else ""
        rows.append(describe_removed(name, without, with_it) | {"kept": words or "how much it keeps cannot be told"})
    for row in conclude_removed(rows):
        row["said"] += f"; {row['kept']}"
    return rows


def all_images(folder: str | Path) -> list[Row]:
    """Question 6: on 60,000 images, which share does each remove (Holm over the five), and is there a gap?"""
    return describe_size(folder, "plain", ALL, REGULARISERS) + describe_gaps(folder, (ALL,))


def longer(folder: str | Path) -> list[Row]:
    """Question 7: do four times the steps remove errors, or change what is removed? t tests, Holm over two and four."""
    slugs = {size: (f"{size}-nothing", f"{size}-nothing{LONG}") for size in (SMALL, LARGE)}
    pairs = {size: [errors(folder, "plain", slug) for slug in slugs[size]] for size in slugs}
    steps = conclude_removed([describe_removed(f"more steps, {size:,} images", *pairs[size]) for size in pairs])
    rows = []
    for size in (SMALL, LARGE):
        for name in LONGER:
            short, long = (read_log_ratio(folder, size, name, suffix=suffix) for suffix in ("", LONG))
            row = describe(f"{name}, {size:,} images", long - short)
            rows.append(row | {"before": share(short.mean()), "after": share(long.mean())})
    return steps + conclude_change(rows)


def conclude_change(rows: list[Row]) -> list[Row]:
    """Say of each row whether the share of errors that is removed changes from `before` to `after`."""
    words = "{}: {:.0f}% of the errors in place of {:.0f}%"
    return conclude(
        rows,
        lambda row: words.format("removes more", row["after"], row["before"]),
        lambda row: words.format("removes less", row["after"], row["before"]),
        lambda row: words.format("no change shown", row["after"], row["before"]),
    )


def second_network(folder: str | Path) -> list[Row]:
    """Question 8: how many times the images does an MLP need without it? By paired t tests along its own curve."""
    return describe_data(folder, "mlp", NETWORK_SIZES, ON_BOTH)


def networks(folder: str | Path) -> list[Row]:
    """Question 9: what is removed in each network, with right and with wrong labels? Holm over the four in a cell."""
    return [
        row
        for network in NETWORKS
        for recipe in (network, f"{network}-wrong")
        for size in NETWORK_SIZES
        for row in describe_size(folder, recipe, size, ON_BOTH)
    ]


def labels(folder: str | Path) -> list[Row]:
    """Question 10: on 10,000 images, is a larger share removed if labels are wrong? t tests, Holm over eight."""
    rows = []
    for network in NETWORKS:
        for name in ON_BOTH:
            right, wrong = (read_log_ratio(folder, LARGE, name, recipe) for recipe in (network, f"{network}-wrong"))
            shares = {"before": share(right.mean()), "after": share(wrong.mean())}
            rows.append(describe(f"{name}, {network}", wrong - right) | shares)
    return conclude_change(rows)


def capacity(folder: str | Path) -> list[Row]:
    """Question 11: do wrong labels raise that share more in the MLP than in PlainNet? t tests, Holm over four."""
    rows = []
    for name in ON_BOTH:
        plain, mlp = (
            read_log_ratio(folder, LARGE, name, f"{network}-wrong") - read_log_ratio(folder, LARGE, name, network)
            for network in NETWORKS
        )
        rows.append(describe(name, mlp - plain))
    return conclude(
        rows,
        lambda row: "wrong labels raise the share more in the MLP",
        lambda row: "wrong labels raise the share more in PlainNet",
        lambda row: "no difference shown",
    )


QUESTIONS = (removes, data, fall, gap, own, all_images, longer, second_network, networks, labels, capacity)


def main(folder: str) -> None:
    """Print the answer to each question whose runs are all complete."""
    for question in QUESTIONS:
        print(f"\n{(question.__doc__ or '').splitlines()[0]}\n")
        try:
            for row in question(folder):
                p = f"p = {row['p_holm']:.3f} after Holm: " if "p_holm" in row else ""
                print(f"{row['subject']}, n = {row['n']}: {p}{row['said']}")
        except ValueError as error:
            print(error)


if __name__ == "__main__":
    main(*sys.argv[1:])
