"""One run: a condition trained with a seed, its checkpoints, and the folder that it leaves."""

import ctypes
import os
import platform
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from s6lib.data import Digits, batches, hold_out, load_mnist
from s6lib.errors import RunError
from s6lib.identity import without_docstrings
from s6lib.lab.files import (
    is_complete,
    read_checkpoint,
    remove_parts,
    serialised,
    write_checkpoint,
    write_results,
    write_whole,
)
from s6lib.recipes import Condition, Recipe, build_model, condition_entry, layers, recipe_entry
from s6lib.train import NonFiniteLoss, evaluate, train_epoch

History = list[dict[str, float]]
# A process trains one run at a time: torch's generator and number of threads are the process's own.
_ONE_RUN = threading.Lock()
COLUMNS = ("epoch", "lr", "train_loss", "train_accuracy", "penalty", "val_loss", "val_accuracy", "seconds")


@dataclass(frozen=True)
class Run:
    """What is trained: a condition, by a recipe, with a seed."""

    recipe: Recipe
    condition: Condition
    seed: int

    def __str__(self) -> str:
        return f"{self.condition.label} ({self.condition.slug}), seed {self.seed}"

    @cached_property
    def settings(self) -> Recipe:
        """The recipe, with the condition's changes."""
        return self.recipe.changed_by(self.condition)

    def folder(self, out: str | Path) -> Path:
        """Where it is kept under `out`."""
        return Path(out) / self.recipe.name / self.condition.slug / f"seed-{self.seed}"

    @cached_property
    def identity(self) -> dict[str, Any]:
        """By what it is known, as JSON: recipe, condition and seed, and the layers of a model of one's own.

        It travels with the run: where the source of a network is not to be had, what it was is still known.
        """
        about = {"recipe": recipe_entry(self.recipe), "condition": condition_entry(self.condition), "seed": self.seed}
        own = layers(self.recipe, self.condition)
        return about | ({"layers": own} if own else {})


class Trained(NamedTuple):
    """What training leaves.

    history: a row an epoch, with the keys COLUMNS; accuracies from 0 to 1, seconds of training alone.
    weights: the state_dict, on the CPU, as torch.save writes it: in one piece it travels far faster than in tensors.
    predictions: uint8 (10000,), the class of each test image.
    machines: where it was trained, one after the other: device, processor, library versions, host and process.
    """

    history: History
    weights: bytes
    predictions: np.ndarray
    machines: list[dict[str, Any]]


def train_run(run: Run, folder: Path | None = None, device: str | torch.device = "cpu") -> Trained:
    """Train a run; with a `folder`, go on from its checkpoint and renew it at each epoch's end, unless it is complete.

    All that is random comes from (seed, epoch) alone, so a run that was stopped ends bit for bit like one that was
    not. Raises RunError when the loss is not finite, or the checkpoint is another run's.
    """
    _keep_freed_memory()
    device, settings = torch.device(device), run.settings
    with _ONE_RUN, _reproducible(device):
        train, test = load_mnist(device=device)
        if settings.held_out:
            train, test = hold_out(train)
        train = Digits(train.images[: settings.train_images], train.labels[: settings.train_images])
        _seed(run.seed, 0, device)
        # On MPS, BatchNorm in channels_last has had wrong gradients (pytorch issue 175189).
        layout = torch.contiguous_format if device.type == "mps" else torch.channels_last
        learner = _learner(build_model(run.recipe, run.condition).to(device, memory_format=layout), settings)
        state = {**run.identity, "history": [], "machines": []}
        if _may_write_in(folder):
            _resume(folder, run, state, learner)
        history, machines = state["history"], state["machines"]
        here = _machine(device)
        machines[:] = [machine for machine in machines if machine != here] + [here]
        predictions = None
        for epoch in range(len(history) + 1, settings.epochs + 1):
            try:
                row, predictions = _epoch(run, epoch, learner, (train, test))
            except NonFiniteLoss as error:
                raise RunError(
                    f"{run}: the loss is not finite at epoch {epoch}, step {error.step}; lower the learning rate or "
                    "the penalties"
                ) from error
            history.append(row)
            if _may_write_in(folder):
                write_checkpoint(folder, {**state, **{n: part.state_dict() for n, part in learner.parts().items()}})
                write_whole(folder / "history.csv", _history_csv(history))
        if predictions is None:  # it was stopped after its last epoch
            predictions = evaluate(learner.judged, test).predictions
    weights = {name: value.cpu().contiguous() for name, value in learner.judged.state_dict().items()}
    return Trained(history, serialised(lambda file: torch.save(weights, file)), predictions.numpy(), machines)


