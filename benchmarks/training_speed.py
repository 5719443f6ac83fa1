"""How fast the study trains, as ratios within one run of this script: `python benchmarks/training_speed.py`.

Each round measures, one after the other on an idle machine: the usual recipe (a DataLoader with per-image PIL
transforms, torch's own layers, default threads), the study on all cores (or the GPU), and a run with BatchNorm and one
with GhostBatchNorm alone. It prints medians over the rounds, and the ratios with their lowest and highest.

`python benchmarks/training_speed.py transforms` measures instead, in processor time on one thread, what a recipe's
`transform` of each image costs beside the built-in augmentation and a step.
"""

import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch
import torch.nn.functional as F
from loky import cpu_count, get_reusable_executor
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, transforms
from torchvision.transforms import v2

from s6lib.data import DATA, FILL, MEAN, STD, Augmentation, batches, load_mnist
from s6lib.lab.run import train_run
from s6lib.models import Dropout, PlainNet
from s6lib.recipes import ALL_CONDITIONS, CONTROL, PLAIN, Run
from s6lib.train import train_epoch

ROUNDS = 7
IMAGES = 12_800
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
JOBS = cpu_count() if DEVICE == "cpu" else 1
SHORT = replace(PLAIN, epochs=1, train_images=IMAGES)


def usual_recipe(loader_processes: int) -> float:
    """Images a second of training as most notebooks do it."""
    augment = [transforms.RandomRotation(PLAIN.rotation, fill=(FILL,))]
    augment += [transforms.ToTensor(), transforms.Normalize((MEAN,), (STD,))]
    images = Subset(datasets.MNIST(DATA, transform=transforms.Compose(augment), download=True), range(IMAGES))
    loader = DataLoader(images, PLAIN.batch_size, shuffle=True, num_workers=loader_processes)
    model = PlainNet(dropout=PLAIN.dropout)
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, Dropout):
                setattr(parent, name, nn.Dropout(PLAIN.dropout))
    model.to(DEVICE).train()
    optimizer = torch.optim.SGD(model.parameters(), PLAIN.learning_rate, PLAIN.momentum)
    begun = time.perf_counter()
    for inputs, labels in loader:
        inputs, labels = inputs.to(DEVICE), labels.to(DEVICE)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        loss.item()
    return IMAGES / (time.perf_counter() - begun)


def one_run(slug: str) -> tuple[float, float]:
    """Images a second of a run of the study, and the peak memory of its process in GB."""
    with TemporaryDirectory() as folder:
        train_run(Run(SHORT, ALL_CONDITIONS[slug], 1), Path(folder), DEVICE)
        seconds = pd.read_csv(f"{folder}/history.csv")["seconds"].item()
    # Linux's own figure: the one of getrusage remembers the process that started this one.
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return IMAGES / seconds, int(peak[1]) / 1e6


def whole_study() -> tuple[float, float]:
    """Images a second of as many runs side by side as the study would have, and the largest peak memory in GB."""
    runs = list(get_reusable_executor(JOBS).map(one_run, [CONTROL.slug] * JOBS))
    return sum(speed for speed, _ in runs), max(memory for _, memory in runs)


def transforms_beside_a_step() -> None:
    """Print milliseconds for a batch of 64: built-in augmentation, transforms of each image, and a step."""
    torch.set_num_threads(1)
    train = load_mnist()[0].part(slice(1_280))

    def milliseconds(work: Callable[[], object]) -> float:
        work()
        times = []
        for _ in range(5):
            begun = time.process_time()  # which other processes hardly change
            work()
            times.append(1000 * (time.process_time() - begun) / 20)
        return statistics.median(times)

    print("| a batch of 64 | ms |\n|---|---|")
    for name, limits in (("rotation", Augmentation(15.0)), ("all of it", Augmentation(15.0, 0.1, 2.0, 0.1))):
        print(
            f"| built-in augmentation: {name} | {milliseconds(lambda one=limits: list(batches(train, 64, one))):.1f} |"
        )
    rotation, jitter = v2.RandomRotation(15, fill=FILL), v2.ColorJitter(0.1, 0.1)
    both = v2.Compose([rotation, jitter, v2.RandomAffine(0, (0.07, 0.07), (0.9, 1.1))])
    for transform in (v2.RandomCrop(28, padding=2), jitter, rotation, both):
        name = " ".join(type(one).__name__ for one in getattr(transform, "transforms", [transform]))
        print(f"| {name} | {milliseconds(lambda one=transform: list(batches(train, 64, transform=one))):.1f} |")
    model, parts = PlainNet().to(memory_format=PlainNet.memory_format), list(batches(train, 64))
    optimizer = torch.optim.SGD(model.parameters(), PLAIN.learning_rate, PLAIN.momentum, fused=True)
    print(f"| a step of PlainNet | {milliseconds(lambda: train_epoch(model, parts, optimizer)):.0f} |")


def spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def main() -> None:
    whole_study()  # starts the workers
    rounds = []
    for number in range(1, ROUNDS + 1):
        usual, loading = usual_recipe(0), usual_recipe(2)
        study, memory = whole_study()
        (bn, _), (gbn, _) = (get_reusable_executor(JOBS).submit(one_run, slug).result() for slug in ("bn", "gbn"))
        rounds.append((usual, loading, study, bn, gbn, memory))
        print(f"round {number} of {ROUNDS}: " + ", ".join(f"{value:.0f}" for value in rounds[-1][:-1]), flush=True)
    usual, loading, study, bn, gbn, memory = zip(*rounds, strict=True)
    print(
        f"\n{DEVICE}, {JOBS} at a time, torch {torch.__version__}; medians over {ROUNDS} rounds (lowest to highest)\n"
    )
    print("| training PlainNet | images a second | ratio |\n|---|---|---|")
    print(f"| usual recipe, DataLoader in the process | {statistics.median(usual):,.0f} | 1 |")
    for name, speeds in (("usual recipe, DataLoader with 2 processes", loading), ("the study, all cores", study)):
        ratios = [speed / base for speed, base in zip(speeds, usual, strict=True)]
        print(f"| {name} | {statistics.median(speeds):,.0f} | {spread(ratios)} |")
    print(f"\nTime of a GBN step over that of a BN step: {spread([a / b for a, b in zip(bn, gbn, strict=True)])}")
    print(f"Peak memory of a worker: {max(memory):.2f} GB")


if __name__ == "__main__":
    transforms_beside_a_step() if sys.argv[1:] == ["transforms"] else main()
