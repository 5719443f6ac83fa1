"""What saved runs say: tables of conditions and results, errors, weights, and how steadily runs learn."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

from s6lib.data import CLASS_NAMES, Digits
from s6lib.errors import SettingError
from s6lib.recipes import Condition, Recipe, name_of
from s6lib.study import Study
from s6lib.train import evaluate, predict_logits


def condition_table(recipe: Recipe, conditions: Sequence[Condition]) -> pd.DataFrame:
    """What sets the conditions apart, and what they share, a row each.

    The settings of the recipe are those by which each condition trains, its own changes made; a setting that any of
    them changes has a column, and so has a penalty of one's own. Raises ValueError if a condition does not fit the
    recipe.
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
    """A setting as a table shows it: a class or a function by its name, what there is none of by a dash."""
    if setting is None:
        return "-"
    return name_of(setting) if callable(setting) else setting


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
    }
    return pd.DataFrame(columns)


def misclassified(model: nn.Module, digits: Digits) -> pd.DataFrame:
    """The images that a model gets wrong, in their order: image number, actual and predicted names, and its confidence.

    The confidence, from 0 to 1, is the softmax probability of the predicted class.
    """
    confidence, predicted = predict_logits(model, digits).softmax(1).max(1)
    wrong = (predicted != digits.labels).nonzero().flatten()
    names = [[digits.class_names[label] for label in labels[wrong].tolist()] for labels in (digits.labels, predicted)]
    columns = {"image": wrong.tolist(), "actual": names[0], "predicted": names[1]}
    return pd.DataFrame({**columns, "confidence": confidence[wrong].tolist()})


def confusion_matrix(predictions: np.ndarray, labels: np.ndarray, classes: int = len(CLASS_NAMES)) -> np.ndarray:
    """How often each class (row) was predicted as each class (column): int64 (classes, classes)."""
    return np.bincount(classes * labels + predictions, minlength=classes**2).reshape(classes, classes)


def confused_pairs(matrix: np.ndarray, class_names: Sequence[str] = CLASS_NAMES) -> pd.DataFrame:
    """The pairs of classes by how often one is taken for the other, in either direction, the most frequent first.

    Columns: pair, errors, and share, the part of all errors from 0 to 1.
    """
    both = matrix + matrix.T
    first, second = (side.tolist() for side in np.triu_indices(len(matrix), k=1))
    if len(class_names) != len(matrix):
        raise SettingError(f"class_names must be the {len(matrix)} names of the matrix's classes, not {class_names!r}")
    names = [f"{class_names[a]} / {class_names[b]}" for a, b in zip(first, second, strict=True)]
    pairs = pd.DataFrame({"pair": names, "errors": both[first, second]})
    pairs["share"] = pairs["errors"] / max(1, pairs["errors"].sum())
    return pairs.sort_values("errors", ascending=False, kind="stable", ignore_index=True)


def errors_by_digit(study: Study, labels: np.ndarray) -> pd.DataFrame:
    """The test images that some run of a study gets wrong, those that most runs get wrong first.

    Columns: image, its number; actual, the name of its class; runs, how many get it wrong; and taken_for, the class
    that most of them take it for.
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


def accuracies_on(digits: Digits, study: Study) -> pd.DataFrame:
    """Accuracy (0 to 1) of each saved model on other digits, such as load_qmnist's: condition, seed, accuracy."""
    rows = [(slug, seed, evaluate(study.model(slug, seed), digits).accuracy) for slug, seed in study.runs]
    return pd.DataFrame(rows, columns=["condition", "seed", "accuracy"])


def right_predictions(study: Study, condition: str, labels: np.ndarray) -> pd.DataFrame:
    """Whether each run of a condition is right on each test image: bool, a row a seed, a column an image.

    Two conditions so pair by seed, not by position. Raises ValueError if the study has no run of the condition.
    """
    seeds = [seed for slug, seed in study.runs if slug == condition]
    if not seeds:
        raise SettingError(f"no run of condition {condition!r}; choose one of: {', '.join(study.conditions)}")
    right = [study.predictions(condition, seed) == labels for seed in seeds]
    return pd.DataFrame(right, index=pd.Index(seeds, name="seed"))


