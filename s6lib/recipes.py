"""Recipes (how a study trains), conditions (what it compares), and the network and data that they name."""

import inspect
import math
import re
from collections.abc import Callable, Hashable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache, partial
from itertools import chain
from numbers import Real
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from s6lib.data import DATASETS, Augmentation, ImageDataset, Transform, hold_out, load_data, normalise
from s6lib.errors import SettingError
from s6lib.models import NETWORKS, BottleneckNet, PlainNet
from s6lib.norm import GhostBatchNorm
from s6lib.train import l1_l2_penalty

Norm = Callable[[int], nn.Module]  # makes the normalisation layer for a number of channels
Penalty = Callable[[nn.Module], Tensor | float]  # from a model to a scalar that is added to the loss
Loss = Callable[[Tensor, Tensor], Tensor]  # from logits and targets to a scalar
BatchTransform = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # from images and labels to images and targets
SCHEDULES = ("steps", "one-cycle", "cosine", "constant")
SLUG = r"[a-z0-9]+([-_.][a-z0-9]+)*"  # of a folder, so it must not lead to another folder

# --- what each setting must be ---------------------------------------------------------------------------------------

Check = tuple[Callable[[Any], bool], str]  # whether a value is sound, and what it must be, in words


def _number(most: float = math.inf) -> Check:
    expected = "a finite number from 0" + (f" to {most:g}" if most < math.inf else "")
    return lambda value: type(value) in (int, float) and 0 <= value <= most and value < math.inf, expected


def _one_of(names: tuple[str, ...], function: str) -> Check:
    expected = f"a function {function}, or one of {', '.join(names)}"
    return lambda value: callable(value) or (isinstance(value, str) and value in names), expected


_WHOLE: Check = (lambda value: type(value) is int and value >= 1, "a whole number from 1")
_TRUE_OR_FALSE: Check = (lambda value: type(value) is bool, "True or False")
_NAME: Check = (
    # The str of an Enum is not its value; a folder's name has at most 255 letters.
    lambda value: isinstance(value, str) and bool(re.fullmatch(SLUG, str(value))) and len(value) <= 200,
    "lower-case words joined by -, _ or ., of 200 letters at most",
)
_CHECKS: dict[str, Check] = {
    **dict.fromkeys(("epochs", "batch_size", "decay_epochs", "passes", "train_images", "num_splits"), _WHOLE),
    **dict.fromkeys(("learning_rate", "shift", "l1", "l2"), _number()),
    **dict.fromkeys(("decay", "momentum", "jitter", "dropout"), _number(1)),
    **dict.fromkeys(("held_out", "draw_images", "nesterov"), _TRUE_OR_FALSE),
    **dict.fromkeys(("name", "slug"), _NAME),
    "label": (lambda value: isinstance(value, str), "text"),
    "rotation": _number(180),
    "scale": _number(0.9),
    "ema": _number(0.9999),
    "schedule": _one_of(SCHEDULES, "of the share of training done"),
    "data": _one_of(tuple(DATASETS), "that gives the training and the test set"),
    "network": (callable, "a class or function that makes a network"),
    "norm": (callable, "a function or a class that makes a layer"),
    "penalty": (callable, "a function of the model"),
    "loss": (callable, "a function of logits and targets"),
    "transform": (callable, "a function of an image"),
    "batch_transform": (callable, "a function of images and labels"),
    "optimizer": (callable, "a class of torch.optim or a partial of one"),
}
_OPTIONAL = ("train_images", "dropout", "num_splits", "norm", "penalty", "transform", "batch_transform", "optimizer")


def _require_sound(settings: Mapping[str, Any]) -> None:
    """Raise SettingError for the first setting that is not as `_CHECKS` says."""
    for name, value in settings.items():
        sound, expected = _CHECKS[name]
        if name in ("network", "norm") and isinstance(value, nn.Module):
            kind = type(value).__name__
            raise SettingError(f"{name} must be {expected}: give the class {kind}, not a {kind} already made")
        if name in ("penalty", "loss", "transform", "batch_transform") and isinstance(value, type):
            raise SettingError(f"{name} must be {expected}: give an instance, {value.__name__}(...), not the class")
        _require(sound(value) or (value is None and name in _OPTIONAL), name, expected, value)


