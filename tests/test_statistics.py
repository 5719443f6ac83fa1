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

from s6lib import preregistered, preregistered_when, statistics
from s6lib.statistics import (
    condition_statistics,
    mean_interval,
    paired_comparisons,
    power,
    run_sd,
    seeds_needed,
    sign_flip_means,
    sign_flip_p,
    verdict,
)

VALUES = st.lists(st.integers(-99, 99), min_size=2, max_size=12).map(lambda whole: np.array(whole) / 4)
TABLES = st.integers(3, 7).flatmap(
    lambda seeds: st.lists(st.lists(st.integers(0, 60), min_size=4, max_size=4), min_size=seeds, max_size=seeds)
)
OF_TABLES = pytest.mark.parametrize("function", [condition_statistics, paired_comparisons, run_sd])


def table_of(**columns):
    """Outcomes in percent, seeds 1, 2, ..."""
    return pd.DataFrame(columns, index=pd.RangeIndex(1, 1 + len(next(iter(columns.values()))), name="seed"))


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
        PEOPLES.to_dict("list"),
        PEOPLES.astype(str),
        PEOPLES.astype("Float64"),
        PEOPLES.map(Decimal),
        PEOPLES.rename_axis(columns="condition"),
    ],
)
def test_a_table_means_the_same_however_it_came(function, same):
    before, expected = PEOPLES.copy(), function(PEOPLES)
    assert np.all(function(same) == expected)
    pd.testing.assert_frame_equal(PEOPLES, before)
    assert len(paired_comparisons(PEOPLES.set_axis(["index", "b", "Seed"], axis=1))) == 3  # names of conditions here


LONG = PEOPLES.reset_index().melt("seed", var_name="condition", value_name="test_accuracy")
WRONG = {
    "long": (LONG, "pivot a table that has one row per run"),
    "transposed": (PEOPLES.T, "transpose one with a row per condition"),
    "transposed, read back": (read_back(PEOPLES.rename_axis(None).T), "transpose one with a row per condition"),
    "levels": (pd.concat({"x": PEOPLES}, axis=1), "several levels of names"),
    "percents": (PEOPLES.astype(str) + "%", "make every outcome a number first: .*99.1%"),
    "complex": (PEOPLES.astype(complex), "make every outcome a number first"),
    "scalars": ({"a": 99.1, "b": 99.2, "c": 99.3}, "one column per condition, and this dict has not"),
    "nothing": (None, r"conditions or more, and the table has \[\]: add columns"),
    "empty": (PEOPLES.iloc[:0], "at least two seeds, and the table has 0: run more"),
    "missing": (PEOPLES.where(PEOPLES < 99.4), "run a seed 4, or leave these seeds out"),
    "seed twice": (PEOPLES.rename(index={2: 1}), "seed 1 occurs twice"),
    "condition twice": (PEOPLES.rename(columns={"b": "a"}), "condition a occurs twice"),
}


