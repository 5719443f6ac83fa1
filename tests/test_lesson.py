"""What the notebooks need beside the lesson: guesses, pictures that move, activations, times."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import lesson
import s6lib
from s6lib.data import PROJECT
from s6lib.recipes import PLAIN


def test_a_live_figure_is_one_output_that_changes(monkeypatch):
    shown = []
    view = SimpleNamespace(update=shown.append)
    monkeypatch.setattr(lesson, "display", lambda image, display_id: shown.append(image) or view)
    live = lesson.Live()
    for panels in (1, 2):
        figure = Figure(figsize=(2, 2))
        figure.subplots(1, panels)
        live.show(figure)
    first, second = shown
    assert first.data != second.data
    assert first.data.startswith(b"\x89PNG")
    assert repr(first) == repr(second)  # nbval compares it


@pytest.mark.parametrize("guess", ["?", 30])
def test_a_guess_stands_beside_the_results(guess):
    (axes,) = lesson.plot_guess(guess, {"with": 834.0, "without": 91.25}, "images").axes
    dots = [tuple(line.get_xydata()[0]) for line in axes.lines if line.get_marker() in "oD"]
    assert dots == [(834, 1), (91.25, 2)] + ([] if guess == "?" else [(30, 0)])
    assert [text.get_text() for text in axes.texts][:2] == ["834", "91.2"]
    assert ("no guess yet" in axes.get_title()) == (guess == "?")
    low, high = axes.get_xlim()
    assert low < 0 < 834 < high


def test_the_gap_is_that_of_the_last_epoch_of_each_condition():
    epochs = [("nothing", 1, 0.5, 0.4), ("nothing", 2, 1.0, 0.85), ("rotation", 1, 0.7, 0.6)]
    table = pd.DataFrame(epochs, columns=["condition", "epoch", "train_accuracy", "test_accuracy"])
    rows = table.to_dict("records")
    assert lesson.last_gaps(rows) == pytest.approx({"nothing": 15, "rotation": 10})
    assert lesson.gap_sentence(rows) == "Epoch 1, the gap: 15.0 points with nothing, 10.0 points with rotation"


def test_receptive_fields_are_the_pixels_that_change_an_output():
    layers = [nn.Conv2d(1, 1, 3), nn.AvgPool2d(2), nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 1), nn.AvgPool2d(3)]
    for count, (name, size) in enumerate(lesson.receptive_fields(nn.Sequential(*layers)), 1):
        image = torch.rand(1, 1, 40, 40, requires_grad=True)
        nn.Sequential(*layers[:count])(image)[0, 0, 2, 2].backward()
        assert image.grad[0, 0].any(0).sum() == size, name
    assert lesson.receptive_fields(s6lib.PlainNet())[-1] == ("Conv2d 1x1", 32)


def test_activations_are_counted_at_each_step_of_training(mnist):
    few = mnist[0].part(slice(128))
    model = s6lib.PlainNet(nn.Identity)
    with lesson.watch_activations(model) as seen:
        s6lib.train_epoch(model, s6lib.batches(few, 64), torch.optim.SGD(model.parameters(), lr=0.01))
        s6lib.evaluate(model, few)
    assert [len(steps) for steps in seen] == [2] * 8
    assert all(step.sum() == pytest.approx(1) for steps in seen for step in steps)
    assert seen[0][0].max() < 0.9 < seen[6][0].max()  # without a normalisation the signal fades
    s6lib.train_epoch(model, s6lib.batches(few, 64), torch.optim.SGD(model.parameters(), lr=0.01))
    assert len(seen[0]) == 2  # no longer
    figure = lesson.plot_activations({"one": seen, "two": seen})
    assert [(row.get_suptitle(), len(row.axes)) for row in figure.subfigs] == [("one", 8), ("two", 8)]
    (image,) = figure.subfigs[0].axes[0].images
    np.testing.assert_allclose(image.get_array() ** 2, np.stack(seen[0], axis=1), rtol=1e-5)


@pytest.mark.parametrize(("mode", "trained"), [("open", []), ("quick", ["plain-quick"]), ("full", ["plain"])])
def test_the_mode_decides_what_is_trained(monkeypatch, mode, trained):
    asked = []
    monkeypatch.setattr(lesson, "run_study", lambda recipe, conditions, seeds, out: asked.append(recipe))
    studies = lesson.five_conditions(mode, PLAIN, PROJECT / "results")
    assert [recipe.name for recipe in asked] == trained
    assert asked == [PLAIN] or mode != "full"
    assert list(studies)[:2] == ["plain (PlainNet)", "bottleneck (BottleneckNet)"]
    assert {len(study.seeds) for study in studies.values()} == {1}
    assert list(studies["plain (PlainNet)"].conditions) == [condition.slug for condition in s6lib.CONDITIONS]


def test_an_unknown_mode_is_a_sentence(tmp_path):
    with pytest.raises(s6lib.S6Error, match='MODE must be "open", "quick" or "full", not \'fast\''):
        lesson.five_conditions("fast", PLAIN, tmp_path)
