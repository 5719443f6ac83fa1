"""What a study compares (conditions), how it trains (recipes), and how the two are recorded."""

import inspect
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from s6lib import models
from s6lib.data import HELD_OUT, Augmentation
from s6lib.identity import Recorded, described, is_library, name_of
from s6lib.models import BottleneckNet, PlainNet
from s6lib.norm import GhostBatchNorm
from s6lib.train import l1_l2_penalty

Norm = Callable[[int], nn.Module]  # makes the normalisation layer for a number of channels
Penalty = Callable[[nn.Module], Tensor]  # what is added to the loss, from a model: a scalar


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
    """One way of training: a name, and what it changes.

    Args:
        slug: name of its folder and on the command line.
        label: name in tables and figures; by default the slug.
        l1: weight of the sum of |w| over all trainable parameters, added to the loss.
        l2: weight of the sum of w^2, likewise.
        num_splits: ghost batches a batch, or None for BatchNorm2d.
        norm: a normalisation of one's own instead: makes the layer for a number of channels.
        penalty: a penalty of one's own, added to the loss: from the model, a scalar.
        changes: settings of the recipe that are others for this condition, by name. All but held_out: conditions are
            compared on the same digits.

    Raises ValueError for a value that makes no sense.
    """

    slug: str
    label: str = ""
    l1: float = 0.0
    l2: float = 0.0
    num_splits: int | None = None
    norm: Norm | None = None
    penalty: Penalty | None = None
    changes: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        _require_slug("slug", self.slug)
        _require(isinstance(self.label, str), "label", "text", self.label)
        object.__setattr__(self, "label", self.label or self.slug)
        _require_number("l1", self.l1, 0)
        _require_number("l2", self.l2, 0)
        if self.num_splits is not None:
            _require_whole("num_splits", self.num_splits, 1)
            _require(self.norm is None, "norm", "left out where num_splits is given", self.norm)
        for name in ("norm", "penalty"):
            value = getattr(self, name)
            _require(value is None or callable(value), name, "a function or a class", value)
        known = [setting.name for setting in fields(Recipe) if setting.name not in ("name", "held_out")]
        sound = isinstance(self.changes, Mapping) and all(name in known for name in self.changes)
        _require(sound, "changes", f"a dict of settings of the recipe, which are {', '.join(known)}", self.changes)

    def penalty_of(self, model: nn.Module) -> Tensor | float:
        """What this condition adds to the loss: its three penalties, a differentiable scalar, or 0 if it has none."""
        penalty = l1_l2_penalty(model, self.l1, self.l2)
        return penalty if self.penalty is None else penalty + self.penalty(model)


