"""Tables, errors, weights and learning curves of saved runs."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from s6lib.data import CLASS_NAMES, Digits
from s6lib.errors import SettingError
from s6lib.recipes import Condition, Recipe, name_of
from s6lib.study import Study
from s6lib.train import evaluate, predict_logits


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


def result_table(study: Study) -> pd.DataFrame:
    """The summary of a study, one row per run, with accuracies in percent, ready to print."""
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
    """List the images that a model gets wrong: image number, actual and predicted class names, and confidence.

    The confidence, from 0 to 1, is the softmax probability of the predicted class.
    """
    confidence, predicted = predict_logits(model, digits).softmax(1).max(1)
    wrong = (predicted != digits.labels).nonzero().flatten()
    names = [[digits.class_names[label] for label in labels[wrong].tolist()] for labels in (digits.labels, predicted)]
    columns = {"image": wrong.tolist(), "actual": names[0], "predicted": names[1]}
    return pd.DataFrame({**columns, "confidence": confidence[wrong].tolist()})


def confusion_matrix(predictions: np.ndarray, labels: np.ndarray, classes: int = len(CLASS_NAMES)) -> np.ndarray:
    """Count how often each class (row) was predicted as each class (column): int64 (classes, classes)."""
    return np.bincount(classes * labels + predictions, minlength=classes**2).reshape(classes, classes)


def confused_pairs(matrix: np.ndarray, class_names: Sequence[str] = CLASS_NAMES) -> pd.DataFrame:
    """Rank the pairs of classes by how often a model confuses them, in either direction.

    Columns: pair, errors, and share (of all errors, 0 to 1).
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


def accuracies_on(digits: Digits, study: Study) -> pd.DataFrame:
    """Accuracy (0 to 1) of each saved model on other images of the same kind: condition, seed, accuracy."""
    rows = [(slug, seed, evaluate(study.model(slug, seed), digits).accuracy) for slug, seed in study.runs]
    return pd.DataFrame(rows, columns=["condition", "seed", "accuracy"])


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


@torch.no_grad()
def pruned(model: nn.Module, share: float) -> nn.Module:
    """Copy a model and set a share (0 to 1) of its convolution weights to zero, the smallest across all layers.

    The copy is not trained further. Its parametrized weights, such as those of weight_norm, become plain weights. Han
    et al. 2015, arXiv:1506.02626, prune by one threshold per layer. Raises SettingError if a hook computes a weight.
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
        if is_parametrized(layer):  # each forward pass would recompute the weight
            _make_plain(layer)
        layer.weight.mul_(kept.view(layer.weight.shape).to(layer.weight.device))
    return copy


def _make_plain(layer: nn.Module) -> None:
    """Make parametrized tensors plain parameters; torch's remove_parametrizations changes the class of the original."""
    names = [name for name, _ in layer.get_submodule("parametrizations").named_children()]
    values = {name: getattr(layer, name).detach().clone() for name in names}
    layer.__class__ = type(layer).__bases__[0]
    del layer.parametrizations
    for name, value in values.items():
        layer.register_parameter(name, nn.Parameter(value))


def _refuse_hooked_weights(model: nn.Module) -> None:
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d) and "weight" not in layer._parameters and not is_parametrized(layer, "weight"):
            raise SettingError(
                f"{name} computes its weight in a hook, so it cannot be pruned: use "
                "torch.nn.utils.parametrizations, or first make it a plain weight, for example with remove_weight_norm"
            )


def pruning_curve(study: Study, digits: Digits, shares: Sequence[float]) -> pd.DataFrame:
    """Evaluate every run on `digits` after `pruned`: condition, seed, share, accuracy (0 to 1), one row per share."""
    rows = []
    for condition, seed in study.runs:
        model = study.model(condition, seed)
        for share in shares:
            accuracy = evaluate(pruned(model, share), digits).accuracy
            rows.append({"condition": condition, "seed": seed, "share": share, "accuracy": accuracy})
    return pd.DataFrame(rows)


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


def stability(history: pd.DataFrame) -> pd.DataFrame:
    """Compute the SD of each run's change of accuracy from epoch to epoch, at the first learning rate and after it.

    The SD is in points. The table has one row per part ("first rate", "after") and seed, and one column per condition.
    A part with fewer than two changes is nan or missing. The change across the first drop of the learning rate belongs
    to neither part.

    Args:
        history: one row per epoch, from `Study.history`: condition, seed, epoch, lr, val_accuracy (0 to 1).
    """
    epochs = history.sort_values(["condition", "seed", "epoch"], kind="stable")
    run = [epochs["condition"], epochs["seed"]]
    first = (epochs["lr"] == epochs["lr"].groupby(run).transform("first")).groupby(run).cummin()
    before = first.groupby(run).shift(fill_value=True)  # whether the previous epoch was at the first rate
    epochs = epochs.assign(
        change=100 * epochs["val_accuracy"].groupby(run).diff(),
        part=np.select([first, ~before], ["first rate", "after"], ""),
    )
    changes = epochs[epochs["part"] != ""].groupby(["part", "seed", "condition"])["change"].std()
    return changes.unstack().reindex(columns=history["condition"].unique())


def passing(history: pd.DataFrame, level: float, last: int) -> pd.Series:
    """Return whether each of a run's `last` epochs reaches this accuracy (0 to 1), by condition and seed.

    Args:
        history: one row per epoch, from `Study.history`.
    """
    runs = history.sort_values("epoch", kind="stable").groupby(["condition", "seed"], sort=False)
    level -= 1e-9  # 99.4 / 100 is a little above 0.994
    return runs["val_accuracy"].apply(lambda accuracies: bool((accuracies.tail(last) >= level).all()))
