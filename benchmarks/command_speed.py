"""How long `python -m s6lib` takes, by running it: `python benchmarks/command_speed.py`.

Each round runs the command itself twice, with one epoch and with two, on all 60,000 images. The difference is an epoch
of all five runs, from which the whole command with its 25 follows.
"""

import statistics
import subprocess
import sys
import tempfile
import time

ROUNDS, EPOCHS = 3, 25


def seconds(epochs: int) -> float:
    """Of the whole command, from the start of Python to the last figure."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "s6lib", "run", "--epochs", str(epochs), "--out", out]
        begun = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True)
        return time.perf_counter() - begun


if __name__ == "__main__":
    whole = []
    for _ in range(ROUNDS):
        one, two = seconds(1), seconds(2)
        whole.append(one + (EPOCHS - 1) * (two - one))
        print(f"one epoch {one:.0f} s, two {two:.0f} s: {EPOCHS} would take {whole[-1] / 60:.0f} minutes", flush=True)
    low, high = (end(whole) / 60 for end in (min, max))
    print(f"the whole command: {statistics.median(whole) / 60:.0f} minutes ({low:.0f} to {high:.0f})")
