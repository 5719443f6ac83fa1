from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from s6lib.analysis import (
    accuracies_on,
    condition_table,
    confused_pairs,
    confusion_matrix,
    convolution_weights,
    errors_by_digit,
    ghost_scatter,
    misclassified,
    passing,
    pruned,
    pruning_curve,
    result_table,
    right_predictions,
    stability,
)
from s6lib.data import CLASS_NAMES, Digits, normalise
from s6lib.recipes import CONDITIONS, PLAIN, Condition, build_model
from s6lib.study import Study
from s6lib.train import predict_logits


def test_misclassified_are_the_saved_predictions_errors(tiny_study, mnist):
    wrong = misclassified(tiny_study.model("gbn"), mnist[1])
    saved = torch.from_numpy(tiny_study.predictions("gbn")).long()
    expected = (saved != mnist[1].labels).nonzero().flatten()
    assert wrong["image"].tolist() == expected.tolist()
    assert wrong["actual"].tolist() == [CLASS_NAMES[digit] for digit in mnist[1].labels[expected]]
    assert wrong["predicted"].tolist() == [CLASS_NAMES[digit] for digit in saved[expected]]


def test_confidence_is_the_softmax_of_the_prediction(tiny_study, mnist):
    model = tiny_study.model("gbn")
    row = misclassified(model, mnist[1]).iloc[3]
    logits = predict_logits(model, mnist[1].part([row["image"]]))[0].double()
    probability = logits.exp() / logits.exp().sum()
    assert row["confidence"] == pytest.approx(probability.max().item(), rel=1e-4)
    assert row["predicted"] == CLASS_NAMES[probability.argmax()]


def test_result_table_is_in_percent(tiny_study):
    table = result_table(tiny_study)
    assert table["condition"].tolist() == ["L1 + BN", "L1 + BN", "GBN", "GBN"]
    assert table["last epoch, %"].tolist() == pytest.approx((100 * tiny_study.summary()["accuracy"]).tolist())
    assert (table["best epoch, %"] >= table["last epoch, %"]).all()


def test_condition_table_has_the_six_settings():
    table = condition_table(PLAIN, CONDITIONS).set_index("condition")
    assert table.loc["L1 + L2 + GBN"].tolist() == [2e-4, 1e-4, "GhostBatchNorm", 4, 0.04, 64, 0.01]
    assert table["splits"].tolist() == [1, 1, 1, 4, 4]


def test_condition_table_shows_what_conditions_of_ones_own_change():
    def two_groups(channels):
        return nn.GroupNorm(2, channels)

    conditions = (
        CONDITIONS[0],
        Condition("groups", norm=two_groups),
        Condition("bound", norm=partial(nn.GroupNorm, 2)),
        Condition("large", penalty=nn.Flatten(), changes={"batch_size": 256, "learning_rate": 0.04, "epochs": 3}),
    )
    table = condition_table(PLAIN, conditions).set_index("condition")
    assert table["normalisation"].tolist() == ["BatchNorm", "two_groups", "GroupNorm", "BatchNorm"]
    assert table["batch size"].tolist() == [64, 64, 64, 256]
    assert table["learning rate"].tolist() == [0.01, 0.01, 0.01, 0.04]
    assert table["epochs"].tolist() == [25, 25, 25, 3]
    assert table["penalty"].tolist() == ["-", "-", "-", "Flatten"]


def test_confusions_of_known_predictions():
    labels = np.array([4, 4, 9, 9, 1, 7, 0])
    predictions = np.array([9, 4, 4, 9, 7, 7, 0])
    matrix = confusion_matrix(predictions, labels)
    assert matrix.sum() == 7
    assert (matrix[4, 9], matrix[9, 4], matrix[1, 7], matrix[7, 1]) == (1, 1, 1, 0)
    pairs = confused_pairs(matrix)
    assert len(pairs) == 45
    assert pairs.iloc[:2].to_numpy().tolist() == [["four / nine", 2, 2 / 3], ["one / seven", 1, 1 / 3]]
    assert pairs["errors"].sum() == 3


def test_confusions_of_a_model_are_its_errors(tiny_study, mnist):
    labels, predictions = mnist[1].labels.numpy(), tiny_study.predictions("gbn")
    matrix = confusion_matrix(predictions, labels)
    assert matrix.sum(1).tolist() == np.bincount(labels).tolist()
    assert matrix.sum(0).tolist() == np.bincount(predictions, minlength=10).tolist()
    assert confused_pairs(matrix)["errors"].sum() == (predictions != labels).sum()


