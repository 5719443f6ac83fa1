"""Where runs go: this process, processes of this machine, or any concurrent.futures.Executor."""

import ctypes
import logging
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, CancelledError, Executor, Future, wait
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from uuid import uuid4

import cloudpickle
import torch
from loky import ProcessPoolExecutor, cpu_count

from s6lib.errors import RunError, S6Error, StudyError
from s6lib.lab.record import is_library
from s6lib.lab.run import Trained, train_run
from s6lib.recipes import Run

POOLS = 3  # one worker may die by chance; who loses this many has too little memory
WORKERS_DIE = (
    "worker processes were killed again and again: is memory short (a worker needs about 1 GB)? Every finished epoch "
    "is kept: give the same command again, with fewer jobs"
)
_PACKED_HERE: dict[str, Run] = {}  # the runs that this process has sent out
LACKS_S6LIB = "a worker cannot import s6lib ({error}): install it there, `pip install -r requirements.txt` in a clone"


class Order(NamedTuple):
    """How runs are trained.

    out: the folder of the study. `token` is the name of a file in it: a worker that sees the file shares the disk, and
    keeps checkpoints there.
    """

    out: Path
    token: str
    device: str
    jobs: int | None


def resolve_device(device: str | torch.device) -> str:
    """The device asked for; "auto" is CUDA where there is one, else the CPU. Raises StudyError if it is not here."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    usable = ["cpu", *(["mps"] if torch.backends.mps.is_available() else [])]
    if torch.cuda.is_available():
        usable += ["cuda", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    if str(device) not in usable:
        raise StudyError(f"device {str(device)!r} is not available here; use auto or one of: {', '.join(usable)}")
    return str(device)


def train_here(runs: list[Run], order: Order) -> Iterator[tuple[Run, Trained | str]]:
    """Train runs on this machine, and yield each as it ends, with what it left, or why it failed.

    `order.jobs` processes work side by side, by default and at most one a core, each with one thread; on a GPU, or with
    one job, the runs take turns in this process. A pool that loses a worker is replaced by a new one.
    """
    jobs = min(order.jobs or (cpu_count() if order.device == "cpu" else 1), cpu_count())
    if jobs == 1:
        yield from ((run, _train(run, order)) for run in runs)
        return
    waiting, alone = list(runs), order._replace(jobs=None)
    for _ in range(POOLS):
        lost = []
        with _pool(min(jobs, len(waiting) or 1)) as pool:
            for run, trained in _trained(pool, waiting, alone):
                if isinstance(trained, BrokenExecutor):
                    lost.append(run)
                else:
                    yield run, _said(run, trained)
        if not lost:
            return
        waiting = lost
        print("a worker process was killed; its runs go on in a new one", file=sys.stderr, flush=True)
    for run in waiting:  # each in a pool of its own, so that one that kills its worker takes no other with it
        with _pool(1) as pool:
            for _, trained in _trained(pool, [run], alone):
                yield run, f"{run}: {WORKERS_DIE}" if isinstance(trained, BrokenExecutor) else _said(run, trained)


def train_with(executor: Executor, runs: list[Run], order: Order) -> Iterator[tuple[Run, Trained | str]]:
    """Train runs wherever an executor takes them, `order.jobs` at a time, by default all, and yield each likewise."""
    for run, trained in _trained(executor, runs, order):
        yield run, _said(run, trained)


def _trained(executor: Executor, runs: list[Run], order: Order) -> Iterator[tuple[Run, Trained | str | BaseException]]:
    """Each run as it ends, with what it left, why it failed, or the error of the executor that lost it."""
    todo, pending = iter(runs), {}
    try:
        while True:
            for run in todo:
                pending[_submitted(executor, run, order)] = run
                if len(pending) == order.jobs:
                    break
            if not pending:
                return
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                yield pending.pop(future), _outcome(future)
    finally:
        for future in pending:  # after Ctrl-C, say
            future.cancel()


def _submitted(executor: Executor, run: Run, order: Order) -> Future:
    key = uuid4().hex
    _PACKED_HERE[key] = run
    try:
        future = executor.submit(train_packed, key, packed(run), order)
        future.add_done_callback(lambda _: _PACKED_HERE.pop(key, None))
    except (BrokenExecutor, RuntimeError) as error:  # the pool has died, or was shut down
        future = Future()
        future.set_exception(error if isinstance(error, BrokenExecutor) else BrokenExecutor(str(error)))
    return future


def _outcome(future: Future) -> Trained | str | BaseException:
    try:
        return future.result()
    except (Exception, CancelledError) as error:
        return error


def _said(run: Run, trained: Trained | str | BaseException) -> Trained | str:
    if not isinstance(trained, BaseException):
        return trained
    if isinstance(trained, ModuleNotFoundError):
        return f"{run}: {LACKS_S6LIB.format(error=trained)}"
    if isinstance(trained, CancelledError):
        return f"{run}: cancelled, perhaps since the scheduler is gone; give the same command again to go on"
    reason = (str(trained).splitlines() or ["no reason given"])[0]
    return f"{run}: given up by the executor, {type(trained).__name__}: {reason}"


def packed(run: Run) -> bytes:
    """A run as bytes that any process with s6lib can unpickle: what is the user's, in a file or a cell, travels too."""
    own = [run.condition.norm, run.condition.penalty, *vars(run.recipe).values(), *run.condition.changes.values()]
    modules = {sys.modules.get(_module_of(thing)) for thing in own if callable(thing) and not is_library(thing)}
    by_value = {module for module in modules if module is not None and not _is_installed(module)}
    for module in by_value:
        cloudpickle.register_pickle_by_value(module)
    try:
        return cloudpickle.dumps(run)
    finally:
        for module in by_value:
            cloudpickle.unregister_pickle_by_value(module)


