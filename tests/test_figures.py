"""Figures that one notebook alone draws."""

import sys

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from s6lib.data import PROJECT
from s6lib.preregistered import answer
from s6lib.statistics import condition_statistics, mean_interval, power, seeds_needed

sys.path.insert(0, str(PROJECT / "notebooks"))
from figures import (
    REGULARISERS,
    plot_answers,
    plot_class_balance,
    plot_fit,
    plot_frontier,
    plot_gains,
    plot_gains_by_size,
    plot_gap,
    plot_ghost_scatter,
    plot_grey_levels,
    plot_limits,
    plot_penalties,
    plot_power,
    plot_split_sweep,
    plot_strengths,
    plot_winners,
)


def test_winners_are_ringed_and_ties_share():
    outcomes = pd.DataFrame({"a": [2.0, 1.0, 3.0], "b": [1.0, 1.0, 2.0], "c": [0.0, 0.5, 1.0]}, index=[1, 2, 3])
    (axes,) = plot_winners(outcomes).axes
    ringed = [len(line.get_xdata()) for line in axes.get_lines() if line.get_markerfacecolor() == "none"]
    assert ringed == [3, 1, 0]
    assert axes.get_title() == "3 studies, 2 of 3 conditions win one (ringed)"


def test_answers_have_both_intervals_and_what_is_said():
    rng = np.random.default_rng(1)
    right = pd.DataFrame(
        rng.integers(9940, 9960, (32, 6)), columns=["bn", "l1-l2-bn", "gbn", "l1-l2-gbn", "l1-bn", "l2-bn"]
    )
    found = answer(right, right)
    (axes,) = plot_answers(found, 0.05, {"G": "what GBN costs"}, "answers").axes
    lines = axes.get_lines()[1:]
    for place, row in enumerate(found.itertuples()):
        assert list(lines[3 * place].get_xdata()) == [row.low_95, row.high_95]
        assert list(lines[3 * place + 1].get_xdata()) == [row.low_90, row.high_90]
        assert axes.texts[place].get_text() == row.said
    assert axes.get_yticklabels()[0].get_text() == "what GBN costs (n = 32)"
    assert axes.get_title() == "answers"
    (band,) = axes.patches
    box = band.get_extents().transformed(axes.transData.inverted())
    assert (box.x0, box.x1) == pytest.approx((-0.05, 0.05))


def test_class_balance_shows_the_counts(mnist):
    train, test = plot_class_balance(*mnist).axes
    assert [bar.get_height() for bar in train.patches] == mnist[0].labels.bincount().tolist()
    assert [bar.get_height() for bar in test.patches] == mnist[1].labels.bincount().tolist()


def test_the_scatter_of_ghosts_has_a_line_a_number_of_splits():
    table = pd.DataFrame({4: [0.1, 0.2], 16: [0.2, 0.4]}, index=[1, 2])
    (axes,) = plot_ghost_scatter(table).axes
    assert [line.get_label() for line in axes.get_lines()] == ["4 splits", "16 splits"]
    assert [line.get_ydata().tolist() for line in axes.get_lines()] == [[0.1, 0.2], [0.2, 0.4]]


def test_grey_levels_leave_out_the_background():
    images = {"a": torch.tensor([[[0, 0], [9, 255]]]), "b": torch.tensor([[[0, 9], [9, 9]]])}
    (axes,) = plot_grey_levels(images).axes
    first, second = (patch.get_xy() for patch in axes.patches)
    assert first[:, 1].max() == 1
    assert second[:, 1].max() == 3


def test_split_sweep_is_in_the_order_of_the_splits(tiny_study):
    (axes,) = plot_split_sweep(tiny_study.outcomes(), {"l1-bn": 1, "gbn": 4}, 64).axes
    means = condition_statistics(tiny_study.outcomes()).set_index("condition")["mean"]
    curve = axes.containers[0].lines[0]
    assert curve.get_xdata().tolist() == [1, 4]
    assert curve.get_ydata().tolist() == [means["l1-bn"], means["gbn"]]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1\n(64)", "4\n(16)"]


def test_a_sweep_needs_the_splits_of_every_condition(tiny_study):
    with pytest.raises(ValueError, match="splits lacks the number of ghost batches of gbn"):
        plot_split_sweep(tiny_study.outcomes(), {"l1-bn": 1}, 64)


