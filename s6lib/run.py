"""One run: a condition trained with a seed, its checkpoints, and the folder that it leaves."""

import ctypes
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torchvision
from torch import Tensor, nn

from s6lib.conditions import Condition, Recipe, build_model
from s6lib.data import Split, batches, load_mnist
from s6lib.files import read_checkpoint, remove_parts, serialised, write_checkpoint, write_results, write_whole
from s6lib.train import NonFiniteLoss, evaluate, train_epoch

History = list[dict[str, float]]
# A process trains one run at a time: torch's generator and number of threads are the process's own.
_ONE_RUN = threading.Lock()
COLUMNS = ("epoch", "lr", "train_loss", "train_accuracy", "penalty", "val_loss", "val_accuracy", "seconds")


class RunError(Exception):
    """A run that cannot go on; the message names condition, seed, and the cause."""


class Run(NamedTuple):
    """What training leaves.

    history: a row an epoch, with the keys COLUMNS; accuracies from 0 to 1, seconds of training alone.
    weights: the state_dict, on the CPU.
    predictions: uint8 (10000,), the class of each test image.
    machine: device, processor and library versions.
    """

    history: History
    weights: dict[str, Tensor]
    predictions: np.ndarray
    machine: dict[str, str]


def train_run(
    recipe: Recipe,
    condition: Condition,
    seed: int,
    folder: Path | None = None,
    device: str = "cpu",
) -> Run:
    """Train one condition with one seed; with a `folder`, go on from its checkpoint and renew it at each epoch's end.

    All that is random comes from (seed, epoch) alone, so a run that was stopped ends bit for bit like one that was
    not. Raises RunError when the loss is not finite, or the checkpoint is another run's.
    """
    _keep_freed_memory()
    with _ONE_RUN, _reproducible():
        train, test = load_mnist(device=device)
        train = Split(train.images[: recipe.train_images], train.labels[: recipe.train_images])
        _seed(seed, 0)
        model = build_model(recipe, condition).to(device, memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), recipe.learning_rate, recipe.momentum, fused=True)
        identity = _identity(recipe, condition, seed)
        history = [] if folder is None else _resume(folder, identity, model, optimizer)
        for epoch in range(len(history) + 1, recipe.epochs + 1):
            try:
                history.append(_epoch(recipe, condition, seed, epoch, model, optimizer, train, test))
            except NonFiniteLoss as error:
                raise RunError(
                    f"{condition.label} ({condition.slug}), seed {seed}: the loss is not finite at epoch {epoch}, step "
                    f"{error.step}; lower the learning rate or the penalties"
                ) from error
            if folder is not None:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "history": history}
                write_checkpoint(folder, {**identity, **state})
                write_whole(folder / "history.csv", _history_csv(history))
        predictions = evaluate(model, test).predictions.numpy()
    weights = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    return Run(history, weights, predictions, _machine(device))


def _epoch(
    recipe: Recipe,
    condition: Condition,
    seed: int,
    epoch: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    train: Split,
    test: Split,
) -> dict[str, float]:
    lr = optimizer.param_groups[0]["lr"] = recipe.learning_rate_at(epoch)
    generator = _seed(seed, epoch)
    begun = time.perf_counter()
    training = train_epoch(
        model,
        batches(train, recipe.batch_size, recipe.rotation, recipe.jitter, generator),
        optimizer,
        condition.l1,
        condition.l2,
    )
    seconds = time.perf_counter() - begun
    validation = evaluate(model, test)
    if not np.isfinite(validation.loss):  # the last step's update was too large
        raise NonFiniteLoss(step=-(-len(train.labels) // recipe.batch_size))
    row = (epoch, lr, *training, validation.loss, validation.accuracy, seconds)
    return dict(zip(COLUMNS, row, strict=True))


def _seed(seed: int, epoch: int) -> torch.Generator:
    """Seed torch (initial weights, dropout) and return a generator for the batches, from the pair alone.

    Two words of one SeedSequence, so that the two streams, and those of other pairs, have nothing in common.
    """
    for_torch, for_batches = np.random.SeedSequence((seed, epoch)).generate_state(2).tolist()
    torch.manual_seed(for_torch)
    return torch.Generator().manual_seed(for_batches)


@contextmanager
def _reproducible() -> Iterator[None]:
    """One thread, deterministic full-precision kernels, no denormals; the caller's generators are left alone.

    A network this small gains nothing from a second thread, while the sums of several threads depend on their number.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # weights that L1 and L2 shrink become denormal numbers, slow on a CPU
    # An idle GPU is not woken for its generator.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    try:
        with torch.random.fork_rng(devices), exact:
            yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)


def _keep_freed_memory() -> None:
    """Have glibc keep the memory of tensors that are freed, for those of the next step.

    By itself it learns to. But Dask starts its workers with MALLOC_TRIM_THRESHOLD_, which ends the learning: every step
    then asks the system for its memory anew, and training takes twice as long.
    """
    trim_threshold, mmap_threshold = -1, -3  # of malloc.h
    with suppress(AttributeError, OSError, TypeError):  # another system, or another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_threshold, 2**25)
        mallopt(trim_threshold, 2**28)


def _machine(device: str) -> dict[str, str]:
    if device == "cuda":
        processor = torch.cuda.get_device_name()
    else:
        processor = f"{_processor()} ({torch.backends.cpu.get_cpu_capability()})"
    versions = {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__}
    return {"device": device, "processor": processor, **versions, "numpy": np.__version__}


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def save_run(folder: Path, recipe: Recipe, condition: Condition, seed: int, run: Run) -> None:
    """Write a finished run to its folder."""
    about = {**_identity(recipe, condition, seed), **run.machine}
    about["seconds"] = round(sum(row["seconds"] for row in run.history), 1)
    results = {
        "predictions.npy": serialised(lambda file: np.save(file, run.predictions)),
        "weights.pt": serialised(lambda file: torch.save(run.weights, file)),
        "history.csv": _history_csv(run.history),
    }
    write_results(folder, about, results)


def _identity(recipe: Recipe, condition: Condition, seed: int) -> dict[str, Any]:
    return {"recipe": asdict(recipe), "condition": asdict(condition), "seed": seed}


def _resume(folder: Path, identity: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> History:
    """Bring model and optimizer to where the checkpoint in `folder` is, if there is one, and return its history."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_parts(folder)
    history: History = []
    checkpoint = read_checkpoint(folder, resume=True)
    if checkpoint is not None:
        if any(checkpoint.get(name) != value for name, value in identity.items()):
            raise RunError(f"the checkpoint in {folder} is of another run; delete it, and the run starts again")
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        history = checkpoint["history"]
    write_whole(folder / "history.csv", _history_csv(history))
    return history


def _history_csv(history: History) -> bytes:
    return pd.DataFrame(history, columns=COLUMNS).to_csv(index=False, lineterminator="\n").encode()
