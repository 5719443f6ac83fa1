"""Steps recorded and launched, on a CPU: stand-ins do what a GPU would, and the bits are those of step by step.

The stand-in for a CUDA graph keeps the operations of a step with the tensors that they read and write, undoes what they
did, and later does these operations alone: no Python of the step, no new memory.
"""

import random
import traceback
import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import GBN, L1_BN, TINY
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import s6lib.lab.device
import s6lib.lab.run
from s6lib.__main__ import read_study_file
from s6lib.data import PROJECT, Augmentation, batches
from s6lib.lab import replay
from s6lib.lab.device import reproducible
from s6lib.lab.replay import COMPARED, Replay
from s6lib.lab.run import train_run
from s6lib.lab.setup import _build_average
from s6lib.models import Dropout, PlainNet
from s6lib.recipes import ALL_CONDITIONS, BOTTLENECK, Condition, Recipe, Run, build_model
from s6lib.train import memory_format


class Stopped(BaseException):
    """Stands for a process that ends where it is."""


SHORT = replace(TINY, train_images=640 + 32)  # ten batches, and a smaller one
FRONTIER, SIZES = read_study_file(str(PROJECT / "studies" / "frontier.py"))
CYCLE = replace(FRONTIER, epochs=2, train_images=640 + 32)
READS = ("aten::_local_scalar_dense", "aten::nonzero")


class Recording(TorchDispatchMode):
    """Keeps operations, and what they write over."""

    def __init__(self):
        super().__init__()
        self.operations, self.overwritten = [], []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.name() in READS:
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        for argument, value in zip(operation._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.overwritten += [(one, one.clone()) for one in tree_leaves(value) if isinstance(one, torch.Tensor)]
        result = operation(*args, **kwargs)
        self.operations.append((operation, args, kwargs, result))
        return result


class Graph:
    """Stands for torch.cuda.CUDAGraph."""

    recorded = launched = 0
    broken = False

    def capture_begin(self):
        Graph.recorded += 1
        self.recording, self.drawn = Recording(), torch.get_rng_state()
        self.recording.__enter__()

    @torch.no_grad()
    def capture_end(self):
        self.recording.__exit__(None, None, None)
        for tensor, value in reversed(self.recording.overwritten):
            tensor.copy_(value)
        torch.set_rng_state(self.drawn)
        if Graph.broken:
            raise RuntimeError("the capture broke off")

    @torch.no_grad()
    def replay(self):
        Graph.launched += 1
        for operation, args, kwargs, result in self.recording.operations:
            if any(one.alias_info is not None and not one.alias_info.is_write for one in operation._schema.returns):
                continue  # a view
            again = operation(*args, **kwargs)
            for place, value in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(place, torch.Tensor) and place.data_ptr() != value.data_ptr():
                    place.copy_(value)


class Generator:
    """Stands for a GPU's generator, by that of the CPU."""

    get_state, set_state = torch.get_rng_state, torch.set_rng_state
    clone_state = get_state

    @staticmethod
    def graphsafe_set_state(state):
        torch.set_rng_state(state)


class Watch(TorchDispatchMode):
    """Warns as torch does of an operation that waits for the GPU."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.name() in READS:
            line = next(one for one in reversed(traceback.extract_stack()[:-1]) if one.filename == __file__)
            message = "called a synchronizing CUDA operation"  # which torch says of the line of Python that it is in
            warnings.warn_explicit(message, UserWarning, line.filename, line.lineno)
        return operation(*args, **(kwargs or {}))


@pytest.fixture
def gpu(monkeypatch):
    """Runs on the CPU go as on a GPU, and its dropout is torch's own."""
    watches = []

    def watch(mode):
        if mode == "warn":
            watches.append(Watch())
            watches[-1].__enter__()
        else:
            watches.pop().__exit__(None, None, None)

    read_data = s6lib.lab.run.read_data

    def read_few(recipe):
        train, test = read_data(recipe)
        return train, test.part(slice(500))

    monkeypatch.setattr(s6lib.lab.run, "read_data", read_few)
    monkeypatch.setattr(s6lib.lab.run, "records_steps", lambda device: True)
    monkeypatch.setattr(Dropout, "forward", nn.Dropout.forward)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "default_generators", {None: Generator})
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", watch)
    for name in ("recorded", "launched", "broken"):
        monkeypatch.setattr(Graph, name, 0)
    monkeypatch.setattr(Replay, "broken", "")
    replay._say.cache_clear()


