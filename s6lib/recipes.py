"""Recipes (how a study trains), conditions (what it compares), and the network that the two build."""

import inspect
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from s6lib.data import DATASETS, Augmentation, Dataset
from s6lib.errors import SettingError
from s6lib.models import BottleneckNet, PlainNet
from s6lib.norm import GhostBatchNorm
from s6lib.train import l1_l2_penalty

Norm = Callable[[int], nn.Module]  # makes the normalisation layer for a number of channels
Penalty = Callable[[nn.Module], Tensor | float]  # from a model to a scalar that is added to the loss
Loss = Callable[[Tensor, Tensor], Tensor]  # from logits and targets to a scalar
Transform = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # from images and labels to images and targets
SCHEDULES = ("steps", "one-cycle", "cosine", "constant")


def _require(met: bool, name: str, expected: str, value: Any) -> None:
    if not met:
        raise SettingError(f"{name} must be {expected}, not {value!r}")


def _require_slug(name: str, value: str) -> None:
    # A slug becomes a folder's name, so it must not lead to another folder.
    slug = isinstance(value, str) and re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", value)
    _require(bool(slug), name, "lower-case words joined by hyphens", value)


def _require_whole(name: str, value: int, least: int) -> None:
    _require(type(value) is int and value >= least, name, f"a whole number from {least}", value)


def _require_number(name: str, value: float, least: float, most: float = sys.float_info.max) -> None:
    expected = f"a finite number from {least}" + (f" to {most}" if most < sys.float_info.max else "")
    _require(type(value) in (int, float) and least <= value <= most, name, expected, value)


def _require_callable(name: str, value: Any, expected: str) -> None:
    if isinstance(value, nn.Module) and name in ("network", "norm"):
        kind = type(value).__name__
        raise SettingError(f"{name} must be {expected}: give the class {kind}, not a {kind} that is already made")
    _require(callable(value), name, expected, value)


def _as_python(value: Any) -> Any:
    """Turn a number of numpy, for example from np.logspace, into a number of Python."""
    return value.item() if isinstance(value, np.generic) else value


def _use_python_numbers(thing: "Condition | Recipe") -> None:
    for setting in fields(thing):
        object.__setattr__(thing, setting.name, _as_python(getattr(thing, setting.name)))


def _refuse_subclass(cls: type) -> None:
    raise SettingError(
        f"{cls.__bases__[0].__name__} cannot be subclassed, since a run records only the settings: pass your own "
        "function as a setting, such as `schedule` or `penalty`"
    )


@dataclass(frozen=True)
class Condition:
    """One way of training: a name, and what it changes in the recipe.

    Args:
        slug: name of its folder, and on the command line.
        label: name in tables and figures; by default the slug.
        l1: weight of the L1 penalty, the sum of |w| over all trainable parameters.
        l2: weight of the L2 penalty, the sum of w^2 over all trainable parameters.
        num_splits: ghost batches per batch, or None for BatchNorm2d.
        norm: your own normalisation instead: makes the layer for a number of channels.
        penalty: your own penalty, from the model to a scalar that is added to the loss.
        changes: settings of the recipe that this condition changes, by name. It cannot change data and held_out, since
            conditions are compared on the same test images.

    Raises SettingError, a ValueError, for an invalid value.
    """

    slug: str
    label: str = ""
    l1: float = 0.0
    l2: float = 0.0
    num_splits: int | None = None
    norm: Norm | None = None
    penalty: Penalty | None = None
    changes: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __init_subclass__(cls) -> None:
        _refuse_subclass(cls)

    def __post_init__(self) -> None:
        _use_python_numbers(self)
        _require_slug("slug", self.slug)
        _require(isinstance(self.label, str), "label", "text", self.label)
        object.__setattr__(self, "label", self.label or self.slug)
        _require_number("l1", self.l1, 0)
        _require_number("l2", self.l2, 0)
        if self.num_splits is not None:
            _require_whole("num_splits", self.num_splits, 1)
            _require(self.norm is None, "norm", "left out where num_splits is given", self.norm)
        if self.norm is not None:
            _require_callable("norm", self.norm, "a function or a class that makes a layer")
        if self.penalty is not None:
            _require_callable("penalty", self.penalty, "a function of the model")
        names = [setting.name for setting in fields(Recipe) if setting.name not in ("name", "data", "held_out")]
        sound = isinstance(self.changes, Mapping) and all(name in names for name in self.changes)
        _require(sound, "changes", f"a dict of settings of the recipe, which are {', '.join(names)}", self.changes)
        idle = {"momentum", "nesterov"} & self.changes.keys()
        if self.changes.get("optimizer") is not None and idle:
            raise SettingError(f"changes must not hold {idle.pop()} beside an optimizer: give it to the optimizer")
        object.__setattr__(self, "changes", {name: _as_python(value) for name, value in self.changes.items()})

    def penalty_of(self, model: nn.Module) -> Tensor | float:
        """Compute the sum of the condition's penalties: a differentiable scalar, or 0 if it has none."""
        penalty = l1_l2_penalty(model, self.l1, self.l2)
        return penalty if self.penalty is None else penalty + self.penalty(model)


