"""What docs/preregistration_worth.md can find at its n, from the spreads that results/when came out with.

    python studies/worth_power.py

Prints the page's table, and how wide the intervals of simulated studies are and how often they find a fall.
"""

import math
import sys
from functools import cache
from pathlib import Path

import numpy as np
import scipy.stats

sys.path.insert(0, str(Path(__file__).parent))  # for the command line, which loads this file alone

import worth_analysis as analysis

RESULTS = Path(__file__).parents[1] / "results"
N, STUDIES = len(analysis.SEEDS), 500
GUESS = 0.75  # percent of errors on 30,000 images


@cache
def spreads(size: int) -> tuple[float, float, float, float]:
    """Of the runs on so many images: mean log error of nothing, its SD, and the SDs of a log ratio and of a gain."""
    if size == analysis.ALL:
        folder, recipe, slugs = RESULTS, "plain", ["bn", "l1-bn", "l2-bn", "l1-l2-bn", "gbn", "l1-l2-gbn"]
    else:
        folder, recipe = RESULTS / "when", "when"
        slugs = [f"{size}-{name}" for name in ("nothing", *analysis.REGULARISERS)]
    runs = ((folder / recipe / slug).glob("seed-*/run.json") for slug in slugs)
    seeds = sorted(set.intersection(*({int(run.parent.name[5:]) for run in one} for one in runs)))
    base, *others = (analysis.errors(folder, recipe, slug, seeds) for slug in slugs)
    ratios, gains = np.log(base) - np.log(others), base - np.array(others)
    pooled = (math.sqrt(values.var(axis=1, ddof=1).mean()) for values in (ratios, gains))
    return float(np.log(base).mean()), float(np.log(base).std(ddof=1)), *pooled


def found_share(spread: float) -> float:
    """The share of the errors whose removal is found in four studies of five, if it is the smallest of five."""
    ratios = np.linspace(0.001, 2, 4_000)
    limit = scipy.stats.t.ppf(1 - 0.05 / 5 / 2, N - 1)
    power = 1 - scipy.stats.nct.cdf(limit, N - 1, ratios / spread * math.sqrt(N))
    return analysis.share(float(ratios[np.argmax(power >= 0.8)]))


def simulate(few: float, many: float, rng: np.random.Generator) -> tuple[bool, bool, list[bool], list[float]]:
    """Simulate a study of two factors: is a fall found, "the same" said; are the factors covered, how wide, in logs.

    Errors with and without a regulariser share what makes them vary more than their difference does.
    """
    table = [spreads(min(size, 10_000)) for size in analysis.SIZES]
    means = np.array([row[0] for row in table[:-1]] + [math.log(GUESS)])
    own = np.array([row[2] for row in table]) / math.sqrt(2)
    common = np.sqrt(np.maximum(np.array([row[1] for row in table]) ** 2 - own**2, 0)) * rng.normal(size=(N, len(own)))
    curve, noise = (common + own * rng.normal(size=common.shape) for _ in range(2))
    curve += means
    pairs = {analysis.SMALL: few, analysis.LARGE: many}
    with_it = {
        size: np.interp(math.log(size * factor), np.log(analysis.SIZES), means) + noise[:, analysis.SIZES.index(size)]
        for size, factor in pairs.items()
    }
    values = analysis.fall_values(curve, *with_it.values())
    low, high = analysis.mean_interval(values, 0.90)
    bounds = [analysis.worth(curve, with_it[size], size)[1:] for size in pairs]
    return (
        scipy.stats.ttest_1samp(values, 0).pvalue <= 0.05 / 5,
        -math.log(analysis.WITHIN) < low < high < math.log(analysis.WITHIN),
        [one[0] <= factor <= one[1] for one, factor in zip(bounds, pairs.values(), strict=True)],
        [math.log(high / low) / 2 if low > 0 else math.inf for low, high in bounds],
    )


def describe_power() -> list[str]:
    """Return the rows of the page's table."""
    rows = ((size, *spreads(size)[2:]) for size in (*analysis.REGULARISED, analysis.ALL))
    return [f"| {size:,} | {gain:.2f} | {ratio:.3f} | {found_share(ratio):.0f}% |" for size, ratio, gain in rows]


def main() -> None:
    """Print the table and the simulations."""
    print(*describe_power(), sep="\n")
    for few, many in ((1.7, 1.2), (2.3, 1.2), (1.7, 1.7), (1.7, 1.36)):
        rng = np.random.default_rng(7)
        falls, same, covered, widths = zip(*(simulate(few, many, rng) for _ in range(STUDIES)), strict=True)
        width = " and ".join(f"x{math.exp(one):.2f}" for one in np.median(widths, axis=0))
        print(f"{few} and {many}: a fall {np.mean(falls):.0%}, the same {np.mean(same):.0%}; {width} wide, ", end="")
        print(f"cover {np.mean(covered):.1%}")


if __name__ == "__main__":
    main()
