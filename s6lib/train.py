"""One epoch of training, one evaluation, and the two penalties."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from s6lib.data import ImageDataset, normalise


class Training(NamedTuple):
    """Means over the images of an epoch: cross-entropy, accuracy (0 to 1), and the penalty added to the loss."""

    loss: float
    accuracy: float
    penalty: float


class Evaluation(NamedTuple):
    """Mean cross-entropy and accuracy (0 to 1)."""

    loss: float
    accuracy: float


def l1_l2_penalty(model: nn.Module, l1: float = 0.0, l2: float = 0.0) -> Tensor | float:
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


def train_epoch(
    model: nn.Module,
    batches: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    penalty: Callable[[nn.Module], Tensor | float] | None = None,
) -> Training:
    """Train once over `batches`, pairs of images (B, 1, H, H) and targets: labels (B,) or probabilities (B, C).

    Each step minimises the loss of a batch plus the penalty of the model. The metrics are those of the training pass
    itself, with dropout and augmentation: cross-entropy, whatever the loss, and how often the most probable class is
    the target's. Raises FloatingPointError if one became infinite or NaN, and ValueError if there was no batch.
    """
    model.train()
    sums = None  # on the device, and read once: a GPU would wait if they were read at each step
    for images, targets in batches:
        logits = model(images)
        data_loss = loss(logits, targets)
        # Keep the penalty after the logits: autograd sums gradients from last to first, and the last bits are settled.
        extra = torch.zeros_like(data_loss) + (0.0 if penalty is None else penalty(model))
        optimizer.zero_grad()
        (data_loss + extra).backward()
        optimizer.step()
        with torch.no_grad():
            entropy = data_loss if loss is F.cross_entropy else F.cross_entropy(logits, targets)
            labels = targets.argmax(1) if targets.is_floating_point() else targets
            hits, count = (logits.argmax(1) == labels).float().sum(), len(targets)
            step = torch.stack([entropy * count, hits, extra * count, torch.full_like(hits, count)])
            # Sum in place: keeping a small tensor from each step would fragment the memory that steps reuse.
            sums = step if sums is None else sums.add_(step)
    if sums is None:
        raise ValueError("there must be at least one batch to train on; these batches are used up, or there are none")
    *totals, images_seen = sums.cpu().double()
    if not all(map(torch.isfinite, totals)):
        raise FloatingPointError("the loss is infinite or not a number; lower the learning rate or the penalties")
    return Training(*(float(total / images_seen) for total in totals))


def memory_format(model: nn.Module) -> torch.memory_format:
    """Return the memory format for training: the model's `memory_format` on a CPU, contiguous elsewhere.

    In float32, channels_last speeds up no GPU before Ampere, and makes the penalties' `flatten` copy. On MPS, it has
    given BatchNorm wrong gradients (pytorch issue 175189).
    """
    on_cpu = all(weights.device.type == "cpu" for weights in model.parameters())
    return getattr(model, "memory_format", torch.contiguous_format) if on_cpu else torch.contiguous_format


def predict_logits(model: nn.Module, dataset: Any) -> Tensor:
    """Compute the logits, float32 (N, C), of a data set's images in evaluation mode, without augmentation.

    The data set is an ImageDataset on the model's device, any torch Dataset of (image, label), or a DataLoader.
    """
    return _answer(model, dataset)[0]


@torch.no_grad()  # not inference_mode, in which a cache that grows in evaluation could not be used in training
def _answer(model: nn.Module, dataset: Any, batch_size: int = 250) -> tuple[Tensor, Sequence[Tensor]]:
    """Compute the logits of a data set's images, and return them with the labels, batch by batch."""
    model.eval()
    if not isinstance(dataset, ImageDataset):
        device = next((weights.device for weights in model.parameters()), "cpu")
        loader = dataset if isinstance(dataset, DataLoader) else DataLoader(dataset, batch_size)
        logits, labels = zip(*((model(images.to(device)), labels) for images, labels in loader), strict=True)
        return torch.cat(logits).float(), labels
    parts = (normalise(part, dataset.mean, dataset.std) for part in dataset.images.split(batch_size))
    if memory_format(model) == torch.channels_last:
        # With one channel, only the strides tell the memory format, and `to` would not change them.
        parts = (part.squeeze(1).unsqueeze(3).movedim(3, 1) for part in parts)
    return torch.cat([model(part) for part in parts]).float(), [dataset.labels]


def predict(model: nn.Module, dataset: Any) -> Tensor:
    """Compute the class of each image of a data set: int64 (N,)."""
    return predict_logits(model, dataset).argmax(1)


def evaluate(model: nn.Module, dataset: Any) -> Evaluation:
    """Compute the mean cross-entropy and the accuracy (0 to 1) of a model on all images of a data set."""
    logits, parts = _answer(model, dataset)
    labels = torch.cat(list(parts)).to(logits.device)
    return Evaluation(float(F.cross_entropy(logits, labels)), int((logits.argmax(1) == labels).sum()) / len(labels))