def test_errors_by_digit_count_the_runs_that_are_wrong(tiny_study, mnist):
    labels = mnist[1].labels.numpy()
    wrong = np.array([tiny_study.predictions(*run) != labels for run in tiny_study.runs])
    table = errors_by_digit(tiny_study, labels)
    assert table["runs"].tolist() == sorted(wrong.sum(0)[wrong.any(0)], reverse=True)
    assert table["runs"].tolist() == wrong.sum(0)[table["image"]].tolist()
    assert table["actual"].tolist() == [CLASS_NAMES[label] for label in labels[table["image"]]]
    first = table.iloc[0]
    taken = [CLASS_NAMES[tiny_study.predictions(*run)[first["image"]]] for run in tiny_study.runs]
    others = [taken.count(name) for name in CLASS_NAMES if name != first["actual"]]
    assert taken.count(first["taken_for"]) == max(others) > 0


def test_pruning_zeroes_the_smallest_convolution_weights_of_a_copy(tiny_study):
    model = tiny_study.model("gbn")
    before = convolution_weights(model)
    after = convolution_weights(pruned(model, 0.6))
    assert len(before) == 9_466
    gone = after == 0
    assert gone.sum() == round(0.6 * 9_466)
    assert np.abs(before[gone]).max() <= np.abs(before[~gone]).min()
    assert (after[~gone] == before[~gone]).all()
    assert (convolution_weights(model) == before).all()
    assert (convolution_weights(pruned(model, 1)) == 0).all()
    with pytest.raises(ValueError, match="a share is from 0 to 1, not 60"):
        pruned(model, 60)


def test_a_pruning_curve_starts_at_the_accuracy_of_the_run(tiny_study, mnist):
    few = Digits(mnist[1].images[:500], mnist[1].labels[:500])
    curve = pruning_curve(tiny_study, few, (0, 1)).set_index(["condition", "seed", "share"])["accuracy"]
    for condition, seed in tiny_study.runs:
        right = tiny_study.predictions(condition, seed)[:500] == few.labels.numpy()
        assert curve[condition, seed, 0] == right.mean()
        assert curve[condition, seed, 1] < 0.2  # one class for all


def test_right_predictions_are_those_of_the_condition_by_seed(tiny_study, mnist):
    labels = mnist[1].labels.numpy()
    right = right_predictions(tiny_study, "gbn", labels)
    assert right.shape == (2, 10_000)
    assert right.index.tolist() == [1, 2]
    assert right.to_numpy().dtype == bool
    assert (100 * right.mean(axis=1)).tolist() == pytest.approx(tiny_study.outcomes()["gbn"].tolist())
    with pytest.raises(ValueError, match="no run of condition 'gnb'; choose one of: l1-bn, gbn"):
        right_predictions(tiny_study, "gnb", labels)


def history_of(accuracies, rates, condition="bn", seed=1):
    run = {"condition": condition, "seed": seed, "epoch": range(1, 1 + len(rates)), "lr": rates}
    return pd.DataFrame({**run, "val_accuracy": accuracies})


def test_stability_is_the_deviation_of_changes():
    first = [0.90, 0.92, 0.91, 0.93, 0.92, 0.94]
    after = [0.98, 0.981, 0.98, 0.981, 0.985]
    run = history_of(first + after, [0.1] * 6 + [0.01] * 3 + [0.001] * 2)
    table = stability(run)["bn"]
    assert table["first rate", 1] == pytest.approx(np.std(100 * np.diff(first), ddof=1))
    assert table["after", 1] == pytest.approx(np.std(100 * np.diff(after), ddof=1))
    assert stability(run[::-1])["bn"].tolist() == pytest.approx(table.tolist())


def test_stability_takes_the_steps_of_each_run_from_its_rates():
    accuracies = [0.90, 0.92, 0.91, 0.93, 0.96, 0.97, 0.95]
    early, late = [0.1] * 2 + [0.01] * 5, [0.1] * 5 + [0.01] * 2
    back = [0.01, 0.01, 0.01, 0.1, 0.01, 0.01, 0.01]  # the first rate again is no first rate
    table = stability(
        pd.concat(history_of(accuracies, rates, slug) for slug, rates in zip("zab", (early, late, back), strict=True))
    )
    assert list(table) == ["z", "a", "b"]  # in the order of the history
    points = 100 * np.diff(accuracies)
    assert table.loc[("after", 1), "z"] == pytest.approx(points[2:].std(ddof=1))
    assert np.isnan(table.loc[("first rate", 1), "z"])  # one change has no deviation
    assert table.loc[("first rate", 1), "a"] == pytest.approx(points[:4].std(ddof=1))
    assert table.loc[("first rate", 1), "b"] == pytest.approx(points[:2].std(ddof=1))
    assert table.loc[("after", 1), "b"] == pytest.approx(points[3:].std(ddof=1))


