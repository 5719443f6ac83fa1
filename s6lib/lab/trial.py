"""The trial of a run with the user's code: its first steps, which also identify it, and a check for hidden state."""

import hashlib
import inspect
import io
import itertools
import json
import math
import pickle
import random
import sys
import traceback
import zlib
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s6lib.errors import SettingError
from s6lib.lab.device import CPU, reproducible, seed_everything
from s6lib.lab.files import serialise
from s6lib.lab.record import compare, identity, is_library, setting_entry
from s6lib.lab.run import Data, Setup, serialise_weights, set_up
from s6lib.lab.source import is_installed, pack
from s6lib.recipes import Run
from s6lib.train import l1_l2_penalty, predict_logits, train_epoch

STEPS = 3  # and one more, from a state that was saved and read back
EVALUATED = 250  # number of test images
_STATE = (
    "a number that it keeps in Python makes a run depend on the order of runs and on where it was stopped: keep it in "
    "a buffer, or use the share of training done, as a schedule does (make caches in __init__, keep activations on "
    "their module, and draw random numbers from the global generators)"
)
_SEEDED = "draw random numbers from the global generators of torch, numpy or random, which each run seeds"


def first_steps(run: Run, data: Data) -> dict[str, Any]:
    """Take the first steps of a run on the CPU, and return their record as JSON.

    The record holds names and shapes of the parameters; loss, penalty and size of the gradient of each step; the
    cross-entropy on some test images afterwards; a digest of all learning rates; and a description of data and
    optimizer if they are the user's.

    Raises SettingError, naming the condition, if the run cannot be trained: its network cannot be built, two builds
    with its seed differ, a step fails, or it continues differently from a saved state.
    """
    with reproducible(CPU), error_prefix(f"{run.condition} cannot be trained"):
        settings = identity(run)
        setup, second = set_up(run, data, CPU), set_up(run, data, CPU)
        built = serialise_weights(setup.model)
        setup.model.train()  # as in a step: what two networks share may have been left in evaluation mode
        before = _pickles(run, setup)  # before the first transform
        with error_prefix("its first batches cannot be made (`transform` gets a uint8 tensor: leave out ToTensor)"):
            again, *batches = [*islice(_first_batches(run, second), 1), *_first_batches(run, setup)]
        steps, attributes, graphs = [], [], list[Any]()
        for number, batch in enumerate(batches[:STEPS], 1):
            with error_prefix(f"step {number} fails"):
                steps.append(_step(run, setup, batch, graphs))
            if len(batch[1]) == len(batches[0][1]):  # a network may keep the shape of what it has seen
                attributes.append(_attributes(setup))
        if serialise_weights(second.model) != built:  # as it was before the steps of the first
            raise SettingError(
                f"two networks built with one seed differ: `network` must make a new one each time, and {_SEEDED}"
            )
        before, after = before | attributes[0], _pickles(run, setup) | attributes[-1]
        if changed := [part for part in before if after.get(part, before[part]) != before[part]]:
            raise SettingError(f"`{changed[0]}` changes from step to step, and {_STATE}")
        if moved := compare(settings, identity(run), shared=True):  # such as a class that counts its instances
            raise SettingError(f"its settings change when they are used ({moved[0]}), and {_STATE}")
        if not all(map(torch.equal, again, batches[0])):
            raise SettingError(f"two first batches of one seed differ: {_SEEDED}")
        if idle := _what_learns_nothing(setup, graphs):
            _say(f"{run.condition}: in the first steps, these learned nothing: {', '.join(idle[:5])}")
        state = {part: one.state_dict() for part, one in setup.parts.items()}
        saved = serialise(lambda file: torch.save(state, file))
        going_on = _go_on(run, setup, batches[-1])
        with error_prefix("a network built anew cannot load its state (make all layers in __init__)"):
            state = torch.load(io.BytesIO(saved), map_location="cpu", weights_only=True)
            for part, one in second.parts.items():
                one.load_state_dict(state[part])
        if phrases := compare(going_on, _go_on(run, second, batches[-1]), tolerance=1e-5):
            raise SettingError(
                f"it goes on differently from a saved state ({phrases[0]}): it keeps a state outside its state_dict, "
                f"or draws random numbers that torch, numpy and random do not seed; {_STATE}"
            )
        record = {**_describe_settings(setup), "steps": steps, "evaluation": going_on["evaluation"]}
    return json.loads(json.dumps(record, default=str))


