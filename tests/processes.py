"""Studies as real processes, for the tests that disturb them."""

import os
import re
import signal
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

from conftest import bounded

from s6lib.__main__ import main
from s6lib.study import Study

# As many tries as the README's table counts; the suite makes fewer of the slow ones.
THOROUGH = "S6LIB_THOROUGH" in os.environ
# Seed 1 of the fixture `tiny_study`: two runs, each in a process of its own.
REQUEST = ("run", "--conditions", "l1-bn", "gbn", "--seeds", "1", "--epochs", "2", "--train-images", "640")


def command(out: Path, *more: str) -> list[str]:
    """The command of a tiny study; `more` overrides its options."""
    return [sys.executable, "-m", "s6lib", *REQUEST, "--out", str(out), "--jobs", "2", "--device", "cpu", *more]


def started(out: Path, *more: str, **popen) -> AbstractContextManager[subprocess.Popen]:
    """A tiny study under way. Its pipe closes when driver and workers have all ended."""
    return bounded(command(out, *more), **popen)


def end(process: subprocess.Popen, code: int) -> str:
    """Wait for the end of all its processes; return what it printed: plain lines in a pipe, and no traceback."""
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == code, printed
    assert "Traceback" not in printed, printed
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", printed), printed
    return printed


def wait_for(text: str, process: subprocess.Popen) -> str:
    """Read what a process prints until a line holds `text`; return it all."""
    printed = ""
    while text not in printed:
        line = process.stdout.readline()
        assert line, f"ended without {text!r}: {printed}"
        printed += line
    return printed


def workers_of(process: subprocess.Popen) -> list[int]:
    """The process numbers of a driver's workers."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()[1:]]
    return [int(pid) for pid, parent, args in rows if int(parent) == process.pid and "loky" in args and "-m" in args]


def complete(out: Path) -> Study:
    """Give the same command again, undisturbed, and open what it leaves."""
    assert main([*REQUEST, "--out", str(out), "--jobs", "1", "--device", "cpu"]) == 0
    leftovers = [path for path in out.rglob("*") if path.name.endswith(".part") or path.name.startswith("checkpoint")]
    assert not leftovers
    return Study(out)


def kill(process: subprocess.Popen, whom: str) -> bool:
    """End with SIGKILL a driver, all its processes, or one of its workers; False if it has none yet."""
    if whom == "all":
        os.killpg(process.pid, signal.SIGKILL)
        return True
    victims = workers_of(process)[:1] if whom == "worker" else [process.pid]
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    return bool(victims)
