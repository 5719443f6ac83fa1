"""Small-network experiments on MNIST: your network, your conditions, many seeds, and what the differences are worth."""

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
_MODULES = ("analysis", "plots", "statistics")  # what is reached as s6lib.statistics.paired_comparisons
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
except PackageNotFoundError:  # a folder on the path, not installed
    __version__ = "unknown"


def __getattr__(name: str) -> Any:
    """Import a name when it is first asked for: torch takes seconds, and `--help` needs none of it."""
    if name in _MODULES:
        return import_module(f"s6lib.{name}")
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"s6lib.{module}"), name)
    raise AttributeError(f"module 's6lib' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, *_MODULES, "__version__"]
