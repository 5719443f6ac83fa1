"""Statistics against closed forms, scipy and statsmodels, on numbers where the answer is known."""

import itertools

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.power import TTestPower

from s6lib.statistics import (
    condition_statistics,
    equal_conditions,
    equivalent,
    false_alarm_rate,
    friedman_p,
    mcnemar_p,
    mean_interval,
    paired_comparisons,
    power,
    run_sd,
    seeds_needed,
    sign_flip_means,
    sign_flip_p,
    variance_sources,
    verdict,
    verdict_on_best,
    wilson_interval,
)

VALUES = st.lists(st.integers(-99, 99), min_size=2, max_size=12).map(lambda whole: np.array(whole) / 4)
TABLES = st.integers(3, 7).flatmap(
    lambda seeds: st.lists(st.lists(st.integers(0, 60), min_size=4, max_size=4), min_size=seeds, max_size=seeds)
)


def table_of(**columns):
    """Outcomes in percent, seeds 1, 2, ..."""
    return pd.DataFrame(columns, index=pd.RangeIndex(1, 1 + len(next(iter(columns.values()))), name="seed"))


def percents(rows):
    """Hundredths of a percent above 99.4, as the accuracies of studies are."""
    return pd.DataFrame(99.4 + np.array(rows) / 100, columns=list("abcd")).round(2)


# --- tables that are not complete ------------------------------------------------------------------------------------

OF_TABLES = pytest.mark.parametrize("function", [condition_statistics, paired_comparisons, run_sd, friedman_p])


@OF_TABLES
def test_missing_runs_are_named(function):
    outcomes = table_of(a=[99.44, 99.51, 99.5], b=[99.5, None, np.inf], c=[99.4, 99.5, 99.6])
    with pytest.raises(ValueError, match="these outcomes are missing: b seed 2, b seed 3; run them"):
        function(outcomes)


@OF_TABLES
def test_one_seed_is_too_few(function):
    with pytest.raises(ValueError, match="at least two seeds, and the table has 1: run more"):
        function(table_of(a=[99.5], b=[99.4], c=[99.3]))


@OF_TABLES
def test_what_occurs_twice_is_refused(function):
    outcomes = table_of(a=[99.5, 99.4], b=[99.4, 99.5], c=[99.4, 99.5])
    with pytest.raises(ValueError, match="occur twice: seed 1"):
        function(outcomes.rename(index={2: 1}))
    with pytest.raises(ValueError, match="occur twice: condition a"):
        function(outcomes.rename(columns={"b": "a"}))


@OF_TABLES
def test_the_table_given_is_left_as_it_was(function):
    outcomes = table_of(a=[9950, 9940, 9951], b=[9940, 9942, 9950], c=[9940, 9942, 9960])
    before = outcomes.copy()
    function(outcomes)
    pd.testing.assert_frame_equal(outcomes, before)


# --- intervals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hits", "images"), [(9945, 10_000), (10_000, 10_000), (0, 20), (81, 263)])
def test_wilson_interval_is_the_closed_form(hits, images):
    z, p = scipy.stats.norm.ppf(0.975), hits / images
    center = (p + z * z / (2 * images)) / (1 + z * z / images)
    half = z / (1 + z * z / images) * (p * (1 - p) / images + z * z / (4 * images**2)) ** 0.5
    assert wilson_interval(p, images) == pytest.approx((center - half, center + half), abs=1e-12)


@pytest.mark.parametrize("percent", [99.5, -0.1, float("nan")])
def test_an_accuracy_in_percent_is_refused(percent):
    with pytest.raises(ValueError, match="divide percents by 100"):
        wilson_interval(percent)


@given(VALUES, st.sampled_from([0.90, 0.95, 0.99]))
def test_mean_interval_is_scipys(values, level):
    if np.ptp(values) == 0:
        expected = (values[0], values[0])
    else:
        expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(level)
    assert mean_interval(values, level) == pytest.approx(tuple(expected), abs=1e-9)


