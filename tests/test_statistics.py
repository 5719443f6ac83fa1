"""The statistics of s6lib.analysis against closed forms, scipy and statsmodels, on data where the answer is known."""

import itertools

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from s6lib.analysis import (
    condition_statistics,
    equal_conditions,
    false_alarm_rate,
    mcnemar_p,
    mean_interval,
    outcomes,
    paired_comparisons,
    right_predictions,
    run_sd,
    seeds_needed,
    sign_flip_p,
    stability,
    variance_sources,
    verdict,
    verdict_on_best,
)
from s6lib.conditions import CONTROL, PLAIN, Condition


class FakeStudy:
    """A study whose numbers are given: accuracies by condition, a list over seeds 1, 2, ... with None for no run."""

    recipe = PLAIN

    def __init__(self, accuracies):
        self.conditions = {slug: Condition(slug, slug.upper()) for slug in accuracies}
        runs = [(s, k, a) for s, values in accuracies.items() for k, a in enumerate(values, 1) if a is not None]
        self._summary = pd.DataFrame(runs, columns=["condition", "seed", "accuracy"])

    def summary(self):
        return self._summary


def test_outcomes_are_paired_by_seed():
    table = outcomes(FakeStudy({"a": [0.9944, 0.9951], "b": [0.995, 0.9939]}))
    assert table.to_dict("list") == {"a": [9944, 9951], "b": [9950, 9939]}
    with pytest.raises(ValueError, match="these runs are missing: b seed 2, b seed 3"):
        outcomes(FakeStudy({"a": [0.99, 0.99, 0.99], "b": [0.99, None, None]}))


@settings(max_examples=40)
@given(st.lists(st.integers(-9, 9), min_size=2, max_size=9))
def test_sign_flip_is_the_count_over_all_signs(differences):
    sums = [abs(np.dot(signs, differences)) for signs in itertools.product((-1, 1), repeat=len(differences))]
    expected = np.mean(np.array(sums) >= abs(sum(differences)))
    assert sign_flip_p(differences) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(10))
def test_sign_flip_is_scipys(seed):
    differences = np.random.default_rng(seed).normal(0.3, 1, size=9)
    test = scipy.stats.permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip_p(differences) == pytest.approx(test.pvalue, rel=1e-9)


def test_sign_flip_sees_ties_of_decimals():
    hundredths = [3, 1, -1, 1, 2, -3, 0, -3]
    assert sign_flip_p(hundredths) == 1.0
    assert sign_flip_p([value / 100 for value in hundredths]) == 1.0


