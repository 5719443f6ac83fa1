"""What the notebooks need beside the lesson: pictures that move, a reader's guesses, sources, times, runs."""

import inspect
import io
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from IPython.display import DisplayHandle, Image, Markdown, display
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor, nn

from s6lib import CONDITIONS, CONTROL, Recipe, S6Error, Study, run_study
from s6lib.data import PROJECT
from s6lib.plots import INK, OTHER_COLORS, STYLE
from s6lib.recipes import name_of
from s6lib.study import recipes_in

SHOWN_IMAGES = 16  # of each batch, whose activations are counted: more look the same


def describe_machine() -> str:
    """The versions of Python and torch, and the GPU, in a line."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU, the CPU will do"
    return f"Python {platform.python_version()}, torch {torch.__version__}, torchvision {version('torchvision')}, {gpu}"


def show_source(thing: Any) -> Markdown:
    """Show the source of a function or class."""
    return Markdown(f"```python\n{inspect.getsource(thing)}```")


class Live:
    """One figure in the output of a cell, which a loop draws anew with each call of `show`."""

    def __init__(self) -> None:
        self._view: DisplayHandle | None = None

    def show(self, figure: Figure) -> None:
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=figure.dpi)
        # As an image, whose text is the same however many panels there are: nbval compares the text.
        image = Image(file.getvalue())
        if self._view is None:
            self._view = display(image, display_id=True)
        else:
            self._view.update(image)


def last_gaps(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Compute the gap between training and test accuracy after the last epoch of each condition, in points."""
    return {row["condition"]: 100 * (row["train_accuracy"] - row["test_accuracy"]) for row in rows}


def gap_sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    """Say how wide the gap is after the last epoch of each condition."""
    gaps = [f"{gap:.1f} points with {condition}" for condition, gap in last_gaps(rows).items()]
    return f"Epoch {rows[-1]['epoch']}, the gap: {', '.join(gaps)}"


