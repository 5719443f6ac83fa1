"""Tables and weights of saved runs."""

import pytest
from torch import nn

from s6lib.analysis import misclassified, result_table
from s6lib.data import ImageDataset
from s6lib.train import predict_logits


def test_confidence_is_the_softmax_of_the_prediction_and_names_are_the_data_sets(mnist):
    few = ImageDataset(mnist[1].images[:50], mnist[1].labels[:50], tuple("abcdefghij"))
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    wrong = misclassified(model, few)
    chances = predict_logits(model, few).double().softmax(1)
    assert wrong["image"].tolist() == (chances.argmax(1) != few.labels).nonzero().flatten().tolist()
    assert wrong["actual"].tolist() == ["abcdefghij"[few.labels[image]] for image in wrong["image"]]
    for row in wrong.itertuples():
        assert row.confidence == pytest.approx(chances[row.image].max().item(), rel=1e-4)
        assert row.predicted == "abcdefghij"[chances[row.image].argmax()]


def test_result_table_is_in_percent(tiny_study):
    table = result_table(tiny_study)
    assert table["condition"].tolist() == ["L1 + BN", "L1 + BN", "GBN", "GBN"]
    assert table["last epoch, %"].tolist() == pytest.approx((100 * tiny_study.summary()["test_accuracy"]).tolist())
    assert (table["best epoch, %"] >= table["last epoch, %"]).all()
