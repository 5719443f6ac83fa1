"""One run, from its seed to its folder: what it starts from, how it goes on after a stop, and what it leaves."""

import io
import random
import re
import shutil
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GBN, L1_BN, TINY, evaluation_on_few_digits, history_of
from torch import nn
from torchvision.transforms import v2

import s6lib.lab.run
from s6lib.data import ImageDataset
from s6lib.errors import RunError, SettingError
from s6lib.lab.device import CPU, machine, reproducible
from s6lib.lab.files import is_complete, read_about, read_checkpoint, write_checkpoint, write_results
from s6lib.lab.record import identity
from s6lib.lab.run import _build_average, _on_device, set_up, train_run
from s6lib.models import PlainNet
from s6lib.recipes import CONTROL, Recipe, Run, load_images
from s6lib.train import memory_format

pytestmark = pytest.mark.usefixtures("few_digits")


class Stopped(BaseException):
    """Stands for a process that ends where it is."""


def assert_same_run(a, b):
    assert history_of(a).drop(columns="seconds").equals(history_of(b).drop(columns="seconds"))
    assert {**a.files, "history.csv": 0} == {**b.files, "history.csv": 0}


def train_watched(run, folder=None, stop=10**6, steps=None):
    """Train a run up to a step, as a killed process would; also give the batches that it saw."""
    original, taken, seen = s6lib.lab.run.train_epoch, count(1), []

    def watched(model, batches, *more):
        def passed():
            for batch in batches:
                if next(taken) > stop:
                    raise Stopped
                seen.append(batch)
                yield batch

        return original(model, passed(), *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(s6lib.lab.run, "train_epoch", watched)
        return train_run(run, folder, entry=identity(run, steps)), seen


def set_up_of(recipe, condition=CONTROL, seed=1):
    with reproducible(CPU):
        return set_up(Run(recipe, condition, seed), load_images(recipe.data, recipe.held_out), CPU)


@pytest.fixture(scope="module")
def undisturbed():
    with evaluation_on_few_digits():
        return train_run(Run(TINY, GBN, 1))


def test_conditions_of_a_seed_share_batches_but_not_results():
    once = replace(TINY, epochs=1, train_images=128)
    (penalised, batches), (ghosts, others) = (train_watched(Run(once, condition, 1)) for condition in (L1_BN, GBN))
    for (images, labels), (same, same_labels) in zip(batches, others, strict=True):
        assert torch.equal(images, same)
        assert torch.equal(labels, same_labels)
    assert not history_of(penalised)["train_loss"].equals(history_of(ghosts)["train_loss"])


# --- a stop ----------------------------------------------------------------------------------------------------------


class Temperature(nn.Module):
    """A loss with a parameter, and with a count of its steps in a buffer, which lowers it."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, logits, targets):
        self.steps += self.training
        return nn.functional.cross_entropy(logits * self.log_scale.exp(), targets) / self.steps.sqrt()


class Counting(nn.Sequential):
    """Counts its steps, in its extra state, and draws from three generators."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(784, 10), nn.Dropout(0.1))
        self.steps = 0

    def forward(self, images):
        self.steps += self.training
        drawn = random.gauss(0, 0.1) + np.random.uniform(0, 0.1) if self.training else 0  # noqa: NPY002
        return super().forward(images) * (1 + drawn) / (1 + self.steps)

    def get_extra_state(self):
        return {"steps": self.steps}

    def set_extra_state(self, state):
        self.steps = state["steps"]


OWN = Recipe(
    "own", Counting, epochs=2, train_images=640, loss=Temperature(), transform=v2.RandomRotation(10),
    optimizer=partial(torch.optim.AdamW, weight_decay=np.logspace(-4, -2, 3)[2]), schedule=lambda done: 1 - done / 2,
)  # fmt: skip
CYCLE = replace(
    TINY, schedule="one-cycle", nesterov=True, learning_rate=0.1, shift=2.0, scale=0.1, ema=0.9, held_out=True
)


TENSOR = replace(TINY, optimizer=lambda parameters, lr: torch.optim.Adam([*parameters], lr=torch.tensor(lr)))


@pytest.mark.parametrize("run", [*[Run(one, GBN, 1) for one in (TINY, CYCLE, TENSOR)], Run(OWN, CONTROL, 1)], ids=str)
def test_a_stopped_run_ends_as_if_never_stopped(run, tmp_path, undisturbed):
    """Stopped at the end of its first epoch, and, gone on, in the middle of its second."""
    first_steps = {"learning rates": "a digest", "steps": [{"loss": 2.3}]}  # as of a run with the user's code
    whole = undisturbed if run.recipe is TINY else train_run(run)
    assert list(history_of(whole)["lr"]) == pytest.approx([run.recipe.learning_rates(epoch)[0] for epoch in (1, 2)])
    for stop in (10, 5):
        with pytest.raises(Stopped):
            train_watched(run, tmp_path, stop, first_steps)
        state = read_checkpoint(tmp_path)
        assert len(state["history"]) == 1
        state["optimizer"]["param_groups"][0]["lr"] = torch.tensor(0.1)  # as a recorded step keeps it
        write_checkpoint(tmp_path, state)
    (tmp_path / ".checkpoint.pt.123.part").write_bytes(b"half a file")
    resumed, steps = train_watched(run, tmp_path, steps=first_steps)
    assert_same_run(resumed, whole)
    assert len(steps) == 10
    assert not list(tmp_path.glob(".*"))
    assert all(read_checkpoint(tmp_path).get("loss", {}).values())  # one's own is trained,
    assert not any(OWN.loss.state_dict().values())  # and the caller's left alone


def test_held_out_images_are_judged(mnist):
    trained = train_run(Run(replace(CYCLE, epochs=1, train_images=64), GBN, 1))
    predictions = np.load(io.BytesIO(trained.files["predictions.npy"]))
    right = (torch.from_numpy(predictions) == mnist[0].labels[50_000:50_500]).float().mean()
    assert history_of(trained)["val_accuracy"].iloc[-1] == pytest.approx(float(right))
    assert predictions.dtype == np.uint8


def test_a_damaged_checkpoint_falls_back_and_one_of_another_run_is_refused(undisturbed, tmp_path, capfd):
    train_run(Run(TINY, GBN, 1), tmp_path)
    others = Run(TINY, GBN, 2), Run(TINY, L1_BN, 1), Run(replace(TINY, epochs=3), GBN, 1)
    for run, steps in (*((other, None) for other in others), (Run(TINY, GBN, 1), {"learning rates": "a digest"})):
        with pytest.raises(RunError, match="is of another run; delete it"):
            train_run(run, tmp_path, entry=identity(run, steps))
    (tmp_path / "checkpoint.pt").write_bytes(b"damaged")
    again, steps = train_watched(Run(TINY, GBN, 1), tmp_path)
    assert_same_run(again, undisturbed)
    assert len(steps) == 10
    assert "checkpoint.pt is damaged" in capfd.readouterr().err


def test_a_finished_folder_holds_four_files_and_the_machines_that_trained(undisturbed, tmp_path, monkeypatch):
    run = Run(TINY, GBN, 1)
    train_run(run, tmp_path)
    assert not is_complete(tmp_path)
    elsewhere = {**machine(CPU), "host": "elsewhere", "core": "another"}
    monkeypatch.setattr(s6lib.lab.run, "machine", lambda device: elsewhere)
    write_results(tmp_path, *train_run(run, tmp_path))
    assert is_complete(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "history.csv", "weights.pt", "predictions.npy"}
    about = read_about(tmp_path)
    assert (about["condition"]["slug"], about["seed"], about["torch"]) == ("gbn", 1, torch.__version__)
    assert (about["host"], about["earlier"][0]["host"]) == ("elsewhere", undisturbed.about["host"])
    assert re.search(r"L2 unified \d+K", about["earlier"][0]["core"]) or not Path("/sys/devices/system/cpu").exists()
    assert (tmp_path / "weights.pt").read_bytes() == undisturbed.files["weights.pt"]


def test_a_run_that_comes_back_elsewhere_is_left_as_it_is(undisturbed, tmp_path, monkeypatch):
    """As when a worker is killed with a result that has just been fetched: its run is sent out again."""

    def completed_meanwhile(*arguments):
        shutil.copytree(done, folder, dirs_exist_ok=True)
        return original(*arguments)

    original, run = s6lib.lab.run.train_epoch, Run(TINY, GBN, 1)
    done, folder = tmp_path / "done", tmp_path / "run"
    write_results(done, *undisturbed)
    monkeypatch.setattr(s6lib.lab.run, "train_epoch", completed_meanwhile)
    for _ in range(2):  # in its first epoch, and before it
        assert_same_run(train_run(run, folder), undisturbed)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
            path.name: path.read_bytes() for path in done.iterdir()
        }


