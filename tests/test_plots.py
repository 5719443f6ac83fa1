import matplotlib.colors
import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from s6lib.analysis import misclassified
from s6lib.plots import (
    COLORS,
    plot_accuracy,
    plot_confusion,
    plot_differences,
    plot_digits,
    plot_loss,
    plot_misclassified,
    plot_pruning,
    plot_replication,
    plot_sign_flips,
    plot_weights,
    save,
)
from s6lib.statistics import condition_statistics, paired_comparisons, sign_flip_p


@pytest.mark.parametrize(("plot", "column"), [(plot_accuracy, "val_accuracy"), (plot_loss, "val_loss")])
def test_curves_show_every_condition_with_its_colour_and_dash(tiny_study, plot, column):
    figure = plot(tiny_study.history(), "PlainNet")
    whole, close = figure.axes
    assert [text.get_text().splitlines()[0] for text in figure.legends[0].get_texts()] == ["L1 + BN", "GBN"]
    for line, slug, dash in zip(whole.get_lines(), ("l1-bn", "gbn"), ("-", "--"), strict=True):
        assert line.get_color() == COLORS[slug]
        assert line.get_linestyle() == dash
        means = tiny_study.history()[tiny_study.history()["condition"] == slug].groupby("epoch")[column].mean()
        assert line.get_ydata().tolist() == pytest.approx(means.tolist())
    assert len(close.get_lines()) == 2
    last = tiny_study.history().query("epoch == 2 and condition == 'gbn'")[column].mean()
    shown = figure.legends[0].get_texts()[1].get_text().splitlines()[1]
    assert shown == (f"{last:.2%}" if column == "val_accuracy" else f"{last:.4f}")


def test_misclassified_names_both_classes_of_25_digits(tiny_study, mnist):
    wrong = misclassified(tiny_study.model("gbn"), mnist[1])
    figure = plot_misclassified(wrong, mnist[1], "GBN")
    titles = [axes.get_title() for axes in figure.axes]
    assert len(titles) == 25
    assert all(", taken for\n" in title and title.endswith("%)") for title in titles)
    assert "25 of its" in figure.get_suptitle()


def test_saved_figures_are_sharp_and_the_same_each_time(tiny_study, tmp_path):
    for name in ("a", "b"):
        save(plot_accuracy(tiny_study.history()), tmp_path / "new" / f"{name}.png")
    a, b = (tmp_path / "new" / f"{name}.png" for name in ("a", "b"))
    assert a.read_bytes() == b.read_bytes()
    assert matplotlib.image.imread(a).shape[:2] == (1000, 2000)


def test_weights_are_shown_with_the_share_that_is_almost_zero():
    weights = {"l1-bn": np.array([0, 0.0009, -0.0009, 0.1]), "bn": np.array([0.05, -0.05, 0.1])}
    first, second, *_ = plot_weights(weights, {"bn": "BN"}).axes
    assert (first.get_title(), second.get_title()) == ("l1-bn: 75% below 0.001", "BN: 0% below 0.001")
    assert sum(bar.get_height() for bar in first.patches) == pytest.approx(1)


def test_pruning_shows_the_mean_of_the_seeds():
    curve = pd.DataFrame(
        {"condition": "bn", "seed": [1, 1, 2, 2], "share": [0, 0.5] * 2, "accuracy": [1, 0.5, 0.9, 0.3]}
    )
    (axes,) = plot_pruning(curve, {"bn": "BN"}, "Net").axes
    (line,) = axes.get_lines()
    assert line.get_xydata().tolist() == [[0, 0.95], [1, 0.4]]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0%", "50%"]
    assert axes.collections[0].get_segments()[1][:, 1].tolist() == [0.3, 0.5]
    assert axes.get_title() == "Net\n2 seeds: mean, lowest and highest"


def test_pruning_shows_conditions_that_are_equal():
    curve = pd.DataFrame({"condition": ["a", "a", "b", "b"], "seed": 1, "share": [0, 0.5] * 2, "accuracy": 0.9})
    (axes,) = plot_pruning(curve).axes
    a, b = (line.get_xdata() for line in axes.get_lines())
    assert (a < b).all()
    first, second = (text for text in axes.texts if text.get_text().startswith("90%  "))
    assert first.get_position()[1] - second.get_position()[1] > 0.05 * np.ptp(axes.get_ylim())


