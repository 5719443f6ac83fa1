"""What a run with code of the user's is known by, and what is found before it is trained."""

import copy
import dataclasses
import enum
import functools
import json
import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GBN, TINY
from torch import nn
from torchvision.transforms import v2

from s6lib.errors import SettingError, StudyError
from s6lib.lab.device import CPU, reproducible
from s6lib.lab.first_steps import step_differences, try_out
from s6lib.lab.launch import run_study
from s6lib.lab.setup import read_data
from s6lib.models import PlainNet
from s6lib.recipes import ALL_CONDITIONS, BOTTLENECK, CONTROL, PLAIN, Condition, Recipe, Run


class Net(nn.Sequential):
    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__(nn.Conv2d(1, 8, 5, 3), norm(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))


NET = Recipe("net", Net, epochs=1, train_images=160)


def steps_of(recipe=NET, condition=CONTROL, seed=1):
    with reproducible(CPU):
        data = read_data(recipe)
    return try_out(Run(recipe, condition, seed), data)


def refusal(recipe=NET, condition=CONTROL):
    with pytest.raises(SettingError) as error:
        steps_of(recipe, condition)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_first_steps_are_those_of_training(tmp_path):
    """Of three batches, the last of 32: their losses are what the history of that epoch averages."""
    condition, sizes = Condition("l1", l1=1e-3), [64, 64, 32]
    steps = steps_of(NET, condition)["steps"]
    row = run_study(NET, condition, 1, tmp_path, jobs=1, show_progress=False).history().iloc[0]
    for name, mean in (("loss", row.train_loss), ("penalty", row.penalty)):
        assert np.average([step[name] for step in steps[:3]], weights=sizes) == pytest.approx(mean)
    assert len(steps) == 4  # the last on as many images as the last batch has


def test_first_steps_leave_the_generators_alone():
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    steps_of(TINY, GBN)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]  # noqa: NPY002


def test_first_steps_survive_json():
    steps = steps_of(replace(NET, optimizer=torch.optim.AdamW, schedule=lambda done: 1 - done))
    assert step_differences(json.loads(json.dumps(steps)), steps) == []


# --- what is known by what it does: an edit of a number is seen wherever it stands ------------------------------------

NUMBERS = {"lam": 1e-4}
LAM = 1e-4


class Constants:
    LAM = 1e-4


class Kind(enum.Enum):
    LAM = 1e-4


@dataclasses.dataclass(frozen=True)
class Spread:
    lam: float

    def __call__(self, model):
        return self.lam * model[0].weight.abs().sum()

    def penalty(self, model):
        return self(model)


def scaled(lam):
    def decorate(function):
        return functools.wraps(function)(lambda model: lam * function(model))

    return decorate


def closure(lam):
    values = [lam]
    return lambda model: values[0] * model[0].weight.abs().sum()


def decorated(lam):
    @scaled(lam)
    def penalty(model):
        return model[0].weight.abs().sum()

    return penalty


def in_a_dict(lam):
    NUMBERS["lam"] = lam
    return lambda model: NUMBERS["lam"] * model[0].weight.abs().sum()


def in_a_generator_expression(lam):
    globals()["LAM"] = lam
    return lambda model: sum(LAM * weights.abs().sum() for weights in model.parameters())


def in_a_class(lam):
    Constants.LAM = lam
    return lambda model: Constants.LAM * model[0].weight.abs().sum()


PLACES = {
    "a default argument": lambda lam: lambda model, lam=lam: lam * model[0].weight.abs().sum(),
    "a keyword default": lambda lam: lambda model, *, lam=lam: lam * model[0].weight.abs().sum(),
    "a generator expression": in_a_generator_expression,
    "a dict": in_a_dict,
    "a class": in_a_class,
    "a bound method": lambda lam: Spread(lam).penalty,
    "a callable object": Spread,
    "a decorator": decorated,
    "a closure's list": closure,
    "a partial": lambda lam: functools.partial(lambda model, lam: lam * model[0].weight.abs().sum(), lam=lam),
    "eval": lambda lam: eval(f"lambda model: {lam} * model[0].weight.abs().sum()"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_number_edited_in_a_penalty_is_seen(place):
    once = steps_of(NET, Condition("mine", penalty=PLACES[place](1e-4)))
    assert step_differences(once, steps_of(NET, Condition("mine", penalty=PLACES[place](1e-4)))) == []
    for edited in (1e-1, 1.05e-4):
        assert "penalty" in step_differences(once, steps_of(NET, Condition("mine", penalty=PLACES[place](edited))))[0]


def with_momentum(momentum):
    return Recipe("net", lambda: Net(lambda channels: nn.BatchNorm2d(channels, momentum=momentum)), train_images=160)


def with_eval_branch(factor):
    class Branch(Net):
        def forward(self, images):
            return super().forward(images) if self.training else factor * super().forward(images)

    return Recipe("net", Branch, train_images=160)


def with_data(last_label):
    def made():
        generator = np.random.default_rng(0)
        images = generator.integers(0, 256, (200, 28, 28), dtype=np.uint8)
        labels = np.arange(200) % 3
        labels[-1] = last_label
        return images, labels, images[:50], labels[:50], ("a", "b", "c")

    return Recipe("net", lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 3)), data=made)


