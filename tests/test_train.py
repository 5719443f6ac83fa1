from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from s6lib.data import ImageDataset, normalise
from s6lib.recipes import BOTTLENECK, CONDITIONS, CONTROL, build_model
from s6lib.train import evaluate, l1_l2_penalty, predict, predict_logits, train_epoch


@pytest.fixture
def model():
    return build_model(BOTTLENECK, CONTROL)  # no dropout: its steps can be repeated by hand


@pytest.fixture
def some(mnist):
    return mnist[0].part(slice(150))


def cut(dataset):
    """Batches of 64, 64 and 22 images, in their order."""
    return list(zip(normalise(dataset.images).split(64), dataset.labels.split(64), strict=True))


def soften(dataset):
    """The same batches, with probabilities in the place of labels."""
    return [(images, 0.9 * F.one_hot(labels, 10) + 0.01) for images, labels in cut(dataset)]


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)


strengths = st.sampled_from([0.0, 1e-4, 0.3, 2.0])


@given(strengths, strengths)
def test_penalties_are_sums_over_all_trainable_parameters(l1, l2):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(3, 2))
    model[2].bias.requires_grad_(False)
    penalty = l1_l2_penalty(model, l1, l2)
    weights = torch.cat([one.detach().flatten() for one in model.parameters() if one.requires_grad]).double()
    expected = float(l1 * weights.abs().sum() + l2 * weights.square().sum())
    assert float(torch.as_tensor(penalty).detach()) == pytest.approx(expected, rel=1e-5)


def train_by_hand(model, parts, optimizer, loss, l1, l2):
    """The loop of every tutorial, with both penalties apart, as the first published runs computed them."""

    def weights():
        return torch.cat([one.flatten() for one in model.parameters()])

    entropy, hits, penalties, count = 0.0, 0, 0.0, 0
    for images, targets in parts:
        logits = model(images)
        data_loss, penalty = loss(logits, targets), l1 * weights().abs().sum() + l2 * weights().square().sum()
        optimizer.zero_grad()
        (data_loss + penalty).backward()
        optimizer.step()
        count += len(images)
        labels = targets.argmax(1) if targets.is_floating_point() else targets
        entropy += F.cross_entropy(logits, targets).item() * len(images)
        hits += int((logits.argmax(1) == labels).sum())
        penalties += penalty.item() * len(images)
    return entropy / count, hits / count, penalties / count


EPOCHS = {condition.slug: (condition, F.cross_entropy, cut) for condition in CONDITIONS} | {
    "another loss": (CONTROL, nn.CrossEntropyLoss(label_smoothing=0.3), cut),
    "probabilities": (CONTROL, F.cross_entropy, soften),
}


@pytest.mark.parametrize("name", EPOCHS)
def test_an_epoch_is_the_loop_by_hand_to_the_last_bit(name, some):
    """And records the cross-entropy, whatever is trained."""
    condition, loss, parts_of = EPOCHS[name]
    ours, theirs = (build_model(BOTTLENECK, condition) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    ours.eval()  # an epoch trains in training mode, whatever came before
    trained = train_epoch(ours, iter(parts_of(some)), sgd(ours), loss, condition.penalty_of)
    expected = train_by_hand(theirs, parts_of(some), sgd(theirs), loss, condition.l1, condition.l2)
    assert trained == pytest.approx(expected, rel=1e-5)
    for weights, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[weights]), weights


def test_no_batches_or_a_loss_or_a_penalty_that_is_not_finite_are_one_sentence(model, some):
    with pytest.raises(ValueError, match="there must be at least one batch to train on"):
        train_epoch(model, iter(()), sgd(model))
    images, labels = cut(some)[0]
    for batch, l1 in (((images * float("nan"), labels), 0.0), ((images, labels), 1e38)):
        fresh, penalty = deepcopy(model), partial(l1_l2_penalty, l1=l1)
        with pytest.raises(FloatingPointError, match="the loss is infinite or not a number; lower the learning rate"):
            train_epoch(fresh, [batch], sgd(fresh), penalty=penalty)


@pytest.mark.parametrize(
    "of", [lambda images: images, list, lambda images: Subset(images, range(300)), lambda images: DataLoader(images, 7),
           lambda images: TensorDataset(normalise(images.images), images.labels)],
)  # fmt: skip
def test_evaluation_is_torchs_on_any_data_set(model, mnist, of):
    some = mnist[1].part(slice(300))
    before = {name: value.clone() for name, value in model.train().state_dict().items()}
    loss, accuracy = evaluate(model, of(some))
    assert not model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    logits = model(normalise(some.images)).detach()
    assert torch.allclose(predict_logits(model, of(some)), logits, atol=1e-5)
    with model.register_forward_hook(lambda *seen: seen[2].bfloat16()):  # as autocast in a network
        assert predict_logits(model, of(some)).dtype == torch.float32
    assert loss == pytest.approx(float(F.cross_entropy(logits, some.labels)), rel=1e-5)
    classes = predict(model, of(some))
    assert (classes.dtype, classes.shape) == (torch.int64, (300,))
    assert torch.equal(classes, predict_logits(model, of(some)).argmax(1))
    assert accuracy == float((classes == some.labels).double().mean())


def test_what_evaluation_caches_can_be_trained_with(some):
    """Positions, for example, that a network computes for the largest batch so far."""

    class Cached(nn.Linear):
        cache = torch.ones(0)

        def forward(self, images):
            if len(self.cache) < len(images):
                self.cache = torch.ones(len(images), 1)
            return super().forward(images.flatten(1)) * self.cache[: len(images)]

    model = Cached(784, 10)
    evaluate(model, some)
    train_epoch(model, cut(some), sgd(model))


def test_a_saved_model_is_judged_in_the_memory_format_of_training(model, mnist):
    """So its logits are those of training to the last bit, and it is as fast, though its weights lie otherwise."""
    images, seen = mnist[1].part(slice(250)), []
    hook = model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].stride()))
    logits = predict_logits(model, images)
    hook.remove()
    assert seen == [(784, 1, 28, 1)]
    assert torch.equal(logits, predict_logits(model.to(memory_format=torch.channels_last), images))


def test_the_data_set_brings_its_own_mean_and_sd(model, some):
    other = ImageDataset(some.images, some.labels, mean=0.5, std=0.5)
    assert torch.allclose(predict_logits(model, other), model(normalise(some.images, 0.5, 0.5)), atol=1e-5)
