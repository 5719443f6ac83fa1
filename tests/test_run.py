import io
import json
import os
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GBN, L1_BN, TINY, evaluation_on_few_digits

import s6lib.lab.run
import s6lib.lab.setup
from s6lib.errors import RunError
from s6lib.lab.device import _denormals_are_flushed
from s6lib.lab.files import is_complete, read_about, read_checkpoint
from s6lib.lab.run import COLUMNS, save_run, train_run
from s6lib.models import PlainNet
from s6lib.norm import GhostBatchNorm
from s6lib.recipes import Run

pytestmark = pytest.mark.usefixtures("few_digits")


class Stopped(BaseException):
    """Stands for a process that ends where it is."""


def assert_same_run(a, b):
    for row, other in zip(a.history, b.history, strict=True):
        assert {**row, "seconds": 0} == {**other, "seconds": 0}
    assert a.weights == b.weights
    assert np.array_equal(a.predictions, b.predictions)


@pytest.fixture(scope="module")
def undisturbed():
    with evaluation_on_few_digits():
        return train_run(Run(TINY, GBN, 1))


def test_run_holds_what_the_design_says(undisturbed):
    assert [tuple(row) for row in undisturbed.history] == [COLUMNS] * 2
    assert [row["epoch"] for row in undisturbed.history] == [1, 2]
    assert undisturbed.predictions.dtype == np.uint8
    assert undisturbed.predictions.shape == (500,)
    assert undisturbed.machines[0]["device"] == "cpu"


def test_predictions_and_accuracy_agree(undisturbed, mnist):
    hits = int((undisturbed.predictions == mnist[1].labels[:500].numpy()).sum())
    assert undisturbed.history[-1]["val_accuracy"] == hits / 500


def test_randomness_comes_from_the_seed_alone(undisturbed):
    torch.manual_seed(99)
    torch.set_num_threads(2)
    state = torch.get_rng_state()
    try:
        assert_same_run(train_run(Run(TINY, GBN, 1)), undisturbed)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert train_run(Run(TINY, GBN, 2)).history != undisturbed.history


def test_conditions_of_a_seed_share_batches_but_not_results(monkeypatch):
    drawn = []
    original = s6lib.lab.setup.batches

    def spy(*args):
        for images, labels in original(*args):
            drawn.append((images, labels))
            yield images, labels

    monkeypatch.setattr(s6lib.lab.setup, "batches", spy)
    once = replace(TINY, epochs=1)
    runs = [train_run(Run(once, condition, 1)) for condition in (L1_BN, GBN)]
    for (images, labels), (others, other_labels) in zip(drawn[:10], drawn[10:], strict=True):
        assert torch.equal(images, others)
        assert torch.equal(labels, other_labels)
    assert runs[0].history != runs[1].history


CYCLE = replace(
    TINY, schedule="one-cycle", nesterov=True, learning_rate=0.1, shift=2.0, scale=0.1, ema=0.9, held_out=True
)


def test_the_moving_average_is_what_is_judged_and_saved(monkeypatch):
    """With a decay of 0.5, three steps leave 1/4, 1/4 and 1/2 of the three models; the first is the whole at first."""
    seen = []

    def spy(learner, batches, *step):
        weights = list(learner.model.parameters())
        learner.optimizer.register_step_post_hook(lambda *_: seen.append([w.detach().clone() for w in weights]))
        return original(learner, batches, *step)

    original = s6lib.lab.run.train_epoch
    monkeypatch.setattr(s6lib.lab.run, "train_epoch", spy)
    trained = train_run(Run(replace(TINY, epochs=1, train_images=192, ema=0.5), GBN, 1))
    weights = torch.load(io.BytesIO(trained.weights))
    for name, first, second, third in zip(dict(PlainNet().named_parameters()), *seen, strict=True):
        assert torch.allclose(weights[name], first / 4 + second / 4 + third / 2, atol=1e-6)


