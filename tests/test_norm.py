"""The laws of GhostBatchNorm, with BatchNorm as the oracle; test_norm_mutations.py proves that they can fail."""

import copy
import importlib
import inspect
import io
import pickle
import re
import sys
import types
import warnings
from functools import cache, wraps
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet18
from torchvision.models.feature_extraction import create_feature_extractor

from s6lib.data import PROJECT
from s6lib.norm import GhostBatchNorm, GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d

BATCHNORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def randomised(norm):
    """The layer with an affine part and running statistics that are not the neutral ones."""
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        if tensor is not None:
            nn.init.normal_(tensor)
    if norm.running_var is not None:
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return norm


def statistics_dims(images):
    return [0, *range(2, images.dim())]


def reference_step(norm, images, gradient, splits):
    """Ghost BatchNorm by its definition, a ghost at a time, in the buffers and gradients of `norm`, a BatchNorm."""
    images = images.detach().clone().requires_grad_()
    dims = statistics_dims(images)
    ghosts = images.tensor_split(min(splits, len(images)))
    shape = [1, -1] + [1] * (images.dim() - 2)
    weight, bias = (1, 0) if norm.weight is None else (norm.weight.view(shape), norm.bias.view(shape))
    outputs = []
    for ghost in ghosts:
        mean, variance = ghost.mean(dims, keepdim=True), ghost.var(dims, keepdim=True, correction=0)
        outputs.append((ghost - mean) / (variance + norm.eps).sqrt() * weight + bias)
    output = torch.cat(outputs)
    norm.zero_grad()
    output.backward(gradient)
    with torch.no_grad():
        values = [ghost[:, 0].numel() for ghost in ghosts]
        mean = sum(n * g.mean(dims) for n, g in zip(values, ghosts, strict=True)) / sum(values)
        degrees = [n - 1 for n in values]
        variance = sum(n * g.var(dims) for n, g in zip(degrees, ghosts, strict=True)) / sum(degrees)
        norm.num_batches_tracked += 1
        step = 1 / norm.num_batches_tracked.item() if norm.momentum is None else norm.momentum
        norm.running_mean += step * (mean - norm.running_mean)
        norm.running_var += step * (variance - norm.running_var)
    return output.detach(), images.grad


@st.composite
def batches(draw, minimum=1):
    """(N, C, *) of rank 2 to 5 in any memory format, and a number of splits that leaves each ghost two values."""
    rank = draw(st.integers(2, 5))
    splits = draw(st.integers(minimum, 9))
    least = 2 * splits if rank == 2 else 1
    samples = draw(st.integers(max(2, least), max(2, least) + 12))
    shape = (samples, draw(st.integers(1, 5)), *(draw(st.integers(2, 4)) for _ in range(rank - 2)))
    torch.manual_seed(draw(st.integers(0, 10_000)))
    images = draw(st.floats(-3, 3)) + draw(st.floats(0.5, 3)) * torch.randn(shape, dtype=torch.float64)
    layout = draw(st.sampled_from(["contiguous", "channels_last", "transposed", "sliced"]))
    if layout == "channels_last" and rank in FORMATS:
        images = images.to(memory_format=FORMATS[rank])
    elif layout == "transposed":
        images = images.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "sliced":
        images = torch.stack([images, images], -1)[..., 0]
    return images, splits


@settings(max_examples=150)
@given(batches(), st.sampled_from([torch.float64, torch.float32]), st.sampled_from([0.1, 0.37, None]), st.booleans())
def test_equals_the_definition_over_steps(batch, dtype, momentum, affine):
    images, splits = batch
    # The larger eps keeps a ghost of two nearly equal values from magnifying the rounding of float32.
    tolerance, eps = (1e-9, 1e-5) if dtype is torch.float64 else (1e-3, 0.1)
    options = {"eps": eps, "momentum": momentum, "affine": affine}
    ghost = randomised(GhostBatchNorm(images.shape[1], splits, **options, dtype=dtype))
    norm = BATCHNORMS[images.dim()](images.shape[1], **options, dtype=torch.float64)
    norm.load_state_dict(ghost.state_dict())
    identities = [buffer.data_ptr() for buffer in ghost.buffers()]
    for step in range(3):
        ours = (images + step).to(dtype).requires_grad_()
        gradient = torch.randn_like(images)
        expected, expected_gradient = reference_step(norm, images + step, gradient, splits)
        ghost.zero_grad()
        before = ours.detach().clone()
        output = ghost(ours)
        output.backward(gradient.to(dtype))
        close = {"rtol": tolerance, "atol": tolerance, "check_dtype": False, "check_stride": False}
        torch.testing.assert_close(output, expected, **close)
        torch.testing.assert_close(ours.grad, expected_gradient, **close)
        for a, b in zip(ghost.parameters(), norm.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, **close)
        for a, b in zip(ghost.buffers(), norm.buffers(), strict=True):
            torch.testing.assert_close(a, b, **close)
        assert torch.equal(ours, before)
    assert identities == [buffer.data_ptr() for buffer in ghost.buffers()]


@settings(max_examples=50)
@given(batches())
def test_one_split_is_batchnorm_to_the_bit(batch):
    images, _ = batch
    ghost = randomised(GhostBatchNorm(images.shape[1], 1, dtype=torch.float64))
    norm = BATCHNORMS[images.dim()](images.shape[1], dtype=torch.float64)
    norm.load_state_dict(ghost.state_dict())
    assert torch.equal(ghost(images), norm(images))
    assert all(torch.equal(a, b) for a, b in zip(ghost.buffers(), norm.buffers(), strict=True))


@settings(max_examples=50)
@given(batches(minimum=2), st.data())
def test_a_sample_influences_its_own_ghost_only(batch, data):
    images, splits = batch
    sample = data.draw(st.integers(0, len(images) - 1))
    images = images.contiguous()  # other strides may round otherwise
    changed = images.clone()
    changed[sample] = changed[sample] * 2 + torch.rand_like(changed[sample])
    ghost = GhostBatchNorm(images.shape[1], splits, dtype=torch.float64)
    different = (ghost(images) != ghost(changed)).flatten(1).any(1).nonzero().flatten().tolist()
    parts = torch.arange(len(images)).tensor_split(min(splits, len(images)))
    own = next(part.tolist() for part in parts if sample in part)
    assert sample in different
    assert set(different) <= set(own)


