import gc
import io
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from filelock import FileLock
from hypothesis import settings
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from s6lib import recipes
from s6lib.data import PROJECT, load_mnist
from s6lib.lab.launch import run_study
from s6lib.lab.run import RunResult
from s6lib.recipes import CONDITIONS, PLAIN, Condition
from s6lib.study import Study

sys.path[:0] = [str(PROJECT / folder) for folder in ("notebooks", "docs", "studies")]  # whose modules are tested too
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.pop("TQDM_DISABLE", None)  # some tests follow the progress that it would switch off
# A second thread gains nothing here, and loses much beside other processes: so not here, and not in what tests start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
# A shell that starts the suite in the background has it ignore Ctrl-C, and with it the studies that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("s6lib", deadline=None, report_multiple_bugs=False)
settings.load_profile("s6lib")

# Two epochs on ten batches: seconds, and long enough for every part of a run.
TINY = replace(PLAIN, epochs=2, train_images=640)
ONCE = replace(TINY, epochs=1, train_images=64)
L1_BN, _, _, GBN, _ = CONDITIONS
DRIVER = os.getpid()


def deadly(model: torch.nn.Module) -> torch.Tensor:
    """A penalty that ends the worker which computes it, as the kernel does when memory is short."""
    if os.getpid() != DRIVER:
        os.kill(os.getpid(), signal.SIGKILL)
    return 0 * model.layers[0].weight.sum()


DEADLY = Condition("deadly", penalty=deadly)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Make warnings errors once all plugins have started: what another's plugin warns of is not for us to mend."""
    config.addinivalue_line("filterwarnings", "error")


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # or nanobind reports at the end, line by line, what is never freed


@contextmanager
def bounded(command: list[str], seconds: float = 300, **popen) -> Iterator[subprocess.Popen]:
    """A command in a session of its own, all of which is killed if it takes longer, and when the test has failed.

    So a study that hangs fails its test. Popen alone would wait for it, even after a `communicate` that timed out.
    """
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    with subprocess.Popen(command, **settings | popen) as process:
        limit = threading.Timer(seconds, os.killpg, (process.pid, signal.SIGKILL))
        limit.start()
        try:
            yield process
            process.wait()
        finally:
            limit.cancel()
            with suppress(ProcessLookupError):  # as it should be
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module", autouse=True)
def _little_to_collect():
    """Freeze torch and what is left of other modules: statsmodels collects garbage at each of Holm's corrections."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _alike():
    """Seed each test; fail one that leaves torch with more threads, which would slow down every later one."""
    torch.manual_seed(1)
    yield
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert threads == 1


@pytest.fixture(scope="session")
def mnist():
    return load_mnist()


def history_of(result: RunResult) -> pd.DataFrame:
    return pd.read_csv(io.BytesIO(result.files["history.csv"]))


@contextmanager
def evaluation_on_few_digits() -> Iterator[None]:
    """Evaluate on 500 images in this process: on all 10,000, a tiny run would spend most of its time on them."""

    def with_few_of_the_second(function):
        def parts(data):
            first, second = function(data)
            return first, second.part(slice(500))

        return parts

    with pytest.MonkeyPatch.context() as patch:
        for name in ("load_data", "hold_out"):
            patch.setattr(recipes, name, with_few_of_the_second(getattr(recipes, name)))
        recipes.load_images.cache_clear()
        yield
        recipes.load_images.cache_clear()


@pytest.fixture
def few_digits():
    with evaluation_on_few_digits():
        yield


@pytest.fixture(scope="session")
def tiny_study(tmp_path_factory):
    """A real study, not to be changed: trained by the first worker of pytest-xdist that needs it, copied by all."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with FileLock(shared / "tiny.lock"):
        run_study(TINY, (L1_BN, GBN), (1, 2), shared / "tiny", jobs=1, show_progress=False)
        return Study(shutil.copytree(shared / "tiny", base / "tiny_study"), TINY, (L1_BN, GBN), (1, 2))


@pytest.fixture
def copy(tiny_study, tmp_path):
    """A folder of runs that may be changed."""
    return shutil.copytree(tiny_study.folder, tmp_path / "copy")


def invent_run(folder: Path, accuracy: float) -> None:
    """Write what an analysis reads of a complete run whose last epoch has this accuracy, in percent."""
    folder.mkdir(parents=True)
    (folder / "history.csv").write_text(f"epoch,val_accuracy\n1,0.1\n2,{accuracy / 100}\n")
    (folder / "run.json").touch()


def commit_all(folder: Path) -> None:
    """Make a folder a git repository, and commit what it holds."""
    for command in ("init -q", "add .", "-c user.name=s6lib -c user.email=s6lib@localhost commit -q -m s6lib"):
        subprocess.run(["git", *command.split()], cwd=folder, check=True)


class Operations(TorchDispatchMode):
    """Names the operations that torch executes; counts those that compute, and those that copy to another device."""

    launched = copied = 0

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.append(operation.overloadpacket.__name__)
        result = operation(*args, **(kwargs or {}))
        devices = {one.device.type for one in tree_leaves((args, kwargs, result)) if isinstance(one, torch.Tensor)}
        self.copied += len(devices) > 1
        view = any(one.alias_info is not None and not one.alias_info.is_write for one in operation._schema.returns)
        empty = operation.name().startswith(("aten::empty", "aten::new_empty"))
        self.launched += len(devices) == 1 and not view and not empty
        return result
