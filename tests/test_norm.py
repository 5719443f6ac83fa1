import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from s6lib.norm import GhostBatchNorm


def reference_step(norm, images, gradient, splits):
    """Ghost BatchNorm from torch's own BatchNorm, a ghost at a time; changes the buffers of `norm`, a BatchNorm2d."""
    images = images.detach().requires_grad_()
    ghosts = images.tensor_split(min(splits, len(images)))
    output = torch.cat([F.batch_norm(g, None, None, norm.weight, norm.bias, True, 0.0, norm.eps) for g in ghosts])
    norm.zero_grad()
    output.backward(gradient)
    values = [g[:, 0].numel() for g in ghosts]
    mean = sum(n * g.mean((0, 2, 3)) for n, g in zip(values, ghosts, strict=True)) / sum(values)
    variance = sum((n - 1) * g.var((0, 2, 3)) for n, g in zip(values, ghosts, strict=True)) / sum(n - 1 for n in values)
    with torch.no_grad():
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance, norm.momentum)
        norm.num_batches_tracked += 1
    return output.detach(), images.grad


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 20), st.integers(1, 5), st.integers(2, 6), st.integers(1, 24), st.booleans(), st.integers(0, 99))
def test_equals_the_reference_over_steps(samples, channels, size, splits, last, seed):
    torch.manual_seed(seed)
    ghost, norm = GhostBatchNorm(channels, splits), nn.BatchNorm2d(channels)
    nn.init.normal_(ghost.weight)
    nn.init.normal_(ghost.bias)
    norm.load_state_dict(ghost.state_dict())
    for _ in range(3):
        images = 3 + 2 * torch.randn(samples, channels, size, size)
        images = images.to(memory_format=torch.channels_last if last else torch.contiguous_format)
        gradient = torch.randn_like(images)
        expected, expected_gradient = reference_step(norm, images, gradient, splits)
        images.requires_grad_()
        ghost.zero_grad()
        output = ghost(images)
        output.backward(gradient)
        assert torch.allclose(output, expected, atol=1e-5)
        assert torch.allclose(images.grad, expected_gradient, atol=1e-4)
        assert torch.allclose(ghost.weight.grad, norm.weight.grad, atol=1e-3)
        assert torch.allclose(ghost.bias.grad, norm.bias.grad, atol=1e-3)
    for name, buffer in norm.named_buffers():
        assert torch.allclose(dict(ghost.named_buffers())[name], buffer, atol=1e-5)


def test_one_split_is_batchnorm_to_the_bit():
    torch.manual_seed(1)
    ghost, norm = GhostBatchNorm(5, 1), nn.BatchNorm2d(5)
    for _ in range(3):
        images = torch.randn(7, 5, 4, 4)
        assert torch.equal(ghost(images), norm(images))
    assert all(torch.equal(a, b) for a, b in zip(ghost.buffers(), norm.buffers(), strict=True))


@pytest.mark.parametrize("samples", [1, 2, 7, 64])
def test_evaluation_is_batchnorm_to_the_bit(samples):
    torch.manual_seed(1)
    ghost, norm = GhostBatchNorm(5, 4), nn.BatchNorm2d(5)
    ghost(torch.randn(16, 5, 4, 4))
    norm.load_state_dict(ghost.state_dict(), strict=True)
    back = GhostBatchNorm(5, 16)
    back.load_state_dict(norm.state_dict(), strict=True)
    images = torch.randn(samples, 5, 4, 4)
    before = copy.deepcopy(ghost.state_dict())
    assert torch.equal(ghost.eval()(images), norm.eval()(images))
    assert torch.equal(back.eval()(images), norm(images))
    assert all(torch.equal(before[name], value) for name, value in ghost.state_dict().items())


def test_a_sample_influences_its_own_ghost_only():
    torch.manual_seed(1)
    images = torch.randn(16, 3, 5, 5)
    changed = images.clone()
    changed[5] += 1
    difference = (GhostBatchNorm(3, 4)(images) != GhostBatchNorm(3, 4)(changed)).flatten(1).any(1)
    assert difference.nonzero().flatten().tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize("splits", [0, -1, 1.5, True, "4", None])
def test_refuses_a_number_of_splits_that_is_none(splits):
    with pytest.raises(ValueError, match="num_splits must be a whole number from 1"):
        GhostBatchNorm(3, splits)


def test_refuses_a_ghost_of_one_value():
    with pytest.raises(ValueError, match=r"N = 5 with num_splits = 4; use at most N // 2 splits"):
        GhostBatchNorm(3, 4)(torch.randn(5, 3))


@pytest.mark.parametrize("shape", [(8, 4, 5, 5), (8,), (8, 4)])
def test_refuses_another_number_of_channels(shape):
    with pytest.raises(ValueError, match=r"expected input \(N, 3, \*\), got"):
        GhostBatchNorm(3, 2)(torch.randn(shape))


def test_prints_its_splits():
    assert repr(GhostBatchNorm(3, 4)).startswith("GhostBatchNorm(3, num_splits=4, eps=1e-05, momentum=0.1")
