"""Write the numbers of README.md and docs/results.md from results/: `python docs/write_numbers.py`.

A page holds blocks, from <!-- begin NAME --> to <!-- end NAME -->, each written by one function. To add a block, write
a function that returns Markdown, give it a name in BLOCKS, put both markers on a page, and run this file. If a claim in
its words depends on the numbers, choose the words in the function, or test the claim in tests/test_readme.py.
"""

import itertools
import math
import re
import textwrap
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import pandas as pd
import torch
from scipy.stats import ttest_1samp
from statsmodels.stats.multitest import multipletests

from s6lib import preregistered_when
from s6lib.__main__ import read_study_file
from s6lib.analysis import passing, pruning_curve
from s6lib.data import PROJECT, load_mnist
from s6lib.preregistered import FACTORIAL, FACTORIAL_SEEDS, MARGIN, PENALTIES, PENALTY_SEEDS, answer, read
from s6lib.recipes import BOTTLENECK, CONDITIONS, CONTROL, PLAIN, SPLIT_SWEEP, Condition, Recipe
from s6lib.statistics import (
    condition_statistics,
    friedman_p,
    mean_interval,
    paired_comparisons,
    run_sd,
    seeds_needed,
    wilson_interval,
)
from s6lib.study import Study

PAGES = (PROJECT / "README.md", PROJECT / "docs" / "results.md")
SIX = (*CONDITIONS, CONTROL)
PREREGISTERED = ((FACTORIAL, FACTORIAL_SEEDS), (PENALTIES, PENALTY_SEEDS))
TEN_SEEDS, NEW_SEEDS = range(1, 11), range(11, 21)
WHEN, WHEN_SEEDS = PROJECT / "results" / "when", preregistered_when.SEEDS
WHEN_NAMES = {"rotation": "rotation", "l2": "L2", "dropout": "dropout", "ghosts": "ghost batches", "l1": "L1"}
FIRST_SEEDS, FRESH_SEEDS = range(1, 6), range(6, 11)  # of studies/ablation.py

# --- Markdown --------------------------------------------------------------------------------------------------------


def number(value: float, digits: int = 3, sign: str = "") -> str:
    """Format a number with a typographic minus, but none before zero, and with a plus if `sign` is "+"."""
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}".replace("-", "\N{MINUS SIGN}")


def interval(low: float, high: float, sign: str = "", digits: int = 3) -> str:
    return f"{number(low, digits, sign)} to {number(high, digits, sign)}"


