"""A mini study through a real Dask scheduler and two worker processes, one of them killed in the middle."""

import os
import re
import signal
import subprocess
import sys

import pytest
from test_study import assert_same_study

from s6lib.__main__ import main
from s6lib.study import Study


@pytest.fixture
def cluster(tmp_path):
    """The address of a scheduler, and its two workers, which stay in folders of their own."""
    processes = []

    def start(*command):
        process = subprocess.Popen(
            [sys.executable, "-m", *command], stderr=subprocess.PIPE, text=True, cwd=tmp_path, start_new_session=True
        )
        processes.append(process)
        return process

    scheduler = start("distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard")
    for line in scheduler.stderr:
        if found := re.search(r"Scheduler at: +tcp://(127\.0\.0\.1:\d+)", line):
            break
    address = found[1]
    worker = ("distributed.cli.dask_worker", f"tcp://{address}", "--nthreads", "1", "--no-dashboard", "--no-nanny")
    workers = [start(*worker, "--local-directory", str(tmp_path / str(k))) for k in range(2)]
    yield address, workers
    for process in processes:
        process.kill()
        process.wait()
        process.stderr.close()


def test_a_study_on_a_cluster_equals_the_local_one_though_a_worker_is_killed(cluster, tiny_study, tmp_path):
    address, workers = cluster
    out = tmp_path / "out"
    command = [sys.executable, "-m", "s6lib", "run", "--cluster", f"dask://{address}", "--conditions", "l1-bn", "gbn"]
    command += ["--seeds", "1", "2", "--epochs", "2", "--train-images", "640", "--out", str(out), "--device", "cpu"]
    printed = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as driver:
        for line in driver.stdout:
            printed += line
            if "epoch 2/2" in line and workers[0].poll() is None:  # a run has come back; the next ones are under way
                os.kill(workers[0].pid, signal.SIGKILL)
    assert driver.returncode == 0, printed
    assert workers[0].poll() is not None
    assert_same_study(Study(out), tiny_study)
    assert not list(out.rglob("checkpoint.pt"))


@pytest.mark.parametrize("address", ["dask://nowhere", "tcp://127.0.0.1:8786", "ray://a:1", "dask://a/b:1"])
def test_another_form_of_address_is_a_wrong_request(address, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["run", "--cluster", address])
    assert stop.value.code == 2
    assert "is not of the form dask://HOST:PORT" in capsys.readouterr().err
