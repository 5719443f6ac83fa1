"""What a study compares (conditions) and how it trains (recipes)."""

import math
import re
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from s6lib.models import BottleneckNet, PlainNet
from s6lib.norm import GhostBatchNorm


def _require(met: bool, name: str, expected: str, value: Any) -> None:
    if not met:
        raise ValueError(f"{name} must be {expected}, not {value!r}")


def _require_slug(name: str, value: str) -> None:
    # It becomes a folder's name, so nothing in it may lead elsewhere.
    slug = isinstance(value, str) and re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", value)
    _require(bool(slug), name, "lower-case words joined by hyphens", value)


def _require_whole(name: str, value: int, least: int, most: float = math.inf) -> None:
    expected = f"a whole number from {least}" + (f" to {most}" if most < math.inf else "")
    _require(type(value) is int and least <= value <= most, name, expected, value)


def _require_number(name: str, value: float, least: float, most: float = sys.float_info.max) -> None:
    expected = f"a finite number from {least}" + (f" to {most}" if most < sys.float_info.max else "")
    _require(type(value) in (int, float) and least <= value <= most, name, expected, value)


@dataclass(frozen=True)
class Condition:
    """One way of regularising: penalties and normalisation.

    Args:
        slug: name of its folder and on the command line.
        label: name in tables and figures.
        l1: weight of the sum of |w| over all trainable parameters, added to the loss.
        l2: weight of the sum of w^2, likewise.
        num_splits: ghost batches a batch, or None for BatchNorm2d.
    """

    slug: str
    label: str
    l1: float = 0.0
    l2: float = 0.0
    num_splits: int | None = None

    def __post_init__(self) -> None:
        _require_slug("slug", self.slug)
        _require(isinstance(self.label, str), "label", "text", self.label)
        _require_number("l1", self.l1, 0)
        _require_number("l2", self.l2, 0)
        if self.num_splits is not None:
            _require_whole("num_splits", self.num_splits, 1)


CONDITIONS = (
    Condition("l1-bn", "L1 + BN", l1=2e-4),
    Condition("l2-bn", "L2 + BN", l2=1e-4),
    Condition("l1-l2-bn", "L1 + L2 + BN", l1=2e-4, l2=1e-4),
    Condition("gbn", "GBN", num_splits=4),
    Condition("l1-l2-gbn", "L1 + L2 + GBN", l1=2e-4, l2=1e-4, num_splits=4),
)
CONTROL = Condition("bn", "BN")
SPLIT_SWEEP = tuple(Condition(f"gbn-{splits}", f"GBN, {splits} splits", num_splits=splits) for splits in (2, 8, 16, 32))
ALL_CONDITIONS = {condition.slug: condition for condition in (*CONDITIONS, CONTROL, *SPLIT_SWEEP)}


@dataclass(frozen=True)
class Recipe:
    """How every condition of a study is trained.

    Args:
        name: name of its folder and on the command line.
        network: PlainNet or BottleneckNet.
        dropout: probability in PlainNet.
        epochs: passes over the training images.
        train_images: how many of the 60,000, from the first.
        batch_size: images a step.
        learning_rate: of SGD, multiplied by `decay` after every `decay_epochs`.
        momentum: of SGD.
        rotation: largest angle of the augmentation, degrees.
        jitter: largest relative change of brightness and of contrast.
    """

    name: str
    network: str
    dropout: float = 0.0
    epochs: int = 25
    train_images: int = 60_000
    batch_size: int = 64
    learning_rate: float = 0.01
    decay: float = 0.1
    decay_epochs: int = 6
    momentum: float = 0.9
    rotation: float = 0.0
    jitter: float = 0.0

    def __post_init__(self) -> None:
        _require_slug("name", self.name)
        _require(self.network in ("PlainNet", "BottleneckNet"), "network", "PlainNet or BottleneckNet", self.network)
        _require_number("dropout", self.dropout, 0, 1)
        _require_whole("epochs", self.epochs, 1)
        _require_whole("train_images", self.train_images, 1, 60_000)
        _require_whole("batch_size", self.batch_size, 1, 60_000)
        _require_number("learning_rate", self.learning_rate, 0)
        _require_number("decay", self.decay, 0, 1)
        _require_whole("decay_epochs", self.decay_epochs, 1)
        _require_number("momentum", self.momentum, 0, 1)
        _require_number("rotation", self.rotation, 0, 180)
        _require_number("jitter", self.jitter, 0, 1)

    def learning_rate_at(self, epoch: int) -> float:
        """The learning rate of an epoch, counted from 1."""
        return self.learning_rate * self.decay ** ((epoch - 1) // self.decay_epochs)


PLAIN = Recipe("plain", "PlainNet", dropout=0.04, rotation=15.0)
BOTTLENECK = Recipe("bottleneck", "BottleneckNet", rotation=7.0, jitter=0.1)
RECIPES = {recipe.name: recipe for recipe in (PLAIN, BOTTLENECK)}


def build_model(recipe: Recipe, condition: Condition) -> nn.Module:
    """The recipe's network with the condition's normalisation, its weights drawn from torch's global generator."""
    norm = nn.BatchNorm2d
    if condition.num_splits is not None:
        norm = partial(GhostBatchNorm, num_splits=condition.num_splits)
    if recipe.network == "PlainNet":
        return PlainNet(norm, recipe.dropout)
    return BottleneckNet(norm)