@settings(max_examples=60)
@given(batches(), st.booleans())
def test_evaluation_is_batchnorm_to_the_bit_and_changes_nothing(batch, affine):
    images, splits = batch
    ghost = randomised(GhostBatchNorm(images.shape[1], splits, affine=affine, dtype=torch.float64)).eval()
    norm = BATCHNORMS[images.dim()](images.shape[1], affine=affine, dtype=torch.float64).eval()
    norm.load_state_dict(ghost.state_dict())
    before = copy.deepcopy(ghost.state_dict())
    for samples in (images, images[:1], images[:0]):
        assert torch.equal(ghost(samples), norm(samples))
    assert all(torch.equal(before[name], value) for name, value in ghost.state_dict().items())


@settings(max_examples=60)
@given(st.integers(2, 40), st.integers(1, 40))
def test_a_ghost_size_makes_as_few_even_ghosts_as_it_allows(samples, size):
    torch.manual_seed(1)
    images = torch.randn(samples, 2, 3)
    splits = next(splits for splits in range(1, samples + 1) if len(images.tensor_split(splits)[0]) <= size)
    sized, numbered = GhostBatchNorm(2, ghost_size=size), GhostBatchNorm(2, splits)
    assert torch.equal(sized(images), numbered(images))
    assert all(torch.equal(a, b) for a, b in zip(sized.buffers(), numbered.buffers(), strict=True))


def switched(exported, train):
    """What `move_exported_model_to_eval` and its like do to an exported graph, in torch.ao or torchao."""
    for node in exported.graph.nodes:
        if node.target is torch.ops.aten.batch_norm.default:
            node.args = (*node.args[:5], train, *node.args[6:])
    exported.recompile()
    return exported


