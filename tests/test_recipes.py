import pickle
from dataclasses import replace
from enum import Enum
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from s6lib.errors import SettingError
from s6lib.models import BottleneckNet, PlainNet
from s6lib.norm import GhostBatchNorm
from s6lib.recipes import ALL_CONDITIONS, BOTTLENECK, CONDITIONS, CONTROL, PLAIN, Condition, Recipe, build_model

Adam, AdamW = torch.optim.Adam, torch.optim.AdamW
ADAM = Adam([nn.Parameter(torch.zeros(1))])  # its repr has many lines


# --- the built-in ones -----------------------------------------------------------------------------------------------


def test_the_conditions_and_recipes_are_the_designs():
    assert [(c.label, c.slug, c.l1, c.l2, c.num_splits) for c in CONDITIONS] == [
        ("L1 + BN", "l1-bn", 2e-4, 0, None),
        ("L2 + BN", "l2-bn", 0, 1e-4, None),
        ("L1 + L2 + BN", "l1-l2-bn", 2e-4, 1e-4, None),
        ("GBN", "gbn", 0, 0, 4),
        ("L1 + L2 + GBN", "l1-l2-gbn", 2e-4, 1e-4, 4),
    ]
    assert CONTROL not in CONDITIONS
    assert [c.num_splits for c in ALL_CONDITIONS.values() if c.slug.startswith("gbn-")] == [2, 8, 16, 32]
    assert Recipe("plain", PlainNet, 0.04, 25, 60_000, 64, 0.01, 0.1, 6, 0.9, 15.0, 0.0) == PLAIN
    same_but = {"name": "bottleneck", "network": BottleneckNet, "dropout": 0.0, "rotation": 7.0, "jitter": 0.1}
    assert replace(PLAIN, **same_but) == BOTTLENECK


@pytest.mark.parametrize("recipe", [PLAIN, BOTTLENECK])
def test_conditions_of_one_seed_share_their_initial_weights_but_not_their_norms(recipe):
    states = []
    for condition in ALL_CONDITIONS.values():
        torch.manual_seed(3)
        model = build_model(recipe, condition)
        norms = [layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
        kind = nn.BatchNorm2d if condition.num_splits is None else GhostBatchNorm
        assert {(type(norm), getattr(norm, "num_splits", None)) for norm in norms} == {(kind, condition.num_splits)}
        states.append(model.state_dict())
    for state in states[1:]:
        torch.testing.assert_close(state, states[0], rtol=0, atol=0)


# --- learning rates --------------------------------------------------------------------------------------------------


def rates_of(recipe):
    return [rate for epoch in range(1, recipe.epochs + 1) for rate in recipe.learning_rates(epoch)]


def test_learning_rate_falls_tenfold_every_six_epochs():
    rates = [PLAIN.learning_rates(epoch) for epoch in (1, 6, 7, 12, 13, 18, 19, 24, 25)]
    assert all(len(of_steps) == 938 and len(set(of_steps)) == 1 for of_steps in rates)
    assert [first for first, *_ in rates] == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5, 1e-6])


