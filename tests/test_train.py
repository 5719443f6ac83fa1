import pytest
import torch
import torch.nn.functional as F
from torch import nn

from s6lib.data import Digits, normalise
from s6lib.recipes import BOTTLENECK, CONDITIONS, CONTROL, PLAIN, Condition, build_model
from s6lib.train import Learner, NonFiniteLoss, evaluate, l1_l2_penalty, predict_logits, train_epoch


@pytest.fixture
def model():
    torch.manual_seed(1)
    return build_model(BOTTLENECK, CONTROL)  # no dropout: its steps can be repeated by hand


@pytest.fixture
def batches(mnist):
    images, labels = (tensor[:150] for tensor in mnist[0][:2])
    return [(normalise(i), n) for i, n in zip(images.split(64), labels.split(64), strict=True)]


def sgd(model, lr=0.01):
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9)


def learner(model, penalty=lambda model: 0.0):
    return Learner(model, sgd(model), penalty=penalty)


def test_penalties_are_sums_over_all_trainable_parameters(model):
    values = torch.cat([p.detach().flatten() for p in model.parameters()]).double()
    assert l1_l2_penalty(model, 1.0, 0.0).item() == pytest.approx(float(values.abs().sum()), rel=1e-6)
    assert l1_l2_penalty(model, 0.0, 1.0).item() == pytest.approx(float((values**2).sum()), rel=1e-6)
    frozen = next(model.parameters()).requires_grad_(False)
    expected = values.abs().sum() - frozen.double().abs().sum()
    assert l1_l2_penalty(model, 1.0, 0.0).item() == pytest.approx(float(expected), rel=1e-6)


def test_penalty_gradients_are_sign_and_twice_the_weight(model):
    l1_l2_penalty(model, 1.0, 1.0).backward()
    for weights in model.parameters():
        assert torch.allclose(weights.grad, weights.detach().sign() + 2 * weights.detach())


def test_gradients_are_those_of_two_penalties_apart_to_the_last_bit(batches):
    """As the first published runs computed them."""
    models = [build_model(BOTTLENECK, CONTROL) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    images, labels = batches[0]

    def strung(model):
        return torch.cat([weights.flatten() for weights in model.parameters()])

    def apart(model):
        return 2e-4 * strung(model).abs().sum() + 1e-4 * strung(model).square().sum()

    for model, penalty_of in zip(models, (lambda model: l1_l2_penalty(model, 2e-4, 1e-4), apart), strict=True):
        loss = F.cross_entropy(model(images), labels)  # before the penalty: autograd adds up from the last to the first
        (loss + penalty_of(model)).backward()
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_the_penalty_comes_after_the_logits(model, batches):
    called = []
    model.register_forward_hook(lambda *_: called.append("logits"))
    train_epoch(learner(model, lambda model: called.append("penalty") or 0.0), batches[:2])
    assert called == ["logits", "penalty"] * 2


@pytest.mark.parametrize("condition", CONDITIONS, ids=lambda c: c.slug)
def test_epoch_equals_the_steps_done_by_hand(condition, batches):
    torch.manual_seed(1)
    ours, theirs = (build_model(BOTTLENECK, condition) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    training = train_epoch(learner(ours, condition.penalty_of), batches)

    optimizer = sgd(theirs)
    losses, penalties, hits = 0.0, 0.0, 0
    for images, labels in batches:
        optimizer.zero_grad()
        logits = theirs(images)
        loss = F.cross_entropy(logits, labels)
        penalty = sum(condition.l1 * p.abs().sum() + condition.l2 * (p * p).sum() for p in theirs.parameters())
        (loss + penalty).backward()
        optimizer.step()
        losses += loss.item() * len(labels)
        penalties += penalty.item() * len(labels)
        hits += int((logits.argmax(1) == labels).sum())
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert training == pytest.approx((losses / 150, hits / 150, penalties / 150), rel=1e-5)


def test_training_learns(mnist):
    torch.manual_seed(1)
    model = build_model(PLAIN, CONDITIONS[3])
    images, labels = (tensor[:1280] for tensor in mnist[0][:2])
    batches = list(zip(normalise(images).split(64), labels.split(64), strict=True))
    training = learner(model)
    accuracies = [train_epoch(training, batches).accuracy for _ in range(4)]
    assert accuracies[0] < 0.7 < 0.8 < accuracies[-1]
    assert evaluate(model, Digits(images, labels)).accuracy > 0.8


@pytest.mark.parametrize("bad", [1, 2, 3])
def test_a_loss_that_is_not_finite_names_its_step(model, batches, bad):
    images, labels = batches[bad - 1]
    batches[bad - 1] = (torch.full_like(images, float("nan")), labels)
    with pytest.raises(NonFiniteLoss, match=f"not finite at step {bad}$"):
        train_epoch(learner(model), batches)


def test_an_infinite_penalty_is_a_loss_that_is_not_finite(model, batches):
    with pytest.raises(NonFiniteLoss, match="step 1"):
        train_epoch(learner(model, Condition("much", l1=1e38).penalty_of), batches)


def test_evaluation_is_torchs(model, mnist):
    split = mnist[1].part(slice(700))
    model.train()
    evaluation = evaluate(model, split)
    assert not model.training
    with torch.no_grad():
        logits = model(normalise(split.images))
    assert torch.allclose(predict_logits(model, split), logits, atol=1e-5)
    assert evaluation.loss == pytest.approx(float(F.cross_entropy(logits, split.labels)), rel=1e-5)
    assert evaluation.predictions.tolist() == logits.argmax(1).tolist()
    assert evaluation.accuracy == float((logits.argmax(1) == split.labels).double().mean())


def test_evaluation_changes_nothing(model, mnist):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(model, mnist[1].part(slice(300)))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert isinstance(model, nn.Module)


def test_a_saved_model_is_judged_in_the_memory_format_of_training(model, mnist):
    """So its logits are those of training to the last bit, and it is as fast, though its weights lie otherwise."""
    images, seen = mnist[1].part(slice(250)), []
    hook = model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].stride()))
    logits = predict_logits(model, images)
    hook.remove()
    assert seen == [(784, 1, 28, 1)]
    assert torch.equal(logits, predict_logits(model.to(memory_format=torch.channels_last), images))
