"""The trial of a run with the user's code: its first steps, which also identify it, and a check for hidden state."""

import hashlib
import io
import json
import sys
import sysconfig
import traceback
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s6lib.errors import SettingError
from s6lib.lab.device import CPU, reproducible, seed_everything
from s6lib.lab.files import serialise
from s6lib.lab.record import compare, is_library
from s6lib.lab.run import Data, Setup, set_up
from s6lib.recipes import Run
from s6lib.train import l1_l2_penalty, predict_logits, train_epoch

STEPS = 3  # and one more, from a state that was saved and read back
PACKAGE = Path(__file__).parents[1]
EVALUATED = 250  # number of test images
_STATE = (
    "a number that it keeps in Python makes a run depend on the order of runs and on where it was stopped: keep it in "
    "a buffer, or use the share of training done, as a schedule does"
)


def first_steps(run: Run, data: Data) -> dict[str, Any]:
    """Take the first steps of a run on the CPU, and return their record as JSON.

    The record holds names and shapes of the parameters; loss, penalty and size of the gradient of each step; the
    cross-entropy on some test images afterwards; a digest of all learning rates; and a description of data and
    optimizer if they are the user's.

    Raises SettingError, naming the condition, if the run cannot be trained: its network cannot be built, two builds
    with its seed differ or share parameters, a step fails, or it continues differently from a saved state.
    """
    name = f"{run.condition.label} ({run.condition.slug})"
    with reproducible(CPU):
        with _error_prefix(f"{name} cannot be built"):
            setup, second = set_up(run, data, CPU), set_up(run, data, CPU)
            before = _require_equal_builds(setup.model, second.model)
            rates = [
                rate for epoch in range(setup.settings.epochs) for rate in setup.settings.learning_rates(epoch + 1)
            ]
        with _error_prefix(f"{name} cannot be trained"):
            pickled = _pickles(run)  # before the first transform
            batches, steps, attributes = list(_first_batches(run, setup)), [], []
            for number, batch in enumerate(batches[:STEPS], 1):
                with _error_prefix(f"step {number} fails"):
                    steps.append(_step(run, setup, batch))
                if len(batch[1]) == len(batches[0][1]):  # a network may keep the shape of what it has seen
                    attributes.append(_attributes(setup))
            if not _same_state(second.model.state_dict(), before):
                raise SettingError("training one network changed another: `network` must make a new one each time")
            _require_no_hidden_state(run, pickled, attributes)
            _name_what_learns_nothing(name, setup.model)
        with _error_prefix(f"{name} cannot be evaluated"):
            logits = _evaluate(setup)
            evaluation = float(F.cross_entropy(logits, setup.test.labels[:EVALUATED]))
        with _error_prefix(f"{name} cannot be saved and read back"):
            _require_going_on_alike(run, setup, second, logits, batches)
    shapes = {name: "x".join(map(str, weights.shape)) for name, weights in setup.model.named_parameters()}
    digest = hashlib.sha256(" ".join(f"{rate:.6g}" for rate in rates).encode()).hexdigest()
    record = {"parameters": shapes, "steps": steps, "evaluation": evaluation, "learning rates": digest}
    return {**record, **_describe_user_parts(setup)}


@contextmanager
def _error_prefix(what: str) -> Iterator[None]:
    """Re-raise errors of the user's code as one sentence that says where they came from."""
    try:
        yield
    except SettingError as error:
        message = str(error)
        raise SettingError(message if message.startswith(what.partition(")")[0]) else f"{what}: {message}") from None
    except Exception as error:  # of the user's own code: any
        lines = [line.strip() for line in str(error).strip().splitlines()] or ["no reason given"]
        reason = " ".join(lines[:2])[:300]
        raise SettingError(f"{what}: {type(error).__name__}: {reason}{_place(error)}") from None


def _place(error: Exception) -> str:
    """Locate an error in the user's code; empty if it came from a library."""
    frames = traceback.extract_tb(error.__traceback__)
    libraries = ("site-packages", "dist-packages", str(PACKAGE), sysconfig.get_path("stdlib"))
    own = [frame for frame in frames if not any(part in frame.filename for part in libraries)]
    return f" (in {own[-1].name}, line {own[-1].lineno})" if own else ""


def _require_equal_builds(first: nn.Module, second: nn.Module) -> dict[str, Any]:
    """Return a copy of the second's state. Raises SettingError if the two differ."""
    state = {name: value.clone() if isinstance(value, Tensor) else value for name, value in second.state_dict().items()}
    if not _same_state(first.state_dict(), state):
        raise SettingError(
            "two networks built with one seed differ: draw random numbers from the global generators of torch, numpy "
            "or random, which each run seeds"
        )
    return state


