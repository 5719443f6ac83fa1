"""What a run with the user's code is known by, and what is found before it is trained."""

import copy
import math
import random
import re
import sys
import threading
from dataclasses import replace
from functools import partial
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_run import KINDS, Counting, flat, squares
from torch import nn
from torch.nn.utils import parametrizations
from torchvision import transforms
from torchvision.models import VisionTransformer
from torchvision.transforms import v2

import s6lib
from s6lib.__main__ import read_study_file
from s6lib.errors import SettingError, StudyError
from s6lib.lab.launch import run_study
from s6lib.lab.record import compare
from s6lib.lab.trial import first_steps
from s6lib.recipes import ALL_CONDITIONS, CONTROL, Condition, Recipe, Run, load_images
from s6lib.study import Study


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


def with_parts(**parts):
    return replace(NET, **parts), CONTROL


def with_penalty(penalty):
    return NET, Condition("mine", penalty=penalty)


def with_flat(**members):
    return with_parts(network=type("Odd", (Flat,), members))


def with_last(layer, **settings):
    return with_parts(network=lambda: nn.Sequential(flat(784, 10), layer()), **settings)


def late(value):
    return with_parts(epochs=20, schedule=lambda done: value(done) if done > 0.95 else 1.0)


def steps_of(recipe, condition, seed=1):
    return first_steps(Run(recipe, condition, seed), load_images(recipe.data, recipe.held_out))


def refusal(recipe, condition):
    with pytest.raises(SettingError) as error:
        steps_of(recipe, condition)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(str(condition)), message
    return message


def test_first_steps_are_those_of_training_and_leave_the_generators_alone(tmp_path):
    """Of three batches, the last of 32: their losses are what the history of that epoch averages."""
    recipe, condition = with_penalty(lambda model: 1e-4 * model[0].weight.abs().sum())
    before = torch.get_rng_state()
    steps = steps_of(recipe, condition)["steps"]
    assert torch.equal(torch.get_rng_state(), before)
    row = run_study(recipe, condition, 1, tmp_path, jobs=1, show_progress=False).history().iloc[0]
    for name, mean in (("loss", row.train_loss), ("penalty", row.penalty)):
        assert np.average([step[name] for step in steps], weights=[64, 64, 32]) == pytest.approx(mean)


# --- what is known by what it does: an edit is seen wherever it stands ------------------------------------------------


def with_momentum(momentum):
    return with_parts(network=lambda: Net(partial(nn.BatchNorm2d, momentum=momentum)))


def with_eval_branch(factor):
    return with_flat(forward=lambda net, images: (1 if net.training else factor) * Flat.forward(net, images))


def with_data(last_label):
    def data():
        train, test = squares()
        train.labels[-1] = last_label
        return train, test

    return Recipe("net", partial(flat, 144, 3), data=data, batch_size=4), CONTROL


EDITS = {
    "a penalty": (lambda lam: with_penalty(lambda model: lam * model[0].weight.abs().sum()), 1e-4, 1.05e-4),
    "a learning rate by 1%": (lambda rate: with_parts(learning_rate=rate), 0.01, 0.0101),
    "the momentum of BatchNorm": (with_momentum, 0.1, 0.01),
    "a branch for evaluation": (with_eval_branch, 1.0, 1.5),
    "a later drop": (lambda a: with_parts(epochs=20, schedule=lambda done: 1.0 if done < a else 0.1), 0.51, 0.54),
    "a cooldown": (lambda end: late(lambda done: end), 1.0, 0.0),
    "one label of the data": (with_data, 0, 1),
    "a weight decay": (lambda a: with_parts(optimizer=partial(torch.optim.AdamW, weight_decay=a)), 0.05, 0.05001),
    "a transform": (lambda a: with_parts(transform=lambda x: (x * a).byte()), 0.9, 0.91),
    "a batch transform": (lambda a: with_parts(network=Flat, batch_transform=lambda x, y: (a * x, y)), 0.9, 0.91),
    "a loss": (lambda a: with_parts(loss=lambda x, y: F.cross_entropy(x, y, label_smoothing=a)), 0.1, 0.11),
}  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_of_any_part_is_seen(edit):
    make, value, edited = EDITS[edit]
    once, again, other = (steps_of(*make(one)) for one in (value, value, edited))
    assert compare(once, again) == []
    assert compare(once, other)


