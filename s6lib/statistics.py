"""Intervals, tests and power for runs of any kind: plain arrays and tables in and out.

A table of outcomes has one row per seed (its index) and one column per condition, in any unit; results are in the same
unit. Conditions are compared seed by seed, so a table must be complete. Too few numbers, a missing number or a number
out of range raises ValueError.
"""

import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import scipy.stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.proportion import proportion_confint

SUPPORTED, CONTRADICTED, UNDECIDED = "supported", "contradicted", "cannot be told at this n"

# --- intervals -------------------------------------------------------------------------------------------------------


def wilson_interval(accuracy: float, images: int = 10_000) -> tuple[float, float]:
    """The 95% interval of one model's accuracy (0 to 1), measured on this number of images (Wilson 1927)."""
    if not 0 <= accuracy <= 1:
        raise ValueError(f"an accuracy is from 0 to 1, not {accuracy!r}: divide percents by 100")
    low, high = proportion_confint(round(accuracy * images), images, method="wilson")
    return float(low), float(high)


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """The t interval of a mean, in the unit of the values (Student 1908). Raises ValueError for fewer than two values.

    For normal values it has its nominal coverage, however few they are; a 95% bootstrap of ten values covers 90%.
    """
    sample = _sample(values)
    if not 0 < level < 1:
        raise ValueError(f"the level of an interval is between 0 and 1, not {level!r}: 0.95 for 95%")
    half = scipy.stats.t.ppf((1 + level) / 2, len(sample) - 1) * scipy.stats.sem(sample)
    return float(sample.mean() - half), float(sample.mean() + half)


def equivalent(values: Sequence[float], margin: float) -> bool:
    """Return whether the 90% t interval of paired differences lies within ± margin, which shows equivalence.

    This equals two one-sided t tests at 5% (Schuirmann 1987). The margin, in the unit of the values, is the largest
    difference that does not matter; choose it before seeing the values. False does not indicate a difference.
    """
    if not margin > 0:
        raise ValueError(
            f"the margin must be above 0, not {margin!r}: name the largest difference that does not matter"
        )
    low, high = mean_interval(values, level=0.90)
    return -margin < low and high < margin


def _sample(values: Sequence[float]) -> np.ndarray:
    sample = np.asarray(values, dtype=float)
    if sample.ndim != 1 or len(sample) < 2 or not np.isfinite(sample).all():
        raise ValueError(f"an interval or a test needs at least two finite numbers, not {values!r}: run more seeds")
    return sample


# --- tables of outcomes ----------------------------------------------------------------------------------------------


def condition_statistics(outcomes: pd.DataFrame) -> pd.DataFrame:
    """One row per condition: n, and the mean, SD and 95% interval of its outcomes (mean, sd, low, high)."""
    rows = []
    for condition, values in _complete(outcomes).items():
        low, high = mean_interval(values)
        moments = {"mean": values.mean(), "sd": values.std(), "low": low, "high": high}
        rows.append({"condition": condition, "n": len(values), **moments})
    return pd.DataFrame(rows)


def run_sd(outcomes: pd.DataFrame) -> float:
    """The SD between runs of the same condition, pooled over the conditions."""
    return float(_complete(outcomes).var().mean() ** 0.5)


def paired_comparisons(outcomes: pd.DataFrame) -> pd.DataFrame:
    """One row per pair of conditions: the mean of first minus second over seeds, its 95% interval, SD and p-values.

    `p` is from the exact sign-flip test; `p_holm` has Holm's correction over all pairs (Holm 1979). `seeds_0.02` and so
    on are the seeds needed to show a true difference of 0.02 units (points, for a table in percent) among as many
    pairs, given the SD of this pair. Raises ValueError for fewer than two conditions.
    """
    table = _complete(outcomes)
    if table.shape[1] < 2:
        raise ValueError(f"a comparison needs two conditions, and the table has {_join(table)} alone: add another")
    steps, rows = _steps(table), []
    for first, second in itertools.combinations(table, 2):
        differences = table[first] - table[second]
        low, high = mean_interval(differences)
        interval = {"difference": differences.mean(), "low": low, "high": high, "sd": differences.std()}
        p = sign_flip_p(steps[first] - steps[second])
        rows.append({"first": first, "second": second, "n": len(differences), **interval, "p": p})
    comparisons = pd.DataFrame(rows)
    comparisons["p_holm"] = multipletests(comparisons["p"], method="holm")[1]
    for size in (0.02, 0.03, 0.05):
        comparisons[f"seeds_{size}"] = [seeds_needed(sd, size, len(rows)) for sd in comparisons["sd"]]
    return comparisons


def friedman_p(outcomes: pd.DataFrame) -> float:
    """The p-value of Friedman's test (1937) that all conditions are equal, from their ranks within each seed.

    Its chi-squared approximation is rough below about ten seeds. Raises ValueError for fewer than three conditions.
    """
    table = _complete(outcomes)
    if table.shape[1] < 3:
        raise ValueError(
            f"Friedman's test takes at least three conditions, and the table has {_join(table)}: compare two by "
            "paired_comparisons"
        )
    steps = _steps(table)
    if (steps.nunique(axis=1) == 1).all():  # without ranks, scipy would divide by 0
        return 1.0
    return float(scipy.stats.friedmanchisquare(*steps.to_numpy().T).pvalue)


