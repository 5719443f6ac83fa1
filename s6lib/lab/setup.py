"""The setup of a run: its data, model and optimizer, and the batches of an epoch."""

from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from s6lib.data import Digits, batches, hold_out, load_data, normalise
from s6lib.errors import SettingError
from s6lib.lab.device import CPU, seed_everything
from s6lib.lab.files import serialise
from s6lib.lab.record import is_library
from s6lib.recipes import Recipe, Run, build_model
from s6lib.train import Learner, memory_format

Data = tuple[Digits, Digits]


class Setup(NamedTuple):
    """Everything that training a run needs.

    settings: the recipe with the condition's changes; its `train_images` is a number.
    average: the moving average of the weights, if the recipe has one.
    train, test: the images for training and for evaluation.
    """

    settings: Recipe
    learner: Learner
    average: AveragedModel | None
    train: Digits
    test: Digits

    @property
    def final_model(self) -> nn.Module:
        """The model that is evaluated and saved."""
        return self.learner.model if self.average is None else self.average.module

    @property
    def parts(self) -> dict[str, Any]:
        """The parts whose state a checkpoint holds, by name."""
        parts = {"model": self.learner.model, "optimizer": self.learner.optimizer, "average": self.average}
        return {name: part for name, part in parts.items() if part is not None}

    def batches(self, epoch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch, and set the learning rate before each."""
        rates, transform = iter(self.settings.learning_rates(epoch)), self.settings.transform
        for _ in range(self.settings.passes):
            for images, targets in batches(self.train, self.settings.batch_size, self.settings.augmentation, generator):
                self._set_learning_rate(next(rates))
                yield (images, targets) if transform is None else transform(images, targets)

    def _set_learning_rate(self, rate: float) -> None:
        """Set a learning rate; parameter groups with a different initial rate keep their ratio."""
        first = self.settings.learning_rate
        for group in self.learner.optimizer.param_groups:
            scaled = rate * (group.get("initial_lr", first) / first) if first else rate
            if isinstance(group["lr"], Tensor):  # a recorded step reads it
                group["lr"].fill_(scaled)
            else:
                group["lr"] = scaled


def read_data(recipe: Recipe) -> Data:
    """Load the training and the test images of a recipe on the CPU; `held_out` replaces the test images."""
    if callable(recipe.data):  # its random numbers are the same for every run
        seed_everything(0, 0, CPU)
    train, test = load_data(recipe.data)
    return hold_out(train) if recipe.held_out else (train, test)


def set_up(run: Run, data: Data, device: torch.device) -> Setup:
    """Build the setup of a run from its seed. Raises SettingError if its settings do not fit its data."""
    (train, test), settings = data, run.settings
    count = settings.train_images or len(train.labels)
    if count > len(train.labels):
        raise SettingError(f"train_images must be at most {len(train.labels):,}, as many as there are, not {count:,}")
    if settings.shift >= (size := train.images.shape[-1]):
        raise SettingError(f"shift must be less than the {size} pixels of an image, not {settings.shift}")
    settings = replace(settings, train_images=count)
    generator = seed_everything(run.seed, 0, device)
    if settings.draw_images:
        train = train.part(torch.randperm(len(train.labels), generator=generator)[:count])
    train, test = train.part(slice(count)).to(device), test.to(device)
    model = build_network(run, train).to(device)
    if memory_format(model) != torch.contiguous_format:
        model = model.to(memory_format=memory_format(model))
    optimizer = _build_optimizer(run, settings, model)
    average = _build_average(model, optimizer, settings.ema) if settings.ema else None
    learner = Learner(model, optimizer, _on_device(settings.loss, device), run.condition.penalty_of)
    return Setup(settings, learner, average, train, test)


def build_network(run: Run, digits: Digits | None) -> nn.Module:
    """Build the network of a run; two images give lazy layers their sizes, and are not needed without such layers."""
    model = build_model(run.recipe, run.condition)
    if not isinstance(model, nn.Module) or not any(weights.requires_grad for weights in model.parameters()):
        raise SettingError(f"`network` must make a torch.nn.Module with parameters to train, not {model!r}")
    if digits is not None and any(map(is_lazy, chain(model.parameters(), model.buffers()))):
        with torch.no_grad():
            model.eval()(normalise(digits.images[:2].cpu(), digits.mean, digits.std))
    return model


def _on_device(thing: Any, device: torch.device) -> Any:
    """Copy a loss, with its tensors, such as class weights, on a device."""
    if isinstance(thing, nn.Module | Tensor):
        return deepcopy(thing).to(device)
    if isinstance(thing, partial):
        named = {name: _on_device(one, device) for name, one in thing.keywords.items()}
        return partial(thing.func, *(_on_device(one, device) for one in thing.args), **named)
    return thing


def _build_optimizer(run: Run, settings: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    if settings.optimizer is None:
        # Fused SGD is faster, but trains neither sparse nor complex weights, nor layers without a gradient in step 1.
        fused = is_library(settings.network) and is_library(run.condition.norm)
        rate, momentum = settings.learning_rate, settings.momentum
        optimizer: Any = torch.optim.SGD(parameters, rate, momentum, nesterov=settings.nesterov, fused=fused)
    else:
        optimizer = settings.optimizer(parameters, lr=settings.learning_rate)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise SettingError(f"optimizer must make a torch.optim.Optimizer, not {type(optimizer).__name__}")
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", float(group["lr"]))
    return optimizer


def _build_average(model: nn.Module, optimizer: torch.optim.Optimizer, keep: float) -> AveragedModel:
    """Build an exponential moving average of the weights, updated after each step of the optimizer."""
    # Keep its counter on the model's device, where a recorded step can update it.
    average, update = AveragedModel(model, next(model.parameters()).device), get_ema_multi_avg_fn(keep)
    started = False  # whether the average holds a step; reading n_averaged each time would make the CPU wait for a GPU

    @torch.no_grad()
    def follow(*_: Any) -> None:
        nonlocal started
        started = started or bool(average.n_averaged > 0)
        pairs = list(zip(_tensors(average.module), _tensors(model), strict=True))
        numbers = [pair for pair in pairs if started and (pair[0].is_floating_point() or pair[0].is_complex())]
        if numbers:
            update(*map(list, zip(*numbers, strict=True)), None)
        for old, new in pairs:
            if not started or not (old.is_floating_point() or old.is_complex()):  # integers have no average
                old.copy_(new)
        average.n_averaged.add_(1)
        started = True

    optimizer.register_step_post_hook(follow)
    return average


def _tensors(model: nn.Module) -> Iterable[Tensor]:
    return chain(model.parameters(), model.buffers())


def serialise_weights(model: nn.Module) -> bytes:
    """Return the state_dict of a model, on the CPU, as torch.save writes it."""
    state = {
        name: value.cpu().contiguous() if isinstance(value, Tensor) else value
        for name, value in model.state_dict().items()
    }
    return serialise(lambda file: torch.save(state, file))