@given(VALUES, st.floats(0.01, 100), st.floats(-100, 100))
def test_mean_interval_moves_and_stretches_with_its_values(values, scale, shift):
    low, high = mean_interval(values)
    expected = (scale * low + shift, scale * high + shift)
    assert mean_interval(scale * values + shift) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("n", "level"), [(2, 0.95), (3, 0.90), (10, 0.95)])
def test_mean_interval_covers_as_it_says(n, level):
    samples = np.random.default_rng(0).normal(size=(2_000, n))
    covered = [low <= 0 <= high for low, high in (mean_interval(sample, level) for sample in samples)]
    assert np.mean(covered) == pytest.approx(level, abs=0.02)  # three standard errors


@pytest.mark.parametrize("level", [0, 1, 95, float("nan")])
def test_a_level_in_percent_is_refused(level):
    with pytest.raises(ValueError, match=r"between 0 and 1, not .*: 0.95 for 95%"):
        mean_interval([1, 2], level)


@given(VALUES.filter(lambda values: np.ptp(values) > 0), st.floats(0.1, 30))
def test_equivalence_is_that_both_one_sided_tests_reject(values, margin):
    above = scipy.stats.ttest_1samp(values, -margin, alternative="greater").pvalue
    below = scipy.stats.ttest_1samp(values, margin, alternative="less").pvalue
    assert equivalent(values, margin) == (max(above, below) < 0.05)


def test_what_is_equivalent_is_so_from_both_sides_and_needs_data():
    differences = [0.02, 0.01, 0.03, 0.02, 0.02]
    assert equivalent(differences, 0.05)
    assert equivalent([-value for value in differences], 0.05)
    assert not equivalent(differences, 0.02)
    assert not equivalent([0.1, -0.1], 0.05)  # a mean of zero is no proof


@pytest.mark.parametrize("margin", [0, -0.05, float("nan")])
def test_equivalence_needs_a_margin(margin):
    with pytest.raises(ValueError, match="the margin must be above 0"):
        equivalent([0.01, 0.02], margin)


@pytest.mark.parametrize("bad", [[], [1.0], [1.0, float("nan")], [[1.0, 2.0]]])
def test_too_little_data_is_refused(bad):
    for function in (mean_interval, sign_flip_p, lambda values: equivalent(values, 1)):
        with pytest.raises(ValueError, match="at least two finite numbers"):
            function(bad)


# --- tables ----------------------------------------------------------------------------------------------------------


def test_condition_statistics_are_in_the_unit_of_the_table():
    table = condition_statistics(table_of(a=[99.4, 99.5, 99.6], b=[1.0, 1.0, 1.0]))
    assert list(table) == ["condition", "n", "mean", "sd", "low", "high"]
    assert table["condition"].tolist() == ["a", "b"]
    half = 4.302653 * 0.1 / 3**0.5
    assert table.iloc[0, 1:].tolist() == pytest.approx([3, 99.5, 0.1, 99.5 - half, 99.5 + half])
    assert table.iloc[1, 1:].tolist() == pytest.approx([3, 1, 0, 1, 1])


def test_run_sd_is_that_of_runs_of_one_condition():
    assert run_sd(table_of(a=[99.4, 99.5, 99.6], b=[99.0, 99.0, 99.0])) == pytest.approx(0.1 / 2**0.5)


def test_paired_comparisons_of_known_differences():
    a = np.array([99.40, 99.50, 99.45, 99.55, 99.41, 99.49])
    b = a - np.array([5, 6, 4, 7, 5, 3]) / 100
    c = a + np.array([1, -1, 2, -2, 1, -1]) / 100
    table = paired_comparisons(table_of(a=a, b=b, c=c)).set_index(["first", "second"])
    assert table.loc[("a", "b"), ["n", "difference"]].tolist() == pytest.approx([6, 0.05])
    assert table.loc[("a", "b"), ["low", "high"]].tolist() == pytest.approx(mean_interval(a - b))
    assert table.loc[("a", "b"), "p"] == pytest.approx(2 / 64)
    assert table.loc[("a", "c"), "p"] == 1
    p = sorted(table["p"])
    assert sorted(table["p_holm"])[0] == pytest.approx(min(1, 3 * p[0]))
    assert (table["p_holm"] >= table["p"]).all()
    assert (table["seeds_0.02"] >= table["seeds_0.05"]).all()
    assert list(table["seeds_0.03"]) == [seeds_needed(sd, 0.03, comparisons=3) for sd in table["sd"]]


