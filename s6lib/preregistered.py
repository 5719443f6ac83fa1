"""The analysis that docs/preregistration.md fixed before its runs: test digits right in, answers out.

    python -m s6lib.preregistered results [SEED ...]      (seeds that are left out, since a run of theirs diverged)

It reads the histories itself and imports no other part of the library, so that nothing which changes there changes it.
"""

import csv
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.stats

FACTORIAL = ("bn", "l1-l2-bn", "gbn", "l1-l2-gbn")
PENALTIES = ("l1-bn", "l2-bn", "l1-l2-bn")
FACTORIAL_SEEDS = range(21, 53)
PENALTY_SEEDS = range(21, 41)
EPOCHS = 25
MARGIN = 0.05  # points


def digits_right(folder: str | Path, condition: str, seeds: Sequence[int]) -> pd.Series:
    """Test digits right, of 10,000, at the last epoch of each run of PlainNet, by seed.

    Raises ValueError, naming the runs, if one is missing or is not complete: nothing is analysed before all are.
    """
    runs = {seed: Path(folder) / "plain" / condition / f"seed-{seed}" for seed in seeds}
    missing = [str(run) for run in runs.values() if not (run / "run.json").exists()]
    if missing:
        raise ValueError(f"these runs are not complete, and nothing is analysed before all are: {', '.join(missing)}")
    return pd.Series({seed: _last_epoch(run / "history.csv") for seed, run in runs.items()}, name=condition)


def _last_epoch(history: Path) -> int:
    with open(history, newline="") as file:
        last = list(csv.DictReader(file))[-1]
    if int(last["epoch"]) != EPOCHS:
        raise ValueError(f"{history} ends at epoch {last['epoch']}, not {EPOCHS}")
    return round(10_000 * float(last["val_accuracy"]))


def contrasts(right: pd.DataFrame) -> pd.DataFrame:
    """Per seed, in points: G, what GBN costs; P, what L1 + L2 brings; and their interaction.

    Args:
        right: a row a seed, a column for each of FACTORIAL, test digits right of 10,000.
    """
    bn, l1_l2_bn, gbn, l1_l2_gbn = (right[slug] / 100 for slug in FACTORIAL)
    return pd.DataFrame(
        {
            "G": ((bn + l1_l2_bn) - (gbn + l1_l2_gbn)) / 2,
            "P": ((l1_l2_bn + l1_l2_gbn) - (bn + gbn)) / 2,
            "interaction": (l1_l2_gbn - gbn) - (l1_l2_bn - bn),
        }
    )


def penalty_differences(right: pd.DataFrame) -> pd.DataFrame:
    """Per seed, in points: the three differences between L1, L2 and L1 + L2, each with BN (question E)."""
    l1, l2, both = (right[slug] / 100 for slug in PENALTIES)
    return pd.DataFrame({"L1 - L2": l1 - l2, "L1 + L2 - L1": both - l1, "L1 + L2 - L2": both - l2})


def exact_sign_flip_p(differences: Sequence[float]) -> float:
    """The two-sided sign-flip test: the share of all 2^n choices of signs with as large a sum, counted exactly.

    The differences are whole multiples of 0.005 points (half a digit), which makes the count one of whole numbers.
    Fisher 1935, section 21.
    """
    halves = np.rint(200 * np.asarray(differences, dtype=float)).astype(int)
    ways = np.ones(1)
    for step in np.abs(halves):  # ways[k]: choices of signs whose positive steps add up to k
        ways = np.pad(ways, (0, step)) + np.pad(ways, (step, 0))
    sums = 2 * np.arange(len(ways)) - np.abs(halves).sum()
    return float(ways[np.abs(sums) >= abs(halves.sum())].sum() / 2.0 ** len(halves))


def mean_interval(differences: Sequence[float], level: float) -> tuple[float, float]:
    """The t interval of a mean: 95% where it is shown, 90% for equivalence (two one-sided tests at 5%)."""
    sample = np.asarray(differences, dtype=float)
    half = scipy.stats.t.ppf((1 + level) / 2, len(sample) - 1) * sample.std(ddof=1) / math.sqrt(len(sample))
    return float(sample.mean() - half), float(sample.mean() + half)


def statement(mean: float, p: float, low: float, high: float) -> str:
    """What is said of a change, from what it gains, its p after Holm, and its 90% interval, all in points."""
    inside = low > -MARGIN and high < MARGIN
    if p <= 0.05 and not inside:
        return f"{'gains' if mean > 0 else 'costs'} {abs(mean):.3f} points"
    if p <= 0.05:
        return "a real difference, under 0.05 points"
    if inside:
        return "no difference of 0.05 points or more"
    return f"undecided, between {low:+.3f} and {high:+.3f} points"


def answer(factorial: pd.DataFrame, penalties: pd.DataFrame) -> pd.DataFrame:
    """The answers to G, P and E, a row each and one for each pair of E: n, mean, intervals, p, and what is said.

    Args:
        factorial, penalties: a row a seed, a column for each of FACTORIAL and of PENALTIES, test digits right.
    """
    differences = contrasts(factorial)
    p = {name: exact_sign_flip_p(differences[name]) for name in ("G", "P")}
    first, second = sorted(p, key=p.get)
    holm = {first: min(1.0, 2 * p[first])}
    holm[second] = max(holm[first], p[second])
    rows = []
    for name in ("G", "P"):
        row = _described(name, differences[name])
        gain = (row["mean"], row["low_90"], row["high_90"])
        if name == "G":  # is what GBN costs: the gain is its opposite
            gain = (-row["mean"], -row["high_90"], -row["low_90"])
        said = statement(gain[0], holm[name], *gain[1:])
        rows.append({**row, "p": p[name], "p_holm": holm[name], "said": said})
    for name, values in penalty_differences(penalties).items():
        row = _described(name, values)
        alike = row["low_90"] > -MARGIN and row["high_90"] < MARGIN
        rows.append({**row, "said": "within 0.05 points" if alike else "not shown to be within 0.05 points"})
    return pd.DataFrame(rows)


def _described(name: str, values: pd.Series) -> dict[str, float]:
    (low_95, high_95), (low_90, high_90) = (mean_interval(values, level) for level in (0.95, 0.90))
    moments = {"question": name, "n": len(values), "mean": values.mean(), "sd": values.std()}
    return {**moments, "low_95": low_95, "high_95": high_95, "low_90": low_90, "high_90": high_90}


def read(folder: str | Path, conditions: Sequence[str], seeds: Sequence[int]) -> pd.DataFrame:
    """Test digits right at the last epoch: a row a seed, a column a condition."""
    return pd.concat([digits_right(folder, condition, seeds) for condition in conditions], axis=1)


def main(folder: str, *left_out: str) -> None:
    """Print the preregistered answer, once every run is complete."""
    factorial, penalties = (
        [seed for seed in seeds if str(seed) not in left_out] for seeds in (FACTORIAL_SEEDS, PENALTY_SEEDS)
    )
    found = answer(read(folder, FACTORIAL, factorial), read(folder, PENALTIES, penalties))
    print(found.round(4).to_string(index=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
