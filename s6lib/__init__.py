"""Small-network experiments on MNIST: your network, your conditions, many seeds, and honest statistics.

The lesson, in reading order:

    data            data sets as tensors on a device, batched augmentation, batches
    models          PlainNet, BottleneckNet, SeparableNet
    norm            GhostBatchNorm, and its conversion from and to BatchNorm; needs torch alone
    train           one step, one epoch, one evaluation, the penalties
    recipes         Recipe and Condition, and the built-in ones
    study           Study, which reads the runs in a folder
    analysis        tables, errors and weights of saved runs
    statistics      intervals, tests and power, for arrays and tables of any kind
    plots           figures for any study
    preregistered   the frozen analysis of docs/preregistration.md
    preregistered_when  that of docs/preregistration_when.md
    errors          the errors that a user can cause
    __main__        the command line, `python -m s6lib`

The machinery in `lab`, which a reader of the notebooks need not open:

    launch          run_study, the one loop over conditions and seeds
    run             one run, from its seed to its folder
    setup           a run's data, model, optimizer and batches
    first_steps     the trial before a run, which also identifies a run with the user's code
    record          recipes and conditions as JSON in run.json, and how two of them differ
    files           the files in a run's folder: written atomically, verified when read
    device          determinism, random seeds, and a description of the machine
    replay          training steps recorded on a GPU and launched as one
    workers         where runs are trained: local processes or any concurrent.futures.Executor
    progress        progress bars and lines
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from s6lib.data import Dataset, load_mnist
    from s6lib.errors import S6Error
    from s6lib.lab.launch import run_study
    from s6lib.models import BottleneckNet, PlainNet, SeparableNet
    from s6lib.norm import GhostBatchNorm
    from s6lib.recipes import ALL_CONDITIONS, BOTTLENECK, CONDITIONS, CONTROL, PLAIN, Condition, Recipe
    from s6lib.study import Study

_HOMES = {
    "recipes": ("ALL_CONDITIONS", "BOTTLENECK", "CONDITIONS", "CONTROL", "PLAIN", "Condition", "Recipe"),
    "data": ("Dataset", "load_mnist"),
    "errors": ("S6Error",),
    "lab.launch": ("run_study",),
    "models": ("BottleneckNet", "PlainNet", "SeparableNet"),
    "norm": ("GhostBatchNorm",),
    "study": ("Study",),
}
_MODULES = ("analysis", "plots", "statistics")  # for s6lib.statistics.paired_comparisons and the like
__all__ = [
    "ALL_CONDITIONS",
    "BOTTLENECK",
    "CONDITIONS",
    "CONTROL",
    "PLAIN",
    "BottleneckNet",
    "Condition",
    "Dataset",
    "GhostBatchNorm",
    "PlainNet",
    "Recipe",
    "S6Error",
    "SeparableNet",
    "Study",
    "load_mnist",
    "run_study",
]

try:
    __version__ = version("s6lib")
except PackageNotFoundError:  # on the path, but not installed
    __version__ = "unknown"


def __getattr__(name: str) -> Any:
    """Import a name on first use: importing torch takes seconds, and `--help` does not need it."""
    if name in _MODULES:
        return import_module(f"s6lib.{name}")
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"s6lib.{module}"), name)
    raise AttributeError(f"module 's6lib' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, *_MODULES, "__version__"]
