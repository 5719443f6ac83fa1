"""What run.json says of a run's settings, and which differences make it another run."""

import inspect
import linecache
import sys
from collections import namedtuple
from dataclasses import dataclass, replace
from functools import lru_cache, partial, wraps

import numpy as np
import pytest
from test_run import Tutorial
from torch import nn, ones, optim
from torchvision.transforms import v2

from s6lib.lab.record import condition_entry, differences, has_user_code, read_condition, read_recipe, recipe_entry
from s6lib.models import PlainNet, SeparableNet
from s6lib.recipes import ALL_CONDITIONS, CONTROL, PLAIN, Condition, Recipe, Run, build_model


def two_groups(channels):
    return nn.GroupNorm(2, channels)


GROUPS = Condition("groups", norm=two_groups)
WEIGHTED = Condition("weighted", loss=partial(nn.functional.cross_entropy, weight=ones(10)))
SMOOTH = partial(nn.functional.cross_entropy, label_smoothing=0.1)
LIBRARY = Condition("library", loss=SMOOTH, optimizer=partial(optim.AdamW, weight_decay=0.05), schedule="cosine")


@pytest.mark.parametrize(
    "condition", [*ALL_CONDITIONS.values(), GROUPS, LIBRARY, WEIGHTED, Condition("wild", dropout=0.0)]
)
def test_what_is_recorded_can_be_read_again(condition):
    entry = condition_entry(condition)
    again = read_condition(entry)
    assert condition_entry(again) == entry
    assert again == condition or condition in (GROUPS, LIBRARY, WEIGHTED)


def test_settings_that_are_not_used_are_not_recorded():
    """So that the first published runs, which knew nothing of them, are still runs of PLAIN."""
    assert set(recipe_entry(PLAIN)) == {
        "name", "network", "dropout", "epochs", "train_images", "batch_size", "learning_rate", "decay", "decay_epochs",
        "momentum", "rotation", "jitter",
    }  # fmt: skip
    changed = replace(
        PLAIN, schedule="one-cycle", shift=2.0, scale=0.1, nesterov=True, ema=0.9, held_out=True, train_images=9
    )
    for recipe in (PLAIN, changed):
        assert read_recipe(recipe_entry(recipe)) == recipe


@pytest.mark.parametrize("network", [partial(SeparableNet, width=14), partial(SeparableNet, 14)])
def test_a_network_of_the_library_with_numbers_can_be_made_from_what_is_recorded(network):
    again = read_recipe(recipe_entry(Recipe("small", network)))
    assert recipe_entry(again) == recipe_entry(Recipe("small", network))
    assert sum(weights.numel() for weights in build_model(again, CONTROL).parameters()) == 1_694


@pytest.mark.parametrize("network", [Tutorial, partial(Tutorial), partial(PlainNet, norm=nn.InstanceNorm2d)])
def test_what_is_ones_own_is_known_by_name_alone_and_cannot_be_made(network):
    entry = recipe_entry(Recipe("own", network))
    again = read_recipe(entry)
    assert recipe_entry(again) == entry
    with pytest.raises(ValueError, match=r"is known from run\.json alone, .* give the recipe and the conditions"):
        build_model(again, CONTROL)


def test_what_is_a_librarys_is_known_by_its_settings():
    assert not has_user_code(Run(PLAIN, LIBRARY, 1))
    entry = condition_entry(LIBRARY)["changes"]
    assert entry["loss"]["partial"] == "torch.nn.functional.cross_entropy"
    assert entry["loss"]["arguments"] == {"label_smoothing": 0.1}
    assert entry["optimizer"]["arguments"] == {"weight_decay": 0.05}
    assert recipe_entry(Recipe("a", PlainNet))["network"] == "PlainNet"
    norm = condition_entry(Condition("a", norm=nn.InstanceNorm2d))["norm"]
    assert norm == "torch.nn.modules.instancenorm.InstanceNorm2d"


@pytest.mark.parametrize(
    "settings",
    [{"norm": two_groups}, {"penalty": lambda model: 0}, {"batch_transform": v2.CutMix(num_classes=10)},
     {"schedule": lambda done: 1.0}, {"network": partial(PlainNet, two_groups)}],
)  # fmt: skip
def test_a_run_with_code_of_the_users_is_ones_own(settings):
    run = Run(PLAIN, Condition("a", **settings), 1)
    assert has_user_code(run)
    assert not run.is_built_in


# --- comparing -------------------------------------------------------------------------------------------------------


def requested(**settings):
    return {"condition": condition_entry(Condition("a", **settings)), "first_steps": {}}