def _require(met: bool, name: str, expected: str, value: Any) -> None:
    if not met:
        raise SettingError(f"{name} must be {expected}, not {short(value)}")


def short(value: Any) -> str:
    """The repr of a value in one short line, for a message."""
    return shorten(repr(value), 90, placeholder="...")


def as_python(value: Any) -> Any:
    """Turn a number of numpy, for example from np.logspace, into a number of Python, in a partial too."""
    parts = pieces(value) if isinstance(value, partial | tuple) else [value]
    known = {id(one): one.item() if isinstance(one, np.generic) else one for one in parts}
    # deepcopy keeps what its memo holds.
    return deepcopy(value, known) if any(isinstance(one, np.generic) for one in parts) else value


def pieces(setting: Any) -> list[Any]:
    """The functions, objects and numbers of which a setting is made: itself, or those in a partial or a list."""
    if isinstance(setting, partial):
        setting = [setting.func, *setting.args, *setting.keywords.values()]
    return [piece for one in setting for piece in pieces(one)] if isinstance(setting, list | tuple) else [setting]


def name_of(thing: Any) -> str:
    """Return a short name for tables: that of a function or class, or of an object's class."""
    if isinstance(thing, partial):
        return name_of(thing.func)
    return getattr(thing, "__name__", type(thing).__name__)


def _word(value: Any) -> str:
    if isinstance(value, partial):
        value = [value.func, *value.args, *value.keywords.items()]
    if isinstance(value, list | tuple):
        return "-".join(map(_word, value))
    if callable(value):
        return name_of(value)
    return re.sub(r"e[+]?(-?)0*", r"e\1", f"{value:g}") if type(value) is float else str(value)


class _Settings:
    def __init_subclass__(cls) -> None:
        if cls.__module__ != __name__:
            raise SettingError(
                f"{cls.__bases__[0].__name__} cannot be subclassed, since a run records only the settings: pass your "
                "own function as a setting, such as `schedule` or `penalty`"
            )


# --- conditions and recipes ------------------------------------------------------------------------------------------


