"""What saved runs say: result tables, errors, and which differences between conditions are real."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import scipy.stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.proportion import proportion_confint
from torch import nn

from s6lib.conditions import Condition, Recipe
from s6lib.data import CLASS_NAMES, Split
from s6lib.study import Study
from s6lib.train import predict_logits


def condition_table(recipe: Recipe, conditions: Sequence[Condition]) -> pd.DataFrame:
    """What sets the conditions apart, and what they share, a row each."""
    rows = [
        {
            "condition": condition.label,
            "lambda 1": condition.l1,
            "lambda 2": condition.l2,
            "normalisation": "BatchNorm" if condition.num_splits is None else "GhostBatchNorm",
            "splits": condition.num_splits or 1,
            "dropout": recipe.dropout,
            "batch size": recipe.batch_size,
            "learning rate": recipe.learning_rate,
        }
        for condition in conditions
    ]
    return pd.DataFrame(rows)


def result_table(study: Study) -> pd.DataFrame:
    """The summary of a study, a row a run, with accuracies in percent, ready to print."""
    summary = study.summary()
    columns = {
        "condition": summary["label"],
        "seed": summary["seed"],
        "last epoch, %": (100 * summary["accuracy"]).round(2),
        "best epoch, %": (100 * summary["best_accuracy"]).round(2),
        "best at": summary["best_epoch"],
        "training, %": (100 * summary["train_accuracy"]).round(2),
        "minutes": (summary["seconds"] / 60).round(1),
    }
    return pd.DataFrame(columns)


def misclassified(model: nn.Module, split: Split) -> pd.DataFrame:
    """The images that a model gets wrong, in their order: image number, actual and predicted names, and its confidence.

    The confidence, from 0 to 1, is the softmax probability of the predicted class.
    """
    confidence, predicted = predict_logits(model, split.images).softmax(1).max(1)
    wrong = (predicted != split.labels).nonzero().flatten()
    names = [[CLASS_NAMES[digit] for digit in digits[wrong].tolist()] for digits in (split.labels, predicted)]
    columns = {"image": wrong.tolist(), "actual": names[0], "predicted": names[1]}
    return pd.DataFrame({**columns, "confidence": confidence[wrong].tolist()})


def confusion_matrix(predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How often each class (row) was predicted as each class (column): int64 (10, 10)."""
    return np.bincount(10 * labels + predictions, minlength=100).reshape(10, 10)


def confused_pairs(matrix: np.ndarray) -> pd.DataFrame:
    """The pairs of classes by how often one is taken for the other, in either direction, the most frequent first.

    Columns: pair, errors, and share, the part of all errors from 0 to 1.
    """
    both = matrix + matrix.T
    first, second = np.triu_indices(10, k=1)
    names = [f"{CLASS_NAMES[a]} / {CLASS_NAMES[b]}" for a, b in zip(first, second, strict=True)]
    pairs = pd.DataFrame({"pair": names, "errors": both[first, second]})
    pairs["share"] = pairs["errors"] / max(1, pairs["errors"].sum())
    return pairs.sort_values("errors", ascending=False, kind="stable", ignore_index=True)


def wrong_in_every_run(study: Study, labels: np.ndarray) -> np.ndarray:
    """The numbers of the test images that every run of a study gets wrong."""
    wrong = [study.predictions(condition, seed) != labels for condition, seed in study.folders]
    return np.flatnonzero(np.all(wrong, axis=0))


def wilson_interval(accuracy: float, images: int = 10_000) -> tuple[float, float]:
    """The 95% interval of one model's accuracy (0 to 1) measured on so many images (Wilson 1927)."""
    low, high = proportion_confint(round(accuracy * images), images, method="wilson")
    return float(low), float(high)


# --- which differences are real --------------------------------------------------------------------------------------


def outcomes(study: Study) -> pd.DataFrame:
    """The outcome fixed beforehand, test images right at the last epoch, of 10,000: a row a seed, a column a condition.

    Counts rather than fractions, so that equal differences are equal. Raises ValueError if a condition lacks a seed
    that another has, since comparisons are paired by seed.
    """
    table = study.summary().pivot(index="seed", columns="condition", values="accuracy")[list(study.conditions)]
    missing = [f"{slug} seed {seed}" for seed in table.index for slug in table if np.isnan(table.loc[seed, slug])]
    if missing:
        raise ValueError(f"comparisons are paired by seed, and these runs are missing: {', '.join(missing)}")
    return (10_000 * table).round().astype(int)