def test_a_one_cycle_run_on_held_out_digits_goes_on_as_if_never_stopped(mnist, tmp_path, monkeypatch):
    whole = train_run(Run(CYCLE, GBN, 1))
    assert [row["lr"] for row in whole.history] == [CYCLE.learning_rates(epoch)[0] for epoch in (1, 2)]
    right = (torch.from_numpy(whole.predictions) == mnist[0].labels[50_000:50_500]).float().mean()
    assert whole.history[-1]["val_accuracy"] == pytest.approx(float(right))
    original = s6lib.lab.run.train_epoch

    def stop_at_epoch_2(learner, batches, *step):
        if learner.optimizer.state:
            raise Stopped
        return original(learner, batches, *step)

    monkeypatch.setattr(s6lib.lab.run, "train_epoch", stop_at_epoch_2)
    with pytest.raises(Stopped):
        train_run(Run(CYCLE, GBN, 1), tmp_path)
    monkeypatch.undo()
    assert_same_run(train_run(Run(CYCLE, GBN, 1), tmp_path), whole)


EVERY_WRITE = [pytest.param(n, marks=() if n in (1, 2, 6, 10) else pytest.mark.slow) for n in range(1, 11)]


@pytest.mark.parametrize("writes", EVERY_WRITE)
def test_a_run_stopped_at_any_write_ends_as_if_never_stopped(undisturbed, tmp_path, monkeypatch, writes):
    """The process ends in the middle of the n-th file that it writes; then the same run is asked for again."""
    original, count = os.fsync, 0

    def fsync(descriptor):
        nonlocal count
        count += 1
        if count == writes:
            raise Stopped
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(Stopped):
        train_run(Run(TINY, GBN, 1), tmp_path)
    monkeypatch.undo()
    assert_same_run(train_run(Run(TINY, GBN, 1), tmp_path), undisturbed)


def test_a_run_goes_on_from_its_checkpoint(undisturbed, tmp_path, monkeypatch):
    def stop_at_epoch_2(learner, batches, *step):
        if learner.optimizer.state:
            raise Stopped
        return original(learner, batches, *step)

    original = s6lib.lab.run.train_epoch
    monkeypatch.setattr(s6lib.lab.run, "train_epoch", stop_at_epoch_2)
    with pytest.raises(Stopped):
        train_run(Run(TINY, GBN, 1), tmp_path)
    (tmp_path / ".checkpoint.pt.123.part").write_bytes(b"half a file")

    epochs = []
    monkeypatch.setattr(s6lib.lab.run, "train_epoch", lambda *args: epochs.append(1) or original(*args))
    assert_same_run(train_run(Run(TINY, GBN, 1), tmp_path), undisturbed)
    assert len(epochs) == 1
    assert not list(tmp_path.glob(".*"))


def test_a_finished_folder_holds_four_files(undisturbed, tmp_path):
    train_run(Run(TINY, GBN, 1), tmp_path)
    assert read_checkpoint(tmp_path)["recipe"]["epochs"] == 2
    assert not is_complete(tmp_path)
    save_run(tmp_path, Run(TINY, GBN, 1), undisturbed)
    assert is_complete(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "history.csv", "weights.pt", "predictions.npy"}
    about = json.loads((tmp_path / "run.json").read_text())
    assert about["condition"]["slug"] == "gbn"
    assert about["seed"] == 1
    assert about["torch"] == torch.__version__
    assert about == read_about(tmp_path)
    assert (tmp_path / "weights.pt").read_bytes() == undisturbed.weights
    model = PlainNet(partial(GhostBatchNorm, num_splits=4))
    model.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_its_history(tmp_path, monkeypatch):
    monkeypatch.setattr(type(TINY), "learning_rates", lambda _, epoch: [0.01 if epoch == 1 else 1e30] * 10)
    with pytest.raises(RunError, match=r"GBN \(gbn\), seed 1: the loss is not finite at epoch 2, step \d+; lower"):
        train_run(Run(TINY, GBN, 1), tmp_path)
    assert (tmp_path / "history.csv").read_text().splitlines()[1].startswith("1,0.01,")
    assert read_checkpoint(tmp_path)["history"][0]["epoch"] == 1


