"""When does regularisation matter? Five regularisers on 100 to 10,000 digits, as docs/preregistration_when.md fixes it.

    python studies/when.py results/when

The base, "nothing", is PlainNet without dropout or rotation, on digits that are drawn anew for each seed. The strengths
did best on held-out digits, in the trials of studies/when_search.py.
"""

import sys

from s6lib import Condition, PlainNet, Recipe, run_study
from s6lib.preregistered_when import BATCH_SEEDS, BATCHES, REGULARISERS, SEEDS, WEAK, WEAK_SIZES

RECIPE = Recipe("when", PlainNet, dropout=0.0, epochs=2, decay_epochs=1, draw_images=True)
PASSES = {100: 125, 300: 50, 1_000: 19, 3_000: 9, 10_000: 5}  # in each epoch, as in the trials
STRENGTHS = {
    100: {"l1": 6e-3, "l2": 3e-2, "dropout": 0.05, "rotation": 40.0, "ghosts": 16},
    300: {"l1": 6e-3, "l2": 3e-2, "dropout": 0.05, "rotation": 25.0, "ghosts": 16},
    1_000: {"l1": 2e-3, "l2": 3e-2, "dropout": 0.01, "rotation": 15.0, "ghosts": 16},
    3_000: {"l1": 2e-3, "l2": 1e-2, "dropout": 0.01, "rotation": 15.0, "ghosts": 8},
    10_000: {"l1": 6e-4, "l2": 3e-3, "dropout": 0.02, "rotation": 5.0, "ghosts": 4},
}
SHARE = 0.5  # of these strengths, where all five are used together
LABELS = {"l1": "L1", "l2": "L2", "ghosts": "ghost batches", "together": "all five together"}
EXERCISE = {"l1-exercise": {"l1": 2e-4}, "l2-exercise": {"l2": 1e-4}}  # of the five conditions


def strengths_of(size: int, name: str) -> dict[str, float]:
    """The strength of each regulariser in a condition on so many digits."""
    if name == "together":
        return {key: SHARE * strength for key, strength in STRENGTHS[size].items()}
    return EXERCISE.get(name, {key: strength for key, strength in STRENGTHS[size].items() if key == name})


def condition(size: int, name: str) -> Condition:
    """A condition on so many digits: nothing, one regulariser, all together, or one of EXERCISE."""
    settings: dict = {"train_images": size, "passes": PASSES[size], **strengths_of(size, name)}
    if "ghosts" in settings:
        settings["num_splits"] = round(settings.pop("ghosts"))
    return Condition(f"{size}-{name}", f"{LABELS.get(name, name)}, {size:,} digits", **settings)


def batches(slug: str) -> Condition:
    """Twenty epochs of 10,240 digits, in four quarters, with batches and ghosts of the sizes in the name."""
    size, *ghosts = (int(part) for part in slug.split("-") if part.isdigit())
    changes = {"train_images": 10_240, "passes": 5, "epochs": 4, "batch_size": size, "learning_rate": 0.01 * size / 64}
    return Condition(slug, slug.replace("-", " "), num_splits=size // ghosts[0] if ghosts else None, **changes)


# What is trained, in this order: names of conditions, and the numbers of digits.
BLOCKS = (
    (("nothing", *REGULARISERS), tuple(SEEDS)),
    (("together",), (300,)),
    (BATCHES, (10_240,)),
    (WEAK, WEAK_SIZES),
)


def block(names: tuple[str, ...], size: int) -> list[Condition]:
    return [batches(name) if name in BATCHES else condition(size, name) for name in names]


CONDITIONS = tuple({one.slug: one for names, sizes in BLOCKS for size in sizes for one in block(names, size)}.values())


def run(out: str) -> None:
    """Train it all, with the seeds of each size; what is there already is not trained again."""
    for names, sizes in BLOCKS:
        for size in sizes:
            run_study(RECIPE, block(names, size), SEEDS.get(size, BATCH_SEEDS), out)


if __name__ == "__main__":
    run(*sys.argv[1:])
