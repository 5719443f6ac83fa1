"""How strong each regulariser of studies/when.py should be: trials on the held-out digits, three seeds.

    python -m s6lib run --study studies/when_search.py --seeds 1 2 3 --out runs-when

Each trial has one regulariser over nothing: PlainNet without dropout or rotation, trained for about 2,000 steps on
digits that are drawn anew for each seed, from the first 50,000 training digits. No trial has seen a test digit.
"""

from s6lib import Condition, PlainNet, Recipe

# How often an epoch goes through the digits, so that four epochs have about 2,000 steps of 64 at each size.
PASSES = {100: 250, 300: 100, 1_000: 31, 3_000: 11, 10_000: 3}
GRIDS = {
    "l1": (2e-4, 6e-4, 2e-3, 6e-3, 2e-2),
    "l2": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    "dropout": (0.02, 0.05, 0.1, 0.2, 0.3),
    "rotation": (5.0, 10.0, 15.0, 25.0, 40.0),
    "ghosts": (2, 4, 8, 16, 32),
}
RECIPE = Recipe("when", PlainNet, dropout=0.0, epochs=4, decay_epochs=1, held_out=True, draw_images=True)


def condition(size: int, name: str = "nothing", strength: float = 0) -> Condition:
    """One regulariser, at one strength, on so many digits; the slug ends with its place in the grid, from 1."""
    changes = {"train_images": size, "passes": PASSES[size]}
    if name == "nothing":
        return Condition(f"{size}-nothing", f"{size:,} digits, nothing", changes=changes)
    slug = f"{size}-{name}-{GRIDS[name].index(strength) + 1}"
    label = f"{size:,} digits, {name} {strength:g}"
    if name in ("dropout", "rotation"):
        return Condition(slug, label, changes={**changes, name: strength})
    own = {"num_splits": strength} if name == "ghosts" else {name: strength}
    return Condition(slug, label, changes=changes, **own)


CONDITIONS = tuple(
    trial
    for size in PASSES
    for trial in (condition(size), *(condition(size, name, one) for name, grid in GRIDS.items() for one in grid))
)
