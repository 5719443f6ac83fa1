"""What a reader moves: a knob over trials, with a button that trains one more, and a slider over seeds."""

from collections.abc import Callable
from io import BytesIO

import ipywidgets
import pandas as pd
from matplotlib.figure import Figure

from figures import REGULARISERS, plot_trials
from s6lib.errors import S6Error

Train = Callable[[int, str, float, int], tuple[float, float]]


def turn_the_knob(trials: pd.DataFrame, train: Train, size: int, name: str, strength: float):
    """Show sliders over the trials, with a button that trains one more.

    Args:
        trials: as in `plot_trials`.
        train: from size, name, strength and seed to the accuracy on training and held-out images, in percent.
        size, name, strength: of the trial that is shown first.
    """
    sizes = [(f"{one:,}", one) for one in sorted(set(trials["size"]))]
    names = [(label, one) for one, (label, _) in REGULARISERS.items()]
    size_slider = ipywidgets.SelectionSlider(options=sizes, value=size, description="images")
    name_list = ipywidgets.Dropdown(options=names, value=name, description="regulariser")
    strength_slider = ipywidgets.SelectionSlider(options=[strength], description="strength")
    button, said, picture = ipywidgets.Button(), ipywidgets.Label(), ipywidgets.Image(format="png", width=720)
    own = pd.DataFrame(columns=["size", "name", "strength", "seed", "train_accuracy", "accuracy"])

    def redraw(_=None) -> None:
        button.description = "train this one"
        figure = plot_trials(trials, size_slider.value, name_list.value, strength_slider.value, own)
        picture.value = as_png(figure)

    def offer_strengths(_=None) -> None:
        here = trials[(trials["size"] == size_slider.value) & (trials["name"] == name_list.value)]
        strengths, before = sorted(set(here["strength"])), strength_slider.value
        strength_slider.unobserve(redraw, "value")  # drawn once, below
        strength_slider.options = [(f"{one:g}", one) for one in strengths]
        strength_slider.value = before if before in strengths else strengths[len(strengths) // 2]
        strength_slider.observe(redraw, "value")
        redraw()

    def train_this(_=None) -> None:
        trial = size_slider.value, name_list.value, strength_slider.value, 101 + len(own)
        button.disabled, button.description = True, "training ..."
        try:
            own.loc[len(own)] = [*trial, *train(*trial)]
            said.value = "your trial: training {:.1f}%, held-out {:.1f}%".format(*own.iloc[-1, 4:])
        except S6Error as error:
            said.value = str(error)
        button.disabled = False
        redraw()

    strength_slider.observe(redraw, "value")
    for one in (size_slider, name_list):
        one.observe(offer_strengths, "value")
    button.on_click(train_this)
    offer_strengths()
    parts = [size_slider, name_list, strength_slider, ipywidgets.HBox([button, said]), picture]
    return _box(parts, "Run this cell for sliders and a button. The picture below shows all trials.")


def slide_over_seeds(accuracies: pd.DataFrame):
    """Show a slider over seeds, with one run of each condition and the winner.

    Args:
        accuracies: one row per seed, one column per condition, in percent.
    """
    slider = ipywidgets.SelectionSlider(options=list(accuracies.index), description="seed")
    table = ipywidgets.HTML()

    def redraw(_=None) -> None:
        run = accuracies.loc[slider.value].sort_values(ascending=False, kind="stable")
        rows = "".join(f"<tr><td>{label}&emsp;</td><td>{accuracy:.2f}%</td></tr>" for label, accuracy in run.items())
        table.value = f"<table>{rows}</table><p>The winner: <b>{' and '.join(run.index[run == run.max()])}</b></p>"

    slider.observe(redraw, "value")
    redraw()
    return _box([slider, table], "Run this cell for a slider over the seeds. The picture below shows them all.")


def _box(parts: list, text: str):
    class Box(ipywidgets.VBox):
        def __repr__(self) -> str:  # shown until the cell is run
            return text

    return Box(parts)


def as_png(figure: Figure) -> bytes:
    """The bytes of a figure, to be shown by a widget."""
    content = BytesIO()
    figure.savefig(content, format="png", dpi=90)
    return content.getvalue()
