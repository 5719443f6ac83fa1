"""The promises of GhostBatchNorm and of docs/ghost_batch_norm.md, with torch's BatchNorm as the reference."""

import copy
import inspect
import pickle
import re
import sys
import types
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from conftest import Operations
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn.utils import parametrize

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


def by_definition(norm, images, splits):
    """A step of `norm`, a BatchNorm, as ghosts should take it: each normalised by itself, all averaged by size."""
    ghosts = images.contiguous().tensor_split(min(splits, len(images)))
    values = images.new_tensor([[ghost[:, 0].numel()] for ghost in ghosts])
    means, variances = images.new_zeros(2, len(ghosts), images.shape[1])
    arguments = norm.weight, norm.bias, True, 1.0, norm.eps
    outputs = [F.batch_norm(*ghost, *arguments) for ghost in zip(ghosts, means, variances, strict=True)]
    norm.num_batches_tracked += 1
    step = norm.momentum or 1 / norm.num_batches_tracked.item()
    norm.running_mean.lerp_((values * means).sum(0) / values.sum(), step)
    norm.running_var.lerp_(((values - 1) * variances).sum(0) / (values - 1).sum(), step)
    return torch.cat(outputs)


def left_by(layer, images, output):
    """All that a step has changed."""
    return [output, images.grad, *(weights.grad for weights in layer.parameters()), *layer.buffers()]


def same_buffers(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.buffers(), other.buffers(), strict=True))


@st.composite
def batches(draw):
    """(N, C, *) of rank 2 to 5 in any memory format, and a number of splits that leaves each ghost two values."""
    rank, splits = draw(st.integers(2, 5)), draw(st.integers(1, 9))
    least = max(2, 2 * splits if rank == 2 else 1)
    shape = [draw(st.integers(*limits)) for limits in ((least, least + 12), (1, 5), *[(2, 4)] * (rank - 2))]
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
@example((torch.randn(4, 5, 8, 3, dtype=torch.float64).permute(2, 3, 0, 1), 8), torch.float64, 0.1, True)
def test_training_is_batchnorm_of_each_ghost_over_steps(batch, dtype, momentum, affine):
    images, splits = batch
    # The larger eps keeps a ghost of two nearly equal values from magnifying the rounding of float32.
    tolerance, eps = (1e-9, 1e-5) if dtype is torch.float64 else (1e-3, 0.1)
    options = {"eps": eps, "momentum": momentum, "affine": affine}
    ghost = randomised(GhostBatchNorm(images.shape[1], splits, **options, dtype=dtype))
    norm = BATCHNORMS[images.dim()](images.shape[1], **options, dtype=torch.float64)
    norm.load_state_dict(ghost.state_dict())
    places = [buffer.data_ptr() for buffer in ghost.buffers()]
    for step in range(3):
        ours, theirs = ((images + step).to(one).requires_grad_() for one in (dtype, torch.float64))
        output, expected = ghost(ours), by_definition(norm, theirs, splits)
        gradient = torch.randn(images.shape, dtype=torch.float64)  # torch's own is wrong for some strides
        torch.autograd.backward([output, expected], [gradient.to(dtype), gradient])
        close = {"rtol": tolerance, "atol": tolerance, "check_dtype": False, "check_stride": False}
        torch.testing.assert_close(left_by(ghost, ours, output), left_by(norm, theirs, expected), **close)
        assert torch.equal(ours, (images + step).to(dtype))
    assert places == [buffer.data_ptr() for buffer in ghost.buffers()]


def outcome(layer, images):
    try:
        return layer(images).tolist()
    except ValueError as error:
        return str(error)


@settings(max_examples=120)
@given(batches(), st.booleans(), st.booleans())
def test_evaluation_one_ghost_and_batches_too_small_to_cut_are_batchnorm_to_the_bit(batch, affine, train):
    """From BatchNorm's state_dict; one sample may be too few, and there may be no sample, or none of its pixels."""
    images, splits = batch
    norm = randomised(BATCHNORMS[images.dim()](images.shape[1], affine=affine, dtype=torch.float64)).train(train)
    small = [images[:1], images[:0], images[:, :, :0] if images.dim() > 2 else images[:0]]
    for number, samples in ((1 if train else splits, images), *((splits, samples) for samples in small)):
        ghost = GhostBatchNorm(images.shape[1], number, affine=affine, dtype=torch.float64).train(train)
        ghost.load_state_dict(norm.state_dict())
        assert outcome(ghost, samples) == outcome(norm, samples)
        assert same_buffers(ghost, norm)