@pytest.mark.parametrize("schedule", ["one-cycle", "cosine"])
@settings(max_examples=30)
@given(st.integers(1, 6), st.integers(1, 200), st.integers(1, 70), st.integers(1, 3))
@example(1, 1, 1, 1)
@example(1, 4, 1, 1)
def test_one_cycle_and_cosine_are_torchs(schedule, epochs, images, batch, passes):
    recipe = replace(PLAIN, epochs=epochs, train_images=images, batch_size=batch, passes=passes, schedule=schedule)
    ours = rates_of(recipe)
    assert len(ours) == epochs * passes * -(-images // batch)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.01)
    if schedule == "cosine":
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(ours))
    elif len(ours) < 6:  # torch divides by zero where the upward part has one step
        assert max(ours) <= 0.01
        return
    else:
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 0.01, total_steps=len(ours), pct_start=0.2, cycle_momentum=False
        )
    for rate in ours:
        assert scheduler.get_last_lr() == pytest.approx([rate], abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_a_schedule_of_the_users_is_a_factor_of_the_learning_rate():
    recipe = replace(PLAIN, epochs=2, train_images=128, schedule=lambda done: np.float64(1 - done))
    assert rates_of(recipe) == pytest.approx([0.01, 0.0075, 0.005, 0.0025])
    assert set(rates_of(replace(recipe, schedule="constant"))) == {0.01}
    for bad in (lambda done: -1.0, lambda done: None, lambda done: float("nan"), lambda done: "1"):
        with pytest.raises(SettingError, match="schedule must be a function that gives a finite number from 0, at 0 t"):
            replace(recipe, schedule=bad).learning_rates(1)


# --- conditions of the user's ----------------------------------------------------------------------------------------


def test_a_keyword_of_a_condition_changes_a_setting_of_the_recipe():
    wild = Condition("wild", dropout=0.5, batch_size=256, network=PlainNet, epochs=3, l1=1e-4)
    assert wild.changes == {"dropout": 0.5, "batch_size": 256, "network": PlainNet, "epochs": 3}
    assert BOTTLENECK.changed_by(wild) == replace(BOTTLENECK, **wild.changes)
    assert {layer.p for layer in build_model(BOTTLENECK, wild).modules() if isinstance(layer, nn.Dropout)} == {0.5}
    assert Condition("wild", changes=wild.changes, l1=1e-4) == wild
    assert Condition("wild", changes={"epochs": 2}, epochs=3).changes == {"epochs": 3}  # what is said last


def test_a_condition_is_a_value():
    short = Condition("short", "Short", l1=1e-4, epochs=3)
    assert replace(short, epochs=4) == Condition("short", "Short", l1=1e-4, epochs=4)
    assert replace(short, l1=0.0, label="x") == Condition("short", "x", epochs=3)
    assert pickle.loads(pickle.dumps(short)) == short
    assert hash(replace(short)) == hash(short)
    assert Condition("groups").label == "groups"


@pytest.mark.parametrize(
    ("changes", "slug"),
    [
        ({"l1": 6e-3, "l2": 1e-5}, "l1-0.006-l2-1e-5"),
        ({"l1": 2e-4, "num_splits": 4}, "l1-0.0002-num_splits-4"),
        ({"dropout": 0.0, "nesterov": True}, "dropout-0-nesterov-true"),
        ({"schedule": "one-cycle"}, "schedule-one-cycle"),
        ({"optimizer": AdamW, "learning_rate": 1e-3}, "optimizer-adamw-learning_rate-0.001"),
        ({"optimizer": partial(AdamW, weight_decay=0.1)}, "optimizer-adamw-weight_decay-0.1"),
        ({"optimizer": partial(AdamW, betas=(0.9, 0.99))}, "optimizer-adamw-betas-0.9-0.99"),
        ({"penalty": nn.functional.relu, "label": "C"}, "penalty-relu"),
        ({"l1": 1e20, "learning_rate": 1e6}, "l1-1e20-learning_rate-1e6"),
    ],
)
def test_a_condition_names_itself_after_what_it_changes(changes, slug):
    assert Condition(**changes).slug == slug


def test_a_penalty_of_ones_own_is_added():
    """A norm of one's own is seen in test_launch.py."""
    model = build_model(BOTTLENECK, CONTROL)
    weights = torch.cat([weight.flatten() for weight in model.parameters()])
    ones = Condition("ones", l1=2.0, l2=3.0, penalty=lambda model: torch.tensor(5.0))
    assert ones.penalty_of(model).item() == pytest.approx((2 * weights.abs().sum() + 3 * (weights**2).sum() + 5).item())
    assert CONTROL.penalty_of(model) == 0


def test_numbers_of_numpy_are_numbers():
    condition = Condition("a", l1=np.float64(1e-4), num_splits=np.arange(4, 8)[0], epochs=np.int64(3))
    assert (condition.l1, condition.num_splits, condition.changes) == (1e-4, 4, {"epochs": 3})
    decay = partial(AdamW, weight_decay=np.logspace(-4, -2, 3)[2], betas=(np.float64(0.9), 0.99))
    optimizer = Condition("b", optimizer=decay).changes["optimizer"]
    numbers = condition.l1, optimizer.keywords["weight_decay"], replace(PLAIN, epochs=np.int64(3)).epochs
    assert [type(number) for number in (*numbers, *optimizer.keywords["betas"])] == [float, float, int, float, float]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0), ("epochs", True), ("epochs", 2.0), ("train_images", 60_001), ("train_images", 0),
        ("batch_size", 0), ("learning_rate", float("nan")), ("learning_rate", -1), ("dropout", 1.5), ("momentum", 2),
        ("rotation", float("inf")), ("jitter", -0.1), ("shift", -1), ("scale", 1.0), ("schedule", "cosines"),
        ("nesterov", 1), ("ema", 1.0), ("held_out", 1), ("passes", 0), ("draw_images", 1), ("data", "svhn"),
        ("loss", None), ("optimizer", "adam"), ("transform", 1), ("batch_transform", 1), ("decay_epochs", 0),
        ("network", "PlainNet"), ("name", "a b"), ("name", "../plain"),
        ("data", type("Data", (list,), {"__call__": list, "__repr__": lambda _: "Data"})()),  # cannot be hashed
    ],
)  # fmt: skip
def test_a_recipe_refuses_what_makes_no_sense(field, value):
    with pytest.raises(ValueError, match=rf"{field} must be .*, not {value!r}"):
        replace(PLAIN, **{field: value})


