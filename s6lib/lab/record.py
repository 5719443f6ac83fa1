"""What run.json says of a run, and whether a recorded run is the requested one."""

import ast
import math
import textwrap
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from s6lib import models
from s6lib.errors import SettingError, StudyError
from s6lib.lab.source import attributes_of, source_of, what_is_read
from s6lib.recipes import Condition, Recipe, Run, name_of, pieces

_CODE = {"network", "norm", "penalty", "transform", "batch_transform", "loss", "optimizer", "schedule", "data"}
COLUMNS = ("epoch", "lr", "train_loss", "train_accuracy", "penalty", "val_loss", "val_accuracy", "seconds")
OTHER_CODE = "other code in"
# Relative. Torch 2.5, 2.11 and 2.14 differ by up to 7e-6 in a loss and 6e-3 in a gradient, over 30 networks: where two
# pixels of a pool nearly tie, or a ReLU is nearly at zero, the gradient jumps.
TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 2e-2

_PLAIN_TYPES = (int, float, str, bool, type(None))
# Settings added after the first published runs, from `shift` on: run.json omits them at their defaults.
_LATER_SETTINGS = {setting.name for setting in fields(Recipe)[12:]}


def identity(run: Run, steps: dict[str, Any] | None = None) -> dict[str, Any]:
    """The run's identity, as JSON: recipe, condition, seed and, with the user's code, its first steps."""
    settings = {"recipe": recipe_entry(run.recipe), "condition": condition_entry(run.condition), "seed": run.seed}
    return settings | ({} if steps is None else {"first_steps": steps})


def recipe_entry(recipe: Recipe) -> dict[str, Any]:
    """A recipe as JSON."""
    return {
        setting.name: setting_entry(getattr(recipe, setting.name))
        for setting in fields(recipe)
        if setting.name not in _LATER_SETTINGS or getattr(recipe, setting.name) != setting.default
    }


def condition_entry(condition: Condition) -> dict[str, Any]:
    """A condition as JSON: always its penalties and splits, and the other settings if they are used."""
    entry = {name: getattr(condition, name) for name in ("slug", "label", "l1", "l2", "num_splits")}
    more = {"norm": condition.norm, "penalty": condition.penalty, "changes": condition.changes}
    return entry | {name: setting_entry(value) for name, value in more.items() if value}


def setting_entry(value: Any) -> Any:
    """A setting as JSON.

    A library's class or function becomes its name, a partial or an object of one its name and arguments. The user's
    code becomes its name and source; its first steps identify it too (see trial.py).
    """
    if isinstance(value, Placeholder):
        return value.entry
    if isinstance(value, _PLAIN_TYPES):
        return value
    if isinstance(value, list | tuple):
        return [setting_entry(one) for one in value]
    if isinstance(value, Mapping):
        return {str(name): setting_entry(one) for name, one in value.items()}
    if isinstance(value, partial):
        arguments = setting_entry({**dict(enumerate(value.args)), **value.keywords})
        return {"name": name_of(value.func), "partial": setting_entry(value.func), "arguments": arguments}
    if _is_in_library(value):
        in_models = value.__module__ == "s6lib.models"  # run.json names s6lib's networks without their module
        return value.__name__ if in_models else f"{value.__module__}.{value.__qualname__}"
    if callable(value) and _is_in_library(type(value)):
        arguments = {name: setting_entry(one) for name, one in attributes_of(value).items() if name[0] != "_"}
        return {"name": name_of(value), "instance": setting_entry(type(value)), "arguments": arguments}
    reads = what_is_read(value)
    return {"name": name_of(value), "source": source_of(value)} | ({"reads": reads} if reads else {})


def _is_in_library(thing: Any) -> bool:
    """Return whether a class or function can be found by its name in s6lib, torch or torchvision."""
    module, name = getattr(thing, "__module__", None) or "", getattr(thing, "__qualname__", None) or ""
    if module.partition(".")[0] in ("s6lib", "torch", "torchvision"):
        with suppress(AttributeError, ValueError):  # ValueError: a name with <locals>
            return resolve_name(f"{module}:{name}") is thing
    return False


def is_library(setting: Any) -> bool:
    """Return whether a setting contains no code of the user's, so that its entry in run.json defines it."""
    return all(isinstance(piece, _PLAIN_TYPES) or _is_in_library(piece) for piece in pieces(setting))


def has_user_code(run: Run) -> bool:
    """Return whether a run contains any code of the user's."""
    return not all(map(is_library, run.parts.values()))


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


def read_recipe(entry: dict[str, Any]) -> Recipe:
    """Read a recipe from its entry, with placeholders for the user's code."""
    return Recipe(**_settings(entry))


def read_condition(entry: dict[str, Any]) -> Condition:
    """Read a condition from its entry, with placeholders for the user's code."""
    settings = _settings(entry)
    return Condition(**settings | {"changes": _settings(settings.get("changes", {}))})


def _settings(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _code(value) if name in _CODE else value for name, value in entry.items()}


def _code(entry: Any) -> Any:
    """Make a network of s6lib, alone or with numbers as arguments; nothing else that run.json names is imported."""
    match entry:
        case str() if entry in models.NETWORKS:
            return models.NETWORKS[entry]
        case {"partial": str() as network, "arguments": arguments} if network in models.NETWORKS:
            if all(isinstance(value, int | float) for value in arguments.values()):
                positional = [value for name, value in arguments.items() if name.isdecimal()]
                keywords = {name: value for name, value in arguments.items() if not name.isdecimal()}
                return partial(models.NETWORKS[network], *positional, **keywords)
    is_code = isinstance(entry, dict) or (isinstance(entry, str) and "." in entry)
    return Placeholder(entry) if is_code else entry


