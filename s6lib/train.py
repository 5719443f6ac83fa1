"""One epoch of training, one evaluation, and the two penalties."""

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
    """`l1` times the sum of |w| plus `l2` times that of w^2, over all trainable parameters: a differentiable scalar.

    The parameters are strung together once, so that the backward pass adds up the two gradients of all of them at once.
    """
    penalty: Tensor | float = 0.0
    if l1 or l2:
        weights = torch.cat([weights.flatten() for weights in model.parameters() if weights.requires_grad])
    if l1:
        penalty = penalty + l1 * weights.abs().sum()
    if l2:
        penalty = penalty + l2 * weights.square().sum()
    return penalty


def train_epoch(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    penalty_of: Callable[[nn.Module], Tensor | float] = lambda model: 0.0,
) -> Training:
    """Train once over `batches`, pairs of images (B, 1, 28, 28) and labels (B,), on cross-entropy plus a penalty.

    The metrics are those of the training pass itself, dropout and augmentation on. They are summed on the device and
    read once, since reading them at each step would make a GPU wait; so NonFiniteLoss too comes when the epoch ends.
    """
    model.train()
    device = next(model.parameters()).device
    # One tensor, added to in place: a small one kept from each step would scatter over the memory that steps reuse.
    sums = torch.zeros(3, device=device)
    finite_steps = torch.zeros((), dtype=torch.int64, device=device)
    count = steps = 0
    for images, labels in batches:
        logits = model(images)
        loss = F.cross_entropy(logits, labels)
        # After the logits: autograd adds gradients up from the last to the first, and the last bits are settled.
        penalty = torch.zeros_like(loss) + penalty_of(model)
        optimizer.zero_grad()
        (loss + penalty).backward()
        optimizer.step()
        with torch.no_grad():
            hits = (logits.argmax(1) == labels).float().sum()
            sums += torch.stack([loss * len(labels), hits, penalty * len(labels)])
            finite_steps += sums.isfinite().all()  # a sum once infinite or NaN stays so
        count += len(labels)
        steps += 1
    if finite_steps < steps:
        raise NonFiniteLoss(step=int(finite_steps) + 1)
    return Training(*(sums.cpu().double() / count).tolist())


@torch.inference_mode()
def predict_logits(model: nn.Module, images: Tensor, batch_size: int = 250) -> Tensor:
    """The logits, float32 (N, 10), of grey-level images (N, 28, 28), without augmentation, in evaluation mode."""
    model.eval()
    # Of one channel, the strides alone tell the memory format: these say channels_last, in which models are trained,
    # and convolutions of this size take about half the time.
    parts = (normalise(part).squeeze(1).unsqueeze(3).movedim(3, 1) for part in images.split(batch_size))
    return torch.cat([model(part) for part in parts])


def evaluate(model: nn.Module, digits: Digits) -> Evaluation:
    """Loss and accuracy of the model on all of `digits`, and its predictions."""
    logits = predict_logits(model, digits.images)
    predictions = logits.argmax(1)
    accuracy = int((predictions == digits.labels).sum()) / len(digits.labels)
    return Evaluation(float(F.cross_entropy(logits, digits.labels)), accuracy, predictions.to("cpu", torch.uint8))
