"""The study files that are published with their results."""

from pathlib import Path

import pandas as pd
import pytest

from s6lib import PLAIN, PlainNet, SeparableNet
from s6lib.__main__ import _own
from s6lib.conditions import build_model, recipe_entry, try_out
from s6lib.data import PROJECT

FILES = sorted((PROJECT / "studies").glob("*.py"))


def parameters(recipe, condition):
    return sum(weights.numel() for weights in build_model(recipe, condition).parameters())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_condition_of_a_study_can_be_trained(file: Path):
    recipe, conditions = _own(str(file))
    assert len({condition.slug for condition in conditions}) == len(conditions)
    for condition in conditions:
        try_out(recipe, condition)


def test_the_sizes_of_the_frontier_are_as_said():
    recipe, conditions = _own(str(PROJECT / "studies" / "frontier.py"))
    for condition in conditions:
        assert condition.label == f"{parameters(recipe, condition):,} parameters"
        assert isinstance(build_model(recipe, condition), SeparableNet)
    assert not recipe.held_out
    assert recipe.train_images == 60_000


def test_the_search_has_seen_no_test_digit_and_its_table_is_of_its_trials():
    recipe, conditions = _own(str(PROJECT / "studies" / "frontier_search.py"))
    table = pd.read_csv(PROJECT / "studies" / "frontier_search.csv").set_index("trial")
    assert list(table.index) == [condition.slug for condition in conditions]
    for condition in conditions:
        assert recipe.changed_by(condition).held_out
        assert table["parameters"][condition.slug] == parameters(recipe, condition)
        assert table["plan"][condition.slug] == condition.changes["network"].keywords["plan"]


def test_the_ablation_leads_from_the_published_recipe_to_that_of_the_frontier():
    recipe, conditions = _own(str(PROJECT / "studies" / "ablation.py"))
    frontier, _ = _own(str(PROJECT / "studies" / "frontier.py"))
    assert recipe == PLAIN
    before = recipe_entry(PLAIN)
    for condition in conditions:
        entry = recipe_entry(recipe.changed_by(condition))
        assert entry != before or condition.l2
        before = entry
    whole = next(condition for condition in conditions if condition.slug == "average")
    changed = recipe.changed_by(whole)
    assert isinstance(build_model(recipe, whole), PlainNet)
    for setting in ("epochs", "batch_size", "learning_rate", "schedule", "nesterov", "ema", "augmentation"):
        assert getattr(changed, setting) == getattr(frontier, setting)