@dataclass(frozen=True, init=False)
class Condition(_Settings):
    """One way of training: a name, and what it changes in the recipe.

    Args:
        slug: name of its folder, and on the command line; by default made from what the condition changes.
        label: name in tables and figures; by default the slug.
        l1: weight of the L1 penalty, the sum of |w| over all trainable parameters.
        l2: weight of the L2 penalty, the sum of w^2 over all trainable parameters.
        num_splits: ghost batches per batch, or None for BatchNorm2d.
        norm: your own normalisation instead: makes the layer for a number of channels.
        penalty: your own penalty, from the model to a scalar that is added to the loss.
        settings: settings of the recipe that this condition changes, such as `optimizer=torch.optim.AdamW` or
            `epochs=3`, kept in `changes`. It cannot change data and held_out, since conditions are compared on the same
            test images.

    Raises SettingError, a ValueError, for an invalid value.
    """

    slug: str
    label: str
    l1: float
    l2: float
    num_splits: int | None
    norm: Norm | None
    penalty: Penalty | None
    changes: Mapping[str, Any] = field(hash=False)

    def __init__(
        self,
        slug: str = "",
        label: str = "",
        *,
        l1: float = 0.0,
        l2: float = 0.0,
        num_splits: int | None = None,
        norm: Norm | None = None,
        penalty: Penalty | None = None,
        changes: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        own = {"l1": l1, "l2": l2, "num_splits": num_splits, "norm": norm, "penalty": penalty}
        own = {name: as_python(value) for name, value in own.items()}
        _require(isinstance(changes, Mapping | None), "changes", "a mapping of settings to values", changes)
        changes = {name: as_python(value) for name, value in {**(changes or {}), **settings}.items()}
        names = [setting.name for setting in fields(Recipe) if setting.name not in ("name", "data", "held_out")]
        for name in changes:
            _require(name in names, "a condition's change", f"a setting of the recipe, {', '.join(names)}", name)
            idle = name in ("momentum", "nesterov") and changes.get("optimizer") is not None
            _require(not idle, name, "given to the optimizer itself", changes[name])
        _require_sound(own | changes)
        if not slug:  # make one, such as l1-0.006 or optimizer-adamw-learning_rate-0.001
            slug = _word([*({name: value for name, value in own.items() if value} | changes).items()]).lower()
            if not re.fullmatch(SLUG, slug):
                raise SettingError("a condition that changes nothing, or has unnamed code, needs a slug, as in 'mine'")
        vars(self).update({"slug": slug, "label": label or slug, **own, "changes": changes})
        _require_sound({"slug": slug, "label": self.label})
        _require(num_splits is None or norm is None, "norm", "left out where num_splits is given", norm)

    def __str__(self) -> str:
        return self.slug if self.label == self.slug else f"{self.label} ({self.slug})"

    def penalty_of(self, model: nn.Module) -> Tensor | float:
        """Compute the sum of the condition's penalties: a differentiable scalar, or 0 if it has none."""
        penalty = l1_l2_penalty(model, self.l1, self.l2)
        return penalty if self.penalty is None else penalty + self.penalty(model)


@dataclass(frozen=True)
class Recipe(_Settings):
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
            choices. Those images are then not trained on; a copy of a built-in recipe needs `train_images` of at most
            50,000 too.
        data: "mnist", "fashion-mnist", "kmnist", or a function that gives the training and the test set, two data sets
            of (image, label), see `s6lib.data.load_data`.
        transform: a data set's transform, as torchvision's: from one training image (1, H, H), uint8 and before
            normalisation, to one of the same size, of uint8 or from 0 to 1; drawn anew for each image.
        batch_transform: from the images (B, 1, H, H), augmented and normalised, and labels (B,) of a training batch to
            the images and targets to train on, such as CutMix of torchvision.transforms.v2.
        loss: from logits (B, C) and targets to a scalar. Parameters of its own are trained too.
        optimizer: called with the parameters and `lr`, the learning rate: a class of torch.optim, or a partial of one
            without `lr`. The default is SGD with `momentum` and `nesterov`, which other optimizers do not use.
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
    data: str | Callable[[], Any] = "mnist"
    transform: Transform | None = None
    loss: Loss = F.cross_entropy
    optimizer: Callable[..., Any] | None = None
    passes: int = 1
    draw_images: bool = False
    batch_transform: BatchTransform | None = None

    def __post_init__(self) -> None:
        vars(self).update({name: as_python(value) for name, value in vars(self).items()})
        _require_sound(vars(self))
        if isinstance(self.data, str):  # each has 60,000 training images
            most, where = (50_000, " with held_out") if self.held_out else (60_000, "")
            count = most if self.train_images is None else self.train_images
            _require(count <= most, "train_images", f"a whole number from 1 to {most:,}{where}", count)
            vars(self).update(train_images=count)
        _require(not self.nesterov or self.momentum > 0, "nesterov", "True, with a momentum above 0, or False", True)
        taken = self.takes("dropout") or not self.dropout
        _require(taken, "dropout", f"left out or 0, since {name_of(self.network)} takes none", self.dropout)
        _require(isinstance(self.data, Hashable), "data", "hashable (a dataclass with eq=False is)", self.data)
        rate = getattr(self.optimizer, "keywords", {}).get("lr")
        _require(rate is None, "lr", "left out of the optimizer: give the rate as `learning_rate`", rate)

    def takes(self, setting: str) -> bool:
        """Return whether the network takes a keyword of this name."""
        try:
            parameters = inspect.signature(self.network).parameters.values()
        except (TypeError, ValueError) as error:
            _require(not isinstance(self.network, partial), "network", "a partial that can be called", error)
            return False  # a callable without a signature
        return any(parameter.name == setting or parameter.kind == parameter.VAR_KEYWORD for parameter in parameters)

    def changed_by(self, condition: Condition) -> "Recipe":
        """Apply a condition's changes. Raises SettingError if the two do not fit."""
        try:
            recipe = replace(self, **condition.changes)
            splits = condition.num_splits or 1
            _require(splits <= recipe.batch_size, "num_splits", f"at most the batch size, {recipe.batch_size}", splits)
            return recipe
        except SettingError as error:
            raise SettingError(f"{condition} with recipe {self.name}: {error}") from None

    @property
    def augmentation(self) -> Augmentation:
        return Augmentation(self.rotation, self.jitter, self.shift, self.scale)

    def learning_rates(self, epoch: int) -> list[float]:
        """The learning rate of each step of an epoch, counted from 1; `train_images` must be a number.

        Raises SettingError if the user's schedule gives an invalid factor.
        """
        assert self.train_images is not None, "the number of steps depends on train_images"
        steps = self.passes * math.ceil(self.train_images / self.batch_size)
        if self.schedule == "steps":
            return [self.learning_rate * self.decay ** ((epoch - 1) // self.decay_epochs)] * steps
        numbers = range((epoch - 1) * steps, epoch * steps)
        return [self._learning_rate(number, self.epochs * steps) for number in numbers]

    def _learning_rate(self, step: int, steps: int) -> float:
        """The learning rate of a step, counted from 0, for every schedule but "steps"."""
        done = step / steps
        if self.schedule == "cosine":
            return self.learning_rate * ((1 + math.cos(math.pi * done)) / 2)
        if self.schedule == "one-cycle":  # torch's OneCycleLR with pct_start=0.2
            start, end, top = self.learning_rate / 25, self.learning_rate, max(0.2 * steps - 1, 0)
            part = step / top if top else 1.0
            if step > top:
                start, end, part = end, start / 1e4, (step - top) / (steps - 1 - top)
            return end + (start - end) * (1 + math.cos(math.pi * part)) / 2
        if isinstance(self.schedule, str):  # constant
            return self.learning_rate
        factor = as_python(self.schedule(done))
        sound = isinstance(factor, Real) and 0 <= float(factor) < math.inf
        _require(sound, "schedule", f"a function that gives a finite number from 0, at {done:.4g} too", factor)
        return self.learning_rate * float(factor)


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
        return f"{self.condition}, seed {self.seed}"

    @cached_property
    def settings(self) -> Recipe:
        """The recipe, with the condition's changes."""
        return self.recipe.changed_by(self.condition)

    @property
    def parts(self) -> dict[str, Any]:
        """All settings of the run, with the condition's norm and penalty."""
        return {**vars(self.settings), "norm": self.condition.norm, "penalty": self.condition.penalty}

    @property
    def is_built_in(self) -> bool:
        """Whether the run has parts of s6lib's alone, whose settings are checked where they are made."""
        known = (F.cross_entropy, *NETWORKS.values())
        parts = pieces(list(self.parts.values()))
        return all(isinstance(part, int | float | str | None) or any(part is one for one in known) for part in parts)

    def folder(self, out: str | Path) -> Path:
        """The run's folder under `out`."""
        return Path(out) / self.recipe.name / self.condition.slug / f"seed-{self.seed}"


def build_model(recipe: Recipe, condition: Condition, train: ImageDataset | None = None) -> nn.Module:
    """Build the network with the condition's normalisation; torch's global generator draws its weights.

    Two images of `train` give lazy layers their sizes. Raises SettingError if the condition needs a normalisation or a
    setting that the network does not take, or if the network is no module with parameters to train.
    """
    recipe, norm = recipe.changed_by(condition), condition.norm
    if condition.num_splits is not None:
        norm = partial(GhostBatchNorm, num_splits=condition.num_splits)
    if norm is not None and not recipe.takes("norm"):
        raise SettingError(
            f"{condition} needs a network that takes `norm`, the maker of the normalisation "
            f"layer for a number of channels; {name_of(recipe.network)} does not"
        )
    arguments = {"norm": norm, "dropout": recipe.dropout if recipe.takes("dropout") else None}
    model = recipe.network(**{name: value for name, value in arguments.items() if value is not None})
    if not isinstance(model, nn.Module) or not any(weights.requires_grad for weights in model.parameters()):
        raise SettingError(f"`network` must make a torch.nn.Module with parameters to train, not {short(model)}")
    if condition.num_splits is not None and not any(isinstance(one, GhostBatchNorm) for one in model.modules()):
        raise SettingError(f"{condition} needs a network that uses `norm`, which {name_of(recipe.network)} ignores")
    if train is not None and any(map(is_lazy, chain(model.parameters(), model.buffers()))):
        model.eval()
        with torch.no_grad():
            model(normalise(train.images[:2].cpu(), train.mean, train.std))
    return model


@lru_cache(maxsize=1)
def load_images(data: str | Callable[[], Any], held_out: bool) -> tuple[ImageDataset, ImageDataset]:
    """Load the training and the test images of a recipe on the CPU; `held_out` replaces the test images.

    `load_images.cache_clear()` makes the next call load anew: a function that gives the data may give others then.
    """
    train, test = load_data(data)
    return hold_out(train) if held_out else (train, test)
