"""What may befall a study that runs: after each, the same command completes it, bit for bit as if undisturbed."""

import errno
import os
import random
import shutil
import signal
import subprocess
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from conftest import DEADLY, GBN, L1_BN, ONCE, TINY, evaluation_on_few_digits
from processes import THOROUGH, command, complete, end, kill, started, wait_for
from test_study import assert_same_study

from s6lib.errors import RunsFailed
from s6lib.lab.launch import run_study
from s6lib.study import Study


@pytest.fixture(scope="module")
def undisturbed(tiny_study):
    return Study(tiny_study.folder, seeds=(1,))


@pytest.mark.slow
def test_kill_9_in_mid_run_loses_nothing(undisturbed, tmp_path):
    with started(tmp_path, "--jobs", "1") as process:
        wait_for("epoch 1/2", process)
        kill(process, "all")
    assert list(tmp_path.rglob("checkpoint.pt"))
    assert_same_study(complete(tmp_path), undisturbed)


@pytest.mark.slow
def test_kills_at_random_moments_lose_nothing(undisturbed, tmp_path):
    moments, kills, studies = random.Random(20), 0, 1
    while kills < (100 if THOROUGH else 3):
        with started(tmp_path / str(studies)) as process:
            try:
                process.wait(moments.uniform(1, 9))
            except subprocess.TimeoutExpired:
                kills += kill(process, ("driver", "all", "worker")[kills % 3])
            printed, _ = process.communicate(timeout=120)
        assert "Traceback" not in printed, printed
        if process.returncode == 0:  # complete before the kill, or in spite of a worker's death
            assert_same_study(Study(tmp_path / str(studies)), undisturbed)
            studies += 1
    assert_same_study(complete(tmp_path / str(studies)), undisturbed)


@pytest.mark.slow
def test_a_worker_with_nothing_to_do_ends_with_its_driver(tmp_path):
    with started(tmp_path, "--conditions", "gbn", "--seeds", "1", "2", "3", "--epochs", "3") as process:
        for _ in range(2):
            wait_for("epoch 3/3", process)  # the third run trains in one of the two workers
        process.kill()
        process.communicate(timeout=30)


@pytest.mark.slow
def test_a_run_that_kills_its_worker_each_time_is_named_and_the_others_complete(undisturbed, tmp_path, capsys):
    with pytest.raises(RunsFailed, match=r"^deadly, seed 1: .*: is memory short .* fewer jobs: finished"):
        run_study(TINY, (DEADLY, L1_BN, GBN), (1,), tmp_path, jobs=2, show_progress=False)
    assert_same_study(Study(tmp_path), undisturbed)
    assert capsys.readouterr().err.count("a worker process was killed; its runs go on in a new one\n") == 3


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_stops_cleanly_and_says_how_to_go_on(undisturbed, tmp_path, times):
    with started(tmp_path) as process:
        wait_for("epoch 1/2", process)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: driver and workers
        if times == 2:
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.3)
            os.killpg(process.pid, signal.SIGINT)
        assert "give the same command again to go on" in end(process, 130)
    assert_same_study(complete(tmp_path), undisturbed)


@pytest.mark.slow
def test_an_output_folder_removed_in_mid_run(undisturbed, tmp_path):
    out = tmp_path / "out"
    with started(out) as process:
        wait_for("epoch 1/2", process)
        shutil.rmtree(out.rename(tmp_path / "removed"))  # at once: no file appears while the folder is emptied
        assert "seed 1: FileNotFoundError: " in end(process, 1)
    assert_same_study(complete(out), undisturbed)


BACKWARDS = """\
import itertools, time
moments = itertools.count(time.time(), -3600)
time.time = lambda: next(moments)
"""


@pytest.mark.slow
def test_a_clock_that_jumps_back(undisturbed, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BACKWARDS)  # Python runs it before all else
    with started(tmp_path / "out", "--jobs", "1", env={**os.environ, "PYTHONPATH": str(tmp_path)}) as process:
        end(process, 0)
    assert_same_study(Study(tmp_path / "out"), undisturbed)


# --- disks -----------------------------------------------------------------------------------------------------------


short_study = partial(run_study, replace(ONCE, epochs=2), (GBN,), (1,), jobs=1, show_progress=False)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    with evaluation_on_few_digits():
        return short_study(out=tmp_path_factory.mktemp("short"))


@pytest.mark.usefixtures("few_digits")
@pytest.mark.parametrize("nth", range(1, 9))
def test_a_disk_that_is_full_at_any_write(short, tmp_path, monkeypatch, nth):
    """Two epochs write eight files: checkpoint and history twice, then predictions, weights, history, run.json."""
    sync, written = os.fsync, []

    def full(descriptor):
        if Path(f"/proc/self/fd/{descriptor}").resolve().suffix == ".part":
            written.append(descriptor)
            if len(written) == nth:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunsFailed, match=r"GBN \(gbn\), seed 1: OSError: .*No space left on device"):
        short_study(out=tmp_path)
    assert not list(tmp_path.rglob("*.part"))
    assert not list(tmp_path.rglob("run.json"))
    assert_same_study(short_study(out=tmp_path), short)
    assert len(written) > nth


def mounted(options: str, folder: Path, script: str) -> subprocess.CompletedProcess:
    """Run a shell script with a tmpfs on `folder`, in a mount namespace of its own."""
    folder.mkdir()
    whole = f"mount -t tmpfs -o {options} none {folder} && echo mounted && {{ {script}\n}}"
    unshare = [shutil.which("unshare") or "false", "--mount", "sh", "-c", whole]
    done = subprocess.run(unshare, capture_output=True, text=True, check=False, timeout=180)
    if not done.stdout.startswith("mounted\n"):
        pytest.skip("this user may not mount a tmpfs")
    return done


@pytest.mark.slow
def test_a_real_disk_that_is_full(undisturbed, tmp_path):
    disk, out = tmp_path / "disk", tmp_path / "out"
    done = mounted("size=160k", disk, f"{' '.join(command(disk))}; echo exit code $?; cp -r {disk} {out}")
    assert "exit code 1\n" in done.stdout
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert_same_study(complete(out), undisturbed)


@pytest.mark.slow
def test_an_output_folder_that_is_read_only(tmp_path):
    disk = tmp_path / "disk"
    done = mounted("ro", disk, " ".join(command(disk)))
    assert done.returncode == 2
    assert done.stderr == f"python -m s6lib: cannot write in {disk} (Read-only file system); choose another folder\n"
