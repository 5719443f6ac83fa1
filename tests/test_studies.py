"""The study files that are published with their results."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from s6lib import PLAIN, PlainNet, SeparableNet
from s6lib.__main__ import read_study_file
from s6lib.data import PROJECT, hold_out
from s6lib.lab.files import read_about, read_result
from s6lib.lab.first_steps import first_steps
from s6lib.lab.record import recipe_entry
from s6lib.recipes import Run, build_model
from s6lib.study import Study
from s6lib.train import evaluate

FILES = sorted((PROJECT / "studies").glob("*.py"))


def parameters(recipe, condition):
    return sum(weights.numel() for weights in build_model(recipe, condition).parameters())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_study_can_be_trained(file: Path, mnist):
    recipe, conditions = read_study_file(str(file))
    assert len({condition.slug for condition in conditions}) == len(conditions)
    first_steps(Run(recipe, conditions[-1], 1), mnist)


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_condition_of_a_study_can_be_trained(file: Path, mnist):
    recipe, conditions = read_study_file(str(file))
    for condition in conditions:
        first_steps(Run(recipe, condition, 1), mnist)


def test_the_sizes_of_the_frontier_are_as_said():
    recipe, conditions = read_study_file(str(PROJECT / "studies" / "frontier.py"))
    for condition in conditions:
        assert condition.label == f"{parameters(recipe, condition):,} parameters"
        assert isinstance(build_model(recipe, condition), SeparableNet)
    assert not recipe.held_out
    assert recipe.train_images == 60_000


def test_the_search_has_seen_no_test_digit_and_its_table_is_of_its_trials():
    recipe, conditions = read_study_file(str(PROJECT / "studies" / "frontier_search.py"))
    table = pd.read_csv(PROJECT / "studies" / "frontier_search.csv").set_index("trial")
    assert list(table.index) == [condition.slug for condition in conditions]
    for condition in conditions:
        assert recipe.changed_by(condition).held_out
        assert table["parameters"][condition.slug] == parameters(recipe, condition)
        assert table["plan"][condition.slug] == condition.changes["network"].keywords["plan"]


def test_the_table_of_the_search_is_what_its_saved_weights_give(mnist):
    """On every fiftieth held-out digit; what was saved of all of them gives the table."""
    recipe, conditions = read_study_file(str(PROJECT / "studies" / "frontier_search.py"))
    table = pd.read_csv(PROJECT / "studies" / "frontier_search.csv").set_index("trial")
    held_out = hold_out(mnist[0])[1]
    for condition in conditions:
        folder = PROJECT / "studies" / "search" / recipe.name / condition.slug / "seed-1"
        about, row = read_about(folder)["recipe"], table.loc[condition.slug]
        assert about == recipe_entry(recipe) | {"network": about["network"]}
        model = build_model(recipe, condition)
        model.load_state_dict(torch.load(read_result(folder, "weights.pt"), weights_only=True))
        some = evaluate(model, held_out.part(slice(None, None, 50))).predictions.numpy()
        saved = np.load(read_result(folder, "predictions.npy"))
        assert np.count_nonzero(some != saved[::50]) <= 1  # two logits may nearly tie, on another processor
        assert row["held_out_accuracy"] == round(100 * (saved == held_out.labels.numpy()).mean(), 2)
        last = pd.read_csv(read_result(folder, "history.csv")).iloc[-1]
        assert (row["train_loss"], row["held_out_loss"]) == (round(last["train_loss"], 4), round(last["val_loss"], 4))


@pytest.mark.slow
def test_the_published_search_is_that_of_its_study_file():
    """Its source has changed since, but not what it does."""
    recipe, conditions = read_study_file(str(PROJECT / "studies" / "frontier_search.py"))
    study = Study(PROJECT / "studies" / "search", recipe, conditions)
    assert len(study.runs) == len(conditions)
    assert study.model("t18")


def test_the_ablation_leads_from_the_published_recipe_to_that_of_the_frontier():
    recipe, conditions = read_study_file(str(PROJECT / "studies" / "ablation.py"))
    frontier, _ = read_study_file(str(PROJECT / "studies" / "frontier.py"))
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


def test_the_trials_of_when_have_seen_no_test_digit_and_their_table_is_what_they_predicted(mnist):
    recipe, conditions = read_study_file(str(PROJECT / "studies" / "when_search.py"))
    assert all(recipe.changed_by(condition).held_out for condition in conditions)
    study = Study(PROJECT / "studies" / "when_search", recipe, conditions)
    table = pd.read_csv(PROJECT / "studies" / "when_search.csv")
    held_out = hold_out(mnist[0])[1].labels.numpy()
    predicted = [round(100 * (study.predictions(*run) == held_out).mean(), 2) for run in study.runs]
    assert table["accuracy"].tolist() == predicted
    assert (100 * study.summary()["train_accuracy"]).round(2).tolist() == table["train_accuracy"].tolist()


def test_the_strengths_of_when_did_best_in_the_trials():
    read_study_file(str(PROJECT / "studies" / "when.py"))
    strengths = sys.modules["s6lib_study_when"].STRENGTHS
    table = pd.read_csv(PROJECT / "studies" / "when_search.csv").query("name != 'together'")
    trials = table.assign(strength=table["strength"].astype(float))
    base = trials[trials["name"] == "nothing"].set_index(["size", "seed"])["accuracy"]
    for (size, name), rows in trials[trials["name"] != "nothing"].groupby(["size", "name"]):
        rows = rows[rows["seed"] <= (1 if size == 10_000 else 2)]
        gains = rows["accuracy"] - [base[size, seed] for seed in rows["seed"]]
        seeds = rows.groupby("strength")["seed"].count()
        means = gains.groupby(rows["strength"]).mean().round(6)[seeds == seeds.max()]
        assert strengths[size][name] == means.idxmax()  # the first, so the weaker of two equal ones
