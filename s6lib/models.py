"""PlainNet and BottleneckNet, the smaller SeparableNet, and a dropout whose mask is cheap on a CPU."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from s6lib.errors import SettingError


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` with a mask that costs a CPU one random draw for each dropped element, not for each element.

    The gaps between the successes of independent Bernoulli trials are geometric (Devroye 1986, section X.2), so
    drawing the gaps draws the mask. On other devices this is torch's dropout, which is cheap there.
    """

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):  # a symbolic trace cannot follow the mode: make one node, as torch does
            return input.tracer.create_proxy("call_module", input.tracer.path_of_module(self), (input,), {})
        if not self.training or not 0 < self.p < 1 or input.device.type != "cpu":
            return super().forward(input)
        count = input.numel()
        # Draw ten standard deviations more than the expected number of gaps, enough to pass the last element.
        draws = int(count * self.p + 10 * (count * self.p) ** 0.5 + 10)
        dropped = torch.empty(draws, dtype=torch.int64).geometric_(self.p).cumsum(0).sub_(1)
        dropped = dropped[: int(torch.searchsorted(dropped, count))]
        mask = torch.full_like(input, 1 / (1 - self.p), requires_grad=False)
        mask.as_strided((count,), (1,)).index_fill_(0, dropped, 0)
        return input * mask


def _conv(channels_in: int, channels_out: int, kernel: int = 3, padding: int = 0, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, kernel, padding=padding, groups=groups, bias=False)


class PlainNet(nn.Module):
    """Seven 3x3 convolutions and a 1x1 on MNIST: (N, 1, 28, 28) to logits (N, 10), 9,646 parameters at width 10.

    Args:
        norm: makes the normalisation layer for a number of channels.
        dropout: probability after each block but the last.
        norm_first: whether the normalisation stands before the ReLU.
        width: channels of the first layers, from 1; the others have 1.2 and 1.6 times as many, rounded.
    """

    memory_format = torch.channels_last  # halves the time of convolutions of this size on a CPU

    def __init__(
        self,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        dropout: float = 0.04,
        norm_first: bool = False,
        width: int = 10,
    ) -> None:
        super().__init__()
        if type(width) is not int or width < 1:
            raise SettingError(f"width must be a whole number from 1, not {width!r}")
        middle, last = round(1.2 * width), round(1.6 * width)

        def block(channels_in: int, channels_out: int, padding: int = 0) -> list[nn.Module]:
            relu = nn.ReLU(inplace=True)  # its input is not needed again; this halves the memory traffic
            pair = [norm(channels_out), relu] if norm_first else [relu, norm(channels_out)]
            return [_conv(channels_in, channels_out, padding=padding), *pair, Dropout(dropout)]

        self.layers = nn.Sequential(
            *block(1, width, padding=1),
            *block(width, width, padding=1),
            nn.MaxPool2d(2),
            *block(width, width),
            *block(width, middle),
            *block(middle, last),
            *block(last, last),
            *block(last, last)[:-1],
            nn.AvgPool2d(4),
            _conv(last, 10, kernel=1),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).flatten(1)


class BottleneckNet(nn.Module):
    """3x3 convolutions with 1x1 bottlenecks on MNIST: (N, 1, 28, 28) to logits (N, 10), 8,546 parameters.

    BatchNorm stands before ReLU where a 1x1 convolution changes the width, and after it elsewhere.

    Args:
        norm: makes the normalisation layer for a number of channels.
    """

    memory_format = torch.channels_last  # halves the time of convolutions of this size on a CPU

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()

        def relu_norm(channels_in: int, channels_out: int, kernel: int = 3) -> list[nn.Module]:
            return [_conv(channels_in, channels_out, kernel), nn.ReLU(inplace=True), norm(channels_out)]

        def norm_relu(channels_in: int, channels_out: int) -> list[nn.Module]:
            return [_conv(channels_in, channels_out, kernel=1), norm(channels_out), nn.ReLU(inplace=True)]

        self.layers = nn.Sequential(
            *relu_norm(1, 10),
            *relu_norm(10, 16),
            *norm_relu(16, 10),
            nn.MaxPool2d(2),
            *relu_norm(10, 10),
            *norm_relu(10, 32),
            *relu_norm(32, 10, kernel=1),
            *relu_norm(10, 10),
            *norm_relu(10, 32),
            *relu_norm(32, 10, kernel=1),
            *relu_norm(10, 14),
            *relu_norm(14, 16),
            nn.AvgPool2d(4),
            _conv(16, 10, kernel=1),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).flatten(1)


class SeparableNet(nn.Module):
    """Four depthwise-separable convolutions on MNIST: (N, 1, 28, 28) to logits (N, 10).

    It has 4 width^2 + 65 width parameters. Each block is unpadded and adds its output to its cropped input (residual
    connections: arXiv:1512.03385; separable convolutions: arXiv:1610.02357; SiLU: arXiv:1702.03118).

    Args:
        width: channels of every layer: 14 makes 1,694 parameters, 18 2,466, 24 3,864, 32 6,176, 42 9,786.
        norm: makes the normalisation layer for a number of channels.
    """

    memory_format = torch.channels_last  # halves the time of convolutions of this size on a CPU

    def __init__(self, width: int = 18, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.first = nn.Sequential(_conv(1, width, padding=1), nn.MaxPool2d(2), norm(width), nn.SiLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(_conv(width, width, groups=width), _conv(width, width, kernel=1), norm(width))
            for _ in range(4)
        )
        self.last = nn.Sequential(nn.AvgPool2d(6), _conv(width, 10, kernel=1))

    def forward(self, images: Tensor) -> Tensor:
        features = self.first(images)
        for block in self.blocks:
            # Crop by a negative pad: the gradient of a slice would leave the memory format, which is slow.
            features = F.silu(block(features) + F.pad(features, (-1, -1, -1, -1)))
        return self.last(features).flatten(1)


NETWORKS = {network.__name__: network for network in (PlainNet, BottleneckNet, SeparableNet)}  # by the name in run.json
