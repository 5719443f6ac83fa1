"""Long work, and how it shows in a terminal (in a pipe: see `end` in processes.py; in Jupyter: see test_errors.py)."""

import os
import re
import struct
import subprocess
import sys

import pytest
from processes import THOROUGH, end, started, wait_for, workers_of

from s6lib.study import Study

pytestmark = pytest.mark.slow


def open_files(process: subprocess.Popen) -> list[int]:
    """How many files the driver and each of its workers hold open."""
    return [len(os.listdir(f"/proc/{pid}/fd")) for pid in (process.pid, *sorted(workers_of(process)))]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc")
def test_many_runs_leave_no_open_files_and_no_process(tmp_path):
    runs = 200 if THOROUGH else 6
    seeds = [str(seed) for seed in range(1, runs + 1)]
    options = ("--conditions", "gbn", "--seeds", *seeds, "--epochs", "1", "--train-images", "64")
    with started(tmp_path, *options) as process:
        wait_for(f" {runs // 3}/{runs} epochs", process)
        early = open_files(process)
        wait_for(f" {runs - 2}/{runs} epochs", process)
        late = open_files(process)
        end(process, 0)  # the pipe has closed: no process is left that holds it
    assert len(late) == len(early) == 3
    assert all(after <= before + 2 for before, after in zip(early, late, strict=True))
    assert len(Study(tmp_path).runs) == runs


def test_in_a_terminal_progress_is_bars(tmp_path):
    pty, fcntl, termios = (pytest.importorskip(name) for name in ("pty", "fcntl", "termios"))
    terminal, end_of_process = pty.openpty()
    size = struct.pack("HHHH", 24, 120, 0, 0)  # rows and columns
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, size)
    with started(tmp_path, "--conditions", "gbn", stdout=end_of_process, stderr=end_of_process) as process:
        os.close(end_of_process)
        printed = b""
        try:
            while part := os.read(terminal, 4096):
                printed += part
        except OSError:  # Linux ends a terminal so
            pass
    os.close(terminal)
    assert process.returncode == 0
    shown = printed.decode()
    assert "\r" in shown
    assert re.search(r"all runs: 100%\|█+\| 2/2", shown)
    assert re.search(r"GBN \(gbn\), seed 1: .*accuracy \d\d\.\d\d%", shown)
    assert "Traceback" not in shown


PEAKS = """\
import resource
from dataclasses import replace
import s6lib.lab.run
from s6lib.recipes import CONDITIONS, PLAIN
from s6lib.data import load_mnist
train, test = load_mnist()
test = test.part(slice(1000))
s6lib.lab.run.load_images = lambda *data: (train, test)
peaks, evaluate = [], s6lib.lab.run.evaluate
def spied(*arguments):
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return evaluate(*arguments)
s6lib.lab.run.evaluate = spied
s6lib.lab.run.train_run(s6lib.lab.run.Run(replace(PLAIN, train_images=640), CONDITIONS[0], 1))
print(peaks[5], peaks[-1])
"""


def test_the_memory_of_a_run_does_not_grow():
    """Its peak after 25 epochs is that after 5, to 1%: keeping the graph of one step an epoch would add more."""
    pytest.importorskip("resource")
    done = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True)
    after_5, after_25 = map(int, done.stdout.split())
    assert after_25 <= 1.01 * after_5