@dataclass(frozen=True)
class Recipe:
    """The settings of training that the conditions of a study share, unless a condition changes one.

    Args:
        name: name of its folder, and on the command line.
        network: makes the network; called with `norm` and `dropout` if it takes them. Training on a CPU uses the memory
            format in the network's attribute `memory_format`, if it has one.
        dropout: probability, for a network that takes it; None for the network's default.
        epochs: number of epochs; each ends with an evaluation.
        train_images: number of training images; by default all.
        batch_size: images per step.
        learning_rate: of the optimizer; with "one-cycle", the highest.
        decay: factor by which "steps" multiplies the learning rate after every `decay_epochs`.
        momentum: of SGD.
        rotation, jitter, shift, scale: of the augmentation, see `s6lib.data.Augmentation`.
        schedule: "steps", "one-cycle" (Smith and Topin, arXiv:1708.07120: up from a 25th of the learning rate in a
            fifth of all steps, then down to almost zero, both along a cosine), "cosine" (Loshchilov and Hutter,
            arXiv:1608.03983, without restarts), "constant", or a function from the share of training done (0 to 1) to
            the factor of the learning rate. "steps" changes the rate between epochs, the others at each step.
        nesterov: whether SGD uses Nesterov's momentum.
        ema: decay of an exponential moving average of the weights, such as 0.999; the average is then evaluated and
            saved. 0 for no average.
        held_out: whether to measure accuracy on the last sixth of the training images instead of the test images, for
            choices. Those images are then not trained on.
        data: "mnist", "fashion-mnist", "kmnist", or a function that returns an `s6lib.Dataset`.
        transform: from the images (B, 1, H, H), augmented and normalised, and labels (B,) of a training batch to the
            images and targets to train on. The transforms of torchvision.transforms.v2 fit.
        loss: from logits (B, C) and targets to a scalar.
        optimizer: called with the parameters and `lr`: a class of torch.optim or a partial of one. The default is SGD
            with `momentum` and `nesterov`, which other optimizers do not use.
        passes: passes over the training images per epoch.
        draw_images: whether each seed draws its own `train_images`; otherwise they are the first.

    Raises SettingError, a ValueError, for an invalid value, such as a dropout that the network does not take.
    """

    name: str
    network: Callable[..., nn.Module]
    dropout: float | None = None
    epochs: int = 25
    train_images: int | None = None
    batch_size: int = 64
    learning_rate: float = 0.01
    decay: float = 0.1
    decay_epochs: int = 6
    momentum: float = 0.9
    rotation: float = 0.0
    jitter: float = 0.0
    shift: float = 0.0
    scale: float = 0.0
    schedule: str | Callable[[float], float] = "steps"
    nesterov: bool = False
    ema: float = 0.0
    held_out: bool = False
    data: str | Callable[[], Dataset] = "mnist"
    transform: Transform | None = None
    loss: Loss = F.cross_entropy
    optimizer: Callable[..., Any] | None = None
    passes: int = 1
    draw_images: bool = False

    def __init_subclass__(cls) -> None:
        _refuse_subclass(cls)

    def __post_init__(self) -> None:
        _use_python_numbers(self)
        _require_slug("name", self.name)
        _require_callable("network", self.network, "a class or function that makes a network")
        if self.dropout is not None:
            _require_number("dropout", self.dropout, 0, 1)
        if self.dropout and not self.takes("dropout"):
            raise SettingError(
                f"dropout must be left out or 0, since {name_of(self.network)} takes none, not {self.dropout!r}"
            )
        self._require_sound_data()
        for name in ("epochs", "batch_size", "decay_epochs", "passes"):
            _require_whole(name, getattr(self, name), 1)
        for name, most in (("decay", 1), ("momentum", 1), ("rotation", 180), ("jitter", 1), ("scale", 0.9)):
            _require_number(name, getattr(self, name), 0, most)
        _require_number("learning_rate", self.learning_rate, 0)
        _require_number("shift", self.shift, 0)
        _require_number("ema", self.ema, 0, 0.9999)
        sound = callable(self.schedule) or (isinstance(self.schedule, str) and self.schedule in SCHEDULES)
        _require(sound, "schedule", f"a function or one of {', '.join(SCHEDULES)}", self.schedule)
        sound = type(self.nesterov) is bool and (not self.nesterov or self.momentum > 0)
        _require(sound, "nesterov", "True, with a momentum above 0, or False", self.nesterov)
        if self.transform is not None:
            _require_callable("transform", self.transform, "a function of images and labels")
        _require_callable("loss", self.loss, "a function of logits and targets")
        if self.optimizer is not None:
            _require_callable("optimizer", self.optimizer, "a class of torch.optim or a partial of one")

    def _require_sound_data(self) -> None:
        sound = callable(self.data) or (isinstance(self.data, str) and self.data in DATASETS)
        _require(sound, "data", f"a function or one of {', '.join(DATASETS)}", self.data)
        _require(type(self.held_out) is bool, "held_out", "True or False", self.held_out)
        _require(type(self.draw_images) is bool, "draw_images", "True or False", self.draw_images)
        if isinstance(self.data, str):  # each has 60,000 training images
            most = 50_000 if self.held_out else 60_000
            count = most if self.train_images is None else self.train_images
            sound = type(count) is int and 1 <= count <= 60_000
            _require(sound, "train_images", "a whole number from 1 to 60,000", count)
            sound = count <= most
            _require(sound, "held_out", "False, or True with at most 50,000 train_images", self.held_out)
            object.__setattr__(self, "train_images", count)
        elif self.train_images is not None:
            _require_whole("train_images", self.train_images, 1)

    def takes(self, setting: str) -> bool:
        """Return whether the network takes a keyword of this name."""
        if getattr(self.network, "__init__", None) is nn.Module.__init__:  # it takes any keyword, but refuses it later
            return False
        try:
            parameters = inspect.signature(self.network).parameters.values()
        except (TypeError, ValueError):  # a callable without a signature
            return False
        return any(parameter.name == setting or parameter.kind == parameter.VAR_KEYWORD for parameter in parameters)

    def changed_by(self, condition: Condition) -> "Recipe":
        """Apply a condition's changes. Raises SettingError if the two do not fit."""
        try:
            return replace(self, **condition.changes)
        except SettingError as error:
            raise SettingError(f"{condition.label} ({condition.slug}) with recipe {self.name}: {error}") from None

    @property
    def augmentation(self) -> Augmentation:
        return Augmentation(self.rotation, self.jitter, self.shift, self.scale)

    def learning_rates(self, epoch: int) -> list[float]:
        """The learning rate of each step of an epoch, counted from 1; `train_images` must be a number."""
        assert self.train_images is not None, "the number of steps depends on train_images"
        steps = self.passes * math.ceil(self.train_images / self.batch_size)
        if self.schedule == "steps":
            return [self.learning_rate * self.decay ** ((epoch - 1) // self.decay_epochs)] * steps
        numbers, total = range((epoch - 1) * steps, epoch * steps), self.epochs * steps
        if self.schedule == "one-cycle":
            return [self._one_cycle(number, total) for number in numbers]
        return [self.learning_rate * self.factor(number / total) for number in numbers]

    def factor(self, done: float) -> float:
        """The factor of the learning rate at a share of training done. Raises SettingError for an invalid factor."""
        if self.schedule == "cosine":
            return (1 + math.cos(math.pi * done)) / 2
        if isinstance(self.schedule, str):
            return 1.0
        factor = _as_python(self.schedule(done))
        sound = isinstance(factor, Real) and 0 <= float(factor) < math.inf
        _require(sound, "schedule", f"a function that gives a finite number from 0, at {done:.4g} too", factor)
        return float(factor)

    def _one_cycle(self, step: int, steps: int) -> float:
        """The learning rate of torch's OneCycleLR with pct_start=0.2."""
        first, last = self.learning_rate / 25, self.learning_rate / 25 / 1e4
        top = max(0.2 * steps - 1, 0)
        if step <= top:
            start, end, part = first, self.learning_rate, step / top if top else 1.0
        else:
            start, end, part = self.learning_rate, last, (step - top) / (steps - 1 - top)
        return end + (start - end) * (1 + math.cos(math.pi * part)) / 2


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


PLAIN = Recipe("plain", PlainNet, dropout=0.04, rotation=15.0)
BOTTLENECK = Recipe("bottleneck", BottleneckNet, dropout=0.0, rotation=7.0, jitter=0.1)
RECIPES = {recipe.name: recipe for recipe in (PLAIN, BOTTLENECK)}


@dataclass(frozen=True)
class Run:
    """One training run: a recipe, a condition and a seed."""

    recipe: Recipe
    condition: Condition
    seed: int

    def __str__(self) -> str:
        return f"{self.condition.label} ({self.condition.slug}), seed {self.seed}"

    @cached_property
    def settings(self) -> Recipe:
        """The recipe, with the condition's changes."""
        return self.recipe.changed_by(self.condition)

    def folder(self, out: str | Path) -> Path:
        """The run's folder under `out`."""
        return Path(out) / self.recipe.name / self.condition.slug / f"seed-{self.seed}"


def name_of(thing: Any) -> str:
    """Return a short name for tables: that of a function or class, or of an object's class."""
    if isinstance(thing, partial):
        return name_of(thing.func)
    return getattr(thing, "__name__", type(thing).__name__)


def build_model(recipe: Recipe, condition: Condition) -> nn.Module:
    """Build the network with the condition's normalisation; torch's global generator draws its weights.

    Raises SettingError if the condition needs a normalisation or a setting that the network does not take.
    """
    recipe = recipe.changed_by(condition)
    norm = condition.norm
    if condition.num_splits is not None:
        norm = partial(GhostBatchNorm, num_splits=condition.num_splits)
    if norm is not None and not recipe.takes("norm"):
        raise SettingError(
            f"{condition.label} ({condition.slug}) needs a network that takes `norm`, the maker of the normalisation "
            f"layer for a number of channels; {name_of(recipe.network)} does not"
        )
    arguments = {"norm": norm, "dropout": recipe.dropout if recipe.takes("dropout") else None}
    return recipe.network(**{name: value for name, value in arguments.items() if value is not None})
