"""Tables, errors, weights and learning curves of saved runs."""

import numpy as np
import pandas as pd
import torch
from torch import nn

from s6lib.data import ImageDataset
from s6lib.errors import SettingError
from s6lib.study import Study
from s6lib.train import predict_logits


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
