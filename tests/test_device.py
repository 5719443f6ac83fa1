"""A process's own settings change no result, and come back."""

import random

import numpy as np
import pytest
import torch
from conftest import GBN, TINY, evaluation_on_few_digits
from test_run import assert_same_run

from s6lib.lab.device import CPU, reproducible, seed_everything
from s6lib.lab.run import train_run
from s6lib.recipes import Run

ONCE = TINY.__class__(**{**vars(TINY), "epochs": 1, "train_images": 64})
pytestmark = pytest.mark.usefixtures("few_digits")


@pytest.fixture(scope="module")
def undisturbed():
    with evaluation_on_few_digits():
        return train_run(Run(ONCE, GBN, 1))


def test_a_default_dtype_changes_nothing(undisturbed):
    torch.set_default_dtype(torch.float64)
    try:
        assert_same_run(train_run(Run(ONCE, GBN, 1)), undisturbed)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_a_mode_of_the_callers_changes_nothing(undisturbed, mode):
    with mode():
        assert_same_run(train_run(Run(ONCE, GBN, 1)), undisturbed)


def test_a_default_device_changes_nothing(undisturbed):
    torch.set_default_device("meta")
    try:
        assert_same_run(train_run(Run(ONCE, GBN, 1)), undisturbed)
    finally:
        torch.set_default_device(None)


def test_every_generator_is_seeded_from_seed_and_epoch_alone():
    def draws(seed, epoch):
        generator = seed_everything(seed, epoch, CPU)
        numbers = [torch.rand(1).item(), np.random.rand(), random.random()]  # noqa: NPY002
        return [*numbers, torch.rand(1, generator=generator).item()]

    with reproducible(CPU):
        assert draws(1, 2) == draws(1, 2)
        several = [number for pair in ((1, 2), (2, 1), (1, 3)) for number in draws(*pair)]
    assert len(set(several)) == 12
