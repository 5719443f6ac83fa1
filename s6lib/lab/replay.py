"""A training step recorded on a GPU and launched whole, since a network this small waits for the launch of each kernel.

A CUDA graph holds the kernels of one step and the addresses that they read and write. Launching it takes the same step,
bit for bit, with whatever is at those addresses then. Python runs once, while the step is recorded: a step that depends
on Python is not recorded, and training goes step by step.
"""

import random
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from s6lib.train import Learner, Sums, add_step

COMPARED = 3  # steps taken as they are and launched, if anything is the user's; if not, one


def records_steps(device: torch.device) -> bool:
    """Whether steps are recorded on a device."""
    return device.type == "cuda"


class Replay:
    """Take the steps of an epoch, as `add_step` does: the first few as they are, the others recorded and launched.

    In the first step libraries load and momentum begins. The next are watched for what cannot be recorded, then
    launched from the same state and compared, which finds what watching cannot. Each epoch has its own Replay: no state
    is kept between epochs, so a resumed run ends like one that was never stopped.

    Args:
        learner, average: what is trained, and its moving average, if it has one.
        rates: the learning rates of the epoch. If they change, steps read them from the GPU, in float32.
        own: whether anything of the run is the user's.
    """

    broken = ""  # why a recording broke off: torch's allocator is then fit for no other in this process

    def __init__(self, learner: Learner, average: nn.Module | None, rates: list[float], own: bool) -> None:
        self.parts = (*learner, average)
        self.watched = COMPARED if own else 1
        self.first = True
        self.graph: Any = None  # a torch.cuda.CUDAGraph, once recorded
        self.before: tuple[list[Tensor], Tensor] | None = None  # the state before the watched steps
        self.inputs: list[Tensor] = []  # what the graph reads
        self.kept: list[list[Tensor]] = []  # what the watched steps read
        self.rates, hindrance = _place_learning_rates(learner.optimizer, rates)
        self.stepwise = _say(Replay.broken or hindrance)

    def __call__(self, learner: Learner, sums: Sums, *batch: Tensor) -> None:
        step = partial(add_step, learner, sums)
        if self.first or self.stepwise or (self.inputs and _layout(batch) != _layout(self.inputs)):
            step(*batch)  # the last batch may be smaller
            self.first = False
        elif self.graph is not None:
            self._launch([*batch, *self.rates])
        else:
            self._watch(step, sums, batch)

    def _launch(self, values: Sequence[Tensor]) -> None:
        for place, value in zip([*self.inputs, *self.rates], values, strict=True):
            if place is not value:
                place.copy_(value)
        self.graph.replay()

    def _watch(self, step: Callable[..., None], sums: Sums, batch: Sequence[Tensor]) -> None:
        """Take a step that may be recorded; record the last of them, and launch them all again to compare."""
        generator = torch.cuda.default_generators[batch[0].device.index]
        tensors = [*_tensors(self.parts), *sums, *self.rates]
        self.before = self.before or _state(tensors, generator)
        self.inputs = self.inputs or [tensor.clone() for tensor in batch]
        self.kept.append([tensor.clone() for tensor in (*batch, *self.rates)])
        self.stepwise = _say(_hindrance(partial(step, *batch), self.parts))
        if self.stepwise or len(self.kept) < self.watched:
            return
        after = _state(tensors, generator)
        self.graph, failure = _record(partial(step, *self.inputs), generator)
        if self.graph is None:
            Replay.broken = self.stepwise = _say(failure)
            return
        _restore(tensors, generator, self.before)
        for values in self.kept:
            self._launch(values)
        if not all(map(_equal, tensors, after[0])):
            _restore(tensors, generator, after)
            self.graph, self.stepwise = None, _say("the first steps come out differently when launched whole")


def _record(step: Callable[[], None], generator: torch.Generator) -> tuple[Any, str]:
    """Record a step, in which nothing is computed: the graph, or None and why there is none."""
    unharmed = generator.clone_state()  # in torch 2.11 a recording that breaks off blocks the one in use
    torch.cuda.empty_cache()  # of the last epoch's graph
    graph = torch.cuda.CUDAGraph()
    try:
        graph.capture_begin()  # torch.cuda.graph, the context manager, would leave its stream set if this fails
        try:
            step()
        finally:
            graph.capture_end()
    except Exception as error:  # of the user's own code: any
        generator.graphsafe_set_state(unharmed)
        first = error.__context__ or error  # the error of capture_end comes after that of the step
        line = traceback.extract_tb(first.__traceback__)[-1]
        reason = (str(first).splitlines() or [type(first).__name__])[0]
        return None, f"{line.filename}:{line.lineno} cannot be recorded: {reason}"
    return graph, ""