def test_a_last_step_that_breaks_the_weights_is_found(monkeypatch):
    original = s6lib.lab.run.evaluate
    monkeypatch.setattr(s6lib.lab.run, "evaluate", lambda *args: original(*args)._replace(loss=float("nan")))
    with pytest.raises(RunError, match="epoch 1, step 10"):
        train_run(Run(TINY, GBN, 1))


def test_a_damaged_checkpoint_falls_back_to_the_epoch_before_and_says_so(undisturbed, tmp_path, capfd, monkeypatch):
    train_run(Run(TINY, GBN, 1), tmp_path)
    content = bytearray((tmp_path / "checkpoint.pt").read_bytes())
    for place in range(len(content) // 2, len(content) // 2 + 256):  # more than the padding between tensors
        content[place] ^= 1
    (tmp_path / "checkpoint.pt").write_bytes(content)
    epochs, original = [], s6lib.lab.run.train_epoch
    monkeypatch.setattr(s6lib.lab.run, "train_epoch", lambda *args: epochs.append(1) or original(*args))
    assert_same_run(train_run(Run(TINY, GBN, 1), tmp_path), undisturbed)
    assert len(epochs) == 1
    assert "checkpoint.pt is damaged" in capfd.readouterr().err


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    train_run(Run(TINY, GBN, 1), tmp_path)
    for recipe, condition, seed in ((TINY, GBN, 2), (TINY, L1_BN, 1), (replace(TINY, epochs=3), GBN, 1)):
        with pytest.raises(RunError, match="is of another run; delete it"):
            train_run(Run(recipe, condition, seed), tmp_path)


@pytest.mark.parametrize("flushing", [True, False])
def test_the_callers_denormals_come_back(flushing):
    torch.set_flush_denormal(flushing)
    try:
        train_run(Run(replace(TINY, epochs=1, train_images=64), GBN, 1))
        assert _denormals_are_flushed() == flushing
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="this torch has no such interface")
def test_the_current_interface_to_tf32_may_have_been_used():
    before = torch.backends.fp32_precision
    torch.backends.fp32_precision = "ieee"
    try:
        train_run(Run(replace(TINY, epochs=1, train_images=64), GBN, 1))
    finally:
        torch.backends.fp32_precision = before


def test_a_run_that_comes_back_elsewhere_is_left_as_it_is(undisturbed, tmp_path, monkeypatch):
    """As when a worker is killed with a result that has just been fetched: its run is sent out again."""

    def completed_meanwhile(*arguments):
        shutil.copytree(done, folder, dirs_exist_ok=True)
        return original(*arguments)

    original, run = s6lib.lab.run.train_epoch, Run(TINY, GBN, 1)
    done, folder = tmp_path / "done", tmp_path / "run"
    save_run(done, run, undisturbed)
    monkeypatch.setattr(s6lib.lab.run, "train_epoch", completed_meanwhile)
    for _ in range(2):  # in its first epoch, and before it
        assert_same_run(train_run(run, folder), undisturbed)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
            path.name: path.read_bytes() for path in done.iterdir()
        }


def test_a_run_resumed_on_another_machine_records_both(undisturbed, tmp_path, monkeypatch):
    train_run(Run(TINY, GBN, 1), tmp_path)
    elsewhere = {**undisturbed.machines[0], "host": "elsewhere", "core": "another"}
    monkeypatch.setattr(s6lib.lab.run, "machine", lambda device: elsewhere)
    trained = train_run(Run(TINY, GBN, 1), tmp_path)
    assert [machine["host"] for machine in trained.machines] == [undisturbed.machines[0]["host"], "elsewhere"]
    save_run(tmp_path, Run(TINY, GBN, 1), trained)
    about = read_about(tmp_path)
    assert about["host"] == "elsewhere"
    assert about["earlier"][0]["core"] == undisturbed.machines[0]["core"]
    assert re.search(r"L2 unified \d+K", about["earlier"][0]["core"]) or not Path("/sys/devices/system/cpu").exists()
