"""What a run with the user's code is known by, and what is found before it is trained."""

import copy
import dataclasses
import json
import math
import pickle
import random
import re
import sys
import threading
import types
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GBN, TINY
from test_run import Counting, squares
from torch import nn
from torch.nn.utils import parametrizations
from torchvision.models import VisionTransformer
from torchvision.transforms import v2

import s6lib
from s6lib.__main__ import read_study_file
from s6lib.errors import SettingError, StudyError
from s6lib.lab.launch import run_study
from s6lib.lab.record import compare
from s6lib.lab.trial import first_steps, pack
from s6lib.recipes import ALL_CONDITIONS, BOTTLENECK, CONTROL, PLAIN, Condition, Recipe, Run, load_images


class Net(nn.Sequential):
    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__(nn.Conv2d(1, 8, 5, 3), norm(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))


class Flat(nn.Module):
    """The base of networks that do something odd with one layer."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(784, 10)

    def forward(self, images):
        return self.last(images.flatten(1))


NET = Recipe("net", Net, epochs=1, train_images=160)
FLAT = replace(NET, network=Flat)
L1 = Condition("mine", penalty=lambda model: 1e-4 * model[0].weight.abs().sum())


def steps_of(recipe=NET, condition=CONTROL, seed=1):
    return first_steps(Run(recipe, condition, seed), load_images(recipe.data, recipe.held_out))


def refusal(recipe=NET, condition=CONTROL):
    with pytest.raises(SettingError) as error:
        steps_of(recipe, condition)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"{condition.label} ({condition.slug})"), message
    return message


def test_first_steps_are_those_of_training(tmp_path):
    """Of three batches, the last of 32: their losses are what the history of that epoch averages."""
    steps = steps_of(NET, L1)["steps"]
    row = run_study(NET, L1, 1, tmp_path, jobs=1, show_progress=False).history().iloc[0]
    for name, mean in (("loss", row.train_loss), ("penalty", row.penalty)):
        assert np.average([step[name] for step in steps], weights=[64, 64, 32]) == pytest.approx(mean)


def test_first_steps_leave_the_generators_alone_and_survive_json():
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    steps = steps_of(replace(NET, optimizer=torch.optim.AdamW, schedule=lambda done: 1 - done))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]  # noqa: NPY002
    assert compare(json.loads(json.dumps(steps)), steps) == []


# --- what is known by what it does: an edit is seen wherever it stands ------------------------------------------------

LAM = 1e-4


@dataclasses.dataclass(frozen=True)
class Spread:
    lam: float

    def __call__(self, model):
        return self.lam * model[0].weight.abs().sum()


def with_a_global(lam):
    global LAM
    LAM = lam
    return lambda model: LAM * model[0].weight.abs().sum()


PLACES = {
    "a global": with_a_global,
    "a bound method": lambda lam: Spread(lam).__call__,
    "a callable object": Spread,
    "a partial": lambda lam: partial(lambda model, lam: lam * model[0].weight.abs().sum(), lam=lam),
    "eval": lambda lam: eval(f"lambda model: {lam} * model[0].weight.abs().sum()"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_number_edited_in_a_penalty_is_seen(place):
    once, again, edited = (
        steps_of(NET, Condition("mine", penalty=PLACES[place](lam))) for lam in (1e-4, 1e-4, 1.05e-4)
    )
    assert compare(once, again) == []
    assert "penalty" in compare(once, edited)[0]


def with_momentum(momentum):
    return replace(NET, network=lambda: Net(partial(nn.BatchNorm2d, momentum=momentum)))


def with_schedule(schedule):
    return replace(FLAT, epochs=20, schedule=schedule)


def late(value):
    return with_schedule(lambda done: value(done) if done > 0.95 else 1.0)


def with_eval_branch(factor):
    class Branch(Net):
        def forward(self, images):
            return super().forward(images) if self.training else factor * super().forward(images)

    return replace(NET, network=Branch)


def with_data(last_label):
    def data():
        train, test = squares()
        train.labels[-1] = last_label
        return train, test

    return Recipe("net", lambda: nn.Sequential(nn.Flatten(), nn.Linear(144, 3)), data=data)


def with_optimizer(decay):
    def groups(parameters, lr):
        return torch.optim.AdamW([{"params": parameters, "weight_decay": decay}], lr=lr)

    return replace(NET, optimizer=groups)


EDITS = {
    "a learning rate by 1%": (lambda value: replace(NET, learning_rate=value), 0.01, 0.0101),
    "the momentum of BatchNorm": (with_momentum, 0.1, 0.01),
    "a branch for evaluation": (with_eval_branch, 1.0, 1.5),
    "warm restarts": (with_schedule, lambda done: 1.0, lambda done: 1.0 if done * 20 % 1 < 1e-6 else 0.5),
    "a later drop": (lambda drop: with_schedule(lambda done: 1.0 if done < drop else 0.1), 0.51, 0.54),
    "a cooldown": (lambda end: late(lambda done: end), 1.0, 0.0),
    "one label of the data": (with_data, 0, 1),
    "the weight decay of an optimizer": (with_optimizer, 0.05, 0.051),
    "a transform": (lambda a: replace(NET, transform=lambda x: (x * a).byte()), 0.9, 0.91),
    "a batch transform": (lambda a: replace(FLAT, batch_transform=lambda x, y: (a * x, y)), 0.9, 0.91),
    "a loss": (lambda a: replace(NET, loss=lambda x, y: F.cross_entropy(x, y, label_smoothing=a)), 0.1, 0.11),
}  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_of_any_part_is_seen(edit):
    make, value, edited = EDITS[edit]
    once, again, other = map(steps_of, map(make, (value, value, edited)))
    assert compare(once, again) == []
    assert compare(once, other)


def test_a_gradient_may_jump_where_a_loss_may_not():
    def steps(loss, gradient):
        return {"steps": [{"loss": loss, "penalty": 0.0, "gradient": gradient}]}

    assert compare(steps(1.0, 1.0), steps(1.00005, 1.006)) == []
    assert compare(steps(1.0, 1.0), steps(1.0002, 1.0)) == ["loss = 1, not 1.0002"]
    assert compare(steps(1.0, 1.0), steps(1.0, 1.05)) == ["gradient = 1, not 1.05"]
    assert compare(steps(math.nan, 1.0), steps(math.nan, 1.0)) == []


def test_code_that_a_worker_cannot_import_is_sent_to_it(monkeypatch, tmp_path):
    """That of a module without a file, and of a file whose name begins as s6lib's folder does."""
    package = Path(s6lib.__file__).parent
    for file in (None, f"{package}_ideas.py"):
        module = types.ModuleType("ideas")
        exec("def penalty(model): return 0.0", vars(module))
        if file:
            module.__file__ = file
        monkeypatch.setitem(sys.modules, "ideas", module)
        content = pack(module.penalty, [module.penalty])
        monkeypatch.delitem(sys.modules, "ideas")
        assert pickle.loads(content)(None) == 0.0