@OF_TABLES
@pytest.mark.parametrize(("table", "sentence"), WRONG.values(), ids=WRONG)
def test_what_is_no_table_of_outcomes_is_refused_in_one_sentence(function, table, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        function(table)
    assert "\n" not in str(error.value)


def test_an_array_has_numbers_for_names_and_too_few_conditions_are_refused():
    for plain in (PEOPLES.to_numpy(), PEOPLES.to_numpy().tolist()):
        assert paired_comparisons(plain)[["first", "second"]].to_numpy().tolist() == [[0, 1], [0, 2], [1, 2]]
    with pytest.raises(ValueError, match=r"needs 2 conditions or more, and the table has \['a'\]"):
        paired_comparisons(PEOPLES["a"])


@pytest.mark.parametrize("module", [statistics, preregistered, preregistered_when])
@given(VALUES, st.sampled_from([0.90, 0.95, 0.99]))
def test_mean_interval_is_scipys(module, values, level):
    equal = np.ptp(values) == 0
    expected = values[:1].repeat(2) if equal else scipy.stats.ttest_1samp(values, 0).confidence_interval(level)
    assert module.mean_interval(values, level) == pytest.approx(tuple(expected), abs=1e-9)


@pytest.mark.parametrize("level", [99.5, -0.1, np.nan])
def test_a_level_in_percent_is_refused(level):
    with pytest.raises(ValueError, match=r"between 0 and 1, not .*: 0.95 for 95%"):
        mean_interval([1.0, 2.0], level)


def test_condition_statistics_are_in_the_unit_of_the_table():
    table = condition_statistics(table_of(a=[99.4, 99.5, 99.6], b=[1.0, 1.0, 1.0])).set_index("condition")
    half = 4.302653 * 0.1 / 3**0.5
    expected = {"n": 3, "mean": 99.5, "sd": 0.1, "low": 99.5 - half, "high": 99.5 + half}
    assert table.loc["a"].to_dict() == pytest.approx(expected)
    assert table.loc["b"].tolist() == pytest.approx([3, 1, 0, 1, 1])
    assert run_sd(table_of(a=[99.4, 99.5, 99.6], b=[99.0, 99.0, 99.0])) == pytest.approx(0.1 / 2**0.5)


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
@given(TABLES)
def test_percents_in_floats_give_the_p_of_whole_digits(rows):
    whole = pd.DataFrame(np.array(rows) + 9940, columns=list("abcd"))
    expected = [sign_flip_p(whole[first] - whole[second]) for first, second in itertools.combinations("abcd", 2)]
    assert paired_comparisons(whole / 100)["p"].tolist() == pytest.approx(expected, rel=1e-12)


def test_differences_that_floats_alone_make_are_none():
    third = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]) + 99
    noisy = third + 3e-14
    assert (noisy > third).all()
    assert paired_comparisons(table_of(a=third, b=noisy, c=third))["p"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("function", [sign_flip_p, preregistered.exact_sign_flip_p])
@settings(max_examples=40)
@given(st.lists(st.integers(-9, 9), min_size=2, max_size=9))
def test_sign_flip_is_the_count_over_all_signs(function, halves):
    """Of differences in steps of 0.005 points, as those of means of two runs: equal decimals may differ as floats."""
    sums = [abs(np.dot(signs, halves)) for signs in itertools.product((-1, 1), repeat=len(halves))]
    assert function(np.array(halves) / 200) == pytest.approx(np.mean(np.array(sums) >= abs(sum(halves))))


def test_sign_flip_sees_small_differences_beside_a_large_one():
    assert sign_flip_p([1e7, -1.0] + [1.0] * 8) == 20 / 1024  # of the ones, none or one has the other sign


@pytest.mark.parametrize("n", [24, 122])
def test_sign_flip_is_exact_for_many_seeds(n):
    """Of n ones and minus ones, the sum is binomial."""
    expected = scipy.stats.binomtest(n // 3, n).pvalue
    assert sign_flip_p([-1] * (n // 3) + [1] * (n - n // 3)) == pytest.approx(expected, rel=1e-9)


@given(st.floats(-9, 9), st.integers(2, 10_000), st.integers(1, 45))
def test_power_is_a_chance_however_large_the_effect(magnitude, n, comparisons):
    """scipy's noncentral t is nan here and there."""
    found = power(1.0, 10.0**magnitude, n, comparisons)
    assert 0.05 / comparisons <= found + 1e-9 <= 1 + 1e-6
    assert power(1.0, 2 * 10.0**magnitude, n, comparisons) >= found - 1e-6


def test_power_is_statsmodels():
    for effect, n, comparisons in itertools.product((1e-4, 0.3, 1.0), (2, 10, 32), (1, 15)):
        expected = np.nan_to_num(TTestPower().power(effect, n, 0.05 / comparisons), nan=1)
        assert power(0.05, 0.05 * effect, n, comparisons) == pytest.approx(expected)


@settings(max_examples=40)
@given(st.floats(0, 0.5), st.sampled_from([0.02, 0.05]), st.integers(1, 15))
def test_as_many_seeds_as_needed_have_the_power(sd, difference, comparisons):
    n = seeds_needed(sd, difference, comparisons)
    assert power(sd, difference, n, comparisons) >= 0.8
    assert 2.0 ** (1 - n) <= 0.05 / comparisons  # the least p of the sign-flip test
    # 1e-5: how near the solver comes.
    assert power(sd, difference, n - 1, comparisons) < 0.8 + 1e-5 or 2.0 ** (2 - n) > 0.05 / comparisons


def test_an_enormous_sd_ends_at_once():
    assert seeds_needed(1e8, 0.02) == pytest.approx(1.962e20, rel=1e-3)
    assert seeds_needed(6.001, 0.02) == pytest.approx(seeds_needed(5.999, 0.02), rel=1e-3)  # from t to normal


@pytest.mark.parametrize("bad", [(-1, 0.05), (0.05, 0), (np.nan, 0.05), (np.inf, 0.05), (0.05, 0.05, 0)])
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
    assert {verdict(0.03, 0.051), verdict(0.03, float("nan"))} == {"cannot be told at this n"}