class Operations(TorchDispatchMode):
    """Collects the names of the operations that torch executes."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


class TestTraining:
    @pytest.mark.parametrize("splits", [2, 4, 8])
    @pytest.mark.parametrize("samples", [32, 64])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_running_statistics_are_the_weighted_ghosts_to_the_bit(self, samples, splits, dtype):
        """The weights as the published runs had them: a tensor, multiplied element by element."""
        torch.manual_seed(1)
        ghost = randomised(GhostBatchNorm(5, splits, dtype=dtype))
        images = 1 + 3 * torch.randn(samples, 5, 4, 4, dtype=dtype)
        statistics = torch.zeros(2, splits, 5, dtype=dtype)
        for part, mean, variance in zip(images.tensor_split(splits), *statistics, strict=True):
            F.batch_norm(part, mean, variance, training=True, momentum=1.0)
        mean, variance = (statistics * torch.full((2, splits, 1), 1 / splits, dtype=dtype)).sum(1)
        expected = ghost.running_mean.lerp(mean, 0.1), ghost.running_var.lerp(variance, 0.1)
        ghost(images)
        assert torch.equal(ghost.running_mean, expected[0])
        assert torch.equal(ghost.running_var, expected[1])

    @pytest.mark.parametrize("samples", [15, 17])
    def test_large_maps_are_the_definition_too(self, samples):
        """They are normalised a ghost at a time, where small ones are folded into channels."""
        torch.manual_seed(1)
        images = torch.randn(samples, 2, 64, 64, dtype=torch.float64)
        ghost, norm = GhostBatchNorm(2, 5, dtype=torch.float64), nn.BatchNorm2d(2, dtype=torch.float64)
        with Operations() as operations:
            output = ghost(images)
        assert operations.names.count("native_batch_norm") == 5
        torch.testing.assert_close(output, reference_step(norm, images, torch.ones_like(images), 5)[0])
        for a, b in zip(ghost.buffers(), norm.buffers(), strict=True):
            torch.testing.assert_close(a, b)

    @pytest.mark.parametrize(("samples", "splits", "calls"), [(64, 4, 4), (62, 4, 4), (64, 16, 1), (62, 16, 2)])
    def test_no_number_is_copied_to_the_device(self, samples, splits, calls):
        """A copy from the host would make a GPU wait, and keep the layer out of a CUDA graph."""
        for track, momentum, dtype in product((True, False), (0.1, None), (torch.float32, torch.float16)):
            case = f"{track=}, {momentum=}, {dtype=}"
            ghost = GhostBatchNorm(3, splits, momentum=momentum, track_running_stats=track, dtype=dtype)
            images = torch.randn(samples, 3, 4, 4, dtype=dtype)
            with Operations() as operations:
                ghost(images)
            assert operations.names.count("native_batch_norm") == calls, case
            assert not {"lift_fresh", "_local_scalar_dense"} & set(operations.names), case
            if momentum is not None and dtype is torch.float32 and splits == 4:
                assert not {"_to_copy", "copy_"} & set(operations.names), case

    def test_takes_the_dtypes_that_batchnorm_takes(self):
        dtypes, taken = (torch.float64, torch.float32, torch.float16, torch.bfloat16), 0
        for dtype, layer_dtype, affine, track in product(dtypes, dtypes, (True, False), (True, False)):
            images = torch.randn(8, 3, 4, 4).to(dtype)
            options = {"affine": affine, "track_running_stats": track, "dtype": layer_dtype}
            try:
                expected = torch.cat([nn.BatchNorm2d(3, **options)(part) for part in images.chunk(4)])
            except RuntimeError:
                continue
            assert torch.equal(GhostBatchNorm(3, 4, **options)(images), expected), f"{dtype=}, {options}"
            taken += 1
        assert taken >= 16  # the equal dtypes at least

    @pytest.mark.parametrize("splits", [2, 4, 8, 16])
    def test_running_mean_does_not_depend_on_the_splits(self, splits):
        torch.manual_seed(1)
        images = torch.randn(16, 3, 5, 5, dtype=torch.float64)
        ghost, norm = GhostBatchNorm(3, splits, dtype=torch.float64), nn.BatchNorm2d(3, dtype=torch.float64)
        ghost(images), norm(images)
        torch.testing.assert_close(ghost.running_mean, norm.running_mean, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("splits", [1, 2, 4, 16])
    def test_the_momentum_of_a_forward_is_momentum(self, splits):
        ghost = GhostBatchNorm(1, splits, momentum=0.1)
        ghost(torch.arange(64.0).remainder(2).view(64, 1, 1, 1) * 2 + 9)  # every ghost: 9 and 11 in turn
        assert ghost.running_mean.item() == pytest.approx(0.1 * 10)
        size = 64 // splits
        assert ghost.running_var.item() == pytest.approx(0.9 + 0.1 * size / (size - 1))

    def test_uneven_batches_drop_nothing(self):
        ghost = GhostBatchNorm(3, 4)
        output = ghost(torch.randn(11, 3, 4, 4))
        assert output.shape == (11, 3, 4, 4)
        sizes = [3, 3, 3, 2]
        for part in output.split(sizes):
            torch.testing.assert_close(part.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
            torch.testing.assert_close(part.var((0, 2, 3), correction=0), torch.ones(3), atol=1e-3, rtol=0)

    def test_fewer_samples_than_splits_make_as_many_ghosts(self):
        images = torch.randn(3, 2, 4, 4)
        assert torch.equal(GhostBatchNorm(2, 8)(images), GhostBatchNorm(2, 3)(images))

    @pytest.mark.parametrize("affine", [True, False])
    def test_without_running_statistics(self, affine):
        images = torch.randn(8, 3, 4, 4)
        ghost = GhostBatchNorm(3, 4, affine=affine, track_running_stats=False)
        assert not list(ghost.buffers())
        assert torch.equal(ghost(images), GhostBatchNorm(3, 4)(images))
        norm = nn.BatchNorm2d(3, track_running_stats=False)
        assert torch.equal(ghost.eval()(images), norm.eval()(images))  # the whole batch's, as BatchNorm

    def test_frozen_affine(self):
        ghost = GhostBatchNorm(3, 4).requires_grad_(False)
        images = torch.randn(8, 3, 4, 4, requires_grad=True)
        ghost(images).square().sum().backward()
        assert images.grad.isfinite().all()
        assert ghost.weight.grad is None

    def test_a_frozen_layer_in_a_training_model_uses_its_running_statistics(self):
        model = nn.Sequential(randomised(GhostBatchNorm(3, 4)), nn.Flatten()).train()
        model[0].eval()
        before = copy.deepcopy(model[0].state_dict())
        images = torch.randn(8, 3, 4, 4)
        norm = nn.BatchNorm2d(3)
        norm.load_state_dict(before)
        assert torch.equal(model(images), norm.eval()(images).flatten(1))
        assert all(torch.equal(before[name], value) for name, value in model[0].state_dict().items())

    @pytest.mark.parametrize("shape", [(8, 3, 4, 4), (8, 3, 2, 4, 4)])
    def test_channels_last_is_kept(self, shape):
        layout = FORMATS[len(shape)]
        images = torch.randn(shape).to(memory_format=layout).requires_grad_()
        output = GhostBatchNorm(3, 4)(images)
        assert output.is_contiguous(memory_format=layout)
        output.sum().backward()
        assert images.grad.is_contiguous(memory_format=layout)

    def test_expanded_input(self):
        images = torch.randn(8, 1, 4, 4).expand(8, 3, 4, 4)
        torch.testing.assert_close(GhostBatchNorm(3, 4)(images), GhostBatchNorm(3, 4)(images.contiguous()))

    @pytest.mark.parametrize("constant", [0.0, 1e4, -1e-30])
    def test_constant_channels_stay_finite(self, constant):
        images = torch.full((8, 3, 4, 4), constant, requires_grad=True)
        ghost = GhostBatchNorm(3, 4)
        output = ghost(images)
        output.sum().backward()
        assert output.isfinite().all()
        assert images.grad.isfinite().all()
        assert all(buffer.isfinite().all() for buffer in ghost.buffers())

    def test_a_large_mean_keeps_its_deviation(self):
        torch.manual_seed(1)
        output = GhostBatchNorm(3, 4)(1e4 + torch.randn(64, 3, 8, 8))
        assert 0.95 < output.std().item() < 1.05

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_input_with_float32_buffers(self, dtype):
        torch.manual_seed(1)
        images = torch.randn(16, 3, 5, 5)
        ghost, exact = GhostBatchNorm(3, 4), GhostBatchNorm(3, 4)
        output = ghost(images.to(dtype))
        assert output.dtype == dtype
        torch.testing.assert_close(output.float(), exact(images), atol=0.05, rtol=0.05)
        assert ghost.running_var.dtype == torch.float32
        torch.testing.assert_close(ghost.running_var, exact.running_var, atol=0.01, rtol=0.01)

    @pytest.mark.parametrize("splits", [2, 16])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_a_variance_beyond_half_precision_is_as_batchnorms(self, dtype, splits):
        torch.manual_seed(1)
        images = (300 * torch.randn(64, 3, 8, 8)).to(dtype)  # a variance of 90,000, where float16 ends at 65,504
        ghost, norm = GhostBatchNorm(3, splits, dtype=dtype), nn.BatchNorm2d(3, dtype=dtype)
        ghost(images), norm(images)
        torch.testing.assert_close(ghost.running_var, norm.running_var, rtol=0.03, atol=0)
        torch.testing.assert_close(ghost.eval()(images), norm.eval()(images), rtol=0.03, atol=0.01)

    @pytest.mark.parametrize("splits", [2, 16])
    @pytest.mark.parametrize("momentum", [0.1, None])
    @pytest.mark.parametrize("removed", [("running_mean", "running_var"), ("num_batches_tracked",)])
    def test_buffers_that_were_set_to_none(self, removed, momentum, splits):
        images = torch.randn(32, 3, 4, 4)
        layers = [GhostBatchNorm(3, splits, momentum=momentum), nn.BatchNorm2d(3, momentum=momentum)]
        for layer in layers:
            for name in removed:
                setattr(layer, name, None)
        ghost, norm = layers
        assert torch.equal(ghost(images), GhostBatchNorm(3, splits)(images))
        norm(images)
        assert [name for name, _ in ghost.named_buffers()] == [name for name, _ in norm.named_buffers()]
        for a, b in zip(ghost.buffers(), norm.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=0.05, atol=1e-3)
        assert torch.equal(ghost.eval()(images), copy.deepcopy(ghost)(images))

    @pytest.mark.skipif("bias" not in inspect.signature(nn.BatchNorm2d).parameters, reason="torch before 2.13")
    def test_without_bias(self):
        images = torch.randn(8, 3, 4, 4)
        ghost = GhostBatchNorm(3, 4, bias=False)
        assert ghost.bias is None
        assert GhostBatchNorm.convert(nn.BatchNorm2d(3, bias=False), 4).bias is None
        for splits in (4, 8):
            ghost.num_splits = splits
            assert torch.equal(ghost(images), GhostBatchNorm(3, splits)(images))

    @pytest.mark.parametrize("splits", [4, 8])
    def test_an_ensemble_trains_under_vmap(self, splits):
        torch.manual_seed(1)
        layers = [randomised(GhostBatchNorm(3, splits)) for _ in range(2)]
        parameters, buffers = torch.func.stack_module_state(layers)
        images = torch.randn(2, 16, 3, 4, 4)

        def call(parameters, buffers, images):
            return torch.func.functional_call(layers[0], (parameters, buffers), images)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # vmap's own: it has no fast rule for lerp_
            stacked = torch.vmap(call)(parameters, buffers, images)
        for member, layer in enumerate(copy.deepcopy(layers)):
            torch.testing.assert_close(stacked[member], layer(images[member]))
            for name, buffer in layer.named_buffers():
                torch.testing.assert_close(buffers[name][member], buffer)

    def test_autocast(self):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(1, 3, 3), GhostBatchNorm(3, 4))
        with torch.autocast("cpu", torch.bfloat16):
            output = model(torch.randn(8, 1, 6, 6))
        output.float().sum().backward()
        assert output.dtype == torch.bfloat16
        assert all(b.dtype in (torch.float32, torch.int64) and b.isfinite().all() for b in model.buffers())

    def test_memory_saved_for_backward_is_flat_in_the_splits(self):
        def saved(splits):
            sizes = {}
            images = torch.randn(64, 8, 10, 10, requires_grad=True)

            def pack(tensor):
                storage = tensor.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                GhostBatchNorm(8, splits)(images)
            return sum(sizes.values())

        assert saved(16) < 1.02 * saved(1)

    def test_gradient_checkpointing_is_as_batchnorms(self):
        torch.manual_seed(1)
        images = torch.randn(8, 3, 4, 4, requires_grad=True)
        plain, checkpointed = GhostBatchNorm(3, 4), GhostBatchNorm(3, 4)
        norm = nn.BatchNorm2d(3)
        plain(images).square().sum().backward()
        expected, images.grad = images.grad, None
        for layer in (norm, checkpointed):
            images.grad = None
            # More than the layer itself: checkpoint stops to recompute once it has what backward needs.
            checkpoint(lambda x, layer=layer: layer(x).square(), images, use_reentrant=False).sum().backward()
        assert torch.equal(images.grad, expected)
        assert checkpointed.num_batches_tracked == norm.num_batches_tracked == 2  # the forward ran twice


class TestEvaluation:
    @pytest.mark.parametrize("splits", [1, 4, 16])
    def test_state_dicts_move_both_ways_in_mid_training(self, splits):
        torch.manual_seed(1)
        ghost, norm, other = GhostBatchNorm(3, splits), nn.BatchNorm2d(3), GhostBatchNorm(3, 7)
        for _ in range(3):
            ghost(torch.randn(16, 3, 4, 4))
        norm.load_state_dict(ghost.state_dict(), strict=True)
        norm(torch.randn(16, 3, 4, 4))
        other.load_state_dict(norm.state_dict(), strict=True)
        images = torch.randn(5, 3, 4, 4)
        assert torch.equal(other.eval()(images), norm.eval()(images))
        assert other.num_batches_tracked == 4

    def test_functional_call_and_vmap(self):
        torch.manual_seed(1)
        layers = [randomised(GhostBatchNorm(3, 4)).eval() for _ in range(2)]
        parameters, buffers = torch.func.stack_module_state(layers)
        images = torch.randn(6, 3, 4, 4)

        def call(parameters, buffers):
            return torch.func.functional_call(layers[0], (parameters, buffers), images)

        stacked = torch.vmap(call)(parameters, buffers)
        for layer, output in zip(layers, stacked, strict=True):
            torch.testing.assert_close(output, layer(images))

    def test_export_and_torchscript(self):
        ghost = randomised(GhostBatchNorm(3, 4)).eval()
        images = torch.randn(6, 3, 4, 4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, on its way from TorchScript to export
            exported = torch.export.export(ghost, (images,)).module()
            traced = torch.jit.trace(ghost, images)
        for other in (exported, traced):
            torch.testing.assert_close(other(images), ghost(images))

    @pytest.mark.parametrize("track", [True, False])
    @pytest.mark.parametrize(
        "make", [GhostBatchNorm, lambda *args, **kw: GhostBatchNorm.convert(nn.BatchNorm2d(3, **kw), 4)]
    )
    def test_torchscript_evaluates_and_names_revert_where_it_cannot(self, make, track):
        ghost = make(3, 4, track_running_stats=track)
        images, file = torch.randn(6, 3, 4, 4), io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scripted = torch.jit.script(nn.Sequential(ghost))
            torch.jit.save(scripted, file)
            file.seek(0)
            scripted = torch.jit.load(file)
        with pytest.raises(torch.jit.Error, match=r"evaluation only: call eval\(\) .* GhostBatchNorm.revert"):
            scripted(images)
        assert torch.equal(scripted.eval()(images), ghost.eval()(images))

    @pytest.mark.parametrize("cut", [{"num_splits": 2}, {"num_splits": 3}, {"num_splits": 8}, {"ghost_size": 3}])
    def test_a_graph_exported_in_training_can_be_switched_to_evaluation_and_back(self, cut):
        """The flow of quantization in PyTorch 2, where a graph is exported once for both."""
        torch.manual_seed(1)
        ghost = randomised(GhostBatchNorm(3, **cut))
        images = 3 + 2 * torch.randn(8, 3, 8, 8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            export = torch.export.export_for_training if torch.__version__ < "2.6" else torch.export.export
            exported = export(copy.deepcopy(ghost), (images,)).module()
        for train in (True, False, True):
            torch.testing.assert_close(switched(exported, train)(images), ghost.train(train)(images))
            for name in ("running_mean", "running_var"):
                torch.testing.assert_close(exported.get_buffer(name), ghost.get_buffer(name))


class TestCompiled:
    @pytest.mark.slow
    @pytest.mark.parametrize("train", [True, False])
    def test_full_graph_at_two_batch_sizes(self, train):
        torch._dynamo.reset()
        eager = randomised(GhostBatchNorm(3, 4)).train(train)
        copied = copy.deepcopy(eager)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled = torch.compile(copied, fullgraph=True)
            for samples in (8, 10):
                images = torch.randn(samples, 3, 4, 4)
                torch.testing.assert_close(compiled(images), eager(images), rtol=1e-4, atol=1e-5)
        for a, b in zip(copied.buffers(), eager.buffers(), strict=True):
            torch.testing.assert_close(a, b)

    @pytest.mark.parametrize(
        "cut",
        [
            {"num_splits": 4},
            *(pytest.param(cut, marks=pytest.mark.slow) for cut in ({"num_splits": 16}, {"ghost_size": 4})),
        ],
    )
    def test_few_graphs_for_many_batch_sizes(self, cut):
        """As many as docs/ghost_batch_norm.md says: with one per remainder, torch would refuse the ninth."""
        from torch._dynamo.testing import CompileCounter  # slow to import, so not in every worker

        torch._dynamo.reset()
        counter = CompileCounter()
        ghost = GhostBatchNorm(3, **cut)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled = torch.compile(copy.deepcopy(ghost), backend=counter, fullgraph=True)
            for samples in range(32, 50):
                images = torch.randn(samples, 3, 4, 4)
                torch.testing.assert_close(compiled(images), ghost(images))
        assert counter.frame_count <= 5


class TestTraced:
    """By torch.fx, which torchvision's feature extractors are made with."""

    def test_features_are_those_of_hooks(self):
        torch.manual_seed(1)
        model, name = GhostBatchNorm.convert(resnet18(), 4).eval(), "layer2.0.downsample.1"
        extractor, hooked, images = create_feature_extractor(model, [name]), [], torch.randn(6, 3, 32, 32)
        model.get_submodule(name).register_forward_hook(lambda layer, args, output: hooked.append(output))
        model(images)
        assert torch.equal(extractor(images)[name], hooked[0])

    def test_trains_at_any_batch_size_and_follows_the_mode(self):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(1, 3, 3), randomised(GhostBatchNorm(3, 4)), nn.ReLU())
        traced = fx.symbolic_trace(copy.deepcopy(model).eval())
        for other in (traced, copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
            ours = copy.deepcopy(model)
            for train, samples in ((True, 8), (True, 11), (False, 3), (True, 1)):
                images = torch.randn(samples, 1, 6, 6)
                assert torch.equal(other.train(train)(images), ours.train(train)(images))
            assert all(torch.equal(a, b) for a, b in zip(other.buffers(), ours.buffers(), strict=True))
            assert other.state_dict().keys() == ours.state_dict().keys()


class TestRefusals:
    @pytest.mark.parametrize("splits", [0, -1, 1.5, True, "4", None])
    def test_a_number_of_splits_that_is_none(self, splits):
        for make in (lambda: GhostBatchNorm(3, splits), lambda: GhostBatchNorm.convert(nn.BatchNorm2d(3), splits)):
            with pytest.raises(ValueError, match="num_splits must be a whole number from 1, not"):
                make()

    @pytest.mark.parametrize("size", [0, -1, 1.5, True, "4"])
    def test_a_ghost_size_that_is_none(self, size):
        for make in (GhostBatchNorm, lambda _, **cut: GhostBatchNorm.convert(nn.BatchNorm2d(3), **cut)):
            with pytest.raises(ValueError, match="ghost_size must be a whole number from 1, not"):
                make(3, ghost_size=size)
            with pytest.raises(ValueError, match="give num_splits or ghost_size, not both: 4 and "):
                make(3, num_splits=4, ghost_size=size)
            with pytest.raises(ValueError, match="whole number from 1, not None; or give a ghost_size"):
                make(3)

    @pytest.mark.parametrize(("samples", "size"), [(5, 1), (5, 2), (3, 2)])
    def test_a_ghost_size_that_leaves_one_value(self, samples, size):
        images = torch.randn(samples, 3)
        with pytest.raises(ValueError, match=rf"N = {samples} with ghost_size = {size}; use a ghost_size of 3 or more"):
            GhostBatchNorm(3, ghost_size=size)(images)
        assert GhostBatchNorm(3, ghost_size=3)(images).isfinite().all()

    @pytest.mark.parametrize("kind", [GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d])
    @pytest.mark.parametrize("rank", [2, 3, 4, 5])
    @pytest.mark.parametrize("train", [True, False])
    def test_classes_by_rank_take_the_ranks_of_their_batchnorm(self, kind, rank, train):
        ghost, images = kind(3, 4).train(train), torch.randn(8, 3, 4, 4, 4)[(...,) + (0,) * (5 - rank)]
        if isinstance(ghost, BATCHNORMS[rank]):
            assert torch.equal(ghost(images), GhostBatchNorm(3, 4).train(train)(images))
        else:
            with pytest.raises(ValueError, match=rf"expected .* input \(got {rank}D input\)"):
                ghost(images)

    @pytest.mark.parametrize(("samples", "splits"), [(5, 4), (2, 2), (3, 8)])
    @pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 1, 1)])
    def test_a_ghost_of_one_value(self, samples, splits, shape):
        ghost = GhostBatchNorm(3, splits)
        with pytest.raises(ValueError, match=rf"N = {samples} with num_splits = {splits}; use at most {samples // 2} "):
            ghost(torch.randn(samples, *shape))
        assert ghost.num_batches_tracked == 0

    def test_a_batch_of_one_value_as_batchnorm(self):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            GhostBatchNorm(3, 4)(torch.randn(1, 3))

    @pytest.mark.parametrize("train", [True, False])
    @pytest.mark.parametrize("shape", [(8, 4, 5, 5), (8,), (), (8, 4), (0, 4)])
    def test_another_rank_or_number_of_channels(self, shape, train):
        with pytest.raises(ValueError, match=r"expected input \(N, 3, \*\), got \("):
            GhostBatchNorm(3, 2).train(train)(torch.randn(shape))

    def test_an_empty_batch_is_batchnorms_affair(self):
        ghost, norm = GhostBatchNorm(3, 4), nn.BatchNorm2d(3)
        assert ghost(torch.randn(0, 3, 4, 4)).shape == norm(torch.randn(0, 3, 4, 4)).shape
        assert all(torch.equal(a, b) for a, b in zip(ghost.buffers(), norm.buffers(), strict=True))


