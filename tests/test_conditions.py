from dataclasses import replace

import pytest
import torch
from torch import nn

from s6lib.conditions import ALL_CONDITIONS, BOTTLENECK, CONDITIONS, CONTROL, PLAIN, Condition, Recipe, build_model
from s6lib.norm import GhostBatchNorm


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
    assert Recipe("plain", "PlainNet", 0.04, 25, 60_000, 64, 0.01, 0.1, 6, 0.9, 15.0, 0.0) == PLAIN
    same_but = {"name": "bottleneck", "network": "BottleneckNet", "dropout": 0.0, "rotation": 7.0, "jitter": 0.1}
    assert replace(PLAIN, **same_but) == BOTTLENECK


def test_learning_rate_falls_tenfold_every_six_epochs():
    rates = [PLAIN.learning_rate_at(epoch) for epoch in (1, 6, 7, 12, 13, 18, 19, 24, 25)]
    assert rates == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5, 1e-6])


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
        {"rotation": float("inf")}, {"jitter": -0.1}, {"decay_epochs": 0}, {"network": "ResNet"}, {"name": "../plain"},
    ],
)  # fmt: skip
def test_recipe_refuses_what_makes_no_sense(change):
    ((field, value),) = change.items()
    with pytest.raises(ValueError, match=rf"{field} must be .*, not {value!r}"):
        replace(PLAIN, **change)


@pytest.mark.parametrize(
    "change",
    [{"l1": -1}, {"l2": float("nan")}, {"l1": float("inf")}, {"num_splits": 0}, {"num_splits": 1.5},
     {"slug": ".."}, {"slug": "a/b"}, {"slug": ""}, {"slug": "gbn\n"}],
)  # fmt: skip
def test_condition_refuses_what_makes_no_sense(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))} must be "):
        replace(Condition("new", "New"), **change)
