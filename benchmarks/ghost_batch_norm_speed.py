"""What GhostBatchNorm costs compared with BatchNorm, forward and backward: run this file.

The two usual implementations are measured too: a loop of BatchNorm over the chunks of the batch, and one batch_norm
with the ghosts as channels. Both update running statistics and keep the memory format. One thread, as in training. The
layers take turns in each round, and the least processor time of each counts, so other work on the machine disturbs
little. The shapes are those of networks that people use, then two of PlainNet's size; the last number of splits leaves
one sample a ghost. It prints the tables of docs/ghost_batch_norm.md and docs/speed.md.
"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s6lib.norm import GhostBatchNorm

ROUNDS = 12
SHAPES = ((256, 64, 32, 32), (512, 32, 8, 8), (1024, 16, 7, 7), (64, 16, 28, 28), (64, 10, 28, 28), (64, 16, 8, 8))
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
    steps = max(1, 2 * 10**6 // images.numel())
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


def measure(shape: tuple[int, ...], layout: str, splits: int) -> list[float]:
    """Seconds of BatchNorm, GhostBatchNorm, the loop and the fold."""
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
    return [min(times) for times in zip(*rounds, strict=True)]


def main() -> None:
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread; the least of {ROUNDS} rounds\n")
    print("| input | splits | BatchNorm, ms | GhostBatchNorm | loop over chunks | ghosts as channels | to the faster |")
    print("|---|---|---|---|---|---|---|")
    summary = []
    for shape in SHAPES:
        for layout in FORMATS:
            size, worst = f"{'x'.join(map(str, shape))}, {layout}", []
            for splits in sorted({*SPLITS, shape[0]}):
                batch, *others = measure(shape, layout, splits)
                ghost, loop, fold = (one / batch for one in others)
                worst.append(ghost / min(loop, fold))
                numbers = " | ".join(f"{one:.2f}" for one in (batch * 1e3, ghost, loop, fold, worst[-1]))
                print(f"| {size} | {splits} | {numbers} |", flush=True)
            summary.append(f"| {size} | {min(worst):.2f} to {max(worst):.2f} |")
    print("\nFor docs/speed.md:\n\n| input | GhostBatchNorm compared with the faster |\n|---|---|")
    print("\n".join(summary))
    kept = ", ".join(f"{saved_for_backward(splits, SHAPES[-2]):.2f} MB with {splits}" for splits in (1, 4, 16, 64))
    print(f"\nKept for backward at {'x'.join(map(str, SHAPES[-2]))}, by splits: {kept}")


if __name__ == "__main__":
    main()