@pytest.mark.parametrize("share", [0.5, 0.95], ids=["a step", "the last step"])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_its_history(tmp_path, share):
    """The last step's update is found by the evaluation after it."""
    recipe = replace(TINY, schedule=lambda done: 1.0 if done < share else 1e35)
    with pytest.raises(RunError, match=r"GBN \(gbn\), seed 1: the loss is not finite at epoch 2; lower"):
        train_run(Run(recipe, GBN, 1), tmp_path)
    assert (tmp_path / "history.csv").read_text().splitlines()[1].startswith("1,0.01,")
    assert len(read_checkpoint(tmp_path)["history"]) == 1


# --- what a run starts from ------------------------------------------------------------------------------------------


def squares():
    """Images with a bright square whose place is the class."""
    labels = np.arange(60) % 3
    images = np.zeros((60, 12, 12), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[label : label + 3, label : label + 3] = 200
    names = ("first", "second", "third")
    return ImageDataset(images, labels, names), ImageDataset(images[:20], labels[:20], names)


def flat(pixels, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, classes))


SQUARES = Recipe("squares", partial(flat, 144, 3), data=squares, epochs=1, batch_size=16)


def test_all_images_are_the_default_and_more_than_there_are_is_an_error():
    assert set_up_of(SQUARES).settings.train_images == 60
    assert set_up_of(replace(SQUARES, held_out=True)).settings.train_images == 50
    with pytest.raises(SettingError, match="train_images must be at most 60, as many as there are, not 61"):
        set_up_of(replace(SQUARES, train_images=61))


