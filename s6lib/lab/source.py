"""The user's code: its source, the numbers and the other code that it reads, and how it travels to a worker."""

import ast
import copyreg
import dis
import inspect
import math
import os
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from enum import Enum
from functools import cached_property, lru_cache, partial
from itertools import islice
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import cloudpickle
import numpy as np
from torch import Tensor, nn

from s6lib.recipes import as_python, pieces

_CACHED: Any = type(lru_cache(abs))
_ABSENT, _OF_MODULES = object(), {*vars(nn.Module()), "training"}
Words = dict[Any, None]  # in the order in which they stand

_LIBRARIES = ("site-packages", "dist-packages", f"{Path(__file__).parents[1]}{os.sep}", sysconfig.get_path("stdlib"))


def what_is_read(thing: Any) -> dict[str, Any]:
    """What the user's code reads, by name: numbers, and the sources of the user's other code, as far as it goes.

    Code leads to its variables, defaults, bases and attributes. Settings (objects, dicts, modules) lead only to what
    the code that reads them mentions, so that an edit of another setting does not matter.
    """
    if (numbers := _numbers_in(thing)) is not None:  # such as class weights
        return {"value": numbers}
    entries, seen = dict[str, Any](), {(id(_kind_of(thing)), 0)}
    todo = [("", *one) for one in _names_in(thing)]
    for path, name, value, words in todo:  # which grows
        numbers = _numbers_in(value)
        if numbers is not None or value is None:
            _add(entries, path + name, numbers)
            continue
        source, is_code = None, _is_users_code(value)
        key = (id(value), 0 if is_code else id(words))
        if key in seen:
            continue
        seen.add(key)
        if is_code:
            source = source_of(value)
            name = _add(entries, name, source)
            todo += [(f"{name}.", *one) for one in _names_in(value)]
        if source is None:  # a class that has a source may also count there
            with suppress(Exception):  # an object may raise anything when it is asked
                todo += [(path, f"{name}.{word}", one, words) for word, one in _members(value, words).items()]
    return entries


def _add(entries: dict[str, Any], name: str, entry: Any) -> str:
    """Add an entry, and return its name, which gets a mark if something else has it, such as in another file."""
    while repr(entries.get(name, entry)) != repr(entry):
        name += "'"
    entries[name] = entry
    return name


def _numbers_in(value: Any) -> Any:
    """A number, or a few in a list, a tuple, a set, a range, an array or a tensor, or an Enum; None for all else."""
    if isinstance(value, Enum):
        return [str(value), repr(value.value)]
    if isinstance(value, np.ndarray | Tensor):
        with suppress(Exception):  # such as one on the device "meta"
            value = value.tolist() if math.prod(value.shape) <= 100 else value
    if isinstance(value, set | frozenset | range) and len(value) <= 100:
        value = sorted(value, key=repr)
    if type(value) in (list, tuple) and 0 < len(value) <= 100:
        numbers = [_numbers_in(one) for one in value]
        return None if None in numbers else numbers
    return as_python(value) if type(as_python(value)) in (int, float, bool) else None


def _names_in(thing: Any) -> list[tuple[str, Any, Words]]:
    """The bases, variables, defaults and attributes of code, each with the names that this code mentions."""
    kind, mentioned = _kind_of(thing), dict[Any, None]()
    names = [(base.__name__, base, mentioned) for base in getattr(kind, "__mro__", ())[1:]]
    for function in _functions_of(kind):
        words = _words_in(function)
        variables = {name: one.default for name, one in inspect.signature(function).parameters.items()}
        variables |= _variables_of(function)
        words |= dict.fromkeys(value for value in variables.values() if isinstance(value, str))  # keys, too
        names += [(name, value, words) for name, value in variables.items()]
        mentioned |= words
    owner = thing.__self__ if inspect.ismethod(thing) else thing
    if not isinstance(thing, type):
        attributes = {type(owner).__name__: type(owner), **attributes_of(owner)}
        names += [(name, value, mentioned) for name, value in attributes.items()]
    return names


