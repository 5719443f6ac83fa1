"""Intervals, tests and power for runs of any kind: plain arrays and tables in and out.

A table of outcomes has one row per seed (its index, or a column `seed`) and one column per condition, in any unit;
results are in the same unit. An array (seeds, conditions) or a dict of columns is a table too. Conditions are compared
seed by seed, so a table must be complete. Too few numbers, a missing number, a number out of range or a table of
another shape raises ValueError.
"""

import itertools
import math
import reprlib
from collections.abc import Sequence

import numpy as np
import pandas as pd
import scipy.stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

SUPPORTED, CONTRADICTED, UNDECIDED = "supported", "contradicted", "cannot be told at this n"
SHAPE = "a table of outcomes has one row per seed and one column per condition"
SEED_COLUMNS = ("unnamed: 0", "index", "seed")  # the index of a table that was written to a csv and read back


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """The t interval of a mean, in the unit of the values (Student 1908). Raises ValueError for fewer than two values.

    For normal values it has its nominal coverage, however few they are; a 95% bootstrap of ten values covers 90%.
    """
    sample = _sample(values)
    if not 0 < level < 1:
        raise ValueError(f"the level of an interval is between 0 and 1, not {level!r}: 0.95 for 95%")
    half = scipy.stats.t.ppf((1 + level) / 2, len(sample) - 1) * scipy.stats.sem(sample)
    return float(sample.mean() - half), float(sample.mean() + half)


def _sample(values: Sequence[float]) -> np.ndarray:
    try:
        sample = np.asarray(values, dtype=None if np.iscomplexobj(values) else float)
    except (TypeError, ValueError, OverflowError):  # such as words, or rows of unequal lengths
        sample = np.array([])
    if sample.dtype != float or sample.ndim != 1 or len(sample) < 2 or not np.isfinite(sample).all():
        given = " ".join(reprlib.repr(values).split())
        raise ValueError(f"an interval or a test needs a list of at least two finite numbers, not {given}")
    return sample


def condition_statistics(outcomes: pd.DataFrame) -> pd.DataFrame:
    """One row per condition: n, and the mean, SD and 95% interval of its outcomes (mean, sd, low, high)."""
    rows = []
    for condition, values in complete_table(outcomes).items():
        low, high = mean_interval(values)
        moments = {"mean": values.mean(), "sd": values.std(), "low": low, "high": high}
        rows.append({"condition": condition, "n": len(values), **moments})
    return pd.DataFrame(rows)


def run_sd(outcomes: pd.DataFrame) -> float:
    """The SD between runs of the same condition, pooled over the conditions."""
    return float(complete_table(outcomes).var().mean() ** 0.5)


def paired_comparisons(outcomes: pd.DataFrame) -> pd.DataFrame:
    """One row per pair of conditions: the mean of first minus second over seeds, its 95% interval, SD and p-values.

    `p` is from the exact sign-flip test; `p_holm` has Holm's correction over all pairs (Holm 1979). Raises ValueError
    for fewer than two conditions.
    """
    table = complete_table(outcomes, conditions=2)
    steps = (table / (1e-12 * table.abs().to_numpy().max() or 1)).round()  # whole: equal decimals may differ as floats
    rows = []
    for first, second in itertools.combinations(table, 2):
        differences = table[first] - table[second]
        low, high = mean_interval(differences)
        interval = {"difference": differences.mean(), "low": low, "high": high, "sd": differences.std()}
        p = sign_flip_p(steps[first] - steps[second])
        rows.append({"first": first, "second": second, "n": len(differences), **interval, "p": p})
    return pd.DataFrame(rows).assign(p_holm=lambda pairs: multipletests(pairs["p"], method="holm")[1])


def complete_table(outcomes: pd.DataFrame, conditions: int = 1) -> pd.DataFrame:
    """Return outcomes as a table of floats, with the seeds as its index.

    Raises ValueError unless it has so many conditions, and one finite number for each of them and each of two seeds.
    """
    table = _by_seed(outcomes)
    for kind, names in (("condition", table.columns), ("seed", table.index)):
        if not names.is_unique:
            raise ValueError(f"{SHAPE}, but {kind} {names[names.duplicated()][0]} occurs twice: drop one")
    if table.shape[1] < conditions:
        raise ValueError(f"this needs {conditions} conditions or more, and the table has {list(table)}: add columns")
    try:
        table = table.astype(object).where(table.notna(), np.nan).astype(float)
    except (TypeError, ValueError, OverflowError) as error:  # such as words, decimal commas or complex numbers
        raise ValueError(f"make every outcome a number first: {error}") from None
    missing = [f"{slug} seed {seed}" for seed in table.index for slug in table if not np.isfinite(table.at[seed, slug])]
    if missing:
        raise ValueError(f"conditions are compared by seed: run {', '.join(missing)}, or leave these seeds out")
    if len(table) < 2:
        raise ValueError(f"a spread needs at least two seeds, and the table has {len(table)}: run more seeds")
    return table