# --- comparing -------------------------------------------------------------------------------------------------------


def differences(recorded: dict[str, Any], requested: dict[str, Any]) -> list[str]:
    """Describe how a recorded run differs from the requested one, a phrase each; none if it is that run.

    Both are entries of run.json: recipe, condition and seed, or those of them that matter, and `first_steps` for a run
    with the user's code. With first steps, the syntax trees of that code are compared too, where both sources are
    known, since what acts seldom or late does not show in three steps.
    """
    steps, there = requested.get("first_steps"), recorded.get("first_steps")
    wanted = {name: requested[name] for name in ("recipe", "condition", "seed") if name in requested}
    phrases = compare({name: recorded.get(name) for name in wanted}, wanted, tolerance=0)
    # Before version 0.3, which records all learning rates, the first steps alone told whether code had changed.
    if "learning rates" not in (there or {}):
        phrases = [phrase for phrase in phrases if not phrase.startswith(OTHER_CODE)]
    if phrases or steps is None:
        return phrases
    return ["no record of its first steps"] if there is None else compare(there, steps, shared=True)


def require_same(folder: Path, recorded: dict[str, Any], requested: dict[str, Any]) -> None:
    """Raise StudyError if the run in a folder differs from the requested one."""
    if phrases := differences(recorded, requested):
        raise StudyError(
            f"{folder} was trained with different settings: {'; '.join(phrases[:3])}. Ask for those, or give what you "
            "changed a new name, or use another folder"
        )


def compare(old: Any, new: Any, name: str = "", *, shared: bool = False, tolerance: float = TOLERANCE) -> list[str]:
    """Describe how two entries differ, a phrase for each difference.

    Args:
        shared: whether to compare only what both have: an argument that one lacks is a default, which the first steps
            compare, or is new in another version of a library.
        tolerance: the relative difference that numbers may have.
    """
    if _is_source(old) and _is_source(new):
        if edits := _edits(f"{OTHER_CODE} {name}", old["source"], new["source"]):
            return edits
        was, now = (entry.get("reads", {}) for entry in (old, new))
        shared_names = [key for key in now if key in was]
        return [edit for key in shared_names for edit in _edits(f"{OTHER_CODE} {name}, {key}", was[key], now[key])]
    phrases: list[str] = []
    if isinstance(old, dict) and isinstance(new, dict):
        if name == "parameters" and old.keys() != new.keys():
            names = sorted(old.keys() ^ new.keys())
            return [f"other parameters (only one of the two has {', '.join(names[:3])})"]
        keys = [key for key in {**old, **new} if key != "label" and (not shared or (key in old and key in new))]
        if _is_source(new.get("partial")) and "arguments" in old:  # an argument may act late, as code may
            alone = sorted(old["arguments"].keys() ^ new["arguments"].keys())
            phrases += [f"{OTHER_CODE} {name}, with and without {', '.join(alone)}"] if alone else []
        shared = shared or "instance" in new or _is_source(new.get("partial"))
        parts = [(key, old.get(key), new.get(key)) for key in keys]
    elif name == "checksums" and old != new:
        return ["other images or labels"]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        one = name.removesuffix("s")
        parts = [(f"{one} {place}", *pair) for place, pair in enumerate(zip(old, new, strict=True), 1)]
    elif old == new or (isinstance(old, float) and isinstance(new, float) and _is_close(name, old, new, tolerance)):
        return []
    elif name == "learning rates":  # a digest
        return ["other learning rates"]
    else:
        return [f"{name} = {_describe(old)}, not {_describe(new)}"]
    for key, was, now in parts:
        phrases += compare(was, now, key, shared=shared, tolerance=tolerance)
    return phrases


def _edits(name: str, was: Any, now: Any) -> list[str]:
    """Describe the edit of a source or a number, if there is one."""
    if repr(was) == repr(now):  # nan equals nan
        return []
    if isinstance(was, str | None) and isinstance(now, str | None):
        return [name] if len({_syntax_tree(was), _syntax_tree(now)} - {None}) == 2 else []
    return [f"{name} = {was}, not {now}"]


def _is_close(name: str, old: float, new: float, tolerance: float) -> bool:
    tolerance = GRADIENT_TOLERANCE if name == "gradient" else tolerance
    return (math.isnan(old) and math.isnan(new)) or math.isclose(old, new, rel_tol=tolerance, abs_tol=1e-5 * tolerance)


def _syntax_tree(source: str | None) -> str | None:
    """The syntax tree of a source without docstrings, as text; None if there is no source, or it is not whole."""
    source = source or "?"
    for text in (textwrap.dedent(source), f"({source}\n)", f"if True:\n{source}"):
        with suppress(SyntaxError):  # of a lambda over two lines, or a comment at the left of a method
            tree = ast.parse(text)
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
                    node.body = node.body[1:]
            return ast.dump(tree)
    return None


def _is_source(entry: Any) -> bool:
    return isinstance(entry, dict) and "source" in entry


def _describe(entry: Any) -> str:
    if isinstance(entry, dict) and "name" in entry:
        return str(entry["name"])
    return f"{entry:.6g}" if isinstance(entry, float) else repr(entry)