def plot_guess(guess: float | str, results: Mapping[str, float], what: str) -> Figure:
    """Draw a reader's guess beside the results, on one line.

    Args:
        guess: "?" as long as there is none.
        results: numbers by name.
        what: the number that is guessed, with its unit.
    """
    guesses = [] if isinstance(guess, str) else [guess]
    numbers = [0.0, *results.values(), *guesses]
    margin = 0.15 * (max(numbers) - min(numbers) or 1.0)
    figure = Figure(figsize=(8, 1 + 0.4 * (1 + len(results))), layout="constrained")
    with rc_context(STYLE):
        axes = figure.subplots()
        for row, value in enumerate(results.values(), 1):
            axes.plot(value, row, "D", color=OTHER_COLORS[0], markersize=9)
            axes.annotate(_short(value), (value, row), (9, 0), textcoords="offset points", va="center")
        for number in guesses:
            axes.axvline(number, color=INK, linestyle="--", linewidth=1)
            axes.plot(number, 0, "o", color=INK, markersize=9)
            axes.annotate(_short(number), (number, 0), (9, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(1 + len(results)), ["your guess", *results])
        axes.set(xlim=(min(numbers) - margin / 5, max(numbers) + margin), ylim=(len(results) + 0.6, -0.6), xlabel=what)
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.grid(visible=False, axis="y")
        axes.set_title("" if guesses else "no guess yet: write a number in the cell, and run it again")
    return figure


def _short(number: float) -> str:
    return f"{number:,.1f}".removesuffix(".0").replace("-", "\N{MINUS SIGN}")


def receptive_fields(model: nn.Module) -> list[tuple[str, int]]:
    """List each convolution and pool, in order: its description, and the width of its receptive field in pixels.

    Valid for a chain of square convolutions and pools (Dumoulin and Visin, arXiv:1603.07285).
    """
    fields, size, step = [], 1, 1
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
            kernel, stride = (
                side[0] if isinstance(side, tuple) else side for side in (layer.kernel_size, layer.stride)
            )
            size += (kernel - 1) * step
            step *= stride
            fields.append((f"{type(layer).__name__} {kernel}x{kernel}", size))
    return fields


@contextmanager
def watch_activations(model: nn.Module, reach: float = 2.0, bins: int = 41) -> Iterator[list[list[np.ndarray]]]:
    """Count the outputs of each convolution at each step of training in the block: a list a convolution.

    It holds an array a step, the shares of the outputs in `bins` equal parts of -reach to reach.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    seen: list[list[np.ndarray]] = [[] for _ in layers]

    def watch(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if layer.training:
            values = output.detach()[:SHOWN_IMAGES].flatten().clamp(-reach, reach)
            seen[layers.index(layer)].append((torch.histc(values, bins, -reach, reach) / len(values)).numpy())

    hooks = [layer.register_forward_hook(watch) for layer in layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def plot_activations(seen: Mapping[str, Sequence[Sequence[np.ndarray]]], reach: float = 2.0) -> Figure:
    """Draw what `watch_activations` saw: a row a network, a panel a convolution, a column of pixels a step.

    The darker, the more outputs. The idea is fastai's "colorful dimension".
    """
    figure = Figure(figsize=(10, 0.6 + 1.6 * len(seen)), layout="constrained")
    count = len(next(iter(seen.values())))
    with rc_context({**STYLE, "axes.grid": False}):
        rows = figure.subfigures(len(seen), 1, squeeze=False).ravel()
        for row, (name, layers) in zip(rows, seen.items(), strict=True):
            row.suptitle(name, fontsize=12, x=0.01, ha="left")
            grid = row.subplots(1, count, sharex=True, sharey=True, squeeze=False).ravel()
            for number, (axes, steps) in enumerate(zip(grid, layers, strict=True), 1):
                extent = (0.5, len(steps) + 0.5, -reach, reach)
                shares = np.sqrt(np.stack(steps, axis=1))
                axes.imshow(shares, "magma_r", aspect="auto", origin="lower", extent=extent, vmin=0, vmax=0.7)
                axes.set_yticks([-reach, 0, reach])
                axes.tick_params(labelsize=9)
                axes.set_title(f"convolution {number}" if number == 1 else str(number), fontsize=9, loc="left")
        figure.supxlabel("step of training", fontsize=11)
        figure.supylabel("output", fontsize=11)
    return figure


def is_published(folder: str | Path) -> bool:
    """Return whether a folder is that of the published runs."""
    return Path(folder).expanduser().resolve() == (PROJECT / "results").resolve()


def open_studies(folder: str | Path) -> dict[str, Study]:
    """Open the studies in a folder by name, such as "plain (PlainNet)", those of built-in recipes first.

    Of the published runs, only seeds 1 to 10 of the six conditions are read. Raises S6Error if there are no runs.
    """
    chosen = {"conditions": (*CONDITIONS, CONTROL), "seeds": range(1, 11)} if is_published(folder) else {}
    studies = [Study(folder, recipe, **chosen) for recipe in recipes_in(Path(folder).expanduser())]
    if not studies:
        raise S6Error("no runs yet: train some in 03, or set FOLDER")
    return {f"{study.recipe.name} ({name_of(study.recipe.network)})": study for study in studies}


def open_comparison(folder: str | Path) -> tuple[str, Study]:
    """Open the first study of a folder, with its name. Raises S6Error if it has too few runs to compare conditions."""
    name, study = next(iter(open_studies(folder).items()))
    if min(len(study.seeds), len(study.conditions)) < 2:
        raise S6Error(
            f"{study.recipe.name} has too few runs to compare: train two conditions or more, with two seeds or more"
        )
    return name, study


def five_conditions(mode: str, recipe: Recipe, folder: str | Path) -> dict[str, Study]:
    """Train the five conditions with seed 1, or nothing, and open the first seed of each study in the folder.

    Args:
        mode: "open" to train nothing, "quick" for three short epochs, "full" for the whole recipe. What is
            there already is not trained again.
    """
    if mode not in ("open", "quick", "full"):
        raise S6Error(f'MODE must be "open", "quick" or "full", not {mode!r}')
    if mode == "quick":
        recipe = replace(recipe, name=f"{recipe.name}-quick", epochs=3, train_images=12_800)
    if mode != "open":
        run_study(recipe, CONDITIONS, seeds=1, out=folder)
    studies = open_studies(folder)
    for name, study in studies.items():
        five = [condition.slug for condition in CONDITIONS if condition.slug in study.conditions]
        studies[name] = Study(folder, study.recipe, five or None, study.seeds[0])
    return studies
