"""The laws in test_norm.py can fail: each of these mistakes, made in a copy of norm.py, breaks the one named."""

import types

import pytest
import test_norm

from s6lib.data import PROJECT

AVERAGE = "mean, variance = weighted.sum(1)"
DEFINITION = test_norm.test_equals_the_definition_over_steps
MUTATIONS = {
    "ghosts in another order": ("torch.cat(ghosts)", "torch.cat(ghosts[::-1])", DEFINITION),
    "samples dealt out in turn": (
        "input.split(sizes), *statistics",
        "[input[ghost::splits] for ghost in range(splits)], *statistics",
        test_norm.test_a_sample_influences_its_own_ghost_only,
    ),
    "biased running variance": (AVERAGE, f"{AVERAGE}\n        variance *= degrees[0] / counts[0]", DEFINITION),
    "momentum times splits": (
        "step = self.momentum\n",
        "step = self.momentum and min(1, self.momentum * self.num_splits)\n",
        DEFINITION,
    ),
    "output not normalised": ("return torch.cat(ghosts)", "return input + 0", DEFINITION),
    "weight not applied": ("variance, self.weight, self.bias", "variance, None, self.bias", DEFINITION),
    "uneven ghosts weigh the same": ("if counts[0] == counts[-1]:", "if True:", DEFINITION),
    "larger ghosts taken for the last": ("counts.count(counts[0])", "counts.count(counts[-1])", DEFINITION),
    "variance weighted by n": ("[count - 1 for count", "[count for count", DEFINITION),
    "ghosts in evaluation": (
        "not self.training or splits <= 1",
        "splits <= 1",
        test_norm.test_evaluation_is_batchnorm_to_the_bit_and_changes_nothing,
    ),
    "cumulative average ignored": ("self.num_batches_tracked.to(mean.dtype).reciprocal()", "0.1", DEFINITION),
    "buffers rebound": (
        "self.running_mean.lerp_(mean, step)",
        "self.running_mean = self.running_mean.lerp(mean, step)",
        DEFINITION,
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mistake_breaks_its_law(name, monkeypatch):
    right, wrong, law = MUTATIONS[name]
    source = (PROJECT / "s6lib" / "norm.py").read_text()
    assert source.count(right) == 1
    mutant = types.ModuleType("mutant")
    exec(source.replace(right, wrong), mutant.__dict__)
    monkeypatch.setattr(test_norm, "GhostBatchNorm", mutant.GhostBatchNorm)
    with pytest.raises(AssertionError):
        law()