def test_a_number_in_a_librarys_object_counts():
    erasing = [requested(batch_transform=v2.RandomErasing(p=p)) for p in (0.1, 0.11)]
    assert differences(*erasing) == ["p = 0.1, not 0.11"]
    nested = [requested(batch_transform=v2.Compose([v2.RandomErasing(p=p)])) for p in (0.1, 0.11)]
    assert differences(*nested)
    assert differences(requested(loss=SMOOTH), requested(loss=partial(SMOOTH, label_smoothing=0.2)))
    assert not differences(requested(loss=nn.CrossEntropyLoss()), requested(loss=nn.CrossEntropyLoss()))


def test_a_setting_that_one_version_of_an_object_lacks_is_no_difference():
    new, old = requested(batch_transform=v2.RandomErasing()), requested(batch_transform=v2.RandomErasing())
    old["condition"]["changes"]["batch_transform"]["arguments"]["retired"] = 1
    del old["condition"]["changes"]["batch_transform"]["arguments"]["inplace"]
    assert not differences(old, new)
    assert differences(old, requested(batch_transform=v2.GaussianNoise()))
    assert differences(requested(norm=nn.InstanceNorm2d), requested(norm=two_groups)) == [
        "norm = 'torch.nn.modules.instancenorm.InstanceNorm2d', not two_groups"
    ]


STEPS = {"evaluation": 1.0, "learning rates": "a digest"}


def with_source(source):
    return {"condition": {"penalty": {"name": "penalty", "source": source}}, "first_steps": STEPS}


SOURCE = "def penalty(model):\n    return 2 * model.sum()\n"


@pytest.mark.parametrize(
    ("source", "edited", "differs"),
    [
        (SOURCE, "    def penalty(model):\n\n        return (2 * model.sum())  # as before\n", False),
        (SOURCE, SOURCE.replace("2", "3"), True),
        (SOURCE, None, False),  # as typed at a prompt
        ("lambda x: x > 0.5", "lambda x: x > 0.6", True),
        ("lambda x: x > 0.5", "lambda x: x > 0.6)", False),  # no Python
    ],
)
def test_the_syntax_tree_of_code_counts_where_it_can_be_had(source, edited, differs):
    assert differences(with_source(source), with_source(edited)) == ["other code in penalty"] * differs


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
    entry, derived = (condition_entry(Condition("a", penalty=kind()))["penalty"] for kind in (Own, Derived))
    numbers = {"Settings.weight": 0.1, "SHARES.l1": 0.5, "deeper.LATE": 0.3}
    assert entry["reads"] == numbers | {one.__name__: inspect.getsource(one) for one in (helper, deeper)}
    assert derived["reads"].items() >= {"Own": inspect.getsource(Own), "smooth.label_smoothing": 0.1}.items()
    assert {"helper", "deeper.LATE"} <= derived["reads"].keys()
    for change, said in (
        ({"deeper": "def deeper(model): return 0"}, "deeper"),
        ({"deeper.LATE": 1}, "deeper.LATE = 0.3, not 1"),
    ):
        edited = {**entry, "reads": {**entry["reads"], **change}}
        both = [{"condition": {"penalty": one}, "first_steps": STEPS} for one in (entry, edited)]
        assert differences(*both) == [f"other code in penalty, {said}"]
    said = ["other code in loss, with and without flood"]
    more = [{**requested(loss=partial(helper, **keywords)), "first_steps": STEPS} for keywords in ({}, {"flood": 1.0})]
    assert differences(*more) == differences(*more[::-1]) == said


class Limit:
    def __init__(self, most):
        self.most = most

    def penalty(self, model):
        return self.most * self.share

    @property
    def share(self):
        return LATE


def scaled(factor):
    return lambda function: wraps(function)(lambda model: factor * function(model))


@dataclass(frozen=True)
class Scaled:
    weight: float

    def __call__(self, model):
        return self.weight * cached(1)


@lru_cache
def cached(size):
    return LATE


Point = namedtuple("Point", ["limit", "other"])
LIMIT, LIMITS, POINT, ALL = Limit(30.0), (30.0, np.float32(31.0)), Point(30.0, 1.0), [deeper, helper]
NESTED = {"loss": {"limit": LIMIT, "class": type("Later", (Settings,), {})}}


