"""Steps recorded and launched, on a CPU: stand-ins do what a GPU would, and the bits are those of step by step.

The stand-in for a CUDA graph takes the step that it records, and keeps its operations with the tensors that they read
and write. So its first launch, which follows at once, finds the step taken; later ones do these operations alone: no
Python of the step, no new memory.
"""

import gc
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import L1_BN, TINY, Operations, history_of
from test_run import Stopped
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import s6lib.lab.device
import s6lib.lab.run
from s6lib.__main__ import read_study_file
from s6lib.data import PROJECT, ImageDataset, batches
from s6lib.lab import replay
from s6lib.lab.device import reproducible
from s6lib.lab.run import train_run
from s6lib.models import Dropout, PlainNet
from s6lib.recipes import ALL_CONDITIONS, BOTTLENECK, CONTROL, PLAIN, RECIPES, Condition, Recipe, Run, build_model
from s6lib.train import train_epoch

FRONTIER, SIZES = read_study_file(str(PROJECT / "studies" / "frontier.py"))
SHORT = replace(TINY, train_images=4 * 64 + 32)  # four batches, and a smaller one
# With a moving average, and a rate for each step; and the smaller batch comes again.
TWICE = replace(FRONTIER, epochs=2, train_images=4 * 64 + 32, passes=2)
STOPPED = Run(TWICE, SIZES[0], 1)
RECORDED = {
    "l1-l2-gbn": Run(SHORT, ALL_CONDITIONS["l1-l2-gbn"], 1),
    "frontier": STOPPED,
    "bottleneck": Run(replace(BOTTLENECK, epochs=2, train_images=288), L1_BN, 1),
}


class Graph(TorchDispatchMode):
    """Stands for torch.cuda.CUDAGraph."""

    recorded = launched = 0
    error = None  # by which a recording breaks off

    def capture_begin(self, capture_error_mode):
        Graph.recorded += 1
        self.operations, self.taken = [], True
        self.__enter__()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        reads = operation.name() in ("aten::_local_scalar_dense", "aten::nonzero")
        if reads and args[0].dtype != torch.int64:  # the counter of a moving average, which is always on the CPU
            raise RuntimeError("operation not permitted when stream is capturing")
        if Graph.error is not None and operation.name() == "aten::relu_":
            raise Graph.error
        assert not gc.isenabled()
        result = operation(*args, **(kwargs or {}))
        self.operations.append((operation, args, kwargs or {}, result))
        return result

    def capture_end(self):
        self.__exit__(None, None, None)

    @torch.no_grad()
    def replay(self):
        Graph.launched += 1
        for operation, args, kwargs, result in () if self.taken else self.operations:
            again = operation(*args, **kwargs)
            for place, value in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(place, torch.Tensor) and place.data_ptr() != value.data_ptr():
                    place.copy_(value)
        self.taken = False


@pytest.fixture
def gpu(monkeypatch, few_digits):
    """Runs on the CPU go as on a GPU, with torch's own dropout, and with the generator of the CPU."""
    records_steps = replay.records_steps
    monkeypatch.setattr(s6lib.lab.run, "records_steps", lambda device: records_steps(torch.device("cuda")))
    monkeypatch.setattr(Dropout, "forward", nn.Dropout.forward)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    generator = SimpleNamespace(clone_state=torch.get_rng_state, graphsafe_set_state=torch.set_rng_state)
    monkeypatch.setattr(torch.cuda, "default_generators", [generator])
    monkeypatch.setattr(replay, "_broken", set())
    Graph.recorded = Graph.launched = 0
    yield
    assert gc.isenabled()


def trained(run, **how):
    """A run, without its seconds; learning rates that change within an epoch are those that a recorded step reads."""
    exact = Recipe.learning_rates

    def rounded(recipe, epoch):
        rates = exact(recipe, epoch)
        return torch.tensor(rates, dtype=torch.float32).tolist() if len(set(rates)) > 1 else rates

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recipe, "learning_rates", rounded)
        result = train_run(run, **how)
    return result.files | {"history.csv": history_of(result).drop(columns="seconds").to_dict("records")}


def step_by_step(run, **how):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("S6LIB_RECORD", "0")
        return trained(run, **how)


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_steps_train_to_the_bits_of_steps_as_they_are(name, gpu, capfd):
    """Of each shape of a batch, in each epoch: a step as it is, then one recorded and launched, then launches alone."""
    run = RECORDED[name]
    assert trained(run) == step_by_step(run)
    assert (Graph.recorded, Graph.launched) == ((4, 2 * (7 + 1)) if run.recipe is TWICE else (2, 2 * 3))
    assert not capfd.readouterr().err


def stopped_twice(folder, device="cpu"):
    """A run, stopped in the middle of its second epoch, and again where it goes on: no recording is kept."""
    original, stops = s6lib.lab.run.Setup.batches, iter([False] * (10 + 3) + [True, True])

    def until(*arguments):
        for batch in original(*arguments):  # whether the training loop sees it or not
            if next(stops):
                raise Stopped
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(s6lib.lab.run.Setup, "batches", until)
        for _ in range(2):
            with pytest.raises(Stopped):
                trained(STOPPED, folder=folder, device=device)
    return trained(STOPPED, folder=folder, device=device)


def test_a_stopped_run_ends_like_one_that_was_not(gpu, tmp_path):
    assert stopped_twice(tmp_path) == trained(STOPPED)


