"""Figures for any study, from tables written here: what they show, not how."""

import itertools
from types import SimpleNamespace

import matplotlib.colors
import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from s6lib import plots
from s6lib.data import ImageDataset
from s6lib.plots import COLORS, INK, OTHER_COLORS, colors_of, save
from s6lib.statistics import condition_statistics, paired_comparisons, sign_flip_p

MINUS = "\N{MINUS SIGN}"
OUTCOMES = pd.DataFrame({"l1-bn": [99.1, 99.3, 99.2], "gbn": [99.0, 99.2, 99.15]}, index=[1, 2, 3])
LABELS = {"l1-bn": "L1 + BN", "gbn": "GBN"}


def history_of(rates, slugs=("l1-bn", "gbn"), seeds=(1, 2)):
    """A history with these learning rates: every condition 0.9 at first, and a little more with each epoch and seed."""
    places = pd.MultiIndex.from_product([slugs, seeds, range(1, len(rates) + 1)], names=["condition", "seed", "epoch"])
    table = places.to_frame(index=False)
    return table.assign(
        label=table["condition"].replace(LABELS),
        lr=np.tile(rates, len(slugs) * len(seeds)),
        train_accuracy=0.9 + 0.002 * table["epoch"],
        test_accuracy=0.9 + 0.001 * (table["epoch"] + 2 * table["seed"]),
        test_loss=1 / table["epoch"],
    )


def texts_of(figure):
    """Every word that a figure shows."""
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")) if text.get_text()]


def lines_of(axes, color):
    return [line for line in axes.get_lines() if line.get_color() == color]


def test_a_colour_has_one_meaning():
    kinds = {"bn": ["nothing", "no regularisation"], "l1-bn": ["l1"], "gbn": ["ghosts"], "dropout": [], "rotation": []}
    for name, alike in kinds.items():
        assert {other for other in COLORS if COLORS[other] == COLORS[name]} == {name, *alike}
    assert not set(OTHER_COLORS) & set(COLORS.values())


def test_conditions_have_a_colour_each_and_strengths_that_of_their_kind():
    names = ["300-l1", "l2-0.006", "gbn-8", "gbn", "mine", "1000-l1", *(f"mine-{number}" for number in range(12))]
    colors = colors_of(names)
    assert list(colors) == names
    assert len(set(colors.values())) == len(names)
    kinds = {"300-l1": "l1", "l2-0.006": "l2", "gbn": "gbn"}
    assert all(colors[name] == COLORS[kind] for name, kind in kinds.items())
    assert not {colors["gbn-8"], colors["mine"], colors["1000-l1"]} & set(COLORS.values())


@pytest.mark.parametrize(
    ("plot", "column", "said"),
    [(plots.plot_accuracy, "test_accuracy", "91.30%"), (plots.plot_loss, "test_loss", "0.1000")],
)
def test_curves_show_the_mean_of_every_condition_and_name_it(plot, column, said):
    history = history_of([0.1] * 10)
    figure = plot(history[::-1], "PlainNet")  # in whatever order
    assert figure.get_suptitle().endswith("(mean of 2 seeds)")
    fewer = history.query("condition == 'gbn' or seed == 1")
    assert plot(fewer).get_suptitle().endswith("(mean of 1 to 2 seeds)")
    for slug, label in LABELS.items():
        assert f"{said}  {label}" in texts_of(figure)
        means = history[history["condition"] == slug].groupby("epoch")[column].mean()
        (line,) = lines_of(figure.axes[0], COLORS[slug])
        assert line.get_ydata().tolist() == pytest.approx(means.tolist())
        assert lines_of(figure.axes[1], COLORS[slug])[0].get_xdata().tolist() == [6, 7, 8, 9, 10]
    assert figure.axes[0].get_ylabel().startswith(column.replace("_", " "))


def test_a_study_is_drawn_as_its_history_is(tmp_path):
    history = history_of([0.1] * 3)
    for plot in (plots.plot_accuracy, plots.plot_loss, plots.plot_learning_curves):
        for name, given in {"a": history, "b": SimpleNamespace(history=lambda: history)}.items():
            save(plot(given), tmp_path / "new" / f"{name}.png")
        a, b = (tmp_path / "new" / f"{name}.png" for name in ("a", "b"))
        assert a.read_bytes() == b.read_bytes()  # the same figure gives the same file
    assert matplotlib.image.imread(a).shape[1] == 9 * 200


