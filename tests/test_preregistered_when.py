"""The analysis of docs/preregistration_when.md; its interval is in test_statistics.py."""

import re

import numpy as np
import pandas as pd
import pytest
from conftest import invent_run
from hypothesis import given
from hypothesis import strategies as st
from statsmodels.stats.multitest import multipletests

from s6lib import preregistered_when as analysis
from s6lib.data import PROJECT

GAINS = {"l1": 2.0, "l2": 3.0, "dropout": 2.5, "rotation": 4.0, "ghosts": 0.0, "together": 4.0}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Accuracies with known gains: GAINS on 300 digits, almost none on 10,000 or by the exercise's strengths."""
    folder, rng = tmp_path_factory.mktemp("when"), np.random.default_rng(3)

    def invent(name, seed, accuracy):
        invent_run(folder / "when" / name / f"seed-{seed}", accuracy)

    for size, seeds in analysis.SEEDS.items():
        for seed in seeds:
            base = 92 + rng.normal()
            invent(f"{size}-nothing", seed, base)
            for name in (*GAINS, *analysis.WEAK):
                gained = GAINS.get(name, 0) * {300: 1.0, 10_000: 0.01}.get(size, 0.5)
                invent(f"{size}-{name}", seed, base + gained + rng.normal(scale=0.05))
    for seed in analysis.BATCH_SEEDS:
        for name, accuracy in zip(analysis.BATCHES, (98.8, 97.9, 98.1, 97.9), strict=True):
            invent(name, seed, accuracy + rng.normal(scale=0.02))
    return folder


def test_answers_are_those_of_known_gains(runs):
    first = analysis.gain(runs)
    assert first["subject"].tolist() == list(analysis.REGULARISERS)
    assert first.loc[3, "mean"] == pytest.approx(4.0, abs=0.05)
    assert [said.split()[0] for said in first["said"]] == ["gains"] * 4 + ["no"]
    assert [said.split()[0] for said in analysis.fall(runs)["said"]] == ["falls"] * 4 + ["no"]
    where = analysis.within(runs)["said"].tolist()
    assert [where[0], where[4]] == [f"within 0.2 points from {size} digits on" for size in ("10,000", "100")]
    assert set(analysis.exercise(runs)["said"]) == {"no gain shown"}
    best, added = analysis.together(runs)["said"]
    assert (best, added.endswith("points less")) == ("no difference shown", True)
    assert [said.split()[0] for said in analysis.batches(runs)["said"]] == ["costs", "gains", "no"]


def test_a_question_waits_for_all_its_runs_and_no_other_does(runs, capsys):
    lost = runs / "when" / "300-together" / f"seed-{analysis.SEEDS[300][0]}" / "run.json"
    lost.unlink()
    try:
        analysis.main(runs)
    finally:
        lost.touch()
    printed = capsys.readouterr().out
    assert f"1 of {7 * len(analysis.SEEDS[300])} runs are not complete, the first of them {lost.parent}" in printed
    assert printed.count("p_holm") == 4


@given(st.lists(st.floats(0, 1), min_size=1, max_size=10))
def test_holm_is_that_of_statsmodels(p_values):
    np.testing.assert_allclose(analysis.holm(p_values), multipletests(p_values, method="holm")[1])


def test_a_gain_is_within_from_the_size_after_which_all_are():
    inside, outside = pd.Series([0.0, 0.1, 0.05]), pd.Series([0.1, 0.3, 0.2])
    assert analysis.smallest_size({1: inside, 2: outside, 3: inside, 4: inside}) == "within 0.2 points from 3 digits on"
    assert analysis.smallest_size({1: inside, 2: outside}) == "at no size within 0.2 points"


def test_the_page_names_the_seeds():
    page = (PROJECT / "docs" / "preregistration_when.md").read_text()
    for size, seeds in analysis.SEEDS.items():
        row = rf"^\| {size:,} \| [\d,]+ \| {seeds[0]} to {seeds[-1]} \| {len(seeds)} \|$"
        assert re.search(row, page, re.MULTILINE)
    assert f"seeds {analysis.BATCH_SEEDS[0]} to {analysis.BATCH_SEEDS[-1]}: BatchNorm with batches of 64" in page