def test_with_held_out_images_50_000_are_left_to_train_on():
    with pytest.raises(ValueError, match=r"train_images must be .* from 1 to 50,000 with held_out, not 60000"):
        replace(PLAIN, held_out=True)
    assert replace(PLAIN, held_out=True, train_images=50_000).held_out


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        *(({"slug": slug}, "slug must be lower-case words") for slug in (".", "..", "/a", "a/b", "a\\b")),
        *(({"slug": slug}, "slug must be lower-case words") for slug in ("gbn\n", "a\nb", "A", "a-", "a_-b", 5)),
        ({"slug": "a" * 201}, "slug must be lower-case words .* of 200 letters at most"),
        ({"slug": Enum("Slug", {"MINE": "mine"}, type=str).MINE}, "slug must be lower-case words"),
        *(({"slug": "", **more}, "needs a slug, as in 'mine'") for more in ({}, {"l1": 0.0}, {"penalty": lambda _: 0})),
        ({"slug": "", "l1": -1e-4}, "l1 must be a finite number from 0, not -0.0001"),
        ({"slug": "", "dropout": -0.1}, "dropout must be a finite number from 0 to 1, not -0.1"),
        ({"label": 5}, "label must be text"),
        ({"l1": -1}, "l1 must"), ({"l1": float("inf")}, "l1 must"), ({"l2": float("nan")}, "l2 must"),
        ({"num_splits": 0}, "num_splits must"), ({"num_splits": 1.5}, "num_splits must"),
        ({"norm": 4}, "norm must"), ({"penalty": 1e-4}, "penalty must"),
        ({"norm": nn.BatchNorm2d(4)}, "give the class BatchNorm2d, not a BatchNorm2d already made"),
        ({"penalty": nn.L1Loss}, "penalty must be a function of the model: give an instance, L1Loss.*, not the class"),
        ({"norm": nn.BatchNorm2d, "num_splits": 4}, "norm must be left out where num_splits is given"),
        *(({name: 1}, "must be a setting of the recipe, network, .*, not") for name in ("colour", "data", "held_out")),
        ({"changes": {"colour": 1}}, "must be a setting of the recipe"),
        ({"changes": 5}, "changes must be a mapping of settings to values, not 5"),
        *(({"optimizer": Adam, name: 1}, f"{name} must be given to the opt") for name in ("momentum", "nesterov")),
        ({"network": PlainNet()}, "network must be .*: give the class PlainNet, not a PlainNet already made"),
        ({"loss": nn.CrossEntropyLoss}, "loss must be .*: give an instance, CrossEntropyLoss.*, not the class"),
        ({"optimizer": ADAM}, r"optimizer must be a class .*, not Adam \( Parameter Group 0 .*\.{3}$"),
        ({"epochs": -1}, "epochs must be a whole number from 1, not -1"),
    ],
)  # fmt: skip
def test_a_condition_refuses_what_makes_no_sense(asked, said):
    with pytest.raises(SettingError, match=said):
        Condition(**{"slug": "new", **asked})


@pytest.mark.parametrize(
    ("recipe", "changes", "said"),
    [
        (PLAIN, {"num_splits": 65}, "num_splits must be at most the batch size, 64, not 65"),
        *(
            (PLAIN, {"optimizer": with_rate}, "lr must be left out of the optimizer: give the rate as `learning_rate`")
            for with_rate in (partial(Adam, lr=1e-6), partial(partial(Adam, lr=1e-6), weight_decay=0.1))
        ),
        (PLAIN, {"network": partial(PlainNet, wdith=20)}, "network must be a partial that can be called"),
        (BOTTLENECK, {"dropout": 0.5}, r"dropout must be left out or 0, since BottleneckNet takes none, not 0\.5"),
        (PLAIN, {"momentum": 0.0, "nesterov": True}, "nesterov must be True, with a momentum above 0, or False"),
    ],
)
def test_a_condition_that_does_not_fit_its_recipe_is_named(recipe, changes, said):
    with pytest.raises(SettingError, match=rf"^New \(new\) with recipe {recipe.name}: {said}"):
        recipe.changed_by(Condition("new", "New", **changes))
    assert recipe.changed_by(Condition("new", num_splits=128, batch_size=128)).batch_size == 128


@pytest.mark.parametrize("kind", [Recipe, Condition])
def test_a_subclass_would_be_recorded_as_if_it_were_the_plain_one(kind):
    with pytest.raises(SettingError, match=f"{kind.__name__} cannot be subclassed, since a run records only"):
        type("Other", (kind,), {})