def run_sd(study: Study) -> float:
    """The SD between runs of one and the same condition, in points, pooled over the conditions."""
    return float(outcomes(study).var().mean() ** 0.5) / 100


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of a mean, by the BCa bootstrap (Efron 1987), seeded. Raises ValueError for under two values.

    A bootstrap of few values is too narrow: of normal means it covers 73% with 3, 86% with 6, 90% with 10.
    """
    sample = _sample(values)
    if np.ptp(sample) == 0:
        return float(sample[0]), float(sample[0])
    found = scipy.stats.bootstrap((sample,), np.mean, n_resamples=9_999, method="BCa", rng=np.random.default_rng(1))
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def sign_flip_p(differences: Sequence[float]) -> float:
    """The exact two-sided p-value of paired differences: how many of all 2^n sign flips have as large a mean.

    Raises ValueError for under two differences. Fisher 1935, section 21; equal sums are counted together, as in Pagano
    and Tritchler 1983, so that a hundred seeds are no more trouble than ten.
    """
    sample = _sample(differences)
    if not sample.any():
        return 1.0
    steps = np.rint(1e6 * sample / np.abs(sample).sum())  # whole numbers, so that sums that tie are seen to
    sums, chances = np.zeros(1), np.ones(1)
    for step in steps:
        sums, places = np.unique(np.concatenate([sums + step, sums - step]), return_inverse=True)
        chances = np.bincount(places, np.tile(chances / 2, 2))
    as_large = np.abs(sums) >= abs(steps.sum()) - len(steps)  # each step is rounded by up to a half
    return float(chances[as_large].sum())


def _sample(values: Sequence[float]) -> np.ndarray:
    sample = np.asarray(values, dtype=float)
    if sample.ndim != 1 or len(sample) < 2 or not np.isfinite(sample).all():
        raise ValueError(f"an interval or a test needs at least two finite numbers, not {values!r}: run more seeds")
    return sample


def condition_statistics(study: Study) -> pd.DataFrame:
    """Per condition: n, and mean, SD and 95% interval of the accuracy, in percent."""
    rows = []
    for slug, hits in outcomes(study).items():
        low, high = mean_interval(hits)
        moments = {"mean": hits.mean() / 100, "sd": hits.std() / 100, "low": low / 100, "high": high / 100}
        rows.append({"condition": slug, "label": study.conditions[slug].label, "n": len(hits), **moments})
    return pd.DataFrame(rows)


def paired_comparisons(study: Study) -> pd.DataFrame:
    """Every pair of conditions: mean difference of accuracy over seeds, in points, with its 95% interval and p-values.

    `p` is the exact sign-flip test's, `p_holm` the same after Holm's correction over all pairs; seeds_0.02 and so on,
    how many seeds it would take for such a difference to stand among as many, given the SD found here.
    """
    table = outcomes(study)
    if table.shape[1] < 2:
        raise ValueError(f"a comparison needs two conditions, and this study has {', '.join(table)} alone")
    rows = []
    for first, second in itertools.combinations(table, 2):
        points = (table[first] - table[second]) / 100
        low, high = mean_interval(points)
        interval = {"difference": points.mean(), "low": low, "high": high, "sd": points.std()}
        p = sign_flip_p(table[first] - table[second])
        rows.append({"first": first, "second": second, "n": len(points), **interval, "p": p})
    comparisons = pd.DataFrame(rows)
    comparisons["p_holm"] = multipletests(comparisons["p"], method="holm")[1]
    for size in (0.02, 0.03, 0.05):
        comparisons[f"seeds_{size}"] = [seeds_needed(sd, size, len(rows)) for sd in comparisons["sd"]]
    return comparisons


def seeds_needed(sd: float, difference: float, comparisons: int = 1) -> int:
    """How many paired seeds show a true difference with power 0.8 at the 5% level (t test; Cohen 1988, chapter 2).

    Among several comparisons the level is 5% divided by their number, which Holm's correction asks of the first. Never
    fewer than the sign-flip test can use: with n seeds no p-value of its is below 2 / 2^n.
    """
    if not (sd >= 0 and difference > 0):
        raise ValueError(f"the SD must be at least 0 and the difference above 0, not {sd!r} and {difference!r}")
    alpha = 0.05 / comparisons
    fewest = math.ceil(1 - math.log2(alpha))
    if difference > 4 * sd:  # so many seeds show it, and the solver may find no root
        return fewest
    return max(fewest, math.ceil(TTestPower().solve_power(effect_size=difference / sd, alpha=alpha, power=0.8)))


def variance_sources(right: np.ndarray) -> dict[str, float]:
    """The standard error of a mean accuracy, in points, from each source: other seeds, other test images, and both.

    Every run is scored on every image, so what is neither the run's nor the image's own, the residual of a two-way
    analysis of variance, is in the variance of the run means and in that of the image means, and is counted once in
    "both". A bootstrap over runs and over images would count it three times there (Owen, "The pigeonhole bootstrap",
    Annals of Applied Statistics 1, 2007).

    Args:
        right: (seeds, images), whether each run is right on each image; or the difference of two such arrays.
    """
    if len(right) < 2:
        raise ValueError("the share of the seeds cannot be told from one run: run more seeds")
    seeds, images = right.shape
    points = 100 * right.astype(float)
    by_seed, by_image = points.mean(1), points.mean(0)
    residual = points - by_seed[:, np.newaxis] - by_image + points.mean()
    noise = (residual**2).sum() / ((seeds - 1) * (images - 1)) / (seeds * images)
    apart = {"seeds": by_seed.var(ddof=1) / seeds, "images": by_image.var(ddof=1) / images}
    both = max(*apart.values(), sum(apart.values()) - noise)
    return {source: float(variance**0.5) for source, variance in {**apart, "both": both}.items()}


def right_predictions(study: Study, condition: str, labels: np.ndarray) -> np.ndarray:
    """Whether each run of a condition is right on each test image: bool (seeds, images)."""
    return np.stack([study.predictions(slug, seed) == labels for slug, seed in study.folders if slug == condition])


def mcnemar_p(first: np.ndarray, second: np.ndarray) -> tuple[int, int, float]:
    """The exact McNemar test of two saved models: images that only the first gets right, only the second, and p.

    It compares these two fitted models on other images, not the two methods that made them: another seed would be
    another model (Dietterich 1998, section 3).
    """
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    test = mcnemar([[0, only_first], [only_second, 0]], exact=True)
    return only_first, only_second, float(test.pvalue)


def false_alarm_rate(runs: Sequence[float], seeds: int, comparisons: int = 1_000) -> float:
    """How often the sign-flip test at the 5% level finds a difference where there is none (an A/A test).

    Args:
        runs: outcomes of one condition, real or simulated, from which both sides are drawn, with replacement.
        seeds: pairs in a comparison.
    """
    draws = np.random.default_rng(1).choice(_sample(runs), size=(2, comparisons, seeds))
    return float(np.mean([sign_flip_p(differences) <= 0.05 for differences in draws[0] - draws[1]]))


def equal_conditions(sd: float, conditions: int = 5, studies: int = 10_000) -> tuple[np.ndarray, float]:
    """If all conditions were equal and each had one run: the share of studies that each would win, and their spread.

    A win is shared among those that tie to 0.01 points; the spread is the mean of best minus worst, in points.
    """
    accuracies = np.random.default_rng(1).normal(99.5, sd, size=(studies, conditions)).round(2)
    best = accuracies == accuracies.max(1, keepdims=True)
    return (best / best.sum(1, keepdims=True)).mean(0), float(np.ptp(accuracies, axis=1).mean())


def stability(study: Study) -> pd.DataFrame:
    """Per run, the SD of the change of accuracy from epoch to epoch, in points, at the first learning rate and after.

    A row for each part ("first rate", "after") and seed, a column a condition. The change from the last epoch at the
    first learning rate to the next belongs to neither part.
    """
    first = study.recipe.decay_epochs
    history = study.history.assign(points=100 * study.history["val_accuracy"])
    history["change"] = history.groupby(["condition", "seed"])["points"].diff()
    history["part"] = np.select([history["epoch"] <= first, history["epoch"] > first + 1], ["first rate", "after"], "")
    changes = history[history["part"] != ""].groupby(["part", "seed", "condition"], sort=False)["change"].std()
    return changes.unstack()[list(study.conditions)]


def verdict(difference: float, p: float) -> str:
    """What a test says of the claim that a difference is above 0, at the 5% level."""
    if p > 0.05:
        return "cannot be told at this n"
    return "supported" if difference > 0 else "not supported"


def verdict_on_best(comparisons: pd.DataFrame, best: str, others: Sequence[str]) -> str:
    """What paired comparisons say of the claim that a condition is better than each of others, by Holm's p-values.

    "supported" if every comparison supports it, "not supported" if one speaks against it. Raises ValueError if one is
    missing.
    """
    swapped = {"first": "second", "second": "first"}
    both = pd.concat([comparisons, comparisons.rename(columns=swapped).assign(difference=-comparisons["difference"])])
    rows = both[(both["first"] == best) & both["second"].isin(others)]
    if missing := set(others) - set(rows["second"]):
        raise ValueError(f"no comparison of {best} with {', '.join(sorted(missing))}")
    verdicts = {verdict(row.difference, row.p_holm) for row in rows.itertuples()}
    return next(found for found in ("not supported", "cannot be told at this n", "supported") if found in verdicts)
