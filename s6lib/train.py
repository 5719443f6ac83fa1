"""One step, one epoch of training, one evaluation, and the two penalties."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s6lib.data import Digits, normalise


class NonFiniteLoss(RuntimeError):
    """The loss became infinite or NaN; `step` counts from 1 within the epoch."""

    def __init__(self, step: int) -> None:
        super().__init__(f"the loss is not finite at step {step}")
        self.step = step


class Learner(NamedTuple):
    """The model, its optimizer, and the loss and penalty that a training step minimises.

    loss: from logits and targets, a scalar.
    penalty: from the model, a scalar that is added to the loss.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    penalty: Callable[[nn.Module], Tensor | float] = lambda model: 0.0


class Step(NamedTuple):
    """The values that a training step computed before it changed the weights: logits (B, C), and two scalars."""

    logits: Tensor
    loss: Tensor
    penalty: Tensor


class Sums(NamedTuple):
    """The sums over the steps of an epoch, on the device and updated in place.

    metrics: float32 (3,), cross-entropy, hits and penalty, each summed over the images.
    finite_steps: int64 (), the number of steps before the metrics became infinite or NaN.
    """

    metrics: Tensor
    finite_steps: Tensor


class Training(NamedTuple):
    """Means over the images of an epoch: cross-entropy, accuracy (0 to 1), and the penalty added to the loss."""

    loss: float
    accuracy: float
    penalty: float


class Evaluation(NamedTuple):
    """Mean cross-entropy, accuracy (0 to 1), and the class of each image, uint8 (N,), on the CPU."""

    loss: float
    accuracy: float
    predictions: Tensor


def l1_l2_penalty(model: nn.Module, l1: float, l2: float) -> Tensor | float:
    """Compute `l1` * sum |w| + `l2` * sum w^2 over all trainable parameters: a differentiable scalar.

    The parameters are concatenated once, so that the backward pass adds both gradients in one operation.
    """
    penalty: Tensor | float = 0.0
    if l1 or l2:
        weights = torch.cat([weights.flatten() for weights in model.parameters() if weights.requires_grad])
    if l1:
        penalty = penalty + l1 * weights.abs().sum()
    if l2:
        penalty = penalty + l2 * weights.square().sum()
    return penalty


def train_step(learner: Learner, images: Tensor, targets: Tensor) -> Step:
    """Take one step of training on a batch: images (B, 1, H, H), and targets as the loss takes them."""
    logits = learner.model(images)
    loss = learner.loss(logits, targets)
    # Keep the penalty after the logits: autograd sums gradients from last to first, and the last bits are settled.
    penalty = torch.zeros_like(loss) + learner.penalty(learner.model)
    learner.optimizer.zero_grad()
    (loss + penalty).backward()
    learner.optimizer.step()
    return Step(logits.detach(), loss.detach(), penalty.detach())


def add_step(learner: Learner, sums: Sums, images: Tensor, targets: Tensor) -> None:
    """Take a step of training, and add its metrics to `sums`."""
    logits, loss, penalty = train_step(learner, images, targets)
    with torch.no_grad():
        if learner.loss is not F.cross_entropy:
            loss = F.cross_entropy(logits, targets)
        labels = targets.argmax(1) if targets.is_floating_point() else targets
        hits = (logits.argmax(1) == labels).float().sum()
        sums.metrics.add_(torch.stack([loss * len(targets), hits, penalty * len(targets)]))
        sums.finite_steps.add_(sums.metrics.isfinite().all())  # a sum once infinite or NaN stays so


def train_epoch(
    learner: Learner,
    batches: Iterable[tuple[Tensor, Tensor]],
    step: Callable[[Learner, Sums, Tensor, Tensor], None] = add_step,
) -> Training:
    """Train once over `batches`, pairs of images (B, 1, H, H) and targets: labels (B,) or probabilities (B, C).

    The metrics are those of the training pass itself, with dropout and augmentation: cross-entropy, whatever the loss,
    and how often the most probable class is the target's. They are summed on the device and read once, since reading
    them at each step would make a GPU wait. For the same reason, NonFiniteLoss is raised at the end of the epoch.

    `step` takes each step: `add_step`, or a faster equivalent.
    """
    learner.model.train()
    device = next(learner.model.parameters()).device
    # Sum in place: keeping a small tensor from each step would fragment the memory that steps reuse.
    sums = Sums(torch.zeros(3, device=device), torch.zeros((), dtype=torch.int64, device=device))
    count = steps = 0
    for images, targets in batches:
        step(learner, sums, images, targets)
        count += len(targets)
        steps += 1
    if sums.finite_steps < steps:
        raise NonFiniteLoss(step=int(sums.finite_steps) + 1)
    return Training(*(sums.metrics.cpu().double() / count).tolist())


def memory_format(model: nn.Module) -> torch.memory_format:
    """Return the memory format for training: the model's `memory_format` on a CPU, contiguous elsewhere.

    In float32, channels_last speeds up no GPU before Ampere, and makes the penalties' `flatten` copy. On MPS, it has
    given BatchNorm wrong gradients (pytorch issue 175189).
    """
    weights = next(model.parameters(), None)
    if weights is not None and weights.device.type != "cpu":
        return torch.contiguous_format
    return getattr(model, "memory_format", torch.contiguous_format)


@torch.inference_mode()
def predict_logits(model: nn.Module, digits: Digits, batch_size: int = 250) -> Tensor:
    """Compute the logits, float32 (N, C), of the images of `digits` in evaluation mode, without augmentation."""
    model.eval()
    parts = (normalise(part, digits.mean, digits.std) for part in digits.images.split(batch_size))
    if memory_format(model) == torch.channels_last:
        # With one channel, only the strides tell the memory format, and `to` would not change them.
        parts = (part.squeeze(1).unsqueeze(3).movedim(3, 1) for part in parts)
    return torch.cat([model(part) for part in parts])


def evaluate(model: nn.Module, digits: Digits) -> Evaluation:
    """Compute the loss, accuracy and predictions of a model on all of `digits`."""
    logits = predict_logits(model, digits)
    predictions = logits.argmax(1)
    accuracy = int((predictions == digits.labels).sum()) / len(digits.labels)
    return Evaluation(float(F.cross_entropy(logits, digits.labels)), accuracy, predictions.to("cpu", torch.uint8))
