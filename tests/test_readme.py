"""The README and the pages in docs/ say what the repository holds."""

import importlib
import math
import re

import pandas as pd
import pytest
from scipy.stats import ttest_1samp
from statsmodels.stats.multitest import multipletests

from s6lib.__main__ import read_study_file as _own
from s6lib.analysis import passing, pruning_curve
from s6lib.data import PROJECT
from s6lib.preregistered import FACTORIAL, FACTORIAL_SEEDS, PENALTIES, PENALTY_SEEDS, answer, read
from s6lib.recipes import CONDITIONS, CONTROL, RECIPES, SPLIT_SWEEP
from s6lib.statistics import (
    condition_statistics,
    equal_conditions,
    friedman_p,
    mean_interval,
    paired_comparisons,
    run_sd,
    seeds_needed,
    wilson_interval,
)
from s6lib.study import Study

README = (PROJECT / "README.md").read_text()
RESULTS = (PROJECT / "docs" / "results.md").read_text()
DOCS = sorted((PROJECT / "docs").glob("*.md"))
PAGES = [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *DOCS]
LAYER = (PROJECT / "docs" / "ghost_batch_norm.md").read_text()
PREREGISTERED = ((FACTORIAL, FACTORIAL_SEEDS), (PENALTIES, PENALTY_SEEDS))


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_result_tables_are_the_published_runs(recipe):
    _, _, section = RESULTS.partition(f"{recipe.network.__name__}, ")
    rows = re.findall(r"^\| ([^|]+?) \| ([\d.]+) \| ([\d.]+) \((\d+)\) \| ([\d.]+) \|$", section, re.MULTILINE)[:5]
    summary = Study(PROJECT / "results", recipe.name, CONDITIONS, seeds=(1,)).summary()
    expected = [
        (
            row.label,
            f"{100 * row.accuracy:.2f}",
            f"{100 * row.best_accuracy:.2f}",
            str(row.best_epoch),
            f"{100 * row.train_accuracy:.2f}",
        )
        for row in summary.itertuples()
    ]
    assert rows == expected


SIX = (*CONDITIONS, CONTROL)


@pytest.fixture(scope="module")
def replication():
    """The study of the headline: as many seeds as it says, which are all that every condition has."""
    seeds = int(re.search(r"What (\d+) runs of each condition say", RESULTS)[1])
    every = [set(Study(PROJECT / "results", conditions=(c,)).seeds) for c in SIX]
    before = set(range(1, min(FACTORIAL_SEEDS)))  # the preregistered seeds are looked at when all are there
    assert set.intersection(*every) & before == set(range(1, seeds + 1))
    return Study(PROJECT / "results", conditions=SIX, seeds=range(1, seeds + 1))


def test_the_headline_is_what_the_results_say(replication):
    comparisons = paired_comparisons(replication.outcomes())
    said = re.search(
        r"\*\*No condition can be told from another, nor from plain BatchNorm: the largest\s+of the (\d+) "
        r"paired differences is ([\d.]+) points,\s+and none of them is significant "
        r"\(smallest p after Holm's correction: ([\d.]+)\)\.\*\*",
        RESULTS,
    )
    assert int(said[1]) == len(comparisons)
    assert said[2] == f"{comparisons['difference'].abs().max():.2f}"
    assert said[3] == f"{comparisons['p_holm'].min():.2f}"
    assert comparisons["p_holm"].min() > 0.05
    room = re.search(r"the intervals\s+leave room for differences of up to ([\d.]+) points", RESULTS)[1]
    assert room == f"{comparisons[['low', 'high']].abs().max().max():.2f}"
    p = friedman_p(replication.outcomes())
    assert re.search(r"Friedman's, chosen\s+afterwards: p = ([\d.]+)\)", RESULTS)[1] == f"{p:.3f}"
    hold_zero = ((comparisons["low"] <= 0) & (comparisons["high"] >= 0)).sum()
    assert f"95% intervals, of which {hold_zero} hold zero" in RESULTS


def test_the_first_screen_is_what_the_results_say(replication):
    """In test digits, of 10,000."""
    sd = run_sd(replication.outcomes())
    two_runs = 2 / math.sqrt(math.pi) * sd  # the mean distance of two normal values
    told = r"differ by about (\d+) digits, and the best and worst of five \*equal\* variants by about (\d+)\."
    said = re.search(told, " ".join(README.split()))
    assert said.groups() == (f"{100 * two_runs:.0f}", f"{100 * equal_conditions(sd)[1]:.0f}")


