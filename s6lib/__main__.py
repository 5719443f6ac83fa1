"""The command line: `python -m s6lib` runs a study, `python -m s6lib report` prints and draws its results."""

import argparse
import importlib.util
import io
import os
import re
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from s6lib.errors import RunsFailed, S6Error, StudyError
from s6lib.lab.launch import run_study
from s6lib.lab.workers import dask_executor
from s6lib.recipes import ALL_CONDITIONS, CONDITIONS, RECIPES, Condition, Recipe, name_of
from s6lib.study import Study, recipes_in

DESCRIPTION = """\
Train a 10k-parameter network on MNIST under five conditions (L1, L2, both, Ghost BatchNorm, all three) and compare.

  python -m s6lib                                   the five conditions, 25 epochs each, into runs/
  python -m s6lib run --conditions gbn bn --seeds 1 2 3
  python -m s6lib run --epochs 2 --train-images 6400 --out runs-short
  python -m s6lib run --study mine.py --seeds 1 2 3 a file that defines your own RECIPE and CONDITIONS
  python -m s6lib report results                    the tables and the figures of a folder

Give the same command again to resume a stopped run from its last complete epoch.
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
    add, recipe = run.add_argument, run.add_mutually_exclusive_group()
    recipe.add_argument("--study", metavar="FILE.py", help="a file that defines your own RECIPE and CONDITIONS")
    recipe.add_argument("--recipe", choices=RECIPES, default="plain", help="the network (default: plain)")
    which = f"which to train: {', '.join(ALL_CONDITIONS)} (default: the first five), or those of your study file"
    add("--conditions", nargs="+", metavar="SLUG", help=which)
    add("--seeds", nargs="+", type=int, default=[1], metavar="K", help="one run each (default: 1)")
    add("--epochs", type=int, metavar="N", help="passes over the training images (default: 25)")
    add("--train-images", type=int, metavar="N", help="how many images to use (default: all)")
    add("--out", default="runs", metavar="DIR", help="the folder for the runs (default: runs)")
    add("--jobs", type=int, metavar="N", help="parallel runs (default: one per core; 1 on a GPU)")
    add("--device", default="auto", help="auto (default: a CUDA GPU if there is one), cpu, cuda:1, mps")
    cluster = "send the runs to the workers of a Dask scheduler"
    add("--cluster", type=_scheduler_address, metavar="dask://HOST:PORT", help=cluster)

    report = commands.add_parser("report", help="print the result tables of a folder and draw its figures")
    report.add_argument("dir", metavar="DIR", help="a folder that `run` filled")
    report.add_argument("--study", metavar="FILE.py", help="report the study in this file, which was given to `run`")
    report.add_argument("--images", metavar="DIR", help="the folder for the figures (default: DIR/images)")
    return parser


def _scheduler_address(address: str) -> str:
    if not re.fullmatch(r"dask://[^/:]+:\d+", address):
        raise argparse.ArgumentTypeError(f"{address!r} is not of the form dask://HOST:PORT")
    return address.replace("dask", "tcp", 1)


def read_study_file(file: str) -> tuple[Recipe, list[Condition]]:
    """Return RECIPE and CONDITIONS of a study file. Raises StudyError if it cannot be read or does not define them."""
    path = Path(file)
    # A prefix, so that a file called random.py does not replace Python's module.
    spec = importlib.util.spec_from_file_location("s6lib_study_" + re.sub(r"\W", "_", path.stem), path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise StudyError(f"there is no Python file {file}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's own code: any
        raise StudyError(f"{file} cannot be imported: {type(error).__name__}: {error}") from None
    recipe, conditions = getattr(module, "RECIPE", None), getattr(module, "CONDITIONS", None)
    if not isinstance(recipe, Recipe):
        raise StudyError(f"{file} must define RECIPE, a s6lib.Recipe, not {recipe!r}")
    if not isinstance(conditions, Sequence) or not all(isinstance(one, Condition) for one in conditions):
        raise StudyError(f"{file} must define CONDITIONS, a tuple of s6lib.Condition, not {conditions!r}")
    return recipe, list(conditions)


def _run(arguments: argparse.Namespace) -> None:
    recipe, conditions, choices = RECIPES[arguments.recipe], list(CONDITIONS), ALL_CONDITIONS
    if arguments.study is not None:
        recipe, conditions = read_study_file(arguments.study)
        choices = {condition.slug: condition for condition in conditions}
    if arguments.conditions is not None:
        if unknown := [slug for slug in arguments.conditions if slug not in choices]:
            raise StudyError(f"{unknown[0]!r} is not known; there are: {', '.join(choices)}")
        conditions = [choices[slug] for slug in arguments.conditions]
    changes = {"epochs": arguments.epochs, "train_images": arguments.train_images}
    recipe = replace(recipe, **{name: value for name, value in changes.items() if value is not None})
    with nullcontext() if arguments.cluster is None else dask_executor(arguments.cluster) as executor:
        options = {"jobs": arguments.jobs, "device": arguments.device, "executor": executor}
        study = run_study(recipe, conditions, arguments.seeds, arguments.out, **options)
    _report(study)


def _report_all(arguments: argparse.Namespace) -> None:
    if arguments.study is not None:
        studies = [Study(arguments.dir, *read_study_file(arguments.study))]
    else:
        studies = [Study(arguments.dir, name) for name in recipes_in(arguments.dir) or ["plain"]]
    for study in studies:
        _report(study, arguments.images)


def _report(study: Study, images: str | None = None) -> None:
    """Print the tables of a study and draw its figures: curves, a model's errors and, with two seeds, comparisons."""
    from s6lib import analysis, plots  # imported here, since they take a second, and training comes first

    study.check()
    name, title, history = study.recipe.name, name_of(study.recipe.network), study.history()
    print(f"{title} ({name})\n{analysis.result_table(study).to_string(index=False)}\n")
    title += " (held-out images)" if study.recipe.held_out else ""
    figures = {"accuracy": plots.plot_accuracy(history, title), "loss": plots.plot_loss(history, title)}
    slug = "gbn" if "gbn" in study.conditions else next(iter(study.conditions))
    with suppress(StudyError):  # without --study, the user's own model has only a name
        model, test = study.model(slug), study.data[1]
        heading = f"{title}, {study.labels[slug]}"
        figures[f"misclassified_{slug}"] = plots.plot_misclassified(analysis.misclassified(model, test), test, heading)
    figures |= _compare(study, title)
    for kind, figure in figures.items():
        path = Path(images or study.folder / "images").expanduser() / f"{name}_{kind}.png"
        plots.save(figure, path)
        print(path)


