"""Workers that train runs: this process, processes on this machine, or any concurrent.futures.Executor."""

import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, CancelledError, Executor, Future, wait
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from loky import ProcessPoolExecutor, cpu_count

from s6lib.errors import RunError, S6Error, StudyError
from s6lib.lab.device import CPU, reproducible
from s6lib.lab.record import has_user_code
from s6lib.lab.run import RunResult, train_run
from s6lib.lab.source import pack
from s6lib.lab.trial import first_steps
from s6lib.recipes import Run, load_images

Outcome = RunResult | str  # of a run: its result, or the reason why it failed
TRIES = 4  # of a run whose worker is killed, since one may be killed by chance
_LACKS_MODULE = (
    "a worker cannot import what the run needs ({}): install it there; for s6lib, run `pip install -r "
    "requirements.txt` in a clone"
)


class Task(NamedTuple):
    """What a worker is sent: the runs of a study, one of which it trains.

    entries: the identity of one run of each condition, by slug.
    token: a file in the study's folder. A worker that sees it shares the disk, and writes checkpoints to the folder.
    device: the name of the device to train on.
    """

    runs: list[Run]
    entries: dict[str, dict[str, Any]]
    token: Path
    device: str


_SENT: dict[bytes, Task] = {}  # the originals of what this process has packed
_unpack = lru_cache(maxsize=1)(pickle.loads)  # once for all runs of a study


