"""What GhostBatchNorm costs beside BatchNorm, forward and backward: `python benchmarks/ghost_batch_norm_speed.py`.

Beside them stands the usual implementation, a loop of BatchNorm over the chunks of the batch that updates the running
statistics at each. One thread, as in training; the layers take turns in each round, on an idle machine. It prints the
median time of BatchNorm, and the ratios to it with their lowest and highest over the rounds.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from s6lib.norm import GhostBatchNorm

ROUNDS = 15
SHAPES = ((64, 10, 28, 28), (64, 16, 8, 8))
SPLITS = 4


def chunk_loop(norm: nn.BatchNorm2d) -> Callable[[Tensor], Tensor]:
    return lambda images: torch.cat([norm(chunk) for chunk in images.chunk(SPLITS)])


def seconds(layer: Callable[[Tensor], Tensor], images: Tensor, gradient: Tensor) -> float:
    steps = max(20, 10**7 // images.numel())
    begun = time.perf_counter()
    for _ in range(steps):
        images.grad = None
        layer(images).backward(gradient)
    return (time.perf_counter() - begun) / steps


def saved_for_backward(splits: int, shape: tuple[int, ...]) -> float:
    """Megabytes of the tensors that a forward keeps for its backward, each storage counted once."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        GhostBatchNorm(shape[1], splits)(torch.randn(shape, requires_grad=True))
    return sum(storages.values()) / 1e6


def main() -> None:
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, {SPLITS} splits, channels_last; medians over {ROUNDS} rounds\n")
    print("| input | BatchNorm, ms | GhostBatchNorm | loop over chunks |\n|---|---|---|---|")
    for shape in SHAPES:
        images = torch.randn(shape).to(memory_format=torch.channels_last).requires_grad_()
        gradient = torch.randn_like(images)
        channels = shape[1]
        layers = [nn.BatchNorm2d(channels), GhostBatchNorm(channels, SPLITS), chunk_loop(nn.BatchNorm2d(channels))]
        rounds = [[seconds(layer, images, gradient) for layer in layers] for _ in range(ROUNDS + 1)][1:]
        ratios = [[times[k] / times[0] for times in rounds] for k in (1, 2)]
        cells = [f"{statistics.median(r):.2f} ({min(r):.2f} to {max(r):.2f})" for r in ratios]
        batch = statistics.median(times[0] for times in rounds) * 1e3
        print(f"| {'x'.join(map(str, shape))} | {batch:.3f} | {' | '.join(cells)} |")
    kept = ", ".join(f"{saved_for_backward(splits, SHAPES[0]):.2f} MB with {splits}" for splits in (1, 4, 16, 64))
    print(f"\nKept for backward at {'x'.join(map(str, SHAPES[0]))}, by splits: {kept}")


if __name__ == "__main__":
    main()