def test_images_are_the_first_or_drawn_anew_for_each_seed(mnist):
    recipe = replace(TINY, train_images=300)
    assert torch.equal(set_up_of(recipe).train.labels, mnist[0].labels[:300])
    drawing = replace(recipe, draw_images=True)
    first, other, same = (set_up_of(drawing, *more).train.images for more in ((), (CONTROL, 2), (GBN, 1)))
    assert torch.equal(first, same)  # conditions of a seed train on the same images
    assert not torch.equal(first, other)
    assert len(first.flatten(1).unique(dim=0)) == 300


def test_an_epoch_may_pass_through_the_images_several_times():
    parts = list(set_up_of(replace(TINY, train_images=100, passes=3)).batches(1, torch.Generator().manual_seed(1)))
    assert [len(labels) for _, labels in parts] == [64, 36] * 3
    assert len({tuple(labels.tolist()) for _, labels in parts}) == 6  # in another order each time


def test_the_schedule_scales_each_groups_own_rate_and_that_of_the_first_is_recorded():
    def two_groups(parameters, lr):
        return torch.optim.SGD([{"params": parameters[:1], "lr": 0.4}, {"params": parameters[1:], "lr": lr / 10}])

    recipe = replace(SQUARES, epochs=2, optimizer=two_groups, schedule=lambda done: 1 - done, learning_rate=0.3)
    setup = set_up_of(recipe)
    rates = [[group["lr"] for group in setup.optimizer.param_groups] for _ in setup.batches(2, torch.Generator())]
    assert rates == [pytest.approx([share * 0.4, share * 0.03]) for share in (0.5, 0.375, 0.25, 0.125)]
    assert list(history_of(train_run(Run(recipe, CONTROL, 1)))["lr"]) == pytest.approx([0.4, 0.2])