def resolve_device(device: str | torch.device) -> str:
    """Return the name of a device; "auto" is CUDA where there is one, else the CPU.

    Raises StudyError if this machine lacks the device.
    """
    gpus = ["cuda", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    gpus = gpus if torch.cuda.is_available() else []
    name = str(device) if device != "auto" else (*gpus, "cpu")[0]
    usable = ["cpu", *["mps"] * torch.backends.mps.is_available(), *gpus]
    if name not in usable:
        raise StudyError(f"device {name!r} is not available here; use auto or one of: {', '.join(usable)}")
    return name


def train_here(task: Task, jobs: int | None = None) -> Iterator[tuple[Run, Outcome]]:
    """Train runs on this machine, and yield each with its outcome as it ends.

    On a CPU, `jobs` processes of one thread each run in parallel: by default, and at most, one per core. On a GPU, with
    one job, or in a daemon, which may not start processes, the runs take turns in this process. A new pool replaces one
    that loses a worker.

    Raises StudyError if the user's code cannot be sent to other processes.
    """
    cores = cpu_count() if task.device == "cpu" else jobs or 1
    jobs = 1 if multiprocessing.current_process().daemon else min(jobs or cores, cores)
    runs, tries = task.runs, TRIES
    if jobs == 1:
        yield from ((run, _train(run, task)) for run in runs)
        return
    while runs:
        tries, lost = tries - 1, list[Run]()
        # In the last try in a pool each, so that a run that kills its worker stops no other run.
        for part in [runs] if tries else [[run] for run in runs]:
            with _pool(min(jobs, len(part))) as pool:
                yield from train_with(pool, task._replace(runs=part), lost=lost if tries else None)
        if lost:
            print("a worker process was killed; its runs go on in a new one", file=sys.stderr, flush=True)
        runs = lost


def train_with(
    executor: Executor, task: Task, jobs: int | None = None, lost: list[Run] | None = None
) -> Iterator[tuple[Run, Outcome]]:
    """Train runs in an executor, `jobs` at a time (by default all), and yield each with its outcome.

    A run whose worker was killed is added to `lost` instead, if that is given.

    Raises StudyError if the user's code cannot be sent to a worker.
    """
    content = _packed(task)
    _SENT[content] = task
    todo, pending = iter(enumerate(task.runs)), dict[Future, Run]()
    try:
        while True:
            for number, run in islice(todo, None if jobs is None else jobs - len(pending)):
                try:
                    future = executor.submit(train_packed, content, number)
                except RuntimeError as error:  # the pool has died, or was shut down
                    future = Future()
                    future.set_exception(error)
                pending[future] = run
            if not pending:
                return
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                run = pending.pop(future)
                if lost is not None and isinstance(future.exception(), BrokenExecutor):
                    lost.append(run)
                else:
                    yield run, _outcome(run, future)
    finally:
        for future in pending:  # for example, after Ctrl-C
            future.cancel()
        _SENT.pop(content, None)


def _packed(task: Task) -> bytes:
    """Pickle runs, and what they share, such as images that a function sees, once. Raises StudyError if it cannot."""
    parts = [part for run in task.runs for part in (*vars(run.recipe).values(), *run.parts.values())]
    try:
        return pack(task, parts)
    except Exception as error:  # whatever the user's objects raise
        raise StudyError(
            f"your code cannot be sent to another process ({error}): open files and make locks inside the function "
            "that uses them, or train in this process, with jobs=1"
        ) from None


def _outcome(run: Run, future: Future) -> Outcome:
    """Return the outcome of a run, whose future is done; an executor's error becomes a reason."""
    try:
        return future.result()
    except ModuleNotFoundError as error:
        return f"{run}: {_LACKS_MODULE.format(error)}"
    except CancelledError:
        return f"{run}: cancelled, perhaps because the scheduler is gone; give the same command again to go on"
    except BrokenExecutor:
        return (
            f"{run}: its worker was killed: is memory short (a worker needs about 1 GB)? Give the same command again, "
            "with fewer jobs: finished epochs are kept if the worker sees the study's folder"
        )
    except Exception as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        return f"{run}: given up by the executor, {type(error).__name__}: {reason}"


def train_packed(content: bytes, number: int) -> Outcome:
    """Train one of a study's packed runs in whatever process or thread an executor calls this.

    In the process that packed the runs, train the original: unpickling it there would redefine the user's classes.
    """
    task = _SENT.get(content) or _unpack(content)
    return _train(task.runs[number], task)


def _train(run: Run, task: Task) -> Outcome:
    """Train a run; return the reason if it fails, since an exception would look like the executor's.

    Checkpoints go to the run's folder if this process sees the study's. Without them, a lost run starts from epoch 1.
    """
    try:
        folder = run.folder(task.token.parent) if task.token.exists() else None
        entry = {**task.entries[run.condition.slug], "seed": run.seed}
        if has_user_code(run):
            with reproducible(CPU):  # a function that gives the data may draw
                entry["first_steps"] = first_steps(run, load_images(run.recipe.data, run.recipe.held_out))
        return train_run(run, folder, resolve_device(task.device), entry)
    except Exception as error:
        message = str(error) if isinstance(error, S6Error) else f"{type(error).__name__}: {error}"
    return message if message.startswith(str(run)) else f"{run}: {message}"


@contextmanager
def _pool(jobs: int) -> Iterator[Executor]:
    """Start worker processes, which end with this process; if the block is left early, they end at once."""
    pool = ProcessPoolExecutor(jobs, initializer=_follow, initargs=(os.getpid(),))
    try:
        yield pool
    except BaseException:
        pool.shutdown(kill_workers=True)
        raise
    pool.shutdown()


def _follow(driver: int) -> None:
    """Make a worker process ignore Ctrl-C, which the driver handles, and end when the driver is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == driver:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def dask_executor(scheduler: str) -> Iterator[Executor]:
    """Open the executor of a Dask scheduler, tcp://HOST:PORT; it retries a run whose worker is lost.

    Raises StudyError if Dask is not installed or no scheduler answers, and RunError if a worker cannot import s6lib.
    """
    try:
        from distributed import Client
    except ImportError:
        raise StudyError('a cluster needs Dask: pip install "s6lib[cluster]"') from None
    try:
        client = Client(scheduler, set_as_default=False)
    except OSError as error:
        raise StudyError(f"no Dask scheduler answers at {scheduler}: {error}") from None
    # Each failed run reports its reason in one line; Dask would add pages.
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    with client:
        answers = client.run(import_module, "s6lib.lab.workers", on_error="return")
        for address, answer in answers.items():
            if isinstance(answer, ModuleNotFoundError):
                raise RunError(f"worker {address}: {_LACKS_MODULE.format(answer)}")
        if not answers:
            print(f"waiting for workers: none has come to {scheduler} yet", file=sys.stderr, flush=True)
        yield client.get_executor(pure=False, retries=TRIES - 1)