class TestModule:
    def test_swa_utils_update_bn(self):
        torch.manual_seed(1)
        model = nn.Sequential(GhostBatchNorm(3, 4))
        data = [3 + torch.randn(16, 3, 4, 4) for _ in range(5)]
        torch.optim.swa_utils.update_bn(data, model)
        mean = torch.stack([images.mean((0, 2, 3)) for images in data]).mean(0)
        torch.testing.assert_close(model[0].running_mean, mean)
        assert model[0].momentum == 0.1

    def test_prints_its_cut(self):
        assert repr(GhostBatchNorm(3, 4)).startswith("GhostBatchNorm(3, num_splits=4, eps=1e-05, momentum=0.1")
        assert repr(GhostBatchNorm1d(3, ghost_size=16)).startswith("GhostBatchNorm1d(3, ghost_size=16, eps=1e-05")


class TestConversion:
    def test_resnet18_and_its_optimizer_go_on(self):
        torch.manual_seed(1)
        model = resnet18().train()
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        parameters, state = list(model.parameters()), copy.deepcopy(model.state_dict())
        assert GhostBatchNorm.convert(model, 4) is model
        ghosts = [layer for layer in model.modules() if isinstance(layer, GhostBatchNorm)]
        assert len(ghosts) == 20
        assert all(ghost.num_splits == 4 and ghost.training for ghost in ghosts)
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
        model(torch.randn(8, 3, 32, 32)).sum().backward()
        optimizer.step()
        assert not torch.equal(model.bn1.weight, state["bn1.weight"])
        GhostBatchNorm.revert(model)
        assert not any(isinstance(layer, GhostBatchNorm) for layer in model.modules())
        assert sum(type(layer) is nn.BatchNorm2d for layer in model.modules()) == 20
        assert model.bn1.num_batches_tracked == 1

    @pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
    def test_a_root_keeps_its_settings_and_its_class_comes_back(self, kind):
        norm = kind(3, eps=1e-3, momentum=None, dtype=torch.float64).eval()
        attributes = dict(norm.__dict__)
        ghost = GhostBatchNorm.convert(norm, 4)
        assert isinstance(ghost, GhostBatchNorm)
        assert (ghost.eps, ghost.momentum, ghost.training, ghost.weight.dtype) == (1e-3, None, False, torch.float64)
        reverted = GhostBatchNorm.revert(ghost)
        assert type(reverted) is kind
        assert dict(reverted.__dict__) == attributes

    def test_what_looks_for_a_batchnorm_of_its_rank_finds_it(self):
        """As loops over a model's layers do that freeze, initialise, or leave them without weight decay."""
        model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm2d(3), nn.BatchNorm3d(3))
        GhostBatchNorm.convert(model, 4)
        for layer, kind in zip(model, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), strict=True):
            assert isinstance(layer, kind)
            assert isinstance(layer, GhostBatchNorm)
        frozen = [
            layer for layer in GhostBatchNorm.convert(resnet18(), 4).modules() if isinstance(layer, nn.BatchNorm2d)
        ]
        assert len(frozen) == 20

    def test_a_ghost_size_instead_of_a_number(self):
        model = GhostBatchNorm.convert(nn.Sequential(nn.BatchNorm1d(3), GhostBatchNorm(3, 4)), ghost_size=5)
        assert [(layer.num_splits, layer.ghost_size) for layer in model] == [(None, 5)] * 2
        images = torch.randn(9, 3)
        expected = torch.cat([nn.BatchNorm1d(3)(part) for part in images.split([5, 4])])
        torch.testing.assert_close(model[0](images), expected)
        GhostBatchNorm.convert(model, 3)
        assert [(layer.num_splits, layer.ghost_size) for layer in model] == [(3, None)] * 2

    def test_parametrized_layers_stay_parametrized_both_ways(self):
        norm, images = randomised(nn.BatchNorm2d(3)), torch.randn(8, 3, 4, 4)
        parametrize.register_parametrization(norm, "weight", nn.Softplus())
        expected = copy.deepcopy(norm)(images)
        ghost = GhostBatchNorm.convert(copy.deepcopy(norm), 4)
        assert isinstance(ghost, GhostBatchNorm2d)
        assert parametrize.is_parametrized(ghost, "weight")
        assert torch.equal(copy.deepcopy(ghost).eval()(images), copy.deepcopy(norm).eval()(images))
        made = GhostBatchNorm(3, 4)
        made.load_state_dict({"weight": norm.weight, "bias": norm.bias, **dict(norm.named_buffers())})
        assert torch.equal(copy.deepcopy(ghost)(images), made(images))
        reverted = GhostBatchNorm.revert(ghost)
        assert not isinstance(reverted, GhostBatchNorm)
        assert torch.equal(reverted(images), expected)
        assert type(parametrize.remove_parametrizations(reverted, "weight")) is nn.BatchNorm2d

    @pytest.mark.parametrize("kind", [GhostBatchNorm, GhostBatchNorm1d, GhostBatchNorm2d])
    def test_a_parametrized_layer_that_was_made(self, kind):
        ghost = kind(3, 4)
        expected = kind.__mro__[2] if kind is not GhostBatchNorm else nn.BatchNorm2d
        parametrize.register_parametrization(ghost, "bias", nn.Tanh())
        assert type(parametrize.remove_parametrizations(GhostBatchNorm.revert(ghost), "bias")) is expected

    def test_classes_that_fsdp_makes_keep_their_base_first(self):
        """Without FSDP itself, which needs a process group: its classes are made like this."""
        mixin = type("FSDPModule", (), {"__module__": "torch.distributed.fsdp", "shards": lambda self: "shards"})
        fsdp = type("FSDPBatchNorm2d", (mixin, nn.BatchNorm2d), {"__module__": "torch.distributed.fsdp"})
        layer, images = nn.BatchNorm2d(3), torch.randn(8, 3, 4, 4)
        layer.__class__ = fsdp
        GhostBatchNorm.convert(layer, 4)
        assert type(layer).__bases__ == (mixin, GhostBatchNorm2d)
        assert torch.equal(layer(images), GhostBatchNorm(3, 4)(images))
        GhostBatchNorm.revert(layer)
        assert (type(layer).__name__, type(layer).__bases__) == ("FSDPBatchNorm2d", (mixin, nn.BatchNorm2d))
        assert layer.shards() == "shards"

    def test_shared_layers_stay_shared_and_others_are_left_alone(self):
        class OwnNorm(nn.BatchNorm2d):
            def forward(self, input):
                return input

        class SameNorm(nn.BatchNorm2d):
            pass

        shared = nn.BatchNorm2d(3)
        others = [nn.InstanceNorm2d(3, affine=True), nn.GroupNorm(1, 3)]
        others += [nn.SyncBatchNorm(3), OwnNorm(3), nn.Sequential(SameNorm(3)), nn.LazyBatchNorm2d()]
        model = nn.Sequential(shared, nn.Sequential(shared, nn.ReLU()), *others)
        kinds = [type(layer) for layer in others]
        with pytest.warns(UserWarning, match="left without ghost batches") as warned:
            GhostBatchNorm.convert(model, 2)
        names = "4 (SyncBatchNorm), 5 (OwnNorm), 6.0 (SameNorm), 7 (LazyBatchNorm2d);"
        assert names in str(warned.pop().message)
        assert not warned.list
        assert model[0] is model[1][0]
        assert isinstance(model[0], GhostBatchNorm)
        assert [type(layer) for layer in others] == kinds

    def test_a_warning_where_nothing_is_converted(self):
        with pytest.warns(UserWarning, match="nothing to convert: Sequential holds no nn.BatchNorm1d, 2d or 3d; pass"):
            GhostBatchNorm.convert(nn.Sequential(nn.Linear(2, 2)), 4)
        with pytest.warns(UserWarning, match=r"left without ghost batches: the module itself \(LazyBatchNorm2d\); "):
            GhostBatchNorm.convert(nn.LazyBatchNorm2d(), 4)

    def test_convert_sync_batchnorm_takes_the_ghosts_away(self):
        """As the docstring warns: torch asks a layer for nothing but what every BatchNorm has."""
        model = nn.Sequential(randomised(GhostBatchNorm(3, 4)))
        state = copy.deepcopy(model.state_dict())
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        assert type(converted[0]) is nn.SyncBatchNorm
        assert all(torch.equal(state[name], value) for name, value in converted.state_dict().items())

    def test_twice_is_once_and_the_splits_can_change(self):
        model = nn.Sequential(nn.BatchNorm2d(3), GhostBatchNorm(3, 2))
        GhostBatchNorm.convert(GhostBatchNorm.convert(model, 4), 4)
        assert [layer.num_splits for layer in model] == [4, 4]
        assert [layer.num_splits for layer in GhostBatchNorm.convert(model, 8)] == [8, 8]
        GhostBatchNorm.revert(GhostBatchNorm.revert(model))
        assert [type(layer) for layer in model] == [nn.BatchNorm2d] * 2

    def test_a_converted_layer_computes_what_a_made_one_does(self):
        torch.manual_seed(1)
        norm = randomised(nn.BatchNorm1d(3))
        made = GhostBatchNorm(3, 4)
        made.load_state_dict(norm.state_dict())
        images = torch.randn(8, 3)
        assert torch.equal(GhostBatchNorm.convert(norm, 4)(images), made(images))
        again = pickle.loads(pickle.dumps(norm))
        assert type(GhostBatchNorm.revert(again)) is nn.BatchNorm1d

    def test_agrees_with_functional_batch_norm_ghost_by_ghost(self):
        images = torch.randn(64, 10, 14, 14).to(memory_format=torch.channels_last)
        expected = torch.cat([F.batch_norm(ghost, None, None, training=True) for ghost in images.chunk(4)])
        assert torch.equal(GhostBatchNorm(10, 4)(images), expected)


