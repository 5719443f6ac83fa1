from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from s6lib.identity import Recorded
from s6lib.models import BottleneckNet, PlainNet, SeparableNet
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
    condition_entry,
    layers,
    recipe_entry,
    recorded_condition,
    recorded_recipe,
    try_out,
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


@given(st.integers(1, 6), st.integers(1, 2000), st.integers(1, 700))
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
        {"rotation": float("inf")}, {"jitter": -0.1}, {"shift": 29}, {"scale": 1.0}, {"schedule": "cosine"},
        {"nesterov": 1}, {"ema": 1.0}, {"held_out": 1}, {"decay_epochs": 0}, {"network": "PlainNet"},
        {"name": "../plain"},
    ],
)  # fmt: skip
def test_recipe_refuses_what_makes_no_sense(change):
    ((field, value),) = change.items()
    with pytest.raises(ValueError, match=rf"{field} must be .*, not {value!r}"):
        replace(PLAIN, **change)


def test_held_out_digits_are_not_trained_on():
    with pytest.raises(ValueError, match="held_out must be True, with at most 50,000 train_images, or False"):
        replace(PLAIN, held_out=True)
    assert replace(PLAIN, held_out=True, train_images=50_000).held_out


def test_nesterov_needs_a_momentum():
    with pytest.raises(ValueError, match="nesterov must be True, with a momentum above 0, or False, not True"):
        replace(PLAIN, momentum=0.0, nesterov=True)


@pytest.mark.parametrize(
    "change",
    [{"l1": -1}, {"l2": float("nan")}, {"l1": float("inf")}, {"num_splits": 0}, {"num_splits": 1.5},
     {"norm": 4}, {"penalty": 1e-4}, {"changes": {"colour": 1}}, {"changes": {"name": "other"}}, {"changes": None},
     {"changes": {"held_out": True}},
     {"slug": ".."}, {"slug": "a/b"}, {"slug": ""}, {"slug": "gbn\n"}],
)  # fmt: skip
def test_condition_refuses_what_makes_no_sense(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))} must be "):
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
    assert any("GroupNorm" in line for line in layers(OWN, GROUPS))
    assert any("GroupNorm" in line for line in layers(PLAIN, GROUPS))
    assert layers(PLAIN, CONTROL) == []


def test_a_condition_changes_any_setting_of_the_recipe():
    wild = Condition("wild", changes={"dropout": 0.5, "batch_size": 256, "network": PlainNet, "epochs": 3})
    changed = OWN.changed_by(wild)
    assert changed == replace(OWN, dropout=0.5, batch_size=256, network=PlainNet, epochs=3)
    assert {layer.p for layer in build_model(OWN, wild).modules() if isinstance(layer, nn.Dropout)} == {0.5}


@pytest.mark.parametrize(
    ("recipe", "condition", "said"),
    [
        (BOTTLENECK, Condition("drop", changes={"dropout": 0.5}), "since BottleneckNet takes none, not 0.5"),
        (PLAIN, Condition("none", changes={"epochs": 0}), "epochs must be a whole number from 1"),
        (Recipe("bare", WithoutNorm), GROUPS, "needs a network that takes `norm`"),
        (Recipe("bare", WithoutNorm), ALL_CONDITIONS["gbn"], "needs a network that takes `norm`"),
        (Recipe("odd", lambda: nn.Flatten()), CONTROL, r".*logits \(N, 10\), not \(2, 784\)"),
        (Recipe("none", lambda: None), CONTROL, "cannot be built: AttributeError"),
        (PLAIN, Condition("many", penalty=lambda model: torch.ones(3)), "the penalty must be a scalar, not of shape"),
        (PLAIN, Condition("bad", penalty=lambda model: 1 / 0), "cannot be built: ZeroDivisionError"),
    ],
)
def test_what_does_not_fit_is_an_error_that_names_the_condition(recipe, condition, said):
    with pytest.raises(ValueError, match=rf"^{condition.label} \({condition.slug}\).*{said}"):
        try_out(recipe, condition)


def test_a_recipe_refuses_a_dropout_that_its_network_does_not_take():
    with pytest.raises(ValueError, match=r"dropout must be left out or 0, since BottleneckNet takes none, not 0\.5"):
        replace(BOTTLENECK, dropout=0.5)


def test_trying_out_leaves_the_generator_alone():
    state = torch.get_rng_state()
    try_out(PLAIN, CONTROL)
    layers(OWN, GROUPS)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_penalties_add_up():
    model = build_model(PLAIN, CONTROL)
    ones = Condition("ones", l1=2.0, l2=3.0, penalty=lambda model: torch.tensor(5.0))
    weights = torch.cat([weight.flatten() for weight in model.parameters()])
    assert ones.penalty_of(model).item() == pytest.approx((2 * weights.abs().sum() + 3 * (weights**2).sum() + 5).item())
    assert CONTROL.penalty_of(model) == 0


def test_a_label_is_the_slug_if_there_is_none():
    assert Condition("groups").label == "groups"


@pytest.mark.parametrize("condition", [*ALL_CONDITIONS.values(), GROUPS, Condition("wild", changes={"dropout": 0.0})])
def test_what_is_recorded_can_be_read_again(condition):
    entry = condition_entry(condition)
    again = recorded_condition(entry)
    assert condition_entry(again) == entry
    assert again == condition or isinstance(again.norm, Recorded)
    assert recipe_entry(recorded_recipe(recipe_entry(OWN))) == recipe_entry(OWN)
    assert recorded_recipe(recipe_entry(PLAIN)) == PLAIN


def test_settings_that_are_not_used_are_not_recorded():
    """So that the first published runs, which knew nothing of them, are still runs of PLAIN."""
    assert set(recipe_entry(PLAIN)) == {
        "name", "network", "dropout", "epochs", "train_images", "batch_size", "learning_rate", "decay", "decay_epochs",
        "momentum", "rotation", "jitter",
    }  # fmt: skip
    changed = replace(
        PLAIN, schedule="one-cycle", shift=2.0, scale=0.1, nesterov=True, ema=0.9, held_out=True, train_images=9
    )
    assert recorded_recipe(recipe_entry(changed)) == changed


@pytest.mark.parametrize("network", [partial(SeparableNet, width=14), partial(SeparableNet, 14)])
def test_a_network_of_the_library_with_numbers_can_be_made_from_what_is_recorded(network):
    entry = recipe_entry(Recipe("small", network))
    again = recorded_recipe(entry)
    assert recipe_entry(again) == entry
    assert sum(weights.numel() for weights in build_model(again, CONTROL).parameters()) == 1_694


@pytest.mark.parametrize("network", [partial(Own), partial(PlainNet, norm=nn.InstanceNorm2d)])
def test_a_partial_of_ones_own_is_known_by_name_alone(network):
    entry = recipe_entry(Recipe("own", network))
    again = recorded_recipe(entry)
    assert recipe_entry(again) == entry
    with pytest.raises(ValueError, match=r"is known from run\.json alone"):
        build_model(again, CONTROL)


def test_what_is_known_by_name_alone_cannot_be_made():
    with pytest.raises(ValueError, match=r"Own is known from run\.json alone, .* give the recipe and the conditions"):
        build_model(recorded_recipe(recipe_entry(OWN)), CONTROL)