def trained(run, **how):
    trained = train_run(run, **how)
    return [{**row, "seconds": 0} for row in trained.history], trained.weights, trained.predictions.tolist()


def as_they_are(run, monkeypatch):
    """A run as on a CPU, but with the learning rates that float32 holds if they change within an epoch."""
    with monkeypatch.context() as patch:
        patch.setattr(s6lib.lab.run, "records_steps", lambda device: False)
        if len(set(run.settings.learning_rates(1))) > 1:
            exact = Recipe.learning_rates
            patch.setattr(
                Recipe, "learning_rates", lambda *args: torch.tensor(exact(*args), dtype=torch.float32).tolist()
            )
        return trained(run)


RECORDED = [
    Run(recipe, ALL_CONDITIONS[slug], 1)
    for recipe, slug in (
        (SHORT, "bn"),
        (SHORT, "l1-bn"),
        (SHORT, "gbn"),
        (SHORT, "l1-l2-gbn"),
        (replace(BOTTLENECK, epochs=2, train_images=672), "l1-l2-bn"),
    )
] + [Run(CYCLE, SIZES[0], 1)]


*BEFORE, ALL_AT_ONCE, BOTTLENECKS, CYCLES = RECORDED
SOME = [ALL_AT_ONCE, CYCLES, *(pytest.param(run, marks=pytest.mark.slow) for run in (*BEFORE, BOTTLENECKS))]


@pytest.mark.parametrize("run", SOME, ids=lambda run: f"{run.recipe.name}-{run.condition.slug}")
def test_recorded_steps_train_to_the_bits_of_steps_as_they_are(run, gpu, monkeypatch, capfd):
    expected = as_they_are(run, monkeypatch)
    found = trained(run)
    found[0][0]["lr"], found[0][1]["lr"] = (row["lr"] for row in expected[0])  # recorded as a double
    assert found == expected
    # In each epoch: the first step as it is, the second recorded and launched too, then eight, and the smaller one.
    assert (Graph.recorded, Graph.launched) == (2, 2 * (1 + 8))
    assert not capfd.readouterr().err


def test_only_a_gpu_records():
    assert [replay.records_steps(torch.device(kind)) for kind in ("cpu", "mps", "cuda")] == [False, False, True]


def test_a_stopped_run_ends_like_one_that_was_not(gpu, monkeypatch, tmp_path):
    """Stopped in the middle of its second epoch, and at the end of the first: nothing recorded is kept."""
    run = Run(replace(CYCLE, epochs=3), SIZES[0], 1)
    expected = trained(run)
    original, limit = Replay.__call__, 11 + 5

    def stopping(self, *arguments):
        nonlocal limit
        if limit == 0:
            raise Stopped
        limit -= 1
        original(self, *arguments)

    monkeypatch.setattr(Replay, "__call__", stopping)
    with pytest.raises(Stopped):
        train_run(run, tmp_path)
    limit = 11  # the second epoch, from its start
    with pytest.raises(Stopped):
        train_run(run, tmp_path)
    limit = 11
    assert trained(run, folder=tmp_path) == expected


# --- what is not recorded --------------------------------------------------------------------------------------------


def penalty_that_reads(model):
    largest = max(weights.abs().max().item() for weights in model.parameters())
    return 1e-4 * largest * sum(weights.square().sum() for weights in model.parameters())


class Replacing(nn.BatchNorm2d):
    """Puts a new tensor in the place of its running mean."""

    def forward(self, images):
        if self.training:
            self.running_mean = 0.9 * self.running_mean + 0.1 * images.mean((0, 2, 3)).detach()
        return (images - self.running_mean.view(1, -1, 1, 1)) * self.weight.view(1, -1, 1, 1) + self.bias.view(
            1, -1, 1, 1
        )