def points(value: float) -> str:
    return f"{value:+.3f}".replace("-", "\N{MINUS SIGN}")


@pytest.fixture(scope="module")
def answers():
    """The preregistered answers, a row each. G is what GBN costs; here, as in the sentences, above 0 is a gain."""
    found = answer(*(read(PROJECT / "results", *of) for of in PREREGISTERED))
    gain, cost = ["mean", "low_95", "high_95", "low_90", "high_90"], ["mean", "high_95", "low_95", "high_90", "low_90"]
    found.loc[0, gain] = -found.loc[0, cost].to_numpy(dtype=float)
    found["question"] = found["question"].str.replace(" - ", " minus ")
    return found


def interval_of(row: pd.Series, level: int) -> str:
    return f"{points(row[f'low_{level}'])} to {points(row[f'high_{level}'])}"


def luck_of(row: pd.Series) -> str:
    return "p < 0.001" if row["p_holm"] < 0.001 else f"p = {row['p_holm']:.3f}"


def answers_in_words(answers: pd.DataFrame) -> list[str]:
    """The README's sentences on G, P and E, as docs/preregistration.md prescribes them."""
    subjects = ("`GhostBatchNorm` (4 ghosts) instead of BatchNorm", "L1 + L2 instead of no penalty")
    lines = [f"{subject}: **{said}**." for subject, said in zip(subjects, answers["said"].iloc[:2], strict=True)]
    pairs = answers.iloc[2:]
    apart = pairs.loc[pairs["said"] != "within 0.05 points", "question"]
    said = f"not shown to be within 0.05 points: {', '.join(apart)}" if len(apart) else "all within 0.05 points"
    return [*lines, f"L1, L2 and L1 + L2, with BatchNorm: **{said}**."]


def answers_in_a_table(answers: pd.DataFrame) -> list[str]:
    """The same in docs/results.md, with every interval and p-value."""
    names = {"G": "G: GBN (4 ghosts) in place of BN", "P": "P: L1 + L2"}
    rows = []
    for _, row in answers.iterrows():
        name, luck = names.get(row["question"], f"E: {row['question']}"), luck_of(row) if row["p"] >= 0 else ""
        cells = (name, row["n"], points(row["mean"]), interval_of(row, 95), interval_of(row, 90), luck, row["said"])
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return rows


def test_the_preregistered_answer_is_said_as_the_page_prescribes(answers):
    for line in answers_in_words(answers):
        assert line in " ".join(README.split())
    assert re.findall(r"^\| [GPE]: .*$", RESULTS, re.MULTILINE) == answers_in_a_table(answers)
    assert f"its p alone is {answers['p'][0]:.3f};" in RESULTS


def test_the_preregistered_runs_are_as_many_and_from_where_it_is_said():
    about = pd.concat(Study(PROJECT / "results", "plain", *of).about() for of in PREREGISTERED)
    about = about.drop_duplicates(["condition", "seed"])
    assert f"and then {len(FACTORIAL_SEEDS)} fresh seeds were run" in " ".join(README.split())
    assert f"{len(about)} of {len(about)} runs are in" in (PROJECT / "notebooks" / "05_replication.ipynb").read_text()
    (processor,) = set(about["processor"])
    versions = " and ".join(sorted({torch.split("+")[0] for torch in about["torch"]}))
    assert f'{len(about)} runs, on processors that call themselves "{processor}", by torch {versions}' in " ".join(
        RESULTS.split()
    )


def test_pruning_leaves_what_is_said(replication, mnist):
    """On every tenth test digit, as in the notebook that draws it."""
    digits = mnist[1].part(slice(None, None, 10))
    study = Study(PROJECT / "results", conditions=("l1-bn", "bn"), seeds=replication.seeds)
    left = pruning_curve(study, digits, [0.7]).groupby("condition")["accuracy"].mean()
    said = re.search(
        r"smallest (\d+)% of .*? with L1\s+it still gets (\d+)% .*?trained without a penalty (\d+)%", README, re.DOTALL
    )
    assert said.groups() == ("70", f"{100 * left['l1-bn']:.0f}", f"{100 * left['bn']:.0f}")


