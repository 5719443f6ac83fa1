"""What saved runs say: result tables, misclassified digits, confusions, and how sure an accuracy is."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
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
    percent = {
        "last epoch, %": summary["accuracy"],
        "best epoch, %": summary["best_accuracy"],
        "training, %": summary["train_accuracy"],
    }
    table = pd.DataFrame({name: (100 * values).round(2) for name, values in percent.items()})
    table.insert(0, "condition", summary["label"])
    table.insert(1, "seed", summary["seed"])
    table.insert(4, "best at", summary["best_epoch"])
    return table.assign(minutes=(summary["seconds"] / 60).round(1))


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
    counts = np.zeros((10, 10), dtype=np.int64)
    np.add.at(counts, (labels, predictions), 1)
    return counts


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