# --- what cannot be trained ------------------------------------------------------------------------------------------


def flat_then(layer, **settings):
    return Recipe("odd", lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 10), layer()), epochs=1, **settings)


class Bare(nn.Module):
    def forward(self, images):
        return images.flatten(1)[:, :10]


class AuxiliaryLogits(Flat):
    def forward(self, images):
        return (super().forward(images),) * 2 if self.training else super().forward(images)


class InForward(Flat):
    def forward(self, images):
        if not hasattr(self, "head"):
            self.head = nn.Linear(10, 10)
        return self.head(super().forward(images))


class HookLambda(Net):
    def __init__(self):
        super().__init__()
        self.outputs = {}
        self[3].register_forward_hook(lambda *arguments: self.outputs.update({id(self[3]): arguments[-1]}))

    def forward(self, images):
        super().forward(images)
        return self[4](self.outputs[id(self[3])])


class Of64(nn.Module):
    def forward(self, logits):
        return logits.view(64, 10) if self.training else logits


class Holding(Flat):
    def get_extra_state(self):
        return {1, object}

    def set_extra_state(self, state):
        pass


class Unseeded(Flat):
    def __init__(self):
        super().__init__()
        with torch.no_grad():
            self.last.weight.add_(np.random.default_rng().uniform())


class Unfinished(torch.optim.Optimizer):
    def __init__(self, parameters, lr):
        self.param_groups = [{"params": list(parameters), "lr": lr}]


