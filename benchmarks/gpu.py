"""What a GPU makes of the study, in under 13 minutes: `python -u benchmarks/gpu.py | tee LOG`, on an idle GPU.

In this order, each part in a process of its own with a time limit, printing as it goes, so that one that fails or hangs
takes none of the others with it:

    steps        kernels of a step and their time; step by step against launched whole, in both memory formats
    streams      the five conditions' recorded steps in turn, and side by side on five streams
    tests        tests/test_gpu.py
    study        the five conditions whole, by the command itself
    resume       a run by the command, killed at an epoch's end and in the middle, against one that was not

`--dry-run` goes the same way on a CPU in a minute or two, with few images and nothing recorded. Parts may be named.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch.profiler import ProfilerActivity, profile

from s6lib.data import PROJECT, batches, load_mnist
from s6lib.lab.device import reproducible
from s6lib.lab.replay import Replay
from s6lib.lab.setup import Setup, set_up
from s6lib.recipes import ALL_CONDITIONS, CONDITIONS, PLAIN, Condition, Run
from s6lib.train import Sums, add_step, evaluate

DRY = "--dry-run" in sys.argv
BEGUN = float(os.environ.setdefault("BEGUN", str(time.time())))
DEVICE = torch.device("cpu" if DRY else "cuda")
STEPS = 5 if DRY else 300
STUDY = 25 * 938  # steps of a run
SHORT = ["--epochs", "2", "--train-images", "640", "--jobs", "1", "--device", "cpu"] if DRY else []
LIMITS = {"steps": 120, "streams": 60, "tests": 240, "study": 240, "resume": 110}  # seconds, 770 in all
FORMATS = {"plain": torch.contiguous_format, "channels_last": torch.channels_last}
COMMAND = [sys.executable, "-m", "s6lib", "run"]


def say(*words: object) -> None:
    print(f"[{time.time() - BEGUN:5.1f}]", *words, flush=True)


def synchronize() -> None:
    if not DRY:
        torch.cuda.synchronize()


def milliseconds(step: Callable[[int], object], steps: int) -> float:
    """A step's time, until the GPU has done all of them."""
    synchronize()
    begun = time.perf_counter()
    for number in range(steps):
        step(number)
    synchronize()
    return 1e3 * (time.perf_counter() - begun) / steps


def new_setup(condition: Condition, memory_format: torch.memory_format = torch.contiguous_format) -> Setup:
    setup = set_up(Run(PLAIN, condition, 1), load_mnist(), DEVICE)
    setup.learner.model.train().to(memory_format=memory_format)
    return setup


def new_sums() -> Sums:
    return Sums(torch.zeros(3, device=DEVICE), torch.zeros((), dtype=torch.int64, device=DEVICE))


def new_replay(setup: Setup) -> Callable[..., None]:
    return add_step if DRY else Replay(setup.learner, setup.average, [PLAIN.learning_rate], own=False)


def tensors_of(setup: Setup) -> list[torch.Tensor]:
    momenta = [state["momentum_buffer"] for state in setup.learner.optimizer.state.values()]
    return [*setup.learner.model.state_dict().values(), *momenta]


def resident_batches(setup: Setup) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(batches(setup.train.part(slice(2048)), 64, PLAIN.augmentation, torch.Generator().manual_seed(1)))


# --- the parts -------------------------------------------------------------------------------------------------------


def steps() -> None:
    for name, memory_format in FORMATS.items():
        for condition in (ALL_CONDITIONS["bn"], ALL_CONDITIONS["l1-l2-gbn"]):
            measure_steps(condition, name, memory_format)
    setup = new_setup(ALL_CONDITIONS["bn"])
    evaluate(setup.final_model, setup.test)
    say(f"an evaluation takes {milliseconds(lambda _: evaluate(setup.final_model, setup.test), 2) / 1e3:.3f} s")


def measure_steps(condition: Condition, name: str, memory_format: torch.memory_format) -> None:
    plain, launched = (new_setup(condition, memory_format) for _ in range(2))
    resident = resident_batches(plain)
    take, sums = partial(add_step, plain.learner, new_sums()), new_sums()
    replay = partial(new_replay(launched), launched.learner, sums)

    # Dropout draws from one generator, so that each goes through all its steps by itself.
    torch.manual_seed(1)
    warm = [milliseconds(lambda number: take(*resident[number]), 1) for _ in range(3)]
    bare = milliseconds(lambda number: take(*resident[number % 32]), STEPS)
    torch.manual_seed(1)
    first = [milliseconds(lambda number: replay(*resident[number]), 1) for _ in range(3)]
    fast = milliseconds(lambda number: replay(*resident[number % 32]), STEPS)
    same = all(map(torch.equal, tensors_of(plain), tensors_of(launched)))
    say(f"{condition.slug}, {name}: {bare:.3f} ms a step, {fast:.3f} launched whole ({bare / fast:.1f} times as fast)")
    say(f"  the same bits after {STEPS + 3} steps: {same}; to watch and record took {first[1] - warm[1]:.0f} ms more")

    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (not DRY)) as profiled:
        milliseconds(lambda number: take(*resident[number]), 5)
    rows = [row for row in profiled.key_averages() if "CPU" not in str(row.device_type)]
    rows = [row for row in rows if not row.key.startswith("Optimizer")]
    count, busy = sum(row.count for row in rows) / 5, sum(row.self_device_time_total for row in rows) / 5e3
    say(f"  {count:.0f} kernels a step keep the GPU busy for {busy:.3f} ms; the longest, in microseconds a step:")
    for row in sorted(rows, key=lambda row: -row.self_device_time_total)[:6]:
        print(f"    {row.self_device_time_total / 5:7.1f} {row.count / 5:5.1f} x {row.key[:90]}", flush=True)


