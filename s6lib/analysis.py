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