def test_a_gradient_may_jump_where_a_loss_may_not():
    def steps(loss, gradient):
        return {"steps": [{"loss": loss, "penalty": 0.0, "gradient": gradient}]}

    assert compare(steps(1.0, 1.0), steps(1.00005, 1.006)) == []
    assert compare(steps(1.0, 1.0), steps(1.0002, 1.0)) == ["loss = 1, not 1.0002"]
    assert compare(steps(1.0, 1.0), steps(1.0, 1.05)) == ["gradient = 1, not 1.05"]
    assert compare(steps(math.nan, 1.0), steps(math.nan, 1.0)) == []


# --- what cannot be trained ------------------------------------------------------------------------------------------


def of_64_images(net, images):
    return net.last(images.view(64, 784)) if net.training else Flat.forward(net, images)


def of_251_images():
    return [part.part(slice(251)) for part in s6lib.load_mnist()]


def shuffling(images, labels):
    return images, labels[np.random.default_rng().permutation(len(labels))]


class Squeezing(Flat):
    def forward(self, images):
        return super().forward(images).squeeze()


def made_in_forward(net, images):
    if not hasattr(net, "head"):
        net.head = nn.Linear(10, 10)
    return net.head(Flat.forward(net, images))


class HookLambda(Net):
    def __init__(self):
        super().__init__()
        self.outputs = {}
        self[3].register_forward_hook(lambda *arguments: self.outputs.update(last=arguments[-1]))

    def forward(self, images):
        super().forward(images)
        return self[4](self.outputs["last"])


class Unfinished(torch.optim.Optimizer):
    def __init__(self, parameters, lr):
        self.param_groups = [{"params": list(parameters), "lr": lr}]


def warmed_up(parameters, lr):
    return torch.optim.lr_scheduler.LinearLR(torch.optim.SGD(parameters, lr)).optimizer


SHARED = Net()
BACKBONE = nn.Sequential(nn.Conv2d(1, 8, 5, 3), nn.Flatten()).requires_grad_(False).eval()  # as another run left it
ITS_PARAMETERS = "optimizer must train the parameters that it is called with"
REFUSED = [
    ((Recipe("bare", nn.ReLU), ALL_CONDITIONS["gbn"]), "needs a network that takes `norm`"),
    (with_parts(network=nn.Tanh), "with parameters to train, not Tanh"),
    (with_parts(network=partial(flat, 784, 9)), "64 images into logits .64, 10., not a tensor of shape .64, 9."),
    (with_parts(network=lambda: None), "cannot be trained: `network` must make a torch.nn.Module"),
    (with_flat(forward=lambda net, images: (Flat.forward(net, images),) * 2), "into logits .64, 10., not tuple"),
    (with_last(partial(nn.Softmax, 1)), "logits, not probabilities"),
    (with_last(partial(nn.BatchNorm1d, 10), train_images=257), "1 images, as many as the last batch has, fails"),
    (with_flat(forward=lambda net, images: F.dropout(Flat.forward(net, images))), "F.dropout with `training=self"),
    (with_parts(network=Squeezing, data=of_251_images), "the evaluation fails: RuntimeError: Tensors must have same"),
    (with_flat(forward=of_64_images), "step 3 fails: RuntimeError: shape '.64, 784.' is invalid"),
    (with_penalty(lambda model: torch.ones(3)), "`penalty` must return a scalar tensor, not a tensor of shape"),
    (with_penalty(lambda model: model[0].weight.sum().detach()), "has no gradient"),
    (with_penalty(lambda model: 1 / 0), r"ZeroDivisionError: .* \(in <lambda>, line \d+\)$"),
    (with_parts(loss=nn.MSELoss()), r"`loss` fails on logits \(64, 10\) and targets \(64,\)"),
    (with_parts(optimizer=lambda parameters, lr: None), "must make a torch.optim.Optimizer that calls super"),
    (with_parts(optimizer=Unfinished, ema=0.9), "must make .* that calls super.*, not Unfinished"),
    (with_parts(optimizer=warmed_up), "optimizer must not hold a scheduler"),
    (with_parts(optimizer=torch.optim.LBFGS), "LBFGS.step.. missing 1 required positional argument"),
    (with_parts(optimizer=lambda p, lr: torch.optim.SGD(SHARED.parameters(), lr)), ITS_PARAMETERS),
    (with_parts(optimizer=lambda p, lr: torch.optim.SGD(list(p)[:2], lr)), ITS_PARAMETERS),
    (with_parts(transform=transforms.ToTensor()), "leave out ToTensor.: TypeError: pic should be PIL"),
    (with_parts(batch_transform=lambda images, labels: images), "must return images and targets"),
    (with_parts(batch_transform=lambda images, labels: (images, labels[1:])), "64 images and 63 targets"),
    (with_parts(batch_transform=v2.CutMix(num_classes=7)), "cannot be trained"),
    (with_parts(batch_transform=shuffling), "two first batches of one seed differ"),
    (late(lambda done: -done), "schedule must be a function that gives a finite number from 0, .* not -0.96"),
    (late(lambda done: 1 / 0), "cannot be trained: ZeroDivisionError"),
    (with_parts(shift=28), "shift must be less than the 28 pixels"),
    (with_parts(network=lambda: SHARED), "`network` must make a new one each time"),
    (with_last(lambda: nn.PReLU(init=np.random.default_rng().uniform())), "two networks built with one seed differ"),
    (with_flat(get_extra_state=lambda net: {object}, set_extra_state=print), "cannot load its state .*: Unpickling"),
    (with_flat(forward=made_in_forward), r"\(make all layers in __init__\): RuntimeError: .*head.weight"),
    (with_parts(transform=lambda x: x.roll(int(np.random.default_rng().integers(28)))), "two first batches .* differ"),
    (with_parts(transform=lambda image: (image > 127).byte()), "uint8 .0 to 255. or floats .*, not torch.uint8"),
    ((Recipe("deaf", lambda norm: Net()), ALL_CONDITIONS["gbn"]), "needs a network that uses `norm`, which <lambda>"),
    (with_parts(network=HookLambda, ema=0.9), "copy .a hook must use the module it is given. fails"),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "said"), REFUSED, ids=[said[:40] for _, said in REFUSED])