def attributes_of(owner: Any) -> dict[str, Any]:
    """The attributes of an object, with its slots and a module's layers and buffers, but without torch's own."""
    kinds = type(owner).__mro__
    slots = [name for kind in kinds for name, one in vars(kind).items() if inspect.ismemberdescriptor(one)]
    attributes = {name: getattr(owner, name, None) for name in slots}
    attributes |= getattr(owner, "__dict__", {})
    attributes |= {**getattr(owner, "_modules", {}), **getattr(owner, "_buffers", {})}
    return {name: value for name, value in attributes.items() if name[:2] != "__" and name not in _OF_MODULES}


def _members(value: Any, words: Words) -> dict[Any, Any]:
    """What an object, such as one of settings, holds under these names, and under those that its methods mention."""
    if isinstance(value, nn.Module):
        return attributes_of(value)
    if type(value) in (list, tuple):
        return dict(enumerate(value[:100]))
    if isinstance(value, partial):
        return {"func": value.func, **dict(enumerate(value.args)), **value.keywords}
    if isinstance(value, Mapping):
        mentioned = {word: value[word] for word in words if word in value}
        return mentioned or dict(islice(value.items(), 100))  # as in a loop over all of it
    if not _is_users(value if inspect.ismodule(value) or isinstance(value, type) else type(value)):
        return {word: vars(value)[word] for word in words if word in getattr(value, "__dict__", {})}
    members, todo = {}, list(map(str, words))
    for word in todo:  # which grows
        member = _unwrap(inspect.getattr_static(value, word, _ABSENT))
        if member is _ABSENT:
            continue
        if inspect.isfunction(member):
            todo += [more for more in map(str, _words_in(member)) if more not in todo]
        is_stored = inspect.ismemberdescriptor(member) or isinstance(value, tuple)  # of slots, or a named tuple
        members[word] = getattr(value, word, None) if is_stored else member
    words.update(dict.fromkeys(todo))  # a method may read what another object holds
    return members


def _words_in(function: FunctionType) -> Words:
    """The names and constants in a function, any of which may be that of an attribute or a key."""
    words = [word for code in _with_inner(function.__code__) for word in (*code.co_names, *code.co_consts)]
    for word in words:  # which grows
        words += word if isinstance(word, tuple | frozenset) else ()
    return dict.fromkeys(word for word in words if isinstance(word, str | int))


