"""Statistics against closed forms, scipy and statsmodels, on numbers where the answer is known."""

import io
import itertools
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.power import TTestPower

from s6lib.statistics import (
    condition_statistics,
    friedman_p,
    mean_interval,
    paired_comparisons,
    power,
    run_sd,
    seeds_needed,
    sign_flip_means,
    sign_flip_p,
    verdict,
    wilson_interval,
)

VALUES = st.lists(st.integers(-99, 99), min_size=2, max_size=12).map(lambda whole: np.array(whole) / 4)
TABLES = st.integers(3, 7).flatmap(
    lambda seeds: st.lists(st.lists(st.integers(0, 60), min_size=4, max_size=4), min_size=seeds, max_size=seeds)
)
OF_TABLES = pytest.mark.parametrize("function", [condition_statistics, paired_comparisons, run_sd, friedman_p])


def table_of(**columns):
    """Outcomes in percent, seeds 1, 2, ..."""
    return pd.DataFrame(columns, index=pd.RangeIndex(1, 1 + len(next(iter(columns.values()))), name="seed"))


def percents(rows):
    """Hundredths of a percent above 99.4, as the accuracies of studies are."""
    return pd.DataFrame(99.4 + np.array(rows) / 100, columns=list("abcd")).round(2)


# --- other people's tables -------------------------------------------------------------------------------------------

PEOPLES = table_of(a=[99.1, 99.3, 99.2, 99.4], b=[99.0, 99.1, 99.15, 99.2], c=[99.2, 99.1, 99.3, 99.0])


def read_back(table, **options):
    return pd.read_csv(io.StringIO(table.to_csv(**options)))


@OF_TABLES
@pytest.mark.parametrize(
    "same",
    [
        read_back(PEOPLES),
        read_back(PEOPLES.rename_axis("Seed")),
        read_back(PEOPLES.rename_axis(None)),
        read_back(PEOPLES.reset_index()),
        read_back(PEOPLES, index=False),
        PEOPLES.reset_index(),
        PEOPLES.to_dict("list"),
        PEOPLES.to_dict(),
        PEOPLES.astype(str),
        PEOPLES.astype(object),
        PEOPLES.astype("Float64"),
        PEOPLES.map(Decimal),
        PEOPLES.rename_axis(columns="condition"),
    ],
)
def test_a_table_means_the_same_however_it_came(function, same):
    expected, found = function(PEOPLES), function(same)
    if isinstance(expected, float):
        assert found == expected
    else:
        pd.testing.assert_frame_equal(found, expected)


@pytest.mark.parametrize("plain", [PEOPLES.to_numpy(), PEOPLES.to_numpy().tolist()])
def test_the_columns_of_an_array_are_numbered(plain):
    comparisons = paired_comparisons(plain)
    assert comparisons[["first", "second"]].to_numpy().tolist() == [[0, 1], [0, 2], [1, 2]]
    assert comparisons["difference"].tolist() == paired_comparisons(PEOPLES)["difference"].tolist()


LONG = PEOPLES.reset_index().melt("seed", var_name="condition", value_name="test_accuracy")
WRONG = {
    "long": (LONG, "pivot a table that has one row per run"),
    "long, indexed": (LONG.set_index("condition")[["test_accuracy"]], "pivot a table that has one row per run"),
    "transposed": (PEOPLES.T, "transpose one with a row per condition"),
    "transposed, read back": (read_back(PEOPLES.rename_axis(None).T), "transpose one with a row per condition"),
    "levels": (pd.concat({"x": PEOPLES}, axis=1), "several levels of names"),
    "levels of rows": (PEOPLES.stack(), "several levels of names"),
    "percents": (PEOPLES.astype(str) + "%", "make every outcome a number first: .*99.1%"),
    "commas": (PEOPLES.astype(str).replace(r"[.]", ",", regex=True), "make every outcome a number first: .*99,1"),
    "complex": (PEOPLES.astype(complex), "make every outcome a number first"),
    "dates": (PEOPLES.map(lambda value: pd.Timestamp("2026")), "make every outcome a number first"),
    "huge": (PEOPLES.map(lambda value: 10**400), "make every outcome a number first"),
    "ragged": ({"a": [1, 2, 3], "b": [1, 2]}, "one column per condition, and this dict has not"),
    "scalars": ({"a": 99.1, "b": 99.2, "c": 99.3}, "one column per condition, and this dict has not"),
    "text": ("results", "one column per condition, and this str has not"),
    "number": (99.1, "one column per condition, and this float has not"),
    "cube": (np.zeros((2, 3, 4)), "one column per condition, and this ndarray has not"),
    "nothing": (None, r"conditions or more, and the table has \[\]: add columns"),
    "empty": (PEOPLES.iloc[:0], "at least two seeds, and the table has 0: run more"),
    "one seed": (PEOPLES.iloc[:1], "at least two seeds, and the table has 1: run more"),
    "missing": (PEOPLES.where(PEOPLES < 99.4), "run a seed 4, or leave these seeds out"),
    "infinite": (PEOPLES.replace({"b": {99.1: np.inf, 99.15: None}}), "run b seed 2, b seed 3, or leave"),
    "seed twice": (PEOPLES.rename(index={2: 1}), "seed 1 occurs twice"),
    "condition twice": (PEOPLES.rename(columns={"b": "a"}), "condition a occurs twice"),
}