def with_optimizer(decay):
    def groups(parameters, lr):
        return torch.optim.AdamW([{"params": parameters, "weight_decay": decay}], lr=lr)

    return replace(NET, optimizer=groups)


EDITS = {
    "a learning rate by 1%": (lambda value: replace(NET, learning_rate=value, network=lambda: Net()), 0.01, 0.0101),
    "the momentum of BatchNorm": (with_momentum, 0.1, 0.01),
    "a branch for evaluation": (with_eval_branch, 1.0, 1.5),
    "the end of a schedule": (lambda end: replace(NET, schedule=lambda done: end if done > 0.9 else 1.0), 0.1, 0.2),
    "one label of the data": (with_data, 0, 1),
    "the weight decay of an optimizer": (with_optimizer, 0.05, 0.051),
    "a transform": (lambda a: replace(NET, transform=lambda x, y: (x + a * torch.randn_like(x), y)), 0.1, 0.11),
    "a loss": (lambda a: replace(NET, loss=lambda x, y: F.cross_entropy(x, y, label_smoothing=a)), 0.1, 0.11),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_of_any_part_is_seen(edit):
    make, value, edited = EDITS[edit]
    once = steps_of(make(value))
    assert step_differences(once, steps_of(make(value))) == []
    assert step_differences(once, steps_of(make(edited)))


# --- what is found before anything is trained -------------------------------------------------------------------------


class Bare(nn.Module):
    def forward(self, images):
        return images.flatten(1)[:, :10]


@pytest.mark.parametrize(
    ("recipe", "condition", "said"),
    [
        (BOTTLENECK, Condition("drop", changes={"dropout": 0.5}), "since BottleneckNet takes none, not 0.5"),
        (PLAIN, Condition("none", changes={"epochs": 0}), "epochs must be a whole number from 1"),
        (Recipe("bare", Bare), Condition("groups", norm=lambda channels: nn.GroupNorm(2, channels)), "takes `norm`"),
        (Recipe("bare", Bare), ALL_CONDITIONS["gbn"], "needs a network that takes `norm`"),
        (Recipe("bare", Bare), CONTROL, "with parameters to train, not Bare"),
        (Recipe("odd", lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 9))), CONTROL, "not .64, 9. for N = 64"),
        (Recipe("none", lambda: None), CONTROL, "cannot be built: `network` must make a torch.nn.Module"),
        (PLAIN, Condition("many", penalty=lambda model: torch.ones(3)), "`penalty` must return a scalar tensor, not a"),
        (PLAIN, Condition("number", penalty=lambda model: 3.0), "`penalty` must return a scalar tensor, not 3.0"),
        (PLAIN, Condition("cut", penalty=lambda model: model.layers[0].weight.sum().detach()), "has no gradient"),
        (PLAIN, Condition("bad", penalty=lambda model: 1 / 0), r"ZeroDivisionError: .* \(in <lambda>, line \d+\)$"),
        (replace(NET, loss=nn.CrossEntropyLoss), CONTROL, "cannot be trained: step 1 fails: "),
        (replace(NET, optimizer=lambda parameters, lr: None), CONTROL, "must make a torch.optim.Optimizer, not"),
        (replace(NET, optimizer=torch.optim.LBFGS), CONTROL, "LBFGS.step.. missing 1 required positional argument"),
        (replace(NET, transform=lambda images, labels: images), CONTROL, "must return images and targets"),
        (replace(NET, transform=v2.CutMix(num_classes=7)), CONTROL, "cannot be trained"),
        (replace(NET, schedule=lambda done: "a"), CONTROL, "schedule must be a function that gives a finite number"),
        (replace(NET, shift=28), CONTROL, "shift must be less than the 28 pixels"),
        (Recipe("odd", lambda: nn.Sequential(Net(), nn.Softmax(1))), CONTROL, "logits, not probabilities"),
        (Recipe("odd", lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.BatchNorm1d(10)), train_images=65),
         CONTROL, "step 2 fails: ValueError: Expected more than 1 value per channel"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_one_sentence_that_names_the_condition(recipe, condition, said):
    message = refusal(recipe, condition)
    assert message.startswith(f"{condition.label} ({condition.slug})")
    assert re.search(said, message), message


def test_the_last_batch_is_tried_however_late_it_comes():
    """Of 193 images the fourth batch is one, which BatchNorm refuses."""
    network = lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.BatchNorm1d(10))  # noqa: E731
    assert "1 images, as many as the last batch has, fails" in refusal(Recipe("odd", network, train_images=64 * 4 + 1))