def test_what_cannot_be_trained_is_one_sentence_that_names_the_condition(asked, said):
    message = refusal(*asked)
    assert re.search(said, message), message


# --- what a run must not carry ---------------------------------------------------------------------------------------

STEPS = 0


def counting_in_a_global(model):
    global STEPS
    STEPS += 1
    return (1e-2 if STEPS > 30 else 0.0) * model[0].weight.abs().sum()


def counting(seen):
    return lambda image: seen.append(1) or image


class CountingLoss(nn.CrossEntropyLoss):
    steps = 0

    def forward(self, logits, targets):
        self.steps += 1
        return super().forward(logits, targets)


class LockedLoss:
    def __init__(self):
        self.lock, self.steps = threading.Lock(), 0

    def __call__(self, logits, targets):
        self.steps += 1
        return F.cross_entropy(logits, targets)


class Warming(Flat):
    """Turns dropout on after fifty steps, which an object of its own counts."""

    def __init__(self):
        super().__init__()
        self.progress = SimpleNamespace(steps=0)

    def forward(self, images):
        self.progress.steps += self.training
        return F.dropout(super().forward(images), 0.5, self.training and self.progress.steps > 50)


class CountingOptimizer(torch.optim.SGD):
    """Leaves out each fifth step, which it counts in an attribute that no state_dict holds."""

    steps = 0

    def step(self, closure=None):
        self.steps += 1
        if self.steps % 5:
            super().step(closure)


class OwnMomentum(torch.optim.SGD):
    """Keeps a gradient of the step before in an attribute."""

    before = 0.0

    def step(self, closure=None):
        gradient = self.param_groups[0]["params"][-2].grad
        self.before = gradient.add_(self.before).clone()
        super().step(closure)


def warming(logits, targets, steps):
    steps[0] += 1
    return F.cross_entropy(logits, targets) * (1.0 if steps[0] > 30 else 0.5)


def counting_in_a_tensor(net, images):
    if not hasattr(net, "steps"):
        net.register_buffer("steps", torch.zeros(()), persistent=False)
    net.steps += net.training
    return Flat.forward(net, images)


def keeping(make, move):
    def forward(net, images):
        net.kept = getattr(net, "kept", None) or make()
        move(net.kept)
        return Flat.forward(net, images)

    return with_flat(forward=forward)