@pytest.mark.parametrize("for_ever", [False, True])
def test_a_recording_that_breaks_off_leaves_training_right(gpu, monkeypatch, capfd, for_ever):
    """The epoch is trained again, and the run goes on step by step; before torch 2.12 later runs do too."""
    run = Run(replace(SHORT, ema=0.9), CONTROL, 1)
    expected = step_by_step(run)
    monkeypatch.setattr(replay, "_BREAKS_FOR_EVER", for_ever)
    with monkeypatch.context() as patch:
        patch.setattr(Graph, "error", RuntimeError("the capture broke off\nhere"))
        assert trained(run) == expected
    said = "training goes step by step, which is slow on a GPU: the capture broke off\n"
    assert (capfd.readouterr().err, Graph.recorded, Graph.launched) == (said, 1, 0)
    assert trained(run) == expected
    assert Graph.recorded == (1 if for_ever else 3)


def test_stop_during_a_recording_ends_the_run_and_leaves_the_next_one_right(gpu, monkeypatch, tmp_path):
    run = Run(replace(SHORT, epochs=1), CONTROL, 1)
    with monkeypatch.context() as patch:
        patch.setattr(Graph, "error", KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            train_run(run, tmp_path)
    assert gc.isenabled()
    assert trained(run, folder=tmp_path) == step_by_step(run)
    assert (Graph.recorded, Graph.launched) == (2, 3)


def test_only_runs_that_are_the_librarys_are_recorded_and_only_on_a_gpu(gpu):
    """In a recorded epoch, a penalty that starts after some calls would never start."""
    own_norm = partial(PlainNet, norm=lambda channels: nn.GroupNorm(2, channels))
    for settings in ({"penalty": lambda model: 0.0}, {"network": own_norm, "dropout": None}):
        train_run(Run(replace(SHORT, epochs=1), Condition("own", **settings), 1))
    assert Graph.recorded == 0
    assert [replay.records_steps(torch.device(kind)) for kind in ("cpu", "mps", "cuda")] == [False, False, True]


def test_runs_on_a_gpu_share_a_stream_of_their_own(monkeypatch):
    made, used = [], []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(device) or f"stream {len(made)}")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: used.append(stream) or nullcontext())
    monkeypatch.setattr(s6lib.lab.device, "_stream", cache(s6lib.lab.device._stream.__wrapped__))
    for device in ("cuda", "cuda", "cpu"):
        with reproducible(torch.device(device)):
            pass
    assert used == ["stream 1"] * 2


# torch 2.5 asks the driver before it makes fake tensors on a GPU.
FAKES_GPUS = torch.cuda.is_available() or not torch.__version__.startswith("2.5.")
# One of each kind: the other conditions and sizes differ from these in numbers alone.
CASES = [(recipe, ALL_CONDITIONS[slug]) for recipe in RECIPES.values() for slug in ("l1-l2-bn", "gbn", "gbn-16")]
CASES += [(FRONTIER, SIZES[0])]


@pytest.mark.skipif(not FAKES_GPUS, reason="this torch fakes no GPU where there is none")
@pytest.mark.parametrize(("recipe", "condition"), CASES, ids=lambda one: getattr(one, "slug", None) or one.name)
def test_a_step_copies_nothing_and_a_hundred_how_their_images_are_moved(recipe, condition):
    """No GPU is needed: of fake tensors torch computes shapes and devices alone, and refuses to mix devices.

    Of two batches, the first lies amid the images that are augmented at once, the second begins the next such.
    """
    settings, copied = recipe.changed_by(condition), []
    images = ImageDataset(torch.zeros(12_800, 28, 28, dtype=torch.uint8), torch.zeros(12_800, dtype=torch.int64))
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            model = build_model(recipe, condition)
            for name in ("images", "labels"):  # `to` would look at the labels
                object.__setattr__(images, name, torch.zeros_like(getattr(images, name), device="cuda"))
        stream = batches(images, settings.batch_size, settings.augmentation, torch.Generator())
        for skipped in (1, 6400 // settings.batch_size - 2):
            for _ in range(skipped):
                next(stream)
            with Operations() as operations:
                batch, targets = next(stream)
                loss = F.cross_entropy(model(batch), targets) + condition.penalty_of(model)
            copied.append(operations.copied)
    assert {loss.device, batch.device, targets.device} == {torch.device("cuda:0")}
    assert copied == [0, 2]


def test_penalties_and_ghosts_add_no_more_operations_than_they_did(mnist):
    """On a GPU these networks wait for the launch of operations, so their number is their time.

    Two penalties: one addition for each of 22 parameters, and 17 more for all of them together. A ghost layer: 26 more
    than BatchNorm, of which 6 are the other three norms and their gradients.
    """
    first, second = batches(mnist[0].part(slice(128)), 64)
    launched = []
    for slug in ("bn", "l1-bn", "l1-l2-bn", "gbn", "l1-l2-gbn"):
        condition = ALL_CONDITIONS[slug]
        model = build_model(replace(PLAIN, dropout=0.0), condition)  # on a CPU a mask takes operations of its own
        optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9, fused=True)
        train_epoch(model, [first], optimizer, penalty=condition.penalty_of)
        with Operations() as operations:
            train_epoch(model, [second], optimizer, penalty=condition.penalty_of)
        launched.append(operations.launched)
    bare, one, two, ghosts, two_and_ghosts = launched
    assert bare <= 110
    assert one - bare <= 30
    assert two - bare == two_and_ghosts - ghosts <= 39
    assert ghosts - bare <= 7 * 26
