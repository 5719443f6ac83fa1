import pytest
import torch

from s6lib.analysis import misclassified, result_table
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
