"""The README and the pages in docs/ say what the repository holds."""

import importlib
import re
import sys

import pandas as pd
import pytest

from s6lib.data import PROJECT
from s6lib.preregistered import FACTORIAL_SEEDS
from s6lib.statistics import friedman_p
from s6lib.study import Study

sys.path.insert(0, str(PROJECT / "docs"))
import write_numbers as numbers

README = (PROJECT / "README.md").read_text()
DOCS = sorted((PROJECT / "docs").glob("*.md"))
PAGES = [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *DOCS]
LAYER = (PROJECT / "docs" / "ghost_batch_norm.md").read_text()


@pytest.mark.parametrize("page", numbers.PAGES, ids=lambda page: page.stem)
def test_the_numbers_of_a_page_are_those_of_the_results(page):
    """If they are not: `python docs/write_numbers.py` writes them."""
    assert page.read_text() == numbers.fill(page.read_text())


def test_every_block_stands_on_one_page():
    markers = re.findall(r"<!-- begin (\S+) -->", "".join(page.read_text() for page in numbers.PAGES))
    assert sorted(markers) == sorted(numbers.BLOCKS)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("<!-- begin typo -->\n<!-- end typo -->", "typo"),
        ("<!-- begin frontier -->\n", "frontier"),
        ("<!-- begin frontier -->\n<!-- begin questions -->\n<!-- end questions -->", "frontier"),
        ("<!-- end frontier -->", "frontier"),
        ("<!-- begin frontier -->\n<!-- end questions -->", "frontier"),
        ("<!--begin frontier-->\n<!--end frontier-->", "frontier"),
    ],
)
def test_an_unknown_or_unclosed_marker_is_named(text, name):
    with pytest.raises(ValueError, match=rf"<!-- ?\w+ {name} ?-->"):
        numbers.fill(text)


def test_wrapping_breaks_no_code_and_starts_no_list():
    for width in range(90, 120):
        lines = numbers.paragraph(f"{'w' * width} L1 + L2 `some code` end").splitlines()
        assert not any(line.startswith("+") or line.count("`") == 1 for line in lines)


# What the blocks say in words holds only for some numbers:


def test_the_claims_about_the_preregistered_runs_hold():
    answers, runs = numbers.answers(), numbers.preregistered_runs()
    assert answers["said"].tolist() == 2 * ["no difference of 0.05 points or more"] + 3 * ["within 0.05 points"]
    g = answers.iloc[0]
    assert g["high_95"] < 0 or g["low_95"] > 0
    assert g["p"] <= 0.05 < g["p_holm"]  # so Holm's correction matters
    older = runs["torch"] == runs["torch"].min()
    assert older.equals((runs["seed"] >= 43) | (older & (runs["seed"] <= 22)))
    assert (older & (runs["seed"] < 43)).sum() == 10
    assert f"{len(runs)} of {len(runs)} runs are in" in (PROJECT / "notebooks" / "05_replication.ipynb").read_text()


def test_the_claims_about_ten_seeds_of_six_conditions_hold():
    seeds = [set(Study(PROJECT / "results", conditions=condition).seeds) for condition in numbers.SIX]
    before = set(range(1, min(FACTORIAL_SEEDS)))
    assert set.intersection(*seeds) & before == set(numbers.TEN_SEEDS)  # all there are
    comparisons, new = numbers.comparisons(), numbers.new_comparison()
    assert (len(numbers.TEN_SEEDS), len(comparisons)) == (10, 15)  # which some sentences spell out
    assert friedman_p(numbers.ten_seeds()) <= 0.05 < comparisons["p_holm"].min()
    assert (comparisons["low"] * comparisons["high"] > 0).any()  # some intervals exclude zero
    largest = comparisons.query("first == 'l2-bn' and second == 'gbn'")["difference"].item()
    assert (new["first"], new["second"]) == ("l2-bn", "gbn")
    assert 0 < new["difference"] < largest
    assert new["p"] > 0.05
    two = numbers.ten_seeds().loc[[1, 2]].drop(columns="bn").idxmax(axis=1)
    assert two[1] != two[2]


def test_the_claims_about_three_seeds_hold():
    bottleneck = numbers.study(*numbers.SIX, recipe="bottleneck")
    splits = numbers.study(*numbers.SPLIT_SWEEP)
    assert len(bottleneck.outcomes()) == len(splits.outcomes()) == 3
    plain = numbers.ten_seeds().mean().rename(bottleneck.labels).sort_values(ascending=False)
    assert list(numbers.bottleneck().index) != list(plain.index)


