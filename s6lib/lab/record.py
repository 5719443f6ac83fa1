"""What run.json says of a run, and whether a recorded run is the requested one."""

import ast
import dis
import inspect
import math
import os
import sys
import sysconfig
import textwrap
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import lru_cache, partial
from pathlib import Path
from pkgutil import resolve_name
from types import CodeType
from typing import Any

import numpy as np
from torch import nn

from s6lib import models
from s6lib.errors import SettingError, StudyError
from s6lib.recipes import Condition, Recipe, Run, as_python, name_of, pieces

_CODE = {"network", "norm", "penalty", "transform", "batch_transform", "loss", "optimizer", "schedule", "data"}
COLUMNS = ("epoch", "lr", "train_loss", "train_accuracy", "penalty", "val_loss", "val_accuracy", "seconds")
OTHER_CODE = "other code in"
# Relative. Torch 2.5, 2.11 and 2.14 differ by up to 7e-6 in a loss and 6e-3 in a gradient, over 30 networks: where two
# pixels of a pool nearly tie, or a ReLU is nearly at zero, the gradient jumps.
TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 2e-2

_LIBRARIES = ("site-packages", "dist-packages", f"{Path(__file__).parents[1]}{os.sep}", sysconfig.get_path("stdlib"))
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
        attributes = {**vars(value), **vars(value).get("_modules", {})}
        settings = {name: setting_entry(one) for name, one in attributes.items() if name[0] != "_"}
        return {"name": name_of(value), "instance": setting_entry(type(value)), "arguments": settings}
    reads = _reads(value)
    return {"name": name_of(value), "source": _source(value)} | ({"reads": reads} if reads else {})


def _reads(thing: Any) -> dict[str, Any]:
    """What the user's code reads, by name: numbers, and the sources of the user's other code, as far as it goes."""
    entries, known, todo = dict[str, Any](), [_kind_of(thing)], [("", thing)]
    for path, one in todo:  # which grows
        for name, value in _names_in(one).items():
            is_code = _is_users_code(value) or (callable(value) and _is_users_code(type(value)))
            if (numbers := _numbers_in(value)) is not None:
                entries[path + name] = numbers
            elif (is_code or isinstance(value, nn.Module)) and value not in known:
                entries |= {name: _source(value)} if is_code else {}
                todo.append((f"{name}." if is_code else f"{path}{name}.", value))
                known.append(value)
    return entries


def _numbers_in(value: Any) -> Any:
    """A number, or a few in a list, a tuple or an array; None for anything else."""
    if isinstance(value, np.ndarray) and value.size <= 100:
        value = value.tolist()
    if isinstance(value, list | tuple) and 0 < len(value) <= 100:
        numbers = [_numbers_in(one) for one in value]
        return None if None in numbers else numbers
    return as_python(value) if type(as_python(value)) in (int, float, bool) else None


def _names_in(thing: Any) -> dict[str, Any]:
    """The attributes, base classes and defaults of code, its variables in closure and module, and what these hold."""
    kind = _kind_of(thing)
    read: dict[str, Any] = {base.__name__: base for base in getattr(kind, "__mro__", ())[1:]}
    functions = [] if _is_in_library(kind) else _functions_of(kind)
    for function in {**dict.fromkeys(functions), **dict.fromkeys(map(inspect.unwrap, functions))}:
        if is_installed(function.__code__.co_filename):  # such as torch's around the step of an optimizer's class
            continue
        words = {word for code in _with_inner(function.__code__) for word in (*code.co_names, *code.co_consts)}
        for name, value in variables_of(function).items():
            read |= {name: value, **{f"{name}.{word}": one for word, one in _members(value, words).items()}}
        read |= {name: one.default for name, one in inspect.signature(function).parameters.items()}
    owner = thing.__self__ if inspect.ismethod(thing) else thing
    read |= {} if owner is thing else {type(owner).__name__: type(owner)}
    own = {} if owner is kind else {**getattr(owner, "__dict__", {}), **getattr(owner, "_modules", {})}
    return read | {name: value for name, value in own.items() if name[0] != "_" and name != "training"}


def _members(value: Any, words: set[Any]) -> dict[Any, Any]:
    """What an object, such as one of settings, holds under these names; of code with a source, nothing more."""
    if _is_users_code(value) and _source(value):  # a class may also count there
        return {}
    kind = type(value)
    fields = {*getattr(kind, "_fields", ()), *getattr(kind, "__slots__", ())}  # of a named tuple, for example
    methods = {word for word in words if isinstance(word, str) and inspect.isfunction(getattr(kind, word, None))}
    inside = value if isinstance(value, Mapping) else getattr(value, "__dict__", {})
    members = {word: getattr(value, word, None) for word in methods | (words & fields)}
    return members | {word: inside[word] for word in words & inside.keys()}