def _module_of(thing: Any) -> str:
    while isinstance(thing, partial):
        thing = thing.func
    return getattr(thing, "__module__", None) or type(thing).__module__


def _is_installed(module: ModuleType) -> bool:
    """Whether a worker can be expected to import a module: Python's own, __main__, or an installed package's."""
    file = getattr(module, "__file__", None) or ""
    package = module.__name__.partition(".")[0]
    return package in sys.stdlib_module_names or "site-packages" in file or "dist-packages" in file


def train_packed(key: str, content: bytes, order: Order) -> Trained | str:
    """Train a run wherever this is called: in a thread of this process the run itself, elsewhere its unpickled copy.

    To unpickle a run in the process that packed it would rewrite the user's classes there.
    """
    return _train(_PACKED_HERE.get(key) or pickle.loads(content), order)


def _train(run: Run, order: Order) -> Trained | str:
    """A run, or the reason why it failed: an exception would be taken for the executor's own.

    It keeps its checkpoints in its folder if this process sees the study's; elsewhere a run that is lost starts anew.
    """
    try:
        folder = run.folder(order.out) if (order.out / order.token).exists() else None
        return train_run(run, folder, resolve_device(order.device))
    except S6Error as error:
        message = str(error)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    return message if message.startswith(str(run)) else f"{run}: {message}"


@contextmanager
def _pool(jobs: int) -> Iterator[Executor]:
    """Worker processes that end with this one; when the block is left early, they end at once."""
    pool = ProcessPoolExecutor(jobs, initializer=_follow, initargs=(os.getpid(),))
    finished = False
    try:
        yield pool
        finished = True
    finally:
        pool.shutdown(wait=True, kill_workers=not finished)


def _follow(driver: int) -> None:
    """From now on, in a worker process: leave Ctrl-C to the driver, and end when the driver is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        _wait_for_the_end_of(driver)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _wait_for_the_end_of(parent: int) -> None:
    if sys.platform == "win32":  # where a process goes on naming a parent that is gone
        synchronize, forever = 0x00100000, -1  # of winnt.h and winbase.h
        kernel = ctypes.windll.kernel32
        kernel.WaitForSingleObject(kernel.OpenProcess(synchronize, False, parent), forever)
        return
    while os.getppid() == parent:
        time.sleep(1)


@contextmanager
def dask_executor(scheduler: str) -> Iterator[Executor]:
    """The executor of a Dask scheduler, tcp://HOST:PORT; a run that is lost with its worker is sent out again.

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
    # Of what goes wrong the runs tell, in a line each; Dask tells it in pages.
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    with client:
        workers = list(client.nthreads())
        tries = [
            client.submit(import_module, "s6lib.lab.workers", workers=[address], pure=False) for address in workers
        ]
        for address, tried in zip(workers, tries, strict=True):
            if isinstance(failure := tried.exception(), ModuleNotFoundError):
                raise RunError(f"worker {address}: {LACKS_S6LIB.format(error=failure)}")
        if not workers:
            print(f"waiting for workers: none has come to {scheduler} yet", file=sys.stderr, flush=True)
        yield client.get_executor(pure=False, retries=POOLS)