def convolution_weights(model: nn.Module) -> np.ndarray:
    """The weights of all 2d convolutions of a model in one row, float32 (count,)."""
    kernels = [layer.weight for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    if not kernels:
        raise SettingError(f"{type(model).__name__} has no 2d convolution whose weights could be looked at")
    return torch.cat([weights.detach().flatten().cpu() for weights in kernels]).numpy()


@torch.no_grad()
def prune(model: nn.Module, share: float) -> nn.Module:
    """A copy of a model with this share (0 to 1) of its convolution weights, the smallest of all layers, set to zero.

    Nothing is trained afterwards. A parametrized weight, as of weight_norm, is a plain one in the copy. Han et al.
    2015, arXiv:1506.02626, prune by one threshold a layer. Raises SettingError if a hook computes a weight.
    """
    if not 0 <= share <= 1:
        raise SettingError(f"a share is from 0 to 1, not {share!r}")
    sizes = np.abs(convolution_weights(model))
    rank = np.empty(len(sizes), dtype=int)
    rank[np.argsort(sizes, kind="stable")] = np.arange(len(sizes))
    keep = torch.from_numpy(rank >= round(share * len(sizes)))
    _refuse_hooked_weights(model)
    copy = deepcopy(model)
    layers = [layer for layer in copy.modules() if isinstance(layer, nn.Conv2d)]
    for layer, kept in zip(layers, keep.split([layer.weight.numel() for layer in layers]), strict=True):
        if is_parametrized(layer, "weight"):  # it would be computed anew at each forward pass
            remove_parametrizations(layer, "weight")
        layer.weight.mul_(kept.view(layer.weight.shape).to(layer.weight.device))
    return copy


def _refuse_hooked_weights(model: nn.Module) -> None:
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d) and "weight" not in layer._parameters and not is_parametrized(layer, "weight"):
            raise SettingError(
                f"{name} computes its weight in a hook, so it cannot be pruned: use "
                "torch.nn.utils.parametrizations, or make it plain first, with remove_weight_norm, say"
            )


def pruning_curve(study: Study, digits: Digits, shares: Sequence[float]) -> pd.DataFrame:
    """The accuracy (0 to 1) on `digits` of every run after `prune`: condition, seed, share, accuracy, a row each."""
    rows = []
    for condition, seed in study.runs:
        model = study.model(condition, seed)
        for share in shares:
            accuracy = evaluate(prune(model, share), digits).accuracy
            rows.append({"condition": condition, "seed": seed, "share": share, "accuracy": accuracy})
    return pd.DataFrame(rows)


@torch.no_grad()
def ghost_scatter(model: nn.Module, images: Tensor, splits: Sequence[int]) -> pd.DataFrame:
    """The noise of ghost statistics: how far the means of ghost batches scatter around those of the batch.

    A row a normalisation layer, numbered from 1, a column a number of splits. In SDs of a channel, averaged over the
    channels of what the layer is given, but for those that are dead, in evaluation mode.

    Args:
        images: a batch for the model, (N, 1, 28, 28).
    """
    rows: list[list[float]] = []

    def look(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        channels = inputs[0].transpose(0, 1).flatten(2)  # (C, N, pixels)
        center, scale = channels.mean((1, 2)), channels.std((1, 2))
        means = [torch.stack([ghost.mean((1, 2)) for ghost in channels.tensor_split(count, 1)]) for count in splits]
        rows.append([float(((each - center) / scale).square().mean(0).sqrt().nanmean()) for each in means])

    layers = [layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    hooks = [layer.register_forward_pre_hook(look) for layer in layers]
    try:
        model.eval()(images)
    finally:
        for hook in hooks:
            hook.remove()
    return pd.DataFrame(rows, index=range(1, len(rows) + 1), columns=list(splits))


def stability(history: pd.DataFrame) -> pd.DataFrame:
    """Per run, the SD of the change of accuracy from epoch to epoch, in points, at the first learning rate and after.

    A row for each part ("first rate", "after") and seed, a column a condition; a part with under two changes is nan or
    left out. The change from the last epoch at the first learning rate to the next belongs to neither part.

    Args:
        history: a row an epoch, as `Study.history` gives it: condition, seed, epoch, lr, val_accuracy (0 to 1).
    """
    epochs = history.sort_values(["condition", "seed", "epoch"], kind="stable")
    run = [epochs["condition"], epochs["seed"]]
    first = (epochs["lr"] == epochs["lr"].groupby(run).transform("first")).groupby(run).cummin()
    before = first.groupby(run).shift(fill_value=True)  # of the epoch from which the change is
    epochs = epochs.assign(
        change=100 * epochs["val_accuracy"].groupby(run).diff(),
        part=np.select([first, ~before], ["first rate", "after"], ""),
    )
    changes = epochs[epochs["part"] != ""].groupby(["part", "seed", "condition"])["change"].std()
    return changes.unstack().reindex(columns=history["condition"].unique())


def passing(history: pd.DataFrame, level: float, last: int) -> pd.Series:
    """Whether all of the `last` epochs of a run have at least this accuracy (0 to 1), by condition and seed.

    Args:
        history: a row an epoch, as `Study.history` gives it.
    """
    runs = history.sort_values("epoch", kind="stable").groupby(["condition", "seed"], sort=False)
    level -= 1e-9  # 99.4 / 100 is a little above 0.994
    return runs["val_accuracy"].apply(lambda accuracies: bool((accuracies.tail(last) >= level).all()))
