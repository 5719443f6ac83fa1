"""What is read of the user's code, and how it travels."""

import inspect
import linecache
import pickle
import sys
import types
from collections import namedtuple
from dataclasses import dataclass
from enum import Enum
from functools import cached_property, lru_cache, partial, wraps
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import s6lib
from s6lib.lab.source import pack, source_of, what_is_read


class Settings:
    epochs, weight = 5, 0.1


SHARES, LATE = {"l1": 0.5, "l2": 0.5}, 0.3


def deeper(model):
    return LATE * (model.sum() if model.dim() else helper(model))


def helper(model):  # the two call each other
    return deeper(model)


class Own(nn.Module):
    def forward(self, model):
        return Settings.weight * SHARES["l1"] * helper(model)


class Derived(Own):
    def __init__(self):
        super().__init__()
        self.smooth = nn.CrossEntropyLoss(label_smoothing=0.1)


def test_what_code_reads_and_derives_from_counts_though_it_stands_elsewhere():
    numbers = {"Settings.weight": 0.1, "SHARES.l1": 0.5, "deeper.LATE": 0.3}
    assert what_is_read(Own()) == numbers | {one.__name__: inspect.getsource(one) for one in (helper, deeper)}
    derived = what_is_read(Derived())
    assert derived.items() >= {"Own": inspect.getsource(Own), "smooth.label_smoothing": 0.1}.items()
    assert {"helper", "deeper.LATE"} <= derived.keys()


class Limit:
    def __init__(self, most):
        self.most = most

    def penalty(self, model):
        return self.most * self.share

    @property
    def share(self):
        return LATE

    late = cached_property(share.fget)


def importing(model):
    from test_source import LATE

    return LATE


def scaled(factor):
    return lambda function: wraps(function)(lambda model: factor * function(model))


@dataclass(frozen=True, slots=True)
class Scaled:
    _weight: float

    def __call__(self, model):
        return self._weight * cached(1)


@lru_cache
def cached(size):
    return LATE


Point = namedtuple("Point", ["limit", "other"])
LIMIT, LIMITS, POINT, ALL = Limit(30.0), (np.array([30.0]), torch.tensor(31.0)), Point(30.0, 1.0), [deeper, helper]
PART, EPOCHS, NOTHING, MODE = partial(scaled, factor=0.1), {21, 20}, None, Enum("Mode", ["SOFT", "HARD"]).SOFT
NESTED = {"loss": {"limit": LIMIT, "class": type("Later", (Settings,), {})}}


@pytest.mark.parametrize(
    ("code", "read"),
    [
        (LIMIT.penalty, {"most": 30.0, "Limit.LATE": 0.3}),
        (lambda model: LIMIT.penalty(model), {"LIMIT.most": 30.0, "LIMIT.share.LATE": 0.3}),
        (lambda model: LIMITS[0], {"LIMITS": [[30.0], 31.0]}),
        (lambda model: POINT.limit, {"POINT.limit": 30.0}),
        (scaled(0.1)(deeper), {"factor": 0.1, "LATE": 0.3}),
        (lambda model: NESTED["loss"]["limit"].most, {"NESTED.loss.limit.most": 30.0}),
        (lambda model: NESTED["loss"]["class"].weight, {"NESTED.loss.class.weight": 0.1}),
        (lambda model: [one(model) for one in ALL], {"ALL.0.LATE": 0.3}),
        (lambda model: PART(model), {"PART.factor": 0.1, "PART.func": inspect.getsource(scaled)}),
        (lambda model: 20 in EPOCHS, {"EPOCHS": [20, 21]}),
        (lambda model: NOTHING or MODE, {"NOTHING": None, "MODE": ["Mode.SOFT", "1"]}),
        (lambda model: [SHARES[one] for one in ("l1", "l2")], {"SHARES.l2": 0.5}),
        (lambda model: sum(SHARES.values()), {"SHARES.l2": 0.5}),
        (lambda model: LIMIT.late, {"LIMIT.late.LATE": 0.3}),
        (importing, {"test_source.LATE": 0.3}),
        (torch.ones(1), {"value": [1.0]}),
        (lambda model, kind="l2": SHARES[kind], {"SHARES.l2": 0.5}),
        (Scaled(0.1), {"_weight": 0.1, "cached": inspect.getsource(cached), "cached.LATE": 0.3}),
    ],
)
def test_what_objects_sequences_and_decorators_hold_is_read(code, read):
    assert what_is_read(code).items() >= read.items()