def test_stability_at_one_learning_rate_has_one_part():
    table = stability(history_of([0.9, 0.92, 0.91], [0.1] * 3))
    assert table.index.get_level_values("part").tolist() == ["first rate"]


def test_a_run_passes_if_all_of_its_last_epochs_do():
    rows = [
        ("a", 1, [0.90, 0.994, 0.994, 0.995]),
        ("a", 2, [0.99, 0.994, 0.9939, 0.995]),
        ("b", 1, [0.994, 0.9, 0.994, 0.994]),
    ]
    history = pd.DataFrame(
        [(c, seed, epoch, accuracy) for c, seed, values in rows for epoch, accuracy in enumerate(values, 1)],
        columns=["condition", "seed", "epoch", "val_accuracy"],
    ).sample(frac=1, random_state=1)
    assert passing(history, 0.994, last=3).to_dict() == {("a", 1): True, ("a", 2): False, ("b", 1): False}
    for level in (0.994, 99.4 / 100):  # which is a little more
        assert passing(history, level, last=2).to_dict() == {("a", 1): True, ("a", 2): False, ("b", 1): True}


def test_ghosts_scatter_as_their_means_do(mnist):
    model = build_model(PLAIN, CONDITIONS[3])
    images = normalise(mnist[0].images[:64])
    table = ghost_scatter(model, images, (1, 4, 16))
    assert table.shape == (7, 3)
    assert table[1].abs().max() < 1e-5
    assert (table[4] < table[16]).all()
    before = model.layers[:2](images)  # what the first normalisation is given
    ghosts = torch.stack([ghost.mean((0, 2, 3)) for ghost in before.tensor_split(4)])
    expected = ((ghosts - before.mean((0, 2, 3))) / before.std((0, 2, 3))).square().mean(0).sqrt().mean()
    assert table[4][1] == pytest.approx(expected.item(), rel=1e-4)
    assert not any(layer._forward_pre_hooks for layer in model.modules())


@pytest.mark.parametrize(
    "wrap", [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal]
)
def test_a_computed_weight_is_pruned_for_good(wrap):
    model = nn.Sequential(wrap(nn.Conv2d(1, 8, 5, 3)), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)).eval()
    copy = pruned(model, 0.7)
    copy(torch.zeros(1, 1, 28, 28))
    assert (convolution_weights(copy) == 0).mean() == pytest.approx(0.7)
    assert (convolution_weights(model) == 0).mean() == 0
    model(torch.zeros(1, 1, 28, 28))  # the original is as it was


def test_a_weight_that_a_hook_computes_is_not_pruned_in_silence():
    with pytest.warns(FutureWarning, match="weight_norm"):
        layer = nn.utils.weight_norm(nn.Conv2d(1, 8, 5))
    with pytest.raises(ValueError, match="0 computes its weight in a hook, so it cannot be pruned"):
        pruned(nn.Sequential(layer), 0.5)


def test_a_network_without_convolutions_has_none_to_prune():
    with pytest.raises(ValueError, match="Linear has no 2d convolution"):
        pruned(nn.Linear(3, 4), 0.5)


def test_the_names_of_classes_are_the_data_sets(mnist):
    digits = mnist[1]._replace(class_names=tuple("abcdefghij"))
    wrong = misclassified(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), digits.part(slice(50)))
    assert set(wrong["actual"]) | set(wrong["predicted"]) <= set("abcdefghij")
    pairs = confused_pairs(confusion_matrix(np.array([0, 2]), np.array([1, 1]), 3), ("x", "y", "z"))
    assert pairs["pair"].tolist() == ["x / y", "y / z", "x / z"]
    with pytest.raises(ValueError, match="class_names must be the 3 names"):
        confused_pairs(np.zeros((3, 3), dtype=int))


def test_accuracies_on_other_digits_are_a_row_a_run(tiny_study, mnist):
    study = Study(tiny_study.folder, seeds=2)
    table = accuracies_on(mnist[1], study)
    assert table["accuracy"].tolist() == pytest.approx(study.summary()["accuracy"].tolist())
