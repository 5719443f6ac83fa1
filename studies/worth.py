"""How much data is a regulariser worth? Trained as docs/preregistration_worth.md fixes it.

    python studies/worth.py train results/worth one     # the page's first part: what is not there yet, two at a time
    python studies/worth.py train results/worth two     # its second part
    python studies/worth.py strengths one               # the page's table of strengths, and `two`

The base, "nothing", is PlainNet without dropout or rotation, on images that are drawn anew for each seed. Beside it
stand a larger network, an MLP, and training labels of which a fifth are wrong. The strengths did best on held-out
images, in the trials of studies/worth_search.py and studies/when_search.py.
"""

import csv
import sys
from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from torch import Tensor, nn

from s6lib import Condition, ImageDataset, PlainNet, Recipe, Study, evaluate, load_mnist, run_study
from s6lib.data import DATA, PROJECT

# As in studies/worth_analysis.py, which imports nothing.
SEEDS = range(31, 41)
SIZES = (100, 300, 1_000, 3_000, 10_000, 30_000)
REGULARISED, ALL = (100, 300, 1_000, 3_000, 10_000), 60_000
REGULARISERS = ("rotation", "l2", "l1", "ghosts", "dropout")
LONGER, LONG = ("rotation", "l2"), "-longer"
NETWORK_SIZES = (300, 3_000, 10_000)
ON_BOTH = ("rotation", "l2", "l1", "dropout")

# In each of the two epochs, the first at the full learning rate and the second at a tenth of it.
PASSES = {100: 125, 300: 50, 1_000: 19, 3_000: 9, 10_000: 5, 30_000: 5, 50_000: 5, 60_000: 5}
TRIALS = (PROJECT / "studies" / "worth_search.csv", PROJECT / "studies" / "when_search.csv")
TRIAL_SEEDS = (1, 2, 3)
# At these strengths a regulariser is next to nothing, so that the weakest one tried may be the best; of two ghosts,
# since one ghost is BatchNorm.
FLOORS = {"l1": 2e-5, "l2": 1e-4, "dropout": 0.002, "rotation": 2.0, "ghosts": 2}
OWN_GRIDS = {
    "nothing": (0,),
    "rotation": (10.0, 15.0, 25.0, 40.0),
    "l2": (3e-3, 1e-2, 3e-2, 1e-1),
    "l1": (6e-4, 2e-3, 6e-3, 2e-2),
    "ghosts": (4, 8, 16, 32),
    "dropout": (0.02, 0.05, 0.1, 0.2),
}
OWN_IMAGES, OWN_HELD_OUT, OWN_PASSES = 300, 60, 62

# --- networks and data ------------------------------------------------------------------------------------------------


