from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from s6lib.models import BottleneckNet, PlainNet
from s6lib.norm import GhostBatchNorm
from s6lib.recipes import (
    ALL_CONDITIONS,
    BOTTLENECK,
    CONDITIONS,
    CONTROL,
    PLAIN,
    Condition,
    Recipe,
    build_model,
)


def test_the_five_conditions_are_the_designs():
    rows = [(c.label, c.slug, c.l1, c.l2, c.num_splits) for c in CONDITIONS]
    assert rows == [
        ("L1 + BN", "l1-bn", 2e-4, 0, None),
        ("L2 + BN", "l2-bn", 0, 1e-4, None),
        ("L1 + L2 + BN", "l1-l2-bn", 2e-4, 1e-4, None),
        ("GBN", "gbn", 0, 0, 4),
        ("L1 + L2 + GBN", "l1-l2-gbn", 2e-4, 1e-4, 4),
    ]
    assert CONTROL not in CONDITIONS
    assert [c.num_splits for c in ALL_CONDITIONS.values() if c.slug.startswith("gbn-")] == [2, 8, 16, 32]


def test_recipes_are_the_designs():
    assert Recipe("plain", PlainNet, 0.04, 25, 60_000, 64, 0.01, 0.1, 6, 0.9, 15.0, 0.0) == PLAIN
    same_but = {"name": "bottleneck", "network": BottleneckNet, "dropout": 0.0, "rotation": 7.0, "jitter": 0.1}
    assert replace(PLAIN, **same_but) == BOTTLENECK


def test_learning_rate_falls_tenfold_every_six_epochs():
    rates = [PLAIN.learning_rates(epoch) for epoch in (1, 6, 7, 12, 13, 18, 19, 24, 25)]
    assert all(len(of_steps) == 938 and len(set(of_steps)) == 1 for of_steps in rates)
    assert [first for first, *_ in rates] == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5, 1e-6])


@given(st.integers(1, 6), st.integers(1, 200), st.integers(1, 70))
def test_one_cycle_is_torchs(epochs, images, batch):
    recipe = Recipe("cycle", Own, epochs=epochs, train_images=images, batch_size=batch, schedule="one-cycle")
    ours = [rate for epoch in range(1, epochs + 1) for rate in recipe.learning_rates(epoch)]
    if len(ours) < 6:  # torch divides by zero where the upward part has one step
        assert max(ours) <= 0.01
        return
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.01, total_steps=len(ours), pct_start=0.2, cycle_momentum=False
    )
    theirs = []
    for _ in ours:
        theirs += scheduler.get_last_lr()
        optimizer.step()
        if len(theirs) < len(ours):
            scheduler.step()
    assert ours == pytest.approx(theirs)


@pytest.mark.parametrize("recipe", [PLAIN, BOTTLENECK])
def test_conditions_of_one_seed_share_their_initial_weights(recipe):
    states = []
    for condition in ALL_CONDITIONS.values():
        torch.manual_seed(3)
        states.append(build_model(recipe, condition).state_dict())
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[name], states[0][name]) for name in state)


def rates_of(recipe):
    return [rate for epoch in range(1, recipe.epochs + 1) for rate in recipe.learning_rates(epoch)]


@given(st.integers(1, 6), st.integers(1, 200), st.integers(1, 70), st.integers(1, 3))
def test_a_cosine_is_torchs(epochs, images, batch, passes):
    recipe = replace(OWN, epochs=epochs, train_images=images, batch_size=batch, passes=passes, schedule="cosine")
    ours = rates_of(recipe)
    assert len(ours) == epochs * passes * -(-images // batch)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(ours))
    theirs = []
    for _ in ours:
        theirs += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    assert ours == pytest.approx(theirs, abs=1e-12)


def test_a_schedule_of_the_users_is_a_factor_of_the_learning_rate():
    recipe = replace(OWN, epochs=2, train_images=128, schedule=lambda done: np.float64(1 - done))
    assert rates_of(recipe) == pytest.approx([0.01, 0.0075, 0.005, 0.0025])
    assert set(rates_of(replace(recipe, schedule="constant"))) == {0.01}
    for bad in (lambda done: -1.0, lambda done: None, lambda done: float("nan")):
        with pytest.raises(ValueError, match="schedule must be a function that gives a finite number from 0, at 0 too"):
            replace(recipe, schedule=bad).learning_rates(1)


def test_numbers_of_numpy_are_numbers():
    condition = Condition("a", l1=np.float64(1e-4), num_splits=np.arange(4, 8)[0], changes={"epochs": np.int64(3)})
    assert (condition.l1, condition.num_splits, condition.changes) == (1e-4, 4, {"epochs": 3})
    assert type(replace(PLAIN, epochs=np.int64(3)).epochs) is int


def test_a_recipe_cannot_be_subclassed():
    """It would be recorded as if it were the plain one."""
    with pytest.raises(ValueError, match="Recipe cannot be subclassed, since a run records only the settings"):

        class _Slower(Recipe):
            def learning_rates(self, epoch):
                return [1e-3]


@pytest.mark.parametrize(("setting", "value"), [("network", PlainNet()), ("norm", nn.BatchNorm2d(4))])
def test_a_model_where_its_class_is_asked_for(setting, value):
    name = type(value).__name__
    with pytest.raises(ValueError, match=f"{setting} must be .*: give the class {name}, not a {name} that is already"):
        Recipe("r", value) if setting == "network" else Condition("c", norm=value)


def test_normalisation_layers_are_the_conditions():
    def kinds(condition):
        return {
            (type(m), getattr(m, "num_splits", None))
            for m in build_model(PLAIN, condition).modules()
            if isinstance(m, nn.modules.batchnorm._BatchNorm)
        }

    assert kinds(CONTROL) == {(nn.BatchNorm2d, None)}
    assert kinds(ALL_CONDITIONS["gbn-16"]) == {(GhostBatchNorm, 16)}


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 0}, {"epochs": True}, {"epochs": 2.0}, {"train_images": 60_001}, {"train_images": 0},
        {"batch_size": 0}, {"learning_rate": float("nan")}, {"learning_rate": -1}, {"dropout": 1.5}, {"momentum": 2},
        {"rotation": float("inf")}, {"jitter": -0.1}, {"shift": -1}, {"scale": 1.0}, {"schedule": "cosines"},
        {"nesterov": 1}, {"ema": 1.0}, {"held_out": 1}, {"passes": 0}, {"draw_images": 1},
        {"data": "svhn"}, {"loss": None},
        {"optimizer": "adam"}, {"transform": 1}, {"decay_epochs": 0}, {"network": "PlainNet"},
        {"name": "../plain"},
    ],
)  # fmt: skip
def test_recipe_refuses_what_makes_no_sense(change):
    ((field, value),) = change.items()
    with pytest.raises(ValueError, match=rf"{field} must be .*, not {value!r}"):
        replace(PLAIN, **change)


