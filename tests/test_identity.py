from functools import partial

import pytest
from torch import nn

from s6lib.identity import Recorded, described, is_library, name_of, without_docstrings
from s6lib.models import PlainNet
from s6lib.norm import GhostBatchNorm

GROUPS = 2


def normalised(channels):
    """Some words."""
    return nn.GroupNorm(GROUPS, channels)  # a comment


def calls_another(channels):
    return normalised(channels)


class Base(nn.Module):
    width = 3


class Net(Base):
    @staticmethod
    def helper():
        return GROUPS

    def forward(self, images):
        return images


def test_what_a_library_holds_is_known_by_its_name():
    assert described(PlainNet) == "PlainNet"
    assert described(nn.BatchNorm2d) == "torch.nn.modules.batchnorm.BatchNorm2d"
    assert is_library(GhostBatchNorm)
    assert not is_library(Net)


def test_what_is_ones_own_is_known_by_its_source_and_by_what_that_uses():
    entry = described(normalised)
    assert entry["name"] == "normalised"
    assert "nn.GroupNorm(GROUPS, channels)" in entry["source"]
    assert "comment" not in entry["source"]
    assert entry["uses"] == {"GROUPS": 2}
    assert described(calls_another)["uses"]["normalised"] == entry
    net = described(Net)
    assert net["source"].startswith("class Net(Base):")
    assert net["uses"]["GROUPS"] == 2
    assert described(Net)["name"] == name_of(Net) == "Net"


def test_only_docstrings_are_taken_out_of_a_source():
    source = "class A:\n    'W'\n\n    def f(self):\n        'W'\n        return 'all'\n\n    def g(self):\n        'W'"
    bare = "class A:\n\n    def f(self):\n        return 'all'\n\n    def g(self):\n        pass"
    assert without_docstrings(source) == without_docstrings(bare) == bare
    for other in ("lambda x: 'kept'", "no Python at all", "\0"):
        assert without_docstrings(other) == other


def test_what_a_function_closes_over_counts():
    def made(groups):
        return lambda channels: nn.GroupNorm(groups, channels)

    assert described(made(2)) != described(made(4))
    assert described(made(2)) == described(made(2))


def test_arguments_of_a_partial_count():
    two, four = (partial(GhostBatchNorm, num_splits=splits) for splits in (2, 4))
    assert described(two)["arguments"] == {"num_splits": 2}
    assert described(two) != described(four)
    assert described(partial(normalised))["partial"]["uses"] == {"GROUPS": 2}


def test_two_lambdas_are_told_apart():
    one = lambda channels: nn.GroupNorm(1, channels)  # noqa: E731
    two = lambda channels: nn.GroupNorm(2, channels)  # noqa: E731
    assert described(one)["source"] == "lambda channels: nn.GroupNorm(1, channels)"
    assert described(two)["source"] == "lambda channels: nn.GroupNorm(2, channels)"


def test_an_object_that_can_be_called_is_its_class_and_its_values():
    class Penalty:
        def __init__(self, weight):
            self.weight = weight

        def __call__(self, model):
            return self.weight

    assert described(Penalty(1)) == described(Penalty(1)) != described(Penalty(2))


def test_a_recursive_function_is_described():
    assert "recursive" in described(recursive)["source"]


def recursive(depth):
    return recursive(depth - 1) if depth else 0


def test_a_source_that_cannot_be_had_is_said():
    typed = {"__name__": "a_prompt"}
    exec("def typed(channels): return channels", typed)
    with pytest.raises(
        ValueError, match=r"the source of typed cannot be had, so it cannot be recorded: define it in a"
    ):
        described(typed["typed"])


def test_what_is_recorded_stands_for_itself():
    entry = described(normalised)
    assert described(Recorded(entry)) == entry
    assert Recorded(entry).__name__ == "normalised"
    with pytest.raises(ValueError, match=r"normalised is known from run\.json alone"):
        Recorded(entry)(4)