@pytest.mark.parametrize("epochs", [1, 2, 25])
@pytest.mark.parametrize("plot", [plots.plot_accuracy, plots.plot_learning_curves])
def test_curves_of_any_length_are_seen(plot, epochs, tmp_path):
    figure = plot(history_of([0.1] * epochs, slugs=("mine", "yours", "bn")))
    save(figure, tmp_path / "own.png")
    lines = [line for axes in figure.axes for line in axes.get_lines() if len(line.get_xdata())]
    assert all(len(line.get_xdata()) > 1 or line.get_marker() not in ("", "None") for line in lines)


@pytest.mark.parametrize(
    ("rates", "marked"), [([0.1] * 6 + [0.01] * 6 + [0.001] * 2, [6.5, 12.5]), ([1 / k for k in range(1, 20)], [])]
)
def test_new_learning_rates_are_marked_and_explained(rates, marked):
    whole = plots.plot_accuracy(history_of(rates, seeds=(1,))).axes[0]
    assert [path[0][0] for lines in whole.collections for path in lines.get_segments()] == marked
    assert ("dotted: new learning rate" in whole.get_xlabel()) == bool(marked)


def test_many_conditions_have_one_bar_for_the_spread_of_their_runs():
    whole, close = plots.plot_accuracy(history_of([0.1] * 4, ["a", "b", "c"])).axes
    assert not whole.collections
    (bar,) = close.collections
    low, high = bar.get_segments()[0][:, 1]
    assert high - low == pytest.approx(2 * np.std([0.906, 0.908], ddof=1))
    assert "1 SD of runs" in close.get_title()


def test_learning_curves_show_training_and_test_and_name_the_gap():
    figure = plots.plot_learning_curves(history_of([0.1] * 10), "few")
    assert [axes.get_title("left") for axes in figure.axes] == ["L1 + BN", "GBN"]
    for axes, slug in zip(figure.axes, LABELS, strict=True):
        ends = {line.get_linestyle(): line.get_ydata()[-1] for line in lines_of(axes, COLORS[slug])}
        assert ends == {"--": pytest.approx(0.92), "-": pytest.approx(0.913)}
        assert {text.get_text() for text in axes.texts} == {"training 92.00%", "gap 0.70 points", "test 91.30%"}
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()


def test_learning_curves_grow_while_a_run_trains():
    rows = []
    for epoch in range(4):
        (axes,) = plots.plot_learning_curves(rows, "live", epochs=20).axes
        assert axes.get_xlim()[1] == 20
        assert len(axes.texts) == (3 if rows else 0)
        rows.append({"epoch": epoch + 1, "train_accuracy": 0.8 + 0.05 * epoch, "test_accuracy": 0.9})
    assert f"gap {MINUS}5.0 points" in texts_of(plots.plot_learning_curves(rows[:2]))
    with pytest.raises(ValueError, match="this one lacks test_accuracy"):
        plots.plot_learning_curves([{"epoch": 1, "train_accuracy": 0.5}])


def test_replication_shows_every_run_and_the_means_with_their_intervals():
    (axes,) = plots.plot_replication(OUTCOMES, {"l1-bn": "L1 + BN"}, "Net").axes
    for row in condition_statistics(OUTCOMES).itertuples():
        shown = [sorted(line.get_xdata()) for line in lines_of(axes, COLORS[row.condition])]
        assert sorted(OUTCOMES[row.condition]) in shown
        assert [row.low, row.high] in shown
        assert [row.mean] in shown
        assert f"{row.mean:.2f}%  ({row.low:.2f} to {row.high:.2f})" in texts_of(axes)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["L1 + BN", "gbn"]
    assert axes.get_title().startswith("Net\n3 seeds: ")


def test_a_table_of_any_form_is_drawn_by_its_names(tmp_path, monkeypatch):
    """As written to a csv, or with numbers for names; a figure goes where `~` leads."""
    monkeypatch.setenv("HOME", str(tmp_path))
    written, slugs = OUTCOMES.rename_axis("seed").reset_index(), list(OUTCOMES)
    for table, names in ((written, slugs), (OUTCOMES.to_dict("list"), slugs), (OUTCOMES.to_numpy(), ["0", "1"])):
        figure = plots.plot_replication(table)
        assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == names
        assert figure.axes[0].get_title().startswith("3 seeds: ")
    save(figure, "~/figures/own.png")
    assert (tmp_path / "figures" / "own.png").exists()
    with pytest.raises(ValueError, match="no epoch to draw"):
        plots.plot_accuracy(history_of([]))