def test_held_out_digits_are_not_trained_on():
    with pytest.raises(ValueError, match="held_out must be False, or True with at most 50,000 train_images"):
        replace(PLAIN, held_out=True)
    assert replace(PLAIN, held_out=True, train_images=50_000).held_out


def test_nesterov_needs_a_momentum():
    with pytest.raises(ValueError, match="nesterov must be True, with a momentum above 0, or False, not True"):
        replace(PLAIN, momentum=0.0, nesterov=True)


@pytest.mark.parametrize(
    "change",
    [{"l1": -1}, {"l2": float("nan")}, {"l1": float("inf")}, {"num_splits": 0}, {"num_splits": 1.5},
     {"norm": 4}, {"penalty": 1e-4}, {"changes": {"colour": 1}}, {"changes": {"name": "other"}}, {"changes": None},
     {"changes": {"held_out": True}}, {"changes": {"data": "kmnist"}},
     {"changes": {"optimizer": torch.optim.Adam, "momentum": 0.5}},
     {"slug": ".."}, {"slug": "a/b"}, {"slug": ""}, {"slug": "gbn\n"}],
)  # fmt: skip
def test_condition_refuses_what_makes_no_sense(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))} must "):
        replace(Condition("new", "New"), **change)


class Own(nn.Module):
    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 3, 4), norm(4), nn.Flatten(), nn.Linear(4 * 7 * 7, 10))

    def forward(self, images):
        return self.layers(images)


class WithoutNorm(nn.Module):
    def forward(self, images):
        return images.flatten(1)[:, :10]


OWN = Recipe("own", Own, epochs=1, train_images=640)
GROUPS = Condition("groups", norm=lambda channels: nn.GroupNorm(2, channels))


def test_a_network_and_a_normalisation_of_ones_own():
    kinds = [type(layer) for layer in build_model(OWN, GROUPS).modules()]
    assert nn.GroupNorm in kinds
    assert nn.BatchNorm2d not in kinds


def test_a_condition_changes_any_setting_of_the_recipe():
    wild = Condition("wild", changes={"dropout": 0.5, "batch_size": 256, "network": PlainNet, "epochs": 3})
    changed = OWN.changed_by(wild)
    assert changed == replace(OWN, dropout=0.5, batch_size=256, network=PlainNet, epochs=3)
    assert {layer.p for layer in build_model(OWN, wild).modules() if isinstance(layer, nn.Dropout)} == {0.5}


def test_a_recipe_refuses_a_dropout_that_its_network_does_not_take():
    with pytest.raises(ValueError, match=r"dropout must be left out or 0, since BottleneckNet takes none, not 0\.5"):
        replace(BOTTLENECK, dropout=0.5)


def test_the_penalties_add_up():
    model = build_model(PLAIN, CONTROL)
    ones = Condition("ones", l1=2.0, l2=3.0, penalty=lambda model: torch.tensor(5.0))
    weights = torch.cat([weight.flatten() for weight in model.parameters()])
    assert ones.penalty_of(model).item() == pytest.approx((2 * weights.abs().sum() + 3 * (weights**2).sum() + 5).item())
    assert CONTROL.penalty_of(model) == 0


def test_a_label_is_the_slug_if_there_is_none():
    assert Condition("groups").label == "groups"