def _hindrance(step: Callable[[], None], parts: Sequence[Any]) -> str:
    """Take a step, and return why it cannot be recorded, if so."""
    # Views keep the memory: if it were freed, what replaces a tensor could come to lie at its address.
    tensors = [tensor.detach() for tensor in _tensors(parts)]
    numbers, drawn, mode = _numbers(parts), _drawn(), torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    for one in caught:
        if "synchronizing CUDA operation" in str(one.message):
            return f"a step reads the GPU in {one.filename}:{one.lineno}"
    if [one.data_ptr() for one in tensors] != [one.data_ptr() for one in _tensors(parts)]:
        return "a step puts another tensor in the place of one of the network's or the optimizer's: change it in place"
    if len({one.device for one in tensors}) > 1:
        return "the network or the optimizer keeps a tensor on the CPU"
    if changed := [name for name, value in _numbers(parts).items() if numbers.get(name) != value]:
        return f"a step changes {changed[0]}, a number in Python: make it a buffer"
    return "a step draws from `random` or numpy.random: draw from torch, on the device" if drawn != _drawn() else ""


def _place_learning_rates(optimizer: torch.optim.Optimizer, rates: list[float]) -> tuple[list[Tensor], str]:
    """Make an optimizer ready for an epoch: its learning rates as tensors if they change, and why it has none then.

    A tensor fits torch's fused optimizers and those with `capturable`, which keep on the GPU what they count.
    """
    varies, groups = len(set(rates)) > 1, optimizer.param_groups
    for group in groups:
        if "capturable" in group and not optimizer.state:
            group["capturable"] = True
    fits = varies and all(group.get("fused") or group.get("capturable") for group in groups)
    for group in groups:  # always: a checkpoint brings back what was there, on the CPU
        group["lr"] = torch.zeros((), device=group["params"][0].device) if fits else rates[0]
    hindrance = f"the learning rate changes at each step, and {type(optimizer).__name__} takes no tensor for it"
    return [group["lr"] for group in groups] if fits else [], hindrance if varies and not fits else ""


def _tensors(parts: Sequence[Any]) -> Iterator[Tensor]:
    """The tensors that modules and optimizers keep."""
    for part in parts:
        if isinstance(part, nn.Module):
            yield from (*part.parameters(), *part.buffers())
        elif isinstance(part, torch.optim.Optimizer):
            yield from (one for state in part.state.values() for one in state.values() if isinstance(one, Tensor))


def _numbers(parts: Sequence[Any]) -> dict[str, Any]:
    """The attributes of modules that are numbers or text, by name."""
    modules = ((path, one) for part in parts if isinstance(part, nn.Module) for path, one in part.named_modules())
    return {
        f"`{name}` of {type(module).__name__} {path}".rstrip(): value
        for path, module in modules
        for name, value in vars(module).items()
        if isinstance(value, int | float | str)
    }


def _drawn() -> tuple[Any, ...]:
    """Where the generators of Python and numpy are."""
    state: Any = np.random.get_state()  # noqa: NPY002 - the one that a user's code may draw from
    _, words, *rest = state
    return random.getstate(), words.tobytes(), rest


def _layout(batch: Sequence[Tensor]) -> list[tuple]:
    return [(one.shape, one.stride(), one.dtype) for one in batch]


def _equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other) or torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def _state(tensors: Sequence[Tensor], generator: torch.Generator) -> tuple[list[Tensor], Tensor]:
    return [one.detach().clone() for one in tensors], generator.get_state()


@torch.no_grad()
def _restore(tensors: Sequence[Tensor], generator: torch.Generator, state: tuple[list[Tensor], Tensor]) -> None:
    for place, value in zip(tensors, state[0], strict=True):
        place.copy_(value)
    generator.set_state(state[1])


@cache
def _say(hindrance: str) -> str:
    """Say once why training goes step by step, if it does."""
    if hindrance:
        print(f"training goes step by step, which is slow on a GPU: {hindrance}", file=sys.stderr, flush=True)
    return hindrance