def p_value(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def paragraph(text: str) -> str:
    """Wrap a paragraph, but do not break code, p = 0.05 or L1 + L2: a line that starts with a plus would be a list."""
    text = " ".join(text.split())
    whole = re.sub(r"`[^`]*`| [+=] ", lambda found: found[0].replace(" ", "\N{NO-BREAK SPACE}"), text)
    lines = textwrap.fill(whole, 120, break_long_words=False, break_on_hyphens=False)
    return lines.replace("\N{NO-BREAK SPACE}", " ")


def table(header: str, rows: Iterable[Iterable[object]]) -> str:
    """Write a table under a header such as `| seed | mean |`."""
    rule = "|" + "---|" * (header.count("|") - 1)
    return "\n".join([header, rule, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def join(*parts: str) -> str:
    return "\n\n".join(parts)


# --- what several blocks use -----------------------------------------------------------------------------------------


@cache
def study(*conditions: Condition | str, recipe: str = "plain", seeds: range | None = None, part: str = "") -> Study:
    """Open published runs, by default of all seeds; `part` is a folder in results/."""
    return Study(PROJECT / "results" / part, recipe, conditions or None, seeds)


def parameters(runs: Study, slug: str) -> int:
    return sum(weights.numel() for weights in runs.model(slug).parameters())


@cache
def ten_seeds() -> pd.DataFrame:
    return study(*SIX, seeds=TEN_SEEDS).outcomes()


@cache
def comparisons() -> pd.DataFrame:
    return paired_comparisons(ten_seeds())


@cache
def answers() -> pd.DataFrame:
    """The preregistered answers, one row each. In `answer`, G is what GBN costs; here, above 0 is always a gain."""
    rows = answer(*(read(PROJECT / "results", *runs) for runs in PREREGISTERED))
    gain, cost = ["mean", "low_95", "high_95", "low_90", "high_90"], ["mean", "high_95", "low_95", "high_90", "low_90"]
    rows.loc[0, gain] = -rows.loc[0, cost].to_numpy(dtype=float)
    rows["question"] = rows["question"].str.replace(" - ", " minus ")
    return rows


@cache
def preregistered_runs() -> pd.DataFrame:
    """One row per run, with its processor and version of torch."""
    about = pd.concat(study(*conditions, seeds=seeds).about() for conditions, seeds in PREREGISTERED)
    return about.drop_duplicates(["condition", "seed"]).assign(torch=lambda rows: rows["torch"].str.split("+").str[0])


@cache
def sizes() -> pd.DataFrame:
    """The networks of the frontier after 25 epochs: as in `condition_statistics`, with network and parameters."""
    tables = []
    for network, runs in (
        ("SeparableNet", study(recipe="frontier", part="epochs-25")),
        ("PlainNet", study("average")),
    ):
        rows = condition_statistics(runs.outcomes())
        counts = [parameters(runs, slug) for slug in rows["condition"]]
        tables.append(rows.assign(network=network, parameters=counts))
    return pd.concat(tables, ignore_index=True)


@cache
def passes() -> pd.DataFrame:
    """How many runs of 15 epochs pass, of how many, and their share: one row per network of the frontier."""
    history = study(recipe="frontier", part="epochs-15").history()
    return passing(history, 0.994, 5).groupby("condition").agg(passed="sum", runs="count", share="mean")


def gain(gains: pd.Series) -> dict[str, float]:
    """The mean of paired differences, its 95% interval and the p-value of a paired t test."""
    low, high = mean_interval(gains)
    return {"n": len(gains), "mean": gains.mean(), "low": low, "high": high, "p": float(ttest_1samp(gains, 0).pvalue)}


@cache
def recipe_gain() -> dict[str, float]:
    """What the recipe of the frontier gains on PlainNet."""
    return gain((study("average").outcomes()["average"] - ten_seeds()["bn"]).dropna())


@cache
def changes() -> pd.DataFrame:
    """The gain of each change of the recipe over those before it: one row each, with label and Holm's p."""
    steps = [condition.slug for condition in read_study_file(str(PROJECT / "studies" / "ablation.py"))[1]]
    runs = study("bn", *steps, seeds=FIRST_SEEDS)
    gains = runs.outcomes().diff(axis=1).iloc[:, 1:]
    rows = pd.DataFrame([{"label": runs.labels[slug], **gain(gains[slug])} for slug in gains])
    return rows.assign(p_holm=multipletests(rows["p"], method="holm")[1])


@cache
def one_cycle_gain() -> dict[str, float]:
    outcomes = study("bn", "one-cycle", seeds=FRESH_SEEDS).outcomes()
    return gain(outcomes["one-cycle"] - outcomes["bn"])


@cache
def when_gains() -> dict[int, pd.DataFrame]:
    """What each regulariser gains alone, by number of digits: one row per seed, one column each."""
    return {size: preregistered_when.read_gains(WHEN, size, tuple(WHEN_NAMES)) for size in WHEN_SEEDS}


@cache
def nothing(size: int) -> float:
    """Mean test accuracy without regularisation, in percent."""
    return preregistered_when.read(WHEN, [f"{size}-nothing"], WHEN_SEEDS[size]).mean().item()


# --- README.md -------------------------------------------------------------------------------------------------------


def readme_summary() -> str:
    """What was asked, and what came out."""
    question = f"""
        **What was asked.** Train a network of 10,000 parameters to read handwritten digits (MNIST) in five variants:
        with an L1 penalty, with an L2 penalty, with both, with Ghost Batch Normalization (`GhostBatchNorm`, which
        normalises parts of each batch separately), and with all three. Which variant gets the most test digits right?
        Hundreds of students have answered from one run of each, and their answers contradict each other. So the
        questions and their analysis were [fixed in writing](docs/preregistration.md), and then
        {len(FACTORIAL_SEEDS)} fresh seeds were run."""
    answer_heading = "**What came out.** 0.01 points of accuracy is one of the 10,000 test digits."
    return join(paragraph(question), answer_heading, prescribed_sentences(), pruning(), few_digits())


def prescribed_sentences() -> str:
    """The sentences on G, P and E that docs/preregistration.md prescribes."""
    ghosts, penalties, *pairs = answers().itertuples()
    apart = [pair.question for pair in pairs if pair.said != "within 0.05 points"]
    alike = f"not shown to be within 0.05 points: {', '.join(apart)}" if apart else "all within 0.05 points"
    return "\n".join(
        [
            f"- `GhostBatchNorm` (4 ghosts) instead of BatchNorm: **{ghosts.said}**.",
            f"- L1 + L2 instead of no penalty: **{penalties.said}**.",
            f"- L1, L2 and L1 + L2, with BatchNorm: **{alike}**.",
        ]
    )


def pruning() -> str:
    digits = load_mnist()[1].part(slice(None, None, 20))  # as in the notebook that draws it
    curve = pruning_curve(study("l1-bn", "bn", seeds=TEN_SEEDS), digits, [0.7])
    right = 100 * curve.groupby("condition")["accuracy"].mean()
    return paragraph(f"""
        But the networks differ a great deal. Set the smallest 70% of a network's convolution weights to zero: trained
        with L1 it still gets {right["l1-bn"]:.0f}% of the digits right, trained without a penalty
        {right["bn"]:.0f}%.""")


def few_digits() -> str:
    """When regularisation matters, in short."""
    few = when_gains()[300].mean().sort_values(ascending=False)
    gains = [f"{WHEN_NAMES[slug]} {number(few[slug], 1)}" for slug in few.index]
    most = {size: number(gains_there.mean().max(), 2) for size, gains_there in when_gains().items()}
    return paragraph(f"""
        **When it matters.** On 60,000 digits nothing is overfitted, so there is nothing to cure. With few digits there
        is: without regularisation, the network learns 300 digits by heart and gets {nothing(300):.1f}% of the test
        digits right. Each regulariser alone adds points: {", ".join(gains[:-1])} and {gains[-1]}. On 3,000 digits the
        best adds {most[3_000]}, on 10,000 digits {most[10_000]}
        ([fixed beforehand](docs/preregistration_when.md)).""")


def readme_more() -> str:
    """What luck does."""
    sd = run_sd(ten_seeds())
    two_runs, five_variants = 2 / math.sqrt(math.pi) * sd, 2.326 * sd  # mean distances of normal values
    luck = f"""
        Two runs of the *same* variant, with different random numbers, differ by about
        {100 * two_runs:.0f} digits, and the best and worst of five *equal* variants by about
        {100 * five_variants:.0f}."""
    return paragraph(luck)


def intervals_and_margin() -> str:
    return f"five mean differences in accuracy with 90% and 95% intervals, against a margin of {MARGIN} points"


# --- docs/results.md -------------------------------------------------------------------------------------------------


def questions() -> str:
    """The three questions that were fixed before their runs."""
    introduction = f"""
        The questions, their tests and the sentences for each outcome were
        [fixed in writing before the runs](preregistration.md). The network is PlainNet, with seeds
        {FACTORIAL_SEEDS[0]} to {FACTORIAL_SEEDS[-1]} ({PENALTY_SEEDS[0]} to {PENALTY_SEEDS[-1]} for E). The table shows
        differences in test accuracy at the last epoch, in points, paired by seed; above 0 is a gain for what is named
        first. (On that page G is what GBN costs, so it has the opposite sign.)"""
    figure = f"![PlainNet: {intervals_and_margin()}](../images/plain_preregistered.png)"
    return join(paragraph(introduction), answer_table(), figure, answers_in_full(), course_of_the_runs())


def answer_table() -> str:
    names = {"G": "G: GBN (4 ghosts) in place of BN", "P": "P: L1 + L2"}
    rows = []
    for row in answers().itertuples():
        wide, narrow = interval(row.low_95, row.high_95, "+"), interval(row.low_90, row.high_90, "+")
        p = "" if math.isnan(row.p) else p_value(row.p_holm)
        name = names.get(row.question, f"E: {row.question}")
        rows.append((name, row.n, number(row.mean, sign="+"), wide, narrow, p, row.said))
    return table("| | n | mean | 95% interval | 90% interval | p, Holm | conclusion |", rows)


def answers_in_full() -> str:
    return paragraph(f"""
        **So neither GBN with 4 ghosts nor L1 + L2 changes the accuracy of this network by {MARGIN} points or more, and
        L1, L2 and L1 + L2, with BN, are all within {MARGIN} points.** G is averaged over training with and without the
        penalties, P over both normalisations. The 95% interval of G excludes zero, and its p alone is
        {answers()["p"][0]:.3f}; but two questions were asked, so p decides after Holm's correction. The intervals are
        Student's t, and the p-values come from exact sign-flip tests. "No difference" and "within" mean that the 90%
        interval lies within ±{MARGIN}. The intervals cover new seeds, not new test images. The
        [notebook](../notebooks/05_replication.ipynb) shows other measures, which decide nothing.""")


def course_of_the_runs() -> str:
    (processor,), versions = preregistered_runs()["processor"].unique(), sorted(preregistered_runs()["torch"].unique())
    return paragraph(f"""
        These are {len(preregistered_runs())} runs, on processors that call themselves "{processor}", by torch
        {" and ".join(versions)} (the first ten and those of seeds 43 and up by {versions[0]}; with both, the five runs
        of seed 1 are [identical to the last digit](machines.md)). Nobody was to look at any of them before all were
        complete. By accident, some accuracies were seen in progress lines, a table and the message of a test: those of
        single runs with seeds 21 and 22, of the first two epochs of two runs with seed 43, and of one run with seed 47
        on a fifth of the digits. Nothing was changed because of them. The analysis is the one committed before the
        first run, and no run diverged, was left out or was replaced.""")


def six_conditions() -> str:
    """Ten seeds of six conditions, before the three questions."""
    n, runs = len(TEN_SEEDS), study(*SIX, seeds=TEN_SEEDS)
    statistics, labels = condition_statistics(ten_seeds()), runs.labels
    ranking = statistics.assign(label=statistics["condition"].map(labels)).sort_values("mean")
    ends = [f"{row.label}, {row.mean:.2f}%" for row in ranking.iloc[[0, -1]].itertuples()]
    zeros = ((comparisons()["low"] <= 0) & (comparisons()["high"] >= 0)).sum()
    return join(
        f"What {n} runs of each condition say: seeds {TEN_SEEDS[0]} to {TEN_SEEDS[-1]}, analysed before the questions "
        "above were asked.",
        differences(lowest=ranking["label"].iloc[0]),
        scatter(),
        f"![PlainNet: {n} runs of each of six conditions as dots, with means from {ends[0]}, to {ends[1]}]"
        "(../images/plain_replication.png)",
        paragraph(f"""
            PlainNet, {parameters(runs, "bn"):,} parameters, 25 epochs on all 60,000 training digits: accuracy on the
            10,000 test digits at the last epoch."""),
        table(
            "| condition | n | mean, % | SD | 95% interval of the mean |",
            (
                (labels[row.condition], row.n, f"{row.mean:.3f}", f"{row.sd:.3f}", f"{row.low:.2f} to {row.high:.2f}")
                for row in statistics.itertuples()
            ),
        ),
        f"![PlainNet: the {len(comparisons())} paired differences between conditions with their 95% intervals, of "
        f"which {zeros} hold zero](../images/plain_differences.png)",
        paragraph("""
            The intervals are Student's t; they cover new seeds, not new test images. Some exclude zero although the
            difference is not significant: among fifteen intervals, one excludes zero by luck more easily than a single
            interval does. Only the p-values, which are exact, are corrected for that."""),
        seeds_for_more(),
        bottleneck_and_splits(),
    )


@cache
def new_comparison() -> pd.Series:
    """L2 + BN over GBN on new seeds, the one difference that was tested again."""
    return paired_comparisons(study("l2-bn", "gbn", seeds=NEW_SEEDS).outcomes()).iloc[0]


def differences(lowest: str) -> str:
    pairs, new = comparisons(), new_comparison()
    return paragraph(f"""
        **No condition can be told from another, nor from plain BatchNorm: the largest of the {len(pairs)} paired
        differences is {pairs["difference"].abs().max():.2f} points, and none of them is significant (smallest p after
        Holm's correction: {pairs["p_holm"].min():.2f}).** That does not make the conditions equal: the intervals leave
        room for differences of up to {pairs[["low", "high"]].abs().max().max():.2f} points, and a test of all six at
        once says that something differs (Friedman's, chosen afterwards: p = {friedman_p(ten_seeds()):.3f}). The lowest
        is {lowest}, and the largest difference that of L2 + BN over GBN. On {new["n"]} new seeds this difference is
        {number(new["difference"])} points, 95% interval {interval(new["low"], new["high"])}, and does not pass the one
        test that was fixed before they were run (p = {new["p"]:.2f}). None of the three questions is about this
        pair.""")


def scatter() -> str:
    sd = run_sd(ten_seeds())
    return paragraph(f"""
        With ten seeds and fifteen comparisons, a study can hardly find anything, and the number of seeds was not fixed
        in writing. Runs of the same condition scatter with an SD of {sd:.3f} points, so the best and the worst of five
        *equal* conditions, one run each, would lie {2.326 * sd:.2f} points apart on average.""")


def seeds_for_more() -> str:
    pair_sd = (comparisons()["sd"] ** 2).mean() ** 0.5
    larger, smaller = (seeds_needed(pair_sd, size, len(comparisons())) for size in (0.05, 0.02))
    return paragraph(f"""
        What {len(TEN_SEEDS)} seeds cannot tell: to find a true difference of 0.05 points among {len(comparisons())}
        comparisons four times out of five, a study needs {larger} seeds; for one of 0.02 points, {smaller}.
        [09_methods](../notebooks/09_methods.ipynb) judges what others claimed.
        `python -m s6lib run --conditions {" ".join(ten_seeds())} --seeds ... --out results` adds seeds; decide
        beforehand how many.""")


@cache
def bottleneck() -> pd.Series:
    """The mean of each condition on BottleneckNet, by label, the highest first."""
    runs = study(*SIX, recipe="bottleneck")
    return runs.outcomes().mean().rename(runs.labels).sort_values(ascending=False)


def bottleneck_and_splits() -> str:
    (highest, *_, lowest), splits = bottleneck().items(), study(*SPLIT_SWEEP).outcomes().mean()
    return paragraph(f"""
        Two more figures have {len(study(*SPLIT_SWEEP).seeds)} seeds of each condition, too few for a test. On
        [BottleneckNet](../images/bottleneck_replication.png) the order is different: {highest[0]} is the highest,
        {highest[1]:.2f}%, and {lowest[0]} the lowest, {lowest[1]:.2f}%. With
        [more ghost batches](../images/plain_splits.png) three seeds get {splits["gbn-8"]:.2f}% with 8,
        {splits["gbn-16"]:.2f}% with 16 and {splits["gbn-32"]:.2f}% with 32.""")


def frontier() -> str:
    """The means of the networks of the frontier, the goals, and the gain of its recipe."""
    passed_runs = {row.Index: f"{row.passed} of {row.runs}" for row in passes().itertuples()}
    header = "| network, parameters | n | mean, % | 95% interval of the mean | pass in 15 epochs |"
    rows = (
        (
            f"{row.network}, {row.parameters:,}",
            row.n,
            f"{row.mean:.3f}",
            f"{row.low:.2f} to {row.high:.2f}",
            passed_runs.get(row.condition, ""),
        )
        for row in sizes().itertuples()
    )
    reports = pd.read_csv(PROJECT / "data" / "frontier.csv").query("kind == 'last' and accuracy >= 99.4")
    goals = f"""
        So none of the goals set beforehand is reached: a mean of 99.40% with 2,500 parameters, a mean of 99.60% with
        10,000, and nine of ten seeds that pass in 15 epochs with 4,000. The smallest network that others reported at
        99.40%, in one run, has {reports["parameters"].min():,} parameters."""
    whole = recipe_gain()
    recipe = f"""
        PlainNet gains {number(whole["mean"])} points by this recipe, compared with BN and the recipe above (95%
        interval {interval(whole["low"], whole["high"])}, n = {whole["n"]}, paired by seed)."""
    return join(table(header, rows), paragraph(goals), paragraph(recipe))


def single_changes() -> str:
    """Which change of the frontier's recipe brings the gain."""
    which = """
        Which change brings the gain? Each is compared with the one before it, on PlainNet, with the same five seeds
        (paired t tests, Holm's correction for the six). None is significant after the correction; only one cycle seems
        to gain anything."""
    rows = (
        (row.label, number(row.mean), interval(row.low, row.high), f"{row.p_holm:.3f}")
        for row in changes().itertuples()
    )
    again = one_cycle_gain()
    verdict = "is confirmed" if again["p"] <= 0.05 and again["mean"] > 0 else "is not confirmed"
    one_cycle = f"""
        One cycle was tried again on five fresh seeds, {FRESH_SEEDS[0]} to {FRESH_SEEDS[-1]}, with one test that was
        [fixed before they ran](../studies/ablation.py). It gains {number(again["mean"])} points (95% interval
        {interval(again["low"], again["high"])}, p = {again["p"]:.3f}): it {verdict}."""
    header = "| change, in addition to those above it | gain, points | 95% interval | p, Holm |"
    return join(paragraph(which), table(header, rows), paragraph(one_cycle))


def one_run_of_each() -> str:
    """What a student sees with seed 1, and how much another seed changes it."""
    low, high = wilson_interval(0.995)
    two = ten_seeds().loc[[1, 2], [condition.slug for condition in CONDITIONS]]
    caution = f"""
        With another 10,000 test digits in mind, one accuracy is uncertain by about {100 * (high - low) / 2:.2f} points
        either way (95%). On the same digits, seed 2 of PlainNet changes these accuracies by up to
        {two.diff().abs().max().max():.2f} points and has another winner: **no difference in these tables tells which
        condition is best.**"""
    return join(first_seed(PLAIN), first_seed(BOTTLENECK), paragraph(caution))


def first_seed(recipe: Recipe) -> str:
    runs = study(*CONDITIONS, recipe=recipe.name, seeds=range(1, 2))
    rows = (
        (
            row.label,
            f"{100 * row.accuracy:.2f}",
            f"{100 * row.best_accuracy:.2f} ({row.best_epoch})",
            f"{100 * row.train_accuracy:.2f}",
        )
        for row in runs.summary().itertuples()
    )
    return join(
        f"{recipe.network.__name__}, {parameters(runs, 'l1-bn'):,} parameters:",
        table("| condition | last epoch, % | best epoch, % (which) | training, % |", rows),
    )


def when() -> str:
    """When regularisation matters: what each regulariser gains at each size, and the preregistered answers."""
    sizes = list(when_gains())
    rows = [(name, *(cell(when_gains()[size][slug]) for size in sizes)) for slug, name in WHEN_NAMES.items()]
    n = ", ".join(f"{len(table)} on {size:,} digits" for size, table in when_gains().items())
    base = ", ".join(f"{nothing(size):.2f}% on {size:,}" for size in sizes)
    caption = f"""
        Gain over no regularisation in points of test accuracy, paired by seed, with the 95% t interval of the mean.
        Seeds: {n}. Without regularisation the accuracy is {base} digits."""
    header = f"| alone | {' | '.join(f'{size:,} digits' for size in sizes)} |"
    *first, batches = [when_question(question) for question in preregistered_when.QUESTIONS]
    return join(paragraph(caption), table(header, rows), *first, best_strengths(), batches)


def best_strengths() -> str:
    """Question 6, which the trials answer."""
    conditions = {one.slug: one for one in read_study_file(str(PROJECT / "studies" / "when.py"))[1]}
    rows = []
    for slug, name in WHEN_NAMES.items():
        chosen = [strength(conditions[f"{size}-{slug}"], slug) for size in WHEN_SEEDS if size < 10_000]
        steps = [after - before for before, after in itertools.pairwise(chosen)]
        falls, rises = max(steps) <= 0 and sum(steps) < 0, min(steps) >= 0 and sum(steps) > 0
        rows.append(
            (name, ", ".join(f"{one:g}" for one in chosen), "falls" if falls else "rises" if rises else "neither")
        )
    title = "**Question 6: does the best strength fall with size? The trials answer, from 100 to 3,000 digits.**"
    return join(title, table("| | best strengths | conclusion |", rows))


def strength(condition: Condition, regulariser: str) -> float:
    own = {"l1": condition.l1, "l2": condition.l2, "ghosts": condition.num_splits}
    return own.get(regulariser) or condition.changes[regulariser]


def cell(gains: pd.Series) -> str:
    return f"{number(gains.mean(), 2, '+')} ({interval(*mean_interval(gains), '+', digits=2)})"


def when_question(question: Callable[[Path], pd.DataFrame]) -> str:
    """The answers to one preregistered question, or how many of its runs are there."""
    title = question.__doc__
    assert title is not None
    try:
        answers = question(WHEN)
    except ValueError as error:
        return f"**{title.strip()}** Not answered yet: {str(error).split(',')[0]}."
    if "p_holm" not in answers:
        rows = [(WHEN_NAMES[row.subject], row.said) for row in answers.itertuples()]
        return join(f"**{title.strip()}**", table("| | conclusion |", rows))
    rows = [
        (
            WHEN_NAMES.get(
                row.subject, row.subject.replace("l1-exercise", "L1 0.0002").replace("l2-exercise", "L2 0.0001")
            ),
            row.n,
            number(row.mean, 2, "+"),
            interval(row.low, row.high, "+", digits=2),
            p_value(row.p_holm),
            row.said,
        )
        for row in answers.itertuples()
    ]
    return join(f"**{title.strip()}**", table("| | n | mean | 95% interval | p, Holm | conclusion |", rows))


# --- the pages -------------------------------------------------------------------------------------------------------

BLOCKS: dict[str, Callable[[], str]] = {
    "readme-summary": readme_summary,
    "readme-more": readme_more,
    "questions": questions,
    "six-conditions": six_conditions,
    "frontier": frontier,
    "single-changes": single_changes,
    "one-run-of-each": one_run_of_each,
    "when": when,
}
BLOCK = re.compile(r"<!-- begin (\S+) -->\n(?:(?!<!-- begin ).)*?<!-- end \1 -->", re.DOTALL)
MARKER = re.compile(r"<!--\s*(?:begin|end)\b.*?-->", re.DOTALL)


def fill(text: str) -> str:
    """Write every block of a page anew. Raises ValueError for a marker without its counterpart or an unknown name."""
    if lone := MARKER.search(BLOCK.sub("", text)):
        raise ValueError(f"{lone[0]} belongs to no block: each goes from <!-- begin NAME --> to <!-- end NAME -->")
    return BLOCK.sub(lambda block: f"<!-- begin {block[1]} -->\n{content(block[1])}\n<!-- end {block[1]} -->", text)


def content(name: str) -> str:
    if name not in BLOCKS:
        raise ValueError(f"<!-- begin {name} --> names no block of docs/write_numbers.py: {', '.join(BLOCKS)}")
    return BLOCKS[name]()


def main() -> None:
    """Write the blocks of all pages anew."""
    torch.set_num_threads(1)  # the models are small: more threads would wait for each other on a busy machine
    for page in PAGES:
        page.write_text(fill(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
