# SPDX-License-Identifier: MIT
# Copyright (c) 2026 The s6lib maintainers
"""Ghost Batch Normalization: BatchNorm whose training statistics come from parts of the batch."""

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

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
        self,
        num_features: int,
        num_splits: int | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        ghost_size: int | None = None,
        bias: bool = True,
    ) -> None:
        _check_cut(num_splits, ghost_size)
        options = {} if bias else {"bias": False}  # unknown to torch before 2.13
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **options)
        self.num_splits = num_splits
        self.ghost_size = ghost_size

    @classmethod
    def convert(cls, module: Module, num_splits: int | None = None, *, ghost_size: int | None = None) -> Module:
        """Turn every BatchNorm1d, 2d and 3d in `module`, itself included, into a ghost one, in place; return it.

        The layers stay the same objects, with their parameters, buffers, settings, hooks and parametrizations: an
        optimizer that holds them goes on. Layers that are ghosts already get the new cut. SyncBatchNorm, lazy layers
        and subclasses, which may compute something else, are left alone, and a UserWarning names them. To convert a
        subclass too, call `convert` on a class of your own that derives from GhostBatchNorm and from it. Another
        UserWarning says that there was nothing to convert.
        """
        _check_cut(num_splits, ghost_size)
        ghosts = (GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d)
        classes: dict[type, type] = {_batchnorm_class(ghost): ghost for ghost in ghosts}
        if cls is not GhostBatchNorm:
            classes[_batchnorm_class(cls)] = cls
        found, left = False, []
        for name, layer in module.named_modules():
            if not isinstance(layer, GhostBatchNorm):
                ghost = _counterpart(type(layer), classes)
                if ghost is None:
                    if isinstance(layer, _BatchNorm):
                        left.append(f"{name or 'the module itself'} ({type(layer).__name__})")
                    continue
                layer.__class__ = ghost
            layer.num_splits, layer.ghost_size = num_splits, ghost_size
            found = True
        _warn_of_unconverted(module, found, left)
        return module

    @classmethod
    def revert(cls, module: Module) -> Module:
        """Turn every ghost layer in `module` back, in place, and return it.

        A layer becomes the BatchNorm that `convert` found, or a BatchNorm2d if it was made as a GhostBatchNorm.
        """
        for layer in module.modules():
            if isinstance(layer, cls):
                ghosts = [kind for kind in type(layer).__mro__ if issubclass(kind, GhostBatchNorm)]
                classes = {kind: _batchnorm_class(kind) for kind in ghosts if not kind.__module__.startswith("torch.")}
                batchnorm: Any = _counterpart(type(layer), classes)  # Any: it is no GhostBatchNorm
                layer.__class__ = batchnorm
                for attribute in ("num_splits", "ghost_size"):
                    layer.__dict__.pop(attribute, None)
        return module

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            return self._forward(input)
        # The branch that TorchScript compiles: evaluation, which is BatchNorm's.
        assert not self.training, (
            "TorchScript runs a GhostBatchNorm in evaluation only: call eval() on the scripted module, or "
            "GhostBatchNorm.revert on the model before torch.jit.script"
        )
        mean, variance = self.running_mean, self.running_var
        return F.batch_norm(input, mean, variance, self.weight, self.bias, mean is None, 0.0, self.eps)

    def _forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):  # a symbolic trace, which could not follow the sizes and the mode
            return input.tracer.create_proxy("call_module", input.tracer.path_of_module(self), (input,), {})
        self._check_input_dim(input)
        samples, values = input.shape[0], input.shape[2:].numel()
        num_splits: Any = self.num_splits  # None only where there is a ghost_size
        splits = min(num_splits, samples) if self.ghost_size is None else -(-samples // self.ghost_size)
        if not self.training or splits <= 1:
            return _BatchNorm.forward(self, input)  # not super(): a subclass may add to its BatchNorm's forward
        if values * (samples // splits) == 1:
            cut, advice = f"num_splits = {self.num_splits}", f"at most {samples // 2} splits"
            if self.ghost_size is not None:
                cut, advice = f"ghost_size = {self.ghost_size}", "a ghost_size of 3 or more"
            raise ValueError(
                f"a ghost batch of one value per channel has no variance: N = {samples} with {cut}; use {advice}"
            )
        parts = self._cut(input, splits)
        mean, variance, batches = self.running_mean, self.running_var, self.num_batches_tracked
        if self.track_running_stats and batches is not None:
            batches.add_(1)
        if not self.track_running_stats or mean is None or variance is None:
            return self._normalise(input, parts, [None] * 2 * len(parts), 1.0)
        step: float | Tensor | None
        average: Callable[..., Tensor]
        statistics: Any  # a list of tensors, then one tensor of all
        even, step, momentum, average = samples % splits == 0, self.momentum, 1.0, torch.mean
        if step is None:  # a cumulative average, which stands still without the number of batches, as BatchNorm's
            step = 0.0 if batches is None else batches.to(mean.dtype).reciprocal()
        if mean.dtype.itemsize > 2 and not torch.compiler.is_compiling():
            # From zero, batch_norm comes to `momentum` times a ghost's mean and unbiased variance.
            statistics = [mean.new_zeros(ghosts * self.num_features) for ghosts, _ in parts * 2]
            if even:
                momentum, average = 1 / splits, torch.sum
        else:
            # From the running statistics, each ghost takes the step itself: in half precision its variance alone could
            # overflow; and a graph exported in training, then switched to evaluation, must read BatchNorm's here.
            statistics = [tensor.repeat(ghosts) for tensor in (mean, variance) for ghosts, _ in parts]
            if self.momentum is not None:
                momentum, step = self.momentum, None
        output = self._normalise(input, parts, statistics, momentum)
        statistics = torch.cat(statistics).view(2, splits, -1)
        averages = average(statistics, 1).unbind() if even else _uneven_average(statistics, samples, values)
        if step is None:  # taken
            mean.copy_(averages[0])
            variance.copy_(averages[1])
        else:
            mean.lerp_(averages[0], step)
            variance.lerp_(averages[1], step)
        return output

    def _cut(self, input: Tensor, splits: int) -> list[tuple[int, int]]:
        """The parts of the batch that one batch_norm each normalises: their numbers of ghosts and of samples."""
        samples = input.shape[0]
        # More than 4 small ghosts cost less as the channels of one batch_norm, though this copies the batch. The limits
        # are measured by benchmarks/ghost_batch_norm_speed.py; up to 4 splits, the digits of published runs stay.
        folded = splits > 4 and (input.numel() <= splits * 2**13 or _is_channels_last(input))
        # torch.compile would make a graph for each number of ghosts, and below for each remainder if N had a branch.
        if folded or (self.ghost_size is not None and torch.compiler.is_compiling()):
            size, larger = samples // splits, samples % splits
            last = (splits - larger, (splits - larger) * size)
            return [(larger, larger * (size + 1)), last] if larger else [last]
        return [(1, (samples + ghost) // splits) for ghost in reversed(range(splits))]

    def _normalise(self, input: Tensor, parts: list[tuple[int, int]], statistics: list, momentum: float) -> Tensor:
        """Call batch_norm for each of `parts`, to update its part of `statistics`: all means, then all variances."""
        weight, bias, outputs = self.weight, self.bias, []
        for index, part in enumerate(input.split_with_sizes([samples for _, samples in parts])):
            mean, variance = statistics[index :: len(parts)]
            ghosts = parts[index][0]
            if ghosts == 1:
                outputs.append(F.batch_norm(part, mean, variance, weight, bias, True, momentum, self.eps))
                continue
            folded = _fold(part, ghosts)
            affine = [None if tensor is None else tensor.expand(ghosts, -1).flatten() for tensor in (weight, bias)]
            output = F.batch_norm(folded.flatten(1, 2), mean, variance, affine[0], affine[1], True, momentum, self.eps)
            outputs.append(_unfold(output.view(folded.shape), part))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _check_input_dim(self, input: Tensor) -> None:
        if isinstance(self, _BATCHNORMS):
            super()._check_input_dim(input)
        if input.dim() < 2 or input.shape[1] != self.num_features:
            raise ValueError(f"expected input (N, {self.num_features}, *), got {tuple(input.shape)}")

    def extra_repr(self) -> str:
        cut = f"num_splits={self.num_splits}" if self.ghost_size is None else f"ghost_size={self.ghost_size}"
        return f"{self.num_features}, {cut}, {super().extra_repr().partition(', ')[2]}"


class GhostBatchNorm1d(GhostBatchNorm, nn.BatchNorm1d):
    """GhostBatchNorm that is a BatchNorm1d, for (N, C) and (N, C, L)."""


class GhostBatchNorm2d(GhostBatchNorm, nn.BatchNorm2d):
    """GhostBatchNorm that is a BatchNorm2d, for (N, C, H, W)."""


class GhostBatchNorm3d(GhostBatchNorm, nn.BatchNorm3d):
    """GhostBatchNorm that is a BatchNorm3d, for (N, C, D, H, W)."""


def _is_channels_last(input: Tensor) -> bool:
    return not input.is_contiguous() and input.movedim(1, -1).is_contiguous()


def _fold(input: Tensor, ghosts: int) -> Tensor:
    """Put ghost batches of one size side by side: (samples of a ghost, ghosts, C, *)."""
    if _is_channels_last(input):
        input = input.movedim(1, -1).flatten(0, -2)  # a row per value: batch_norm is fastest along C
    return input.unflatten(0, (ghosts, -1)).transpose(0, 1)


def _unfold(folded: Tensor, input: Tensor) -> Tensor:
    """Undo `_fold` of `input`."""
    output = folded.transpose(0, 1).flatten(0, 1)
    return output.view(input.movedim(1, -1).shape).movedim(-1, 1) if _is_channels_last(input) else output


def _uneven_average(statistics: Tensor, samples: int, values: int) -> tuple[Tensor, Tensor]:
    """Weight the ghosts' means by n and their unbiased variances by n - 1, together (2, splits, C).

    The weights are Python's numbers: as a tensor they would be copied to a GPU, and the CPU would wait for it.
    """
    splits = statistics.shape[1]
    larger = samples % splits
    first, last = statistics[:, :larger].mean(1), statistics[:, larger:].mean(1)
    share = larger * (samples // splits + 1)  # samples in the larger ghosts, which come first
    degrees = (share * values - larger) / (samples * values - splits)
    return last[0].lerp(first[0], share / samples), last[1].lerp(first[1], degrees)


def _check_cut(num_splits: int | None, ghost_size: int | None) -> None:
    if num_splits is not None and ghost_size is not None:
        raise ValueError(f"give num_splits or ghost_size, not both: {num_splits!r} and {ghost_size!r}")
    name, number = ("num_splits", num_splits) if ghost_size is None else ("ghost_size", ghost_size)
    if type(number) is not int or number < 1:
        alternative = "; or give a ghost_size" if number is None else ""
        raise ValueError(f"{name} must be a whole number from 1, not {number!r}{alternative}")


def _batchnorm_class(ghost: type[nn.Module]) -> type[nn.Module]:
    """The BatchNorm that the class derives from beside GhostBatchNorm, or BatchNorm2d."""
    others = (kind for kind in ghost.__mro__ if issubclass(kind, _BATCHNORMS) and not issubclass(kind, GhostBatchNorm))
    return next(others, nn.BatchNorm2d)


def _counterpart(kind: type, classes: dict[type, type]) -> type | None:
    """The class that `classes` gives for `kind`; for what torch derives from one at run time, its like.

    torch makes classes for parametrized and FSDP modules: their likes differ from them in the base alone.
    """
    if kind in classes or not kind.__module__.startswith("torch."):
        return classes.get(kind)
    found = {base: _counterpart(base, classes) for base in kind.__bases__}
    if not any(found.values()):
        return None
    name = kind.__name__
    for base, other in found.items():
        name = name.replace(base.__name__, other.__name__) if other else name
    members = {key: value for key, value in vars(kind).items() if key not in ("__dict__", "__weakref__")}
    return type(name, tuple(other or base for base, other in found.items()), members)


def _warn_of_unconverted(module: nn.Module, found: bool, left: list[str]) -> None:
    if left:
        message = (
            f"left without ghost batches: {', '.join(left)}; convert takes nn.BatchNorm1d, 2d and 3d themselves, not "
            "what derives from them: replace these layers by such, let lazy ones see a batch before you convert, or "
            "call convert on a class that derives from GhostBatchNorm and from theirs"
        )
    elif not found:
        message = (
            f"nothing to convert: {type(module).__name__} holds no nn.BatchNorm1d, 2d or 3d; pass a model that does"
        )
    else:
        return
    warnings.warn(message, UserWarning, stacklevel=3)