@cache
def torchs_inputs():
    """Name the inputs that torch keeps for its own tests of BatchNorm1d, 2d and 3d, in training and evaluation."""
    pytest.importorskip("expecttest", reason="torch's test inputs need expecttest")
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setattr(torch.backends, "disable_global_flags", lambda: None)  # other tests of this process set flags
        common_modules = importlib.import_module("torch.testing._internal.common_modules")
    cases = []
    for info in common_modules.module_db:
        if info.module_cls in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            for train in (True, False):
                for case in info.module_inputs_func(info, "cpu", torch.float64, True, train):
                    name = f"{info.module_cls.__name__}-{case.desc or 'default'}-{'train' if train else 'eval'}"
                    cases.append((name, (info.module_cls, case, train)))
    assert len(cases) > 30
    return cases


def for_each_of_torchs_inputs(law):
    """A test of a law for each input: here rather than with parametrize, so that only one worker imports them."""

    @wraps(law)
    def test(self):
        for name, case in torchs_inputs():
            try:
                law(self, *case)
            except Exception as error:
                raise AssertionError(name) from error

    del test.__wrapped__  # pytest would take its parameters for fixtures
    return test


class TestAsTorchTestsItsModules:
    """The laws of torch's test_modules.py, with its inputs for BatchNorm, for converted layers."""

    @staticmethod
    def layers(kind, case, train, splits=2, **factory):
        """BatchNorm, its like with ghosts, and an input."""
        torch.manual_seed(1)
        arguments = case.constructor_input
        factory = {"dtype": torch.float64, **factory}
        norm = randomised(kind(*arguments.args, **arguments.kwargs, **factory)).train(train)
        ghost = GhostBatchNorm.convert(copy.deepcopy(norm), splits)
        return norm, ghost, case.forward_input.args[0].detach().clone().requires_grad_()

    @for_each_of_torchs_inputs
    def test_is_batchnorm_with_one_split_and_ghost_by_ghost_with_two(self, kind, case, train):
        norm, ghost, images = self.layers(kind, case, train, splits=1)
        assert torch.equal(ghost(images), norm(images))
        assert all(torch.equal(a, b) for a, b in zip(ghost.buffers(), norm.buffers(), strict=True))
        norm, ghost, images = self.layers(kind, case, train)
        parts = images.chunk(2) if norm.training or norm.track_running_stats else [images]
        assert torch.equal(ghost(images), torch.cat([norm(part) for part in parts]))

    @for_each_of_torchs_inputs
    def test_copies_and_files_are_the_layer(self, kind, case, train):
        _, ghost, images = self.layers(kind, case, train)
        file = io.BytesIO()
        torch.save(ghost, file)
        file.seek(0)
        others = [copy.deepcopy(ghost), pickle.loads(pickle.dumps(ghost)), torch.load(file, weights_only=False)]
        output = ghost(images)
        for other in others:
            assert repr(other) == repr(ghost)
            assert torch.equal(other(images), output)
            assert all(torch.equal(a, b) for a, b in zip(other.buffers(), ghost.buffers(), strict=True))

    @for_each_of_torchs_inputs
    def test_any_memory_is_taken(self, kind, case, train):
        _, ghost, images = self.layers(kind, case, train)
        expected = copy.deepcopy(ghost)(images)
        (gradient,) = torch.autograd.grad(expected.square().sum(), images)
        transposed = images.detach().transpose(0, 1).contiguous().transpose(0, 1)
        sliced = torch.stack([images.detach()] * 2, -1)[..., 0]
        for other in (
            transposed,
            sliced,
            images.detach().to(memory_format=FORMATS.get(images.dim(), torch.contiguous_format)),
        ):
            output = copy.deepcopy(ghost)(other.requires_grad_())
            torch.testing.assert_close(output, expected)
            torch.testing.assert_close(torch.autograd.grad(output.square().sum(), other)[0], gradient)

    @for_each_of_torchs_inputs
    def test_gradients(self, kind, case, train):
        _, ghost, images = self.layers(kind, case, train)
        parameters = dict(ghost.named_parameters())
        buffers = dict(ghost.named_buffers())

        def forward(images, *values):
            state = dict(zip(parameters, values, strict=True)) | {name: b.clone() for name, b in buffers.items()}
            return torch.func.functional_call(ghost, state, images)

        inputs = (images, *parameters.values())
        assert torch.autograd.gradcheck(forward, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(forward, inputs, fast_mode=True)

    @for_each_of_torchs_inputs
    def test_made_on_a_device_and_reset(self, kind, case, train):
        norm, _, images = self.layers(kind, case, train)
        arguments = case.constructor_input
        (ghost_class,) = [
            ghost for ghost in (GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d) if issubclass(ghost, kind)
        ]
        features, *settings = arguments.args
        made = ghost_class(features, 2, *settings, **arguments.kwargs, device="meta", dtype=torch.float64).train(train)
        assert made(images.to("meta")).shape == images.shape
        made = made.to_empty(device="cpu")
        made.reset_parameters()
        norm.reset_parameters()
        assert made.state_dict().keys() == norm.state_dict().keys()
        assert all(
            torch.equal(a, b) for a, b in zip(made.state_dict().values(), norm.state_dict().values(), strict=True)
        )


def page_code(word):
    """The one block of Python on the page that holds `word`."""
    page = (PROJECT / "docs" / "ghost_batch_norm.md").read_text()
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if word in block]
    return block


