"""Ghost Batch Normalization: BatchNorm whose training statistics come from parts of the batch."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm


class GhostBatchNorm(_BatchNorm):
    """BatchNorm that, in training, normalises each of `num_splits` ghost batches by its own statistics.

    Input and output are (N, C, *): any shape with channels at dimension 1. In training the N samples are cut into
    `num_splits` contiguous ghost batches whose sizes differ by at most one (as `torch.tensor_split`; with fewer
    samples than splits, one sample each), and each is normalised by its own mean and biased variance. The running
    mean and variance take one momentum step a forward, toward the ghosts' means and unbiased variances averaged with
    the weights n and n - 1, where n is a ghost's number of values a channel. In evaluation, and with one split, it is
    BatchNorm; parameters and buffers are BatchNorm's own, so a state_dict moves between the two in both directions.

    Args:
        num_features: C.
        num_splits: ghost batches a batch, at least 1.
        eps, momentum, affine, track_running_stats, device, dtype: as in `torch.nn.BatchNorm2d`.

    Raises ValueError for a `num_splits` that is not a whole number from 1, for an input whose dimension 1 is not C,
    and in training for a ghost batch of one value a channel, whose variance is not defined.

    Source: Hoffer, Hubara, Soudry, "Train longer, generalize better", arXiv:1705.08741, section 4 and algorithm 1;
    the running statistics are updated once a forward rather than once a ghost, so that `momentum` means the same for
    any number of splits.
    """

    def __init__(
        self,
        num_features: int,
        num_splits: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        if isinstance(num_splits, bool) or not isinstance(num_splits, int) or num_splits < 1:
            raise ValueError(f"num_splits must be a whole number from 1, not {num_splits!r}")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.num_splits = num_splits

    def forward(self, input: Tensor) -> Tensor:
        splits = min(self.num_splits, input.shape[0])
        if not self.training or splits <= 1:
            return super().forward(input)
        self._check_input_dim(input)
        sizes = [input.shape[0] // splits + (ghost < input.shape[0] % splits) for ghost in range(splits)]
        values = input[0, 0].numel()
        if values * sizes[-1] == 1:
            raise ValueError(
                f"a ghost batch of one value a channel has no variance: N = {input.shape[0]} with num_splits = "
                f"{self.num_splits}; use at most N // 2 splits"
            )
        # A momentum of 1 makes batch_norm leave a ghost's mean and unbiased variance in the buffers it is given.
        statistics = torch.zeros(2, splits, self.num_features, device=input.device, dtype=self._statistics_dtype())
        ghosts = [
            F.batch_norm(ghost, mean, variance, self.weight, self.bias, True, 1.0, self.eps)
            for ghost, mean, variance in zip(input.split(sizes), *statistics, strict=True)
        ]
        if self.track_running_stats:
            self._update_running_statistics(statistics, [size * values for size in sizes])
        return torch.cat(ghosts)

    @torch.no_grad()
    def _update_running_statistics(self, statistics: Tensor, counts: list[int]) -> None:
        degrees = [count - 1 for count in counts]
        weights = statistics.new_tensor([[n / sum(counts) for n in counts], [n / sum(degrees) for n in degrees]])
        mean, variance = (statistics * weights.unsqueeze(2)).sum(1)
        self.num_batches_tracked.add_(1)
        step = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, step)
        self.running_var.lerp_(variance, step)

    def _statistics_dtype(self) -> torch.dtype:
        like = self.running_mean if self.track_running_stats else self.weight
        return torch.float32 if like is None else like.dtype

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2 or input.shape[1] != self.num_features:
            raise ValueError(f"expected input (N, {self.num_features}, *), got {tuple(input.shape)}")

    def extra_repr(self) -> str:
        return f"{self.num_features}, num_splits={self.num_splits}, {super().extra_repr().partition(', ')[2]}"
