"""What only a GPU can show: its bits, recorded and step by step. test_replay.py does the same with stand-ins."""

import os
import sys
from dataclasses import replace

import pytest
import torch
from conftest import GBN, L1_BN, bounded
from test_replay import RECORDED, SHORT, STOPPED, step_by_step, stopped_twice, trained

from s6lib.data import PROJECT
from s6lib.lab.launch import run_study
from s6lib.recipes import CONTROL, Condition, Run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
DEVICE = "cuda"
DRAWN_AGAIN = replace(SHORT, name="drawn-again", dropout=0.5)  # where a mask that is repeated would show
RUNS = {**RECORDED, "bn": Run(SHORT, CONTROL, 1), "drawn again": Run(DRAWN_AGAIN, GBN, 1)}

BROKEN = """
import torch
from test_gpu import DEVICE, SHORT, step_by_step, trained
from torch.nn import functional
from s6lib.recipes import CONTROL, Run

def reading(inputs, inplace=False):
    if torch.cuda.is_current_stream_capturing() and breaking:
        inputs.sum().item()
    return relu(inputs, inplace)

relu, functional.relu = functional.relu, reading
run = Run(SHORT, CONTROL, 1)
for breaking in (True, False):  # the second finds what the first has left
    assert trained(run, device=DEVICE) == step_by_step(run, device=DEVICE)
print("the same")
"""


@pytest.fixture
def launches(monkeypatch):
    """One entry for each step that is launched whole."""
    counted, original = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda self: counted.append(1) or original(self))
    return counted


@pytest.mark.parametrize("name", RUNS)
def test_recorded_steps_train_to_the_bits_of_steps_as_they_are(name, launches, capfd):
    expected = step_by_step(RUNS[name], device=DEVICE)
    assert not launches
    assert trained(RUNS[name], device=DEVICE) == expected
    assert len(launches) == 2 * (8 if name == "frontier" else 3)
    assert not capfd.readouterr().err


def test_a_users_code_is_not_recorded(launches):
    run = Run(SHORT, Condition("own", penalty=lambda model: 1e-4 * model.layers[0].weight.norm()), 1)
    assert trained(run, device=DEVICE) == step_by_step(run, device=DEVICE)
    assert not launches


def test_a_recording_that_breaks_off_leaves_training_right():
    """In a process of its own, since before torch 2.12 no other recording can follow."""
    path = os.pathsep.join([str(PROJECT), str(PROJECT / "tests")])
    with bounded([sys.executable, "-c", BROKEN], env={**os.environ, "PYTHONPATH": path}) as process:
        output = process.stdout.read()
    assert output.count("training goes step by step") == 1, output
    assert output.endswith("the same\n"), output


def test_a_stopped_run_ends_like_one_that_was_not(tmp_path):
    assert stopped_twice(tmp_path, DEVICE) == trained(STOPPED, device=DEVICE)


def test_runs_in_turn_are_those_taken_alone(tmp_path):
    """In one process, on one stream: nothing of a run is left for the next."""
    study = run_study(SHORT, (L1_BN, GBN), (1,), tmp_path, jobs=1, device=DEVICE, show_progress=False)
    for condition in (GBN, L1_BN):
        run = Run(SHORT, condition, 1)
        assert (run.folder(study.folder) / "weights.pt").read_bytes() == trained(run, device=DEVICE)[1]