@dataclass(frozen=True)
class Recipe:
    """How a study trains, whatever its conditions change.

    Args:
        name: name of its folder and on the command line.
        network: makes the network; called with `norm` and `dropout` where it takes them.
        dropout: probability, for a network that takes it; None leaves the network's own.
        epochs: passes over the training images.
        train_images: how many of the 60,000, from the first.
        batch_size: images a step.
        learning_rate: of SGD; of "one-cycle" the highest.
        decay: by which "steps" multiplies the learning rate after every `decay_epochs`.
        momentum: of SGD.
        rotation, jitter, shift, scale: of the augmentation, see `s6lib.data.Augmentation`.
        schedule: "steps", or "one-cycle" (Smith and Topin, arXiv:1708.07120): from a 25th of the learning rate up to it
            in a fifth of all steps, and down to almost nothing, both along a cosine, step by step.
        nesterov: whether the momentum is Nesterov's.
        ema: what an exponential moving average of the weights keeps of itself at each step, such as 0.999; the average
            is then what is judged and saved. 0: no average.
        held_out: whether accuracy is measured on the last 10,000 training digits, for choices, and not on the test
            digits; `train_images` is then at most 50,000.

    Raises ValueError for a value that makes no sense, a dropout that the network does not take among them.
    """

    name: str
    network: Callable[..., nn.Module]
    dropout: float | None = None
    epochs: int = 25
    train_images: int = 60_000
    batch_size: int = 64
    learning_rate: float = 0.01
    decay: float = 0.1
    decay_epochs: int = 6
    momentum: float = 0.9
    rotation: float = 0.0
    jitter: float = 0.0
    shift: float = 0.0
    scale: float = 0.0
    schedule: str = "steps"
    nesterov: bool = False
    ema: float = 0.0
    held_out: bool = False

    def __post_init__(self) -> None:
        _require_slug("name", self.name)
        _require(callable(self.network), "network", "a class or function that makes a network", self.network)
        if self.dropout is not None:
            _require_number("dropout", self.dropout, 0, 1)
        if self.dropout and not self.takes("dropout"):
            raise ValueError(
                f"dropout must be left out or 0, since {name_of(self.network)} takes none, not {self.dropout!r}"
            )
        _require_whole("epochs", self.epochs, 1)
        _require_whole("train_images", self.train_images, 1, 60_000)
        sound = type(self.held_out) is bool and self.train_images <= 60_000 - self.held_out * HELD_OUT
        _require(sound, "held_out", "True, with at most 50,000 train_images, or False", self.held_out)
        _require_whole("batch_size", self.batch_size, 1, 60_000)
        _require_number("learning_rate", self.learning_rate, 0)
        _require_number("decay", self.decay, 0, 1)
        _require_whole("decay_epochs", self.decay_epochs, 1)
        _require_number("momentum", self.momentum, 0, 1)
        _require_number("rotation", self.rotation, 0, 180)
        _require_number("jitter", self.jitter, 0, 1)
        _require_number("shift", self.shift, 0, 28)
        _require_number("scale", self.scale, 0, 0.9)
        _require(self.schedule in ("steps", "one-cycle"), "schedule", "'steps' or 'one-cycle'", self.schedule)
        _require_number("ema", self.ema, 0, 0.9999)
        sound = type(self.nesterov) is bool and (not self.nesterov or self.momentum > 0)
        _require(sound, "nesterov", "True, with a momentum above 0, or False", self.nesterov)

    def takes(self, setting: str) -> bool:
        """Whether the network is made with a keyword of this name."""
        if isinstance(self.network, Recorded):
            return True
        if getattr(self.network, "__init__", None) is nn.Module.__init__:  # which takes any keyword, to refuse it later
            return False
        parameters = inspect.signature(self.network).parameters.values()
        return any(parameter.name == setting or parameter.kind == parameter.VAR_KEYWORD for parameter in parameters)

    def changed_by(self, condition: Condition) -> "Recipe":
        """The recipe by which a condition trains. Raises ValueError if the two do not fit."""
        try:
            return replace(self, **condition.changes)
        except ValueError as error:
            raise ValueError(f"{condition.label} ({condition.slug}) with recipe {self.name}: {error}") from error

    @property
    def augmentation(self) -> Augmentation:
        return Augmentation(self.rotation, self.jitter, self.shift, self.scale)

    def learning_rates(self, epoch: int) -> list[float]:
        """The learning rate of each step of an epoch, which is counted from 1."""
        steps = -(-self.train_images // self.batch_size)
        if self.schedule == "steps":
            return [self.learning_rate * self.decay ** ((epoch - 1) // self.decay_epochs)] * steps
        return [self._one_cycle((epoch - 1) * steps + step, self.epochs * steps) for step in range(steps)]

    def _one_cycle(self, step: int, steps: int) -> float:
        """As torch's OneCycleLR with a fifth of the steps upwards."""
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


def build_model(recipe: Recipe, condition: Condition) -> nn.Module:
    """The network with the condition's normalisation, its weights drawn from torch's global generator.

    Raises ValueError if the condition asks for a normalisation or a setting that the network does not take.
    """
    recipe = recipe.changed_by(condition)
    norm = condition.norm
    if condition.num_splits is not None:
        norm = partial(GhostBatchNorm, num_splits=condition.num_splits)
    if norm is not None and not recipe.takes("norm"):
        raise ValueError(
            f"{condition.label} ({condition.slug}) needs a network that takes `norm`, the maker of the normalisation "
            f"layer for a number of channels; {name_of(recipe.network)} does not"
        )
    arguments = {"norm": norm, "dropout": recipe.dropout if recipe.takes("dropout") else None}
    return recipe.network(**{name: value for name, value in arguments.items() if value is not None})


def try_out(recipe: Recipe, condition: Condition) -> None:
    """Build the model and put two blank images through it, before hours are spent on it.

    Raises ValueError, naming the condition, if that fails, the logits are not (2, 10), or the penalty is no scalar.
    """
    name = f"{condition.label} ({condition.slug}) with recipe {recipe.name}"
    recipe.changed_by(condition)  # names the two itself where they do not fit
    with torch.random.fork_rng([]):
        try:
            model = build_model(recipe, condition).eval()
            logits, penalty = model(torch.zeros(2, 1, 28, 28)), torch.as_tensor(condition.penalty_of(model))
        except Exception as error:  # of one's own code: any
            raise ValueError(f"{name} cannot be built: {type(error).__name__}: {error}") from error
    if not isinstance(logits, Tensor) or logits.shape != (2, 10):
        shape = tuple(getattr(logits, "shape", ()))
        raise ValueError(
            f"{name}: the network must turn images (N, 1, 28, 28) into logits (N, 10), not {shape} for N = 2"
        )
    if penalty.shape != ():
        raise ValueError(f"{name}: the penalty must be a scalar, not of shape {tuple(penalty.shape)}")


# --- what run.json says ----------------------------------------------------------------------------------------------


def recipe_entry(recipe: Recipe) -> dict[str, Any]:
    """A recipe as JSON, settings that came after the first published runs left out where they are not used."""
    settings = {setting.name: getattr(recipe, setting.name) for setting in fields(recipe)}
    later = ("shift", "scale", "schedule", "nesterov", "ema", "held_out")
    unused = [
        setting.name
        for setting in fields(recipe)
        if setting.name in later and settings[setting.name] == setting.default
    ]
    return _entry({name: value for name, value in settings.items() if name not in unused})


def condition_entry(condition: Condition) -> dict[str, Any]:
    """A condition as JSON, what is not its own left out but for the settings of the five conditions."""
    entry = {name: getattr(condition, name) for name in ("slug", "label", "l1", "l2", "num_splits")}
    own = {"norm": condition.norm, "penalty": condition.penalty, "changes": _entry(condition.changes)}
    return entry | _entry({name: value for name, value in own.items() if value})


def _entry(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: described(value) if callable(value) else value for name, value in settings.items()}


def recorded_recipe(entry: dict[str, Any]) -> Recipe:
    """The recipe of an entry; a network of one's own can then be named, but not made."""
    return Recipe(**_made(entry))


def recorded_condition(entry: dict[str, Any]) -> Condition:
    """The condition of an entry, likewise."""
    made = _made(entry)
    return Condition(**made | {"changes": _made(made.get("changes", {}))})


def _made(entry: Mapping[str, Any]) -> dict[str, Any]:
    made = dict(entry)
    for name in {"network", "norm", "penalty"} & made.keys():
        made[name] = _known(made[name]) or Recorded(made[name])
    return made


def _known(entry: Any) -> Callable[..., nn.Module] | None:
    """A network of the library, by itself or with numbers for arguments. What else a run.json names is not imported."""
    if isinstance(entry, str):
        return models.NETWORKS.get(entry)
    network, arguments = entry.get("partial"), entry.get("arguments", {})
    if not isinstance(network, str) or not all(isinstance(value, int | float) for value in arguments.values()):
        return None
    placed = [value for name, value in arguments.items() if name.isdecimal()]
    named = {name: value for name, value in arguments.items() if not name.isdecimal()}
    return partial(models.NETWORKS[network], *placed, **named) if network in models.NETWORKS else None


def layers(recipe: Recipe, condition: Condition) -> list[str]:
    """The layers of a model that is not wholly the library's own, for run.json; of the library's, none."""
    things = (recipe.changed_by(condition).network, condition.norm)
    if all(thing is None or is_library(thing) for thing in things):
        return []
    with torch.random.fork_rng([]):
        return repr(build_model(recipe, condition)).splitlines()