def _is_users_code(thing: Any) -> bool:
    """Return whether a thing is a function, or a class with methods, from no installed file."""
    file = getattr(sys.modules.get(getattr(thing, "__module__", None) or ""), "__file__", None)
    return bool(_functions_of(thing)) and not is_installed(file)


def _kind_of(thing: Any) -> Any:
    return thing if isinstance(thing, type) or inspect.isroutine(thing) else type(thing)


def variables_of(function: Any) -> dict[str, Any]:
    """The variables of its module and closure that a function reads, but for those that are not set yet."""
    module, code = function.__globals__, function.__code__
    steps = [step for inner in _with_inner(code) for step in dis.get_instructions(inner)]
    names = {step.argval for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    variables = {name: module[name] for name in sorted(names & module.keys())}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # it is empty
            variables[name] = cell.cell_contents
    return variables


def is_installed(file: str | None) -> bool:
    """Return whether a file is Python's, s6lib's or an installed package's, which a worker has too."""
    return any(library in (file or "") for library in _LIBRARIES)


def _functions_of(kind: Any) -> list[Any]:
    """The methods and properties of a class; of a function, itself."""
    members = vars(kind).values() if isinstance(kind, type) else [kind]
    members = [one.fget if isinstance(one, property) else getattr(one, "__func__", one) for one in members]
    return list(filter(inspect.isfunction, members))


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


def _source(thing: Any) -> str | None:
    """Return the source of a function or class, or None if Python cannot find it or its file has been edited."""
    thing = _kind_of(thing)
    if _is_in_library(thing):  # such as Tensor, of class weights
        return None
    with suppress(Exception):  # Python finds a source, or it does not
        functions = [inspect.unwrap(function) for function in _functions_of(thing)]
        lines, first = inspect.findsource(functions[0] if functions else thing)
        if {function.__code__ for function in functions} <= _codes_in(text := "".join(lines)):
            if isinstance(thing, type):
                return _class_source(thing.__name__, first + 1, text)
            return _lambda_source(thing, text) or "".join(inspect.getblock(lines[first:]))
    return None


@lru_cache(maxsize=256)  # it searches the whole text
def _class_source(name: str, line: int, text: str) -> str:
    """Return the source of the class of this name around a line; `inspect` finds none of a notebook's."""
    classes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef) and node.name == name]
    (found,) = (node for node in classes if node.lineno <= line <= (node.end_lineno or 0))
    start = min([found.lineno, *(one.lineno for one in found.decorator_list)])
    return "".join(text.splitlines(keepends=True)[start - 1 : found.end_lineno])


def _lambda_source(thing: Any, text: str) -> str | None:
    """Return the source of a lambda without the rest of its lines, which may be no Python, or hold another lambda."""
    code = getattr(thing, "__code__", None)
    if code is None or code.co_name != "<lambda>":
        return None
    found = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Lambda)]
    found = [node for node in found if node.lineno == code.co_firstlineno]
    if len(found) > 1 and hasattr(code, "co_positions"):  # from Python 3.11 on
        columns = {column for _, _, column, _ in code.co_positions() if column}
        found = [node for node in found if node.body.col_offset in columns]
    return ast.get_source_segment(text, found[0]) if len(found) == 1 else None


@lru_cache(maxsize=8)  # each run of a study asks anew
def _codes_in(text: str) -> set[CodeType]:
    return set(_with_inner(compile(text, "", "exec", dont_inherit=True)))


def _with_inner(code: CodeType) -> list[CodeType]:
    """A code object, and those of the functions and comprehensions in it."""
    codes = [code]
    for one in codes:  # which grows
        codes += [constant for constant in one.co_consts if isinstance(constant, CodeType)]
    return codes


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
    """The syntax tree of a function, a class or the only lambda in a source, as text; None if there is no such tree."""
    with suppress(SyntaxError, IndexError):  # IndexError: there is no source
        tree = ast.parse(textwrap.dedent(source or "").strip())
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        if isinstance(tree.body[0], ast.FunctionDef | ast.ClassDef):
            return ast.dump(tree)
        lambdas = [node for node in ast.walk(tree) if isinstance(node, ast.Lambda)]
        whole = getattr(tree.body[0], "value", None) in lambdas
        return ast.dump(lambdas[0]) if whole or len(lambdas) == 1 else None
    return None


def _is_source(entry: Any) -> bool:
    return isinstance(entry, dict) and "source" in entry


def _describe(entry: Any) -> str:
    if isinstance(entry, dict) and "name" in entry:
        return str(entry["name"])
    return f"{entry:.6g}" if isinstance(entry, float) else repr(entry)