@settings(max_examples=60)
@given(st.integers(2, 40), st.integers(1, 40))
def test_a_ghost_size_makes_as_few_even_ghosts_as_it_allows(samples, size):
    torch.manual_seed(1)
    images = torch.randn(samples, 2, 3)
    splits = next(splits for splits in range(1, samples + 1) if len(images.tensor_split(splits)[0]) <= size)
    sized, numbered = GhostBatchNorm(2, ghost_size=size), GhostBatchNorm(2, splits)
    assert torch.equal(sized(images), numbered(images))
    assert same_buffers(sized, numbered)


class TestTraining:
    @pytest.mark.parametrize("splits", [2, 4, 8])
    @pytest.mark.parametrize("samples", [32, 64])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_running_statistics_are_the_weighted_ghosts_to_the_bit(self, samples, splits, dtype):
        """The weights as the published runs had them: a tensor, multiplied element by element."""
        ghost = randomised(GhostBatchNorm(5, splits, dtype=dtype))
        images = 1 + 3 * torch.randn(samples, 5, 4, 4, dtype=dtype)
        statistics = torch.zeros(2, splits, 5, dtype=dtype)
        for part in zip(images.tensor_split(splits), *statistics, strict=True):
            F.batch_norm(*part, training=True, momentum=1.0)
        mean, variance = (statistics * torch.full((2, splits, 1), 1 / splits, dtype=dtype)).sum(1)
        expected = ghost.running_mean.lerp(mean, 0.1), ghost.running_var.lerp(variance, 0.1)
        ghost(images)
        assert torch.equal(ghost.running_mean, expected[0])
        assert torch.equal(ghost.running_var, expected[1])

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize(
        ("samples", "channels", "side", "splits", "calls"),
        [(15, 4, 64, 5, 5), (17, 4, 64, 5, 5), (16, 2, 8, 4, 4), (16, 2, 8, 8, 1), (17, 2, 8, 8, 2), (5, 16, 64, 5, 1)],
    )
    def test_large_and_small_maps_are_the_definition(self, samples, channels, side, splits, calls, layout):
        """Large ghosts are normalised one by one, small ones, and single contiguous samples, together as channels."""
        images = torch.randn(samples, channels, side, side, dtype=torch.float64).to(memory_format=layout)
        ghost = GhostBatchNorm(channels, splits, dtype=torch.float64)
        norm = nn.BatchNorm2d(channels, dtype=torch.float64)
        with Operations() as operations:
            output = ghost(images)
        single = samples == splits and layout is torch.channels_last
        assert operations.names.count("native_batch_norm") == (splits if single else calls)
        assert output.is_contiguous(memory_format=layout)
        torch.testing.assert_close(output, by_definition(norm, images, splits))
        torch.testing.assert_close(list(ghost.buffers()), list(norm.buffers()))

    @pytest.mark.parametrize("samples", [64, 62])
    @pytest.mark.parametrize("splits", [4, 16])
    def test_no_number_is_copied_to_the_device(self, samples, splits):
        """A copy from the host would make a GPU wait, and keep the layer out of a CUDA graph."""
        for track, momentum, dtype in product((True, False), (0.1, None), (torch.float32, torch.float16)):
            ghost = GhostBatchNorm(3, splits, momentum=momentum, track_running_stats=track, dtype=dtype)
            with Operations() as operations:
                ghost(torch.ones(samples, 3, 4, 4, dtype=dtype))
            copies = {"lift_fresh", "_local_scalar_dense"}
            if momentum is not None and dtype is torch.float32 and splits == 4:
                copies |= {"_to_copy", "copy_"}
            assert not copies & set(operations.names), f"{track=}, {momentum=}, {dtype=}"

    @pytest.mark.parametrize("splits", [4, 16])
    def test_takes_the_dtypes_that_batchnorm_takes(self, splits):
        """With a variance of 90,000, where float16 ends at 65,504."""
        dtypes, taken = (torch.float64, torch.float32, torch.float16, torch.bfloat16), 0
        for dtype, layer_dtype, affine, track in product(dtypes, dtypes, (True, False), (True, False)):
            images = (300 * torch.randn(64, 3, 4, 4)).to(dtype)
            options = {"affine": affine, "track_running_stats": track, "dtype": layer_dtype}
            ghost, norms = GhostBatchNorm(3, splits, **options), [nn.BatchNorm2d(3, **options) for _ in range(splits)]
            try:
                expected = torch.cat([norm(part) for norm, part in zip(norms, images.chunk(splits), strict=True)])
            except RuntimeError:
                continue
            assert torch.equal(ghost(images), expected), f"{dtype=}, {options}"
            if track:
                variance = torch.stack([norm.running_var.double() for norm in norms]).mean(0)
                torch.testing.assert_close(ghost.running_var.double(), variance, rtol=0.01, atol=0)
            taken += 1
        assert taken >= 16  # the equal dtypes at least

    @pytest.mark.parametrize("splits", [2, 16])
    @pytest.mark.parametrize("momentum", [0.1, None])
    @pytest.mark.parametrize(
        "removed", [[], ["running_mean", "running_var"], ["num_batches_tracked"], ["track_running_stats"]]
    )
    def test_buffers_that_are_not_tracked_or_set_to_none_are_missed_as_by_batchnorm(self, removed, momentum, splits):
        options, images = {"momentum": momentum, "track_running_stats": removed != []}, torch.randn(32, 3, 4, 4)
        ghost, norm = layers = GhostBatchNorm(3, splits, **options), nn.BatchNorm2d(3, **options)
        for layer, name in product(layers, removed):
            setattr(layer, name, None)
        assert torch.equal(ghost(images), GhostBatchNorm(3, splits)(images))
        norm(images)
        assert [name for name, _ in ghost.named_buffers()] == [name for name, _ in norm.named_buffers()]
        torch.testing.assert_close(list(ghost.buffers()), list(norm.buffers()), rtol=0.05, atol=1e-3)
        norm.load_state_dict(ghost.state_dict())
        assert torch.equal(ghost.eval()(images), norm.eval()(images))  # by the whole batch, without running statistics

    @pytest.mark.skipif("bias" not in inspect.signature(nn.BatchNorm2d).parameters, reason="torch before 2.13")
    @pytest.mark.parametrize("splits", [4, 8])
    def test_without_bias(self, splits):
        images, ghost = torch.randn(8, 3, 4, 4), GhostBatchNorm.convert(nn.BatchNorm2d(3, bias=False), splits)
        assert ghost.bias is GhostBatchNorm(3, splits, bias=False).bias is None
        assert torch.equal(ghost(images), GhostBatchNorm(3, splits)(images))

    @pytest.mark.filterwarnings("ignore")  # vmap's own: it has no fast rule for lerp_
    @pytest.mark.parametrize("splits", [4, 8])
    def test_an_ensemble_trains_under_vmap(self, splits):
        layers, images = [randomised(GhostBatchNorm(3, splits)) for _ in range(2)], torch.randn(2, 16, 3, 4, 4)
        parameters, buffers = torch.func.stack_module_state(layers)

        def call(parameters, buffers, images):
            return torch.func.functional_call(layers[0], (parameters, buffers), images)

        stacked = torch.vmap(call)(parameters, buffers, images)
        for member, layer in enumerate(copy.deepcopy(layers)):
            torch.testing.assert_close(stacked[member], layer(images[member]))
            for name, buffer in layer.named_buffers():
                torch.testing.assert_close(buffers[name][member], buffer)

    @pytest.mark.parametrize("splits", [3, 8])
    @pytest.mark.parametrize("shape", [(16, 2), (17, 2, 2, 2)])
    def test_gradients_have_gradients(self, shape, splits):
        ghost = randomised(GhostBatchNorm(2, splits, dtype=torch.float64))
        images = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradgradcheck(ghost, images, fast_mode=True)

    def test_memory_saved_for_backward_is_flat_in_the_splits(self):
        def saved(splits):
            sizes = {}

            def pack(tensor):
                storage = tensor.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                GhostBatchNorm(8, splits)(torch.randn(64, 8, 10, 10, requires_grad=True))
            return sum(sizes.values())

        assert saved(16) < 1.02 * saved(1)