def test_differences_are_those_of_the_comparisons_the_largest_on_top():
    outcomes = pd.DataFrame({"a": np.arange(8) / 100, "b": np.arange(8) / 100 + 1, "c": [0.0, 0.1] * 4})
    (axes,) = plots.plot_differences(outcomes, {"a": "A"}, "Net").axes
    comparisons = paired_comparisons(outcomes).sort_values("difference", ascending=False)
    names = [f"{row.first}  minus  {row.second}".replace("a ", "A ") for row in comparisons.itertuples()]
    assert [label.get_text() for label in axes.get_yticklabels()] == names
    beside = [f"{row.difference:+.3f}    {row.p:.3f}    {row.p_holm:.2f}" for row in comparisons.itertuples()]
    assert set(beside) <= {text.replace(MINUS, "-") for text in texts_of(axes)}
    assert len(lines_of(axes, INK)) == 2 * (comparisons["p_holm"] <= 0.05).sum() > 0
    assert "2 significant" in axes.get_title()


SIGNED = [[0.03, 0.01, -0.02, 0.05], [-0.1, -0.2, -0.3], [0.0, 0.0], np.arange(20), 0.9 ** np.arange(12)]


@pytest.mark.parametrize("differences", SIGNED)
def test_the_black_share_of_the_sign_flips_is_p(differences):
    (axes,) = plots.plot_sign_flips(differences).axes
    heights = {"black": 0.0, "grey": 0.0}
    for bar in axes.patches:
        black = matplotlib.colors.to_hex(bar.get_facecolor()) == INK
        heights["black" if black else "grey"] += bar.get_height()
        middle = abs(bar.get_x() + bar.get_width() / 2)
        assert black == (middle >= abs(np.mean(differences)) - 1e-3)
    assert heights["black"] == pytest.approx(sign_flip_p(differences))
    assert sum(heights.values()) == pytest.approx(1)


def test_a_panel_may_be_given():
    of = {plots.plot_replication: OUTCOMES, plots.plot_differences: OUTCOMES, plots.plot_sign_flips: [1, 2, -1]}
    for plot, data in of.items():
        other, panel = Figure().subplots(1, 2)
        assert plot(data, ax=panel) is panel.figure
        assert (panel.has_data(), other.has_data()) == (True, False)


IMAGES = torch.arange(4 * 9, dtype=torch.uint8).reshape(4, 3, 3)


def test_images_have_a_title_each():
    figure = plots.plot_digits(IMAGES, ["seven\nas one", "two", "", ""], columns=2)
    assert {"seven\nas one", "two"} <= set(texts_of(figure))
    assert plots.plot_digits(IMAGES[:0], [], columns=5, title="Errors").get_suptitle() == "Errors\nno images to show"
    with pytest.raises(ValueError, match="4 images need as many titles, not 2"):
        plots.plot_digits(IMAGES, ["seven", "two"], columns=3)


def test_titles_fit_into_their_columns():
    figure = plots.plot_digits(IMAGES[[0] * 20], ["seven as three\n12 of 60"] * 20, columns=10)
    figure.draw_without_rendering()
    boxes = [axes.title.get_window_extent() for axes in figure.axes[:10]]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


def test_misclassified_names_both_classes_and_the_confidence():
    wrong = pd.DataFrame({"image": [2, 3], "actual": "one", "predicted": "seven", "confidence": [0.9, 0.51]})
    dataset = ImageDataset(IMAGES, torch.zeros(4, dtype=torch.long))
    figure = plots.plot_misclassified(wrong.loc[[0, 1, 0, 1, 0]], dataset, "bottleneck (BottleneckNet), L1 + L2 + GBN")
    assert "one, taken for\nseven (90%)" in texts_of(figure)
    assert figure.get_suptitle().endswith(", L1 + L2 + GBN\n5 of its 5 errors on 4 images (confidence in brackets)")
    assert all(0 < end < figure.bbox.x1 for text in figure.texts for end in text.get_window_extent().intervalx)
    assert "0 of its 0 errors" in plots.plot_misclassified(wrong[:0], dataset).get_suptitle()


def test_weights_are_shown_with_the_share_that_is_almost_zero():
    weights = {"l1-bn 0": np.array([0, 0.0009, -0.0009, 0.1]), "bn 0": np.array([0.05, 0.1]), "l1-bn 1": np.ones(3)}
    axes = plots.plot_weights(weights, {"bn 0": "BN"}).axes
    assert [each.get_title() for each in axes[:2]] == ["l1-bn 0: 75% within ±0.001", "BN: 0% within ±0.001"]
    assert sum(bar.get_height() for bar in axes[0].patches) == pytest.approx(1)
    colors = [matplotlib.colors.to_hex(each.patches[0].get_facecolor()).upper() for each in axes]
    assert colors == [COLORS[slug] for slug in ("l1-bn", "bn", "l1-bn")]