@pytest.mark.parametrize("n", [24, 122])
def test_sign_flip_is_exact_for_many_seeds(n):
    """Of n ones and some minus ones, the sum is binomial."""
    differences = np.ones(n)
    differences[: n // 3] = -1
    expected = scipy.stats.binomtest(n // 3, n).pvalue
    assert sign_flip_p(differences) == pytest.approx(expected, rel=1e-9)


def test_mean_interval_is_near_students_on_normal_data():
    sample = scipy.stats.norm.ppf((np.arange(40) + 0.5) / 40)
    low, high = mean_interval(sample)
    expected = scipy.stats.t.interval(0.95, 39, 0, scipy.stats.sem(sample))
    assert (low, high) == pytest.approx(expected, abs=0.03)
    assert mean_interval([5, 5, 5]) == (5, 5)
    assert mean_interval(sample) == (low, high)


@pytest.mark.parametrize(("n", "coverage"), [(3, 0.73), (6, 0.86), (10, 0.90)])
def test_mean_interval_of_few_values_covers_as_its_docstring_says(n, coverage):
    samples = np.random.default_rng(0).normal(size=(300, n))
    intervals = [mean_interval(sample) for sample in samples]
    assert np.mean([low <= 0 <= high for low, high in intervals]) == pytest.approx(coverage, abs=0.06)
    assert f"{coverage:.0%} with {n}" in mean_interval.__doc__


@pytest.mark.parametrize("bad", [[], [1.0], [1.0, float("nan")], [[1.0, 2.0]]])
def test_too_little_data_is_refused(bad):
    for function in (mean_interval, sign_flip_p):
        with pytest.raises(ValueError, match="at least two finite numbers"):
            function(bad)


def test_condition_statistics_are_in_percent():
    row = condition_statistics(FakeStudy({"a": [0.994, 0.995, 0.996]})).iloc[0]
    assert (row["n"], row["mean"]) == (3, pytest.approx(99.5))
    assert row["sd"] == pytest.approx(0.1)
    assert 99.4 <= row["low"] < 99.5 < row["high"] <= 99.6


def test_run_sd_is_that_of_runs_of_one_condition():
    assert run_sd(FakeStudy({"a": [0.994, 0.995, 0.996], "b": [0.99, 0.99, 0.99]})) == pytest.approx(0.1 / 2**0.5)


def test_paired_comparisons_of_known_differences():
    a = [0.9940, 0.9950, 0.9945, 0.9955, 0.9941, 0.9949]
    b = [x - d / 10_000 for x, d in zip(a, [5, 6, 4, 7, 5, 3], strict=True)]
    c = [x + d / 10_000 for x, d in zip(a, [1, -1, 2, -2, 1, -1], strict=True)]
    table = paired_comparisons(FakeStudy({"a": a, "b": b, "c": c})).set_index(["first", "second"])
    assert table.loc[("a", "b"), "difference"] == pytest.approx(0.05)
    assert table.loc[("a", "b"), "p"] == pytest.approx(2 / 64)
    assert table.loc[("a", "c"), "p"] == 1
    assert table.loc[("a", "b"), "low"] > 0
    p = sorted(table["p"])
    assert sorted(table["p_holm"])[0] == pytest.approx(min(1, 3 * p[0]))
    assert (table["p_holm"] >= table["p"]).all()
    assert (table["seeds_0.02"] >= table["seeds_0.05"]).all()
    assert list(table["seeds_0.03"]) == [seeds_needed(sd, 0.03, comparisons=3) for sd in table["sd"]]


def test_a_pair_whose_differences_are_all_equal_is_compared():
    table = paired_comparisons(FakeStudy({"a": [0.994, 0.995], "b": [0.993, 0.994]}))
    assert table[["difference", "low", "high", "sd", "p"]].iloc[0].tolist() == pytest.approx([0.1, 0.1, 0.1, 0, 0.5])


@pytest.mark.parametrize("comparisons", [1, 15])
@pytest.mark.parametrize(("sd", "difference"), [(0.05, 0.05), (0.05, 0.02), (0.035, 0.03)])
def test_seeds_needed_reach_the_power_and_one_fewer_does_not(sd, difference, comparisons):
    def power(n):
        noncentrality = difference / sd * n**0.5
        limit = scipy.stats.t.isf(0.025 / comparisons, n - 1)
        return scipy.stats.nct.sf(limit, n - 1, noncentrality) + scipy.stats.nct.cdf(-limit, n - 1, noncentrality)

    n = seeds_needed(sd, difference, comparisons)
    assert power(n) >= 0.8 > power(n - 1)


@pytest.mark.parametrize("comparisons", [1, 15])
@pytest.mark.parametrize("sd", [0, 1e-9, 0.001, 0.012, 0.013, 0.02])
def test_seeds_needed_are_enough_for_the_sign_flip_test(sd, comparisons):
    n = seeds_needed(sd, 0.05, comparisons)
    assert sign_flip_p([1] * n) <= 0.05 / comparisons
    assert sd > 0.0125 or sign_flip_p([1] * (n - 1)) > 0.05 / comparisons


@pytest.mark.parametrize("bad", [(-1, 0.05), (0.05, 0), (float("nan"), 0.05)])
def test_seeds_needed_for_nothing_are_refused(bad):
    with pytest.raises(ValueError, match="must be at least 0 and the difference above 0"):
        seeds_needed(*bad)


def test_variance_sources_are_told_apart():
    generator = np.random.default_rng(0)
    images = 4_000
    same = np.tile(generator.random(images) < 0.9, (5, 1))
    only_images = variance_sources(same)  # every run right on the same images: seeds add nothing
    binomial = 100 * (same[0].mean() * (1 - same[0].mean()) / (images - 1)) ** 0.5
    assert only_images == {"seeds": 0, "images": pytest.approx(binomial), "both": pytest.approx(binomial)}

    only_seeds = variance_sources(np.tile([[80], [85], [90], [95]], images) / 100)
    expected = np.std([80, 85, 90, 95], ddof=1) / 2
    assert only_seeds == pytest.approx({"seeds": expected, "images": 0, "both": expected})
    with pytest.raises(ValueError, match="run more seeds"):
        variance_sources(same[:1])


def test_variance_sources_count_what_is_neither_the_runs_nor_the_images_once():
    """Against the variance by which the mean really varies, for known components, over 400 studies."""
    seeds, images, study = 6, 100, np.random.default_rng(0)
    of_seed, of_image, of_neither = 0.1, 0.5, 1.0
    found, means = [], []
    for _ in range(400):
        scores = of_seed * study.normal(size=(seeds, 1)) + of_image * study.normal(size=images)
        scores = scores + of_neither * study.normal(size=(seeds, images))
        means.append(100 * scores.mean())
        found.append(variance_sources(scores)["both"] ** 2)
    expected = 1e4 * (of_seed**2 / seeds + of_image**2 / images + of_neither**2 / (seeds * images))
    assert np.var(means) == pytest.approx(expected, rel=0.2)
    assert np.mean(found) == pytest.approx(expected, rel=0.2)  # counted three times: 1.57 times it


def test_mcnemar_is_the_binomial_test():
    first, second = (np.zeros(100, dtype=bool) for _ in range(2))
    first[:40], second[27:40] = True, True
    second[40:47] = True
    assert mcnemar_p(first, second) == (27, 7, pytest.approx(scipy.stats.binomtest(7, 34).pvalue))
    assert mcnemar_p(first, first) == (0, 0, 1)


def test_right_predictions_are_those_of_the_condition(tiny_study, mnist):
    labels = mnist[1].labels.numpy()
    right = right_predictions(tiny_study, "gbn", labels)
    assert right.shape == (2, 10_000)
    assert right.mean(1).tolist() == pytest.approx(
        tiny_study.summary().query("condition == 'gbn'")["accuracy"].tolist()
    )


def test_the_method_does_not_cry_wolf():
    normal = np.random.default_rng(0).normal(9950, 6, size=5_000).round()
    # 500 comparisons of a condition with itself: 5% within three standard errors, and less for the ties.
    assert 0.02 <= false_alarm_rate(normal, seeds=10, comparisons=500) <= 0.08
    assert false_alarm_rate(normal, seeds=5, comparisons=200) == 0  # the least p of five pairs is 2/32
    with pytest.raises(ValueError, match="at least two finite numbers"):
        false_alarm_rate([9950], seeds=10)


def test_a_verdict_needs_evidence():
    assert verdict(0.03, 0.05) == "supported"
    assert verdict(-0.03, 0.05) == "not supported"
    assert verdict(0.03, 0.051) == "cannot be told at this n"


@pytest.mark.parametrize(
    ("p_over_b", "p_over_c", "a_is_best", "c_is_best"),
    [
        (0.01, 0.02, "supported", "not supported"),
        (0.01, 0.30, "cannot be told at this n", "cannot be told at this n"),
        (0.30, 0.02, "cannot be told at this n", "not supported"),
    ],
)
def test_the_best_must_beat_every_other(p_over_b, p_over_c, a_is_best, c_is_best):
    rows = [("a", "b", 0.03, p_over_b), ("c", "a", -0.05, p_over_c), ("b", "c", 9, 0.9)]
    comparisons = pd.DataFrame(rows, columns=["first", "second", "difference", "p_holm"])
    assert verdict_on_best(comparisons, "a", ["b", "c"]) == a_is_best
    assert verdict_on_best(comparisons, "c", ["a", "b"]) == c_is_best


def test_what_was_not_compared_has_no_verdict():
    with pytest.raises(ValueError, match="a comparison needs two conditions, and this study has a alone"):
        paired_comparisons(FakeStudy({"a": [0.994, 0.995]}))
    comparisons = paired_comparisons(FakeStudy({"a": [0.994, 0.995], "b": [0.995, 0.994]}))
    for best, other in (("a", "c"), ("c", "b")):
        with pytest.raises(ValueError, match=f"no comparison of {best} with {other}"):
            verdict_on_best(comparisons, best, [other])


def test_equal_conditions_win_by_turns():
    shares, spread = equal_conditions(0.035)
    assert shares.sum() == pytest.approx(1)
    assert shares == pytest.approx([0.2] * 5, abs=0.02)
    assert spread == pytest.approx(0.035 * 2.326, abs=0.003)  # the mean range of five normal values


def test_stability_is_the_deviation_of_changes():
    study = FakeStudy({CONTROL.slug: [0.99]})
    first = [0.90, 0.92, 0.91, 0.93, 0.92, 0.94]
    after = [0.98, 0.981, 0.98, 0.981]
    study.history = pd.DataFrame({"condition": "bn", "seed": 1, "epoch": range(1, 11), "val_accuracy": first + after})
    table = stability(study)["bn"]
    assert table["first rate", 1] == pytest.approx(np.std(100 * np.diff(first), ddof=1))
    assert table["after", 1] == pytest.approx(np.std(100 * np.diff(after), ddof=1))
