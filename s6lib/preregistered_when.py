"""The analysis that docs/preregistration_when.md fixed before its runs: when does regularisation matter?

    python -m s6lib.preregistered_when results/when

It reads the histories itself and imports no other part of the library, so that no later change alters an answer.
"""

import csv
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.stats

REGULARISERS = ("l1", "l2", "dropout", "rotation", "ghosts")  # each alone, at the strength chosen for its size
WEAK = ("l1-exercise", "l2-exercise")  # at the strengths of the five conditions, on these numbers of digits:
WEAK_SIZES = (100, 300, 1_000)
SMALL, LARGE = 300, 10_000  # the sizes that question 2 compares
SEEDS = {100: range(11, 19), 300: range(11, 27), 1_000: range(11, 19), 3_000: range(11, 17), 10_000: range(11, 17)}
BATCH_SEEDS = range(11, 16)
BATCHES = ("batch-64", "batch-1024", "batch-1024-ghosts-64", "batch-1024-ghosts-16")
BEST = "rotation"  # the best alone on 300 digits in the trials
MARGIN = 0.2  # points: a smaller gain does not matter here
GAIN = ("gains {:.2f} points", "costs {:.2f} points", "no gain shown")


def read(folder: str | Path, names: Sequence[str], seeds: Sequence[int]) -> pd.DataFrame:
    """Test accuracy at the last epoch, in percent: a row a seed, a column a condition.

    Raises ValueError if a run is missing or not complete: no question is answered before all its runs are.
    """
    runs = {(name, seed): Path(folder) / "when" / name / f"seed-{seed}" for name in names for seed in seeds}
    missing = [str(run) for run in runs.values() if not (run / "run.json").exists()]
    if missing:
        raise ValueError(f"{len(missing)} of {len(runs)} runs are not complete, the first of them {missing[0]}")
    table = pd.DataFrame({name: {seed: _last_accuracy(runs[name, seed]) for seed in seeds} for name in names})
    return table.rename_axis("seed")


def _last_accuracy(run: Path) -> float:
    with open(run / "history.csv", newline="") as file:
        return 100 * float(list(csv.DictReader(file))[-1]["val_accuracy"])


def read_gains(folder: str | Path, size: int, names: Sequence[str]) -> pd.DataFrame:
    """What conditions gain over "nothing" on so many digits, in points, paired by seed: a column a condition."""
    table = read(folder, [f"{size}-{name}" for name in ("nothing", *names)], SEEDS[size])
    nothing, *conditions = (table[column] for column in table)
    return pd.DataFrame({name: values - nothing for name, values in zip(names, conditions, strict=True)})


def mean_interval(values: Sequence[float], level: float) -> tuple[float, float]:
    """The t interval of a mean."""
    sample = np.asarray(values, dtype=float)
    half = scipy.stats.t.ppf((1 + level) / 2, len(sample) - 1) * sample.std(ddof=1) / math.sqrt(len(sample))
    return float(sample.mean() - half), float(sample.mean() + half)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction (1979): the smallest p times their number, the next times one less, never below the last."""
    ranks = np.argsort(p_values, kind="stable")
    steps = np.asarray(p_values)[ranks] * np.arange(len(ranks), 0, -1)
    corrected = np.empty(len(ranks))
    corrected[ranks] = np.minimum(1, np.maximum.accumulate(steps))
    return corrected.tolist()


def gain(folder: str | Path) -> pd.DataFrame:
    """Question 1: does each regulariser gain on 300 digits? Paired t tests, Holm over the five."""
    gains = read_gains(folder, SMALL, REGULARISERS)
    return _conclude([_describe(name, gains[name]) for name in gains], *GAIN)


def fall(folder: str | Path) -> pd.DataFrame:
    """Question 2: is each gain smaller on 10,000 digits than on 300? Welch's t tests, Holm over the five."""
    small, large = (read_gains(folder, size, REGULARISERS) for size in (SMALL, LARGE))
    rows = []
    for name in REGULARISERS:
        test = scipy.stats.ttest_ind(small[name], large[name], equal_var=False)
        (low, high), mean = test.confidence_interval(0.95), small[name].mean() - large[name].mean()
        n = f"{len(small)} and {len(large)}"
        rows.append({"subject": name, "n": n, "mean": mean, "low": low, "high": high, "p": test.pvalue})
    return _conclude(rows, "falls by {:.2f} points", "grows by {:.2f} points", "no change shown")


