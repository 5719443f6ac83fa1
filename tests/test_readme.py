"""The README and the pages in docs/ say what the repository holds."""

import re
import sys

import few_images
import pandas as pd
import pytest
import torch

import write_numbers as numbers
from s6lib.__main__ import read_study_file
from s6lib.data import PROJECT
from s6lib.preregistered import FACTORIAL, FACTORIAL_SEEDS, PENALTIES, PENALTY_SEEDS, answer, read
from s6lib.recipes import PLAIN
from s6lib.statistics import paired_comparisons
from s6lib.study import Study, recipes_in

README = (PROJECT / "README.md").read_text()
# Their words, in one line, where a number of them is set by hand
FIRST, RESULTS = (" ".join(re.sub(r"<!--.*?-->", "", page.read_text()).split()) for page in numbers.PAGES)
DOCS = sorted((PROJECT / "docs").glob("*.md"))
PAGES = [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *DOCS]
# What a page may say of numbers without a marker: units, margins, strengths and quotes; versions and a licence
SETTINGS = {"0.01", "0.05", "0.2", "0.0002", "0.0001", "99.4", "0.1", "0.8", "0.11", "1.5"}
VERSIONS = {"3.10", "3.11.7", "2.14.1", "2.15.0", "3.0"}


@pytest.mark.parametrize("page", numbers.PAGES, ids=lambda page: page.stem)
class TestPage:
    def test_its_numbers_are_those_of_the_results(self, page):
        """If they are not: `python docs/write_numbers.py` writes them."""
        assert page.read_text() == numbers.fill(page.read_text())

    def test_no_result_is_typed_by_hand_and_no_marker_ends_a_paragraph(self, page):
        text = numbers.MARKED.sub("", page.read_text())
        prose = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)|arXiv:\S+", "", text, flags=re.DOTALL)
        assert set(re.findall(r"\d+(?:\.\d+)+", prose)) <= SETTINGS | VERSIONS
        assert not re.search(r"(?<=[^\n])\n<!-- (?!/)", page.read_text())


def test_an_unknown_or_unclosed_marker_is_named():
    for text, named in {
        "<!-- typo -->1<!-- / -->": "<!-- typo --> names no number",
        "<!-- shares 300 l2 -->1": "<!-- shares 300 l2 --> has no counterpart",
        "<!-- shares 300 l2 -->1<!-- shares 300 l1 -->2<!-- / -->": "<!-- shares 300 l2 --> has no counterpart",
        "<!--shares 300 l2-->1<!-- / -->": "<!--shares 300 l2--> has no counterpart",
    }.items():
        with pytest.raises(ValueError, match=re.escape(named)):
            numbers.fill(text)


def test_an_interval_tells_on_which_side_of_zero_an_end_is():
    assert numbers.interval(-0.0018, 0.265, 2) == "\N{MINUS SIGN}0.002 to +0.265"
    assert numbers.interval(0.018, 0.265, 2) == "+0.02 to +0.27"


# What the pages say in words holds only for some numbers:


def test_the_claims_about_the_preregistered_runs_hold():
    asked = ((FACTORIAL, FACTORIAL_SEEDS), (PENALTIES, PENALTY_SEEDS))
    answers = answer(*(read(numbers.RESULTS, *runs) for runs in asked)).set_index("question")
    assert answers["said"].tolist() == 2 * ["no difference of 0.05 points or more"] + 3 * ["within 0.05 points"]
    assert answers["low_95"]["G"] > 0 or answers["high_95"]["G"] < 0
    assert answers["p"]["G"] <= 0.05 < answers["p_holm"]["G"]  # so Holm's correction matters
    ends = re.findall(r"([+\N{MINUS SIGN}]0\.\d+) to ([+\N{MINUS SIGN}]0\.\d+)", numbers.answer_table())
    assert len(ends) == 15  # 95%, 90%, and 90% over seeds and images
    assert all(abs(float(end.replace("\N{MINUS SIGN}", "-"))) < 0.05 for pair in ends[2::3] for end in pair)
    (first, last), (_, last_of_e) = ((seeds[0], seeds[-1]) for seeds in (FACTORIAL_SEEDS, PENALTY_SEEDS))
    assert f"seeds {first} to {last} ({first} to {last_of_e} for E)" in RESULTS
    many, few = len(FACTORIAL_SEEDS), len(PENALTY_SEEDS)
    assert f"{few} to {many} fresh seeds" in FIRST
    headlines = 2 * [("no difference of 0.05 points or more", str(many))] + [("all within 0.05 points", str(few))]
    assert re.findall(r"\*\*([^*]+)\*\* \(n = (\d+)", FIRST) == headlines
    runs = pd.concat(
        Study(numbers.RESULTS, "plain", conditions, seeds).about() for conditions, seeds in asked
    ).drop_duplicates(["condition", "seed"])
    assert f"These are {len(runs)} runs" in RESULTS
    assert set(runs["processor"]) == {"AMD EPYC (AVX512)"}
    older = runs["torch"].str.startswith("2.14.1")
    assert older.equals((runs["seed"] >= 43) | (older & (runs["seed"] <= 22)))
    assert runs[~older]["torch"].str.startswith("2.15.0").all()
    assert (older & (runs["seed"] < 43)).sum() == 10


