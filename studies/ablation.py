"""From the published recipe to that of the frontier, on PlainNet: each condition has the changes of those before it.

    python -m s6lib run --study studies/ablation.py --seeds 1 2 3 4 5 --out results
    python -m s6lib run --study studies/ablation.py --seeds 6 7 8 9 10 --conditions one-cycle average --out results

The runs of BN by the published recipe are there already, and the first change is compared with them. "average" is the
whole recipe of studies/frontier.py; after it comes a penalty, which that has not.

On seeds 1 to 5 only the first change seemed to gain, and among six no gain stood. So it alone was tried again. Fixed
before seeds 6 to 10 of it were run: one-cycle minus bn on these five seeds, one two-sided paired t test at 5%, no
correction, since it is the only one.
"""

from functools import partial

from s6lib import PLAIN, Condition, PlainNet

RECIPE = PLAIN
STEPS = (
    ("one-cycle", "one cycle to 0.1", {"schedule": "one-cycle", "learning_rate": 0.1, "nesterov": True}, 0.0),
    ("shift-scale", "shift and scale", {"rotation": 10.0, "shift": 2.0, "scale": 0.1}, 0.0),
    ("no-dropout", "no dropout", {"dropout": 0.0}, 0.0),
    ("norm-first", "BN before ReLU", {"network": partial(PlainNet, norm_first=True)}, 0.0),
    ("average", "moving average", {"ema": 0.999}, 0.0),
    ("average-l2", "L2 penalty", {}, 1e-4),
)


def _conditions() -> tuple[Condition, ...]:
    changes: dict = {}
    made = []
    for slug, label, more, l2 in STEPS:
        changes = {**changes, **more}
        made.append(Condition(slug, label, l2=l2, **changes))
    return tuple(made)


CONDITIONS = _conditions()