@OF_TABLES
@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_table_of_outcomes_is_refused_in_one_sentence(function, kind):
    table, sentence = WRONG[kind]
    with pytest.raises(ValueError, match=sentence) as error:
        function(table)
    assert "\n" not in str(error.value)


def test_too_few_conditions_are_refused():
    with pytest.raises(ValueError, match=r"needs 2 conditions or more, and the table has \['a'\]"):
        paired_comparisons(PEOPLES["a"])
    with pytest.raises(ValueError, match=r"needs 3 conditions or more, and the table has \['a', 'b'\]"):
        friedman_p(PEOPLES[["a", "b"]])


def test_yes_and_no_are_outcomes_too():
    assert condition_statistics(PEOPLES > 99.15)["mean"].tolist() == [0.75, 0.25, 0.5]


@OF_TABLES
def test_the_table_given_is_left_as_it_was(function):
    outcomes = table_of(a=[9950, 9940, 9951], b=[9940, 9942, 9950], c=[9940, 9942, 9960])
    before = outcomes.copy()
    function(outcomes)
    pd.testing.assert_frame_equal(outcomes, before)


@pytest.mark.parametrize(("hits", "images"), [(9945, 10_000), (10_000, 10_000), (0, 20), (81, 263)])
def test_wilson_interval_is_the_closed_form(hits, images):
    z, p = scipy.stats.norm.ppf(0.975), hits / images
    center = (p + z * z / (2 * images)) / (1 + z * z / images)
    half = z / (1 + z * z / images) * (p * (1 - p) / images + z * z / (4 * images**2)) ** 0.5
    assert wilson_interval(p, images) == pytest.approx((center - half, center + half), abs=1e-12)


@given(VALUES, st.sampled_from([0.90, 0.95, 0.99]))
def test_mean_interval_is_scipys(values, level):
    if np.ptp(values) == 0:
        expected = (values[0], values[0])
    else:
        expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(level)
    assert mean_interval(values, level) == pytest.approx(tuple(expected), abs=1e-9)


def test_condition_statistics_are_in_the_unit_of_the_table():
    table = condition_statistics(table_of(a=[99.4, 99.5, 99.6], b=[1.0, 1.0, 1.0]))
    assert list(table) == ["condition", "n", "mean", "sd", "low", "high"]
    assert table["condition"].tolist() == ["a", "b"]
    half = 4.302653 * 0.1 / 3**0.5
    assert table.iloc[0, 1:].tolist() == pytest.approx([3, 99.5, 0.1, 99.5 - half, 99.5 + half])
    assert table.iloc[1, 1:].tolist() == pytest.approx([3, 1, 0, 1, 1])


def test_run_sd_is_that_of_runs_of_one_condition():
    assert run_sd(table_of(a=[99.4, 99.5, 99.6], b=[99.0, 99.0, 99.0])) == pytest.approx(0.1 / 2**0.5)


@pytest.mark.parametrize("percent", [99.5, -0.1, float("nan")])
def test_an_accuracy_in_percent_is_refused(percent):
    with pytest.raises(ValueError, match="divide percents by 100"):
        wilson_interval(percent)
    with pytest.raises(ValueError, match=r"between 0 and 1, not .*: 0.95 for 95%"):
        mean_interval([1, 2], percent)


@pytest.mark.parametrize(
    "bad", [[], [1.0], [1.0, np.nan], [[1.0, 2.0]], ["a", "b"], [1j, 2], [[1], [2, 3]], {1, 2}, 5, None, PEOPLES]
)
def test_too_little_data_is_refused(bad):
    for function in (mean_interval, sign_flip_p, sign_flip_means):
        with pytest.raises(ValueError, match="a list of at least two finite numbers, not") as error:
            function(bad)
        assert "\n" not in str(error.value)


def test_paired_comparisons_of_known_differences():
    a = np.array([99.40, 99.50, 99.45, 99.55, 99.41, 99.49])
    b = a - np.array([5, 6, 4, 7, 5, 3]) / 100
    c = a + np.array([1, -1, 2, -2, 1, -1]) / 100
    table = paired_comparisons(table_of(a=a, b=b, c=c)).set_index(["first", "second"])
    assert table.loc[("a", "b"), ["n", "difference"]].tolist() == pytest.approx([6, 0.05])
    assert table.loc[("a", "b"), ["low", "high"]].tolist() == pytest.approx(mean_interval(a - b))
    assert table.loc[("a", "b"), "p"] == pytest.approx(2 / 64)
    assert table.loc[("a", "c"), "p"] == 1
    assert table["p_holm"].min() == pytest.approx(3 * table["p"].min())
    assert (table["p_holm"] >= table["p"]).all()


