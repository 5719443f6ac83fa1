"""Figures and tables that one notebook alone uses."""

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from torch import nn

import figures
import lesson_tables as tables
from s6lib.analysis import convolution_weights
from s6lib.recipes import CONDITIONS, PLAIN, Condition, build_model
from s6lib.statistics import seeds_needed

OUTCOMES = pd.DataFrame({"bn": [2.0, 1.0, 3.0], "gbn": [1.0, 1.0, 2.0]}, index=[1, 2, 3])
ENDS = {"low_90": -0.1, "high_90": 0.1, "low_95": -0.2, "high_95": 0.2, "mean": 0.0, "low": -0.2, "high": 0.2, "n": 9}
NAMES, SIZES = list(figures.REGULARISERS), (100, 300)
RUNS = pd.DataFrame({"network": ["A"] * 4 + ["B"] * 2, "parameters": [100, 100, 900, 900, 890, 890]})
REPORTED = pd.DataFrame({"parameters": [50, 70], "accuracy": [98.0, 98.5], "kind": ["last", "claim"]})
CURVE = {"condition": ["bn"] * 4 + ["l1-bn"] * 4, "seed": [1, 1, 2, 2] * 2, "share": [0, 0.5] * 4}
GAPS = {"training": [100.0, 99.0], "nothing": [80.0, 98.0], "rotation": [90.0, 98.5]}
NETWORKS = pd.DataFrame({"network": "PlainNet", "labels": "right labels", "size": SIZES, "name": "l1", "share": 5.0})
TRIALS = pd.DataFrame({"size": 300, "name": ["nothing", "l1", "l1"], "strength": [0, 0.1, 1]})
TRIALS = TRIALS.assign(train_accuracy=100.0, accuracy=[92.0, 95.0, 60.0])


def by_size():
    """Of which the worth on 300 images has no upper end."""
    columns = [f"{column}{end}" for column in ("error", "worth") for end in ("", "_low", "_high")]
    rows = {(name, size): [5.0, 4.0, 6.0, 1.5, 1.2, 2.0 if size < 300 else np.inf] for name in NAMES for size in SIZES}
    rows |= {("nothing", size): [9.0, 8.0, 9.9, *[np.nan] * 3] for size in (*SIZES, 30_000)}
    return pd.DataFrame(rows, index=columns).T.rename_axis(["name", "size"])


def trials():
    rows = [(1, 1, 0.5), (1, 2, 0.5), (2, 1, 1.0), (2, 2, 0.0), (3, 1, 2.0)]
    columns = ["name", "size", "strength", "seed", "gain"]
    return pd.DataFrame([(name, size, *row) for name in NAMES for size in SIZES for row in rows], columns=columns)


