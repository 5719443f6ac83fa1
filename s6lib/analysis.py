"""What saved runs say: result tables and misclassified digits."""

import pandas as pd
from torch import nn

from s6lib.data import CLASS_NAMES, Split
from s6lib.study import Study
from s6lib.train import predict_logits


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