def _same_state(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Return whether two state_dicts hold equal tensors under equal names; extra state is not compared."""
    return first.keys() == second.keys() and all(
        torch.allclose(value, second[name], rtol=0, atol=0, equal_nan=True)
        for name, value in first.items()
        if isinstance(value, Tensor)
    )


def _first_batches(run: Run, setup: Setup) -> Iterator[Any]:
    """Yield the first batches of the first epoch, then one of the size of the epoch's last batch."""
    generator = seed_everything(run.seed, 1, CPU)
    yield from islice(setup.batches(1, generator), STEPS)
    last = len(setup.train) % setup.settings.batch_size or setup.settings.batch_size
    yield next(setup._replace(train=setup.train.part(slice(last))).batches(1, generator))


def _step(run: Run, setup: Setup, batch: Any) -> dict[str, float]:
    """Take a step, and return its loss, its penalty and the size of its gradient."""
    pair = isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)
    if not pair or len(batch[0]) != len(batch[1]):
        raise SettingError("`batch_transform` must return images and targets, two tensors of one length")
    values: dict[str, float] = {}

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        _require_logits(logits, len(targets), len(setup.train.class_names))
        with _error_prefix(f"`loss` fails on logits {tuple(logits.shape)} and targets {tuple(targets.shape)}"):
            value = setup.loss(logits, targets)
        _require_scalar("`loss`", value)
        values["loss"] = value.item()
        return value

    def penalty(model: nn.Module) -> Tensor | float:
        own = 0.0 if run.condition.penalty is None else run.condition.penalty(model)
        if not isinstance(own, int | float) or own:
            _require_scalar("`penalty`", own)
        value = l1_l2_penalty(model, run.condition.l1, run.condition.l2) + own
        values["penalty"] = value.item() if isinstance(value, Tensor) else float(value)
        return value

    # The history records cross-entropy, whatever the loss.
    train_epoch(setup.model, [[part.clone() for part in batch]], setup.optimizer, loss, penalty)
    gradients = [weights.grad for weights in setup.model.parameters() if weights.grad is not None]
    sizes = [(one.coalesce().values() if one.is_sparse else one).abs().double().norm() for one in gradients]
    return {**values, "gradient": float(torch.stack(sizes).norm()) if sizes else 0.0}


def _require_scalar(what: str, value: Any) -> None:
    if not isinstance(value, Tensor) or value.shape != ():
        shape = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise SettingError(f"{what} must return a scalar tensor, not {shape}")
    if not value.requires_grad:
        raise SettingError(
            f"{what} has no gradient, so it would not affect training: compute it from the network's parameters, "
            "without item(), detach() or no_grad()"
        )


