"""The sliders of notebooks 05 and 06, without a browser."""

import ipywidgets
import knob
import pandas as pd
import pytest

from s6lib.data import PROJECT
from s6lib.errors import SettingError

TRIALS = pd.read_csv(PROJECT / "studies" / "when_search.csv")


@pytest.fixture
def turned(monkeypatch):
    """What the knob shows, instead of a picture of it, and its widgets."""
    shown = []
    monkeypatch.setattr(knob, "as_png", lambda figure: shown.append(figure) or b"")

    def train(size, name, strength, seed):
        if name == "l2":
            raise SettingError("no such strength")
        return 100.0, 90.0 + seed - 101

    box = knob.turn_the_knob(TRIALS, train, 300, "l1", 6e-3)
    size, name, strength, (button, said), _ = (*box.children[:3], box.children[3].children, box.children[4])
    return shown, size, name, strength, button, said


def title(figure):
    return figure.axes[0].get_title().splitlines()[0]


def test_the_sliders_answer_at_once(turned):
    shown, size, name, strength, *_ = turned
    assert title(shown[-1]) == "300 images, L1 0.006: training 99.9%, held-out 94.3%, gap 5.7 points"
    for size.value, name.value in ((10_000, "dropout"), (100, "rotation"), (1_000, "ghosts")):
        tried = TRIALS[(TRIALS["size"] == size.value) & (TRIALS["name"] == name.value)]["strength"]
        assert [value for _, value in strength.options] == sorted(set(tried))
        assert "nan" not in title(shown[-1])
    size.value, name.value = 300, "l2"
    strength.value = 0.3
    assert title(shown[-1]).endswith("held-out 9.9%, below this panel, gap -0.6 points")


def test_the_button_adds_the_readers_own_dots_each_with_a_seed_of_its_own(turned):
    shown, _, name, _, button, said = turned
    button.click()
    button.click()
    crosses = [line for line in shown[-1].axes[0].get_lines() if line.get_marker() == "X"]
    assert [list(line.get_ydata()) for line in crosses] == [[100.0, 100.0], [90.0, 91.0]]
    assert said.value == "your trial: training 100.0%, held-out 91.0%"
    name.value = "l2"
    button.click()
    assert said.value == "no such strength"
    assert not button.disabled


def test_the_slider_over_seeds_shows_the_winners_of_each():
    accuracies = pd.DataFrame({"A": [99.1, 99.2, 99.4], "B": [99.3, 99.2, 99.3]}, index=[1, 2, 3])
    slider, table = knob.slide_over_seeds(accuracies).children
    for slider.value, winners in ((1, "B"), (2, "A and B"), (3, "A"), (1, "B")):
        assert f"{accuracies.loc[slider.value].max():.2f}%</td></tr>" in table.value
        assert f"The winner: <b>{winners}</b>" in table.value


def test_what_is_saved_of_a_knob_fits_in_what_ipywidgets_shows():
    box = knob.turn_the_knob(TRIALS, None, 300, "l1", 6e-3)
    assert len(repr(box)) <= 110
    assert isinstance(box, ipywidgets.VBox)
