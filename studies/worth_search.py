"""How strong each regulariser of studies/worth.py should be: trials on held-out images.

    python studies/worth_search.py train studies/worth_search      # what is not there yet, two at a time
    python studies/worth_search.py collect studies/worth_search    # writes studies/worth_search.csv

Each trial has one regulariser over nothing, as studies/when_search.py has it, from which the grids start: PlainNet
without dropout or rotation, on images that are drawn anew for each seed from the first 50,000 training images, and ten
passes over them. No trial has seen a test image. The trials of studies/when_search.csv on 10,000 images have the same
settings; they count here too and are not repeated. 50,000 images stand for 60,000, of which none could be held out.
"""

import csv
import json
import sys
from pathlib import Path

from s6lib import Condition, PlainNet, Recipe, run_study

# How often each of the two epochs goes through the images, the first at a rate of 0.01 and the second at 0.001.
PASSES = {100: 125, 300: 50, 1_000: 19, 3_000: 9, 10_000: 5, 30_000: 5, 50_000: 5}
RECIPE = Recipe("plain", PlainNet, dropout=0.0, epochs=2, decay_epochs=1, held_out=True, draw_images=True)

Grid = dict[str, tuple[float, ...]]
NOTHING: Grid = {"nothing": (0,)}
# Below the grids of studies/when_search.py.
LOWER: Grid = {"l1": (6e-5,), "l2": (1e-3,), "dropout": (0.005, 0.01), "rotation": (3.0,)}
SMALL: Grid = {
    "l1": (6e-5, 2e-4, 6e-4),
    "l2": (1e-3, 3e-3, 1e-2),
    "dropout": (0.005, 0.01, 0.02, 0.05),
    "rotation": (3.0, 5.0, 10.0, 15.0),
    "ghosts": (2, 4, 8),
}
FEW: Grid = {"l1": (2e-3, 6e-3, 2e-2), "l2": (1e-2, 3e-2, 1e-1), "dropout": (0.02, 0.05, 0.1), "ghosts": (8, 16, 32)}
SOME: Grid = {
    "l1": (6e-4, 2e-3, 6e-3),
    "l2": (3e-3, 1e-2, 3e-2),
    "dropout": (0.02,),
    "rotation": (10.0, 15.0, 25.0),
    "ghosts": (4, 8, 16),
}
LARGE: Grid = {
    "l2": (1e-3, 3e-3, 1e-2),
    "rotation": (5.0, 10.0, 15.0),
    "dropout": (0.01, 0.02, 0.05),
    "l1": (6e-5, 2e-4, 6e-4),
    "ghosts": (2, 4, 8),
}
# What is trained, in this order: a number of images, seeds, and the strengths.
BLOCKS: tuple[tuple[int, tuple[int, ...], Grid], ...] = (
    (10_000, (1,), LOWER),
    (50_000, (1,), NOTHING | LARGE),
    (10_000, (2,), SMALL | {"l1": (6e-5,)}),  # the other two are there
    # What studies/when_search.py lacks of three seeds of the best and its neighbours.
    (100, (3,), {"rotation": (25.0, 40.0), "ghosts": (8, 16, 32)}),
    (300, (3,), NOTHING | FEW | {"rotation": (15.0, 25.0, 40.0)}),
    (1_000, (3,), NOTHING | FEW | {"l1": (6e-4, 2e-3, 6e-3), "dropout": (0.02,), "rotation": (10.0, 15.0, 25.0)}),
    (1_000, (1, 2, 3), {"dropout": (0.005,)}),
    (1_000, (2,), {"rotation": (10.0,)}),
    (3_000, (3,), NOTHING | SOME),
    (3_000, (1, 2, 3), {"dropout": (0.005,)}),
    (10_000, (3,), NOTHING | SMALL),
    (30_000, (1, 2, 3), NOTHING),
    (50_000, (2, 3), NOTHING | LARGE),
)


def slug_of(size: int, name: str, strength: float) -> str:
    """The slug of a trial, such as 10000-l2-3e-03 or 10000-rotation-15."""
    strength_slug = f"{strength:g}" if strength >= 1 else f"{strength:.0e}"
    return f"{size}-{name}-{strength_slug}" if strength else f"{size}-{name}"


def condition(size: int, name: str = "nothing", strength: float = 0) -> Condition:
    """One regulariser, at one strength, on so many images."""
    changes = {"train_images": size, "passes": PASSES[size]}
    own = {}
    if name in ("dropout", "rotation"):
        changes[name] = strength
    elif name != "nothing":
        own = {"num_splits": strength} if name == "ghosts" else {name: strength}
    label = f"{size:,} images, {name} {strength:g}" if strength else f"{size:,} images, {name}"
    return Condition(slug_of(size, name, strength), label, changes=changes, **own)


def block(size: int, grid: Grid) -> list[Condition]:
    return [condition(size, name, strength) for name, strengths in grid.items() for strength in strengths]


CONDITIONS = tuple({one.slug: one for size, _, grid in BLOCKS for one in block(size, grid)}.values())


def train(out: str) -> None:
    """Train it all; what is there already is not trained again."""
    for size, seeds, grid in BLOCKS:
        run_study(RECIPE, block(size, grid), seeds, out, jobs=2)


def collect(out: str) -> None:
    """Write the accuracies of all complete trials, in percent, into a table beside their folder."""
    rows = []
    for file in Path(out).glob("*/*/seed-*/run.json"):
        about = json.loads(file.read_text())
        size, name, strength = read_slug(about["condition"])
        with open(file.with_name("history.csv"), newline="") as lines:
            last = list(csv.DictReader(lines))[-1]
        accuracies = [round(100 * float(last[column]), 2) for column in ("train_accuracy", "val_accuracy")]
        rows.append((about["recipe"]["name"], size, name, strength, about["seed"], *accuracies))
    with open(Path(out).with_suffix(".csv"), "w", newline="") as lines:
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow(("recipe", "size", "name", "strength", "seed", "train_accuracy", "accuracy"))
        writer.writerows(sorted(rows))


def read_slug(condition: dict) -> tuple[int, str, float]:
    """The number of images, the regulariser and the strength of a trial from its entry in run.json."""
    size, name, *_ = condition["slug"].split("-")
    own = {"ghosts": condition["num_splits"], "l1": condition["l1"], "l2": condition["l2"], "nothing": 0}
    return int(size), name, own.get(name, condition["changes"].get(name))


if __name__ == "__main__":
    {"train": train, "collect": collect}[sys.argv[1]](sys.argv[2])
