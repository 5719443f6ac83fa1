"""How a study grows from one Dask worker to two, and what the scheduler costs at 1,000 runs.

Run it where nothing else runs: python benchmarks/cluster_speed.py
"""

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from distributed import Client, LocalCluster
from joblib import Parallel, delayed, parallel_config

from s6lib.conditions import CONDITIONS, CONTROL, PLAIN, build_model
from s6lib.run import COLUMNS, Run
from s6lib.study import run_study

ROUNDS, RUNS = 3, 1_000
RECIPE = replace(PLAIN, epochs=1)


@contextmanager
def dask_workers(count: int) -> Iterator[None]:
    """Within the block, joblib sends its work to so many Dask workers of one thread."""
    cluster = LocalCluster(n_workers=count, threads_per_worker=1, dashboard_address=None)
    with cluster, Client(cluster), parallel_config(backend="dask"):
        yield


def study_seconds(workers: int) -> float:
    """Two conditions with two seeds on so many workers, which have trained before."""
    with dask_workers(workers), tempfile.TemporaryDirectory() as out:
        warm = replace(RECIPE, epochs=1, train_images=64)
        run_study(warm, CONDITIONS[: 2 * workers], (1,), f"{out}/warm", show_progress=False)
        begun = time.perf_counter()
        run_study(RECIPE, (CONDITIONS[3], CONTROL), (1, 2), f"{out}/study", show_progress=False)
        return time.perf_counter() - begun


def finished_run() -> Run:
    """What a run of 25 epochs sends back, without the training."""
    weights = build_model(PLAIN, CONTROL).state_dict()
    history = [dict.fromkeys(COLUMNS, float(epoch)) for epoch in range(25)]
    return Run(history, weights, np.zeros(10_000, np.uint8), {"torch": torch.__version__})


def seconds_a_run() -> float:
    """The whole cost of sending 1,000 runs out and fetching them back, a run."""
    with dask_workers(2):
        parallel = Parallel(batch_size=1, return_as="generator_unordered")
        list(parallel(delayed(finished_run)() for _ in range(10)))
        begun = time.perf_counter()
        assert sum(1 for _ in parallel(delayed(finished_run)() for _ in range(RUNS))) == RUNS
        return (time.perf_counter() - begun) / RUNS


if __name__ == "__main__":
    ratios = [study_seconds(1) / study_seconds(2) for _ in range(ROUNDS)]
    print(f"two workers against one: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"scheduler: {1000 * seconds_a_run():.0f} ms a run, over {RUNS:,} runs")
