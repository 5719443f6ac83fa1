"""The first steps of a run: a trial before training, and the identity of a run with the user's code."""

import io
import json
import math
import traceback
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s6lib.errors import SettingError
from s6lib.lab.device import CPU, reproducible, seed_everything
from s6lib.lab.record import differences, has_user_code
from s6lib.lab.setup import Data, Setup, build_network, serialise_weights, set_up
from s6lib.recipes import Loss, Penalty, Run
from s6lib.train import predict_logits, train_step

STEPS = 3  # and one more, on a batch of the last one's size
# Relative. Torch 2.5, 2.11 and 2.14 differ by up to 7e-6 in a loss and 6e-3 in a gradient, over 30 networks: where two
# pixels of a pool nearly tie, or a ReLU is nearly at zero, the gradient jumps.
TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 2e-2
PACKAGE = Path(__file__).parents[1]
SHARES = [share / 20 for share in range(20)]  # shares of training done at which the user's schedule is recorded
EVALUATED = 250  # number of test images


def first_steps(run: Run, data: Data) -> dict[str, Any]:
    """Take the first steps of a run on the CPU, and return their record as JSON.

    The record holds names and shapes of the parameters; loss, penalty and size of the gradient of each step; the
    cross-entropy on some test images afterwards; and a description of data, schedule and optimizer if they are the
    user's.

    Raises SettingError, naming the condition, if the run cannot be trained: its network cannot be built, two builds
    with its seed differ or share parameters, a step fails, or the saved model gives other predictions.
    """
    name = f"{run.condition.label} ({run.condition.slug})"
    with reproducible(CPU):
        with _error_prefix(f"{name} cannot be built"):
            setup = set_up(run, data, CPU)
            seed_everything(run.seed, 0, CPU)
            second = build_network(run, setup.train)
            _require_equal_builds(setup.learner.model, second)
        untouched = deepcopy(second.state_dict())
        with _error_prefix(f"{name} cannot be trained"):
            steps = [_measure_step(run, setup, *batch) for batch in _first_batches(run, setup)]
            if not _same_state(second.state_dict(), untouched):
                raise SettingError("training one network changed another: `network` must make a new one each time")
        with _error_prefix(f"{name} cannot be saved and read back"):
            logits = _read_back(setup, second)
        evaluation = float(F.cross_entropy(logits, setup.test.labels[:EVALUATED]))
    shapes = {name: "x".join(map(str, weights.shape)) for name, weights in setup.learner.model.named_parameters()}
    return {"parameters": shapes, "steps": steps, "evaluation": evaluation, **_describe_user_parts(setup)}


def try_out(run: Run, data: Data) -> dict[str, Any]:
    """Take the first steps of a run, twice if it contains the user's code.

    Raises SettingError as `first_steps` does, and if the two differ.
    """
    steps = first_steps(run, data)
    if has_user_code(run) and (different := step_differences(steps, first_steps(run, data), tolerance=1e-6)):
        raise SettingError(
            f"{run.condition.label} ({run.condition.slug}) trains differently each time ({different[0]}): your code "
            "keeps a state from run to run, or draws random numbers that torch, numpy and random do not seed"
        )
    return steps


def identity_differences(recorded: dict[str, Any], requested: dict[str, Any]) -> list[str]:
    """Describe how a recorded run differs from the requested one, a phrase each; none if they are the same run."""
    settings = ("recipe", "condition", "seed")
    phrases = differences(recorded, {name: requested[name] for name in settings if name in requested})
    if phrases or "first_steps" not in requested:
        return phrases
    if "first_steps" not in recorded:
        return ["no record of its first steps"]
    return step_differences(recorded["first_steps"], requested["first_steps"])


def step_differences(recorded: Any, requested: Any, name: str = "", tolerance: float = TOLERANCE) -> list[str]:
    """Describe how recorded first steps differ from the requested ones, a phrase each.

    Keys that only one dict has are ignored: another version of torch may name more settings of an optimizer.
    """
    if isinstance(recorded, dict) and isinstance(requested, dict):
        if name == "parameters" and recorded.keys() != requested.keys():
            names = sorted(recorded.keys() ^ requested.keys())
            some = ", ".join([*names[:3], "..."] if len(names) > 3 else names)
            return [f"other parameters (only one of the two has {some})"]
        pairs = [(f"{name} {key}".strip(), recorded[key], requested[key]) for key in requested if key in recorded]
    elif isinstance(recorded, list) and isinstance(requested, list) and len(recorded) == len(requested):
        one = name.removesuffix("s")
        pairs = [(f"{one} {number}", *pair) for number, pair in enumerate(zip(recorded, requested, strict=True), 1)]
    elif _is_close(recorded, requested, GRADIENT_TOLERANCE if name.endswith(" gradient") else tolerance):
        return []
    else:
        return [f"{name} = {_format(recorded)}, not {_format(requested)}"]
    return [phrase for part, old, new in pairs for phrase in step_differences(old, new, part, tolerance)]


def _is_close(a: Any, b: Any, tolerance: float) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=tolerance, abs_tol=1e-9) or (math.isnan(a) and math.isnan(b))
    return a == b