def _may_write_in(folder: Path | None) -> bool:
    """Whether a run in training may write in its folder: not once that is complete.

    For a run that seemed lost, and was sent out again, may have come back all the same.
    """
    return folder is not None and not is_complete(folder)


class _Learner(NamedTuple):
    """What a checkpoint holds of a run: the model, its optimizer, and the average of its weights if there is one."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: AveragedModel | None

    @property
    def judged(self) -> nn.Module:
        """What is evaluated and saved."""
        return self.model if self.average is None else self.average.module

    def parts(self) -> dict[str, Any]:
        """By the names that they have in a checkpoint."""
        return {name: part for name, part in self._asdict().items() if part is not None}


def _learner(model: nn.Module, settings: Recipe) -> _Learner:
    optimizer = torch.optim.SGD(
        model.parameters(), settings.learning_rate, settings.momentum, nesterov=settings.nesterov, fused=True
    )
    average = None
    if settings.ema:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema), use_buffers=True)
        optimizer.register_step_post_hook(lambda *_: average.update_parameters(model))
    return _Learner(model, optimizer, average)


def _epoch(run: Run, epoch: int, learner: _Learner, digits: tuple[Digits, Digits]) -> tuple[dict[str, float], Tensor]:
    """Train an epoch: its row of the history, and the classes of the test digits after it."""
    (train, test), settings, optimizer = digits, run.settings, learner.optimizer
    rates = settings.learning_rates(epoch)
    generator = _seed(run.seed, epoch, train.labels.device)
    begun = time.perf_counter()
    augmented = batches(train, settings.batch_size, settings.augmentation, generator)
    training = train_epoch(learner.model, _paced(augmented, optimizer, rates), optimizer, run.condition.penalty_of)
    seconds = time.perf_counter() - begun
    validation = evaluate(learner.judged, test)
    if not np.isfinite(validation.loss):  # the last step's update was too large
        raise NonFiniteLoss(step=-(-len(train.labels) // settings.batch_size))
    row = (epoch, rates[0], *training, validation.loss, validation.accuracy, seconds)
    return dict(zip(COLUMNS, row, strict=True)), validation.predictions


def _paced(
    batches: Iterable[tuple[Tensor, Tensor]], optimizer: torch.optim.Optimizer, rates: list[float]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches, each with its learning rate set."""
    for batch, rate in zip(batches, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        yield batch


def _seed(seed: int, epoch: int, device: torch.device) -> torch.Generator:
    """Seed torch (initial weights, dropout) and return a generator for the batches, from seed and epoch alone.

    Two words of one SeedSequence, so that the two streams, and those of other pairs, have nothing in common.
    """
    for_torch, for_batches = np.random.SeedSequence((seed, epoch)).generate_state(2).tolist()
    torch.default_generator.manual_seed(for_torch)
    if device.type != "cpu":  # torch.manual_seed would also reseed, later, a GPU that is not used here
        torch.manual_seed(for_torch)
    return torch.Generator().manual_seed(for_batches)


@contextmanager
def _reproducible(device: torch.device) -> Iterator[None]:
    """One thread, deterministic full-precision kernels, no denormals; the caller's settings and generators come back.

    A network this small gains nothing from a second thread, while the sums of several threads depend on their number.
    """
    threads, flushing = torch.get_num_threads(), _denormals_are_flushed()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # weights that L1 and L2 shrink become denormal numbers, slow on a CPU
    devices = range(torch.cuda.device_count()) if device.type == "cuda" else []  # an idle GPU is not woken
    try:
        with torch.random.fork_rng(devices), _exact_convolutions() if device.type == "cuda" else nullcontext():
            yield
    finally:
        torch.set_flush_denormal(flushing)
        torch.set_num_threads(threads)


def _denormals_are_flushed() -> bool:
    return bool(torch.tensor(2.0**-120) * 2.0**-20 == 0)


@contextmanager
def _exact_convolutions() -> Iterator[None]:
    """cuDNN's deterministic kernels in full float32, by whichever of torch's two interfaces to TF32 there is."""
    cudnn = torch.backends.cudnn
    holder, name, exact = cudnn, "allow_tf32", False
    if hasattr(cudnn, "conv"):  # to mix the two interfaces is an error in torch
        holder, name, exact = cudnn.conv, "fp32_precision", "ieee"
    wanted = [(cudnn, "benchmark", False), (cudnn, "deterministic", True), (holder, name, exact)]
    before = [getattr(place, setting) for place, setting, _ in wanted]
    try:
        for place, setting, value in wanted:
            setattr(place, setting, value)
        yield
    finally:
        for (place, setting, _), value in zip(wanted, before, strict=True):
            setattr(place, setting, value)


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


def _machine(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    else:
        processor = f"{_processor()} ({torch.backends.cpu.get_cpu_capability()})"
    versions = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": version("torchvision"),
    }
    place = {"host": platform.node(), "process": os.getpid()}
    return {
        "device": str(device),
        "processor": processor,
        "core": _core(),
        **versions,
        "numpy": np.__version__,
        **place,
    }


def _processor() -> str:
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def _core() -> str:
    """Family, model, stepping and caches: processors that share a name have trained to other last digits."""
    names = {"vendor_id": "", "cpu family": "family ", "model": "model ", "stepping": "stepping "}
    cpuinfo = _cpuinfo()
    words = [f"{word}{cpuinfo[name]}" for name, word in names.items() if name in cpuinfo]
    caches = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"))
    words += [
        f"L{(cache / 'level').read_text().strip()} {(cache / 'type').read_text().strip().lower()} "
        f"{(cache / 'size').read_text().strip()}"
        for cache in caches
        if all((cache / name).exists() for name in ("level", "type", "size"))
    ]
    return ", ".join(words) or platform.machine()


def _cpuinfo() -> dict[str, str]:
    """What Linux says of the first core; nothing elsewhere."""
    path = Path("/proc/cpuinfo")
    first = path.read_text().partition("\n\n")[0] if path.exists() else ""
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}