def test_the_largest_difference_on_new_seeds_is_as_said(replication):
    largest = (
        paired_comparisons(replication.outcomes()).query("first == 'l2-bn' and second == 'gbn'")["difference"].item()
    )
    chosen = [condition for condition in CONDITIONS if condition.slug in ("l2-bn", "gbn")]
    (new,) = paired_comparisons(
        Study(PROJECT / "results", conditions=chosen, seeds=range(11, 21)).outcomes()
    ).itertuples()
    said = re.search(
        r"On (\d+) new seeds the\s+difference, L2 \+ BN over GBN, is ([\d.]+) points, 95%\s+interval\s+(\S+) to (\S+), "
        r"and does not pass the one test that\s+was fixed before they were run \(p = ([\d.]+)\)",
        RESULTS,
    )
    numbers = (
        f"{new.difference:.3f}",
        f"{new.low:.3f}".replace("-", "\N{MINUS SIGN}"),
        f"{new.high:.3f}",
        f"{new.p:.2f}",
    )
    assert said.groups() == (str(new.n), *numbers)
    assert 0 < new.difference < largest


def test_luck_alone_does_what_the_readme_says(replication):
    sd = run_sd(replication.outcomes())
    said = re.search(r"scatter with an SD\s+of ([\d.]+) points.*?would lie ([\d.]+) points apart", RESULTS, re.DOTALL)
    assert said.groups() == (f"{sd:.3f}", f"{equal_conditions(sd)[1]:.2f}")


def test_it_takes_as_many_seeds_as_said(replication):
    comparisons = paired_comparisons(replication.outcomes())
    pair_sd = (comparisons["sd"] ** 2).mean() ** 0.5
    for size, said in (
        (0.05, re.search(r"difference of 0\.05 points .*? needs\s+(\d+) seeds", RESULTS, re.DOTALL)),
        (0.02, re.search(r"one of 0\.02 points, (\d+)\.", RESULTS)),
    ):
        assert int(said[1]) == seeds_needed(pair_sd, size, len(comparisons))


def test_the_table_of_means_is_what_the_results_say(replication):
    statistics = condition_statistics(replication.outcomes())
    lowest, highest = (statistics.loc[getattr(statistics["mean"], which)()] for which in ("idxmin", "idxmax"))
    labels = replication.labels
    ends = [f"{labels[row['condition']]}, {row['mean']:.2f}%" for row in (lowest, highest)]
    assert f"with means from {ends[0]}, to {ends[1]}]" in RESULTS
    assert f"The lowest is {labels[lowest['condition']]}." in RESULTS
    rows = re.findall(
        r"^\| ([^|]+?) \| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) to ([\d.]+) \|$", RESULTS, re.MULTILINE
    )
    expected = [
        (labels[row.condition], str(row.n), f"{row.mean:.3f}", f"{row.sd:.3f}", f"{row.low:.2f}", f"{row.high:.2f}")
        for row in statistics.itertuples()
    ]
    assert rows == expected


def test_three_seeds_of_another_network_and_of_the_splits_are_as_said():
    study = Study(PROJECT / "results", "bottleneck", conditions=SIX)
    bottleneck = condition_statistics(study.outcomes())
    bottleneck["label"] = bottleneck["condition"].map(study.labels)
    assert bottleneck["n"].tolist() == [3] * 6
    highest, lowest = (bottleneck.loc[getattr(bottleneck["mean"], which)()] for which in ("idxmax", "idxmin"))
    said = re.search(r"different: (.*) is the highest, ([\d.]+)%, and (.*) the\s+lowest, ([\d.]+)%", RESULTS).groups()
    assert said == (highest["label"], f"{highest['mean']:.2f}", lowest["label"], f"{lowest['mean']:.2f}")

    sweep = condition_statistics(Study(PROJECT / "results", conditions=SPLIT_SWEEP).outcomes()).set_index("condition")
    assert sweep["n"].tolist() == [3] * 4
    said = re.search(r"no drop up to 8 \(([\d.]+)%\); with 32 it\s+is ([\d.]+)%", RESULTS).groups()
    assert said == (f"{sweep.loc['gbn-8', 'mean']:.2f}", f"{sweep.loc['gbn-32', 'mean']:.2f}")