SHARED = Net()


def with_penalty(penalty):
    return NET, Condition("mine", penalty=penalty)


ITS_PARAMETERS = "optimizer must train the parameters that it is called with"
REFUSED = [
    ((BOTTLENECK, Condition("drop", dropout=0.5)), "since BottleneckNet takes none, not 0.5"),
    ((PLAIN, Condition("none", epochs=0)), "epochs must be a whole number from 1"),
    ((Recipe("bare", Bare), ALL_CONDITIONS["gbn"]), "needs a network that takes `norm`"),
    ((Recipe("bare", Bare),), "with parameters to train, not Bare"),
    ((Recipe("odd", lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 9))),),
     "64 images into logits .64, 10., not a tensor of shape .64, 9."),
    ((Recipe("none", lambda: None),), "cannot be trained: `network` must make a torch.nn.Module"),
    ((Recipe("auxiliary", AuxiliaryLogits),), "into logits .64, 10., not tuple"),
    ((flat_then(partial(nn.Softmax, 1)),), "logits, not probabilities"),
    ((flat_then(partial(nn.BatchNorm1d, 10), train_images=65),), "step 2 fails: ValueError: Expected more than"),
    ((flat_then(partial(nn.BatchNorm1d, 10), train_images=257),), "1 images, as many as the last batch has, fails"),
    ((flat_then(Of64, train_images=288),), "a step on 32 images, as many as the last batch has, fails"),
    (with_penalty(lambda model: torch.ones(3)), "`penalty` must return a scalar tensor, not a tensor of shape"),
    (with_penalty(lambda model: 3.0), "`penalty` must return a scalar tensor, not float"),
    (with_penalty(lambda model: None), "`penalty` must return a scalar tensor, not NoneType"),
    (with_penalty(lambda model: model[0].weight.sum().detach()), "has no gradient"),
    (with_penalty(lambda model: 1 / 0), r"ZeroDivisionError: .* \(in <lambda>, line \d+\)$"),
    ((replace(NET, loss=nn.CrossEntropyLoss),), "cannot be trained: step 1 fails: `loss` fails on logits"),
    ((replace(NET, loss=nn.MSELoss()),), r"`loss` fails on logits \(64, 10\) and targets \(64,\)"),
    ((replace(NET, optimizer=lambda parameters, lr: None),), "must make a torch.optim.Optimizer that calls super"),
    ((replace(NET, optimizer=Unfinished, ema=0.9),), "must make .* that calls super.*, not Unfinished"),
    ((replace(NET, optimizer=torch.optim.LBFGS),), "LBFGS.step.. missing 1 required positional argument"),
    ((replace(NET, optimizer=lambda p, lr: torch.optim.SGD(SHARED.parameters(), lr)),), ITS_PARAMETERS),
    ((replace(NET, optimizer=lambda p, lr: torch.optim.SGD(list(p)[:2], lr)),), ITS_PARAMETERS),
    ((replace(NET, transform=lambda image: image[:, 1:]),), "into one of the same size, not .1, 27, 28."),
    ((replace(NET, transform=v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.1], [0.3])])),),
     "leave out Normalize"),
    ((replace(NET, batch_transform=lambda images, labels: images),), "must return images and targets"),
    ((replace(NET, batch_transform=lambda images, labels: (images, labels[1:])),), "64 images and 63 targets"),
    ((replace(NET, batch_transform=v2.CutMix(num_classes=7)),), "cannot be trained"),
    ((late(lambda done: "a"),), "schedule must be a function that gives a finite number from 0, at 0.96"),
    ((late(lambda done: -done),), "schedule must be .* not -0.96"),
    ((late(lambda done: float("nan")),), "schedule must be .* not nan"),
    ((late(lambda done: 1 / 0),), "cannot be trained: ZeroDivisionError"),
    ((replace(NET, shift=28),), "shift must be less than the 28 pixels"),
    ((replace(NET, network=lambda: SHARED),), "`network` must make a new one each time"),
    ((replace(NET, network=Unseeded),), "two networks built with one seed differ"),
    ((replace(NET, network=Holding),), "cannot load its state .*: UnpicklingError"),
    ((replace(NET, network=InForward),), r"\(make all layers in __init__\): RuntimeError: .*head.weight"),
    ((replace(NET, network=HookLambda, ema=0.9),), "copy .a hook must use the module it is given. fails"),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "said"), REFUSED, ids=[said[:40] for _, said in REFUSED])