def test_the_moving_average_is_what_is_judged_and_saved():
    """With a decay of 0.5, three steps leave 1/4, 1/4 and 1/2 of three networks; whole numbers are the last's."""
    seen = []

    class Noted(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            seen.append([weights.detach().clone() for weights in self.param_groups[0]["params"]])

    run = Run(replace(TINY, epochs=1, train_images=192, ema=0.5, optimizer=Noted), GBN, 1)
    state = torch.load(io.BytesIO(train_run(run).files["weights.pt"]))
    for name, first, second, third in zip(dict(PlainNet().named_parameters()), *seen, strict=True):
        assert torch.allclose(state[name], first / 4 + second / 4 + third / 2, atol=1e-6)
    assert {int(value) for name, value in state.items() if name.endswith("num_batches_tracked")} == {3}


def test_a_network_says_in_which_memory_format_it_is_trained():
    assert set_up_of(TINY).model.layers[4].weight.is_contiguous(memory_format=torch.channels_last)
    assert memory_format(PlainNet().to("meta")) == torch.contiguous_format  # on a GPU

    own = nn.Sequential(nn.Conv2d(1, 4, 5, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(144, 10))
    recipe = replace(TINY, network=lambda: own, dropout=None)
    assert set_up_of(recipe).model[1].weight.is_contiguous()
    own.memory_format = torch.channels_last
    assert set_up_of(recipe).model[1].weight.is_contiguous(memory_format=torch.channels_last)


def sum_of(logits, targets, losses):
    return sum(loss(logits, targets) for loss in losses)


def test_a_loss_and_a_moving_average_go_to_the_device():
    """With the tensors of a loss, such as class weights; the caller's stay where they are."""
    weights, meta = torch.tensor([1.0, 2.0, 3.0]), torch.device("meta")
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    weighted = nn.CrossEntropyLoss(weight=weights)
    for loss, weight_of in (
        (weighted, lambda moved: moved.weight),
        (partial(nn.functional.cross_entropy, weight=weights), lambda moved: moved.keywords["weight"]),
        (partial(sum_of, losses=[weighted]), lambda moved: moved.keywords["losses"][0].weight),
    ):
        assert weight_of(_on_device(loss, meta)).device == meta
        assert torch.equal(set_up_of(replace(SQUARES, loss=loss)).loss(logits, labels), loss(logits, labels))
    model = flat(144, 3).to(meta)
    average = _build_average(model, torch.optim.SGD(model.parameters(), 0.1), 0.9)
    assert {tensor.device for tensor in (*average.module.parameters(), *average.module.buffers())} == {meta}


class Tutorial(nn.Module):
    """As in the course's first session: it views what a convolution gives."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(1, 10, 5), nn.Conv2d(10, 20, 5), nn.Linear(320, 10)

    def forward(self, images):
        for layer in (self.first, self.second):
            images = nn.functional.max_pool2d(layer(images), 2).relu()
        return self.last(images.view(-1, 320)).log_softmax(1)


class GreyLevels(nn.Flatten):
    def forward(self, images):
        return super().forward(((images + 0.5) * 4).long().clamp(0, 15))


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(0.01 * torch.randn(784, 10, dtype=torch.cfloat))

    def forward(self, images):
        return (images.flatten(1).to(torch.cfloat) @ self.weight).abs()


class SittingOut(nn.Linear):
    """A layer that is skipped at random, as in stochastic depth."""

    def forward(self, features):
        skipped = self.training and torch.rand(()) < 0.5
        return features if skipped else features + super().forward(features).relu()


KINDS = {
    "viewing": Tutorial,
    "lazy": lambda: nn.Sequential(nn.LazyConv2d(8, 5, 3, bias=False), nn.LazyBatchNorm2d(), flat(512, 10)),
    "volume": lambda: nn.Sequential(nn.Unflatten(1, (1, 1)), nn.Conv3d(1, 4, (1, 28, 28)), flat(4, 10)),
    "sparse": lambda: nn.Sequential(GreyLevels(), nn.Embedding(16, 4, sparse=True), flat(3136, 10)),
    "complex": Complex,
    "sitting out": lambda: nn.Sequential(flat(784, 32), nn.ReLU(), SittingOut(32, 32), nn.Linear(32, 10)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_all_layers_of_networks_of_every_kind_are_trained(kind):
    recipe = Recipe("r", KINDS[kind], epochs=1, train_images=640)
    before = set_up_of(recipe).model.state_dict()
    trained = train_run(Run(recipe, CONTROL, 1))
    after = torch.load(io.BytesIO(trained.files["weights.pt"]))
    assert after.keys() == before.keys()
    assert not [name for name, value in after.items() if torch.equal(value, before[name])]
    assert np.isfinite(history_of(trained)["train_loss"][0])
