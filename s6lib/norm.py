"""Ghost Batch Normalization: BatchNorm whose training statistics come from parts of the batch."""

import warnings
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

Module = TypeVar("Module", bound=nn.Module)

_CONVERTIBLE = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class GhostBatchNorm(_BatchNorm):
    """BatchNorm that, in training, normalises each of `num_splits` ghost batches by its own statistics.

    Input and output are (N, C, *): any shape with channels at dimension 1. In training the N samples are cut into
    `num_splits` contiguous ghost batches whose sizes differ by at most one (as `torch.tensor_split`; with fewer
    samples than splits, one sample each), and each is normalised by its own mean and biased variance.

    The running mean and variance take one momentum step a forward, toward the ghosts' means and unbiased variances
    averaged with the weights n and n - 1, where n is a ghost's number of values a channel. Other implementations take
    a step a ghost, one after the other, so that the last ghosts count most and the momentum of a forward becomes
    1 - (1 - momentum)^num_splits: 0.34 with 4 splits, 0.82 with 16. Here it is `momentum` for any number of splits.

    In evaluation, and with one split, it is BatchNorm. Parameters and buffers are BatchNorm's own, so a state_dict
    moves strictly between BatchNorm and GhostBatchNorm, with any number of splits, in both directions.

    torch.fx sees one node in it, as in torch's own layers, that goes on to follow `train` and `eval`.

    In distributed training each process cuts its own part of the batch, and nothing is to be synchronised. Keep ghost
    layers from `torch.nn.SyncBatchNorm.convert_sync_batchnorm`: it replaces every kind of BatchNorm, and without a
    word leaves layers that have no ghosts.

    When it helps, by the literature: large batches cut into ghosts of 16 to 32 get back the generalization of small
    ones (arXiv:1705.08741); at small and medium batch sizes it regularises, worth 0 to 1 point of accuracy
    (arXiv:1906.03548); what helps is the noise, while small ghosts also part training from evaluation, so that noise
    injected alone can do better (arXiv:2305.17205).

    Args:
        num_features: C.
        num_splits: ghost batches a batch, at least 1.
        eps, momentum, affine, track_running_stats, device, dtype: as in `torch.nn.BatchNorm2d`.

    Raises ValueError for a `num_splits` that is not a whole number from 1, for an input whose dimension 1 is not C,
    and in training for a ghost batch of one value a channel, which has no variance.

    Source: Hoffer, Hubara, Soudry, "Train longer, generalize better", arXiv:1705.08741, section 4 and algorithm 1.
    """

    _revert_to: type[nn.Module] = nn.BatchNorm2d  # what `convert` found, so that `revert` can restore it

    def __init__(
        self,
        num_features: int,
        num_splits: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_num_splits(num_splits)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.num_splits = num_splits

    @classmethod
    def convert(cls, module: Module, num_splits: int) -> Module:
        """Turn every BatchNorm1d, 2d and 3d in `module`, itself included, into a ghost one, in place; return it.

        The layers stay the same objects, with their parameters, buffers, settings and hooks: an optimizer that holds
        them goes on. Layers that are ghosts already get the new number of splits. SyncBatchNorm, lazy layers and
        subclasses, which may compute otherwise, are left alone; a UserWarning names them. Another says that there was
        nothing to convert.
        """
        _check_num_splits(num_splits)
        found, left = False, []
        for name, layer in module.named_modules():
            if type(layer) in _CONVERTIBLE:
                layer._revert_to = type(layer)
                layer.__class__ = cls
            if isinstance(layer, cls):
                layer.num_splits = num_splits
                found = True
            elif isinstance(layer, _BatchNorm):
                left.append(f"{name or 'the module itself'} ({type(layer).__name__})")
        _warn_of_unconverted(module, found, left)
        return module

    @classmethod
    def revert(cls, module: Module) -> Module:
        """Turn every ghost layer in `module` back, in place, and return it.

        A layer becomes the class that `convert` found, or BatchNorm2d if it was made as a GhostBatchNorm.
        """
        for layer in module.modules():
            if isinstance(layer, cls):
                layer.__class__ = layer._revert_to
                for attribute in ("num_splits", "_revert_to"):
                    layer.__dict__.pop(attribute, None)
        return module

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):  # a symbolic trace, which could not follow the sizes and the mode
            return input.tracer.create_proxy("call_module", input.tracer.path_of_module(self), (input,), {})
        self._check_input_dim(input)
        samples = input.shape[0]
        splits = min(self.num_splits, samples)
        if not self.training or splits <= 1:
            return super().forward(input)
        sizes = [samples // splits + (ghost < samples % splits) for ghost in range(splits)]
        values = input.shape[2:].numel()
        if values * sizes[-1] == 1:
            raise ValueError(
                f"a ghost batch of one value a channel has no variance: N = {samples} with num_splits = "
                f"{self.num_splits}; use at most {samples // 2} splits, or larger batches"
            )
        if not self.track_running_stats:
            return torch.cat([self._normalise(ghost) for ghost in input.split(sizes)])
        # A momentum of 1 makes batch_norm leave a ghost's mean and unbiased variance in the buffers it is given.
        statistics = torch.zeros(2, splits, self.num_features, device=input.device, dtype=self.running_mean.dtype)
        ghosts = [
            self._normalise(ghost, mean, variance)
            for ghost, mean, variance in zip(input.split(sizes), *statistics, strict=True)
        ]
        self._update_running_statistics(statistics, [size * values for size in sizes])
        return torch.cat(ghosts)

    def _normalise(self, ghost: Tensor, mean: Tensor | None = None, variance: Tensor | None = None) -> Tensor:
        return F.batch_norm(ghost, mean, variance, self.weight, self.bias, True, 1.0, self.eps)

    @torch.no_grad()
    def _update_running_statistics(self, statistics: Tensor, counts: list[int]) -> None:
        """One momentum step toward the ghosts' means and unbiased variances, together (2, splits, C)."""
        degrees = [count - 1 for count in counts]
        # The weights are Python's numbers: as a tensor they would be copied to a GPU, and the CPU would wait for it.
        if counts[0] == counts[-1]:
            weighted = statistics * (1 / len(counts))
        else:
            weighted = statistics.clone()  # backward refuses `statistics` once changed in place
            larger = counts.count(counts[0])  # sizes differ by one at most, and the larger come first
            for ghosts, numbers in zip(weighted, (counts, degrees), strict=True):
                ghosts[:larger].mul_(numbers[0] / sum(numbers))
                ghosts[larger:].mul_(numbers[-1] / sum(numbers))
        mean, variance = weighted.sum(1)
        self.num_batches_tracked.add_(1)
        step = self.momentum
        if step is None:  # a cumulative average
            step = self.num_batches_tracked.to(mean.dtype).reciprocal()
        self.running_mean.lerp_(mean, step)
        self.running_var.lerp_(variance, step)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2 or input.shape[1] != self.num_features:
            raise ValueError(f"expected input (N, {self.num_features}, *), got {tuple(input.shape)}")

    def extra_repr(self) -> str:
        return f"{self.num_features}, num_splits={self.num_splits}, {super().extra_repr().partition(', ')[2]}"


def _check_num_splits(num_splits: int) -> None:
    if type(num_splits) is not int or num_splits < 1:
        raise ValueError(f"num_splits must be a whole number from 1, not {num_splits!r}")


def _warn_of_unconverted(module: nn.Module, found: bool, left: list[str]) -> None:
    if left:
        message = (
            f"left without ghost batches: {', '.join(left)}; convert takes nn.BatchNorm1d, 2d and 3d themselves, not "
            "what derives from them: replace these layers by such, and let lazy ones see a batch, before you convert"
        )
    elif not found:
        message = (
            f"nothing to convert: {type(module).__name__} holds no nn.BatchNorm1d, 2d or 3d; pass a model that does"
        )
    else:
        return
    warnings.warn(message, UserWarning, stacklevel=3)