def test_power_grows_with_the_seeds_and_falls_with_the_questions():
    (axes,) = plot_power(0.06, 0.05, (1, 15), "sizes").axes
    curves = [line for line in axes.get_lines() if line.get_linewidth() == 2.2]
    for curve, count in zip(curves, (1, 15), strict=True):
        seeds, shares = curve.get_xdata(), curve.get_ydata()
        assert shares == pytest.approx([power(0.06, 0.05, n, count) for n in seeds])
        assert seeds[np.argmax(np.array(shares) >= 0.8)] == seeds_needed(0.06, 0.05, count)
    assert axes.get_legend().get_texts()[0].get_text() == f"the only question: {seeds_needed(0.06, 0.05)} seeds for 80%"
    assert axes.get_title() == "sizes, a true difference of 0.05 points"


def test_the_frontier_shows_every_run_the_means_and_what_was_reported():
    runs = pd.DataFrame(
        {
            "network": ["Net"] * 5 + ["Other"] * 2,
            "parameters": [100, 100, 100, 900, 900, 850, 850],
            "accuracy": [99.0, 99.1, 99.3, 99.5, 99.6, 99.7, 99.8],
        }
    )
    reported = pd.DataFrame({"parameters": [50, 70], "accuracy": [98.0, 98.5], "kind": ["last", "claim"]})
    (axes,) = plot_frontier(runs, reported, 99.4, "sizes").axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    dots = [line for line in axes.get_lines() if line.get_alpha() == 0.3]
    assert [line.get_ydata().tolist() for line in dots] == [[99.0, 99.1, 99.3, 99.5, 99.6], [99.7, 99.8]]
    assert [line.get_xdata().tolist() for line in dots] == [[100, 100, 100, 900, 900], [850, 850]]
    assert lines["reported, one run, last epoch"].get_xdata().tolist() == [50]
    assert lines["claimed, without a log"].get_ydata().tolist() == [98.5]
    net, other = axes.containers
    assert net.lines[0].get_ydata().tolist() == pytest.approx([297.4 / 3, 99.55])
    assert other.lines[0].get_xydata().tolist() == [[850, pytest.approx(99.75)]]
    assert [text.get_text() for text in axes.texts] == ["99.4%", "Net", "Other"]
    assert not axes.child_axes
    low, high = (point[1] for point in net.lines[2][0].get_segments()[0])
    assert (low, high) == pytest.approx(mean_interval([99.0, 99.1, 99.3]))
    assert any(line.get_ydata() == [99.4, 99.4] for line in axes.get_lines())


def test_networks_of_almost_one_size_are_enlarged_side_by_side():
    sizes = {"network": ["Net"] * 4 + ["Other"] * 2, "parameters": [100, 100, 900, 900, 890, 890]}
    runs = pd.DataFrame({**sizes, "accuracy": [99.0, 99.1, 99.3, 99.5, 99.6, 99.8]})
    reported = pd.DataFrame({"parameters": [], "accuracy": [], "kind": []})
    (corner,) = plot_frontier(runs, reported, 99.4).axes[0].child_axes
    assert [text.get_text() for text in corner.get_xticklabels()] == ["Net\n900", "Other\n890"]
    dots = [line.get_xydata().tolist() for line in corner.get_lines() if line.get_alpha() == 0.3]
    assert dots == [[[0, 99.3], [0, 99.5]], [[1, 99.6], [1, 99.8]]]


def test_gains_stand_in_rows_with_their_intervals_and_a_line_between_groups():
    gains = pd.DataFrame(
        [
            ("more", "change", 5, 0.1, 0.05, 0.15),
            ("less", "change", 5, -0.1, -0.2, 0.0),
            ("other", "b", 9, 0, -1, 1),
        ],
        columns=["label", "group", "n", "mean", "low", "high"],
    )
    (axes,) = plot_gains(gains, "gains").axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["more", "less", "other"]
    assert [text.get_text() for text in axes.texts] == [
        "+0.100  (n = 5)",
        "\N{MINUS SIGN}0.100  (n = 5)",
        "+0.000  (n = 9)",
    ]
    bars = [list(line.get_xdata()) for line in axes.get_lines() if line.get_linewidth() == 2]
    assert bars == [[0.05, 0.15], [-0.2, 0.0], [-1, 1]]
    edges = [line.get_ydata()[0] for line in axes.get_lines() if list(line.get_xdata()) == [0, 1]]
    assert edges == [1.5]


