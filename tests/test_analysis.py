"""Tables and weights of saved runs, and pruning."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from s6lib.analysis import convolution_weights, misclassified, pruned, pruning_curve, result_table
from s6lib.data import ImageDataset
from s6lib.train import predict_logits


def test_confidence_is_the_softmax_of_the_prediction_and_names_are_the_data_sets(mnist):
    few = ImageDataset(mnist[1].images[:50], mnist[1].labels[:50], tuple("abcdefghij"))
    torch.manual_seed(1)
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


def small_network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 8, 5, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(216, 10)).eval()


@pytest.mark.parametrize("share", [0, 0.37, 0.6, 1])
def test_pruning_zeroes_the_smallest_convolution_weights_of_a_copy(share):
    model = small_network()
    before, state = convolution_weights(model), {name: value.clone() for name, value in model.state_dict().items()}
    copy = pruned(model, share)
    after = convolution_weights(copy)
    gone = after == 0
    assert gone.sum() == round(share * 632)
    assert (after[~gone] == before[~gone]).all()
    if 0 < share < 1:
        assert np.abs(before[gone]).max() <= np.abs(before[~gone]).min()
    assert copy.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(copy.state_dict()[name], state[name]) for name in ("0.bias", "4.weight", "4.bias"))


def test_what_cannot_be_pruned_is_refused():
    with pytest.raises(ValueError, match="a share is from 0 to 1, not 60"):
        pruned(small_network(), 60)
    for function in (convolution_weights, lambda model: pruned(model, 0.5)):
        with pytest.raises(ValueError, match="Linear has no 2d convolution"):
            function(nn.Linear(3, 4))
    with pytest.raises(ValueError, match="0 computes its weight, so it cannot be pruned: make it a plain weight"):
        pruned(nn.Sequential(parametrizations.weight_norm(nn.Conv2d(1, 8, 5))), 0.5)


def test_a_pruning_curve_starts_at_the_accuracy_of_the_run(tiny_study, mnist):
    few = mnist[1].part(slice(500))
    curve = pruning_curve(tiny_study, few, (0, 1)).set_index(["condition", "seed", "share"])["accuracy"]
    for condition, seed in tiny_study.runs:
        right = tiny_study.predictions(condition, seed)[:500] == few.labels.numpy()
        assert curve[condition, seed, 0] == pytest.approx(right.mean())
        assert curve[condition, seed, 1] < 0.2  # one class for all
