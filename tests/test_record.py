"""What run.json says of a run's settings, and which differences make it another run."""

from dataclasses import replace
from functools import partial

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
        (SOURCE, "    def penalty(model):\n        'Twice.'\n        return (2 * model.sum())  # as before\n", False),
        (SOURCE, SOURCE.replace("2", "3"), True),
        (SOURCE, None, False),  # as typed at a prompt
        ("lambda x: x > 0.5", "lambda x: x > 0.6", True),
        ("lambda x: x > 0.5", "lambda x: x > 0.6)", False),  # no Python
        ("lambda x:\n    x > 0.5", "lambda x:\n    x > 0.6", True),  # Python in brackets alone
        ("    def f(x):\n# a\n        return 1", "    def f(x):\n# a\n        return 2", True),
    ],
)
def test_the_syntax_tree_of_code_counts_where_it_can_be_had(source, edited, differs):
    assert differences(with_source(source), with_source(edited)) == ["other code in penalty"] * differs


def test_an_edit_of_what_code_reads_counts_and_so_does_an_argument_that_one_lacks():
    reads = {"deeper": "def deeper(model): return LATE", "deeper.LATE": 0.3}
    for change, said in (
        ({"deeper": "def deeper(model): return 0"}, "deeper"),
        ({"deeper.LATE": 1}, "deeper.LATE = 0.3, not 1"),
    ):
        one, other = with_source(SOURCE), with_source(SOURCE)
        one["condition"]["penalty"]["reads"], other["condition"]["penalty"]["reads"] = reads, {**reads, **change}
        assert differences(one, other) == [f"other code in penalty, {said}"]
    more = [{**requested(loss=partial(two_groups, **given)), "first_steps": STEPS} for given in ({}, {"flood": 1.0})]
    assert differences(*more) == differences(*more[::-1]) == ["other code in loss, with and without flood"]


def test_runs_of_before_are_read():
    """Their run.json has no learning rates among its first steps; code that was edited is then known by the rest."""
    asked, edited = with_source(SOURCE), with_source(SOURCE.replace("2", "3"))
    assert differences({**edited, "first_steps": {"evaluation": 1.0}}, asked) == []
    assert differences({**asked, "first_steps": {**STEPS, "learning rates": "b"}}, asked) == ["other learning rates"]
    assert differences({"condition": asked["condition"]}, asked) == ["no record of its first steps"]