def test_the_claims_about_what_others_reported_hold():
    reported = pd.read_csv(PROJECT / "data" / "reported.csv").pivot(index="repository", columns="condition")
    last = reported["last"].dropna()
    assert (len(reported), len(last)) == (10, 8)
    assert "[Ten public repositories](data/reported.csv) give one run of each; eight give the last-epoch" in FIRST
    assert set(last.eq(last.max(axis=1), axis=0).any().loc[lambda wins: wins].index) == set(numbers.SIX[:5])


def test_the_claims_about_ten_seeds_of_six_conditions_hold():
    seeds = [set(Study(PROJECT / "results", "plain", slug).seeds) for slug in numbers.SIX]
    before = set(range(1, min(FACTORIAL_SEEDS)))
    assert set.intersection(*seeds) & before == set(numbers.TEN_SEEDS)  # all there are
    pairs = paired_comparisons(Study(numbers.RESULTS, "plain", numbers.SIX, numbers.TEN_SEEDS).outcomes())
    largest = pairs.loc[pairs["difference"].abs().idxmax()]
    assert (len(pairs), largest["first"], largest["second"]) == (15, "l2-bn", "gbn")
    assert pairs["p_holm"].min() > 0.05
    new = paired_comparisons(Study(numbers.RESULTS, "plain", ("l2-bn", "gbn"), range(11, 21)).outcomes()).iloc[0]
    assert 0 < new["difference"] < largest["difference"]
    assert new["p"] > 0.05
    bottleneck = Study(numbers.RESULTS, "bottleneck", numbers.SIX).outcomes()
    plain = Study(numbers.RESULTS, "plain", numbers.SIX, numbers.TEN_SEEDS).outcomes()
    assert len(bottleneck) == 3
    assert list(bottleneck.mean().sort_values().index) != list(plain.mean().sort_values().index)


def test_the_claims_about_the_frontier_hold():
    """The notebook judges the single changes; its outputs are compared with those saved."""
    notebook = (PROJECT / "notebooks" / "08_frontier.ipynb").read_text()
    assert "significant after the correction: none" in notebook
    assert "confirmed" in notebook
    networks = Study(numbers.RESULTS / "epochs-25", "frontier").outcomes()
    assert networks.shape == (10, 5)
    for change, seeds in (("average", range(1, 11)), ("one-cycle", range(6, 11))):
        assert paired_comparisons(Study(numbers.RESULTS, "plain", (change, "bn"), seeds).outcomes())["low"].item() > 0


def test_the_claims_about_fewer_images_hold():
    share, names = few_images.share_removed, tuple(few_images.NAMES)
    assert [name for name in names if share(10_000, name)[1] > 0] == ["l2"]
    assert all(few_images.gains(100)[name].mean() > 5 for name in names)
    assert all(few_images.gains(3_000)[name].mean() < 0.5 for name in names)
    assert few_images.minutes(100, 300) > 9.0  # since the page's commit, when the headline was committed
    assert sorted(map(few_images.recurrence, names))[-1] == few_images.recurrence("l1")