DRAWINGS = {
    "plot_winners": ((OUTCOMES,), ["3 studies: 2 of 2 conditions win, or share a win (ringed)", "gbn"]),
    "plot_answers": ((pd.DataFrame([{"question": "G", **ENDS, "said": "none"}]), 0.05), ["none", "G (n = 9)"]),
    "plot_ghost_scatter": ((pd.DataFrame({4: [0.1, 0.2], 16: [0.2, 0.4]}, index=[1, 2]),), ["4 splits", "16 splits"]),
    "plot_split_sweep": ((OUTCOMES, {"bn": 1, "gbn": 4}, 64), ["1\n(64)", "4\n(16)"]),
    "plot_power": ((0.06, 0.05, (1, 15)), [f"the only question: {seeds_needed(0.06, 0.05)} seeds for 80%"]),
    "plot_frontier": ((RUNS.assign(accuracy=np.arange(6) + 93), REPORTED, 99.4), ["A", "B\n890", "99.4%"]),
    "plot_gains": ((pd.DataFrame([{"label": "more", "group": "a", **ENDS}]),), ["more", "+0.000  (n = 9)"]),
    "plot_gap": ((pd.DataFrame(GAPS, index=[100, 10_000]),), ["test images, rotation", "10,000"]),
    "plot_pruning": (
        (pd.DataFrame(CURVE).assign(accuracy=[1, 0.5, 1, 0.3, 1, 0.9, 1, 0.9]), {"bn": "BN"}),
        ["50%", "40%  BN", "a dot is a run, a diamond the mean of 2 seeds; BN at 50%: 30% to 50% by seed"],
    ),
    "plot_confusion": ((np.diag([90, 90]) + np.array([[0, 7], [0, 0]]), "", ["x", "y"]), ["7", "predicted", "actual"]),
    "plot_worth": ((by_size(),), ["10%", "300", "ghost batches", "2 times", "no regularisation"]),
    "plot_networks": ((NETWORKS.assign(share_low=4.0, share_high=6.0),), ["PlainNet, right labels", "L1", "300", "6%"]),
    "plot_trials": (
        (TRIALS, 300, "l1", 0.1, TRIALS.tail(1)),
        ["300 images, L1 0.1: training 100.0%, held-out 95.0%, gap 5.0 points", "L1: weight of the penalty"],
    ),
    "plot_strengths": ((trials(),), ["100 images\ngain, points", "largest angle, degrees"]),
    "plot_class_balance": (None, ["10,000 test images", "60,000 training images", "seven"]),
    "plot_grey_levels": (({"dark": torch.tensor([[[0, 9], [9, 255]]])},), ["dark", "pixels"]),
    "plot_limits": (((1.6, 0.4),), ["L1: a diamond\nbest weights within it: 1.00 and 0.00"]),
    "plot_penalties": ((2e-4, 1e-4), ["alike at |w| = 1"]),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_figures_show_what_they_name(name, mnist):
    arguments, texts = DRAWINGS[name]
    plot = getattr(figures, name)
    figure = plot(*(arguments or mnist))
    figure.draw_without_rendering()
    shown = [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]
    assert set(texts) <= {line for text in shown for line in (text, *text.splitlines())}


def test_every_figure_is_tested():
    assert set(DRAWINGS) == {name for name in vars(figures) if name.startswith("plot_")}


def test_condition_table_has_the_settings_and_what_conditions_change():
    table = tables.condition_table(PLAIN, CONDITIONS).set_index("condition")
    assert table.loc["L1 + L2 + GBN"].tolist() == [2e-4, 1e-4, "GhostBatchNorm", 4, 0.04, 64, 0.01]
    own = Condition("own", norm=nn.InstanceNorm2d, penalty=nn.Flatten(), changes={"batch_size": 256})
    row = tables.condition_table(PLAIN, (CONDITIONS[0], own)).iloc[1]
    assert row[["normalisation", "penalty", "batch size"]].tolist() == ["InstanceNorm2d", "Flatten", 256]


def test_confusions_of_known_predictions():
    labels, predictions = np.array([4, 4, 9, 9, 1, 7, 0]), np.array([9, 4, 4, 9, 7, 7, 0])
    matrix = tables.confusion_matrix(predictions, labels)
    assert (matrix.sum(), matrix[4, 9], matrix[9, 4], matrix[1, 7], matrix[7, 1]) == (7, 1, 1, 1, 0)
    pairs = tables.confused_pairs(matrix)
    assert pairs.iloc[:2].to_numpy().tolist() == [["four / nine", 2, 2 / 3], ["one / seven", 1, 1 / 3]]


def test_errors_by_digit_count_the_runs_that_are_wrong(tiny_study, mnist):
    labels = mnist[1].labels.numpy()
    wrong = np.array([tiny_study.predictions(*run) != labels for run in tiny_study.runs]).sum(0)
    table = tables.errors_by_digit(tiny_study, labels)
    assert table["runs"].tolist() == sorted(wrong[wrong > 0], reverse=True)
    assert table["runs"].tolist() == wrong[table["image"]].tolist()
    assert (table["actual"] != table["taken_for"]).all()


def test_ghosts_scatter_as_their_means_do():
    model, images = build_model(PLAIN, CONDITIONS[3]), torch.rand(64, 1, 28, 28)  # with others a channel may be dead
    table = tables.ghost_scatter(model, images, (1, 4, 16))
    assert table[1].abs().max() < 1e-5
    before = model.layers[:2](images)  # what the first normalisation is given
    ghosts = torch.stack([ghost.mean((0, 2, 3)) for ghost in before.tensor_split(4)])
    expected = ((ghosts - before.mean((0, 2, 3))) / before.std((0, 2, 3))).square().mean(0).sqrt().mean()
    assert table[4][1] == pytest.approx(expected.item(), rel=1e-4)
    assert not any(layer._forward_pre_hooks for layer in model.modules())


def test_stability_is_the_deviation_of_changes_at_the_first_rate_and_after_it():
    accuracies, rates = [0.90, 0.92, 0.91, 0.93, 0.96, 0.97, 0.95], [0.1] * 4 + [0.01] * 2 + [0.1]
    run = {"condition": "bn", "seed": 1, "epoch": range(1, 8), "lr": rates, "test_accuracy": accuracies}
    table, points = tables.stability(pd.DataFrame(run)[::-1])["bn"], 100 * np.diff(accuracies)
    assert table["first rate", 1] == pytest.approx(points[:3].std(ddof=1))
    assert table["after", 1] == pytest.approx(points[4:].std(ddof=1))  # and no change across the drop


def test_variance_sources_count_what_is_neither_the_runs_nor_the_images_once():
    """Against the variance by which the mean really varies, for known components, over 400 studies."""
    seeds, images, study = 6, 100, np.random.default_rng(0)
    of_seed, of_image, of_neither = 0.1, 0.5, 1.0
    found, means = [], []
    for _ in range(400):
        scores = of_seed * study.normal(size=(seeds, 1)) + of_image * study.normal(size=images)
        scores = scores + of_neither * study.normal(size=(seeds, images))
        means.append(100 * scores.mean())
        found.append(tables.variance_sources(scores)["both"] ** 2)
    expected = 1e4 * (of_seed**2 / seeds + of_image**2 / images + of_neither**2 / (seeds * images))
    assert np.var(means) == pytest.approx(expected, rel=0.2)
    assert np.mean(found) == pytest.approx(expected, rel=0.2)  # counted three times: 1.57 times it


def test_conditions_of_different_seeds_have_no_difference():
    first = pd.DataFrame(np.eye(3, 50), index=[1, 2, 3])
    with pytest.raises(ValueError, match="pair by seed, and one of them lacks: 1, 4; leave these seeds out"):
        tables.variance_sources(first - first.set_axis([4, 3, 2]))
    with pytest.raises(ValueError, match="run more seeds"):
        tables.variance_sources(first[:1])


def test_mcnemar_is_the_binomial_test():
    first, second = (np.isin(np.arange(100), range(*ends)) for ends in ((0, 40), (27, 47)))
    assert tables.mcnemar_p(first, second) == (27, 7, pytest.approx(scipy.stats.binomtest(7, 34).pvalue))


def test_equal_conditions_differ_by_chance_alone():
    normal = np.random.default_rng(0).normal(9950, 6, size=5_000).round()
    # 500 comparisons of a condition with itself: 5% within three standard errors, and less for the ties.
    assert 0.02 <= tables.false_alarm_rate(normal, seeds=10, comparisons=500) <= 0.08
    shares, spread = tables.equal_conditions(0.035)
    assert shares == pytest.approx([0.2] * 5, abs=0.02)
    assert spread == pytest.approx(0.035 * 2.326, abs=0.003)  # the mean range of five normal values


def test_the_best_must_beat_every_other():
    rows = [("a", "b", 0.03, 0.01), ("c", "a", -0.05, 0.02), ("b", "c", 9, 0.9)]
    comparisons = pd.DataFrame(rows, columns=["first", "second", "difference", "p_holm"])
    assert tables.verdict_on_best(comparisons, "a", ["b", "c"]) == "supported"
    assert tables.verdict_on_best(comparisons, "c", ["a", "b"]) == "contradicted"
    assert tables.verdict_on_best(comparisons.assign(p_holm=0.3), "a", ["b"]) == "cannot be told at this n"


def test_right_predictions_are_those_of_the_condition_by_seed(tiny_study, mnist):
    labels = mnist[1].labels.numpy()
    right = tables.right_predictions(tiny_study, "gbn", labels)
    assert (right.shape, right.index.tolist(), right.to_numpy().dtype) == ((2, 10_000), [1, 2], bool)
    assert (100 * right.mean(axis=1)).tolist() == pytest.approx(tiny_study.outcomes()["gbn"].tolist())


def test_a_run_passes_if_all_of_its_last_epochs_do():
    runs = {("a", 1): [0.90, 0.994, 0.994, 0.995], ("a", 2): [0.99, 0.994, 0.9939, 0.995], ("b", 1): [1, 0.9, 1, 0.994]}
    histories = {run: pd.DataFrame({"epoch": range(1, 5), "test_accuracy": values}) for run, values in runs.items()}
    history = pd.concat(histories, names=["condition", "seed"]).reset_index().sample(frac=1, random_state=1)
    assert tables.passing(history, 0.994, last=3).to_dict() == {("a", 1): True, ("a", 2): False, ("b", 1): False}
    for level in (0.994, 99.4 / 100):  # which is a little more
        assert tables.passing(history, level, last=2).to_dict() == {("a", 1): True, ("a", 2): False, ("b", 1): True}


def test_the_interval_of_an_accuracy_is_wilsons():
    assert tables.wilson_interval(0.9945) == pytest.approx((0.99285, 0.99577), abs=1e-5)


@pytest.mark.parametrize("share", [0, 0.37, 0.6, 1])
def test_pruning_zeroes_the_smallest_convolution_weights_of_a_copy(share):
    model = nn.Sequential(nn.Conv2d(1, 8, 5, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(216, 10)).eval()
    before, state = convolution_weights(model), {name: value.clone() for name, value in model.state_dict().items()}
    copy = tables.pruned(model, share)
    after = convolution_weights(copy)
    gone = after == 0
    assert gone.sum() == round(share * 632)
    assert (after[~gone] == before[~gone]).all()
    if 0 < share < 1:
        assert np.abs(before[gone]).max() <= np.abs(before[~gone]).min()
    assert copy.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(copy.state_dict()[name], state[name]) for name in ("0.bias", "4.weight", "4.bias"))


def test_a_pruning_curve_starts_at_the_accuracy_of_the_run(tiny_study, mnist):
    few = mnist[1].part(slice(500))
    curve = tables.pruning_curve(tiny_study, few, (0, 1)).set_index(["condition", "seed", "share"])["accuracy"]
    for condition, seed in tiny_study.runs:
        right = tiny_study.predictions(condition, seed)[:500] == few.labels.numpy()
        assert curve[condition, seed, 0] == pytest.approx(right.mean())
        assert curve[condition, seed, 1] < 0.2  # one class for all