def _require_logits(logits: Any, count: int, classes: int) -> None:
    if not isinstance(logits, Tensor) or logits.shape != (count, classes):
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise SettingError(
            f"the network must turn images (N, 1, H, H) into logits (N, {classes}), not {shape} for N = {count}"
        )
    if not logits.is_floating_point():
        raise SettingError(f"the network must return logits as floating-point numbers, not {logits.dtype}")
    sums = logits.detach().sum(1)
    if bool((logits >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
        raise SettingError("the network must return logits, not probabilities: leave out the softmax at its end")


def _pickles(run: Run) -> dict[str, bytes]:
    """The user's parts as bytes, which show a counter in a closure, a global or an attribute."""
    pickles = {}
    for name, part in run.parts.items():
        if not is_library(part) and name != "data":
            with suppress(Exception):  # a lock, for example: what cannot be pickled cannot be watched
                pickles[name] = pack(part, [part])
    return pickles


def pack(content: Any, parts: Iterable[Any]) -> bytes:
    """Pickle something for any process with s6lib, with the user's code in `parts`, be it in a file or a notebook."""
    modules = {sys.modules.get(_module_of(part)) for part in parts if callable(part) and not is_library(part)}
    by_value = {module for module in modules if module is not None and not _is_installed(module)}
    for module in by_value:
        cloudpickle.register_pickle_by_value(module)
    try:
        return cloudpickle.dumps(content)
    finally:
        for module in by_value:
            cloudpickle.unregister_pickle_by_value(module)


def _module_of(thing: Any) -> str:
    while isinstance(thing, partial):
        thing = thing.func
    return getattr(thing, "__module__", None) or type(thing).__module__


def _is_installed(module: ModuleType) -> bool:
    """Return whether a worker can import a module: one of Python's or an installed package's."""
    file = getattr(module, "__file__", None) or ""
    package = module.__name__.partition(".")[0]
    return package in sys.stdlib_module_names or "site-packages" in file or "dist-packages" in file


def _attributes(setup: Setup) -> dict[str, Any]:
    """The attributes of network and loss that are numbers, text, or lists and dicts of them, by name."""
    modules = [("network", *pair) for pair in setup.model.named_modules()]
    modules += [("loss", *pair) for loss in setup.parts.get("loss", ()) for pair in loss.named_modules()]
    return {
        f"`{path}{'.' if path else ''}{name}` of the {part}": repr(value)
        for part, path, module in modules
        if type(module).get_extra_state is nn.Module.get_extra_state  # what it keeps would be in the checkpoint
        for name, value in vars(module).items()
        if name != "training" and name[0] != "_" and _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return all(map(_is_plain, value.values())) if isinstance(value, dict) else isinstance(value, int | float | str)


def _require_no_hidden_state(run: Run, pickles: dict[str, bytes], attributes: list[dict[str, Any]]) -> None:
    """Raise SettingError if the steps have changed something that a checkpoint does not hold."""
    before, after = attributes[0], attributes[-1]
    changed = [name for name, value in before.items() if after.get(name, value) != value]
    changed += [f"`{name}`" for name, content in _pickles(run).items() if pickles.get(name, content) != content]
    if changed:
        raise SettingError(f"{changed[0]} changes from step to step, and {_STATE}")


def _name_what_learns_nothing(name: str, model: nn.Module) -> None:
    """Print which parameters have had no gradient, and which layers are hidden in plain lists and dicts."""
    idle = [path for path, one in model.named_parameters() if one.requires_grad and one.grad is None]
    known = set(model.modules())
    for module in known:
        for attribute, value in vars(module).items():
            items = value.values() if isinstance(value, dict) and attribute[0] != "_" else value
            if isinstance(items, list | tuple | type({}.values())):
                hidden = [one for one in items if isinstance(one, nn.Module) and one not in known]
                idle += [f"{attribute} (use nn.ModuleList)"] if hidden else []
    if idle:
        _say(f"{name}: in the first steps, these learned nothing: {', '.join(idle[:5])}")


@cache
def _say(line: str) -> None:
    """Print a line once: every seed takes its own first steps."""
    print(line, file=sys.stderr, flush=True)


def _evaluate(setup: Setup) -> Tensor:
    """Compute the logits of some test images."""
    some = setup.test.part(slice(EVALUATED))
    try:
        logits = predict_logits(setup.final_model, some)
    except KeyError as error:
        if setup.average is None:
            raise
        raise SettingError(
            f"the moving average copies the network, and a hook or a lambda in it still refers to the original "
            f"({error} is missing there): refer to the module that the hook is given"
        ) from None
    _require_logits(logits, len(some), len(some.class_names))
    return logits.float()


def _require_going_on_alike(run: Run, setup: Setup, second: Setup, logits: Tensor, batches: list[Any]) -> None:
    """Raise SettingError if a second setup with the saved state predicts or continues differently."""
    state = serialise(lambda file: torch.save({name: part.state_dict() for name, part in setup.parts.items()}, file))
    saved = torch.load(io.BytesIO(state), map_location="cpu", weights_only=True)
    layers = setup.model.state_dict().keys() ^ second.model.state_dict().keys()
    if layers:
        raise SettingError(f"{min(layers)} is made in a step: make all layers in __init__, such as nn.LazyLinear")
    for name, part in second.parts.items():
        part.load_state_dict(saved[name])
    if not torch.allclose(_evaluate(second), logits, rtol=1e-3, atol=1e-4, equal_nan=True):
        raise SettingError(
            "it gives other predictions: everything the network needs must be in its state_dict (parameters, buffers, "
            "or get_extra_state), or follow from the seed"
        )
    last, steps = len(batches[-1][1]), []
    for one in (setup, second):
        seed_everything(run.seed, 2, CPU)
        with _error_prefix(f"a step on {last} images, as many as the last batch has, fails"):
            steps.append(_step(run, one, batches[-1]))
    if phrases := compare(steps[0], steps[1], tolerance=1e-5):
        raise SettingError(
            f"it trains differently from there ({phrases[0]}): it keeps a state outside its state_dict, or draws "
            f"random numbers that torch, numpy and random do not seed; {_STATE}"
        )


def _describe_user_parts(setup: Setup) -> dict[str, Any]:
    """Describe the user's data and optimizer, which the first steps alone would not fully show."""
    parts: dict[str, Any] = {}
    if callable(setup.settings.data):
        arrays = [part for data in (setup.train, setup.test) for part in (data.images, data.labels)]
        sums = [zlib.crc32(array.contiguous().numpy().data) for array in arrays]
        parts["data"] = {"class names": list(setup.train.class_names), "checksums": sums}
    if setup.settings.optimizer is not None:
        groups = setup.optimizer.param_groups
        parts["optimizer"] = [{name: value for name, value in group.items() if name != "params"} for group in groups]
    return json.loads(json.dumps(parts, default=str))
