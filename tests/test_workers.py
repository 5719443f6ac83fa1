"""Where runs go: real Dask schedulers and workers, some of them killed, and what a driver then says."""

import io
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import cloudpickle
import pandas as pd
import pytest
import torch
from conftest import DEADLY, GBN, L1_BN, ONCE, TINY, bounded
from processes import command, end, started, wait_for
from test_study import assert_same_study

from s6lib.__main__ import main
from s6lib.errors import RunsFailed, StudyError
from s6lib.lab.launch import run_study
from s6lib.lab.record import identity
from s6lib.lab.workers import Task, _packed, dask_executor, resolve_device, train_here, train_packed
from s6lib.recipes import Condition, Run
from s6lib.study import Study


class Cluster(ExitStack):
    """A scheduler, and workers in folders of their own."""

    def __init__(self, folder):
        super().__init__()
        self.folder, self.processes = folder, []
        self.scheduler = self.start("scheduler", "--host", "127.0.0.1", "--port", "0")
        line = next(line for line in self.scheduler.stdout if "Scheduler at:" in line)
        self.address = re.search(r"tcp://(127\.0\.0\.1:\d+)", line)[1]
        self.options = ("--cluster", f"dask://{self.address}", "--seeds", "1", "2", "--jobs", "4")

    def start(self, kind, *options, python=()):
        command = [sys.executable, *(python or ("-m", f"distributed.cli.dask_{kind}")), *options, "--no-dashboard"]
        self.processes.append(self.enter_context(bounded(command, cwd=self.folder)))
        return self.processes[-1]

    def worker(self, *options, python=()):
        """A worker that has come to its scheduler."""
        place = str(self.folder / str(len(self.processes)))
        options = (f"tcp://{self.address}", "--nthreads", "1", "--local-directory", place, *options)
        worker = self.start("worker", *options, python=python)
        assert any("Registered to" in line for line in worker.stdout)
        return worker


@pytest.fixture
def cluster(tmp_path):
    with Cluster(tmp_path) as cluster:
        yield cluster
        for process in cluster.processes:
            process.kill()


@pytest.mark.slow
def test_a_study_on_a_cluster_equals_the_local_one_though_a_worker_is_killed(cluster, tiny_study, tmp_path):
    workers = [cluster.worker("--no-nanny"), cluster.worker("--no-nanny")]
    out = tmp_path / "out"
    with started(out, *cluster.options) as driver:
        wait_for("epoch 2/2", driver)  # a run has come back; the next ones are under way
        os.kill(workers[0].pid, signal.SIGKILL)
        end(driver, 0)
    study = Study(out)
    assert_same_study(study, tiny_study)
    assert driver.pid not in set(study.about()["process"])
    assert not list(out.rglob("checkpoint*.pt"))


@pytest.mark.slow
def test_one_worker_never_trains_in_the_driver_and_a_deadly_run_is_named(cluster, tiny_study, tmp_path):
    cluster.worker()  # with a nanny, which starts it again
    settings = {"jobs": 1, "device": "cpu", "show_progress": False}
    with dask_executor(f"tcp://{cluster.address}") as executor:
        with pytest.raises(RunsFailed, match=r"^deadly, seed 1: given up by the executor, KilledWorker: "):
            run_study(TINY, (DEADLY, L1_BN, GBN), (1,), tmp_path / "out", executor=executor, **settings)
        study = run_study(TINY, (L1_BN, GBN), (1, 2), tmp_path / "out", executor=executor, **settings)
    assert_same_study(study, tiny_study)
    assert os.getpid() not in set(study.about()["process"])


WITHOUT = "import sys; sys.modules['s6lib'] = None; from distributed.cli.dask_worker import main; main()"


@pytest.mark.slow
def test_a_worker_without_s6lib_is_named_with_the_remedy(cluster, tmp_path):
    cluster.worker("--no-nanny", python=("-c", WITHOUT))
    with started(tmp_path / "out", *cluster.options) as driver:
        printed = end(driver, 1)
    assert re.search(r"^python -m s6lib: worker tcp://\S+: a worker cannot import what .*: install", printed)
    assert printed.count("\n") == 1


@pytest.mark.slow
def test_a_scheduler_that_is_gone_ends_the_study_and_keeps_what_is_finished(cluster, tmp_path):
    cluster.worker("--no-nanny")
    with started(tmp_path / "out", *cluster.options) as driver:
        wait_for("3/8 epochs", driver)  # the first run has come back
        cluster.scheduler.kill()
        printed, _ = driver.communicate(timeout=120)  # with what Dask itself says of it
    assert driver.returncode == 1, printed
    assert "cancelled, perhaps because the scheduler is gone; give the same command again" in printed
    assert list(tmp_path.rglob("run.json"))


@pytest.mark.slow
def test_a_study_waits_for_workers_and_one_of_two_threads_gives_the_local_one(cluster, tiny_study, tmp_path):
    with started(tmp_path / "out", *cluster.options) as driver:
        assert driver.stdout.readline() == f"waiting for workers: none has come to tcp://{cluster.address} yet\n"
        cluster.worker("--no-nanny", "--nthreads", "2")
        end(driver, 0)
    study = Study(tmp_path / "out")
    assert_same_study(study, tiny_study)
    assert study.about()["process"].nunique() == 1