def test_the_claims_about_the_worth_of_regularisers_hold():
    """Of README, docs/results.md and notebook 06: they follow from the sentences of the analysis."""
    table, folder = numbers.worths(), numbers.RESULTS / "worth"
    answers = [numbers.worth_analysis.QUESTIONS[k](folder) for k in (0, 1, 5)]
    removed, worth = ({row["subject"]: row for row in rows} for rows in (answers[0] + answers[2], answers[1]))
    assert all(removed[f"{name}, 300 images"]["said"].startswith("removes") for name in few_images.NAMES)
    for name in few_images.NAMES:
        for size in ("10,000", "60,000"):
            assert removed[f"{name}, {size} images"]["said"].startswith("not shown")
        assert worth[f"{name}, 10,000 images"]["said"].endswith("not shown to be worth more or less than itself")
    on_300, on_10_000 = (table["worth"].drop("nothing").xs(size, level="size").round(1) for size in (300, 10_000))
    assert (on_300["rotation"], on_300.drop("rotation").min(), on_300.drop("rotation").max()) == (2.2, 1.4, 1.8)
    assert (on_10_000.min(), on_10_000.max()) == (0.9, 1.2)
    for size, ends in ((300, [1.5, 1.8]), (10_000, [1.0, 1.3])):
        assert table.loc[("l2", size), ["worth_low", "worth_high"]].round(1).tolist() == ends
    fall = {row["subject"]: row["said"].partition(" ")[0] for row in numbers.worth_analysis.fall(folder)}
    assert fall == dict.fromkeys(few_images.NAMES, "falls") | {"dropout": "the"}
    own = {row["subject"]: row for row in numbers.worth_analysis.own(folder)}
    assert max(own, key=lambda name: own[name]["points"]) == "rotation"
    assert all(int(re.search(r"keeps (\d+)%", row["kept"])[1]) > 73 for row in own.values())
    abouts = {recipe: Study(folder, recipe).about().set_index("condition")["commit"] for recipe in recipes_in(folder)}
    commits = pd.concat(abouts, names=["recipe"]).str[:7]
    recipe, condition = map(commits.index.get_level_values, commits.index.names)
    part_one = (recipe == "plain") & ~condition.str.contains(
        f"^{numbers.worth_analysis.ALL}-|{numbers.worth_analysis.LONG}$"
    )
    assert (set(commits[part_one]), set(commits[~part_one])) == ({"748da0c"}, {"1e8bb3f"})


def test_the_claims_about_steps_networks_and_wrong_labels_hold():
    """Of README, docs/results.md and notebook 06."""
    folder, analysis, four = numbers.RESULTS / "worth", numbers.worth_analysis, list(numbers.worth_analysis.ON_BOTH)
    assert f"(n = {len(analysis.SEEDS)}) of the test images right" in FIRST
    longer = {row["subject"]: row["said"] for row in analysis.longer(folder)}
    assert longer["more steps, 300 images"].startswith("not shown")
    assert longer["more steps, 10,000 images"].startswith("removes 13%")
    assert longer["rotation, 10,000 images"] == "removes more: 19% of the errors in place of 5%"
    assert longer["l2, 10,000 images"].startswith("no change shown")
    assert all(longer[f"{name}, 300 images"].startswith("removes more") for name in analysis.LONGER)
    worth = {row["subject"]: row["mean"] for row in analysis.second_network(folder)}
    assert all(1 < worth[f"{name}, 10,000 images"] < 1.2 for name in four[1:])
    table = numbers.lesson_tables.shares_by_network()
    (_, plain), (_, mlp) = table[table["labels"] != "right labels"].groupby("network", sort=False)
    assert mlp.query("size == 10_000")["share"].between(33, 51.5).all()
    assert mlp.query("size == 10_000")["p"].max() <= 0.05
    assert plain.query("size == 10_000 and p <= 0.05")["name"].tolist() == ["l2"]
    assert plain.query("size < 10_000 and p <= 0.05 and share > 0")["name"].tolist() == 2 * four
    changes = [row["said"].partition(":")[0] for row in analysis.labels(folder)]
    assert changes == 4 * ["no change shown"] + 4 * ["removes more"]
    assert {row["said"] for row in analysis.capacity(folder)} == {"wrong labels raise the share more in the MLP"}
    clean = pd.read_csv(folder / "clean.csv").query("condition == '10000-nothing'").groupby("recipe")["accuracy"].mean()
    assert (round(clean["mlp-wrong"]), round(clean["plain-wrong"])) == (86, 79)
    names = {recipe: set(Study(folder, recipe).about()["processor"]) for recipe in recipes_in(folder)}
    assert {name for recipe in names if recipe.endswith("wrong") for name in names[recipe]} == {
        "Intel(R) Xeon(R) Processor (AVX512)"
    }
    assert names["plain"] == names["mlp"] == {"AMD EPYC (AVX512)"}


def test_the_claims_about_settings_on_fewer_images_hold():
    recipe, _conditions = read_study_file(str(PROJECT / "studies" / "when.py"))
    study = sys.modules["s6lib_study_when"]
    strengths = study.STRENGTHS
    l1, l2, l2_on_many = strengths[300]["l1"] / 2e-4, strengths[300]["l2"] / 1e-4, strengths[10_000]["l2"] / 1e-4
    assert f"L1 is {l1:.0f} times and L2 {l2:.0f} times as strong as in the exercise" in RESULTS
    assert f"at a strength {l2_on_many:.0f} times that of the exercise" in RESULTS
    seen = [f"{recipe.epochs * study.PASSES[size]} times ({size:,} images)" for size in (100, 300, 10_000)]
    assert f"{seen[0]}, {seen[1]} or {seen[2]}, against {PLAIN.epochs} times (60,000 images)" in RESULTS
    for name in few_images.NAMES:  # question 6
        chosen = [strengths[size][name] for size in few_images.SIZES[:-1]]
        assert chosen == sorted(chosen, reverse=True)
        assert chosen[-1] < chosen[0]
    runs = Study(few_images.WHEN, "when").about()
    assert f"All {len(runs)} runs" in RESULTS
    assert {version.split("+")[0] for version in runs["torch"]} == {"2.14.1"}
    assert set(runs["python"]) == {"3.11.7"}
    assert set(runs["processor"]) == {"AMD EPYC (AVX512)"}


