"""What the text of a notebook claims about the published runs, checked in its last cell, out of the lesson's way."""

from collections.abc import Mapping
from types import SimpleNamespace

import numpy as np
import pandas as pd

from lesson import is_published
from s6lib.statistics import mean_interval, run_sd


def _behind(history: pd.DataFrame) -> bool:
    """Whether, before the learning rate falls, every condition with L1 has a lower mean accuracy than all others."""
    means = history.query("3 <= epoch <= 6").groupby(["epoch", "condition"])["test_accuracy"].mean().unstack()
    with_l1 = means.columns.str.contains("l1")
    return bool((means.loc[:, with_l1].max(axis=1) < means.loc[:, ~with_l1].min(axis=1)).all())


def _compare_bn_with_gbn(pairs: pd.DataFrame) -> bool:
    """Whether every pair is a penalty with BN against a condition with GBN, and all intervals are above zero."""
    with_bn, with_gbn = pairs["first"].str.endswith("-bn"), pairs["second"].str.endswith("gbn")
    return bool((with_bn & with_gbn & (pairs["low"] > 0)).all())


# Each claim is a sentence, and its test on the notebook's variables.
CLAIMS = {
    "04_analysis": {
        "until the learning rate falls, the three with L1 are behind": lambda it: _behind(it.study.history()),
        "in the end the lines lie no further apart than the bar is long": lambda it: (
            np.ptp(it.study.outcomes().mean()) < 2 * run_sd(it.study.outcomes())
        ),
        "L1 + BN has a lower loss than L1 + L2 + GBN in every seed": lambda it: (
            it.losses["l1-bn"] < it.losses["l1-l2-gbn"]
        ).all(),
        "measured in the same way it is higher, by less than 0.1 points": lambda it: (
            0 < it.on_training - it.on_test < 0.1
        ),
        "the finished networks show no such difference": lambda it: it.fair.diff().iloc[1, 1] > 0,
        "L1 has a spike at zero": lambda it: min(it.small[slug] for slug in it.small if "l1" in slug) > 0.25,
        "L2 makes weights smaller": lambda it: abs(it.weights["l2-bn"]).mean() < abs(it.weights["bn"]).mean(),
        "nothing else does": lambda it: max(it.small[slug] for slug in it.small if "l1" not in slug) < 0.01,
        "every network keeps its accuracy to within a point without half of its weights": lambda it: (
            (it.left["0% removed"] - it.left["50% removed"]).max() < 1
        ),
        "with 70% removed, those trained with L1 still get 99% right": lambda it: (
            it.left.loc[["l1-bn", "l1-l2-bn"], "70% removed"].round().eq(99).all()
        ),
        "without L1 it depends on the seed": lambda it: (
            np.ptp(it.curve.query("share == 0.7 and condition in ['l2-bn', 'bn']")["accuracy"]) > 0.3
        ),
        "with 16 ghosts, all runs are below every run with fewer": lambda it: (
            it.accuracies[[1, 2, 4, 8]].min().min() > it.accuracies[16].max()
        ),
        "with 32 ghosts, they are lower still": lambda it: it.accuracies[16].min() > it.accuracies[32].max(),
        "few images cause most errors": lambda it: it.share_hard > 0.5,
    },
    "05_replication": {
        "each of the five conditions wins, or shares a win, for some seed": lambda it: it.best.any().all(),
        "each of five equal conditions wins often": lambda it: it.wins.min() > 0.15,
        "five equal conditions lie further apart than our means": lambda it: (
            it.spread > it.outcomes.mean().max() - it.outcomes.mean().min()
        ),
        "the pair has the largest difference": lambda it: (
            it.comparisons["difference"].abs().max() == abs(it.differences.mean())
        ),
        "none is significant after the correction": lambda it: it.comparisons["p_holm"].min() > 0.05,
        "the six pairs on top compare BN with GBN, and their intervals exclude zero": lambda it: _compare_bn_with_gbn(
            it.comparisons.nlargest(6, "difference")
        ),
        "the new runs neither confirm the difference nor rule it out": lambda it: (
            it.again.low < 0 < it.again.difference < it.differences.mean() < it.again.high and it.again.p > 0.05
        ),
        "differences of 0.05 points are excluded": lambda it: (
            it.gains["said"].tolist() == 2 * ["no difference of 0.05 points or more"] + 3 * ["within 0.05 points"]
        ),
        "and lie within 0.05 points by their 95% intervals too": lambda it: (
            it.gains[["low_95", "high_95"]].abs().max().max() < 0.05
        ),
        "a cost of GBN is not shown": lambda it: it.gains["p"][0] <= 0.05 < it.gains["p_holm"][0],
        "GBN has the higher loss": lambda it: mean_interval(-it.measures["test loss"]["G"])[0] > 0,
        "L1 has its spike at zero": lambda it: all(
            (share > 25) == ("L1" in label) for label, share in it.small.items()
        ),
        "the highest on PlainNet is the lowest on BottleneckNet": lambda it: (
            it.means.idxmin() == it.outcomes.mean().idxmax()
        ),
    },
    "08_frontier": {
        "the recipe gains 0.08 points (0.01 to 0.14, n = 10)": lambda it: (
            [round(it.whole[name], 2) for name in ("mean", "low", "high", "n")] == [0.08, 0.01, 0.14, 10]
        ),
        "no condition's mean differs from BN's by more than 0.05": lambda it: (
            max(abs(row["mean"]) for row in it.conditions) <= 0.05
        ),
        "one cycle gained the most, and fresh seeds confirmed it": lambda it: (
            it.table["mean"].idxmax() == 0 and it.verdict == "confirmed"
        ),
        "the smallest whose mean reaches 99.40% has 3,864 parameters (99.35 to 99.45, n = 10)": lambda it: (
            it.enough[["parameters", "mean", "low", "high", "n"]].astype(float).round(2).tolist()
            == [3_864, 99.40, 99.35, 99.45, 10]
        ),
        "the best mean, 99.55% (99.52 to 99.59), is that of PlainNet with 9,646": lambda it: (
            it.best[["parameters", "mean", "low", "high"]].astype(float).round(2).tolist()
            == [9_646, 99.55, 99.52, 99.59]
        ),
        "in 15 epochs, 0 to 5 of 10 pass": lambda it: (
            set(it.challenge.groupby(level="condition").sum()) == {0, 1, 5} and len(it.short.seeds) == 10
        ),
    },
    "09_methods": {
        "some parts are harder than others, for every network": lambda it: (
            np.ptp(it.parts.to_numpy(), axis=1).min() > np.ptp(it.parts.to_numpy(), axis=0).max()
        ),
        "the images make a mean more uncertain than the seeds do": lambda it: all(
            source["images"] > 2.5 * source["seeds"] for source in list(it.sources.values())[:-1]
        ),
        "in a difference most of that cancels": lambda it: (
            it.both["images"] < 0.5 * min(source["images"] for source in list(it.sources.values())[:-1])
        ),
        "some pairs of networks differ, and most do not": lambda it: 0 < it.found < len(it.SEEDS) / 2,
        "the test keeps its level for equal conditions": lambda it: 0.02 < (it.p <= 0.05).mean() < 0.06,
        "and for real runs": lambda it: it.rate < 0.06,
        "without a correction many studies find something where there is nothing": lambda it: (
            it.table.iloc[0]["any of 15, alone"] > 20
        ),
        "with Holm's, hardly any do": lambda it: it.table.iloc[0]["any of 15, Holm"] < 6,
        "Holm finds a given small difference far less often": lambda it: (
            it.table.iloc[1]["first pair, Holm"] < 0.5 * it.table.iloc[1]["first pair, alone"]
        ),
        "four of the claims cannot be told": lambda it: list(it.claims.values()).count("cannot be told at this n") == 4,
        "L1 + BN jumps more than BN": lambda it: it.claims["L1 + BN jumps more than BN"] == "supported",
    },
}


def check_claims(notebook: str, names: Mapping[str, object]) -> None:
    """Check the text of a notebook against its variables; a reader's own runs may say something else.

    Args:
        names: the notebook's `globals()`.

    Raises AssertionError with the first claim that does not hold for the published runs.
    """
    if not is_published(names["FOLDER"]):
        print("The text is about the published runs; yours may differ.")
        return
    for claim, test in CLAIMS[notebook].items():
        assert test(SimpleNamespace(**names)), f"the text says: {claim}"
    print(f"{len(CLAIMS[notebook])} claims of the text hold for the published runs")
