"""The laws in test_norm.py can fail: each of these mistakes, made in a copy of norm.py, breaks the one named."""

import types

import pytest
import test_norm

from s6lib.data import PROJECT

DEFINITION = test_norm.test_equals_the_definition_over_steps
SIZE = test_norm.test_a_ghost_size_makes_as_few_even_ghosts_as_it_allows
MUTATIONS = {
    "ghosts in another order": ("torch.cat(outputs)", "torch.cat(outputs[::-1])", DEFINITION),
    "samples dealt out in turn": (
        "input.unflatten(0, (ghosts, -1)).transpose(0, 1)",
        "input.unflatten(0, (-1, ghosts))",
        test_norm.test_a_sample_influences_its_own_ghost_only,
    ),
    "ghosts left side by side": ("folded.transpose(0, 1).flatten(0, 1)", "folded.flatten(0, 1)", DEFINITION),
    "biased running variance": (
        "_uneven_average(statistics, samples, values)",
        "(statistics[0].mean(0), statistics[1].mean(0) * (1 - splits / (samples * values)))",
        DEFINITION,
    ),
    "momentum times splits": (
        "variance.lerp_(averages[1], step)",
        "variance.lerp_(averages[1], min(1, step * splits))",
        DEFINITION,
    ),
    "a step per ghost": ("momentum, average = 1 / splits, torch.sum", "momentum, average = 1.0, torch.sum", DEFINITION),
    "output not normalised": ("        return output\n", "        return input + 0\n", DEFINITION),
    "weight not applied": ("variance, weight, bias, True", "variance, None, bias, True", DEFINITION),
    "weights in another order": (
        "tensor.expand(ghosts, -1).flatten()",
        "tensor.repeat_interleave(ghosts)",
        DEFINITION,
    ),
    "uneven ghosts weigh the same": (
        "even, step, momentum, average = samples % splits == 0,",
        "even, step, momentum, average = True,",
        DEFINITION,
    ),
    "larger ghosts taken for the last": ("last[0].lerp(first[0]", "first[0].lerp(last[0]", DEFINITION),
    "variance weighted by n": ("share * values - larger", "share * values", DEFINITION),
    "ghosts in evaluation": (
        "not self.training or splits <= 1",
        "splits <= 1",
        test_norm.test_evaluation_is_batchnorm_to_the_bit_and_changes_nothing,
    ),
    "cumulative average ignored": ("batches.to(mean.dtype).reciprocal()", "0.1", DEFINITION),
    "buffers rebound": (
        "mean.lerp_(averages[0], step)",
        "self.running_mean = mean.lerp(averages[0], step)",
        DEFINITION,
    ),
    "a ghost too few": ("-(-samples // self.ghost_size)", "samples // self.ghost_size", SIZE),
    "a ghost too many": ("-(-samples // self.ghost_size)", "samples // self.ghost_size + 1", SIZE),
}


first, *others = MUTATIONS


@pytest.mark.parametrize("name", [first, *(pytest.param(name, marks=pytest.mark.slow) for name in others)])
def test_a_mistake_breaks_its_law(name, monkeypatch):
    right, wrong, law = MUTATIONS[name]
    source = (PROJECT / "s6lib" / "norm.py").read_text()
    assert source.count(right) == 1
    mutant = types.ModuleType("mutant")
    exec(source.replace(right, wrong), mutant.__dict__)
    monkeypatch.setattr(test_norm, "GhostBatchNorm", mutant.GhostBatchNorm)
    with pytest.raises(AssertionError):
        law()