def _by_seed(outcomes: pd.DataFrame) -> pd.DataFrame:
    """Return outcomes with a row per seed. Raises ValueError if the rows or the columns are anything else."""
    try:
        table = pd.DataFrame(outcomes)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{SHAPE}, and this {type(outcomes).__name__} has not: {error}") from None
    if max(table.columns.nlevels, table.index.nlevels) > 1:
        raise ValueError(f"{SHAPE}, but this one has several levels of names: remove one with droplevel or unstack")
    columns = [str(name).strip().lower() for name in table]
    for name in SEED_COLUMNS if table.index.name is None else ():
        if columns.count(name) == 1:
            table = table.set_index(table.columns[columns.index(name)])
            columns.remove(name)
    numbered = all(str(name).isdigit() for name in table) and all(isinstance(name, str) for name in table.index)
    if "condition" in (*columns, table.index.name) or table.columns.name == "seed" or (numbered and len(table)):
        raise ValueError(f"{SHAPE}: pivot a table that has one row per run, transpose one with a row per condition")
    return table


def sign_flip_p(differences: Sequence[float]) -> float:
    """The exact two-sided p-value of paired differences: the share of all 2^n sign flips with a mean as large.

    Raises ValueError for fewer than two differences. Fisher 1935, section 21.
    """
    chances, sample = sign_flip_means(differences), _sample(differences)
    return float(chances[np.abs(chances.index) >= abs(sample.mean()) - _flip_step(sample)].sum())


def sign_flip_means(differences: Sequence[float]) -> pd.Series:
    """The probability of each mean under random signs, indexed by the mean: the distribution behind `sign_flip_p`.

    The means are in the unit of the differences, to a millionth of their sum. Raises ValueError for fewer than two.
    Equal sums are counted together, as in Pagano and Tritchler 1983, so that a hundred seeds take no longer than ten.
    """
    sample = _sample(differences)
    step = _flip_step(sample)
    sums: np.ndarray = np.zeros(1)
    chances: np.ndarray = np.ones(1)
    for size in np.rint(sample / step):  # whole: 99.34 - 99.30 and 99.32 - 99.28 differ as floats
        sums, places = np.unique(np.concatenate([sums + size, sums - size]), return_inverse=True)
        chances = np.bincount(places, np.tile(chances / 2, 2))
    return pd.Series(chances, index=pd.Index(sums * step / len(sample), name="mean"), name="chance")


def _flip_step(sample: np.ndarray) -> float:
    """The step that differences are rounded to: coarser for many seeds, whose signs make too many different sums."""
    return float(np.abs(sample).sum()) / (1e9 if len(sample) <= 16 else 1e6) or 1.0


def verdict(difference: float, p: float) -> str:
    """Judge the claim that a difference is above 0 by a test's p-value, at the 5% level."""
    if not p <= 0.05:
        return UNDECIDED
    return SUPPORTED if difference > 0 else CONTRADICTED


def power(sd: float, difference: float, n: int, comparisons: int = 1) -> float:
    """The probability that a paired two-sided t test detects a true difference of this size (Cohen 1988, chapter 2).

    Args:
        sd: of the paired differences, in the unit of `difference`.
        n: paired seeds, at least 2.
        comparisons: number of comparisons; it divides the level of 5%, as Holm's correction does for the smallest p.
    """
    if not (0 <= sd < 1e100 * difference < math.inf and comparisons >= 1):
        raise ValueError(
            "the SD must be at least 0 and finite, the difference above 0 and the comparisons at least 1, not "
            f"{sd!r}, {difference!r} and {comparisons!r}"
        )
    if n < 2:
        raise ValueError(f"a t test needs at least two seeds, not {n!r}: run more")
    if sd == 0:
        return 1.0
    level, effect = 0.05 / comparisons / 2, difference / sd
    right, wrong = (TTestPower().power(effect, n, level, alternative=side) for side in ("larger", "smaller"))
    # Far out the noncentral t distribution is nan; there the power of the right side is 1, of the wrong side 0.
    return float(np.nan_to_num(right, nan=1.0) + np.nan_to_num(wrong, nan=0.0))


def seeds_needed(sd: float, difference: float, comparisons: int = 1) -> int:
    """The number of paired seeds that detect a true difference with `power` 0.8.

    It is large enough for the sign-flip test, whose p-value is at least 2 / 2^n with n seeds.
    """
    level = 0.05 / max(1, comparisons)  # `power` refuses fewer
    least = math.ceil(1 - math.log2(level))
    if power(sd, difference, least, comparisons) >= 0.8:
        return least
    if sd > 300 * difference:  # statsmodels finds no solution so far out, where t is normal
        return math.ceil(((scipy.stats.norm.isf(level / 2) + scipy.stats.norm.isf(0.2)) * sd / difference) ** 2)
    return math.ceil(TTestPower().solve_power(difference / sd, power=0.8, alpha=level / 2, alternative="larger"))
