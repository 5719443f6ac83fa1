"""What only a GPU can show: its bits, recorded and step by step. test_replay.py does the same with stand-ins."""

import os
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import GBN, L1_BN, bounded
from test_replay import CASES, CYCLE, RECORDED, SHORT, Stopped, own, trained

from s6lib.data import PROJECT
from s6lib.lab import replay
from s6lib.lab.launch import run_study
from s6lib.lab.replay import COMPARED, Replay
from s6lib.lab.run import train_run
from s6lib.models import PlainNet
from s6lib.recipes import CONTROL, Condition, Run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
DEVICE = "cuda"
ADAMW = replace(SHORT, name="adamw", schedule="cosine", learning_rate=1e-3, optimizer=torch.optim.AdamW)
DRAWN_AGAIN = replace(SHORT, name="drawn-again", dropout=0.5)  # where a mask that is repeated would show
RUNS = [*RECORDED, Run(ADAMW, L1_BN, 1), Run(DRAWN_AGAIN, GBN, 1)]

BROKEN = """
import torch
from test_gpu import DEVICE, as_they_are, trained
from test_replay import SHORT
from s6lib.recipes import CONTROL, Condition, Run

def penalty(model):
    size = sum(weights.square().sum() for weights in model.parameters())
    if torch.cuda.is_current_stream_capturing():
        size.item()
    return 1e-4 * size

for condition in (Condition("own", penalty=penalty), CONTROL):  # the second finds what the first has left
    run = Run(SHORT, condition, 1)
    assert trained(run, device=DEVICE) == as_they_are(run)
print("the same")
"""


@pytest.fixture(autouse=True)
def _anew(monkeypatch):
    monkeypatch.setattr(Replay, "broken", "")
    replay._say.cache_clear()


def as_they_are(run):
    """A run whose steps are all taken as they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Replay, "_watch", lambda self, step, sums, batch: step(*batch))
        return trained(run, device=DEVICE)


@pytest.fixture
def launches(monkeypatch):
    """One entry for each step that is launched whole."""
    counted, original = [], Replay._launch
    monkeypatch.setattr(Replay, "_launch", lambda self, values: counted.append(1) or original(self, values))
    return counted


@pytest.mark.parametrize(
    "run",
    [*RECORDED, Run(ADAMW, L1_BN, 1), Run(DRAWN_AGAIN, GBN, 1)],
    ids=lambda r: f"{r.recipe.name}-{r.condition.slug}",
)
def test_recorded_steps_train_to_the_bits_of_steps_as_they_are(run, launches, capfd):
    expected = as_they_are(run)
    assert not launches
    assert trained(run, device=DEVICE) == expected
    assert len(launches) == 2 * (1 + 8)
    assert not capfd.readouterr().err


def test_code_of_the_users_that_can_be_recorded_is(launches, capfd):
    run = Run(own(partial(PlainNet)), Condition("own", penalty=lambda model: 1e-4 * model.layers[0].weight.norm()), 1)
    expected = as_they_are(run)
    assert trained(run, device=DEVICE) == expected
    assert len(launches) == 2 * (COMPARED + 9 - COMPARED)
    assert not capfd.readouterr().err


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_recorded_runs_step_by_step_and_one_line_says_why(case, launches, capfd):
    recipe, changes, reason = CASES[case]
    run = Run(recipe, Condition("own", **changes), 1)
    expected = as_they_are(run)
    replay._say.cache_clear()
    capfd.readouterr()
    assert trained(run, device=DEVICE) == expected
    (line,) = capfd.readouterr().err.splitlines()
    assert reason in line
    assert len(launches) == (COMPARED + 9 if case == "counts unseen" else 0)


def test_a_recording_that_breaks_off_leaves_training_right():
    """In a process of its own, since no other recording can follow."""
    path = os.pathsep.join([str(PROJECT), str(PROJECT / "tests")])
    with bounded([sys.executable, "-c", BROKEN], env={**os.environ, "PYTHONPATH": path}) as process:
        output = process.stdout.read()
    assert output.count("training goes step by step") == 1, output
    assert "cannot be recorded" in output
    assert output.endswith("the same\n"), output


@pytest.mark.parametrize("steps", [11, 11 + 5], ids=["at an epoch's end", "in the middle"])
def test_a_stopped_run_ends_like_one_that_was_not(steps, monkeypatch, tmp_path):
    run = Run(replace(CYCLE, epochs=3), CONTROL, 1)
    expected = trained(run, device=DEVICE)
    original, taken = Replay.__call__, []

    def stopping(self, *arguments):
        if len(taken) == steps:
            raise Stopped
        taken.append(1)
        original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Replay, "__call__", stopping)
        with pytest.raises(Stopped):
            train_run(run, tmp_path, DEVICE)
    assert trained(run, folder=tmp_path, device=DEVICE) == expected


def test_runs_in_turn_are_those_taken_alone(tmp_path):
    """In one process, on one stream: nothing of a run is left for the next."""
    study = run_study(SHORT, (L1_BN, GBN), (1,), tmp_path, jobs=1, device=DEVICE, show_progress=False)
    for condition in (GBN, L1_BN):
        run = Run(SHORT, condition, 1)
        assert (run.folder(study.folder) / "weights.pt").read_bytes() == train_run(run, device=DEVICE).weights
