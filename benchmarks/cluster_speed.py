"""How a study grows from one worker to two, on Dask and in local processes, and what a run costs to send and fetch.

Run it where nothing else runs: python benchmarks/cluster_speed.py
"""

import pickle
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Executor, as_completed
from contextlib import contextmanager
from dataclasses import replace

from distributed import Client, LocalCluster
from loky import ProcessPoolExecutor

from s6lib.lab.launch import run_study
from s6lib.lab.run import train_run
from s6lib.lab.source import pack
from s6lib.recipes import CONTROL, PLAIN, Run

ROUNDS, RUNS = 3, 1_000
RECIPE = replace(PLAIN, epochs=1, train_images=30_000)


@contextmanager
def dask_workers(count: int) -> Iterator[Executor]:
    """So many Dask workers of one thread."""
    cluster = LocalCluster(n_workers=count, threads_per_worker=1, dashboard_address=None)
    with cluster, Client(cluster) as client:
        yield client.get_executor(pure=False)


def study_seconds(executor: Executor) -> float:
    """Four runs alike on workers that have trained before: uneven ones would measure how they are dealt out."""
    with tempfile.TemporaryDirectory() as out:
        warm = replace(RECIPE, train_images=64)
        run_study(warm, CONTROL, range(4), f"{out}/warm", device="cpu", executor=executor, show_progress=False)
        begun = time.perf_counter()
        run_study(RECIPE, CONTROL, range(4), f"{out}/study", device="cpu", executor=executor, show_progress=False)
        return time.perf_counter() - begun


def growth(workers_of: type | object) -> float:
    """The throughput of two workers over that of one."""
    seconds = []
    for count in (1, 2):
        with workers_of(count) as executor:
            seconds.append(study_seconds(executor))
    return seconds[0] / seconds[1]


def seconds_a_run() -> float:
    """The whole cost of sending 1,000 runs out and fetching them back, a run: in place of training, an unpickling."""
    run = Run(PLAIN, CONTROL, 1)
    short = replace(run, recipe=replace(PLAIN, train_images=64))
    result, futures = pickle.dumps(train_run(short)), []
    with dask_workers(2) as executor:
        list(executor.map(pickle.loads, [result] * 10))
        begun = time.perf_counter()
        for seed in range(RUNS):
            pack(replace(run, seed=seed), [])  # which the real one sends
            futures.append(executor.submit(pickle.loads, result))
        assert sum(1 for _ in as_completed(futures)) == RUNS
        return (time.perf_counter() - begun) / RUNS


if __name__ == "__main__":
    for name, workers_of in (("Dask workers", dask_workers), ("local processes", ProcessPoolExecutor)):
        ratios = [growth(workers_of) for _ in range(ROUNDS)]
        print(f"two {name} against one: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    costs = [1000 * seconds_a_run() for _ in range(ROUNDS)]
    print(f"sending and fetching: {statistics.median(costs):.1f} ms a run ({min(costs):.1f} to {max(costs):.1f})")
