"""What a step of training does where: its operations, on which device they are, and what is copied between the two.

No GPU is needed: of fake tensors torch computes shapes, types and devices alone, and refuses to mix devices. It cannot
go backward on them, so whole steps are counted on the CPU.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import needs_fake_gpu
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from s6lib.__main__ import read_study_file
from s6lib.data import PROJECT, Digits, batches
from s6lib.lab.device import CPU
from s6lib.lab.setup import set_up
from s6lib.recipes import ALL_CONDITIONS, PLAIN, RECIPES, Run, build_model
from s6lib.train import train_epoch

CUDA = torch.device("cuda")
FRONTIER, SIZES = read_study_file(str(PROJECT / "studies" / "frontier.py"))
STUDIES = [(recipe, condition) for recipe in RECIPES.values() for condition in ALL_CONDITIONS.values()]
STUDIES += [(FRONTIER, condition) for condition in SIZES]


class Operations(TorchDispatchMode):
    """Counts operations, views and bare memory aside, and those that copy from one device to another."""

    def __init__(self):
        super().__init__()
        self.launched, self.copied = Counter(), Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        name = operation.name().removeprefix("aten::")
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        view = any(one.alias_info is not None and not one.alias_info.is_write for one in operation._schema.returns)
        if len({tensor.device.type for tensor in tensors}) > 1:
            self.copied[name] += 1
        elif tensors and not view and not name.startswith(("empty", "new_empty")):
            self.launched[name] += 1
        return result


def copies_on_a_gpu(recipe, condition):
    """What is copied from the indices of a batch to its loss, on a GPU that is not there: of two batches.

    The first lies amid the images that are augmented at once, the second begins the next such.
    """
    settings, copied = recipe.changed_by(condition), []
    with FakeTensorMode():
        with CUDA:
            model = build_model(recipe, condition)
            images = torch.zeros(2 * 6400, 28, 28, dtype=torch.uint8)
            digits = Digits(images, torch.zeros(len(images), dtype=torch.int64))
        stream = batches(digits, settings.batch_size, settings.augmentation, torch.Generator())
        for skipped in (1, 6400 // settings.batch_size - 2):
            for _ in range(skipped):
                next(stream)
            with Operations() as operations:
                batch, labels = next(stream)
                loss = F.cross_entropy(model(batch), labels) + condition.penalty_of(model)
            copied.append(operations.copied)
    assert loss.shape == ()
    assert {loss.device, batch.device, labels.device} == {torch.device("cuda:0")}
    return copied


FAST = ("gbn", "l1-l2-bn", "width-14")  # of each recipe; the others differ from them in numbers alone
CASES = [pytest.param(*study, marks=() if study[1].slug in FAST else pytest.mark.slow) for study in STUDIES]


@needs_fake_gpu
@pytest.mark.parametrize(("recipe", "condition"), CASES, ids=lambda one: getattr(one, "slug", None) or one.name)
def test_a_step_copies_nothing_and_a_hundred_their_indices_and_how_their_images_are_moved(recipe, condition):
    moved = 2 if recipe.shift or recipe.scale else 1  # a shift beside the turn
    assert copies_on_a_gpu(recipe, condition) == [{}, {"_to_copy": 1 + moved}]


def operations_of_a_step(recipe, condition, digits):
    recipe = replace(recipe, train_images=len(digits.labels))
    learner = set_up(Run(recipe, condition, 1), (digits, digits), CPU).learner
    learner.model.to(memory_format=torch.contiguous_format)  # as on a GPU
    for layer in learner.model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0  # on a CPU a mask takes operations of its own
    stream = batches(digits, 64, recipe.augmentation, torch.Generator().manual_seed(1))
    train_epoch(learner, [next(stream)])
    with Operations() as operations:
        train_epoch(learner, [next(stream)])
    return operations.launched.total()


def test_penalties_and_ghosts_add_no_more_operations_than_they_did(mnist):
    """On a GPU these networks wait for the launch of operations, so their number is their time.

    Two penalties: one addition for each of 22 parameters, and 17 more for all of them together. A ghost layer: 26 more
    than BatchNorm, of which 6 are the other three norms and their gradients. Its statistics begin in eight tensors:
    under torch.vmap, parts of one tensor would not be updated.
    """
    digits = Digits(mnist[0].images[:128], mnist[0].labels[:128])
    slugs = ("bn", "l1-bn", "l1-l2-bn", "gbn", "l1-l2-gbn")
    counted = {slug: operations_of_a_step(PLAIN, ALL_CONDITIONS[slug], digits) for slug in slugs}
    bare = counted["bn"]
    assert bare <= 110
    assert counted["l1-bn"] - bare <= 30
    assert counted["l1-l2-bn"] - bare == counted["l1-l2-gbn"] - counted["gbn"] <= 39
    assert counted["gbn"] - bare <= 7 * 26