def _describe_settings(setup: Setup) -> dict[str, Any]:
    """Describe what the first steps alone would not fully show: all learning rates, and the user's own parts."""
    settings, model = setup.settings, setup.model
    rates = [f"{rate:.6g}" for epoch in range(settings.epochs) for rate in settings.learning_rates(epoch + 1)]
    record: dict[str, Any] = {
        "parameters": {name: "x".join(map(str, weights.shape)) for name, weights in model.named_parameters()},
        "learning rates": hashlib.sha256(" ".join(rates).encode()).hexdigest(),
    }
    if callable(settings.data):
        arrays = [part for data in (setup.train, setup.test) for part in (data.images, data.labels)]
        sums = [zlib.crc32(array.contiguous().numpy().data) for array in arrays]
        record["data"] = {"class names": list(setup.train.class_names), "checksums": sums}
    if settings.optimizer is not None:
        groups = setup.optimizer.param_groups
        record["optimizer"] = [{name: value for name, value in group.items() if name != "params"} for group in groups]
    return record


@contextmanager
def error_prefix(what: str) -> Iterator[None]:
    """Re-raise errors of the user's code as one sentence that says where they came from."""
    try:
        yield
    except Exception as error:  # of the user's own code: any
        message = str(error).strip()
        if not isinstance(error, SettingError):
            lines = [line.strip() for line in message.splitlines()] or ["no reason given"]
            own = [frame for frame in traceback.extract_tb(error.__traceback__) if not is_installed(frame.filename)]
            place = f" (in {own[-1].name}, line {own[-1].lineno})" if own else ""
            message = f"{type(error).__name__}: {' '.join(lines[:2])[:300]}{place}"
        named = message.startswith(what.partition(" cannot")[0])
        raise SettingError(message if named else f"{what}: {message}") from None


def _first_batches(run: Run, setup: Setup) -> Iterator[Any]:
    """Yield the first batches of the first epoch, then one of the size of the epoch's last batch."""
    generator = seed_everything(run.seed, 1, CPU)
    yield from islice(setup.batches(1, generator), STEPS)
    last = len(setup.train) % setup.settings.batch_size or setup.settings.batch_size
    yield next(setup._replace(train=setup.train.part(slice(last))).batches(1, generator))


def _step(run: Run, setup: Setup, batch: Any, graphs: list[Any]) -> dict[str, float]:
    """Take a step; return its loss, its penalty and the size of its gradient, and add the first two to `graphs`."""
    with error_prefix("`batch_transform` must return images and targets, two tensors of one length"):
        images, targets = (part.clone() for part in batch)
        if len(images) != len(targets):
            raise ValueError(f"there are {len(images)} images and {len(targets)} targets")
    losses = []

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        _require_logits(logits, len(images), len(setup.train.class_names))
        with error_prefix(f"`loss` fails on logits {tuple(logits.shape)} and targets {tuple(targets.shape)}"):
            losses.append(setup.loss(logits, targets))
        _require_scalar("`loss`", losses[0])
        graphs.append(losses[0])
        return losses[0]

    def penalty(model: nn.Module) -> Tensor | float:
        own = 0.0 if run.condition.penalty is None else run.condition.penalty(model)
        if not isinstance(own, int | float) or own:
            _require_scalar("`penalty`", own)
            graphs.append(own)
        return l1_l2_penalty(model, run.condition.l1, run.condition.l2) + own

    metrics = train_epoch(setup.model, [(images, targets)], setup.optimizer, loss, penalty)
    gradients = [weights.grad.to_dense() for weights in setup.model.parameters() if weights.grad is not None]
    size = math.hypot(*(float(gradient.abs().double().norm()) for gradient in gradients))
    return {"loss": losses[0].item(), "penalty": metrics.penalty, "gradient": size}


def _require_scalar(what: str, value: Any) -> None:
    if not isinstance(value, Tensor) or value.shape != ():
        raise SettingError(f"{what} must return a scalar tensor, not {_kind(value)}")
    if not value.requires_grad:
        raise SettingError(
            f"{what} has no gradient, so it would not affect training: compute it from the network's parameters, "
            "without item(), detach() or no_grad()"
        )


def _require_logits(logits: Any, images: int, classes: int) -> None:
    if not isinstance(logits, Tensor) or logits.shape != (images, classes):
        raise SettingError(f"the network must turn {images} images into logits {images, classes}, not {_kind(logits)}")
    if bool((logits >= 0).all()) and torch.allclose(logits.sum(1).float(), torch.ones(images), atol=1e-3):
        raise SettingError("the network must return logits, not probabilities: leave out the softmax at its end")


