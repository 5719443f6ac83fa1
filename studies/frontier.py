"""The small networks of notebook 08, five sizes of one kind, on all training digits and judged on the test digits.

    python -m s6lib run --study studies/frontier.py --seeds 1 2 3 4 5 6 7 8 9 10 --out results/epochs-25
    python -m s6lib run --study studies/frontier.py --seeds 1 2 3 4 5 6 7 8 9 10 --out results/epochs-15 \\
        --epochs 15 --conditions width-18 width-24 width-32

Network and recipe were chosen on held-out training digits: see studies/frontier_search.py.
"""

from functools import partial

from s6lib import Condition, Recipe, SeparableNet

RECIPE = Recipe(
    "frontier",
    SeparableNet,
    learning_rate=0.1,
    schedule="one-cycle",
    nesterov=True,
    ema=0.999,
    rotation=10.0,
    shift=2.0,
    scale=0.1,
)
CONDITIONS = tuple(
    Condition(
        f"width-{width}",
        f"{4 * width**2 + 65 * width:,} parameters",
        network=partial(SeparableNet, width=width),
    )
    for width in (14, 18, 24, 32, 42)
)
