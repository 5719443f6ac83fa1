"""Write the numbers of README.md and docs/results.md from results/: `python docs/write_numbers.py`.

On a page, <!-- NAME ARGUMENTS -->content<!-- / --> holds what the function NAME of VALUES returns for the arguments: a
number, a few words or a table. The words around it stand on the page alone; tests/test_readme.py tests those that hold
only for some numbers. A line of a paragraph must not begin with a marker: Markdown would end the paragraph there.
"""

import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial

import few_images as few
import pandas as pd
import scipy.stats
import torch

from s6lib import preregistered, preregistered_when, statistics
from s6lib.data import PROJECT, load_mnist
from s6lib.preregistered import FACTORIAL, FACTORIAL_SEEDS, PENALTIES, PENALTY_SEEDS
from s6lib.recipes import CONDITIONS, CONTROL
from s6lib.study import Study

sys.path.insert(0, str(PROJECT / "notebooks"))
import lesson_tables
from lesson_tables import WORTH, variance_sources, worth_analysis

PAGES = (PROJECT / "README.md", PROJECT / "docs" / "results.md")
RESULTS = PROJECT / "results"
SIX = tuple(condition.slug for condition in (*CONDITIONS, CONTROL))
TEN_SEEDS = range(1, 11)
worths = cache(lesson_tables.worth_by_size)


def number(value: float, digits: int = 3, sign: str = "") -> str:
    """Format a number with a typographic minus, but none before zero, and with a plus if `sign` is "+"."""
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}".replace("-", "\N{MINUS SIGN}")


def interval(low: float, high: float, digits: int = 3, sign: str = "+") -> str:
    """Format an interval, with another decimal where rounding would hide on which side of zero an end is."""
    if 0 in (round(low, digits), round(high, digits)):
        digits += 1
    return f"{number(low, digits, sign)} to {number(high, digits, sign)}"


def p_value(p: float) -> str:
    return "" if math.isnan(p) else "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def table(header: str, rows: Iterable[Iterable[object]]) -> str:
    """Write a table under a header such as `| seed | mean |`."""
    rule = "|" + "---|" * (header.count("|") - 1)
    return "\n".join(["", header, rule, *(f"| {' | '.join(map(str, row))} |" for row in rows), ""])


def right(conditions: Sequence[str], seeds: range) -> pd.DataFrame:
    """Return whether each run is right on each test image: one row per image and seed, one column per condition."""
    runs, labels = Study(RESULTS, "plain", conditions, seeds), load_mnist()[1].labels.numpy()
    return pd.DataFrame({slug: lesson_tables.right_predictions(runs, slug, labels).unstack() for slug in conditions})


def answer_table() -> str:
    """The preregistered answers. In the analysis, G is what GBN costs; here, above 0 is always a gain."""
    names = {"G": "G: GBN (4 ghosts) in place of BN", "P": "P: L1 + L2 in place of no penalty"}
    factorial, penalties = (FACTORIAL, FACTORIAL_SEEDS), (PENALTIES, PENALTY_SEEDS)
    contrasts = {**preregistered.contrasts(right(*factorial)), **preregistered.penalty_differences(right(*penalties))}
    answers = preregistered.answer(*(preregistered.read(RESULTS, *runs) for runs in (factorial, penalties)))
    rows = []
    for row in answers.itertuples():
        both = variance_sources(100 * contrasts[row.question].unstack(0))["both"]  # contrasts divide counts by 100
        freedom = (row.n - 1) * (both / (row.sd / row.n**0.5)) ** 4  # Satterthwaite's, of seeds alone n - 1
        images = scipy.stats.t.interval(0.9, freedom, row.mean, both)
        sign = -1 if row.question == "G" else 1
        ends = ((row.low_95, row.high_95), (row.low_90, row.high_90), images)
        intervals = [interval(*sorted(sign * end for end in pair)) for pair in ends]
        name, mean = names.get(row.question, f"E: {row.question}"), number(sign * row.mean, sign="+")
        rows.append((name.replace(" - ", " minus "), row.n, mean, *intervals, p_value(row.p_holm), row.said))
    return table("| | n | mean | 95%, seeds | 90%, seeds | 90%, seeds and images | p, Holm | conclusion |", rows)


def pruned(slug: str) -> str:
    """Accuracy after pruning, on every twentieth test image: the mean and the range of ten seeds, in percent."""
    some = load_mnist()[1].part(slice(None, None, 20))
    right = 100 * lesson_tables.pruning_curve(Study(RESULTS, "plain", slug, TEN_SEEDS), some, [0.7])["accuracy"]
    return f"{right.mean():.0f}% ({right.min():.0f} to {right.max():.0f}%)"


