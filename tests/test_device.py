"""A process's own settings change no result, and come back; a start is described."""

import random
import re
import subprocess
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from conftest import GBN, ONCE, commit_all, history_of
from test_run import assert_same_run
from torch import nn

import s6lib.lab.device
from s6lib.lab.device import CPU, _denormals_are_flushed, machine, reproducible, seed_everything
from s6lib.lab.run import train_run
from s6lib.recipes import CONTROL, Recipe, Run


class Mixed(nn.Sequential):
    """In mixed precision, as many write it."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(784, 10))

    def forward(self, images):
        with torch.autocast(images.device.type, torch.bfloat16):
            return super().forward(images)


RUN, MIXED = Run(ONCE, GBN, 1), Run(Recipe("mixed", Mixed, epochs=2, train_images=640), CONTROL, 1)


def settings() -> list:
    dtype, denormals, threads = torch.get_default_dtype(), _denormals_are_flushed(), torch.get_num_threads()
    drawn = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    return [dtype, denormals, threads, torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, drawn]


@pytest.mark.usefixtures("few_digits")
def test_a_callers_settings_and_modes_change_nothing_and_come_back():
    torch.manual_seed(1)
    before, undisturbed, mixed = settings(), train_run(RUN), train_run(MIXED)
    losses = history_of(mixed)["train_loss"]
    assert losses[1] < 0.8 * losses[0]
    with ExitStack() as disturbed:
        for change, value, usual in (
            (torch.set_default_dtype, torch.float64, torch.float32),
            (torch.set_flush_denormal, True, False),
            (torch.set_num_threads, 2, 1),
            (torch.manual_seed, 99, 1),
            (torch.set_float32_matmul_precision, "medium", "highest"),  # bfloat16, on some CPUs too
        ):
            disturbed.callback(change, usual)
            change(value)
        for mode in (torch.no_grad(), torch.autocast("cpu", torch.bfloat16)):
            disturbed.enter_context(mode)
        theirs = settings()
        for mode in (torch.device("meta"), torch.inference_mode()):
            with mode:
                assert_same_run(train_run(RUN), undisturbed)
                assert_same_run(train_run(MIXED), mixed)
            assert settings() == theirs
    assert settings() == before
    assert train_run(Run(ONCE, GBN, 2)).files["weights.pt"] != undisturbed.files["weights.pt"]


NEWER = pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="this torch has no such interface")


@pytest.mark.parametrize("interface", ["neither", "the older", "both", pytest.param("the newer", marks=NEWER)])
def test_float32_is_full_whichever_interface_has_asked_for_tf32(interface, monkeypatch, request):
    """And the older one can be read: torch refuses that if the two disagree."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    newer = [cudnn.conv, matmul] if hasattr(cudnn, "conv") else []

    def state():
        return [cudnn.allow_tf32, cudnn.deterministic, *(operation.fp32_precision for operation in newer)]

    if interface == "the newer":
        monkeypatch.setattr(torch.backends, "fp32_precision", "tf32")
    elif interface != "neither":
        request.addfinalizer(lambda: torch.set_float32_matmul_precision("highest"))
        torch.set_float32_matmul_precision("medium")
        if interface == "both":
            matmul.allow_tf32 = True
    before = state()
    with reproducible(CPU):
        assert state() == [False, True] + ["ieee"] * len(newer)
        assert not matmul.allow_tf32
    assert state() == before


def test_every_generator_is_seeded_from_seed_and_epoch_alone():
    def draws(seed, epoch):
        generator = seed_everything(seed, epoch, CPU)
        numbers = [torch.rand(1).item(), np.random.rand(), random.random()]  # noqa: NPY002
        return [*numbers, torch.rand(1, generator=generator).item()]

    with reproducible(CPU):
        assert draws(1, 2) == draws(1, 2)
        several = [number for pair in ((1, 2), (2, 1), (1, 3)) for number in draws(*pair)]
    assert len(set(several)) == 12


def test_a_start_names_the_commit_of_a_clone_and_whether_it_was_changed(tmp_path, monkeypatch):
    commit = s6lib.lab.device._commit.__wrapped__
    file = tmp_path / "s6lib" / "lab" / "device.py"
    file.parent.mkdir(parents=True)
    file.write_text("as committed")
    monkeypatch.setattr(s6lib.lab.device, "__file__", str(file))
    assert commit() is None  # no clone
    commit_all(tmp_path)
    head = subprocess.check_output(["git", "-C", tmp_path, "rev-parse", "HEAD"], text=True).strip()
    assert commit() == head
    file.write_text("changed")
    assert commit() == f"{head} with changes"
    monkeypatch.setenv("PATH", "")
    assert commit() is None  # no git
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", machine(CPU)["started"])