@pytest.mark.slow
def test_ctrl_c_keeps_finished_runs_and_cancels_what_was_sent(cluster, tiny_study, tmp_path):
    cluster.worker("--no-nanny")
    out = tmp_path / "out"
    with started(out, *cluster.options) as driver:
        wait_for("3/8 epochs", driver)  # the first run has come back
        driver.send_signal(signal.SIGINT)
        assert end(driver, 130).splitlines()[-1].startswith("Stopped. Every finished run is kept: give the same")
    finished = {path: path.stat().st_mtime_ns for path in out.rglob("run.json")}
    assert 1 <= len(finished) < 4
    from distributed import Client  # slow to import, so not in every worker

    with Client(f"tcp://{cluster.address}", set_as_default=False) as client:
        kept = client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks))
    assert kept == 0
    assert main(command(out, *cluster.options)[3:]) == 0
    assert_same_study(Study(out), tiny_study)
    assert all(path.stat().st_mtime_ns == written for path, written in finished.items())


@pytest.mark.usefixtures("few_digits")
def test_any_executor_takes_the_runs_so_many_at_a_time(tmp_path):
    sent, most, out = 0, 0, tmp_path / "out"

    class Counting(ThreadPoolExecutor):
        def submit(self, *arguments):
            nonlocal sent, most
            sent += 1
            most = max(most, sent - len(list(out.rglob("run.json"))))
            return super().submit(*arguments)

    with Counting(2) as executor:
        run_study(ONCE, (L1_BN, GBN), (1, 2), out, executor=executor, jobs=2, show_progress=False)
    assert sent == 4
    assert most <= 3  # one has come back and is being saved


def test_an_executor_that_is_shut_down_is_a_failure_of_each_run(tmp_path):
    executor = ThreadPoolExecutor()
    executor.shutdown()
    with pytest.raises(RunsFailed, match=r"GBN \(gbn\), seed 1: given up by the executor, .*shutdown"):
        run_study(TINY, (GBN,), (1,), tmp_path, executor=executor, show_progress=False)


def task_of(runs, folder, device="cpu"):
    entries = {run.condition.slug: identity(run) for run in runs if isinstance(run, Run)}
    return Task(runs, entries, folder / "not there", device)


def half(model):
    return 0.5 + 0 * model.layers[0].weight.sum()


@pytest.mark.slow
def test_what_is_ones_own_travels_by_value(tmp_path):
    """To a process that knows nothing of this file, and shares no disk."""
    runs = [Run(ONCE, Condition("half", penalty=half), seed) for seed in (1, 2)]
    task = tmp_path / "task"
    task.write_bytes(pickle.dumps((_packed(task_of(runs, tmp_path)), 1)))
    script = (
        "import pickle, sys; from s6lib.lab.workers import train_packed\n"
        "print(train_packed(*pickle.load(open(sys.argv[1], 'rb'))).files['history.csv'].decode())"
    )
    arguments = [sys.executable, "-c", script, str(task)]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd="/", check=True)
    assert pd.read_csv(io.StringIO(done.stdout))["penalty"].tolist() == pytest.approx([0.5])
    assert cloudpickle.list_registry_pickle_by_value() == set()
    assert not (tmp_path / "plain").exists()


def test_what_runs_share_is_pickled_and_read_once(monkeypatch, tmp_path):
    images = bytes(10**6)
    condition = Condition("own", penalty=lambda model: len(images))
    runs = [Run(ONCE, condition, seed) for seed in (1, 2, 3)]
    content = _packed(task_of(runs, tmp_path))
    assert len(content) < 1.1 * len(images)
    trained = []
    monkeypatch.setattr("s6lib.lab.workers._train", lambda run, task: trained.append(run))
    for number in range(3):
        train_packed(content, number)
    assert [run.seed for run in trained] == [1, 2, 3]
    assert trained[0].condition is trained[2].condition is not condition


@pytest.mark.parametrize("thing", [threading.Lock(), sys.stderr], ids=["a lock", "an open file"])
def test_what_cannot_be_sent_is_refused_before_training(tmp_path, thing):
    run = Run(ONCE, Condition("own", penalty=lambda model: id(thing)), 1)
    with pytest.raises(StudyError, match=r"cannot be sent to another process \(.*\): open files and .* with jobs=1$"):
        list(train_here(task_of([run, run], tmp_path), 2))


@pytest.mark.parametrize(
    ("device", "jobs", "runs", "processes"),
    [("cpu", None, 9, [3]), ("cpu", 2, 9, [2]), ("cpu", 5, 2, [2]), ("cpu", 1, 9, []), ("cuda", 5, 9, [5]),
     ("cuda", None, 9, []), ("daemon", None, 9, []), ("daemon", 5, 9, [])],
)  # fmt: skip
def test_cores_limit_the_jobs_on_a_cpu_and_a_daemon_starts_none(tmp_path, monkeypatch, device, jobs, runs, processes):
    """By default a GPU has one, this process."""
    started = []
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", device == "daemon")
    monkeypatch.setattr("s6lib.lab.workers.cpu_count", lambda: 3)
    monkeypatch.setattr("s6lib.lab.workers._pool", lambda number: started.append(number) or ThreadPoolExecutor())
    monkeypatch.setattr("s6lib.lab.workers._train", lambda run, task: "in this process")
    monkeypatch.setattr("s6lib.lab.workers.train_with", lambda pool, task, lost: ((run, "") for run in task.runs))
    trained = list(train_here(task_of(list(range(runs)), tmp_path, device.replace("daemon", "cpu")), jobs))
    assert trained == [(run, "" if processes else "in this process") for run in range(runs)]
    assert started == processes


def test_auto_is_the_cpu_where_there_is_no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto") == "cpu"
    assert resolve_device("mps") == "mps"
    with pytest.raises(StudyError, match="device 'cuda:1' is not available here; use auto or one of: cpu, mps"):
        resolve_device(torch.device("cuda", 1))