@settings(max_examples=30)
@given(TABLES, st.randoms(use_true_random=False))
def test_comparisons_are_paired_by_seed_in_whatever_order(rows, random):
    outcomes = percents(rows)
    shuffled = outcomes.loc[random.sample(list(outcomes.index), len(outcomes))]
    pd.testing.assert_frame_equal(paired_comparisons(shuffled), paired_comparisons(outcomes), rtol=1e-9, atol=1e-9)
    assert friedman_p(shuffled) == pytest.approx(friedman_p(outcomes))


@settings(max_examples=30)
@given(TABLES)
def test_swapped_conditions_differ_by_the_opposite(rows):
    outcomes = percents(rows)[["a", "b"]]
    (there,), (back,) = (paired_comparisons(outcomes[order]).itertuples() for order in (["a", "b"], ["b", "a"]))
    assert (back.difference, back.low, back.high) == pytest.approx((-there.difference, -there.high, -there.low))
    assert (back.p, back.sd) == pytest.approx((there.p, there.sd))


@settings(max_examples=30)
@given(TABLES, st.sampled_from([0.01, 100, 1 / 3]), st.sampled_from([0, -99.4, 1000]))
def test_p_values_do_not_depend_on_the_unit(rows, scale, shift):
    outcomes = percents(rows)
    moved = scale * (outcomes + shift)
    before, after = paired_comparisons(outcomes), paired_comparisons(moved)
    assert after["p"].tolist() == pytest.approx(before["p"].tolist())
    for column in ("difference", "low", "high", "sd"):
        assert after[column].tolist() == pytest.approx((scale * before[column]).tolist(), abs=1e-9)
    assert friedman_p(moved) == pytest.approx(friedman_p(outcomes))


@settings(max_examples=30)
@given(TABLES)
def test_percents_in_floats_give_the_p_of_whole_digits(rows):
    whole = pd.DataFrame(np.array(rows) + 9940, columns=list("abcd"))
    expected = [sign_flip_p(whole[first] - whole[second]) for first, second in itertools.combinations("abcd", 2)]
    assert paired_comparisons(whole / 100)["p"].tolist() == pytest.approx(expected, rel=1e-12)
    assert friedman_p(whole / 100) == friedman_p(whole)


def test_differences_that_floats_alone_make_are_none():
    third = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]) + 99
    noisy = third + 3e-14
    assert (noisy > third).all()
    outcomes = table_of(a=third, b=noisy, c=third)
    assert paired_comparisons(outcomes)["p"].tolist() == [1, 1, 1]
    assert friedman_p(outcomes) == 1


def test_a_pair_whose_differences_are_all_equal_is_compared():
    table = paired_comparisons(table_of(a=[99.4, 99.5], b=[99.3, 99.4]))
    assert table[["difference", "low", "high", "sd", "p"]].iloc[0].tolist() == pytest.approx([0.1, 0.1, 0.1, 0, 0.5])


def test_friedmans_p_is_that_of_the_formula():
    ranks = np.array([[1, 2, 3], [1, 3, 2], [1, 2, 3], [2, 1, 3], [1, 2, 3]])
    statistic = 12 / (5 * 3 * 4) * (ranks.sum(0) ** 2).sum() - 3 * 5 * 4
    expected = scipy.stats.chi2.sf(statistic, 2)
    assert friedman_p(pd.DataFrame(np.add(np.exp(ranks), [[10], [20], [5], [1], [7]]))) == pytest.approx(expected)


