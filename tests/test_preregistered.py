"""The analysis of docs/preregistration.md; its interval and its test are in test_statistics.py."""

import numpy as np
import pandas as pd
import pytest

from s6lib.data import PROJECT
from s6lib.preregistered import FACTORIAL, PENALTIES, answer, contrasts, main, read, statement


def test_contrasts_are_those_of_the_page():
    right = pd.DataFrame([[9950, 9954, 9940, 9947]], columns=FACTORIAL, index=[21])
    np.testing.assert_allclose(contrasts(right), [[0.085, 0.055, 0.03]])


@pytest.mark.parametrize(
    ("mean", "p", "low", "high", "said"),
    [
        (-0.06, 0.01, -0.08, -0.04, "costs 0.060 points"),
        (0.06, 0.01, 0.04, 0.08, "gains 0.060 points"),
        (0.03, 0.05, 0.01, 0.049, "a real difference, under 0.05 points"),
        (0.01, 0.3, -0.01, 0.03, "no difference of 0.05 points or more"),
        (0.03, 0.3, -0.01, 0.05, "undecided, between -0.010 and +0.050 points"),
    ],
)
def test_sentences_are_those_of_the_page(mean, p, low, high, said):
    assert statement(mean, p, low, high) == said


def test_a_cost_of_ghost_batches_is_said_to_be_one():
    noise = np.array([-1, 1] * 8)
    right = pd.DataFrame({"bn": 9950 + noise, "l1-l2-bn": 9950, "gbn": 9940, "l1-l2-gbn": 9940})
    penalties = pd.DataFrame({"l1-bn": 9950 + noise, "l2-bn": 9950, "l1-l2-bn": 9940})
    found = answer(right, penalties).set_index("question")["said"]
    assert found["G"] == "costs 0.100 points"
    assert found["P"] == "no difference of 0.05 points or more"
    assert found["L1 - L2"] == "within 0.05 points"
    assert found["L1 + L2 - L1"] == found["L1 + L2 - L2"] == "not shown to be within 0.05 points"


def test_what_the_page_says_of_seeds_1_to_10():
    runs = [read(PROJECT / "results", conditions, range(1, 11)) for conditions in (FACTORIAL, PENALTIES)]
    found = answer(*runs).set_index("question").round(3)
    assert found.loc["G", ["mean", "low_95", "high_95", "p", "p_holm"]].tolist() == [0.044, 0.004, 0.084, 0.047, 0.094]
    assert found.loc["P", ["mean", "low_95", "high_95"]].tolist() == [0.028, -0.006, 0.062]


def test_nothing_is_analysed_before_all_runs_are_complete(tmp_path):
    with pytest.raises(ValueError, match=r"not complete.*bn.seed-21"):
        main(str(tmp_path))