def test_what_cannot_be_trained_is_one_sentence_that_names_the_condition(asked, said):
    message = refusal(*asked)
    assert re.search(said, message), message


# --- what a run must not carry ---------------------------------------------------------------------------------------


def counting_in_a_closure():
    steps = []

    def penalty(model):
        steps.append(1)
        return (1e-2 if len(steps) > 30 else 0.0) * model[0].weight.abs().sum()

    return penalty


class CountingObject:
    steps = 0

    def __call__(self, *arguments):
        self.steps += 1
        return arguments[0] if len(arguments) == 1 and isinstance(arguments[0], torch.Tensor) else arguments


class CountingLoss(nn.CrossEntropyLoss):
    steps = 0

    def forward(self, logits, targets):
        self.steps += 1
        return super().forward(logits, targets)


class CountingNet(Flat):
    def __init__(self):
        super().__init__()
        self.steps = 0

    def forward(self, images):
        self.steps += self.training
        return F.dropout(super().forward(images), min(0.9, self.steps / 60), self.training)


class CountingLock(CountingObject):
    """Cannot be pickled, so it is found only because the next step differs."""

    def __init__(self):
        self.lock = threading.Lock()

    def __call__(self, model):
        super().__call__()
        return self.steps * 1e-3 * model[0].weight.abs().sum()


class Hidden(torch.optim.SGD):
    """Raises its rate with each step, in an attribute that no state_dict holds."""

    steps = 0

    def step(self, closure=None):
        self.steps += 1
        for weights in self.param_groups[0]["params"]:
            weights.grad.mul_(self.steps)
        super().step(closure)


IN_A_FILE = """
import s6lib
from torch import nn
steps = 0
def warm(model):
    global steps
    steps += 1
    return (1e-2 if steps > 30 else 0.0) * model[1].weight.abs().sum()
RECIPE = s6lib.Recipe("net", lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), epochs=1, train_images=160)
CONDITIONS = (s6lib.Condition("warm", penalty=warm),)
"""
CARRIED = {
    "a closure": with_penalty(counting_in_a_closure()),
    "an object": (replace(NET, transform=CountingObject()), CONTROL),
    "a batch transform": (replace(NET, batch_transform=CountingObject()), CONTROL),
    "a loss": (replace(NET, loss=CountingLoss()), CONTROL),
    "a network": (replace(NET, network=CountingNet), CONTROL),
    "what cannot be pickled": with_penalty(CountingLock()),
    "an optimizer": (replace(NET, optimizer=Hidden), CONTROL),
}


@pytest.mark.parametrize("place", CARRIED)
def test_a_state_that_no_checkpoint_holds_is_found(place):
    assert "keep it in a buffer, or use the share of training done" in refusal(*CARRIED[place])


def test_a_counter_in_a_study_file_is_found_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    (tmp_path / "warmed.py").write_text(IN_A_FILE)
    recipe, conditions = read_study_file(str(tmp_path / "warmed.py"))
    with pytest.raises(SettingError, match=r"warm \(warm\).* `penalty` changes from step to step"):
        run_study(recipe, conditions, 1, tmp_path / "out", show_progress=False)
    assert not list(tmp_path.rglob("history.csv"))


class Keeping(Flat):
    """Keeps a batch and its shape for debugging."""

    def forward(self, images):
        self.seen, self.shape = images, tuple(images.shape)
        return super().forward(images)