def test_the_claims_about_the_frontier_hold():
    sizes, passes = numbers.sizes(), numbers.passes()
    means, parameters = sizes["mean"].round(6), sizes.set_index("condition")["parameters"]
    assert not ((means >= 99.4) & (sizes["parameters"] <= 2_500)).any()
    assert not ((means >= 99.6) & (sizes["parameters"] <= 10_000)).any()
    assert not ((passes["share"] >= 0.9) & (parameters[passes.index] <= 4_000)).any()
    assert (sizes["network"] == "SeparableNet").sum() == 5
    assert set(sizes["n"]) == {10}
    changes = numbers.changes()
    assert (len(changes), set(changes["n"])) == (6, {5})
    assert changes["p_holm"].min() > 0.05
    assert changes.loc[changes["low"] > 0, "label"].tolist() == ["one cycle to 0.1"]
    assert min(numbers.recipe_gain()["low"], numbers.one_cycle_gain()["low"]) > 0


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
    without_code = re.sub(r"```.*?```|<!--.*?-->", "", README, flags=re.DOTALL)
    assert len(re.sub(r"\[!\[.*?\)\]\(.*?\)", "", without_code).split()) <= 800


def test_ci_runs_the_test_command_of_the_readme():
    command = re.search(r"&& (pytest .*)$", README, re.MULTILINE)[1]
    assert f"\n{command}\n" in (PROJECT / ".ci" / "run").read_text()


def test_the_ghost_batch_norm_example_runs():
    (example,) = [code for code in re.findall(r"```python\n(.*?)```", LAYER, re.DOTALL) if "resnet18" in code]
    exec(example, {})


@pytest.mark.slow
def test_the_example_of_ones_own_runs_from_a_file(tmp_path, monkeypatch):
    (example,) = [code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "MyNet" in code]
    quick = example.replace("epochs=5", "epochs=1, train_images=640").replace("range(1, 6)", "range(1, 3)")
    (tmp_path / "readme_example.py").write_text(quick)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    example = importlib.import_module("readme_example")
    assert len(example.study.runs) == 14
    assert example.study.folder.resolve() == tmp_path / "runs"


def test_the_claims_about_few_digits_hold():
    """Those of the README, of docs/results.md and of notebook 06."""
    assert numbers.preregistered_when.gain(numbers.WHEN)["said"].str.startswith("gains").all()
    means = {size: gains.mean() for size, gains in numbers.when_gains().items()}
    assert means[100].between(7.5, 16).all()
    assert means[300].between(2, 4.5).all()
    assert (means[1_000] < means[300] / 3 + 0.001).all()
    assert means[10_000].abs().max() < 0.15
    assert means[100].idxmax() == means[300].idxmax() == "rotation"
    assert round(numbers.nothing(1_000) - numbers.nothing(300)) == 5 > means[300].max()
    table = pd.read_csv(PROJECT / "studies" / "when_search.csv")
    assert (table.query("size == 300 and name == 'l2' and strength == 0.3")["accuracy"].round() == 10).all()
    together = table.query("name == 'together'").groupby("strength")["accuracy"].mean().round(1)
    assert together.to_dict() == {1.0: 81.9, 0.5: 96.0, 0.25: 95.5, 0.125: 94.0}
    batches = numbers.preregistered_when.batches(numbers.WHEN)
    large, *ghosts = batches["mean"].round(2)
    assert (large, ghosts) == (-0.65, [0.09, 0.09])
    assert 0.5 < batches["high"].max() / 0.65 < 0.6  # about half of the loss at most
    training = Study(numbers.WHEN, "when").summary().groupby("condition")["train_accuracy"].mean()
    assert training["300-nothing"] == 1  # by heart
    assert training[["batch-1024", "batch-1024-ghosts-64", "batch-1024-ghosts-16"]].max() < training["batch-64"]
    within = numbers.preregistered_when.within(numbers.WHEN)["said"]
    assert within.str.startswith("within").sum() == 4
    assert numbers.preregistered_when.exercise(numbers.WHEN)["said"].eq("no gain shown").all()
    more, less = numbers.preregistered_when.together(numbers.WHEN)["mean"]
    assert (round(more, 1), round(less)) == (0.9, -10)
    assert round(100 * Study(numbers.WHEN, "when", "300-together").summary()["accuracy"].mean(), 1) == 96.6