LOCK = threading.Lock()
CARRIED = {
    "an optimizer's own momentum": with_parts(optimizer=OwnMomentum),
    "an argument of a loss": with_parts(loss=partial(warming, steps=[0])),
    "a buffer that is not saved": with_flat(forward=counting_in_a_tensor),
    "a global": with_penalty(counting_in_a_global),
    "a closure": with_parts(transform=counting([])),
    "a loss": with_parts(loss=CountingLoss()),
    "what cannot be pickled": with_parts(loss=LockedLoss()),
    "an object of a network": with_parts(network=Warming),
    "an optimizer": with_parts(optimizer=CountingOptimizer),
    "a count": keeping(count, next),
    "a list beside a layer": keeping(lambda: [nn.ReLU()], lambda kept: kept.append(0)),
    "a hook": keeping(lambda: counting([]), lambda kept: kept(torch.zeros(1))),
    "random": keeping(lambda: random.Random(1), lambda kept: kept.random()),
    "a generator of numpy": keeping(lambda: np.random.default_rng(1), lambda kept: kept.random()),
    "a generator of torch": keeping(torch.Generator, lambda kept: torch.rand(1, generator=kept)),
}


@pytest.mark.parametrize("place", CARRIED)
def test_a_state_that_no_checkpoint_holds_is_found(place):
    assert "keep it in a buffer, or use the share of training done" in refusal(*CARRIED[place])


def kept_for_debugging(net, images):
    net.seen, net.shape, net.size = images, tuple(images.shape), net.last.weight.abs().mean()  # with a graph
    return Flat.forward(net, images)


def in_place(net, images):
    images -= 0.5
    images *= 2
    return Flat.forward(net, images)


class FrozenInEvaluation(Net):
    def train(self, mode=True):
        super().train(mode)
        self[1].eval()
        return self


def part_of_a_storage():
    """The rest of the storage is not drawn, and differs from build to build."""
    network = Flat()
    storage = torch.rand(100_000, generator=torch.Generator().manual_seed(id(network) % 2**31))
    network.last.bias = nn.Parameter(storage[:10].zero_())
    return network


def slope(model):
    images = torch.ones(4, 1, 28, 28, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(images).sum(), images, create_graph=True)
    return 1e-3 * gradient.square().sum()


def transformer():
    return nn.Sequential(nn.Conv2d(1, 3, 1), VisionTransformer(28, 7, 2, 2, 16, 32, num_classes=10))


ORDER = torch.randperm(784)
ALLOWED = {
    "lazy layers": with_parts(network=KINDS["lazy"]),
    "complex weights": with_parts(network=KINDS["complex"]),
    "transformer": with_parts(network=transformer),
    "extra state": with_parts(network=Counting),
    "a part of a larger storage": with_parts(network=part_of_a_storage),
    "spectral norm": with_last(lambda: parametrizations.spectral_norm(nn.Linear(10, 10))),
    "momentum None": with_momentum(None),
    "DataParallel": with_parts(network=lambda: nn.DataParallel(Net())),
    "a shape kept": with_flat(forward=kept_for_debugging),
    "in place on the input": with_flat(forward=in_place),
    "a shared constant": with_flat(forward=lambda net, images: net.last(images.flatten(1)[:, ORDER])),
    "frozen in evaluation": with_parts(network=FrozenInEvaluation),
    "a shared part that is frozen": with_parts(network=lambda: nn.Sequential(BACKBONE, nn.Linear(512, 10))),
    "a copy of a trained network": with_parts(network=lambda: copy.deepcopy(SHARED)),
    "a hook that refers to its network": with_parts(network=HookLambda),
    "CutMix": with_parts(batch_transform=v2.CutMix(num_classes=10)),
    "RandomErasing": with_parts(batch_transform=v2.RandomErasing(p=1.0)),
    "no penalty": with_penalty(lambda model: 0.0),
    "a gradient penalty": with_penalty(slope),
    "a lock": with_penalty(lambda model, lock=LOCK: 1e-3 * model[0].weight.abs().sum()),
    "AdamW": with_parts(optimizer=partial(torch.optim.AdamW, weight_decay=0.1), ema=0.9),
}


@pytest.mark.parametrize("allowed", ALLOWED)
def test_what_is_sound_is_trained(allowed, capfd):
    steps_of(*ALLOWED[allowed])
    assert not capfd.readouterr().err


