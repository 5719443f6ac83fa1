"""What a GPU makes of the study, in two calls of at most 10 minutes each, on an idle GPU:

    python -u benchmarks/gpu.py steps streams tests profile 2>&1 | tee -a LOG
    python -u benchmarks/gpu.py study resume notebooks 2>&1 | tee -a LOG

Each part is a process of its own with a time limit, and prints as it goes, so that one that fails or hangs takes none
of the others with it:

    steps        time of a step: step by step against launched whole, in both memory formats
    streams      the five conditions' recorded steps in turn, and side by side on five streams
    tests        tests/test_gpu.py
    profile      the kernels of a step
    study        the five conditions whole, by the command itself, and whether they agree with the published runs
    resume       a run by the command, killed at an epoch's end and in the middle, against one that was not
    notebooks    the real use: 03 in "quick", 06 and 07

`--dry-run` goes the same way on a CPU in a few minutes, with few images and nothing recorded. Where s6lib is not
installed, set PYTHONPATH=. before these commands.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path

import pandas as pd
import torch

from s6lib.data import PROJECT, load_mnist
from s6lib.lab.device import reproducible
from s6lib.lab.replay import Recorder
from s6lib.lab.run import Setup, set_up
from s6lib.recipes import ALL_CONDITIONS, CONDITIONS, PLAIN, Condition, Run
from s6lib.study import Study
from s6lib.train import evaluate, train_epoch

DRY = "--dry-run" in sys.argv
BEGUN = float(os.environ.setdefault("BEGUN", str(time.time())))
DEVICE = torch.device("cpu" if DRY else "cuda")
STEPS = 5 if DRY else 300
STUDY = 25 * 938  # steps of a run
SHORT = ["--epochs", "2", "--train-images", "640", "--jobs", "1", "--device", "cpu"] if DRY else []
# In seconds, less than ten minutes for each of the two calls.
LIMITS = {"steps": 180, "streams": 60, "tests": 240, "profile": 60, "study": 220, "resume": 100, "notebooks": 220}
FORMATS = {"plain": torch.contiguous_format, "channels_last": torch.channels_last}
COMMAND = [sys.executable, "-m", "s6lib", "run"]


def say(*words: object) -> None:
    print(f"[{time.time() - BEGUN:5.1f}]", *words, flush=True)


def synchronize() -> None:
    if not DRY:
        torch.cuda.synchronize()


def new_setup(condition: Condition, memory_format: torch.memory_format = torch.contiguous_format) -> Setup:
    setup = set_up(Run(PLAIN, condition, 1), load_mnist(), DEVICE)
    setup.model.train().to(memory_format=memory_format)
    return setup


def timed(setup: Setup, condition: Condition, record: bool, at_start: Callable[[], object] = lambda: None) -> float:
    """Milliseconds of a step, until the GPU has done all of them, after three that are not counted."""
    part = setup._replace(train=setup.train.part(slice(2048)))
    resident, times = list(part.batches(1, torch.Generator().manual_seed(1))), []

    def source() -> Iterator:
        for number in range(3 + STEPS):
            if number == 3:
                at_start()
                synchronize()
                times.append(time.perf_counter())
            yield resident[number % len(resident)]
        synchronize()
        times.append(time.perf_counter())

    watch = Recorder(DEVICE).record if record and not DRY else iter
    torch.manual_seed(1)
    train_epoch(setup.model, watch(source()), setup.optimizer, setup.loss, condition.penalty_of)
    return 1e3 * (times[1] - times[0]) / STEPS


def tensors_of(setup: Setup) -> list[torch.Tensor]:
    momenta = [state["momentum_buffer"] for state in setup.optimizer.state.values()]
    return [*setup.model.state_dict().values(), *momenta]


# --- the parts -------------------------------------------------------------------------------------------------------


def steps() -> None:
    for name, memory_format in FORMATS.items():
        for condition in (ALL_CONDITIONS["bn"], ALL_CONDITIONS["l1-l2-gbn"]):
            plain, launched = (new_setup(condition, memory_format) for _ in range(2))
            bare, fast = timed(plain, condition, False), timed(launched, condition, True)
            same = all(map(torch.equal, tensors_of(plain), tensors_of(launched)))
            say(f"{condition.slug}, {name}: {bare:.3f} ms a step; launched whole {fast:.3f}")
            say(f"  {bare / fast:.1f} times as fast, {fast * 0.938:.2f} s an epoch; the same bits: {same}")
    setup = new_setup(ALL_CONDITIONS["bn"])
    for _ in range(3):
        begun = time.perf_counter()
        evaluate(setup.final_model, setup.test)
        say(f"an evaluation takes {time.perf_counter() - begun:.3f} s")


def streams() -> None:
    """Whether runs would gain by taking steps side by side, in a thread and on a stream each."""
    if DRY:
        return say("nothing is recorded on a CPU")
    alone, together, times = threading.Lock(), threading.Barrier(len(CONDITIONS)), {}

    def start() -> None:
        alone.release()
        together.wait(timeout=50)

    def lane(condition: Condition) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            alone.acquire()  # a recording must be alone
            times[condition.slug] = timed(new_setup(condition), condition, True, start)

    in_turn = sum(timed(new_setup(condition), condition, True) for condition in CONDITIONS)
    threads = [threading.Thread(target=lane, args=[condition]) for condition in CONDITIONS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, cost in {"in turn": in_turn, "side by side": max(times.values())}.items():
        say(f"five steps {name}: {cost:.3f} ms, {cost * STUDY / 1e3:.0f} s for the steps of 25 epochs")


def tests() -> None:
    """Of a GPU; where there is none, that they are skipped."""
    subprocess.run([sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "tests/test_gpu.py"], check=False)


def profile() -> None:
    """In a process that times nothing: what the profiler attaches to stays slower."""
    for slug in ("bn", "l1-l2-gbn"):
        setup, condition = new_setup(ALL_CONDITIONS[slug]), ALL_CONDITIONS[slug]
        timed(setup, condition, False)
        with torch.profiler.profile(activities=None if DRY else [torch.profiler.ProfilerActivity.CUDA]) as profiled:
            timed(setup, condition, False)
        rows = [row for row in profiled.key_averages() if DRY or "CPU" not in str(row.device_type)]
        rows, count = [row for row in rows if not row.key.startswith("Optimizer")], 3 + STEPS
        busy = sum(row.self_device_time_total for row in rows) / count / 1e3
        say(f"{slug}: {sum(row.count for row in rows) / count:.0f} kernels a step keep the GPU busy for {busy:.3f} ms;")
        for row in sorted(rows, key=lambda row: -row.self_device_time_total)[:6]:
            say(f"  {row.self_device_time_total / count:7.1f} microseconds, {row.count / count:5.1f} x {row.key[:80]}")


def study() -> None:
    """The whole command, which prints each epoch; then how far its accuracies are from the published ones."""
    with tempfile.TemporaryDirectory() as out:
        begun = time.perf_counter()
        command = [*COMMAND, "--out", out, *SHORT, *(["--conditions", "bn", "gbn"] if DRY else [])]
        status = subprocess.run(command, check=False).returncode
        say(f"the command took {time.perf_counter() - begun:.1f} s, exit code {status}")
        published = Study(PROJECT / "results", "plain").summary().groupby("condition")["test_accuracy"]
        for row in Study(out).summary().itertuples():
            mean, sd = published.mean()[row.condition], published.std()[row.condition]
            distance = abs(row.test_accuracy - mean) / sd
            say(f"  {row.condition}: {row.seconds:.1f} s, test accuracy {row.test_accuracy:.2%}")
            say(f"    {distance:.1f} SD from the mean of the published seeds, {mean:.2%} (SD {sd:.2%})")


def resume() -> None:
    """Kill a run when its first epoch has ended, and, gone on, in the middle of its third."""
    with tempfile.TemporaryDirectory() as folder:
        command = [*COMMAND, "--conditions", "l1-l2-gbn", *SHORT, "--epochs", "5", "--out"]
        subprocess.run([*command, f"{folder}/whole"], check=True)
        for epochs, later in ((1, 0.0), (2, 0.2)):
            rows = kill(subprocess.Popen([*command, f"{folder}/killed"]), epochs, later)
            say(f"killed with {rows} epochs done")
        subprocess.run([*command, f"{folder}/killed"], check=True)
        whole, killed = (next(Path(folder, name).glob("*/*/seed-1")) for name in ("whole", "killed"))
        equal = (whole / "weights.pt").read_bytes() == (killed / "weights.pt").read_bytes()
        histories = [pd.read_csv(run / "history.csv").drop(columns="seconds") for run in (whole, killed)]
        say(f"the same weights: {equal}; the same history: {histories[0].equals(histories[1])}")


def kill(process: subprocess.Popen, epochs: int, later: float) -> int:
    """Kill a command once its run has so many epochs, or a moment later; how many it then has."""
    out = Path(process.args[-1])

    def done() -> int:
        files = list(out.glob("*/*/*/history.csv"))
        return len(files[0].read_text().splitlines()) - 1 if files else 0

    while done() < epochs and process.poll() is None:
        time.sleep(0.005)
    time.sleep(later)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return done()


def notebooks() -> None:
    """Run them in a copy of the project, where no run is there already."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("notebooks", "s6lib"):
            shutil.copytree(PROJECT / name, Path(folder, name))
        for name in ("results", "data", "studies", "pyproject.toml"):
            Path(folder, name).symlink_to(PROJECT / name)
        environment = {**os.environ, "PYTHONPATH": folder}
        third = Path(folder, "notebooks", "03_study.ipynb")
        third.write_text(third.read_text().replace('MODE = \\"open\\"', 'MODE = \\"quick\\"'))
        for name in ("07_your_own.ipynb",) if DRY else ("03_study.ipynb", "06_when.ipynb", "07_your_own.ipynb"):
            begun = time.perf_counter()
            command = [sys.executable, "execute.py", name]
            status = subprocess.run(command, cwd=third.parent, env=environment, check=False).returncode
            say(f"{name} took {time.perf_counter() - begun:.1f} s, exit code {status}")


PARTS = {part.__name__: part for part in (steps, streams, tests, profile, study, resume, notebooks)}


def main() -> None:
    os.chdir(PROJECT)
    if "--part" in sys.argv:
        with reproducible(DEVICE) if sys.argv[-1] in ("steps", "streams", "profile") else nullcontext():
            return PARTS[sys.argv[-1]]()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # with its children
    about = "no GPU: a dry run" if DRY else f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    say(f"{about}; torch {torch.__version__}, Python {sys.version.split()[0]}, {os.cpu_count()} cores")
    for name in [argument for argument in sys.argv[1:] if argument in PARTS] or PARTS:
        say(f"--- {name}, {LIMITS[name]} s at most")
        command = [sys.executable, "-u", __file__, *(["--dry-run"] if DRY else []), "--part", name]
        process = subprocess.Popen(command, start_new_session=True)
        try:
            process.wait(LIMITS[name])
        except subprocess.TimeoutExpired:
            say(f"{name} has taken {LIMITS[name]} s and is ended")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    say("done")


if __name__ == "__main__":
    main()