@pytest.mark.parametrize("differences", [[0.03, 0.01, -0.02, 0.05], [-0.1, -0.2, -0.3], [0.0, 0.0], np.arange(20)])
def test_the_coloured_share_of_the_sign_flips_is_p(differences):
    (axes,) = plot_sign_flips(differences).axes
    grey, coloured = (sum(bar.get_height() for bar in bars) for bars in axes.containers)
    assert coloured == pytest.approx(sign_flip_p(differences))
    assert grey + coloured == pytest.approx(1)


def test_rows_of_digits_have_their_names(mnist):
    figure = plot_digits(mnist[1].images[:4], [""] * 4, columns=2, rows=("first", "second"))
    assert [axes.texts[0].get_text() for axes in figure.axes if axes.texts] == ["first", "second"]


def test_confusion_shows_errors_alone():
    matrix = np.diag([90] * 10)
    matrix[4, 9] = 7
    axes = plot_confusion(matrix, "title").axes[0]
    assert [text.get_text() for text in axes.texts] == ["7"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "actual")


def test_replication_shows_every_run_and_the_means_with_their_intervals(tiny_study):
    (axes,) = plot_replication(tiny_study.outcomes(), tiny_study.labels).axes
    outcomes = tiny_study.outcomes()
    statistics = condition_statistics(outcomes)
    lines = axes.get_lines()
    for row in statistics.itertuples():
        dots, interval, mean = lines[3 * row.Index : 3 * row.Index + 3]
        assert dots.get_xdata().tolist() == outcomes[row.condition].tolist()
        assert list(interval.get_xdata()) == [row.low, row.high]
        assert mean.get_xdata() == [row.mean]
        assert {line.get_color() for line in (dots, interval, mean)} == {COLORS[row.condition]}
        assert axes.texts[row.Index].get_text() == f"{row.mean:.2f}%  ({row.low:.2f} to {row.high:.2f})"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["L1 + BN", "GBN"]
    assert "2 seeds" in axes.get_title()
    assert np.ptp(lines[6].get_xdata()) == pytest.approx(0.05)  # the bar of 5 digits
    assert axes.texts[-1].get_text() == "5 test digits"


def test_a_condition_without_a_colour_of_its_own_has_one_all_the_same(tiny_study, monkeypatch):
    monkeypatch.delitem(COLORS, "gbn")
    (axes,) = plot_replication(tiny_study.outcomes(), tiny_study.labels).axes
    assert len({line.get_color() for line in axes.get_lines()[3:6]}) == 1


def test_differences_are_those_of_the_comparisons(tiny_study):
    (axes,) = plot_differences(tiny_study.outcomes(), tiny_study.labels).axes
    (row,) = paired_comparisons(tiny_study.outcomes()).itertuples()
    _, interval, mean = axes.get_lines()
    assert list(interval.get_xdata()) == [row.low, row.high]
    assert mean.get_xdata() == [row.difference]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["L1 + BN  minus  GBN"]
    assert "0 of 1 differences stand" in axes.get_title()
    beside = [text.get_text().replace("\N{MINUS SIGN}", "-") for text in axes.texts]
    assert beside == ["points", f"{row.difference:+.3f}", "p alone", f"{row.p:.3f}", "among 1", f"{row.p_holm:.2f}"]


def test_differences_across_groups_come_first_and_each_group_by_size():
    outcomes = pd.DataFrame(np.arange(12).reshape(4, 3) % 5, columns=["x", "y", "z"]) + np.array([0, 1, 5])
    (axes,) = plot_differences(outcomes, groups={"x": "one", "y": "two", "z": "one"}).axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names[-1] == "x  minus  z"
    assert set(names[:2]) == {"x  minus  y", "z  minus  y"}
    differences = [line.get_xdata()[0] for line in axes.get_lines() if line.get_marker() == "s"]
    assert differences[0] > differences[1]


