"""How strong each regulariser of studies/when.py should be: trials on held-out digits.

    python -m s6lib run --study studies/when_search.py --seeds 1 --out studies/when_search

Each trial has one regulariser over nothing: PlainNet without dropout or rotation, on digits that are drawn anew for
each seed, from the first 50,000 training digits. No trial has seen a test digit. The best strength of each regulariser
and its two neighbours were tried with seed 2 too, and some with seed 3. studies/when_search.csv lists the accuracies.
"""

from s6lib import Condition, PlainNet, Recipe

# How often each of the two epochs goes through the digits: 250 to 785 steps of 64 at a learning rate of 0.01, and as
# many at 0.001. In a pilot, 300 digits with four times the steps changed the accuracy of nothing and of rotation by 0.1
# and 0.8 points; lower learning rates after these two changed it by 0.1 at most. Nothing of the pilot is kept.
PASSES = {100: 125, 300: 50, 1_000: 19, 3_000: 9, 10_000: 5}
GRIDS = {
    "l1": (2e-4, 6e-4, 2e-3, 6e-3, 2e-2),
    "l2": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    "dropout": (0.02, 0.05, 0.1, 0.2, 0.3, 0.01),  # the sixth was added where the end of the grid had done best
    "rotation": (5.0, 10.0, 15.0, 25.0, 40.0, 60.0),
    "ghosts": (2, 4, 8, 16, 32),
}
RECIPE = Recipe("when", PlainNet, dropout=0.0, epochs=2, decay_epochs=1, held_out=True, draw_images=True)


def condition(size: int, name: str = "nothing", strength: float = 0) -> Condition:
    """One regulariser, at one strength, on so many digits; the slug ends with its place in the grid, from 1."""
    changes = {"train_images": size, "passes": PASSES[size]}
    if name == "nothing":
        return Condition(f"{size}-nothing", f"{size:,} digits, nothing", **changes)
    slug = f"{size}-{name}-{GRIDS[name].index(strength) + 1}"
    label = f"{size:,} digits, {name} {strength:g}"
    return Condition(slug, label, **changes, **{"num_splits" if name == "ghosts" else name: strength})


def together(share: float) -> Condition:
    """All five on 300 digits, at a share of what did best alone."""
    changes = {"train_images": 300, "passes": PASSES[300], "dropout": 0.05 * share, "rotation": 25.0 * share}
    label = f"300 digits, all five at {share:g}"
    splits = round(16 * share)
    return Condition(f"300-together-{splits}", label, l1=6e-3 * share, l2=3e-2 * share, num_splits=splits, **changes)


def batches(slug: str, label: str, num_splits: int | None = None, **changes: float) -> Condition:
    """Twenty epochs of 10,240 digits, in four quarters."""
    shared = {"train_images": 10_240, "passes": 5, "epochs": 4}
    return Condition(slug, label, num_splits=num_splits, **{**shared, **changes})


LARGE = {"batch_size": 1_024, "learning_rate": 0.16}
CONDITIONS = (
    *(
        trial
        for size in PASSES
        for trial in (condition(size), *(condition(size, name, one) for name, grid in GRIDS.items() for one in grid))
    ),
    *map(together, (1.0, 0.5, 0.25, 0.125)),
    batches("batch-64", "batches of 64"),
    batches("batch-1024", "batches of 1,024", **LARGE),
    batches("batch-1024-ghosts-64", "batches of 1,024, ghosts of 64", num_splits=16, **LARGE),
    batches("batch-1024-ghosts-16", "batches of 1,024, ghosts of 16", num_splits=64, **LARGE),
)
