"""Recipes and conditions as JSON in run.json, read back, and described differences between them."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import partial
from importlib import import_module
from types import CodeType
from typing import Any

from torch import nn

from s6lib import models
from s6lib.errors import SettingError
from s6lib.recipes import Condition, Recipe, Run, name_of

_PLAIN_TYPES = (int, float, str, bool, type(None))
# Settings added after the first published runs: run.json omits them at their defaults.
_LATER_SETTINGS = {
    "shift", "scale", "schedule", "nesterov", "ema", "held_out", "data", "transform", "loss", "optimizer", "passes",
    "draw_images",
}  # fmt: skip


def settings_of(run: Run) -> dict[str, Any]:
    """Recipe, condition and seed of a run, as JSON."""
    return {
        "recipe": recipe_entry(run.recipe),
        "condition": condition_entry(run.condition),
        "seed": run.seed,
    }


def recipe_entry(recipe: Recipe) -> dict[str, Any]:
    """A recipe as JSON."""
    return {
        setting.name: _entry(getattr(recipe, setting.name))
        for setting in fields(recipe)
        if setting.name not in _LATER_SETTINGS or getattr(recipe, setting.name) != setting.default
    }


def condition_entry(condition: Condition) -> dict[str, Any]:
    """A condition as JSON: always its penalties and splits, and the other settings if they are used."""
    entry = {name: getattr(condition, name) for name in ("slug", "label", "l1", "l2", "num_splits")}
    more = {"norm": condition.norm, "penalty": condition.penalty, "changes": condition.changes}
    return entry | {name: _entry(value) for name, value in more.items() if value}


def _entry(value: Any) -> Any:
    """A setting as JSON.

    A library's class or function becomes its name, a partial or an object of one its name and arguments. The user's
    code becomes its name and source, for people to read: the first steps identify it (see first_steps.py).
    """
    if isinstance(value, Placeholder):
        return value.entry
    if isinstance(value, _PLAIN_TYPES):
        return value
    if isinstance(value, list | tuple):
        return [_entry(one) for one in value]
    if isinstance(value, Mapping):
        return {str(name): _entry(one) for name, one in value.items()}
    if isinstance(value, partial):
        arguments = {str(place): _entry(one) for place, one in enumerate(value.args)}
        arguments |= {name: _entry(one) for name, one in value.keywords.items()}
        return {"name": name_of(value.func), "partial": _entry(value.func), "arguments": arguments}
    if _is_in_library(value):
        in_models = value.__module__ == "s6lib.models"  # run.json names s6lib's networks without their module
        return value.__name__ if in_models else f"{value.__module__}.{value.__qualname__}"
    if callable(value) and _is_in_library(type(value)):
        settings = {name: _entry(one) for name, one in vars(value).items() if name[0] != "_" and _is_setting(one)}
        return {"name": name_of(value), "instance": _entry(type(value)), "arguments": settings}
    return {"name": name_of(value), "source": _source(value)}


def _is_setting(value: Any) -> bool:
    """Return whether an attribute of a library's object is a setting: a number, a text, another such object."""
    if isinstance(value, list | tuple):
        return all(map(_is_setting, value))
    return isinstance(value, _PLAIN_TYPES) or (callable(value) and _is_in_library(type(value)))


def _is_in_library(thing: Any) -> bool:
    """Return whether a class or function can be found by its name in s6lib, torch or torchvision."""
    module, name = getattr(thing, "__module__", None) or "", getattr(thing, "__qualname__", None) or ""
    if module.partition(".")[0] not in ("s6lib", "torch", "torchvision") or "<locals>" in name:
        return False
    holder: Any = import_module(module)
    for part in name.split("."):
        holder = getattr(holder, part, None)
    return holder is thing


def is_library(setting: Any) -> bool:
    """Return whether a setting contains no code of the user's, so that its entry in run.json defines it."""
    if isinstance(setting, partial):
        return all(map(is_library, (setting.func, *setting.args, *setting.keywords.values())))
    if isinstance(setting, list | tuple):
        return all(map(is_library, setting))
    return isinstance(setting, _PLAIN_TYPES) or _is_in_library(setting)


def has_user_code(run: Run) -> bool:
    """Return whether a run contains any code of the user's."""
    settings = [getattr(run.settings, setting.name) for setting in fields(run.settings)]
    return not all(map(is_library, [*settings, run.condition.norm, run.condition.penalty]))