def _complete(outcomes: pd.DataFrame) -> pd.DataFrame:
    """Return a table as floats. Raises ValueError unless each condition has one finite number for each of two seeds."""
    for kind, names in (("condition", outcomes.columns), ("seed", outcomes.index)):
        if not names.is_unique:
            raise ValueError(
                f"one row per seed and one column per condition, but these occur twice: {kind} "
                f"{_join(names[names.duplicated()].unique())}; drop or rename them"
            )
    table = outcomes.astype(float)
    missing = [f"{slug} seed {seed}" for seed in table.index for slug in table if not np.isfinite(table.at[seed, slug])]
    if missing:
        raise ValueError(
            f"conditions are compared by seed, and these outcomes are missing: {', '.join(missing)}; "
            "run them, or leave their seeds out"
        )
    if len(table) < 2:
        raise ValueError(f"a spread needs at least two seeds, and the table has {len(table)}: run more seeds")
    return table


def _steps(table: pd.DataFrame) -> pd.DataFrame:
    """Round a table to whole multiples of a tiny step, so that equal decimals are equal floats."""
    return (table / (1e-12 * table.abs().to_numpy().max() or 1)).round()


def _join(names: Iterable[object]) -> str:
    return ", ".join(map(str, names)) or "none"


# --- tests -----------------------------------------------------------------------------------------------------------


def sign_flip_p(differences: Sequence[float]) -> float:
    """The exact two-sided p-value of paired differences: the share of all 2^n sign flips with a mean as large.

    Raises ValueError for fewer than two differences. Fisher 1935, section 21. Equal sums are counted together, as in
    Pagano and Tritchler 1983, so that a hundred seeds take no longer than ten.
    """
    sample = _sample(differences)
    if not sample.any():
        return 1.0
    steps = _whole_steps(sample)
    sums, chances = _flipped_sums(steps)
    as_large = np.abs(sums) >= abs(steps.sum()) - len(steps)  # rounding moves each step by up to a half
    return float(chances[as_large].sum())


def sign_flip_means(differences: Sequence[float]) -> pd.Series:
    """The probability of each mean under random signs, indexed by the mean: the distribution behind `sign_flip_p`.

    The means are in the unit of the differences, to a millionth of their sum. Raises ValueError for fewer than two.
    """
    sample = _sample(differences)
    total = np.abs(sample).sum()
    sums, chances = _flipped_sums(_whole_steps(sample) if total else sample)
    return pd.Series(chances, index=pd.Index(sums * total / (1e6 * len(sample)), name="mean"), name="chance")


def _whole_steps(sample: np.ndarray) -> np.ndarray:
    """Round to whole numbers, so that equal sums compare equal: 99.34 - 99.30 and 99.32 - 99.28 differ as floats."""
    return np.rint(1e6 * sample / np.abs(sample).sum())