def _format(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else repr(value)


@contextmanager
def _error_prefix(what: str) -> Iterator[None]:
    """Re-raise errors of the user's code as one sentence that says where they came from."""
    try:
        yield
    except SettingError as error:
        message = str(error)
        raise SettingError(message if message.startswith(what.partition(")")[0]) else f"{what}: {message}") from None
    except Exception as error:  # of the user's own code: any
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise SettingError(f"{what}: {type(error).__name__}: {reason}{_place(error)}") from None


def _place(error: Exception) -> str:
    """Locate an error in the user's code; empty if it came from a library."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename and str(PACKAGE) not in frame.filename]
    return f" (in {own[-1].name}, line {own[-1].lineno})" if own else ""


def _require_equal_builds(first: nn.Module, second: nn.Module) -> None:
    if first is not second and not _same_state(first.state_dict(), second.state_dict()):
        raise SettingError(
            "two networks built with one seed differ: draw random numbers from the global generators of torch, numpy "
            "or random, which each run seeds"
        )


def _same_state(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Return whether two state_dicts hold equal tensors under equal names; extra state is not compared."""
    return first.keys() == second.keys() and all(
        torch.allclose(value, second[name], rtol=0, atol=0, equal_nan=True)
        for name, value in first.items()
        if isinstance(value, Tensor)
    )


def _first_batches(run: Run, setup: Setup) -> Iterator[tuple[Any, str]]:
    """Yield batches of the first epoch, and one of the last batch's size, each with a message for its failure."""
    generator = seed_everything(run.seed, 1, CPU)
    for number, batch in enumerate(islice(setup.batches(1, generator), STEPS), 1):
        yield batch, f"step {number} fails"
    last = len(setup.train.labels) % setup.settings.batch_size
    if last:
        few = setup._replace(train=setup.train.part(slice(last)))
        yield next(few.batches(1, generator)), f"a step on {last} images, as many as the last batch has, fails"


def _measure_step(run: Run, setup: Setup, batch: Any, failure: str) -> dict[str, float]:
    """Take a step, and return its loss, its penalty and the size of its gradient."""
    pair = isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)
    if not pair or len(batch[0]) != len(batch[1]):
        raise SettingError("`transform` must return images and targets, two tensors of one length")
    images, targets = batch
    learner = setup.learner._replace(loss=_loss_with_checks(setup), penalty=_penalty_with_checks(run))
    learner.model.train()
    with _error_prefix(failure):
        logits, loss, penalty = train_step(learner, images, targets)
        F.cross_entropy(logits, targets)  # the history records it, whatever the loss
    gradients = [weights.grad for weights in learner.model.parameters() if weights.grad is not None]
    sizes = [(one.coalesce().values() if one.is_sparse else one).abs().double().norm() for one in gradients]
    gradient = float(torch.stack(sizes).norm()) if sizes else 0.0
    return {"loss": float(loss), "penalty": float(penalty), "gradient": gradient}


def _loss_with_checks(setup: Setup) -> Loss:
    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        _require_logits(logits, len(targets), len(setup.train.class_names))
        value = setup.settings.loss(logits, targets)
        _require_scalar("`loss`", value)
        return value

    return loss


def _penalty_with_checks(run: Run) -> Penalty:
    own = run.condition.penalty
    if own is None:
        return run.condition.penalty_of

    def penalty(model: nn.Module) -> Tensor | float:
        value = own(model)
        _require_scalar("`penalty`", value)
        return value

    return replace(run.condition, penalty=penalty).penalty_of


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


@torch.no_grad()
def _read_back(setup: Setup, second: nn.Module) -> Tensor:
    """Compute the logits of some test images. Raises SettingError if the model saved and read back gives others."""
    some = setup.test.part(slice(EVALUATED))
    logits = predict_logits(setup.final_model, some)
    _require_logits(logits, len(some.labels), len(some.class_names))
    state = torch.load(io.BytesIO(serialise_weights(setup.final_model)), map_location="cpu", weights_only=True)
    second.load_state_dict(state)
    if not torch.allclose(predict_logits(second, some), logits, rtol=1e-3, atol=1e-4, equal_nan=True):
        raise SettingError(
            "it gives other predictions: everything the network needs must be in its state_dict (parameters, buffers, "
            "or get_extra_state), or follow from the seed"
        )
    return logits.float()


def _describe_user_parts(setup: Setup) -> dict[str, Any]:
    """Describe the user's data, schedule and optimizer, which the first steps alone would not fully show."""
    settings = setup.settings
    parts: dict[str, Any] = {}
    if callable(settings.data):
        arrays = [*setup.train[:2], *setup.test[:2]]
        sums = [zlib.crc32(array.contiguous().numpy().data) for array in arrays]
        parts["data"] = {"class names": list(setup.train.class_names), "checksums": sums}
    if callable(settings.schedule):
        parts["schedule"] = [settings.factor(share) for share in SHARES]
    if settings.optimizer is not None:
        groups = setup.learner.optimizer.param_groups
        parts["optimizer"] = [{name: value for name, value in group.items() if name != "params"} for group in groups]
    return json.loads(json.dumps(parts, default=str))