MODULE = """
import warnings

class Strength:
    weight = 1e-3

def penalty(model, strength=Strength()):
    warnings.warn("a line that is printed once")
    return strength.weight * model[0].weight.abs().sum()
"""


@pytest.mark.filterwarnings("ignore:a line")
def test_a_module_may_keep_what_python_keeps_of_its_first_use(tmp_path, monkeypatch):
    """The warnings that it has given; and __slotnames__ of a class, from the first time that an object is pickled."""
    (tmp_path / "used_first_here.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    import used_first_here

    steps_of(*with_penalty(lambda model: used_first_here.penalty(model)))


def test_what_learns_nothing_is_named_in_a_line(capfd):
    class Hiding(Flat):
        def __init__(self):
            super().__init__()
            self.hidden, self.unused = [nn.Linear(784, 784)], nn.Linear(1, 1)

        def forward(self, images):
            return super().forward(self.hidden[0](images.flatten(1)))

    scale = nn.Parameter(torch.ones(()))
    loss = lambda logits, targets: F.cross_entropy(scale * logits, targets)  # noqa: E731 - as in a notebook
    for seed in (1, 2):
        steps_of(replace(NET, network=Hiding, loss=loss), Condition("plainly"), seed)
    said = "nothing: unused.weight, unused.bias, tensors of shape (), (784, 784), (784,) outside the network (keep"
    assert capfd.readouterr().err.count(said) == 1


# --- and through the whole library -----------------------------------------------------------------------------------

BUILT = 0


def test_a_network_that_counts_how_often_it_was_built_is_refused_before_training(tmp_path):
    """What its code reads would be another number whenever it is asked for."""

    def counted():
        global BUILT
        BUILT += 1
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))

    with pytest.raises(
        SettingError, match=r"settings change when they are used \(other code in network, BUILT = 0, not 2\)"
    ):
        run_study(replace(NET, network=counted), CONTROL, out=tmp_path)


STUDY_FILE = """
import s6lib, torch
from torch import nn

class Lookahead(torch.optim.SGD):
    def step(self, closure=None):
        super().step(closure)
        for weights in self.param_groups[0]["params"]:
            state = self.state[weights]
            state["steps"] = state.get("steps", 0) + 1
            if state["steps"] % 5 == 0:
                weights.data.mul_(0.5)

network = lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
flip = lambda image: image.flip(2) if torch.rand(()) < _RARE else image
_RARE = 0.0002
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
    assert study(3, "        super()", "        # as ever\n\n        super()") == [("bn", 1)]
    with pytest.raises(StudyError, match=r"with different settings: other code in optimizer.* a new name"):
        study(4, "% 5", "% 6")
    with pytest.raises(StudyError, match=r"other code in transform, _RARE = 0\.0002, not 0\.0003"):
        study(5, "0.0002", "0.0003")
    file = tmp_path / "4" / "edited.py"
    with pytest.raises(StudyError, match="other code in optimizer"):
        Study(tmp_path / "out", *read_study_file(str(file)))


def test_what_is_complete_is_compared_before_it_is_tried_and_is_not_trained(tmp_path, monkeypatch):
    def study(lam=1e-4, epochs=1):
        mine = Condition("mine", penalty=lambda model, lam=lam: lam * model[0].weight.abs().sum())
        return run_study(replace(NET, epochs=epochs), mine, 1, tmp_path, jobs=1, show_progress=False)

    before = study().history()
    monkeypatch.setattr("s6lib.lab.run.train_epoch", None)
    assert study().history().equals(before)
    with pytest.raises(StudyError, match=r"settings: other code in penalty, lam = 0.0001, not 0.1\..*new name"):
        study(lam=1e-1)
    monkeypatch.setattr("s6lib.lab.launch.first_steps", None)
    with pytest.raises(StudyError, match="epochs = 1, not 2"):
        study(epochs=2)


def test_conditions_that_cannot_be_told_apart_are_named(tmp_path, capfd):
    loop = [Condition(f"a-{a}", penalty=lambda model: a * model[0].weight.square().sum()) for a in (0.0, 1e-3)]  # noqa: B023
    run_study(NET, loop, 1, tmp_path, jobs=1, show_progress=False)
    assert "a-0.0 and a-0.001 train alike, as far as settings and first steps show" in capfd.readouterr().err