@pytest.mark.filterwarnings("ignore")  # torch's own compilers cause some
class TestCompilers:
    @pytest.mark.parametrize("track", [True, False])
    @pytest.mark.parametrize("make", [GhostBatchNorm, GhostBatchNorm2d])
    def test_torchscript_evaluates_and_names_revert_where_it_cannot(self, make, track, tmp_path):
        ghost, images = make(3, 4, track_running_stats=track), torch.randn(6, 3, 4, 4)
        torch.jit.save(torch.jit.script(nn.Sequential(ghost)), tmp_path / "ghost.pt")
        scripted = torch.jit.load(tmp_path / "ghost.pt")
        with pytest.raises(torch.jit.Error, match=r"evaluation only: call eval\(\) .* GhostBatchNorm.revert"):
            scripted(images)
        assert torch.equal(scripted.eval()(images), ghost.eval()(images))

    @pytest.mark.parametrize("cut", [{"num_splits": 2}, {"num_splits": 3}, {"num_splits": 8}, {"ghost_size": 3}])
    def test_a_graph_exported_in_training_can_be_switched_to_evaluation_and_back(self, cut):
        """The flow of quantization in PyTorch 2, where a graph is exported once for both."""
        ghost, images = randomised(GhostBatchNorm(3, **cut)), 3 + 2 * torch.randn(8, 3, 8, 8)
        export = torch.export.export_for_training if torch.__version__ < "2.6" else torch.export.export
        exported = export(copy.deepcopy(ghost), (images,)).module()
        for train in (True, False, True):
            for node in exported.graph.nodes:  # what `move_exported_model_to_eval` does, in torch.ao and torchao
                if node.target is torch.ops.aten.batch_norm.default:
                    node.args = (*node.args[:5], train, *node.args[6:])
            exported.recompile()
            torch.testing.assert_close(exported(images), ghost.train(train)(images))
            for name in ("running_mean", "running_var"):
                torch.testing.assert_close(exported.get_buffer(name), ghost.get_buffer(name))

    @pytest.mark.parametrize(
        ("splits", "size"),
        [(4, None), *(pytest.param(*cut, marks=pytest.mark.slow) for cut in ((16, None), (None, 4)))],
    )
    def test_few_graphs_for_many_batch_sizes(self, splits, size):
        """As many as docs/ghost_batch_norm.md says: with one per remainder, torch would refuse the ninth."""
        from torch._dynamo.testing import CompileCounter  # slow to import, so not in every worker

        torch._dynamo.reset()
        counter, ghost = CompileCounter(), GhostBatchNorm(3, splits, ghost_size=size)
        compiled = torch.compile(copy.deepcopy(ghost), backend=counter, fullgraph=True)
        for samples in range(32, 50):
            images = torch.randn(samples, 3, 4, 4)
            torch.testing.assert_close(compiled(images), ghost(images))
        assert counter.frame_count <= 5

    def test_fx_traces_a_layer_that_trains_at_any_batch_size_and_follows_the_mode(self):
        """torchvision's feature extractors are made so. Copies and pickles, of a converted layer too, are the layer."""
        model = nn.Sequential(nn.Conv2d(1, 3, 3), randomised(GhostBatchNorm(3, 4)), randomised(nn.BatchNorm2d(3)))
        GhostBatchNorm.convert(model[2:], ghost_size=3)
        traced = fx.symbolic_trace(copy.deepcopy(model).eval())
        others = traced, copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))
        for train, samples in ((True, 8), (True, 11), (False, 3), (True, 1)):
            images = torch.randn(samples, 1, 6, 6)
            output = model.train(train)(images)
            assert all(torch.equal(other.train(train)(images), output) for other in others)
        assert all(same_buffers(other, model) for other in others)
        assert all(other.state_dict().keys() == model.state_dict().keys() for other in others)