def test_friedmans_test_of_two_is_refused():
    with pytest.raises(ValueError, match=r"at least three conditions, and the table has a, b: .*paired_comparisons"):
        friedman_p(table_of(a=[99.4, 99.5], b=[99.3, 99.4]))


# --- tests -----------------------------------------------------------------------------------------------------------


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
    assert 99.34 - 99.30 != 99.32 - 99.28  # in floats, though both are 0.04
    assert sign_flip_p([99.34 - 99.30, 99.28 - 99.32, 99.34 - 99.30, 99.28 - 99.32]) == 1.0


@settings(max_examples=30)
@given(VALUES)
def test_sign_flip_means_are_those_of_all_signs(differences):
    signs = np.array(list(itertools.product([-1, 1], repeat=len(differences))))
    expected, means = (signs * differences).mean(1), sign_flip_means(differences)
    near = 2e-6 * np.abs(differences).sum() + 1e-12
    for mean in np.unique(expected):
        assert means[np.abs(means.index - mean) < near].sum() == pytest.approx(np.mean(np.abs(expected - mean) < near))


@given(VALUES, st.sampled_from([-3, 0.01, 1 / 3]))
def test_sign_flip_knows_no_unit_and_no_side(differences, scale):
    assert sign_flip_p(scale * differences) == pytest.approx(sign_flip_p(differences))
    assert sign_flip_p(differences[::-1]) == pytest.approx(sign_flip_p(differences))


