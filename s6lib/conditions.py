"""What a study compares (conditions) and how it trains (recipes)."""

from dataclasses import dataclass
from functools import partial

from torch import nn

from s6lib.models import BottleneckNet, PlainNet
from s6lib.norm import GhostBatchNorm


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
