"""What was asked of results/when after its runs: shares of errors, worth in data, and accuracy on clean images.

history.csv holds the training accuracy of an epoch, with rotation, dropout and the statistics of each batch in it. To
see overfitting, `python docs/few_images.py` (six minutes) scores finished networks in evaluation mode on their own
training images as they are, and writes docs/clean_accuracy.csv: a row per network, with accuracies in percent.
"""

import math
import re
from collections.abc import Iterator
from functools import cache

import numpy as np
import pandas as pd
import torch

from s6lib.data import PROJECT, load_mnist
from s6lib.preregistered import FACTORIAL_SEEDS
from s6lib.preregistered_when import SEEDS, read, read_gains
from s6lib.statistics import mean_interval
from s6lib.study import Study
from s6lib.train import evaluate

WHEN, CLEAN = PROJECT / "results" / "when", PROJECT / "docs" / "clean_accuracy.csv"
SIZES = tuple(SEEDS)  # numbers of training images
NAMES = {"rotation": "rotation", "l2": "L2", "l1": "L1", "ghosts": "ghost batches", "dropout": "dropout"}
WITH_WEIGHTS = (11, 12)  # the seeds whose weights are in results/when


@cache
def gains(size: int) -> pd.DataFrame:
    """What each regulariser gains alone, in points: one row per seed, one column each."""
    return read_gains(WHEN, size, tuple(NAMES))


@cache
def errors(size: int) -> pd.DataFrame:
    """The test images that are wrong, in percent: one row per seed, a column for nothing and each regulariser."""
    names = ("nothing", *NAMES)
    return 100 - read(WHEN, [f"{size}-{name}" for name in names], SEEDS[size]).set_axis(names, axis=1)


def share_removed(size: int, name: str) -> tuple[float, float, float]:
    """The share of errors that a regulariser removes, in percent, with its 95% interval: from paired log ratios."""
    logs = np.log(errors(size)[name] / errors(size)["nothing"])
    low, high = mean_interval(logs)
    return tuple(100 * (1 - math.exp(log)) for log in (logs.mean(), high, low))


@cache
def planned() -> dict[int, tuple[float, float]]:
    """The SD of a gain, and the gain that is found four times in five, as docs/preregistration_when.md plans them."""
    page = (PROJECT / "docs" / "preregistration_when.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\d,]+) \| ([\d.]+) \| \d+ \| ([\d.]+) points \|$", page, re.MULTILINE)
    return {int(size.replace(",", "")): (float(sd), float(finds)) for size, sd, finds in rows}


def power(size: int) -> tuple[float, float, float, float]:
    """The SD of a gain, planned and as it came out, and the gain found four times in five, by both."""
    sd, finds = planned()[size]
    found = float(gains(size).var().mean() ** 0.5)  # pooled over the regularisers
    return sd, found, finds, finds * found / sd


def recurrence(name: str) -> float:
    """How often (0 to 1) the best strength falls with size if the trials are drawn again with the planned noise."""
    trials = pd.read_csv(PROJECT / "studies" / "when_search.csv").query("name == @name and seed <= 2")
    trials["strength"] = trials["strength"].astype(float)
    rng, picks = np.random.default_rng(1), []
    for size in SIZES[:-1]:
        tried = trials[trials["size"] == size].groupby("strength")["accuracy"].agg(["mean", "count"])
        tried = tried[tried["count"] == 2]  # among which the strength was chosen
        noise = rng.normal(scale=planned()[size][0] / math.sqrt(2), size=(10_000, len(tried)))
        picks.append(tried.index.to_numpy()[(tried["mean"].to_numpy() + noise).argmax(1)])
    steps = np.diff(picks, axis=0)
    return float(((steps <= 0).all(0) & (steps < 0).any(0)).mean())


def minutes(*sizes: int) -> float:
    """How long the runs on so many images trained, one size after the other: the busier process of each, in minutes."""
    about = Study(WHEN, "when").about()
    block = about["condition"].str.extract(rf"^(\d+)-(?:{'|'.join(['nothing', *NAMES])})$")[0]
    by_process = about.groupby([block.astype(float), about["process"]])["seconds"].sum()
    return by_process.groupby(level=0).max()[list(sizes)].sum() / 60


def drawn(size: int, seed: int) -> torch.Tensor:
    """The training images that a run of results/when drew: the first draw of its seed, before epoch 1."""
    words = np.random.SeedSequence((seed, 0)).generate_state(4).tolist()
    return torch.randperm(60_000, generator=torch.Generator().manual_seed(words[1]))[:size]


def networks() -> Iterator[tuple[Study, str, int, torch.Tensor]]:
    """Study, condition, seed and training images: "nothing" on few images, then BN on all."""
    for size in SIZES:
        when = Study(WHEN, "when", [f"{size}-nothing"], WITH_WEIGHTS)
        for seed in WITH_WEIGHTS:
            yield when, f"{size}-nothing", seed, drawn(size, seed)
    plain = Study(PROJECT / "results", "plain", ["bn"], FACTORIAL_SEEDS)
    for seed in FACTORIAL_SEEDS:
        yield plain, "bn", seed, torch.arange(60_000)


def score(study: Study, condition: str, seed: int, images: torch.Tensor) -> dict[str, object]:
    """A row of the table."""
    model, (train, test) = study.model(condition, seed), load_mnist()
    row = {"condition": condition, "seed": seed, "images": len(images)}
    parts = {"train_accuracy": train.part(images), "test_accuracy": test}
    return row | {column: round(100 * evaluate(model, part)[1], 4) for column, part in parts.items()}


@cache
def clean() -> pd.DataFrame:
    """The table that this file writes, and the gap between training and test images, in points."""
    return pd.read_csv(CLEAN).assign(gap=lambda rows: rows["train_accuracy"] - rows["test_accuracy"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    pd.DataFrame([score(*network) for network in networks()]).to_csv(CLEAN, index=False)