class Counting(PlainNet):
    """Halves its logits every second time."""

    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__(norm, dropout=0.0)
        self.count = 0

    def forward(self, images):
        self.count += self.training
        return super().forward(images) / (1 + self.count % 2)


class CountingInAList(Counting):
    """Halves its logits from the fourth time on, in a way that nobody sees from outside."""

    def forward(self, images):
        if not self.training:
            return PlainNet.forward(self, images)
        self.seen = getattr(self, "seen", [])
        self.seen.append(1)
        return PlainNet.forward(self, images) / (1 if len(self.seen) < 4 else 2)


class Drawing(Counting):
    """Scales its logits at random."""

    def forward(self, images):
        logits = PlainNet.forward(self, images)
        return logits * self.factor() if self.training else logits

    factor = staticmethod(lambda: random.uniform(0.5, 1.5))


class DrawingWithNumpy(Drawing):
    factor = staticmethod(lambda: np.random.uniform(0.5, 1.5))  # noqa: NPY002


class Elsewhere(torch.optim.SGD):
    """Keeps a tensor on another device."""

    def step(self, closure=None):
        super().step(closure)
        for weights in self.param_groups[0]["params"]:
            self.state[weights].setdefault("seen", torch.zeros((), device="meta"))


def own(network):
    return replace(SHORT, name="own", network=network, dropout=None)


LINE = penalty_that_reads.__code__.co_firstlineno + 1
CASES = {
    "reads": (SHORT, {"penalty": penalty_that_reads}, f"a step reads the GPU in {__file__}:{LINE}"),
    "replaces": (SHORT, {"norm": Replacing}, "a step puts another tensor in the place of one"),
    "counts": (own(Counting), {}, "a step changes `count` of Counting, a number in Python"),
    "draws": (own(Drawing), {}, "a step draws from `random` or numpy.random"),
    "draws with numpy": (own(DrawingWithNumpy), {}, "a step draws from `random` or numpy.random"),
    "counts unseen": (own(CountingInAList), {}, "the first steps come out differently when launched whole"),
    "rate": (replace(own(PlainNet), schedule="cosine", optimizer=torch.optim.SGD), {}, "SGD takes no tensor for it"),
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case == "reads" else pytest.mark.slow) for case in CASES]
)
def test_what_cannot_be_recorded_runs_step_by_step_and_one_line_says_why(case, gpu, monkeypatch, capfd):
    recipe, changes, reason = CASES[case]
    run = Run(recipe, Condition("own", **changes), 1)
    with monkeypatch.context() as patch:
        patch.setattr(s6lib.lab.run, "records_steps", lambda device: False)
        expected = trained(run)
    capfd.readouterr()
    assert trained(run) == expected
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("training goes step by step, which is slow on a GPU: ")
    assert reason in line
    # The one that counts unseen launches to compare, and is at rest in its second epoch.
    assert Graph.launched == (COMPARED + 9 if case == "counts unseen" else 0)


@pytest.mark.slow
def test_code_of_the_users_that_can_be_recorded_is(gpu, monkeypatch, capfd):
    run = Run(
        own(partial(Own)), Condition("own", penalty=lambda model: 1e-4 * sum(map(torch.norm, model.parameters()))), 1
    )
    expected = as_they_are(run, monkeypatch)
    assert trained(run) == expected
    assert (Graph.recorded, Graph.launched) == (2, 2 * (COMPARED + 9 - COMPARED))
    assert not capfd.readouterr().err


class Own(PlainNet):
    pass


def norms(model):
    return 1e-4 * sum(map(torch.norm, model.parameters()))


@pytest.mark.slow
def test_a_recording_that_breaks_off_leaves_training_right(gpu, monkeypatch, capfd):
    run = Run(SHORT, GBN, 1)
    expected = as_they_are(run, monkeypatch)
    monkeypatch.setattr(Graph, "broken", True)
    assert trained(run) == expected
    monkeypatch.setattr(Graph, "broken", False)
    assert trained(run) == expected  # nor is another one begun
    assert (Graph.recorded, Graph.launched) == (1, 0)
    (line,) = capfd.readouterr().err.splitlines()
    assert f"{__file__}:" in line
    assert line.endswith(" cannot be recorded: the capture broke off")