def _compare(study: Study, title: str) -> dict[str, Any]:
    """Print means and differences, and return their figures, if all conditions share at least two seeds."""
    from s6lib import plots, statistics

    try:
        outcomes = study.outcomes()
    except ValueError as error:  # some condition lacks a seed
        print(f"no comparison of conditions: {error}\n")
        return {}
    if len(outcomes) < 2:
        return {}
    part = "held-out" if study.recipe.held_out else "test"
    means = statistics.condition_statistics(outcomes).round(3).to_string(index=False)
    print(f"accuracy on the {part} images at the last epoch, %\n{means}\n")
    figures = {"replication": plots.plot_replication(outcomes, study.labels, title)}
    if outcomes.shape[1] > 1:
        columns = ["first", "second", "n", "difference", "low", "high", "p", "p_holm"]
        differences = statistics.paired_comparisons(outcomes)[columns].round(3).to_string(index=False)
        print(f"paired differences, points\n{differences}\n")
        figures["differences"] = plots.plot_differences(outcomes, study.labels, title)
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    The code is 0 on success, 1 if a run failed or a file is damaged, missing or cannot be written, 2 if the request is
    wrong, and 130 after Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a label may hold a letter that the encoding lacks
            stream.reconfigure(errors="backslashreplace")
    arguments = _parser().parse_args(argv or ["run"])
    try:
        _run(arguments) if arguments.command == "run" else _report_all(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (S6Error, OSError) as error:  # OSError: for example, a full disk
        failed = "these runs failed, all others are complete:\n" if isinstance(error, RunsFailed) else ""
        print(f"python -m s6lib: {failed}{error}", file=sys.stderr)
        return 2 if isinstance(error, StudyError) else 1
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left for a second Ctrl-C to stop
        kept = "epoch" if getattr(arguments, "cluster", None) is None else "run"
        print(f"\nStopped. Every finished {kept} is kept: give the same command again to go on.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