class TestRefusals:
    @pytest.mark.parametrize(
        "cut", [(0, None), (-1, None), (1.5, None), (True, None), ("4", None), (None, 0), (4, 16), (None, None)]
    )
    def test_a_cut_that_is_none(self, cut):
        said = "give num_splits or ghost_size, one whole number from 1, not num_splits"
        with pytest.raises(ValueError, match=said):
            GhostBatchNorm(3, cut[0], ghost_size=cut[1])
        with pytest.raises(ValueError, match=said):
            GhostBatchNorm.convert(nn.BatchNorm2d(3), cut[0], ghost_size=cut[1])

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

    @pytest.mark.parametrize("train", [True, False])
    @pytest.mark.parametrize("shape", [(8, 4, 5, 5), (8,), (), (8, 4), (0, 4)])
    def test_another_rank_or_number_of_channels(self, shape, train):
        with pytest.raises(ValueError, match=r"expected input \(N, 3, \*\), got \("):
            GhostBatchNorm(3, 2).train(train)(torch.randn(shape))

    @pytest.mark.parametrize("removed", ["running_mean", "running_var"])
    @pytest.mark.parametrize("momentum", [0.1, None])
    def test_one_running_statistic_alone(self, removed, momentum):
        ghost = GhostBatchNorm(3, 2, momentum=momentum)
        setattr(ghost, removed, None)
        with pytest.raises(ValueError, match="running_mean and running_var must be two tensors, or both None"):
            ghost(torch.randn(8, 3, 4, 4))
        assert ghost.num_batches_tracked == 0


