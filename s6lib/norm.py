# SPDX-License-Identifier: MIT
# Copyright (c) 2026 The s6lib maintainers
"""Ghost Batch Normalization: BatchNorm whose training statistics come from parts of the batch."""

import warnings
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

Module = TypeVar("Module", bound=nn.Module)
_BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class GhostBatchNorm(_BatchNorm):
    """BatchNorm that, in training, normalises each ghost batch, a part of the batch, by its own statistics.

    Input and output are (N, C, *): any shape with channels at dimension 1. In training the N samples are cut into
    contiguous ghost batches whose sizes differ by at most one, the larger ones first: `num_splits` of them (N if there
    are fewer samples), or as few as keep each within `ghost_size`: 9 samples with a `ghost_size` of 5 are 5 and 4.
    Each is normalised by its own mean and biased variance.

    The running mean and variance take one momentum step per forward pass, toward the ghosts' means and unbiased
    variances averaged with the weights n and n - 1, where n is a ghost's number of values per channel. The paper's
    algorithm 1 decays once per ghost instead. The momentum of a forward pass is then 1 - (1 - momentum)^num_splits:
    0.34 with 4 splits, 0.82 with 16, and the last ghosts count most. Here `momentum` means the same for any cut, so
    that the number of splits can change without retuning it.

    In evaluation, and with one ghost, it is BatchNorm: without running statistics (`track_running_stats=False`),
    evaluation uses the statistics of the whole batch. Parameters and buffers are BatchNorm's own, so a state_dict
    moves strictly between BatchNorm and GhostBatchNorm, in both directions, whatever the cut.

    GhostBatchNorm takes any rank. GhostBatchNorm1d, 2d and 3d are also BatchNorm1d, 2d and 3d: they take the same
    ranks, and `isinstance(layer, nn.BatchNorm2d)` finds them. `convert` makes these.

    torch.fx sees one node in it, as in torch's own layers, which still follows `train` and `eval`. TorchScript runs it
    in evaluation only.

    In distributed training each process cuts its own part of the batch, with nothing to synchronise. Keep ghost layers
    from `torch.nn.SyncBatchNorm.convert_sync_batchnorm`: it replaces every kind of BatchNorm, and silently leaves
    layers without ghosts.

    Args:
        num_features: C.
        num_splits: ghost batches per batch, at least 1.
        eps, momentum, affine, track_running_stats, device, dtype: as in `torch.nn.BatchNorm2d`.
        ghost_size: samples per ghost batch at most, at least 1; give either this or `num_splits`.
        bias: as in `torch.nn.BatchNorm2d` of torch 2.13 and newer.

    Raises ValueError unless exactly one of `num_splits` and `ghost_size` is a whole number from 1, for an input whose
    dimension 1 is not C, and in training for a ghost batch of one value per channel, which has no variance.

    Source: Hoffer, Hubara, Soudry, "Train longer, generalize better", arXiv:1705.08741, section 4 and algorithm 1.
    """

    def __init__(
        self, num_features: int, num_splits: int | None = None, *args: Any, ghost_size: int | None = None, **kwargs: Any
    ) -> None:
        number = num_splits if ghost_size is None else ghost_size
        if type(number) is not int or number < 1 or (num_splits is not None and ghost_size is not None):
            cut = f"num_splits = {num_splits!r} and ghost_size = {ghost_size!r}"
            raise ValueError(f"give num_splits or ghost_size, one whole number from 1, not {cut}")
        super().__init__(num_features, *args, **kwargs)
        self.num_splits, self.ghost_size = num_splits, ghost_size

    @classmethod
    def convert(cls, module: Module, num_splits: int | None = None, *, ghost_size: int | None = None) -> Module:
        """Turn every BatchNorm1d, 2d and 3d in `module`, itself included, into a ghost one, in place; return it.

        The layers stay the same objects, with their parameters, buffers, settings and hooks: an optimizer that holds
        them goes on. Layers that are ghosts already get the new cut. SyncBatchNorm, lazy, parametrized and sharded
        layers, other subclasses, which may compute something else, and layers whose `forward` was replaced are left
        alone, and a UserWarning names them. To convert a subclass too, call `convert` on a class of your own that
        derives from GhostBatchNorm and from it, in this order; if the subclass has a `forward`, yours needs one that
        does the work of both, or a TypeError says so. Another UserWarning says that there was nothing to convert.
        """
        GhostBatchNorm(0, num_splits, ghost_size=ghost_size)  # raises ValueError for a wrong cut
        ghosts = [GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d] + [cls] * (cls is not GhostBatchNorm)
        classes: dict[type, Any] = {_batchnorm_class(ghost): ghost for ghost in ghosts}
        base, ordered = _batchnorm_class(cls), issubclass(cls.__bases__[0], GhostBatchNorm)
        if base.forward is not _BatchNorm.forward and not ("forward" in vars(cls) and ordered):
            advice = f"derive from GhostBatchNorm first, and define a forward that adds what {base.__name__}'s does"
            raise TypeError(f"{cls.__name__} would leave out a forward: {advice}")
        found, left = False, []
        for name, layer in module.named_modules():
            if type(layer) in classes and "forward" not in vars(layer):
                layer.__class__ = classes[type(layer)]
            if isinstance(layer, GhostBatchNorm):
                layer.num_splits, layer.ghost_size, found = num_splits, ghost_size, True
            elif isinstance(layer, _BatchNorm):
                left.append(f"{name or 'the module itself'} ({type(layer).__name__})")
        if left or not found:
            problem = f"left without ghost batches: {', '.join(left)}" if left else "no BatchNorm to convert"
            advice = "convert takes BatchNorm1d, 2d, 3d, and a subclass through a class of GhostBatchNorm and of it"
            warnings.warn(f"{problem} in {type(module).__name__}; {advice}", stacklevel=2)
        return module

    @classmethod
    def revert(cls, module: Module) -> Module:
        """Turn every ghost layer in `module` back, in place, and return it.

        A layer becomes the BatchNorm that `convert` found, or a BatchNorm2d if it was made as a GhostBatchNorm. A
        parametrized or sharded ghost layer raises TypeError, before any layer is changed.
        """
        layers: list[Any] = [layer for layer in module.modules() if isinstance(layer, cls)]
        for kind in map(type, layers):
            if kind.__module__.startswith("torch."):  # made by torch for a layer
                raise TypeError(f"cannot revert a {kind.__name__}: remove parametrizations before, and shard after")
        for layer in layers:
            layer.__class__ = _batchnorm_class(type(layer))
            del layer.num_splits, layer.ghost_size
        return module

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # and TorchScript compiles no more than this
            assert not self.training, (
                "evaluation only: call eval() on the model, or GhostBatchNorm.revert before script"
            )
            mean, variance = self.running_mean, self.running_var
            return F.batch_norm(input, mean, variance, self.weight, self.bias, mean is None, 0.0, self.eps)
        if isinstance(input, fx.Proxy):  # a symbolic trace, which could not follow the sizes and the mode
            return input.tracer.create_proxy("call_module", input.tracer.path_of_module(self), (input,), {})
        self._check_input_dim(input)
        samples = input.shape[0]
        splits = min(self.num_splits or -(-samples // (self.ghost_size or 1)), samples)
        if not self.training or splits <= 1 or input.numel() == 0:
            return _BatchNorm.forward(self, input)  # not super(): a subclass may add to its BatchNorm's forward
        if input.shape[2:].numel() * (samples // splits) == 1:
            problem = f"a ghost batch of one value per channel has no variance: N = {samples} in {splits} ghost batches"
            raise ValueError(f"{problem}; use at most {samples // 2} splits, or a ghost_size of 3 or more")
        return self._normalise(input, splits)

    def _normalise(self, input: Tensor, splits: int) -> Tensor:
        """Normalise each ghost by its own statistics, and take the running ones a step toward their average."""
        buffers: tuple[Any, ...] = (self.running_mean, self.running_var, self.num_batches_tracked)
        mean, variance, batches = buffers if self.track_running_stats else (None, None, None)
        if (mean is None) != (variance is None):
            raise ValueError("running_mean and running_var must be two tensors, or both None")
        if batches is not None:
            batches.add_(1)
        samples, values, step = input.shape[0], input.shape[2:].numel(), cast(Any, self.momentum)
        size, larger = samples // splits, samples % splits
        # More than 4 small ghosts are faster as the channels of one batch_norm; up to 4, published digits stay.
        folded = splits > 4 and (input.numel() <= splits * 2**15 or (samples == splits and input.is_contiguous()))
        # torch.compile would make a graph for each number of ghosts, and below for each remainder if N had a branch.
        if folded or (self.ghost_size is not None and torch.compiler.is_compiling()):
            groups = [(larger, size + 1), (splits - larger, size)] if larger else [(splits, size)]
        else:
            groups = [(1, (samples + ghost) // splits) for ghost in reversed(range(splits))]
        average: Any = torch.mean
        if mean is None:
            momentum, statistics = 0.0, cast(Any, [None] * 2 * len(groups))
        elif step is not None and (mean.dtype.itemsize <= 2 or torch.compiler.is_compiling()):
            # From the running statistics, each ghost takes the step itself: in half precision its variance alone could
            # overflow; and a graph exported in training, then switched to evaluation, must read BatchNorm's here.
            statistics = [running.repeat(ghosts) for running in (mean, variance) for ghosts, _ in groups]
            momentum, step = step, 1.0
        else:
            # From zero, batch_norm comes to `momentum` times a ghost's mean and unbiased variance.
            statistics = [mean.new_zeros(ghosts * self.num_features) for ghosts, _ in groups * 2]
            momentum, average = (1.0, torch.mean) if larger else (1 / splits, torch.sum)
            if step is None:  # a cumulative average, which stands still without the number of batches, as BatchNorm's
                step = 0.0 if batches is None else batches.to(mean.dtype).reciprocal()
        parts = [input] if len(groups) == 1 else input.split_with_sizes([ghosts * size for ghosts, size in groups])
        outputs = []
        for index, (part, (ghosts, _)) in enumerate(zip(parts, groups, strict=True)):
            options: Any = (*statistics[index :: len(groups)], self.weight, self.bias, True, momentum, self.eps)
            outputs.append(F.batch_norm(part, *options) if ghosts == 1 else _folded(part, ghosts, *options))
        if mean is not None:
            by_ghost = torch.cat(statistics).view(2, splits, -1)
            averages = average(by_ghost, 1)
            if larger:
                # Weights n and n - 1, in Python's numbers: a tensor of them would be copied to a GPU, with a wait.
                share = larger * (size + 1)  # samples in the larger ghosts, which come first
                degrees = (share * values - larger) / (samples * values - splits)
                first, last = by_ghost[:, :larger].mean(1), by_ghost[:, larger:].mean(1)
                averages = last[0].lerp(first[0], share / samples), last[1].lerp(first[1], degrees)
            mean.lerp_(averages[0], step)
            variance.lerp_(averages[1], step)
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def _check_input_dim(self, input: Tensor) -> None:
        if isinstance(self, _BATCHNORMS):
            super()._check_input_dim(input)
        if input.dim() < 2 or input.shape[1] != self.num_features:
            raise ValueError(f"expected input (N, {self.num_features}, *), got {tuple(input.shape)}")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_splits={self.num_splits}, ghost_size={self.ghost_size}"


class GhostBatchNorm1d(GhostBatchNorm, nn.BatchNorm1d):
    """GhostBatchNorm that is a BatchNorm1d, for (N, C) and (N, C, L)."""


class GhostBatchNorm2d(GhostBatchNorm, nn.BatchNorm2d):
    """GhostBatchNorm that is a BatchNorm2d, for (N, C, H, W)."""


class GhostBatchNorm3d(GhostBatchNorm, nn.BatchNorm3d):
    """GhostBatchNorm that is a BatchNorm3d, for (N, C, D, H, W)."""


def _folded(input: Tensor, ghosts: int, mean: Any, variance: Any, weight: Any, bias: Any, *options: Any) -> Tensor:
    """batch_norm of equal ghosts side by side, as channels; channels_last input becomes rows first, which is faster."""
    last = input.movedim(1, -1)
    rows = last.flatten(0, -2) if last.is_contiguous() and not input.is_contiguous() else input
    parts = rows.unflatten(0, (ghosts, -1)).transpose(0, 1)
    weight, bias = [None if tensor is None else tensor.expand(ghosts, -1).flatten() for tensor in (weight, bias)]
    channels = parts.flatten(1, 2).contiguous()  # torch's gradient is wrong for views with odd strides
    output = F.batch_norm(channels, mean, variance, weight, bias, *options).view(parts.shape).transpose(0, 1)
    return output.flatten(0, 1) if rows is input else output.reshape(last.shape).movedim(-1, 1)


def _batchnorm_class(ghost: type) -> Any:
    """The BatchNorm that the class derives from beside GhostBatchNorm, or BatchNorm2d."""
    others = (kind for kind in ghost.__mro__ if issubclass(kind, _BATCHNORMS) and not issubclass(kind, GhostBatchNorm))
    return next(others, nn.BatchNorm2d)
