"""How strong each regulariser of studies/worth.py should be: trials on held-out images.

    python studies/worth_search.py train studies/worth_search      # what is not there yet, two at a time
    python studies/worth_search.py collect studies/worth_search    # writes studies/worth_search.csv

Each trial has one regulariser over nothing, on images that are drawn anew for each seed from the first 50,000 training
images. No trial has seen a test image. The grids for PlainNet start from studies/when_search.csv, whose trials have the
same settings; they count here too and are not repeated. 50,000 images stand for 60,000, which leave none to hold out.
"""

import csv
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # for the command line, which loads this file alone

from worth import NETWORK_SIZES, at, condition, recipes, times

from s6lib import Condition, run_study

Grid = dict[str, tuple[float, ...]]
NOTHING: Grid = {"nothing": (0,)}
LOWER: Grid = {"l1": (6e-5,), "l2": (1e-3,), "dropout": (0.005, 0.01), "rotation": (3.0,)}
SMALL: Grid = {
    "l1": (6e-5, 2e-4, 6e-4),
    "l2": (1e-3, 3e-3, 1e-2),
    "dropout": (0.005, 0.01, 0.02, 0.05),
    "rotation": (3.0, 5.0, 10.0, 15.0),
    "ghosts": (2, 4, 8),
}
FEW: Grid = {"l1": (2e-3, 6e-3, 2e-2), "l2": (1e-2, 3e-2, 1e-1), "dropout": (0.02, 0.05, 0.1), "ghosts": (8, 16, 32)}
MORE: Grid = {"l1": (6e-4, 2e-3, 6e-3), "dropout": (0.02,), "rotation": (10.0, 15.0, 25.0)}
SOME: Grid = {
    "l1": (6e-4, 2e-3, 6e-3),
    "l2": (3e-3, 1e-2, 3e-2),
    "dropout": (0.02,),
    "rotation": (10.0, 15.0, 25.0),
    "ghosts": (4, 8, 16),
}
LARGE: Grid = {
    "l2": (1e-4, 3e-4, 1e-3, 3e-3),
    "rotation": (5.0, 10.0, 15.0),
    "dropout": (0.01, 0.02, 0.05),
    "l1": (2e-5, 6e-5, 2e-4, 6e-4),
    "ghosts": (2, 4, 8),
}
MLP: Grid = {
    "l2": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "rotation": (5.0, 10.0, 15.0, 25.0, 40.0),
    "dropout": (0.1, 0.2, 0.3, 0.5, 0.7),
    "l1": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3),
}
WRONG: Grid = {
    "l2": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "rotation": (5.0, 10.0, 15.0, 25.0, 40.0),
    "dropout": (0.02, 0.05, 0.1, 0.2, 0.3),
    "l1": (2e-4, 6e-4, 2e-3, 6e-3),
}
# Where seed 1 did best, and beside it: by recipe and number of images.
NEAR: dict[tuple[str, int], Grid] = {
    ("mlp", 10_000): {
        "l2": (3e-4, 1e-3, 3e-3),
        "rotation": (5.0, 10.0, 15.0, 25.0),
        "dropout": (0.05, 0.1, 0.2, 0.3),
        "l1": (3e-5, 1e-4, 3e-4),
    },
    ("mlp", 3_000): {
        "l2": (1e-3, 3e-3, 1e-2),
        "rotation": (10.0, 15.0, 25.0),
        "dropout": (0.2, 0.3, 0.5),
        "l1": (1e-5, 3e-5, 1e-4),
    },
    ("mlp", 300): {
        "l2": (1e-4, 3e-4, 1e-3, 3e-3),
        "rotation": (15.0, 25.0, 40.0),
        "dropout": (0.1, 0.2, 0.3, 0.5, 0.7),
        "l1": (1e-5, 3e-5, 1e-4),
    },
    ("mlp-wrong", 10_000): {
        "l2": (1e-3, 3e-3, 1e-2),
        "rotation": (15.0, 25.0, 40.0),
        "dropout": (0.1, 0.2, 0.3, 0.5),
        "l1": (1e-4, 3e-4, 1e-3, 3e-3),
    },
    ("mlp-wrong", 3_000): {
        "l2": (3e-3, 1e-2, 3e-2),
        "rotation": (25.0, 40.0, 60.0),
        "dropout": (0.3, 0.5, 0.7),
        "l1": (3e-4, 1e-3, 3e-3, 1e-2),
    },
    ("mlp-wrong", 300): {
        "l2": (1e-2, 3e-2, 1e-1, 3e-1),
        "rotation": (15.0, 25.0, 40.0),
        "dropout": (0.5, 0.7, 0.8, 0.9),
        "l1": (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    },
    ("plain-wrong", 10_000): {
        "l2": (1e-3, 3e-3, 1e-2, 3e-2),
        "rotation": (5.0, 10.0, 15.0, 25.0),
        "dropout": (0.005, 0.01, 0.02, 0.05, 0.1, 0.2),
        "l1": (2e-5, 6e-5, 2e-4, 6e-4, 2e-3),
    },
    ("plain-wrong", 3_000): {
        "l2": (3e-3, 1e-2, 3e-2, 1e-1),
        "rotation": (5.0, 10.0, 15.0, 25.0, 40.0),
        "dropout": (0.02, 0.05, 0.1, 0.2),
        "l1": (6e-4, 2e-3, 6e-3),
    },
    ("plain-wrong", 300): {
        "l2": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
        "rotation": (25.0, 40.0, 60.0),
        "dropout": (0.02, 0.05, 0.1, 0.2, 0.3),
        "l1": (2e-4, 6e-4, 2e-3, 6e-3),
    },
}
# What is trained, in this order: a recipe, a number of images, seeds, and the strengths.
BLOCKS: tuple[tuple[str, int, tuple[int, ...], Grid], ...] = (
    ("plain", 10_000, (1,), LOWER),
    ("plain", 10_000, (2,), SMALL | {"l1": (6e-5,)}),  # the other two are there
    # What studies/when_search.py lacks of three seeds of the best and its neighbours.
    ("plain", 300, (3,), NOTHING | FEW | {"rotation": (15.0, 25.0, 40.0)}),
    ("plain", 10_000, (3,), NOTHING | SMALL | {"l1": (6e-5, 2e-4, 6e-4, 2e-3)}),
    ("plain", 10_000, (1, 2, 3), {"dropout": (0.002,)}),
    ("plain", 10_000, (2, 3), {"l2": (3e-2,), "rotation": (25.0,)}),
    ("plain", 3_000, (3,), NOTHING | SOME),
    ("plain", 3_000, (1, 2, 3), {"dropout": (0.005,)}),
    ("plain", 1_000, (3,), NOTHING | FEW | MORE),
    ("plain", 1_000, (1, 2, 3), {"dropout": (0.005,)}),
    ("plain", 1_000, (2,), {"rotation": (10.0,)}),
    ("plain", 100, (3,), {"rotation": (25.0, 40.0), "ghosts": (8, 16, 32)}),
    ("plain", 100, (2, 3), {"dropout": (0.2,)}),
    ("plain", 3_000, (2, 3), {"rotation": (5.0,)}),
    ("plain", 10_000, (2, 3), {"ghosts": (16,)}),
    *(("mlp-wrong", size, (1,), NOTHING | MLP) for size in reversed(NETWORK_SIZES)),
    *(("mlp", size, (1,), NOTHING | MLP) for size in reversed(NETWORK_SIZES)),
    *((recipe, size, (1, 2, 3), NOTHING | grid) for (recipe, size), grid in NEAR.items()),
    *(("plain-wrong", size, (1,), NOTHING | WRONG) for size in reversed(NETWORK_SIZES)),
    ("plain", 50_000, (1,), NOTHING | LARGE),
    ("plain", 50_000, (1,), {"l2": (1e-2,)}),
    ("plain", 50_000, (1,), {"rotation": (3.0,)}),
    ("plain", 50_000, (2, 3), NOTHING | {"l2": (1e-4, 3e-4, 1e-3), "rotation": (3.0, 5.0, 10.0)}),
    ("plain", 50_000, (2, 3), {"dropout": (0.01, 0.02, 0.05), "l1": (2e-5, 6e-5, 2e-4), "ghosts": (2, 4, 8)}),
    # What the rule still asks for.
    ("plain", 50_000, (1, 2, 3), {"dropout": (0.005,)}),
    ("plain", 50_000, (2, 3), {"rotation": (15.0,), "l2": (3e-3,)}),
)


def block(recipe: str, size: int, grid: Grid) -> list[Condition]:
    """One regulariser each, at one strength, on so many images."""
    return [
        condition(f"{size}-{at(name, strength)}", size, name, strength, times(recipe))
        for name, strengths in grid.items()
        for strength in strengths
    ]


RECIPE = recipes(held_out=True)["plain"]
CONDITIONS = tuple(
    {one.slug: one for name, size, _, grid in BLOCKS if name == "plain" for one in block(name, size, grid)}.values()
)


def train(out: str, *only: str) -> None:
    """Train it all, or the recipes that are named; what is there already is not trained again."""
    for recipe, size, seeds, grid in BLOCKS:
        if recipe in (only or recipes()):
            run_study(recipes(held_out=True)[recipe], block(recipe, size, grid), seeds, out, jobs=2)


def collect(out: str) -> None:
    """Write the accuracies of all complete trials, in percent, into a table beside their folder."""
    rows = []
    for file in Path(out).glob("*/*/seed-*/run.json"):
        about = json.loads(file.read_text())
        size, name, strength = read_strength(about["condition"])
        with open(file.with_name("history.csv"), newline="") as lines:
            last = list(csv.DictReader(lines))[-1]
        accuracies = [round(100 * float(last[column]), 2) for column in ("train_accuracy", "val_accuracy")]
        rows.append((about["recipe"]["name"], size, name, strength, about["seed"], *accuracies))
    with open(Path(out).with_suffix(".csv"), "w", newline="") as lines:
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow(("recipe", "size", "name", "strength", "seed", "train_accuracy", "accuracy"))
        writer.writerows(sorted(rows))


def read_strength(trial: dict[str, Any]) -> tuple[int, str, float]:
    """The number of images, the regulariser and its strength from the condition's entry in run.json."""
    size, name, *_ = trial["slug"].split("-")
    own = {"nothing": 0, "ghosts": trial["num_splits"], "l1": trial["l1"], "l2": trial["l2"]}
    return int(size), name, own[name] if name in own else trial["changes"][name]


if __name__ == "__main__":
    {"train": train, "collect": collect}[sys.argv[1]](*sys.argv[2:])
