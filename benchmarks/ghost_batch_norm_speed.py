"""What GhostBatchNorm costs beside BatchNorm, forward and backward: `python benchmarks/ghost_batch_norm_speed.py`.

Beside them stand the two usual implementations: a loop of BatchNorm over the chunks of the batch, and one batch_norm
with the ghosts as channels; both update running statistics and keep the memory format. One thread, as in training; the
layers take turns in each round, on an idle machine, and processor time is counted. It prints the median time of
BatchNorm, and the median ratios to it over the rounds. The last column compares GhostBatchNorm with the faster of the
two usual ways.
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s6lib.norm import GhostBatchNorm

ROUNDS = 15
SHAPES = ((64, 10, 28, 28), (64, 16, 8, 8))
SPLITS = (2, 4, 8, 16, 32, 64)
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def chunk_loop(channels: int, splits: int) -> Callable[[Tensor], Tensor]:
    norm = nn.BatchNorm2d(channels)
    return lambda images: torch.cat([norm(chunk) for chunk in images.chunk(splits)])


def folded(channels: int, splits: int, layout: torch.memory_format) -> Callable[[Tensor], Tensor]:
    norm = nn.BatchNorm2d(channels)

    def forward(images: Tensor) -> Tensor:
        mean, variance = torch.zeros(splits * channels), torch.zeros(splits * channels)
        parts = images.view(splits, -1, *images.shape[1:]).transpose(0, 1)
        weight, bias = norm.weight.repeat(splits), norm.bias.repeat(splits)
        output = F.batch_norm(parts.flatten(1, 2), mean, variance, weight, bias, True, 1.0, norm.eps)
        norm.running_mean.lerp_(mean.view(splits, channels).mean(0), norm.momentum)
        norm.running_var.lerp_(variance.view(splits, channels).mean(0), norm.momentum)
        return output.view(parts.shape).transpose(0, 1).reshape(images.shape).contiguous(memory_format=layout)

    return forward


def seconds(layer: Callable[[Tensor], Tensor], images: Tensor, gradient: Tensor) -> float:
    steps = max(20, 10**7 // images.numel())
    begun = time.process_time()
    for _ in range(steps):
        images.grad = None
        layer(images).backward(gradient)
    return (time.process_time() - begun) / steps


def saved_for_backward(splits: int, shape: tuple[int, ...]) -> float:
    """Megabytes of the tensors that a forward keeps for its backward, each storage counted once."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        GhostBatchNorm(shape[1], splits)(torch.randn(shape, requires_grad=True))
    return sum(storages.values()) / 1e6


def measure(shape: tuple[int, ...], layout: str, splits: int) -> str:
    images = torch.randn(shape).to(memory_format=FORMATS[layout]).requires_grad_()
    gradient = torch.randn_like(images)
    channels = shape[1]
    layers = [
        nn.BatchNorm2d(channels),
        GhostBatchNorm(channels, splits),
        chunk_loop(channels, splits),
        folded(channels, splits, FORMATS[layout]),
    ]
    rounds = [[seconds(layer, images, gradient) for layer in layers] for _ in range(ROUNDS + 1)][1:]
    ghost, loop, fold = (statistics.median(times[k] / times[0] for times in rounds) for k in (1, 2, 3))
    batch = statistics.median(times[0] for times in rounds) * 1e3
    best = statistics.median(times[1] / min(times[2:]) for times in rounds)
    size = "x".join(map(str, shape))
    return f"| {size}, {layout} | {splits} | {batch:.2f} | {ghost:.2f} | {loop:.2f} | {fold:.2f} | {best:.2f} |"


def main() -> None:
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread; medians over {ROUNDS} rounds\n")
    print("| input | splits | BatchNorm, ms | GhostBatchNorm | loop over chunks | folded | beside the faster |")
    print("|---|---|---|---|---|---|---|")
    for shape in SHAPES:
        for layout in FORMATS:
            for splits in SPLITS:
                print(measure(shape, layout, splits), flush=True)
    kept = ", ".join(f"{saved_for_backward(splits, SHAPES[0]):.2f} MB with {splits}" for splits in (1, 4, 16, 64))
    print(f"\nKept for backward at {'x'.join(map(str, SHAPES[0]))}, by splits: {kept}")


if __name__ == "__main__":
    main()