def six(name: str) -> str:
    """One of several numbers about ten seeds of six conditions."""
    outcomes = Study(RESULTS, "plain", SIX, TEN_SEEDS).outcomes()
    sd, pairs = statistics.run_sd(outcomes), statistics.paired_comparisons(outcomes)
    return {
        "largest": f"{pairs['difference'].abs().max():.2f}",
        "p": p_value(pairs["p_holm"].min()),
        "friedman": p_value(scipy.stats.friedmanchisquare(*outcomes.to_numpy().T).pvalue),
        "sd": f"{sd:.3f}",
        "two-runs": f"{100 * 1.128 * sd:.0f}",  # the mean range of two and of five normal values, in SDs
        "five-runs": f"{100 * 2.326 * sd:.0f}",
    }[name]


def difference(first: str, second: str, first_seed: str, last_seed: str) -> str:
    """The mean of first minus second, with its interval and n."""
    runs = Study(RESULTS, "plain", (first, second), range(int(first_seed), int(last_seed) + 1))
    row = statistics.paired_comparisons(runs.outcomes()).iloc[0]
    return f"{number(row['difference'])} points (95% interval {interval(row['low'], row['high'])}, n = {row['n']})"


def summary_table(runs: Study) -> str:
    """The accuracy of each condition: n, mean, SD, and the interval of the mean."""
    rows = []
    for row in statistics.condition_statistics(runs.outcomes()).itertuples():
        ends = interval(row.low, row.high, 2, "")
        rows.append((runs.labels[row.condition], row.n, f"{row.mean:.3f}", f"{row.sd:.3f}", ends))
    return table("| | n | mean, % | SD | 95% interval of the mean |", rows)


def by_size(sizes: Sequence[int], cell: Callable[[int, str], str], *last: object) -> str:
    """A table with a row for each regulariser, a column for each number of images, and another last row."""
    rows = [[name, *(cell(size, slug) for size in sizes)] for slug, name in few.NAMES.items()]
    return table(f"| alone | {' | '.join(f'{size:,} images' for size in sizes)} |", [*rows, last])


def gain(row: pd.Series) -> str:
    """The mean of a gain, in points, with its interval."""
    return f"{number(row['mean'], 2, '+')} ({interval(row['low'], row['high'], 2)})"


def gain_table() -> str:
    gains = {size: statistics.condition_statistics(few.gains(size)).set_index("condition") for size in few.SIZES}
    errors = (few.errors(size)["nothing"] for size in few.SIZES)
    without = (f"{100 - wrong.mean():.1f}% (n = {len(wrong)})" for wrong in errors)
    return by_size(few.SIZES, lambda size, slug: gain(gains[size].loc[slug]), "*accuracy without*", *without)


def size_table() -> str:
    """Accuracy without regularisation on training and on test images, and the gap, by the number of training images."""
    columns, sizes = ["train_accuracy", "test_accuracy", "gap"], few.clean().groupby("images")
    rows = ((f"{size:,}", len(part), *map("{:.2f}".format, part[columns].mean())) for size, part in sizes)
    return table("| training images | n | accuracy on these, % | on test images, % | gap, points |", rows)


def question_table() -> str:
    """The preregistered answers, to question 3 without means; that to question 6 is given by the trials."""
    names = {"l1-exercise": "L1 0.0002", "l2-exercise": "L2 0.0001", "digits": "images"} | few.NAMES
    rows = []
    for question, ask in zip((1, 2, 3, 4, 5, 7), preregistered_when.QUESTIONS, strict=True):
        for _, row in ask(few.WHEN).iterrows():
            subject = re.sub("l[12]-exercise|digits|^[a-z0-9]+$", lambda found: names[found[0]], row["subject"])
            mean = f"{gain(row)}, n = {row['n']}, {p_value(row['p_holm'])}" if "mean" in row else ""
            rows.append((question, subject, mean, row["said"].replace("digits", "images")))
    return table("| | | mean (95% interval), p after Holm | conclusion |", rows)


def share_cell(row: pd.Series) -> str:
    """The share of errors removed, bold where it differs from 0 after Holm's correction."""
    bold = "**" if row["p"] <= 0.05 else ""
    return f"{bold}{number(row['share'], 0)}%{bold} ({interval(row['share_low'], row['share_high'], 0, '')})"


def worth_cell(size: int, slug: str) -> str:
    """The share of errors removed, and the worth."""
    row = worths().loc[(slug, size)]
    times = interval(row["worth_low"], row["worth_high"], 2, "")
    return share_cell(row) + ("" if math.isnan(row["worth"]) else f"; {row['worth']:.2f} ({times})")


