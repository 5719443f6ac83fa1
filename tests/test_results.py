"""What is published under results/ is what the saved weights give, and what the code trains."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import worth
from conftest import history_of

from s6lib.data import PROJECT
from s6lib.lab.run import train_run
from s6lib.recipes import CONDITIONS, RECIPES, Run
from s6lib.study import Study
from s6lib.train import evaluate, predict

RESULTS = PROJECT / "results"
FOLDERS = sorted({path.parents[2].relative_to(RESULTS) for path in RESULTS.rglob("seed-*/run.json")})

# To keep the repository small, only two seeds of these carry their weights.
WITH_WEIGHTS = {"when": (11, 12), "worth": (31, 32)}


@cache  # so that every history is read once
def read_study(path, weights=False):
    """A study, or its runs that carry their weights."""
    own = worth.recipes() if path.parts[0] == "worth" else {}  # a network and data that run.json cannot make
    seeds = WITH_WEIGHTS.get(path.parts[0]) if weights else None
    return Study((RESULTS / path).parent, own.get(path.name, path.name), seeds=seeds)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_five_conditions_are_published(recipe):
    study = read_study(Path(recipe))
    assert study.recipe == RECIPES[recipe]
    accuracies = study.summary().query("seed == 1").set_index("condition")["test_accuracy"]
    for condition in CONDITIONS:
        assert study.conditions[condition.slug] == condition
        assert accuracies[condition.slug] >= 0.9940


@pytest.mark.parametrize("path", FOLDERS, ids=str)
def test_saved_predictions_give_the_published_numbers(path, mnist):
    study = read_study(path)
    assert not study.recipe.held_out
    read_study(path, weights=True).check()
    for (slug, seed), history in study.history().groupby(["condition", "seed"]):
        run = f"{slug}, seed {seed}"
        epochs = study.recipe.changed_by(study.conditions[slug]).epochs
        assert history["epoch"].tolist() == list(range(1, epochs + 1)), run
        right = float((study.predictions(slug, seed) == mnist[1].labels.numpy()).mean())
        assert right == pytest.approx(history["test_accuracy"].iloc[-1], abs=1e-9), run


def telling_images(seed, saved, labels):
    """Every fiftieth image, others for each seed, and a hundred that the run got wrong, which tell it from others."""
    return np.union1d(np.arange(seed % 50, len(saved), 50), np.flatnonzero(saved != labels)[:100])


def all_images(seed, saved, labels):
    return np.arange(len(saved))


@pytest.mark.parametrize("path", FOLDERS, ids=str)
@pytest.mark.parametrize(
    ("choose", "step"), [(telling_images, 1), pytest.param(all_images, 20, marks=pytest.mark.slow)]
)
def test_saved_weights_give_the_saved_predictions(path, choose, step, mnist):
    """All images, and the loss, of every twentieth run: ten thousand images of each take ten minutes."""
    study, images = read_study(path, weights=True), mnist[1]
    losses = study.summary().set_index(["condition", "seed"])["test_loss"]
    for slug, seed in study.runs[::step]:
        run, saved = f"{slug}, seed {seed}", study.predictions(slug, seed)
        chosen = choose(seed, saved, images.labels.numpy())
        part = images.part(torch.from_numpy(chosen))
        model = study.model(slug, seed)
        # Two logits that nearly tie may change places on another processor: three images in ten thousand.
        assert np.count_nonzero(predict(model, part).numpy() != saved[chosen]) <= 3, run
        if len(chosen) == len(saved):
            assert evaluate(model, part).loss == pytest.approx(losses[slug, seed], rel=1e-3), run


@pytest.mark.slow
def test_the_first_epoch_trains_again_to_its_published_row():
    """Bit for bit on the processor that trained it; on another, rounding grows over 938 steps to these tolerances."""
    study = read_study(Path("plain"))
    first = study.history().query("condition == 'gbn' and seed == 1").iloc[0]
    row = history_of(train_run(Run(replace(study.recipe, epochs=1), study.conditions["gbn"], 1))).iloc[0]
    assert row["lr"] == first["lr"]
    assert row["train_loss"] == pytest.approx(first["train_loss"], rel=0.03)
    assert row["train_accuracy"] == pytest.approx(first["train_accuracy"], abs=0.005)
    assert row["val_accuracy"] == pytest.approx(first["test_accuracy"], abs=0.006)