def test_a_second_seed_moves_the_accuracies_as_said():
    said = re.search(r"changes these\s+accuracies by up to\s+([\d.]+) points and has another winner", RESULTS)
    outcomes = Study(PROJECT / "results", conditions=CONDITIONS, seeds=(1, 2)).outcomes()
    assert (outcomes.loc[1] - outcomes.loc[2]).abs().max() == pytest.approx(float(said[1]))
    assert outcomes.loc[1].idxmax() != outcomes.loc[2].idxmax()


def signed(number, digits=3):
    return f"{round(number, digits) + 0.0:.{digits}f}".replace("-", "\N{MINUS SIGN}")  # never -0.0


def test_one_accuracy_is_as_uncertain_as_said():
    said = float(re.search(r"uncertain by about ([\d.]+) points either way", RESULTS)[1])
    low, high = wilson_interval(0.995)
    assert 100 * (high - low) / 2 == pytest.approx(said, abs=0.01)


def averaged():
    return Study(PROJECT / "results", conditions="average")


@pytest.fixture(scope="module")
def frontier():
    """A row a size after 25 epochs, as condition_statistics has it, with network and parameters."""
    tables = []
    for name, study in (
        ("SeparableNet", Study(PROJECT / "results" / "epochs-25", "frontier")),
        ("PlainNet", averaged()),
    ):
        table = condition_statistics(study.outcomes())
        models = [study.model(slug) for slug in table["condition"]]
        counts = [sum(weights.numel() for weights in model.parameters()) for model in models]
        tables.append(table.assign(network=name, parameters=counts))
    return pd.concat(tables, ignore_index=True)


@pytest.fixture(scope="module")
def challenge():
    """By condition, whether the last five of 15 epochs are at 99.40% or more, for each seed."""
    return passing(Study(PROJECT / "results" / "epochs-15", "frontier").history(), 0.994, 5).groupby("condition")


def test_the_table_of_the_frontier_is_what_the_results_say(frontier, challenge):
    passed = {slug: f"{runs.sum()} of {len(runs)}" for slug, runs in challenge}
    expected = [
        (
            f"{row.network}, {row.parameters:,}",
            str(row.n),
            f"{row.mean:.3f}",
            f"{row.low:.2f}",
            f"{row.high:.2f}",
            passed.get(row.condition, ""),
        )
        for row in frontier.itertuples()
    ]
    rows = re.findall(
        r"^\| (\w+, [\d,]+) \| (\d+) \| ([\d.]+) \| ([\d.]+) to ([\d.]+) \| (.*?) ?\|$", RESULTS, re.MULTILINE
    )
    assert rows == expected


def test_no_goal_of_the_frontier_is_reached(frontier, challenge):
    passed, sizes = challenge.mean(), frontier.set_index("condition")["parameters"]
    reached = {
        "99.40% with 2,500": (frontier["mean"].round(6) >= 99.4)[frontier["parameters"] <= 2_500].any(),
        "99.60% with 10,000": (frontier["mean"].round(6) >= 99.6)[frontier["parameters"] <= 10_000].any(),
        "nine of ten with 4,000": (passed >= 0.9)[sizes[passed.index] <= 4_000].any(),
    }
    assert not any(reached.values()), reached
    assert "none of the goals set beforehand is reached" in RESULTS
    reports = pd.read_csv(PROJECT / "data" / "frontier.csv").query("kind == 'last' and accuracy >= 99.4")
    assert f"in one run, has {reports['parameters'].min():,} parameters" in " ".join(RESULTS.split())


def test_the_recipe_gains_what_is_said():
    gains = averaged().outcomes()["average"] - Study(PROJECT / "results", conditions="bn").outcomes()["bn"]
    gains = gains.dropna()
    numbers = gains.mean(), *mean_interval(gains)
    said = re.search(r"gains (\S+) points by it, .*?interval (\S+) to (\S+), n = (\d+)", RESULTS, re.DOTALL)
    assert said.groups() == (*map(signed, numbers), str(len(gains)))
    assert (numbers[1] <= 0) == (re.search(r"shown\s+by so few seeds", RESULTS) is not None)