def test_a_network_that_is_always_the_same_object_is_refused():
    model = Net()
    assert "`network` must make a new one each time" in refusal(Recipe("shared", lambda: model))
    steps_of(Recipe("copied", lambda: copy.deepcopy(model), train_images=160))
    weights = nn.Parameter(torch.zeros(10))

    class Sharing(Net):
        def __init__(self):
            super().__init__()
            self.scale = weights

        def forward(self, images):
            return super().forward(images) + self.scale

    assert "`network` must make a new one each time" in refusal(Recipe("shared", Sharing))


def test_a_constant_that_networks_share_is_no_harm():
    order = torch.randperm(784)

    class Permuted(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("order", order)
            self.last = nn.Linear(784, 10)

        def forward(self, images):
            return self.last(images.flatten(1)[:, self.order])

    steps_of(Recipe("permuted", Permuted, train_images=160))


def test_two_builds_of_one_seed_must_be_equal():
    class Unseeded(Net):
        def __init__(self):
            super().__init__()
            with torch.no_grad():
                self[0].weight.add_(np.random.default_rng().uniform())

    assert "two networks built with one seed differ" in refusal(Recipe("unseeded", Unseeded))


def test_a_state_that_is_not_saved_is_found():
    class Cooling(Net):
        temperature = 1.0

        def forward(self, images):
            self.temperature *= 0.9 if self.training else 1.0
            return super().forward(images) / self.temperature

    assert "gives other predictions" in refusal(Recipe("cooling", Cooling))


def test_a_state_that_goes_on_from_run_to_run_is_found():
    calls = []

    def warming(model):
        calls.append(1)
        return 1e-3 * len(calls) * model[0].weight.abs().sum()

    message = refusal(NET, Condition("warming", penalty=warming))
    assert "trains differently each time" in message
    assert "keeps a state from run to run" in message


def test_extra_state_of_another_kind_is_found():
    class Holding(Net):
        def get_extra_state(self):
            return {1, object}

        def set_extra_state(self, state):
            pass

    assert "cannot be saved and read back" in refusal(Recipe("holding", Holding))


class NormFirst(nn.Sequential):
    def __init__(self, norm=nn.BatchNorm1d):
        super().__init__(nn.Flatten(), nn.Linear(784, 20), norm(20), nn.ReLU(), nn.Linear(20, 10))


def test_ghosts_of_one_value_are_found():
    many = Condition("many", num_splits=32)
    assert "32 images, as many as the last batch has" in refusal(
        Recipe("norm", NormFirst, train_images=64 * 4 + 32), many
    )


class AuxiliaryLogits(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(784, 10), nn.Linear(784, 10)

    def forward(self, images):
        images = images.flatten(1)
        return (self.one(images), self.two(images)) if self.training else self.one(images)


def test_auxiliary_logits_are_found():
    assert "into logits (N, 10), not tuple" in refusal(Recipe("auxiliary", AuxiliaryLogits))


# --- and through the whole library ------------------------------------------------------------------------------------


def test_a_penalty_edited_in_a_cell_is_refused_and_the_same_accepted(tmp_path):
    def study(lam):
        mine = Condition("mine", penalty=lambda model, lam=lam: lam * model[0].weight.abs().sum())
        return run_study(NET, mine, 1, tmp_path, jobs=1, show_progress=False)

    before = study(1e-4).history()
    assert study(1e-4).history().equals(before)
    with pytest.raises(StudyError, match=r"was trained with different settings: step 1 penalty = .*new name"):
        study(1e-1)


def test_published_numbers_of_the_librarys_own_runs_hold_no_first_steps(tiny_study):
    assert "first_steps" not in json.loads((tiny_study.folder / "plain" / "gbn" / "seed-1" / "run.json").read_text())
    assert isinstance(tiny_study.model("gbn"), PlainNet)


def test_a_gradient_may_jump_where_a_loss_may_not():
    def steps(loss, gradient):
        return {"steps": [{"loss": loss, "penalty": 0.0, "gradient": gradient}]}

    assert step_differences(steps(1.0, 1.0), steps(1.00005, 1.006)) == []
    assert step_differences(steps(1.0, 1.0), steps(1.0002, 1.0)) == ["step 1 loss = 1, not 1.0002"]
    assert step_differences(steps(1.0, 1.0), steps(1.0, 1.05)) == ["step 1 gradient = 1, not 1.05"]
