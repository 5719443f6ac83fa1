import numpy as np
import pytest
import torch

from s6lib.analysis import (
    condition_table,
    confused_pairs,
    confusion_matrix,
    misclassified,
    result_table,
    wrong_in_every_run,
)
from s6lib.conditions import CONDITIONS, PLAIN
from s6lib.data import CLASS_NAMES
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
    logits = predict_logits(model, mnist[1].images[row["image"]][None])[0].double()
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


def test_wrong_in_every_run(tiny_study, mnist):
    labels = mnist[1].labels.numpy()
    wrong = wrong_in_every_run(tiny_study, labels)
    assert 0 < len(wrong) < 10_000
    for condition, seed in tiny_study.runs:
        assert (tiny_study.predictions(condition, seed)[wrong] != labels[wrong]).all()