def save_run(folder: Path, run: Run, trained: Trained) -> None:
    """Write a finished run to its folder."""
    *earlier, last = trained.machines
    about = {**run.identity, **last, **({"earlier": earlier} if earlier else {})}
    about["seconds"] = round(sum(row["seconds"] for row in trained.history), 1)
    results = {
        "predictions.npy": serialised(lambda file: np.save(file, trained.predictions)),
        "weights.pt": trained.weights,
        "history.csv": _history_csv(trained.history),
    }
    write_results(folder, about, results)


def _resume(folder: Path, run: Run, state: dict[str, Any], learner: _Learner) -> None:
    """Bring the state and the learner to where the checkpoint in `folder` is, if there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_parts(folder)
    checkpoint = read_checkpoint(folder, resume=True)
    if checkpoint is not None:
        if differences(checkpoint, run.identity):
            raise RunError(f"the checkpoint in {folder} is of another run; delete it, and the run starts again")
        for name, part in learner.parts().items():
            part.load_state_dict(checkpoint[name])
        state.update({name: checkpoint.get(name, []) for name in ("history", "machines")})
    write_whole(folder / "history.csv", _history_csv(state["history"]))


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """In what a recorded run differs from the one that is wanted, in words; labels and docstrings change nothing."""
    said = []
    for name in wanted:
        old, new = found.get(name), wanted[name]
        if name == "source":
            old, new = (without_docstrings(source) if isinstance(source, str) else source for source in (old, new))
        if isinstance(old, dict) and isinstance(new, dict):
            said += differences(old, {**dict.fromkeys(old), **new})
        elif name != "label" and old != new:
            said.append(_difference(name, old, new))
    return said


def _difference(name: str, old: Any, new: Any) -> str:
    """Of a source or of layers, the first line that differs."""
    if name == "source" and isinstance(old, str) and isinstance(new, str):
        old, new = old.splitlines(), new.splitlines()
    if isinstance(old, list) and isinstance(new, list):
        old, new = next((a, b) for a, b in zip([*old, None], [*new, None], strict=False) if a != b)
        old, new = old and old.strip(), new and new.strip()
    return f"{name} = {old!r}, not {new!r}"


def _history_csv(history: History) -> bytes:
    return pd.DataFrame(history, columns=COLUMNS).to_csv(index=False, lineterminator="\n").encode()