class MLP(nn.Sequential):
    """A hidden layer of 128, 101,770 parameters: ten times PlainNet's. Takes (B, 1, 28, 28), returns logits (B, 10)."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Dropout(dropout), nn.Linear(128, 10))


def mislabel(labels: Tensor, share: float = 0.2) -> Tensor:
    """Give a share of the images, drawn once, another class, drawn evenly from the nine others."""
    generator = np.random.default_rng(20)
    chosen = generator.permutation(len(labels))[: round(share * len(labels))]
    wrong = labels.clone()
    wrong[chosen] = (wrong[chosen] + torch.from_numpy(generator.integers(1, 10, len(chosen)))) % 10
    return wrong


def wrong_labels() -> tuple[ImageDataset, ImageDataset]:
    """MNIST with a fifth of the training labels wrong; the labels of the test images are right."""
    train, test = load_mnist(DATA)
    return ImageDataset(train.images, mislabel(train.labels)), test


def own_images(seed: int) -> tuple[ImageDataset, ImageDataset]:
    """The 300 images that a run of this seed learns from: the first 240, and the last 60 to choose a strength on."""
    train, _ = load_mnist(DATA)
    drawn = draw(seed, len(train.labels), OWN_IMAGES)
    return train.part(drawn[:-OWN_HELD_OUT]), train.part(drawn[-OWN_HELD_OUT:])


def draw(seed: int, images: int, count: int) -> Tensor:
    """The places of the images that a run of this seed learns from, in order: those of `draw_images`."""
    words = np.random.SeedSequence((seed, 0)).generate_state(4).tolist()
    return torch.randperm(images, generator=torch.Generator().manual_seed(words[1]))[:count]


# --- recipes and conditions -------------------------------------------------------------------------------------------


def recipes(held_out: bool = False) -> dict[str, Recipe]:
    """PlainNet and the MLP, with right and with wrong labels, by name."""
    shared = {"dropout": 0.0, "epochs": 2, "decay_epochs": 1, "held_out": held_out, "draw_images": True}
    mlp = {**shared, "learning_rate": 0.05}
    made = (
        Recipe("plain", PlainNet, **shared),
        Recipe("plain-wrong", PlainNet, data=wrong_labels, **shared),
        Recipe("mlp", MLP, **mlp),
        Recipe("mlp-wrong", MLP, data=wrong_labels, **mlp),
    )
    return {recipe.name: recipe for recipe in made}


def condition(slug: str, size: int, name: str, strength: float, times: int = 1) -> Condition:
    """One regulariser, or nothing, on so many images, with so many times the usual passes."""
    own = {} if name == "nothing" else {"num_splits": round(strength)} if name == "ghosts" else {name: strength}
    text = f"{label(name, strength)}, {size:,} images"
    return Condition(slug, text, train_images=size, passes=PASSES[size] * times, **own)


def label(name: str, strength: float) -> str:
    names = {"l1": "L1", "l2": "L2", "ghosts": "ghost batches"}
    return f"{names.get(name, name)} {strength:g}" if strength else name


def at(name: str, strength: float) -> str:
    """A regulariser at a strength, in a slug: l2-3e-02 or rotation-15."""
    return f"{name}-{strength:g}" if strength >= 1 else f"{name}-{strength:.0e}" if strength else name


def times(recipe: str) -> int:
    """How many times the passes of PlainNet a recipe has."""
    return 2 if recipe.startswith("mlp") else 1


# --- strengths --------------------------------------------------------------------------------------------------------


def trials() -> dict[tuple[str, int, str, float], dict[int, float]]:
    """The accuracies on held-out images by recipe, number of images, regulariser and strength, then by seed."""
    found: dict[tuple[str, int, str, float], dict[int, float]] = {}
    for file in TRIALS:
        with open(file, newline="") as lines:
            for row in csv.DictReader(lines):
                if row["name"] != "together" and row["size"].isdigit():
                    key = (row.get("recipe", "plain"), int(row["size"]), row["name"], float(row["strength"]))
                    found.setdefault(key, {})[int(row["seed"])] = float(row["accuracy"])
    return found


def strength_of(recipe: str, size: int, name: str) -> float:
    """The strength with the best mean of three trials, the weaker of two equal ones; 50,000 images stand for 60,000.

    Raises ValueError if the strongest or the weakest tried is the best, or was not tried as often as its neighbours.
    """
    accuracies = {
        key[3]: seeds for key, seeds in sorted(trials().items()) if key[:3] == (recipe, min(size, 50_000), name)
    }
    means = {
        strength: round(fmean(seeds[seed] for seed in TRIAL_SEEDS), 6)
        for strength, seeds in accuracies.items()
        if all(seed in seeds for seed in TRIAL_SEEDS)
    }
    what = f"{name} in {recipe} on {size:,} images"
    if not means:
        raise ValueError(f"{what}: no strength was tried with seeds 1, 2 and 3")
    best, tried = max(means, key=means.__getitem__), list(accuracies)
    place = tried.index(best)
    if place == len(tried) - 1 or (place == 0 and best > FLOORS[name]):
        raise ValueError(f"{what}: {best:g} is the best of those tried, but at their end: try more")
    if neighbours := [one for one in tried[max(place - 1, 0) : place + 2] if one not in means]:
        raise ValueError(f"{what}: {neighbours[0]:g}, beside the best, was not tried with seeds 1, 2 and 3")
    return best


# --- what is trained --------------------------------------------------------------------------------------------------


def block(recipe: str, size: int, names: tuple[str, ...], longer: bool = False) -> list[Condition]:
    """Nothing, or regularisers at their strengths, on so many images."""
    suffix, factor = (LONG, 4) if longer else ("", 1)
    return [
        condition(
            f"{size}-{name}{suffix}",
            size,
            name,
            0 if name == "nothing" else strength_of(recipe, size, name),
            factor * times(recipe),
        )
        for name in names
    ]


Block = tuple[str, list[Condition]]


def part_one() -> list[Block]:
    """PlainNet on 100 to 30,000 images, by recipe."""
    return [
        *(("plain", block("plain", size, ("nothing",))) for size in SIZES),
        *(("plain", block("plain", size, REGULARISERS)) for size in REGULARISED),
    ]


def part_two() -> list[Block]:
    """All 60,000 images, four times the steps, the MLP, and wrong labels."""
    return [
        ("plain", block("plain", ALL, ("nothing", *REGULARISERS))),
        *(("plain", block("plain", size, ("nothing", *LONGER), longer=True)) for size in (300, 10_000)),
        *(("mlp", block("mlp", size, ("nothing",))) for size in SIZES),
        *(("mlp", block("mlp", size, ON_BOTH)) for size in NETWORK_SIZES),
        *(
            (recipe, block(recipe, size, ("nothing", *ON_BOTH)))
            for recipe in ("mlp-wrong", "plain-wrong")
            for size in NETWORK_SIZES
        ),
    ]


PARTS = {"one": part_one, "two": part_two}
# Recipes, numbers of images and regularisers whose strengths a part needs.
STRENGTHS = {
    "one": [("plain", REGULARISED, REGULARISERS)],
    "two": [
        ("plain", (ALL,), REGULARISERS),
        *((recipe, NETWORK_SIZES, ON_BOTH) for recipe in ("mlp", "mlp-wrong", "plain-wrong")),
    ],
}
RECIPE = recipes()["plain"]
CONDITIONS = tuple(one for size in SIZES for one in block("plain", size, ("nothing",)))


def train(out: str, part: str) -> None:
    """Train a part of the page, "one" or "two", in its order; what is there already is not trained again."""
    for recipe, conditions in PARTS[part]():  # a list, so that a strength may not be missing after the first runs
        measure(run_study(recipes()[recipe], conditions, SEEDS, out, jobs=2), out)
    if part == "one":
        train_own(out)


def strengths(part: str) -> None:
    """Print a part's table of strengths, each with its mean gain in the trials in points."""
    accuracies = trials()
    for recipe, sizes, names in STRENGTHS[part]:
        print(f"| {recipe} | " + " | ".join(f"{size:,}" for size in sizes) + " |\n" + "|---" * (len(sizes) + 1) + "|")
        for name in names:
            cells = []
            for size in sizes:
                strength = strength_of(recipe, size, name)
                tried = [(recipe, min(size, 50_000), *one) for one in ((name, strength), ("nothing", 0))]
                with_it, without = (fmean(accuracies[one][seed] for seed in TRIAL_SEEDS) for one in tried)
                cells.append(f"{strength:g} ({with_it - without:+.2f})")
            print(f"| {name} | {' | '.join(cells)} |")
        print()