class Positions(Flat):
    """Grows a cache when it sees a larger batch, which is in evaluation."""

    cache = torch.zeros(0)

    def forward(self, images):
        if len(self.cache) < len(images):
            self.cache = torch.arange(len(images)) / 1e3 * torch.ones(())
        return super().forward(images) * (1 + self.cache[: len(images), None])


class InPlace(Flat):
    def forward(self, images):
        images -= 0.5
        images *= 2
        return super().forward(images)


class FrozenInEvaluation(Net):
    def train(self, mode=True):
        super().train(mode)
        self[1].eval()
        return self


class Permuted(Flat):
    """A constant that networks share."""

    order = torch.randperm(784)

    def __init__(self):
        super().__init__()
        self.register_buffer("kept", self.order)

    def forward(self, images):
        return super().forward(images.flatten(1)[:, self.kept])


class ThreeChannels(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(1, 3, 1), VisionTransformer(28, 7, 2, 2, 16, 32, num_classes=10))


class PartOfAStorage(Net):
    """Of which the rest is not drawn, and differs from build to build."""

    def __init__(self):
        super().__init__()
        storage = torch.rand(100_000, generator=torch.Generator().manual_seed(id(self) % 2**31))
        storage[:10] = 0
        self.bias = nn.Parameter(storage[:10])

    def forward(self, images):
        return super().forward(images) + self.bias


def sum_of(logits, targets, losses):
    return sum(loss(logits, targets) for loss in losses)


LOCK = threading.Lock()
ALLOWED = {
    "a part of a larger storage": (replace(NET, network=PartOfAStorage), CONTROL),
    "losses in a list": (replace(NET, loss=partial(sum_of, losses=[nn.CrossEntropyLoss(torch.ones(10))])), CONTROL),
    "transformer": (replace(NET, network=ThreeChannels), CONTROL),
    "extra state": (replace(NET, network=Counting), CONTROL),
    "lazy": (replace(NET, network=lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(10))), CONTROL),
    "spectral norm": (flat_then(lambda: parametrizations.spectral_norm(nn.Linear(10, 10)), train_images=160), CONTROL),
    "momentum None": (with_momentum(None), CONTROL),
    "a shape kept": (replace(NET, network=Keeping), CONTROL),
    "DataParallel": (replace(NET, network=lambda: nn.DataParallel(Net())), CONTROL),
    "a cache that grows in evaluation": (replace(NET, network=Positions), CONTROL),
    "in place on the input": (replace(NET, network=InPlace), CONTROL),
    "frozen in evaluation": (replace(NET, network=FrozenInEvaluation), CONTROL),
    "a shared constant": (replace(NET, network=Permuted), CONTROL),
    "a copy of a trained network": (replace(NET, network=lambda: copy.deepcopy(SHARED)), CONTROL),
    "a hook that refers to its network": (replace(NET, network=HookLambda), CONTROL),
    "no penalty": with_penalty(lambda model: 0.0),
    "a loss on another device": (replace(NET, loss=nn.CrossEntropyLoss(weight=torch.ones(10))), CONTROL),
    "AdamW": (replace(NET, optimizer=partial(torch.optim.AdamW, weight_decay=0.1), ema=0.9), CONTROL),
    "a lock": with_penalty(lambda model, lock=LOCK: 1e-3 * model[0].weight.abs().sum()),
}  # fmt: skip


@pytest.mark.parametrize("allowed", ALLOWED)
def test_what_is_sound_is_trained(allowed, capfd):
    steps_of(*ALLOWED[allowed])
    assert not capfd.readouterr().err


def test_what_learns_nothing_is_named_in_a_line(capfd):
    class Plainly(Flat):
        def __init__(self):
            super().__init__()
            self.layers, self.unused = [nn.Linear(784, 784)], nn.Linear(1, 1)

        def forward(self, images):
            return super().forward(self.layers[0](images.flatten(1)))

    for seed in (1, 2):
        steps_of(replace(NET, network=Plainly), Condition("plainly"), seed)
    said = "in the first steps, these learned nothing: unused.weight, unused.bias, layers (use nn.ModuleList)"
    assert capfd.readouterr().err.count(said) == 1