def test_the_table_of_single_changes_is_what_the_results_say():
    slugs = ["bn", *(condition.slug for condition in _own(str(PROJECT / "studies" / "ablation.py"))[1])]
    study = Study(PROJECT / "results", conditions=slugs, seeds=range(1, 6))
    gains = study.outcomes().diff(axis=1).iloc[:, 1:]
    p_values = multipletests(ttest_1samp(gains, 0).pvalue, method="holm")[1]
    rows = re.findall(r"^\| (\D.*) \| (\S+) \| (\S+) to (\S+) \| ([\d.]+) \|$", RESULTS, re.MULTILINE)
    assert len(rows) == 6
    for row, slug, p in zip(rows, gains, p_values, strict=True):
        numbers = map(signed, (gains[slug].mean(), *mean_interval(gains[slug])))
        assert row == (study.labels[slug], *numbers, f"{p:.3f}")
    assert (p_values.min() > 0.05) == ("None is significant after the correction" in RESULTS)


def test_one_cycle_on_fresh_seeds_is_as_said():
    outcomes = Study(PROJECT / "results", conditions=("bn", "one-cycle"), seeds=range(6, 11)).outcomes()
    gains = outcomes["one-cycle"] - outcomes["bn"]
    numbers, p = (gains.mean(), *mean_interval(gains)), ttest_1samp(gains, 0).pvalue
    said = re.search(r"^(\S+) points \(95% interval (\S+) to (\S+), p = ([\d.]+)\): it (.*)\.$", RESULTS, re.MULTILINE)
    verdict = "is confirmed" if p <= 0.05 and gains.mean() > 0 else "is not confirmed"
    assert said.groups() == (*map(signed, numbers), f"{p:.3f}", verdict)
    said = re.search(r"gains PlainNet (\S+)\s+points \((\d+) fresh seeds\)", README)
    assert said.groups() == (signed(gains.mean(), 2), str(len(gains)))


def test_the_smallest_network_of_the_goal_is_as_said(frontier):
    networks = frontier[frontier["network"] == "SeparableNet"]
    row = networks[networks["mean"].round(6) >= 99.4].sort_values("parameters").iloc[0]
    said = re.search(r"with a mean of\s+99\.4% has\s+([\d,]+) parameters\s+\(([\d.]+)%, (\d+) seeds\)", README)
    assert said.groups() == (f"{row.parameters:,}", f"{row['mean']:.2f}", str(row.n))
    ends = [f"{row.parameters:,} parameters {row.mean:.2f}%" for row in networks.itertuples()]
    assert f"means of {row.n} seeds, {ends[0]}, {ends[-1]}]" in README
    assert len(ends) == 5


def test_the_citation_names_this_version():
    version = re.search(r'^version = "(.*)"$', (PROJECT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert f"\nversion: {version}\n" in (PROJECT / "CITATION.cff").read_text()


def test_figures_are_there_and_have_a_text():
    for page in PAGES:
        for text, path in re.findall(r"!\[([^\]]*)\]\((?!https?:)([^)]+)\)", page.read_text()):
            assert len(text) > 30
            assert (page.parent / path).is_file()


def test_linked_files_exist():
    for page in PAGES:
        for path in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / path).exists(), path


def test_every_page_is_linked_from_the_readme_which_is_short():
    assert all(f"({page.relative_to(PROJECT)})" in README for page in PAGES[1:])
    without_code = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    assert len(re.sub(r"\[!\[.*?\)\]\(.*?\)", "", without_code).split()) <= 800


def test_ci_runs_the_test_command_of_the_readme():
    command = re.search(r"&& (pytest .*)$", README, re.MULTILINE)[1]
    assert f"\n{command}\n" in (PROJECT / ".ci" / "run").read_text()


def test_the_ghost_batch_norm_example_runs():
    (example,) = [code for code in re.findall(r"```python\n(.*?)```", LAYER, re.DOTALL) if "resnet18" in code]
    exec(example, {})


def test_the_example_of_ones_own_runs_from_a_file(tmp_path, monkeypatch):
    (example,) = [code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "MyNet" in code]
    quick = example.replace("epochs=5", "epochs=1, train_images=640").replace("range(1, 6)", "range(1, 3)")
    (tmp_path / "readme_example.py").write_text(quick)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    example = importlib.import_module("readme_example")
    assert len(example.study.runs) == 14
    assert example.study.folder.resolve() == tmp_path / "runs"