def test_a_figure_of_no_images_says_so(mnist):
    none = mnist[1].images[:0]
    assert plot_digits(none, [], columns=5, title="Errors").get_suptitle() == "Errors\nno images to show"
    wrong = pd.DataFrame({"image": [], "actual": [], "predicted": [], "confidence": []}).astype({"image": int})
    assert "0 of its 0 errors" in plot_misclassified(wrong, mnist[1]).get_suptitle()


def test_images_need_a_title_each(mnist):
    with pytest.raises(ValueError, match="3 images need as many titles, not 2"):
        plot_digits(mnist[1].images[:3], ["seven", "two"], columns=3)


def test_a_matrix_without_errors_is_drawn():
    figure = plot_confusion(np.diag([90] * 10))
    figure.canvas.draw()
    assert not figure.axes[0].texts


def history_of(rates, slugs=("mine", "yours", "bn"), seeds=(1, 2)):
    """A history whose learning rates are given, by epoch."""
    rows = [
        {"condition": slug, "label": slug, "seed": seed, "epoch": epoch, "lr": rate, "val_accuracy": 0.9}
        for slug in slugs
        for seed in seeds
        for epoch, rate in enumerate(rates, 1)
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize("epochs", [1, 2, 25])
def test_curves_of_any_length_and_of_ones_own_conditions(epochs, tmp_path):
    figure = plot_accuracy(history_of([0.1] * epochs), "Own")
    save(figure, tmp_path / "own.png")
    for axes in figure.axes:
        lines = axes.get_lines()
        assert len({line.get_color() for line in lines}) == 3
        assert all(len(line.get_xdata()) > 1 or line.get_marker() == "o" for line in lines)  # a point is seen
        assert axes.get_xticks()[[0, -1]].tolist() == [lines[0].get_xdata()[0], epochs]
    assert figure.axes[1].get_title() == {1: "epoch 1", 2: "epoch 2", 25: "epochs 13 to 25"}[epochs]


def test_a_dozen_conditions_of_ones_own_have_a_colour_each():
    slugs = [f"mine-{number}" for number in range(12)]
    lines = plot_accuracy(history_of([0.1] * 3, [*COLORS, *slugs])).axes[0].get_lines()
    assert len({line.get_color() for line in lines}) == len(COLORS) + 12


@pytest.mark.parametrize(
    ("rates", "changes", "said"),
    [
        ([0.1] * 6 + [0.01] * 6 + [0.001] * 2, [6.5, 12.5], "dotted: learning rate \N{MULTIPLICATION SIGN} 0.1"),
        ([0.1, 0.1, 0.05, 0.05, 0.01, 0.01], [2.5, 4.5], "dotted: new learning rate"),
        ([0.1, 0.2, 0.2], [1.5], "dotted: learning rate \N{MULTIPLICATION SIGN} 2"),
        ([0.1] * 5, [], None),
        ([1 / epoch for epoch in range(1, 20)], [], None),
    ],
)
def test_new_learning_rates_are_marked_and_explained_once(rates, changes, said):
    whole, close = plot_accuracy(history_of(rates)).axes
    assert [text.get_text() for text in whole.texts] == ([said] if said else [])
    assert not close.texts
    marks = [collection for collection in whole.collections if collection.get_linestyle() != [(0, None)]]
    assert [path[0][0] for mark in marks for path in mark.get_segments()] == changes


def test_a_learning_rate_of_one_condition_alone_is_not_marked_for_all():
    history = pd.concat([history_of([0.1] * 8, ["a"]), history_of([0.1] * 4 + [0.01] * 4, ["b"])])
    assert not plot_accuracy(history).axes[0].texts


def test_figures_without_a_title_have_no_stray_marks(tiny_study):
    outcomes, history = tiny_study.outcomes(), tiny_study.history()
    assert plot_accuracy(history).get_suptitle() == "test accuracy"
    assert plot_accuracy(history, "Net").get_suptitle() == "Net: test accuracy"
    for plot, mark in ((plot_replication, "\n"), (plot_differences, ", ")):
        assert plot(outcomes).axes[0].get_title().startswith("2 seeds: ")
        assert plot(outcomes, title="Net").axes[0].get_title().startswith(f"Net{mark}2 seeds: ")


def test_conditions_without_a_label_show_their_name(tiny_study):
    (axes,) = plot_replication(tiny_study.outcomes(), {"gbn": "ghosts"}).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["l1-bn", "ghosts"]


def test_a_difference_that_stands_is_counted():
    outcomes = pd.DataFrame({"a": np.arange(12) / 100 + 1, "b": np.arange(12) / 100})
    (axes,) = plot_differences(outcomes).axes
    assert [text.get_text() for text in axes.texts[1::2]] == ["+1.000", "0.000", "0.00"]
    assert "1 of 1 differences stand" in axes.get_title()


@pytest.mark.parametrize(
    "plot",
    [
        plot_replication,
        plot_differences,
        lambda outcomes, ax: plot_sign_flips(outcomes["l1-bn"] - outcomes["gbn"], ax=ax),
        lambda outcomes, ax: plot_confusion(np.ones((10, 10), dtype=int), ax=ax),
    ],
)
def test_a_panel_may_be_given(tiny_study, plot):
    figure = Figure()
    other, panel = figure.subplots(1, 2)
    assert plot(tiny_study.outcomes(), ax=panel) is figure
    assert panel.has_data()
    assert not other.has_data()


def test_weights_of_several_epochs_have_the_colour_of_their_condition():
    weights = {f"{slug} {epoch}": np.zeros(3) for slug in ("bn", "l1-bn") for epoch in (0, 1)}
    drawn = [axes.patches[0].get_facecolor() for axes in plot_weights(weights).axes if axes.patches]
    assert [matplotlib.colors.to_hex(color).upper() for color in drawn] == [
        COLORS[s] for s in ("bn",) * 2 + ("l1-bn",) * 2
    ]


def test_more_than_two_conditions_are_lines_and_one_bar_shows_how_much_runs_differ():
    history = history_of([0.1] * 4)
    history["val_accuracy"] += 0.01 * history["seed"]  # 1 and 2: an SD of 0.01 / sqrt(2)
    figure = plot_accuracy(history)
    whole, close = figure.axes
    assert not whole.collections
    (bar,) = close.collections
    ((low, high),) = (path[:, 1] for path in bar.get_segments())
    assert (low, high) == pytest.approx((0.915 - 0.01 / 2**0.5, 0.915 + 0.01 / 2**0.5))
    assert close.texts[0].get_text() == "runs of one condition: \N{PLUS-MINUS SIGN}1 SD"
    assert figure.legends[0].get_title().get_text().endswith("(mean of 2 seeds)")
    two = plot_accuracy(history[history["condition"] != "bn"])
    assert [len(axes.collections) for axes in two.axes] == [2, 2]


def test_the_texts_of_the_differences_do_not_touch(tiny_study):
    figure = plot_differences(tiny_study.outcomes(), title="A name as long as the figure")
    figure.draw_without_rendering()
    (axes,) = figure.axes
    boxes = [text.get_window_extent() for text in (axes.title, *axes.texts)]
    assert not any(one.overlaps(other) for place, one in enumerate(boxes) for other in boxes[:place])
    assert [box.x1 for box in boxes[1::2]] == pytest.approx([box.x1 for box in boxes[2::2]], abs=1)


@pytest.mark.parametrize(("spread", "digits"), [(0.1, 5), (10, 50), (50, 500)])
def test_the_bar_of_test_digits_is_long_enough_to_see(spread, digits):
    (axes,) = plot_replication(pd.DataFrame({"a": [50.0, 50.0 + spread] * 10, "b": 50.0})).axes
    assert axes.texts[-1].get_text() == f"{digits} test digits"
    assert np.ptp(axes.get_lines()[-1].get_xdata()) == pytest.approx(digits / 100)


def test_few_sign_flips_are_drawn_in_few_bars():
    bars = [len(plot_sign_flips(np.arange(1, n + 1)).axes[0].containers[0]) for n in (2, 6, 10)]
    assert bars == [3, 9, 33]
