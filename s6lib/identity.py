"""What a network, a normalisation or a penalty of one's own is recorded as: its name, its source, and what it uses."""

import ast
import inspect
import linecache
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType
from typing import Any

Entry = str | dict[str, Any]  # as JSON holds it
_PLAIN_VALUES = (int, float, str, bool, type(None))


@dataclass(frozen=True)
class Recorded:
    """Stands for something of one's own that run.json alone tells of: it says what it was, but cannot make it."""

    entry: Entry = field(hash=False)

    @property
    def __name__(self) -> str:
        return self.entry if isinstance(self.entry, str) else self.entry["name"]

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise ValueError(
            f"{self.__name__} is known from run.json alone, which cannot make it: give the recipe and the conditions "
            "themselves to Study"
        )


def described(thing: Callable) -> Entry:
    """What a class, a function or a partial is: its name if a library holds it, else its source and what it uses too.

    Layout and comments do not count. Functions and numbers that the source takes from around it do; whole modules do
    not. Raises ValueError if the source cannot be had, as of what is typed at a prompt.
    """
    return _described(thing, ())


def _described(thing: Any, within: tuple) -> Entry:
    if isinstance(thing, Recorded):
        return thing.entry
    if isinstance(thing, partial):
        arguments = {str(place): _value(value, within) for place, value in enumerate(thing.args)}
        arguments |= {name: _value(value, within) for name, value in thing.keywords.items()}
        return {"name": name_of(thing.func), "partial": _described(thing.func, within), "arguments": arguments}
    if not isinstance(thing, type | FunctionType):
        if is_library(type(thing)):  # a built-in function, say
            return name_of(thing)
        arguments = {name: _value(value, within) for name, value in vars(thing).items()}
        return {"name": name_of(thing), "instance": _described(type(thing), within), "arguments": arguments}
    if is_library(thing):
        in_models = thing.__module__ == "s6lib.models"  # the names by which run.json knows our own networks
        return thing.__name__ if in_models else f"{thing.__module__}.{thing.__qualname__}"
    entry: dict[str, Any] = {"name": name_of(thing), "source": _source(thing)}
    used = {} if thing in within else _used(thing, (*within, thing))
    return entry | ({"uses": used} if used else {})


def without_docstrings(source: str) -> str:
    """A recorded source without the words that change nothing; what is not Python comes back as it is."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return source
    with_words = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(tree):
        if isinstance(node, with_words) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def name_of(thing: Any) -> str:
    """A short name for tables: of a function or class its own, of an object its class's."""
    if isinstance(thing, partial):
        return name_of(thing.func)
    return getattr(thing, "__name__", type(thing).__name__)


def is_library(thing: Any) -> bool:
    """Whether an installed package, s6lib or Python itself holds it, so that a name says what it is."""
    package = (getattr(thing, "__module__", None) or "builtins").partition(".")[0]
    if package in ("s6lib", "torch", "torchvision") or package in sys.stdlib_module_names:
        return package != "__main__"
    file = getattr(sys.modules.get(package), "__file__", None) or ""
    return "site-packages" in file or "dist-packages" in file


def _value(value: Any, within: tuple) -> Any:
    if isinstance(value, _PLAIN_VALUES):
        return value
    if callable(value):
        return _described(value, within)
    return repr(value)


def _functions(thing: type | FunctionType) -> list[FunctionType]:
    if isinstance(thing, FunctionType):
        return [inspect.unwrap(thing)]
    members = (getattr(member, "__func__", member) for member in vars(thing).values())
    return [member for member in members if isinstance(member, FunctionType)]


def _source(thing: type | FunctionType) -> str:
    """The source without layout and comments.

    inspect.getsource knows no class of a notebook cell, and cuts lambdas out of their line. Of several lambdas that
    begin on one line all are taken.
    """
    kind = ast.ClassDef if isinstance(thing, type) else ast.Lambda if thing.__name__ == "<lambda>" else ast.FunctionDef
    for file, line in _places(thing):
        linecache.checkcache(file)
        nodes = ast.walk(ast.parse("".join(linecache.getlines(file))))
        found = [node for node in nodes if isinstance(node, kind) and _is(node, thing, line)]
        if found:
            return "\n".join(ast.unparse(node) for node in found)
    raise ValueError(
        f"the source of {name_of(thing)} cannot be had, so it cannot be recorded: define it in a file or in a cell"
    )


def _places(thing: type | FunctionType) -> list[tuple[str, int | None]]:
    """Files and lines that hold a part of a source."""
    codes = [function.__code__ for function in _functions(thing)]
    if codes:
        return [(code.co_filename, code.co_firstlineno) for code in codes]
    file = getattr(sys.modules.get(thing.__module__), "__file__", None)  # a class without a function of its own
    return [(file, None)] if file else []


def _is(node: ast.AST, thing: type | FunctionType, line: int | None) -> bool:
    """Whether a node is the definition of `thing`, a line of which is known; a decorator counts to its function."""
    if isinstance(node, ast.Lambda):
        return node.lineno == line
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return node.name == thing.__name__ and (line is None or first <= line <= node.end_lineno)


def _used(thing: type | FunctionType, within: tuple) -> dict[str, Any]:
    """The numbers, texts and own functions or classes that a source takes from around it, by name."""
    used: dict[str, Any] = {}
    for function in _functions(thing):
        variables = inspect.getclosurevars(function)
        for name, value in {**variables.globals, **variables.nonlocals}.items():
            own = isinstance(value, type | FunctionType | partial) and not is_library(value)
            if value not in within if own else isinstance(value, _PLAIN_VALUES):
                used[name] = _value(value, within)
    bases = [base for base in getattr(thing, "__bases__", ()) if not is_library(base)]
    return dict(sorted((used | {base.__name__: _described(base, within) for base in bases}).items()))