def test_takes_batchnorms_arguments_prints_them_and_its_cut_and_is_made_on_a_device():
    made = GhostBatchNorm3d(3, 2, 1e-3, 0.2, device="meta", dtype=torch.float64)
    settings = r"GhostBatchNorm3d\(3, eps=0.001, momentum=0.2.*, num_splits=2, ghost_size=None\)"
    assert re.fullmatch(settings, repr(made))
    assert repr(GhostBatchNorm(3, ghost_size=16)).endswith("num_splits=None, ghost_size=16)")
    assert made(torch.randn(4, 3, 2, 2, 2, dtype=torch.float64, device="meta")).shape == (4, 3, 2, 2, 2)


class TestConversion:
    @pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
    def test_a_root_keeps_its_parameters_and_settings_and_its_class_comes_back(self, kind):
        norm = randomised(kind(3, eps=1e-3, momentum=None, dtype=torch.float64)).eval()
        attributes, state = dict(norm.__dict__), copy.deepcopy(norm.state_dict())
        weight = norm.weight  # which an optimizer may hold
        ghost = GhostBatchNorm.convert(norm, 4)
        assert ghost is norm
        assert ghost.weight is weight
        assert isinstance(ghost, GhostBatchNorm)
        assert isinstance(ghost, kind)
        assert ghost.__dict__ == attributes | {"num_splits": 4, "ghost_size": None}
        reverted = GhostBatchNorm.revert(ghost)
        assert type(reverted) is kind
        assert reverted.__dict__ == attributes
        torch.testing.assert_close(reverted.state_dict(), state, rtol=0, atol=0)

    def test_ghosts_get_a_new_cut_and_what_was_made_as_one_becomes_a_batchnorm2d(self):
        model = GhostBatchNorm.convert(nn.Sequential(nn.BatchNorm1d(3), GhostBatchNorm(3, 4)), ghost_size=5)
        assert [(layer.num_splits, layer.ghost_size) for layer in model] == [(None, 5)] * 2
        GhostBatchNorm.convert(GhostBatchNorm.convert(model, 3), 3)
        assert [(layer.num_splits, layer.ghost_size) for layer in model] == [(3, None)] * 2
        GhostBatchNorm.revert(GhostBatchNorm.revert(model))
        assert [type(layer) for layer in model] == [nn.BatchNorm1d, nn.BatchNorm2d]

    @pytest.mark.parametrize("made", ["Parametrized", "FSDP"])
    def test_classes_that_torch_makes_for_a_layer_are_left_as_they_are(self, made):
        """FSDP itself needs a process group: its classes are made like this."""
        model = nn.Sequential(GhostBatchNorm2d(3, 2), nn.BatchNorm2d(3), GhostBatchNorm2d(3, 2))
        for layer in model[1:]:
            if made == "Parametrized":
                parametrize.register_parametrization(layer, "weight", nn.Softplus())
            else:
                name, module = f"FSDP{type(layer).__name__}", {"__module__": "torch.distributed.fsdp"}
                layer.__class__ = type(name, (type(layer),), module)
        kinds = [type(layer) for layer in model]
        with pytest.warns(UserWarning, match=rf"left without ghost batches: 1 \({made}BatchNorm2d\) in Sequential"):
            GhostBatchNorm.convert(model, 4)
        assert model[2].num_splits == 4  # a new cut needs no new class
        advice = f"revert a {made}GhostBatchNorm2d: remove parametrizations before, and shard after"
        with pytest.raises(TypeError, match=advice):
            GhostBatchNorm.revert(model)
        assert [type(layer) for layer in model] == kinds
        assert model(torch.randn(8, 3, 2, 2)).isfinite().all()

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

    def test_shared_layers_stay_shared_and_others_are_left_alone_and_named(self):
        own = type("OwnNorm", (nn.BatchNorm2d,), {"forward": lambda self, input: input})
        same = type("SameNorm", (nn.BatchNorm2d,), {})
        replaced = nn.BatchNorm2d(3)
        replaced.forward = replaced.forward  # as accelerate and others do, around what was there
        others = [nn.InstanceNorm2d(3, affine=True), nn.GroupNorm(1, 3), replaced]
        others += [nn.SyncBatchNorm(3), own(3), nn.Sequential(same(3)), nn.LazyBatchNorm2d()]
        kinds, shared = [type(layer) for layer in others], nn.BatchNorm2d(3)
        model = nn.Sequential(shared, nn.Sequential(shared, nn.BatchNorm2d(3)), *others)
        names = "4 (BatchNorm2d), 5 (SyncBatchNorm), 6 (OwnNorm), 7.0 (SameNorm), 8 (LazyBatchNorm2d) in Sequential;"
        with pytest.warns(UserWarning, match=rf"without ghost batches: {re.escape(names)} convert takes") as warned:
            GhostBatchNorm.convert(model, 2)
        assert len(warned) == 1
        assert model[0] is model[1][0]
        assert type(model[0]) is type(model[1][1]) is GhostBatchNorm2d
        assert [type(layer) for layer in others] == kinds

    def test_a_warning_where_nothing_is_converted(self):
        with pytest.warns(UserWarning, match="no BatchNorm to convert in Sequential; convert takes"):
            GhostBatchNorm.convert(nn.Sequential(nn.Linear(2, 2)), 4)
        with pytest.warns(UserWarning, match=r"left without ghost batches: the module itself \(LazyBatchNorm2d\) in "):
            GhostBatchNorm.convert(nn.LazyBatchNorm2d(), 4)