def worth_table() -> str:
    """Questions 1, 2 and 6 of the third study, and the errors without a regulariser."""
    sizes = (*worth_analysis.REGULARISED, worth_analysis.ALL)
    without = (f"{error:.2f}%" for error in worths().loc["nothing"].loc[list(sizes), "error"])
    return by_size(sizes, worth_cell, "*wrong without, geometric mean*", *without)


def network_table() -> str:
    """Question 9 of the third study."""
    names = " | ".join(few.NAMES[name] for name in worth_analysis.ON_BOTH)
    cells = lesson_tables.shares_by_network().groupby(["network", "labels", "size"], sort=False)
    rows = ((*cell[:2], f"{cell[2]:,}", *shares.apply(share_cell, axis=1)) for cell, shares in cells)
    return table(f"|  | training labels | images | {names} |", rows)


def longer(size: str, name: str) -> str:
    """The share of errors that a regulariser removes with four times the steps."""
    shares = worth_analysis.read_log_ratio(WORTH, int(size), name, suffix=worth_analysis.LONG)
    share, low, high = map(worth_analysis.share, (shares.mean(), *worth_analysis.mean_interval(shares)))
    return f"{share:.0f}% ({low:.0f} to {high:.0f}%)"


def worth_answers(*questions: str) -> str:
    """The sentences on other questions of the third study."""
    rows = []
    for question in questions:
        for row in worth_analysis.QUESTIONS[int(question) - 1](WORTH):
            subject = re.sub(r"^\w+", lambda name: few.NAMES.get(name[0], name[0]), row["subject"])
            rows.append((question, subject, row["n"], p_value(row.get("p_holm", math.nan)), row["said"]))
    return table("| | | n | p, Holm | answer |", rows)


def worth(size: str, *names: str, columns: Sequence[str] = ("worth",)) -> str:
    """How many times the images a regulariser is worth on so many, or the range of several."""
    factors = worths().loc[[(name, int(size)) for name in names], [*columns]].to_numpy()
    return " to ".join(f"{factor:.1f}" for factor in sorted({factors.min(), factors.max()}))


def power_table() -> str:
    rows = ((f"{size:,}", *map("{:.2f}".format, few.power(size))) for size in few.SIZES)
    return table("| images | SD of a gain, planned | as it came out | finds, planned | as it came out |", rows)


TABLES = (answer_table, gain_table, size_table, question_table, power_table, worth_table, network_table)
NUMBERS = (pruned, six, difference, worth, worth_answers, longer)
VALUES: dict[str, Callable[..., str]] = {
    **{function.__name__: function for function in (*TABLES, *NUMBERS)},
    "six_table": lambda: summary_table(Study(RESULTS, "plain", SIX, TEN_SEEDS)),
    "frontier_table": lambda: summary_table(Study(RESULTS / "epochs-25", "frontier")),
    "nothing": lambda size: f"{100 - worth_analysis.errors(WORTH, 'plain', f'{size}-nothing').mean():.1f}%",
    "mlp-worth": lambda size, name: worth_analysis.describe_data(WORTH, "mlp", [int(size)], [name])[0]["said"],
    "worth-ends": partial(worth, columns=("worth_low", "worth_high")),
    "shares": lambda size, name: f"{few.share_removed(int(size), name)[0]:.0f}%",
    "minutes": lambda *sizes: f"{few.minutes(*map(int, sizes)):.0f}",
    "bn-margin": lambda: f"{1.96 * variance_sources(right(['bn'], FACTORIAL_SEEDS)['bn'].unstack(0))['both']:.2f}",
    "clean": lambda images, column: f"{few.clean().query(f'images == {images}')[column].mean():.2f}",
    "recurrence": lambda slug: f"{few.recurrence(slug):.0%}",
}
MARKED = re.compile(r"<!-- (\w[^<>]*) -->((?:(?!<!-- ).)*?)<!-- / -->", re.DOTALL)


def fill(text: str) -> str:
    """Write every number of a page anew. Raises ValueError for a marker without its counterpart or an unknown name."""
    if lone := re.search(r"<!--.*?-->", MARKED.sub("", text), re.DOTALL):
        raise ValueError(f"{lone[0]} has no counterpart: each number stands between <!-- NAME --> and <!-- / -->")
    return MARKED.sub(lambda found: f"<!-- {found[1]} -->{value(found[1])}<!-- / -->", text)


@cache
def value(marker: str) -> str:
    name, *arguments = marker.split()
    if name not in VALUES:
        raise ValueError(f"<!-- {marker} --> names no number of docs/write_numbers.py: {', '.join(VALUES)}")
    return VALUES[name](*arguments)


if __name__ == "__main__":
    torch.set_num_threads(1)  # the models are small: more threads would wait for each other on a busy machine
    for page in PAGES:
        page.write_text(fill(page.read_text(encoding="utf-8")), encoding="utf-8")
