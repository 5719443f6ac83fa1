"""Small-network experiments on MNIST: your network, your conditions, many seeds, and honest statistics.

The lesson, in reading order:

    data            data sets of images, batched augmentation, batches
    models          PlainNet, BottleneckNet, SeparableNet
    norm            GhostBatchNorm, and its conversion from and to BatchNorm; needs torch alone
    train           train_epoch, evaluate, predict, and the penalties
    recipes         Recipe and Condition, and the built-in ones
    study           Study, which reads the runs in a folder
    analysis        tables, errors and weights of saved runs
    statistics      intervals, tests and power, for arrays and tables of any kind
    plots           figures for any study
    preregistered, preregistered_when   the frozen analyses of two pages in docs/
    errors          the errors that a user can cause
    __main__        the command line, `python -m s6lib`

The machinery in `lab`, which a reader of the notebooks need not open: `launch` has run_study.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from s6lib.data import Augmentation, ImageDataset, batches, load_mnist
from s6lib.errors import S6Error
from s6lib.lab.launch import run_study
from s6lib.models import BottleneckNet, PlainNet, SeparableNet
from s6lib.norm import GhostBatchNorm, GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d
from s6lib.recipes import ALL_CONDITIONS, BOTTLENECK, CONDITIONS, CONTROL, PLAIN, Condition, Recipe
from s6lib.study import Study
from s6lib.train import evaluate, l1_l2_penalty, predict, train_epoch

__all__ = ["ALL_CONDITIONS", "BOTTLENECK", "CONDITIONS", "CONTROL", "PLAIN", "S6Error"]
__all__ += ["Augmentation", "BottleneckNet", "Condition", "ImageDataset", "PlainNet", "Recipe", "SeparableNet", "Study"]
__all__ += ["GhostBatchNorm", "GhostBatchNorm1d", "GhostBatchNorm2d", "GhostBatchNorm3d"]
__all__ += ["batches", "evaluate", "l1_l2_penalty", "load_mnist", "predict", "run_study", "train_epoch"]

try:
    __version__ = version("s6lib")
except PackageNotFoundError:  # on the path, but not installed
    __version__ = "unknown"


def __getattr__(name: str) -> ModuleType:
    """Import on first use what takes seconds to import and what training does not need."""
    if name in ("analysis", "plots", "statistics"):
        return import_module(f"s6lib.{name}")
    raise AttributeError(f"module 's6lib' has no attribute {name!r}")