def measure(study: Study, out: str) -> None:
    """Add to clean.csv how finished networks without a regulariser do on their own training images, 10,000 at most.

    In evaluation mode and without rotation, on the labels that they learned from.
    """
    file = Path(out) / "clean.csv"
    rows = read_rows(file)
    there = {(row["recipe"], row["condition"], int(row["seed"])) for row in rows}
    train, _ = study.data
    for slug, seed in study.runs:
        if "nothing" in slug and (study.recipe.name, slug, seed) not in there:
            drawn = draw(seed, len(train.labels), min(int(slug.split("-")[0]), 10_000))
            accuracy = evaluate(study.model(slug, seed), train.part(drawn)).accuracy
            entry = {"recipe": study.recipe.name, "condition": slug, "seed": seed, "images": len(drawn)}
            rows.append(entry | {"accuracy": round(100 * accuracy, 4)})
    write_rows(file, rows)


def train_own(out: str) -> None:
    """Choose strengths on a fifth of each seed's own 300 images, and train on all of them with what was chosen."""
    rows = []
    for seed in SEEDS:
        recipe = Recipe(f"own-{seed}", PlainNet, dropout=0.0, epochs=2, decay_epochs=1, data=partial(own_images, seed))
        grid = {at(name, one): (name, one) for name, strengths in OWN_GRIDS.items() for one in strengths}
        study = run_study(recipe, [own_trial(slug, *grid[slug]) for slug in grid], [seed], out, jobs=2)
        last = study.history().query("epoch == 2").set_index("condition")
        conditions = []
        for name in REGULARISERS:
            name_slugs = [slug for slug in grid if grid[slug][0] in (name, "nothing")]
            # Most right, then the lowest loss; nothing at all may be best.
            best = min(name_slugs, key=lambda slug: (-last["test_accuracy"][slug], last["test_loss"][slug]))
            slug = f"300-own-{best}" if best != "nothing" else "300-nothing"
            rows.append({"seed": seed, "name": name, "strength": grid[best][1], "condition": slug})
            if best != "nothing":
                conditions.append(condition(slug, OWN_IMAGES, *grid[best]))
        if conditions:
            run_study(recipes()["plain"], conditions, [seed], out, jobs=2)
    write_rows(Path(out) / "own.csv", rows)


def own_trial(slug: str, name: str, strength: float) -> Condition:
    """A trial on all that a data set has, 240 images, with as many steps as on 300."""
    trial = condition(slug, OWN_IMAGES, name, strength)
    changes = {**trial.changes, "train_images": None, "passes": OWN_PASSES}
    return Condition(slug, l1=trial.l1, l2=trial.l2, num_splits=trial.num_splits, changes=changes)


def read_rows(file: Path) -> list[dict[str, object]]:
    if not file.exists():
        return []
    with open(file, newline="") as lines:
        return list(csv.DictReader(lines))


def write_rows(file: Path, rows: list[dict[str, object]]) -> None:
    with open(file, "w", newline="") as lines:
        writer = csv.DictWriter(lines, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    {"train": train, "strengths": strengths}[sys.argv[1]](*sys.argv[2:])
