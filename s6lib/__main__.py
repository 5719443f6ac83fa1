"""The command line: `python -m s6lib` runs the study, `python -m s6lib report` tells what a folder holds."""

import argparse
import difflib
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from joblib import parallel_config

from s6lib.analysis import result_table
from s6lib.conditions import ALL_CONDITIONS, CONDITIONS, PLAIN, RECIPES, Recipe
from s6lib.data import MnistError, load_mnist
from s6lib.files import DamagedFile
from s6lib.plots import plot_accuracy, plot_loss, plot_misclassified, save
from s6lib.study import RunsFailed, Study, StudyError, run_study

DESCRIPTION = """\
Train a 10k-parameter network on MNIST under five conditions (L1, L2, both, Ghost BatchNorm, all three) and compare.

  python -m s6lib                                   the five conditions, 25 epochs each, into runs/
  python -m s6lib run --conditions gbn bn --seeds 1 2 3
  python -m s6lib run --epochs 2 --train-images 6400 --out runs-short
  python -m s6lib report results                    the table and the figures of a folder

A run that was stopped goes on from its last whole epoch when the same command is given again.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m s6lib", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", metavar="{run,report}", parser_class=_Parser)

    run = commands.add_parser("run", help="train (the default), then report")
    run.add_argument(
        "--recipe", type=_one_of(RECIPES), default=PLAIN, metavar="NAME", help="plain (default) or bottleneck"
    )
    run.add_argument(
        "--conditions",
        nargs="+",
        type=_one_of(ALL_CONDITIONS),
        default=CONDITIONS,
        metavar="SLUG",
        help=f"which to train, of {', '.join(ALL_CONDITIONS)} (default: the first five)",
    )
    run.add_argument("--seeds", nargs="+", type=_whole(0), default=[1], metavar="K", help="one run each (default: 1)")
    run.add_argument("--epochs", type=_whole(1), metavar="N", help="passes over the images (default: 25)")
    run.add_argument("--train-images", type=_whole(1), metavar="N", help="the first N of 60,000 (default: all)")
    run.add_argument("--out", default="runs", metavar="DIR", help="where the runs are kept (default: runs)")
    run.add_argument("--jobs", type=_whole(1), metavar="N", help="runs side by side (default: one a core; 1 on a GPU)")
    run.add_argument(
        "--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto (default) takes a GPU if it can"
    )
    run.add_argument(
        "--cluster",
        type=_scheduler,
        metavar="dask://HOST:PORT",
        help="send the runs to the workers of a Dask scheduler",
    )

    report = commands.add_parser("report", help="print the result tables of a folder and draw its figures")
    report.add_argument("dir", metavar="DIR", help="a folder that `run` filled")
    report.add_argument("--images", metavar="DIR", help="where the figures go (default: DIR/images)")
    return parser


def _one_of(known: dict):
    def parse(name: str):
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise argparse.ArgumentTypeError(f"{name!r} is not known; {hint}There are: {', '.join(known)}")
        return known[name]

    return parse


def _whole(least: int):
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least}")
        return int(text)

    return parse


def _scheduler(address: str) -> str:
    if not re.fullmatch(r"dask://[^/:]+:\d+", address):
        raise argparse.ArgumentTypeError(f"{address!r} is not of the form dask://HOST:PORT")
    return address.replace("dask", "tcp", 1)


@contextmanager
def _cluster(scheduler: str | None) -> Iterator[None]:
    """Within the block, joblib sends its work to a Dask scheduler, if there is one."""
    if scheduler is None:
        yield
        return
    try:
        backend = parallel_config(backend="dask", scheduler_host=scheduler)
    except (ImportError, ValueError) as error:
        raise StudyError('a cluster needs Dask: pip install "s6lib[cluster]"') from error
    except OSError as error:
        raise StudyError(f"no Dask scheduler answers at {scheduler}: {error}") from error
    with backend:
        yield


def _recipe(arguments: argparse.Namespace) -> Recipe:
    changes = {"epochs": arguments.epochs, "train_images": arguments.train_images}
    try:
        return replace(arguments.recipe, **{name: value for name, value in changes.items() if value is not None})
    except ValueError as error:
        raise StudyError(str(error)) from error


def _run(arguments: argparse.Namespace) -> None:
    recipe = _recipe(arguments)
    with _cluster(arguments.cluster):
        study = run_study(
            recipe, arguments.conditions, arguments.seeds, arguments.out, jobs=arguments.jobs, device=arguments.device
        )
    _report(study, Path(arguments.out) / "images")


def _report_all(arguments: argparse.Namespace) -> None:
    folder = Path(arguments.dir)
    names = [name for name in RECIPES if any((folder / name).glob("*/seed-*/run.json"))]
    for name in names or [PLAIN.name]:
        _report(Study(folder, name), Path(arguments.images or folder / "images"))


def _report(study: Study, images: Path) -> None:
    """Print the table of a study, and draw its two graphs and the errors of its GBN model."""
    name = study.recipe.name
    print(f"\n{study.recipe.network} ({name})\n{result_table(study).to_string(index=False)}\n")
    figures = {"accuracy": plot_accuracy(study), "loss": plot_loss(study)}
    if ("gbn", 1) in study.folders:
        _, test = load_mnist()
        figures["misclassified_gbn"] = plot_misclassified(study, test)
    for kind, figure in figures.items():
        path = images / f"{name}_{kind}.png"
        save(figure, path)
        print(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line asks, and return the exit code.

    0 when done, 1 if a run failed or a file is damaged, missing or cannot be written, 2 if the request is wrong, 130
    after Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    arguments = _parser().parse_args(argv or ["run"])
    try:
        _run(arguments) if arguments.command == "run" else _report_all(arguments)
    except (StudyError, MnistError, DamagedFile, OSError) as error:  # OSError: the disk is full, say
        print(f"python -m s6lib: {error}", file=sys.stderr)
        return 2 if isinstance(error, StudyError) else 1
    except RunsFailed as error:
        print(f"python -m s6lib: these runs failed, all others are complete:\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C has nothing more to stop
        print("\nStopped. Every finished epoch is kept: the same command goes on from there.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
