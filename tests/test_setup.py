"""What a run starts from: the user's data, optimizer, schedule, and weights averaged as they should be."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import GBN, TINY
from test_data import squares
from torch import nn
from torchvision.transforms import v2

from s6lib.data import load_data
from s6lib.errors import SettingError
from s6lib.lab.device import CPU, reproducible, seed_everything
from s6lib.lab.run import train_run
from s6lib.lab.setup import _on_device, read_data, set_up
from s6lib.recipes import CONTROL, PLAIN, Condition, Recipe, Run


class Small(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(4))
        self.append(nn.Flatten()).append(nn.Linear(64, 3))


SQUARES = Recipe("squares", Small, data=squares, epochs=3, batch_size=16)


def set_up_of(recipe, condition=CONTROL, seed=1):
    with reproducible(CPU):
        return set_up(Run(recipe, condition, seed), read_data(recipe), CPU)


def test_another_data_set_of_another_size_is_learned():
    trained = train_run(Run(replace(SQUARES, epochs=12), CONTROL, 1))
    assert trained.history[-1]["val_accuracy"] > 0.9
    assert trained.predictions.shape == (20,)


def test_all_images_are_the_default_and_more_than_there_are_is_an_error():
    assert set_up_of(SQUARES).settings.train_images == 60
    assert set_up_of(replace(SQUARES, held_out=True)).settings.train_images == 50
    with pytest.raises(SettingError, match="train_images must be at most 60, as many as there are, not 61"):
        set_up_of(replace(SQUARES, train_images=61))


def test_images_are_the_first_or_drawn_anew_for_each_seed(mnist):
    recipe = replace(PLAIN, train_images=300)
    assert torch.equal(set_up_of(recipe).train.labels, mnist[0].labels[:300])
    drawn = [set_up_of(replace(recipe, draw_images=True), seed=seed).train for seed in (1, 2, 1)]
    assert torch.equal(drawn[0].images, drawn[2].images)
    assert not torch.equal(drawn[0].images, drawn[1].images)
    assert all(len(one.images.flatten(1).unique(dim=0)) == 300 for one in drawn)
    other = set_up_of(replace(recipe, draw_images=True), GBN).train
    assert torch.equal(drawn[0].images, other.images)  # conditions of a seed train on the same images


def test_an_epoch_may_pass_through_the_images_several_times():
    setup = set_up_of(replace(TINY, train_images=100, passes=3))
    parts = list(setup.batches(1, torch.Generator().manual_seed(1)))
    assert [len(labels) for _, labels in parts] == [64, 36] * 3
    assert len({tuple(labels.tolist()) for _, labels in parts}) == 6  # in another order each time


def test_the_learning_rate_follows_the_schedule_and_groups_keep_their_ratio():
    def two_groups(parameters, lr):
        return torch.optim.SGD([{"params": parameters[:1], "lr": lr / 10}, {"params": parameters[1:]}], lr=lr)

    recipe = replace(SQUARES, optimizer=two_groups, schedule=lambda done: 1 - done, learning_rate=0.3, epochs=1)
    setup = set_up_of(recipe)
    rates = [
        [group["lr"] for group in setup.learner.optimizer.param_groups]
        for _ in setup.batches(1, torch.Generator().manual_seed(1))
    ]
    assert [rate for _, rate in rates] == pytest.approx([0.3, 0.225, 0.15, 0.075])
    assert [rate for rate, _ in rates] == pytest.approx([0.03, 0.0225, 0.015, 0.0075])


@pytest.mark.parametrize("transform", [v2.CutMix(num_classes=3), v2.RandomErasing(p=1.0), v2.MixUp(num_classes=3)])
def test_transforms_of_torchvision_fit(transform):
    (images, targets), *_ = set_up_of(replace(SQUARES, transform=transform)).batches(
        1, torch.Generator().manual_seed(1)
    )
    assert images.shape == (16, 1, 12, 12)
    assert targets.shape in ((16,), (16, 3))
    history = train_run(Run(replace(SQUARES, transform=transform), CONTROL, 1)).history
    assert 0 < history[-1]["train_accuracy"] <= 1


def test_an_average_keeps_whole_numbers_whole():
    """num_batches_tracked of an average of two and three steps is 3, not 2.5 cut off."""
    setup = set_up_of(replace(TINY, ema=0.5))
    for images, labels in list(setup.batches(1, torch.Generator().manual_seed(1)))[:3]:
        nn.functional.cross_entropy(setup.learner.model(images), labels).backward()
        setup.learner.optimizer.step()
    counts = [value for name, value in setup.final_model.state_dict().items() if name.endswith("num_batches_tracked")]
    assert set(map(int, counts)) == {3}
    assert int(setup.average.n_averaged) == 3


def test_a_network_says_in_which_memory_format_it_is_trained():
    assert set_up_of(TINY).learner.model.layers[4].weight.is_contiguous(memory_format=torch.channels_last)

    class Own(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Conv2d(1, 4, 5, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(144, 10))

    recipe = replace(TINY, network=Own, dropout=None)
    assert set_up_of(recipe).learner.model[1].weight.is_contiguous()
    Own.memory_format = torch.channels_last
    assert set_up_of(recipe).learner.model[1].weight.is_contiguous(memory_format=torch.channels_last)


class Tutorial(nn.Module):
    """As in the course's first session: it views what a convolution gives."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(1, 10, 5), nn.Conv2d(10, 20, 5), nn.Linear(320, 10)

    def forward(self, images):
        for layer in (self.first, self.second):
            images = nn.functional.max_pool2d(layer(images), 2).relu()
        return self.last(images.view(-1, 320)).log_softmax(1)