def test_the_claims_about_the_page_of_the_second_study_hold():
    page = " ".join((PROJECT / "docs" / "preregistration_when.md").read_text().split())
    quotes = re.findall(r'\*"([^"]+)"', RESULTS[RESULTS.index("## What turned out wrong") :])
    assert len(quotes) == 6
    assert all(quoted.rstrip(".?") in page for quoted in quotes)
    planned = {size: few_images.power(size)[:2] for size in few_images.SIZES}
    assert len(few_images.planned()) == 5
    assert [size for size, (before, found) in planned.items() if found < before] == [10_000]
    trials = pd.read_csv(PROJECT / "studies" / "when_search.csv").query("size == 100 and name == 'dropout'")
    trials = trials.astype({"strength": float}).pivot(index="strength", columns="seed", values="accuracy")
    assert [trials[[*seeds]].dropna().mean(axis=1).idxmax() for seeds in ((1, 2), (1, 2, 3))] == [0.05, 0.1]
    large = few_images.clean().query("images == 60_000")
    assert f"above zero in {(large['gap'] > 0).sum()} of {len(large)} seeds" in RESULTS
    assert large["gap"].mean() < float(numbers.VALUES["bn-margin"]())
    assert few_images.errors(10_000)["nothing"].mean() == pytest.approx(1, abs=0.1)


def test_the_claims_of_notebook_06_hold():
    gains = {size: few_images.gains(size).mean() for size in few_images.SIZES}
    assert gains[100].between(7.5, 16).all()
    assert gains[300].between(2, 4.5).all()
    assert gains[100].idxmax() == gains[300].idxmax() == "rotation"
    nothing = {size: 100 - few_images.errors(size)["nothing"].mean() for size in few_images.SIZES}
    assert round(nothing[1_000] - nothing[300]) == 5 > gains[300].max()
    table = pd.read_csv(PROJECT / "studies" / "when_search.csv")
    assert (table.query("size == 300 and name == 'l2' and strength == 0.3")["accuracy"].round() == 10).all()
    together = table.query("name == 'together'").groupby("strength")["accuracy"].mean().round(1)
    assert together.to_dict() == {1.0: 81.9, 0.5: 96.0, 0.25: 95.5, 0.125: 94.0}
    batches = numbers.preregistered_when.batches(few_images.WHEN)
    assert batches["mean"].round(2).tolist() == [-0.65, 0.09, 0.09]
    assert 0.5 < batches["high"].max() / 0.65 < 0.6  # about half of the loss at most


@pytest.mark.slow
def test_the_accuracies_on_clean_images_are_those_of_the_networks():
    """Of all networks on few images, and of two of those on all; another processor may flip an image or two."""
    table = few_images.clean().set_index(["condition", "seed"])
    for study, condition, seed, images in few_images.networks():
        if len(images) < 60_000 or seed in (21, 52):
            row, saved = few_images.score(study, condition, seed, images), table.loc[(condition, seed)]
            few = 3 * 100 / len(images) if len(images) < 60_000 else 0.01
            assert row["train_accuracy"] == pytest.approx(saved["train_accuracy"], abs=min(few, 1))
            assert row["test_accuracy"] == pytest.approx(saved["test_accuracy"], abs=0.03)
    assert torch.get_num_threads() == 1


def test_the_citation_names_this_version():
    version = re.search(r'^version = "(.*)"$', (PROJECT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert f"\nversion: {version}\n" in (PROJECT / "CITATION.cff").read_text()


def test_figures_have_a_text_and_linked_files_exist():
    for page in [*PAGES, PROJECT / "CHANGELOG.md"]:
        assert all(len(text) > 30 for text in re.findall(r"!\[([^\]]*)\]\((?!https?:)", page.read_text()))
        for path in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / path).exists(), path


def test_every_page_is_linked_from_the_readme_which_is_short():
    assert all(f"({page.relative_to(PROJECT)})" in README for page in PAGES[1:])
    without_code = re.sub(r"```.*?```|<!--.*?-->", "", README, flags=re.DOTALL)
    assert len(re.sub(r"\[!\[.*?\)\]\(.*?\)", "", without_code).split()) <= 900


def test_ci_runs_the_test_command_of_the_readme():
    command = re.search(r"&& (pytest .*)$", README, re.MULTILINE)[1]
    assert f"\n{command}\n" in (PROJECT / ".ci" / "run").read_text()