@settings(max_examples=15)
@given(TABLES, st.randoms(use_true_random=False))
def test_comparisons_are_paired_by_seed_in_whatever_order(rows, random):
    outcomes = percents(rows)
    shuffled = outcomes.loc[random.sample(list(outcomes.index), len(outcomes))]
    pd.testing.assert_frame_equal(paired_comparisons(shuffled), paired_comparisons(outcomes), rtol=1e-9, atol=1e-9)
    assert friedman_p(shuffled) == pytest.approx(friedman_p(outcomes))


@settings(max_examples=15)
@given(TABLES)
def test_swapped_conditions_differ_by_the_opposite(rows):
    outcomes = percents(rows)[["a", "b"]]
    (there,), (back,) = (paired_comparisons(outcomes[order]).itertuples() for order in (["a", "b"], ["b", "a"]))
    assert (back.difference, back.low, back.high) == pytest.approx((-there.difference, -there.high, -there.low))
    assert (back.p, back.sd) == pytest.approx((there.p, there.sd))


@settings(max_examples=15)
@given(TABLES, st.sampled_from([0.01, 100, 1 / 3]), st.sampled_from([0, -99.4, 1000]))
def test_p_values_do_not_depend_on_the_unit(rows, scale, shift):
    outcomes = percents(rows)
    moved = scale * (outcomes + shift)
    before, after = paired_comparisons(outcomes), paired_comparisons(moved)
    assert after["p"].tolist() == pytest.approx(before["p"].tolist())
    for column in ("difference", "low", "high", "sd"):
        assert after[column].tolist() == pytest.approx((scale * before[column]).tolist(), abs=1e-9)
    assert friedman_p(moved) == pytest.approx(friedman_p(outcomes))


@settings(max_examples=15)
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


@settings(max_examples=15)
@given(VALUES)
def test_sign_flip_means_are_those_of_all_signs(differences):
    signs = np.array(list(itertools.product([-1, 1], repeat=len(differences))))
    expected, means = (signs * differences).mean(1), sign_flip_means(differences)
    near = 2e-6 * np.abs(differences).sum() + 1e-12
    for mean in np.unique(expected):
        assert means[np.abs(means.index - mean) < near].sum() == pytest.approx(np.mean(np.abs(expected - mean) < near))


@pytest.mark.parametrize("n", [24, 122])
def test_sign_flip_is_exact_for_many_seeds(n):
    """Of n ones and some minus ones, the sum is binomial."""
    differences = np.ones(n)
    differences[: n // 3] = -1
    expected = scipy.stats.binomtest(n // 3, n).pvalue
    assert sign_flip_p(differences) == pytest.approx(expected, rel=1e-9)


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


@given(st.floats(-9, 9), st.integers(2, 10_000), st.integers(1, 45))
def test_power_is_a_chance_however_large_the_effect(magnitude, n, comparisons):
    """scipy's noncentral t is nan here and there."""
    found = power(1.0, 10.0**magnitude, n, comparisons)
    assert 0.05 / comparisons <= found + 1e-9 <= 1 + 1e-6
    assert power(1.0, 2 * 10.0**magnitude, n, comparisons) >= found - 1e-6


@settings(max_examples=40)
@given(st.floats(0.001, 0.5), st.sampled_from([0.02, 0.05]), st.integers(1, 15))
def test_as_many_seeds_as_needed_have_the_power(sd, difference, comparisons):
    n = seeds_needed(sd, difference, comparisons)
    assert power(sd, difference, n, comparisons) >= 0.8
    assert power(sd, difference, n - 1, comparisons) < 0.8 or sign_flip_p([1] * (n - 1)) > 0.05 / comparisons


def test_sign_flip_is_exact_for_differences_of_all_sizes():
    assert sign_flip_p([1e7] + [1.0] * 9) == 2 / 1024
    assert sign_flip_p([1e7, -1.0] + [1.0] * 8) == 20 / 1024  # of the ones, none or one has the other sign


def test_an_enormous_sd_ends_at_once():
    assert seeds_needed(1e8, 0.02) == pytest.approx(1.962e20, rel=1e-3)
    assert seeds_needed(6.001, 0.02) == pytest.approx(seeds_needed(5.999, 0.02), rel=1e-3)  # from t to normal
    with pytest.raises(ValueError, match="the SD must be at least 0 and finite"):
        seeds_needed(float("inf"), 0.02)


@pytest.mark.parametrize("bad", [(-1, 0.05), (0.05, 0), (float("nan"), 0.05), (0.05, 0.05, 0)])
def test_power_for_nothing_is_refused(bad):
    for function, n in ((seeds_needed, ()), (power, (10,))):
        with pytest.raises(ValueError, match="the SD must be at least 0 and finite, the difference above 0"):
            function(*bad[:2], *n, *bad[2:])
    with pytest.raises(ValueError, match="at least two seeds"):
        power(0.05, 0.05, 1)
    assert power(0, 0.01, 2) == 1


def test_a_verdict_needs_evidence():
    assert verdict(0.03, 0.05) == "supported"
    assert verdict(-0.03, 0.05) == "contradicted"
    assert verdict(0.03, 0.051) == "cannot be told at this n"
    assert verdict(0.03, float("nan")) == "cannot be told at this n"