@pytest.mark.parametrize("n", [24, 122])
def test_sign_flip_is_exact_for_many_seeds(n):
    """Of n ones and some minus ones, the sum is binomial."""
    differences = np.ones(n)
    differences[: n // 3] = -1
    expected = scipy.stats.binomtest(n // 3, n).pvalue
    assert sign_flip_p(differences) == pytest.approx(expected, rel=1e-9)


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


@pytest.mark.parametrize("comparisons", [1, 15])
@pytest.mark.parametrize("n", [2, 10, 32])
@pytest.mark.parametrize("effect", [1e-4, 0.3, 1.0, 2.5])
def test_power_is_statsmodels(effect, n, comparisons):
    expected = TTestPower().power(effect, n, 0.05 / comparisons)
    if np.isnan(expected):  # SciPy 1.15 gives no number where the power is almost 1
        expected = 1.0
    assert power(0.05, 0.05 * effect, n, comparisons) == pytest.approx(expected)


def test_power_is_how_often_the_t_test_finds_the_difference():
    samples = np.random.default_rng(0).normal(0.03, 0.05, size=(4_000, 12))
    found = scipy.stats.ttest_1samp(samples, 0, axis=1).pvalue <= 0.05
    assert found.mean() == pytest.approx(power(0.05, 0.03, 12), abs=0.025)


@given(st.floats(-9, 9), st.integers(2, 10_000), st.integers(1, 45))
def test_power_is_a_chance_however_large_the_effect(magnitude, n, comparisons):
    """scipy's noncentral t is nan here and there."""
    found = power(1.0, 10.0**magnitude, n, comparisons)
    assert 0.05 / comparisons <= found + 1e-9 <= 1 + 1e-6
    assert power(1.0, 2 * 10.0**magnitude, n, comparisons) >= found - 1e-6


def test_power_without_spread_is_certain():
    assert power(0, 0.01, 2) == 1


@settings(max_examples=40)
@given(st.floats(0.001, 0.5), st.sampled_from([0.02, 0.05]), st.integers(1, 15))
def test_as_many_seeds_as_needed_have_the_power(sd, difference, comparisons):
    n = seeds_needed(sd, difference, comparisons)
    assert power(sd, difference, n, comparisons) >= 0.8
    assert power(sd, difference, n - 1, comparisons) < 0.8 or sign_flip_p([1] * (n - 1)) > 0.05 / comparisons


@pytest.mark.parametrize("bad", [(-1, 0.05), (0.05, 0), (float("nan"), 0.05), (0.05, 0.05, 0)])
def test_power_for_nothing_is_refused(bad):
    with pytest.raises(ValueError, match="the SD must be at least 0, the difference above 0"):
        seeds_needed(*bad)
    with pytest.raises(ValueError, match="the SD must be at least 0, the difference above 0"):
        power(*bad[:2], 10, *bad[2:])
    with pytest.raises(ValueError, match="at least two seeds"):
        power(0.05, 0.05, 1)


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
    assert variance_sources(pd.DataFrame(same, index=[3, 1, 7, 5, 9])) == only_images


def test_conditions_of_different_seeds_have_no_difference():
    first = pd.DataFrame(np.random.default_rng(0).random((3, 50)) < 0.9, index=[1, 2, 3])
    second = first.set_axis([4, 3, 2])
    for difference in (first.astype(int) - second, second.astype(int) - first.astype(int)):
        with pytest.raises(ValueError, match="pair by seed, and one of them lacks: 1, 4; leave these seeds out"):
            variance_sources(difference)
    assert variance_sources(first.astype(int) - first[::-1]) == {"seeds": 0, "images": 0, "both": 0}


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
    assert mcnemar_p(first.astype(int), second.astype(int)) == mcnemar_p(first, second)
    with pytest.raises(ValueError, match=r"the same images, not on \(100,\) and \(99,\)"):
        mcnemar_p(first, second[1:])


def test_the_method_does_not_cry_wolf():
    normal = np.random.default_rng(0).normal(9950, 6, size=5_000).round()
    # 500 comparisons of a condition with itself: 5% within three standard errors, and less for the ties.
    assert 0.02 <= false_alarm_rate(normal, seeds=10, comparisons=500) <= 0.08
    assert false_alarm_rate(normal, seeds=5, comparisons=200) == 0  # the least p of five pairs is 2/32
    with pytest.raises(ValueError, match="at least two finite numbers"):
        false_alarm_rate([9950], seeds=10)


def test_a_verdict_needs_evidence():
    assert verdict(0.03, 0.05) == "supported"
    assert verdict(-0.03, 0.05) == "contradicted"
    assert verdict(0.03, 0.051) == "cannot be told at this n"
    assert verdict(0.03, float("nan")) == "cannot be told at this n"


@pytest.mark.parametrize(
    ("p_over_b", "p_over_c", "a_is_best", "c_is_best"),
    [
        (0.01, 0.02, "supported", "contradicted"),
        (0.01, 0.30, "cannot be told at this n", "cannot be told at this n"),
        (0.30, 0.02, "cannot be told at this n", "contradicted"),
    ],
)
def test_the_best_must_beat_every_other(p_over_b, p_over_c, a_is_best, c_is_best):
    rows = [("a", "b", 0.03, p_over_b), ("c", "a", -0.05, p_over_c), ("b", "c", 9, 0.9)]
    comparisons = pd.DataFrame(rows, columns=["first", "second", "difference", "p_holm"])
    assert verdict_on_best(comparisons, "a", ["b", "c"]) == a_is_best
    assert verdict_on_best(comparisons, "c", ["a", "b"]) == c_is_best


def test_what_was_not_compared_has_no_verdict():
    with pytest.raises(ValueError, match="a comparison needs two conditions, and the table has a alone"):
        paired_comparisons(table_of(a=[99.4, 99.5]))
    comparisons = paired_comparisons(table_of(a=[99.4, 99.5], b=[99.5, 99.4]))
    for best, other in (("a", "c"), ("c", "b")):
        with pytest.raises(ValueError, match=f"no comparison of {best} with {other}"):
            verdict_on_best(comparisons, best, [other])
    with pytest.raises(ValueError, match="a is compared with none"):
        verdict_on_best(comparisons, "a", [])


def test_equal_conditions_win_by_turns():
    shares, spread = equal_conditions(0.035)
    assert shares.sum() == pytest.approx(1)
    assert shares == pytest.approx([0.2] * 5, abs=0.02)
    assert spread == pytest.approx(0.035 * 2.326, abs=0.003)  # the mean range of five normal values
