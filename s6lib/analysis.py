"""Tables, errors, weights and learning curves of saved runs."""

from collections.abc import Sequence
from copy import deepcopy

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn.utils import prune

from s6lib.data import ImageDataset
from s6lib.errors import SettingError
from s6lib.study import Study
from s6lib.train import evaluate, predict_logits


def result_table(study: Study) -> pd.DataFrame:
    """The summary of a study, one row per run, with accuracies in percent, ready to print."""
    summary = study.summary()
    columns = {
        "condition": summary["label"],
        "seed": summary["seed"],
        "last epoch, %": (100 * summary["test_accuracy"]).round(2),
        "best epoch, %": (100 * summary["best_accuracy"]).round(2),
        "best at": summary["best_epoch"],
        "training, %": (100 * summary["train_accuracy"]).round(2),
    }
    return pd.DataFrame(columns)


def misclassified(model: nn.Module, images: ImageDataset) -> pd.DataFrame:
    """List the images that a model gets wrong: image number, actual and predicted class names, and confidence.

    The confidence, from 0 to 1, is the softmax probability of the predicted class.
    """
    confidence, predicted = predict_logits(model, images).softmax(1).max(1)
    wrong = (predicted != images.labels).nonzero().flatten()
    names = [[images.class_names[label] for label in labels[wrong].tolist()] for labels in (images.labels, predicted)]
    columns = {"image": wrong.tolist(), "actual": names[0], "predicted": names[1]}
    return pd.DataFrame({**columns, "confidence": confidence[wrong].tolist()})


def right_predictions(study: Study, condition: str, labels: np.ndarray) -> pd.DataFrame:
    """Return whether each run of a condition is right on each test image: bool, one row per seed, one column per image.

    The index holds the seeds, so that two conditions pair by seed. Raises ValueError if the study has no run of the
    condition.
    """
    seeds = [seed for slug, seed in study.runs if slug == condition]
    if not seeds:
        raise SettingError(f"no run of condition {condition!r}; choose one of: {', '.join(study.conditions)}")
    right = [study.predictions(condition, seed) == labels for seed in seeds]
    return pd.DataFrame(right, index=pd.Index(seeds, name="seed"))


def convolution_weights(model: nn.Module) -> np.ndarray:
    """Concatenate the weights of all 2d convolutions of a model: float32 (count,)."""
    kernels = [layer.weight for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    if not kernels:
        raise SettingError(f"{type(model).__name__} has no 2d convolution, so it has no weights to show")
    return torch.cat([weights.detach().flatten().cpu() for weights in kernels]).numpy()


def pruned(model: nn.Module, share: float) -> nn.Module:
    """Copy a model and set a share (0 to 1) of its convolution weights to zero, the smallest across all layers.

    The copy is not trained further. Han et al. 2015, arXiv:1506.02626, prune by one threshold per layer. Raises
    SettingError if a weight is computed, as by weight_norm.
    """
    if not 0 <= share <= 1:
        raise SettingError(f"a share is from 0 to 1, not {share!r}")
    convolution_weights(model)  # raises SettingError where there are none
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d) and "weight" not in layer._parameters:
            raise SettingError(
                f"{name} computes its weight, so it cannot be pruned: make it a plain weight first, with "
                "remove_parametrizations or remove_weight_norm"
            )
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


def passing(history: pd.DataFrame, level: float, last: int) -> pd.Series:
    """Return whether each of a run's `last` epochs reaches this accuracy (0 to 1), by condition and seed.

    Args:
        history: one row per epoch, from `Study.history`.
    """
    runs = history.sort_values("epoch", kind="stable").groupby(["condition", "seed"], sort=False)
    level -= 1e-9  # 99.4 / 100 is a little above 0.994
    return runs["test_accuracy"].apply(lambda accuracies: bool((accuracies.tail(last) >= level).all()))