class Lazy(nn.Sequential):
    def __init__(self):
        super().__init__(nn.LazyConv2d(8, 5, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))


class Volume(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv3d(1, 4, (1, 5, 5), (1, 3, 3)), nn.Linear(256, 10)

    def forward(self, images):
        return self.last(self.first(images.unsqueeze(2)).flatten(1))


class Sparse(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Embedding(16, 4, sparse=True), nn.Linear(3136, 10)

    def forward(self, images):
        return self.last(self.first(((images + 0.5) * 4).long().clamp(0, 15).flatten(1)).flatten(1))


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(0.01 * torch.randn(784, 10, dtype=torch.cfloat))

    def forward(self, images):
        return (images.flatten(1).to(torch.cfloat) @ self.weight).abs()


class SittingOut(nn.Module):
    """A layer that is skipped at random, as in stochastic depth."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(784, 32), nn.Linear(32, 32), nn.Linear(32, 10)

    def forward(self, images):
        features = self.first(images.flatten(1)).relu()
        if not self.training or torch.rand(()) < 0.5:
            features = features + self.middle(features).relu()
        return self.last(features)


class Counting(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(784, 10))
        self.steps = 0

    def forward(self, images):
        self.steps += self.training
        return super().forward(images)

    def get_extra_state(self):
        return {"steps": self.steps}

    def set_extra_state(self, state):
        self.steps = state["steps"]


@pytest.mark.usefixtures("few_digits")
@pytest.mark.parametrize("network", [Tutorial, Lazy, Volume, Sparse, Complex, SittingOut, Counting])
@pytest.mark.parametrize("seed", [1, 2])
def test_networks_of_every_kind_learn(network, seed):
    trained = train_run(Run(Recipe("r", network, epochs=2, train_images=640), CONTROL, seed))
    losses = [row["train_loss"] for row in trained.history]
    assert losses[1] < losses[0]


def test_data_of_the_users_is_the_same_for_every_run():
    def drawn():
        images = torch.randint(0, 256, (8, 8, 8), dtype=torch.uint8)
        return images, torch.arange(8) % 2, images, torch.arange(8) % 2, ("a", "b")

    recipe = replace(SQUARES, data=drawn)
    with reproducible(CPU):
        seed_everything(5, 5, CPU)
        first = read_data(recipe)[0]
        seed_everything(6, 6, CPU)
        assert torch.equal(read_data(recipe)[0].images, first.images)


def test_named_data_is_the_default(mnist):
    assert torch.equal(load_data("mnist")[1].labels, mnist[1].labels)
    assert Condition("a", changes={"train_images": 5}).changes == {"train_images": 5}


def test_a_loss_with_weights_is_copied_with_its_tensors():
    """So that they move to a GPU with it, and a state that the loss keeps is not shared between runs."""
    weights = torch.tensor([1.0, 2.0, 3.0])
    for loss in (nn.CrossEntropyLoss(weight=weights), partial(nn.functional.cross_entropy, weight=weights)):
        setup = set_up_of(replace(SQUARES, loss=loss))
        assert setup.learner.loss is not loss
        logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
        assert torch.equal(setup.learner.loss(logits, labels), loss(logits, labels))
    with torch.device("meta"):
        assert _on_device(loss, torch.device("meta")).keywords["weight"].device.type == "meta"