def _variables_of(function: Any) -> dict[str, Any]:
    """The variables of its module and closure that a function reads, if they are set, and the modules it imports."""
    module, code = function.__globals__, function.__code__
    steps = [step for inner in _with_inner(code) for step in dis.get_instructions(inner)]
    names = {step.argval for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    variables = {name: module[name] for name in sorted(names & module.keys())}
    imported = {step.argval for step in steps if step.opname == "IMPORT_NAME"}
    variables |= {name: sys.modules[name] for name in sorted(imported & sys.modules.keys())}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # it is empty
            variables[name] = cell.cell_contents
    return variables


def is_installed(file: str | None) -> bool:
    """Return whether a file is Python's, s6lib's or an installed package's, which a worker has too."""
    return any(library in (file or "") for library in _LIBRARIES)


def _is_users(thing: Any) -> bool:
    """Return whether a module, class or function is the user's: neither Python's, nor of an installed file."""
    name = thing.__name__ if inspect.ismodule(thing) else getattr(thing, "__module__", None) or ""
    file = getattr(sys.modules.get(name), "__file__", None)
    return name.partition(".")[0] not in sys.stdlib_module_names and not is_installed(file)


def _is_users_code(thing: Any) -> bool:
    """Return whether a thing is a function or class of the user's, or can be called since its class is one."""
    return callable(thing) and bool(_functions_of(_kind_of(thing)))


def _kind_of(thing: Any) -> Any:
    """A function or a class itself, the class of anything else."""
    return thing if isinstance(thing, type) or inspect.isroutine(thing) else type(thing)


def _functions_of(kind: Any) -> list[FunctionType]:
    """The user's methods and properties of a class; of a function, itself; and what these decorate."""
    members = list(map(_unwrap, vars(kind).values() if isinstance(kind, type) else [kind]))
    for one in members:  # which grows
        members += [one.__wrapped__] if callable(one) and hasattr(one, "__wrapped__") else []
    functions = [one for one in members if inspect.isfunction(one) and not is_installed(one.__code__.co_filename)]
    return [one for one in functions if one is kind or one.__code__.co_filename != "<string>"]  # as of dataclasses


def _unwrap(member: Any) -> Any:
    """The function inside a property or a method; anything else as it is."""
    if isinstance(member, cached_property):
        return member.func
    return member.fget if isinstance(member, property) else getattr(member, "__func__", member)


def source_of(thing: Any) -> str | None:
    """Return the source of a function or class, or None if Python cannot find it or its file has been edited."""
    kind = _kind_of(thing)
    if not _is_users(kind):  # such as Tensor, of class weights
        return None
    with suppress(Exception):  # Python finds a source, or it does not
        codes = [one.__code__ for one in _functions_of(kind) if not hasattr(one, "__wrapped__")]
        lines, line = inspect.findsource(codes[0] if codes else kind)
        if set(codes) <= _codes_in(text := "".join(lines)):
            name = kind.__name__ if isinstance(kind, type) else codes[0].co_name
            return _definition(text, name, line + 1, codes[0] if codes else None)
    return None


@lru_cache(maxsize=256)  # it searches the whole text
def _definition(text: str, name: str, line: int, code: Any) -> str:
    """Return the definition around a line of a text; `inspect` finds neither a notebook's class nor a lambda alone."""
    nodes: list[Any] = [node for node in ast.walk(ast.parse(text)) if hasattr(node, "lineno")]
    if name == "<lambda>":
        found = [node for node in nodes if isinstance(node, ast.Lambda) and node.lineno == line]
        if len(found) > 1:  # on one line; Python tells which from 3.11 on
            columns = {column for _, _, column, _ in code.co_positions()}
            found = [node for node in found if node.body.col_offset in columns]
        (node,) = found
        return ast.get_source_segment(text, node) or ""
    nodes = [node for node in nodes if getattr(node, "name", "") == name and hasattr(node, "decorator_list")]
    parts = [(min(one.lineno for one in (node, *node.decorator_list)), node.end_lineno) for node in nodes]
    start, end = max(part for part in parts if part[0] <= line <= part[1])  # the innermost
    return "".join(text.splitlines(keepends=True)[start - 1 : end])


@lru_cache(maxsize=8)  # each run of a study asks anew
def _codes_in(text: str) -> set[CodeType]:
    return set(_with_inner(compile(text, "", "exec", dont_inherit=True)))


def _with_inner(code: CodeType) -> list[CodeType]:
    """A code object, and those of the functions and comprehensions in it."""
    codes = [code]
    for one in codes:  # which grows
        codes += [constant for constant in one.co_consts if isinstance(constant, CodeType)]
    return codes


def pack(content: Any, parts: Iterable[Any]) -> bytes:
    """Pickle something for any process with s6lib, with the user's code in `parts`, be it in a file or a notebook."""
    used = [piece for part in parts for piece in pieces(part)]
    for function in filter(inspect.isfunction, list(used)):  # and what it calls, perhaps from another file
        used += _variables_of(function).values()
    names = {one.__name__ if inspect.ismodule(one) else getattr(one, "__module__", "") for one in used}
    with ExitStack() as registered:
        # Or it would be sought by its name in the worker.
        copyreg.pickle(_CACHED, lambda cached: (lru_cache, (cached.__wrapped__,)))
        registered.callback(copyreg.dispatch_table.pop, _CACHED, None)
        for module in (sys.modules[name] for name in names & sys.modules.keys()):
            if _is_users(module):
                cloudpickle.register_pickle_by_value(module)
                registered.callback(cloudpickle.unregister_pickle_by_value, module)
                warned = vars(module).pop("__warningregistry__", {})  # which warnings it has given changes nothing
                registered.callback(vars(module).update, __warningregistry__=warned)
        return cloudpickle.dumps(content)
