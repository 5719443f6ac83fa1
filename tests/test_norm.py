"""The promises of GhostBatchNorm and of docs/ghost_batch_norm.md, with BatchNorm as the reference."""

import copy
import inspect
import io
import pickle
import re
import sys
import types
import warnings
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import resnet18

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

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize(
        ("shape", "splits", "calls"),
        [
            ((15, 4, 64, 64), 5, 5),
            ((17, 4, 64, 64), 5, 5),
            ((16, 2, 8, 8), 4, 4),
            ((17, 2, 8, 8), 8, 2),
            ((5, 16, 64, 64), 5, 1),
        ],
    )
    def test_large_and_small_maps_are_the_definition(self, shape, splits, calls, layout):
        """Large ghosts are normalised one by one, small ones, and single contiguous samples, together as channels."""
        torch.manual_seed(1)
        images = torch.randn(shape, dtype=torch.float64).to(memory_format=layout)
        ghost = GhostBatchNorm(shape[1], splits, dtype=torch.float64)
        norm = nn.BatchNorm2d(shape[1], dtype=torch.float64)
        with Operations() as operations:
            output = ghost(images)
        single = len(images) == splits and layout is torch.channels_last
        assert operations.names.count("native_batch_norm") == (splits if single else calls)
        assert output.is_contiguous(memory_format=layout)
        torch.testing.assert_close(output, reference_step(norm, images, torch.ones_like(images), splits)[0])
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

    @pytest.mark.parametrize("affine", [True, False])
    def test_without_running_statistics(self, affine):
        images = torch.randn(8, 3, 4, 4)
        ghost = GhostBatchNorm(3, 4, affine=affine, track_running_stats=False)
        assert not list(ghost.buffers())
        assert torch.equal(ghost(images), GhostBatchNorm(3, 4)(images))
        norm = nn.BatchNorm2d(3, track_running_stats=False)
        assert torch.equal(ghost.eval()(images), norm.eval()(images))  # the whole batch's, as BatchNorm

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
    @pytest.mark.parametrize(
        "cut", [(0, None), (-1, None), (1.5, None), (True, None), ("4", None), (None, 0), (4, 16), ()]
    )
    def test_a_cut_that_is_none(self, cut):
        keywords = dict(zip(("num_splits", "ghost_size"), cut, strict=False))
        for make in (GhostBatchNorm, lambda _, **cut: GhostBatchNorm.convert(nn.BatchNorm2d(3), **cut)):
            with pytest.raises(
                ValueError, match="give num_splits or ghost_size, one whole number from 1, not num_splits"
            ):
                make(3, **keywords)

    @pytest.mark.parametrize(("samples", "cut", "splits"), [(5, 4, 4), (2, 2, 2), (3, 8, 3), (5, -2, 3), (5, -1, 5)])
    @pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 1, 1)])
    def test_a_ghost_of_one_value(self, samples, cut, splits, shape):
        images = torch.randn(samples, *shape)
        ghost = GhostBatchNorm(3, cut) if cut > 0 else GhostBatchNorm(3, ghost_size=-cut)
        advice = f"N = {samples} in {splits} ghost batches; use at most {samples // 2} splits, or a ghost_size of 3 or"
        with pytest.raises(ValueError, match=advice):
            ghost(images)
        assert ghost.num_batches_tracked == 0
        for cut in ({"num_splits": samples // 2}, {"ghost_size": 3}):
            assert GhostBatchNorm.convert(ghost, **cut)(images).isfinite().all()

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

    def test_a_batch_of_one_value_as_batchnorm(self):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            GhostBatchNorm(3, 4)(torch.randn(1, 3))

    @pytest.mark.parametrize("train", [True, False])
    @pytest.mark.parametrize("shape", [(8, 4, 5, 5), (8,), (), (8, 4), (0, 4)])
    def test_another_rank_or_number_of_channels(self, shape, train):
        with pytest.raises(ValueError, match=r"expected input \(N, 3, \*\), got \("):
            GhostBatchNorm(3, 2).train(train)(torch.randn(shape))

    @pytest.mark.parametrize("shape", [(0, 3, 4, 4), (8, 3, 0, 4), (8, 3, 0)])
    @pytest.mark.parametrize("splits", [4, 8])
    def test_an_input_without_values_is_as_batchnorms(self, shape, splits):
        images = torch.randn(shape)
        ghost, norm = randomised(GhostBatchNorm(3, splits)), BATCHNORMS[len(shape)](3)
        norm.load_state_dict(ghost.state_dict())
        assert ghost(images).shape == norm(images).shape
        assert all(torch.equal(a, b) for a, b in zip(ghost.buffers(), norm.buffers(), strict=True))

    @pytest.mark.parametrize("removed", ["running_mean", "running_var"])
    @pytest.mark.parametrize("momentum", [0.1, None])
    def test_one_running_statistic_alone(self, removed, momentum):
        ghost = GhostBatchNorm(3, 2, momentum=momentum)
        setattr(ghost, removed, None)
        with pytest.raises(ValueError, match="running_mean and running_var must be two tensors, or both None"):
            ghost(torch.randn(8, 3, 4, 4))
        assert ghost.num_batches_tracked == 0


class TestModule:
    def test_prints_its_cut(self):
        assert repr(GhostBatchNorm(3, 4)).startswith("GhostBatchNorm(3, eps=1e-05, momentum=0.1")
        assert repr(GhostBatchNorm(3, 4)).endswith("num_splits=4, ghost_size=None)")
        assert repr(GhostBatchNorm1d(3, ghost_size=16)).endswith("num_splits=None, ghost_size=16)")

    @pytest.mark.parametrize("splits", [3, 8])
    def test_gradients(self, splits):
        torch.manual_seed(1)
        for shape in ((16, 2), (17, 2, 2, 2)):
            ghost = randomised(GhostBatchNorm(2, splits, dtype=torch.float64))
            parameters, buffers = dict(ghost.named_parameters()), dict(ghost.named_buffers())

            def forward(images, *values, ghost=ghost, parameters=parameters, buffers=buffers):
                state = dict(zip(parameters, values, strict=True)) | {name: b.clone() for name, b in buffers.items()}
                return torch.func.functional_call(ghost, state, images)

            inputs = (torch.randn(shape, dtype=torch.float64, requires_grad=True), *parameters.values())
            assert torch.autograd.gradcheck(forward, inputs, fast_mode=True)
            assert torch.autograd.gradgradcheck(forward, inputs, fast_mode=True)

    @pytest.mark.parametrize("make", [GhostBatchNorm2d, lambda *cut: GhostBatchNorm.convert(nn.BatchNorm2d(3), 4)])
    def test_copies_and_files_are_the_layer(self, make):
        ghost, file, images = randomised(make(3, 4)), io.BytesIO(), torch.randn(8, 3, 4, 4)
        torch.save(ghost, file)
        file.seek(0)
        others = [copy.deepcopy(ghost), pickle.loads(pickle.dumps(ghost)), torch.load(file, weights_only=False)]
        output = ghost(images)
        for other in others:
            assert repr(other) == repr(ghost)
            assert torch.equal(other(images), output)
            assert all(torch.equal(a, b) for a, b in zip(other.buffers(), ghost.buffers(), strict=True))
            assert type(GhostBatchNorm.revert(other)) is nn.BatchNorm2d

    def test_takes_batchnorms_arguments_and_is_made_on_a_device(self):
        made = GhostBatchNorm3d(3, 2, 1e-3, 0.2, device="meta", dtype=torch.float64)
        assert (made.eps, made.momentum, made.weight.dtype) == (1e-3, 0.2, torch.float64)
        assert made(torch.randn(4, 3, 2, 2, 2, dtype=torch.float64, device="meta")).shape == (4, 3, 2, 2, 2)
        made = made.to_empty(device="cpu")
        made.reset_parameters()
        expected = nn.BatchNorm3d(3, dtype=torch.float64).state_dict()
        assert all(torch.equal(expected[name], value) for name, value in made.state_dict().items())


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

    def test_a_ghost_size_instead_of_a_number(self):
        model = GhostBatchNorm.convert(nn.Sequential(nn.BatchNorm1d(3), GhostBatchNorm(3, 4)), ghost_size=5)
        assert [(layer.num_splits, layer.ghost_size) for layer in model] == [(None, 5)] * 2
        images = torch.randn(9, 3)
        expected = torch.cat([nn.BatchNorm1d(3)(part) for part in images.split([5, 4])])
        torch.testing.assert_close(model[0](images), expected)
        GhostBatchNorm.convert(GhostBatchNorm.convert(model, 3), 3)
        assert [(layer.num_splits, layer.ghost_size) for layer in model] == [(3, None)] * 2
        GhostBatchNorm.revert(GhostBatchNorm.revert(model))
        assert [type(layer) for layer in model] == [nn.BatchNorm1d, nn.BatchNorm2d]

    @pytest.mark.parametrize("kind", [nn.BatchNorm2d, GhostBatchNorm2d])
    @pytest.mark.parametrize("made", ["Parametrized", "FSDP"])
    def test_classes_that_torch_makes_for_a_layer_are_left_as_they_are(self, kind, made):
        """FSDP itself needs a process group: its classes are made like this."""
        layer, ghost = kind(3, **({} if kind is nn.BatchNorm2d else {"num_splits": 2})), GhostBatchNorm2d(3, 2)
        if made == "Parametrized":
            parametrize.register_parametrization(layer, "weight", nn.Softplus())
        else:
            layer.__class__ = type(f"FSDP{kind.__name__}", (kind,), {"__module__": "torch.distributed.fsdp"})
        model, name = nn.Sequential(ghost, layer), type(layer).__name__
        if kind is nn.BatchNorm2d:
            with pytest.warns(UserWarning, match=rf"left without ghost batches: 1 \({name}\) in Sequential"):
                GhostBatchNorm.convert(model, 4)
        else:
            assert GhostBatchNorm.convert(model, 4)[1].num_splits == 4  # a new cut needs no new class
            with pytest.raises(TypeError, match=f"revert a {name}: remove parametrizations before, and shard after"):
                GhostBatchNorm.revert(model)
        assert [type(layer).__name__ for layer in model] == ["GhostBatchNorm2d", name]
        assert model(torch.randn(8, 3, 2, 2)).isfinite().all()

    def test_a_layer_whose_forward_was_replaced_is_left_alone(self):
        model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
        model[1].forward = model[1].forward  # as accelerate and others do, around what was there
        with pytest.warns(UserWarning, match=r"left without ghost batches: 1 \(BatchNorm2d\)"):
            GhostBatchNorm.convert(model, 4)
        assert [type(layer) for layer in model] == [GhostBatchNorm2d, nn.BatchNorm2d]

    def test_a_class_that_would_leave_out_a_forward_is_refused(self):
        def forward(self, input):
            return super(type(self), self).forward(input).relu()

        act = type("Act", (nn.BatchNorm2d,), {"forward": forward})
        same, plain = type("Same", (act,), {}), type("Plain", (nn.BatchNorm2d,), {})
        own = type("Own", (GhostBatchNorm2d,), {"forward": forward})
        model = nn.Sequential(nn.BatchNorm2d(3), act(3), same(3))
        hiding = [((GhostBatchNorm2d, act), {}), ((act, GhostBatchNorm2d), {}), ((GhostBatchNorm, same), {})]
        for bases, members in [*hiding, ((own, act), {}), ((act, GhostBatchNorm2d), {"forward": forward})]:
            with pytest.raises(TypeError, match="Ghost would leave out a forward: derive from GhostBatchNorm first"):
                type("Ghost", bases, members).convert(model, 2)
        assert [type(layer) for layer in model] == [nn.BatchNorm2d, act, same]
        assert type(own.convert(nn.BatchNorm2d(3), 2)) is own
        ghost = type("Ghost", (GhostBatchNorm2d, plain), {})
        assert type(ghost.revert(ghost.convert(plain(3), 2))) is plain

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
        names = "4 (SyncBatchNorm), 5 (OwnNorm), 6.0 (SameNorm), 7 (LazyBatchNorm2d) in Sequential; convert takes"
        assert names in str(warned.pop().message)
        assert not warned.list
        assert model[0] is model[1][0]
        assert isinstance(model[0], GhostBatchNorm)
        assert [type(layer) for layer in others] == kinds

    def test_a_warning_where_nothing_is_converted(self):
        with pytest.warns(UserWarning, match="no BatchNorm to convert in Sequential; convert takes"):
            GhostBatchNorm.convert(nn.Sequential(nn.Linear(2, 2)), 4)
        with pytest.warns(UserWarning, match=r"left without ghost batches: the module itself \(LazyBatchNorm2d\) in "):
            GhostBatchNorm.convert(nn.LazyBatchNorm2d(), 4)

    def test_convert_sync_batchnorm_takes_the_ghosts_away(self):
        """As the docstring warns: torch asks a layer for nothing but what every BatchNorm has."""
        model = nn.Sequential(randomised(GhostBatchNorm(3, 4)))
        state = copy.deepcopy(model.state_dict())
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        assert type(converted[0]) is nn.SyncBatchNorm
        assert all(torch.equal(state[name], value) for name, value in converted.state_dict().items())


def page_code(word):
    """The one block of Python on the page that holds `word`."""
    page = (PROJECT / "docs" / "ghost_batch_norm.md").read_text()
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if word in block]
    return block


class TestPage:
    """The recipes of docs/ghost_batch_norm.md, run as they stand there."""

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
