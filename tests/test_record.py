from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torchvision.transforms import v2

from s6lib.lab.record import (
    condition_entry,
    differences,
    has_user_code,
    read_condition,
    read_recipe,
    recipe_entry,
)
from s6lib.models import PlainNet, SeparableNet
from s6lib.recipes import ALL_CONDITIONS, CONTROL, PLAIN, Condition, Recipe, Run, build_model


class Own(nn.Module):
    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 3, 4), norm(4), nn.Flatten(), nn.Linear(4 * 7 * 7, 10))

    def forward(self, images):
        return self.layers(images)


def two_groups(channels):
    return nn.GroupNorm(2, channels)


OWN = Recipe("own", Own, epochs=1, train_images=640)
GROUPS = Condition("groups", norm=two_groups)
SMOOTH = partial(nn.functional.cross_entropy, label_smoothing=0.1)
ADAMW = partial(torch.optim.AdamW, weight_decay=0.05)
WILD = Condition("wild", changes={"dropout": 0.0})
LIBRARY = Condition("library", changes={"loss": SMOOTH, "optimizer": ADAMW, "schedule": "cosine"})


@pytest.mark.parametrize("condition", [*ALL_CONDITIONS.values(), GROUPS, LIBRARY, WILD])
def test_what_is_recorded_can_be_read_again(condition):
    entry = condition_entry(condition)
    again = read_condition(entry)
    assert condition_entry(again) == entry
    assert again == condition or condition in (GROUPS, LIBRARY)
    assert recipe_entry(read_recipe(recipe_entry(OWN))) == recipe_entry(OWN)
    assert read_recipe(recipe_entry(PLAIN)) == PLAIN


def test_settings_that_are_not_used_are_not_recorded():
    """So that the first published runs, which knew nothing of them, are still runs of PLAIN."""
    assert set(recipe_entry(PLAIN)) == {
        "name", "network", "dropout", "epochs", "train_images", "batch_size", "learning_rate", "decay", "decay_epochs",
        "momentum", "rotation", "jitter",
    }  # fmt: skip
    changed = replace(
        PLAIN, schedule="one-cycle", shift=2.0, scale=0.1, nesterov=True, ema=0.9, held_out=True, train_images=9
    )
    assert read_recipe(recipe_entry(changed)) == changed


@pytest.mark.parametrize("network", [partial(SeparableNet, width=14), partial(SeparableNet, 14)])
def test_a_network_of_the_library_with_numbers_can_be_made_from_what_is_recorded(network):
    entry = recipe_entry(Recipe("small", network))
    again = read_recipe(entry)
    assert recipe_entry(again) == entry
    assert sum(weights.numel() for weights in build_model(again, CONTROL).parameters()) == 1_694


@pytest.mark.parametrize("network", [partial(Own), partial(PlainNet, norm=nn.InstanceNorm2d)])
def test_a_partial_of_ones_own_is_known_by_name_alone(network):
    entry = recipe_entry(Recipe("own", network))
    again = read_recipe(entry)
    assert recipe_entry(again) == entry
    with pytest.raises(ValueError, match=r"is known from run\.json alone"):
        build_model(again, CONTROL)


def test_what_is_known_by_name_alone_cannot_be_made():
    with pytest.raises(ValueError, match=r"Own is known from run\.json alone, .* give the recipe and the conditions"):
        build_model(read_recipe(recipe_entry(OWN)), CONTROL)


def test_what_is_a_librarys_is_known_by_its_settings():
    assert not has_user_code(Run(PLAIN, LIBRARY, 1))
    entry = condition_entry(LIBRARY)["changes"]
    assert entry["loss"]["partial"] == "torch.nn.functional.cross_entropy"
    assert entry["loss"]["arguments"] == {"label_smoothing": 0.1}
    assert entry["optimizer"]["arguments"] == {"weight_decay": 0.05}
    assert recipe_entry(Recipe("a", PlainNet))["network"] == "PlainNet"
    assert (
        condition_entry(Condition("a", norm=nn.InstanceNorm2d))["norm"]
        == "torch.nn.modules.instancenorm.InstanceNorm2d"
    )


@pytest.mark.parametrize(
    "condition",
    [GROUPS, Condition("a", penalty=lambda model: 0), Condition("a", changes={"transform": v2.CutMix(num_classes=10)}),
     Condition("a", changes={"schedule": lambda done: 1.0}),
     Condition("a", changes={"network": partial(PlainNet, two_groups)})],
)  # fmt: skip
def test_a_run_with_code_of_the_users_is_own(condition):
    assert has_user_code(Run(PLAIN, condition, 1))


def entry(**changes):
    return condition_entry(Condition("a", changes=changes))


def test_a_number_in_a_librarys_object_counts():
    erasing = [entry(transform=v2.RandomErasing(p=p)) for p in (0.1, 0.11)]
    assert differences(*erasing) == ["p = 0.1, not 0.11"]
    nested = [entry(transform=v2.Compose([v2.RandomErasing(p=p)])) for p in (0.1, 0.11)]
    assert differences(*nested)
    assert differences(entry(loss=SMOOTH), entry(loss=partial(SMOOTH, label_smoothing=0.2)))
    assert not differences(entry(loss=nn.CrossEntropyLoss()), entry(loss=nn.CrossEntropyLoss()))


def test_a_setting_that_one_version_of_an_object_lacks_is_no_difference():
    new = entry(transform=v2.RandomErasing())
    old = entry(transform=v2.RandomErasing())
    old["changes"]["transform"]["arguments"]["retired"] = 1
    del old["changes"]["transform"]["arguments"]["inplace"]
    assert not differences(old, new)
    assert differences(old, entry(transform=v2.GaussianNoise()))


def test_names_and_words_of_code_are_no_difference():
    def f(model):
        "Some words."
        return model

    old, new = condition_entry(Condition("a", penalty=f)), condition_entry(Condition("a", "Label", penalty=lambda m: m))
    assert "Some words." in old["penalty"]["source"]
    assert not differences(old, new)
    assert differences(condition_entry(Condition("groups", norm=nn.InstanceNorm2d)), condition_entry(GROUPS)) == [
        "norm = 'torch.nn.modules.instancenorm.InstanceNorm2d', not two_groups"
    ]


def test_a_source_that_is_not_what_runs_is_left_out(tmp_path, monkeypatch):
    file = tmp_path / "edited_after_import.py"
    file.write_text("def penalty(model):\n    return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    import edited_after_import

    assert "return 1" in condition_entry(Condition("a", penalty=edited_after_import.penalty))["penalty"]["source"]
    file.write_text("def penalty(model):\n    return 2\n")
    assert condition_entry(Condition("a", penalty=edited_after_import.penalty))["penalty"]["source"] is None


def test_a_source_that_cannot_be_had_is_no_error():
    typed = {"__name__": "a_prompt"}
    exec("def typed(channels): return channels", typed)
    assert condition_entry(Condition("a", norm=typed["typed"]))["norm"] == {"name": "typed", "source": None}