class Failing(PlainNet):
    """Does in a recording what is refused there."""

    def forward(self, images):
        if Graph.recorded and self.training:
            images.sum().item()
        return super().forward(images)


def test_a_step_that_fails_when_recorded_is_named(gpu, monkeypatch, capfd):
    """Its own line, not that of the recording that cannot end."""
    run = Run(replace(own(Failing), epochs=1), Condition("own"), 1)
    expected = as_they_are(run, monkeypatch)
    monkeypatch.setattr(Graph, "broken", True)
    assert trained(run) == expected
    (line,) = capfd.readouterr().err.splitlines()
    assert "operation not permitted when stream is capturing" in line


def test_a_tensor_off_the_gpu_is_named(gpu):
    model = nn.Linear(2, 2)
    optimizer = Elsewhere(model.parameters(), 0.1)

    def step():
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()

    step()
    assert replay._hindrance(step, (model, optimizer)) == "the network or the optimizer keeps a tensor on the CPU"


def test_optimizers_count_on_the_gpu_and_read_a_changing_rate_there():
    weights = [nn.Parameter(torch.zeros(2))]
    adam = torch.optim.AdamW([{"params": weights, "initial_lr": 0.1}], 0.1)
    rates, hindrance = replay._place_learning_rates(adam, [0.1, 0.2])
    assert (hindrance, [*map(type, rates)], adam.param_groups[0]["capturable"]) == ("", [torch.Tensor], True)
    assert adam.param_groups[0]["lr"] is rates[0]
    assert replay._place_learning_rates(adam, [0.1, 0.1]) == ([], "")
    assert adam.param_groups[0]["lr"] == 0.1
    later = torch.optim.AdamW(weights, 0.1)
    later.state[weights[0]]["step"] = torch.zeros(())  # on the CPU, from a run that began there
    assert replay._place_learning_rates(later, [0.1, 0.2])[1] == (
        "the learning rate changes at each step, and AdamW takes no tensor for it"
    )
    assert not later.param_groups[0]["capturable"]


# --- what else differs on a GPU --------------------------------------------------------------------------------------


@pytest.mark.parametrize("augmentation", [(15.0, 0.0), (7.0, 0.1), (10.0, 0.1, 2.0, 0.1)], ids=str)
@pytest.mark.parametrize("at_once", [3, 100])
def test_images_augmented_at_once_are_the_same_to_the_bit(mnist, augmentation, at_once):
    digits = mnist[0].part(slice(64 * 7 + 32))
    arguments = (digits, 64, Augmentation(*augmentation))
    pairs = zip(
        batches(*arguments, torch.Generator().manual_seed(1)),
        batches(*arguments, torch.Generator().manual_seed(1), at_once),
        strict=True,
    )
    for one, other in pairs:
        assert all(map(torch.equal, one, other))


def test_a_run_on_a_gpu_has_a_stream_of_its_own(monkeypatch):
    streams = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: streams.append(device) or "the stream")

    class Within:
        current = None

        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            Within.current = self.stream

        def __exit__(self, *_):
            Within.current = None

    monkeypatch.setattr(torch.cuda, "stream", Within)
    s6lib.lab.device._stream.cache_clear()
    try:
        for _ in range(2):
            with reproducible(torch.device("cuda")):
                assert Within.current == "the stream"
            assert Within.current is None
        with reproducible(torch.device("cpu")):
            assert Within.current is None
    finally:
        s6lib.lab.device._stream.cache_clear()
    assert streams == [torch.device("cuda")]


def test_a_moving_average_is_on_the_device_of_its_model():
    """Its count of steps too, which a recorded step would not reach on the CPU."""
    model = build_model(TINY, L1_BN).to("meta")
    average = _build_average(model, torch.optim.SGD(model.parameters(), 0.1), 0.9)
    assert {tensor.device.type for tensor in (*average.parameters(), *average.buffers())} == {"meta"}


def test_the_memory_format_of_a_network_is_for_a_cpu():
    model = build_model(TINY, L1_BN)
    assert memory_format(model) == torch.channels_last
    assert memory_format(model.to("meta")) == torch.contiguous_format
    assert memory_format(nn.ReLU()) == torch.contiguous_format