CELL = """class Counting:
    count = 0

    def __init__(self):
        Counting.count += 1
"""


def test_a_class_of_a_notebook_is_known_by_its_source_though_it_counts(monkeypatch):
    """`inspect` finds such a source by the lines of a method, and not by the class, whose module has no file."""
    monkeypatch.setitem(linecache.cache, "a cell", (len(CELL), None, CELL.splitlines(keepends=True), "a cell"))
    typed = {"__name__": "a_notebook"}
    exec(compile(CELL + "norm = lambda channels: Counting()", "a cell", "exec"), typed)
    assert what_is_read(typed["norm"]) == {"Counting": CELL}


def test_what_a_comprehension_reads_counts_and_an_attribute_with_the_name_of_a_variable_does_not():
    typed = {"__name__": "a_prompt", "late": 0.3, "size": 28}
    exec("def penalty(model): return sum(late * one.size for one in model)", typed)
    assert what_is_read(typed["penalty"]) == {"late": 0.3}


def test_functions_of_one_name_in_two_files_are_both_read():
    for file in (files := [{"__name__": "a_prompt", "late": late} for late in (0.3, 0.4)]):
        exec("def scale(model): return late\ndef penalty(model): return scale(model)", file)
    read = what_is_read(lambda model: [file["penalty"](model) for file in files])
    assert (read["scale.late"], read["scale.late'"]) == (0.3, 0.4)


def test_a_function_that_many_call_is_read_once():
    """Each of 40 pairs calls both of the pair below, which makes 2^40 ways down."""
    pair = "def f{0}(x): return f{1}(x) + g{1}(x)\ndef g{0}(x): return f{1}(x) - g{1}(x)\n"
    typed = {"__name__": "a_prompt"}
    exec("f0 = g0 = abs\n" + "".join(pair.format(number, number - 1) for number in range(1, 41)), typed)
    assert len(what_is_read(typed["f40"])) == 78


def test_a_lambda_or_a_dataclass_is_known_by_its_own_source():
    """Though a lambda's line is no Python, or holds another: Python tells the two apart from 3.11 on."""
    (alone,) = ((
        lambda model: helper(model)),)  # fmt: skip
    pair = (lambda model: 1), (lambda model: 2)
    assert source_of(alone) == "lambda model: helper(model)"
    assert source_of(Scaled(0.1)) == inspect.getsource(Scaled)
    assert list(map(source_of, pair)) == ["lambda model: 1", "lambda model: 2"] or sys.version_info < (3, 11)


def test_a_source_that_is_not_what_runs_or_that_cannot_be_had_is_left_out(tmp_path, monkeypatch):
    file = tmp_path / "edited_after_import.py"
    file.write_text("def penalty(model):\n    return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    import edited_after_import

    assert "return 1" in source_of(edited_after_import.penalty)
    file.write_text("def penalty(model):\n    return 2\n")
    assert source_of(edited_after_import.penalty) is None
    typed = {"__name__": "a_prompt"}
    exec("def typed(channels): return channels", typed)
    assert source_of(typed["typed"]) is None


PENALTIES = """
from functools import lru_cache

def penalty(model): return zero(1)

@lru_cache
def zero(size): return 0.0

cached = lru_cache(maxsize=None)(penalty)
"""


def calling(penalty):
    return lambda model: penalty(model)


def test_code_that_a_worker_cannot_import_is_sent_to_it(monkeypatch):
    """That of a module without a file, and of a file whose name begins as s6lib's folder does; cached or not."""
    for file in (None, f"{Path(s6lib.__file__).parent}_ideas.py"):
        module = types.ModuleType("ideas")
        exec(PENALTIES, vars(module))
        if file:
            module.__file__ = file
        monkeypatch.setitem(sys.modules, "ideas", module)
        contents = [pack(code, [code]) for code in (module.penalty, calling(module.cached), module.cached)]
        monkeypatch.delitem(sys.modules, "ideas")
        assert [pickle.loads(content)(None) for content in contents] == [0.0, 0.0, 0.0]