def test_penalties_and_their_pulls_are_those_of_autograd():
    left, right = plot_penalties(2e-4, 1e-4).axes
    for lines, penalty in zip(
        zip(left.get_lines(), right.get_lines(), strict=True),
        (lambda w: 2e-4 * w.abs(), lambda w: 1e-4 * w**2),
        strict=True,
    ):
        weights = torch.tensor(lines[0].get_xdata(), requires_grad=True)
        value = penalty(weights)
        value.sum().backward()
        assert lines[0].get_ydata() == pytest.approx(value.detach().numpy())
        nonzero = weights.detach().numpy() != 0  # at zero |w| has no gradient
        assert lines[1].get_ydata()[nonzero] == pytest.approx(weights.grad.abs().numpy()[nonzero])
    assert right.texts[0].get_text() == "alike at |w| = 1"


@pytest.mark.parametrize(
    "plot",
    [plot_winners, lambda outcomes, ax: plot_split_sweep(outcomes, {"l1-bn": 1, "gbn": 4}, 64, ax=ax)],
)
def test_a_panel_may_be_given(tiny_study, plot):
    figure = Figure()
    other, panel = figure.subplots(1, 2)
    assert plot(tiny_study.outcomes(), ax=panel) is figure
    assert panel.has_data()
    assert not other.has_data()


def test_l1_is_touched_at_a_corner_and_l2_beside_the_axis():
    figure = plot_limits(best=(1.6, 0.4))
    touched = [line.get_xydata()[0] for axes in figure.axes for line in axes.get_lines() if line.get_marker() == "o"]
    assert touched[0] == pytest.approx([1, 0], abs=1e-3)
    assert touched[1] == pytest.approx(np.array([1.6, 0.4]) / np.hypot(1.6, 0.4), abs=1e-3)


def gain_rows(sizes):
    rows = [(name, size, 100 / size, 50 / size, 150 / size) for name in REGULARISERS for size in sizes]
    return pd.DataFrame(rows, columns=["name", "size", "mean", "low", "high"])


def test_gains_by_size_have_a_line_a_regulariser_and_hollow_markers_for_another_recipe():
    figure = plot_gains_by_size(gain_rows([100, 300]), gain_rows([60_000]), "gains")
    for axes in figure.axes:
        lines = [container.lines[0] for container in axes.containers]
        assert [line.get_ydata().tolist() for line in lines[::2]] == [[1.0, 1 / 3]] * 5
        assert {line.get_markerfacecolor() for line in lines[1::2]} == {"white"}
        assert [label.get_text() for label in axes.get_xticklabels()] == ["100", "300", "60,000"]
    names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert names == [label for label, *_ in REGULARISERS.values()]


def test_strengths_star_the_best_of_those_with_most_seeds():
    strengths = [
        (1, 1, 0.5),
        (1, 2, 0.5),
        (2, 1, 1.0),
        (2, 2, 0.0),
        (3, 1, 2.0),
    ]  # 3 has one seed, though it gains most
    rows = [(name, size, *trial) for name in REGULARISERS for size in (100, 300) for trial in strengths]
    trials = pd.DataFrame(rows, columns=["name", "size", "strength", "seed", "gain"])
    axes = plot_strengths(trials).axes
    assert len(axes) == 10
    for panel in axes:
        (star,) = [line for line in panel.get_lines() if line.get_marker() == "*"]
        assert (list(star.get_xdata()), list(star.get_ydata())) == ([1], [0.5])


def test_the_gap_lies_between_training_and_test():
    lines = {"training": [100.0, 99.0], "nothing": [80.0, 98.0], "regularised": [90.0, 99.0]}
    (axes,) = plot_gap(pd.DataFrame(lines, index=[100, 10_000])).axes
    assert [list(line.get_ydata()) for line in axes.get_lines()] == [lines[k] for k in lines if k != "nothing"] + [
        lines["nothing"]
    ]
    edges = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (edges.min(), edges.max()) == (80.0, 100.0)


def test_the_fit_of_a_run_is_a_line_from_test_to_training():
    summary = pd.DataFrame({"label": ["a", "b"], "train_accuracy": [1.0, 0.9], "accuracy": [0.8, 0.85]})
    (axes,) = plot_fit(summary).axes
    assert [list(line.get_xdata()) for line in axes.get_lines()[:2]] == [[80.0, 100.0], [85.0, 90.0]]
    assert [text.get_text() for text in axes.texts] == ["80.0%", "85.0%"]
