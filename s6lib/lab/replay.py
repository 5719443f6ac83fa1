"""A training step recorded on a GPU and launched whole, since a network this small waits for the launch of each kernel.

A CUDA graph holds the kernels of one step and the addresses that they read and write. Launching it takes the same step,
bit for bit, with whatever is at those addresses then. Python runs once, while the step is recorded: so only runs that
are wholly the library's are recorded, since a counter in the user's code would stand still.
"""

import gc
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from copy import deepcopy
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from s6lib.train import Training

Batch = tuple[Tensor, ...]
Watch = Callable[[Iterator[Batch]], Iterator[Batch]]
_broken: set[ref] = set()  # networks whose recording has failed
# Then torch's allocator cannot serve another recording (pytorch pull request 180395).
_BREAKS_FOR_EVER = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12)


def records_steps(device: torch.device) -> bool:
    """Return whether steps are recorded; the environment variable S6LIB_RECORD=0 switches this off."""
    return device.type == "cuda" and os.environ.get("S6LIB_RECORD") != "0" and not (_BREAKS_FOR_EVER and _broken)


def train_recorded(
    train: Callable[[Watch], Training], parts: Mapping[str, Any], rates: list[float], device: torch.device
) -> Training:
    """Train an epoch with recorded steps; if a recording breaks off, train it and later ones step by step, and say so.

    Args:
        train: trains the epoch; it passes its batches through the function that it is given.
        parts: what is trained, with a state_dict each, by name.
        rates: the learning rates of the epoch. If they change, a recorded step reads them as tensors, in float32.
    """
    for group in parts["optimizer"].param_groups:  # always: a checkpoint brings back what was there, on the CPU
        group["lr"] = torch.zeros((), device=device) if len(set(rates)) > 1 else rates[0]
    if ref(parts["model"]) in _broken:
        return train(iter)
    recorder = Recorder(device)
    before = deepcopy({name: part.state_dict() for name, part in parts.items()})
    try:
        return train(recorder.record)
    except BaseException as error:
        if recorder.graph is None:  # it is not the recording that has failed
            raise
        recorder.break_off()
        if not isinstance(error, Exception):  # Stop in a notebook
            raise
        _broken.add(ref(parts["model"]))
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        print(f"training goes step by step, which is slow on a GPU: {reason}", file=sys.stderr, flush=True)
    for name, part in parts.items():
        part.load_state_dict(before[name])
    return train(iter)


class Recorder:
    """Records the body of a training loop from outside, through the batches that it is given.

    The first batch of each shape passes as it is: libraries load, and momentum begins. While the second is with the
    loop, its step is recorded, in which nothing is computed. From then on, batches of this shape never reach the loop:
    the recorded step is launched with them. Each epoch has its own Recorder, so no state is kept between epochs.
    """

    def __init__(self, device: torch.device) -> None:
        self.graph: Any = None  # a torch.cuda.CUDAGraph, while it is recorded
        self.generator = torch.cuda.default_generators[device.index or 0]
        self.unharmed = self.generator.clone_state()  # in torch 2.11 a recording that breaks off blocks the other

    def record(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Pass batches on to a loop, which never sees those that are launched."""
        recorded: dict[Any, Any] = {}  # by shape, the graph and its inputs; None after the first batch
        for batch in batches:
            layout = tuple((one.shape, one.stride(), one.dtype) for one in batch)
            if layout not in recorded:
                recorded[layout] = None
                yield batch
                continue
            if recorded[layout] is None:
                inputs = tuple(one.clone() for one in batch)
                torch.cuda.empty_cache()  # of the last epoch's graphs
                self.graph = torch.cuda.CUDAGraph()
                gc.disable()  # the end of an old graph would break the recording (pytorch pull request 161037)
                self.graph.capture_begin(capture_error_mode="thread_local")  # a notebook has other threads
                yield inputs
                self.graph.capture_end()
                gc.enable()
                recorded[layout], self.graph = (self.graph, inputs), None
            graph, inputs = recorded[layout]
            for place, value in zip(inputs, batch, strict=True):
                place.copy_(value)
            graph.replay()

    def break_off(self) -> None:
        """End a recording that failed, and mend what it has left behind."""
        with suppress(Exception):
            self.graph.capture_end()
        self.graph = None
        self.generator.graphsafe_set_state(self.unharmed)
        gc.enable()