def streams() -> None:
    """Whether runs would gain by taking steps side by side, each on a stream and with a generator of its own."""
    if DRY:
        return say("nothing is recorded on a CPU")
    default = torch.cuda.default_generators[0]
    before, lanes = default.graphsafe_get_state(), []
    for condition in CONDITIONS:  # in torch 2.11 all graphs of one generator share its seed and offset
        stream, generator = torch.cuda.Stream(), torch.Generator(DEVICE)
        synchronize()
        default.graphsafe_set_state(generator)
        with torch.cuda.stream(stream):
            setup, sums = new_setup(condition), new_sums()
            resident, replay = resident_batches(setup), partial(new_replay(setup), setup.learner, sums)
            for batch in resident[:3]:
                replay(*batch)
        synchronize()
        default.graphsafe_set_state(before)
        lanes.append((stream, generator, replay, resident, tensors_of(setup)))
    begun = [[tensor.clone() for tensor in tensors] for *_, tensors in lanes]
    ends = []
    for name, groups in {"in turn": [[lane] for lane in lanes], "side by side": [lanes]}.items():
        for (_, generator, *_, tensors), values in zip(lanes, begun, strict=True):
            generator.manual_seed(7)
            for tensor, value in zip(tensors, values, strict=True):
                tensor.data.copy_(value)
        cost = sum(milliseconds(partial(step_of_each, group), STEPS) for group in groups)
        ends.append([tensor.clone() for *_, tensors in lanes for tensor in tensors])
        say(f"five steps {name}: {cost:.3f} ms, {cost * STUDY / 1e3:.0f} s for the steps of 25 epochs")
    say("  to the same bits:", all(map(torch.equal, *ends)))


def step_of_each(lanes: list[tuple], number: int) -> None:
    for stream, _, replay, resident, _ in lanes:
        with torch.cuda.stream(stream):
            replay(*resident[number % 32])


def tests() -> None:
    """Of a GPU; where there is none, that they are skipped."""
    subprocess.run([sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "tests/test_gpu.py"], check=False)


def study() -> None:
    with tempfile.TemporaryDirectory() as out:
        begun = time.perf_counter()
        command = [*COMMAND, "--out", out, *SHORT, *(["--conditions", "bn", "gbn"] if DRY else [])]
        status = subprocess.run(command, check=False).returncode
        say(f"the command took {time.perf_counter() - begun:.1f} s, exit code {status}")
        for history in sorted(Path(out).glob("*/*/*/history.csv")):
            rows = pd.read_csv(history)
            seconds, last = rows["seconds"], rows.iloc[-1]
            say(
                f"  {history.parents[1].name}: {len(rows)} epochs, {seconds.median():.3f} s each (first "
                f"{seconds.iloc[0]:.2f}), test accuracy {last['val_accuracy']:.4f}"
            )


def resume() -> None:
    """Kill a run when its first epoch has ended, and, gone on, in the middle of its third."""
    with tempfile.TemporaryDirectory() as folder:
        command = [*COMMAND, "--conditions", "l1-l2-gbn", *SHORT, "--epochs", "5", "--out"]
        subprocess.run([*command, f"{folder}/whole"], check=True, capture_output=True)
        for epochs, later in ((1, 0.0), (2, 0.2)):
            rows = kill(subprocess.Popen([*command, f"{folder}/killed"], stderr=subprocess.DEVNULL), epochs, later)
            say(f"killed with {rows} epochs done")
        subprocess.run([*command, f"{folder}/killed"], check=True, capture_output=True)
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


PARTS = {"steps": steps, "streams": streams, "tests": tests, "study": study, "resume": resume}


def run_part(name: str) -> None:
    if name in ("tests", "study", "resume"):  # which start processes of their own
        PARTS[name]()
        return
    with reproducible(DEVICE):
        PARTS[name]()


def main() -> None:
    os.chdir(PROJECT)
    if "--part" in sys.argv:
        run_part(sys.argv[-1])
        return
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
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    say("done")


if __name__ == "__main__":
    main()