def within(folder: str | Path) -> pd.DataFrame:
    """Question 3: from what size on does the 90% t interval of each gain lie within 0.2 points, ends excluded?"""
    gains = {size: read_gains(folder, size, REGULARISERS) for size in SEEDS}
    return pd.DataFrame(
        [{"subject": name, "said": smallest_size({size: gains[size][name] for size in gains})} for name in REGULARISERS]
    )


def smallest_size(gains: dict[int, pd.Series]) -> str:
    """The sentence of question 3 for one regulariser, from its gains by size."""
    smallest = None
    for size in sorted(gains, reverse=True):
        low, high = mean_interval(gains[size], 0.90)
        if not -MARGIN < low < high < MARGIN:
            break
        smallest = size
    return f"within {MARGIN} points from {smallest:,} digits on" if smallest else f"at no size within {MARGIN} points"


def exercise(folder: str | Path) -> pd.DataFrame:
    """Question 4: do the exercise's strengths of L1 and L2 gain on few digits? Paired t tests, Holm over the six."""
    gains = {size: read_gains(folder, size, WEAK) for size in WEAK_SIZES}
    rows = [_describe(f"{name}, {size:,} digits", gains[size][name]) for name in WEAK for size in gains]
    return _conclude(rows, *GAIN)


def together(folder: str | Path) -> pd.DataFrame:
    """Question 5: on 300 digits, do all five gain more than the best alone, and as much as the sum of the five?"""
    gains = read_gains(folder, SMALL, (*REGULARISERS, "together"))
    alone = gains[list(REGULARISERS)].sum(axis=1)
    rows = [
        _describe(f"together minus {BEST}", gains["together"] - gains[BEST]),
        _describe("together minus the sum", gains["together"] - alone),
    ]
    return _conclude(rows, "{:.2f} points more", "{:.2f} points less", "no difference shown")


def batches(folder: str | Path) -> pd.DataFrame:
    """Question 7: at equal epochs, what does a batch of 1,024 cost, and what do ghosts recover? Holm over the three."""
    accuracies = read(folder, BATCHES, BATCH_SEEDS)
    small, large, *ghosts = BATCHES
    pairs = [(large, small), *((name, large) for name in ghosts)]
    rows = [_describe(f"{one} minus {other}", accuracies[one] - accuracies[other]) for one, other in pairs]
    return _conclude(rows, "gains {:.2f} points", "costs {:.2f} points", "no difference shown")


def _describe(subject: str, values: pd.Series) -> dict[str, object]:
    """Mean, 95% interval and two-sided p of a paired t test of the mean against zero."""
    low, high = mean_interval(values, 0.95)
    p = scipy.stats.ttest_1samp(values, 0).pvalue
    return {"subject": subject, "n": str(len(values)), "mean": values.mean(), "low": low, "high": high, "p": p}


def _conclude(rows: list[dict], more: str, less: str, neither: str) -> pd.DataFrame:
    """Add p after Holm's correction, and the sentence: `more` or `less` where it is at most 5%."""
    table = pd.DataFrame(rows)
    table["p_holm"] = holm(table["p"])
    table["said"] = [
        (more if row.mean > 0 else less).format(abs(row.mean)) if row.p_holm <= 0.05 else neither
        for row in table.itertuples()
    ]
    return table


QUESTIONS = (gain, fall, within, exercise, together, batches)


def main(folder: str) -> None:
    """Print the answer to each question whose runs are all complete."""
    for question in QUESTIONS:
        print(f"\n{question.__doc__}")
        try:
            print(question(folder).round(4).to_string(index=False))
        except ValueError as error:
            print(error)


if __name__ == "__main__":
    main(*sys.argv[1:])