def _flipped_sums(steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All sums of the steps with random signs, in order, and the probability of each."""
    sums: np.ndarray = np.zeros(1)
    chances: np.ndarray = np.ones(1)
    for step in steps:
        sums, places = np.unique(np.concatenate([sums + step, sums - step]), return_inverse=True)
        chances = np.bincount(places, np.tile(chances / 2, 2))
    return sums, chances


def mcnemar_p(first: np.ndarray, second: np.ndarray) -> tuple[int, int, float]:
    """The exact McNemar test of two models: images that only the first gets right, only the second, and p.

    It compares these two trained models on new images, not the two methods: another seed would be another model
    (Dietterich 1998, section 3).

    Args:
        first, second: bool (images,), whether each model is right on each image. ValueError if they differ in shape.
    """
    first, second = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if first.shape != second.shape:
        raise ValueError(f"both models must be scored on the same images, not on {first.shape} and {second.shape}")
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    test = mcnemar([[0, only_first], [only_second, 0]], exact=True)
    return only_first, only_second, float(test.pvalue)


def verdict(difference: float, p: float) -> str:
    """Judge the claim that a difference is above 0 by a test's p-value, at the 5% level."""
    if not p <= 0.05:
        return UNDECIDED
    return SUPPORTED if difference > 0 else CONTRADICTED


def verdict_on_best(comparisons: pd.DataFrame, best: str, others: Sequence[str]) -> str:
    """Judge the claim that a condition is better than each of the others by Holm's p-values of paired comparisons.

    The verdict is "supported" if every comparison supports it, "contradicted" if one contradicts it. Raises ValueError
    if a comparison is missing, or if there are no others.
    """
    swapped = {"first": "second", "second": "first"}
    both = pd.concat([comparisons, comparisons.rename(columns=swapped).assign(difference=-comparisons["difference"])])
    rows = both[(both["first"] == best) & both["second"].isin(others)]
    if missing := set(others) - set(rows["second"]):
        raise ValueError(f"no comparison of {best} with {', '.join(sorted(missing))}: compare tables that hold both")
    verdicts = {verdict(row.difference, row.p_holm) for row in rows.itertuples()}
    if not verdicts:
        raise ValueError(f"{best} is compared with none: name the others")
    return next(answer for answer in (CONTRADICTED, UNDECIDED, SUPPORTED) if answer in verdicts)


# --- power -----------------------------------------------------------------------------------------------------------


def power(sd: float, difference: float, n: int, comparisons: int = 1) -> float:
    """The probability that a paired two-sided t test detects a true difference of this size (Cohen 1988, chapter 2).

    Args:
        sd: of the paired differences, in the unit of `difference`.
        n: paired seeds, at least 2.
        comparisons: number of comparisons; it divides the level of 5%, as Holm's correction does for the smallest p.
    """
    _require_power(sd, difference, comparisons)
    if n < 2:
        raise ValueError(f"a t test needs at least two seeds, not {n!r}: run more")
    if sd == 0:
        return 1.0
    level = 0.05 / comparisons
    right, wrong = (
        TTestPower().power(difference / sd, n, level / 2, alternative=side) for side in ("larger", "smaller")
    )
    # Far out the noncentral t distribution is nan; there the power of the right side is 1, of the wrong side 0.
    return float(np.nan_to_num(right, nan=1.0) + np.nan_to_num(wrong, nan=0.0))


def seeds_needed(sd: float, difference: float, comparisons: int = 1) -> int:
    """The number of paired seeds that detect a true difference with `power` 0.8.

    It is large enough for the sign-flip test, whose p-value is at least 2 / 2^n with n seeds.
    """
    _require_power(sd, difference, comparisons)
    level = 0.05 / comparisons
    known_sd = ((scipy.stats.norm.isf(level / 2) + scipy.stats.norm.isf(0.2)) * sd / difference) ** 2
    n = max(math.ceil(1 - math.log2(level)), math.floor(known_sd))  # a few fewer than the t test needs
    while power(sd, difference, n, comparisons) < 0.8:
        n += 1
    return n


def _require_power(sd: float, difference: float, comparisons: int) -> None:
    if not (sd >= 0 and difference > 0 and comparisons >= 1):
        raise ValueError(
            "the SD must be at least 0, the difference above 0 and the comparisons at least 1, not "
            f"{sd!r}, {difference!r} and {comparisons!r}"
        )


# --- where the variance comes from, and what chance alone does -------------------------------------------------------


def variance_sources(right: np.ndarray | pd.DataFrame) -> dict[str, float]:
    """The standard error of a mean accuracy, in points, from each source: seeds, test images, and both.

    Every run is scored on every image. The residual of the two-way analysis of variance is therefore part of the
    variance of the run means and of the image means; "both" counts it once. A bootstrap over runs and over images
    would count it three times (Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 1, 2007).

    Args:
        right: (seeds, images), whether each run is right on each image; or the difference of two such arrays or
            tables. Raises ValueError if the two tables lack the same seeds.
    """
    points = 100 * np.asarray(right, dtype=float)
    if len(points) < 2:
        raise ValueError("the share of the seeds cannot be told from one run: run more seeds")
    lacking = np.isnan(points).any(1)
    if lacking.any():
        seeds = right.index[lacking] if isinstance(right, pd.DataFrame) else np.flatnonzero(lacking)
        raise ValueError(f"two conditions pair by seed, and one of them lacks: {_join(seeds)}; leave these seeds out")
    seeds, images = points.shape
    by_seed, by_image = points.mean(1), points.mean(0)
    residual = points - by_seed[:, np.newaxis] - by_image + points.mean()
    noise = (residual**2).sum() / ((seeds - 1) * (images - 1)) / (seeds * images)
    apart = {"seeds": by_seed.var(ddof=1) / seeds, "images": by_image.var(ddof=1) / images}
    both = max(*apart.values(), sum(apart.values()) - noise)
    return {source: float(variance**0.5) for source, variance in {**apart, "both": both}.items()}


def false_alarm_rate(runs: Sequence[float], seeds: int, comparisons: int = 1_000) -> float:
    """Estimate how often the sign-flip test at the 5% level finds a difference where there is none (an A/A test).

    Args:
        runs: outcomes of one condition, real or simulated; both sides are drawn from them, with replacement.
        seeds: pairs per comparison.
    """
    draws = np.random.default_rng(1).choice(_sample(runs), size=(2, comparisons, seeds))
    return float(np.mean([sign_flip_p(differences) <= 0.05 for differences in draws[0] - draws[1]]))


def equal_conditions(sd: float, conditions: int = 5, studies: int = 10_000) -> tuple[np.ndarray, float]:
    """Simulate studies of equal conditions with one run each: the share that each condition wins, and their spread.

    The SD and the spread, the mean of best minus worst, are in points. Conditions that tie to 0.01 points share a win.
    """
    accuracies = np.random.default_rng(1).normal(99.5, sd, size=(studies, conditions)).round(2)
    best = accuracies == accuracies.max(1, keepdims=True)
    return (best / best.sum(1, keepdims=True)).mean(0), float(np.ptp(accuracies, axis=1).mean())
