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
from s6lib.errors import StudyError
from s6lib.lab.files import read_result
from s6lib.lab.record import recipe_entry
from s6lib.lab.trial import first_steps
from s6lib.recipes import Run, build_model
from s6lib.study import Study
from s6lib.train import predict

STUDIES = PROJECT / "studies"
FILES = sorted(path for path in STUDIES.glob("*.py") if "\nCONDITIONS = " in path.read_text())  # not analyses


def read(name):
    return read_study_file(str(STUDIES / f"{name}.py"))


def parameters(recipe, condition):
    return sum(weights.numel() for weights in build_model(recipe, condition).parameters())


@pytest.mark.parametrize(
    "which", [slice(-1, None), pytest.param(slice(None, -1, 6), marks=pytest.mark.slow)], ids=["last", "every sixth"]
)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_conditions_can_be_trained(file: Path, which, mnist):
    recipe, conditions = read(file.stem)
    assert len({condition.slug for condition in conditions}) == len(conditions)
    for condition in conditions[which]:
        first_steps(Run(recipe, condition, 1), mnist)


def test_the_frontier_has_the_sizes_that_its_labels_say():
    recipe, conditions = read("frontier")
    for condition in conditions:
        assert condition.label == f"{parameters(recipe, condition):,} parameters"
        assert isinstance(build_model(recipe, condition), SeparableNet)
    assert (recipe.held_out, recipe.train_images) == (False, 60_000)


def test_the_ablation_leads_from_the_published_recipe_to_that_of_the_frontier():
    (recipe, conditions), (frontier, _) = read("ablation"), read("frontier")
    assert recipe == PLAIN
    before = recipe_entry(PLAIN)
    for condition in conditions:
        entry = recipe_entry(recipe.changed_by(condition))
        assert entry != before or condition.l2
        before = entry
    whole = next(condition for condition in conditions if condition.slug == "average")
    assert isinstance(build_model(recipe, whole), PlainNet)
    for setting in ("epochs", "batch_size", "learning_rate", "schedule", "nesterov", "ema", "augmentation"):
        assert getattr(recipe.changed_by(whole), setting) == getattr(frontier, setting)


def test_the_search_for_the_frontier_is_what_its_table_says_and_saw_no_test_image(mnist):
    """On every fiftieth held-out image; what was saved of all of them gives the table."""
    recipe, conditions = read("frontier_search")
    table = pd.read_csv(STUDIES / "frontier_search.csv").set_index("trial")
    assert list(table.index) == [condition.slug for condition in conditions]
    images = hold_out(mnist[0])[1]
    for condition in conditions:
        row, folder = table.loc[condition.slug], STUDIES / "search" / recipe.name / condition.slug / "seed-1"
        assert recipe.changed_by(condition).held_out
        assert row["parameters"] == parameters(recipe, condition)
        assert row["plan"] == condition.changes["network"].keywords["plan"]
        model = build_model(recipe, condition)
        model.load_state_dict(torch.load(read_result(folder, "weights.pt"), weights_only=True))
        some, saved = predict(model, images.part(slice(None, None, 50))), np.load(folder / "predictions.npy")
        assert np.count_nonzero(some != saved[::50]) <= 1  # two logits may nearly tie, on another processor
        assert row["held_out_accuracy"] == round(100 * (saved == images.labels.numpy()).mean(), 2)


def test_the_published_search_is_read_though_its_code_has_changed():
    """It was trained before version 0.3, to which the first steps alone told one network from another."""
    recipe, conditions = read("frontier_search")
    study = Study(STUDIES / "search", recipe, conditions)
    assert study.runs == [(condition.slug, 1) for condition in conditions]
    study.check()
    study.model("t18")
    unknown = Study(STUDIES / "search")
    assert unknown.recipe.name == recipe.name
    table, columns = pd.read_csv(STUDIES / "frontier_search.csv"), ["train_loss", "test_loss"]
    last = unknown.history().groupby("condition").last().loc[table["trial"], columns].round(4)
    assert last.to_numpy().tolist() == table[["train_loss", "held_out_loss"]].to_numpy().tolist()
    with pytest.raises(StudyError, match=r"Trial is known from run\.json alone, which cannot make it"):
        unknown.model("t18")


def test_the_trials_of_when_are_what_their_table_says_and_saw_no_test_image(mnist):
    recipe, conditions = read("when_search")
    assert all(recipe.changed_by(condition).held_out for condition in conditions)
    study = Study(STUDIES / "when_search", recipe, conditions)
    table = pd.read_csv(STUDIES / "when_search.csv")
    held_out = hold_out(mnist[0])[1].labels.numpy()
    predicted = [round(100 * (study.predictions(*run) == held_out).mean(), 2) for run in study.runs]
    assert table["accuracy"].tolist() == predicted
    assert (100 * study.summary()["train_accuracy"]).round(2).tolist() == table["train_accuracy"].tolist()


def test_the_strengths_of_when_did_best_in_the_trials():
    read("when")
    strengths = sys.modules["s6lib_study_when"].STRENGTHS
    table = pd.read_csv(STUDIES / "when_search.csv").query("name != 'together'")
    trials = table.assign(strength=table["strength"].astype(float))
    base = trials[trials["name"] == "nothing"].set_index(["size", "seed"])["accuracy"]
    for (size, name), rows in trials[trials["name"] != "nothing"].groupby(["size", "name"]):
        rows = rows[rows["seed"] <= (1 if size == 10_000 else 2)]
        gains = rows["accuracy"] - [base[size, seed] for seed in rows["seed"]]
        seeds = rows.groupby("strength")["seed"].count()
        means = gains.groupby(rows["strength"]).mean().round(6)[seeds == seeds.max()]
        assert strengths[size][name] == means.idxmax()  # the first, so the weaker of two equal ones