def _kind(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _pickles(run: Run, setup: Setup) -> dict[str, Any]:
    """The user's parts as bytes, or as JSON, which show a counter in a closure, a global or an attribute."""
    pickles = {}
    for name, part in {**run.parts, **({} if "loss" in setup.parts else {"loss": setup.loss})}.items():
        if not is_library(part) and name != "data":
            try:
                _, pickles[name] = pack(part, [part]), pack(part, [part])  # the first leaves __slotnames__ on a class
            except Exception:  # it holds a lock, for example: the numbers that run.json records can be watched
                pickles[name] = setting_entry(part)
    return pickles


def _attributes(setup: Setup) -> dict[str, Any]:
    """The attributes of network, loss and optimizer that are numbers, text, or hold such, as JSON, by name."""
    owners: dict[str, Any] = {}  # without those whose state_dict holds more than torch's, perhaps what they keep
    for number, part in enumerate((setup.model, *setup.parts.get("loss", ()))):
        owners |= dict(part.named_modules(prefix=f"{type(part).__name__} {number}"))
    owners = {path: one for path, one in owners.items() if type(one).get_extra_state is nn.Module.get_extra_state}
    if type(setup.optimizer).state_dict is torch.optim.Optimizer.state_dict:
        owners["optimizer"] = setup.optimizer
    attributes = {}
    for path, owner in owners.items():
        unsaved = {name: owner.get_buffer(name) for name in getattr(owner, "_non_persistent_buffers_set", ())}
        for name, value in {**vars(owner), "_parameters": None, "_buffers": unsaved}.items():
            with suppress(TypeError, ValueError, RuntimeError):  # what JSON cannot hold cannot be watched
                attributes[f"{path}.{name}"] = json.dumps(value, default=_attributes_of)
    return attributes


def _attributes_of(value: Any) -> Any:
    """The number in an array, or the attributes of an object, such as a counter; not those of modules and tensors."""
    if isinstance(value, nn.Module) or getattr(value, "grad_fn", None):  # a graph is that of one step
        return None
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return value.item() if math.prod(value.shape) == 1 else None
    if isinstance(value, random.Random | np.random.Generator | np.random.RandomState):
        return pickle.dumps(value).hex()
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if inspect.isfunction(value):  # such as a hook
        return [cell.cell_contents for cell in value.__closure__ or ()]
    if isinstance(value, itertools.count):
        return repr(value)
    return list(value) if isinstance(value, deque | set | frozenset) else vars(value)


def _what_learns_nothing(setup: Setup, graphs: list[Any]) -> list[str]:
    """List the parameters that have had no gradient, and what has had one and is not trained."""
    idle = [path for path, one in setup.model.named_parameters() if one.requires_grad and one.grad is None]
    trained = {weights for group in setup.optimizer.param_groups for weights in group["params"]}
    used = Counter(leaf for graph in graphs for leaf in _leaves(graph))
    outside = {leaf for leaf, steps in used.items() if steps > 1} - trained  # an input to differentiate by is used once
    if shapes := sorted({str(tuple(one.shape)) for one in outside}):
        remedy = "keep layers in an nn.ModuleList, and pass a loss with parameters as the nn.Module that it is"
        idle.append(f"tensors of shape {', '.join(shapes[:3])} outside the network ({remedy})")
    return idle


def _leaves(graph: Tensor) -> set[Tensor]:
    """The tensors to which a scalar has a gradient, and which come from no other."""
    todo, nodes = [graph.grad_fn], set[Any]()
    for node in todo:  # which grows
        if node is not None and node not in nodes:
            nodes.add(node)
            todo += [one for one, _ in node.next_functions]
    return {node.variable for node in nodes if hasattr(node, "variable")}


@cache
def _say(line: str) -> None:
    """Print a line once: every seed takes its own first steps."""
    print(line, file=sys.stderr, flush=True)


def _go_on(run: Run, setup: Setup, batch: Any) -> dict[str, float]:
    """Evaluate the model and take one more step, and return the cross-entropy and the record of the step."""
    some = setup.test.part(slice(EVALUATED))
    more = setup.test.part(slice(EVALUATED + len(setup.test) % EVALUATED))  # and as many as the last batch has
    copied = "" if setup.average is None else " of the moving average's copy (a hook must use the module it is given)"
    with error_prefix(f"the evaluation{copied} fails"):
        logits = predict_logits(setup.final_model, some)
        _require_logits(logits, len(some), len(some.class_names))
        if not torch.equal(logits, predict_logits(setup.final_model, more)[: len(some)]) and not logits.isnan().any():
            raise SettingError(
                "the network gives other logits each time: call F.dropout with `training=self.training`, and draw "
                "random numbers in training alone"
            )
        evaluation = float(F.cross_entropy(logits.float(), some.labels))
    seed_everything(run.seed, 2, CPU)
    with error_prefix(f"a step on {len(batch[1])} images, as many as the last batch has, fails"):
        step = _step(run, setup, batch, [])
        after = predict_logits(setup.model, some)  # shows what the optimizer keeps
        return {"evaluation": evaluation, **step, "loss afterwards": float(F.cross_entropy(after.float(), some.labels))}