def _source(thing: Any) -> str | None:
    """Return the source of a function or class, or None if Python cannot find it or its file has been edited."""
    thing = thing if isinstance(thing, type) or inspect.isroutine(thing) else type(thing)
    members = vars(thing).values() if isinstance(thing, type) else [inspect.unwrap(thing)]
    codes = {member.__code__ for member in members if inspect.isfunction(member)}
    with suppress(Exception):  # the source is for people to read; nothing depends on it
        lines, _ = inspect.findsource(thing)
        if codes <= set(_codes_in(compile("".join(lines), "", "exec", dont_inherit=True))):
            return inspect.getsource(thing)
    return None


def _codes_in(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes_in(constant)


# --- reading back ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Placeholder:
    """A stand-in for a user's setting that run.json describes: it has a name, but cannot be called."""

    entry: Any = field(hash=False)

    @property
    def __name__(self) -> str:
        return self.entry if isinstance(self.entry, str) else self.entry["name"]

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise SettingError(
            f"{self.__name__} is known from run.json alone, which cannot make it: give the recipe and the conditions "
            "themselves to Study"
        )


def has_placeholder(run: Run) -> bool:
    """Return whether a setting of a run is known from run.json alone, so that the run cannot be built."""
    parts = (*vars(run.settings).values(), run.condition.norm, run.condition.penalty)
    return any(isinstance(part, Placeholder) for part in parts)


def read_recipe(entry: dict[str, Any]) -> Recipe:
    """Read a recipe from its entry, with placeholders for the user's code."""
    return Recipe(**_settings(entry))


def read_condition(entry: dict[str, Any]) -> Condition:
    """Read a condition from its entry, with placeholders for the user's code."""
    settings = _settings(entry)
    return Condition(**settings | {"changes": _settings(settings.get("changes", {}))})


def _settings(entry: Mapping[str, Any]) -> dict[str, Any]:
    settings = dict(entry)
    for name in {"network", "norm", "penalty", "transform", "loss", "optimizer", "schedule", "data"} & settings.keys():
        value = settings[name]
        if name == "network":
            settings[name] = _library_network(value) or Placeholder(value)
        elif isinstance(value, dict) or (isinstance(value, str) and "." in value):
            settings[name] = Placeholder(value)
    return settings


def _library_network(entry: Any) -> Callable[..., nn.Module] | None:
    """Return a network of s6lib, alone or with numbers as arguments; nothing else that run.json names is imported."""
    if isinstance(entry, str):
        return models.NETWORKS.get(entry)
    network, arguments = entry.get("partial"), entry.get("arguments", {})
    if not isinstance(network, str) or not all(isinstance(value, int | float) for value in arguments.values()):
        return None
    positional = [value for name, value in arguments.items() if name.isdecimal()]
    keywords = {name: value for name, value in arguments.items() if not name.isdecimal()}
    return partial(models.NETWORKS[network], *positional, **keywords) if network in models.NETWORKS else None


# --- comparing -------------------------------------------------------------------------------------------------------


def differences(recorded: dict[str, Any], requested: dict[str, Any]) -> list[str]:
    """Describe how the settings of a recorded run differ from the requested ones, a phrase each.

    Labels are ignored, and so are the name and source of the user's code, which the first steps compare.
    """
    phrases = []
    for name, new in requested.items():
        old = recorded.get(name)
        if name == "label" or (_is_source(old) and _is_source(new)):
            continue
        if isinstance(old, dict) and isinstance(new, dict) and not _is_source(old) and not _is_source(new):
            phrases += differences(*_comparable(old, new))
        elif old != new:
            phrases.append(f"{name} = {_describe(old)}, not {_describe(new)}")
    return phrases


def _comparable(old: dict[str, Any], new: dict[str, Any]) -> list[dict[str, Any]]:
    """Reduce two entries to the parts to compare: everything, except for objects and for partials of the user's code.

    Of those, compare only the arguments that both entries have. An argument that one lacks is a default, which the
    first steps compare, or is new in another version of a library.
    """
    kind = next((kind for kind in ("partial", "instance") if kind in old and kind in new), None)
    if kind is None:
        return [old, {**dict.fromkeys(old), **new}]
    names = old["arguments"].keys() | new["arguments"].keys()
    if kind == "instance" or _is_source(new[kind]):
        names = old["arguments"].keys() & new["arguments"].keys()
    return [{kind: one[kind], **{name: one["arguments"].get(name) for name in sorted(names)}} for one in (old, new)]


def _is_source(entry: Any) -> bool:
    return isinstance(entry, dict) and "source" in entry


def _describe(entry: Any) -> str:
    return str(entry["name"]) if isinstance(entry, dict) and "name" in entry else repr(entry)