class TestPage:
    """The recipes of docs/ghost_batch_norm.md, run as they stand there."""

    def test_usage(self):
        torch.manual_seed(1)
        names = {}
        exec(page_code("optimizer"), names)
        assert not any(isinstance(layer, GhostBatchNorm) for layer in names["model"].modules())

    def test_fusing_with_a_convolution(self):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(3, 4, 1), randomised(GhostBatchNorm(4, 2)), nn.ReLU())
        images = torch.randn(4, 3, 5, 5)
        expected = copy.deepcopy(model).eval()(images)
        names = {"model": model}
        exec(page_code("fuse("), names)
        assert not any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in names["fused"].modules())
        torch.testing.assert_close(names["fused"](images), expected)

    def test_batchnorm_with_an_activation(self, monkeypatch):
        """With a stand-in for timm's layer, so that the tests do without timm."""

        class BatchNormAct2d(nn.BatchNorm2d):
            def __init__(self, channels):
                super().__init__(channels)
                self.drop, self.act = nn.Identity(), nn.SiLU()

            def forward(self, input):
                return self.act(self.drop(super().forward(input)))

        monkeypatch.setitem(sys.modules, "timm", types.ModuleType("timm"))
        monkeypatch.setitem(sys.modules, "timm.layers", types.ModuleType("timm.layers"))
        sys.modules["timm.layers"].BatchNormAct2d = BatchNormAct2d
        norm, images = randomised(BatchNormAct2d(3)), torch.randn(8, 3, 4, 4)
        model = nn.Sequential(norm, nn.BatchNorm2d(3))
        before = copy.deepcopy(model).eval()
        names = {"model": model}
        exec(page_code("BatchNormAct2d"), names)
        assert isinstance(norm, BatchNormAct2d)
        assert [type(layer) for layer in model] == [names["GhostBatchNormAct2d"], GhostBatchNorm2d]
        made = GhostBatchNorm(3, norm.num_splits)
        made.load_state_dict(norm.state_dict())
        assert torch.equal(norm(images), F.silu(made(images)))
        before.load_state_dict(model.state_dict())
        for other in (model.eval(), fx.symbolic_trace(model), GhostBatchNorm.revert(copy.deepcopy(model))):
            assert torch.equal(other(images), before(images))
        assert type(GhostBatchNorm.revert(model)[0]) is BatchNormAct2d
