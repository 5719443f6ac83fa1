"""One run, from its seed to its folder: setup, training, checkpoints, and the saved result."""

import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from s6lib.data import ImageDataset, batches
from s6lib.errors import RunError, SettingError
from s6lib.lab.device import keep_freed_memory, machine, reproducible, seed_everything
from s6lib.lab.files import is_complete, read_checkpoint, serialise, write_checkpoint, write_whole
from s6lib.lab.record import COLUMNS, differences, identity, is_library
from s6lib.lab.replay import records_steps, train_recorded
from s6lib.recipes import Loss, Recipe, Run, as_python, build_model, load_images, pieces
from s6lib.train import Training, evaluate, memory_format, predict, train_epoch

History = list[dict[str, float]]
Data = tuple[ImageDataset, ImageDataset]


class Setup(NamedTuple):
    """Everything that training a run needs.

    settings: the recipe with the condition's changes; its `train_images` is a number.
    loss: on the device, with copies of its tensors, such as class weights.
    average: the moving average of the weights, if the recipe has one.
    train, test: the images for training and for evaluation.
    """

    settings: Recipe
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Loss
    average: AveragedModel | None
    train: ImageDataset
    test: ImageDataset

    @property
    def final_model(self) -> nn.Module:
        """The model that is evaluated and saved."""
        return self.model if self.average is None else self.average.module

    @property
    def parts(self) -> dict[str, Any]:
        """The parts whose state a checkpoint holds, by name."""
        parts = {"model": self.model, "optimizer": self.optimizer, "average": self.average}
        parts["loss"] = _modules_in(self.loss) or None
        return {name: part for name, part in parts.items() if part is not None}

    def batches(self, epoch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch, and set the learning rate before each."""
        settings, rates = self.settings, iter(self.settings.learning_rates(epoch))
        for _ in range(settings.passes):
            augmented = batches(self.train, settings.batch_size, settings.augmentation, generator, settings.transform)
            for images, targets in augmented:
                rate = next(rates)
                for group in self.optimizer.param_groups:
                    if isinstance(group["lr"], Tensor):  # a recorded step reads it
                        group["lr"].fill_(self.rate_of(group, rate))
                    else:
                        group["lr"] = self.rate_of(group, rate)
                own = settings.batch_transform
                yield (images, targets) if own is None else own(images, targets)

    def rate_of(self, group: dict[str, Any], rate: float) -> float:
        """The learning rate of a parameter group: one with another initial rate than the recipe keeps the ratio."""
        first = self.settings.learning_rate
        return rate * (group.get("initial_lr", first) / first) if first else rate


class RunResult(NamedTuple):
    """The result of training, ready to be written to the run's folder; bytes travel much faster than tensors.

    about: the entries of run.json: the run's identity, its last start (device, processor, library versions, host,
        process, commit and time), earlier ones, and seconds.
    files: the content of the other files, by name: history.csv, with the columns COLUMNS; weights.pt, the state_dict,
        on the CPU, as torch.save writes it; predictions.npy, uint8 (N,), the class of each test image.
    """

    about: dict[str, Any]
    files: dict[str, bytes]


def set_up(run: Run, data: Data, device: torch.device) -> Setup:
    """Build the setup of a run from its seed. Raises SettingError if its settings do not fit its data."""
    (train, test), settings = data, run.settings
    count = settings.train_images or len(train)
    if count > len(train):
        raise SettingError(f"train_images must be at most {len(train):,}, as many as there are, not {count:,}")
    if settings.shift >= (size := train.images.shape[-1]):
        raise SettingError(f"shift must be less than the {size} pixels of an image, not {settings.shift}")
    settings = replace(settings, train_images=count)
    generator = seed_everything(run.seed, 0, device)
    if settings.draw_images:
        train = train.part(torch.randperm(len(train), generator=generator)[:count])
    train, test = train.part(slice(count)).to(device), test.to(device)
    model = build_model(run.recipe, run.condition, train).to(device)
    if memory_format(model) != torch.contiguous_format:
        model = model.to(memory_format=memory_format(model))
    loss = _on_device(settings.loss, device)
    optimizer = _build_optimizer(run, settings, model, loss)
    average = _build_average(model, optimizer, settings.ema) if settings.ema else None
    return Setup(settings, model, optimizer, loss, average, train, test)


def _on_device(loss: Any, device: torch.device) -> Any:
    """Copy a loss, with its tensors, such as class weights, on a device."""
    moved = {id(one): deepcopy(one).to(device) if isinstance(one, nn.Module | Tensor) else one for one in pieces(loss)}
    return deepcopy(loss, moved)  # which keeps what its memo holds


def _modules_in(loss: Loss) -> nn.ModuleList:
    return nn.ModuleList(piece for piece in pieces(loss) if isinstance(piece, nn.Module))


def _build_optimizer(run: Run, settings: Recipe, model: nn.Module, loss: Loss) -> torch.optim.Optimizer:
    parameters = [*model.parameters(), *_modules_in(loss).parameters()]
    # Fused SGD is faster, but trains neither sparse nor complex weights, nor layers without a gradient in step 1.
    fused = is_library([settings.network, run.condition.norm, settings.loss])
    sgd = partial(torch.optim.SGD, momentum=settings.momentum, nesterov=settings.nesterov, fused=fused)
    optimizer: Any = (settings.optimizer or sgd)(parameters, lr=settings.learning_rate)
    if not isinstance(optimizer, torch.optim.Optimizer) or not hasattr(optimizer, "_optimizer_step_post_hooks"):
        raise SettingError(
            f"optimizer must make a torch.optim.Optimizer that calls super().__init__, not {type(optimizer).__name__}"
        )
    given = {id(weights) for group in optimizer.param_groups for weights in group["params"]}
    if given - set(map(id, parameters)) or {id(one) for one in parameters if one.requires_grad} - given:
        raise SettingError(
            "optimizer must train the parameters that it is called with, all of those that need a gradient and no "
            "others: freeze some with requires_grad_(False) in the network instead"
        )
    if any("initial_lr" in group for group in optimizer.param_groups):
        raise SettingError("optimizer must not hold a scheduler, which would have no effect: use `schedule` instead")
    for group in optimizer.param_groups:
        group.update({name: as_python(value) for name, value in group.items() if name != "params"})
        group["initial_lr"] = float(group["lr"])
    return optimizer


def _build_average(model: nn.Module, optimizer: torch.optim.Optimizer, keep: float) -> AveragedModel:
    """Build an exponential moving average of the weights, updated after each step of the optimizer."""
    average = AveragedModel(model)

    @torch.no_grad()
    def follow() -> None:
        averaged, latest = ([*one.parameters(), *one.buffers()] for one in (average.module, model))
        started = average.n_averaged.item() > 0  # always on the CPU, so that a GPU need not be waited for
        for old, new in zip(averaged, latest, strict=True):
            if started and (old.is_floating_point() or old.is_complex()):  # whole numbers have no average
                old.lerp_(new, 1 - keep)
            else:
                old.copy_(new)
        average.n_averaged.add_(1)

    # Not a hook: torch calls it twice a step if the class's step calls that of a class that was used before.
    step = optimizer.step
    setattr(optimizer, "step", lambda: (step(), follow()))  # noqa: B010 - mypy refuses an assignment
    return average


def train_run(
    run: Run, folder: Path | None = None, device: str | torch.device = "cpu", entry: dict[str, Any] | None = None
) -> RunResult:
    """Train a run; with a `folder`, resume from its checkpoint, and write one after each epoch until it is complete.

    `entry` is the run's identity from before the study began, since the user may edit a file during training; the
    default is its identity now. All random numbers come from (seed, epoch) alone, so that a resumed run gives the same
    bits as one without a stop. Raises RunError if the loss is not finite, or the checkpoint belongs to another run.
    """
    entry = identity(run) if entry is None else entry
    keep_freed_memory()
    device = torch.device(device)
    with reproducible(device):
        setup = set_up(run, load_images(run.recipe.data, run.recipe.held_out), device)
        # A run that seemed lost and was sent out again may still be in training when the second attempt has finished:
        # it then leaves the complete folder alone.
        resumed = {} if folder is None or is_complete(folder) else _resume(folder, entry, setup)
        history, machines = resumed.get("history", []), [*resumed.get("machines", []), machine(device)]
        for epoch in range(len(history) + 1, setup.settings.epochs + 1):
            history.append(_epoch(run, epoch, setup))
            if folder is not None and not is_complete(folder):
                state = {**entry, "history": history, "machines": machines}
                write_checkpoint(folder, {**state, **{name: part.state_dict() for name, part in setup.parts.items()}})
                write_whole(folder / "history.csv", _history_csv(history))
        predictions = predict(setup.final_model, setup.test).to("cpu", torch.uint8).numpy()
    *earlier, last = machines
    about = {**entry, **last, **({"earlier": earlier} if earlier else {})}
    about["seconds"] = round(sum(row["seconds"] for row in history), 1)
    files = {
        "predictions.npy": serialise(lambda file: np.save(file, predictions)),
        "weights.pt": serialise_weights(setup.final_model),
        "history.csv": _history_csv(history),
    }
    return RunResult(about, files)


def _epoch(run: Run, epoch: int, setup: Setup) -> dict[str, float]:
    """Train and evaluate an epoch; return its row of the history.

    On a GPU, steps are recorded if the run is wholly the library's.
    """
    start = time.perf_counter()
    device, rates = setup.train.labels.device, setup.settings.learning_rates(epoch)

    def train(watch: Callable[[Iterator], Iterator] = iter) -> Training:
        seen = watch(setup.batches(epoch, seed_everything(run.seed, epoch, device)))
        return train_epoch(setup.model, seen, setup.optimizer, setup.loss, run.condition.penalty_of)

    try:
        recorded = run.is_built_in and records_steps(device)
        training = train_recorded(train, setup.parts, rates, device) if recorded else train()
        seconds = time.perf_counter() - start
        test = evaluate(setup.final_model, setup.test)
        if not np.isfinite(test.loss):  # the last step's update was too large
            raise FloatingPointError
    except FloatingPointError:
        raise RunError(
            f"{run}: the loss is not finite at epoch {epoch}; lower the learning rate or the penalties"
        ) from None
    rate = setup.rate_of(setup.optimizer.param_groups[0], rates[0])
    return dict(zip(COLUMNS, (epoch, rate, *training, *test, seconds), strict=True))


def _resume(folder: Path, entry: dict[str, Any], setup: Setup) -> dict[str, Any]:
    """Restore the setup from the checkpoint in `folder`, and return the checkpoint; {} if there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = read_checkpoint(folder, resume=True)
    if checkpoint is None:
        return {}
    if differences(checkpoint, entry):
        raise RunError(f"the checkpoint in {folder} is of another run; delete it to start the run again")
    rates = [group["lr"] for group in setup.optimizer.param_groups]
    for name, part in setup.parts.items():
        part.load_state_dict(checkpoint[name])
    for group, rate in zip(setup.optimizer.param_groups, rates, strict=True):
        if not isinstance(rate, Tensor):  # a recorded step had made it one
            group["lr"] = float(group["lr"])
    write_whole(folder / "history.csv", _history_csv(checkpoint["history"]))
    return checkpoint


def _history_csv(history: History) -> bytes:
    return pd.DataFrame(history, columns=COLUMNS).to_csv(index=False, lineterminator="\n").encode()


def serialise_weights(model: nn.Module) -> bytes:
    """Return the state_dict of a model, on the CPU, as torch.save writes it."""
    state = {  # clones, without the rest of a larger storage, which torch.save would write too
        name: value.cpu().contiguous().clone() if isinstance(value, Tensor) else value
        for name, value in model.state_dict().items()
    }
    return serialise(lambda file: torch.save(state, file))