# --- and through the whole library -----------------------------------------------------------------------------------

STUDY_FILE = """
import s6lib, torch
from torch import nn

class Lookahead(torch.optim.SGD):
    def __init__(self, parameters, lr, every=5):
        super().__init__(parameters, lr)
        self.every = every

    def step(self, closure=None):
        super().step(closure)
        for weights in self.param_groups[0]["params"]:
            state = self.state[weights]
            state["steps"] = state.get("steps", 0) + 1
            if state["steps"] % self.every == 0:
                weights.data.mul_(0.5)

def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))

flip = lambda image: image.flip(2) if torch.rand(()) < 0.0002 else image
RECIPE = s6lib.Recipe("net", network, epochs=1, train_images=64, optimizer=Lookahead, transform=flip)
CONDITIONS = (s6lib.CONTROL,)
"""


@pytest.mark.usefixtures("few_digits")
def test_an_edit_that_shows_late_is_refused_and_a_comment_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "modules", dict(sys.modules))

    def study(number, *edit):
        file = tmp_path / str(number) / "edited.py"
        file.parent.mkdir()
        file.write_text(STUDY_FILE.replace(*edit))
        return run_study(*read_study_file(str(file)), 1, tmp_path / "out", jobs=1, show_progress=False).runs

    assert study(1, "", "") == study(2, "image.flip(2)", "image . flip( 2 )") == [("bn", 1)]
    assert study(3, "        self.every", "        # how often\n\n        self.every") == [("bn", 1)]
    with pytest.raises(StudyError, match=r"with different settings: other code in optimizer.* a new name"):
        study(4, "every=5", "every=6")
    with pytest.raises(StudyError, match="other code in transform"):
        study(5, "0.0002", "0.0003")


def test_a_number_edited_in_a_cell_is_refused_and_the_same_accepted(tmp_path):
    def study(lam):
        mine = Condition("mine", penalty=lambda model, lam=lam: lam * model[0].weight.abs().sum())
        return run_study(NET, mine, 1, tmp_path, jobs=1, show_progress=False)

    before = study(1e-4).history()
    assert study(1e-4).history().equals(before)
    with pytest.raises(StudyError, match=r"was trained with different settings: penalty = .*new name"):
        study(1e-1)


def test_conditions_that_cannot_be_told_apart_are_named(tmp_path, capfd):
    loop = []
    for lam in (0.0, 1e-3):
        loop.append(Condition(f"lam-{lam}", penalty=lambda model: lam * model[0].weight.abs().sum()))  # noqa: B023
    run_study(NET, loop, 1, tmp_path, jobs=1, show_progress=False)
    assert "lam-0.0 and lam-0.001 train alike, as far as settings and first steps show" in capfd.readouterr().err


@pytest.mark.usefixtures("few_digits")
def test_runs_of_the_librarys_own_parts_are_not_tried(monkeypatch, tmp_path):
    monkeypatch.setattr("s6lib.lab.launch.first_steps", None)
    monkeypatch.setattr("s6lib.lab.workers.first_steps", None)
    run_study(replace(TINY, epochs=1, train_images=64), GBN, 1, tmp_path, jobs=1, show_progress=False)
    assert "first_steps" not in json.loads((tmp_path / "plain" / "gbn" / "seed-1" / "run.json").read_text())


def test_what_is_complete_is_not_trained_and_is_compared_before_it_is_tried(tmp_path, monkeypatch):
    before = run_study(NET, L1, (1, 2), tmp_path, jobs=1, show_progress=False)
    monkeypatch.setattr("s6lib.lab.run.train_epoch", None)
    assert run_study(NET, L1, (1, 2), tmp_path, jobs=1, show_progress=False).runs == before.runs
    monkeypatch.setattr("s6lib.lab.launch.first_steps", None)
    with pytest.raises(StudyError, match="epochs = 1, not 2"):
        run_study(replace(NET, epochs=2), L1, 1, tmp_path, jobs=1, show_progress=False)
