"""One run, from its seed to its folder: training, checkpoints, and the saved result."""

import threading
import time
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from s6lib.errors import RunError
from s6lib.lab.device import keep_freed_memory, machine, reproducible, seed_everything
from s6lib.lab.files import (
    is_complete,
    read_checkpoint,
    remove_parts,
    serialise,
    write_checkpoint,
    write_results,
    write_whole,
)
from s6lib.lab.first_steps import first_steps, identity_differences
from s6lib.lab.record import has_user_code, settings_of
from s6lib.lab.replay import Replay, records_steps
from s6lib.lab.setup import Setup, read_data, serialise_weights, set_up
from s6lib.recipes import Run
from s6lib.train import NonFiniteLoss, add_step, evaluate, train_epoch

History = list[dict[str, float]]
# A process trains one run at a time, since torch has one generator and one number of threads per process.
_ONE_RUN = threading.Lock()
COLUMNS = ("epoch", "lr", "train_loss", "train_accuracy", "penalty", "val_loss", "val_accuracy", "seconds")


class RunResult(NamedTuple):
    """The result of training.

    first_steps: the record of the first steps as JSON, for a run with the user's code (see first_steps.py).
    history: one row per epoch, with the keys COLUMNS; accuracies from 0 to 1, seconds of training alone.
    weights: the state_dict, on the CPU, as torch.save writes it; bytes travel much faster than tensors.
    predictions: uint8 (N,), the class of each test image.
    machines: the machines that trained it, in order: device, processor, library versions, host and process.
    """

    first_steps: dict[str, Any] | None
    history: History
    weights: bytes
    predictions: np.ndarray
    machines: list[dict[str, Any]]


def train_run(run: Run, folder: Path | None = None, device: str | torch.device = "cpu") -> RunResult:
    """Train a run; with a `folder`, resume from its checkpoint, and write one after each epoch until it is complete.

    All random numbers come from (seed, epoch) alone, so that a resumed run gives the same bits as one without a stop.
    Raises RunError if the loss is not finite, or the checkpoint belongs to another run.
    """
    keep_freed_memory()
    device = torch.device(device)
    with _ONE_RUN, reproducible(device):
        data = read_data(run.settings)
        steps = first_steps(run, data) if has_user_code(run) else None
        setup = set_up(run, data, device)
        state = {**_identity(run, steps), "history": [], "machines": []}
        if _may_write_in(folder):
            _resume(folder, state, setup)
        history, machines = state["history"], state["machines"]
        here = machine(device)
        machines[:] = [earlier for earlier in machines if earlier != here] + [here]
        predictions = None
        for epoch in range(len(history) + 1, setup.settings.epochs + 1):
            try:
                row, predictions = _epoch(run, epoch, setup)
            except NonFiniteLoss as error:
                raise RunError(
                    f"{run}: the loss is not finite at epoch {epoch}, step {error.step}; lower the learning rate or "
                    "the penalties"
                ) from None
            history.append(row)
            if _may_write_in(folder):
                write_checkpoint(folder, {**state, **{name: part.state_dict() for name, part in setup.parts.items()}})
                write_whole(folder / "history.csv", _history_csv(history))
        if predictions is None:  # the run was stopped after its last epoch
            predictions = evaluate(setup.final_model, setup.test).predictions
        return RunResult(steps, history, serialise_weights(setup.final_model), predictions.numpy(), machines)


def _identity(run: Run, steps: dict[str, Any] | None) -> dict[str, Any]:
    """The run's identity, as JSON: its settings and, with the user's code, its first steps."""
    return settings_of(run) | ({} if steps is None else {"first_steps": steps})


def _may_write_in(folder: Path | None) -> TypeGuard[Path]:
    """Return whether a run in training may write in its folder: only until the folder is complete.

    A run that seemed lost and was sent out again may still be training when the second attempt has finished.
    """
    return folder is not None and not is_complete(folder)


def _epoch(run: Run, epoch: int, setup: Setup) -> tuple[dict[str, float], Tensor]:
    """Train an epoch; return its row of the history, and the predicted classes of the test images."""
    device, rates = setup.train.labels.device, setup.settings.learning_rates(epoch)
    generator = seed_everything(run.seed, epoch, device)
    start = time.perf_counter()
    step = Replay(setup.learner, setup.average, rates, has_user_code(run)) if records_steps(device) else add_step
    training = train_epoch(setup.learner, setup.batches(epoch, generator), step)
    seconds = time.perf_counter() - start
    test = evaluate(setup.final_model, setup.test)
    if not np.isfinite(test.loss):  # the last step's update was too large
        raise NonFiniteLoss(step=len(rates))
    row = (epoch, rates[0], *training, test.loss, test.accuracy, seconds)
    return dict(zip(COLUMNS, row, strict=True)), test.predictions


def save_run(folder: Path, run: Run, result: RunResult) -> None:
    """Write a finished run to its folder."""
    *earlier, last = result.machines
    about = {**_identity(run, result.first_steps), **last, **({"earlier": earlier} if earlier else {})}
    about["seconds"] = round(sum(row["seconds"] for row in result.history), 1)
    results = {
        "predictions.npy": serialise(lambda file: np.save(file, result.predictions)),
        "weights.pt": result.weights,
        "history.csv": _history_csv(result.history),
    }
    write_results(folder, about, results)


def _resume(folder: Path, state: dict[str, Any], setup: Setup) -> None:
    """Restore state and setup from the checkpoint in `folder`, if there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_parts(folder)
    checkpoint = read_checkpoint(folder, resume=True)
    if checkpoint is not None:
        if identity_differences(checkpoint, state):
            raise RunError(f"the checkpoint in {folder} is of another run; delete it to start the run again")
        for name, part in setup.parts.items():
            part.load_state_dict(checkpoint[name])
        state.update({name: checkpoint.get(name, []) for name in ("history", "machines")})
    write_whole(folder / "history.csv", _history_csv(state["history"]))


def _history_csv(history: History) -> bytes:
    return pd.DataFrame(history, columns=COLUMNS).to_csv(index=False, lineterminator="\n").encode()
