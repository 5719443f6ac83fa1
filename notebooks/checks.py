"""What the text of a notebook claims about the published runs, checked in its last cell, out of the lesson's way."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

from s6lib.data import PROJECT
from s6lib.statistics import friedman_p

# Each claim is a sentence, and its test on the notebook's variables.
CLAIMS = {
    "04_analysis": {
        "L1 + BN has a lower loss than L1 + L2 + GBN in every seed": lambda it: (
            it.losses["l1-bn"] < it.losses["l1-l2-gbn"]
        ).all(),
        "L1 leaves a spike near zero": lambda it: min(it.small[slug] for slug in it.small if "l1" in slug) > 0.25,
        "nothing else does": lambda it: max(it.small[slug] for slug in it.small if "l1" not in slug) < 0.01,
        "with L1 the network needs about a third of its weights": lambda it: (
            it.left[it.left.index.str.contains("l1")][0.7].min() > 0.98
        ),
        "without L1 it needs most of them": lambda it: it.left[~it.left.index.str.contains("l1")][0.7].max() < 0.85,
        "most of GBN's lower training accuracy comes from how it is measured": lambda it: (
            0 < it.gap_finished < 0.4 * it.gap_training
        ),
        "with 16 ghosts, all runs are below every run with fewer": lambda it: (
            it.accuracies[[1, 2, 4, 8]].min().min() > it.accuracies[16].max()
        ),
        "with 32 ghosts, they are lower still": lambda it: it.accuracies[16].min() > it.accuracies[32].max(),
        "many errors are not close calls": lambda it: 0.15 < it.share_sure < 0.35,
        "4 and 9 are confused most often in every seed": lambda it: it.places.loc["four / nine"].eq(1).all(),
        "other pairs come before 1 and 7 in every seed": lambda it: it.places.loc["one / seven"].min() > 2,
        "few digits cause most errors": lambda it: it.share_hard > 0.5,
    },
    "05_replication": {
        "each of the five conditions wins for some seed": lambda it: it.best.any().all(),
        "each of five equal conditions wins often": lambda it: it.wins.min() > 0.15,
        "five equal conditions lie further apart than our means": lambda it: (
            it.spread > it.outcomes.mean().max() - it.outcomes.mean().min()
        ),
        "the pair has the largest difference": lambda it: (
            it.comparisons["difference"].abs().max() == abs(it.differences.mean())
        ),
        "no difference is left after the correction": lambda it: it.comparisons["p_holm"].min() > 0.05,
        "intervals and uncorrected p-values agree": lambda it: (
            ((it.comparisons["low"] > 0) | (it.comparisons["high"] < 0)) == (it.comparisons["p"] <= 0.05)
        ).all(),
        "the new runs neither confirm the difference nor rule it out": lambda it: (
            it.again.low < 0 < it.again.difference < it.differences.mean() < it.again.high and it.again.p > 0.05
        ),
        "differences of 0.05 points are excluded": lambda it: (
            set(it.found["said"][:2]) == {"no difference of 0.05 points or more"} and not it.apart
        ),
        "the highest on PlainNet is the lowest on BottleneckNet": lambda it: (
            it.means.idxmin() == it.outcomes.mean().idxmax()
        ),
    },
    "09_methods": {
        "the digits make a mean more uncertain than the seeds do": lambda it: all(
            source["images"] > 2.5 * source["seeds"] for source in list(it.sources.values())[:-1]
        ),
        "in a difference most of that cancels": lambda it: (
            it.both["images"] < 0.5 * min(source["images"] for source in list(it.sources.values())[:-1])
        ),
        "some pairs of models differ, and most do not": lambda it: 0 < it.found < len(it.SEEDS) / 2,
        "the test keeps its level for equal conditions": lambda it: 0.02 < (it.p <= 0.05).mean() < 0.06,
        "and for real runs": lambda it: it.rate < 0.06,
        "without a correction many studies find something where there is nothing": lambda it: (
            it.table.iloc[0]["any of 15, alone"] > 0.2
        ),
        "with Holm's, hardly any do": lambda it: it.table.iloc[0]["any of 15, Holm"] < 0.06,
        "Holm finds a given small difference far less often": lambda it: (
            it.table.iloc[1]["first pair, Holm"] < 0.5 * it.table.iloc[1]["first pair, alone"]
        ),
        "Friedman's test says that something differs": lambda it: friedman_p(it.outcomes) < 0.05,
        "GBN has the last rank": lambda it: it.ranks.idxmax() == "GBN",
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
    if Path(names["FOLDER"]).resolve() != (PROJECT / "results").resolve():
        print("The text is about the published runs; yours may differ.")
        return
    for claim, test in CLAIMS[notebook].items():
        assert test(SimpleNamespace(**names)), f"the text says: {claim}"
    print(f"{len(CLAIMS[notebook])} claims of the text hold for the published runs")
