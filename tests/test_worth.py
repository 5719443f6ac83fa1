"""studies/worth_analysis.py on invented runs, and what studies/worth.py chooses."""

import itertools
import json
import math
import re
import shutil

import numpy as np
import pytest
import scipy.stats
import torch
import worth
import worth_analysis as analysis
import worth_power
import worth_search
from conftest import invent_run

from s6lib.data import PROJECT

ERRORS = dict(zip((100, 300, 1_000, 3_000, 10_000, 30_000, 60_000), (25.0, 8.0, 4.0, 2.0, 1.0, 0.5, 0.4), strict=True))
PAGE = (PROJECT / "docs" / "preregistration_worth.md").read_text()


def write(folder, recipe, condition, rates):
    """Invent runs with these error rates in percent, one for each seed."""
    for seed, rate in zip(analysis.SEEDS, rates, strict=True):
        invent_run(folder / recipe / condition / f"seed-{seed}", 100 - rate)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs in which rotation halves the errors, L2 is worth 1.5 times the data, L1 adds a tenth, the rest do nothing.

    With wrong labels, all remove twice as much (in logs) in the MLP; chosen on the 300 images, half; longer, the same.
    """
    folder, rng = tmp_path_factory.mktemp("worth"), np.random.default_rng(5)

    def noisy(rate):
        noise = rng.normal(scale=0.01, size=len(analysis.SEEDS))
        return rate * np.exp(noise - noise.mean())

    def removed(size, name):
        if name == "l2":
            logs, errors = np.log(list(ERRORS)), np.log(list(ERRORS.values()))
            return math.log(ERRORS[size]) - np.interp(math.log(1.5 * size), logs, errors)
        return {"rotation": math.log(2), "l1": -math.log(1.1)}.get(name, 0.0)

    for size, rate in ERRORS.items():
        for recipe in ("plain", "mlp", "plain-wrong", "mlp-wrong"):
            for suffix in ("", analysis.LONG):
                write(folder, recipe, f"{size}-nothing{suffix}", noisy(rate))
                for name in analysis.REGULARISERS:
                    left = math.exp(-removed(size, name) * (2 if recipe == "mlp-wrong" else 1))
                    write(folder, recipe, f"{size}-{name}{suffix}", noisy(rate * left))
    networks = itertools.product(ERRORS.items(), analysis.SEEDS)
    rows = [f"plain,{size}-nothing,{seed},1,{100 - rate / 2}" for (size, rate), seed in networks]
    (folder / "clean.csv").write_text("\n".join(["recipe,condition,seed,images,accuracy", *rows]))
    for name in analysis.REGULARISERS:
        write(folder, "plain", f"300-own-{name}", noisy(8.0 * math.exp(-removed(300, name) / 2)))
    rows = [f"{seed},{name},1,300-own-{name}" for name in analysis.REGULARISERS for seed in analysis.SEEDS]
    (folder / "own.csv").write_text("\n".join(["seed,name,strength,condition", *rows]))
    return folder


def said(rows):
    return {row["subject"]: row["said"] for row in rows}


def test_every_question_answers_what_was_put_in(runs):
    shares = said(analysis.removes(runs))
    assert said(analysis.all_images(runs))["rotation, 60,000 images"].startswith("removes 50% of the errors (")
    assert shares["l1, 300 images"].startswith("adds 10% of the errors (")
    assert shares["ghosts, 10,000 images"].startswith("not shown to remove or add errors")
    worth = said(analysis.data(runs))
    assert worth["l2, 10,000 images"].startswith("worth 1.5")
    assert worth["rotation, 300 images"].startswith("worth 3.")
    assert worth["ghosts, 3,000 images"].endswith("not shown to be worth more or less than itself")
    fall = said(analysis.fall(runs))
    assert fall["l2"].startswith("the same to within a half: from 1.5")
    gaps = said(analysis.gap(runs))
    assert gaps["nothing, 300 images"].startswith("4.00 points better (3.9")
    own = said(analysis.own(runs))
    assert "; keeps 50% of the gain (" in own["rotation"]
    assert own["ghosts"].endswith("how much it keeps cannot be told")
    longer = said(analysis.longer(runs))
    assert longer["more steps, 300 images"].startswith("not shown to remove")
    assert longer["rotation, 300 images"].startswith("no change shown: 50% of the errors in place of")
    assert said(analysis.second_network(runs))["l2, 300 images"].startswith("worth 1.5")
    assert said(analysis.networks(runs))["rotation, mlp-wrong, 10,000 images"].startswith("removes 75% of the errors")
    labels = said(analysis.labels(runs))
    assert labels["rotation, mlp"] == "removes more: 75% of the errors in place of 50%"
    assert labels["l1, mlp"].startswith("removes less")
    assert labels["rotation, plain"].startswith("no change shown")
    assert said(analysis.capacity(runs))["rotation"] == "wrong labels raise the share more in the MLP"


def test_a_question_waits_for_all_its_runs_and_no_other_does(runs, capsys):
    lost = runs / "plain" / f"300-l2{analysis.LONG}" / f"seed-{analysis.SEEDS[0]}" / "run.json"
    lost.unlink()
    try:
        analysis.main(runs)
    finally:
        lost.touch()
    printed = capsys.readouterr().out
    assert f"1 of {len(analysis.SEEDS)} runs are not complete, the first of them {lost.parent}" in printed
    assert printed.count("not complete") == 1
    assert all(f"Question {number}: " in printed for number in range(1, 12))


def test_a_factor_inside_the_first_step_has_the_interval_of_fieller():
    """Where the mean of y minus g times the mean of x is not rejected, g solves a quadratic."""
    rng, n = np.random.default_rng(2), 8
    curve = np.log([8.0, 3.0]) + rng.normal(scale=0.1, size=(n, 2))
    with_it = np.log(5.5) + rng.normal(scale=0.1, size=n)
    x, y = curve[:, 0] - curve[:, 1], curve[:, 0] - with_it
    (xx, xy), (_, yy) = np.cov(x, y) / n
    t = scipy.stats.t.ppf(0.975, n - 1) ** 2
    quadratic = x.mean() ** 2 - t * xx, -2 * (x.mean() * y.mean() - t * xy), y.mean() ** 2 - t * yy
    low, high = sorted(np.exp(np.roots(quadratic) * math.log(1_000 / 300)))
    assert analysis.worth(curve, with_it, 300, (300, 1_000)) == pytest.approx(
        (math.exp(y.mean() / x.mean() * math.log(1_000 / 300)), low, high), rel=0.002
    )


def test_a_factor_beyond_the_curve_has_no_bound_there():
    rng = np.random.default_rng(3)
    curve = np.log([8.0, 4.0]) + rng.normal(scale=0.05, size=(8, 2))
    _, low, high = analysis.worth(curve, np.log(4.0) + rng.normal(scale=0.05, size=8), 300, (300, 1_000))
    assert 2 < low < 1_000 / 300
    assert high == math.inf
    assert analysis.say_worth(3.3, low, high).startswith("worth at least")
    with pytest.raises(ValueError, match="fewer errors with each size"):
        analysis.log_worth(curve[:, ::-1], curve[:, 0], 300, (300, 1_000))


def test_the_jackknife_of_a_mean_is_the_t_interval():
    values = np.array([1.0, 3.0, 2.0, 5.0])
    pseudo = analysis.jackknife(lambda seeds: float(values[seeds].mean()), 4)
    np.testing.assert_allclose(pseudo, values)
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    np.testing.assert_allclose(analysis.mean_interval(values), expected)


def test_the_study_trains_what_the_analysis_reads():
    shared = [name for name in vars(worth) if name.isupper() and hasattr(analysis, name)]
    assert len(shared) >= 9
    assert all(getattr(worth, name) == getattr(analysis, name) for name in shared)


def test_the_page_has_every_question_the_seeds_and_every_size():
    numbers = [re.match(r"Question (\d+): ", question.__doc__)[1] for question in analysis.QUESTIONS]
    assert re.findall(r"^\| (\d+) \| [A-Z]", PAGE, re.MULTILINE) == numbers
    assert f"Seeds {analysis.SEEDS[0]} to {analysis.SEEDS[-1]} (n = {len(analysis.SEEDS)})" in PAGE
    for size in (*analysis.SIZES, analysis.ALL):
        assert re.search(rf"^\| {size:,} \| {2 * worth.PASSES[size]} \| nothing", PAGE, re.MULTILINE)


@pytest.mark.parametrize("part", worth.PARTS)
def test_the_page_has_the_strengths_that_the_trials_give(part, capsys):
    worth.strengths(part)
    assert capsys.readouterr().out.strip() in PAGE


def test_the_page_plans_with_what_the_published_runs_came_out_with():
    assert "\n".join(worth_power.describe_power()) in PAGE


def test_the_best_strength_is_no_end_and_was_tried_as_often_as_its_neighbours(tmp_path, monkeypatch):
    def choose(*means, name="l1", seeds=3):
        """Choose from 1e-5, 1e-4, 1e-3 and so on; the last is tried with so many seeds, the others with three."""
        rows = [
            f"plain,300,{name},{10.0**place},{seed},100,{mean + seed}"
            for place, mean in enumerate(means, start=-5)
            for seed in (1, 2, 3)[: seeds if place == len(means) - 6 else 3]
        ]
        (tmp_path / "trials.csv").write_text(
            "\n".join(["recipe,size,name,strength,seed,train_accuracy,accuracy", *rows])
        )
        return worth.strength_of("plain", 300, name)

    monkeypatch.setattr(worth, "TRIALS", [tmp_path / "trials.csv"])
    assert choose(90, 92, 91) == 1e-4
    assert choose(90, 92, 92, 91) == 1e-4
    assert choose(93, 92, 91) == 1e-5  # where L1 is next to nothing
    with pytest.raises(ValueError, match=r"0\.001 is the best of those tried, but at their end"):
        choose(90, 91, 92)
    with pytest.raises(ValueError, match=r"0\.001, beside the best, was not tried"):
        choose(90, 92, 91, seeds=2)
    with pytest.raises(ValueError, match="no strength was tried"):
        worth.strength_of("mlp", 300, "l1")


def test_a_fifth_of_the_labels_is_wrong_and_the_same_fifth_each_time():
    labels = torch.arange(1_000) % 10
    wrong = worth.mislabel(labels)
    assert (wrong != labels).sum() == 200
    assert set(wrong.tolist()) == set(range(10))
    assert torch.equal(wrong, worth.mislabel(labels))


def test_the_table_of_trials_is_what_their_histories_say_and_none_saw_a_test_image(tmp_path):
    folder = PROJECT / "studies" / "worth_search"
    abouts = [json.loads(file.read_text()) for file in folder.glob("*/*/seed-*/run.json")]
    assert abouts
    assert all(about["recipe"]["held_out"] for about in abouts)
    shutil.copytree(folder, tmp_path / "worth_search")
    worth_search.collect(tmp_path / "worth_search")
    assert (tmp_path / "worth_search.csv").read_text() == folder.with_suffix(".csv").read_text()
