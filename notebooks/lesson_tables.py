"""Tables and tests that only one notebook uses. Those for any study are in s6lib.analysis and s6lib.statistics."""

import sys
from collections.abc import Sequence
from copy import deepcopy
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import torch
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint
from torch import Tensor, nn
from torch.nn.utils import prune

from s6lib import Condition, ImageDataset, Recipe, Study, evaluate
from s6lib.data import CLASS_NAMES, PROJECT
from s6lib.recipes import name_of
from s6lib.statistics import CONTRADICTED, SUPPORTED, UNDECIDED, mean_interval, sign_flip_p, verdict

sys.path.insert(0, str(PROJECT / "studies"))
import worth_analysis

WORTH = PROJECT / "results" / "worth"


@torch.no_grad()
def ghost_scatter(model: nn.Module, images: Tensor, splits: Sequence[int]) -> pd.DataFrame:
    """Measure the noise of ghost statistics: how far ghost means scatter around the batch means.

    The table has one row per normalisation layer, numbered from 1, and one column per number of splits. The scatter is
    in SDs of a channel, averaged over the layer's input channels; dead channels are left out. The model runs in
    evaluation mode.

    Args:
        images: a batch for the model, (N, 1, 28, 28).
    """
    rows: list[list[float]] = []

    def measure(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        channels = inputs[0].transpose(0, 1).flatten(2)  # (C, N, pixels)
        center, scale = channels.mean((1, 2)), channels.std((1, 2))
        means = [torch.stack([ghost.mean((1, 2)) for ghost in channels.tensor_split(count, 1)]) for count in splits]
        rows.append([float(((each - center) / scale).square().mean(0).sqrt().nanmean()) for each in means])

    layers = [layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    hooks = [layer.register_forward_pre_hook(measure) for layer in layers]
    try:
        model.eval()(images)
    finally:
        for hook in hooks:
            hook.remove()
    return pd.DataFrame(rows, index=range(1, len(rows) + 1), columns=list(splits))


def condition_table(recipe: Recipe, conditions: Sequence[Condition]) -> pd.DataFrame:
    """Tabulate the settings of each condition, one row per condition.

    The settings of the recipe include the condition's changes. Every setting that some condition changes has a column,
    and so do penalties that users define. Raises ValueError if a condition does not fit the recipe.
    """
    names = dict.fromkeys(["dropout", "batch_size", "learning_rate"])
    names |= dict.fromkeys(name for condition in conditions for name in condition.changes)
    rows = []
    for condition in conditions:
        row = {"condition": condition.label, "lambda 1": condition.l1, "lambda 2": condition.l2}
        if any(other.penalty is not None for other in conditions):
            row["penalty"] = _table_entry(condition.penalty)
        row |= {"normalisation": _normalisation(condition), "splits": condition.num_splits or 1}
        settings = recipe.changed_by(condition)
        rows.append(row | {name.replace("_", " "): _table_entry(getattr(settings, name)) for name in names})
    return pd.DataFrame(rows)


def _normalisation(condition: Condition) -> str:
    if condition.norm is not None:
        return name_of(condition.norm)
    return "BatchNorm" if condition.num_splits is None else "GhostBatchNorm"


def _table_entry(setting: Any) -> Any:
    """A setting as a table shows it: the name of a class or function, a dash for None."""
    if setting is None:
        return "-"
    return name_of(setting) if callable(setting) else setting


def wilson_interval(accuracy: float, images: int = 10_000) -> tuple[float, float]:
    """The 95% interval of one model's accuracy (0 to 1), measured on this number of images (Wilson 1927)."""
    low, high = proportion_confint(round(accuracy * images), images, method="wilson")
    return float(low), float(high)


def confusion_matrix(predictions: np.ndarray, labels: np.ndarray, classes: int = len(CLASS_NAMES)) -> np.ndarray:
    """Count how often each class (row) was predicted as each class (column): int64 (classes, classes)."""
    return np.bincount(classes * labels + predictions, minlength=classes**2).reshape(classes, classes)


def confused_pairs(matrix: np.ndarray, class_names: Sequence[str] = CLASS_NAMES) -> pd.DataFrame:
    """Rank the pairs of classes by how often a model confuses them, in either direction.

    Columns: pair, errors, and share (of all errors, 0 to 1).
    """
    both = matrix + matrix.T
    first, second = (side.tolist() for side in np.triu_indices(len(matrix), k=1))
    names = [f"{class_names[a]} / {class_names[b]}" for a, b in zip(first, second, strict=True)]
    pairs = pd.DataFrame({"pair": names, "errors": both[first, second]})
    pairs["share"] = pairs["errors"] / max(1, pairs["errors"].sum())
    return pairs.sort_values("errors", ascending=False, kind="stable", ignore_index=True)


def errors_by_digit(study: Study, labels: np.ndarray) -> pd.DataFrame:
    """List the test images that some run of a study gets wrong, those with the most wrong runs first.

    Columns: image (its number), actual (its class name), runs (how many get it wrong), and taken_for (the class name
    that these runs predict most often).
    """
    class_names = study.data[1].class_names
    votes = np.zeros((len(labels), len(class_names)), dtype=int)
    for condition, seed in study.runs:
        votes[np.arange(len(labels)), study.predictions(condition, seed)] += 1
    votes[np.arange(len(labels)), labels] = 0
    wrong = votes.sum(1)
    images = np.argsort(-wrong, kind="stable")[: np.count_nonzero(wrong)]
    names = [[class_names[label] for label in classes[images]] for classes in (labels, votes.argmax(1))]
    return pd.DataFrame({"image": images, "actual": names[0], "runs": wrong[images], "taken_for": names[1]})


def pruned(model: nn.Module, share: float) -> nn.Module:
    """Copy a model and set a share (0 to 1) of its convolution weights to zero, the smallest across all layers.

    The copy is not trained further. Han et al. 2015, arXiv:1506.02626, prune by one threshold per layer.
    """
    copy = deepcopy(model)
    weights = [(layer, "weight") for layer in copy.modules() if isinstance(layer, nn.Conv2d)]
    prune.global_unstructured(weights, prune.L1Unstructured, amount=float(share))
    for layer, name in weights:
        prune.remove(layer, name)
    return copy


def pruning_curve(study: Study, images: ImageDataset, shares: Sequence[float]) -> pd.DataFrame:
    """Evaluate every run on `images` after `pruned`: condition, seed, share, accuracy (0 to 1), one row per share."""
    rows = []
    for condition, seed in study.runs:
        model = study.model(condition, seed)
        for share in shares:
            accuracy = evaluate(pruned(model, share), images).accuracy
            rows.append({"condition": condition, "seed": seed, "share": share, "accuracy": accuracy})
    return pd.DataFrame(rows)


def equal_conditions(sd: float, conditions: int = 5, studies: int = 10_000) -> tuple[np.ndarray, float]:
    """Simulate studies of equal conditions with one run each: the share that each condition wins, and their spread.

    The SD and the spread, the mean of best minus worst, are in points. Conditions that tie to 0.01 points share a win.
    """
    accuracies = np.random.default_rng(1).normal(99.5, sd, size=(studies, conditions)).round(2)
    best = accuracies == accuracies.max(1, keepdims=True)
    return (best / best.sum(1, keepdims=True)).mean(0), float(np.ptp(accuracies, axis=1).mean())


def right_predictions(study: Study, condition: str, labels: np.ndarray) -> pd.DataFrame:
    """Return whether each run of a condition is right on each test image: bool, one row per seed, one column per image.

    The index holds the seeds, so that two conditions pair by seed.
    """
    seeds = [seed for slug, seed in study.runs if slug == condition]
    right = [study.predictions(condition, seed) == labels for seed in seeds]
    return pd.DataFrame(right, index=pd.Index(seeds, name="seed"))


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
        raise ValueError(
            f"two conditions pair by seed, and one of them lacks: {', '.join(map(str, seeds))}; leave these seeds out"
        )
    seeds, images = points.shape
    by_seed, by_image = points.mean(1), points.mean(0)
    residual = points - by_seed[:, np.newaxis] - by_image + points.mean()
    noise = (residual**2).sum() / ((seeds - 1) * (images - 1)) / (seeds * images)
    apart = {"seeds": by_seed.var(ddof=1) / seeds, "images": by_image.var(ddof=1) / images}
    both = max(*apart.values(), sum(apart.values()) - noise)
    return {source: float(variance**0.5) for source, variance in {**apart, "both": both}.items()}


def mcnemar_p(first: np.ndarray, second: np.ndarray) -> tuple[int, int, float]:
    """The exact McNemar test of two models: images that only the first gets right, only the second, and p.

    It compares these two trained models on new images, not the two methods: another seed would be another model
    (Dietterich 1998, section 3).

    Args:
        first, second: bool (images,), whether each model is right on each image.
    """
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    test = mcnemar([[0, only_first], [only_second, 0]], exact=True)
    return only_first, only_second, float(test.pvalue)


def false_alarm_rate(runs: Sequence[float], seeds: int, comparisons: int = 1_000) -> float:
    """Estimate how often the sign-flip test at the 5% level finds a difference where there is none (an A/A test).

    Args:
        runs: outcomes of one condition, real or simulated; both sides are drawn from them, with replacement.
        seeds: pairs per comparison.
    """
    draws = np.random.default_rng(1).choice(runs, size=(2, comparisons, seeds))
    return float(np.mean([sign_flip_p(differences) <= 0.05 for differences in draws[0] - draws[1]]))


def passing(history: pd.DataFrame, level: float, last: int) -> pd.Series:
    """Return whether each of a run's `last` epochs reaches this accuracy (0 to 1), by condition and seed.

    Args:
        history: one row per epoch, from `Study.history`.
    """
    runs = history.sort_values("epoch", kind="stable").groupby(["condition", "seed"], sort=False)
    level -= 1e-9  # 99.4 / 100 is a little above 0.994
    return runs["test_accuracy"].apply(lambda accuracies: bool((accuracies.tail(last) >= level).all()))


def stability(history: pd.DataFrame) -> pd.DataFrame:
    """Compute the SD of each run's change of accuracy from epoch to epoch, at the first learning rate and after it.

    The SD is in points. The table has one row per part ("first rate", "after") and seed, and one column per condition.
    A part with fewer than two changes is nan or missing. The change across the first drop of the learning rate belongs
    to neither part.

    Args:
        history: one row per epoch, from `Study.history`: condition, seed, epoch, lr, test_accuracy (0 to 1).
    """
    epochs = history.sort_values(["condition", "seed", "epoch"], kind="stable")
    run = [epochs["condition"], epochs["seed"]]
    first = (epochs["lr"] == epochs["lr"].groupby(run).transform("first")).groupby(run).cummin()
    before = first.groupby(run).shift(fill_value=True)  # whether the previous epoch was at the first rate
    epochs = epochs.assign(
        change=100 * epochs["test_accuracy"].groupby(run).diff(),
        part=np.select([first, ~before], ["first rate", "after"], ""),
    )
    changes = epochs[epochs["part"] != ""].groupby(["part", "seed", "condition"])["change"].std()
    return changes.unstack().reindex(columns=history["condition"].unique())


def verdict_on_best(comparisons: pd.DataFrame, best: str, others: Sequence[str]) -> str:
    """Judge the claim that a condition is better than each of the others by Holm's p-values of paired comparisons.

    The verdict is "supported" if every comparison supports it, "contradicted" if one contradicts it.
    """
    swapped = {"first": "second", "second": "first"}
    both = pd.concat([comparisons, comparisons.rename(columns=swapped).assign(difference=-comparisons["difference"])])
    rows = both[(both["first"] == best) & both["second"].isin(others)]
    verdicts = {verdict(row.difference, row.p_holm) for row in rows.itertuples()}
    return next(answer for answer in (CONTRADICTED, UNDECIDED, SUPPORTED) if answer in verdicts)


def shares_by_network() -> pd.DataFrame:
    """Tabulate the answers to question 9 of docs/preregistration_worth.md.

    Returns:
        one row per network, kind of labels, number of images and regulariser: network, labels, size, name; `share` of
        the errors removed, in percent, with its 95% interval over seeds as `_low` and `_high`; and `p` after Holm's
        correction over the four regularisers.
    """
    networks = {"plain": "PlainNet, 9,646 parameters", "mlp": "MLP, 101,770 parameters"}
    cells = product(
        networks, ("right labels", "20% wrong labels"), worth_analysis.NETWORK_SIZES, worth_analysis.ON_BOTH
    )
    rows = []
    for (network, labels, size, name), row in zip(cells, worth_analysis.networks(WORTH), strict=True):
        low, share, high = (worth_analysis.share(row[end]) for end in ("low", "mean", "high"))
        rows.append((networks[network], labels, size, name, share, low, high, row["p_holm"]))
    return pd.DataFrame(rows, columns=["network", "labels", "size", "name", "share", "share_low", "share_high", "p"])


def worth_by_size() -> pd.DataFrame:
    """Tabulate the answers to questions 1, 2 and 6 of docs/preregistration_worth.md, for each regulariser and size.

    Returns:
        rows by name and size: `error`, in percent, `share` of the errors removed, in percent, and `worth`, how many
        times the images (missing on 60,000, since there are no more), each with its 95% interval over seeds as `_low`
        and `_high`; and `p` of the share, after Holm's correction. "nothing" has errors alone.
    """
    rows: dict[tuple[str, int], dict[str, float]] = {}

    def add(name: str, size: int, column: str, mean: float, low: float, high: float) -> None:
        rows.setdefault((name, size), {}).update({column: mean, f"{column}_low": low, f"{column}_high": high})

    ends, last = ("mean", "low", "high"), worth_analysis.ALL
    pairs = [(name, size) for size in (*worth_analysis.REGULARISED, last) for name in worth_analysis.REGULARISERS]
    for name, size in [*(("nothing", size) for size in (*worth_analysis.SIZES, last)), *pairs]:
        logs = np.log(worth_analysis.errors(WORTH, "plain", f"{size}-{name}"))
        add(name, size, "error", *np.exp([logs.mean(), *mean_interval(logs)]))
    *on_all, _gap = worth_analysis.all_images(WORTH)
    for pair, row in zip(pairs, [*worth_analysis.removes(WORTH), *on_all], strict=True):
        add(*pair, "share", *(worth_analysis.share(row[end]) for end in ends))
        rows[pair]["p"] = row["p_holm"]
    for pair, row in zip(pairs, worth_analysis.data(WORTH), strict=False):  # not on 60,000
        add(*pair, "worth", *(row[end] for end in ends))
    return pd.DataFrame(rows).T.rename_axis(["name", "size"]).sort_index()