@pytest.mark.parametrize(
    ("code", "read"),
    [
        (LIMIT.penalty, {"most": 30.0, "Limit.LATE": 0.3}),
        (lambda model: LIMIT.penalty(model), {"LIMIT.most": 30.0, "LIMIT.share.LATE": 0.3}),
        (lambda model: LIMITS[0], {"LIMITS": [30.0, 31.0]}),
        (lambda model: POINT.limit, {"POINT.limit": 30.0}),
        (scaled(0.1)(deeper), {"factor": 0.1, "LATE": 0.3}),
        (lambda model: NESTED["loss"]["limit"].most, {"NESTED.loss.limit.most": 30.0}),
        (lambda model: NESTED["loss"]["class"].weight, {"NESTED.loss.class.weight": 0.1}),
        (lambda model: [one(model) for one in ALL], {"ALL.0.LATE": 0.3}),
        (Scaled(0.1), {"weight": 0.1, "cached": inspect.getsource(cached), "cached.LATE": 0.3}),
    ],
)
def test_what_objects_sequences_and_decorators_hold_is_read(code, read):
    assert condition_entry(Condition("a", penalty=code))["penalty"]["reads"].items() >= read.items()


CELL = """class Counting:
    count = 0

    def __init__(self):
        Counting.count += 1
"""


def test_what_a_dataclass_adds_to_a_class_hides_no_source():
    assert condition_entry(Condition("a", penalty=Scaled(0.1)))["penalty"]["source"] == inspect.getsource(Scaled)


def test_a_class_of_a_notebook_is_known_by_its_source_though_it_counts(monkeypatch):
    """`inspect` finds such a source by the lines of a method, and not by the class, whose module has no file."""
    monkeypatch.setitem(linecache.cache, "a cell", (len(CELL), None, CELL.splitlines(keepends=True), "a cell"))
    typed = {"__name__": "a_notebook"}
    exec(compile(CELL + "norm = lambda channels: Counting()", "a cell", "exec"), typed)
    assert condition_entry(Condition("a", norm=typed["norm"]))["norm"]["reads"] == {"Counting": CELL}


def test_what_a_comprehension_reads_counts_and_an_attribute_with_the_name_of_a_variable_does_not():
    typed = {"__name__": "a_prompt", "late": 0.3, "size": 28}
    exec("def penalty(model): return sum(late * one.size for one in model)", typed)
    assert condition_entry(Condition("a", penalty=typed["penalty"]))["penalty"]["reads"] == {"late": 0.3}


def test_a_function_that_many_call_is_read_once():
    """Each of 40 pairs calls both of the pair below, which makes 2^40 ways down."""
    pair = "def f{0}(x): return f{1}(x) + g{1}(x)\ndef g{0}(x): return f{1}(x) - g{1}(x)\n"
    typed = {"__name__": "a_prompt"}
    exec("f0 = g0 = abs\n" + "".join(pair.format(number, number - 1) for number in range(1, 41)), typed)
    assert len(condition_entry(Condition("a", penalty=typed["f40"]))["penalty"]["reads"]) == 78


def test_a_lambda_is_known_by_its_own_source():
    """Though its line is no Python, or holds another lambda: Python tells the two apart from 3.11 on."""
    (alone,) = ((
        lambda model: helper(model)),)  # fmt: skip
    pair = (lambda model: 1), (lambda model: 2)
    sources = [condition_entry(Condition("a", penalty=one))["penalty"]["source"] for one in (alone, *pair)]
    assert sources[0] == "lambda model: helper(model)"
    assert sources[1:] == ["lambda model: 1", "lambda model: 2"] or sys.version_info < (3, 11)


def test_runs_of_before_are_read():
    """Their run.json has no learning rates among its first steps; code that was edited is then known by the rest."""
    asked, edited = with_source(SOURCE), with_source(SOURCE.replace("2", "3"))
    assert differences({**edited, "first_steps": {"evaluation": 1.0}}, asked) == []
    assert differences({**asked, "first_steps": {**STEPS, "learning rates": "b"}}, asked) == ["other learning rates"]
    assert differences({"condition": asked["condition"]}, asked) == ["no record of its first steps"]


def test_a_source_that_is_not_what_runs_or_that_cannot_be_had_is_left_out(tmp_path, monkeypatch):
    file = tmp_path / "edited_after_import.py"
    file.write_text("def penalty(model):\n    return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    import edited_after_import

    assert "return 1" in condition_entry(Condition("a", penalty=edited_after_import.penalty))["penalty"]["source"]
    file.write_text("def penalty(model):\n    return 2\n")
    assert condition_entry(Condition("a", penalty=edited_after_import.penalty))["penalty"]["source"] is None
    typed = {"__name__": "a_prompt"}
    exec("def typed(channels): return channels", typed)
    assert condition_entry(Condition("a", norm=typed["typed"]))["norm"] == {"name": "typed", "source": None}