def run_page(word, model):
    """Run the one block of Python in docs/ghost_batch_norm.md that holds `word`, and return its names."""
    page, names = (PROJECT / "docs" / "ghost_batch_norm.md").read_text(), {"model": model}
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if word in block]
    exec(block, names)
    return names


class TestPage:
    def test_the_example_runs(self):
        norms = [layer for layer in run_page("resnet18", None)["model"].modules() if hasattr(layer, "running_mean")]
        assert [(type(norm), int(norm.num_batches_tracked)) for norm in norms] == [(nn.BatchNorm2d, 1)] * 20

    @pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # by torch 2.11 itself
    def test_fusing_with_a_convolution(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), randomised(GhostBatchNorm(4, 2)), nn.ReLU())
        images = torch.randn(4, 3, 5, 5)
        expected = copy.deepcopy(model).eval()(images)
        fused = run_page("fuse(", model)["fused"]
        assert not any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in fused.modules())
        torch.testing.assert_close(fused(images), expected)

    def test_batchnorm_with_an_activation(self, monkeypatch):
        """With a stand-in for timm's layer, so that the tests do without timm."""

        class BatchNormAct2d(nn.BatchNorm2d):
            drop, act = nn.Identity(), nn.SiLU()

            def forward(self, input):
                return self.act(self.drop(super().forward(input)))

        monkeypatch.setitem(sys.modules, "timm", types.ModuleType("timm"))
        monkeypatch.setitem(sys.modules, "timm.layers", types.SimpleNamespace(BatchNormAct2d=BatchNormAct2d))
        norm, images = randomised(BatchNormAct2d(3)), torch.randn(8, 3, 4, 4)
        model = nn.Sequential(norm, nn.BatchNorm2d(3))
        before = copy.deepcopy(model).eval()
        kind = run_page("BatchNormAct2d", model)["GhostBatchNormAct2d"]
        assert isinstance(norm, BatchNormAct2d)
        assert [type(layer) for layer in model] == [kind, GhostBatchNorm2d]
        made = GhostBatchNorm(3, norm.num_splits)
        made.load_state_dict(norm.state_dict())
        assert torch.equal(norm(images), F.silu(made(images)))
        before.load_state_dict(model.state_dict())
        for other in (model.eval(), fx.symbolic_trace(model), GhostBatchNorm.revert(copy.deepcopy(model))):
            assert torch.equal(other(images), before(images))
        assert type(GhostBatchNorm.revert(model)[0]) is BatchNormAct2d
