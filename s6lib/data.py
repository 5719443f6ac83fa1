"""MNIST as uint8 tensors on a device, batched augmentation, and the batches of an epoch."""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor
from torchvision.datasets import MNIST
from torchvision.datasets.utils import check_integrity

# A checkout carries the archives and the published results; an installed package works in the current folder.
_CHECKOUT = Path(__file__).resolve().parents[1]
PROJECT = _CHECKOUT if (_CHECKOUT / "pyproject.toml").is_file() else Path()
DATA = PROJECT / "data"

MEAN, STD = 0.1307, 0.3081  # of the training pixels, on the scale 0 to 1
FILL = 1  # the grey level, of 255, that rotation brings in from outside the image
CLASS_NAMES = tuple(name.split(" - ")[1] for name in MNIST.classes)  # "zero" to "nine"


class MnistError(RuntimeError):
    """An archive is missing or damaged, and could not be downloaded; the message names it and the remedy."""


class Split(NamedTuple):
    """Images uint8 (N, 28, 28), 0 = background, and their labels int64 (N,)."""

    images: Tensor
    labels: Tensor


def load_mnist(root: str | Path = DATA, device: str | torch.device = "cpu") -> tuple[Split, Split]:
    """The training and the test split of MNIST, 60,000 and 10,000 images, on `device`.

    The four archives in `root`/MNIST/raw are checked by MD5 and unpacked by torchvision, which downloads what is
    missing or damaged. Raises MnistError where that fails.
    """
    root = Path(root).expanduser()
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    with FileLock(raw.parent / ".lock"):
        for name, md5 in MNIST.resources:
            # torchvision does not look again at what it once unpacked; without the file it starts from the archive.
            if not _unpacked_whole(raw / name, md5):
                (raw / name).with_suffix("").unlink(missing_ok=True)
        try:
            splits = [MNIST(root, train=train, download=True) for train in (True, False)]
        except (RuntimeError, OSError, EOFError) as error:
            damaged = [raw / name for name, md5 in MNIST.resources if not check_integrity(raw / name, md5)]
            if not damaged:  # the disk is full, say: the error speaks for itself
                raise
            raise MnistError(
                f"MNIST archive missing or damaged, and the download failed: {', '.join(map(str, damaged))}. "
                "Restore it with `git checkout -- data/MNIST/raw`, or delete it and try again with a network."
            ) from error
    train, test = (Split(split.data.to(device), split.targets.to(device)) for split in splits)
    return train, test


def _unpacked_whole(archive: Path, md5: str) -> bool:
    """Whether the unpacked file beside an undamaged archive has the CRC-32 that ends the archive (RFC 1952)."""
    unpacked = archive.with_suffix("")
    if not (unpacked.is_file() and check_integrity(archive, md5)):
        return False
    return zlib.crc32(unpacked.read_bytes()) == int.from_bytes(archive.read_bytes()[-8:-4], "little")


def normalise(images: Tensor) -> Tensor:
    """Grey levels 0 to 255, (N, 28, 28), as network input: float32 (N, 1, 28, 28), mean 0 and SD 1 over MNIST."""
    return _grey(images).unsqueeze(1).sub_(255 * MEAN).div_(255 * STD)


def rotate(images: Tensor, angles: Tensor, fill: int = FILL) -> Tensor:
    """Rotate each square image (N, H, H) by its own angle (N,), in degrees counter-clockwise, nearest pixel.

    Returns grey levels as float32; equals `torchvision.transforms.v2.functional.rotate` pixel for pixel.
    """
    size = images.shape[-1]
    axis = torch.linspace(1 / size - 1, 1 - 1 / size, size, device=images.device)
    # A pixel centre is a complex number x + iy, and to rotate it is one multiplication (y points down).
    grid = torch.complex(axis.expand(size, size), axis.unsqueeze(1).expand(size, size))
    angles = torch.deg2rad(angles.double().cpu())
    turns = torch.polar(torch.ones_like(angles), angles).to(grid)
    sources = torch.view_as_real(grid * turns.view(-1, 1, 1))
    # Grid sampling pads with zeros: shift the grey levels so that zero is the fill.
    shifted = _grey(images).unsqueeze(1).sub_(fill)
    return F.grid_sample(shifted, sources, mode="nearest", align_corners=False).squeeze(1).add_(fill)


def adjust_brightness(images: Tensor, factors: Tensor) -> Tensor:
    """Multiply each image (N, H, W) by its own factor (N,), as torchvision does on uint8: clamped and floored."""
    return _grey(images).mul_(factors.view(-1, 1, 1)).clamp_(0, 255).floor_()


def adjust_contrast(images: Tensor, factors: Tensor) -> Tensor:
    """Stretch each image (N, H, W) about its own mean by its own factor (N,), as torchvision does on uint8."""
    images, factors = _grey(images), factors.view(-1, 1, 1)
    means = images.mean(dim=(1, 2), keepdim=True)
    return images.mul_(factors).add_(means * (1 - factors)).clamp_(0, 255).floor_()


def batches(
    split: Split, batch_size: int, rotation: float, jitter: float, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch over `split` in random order, augmented: pairs of float32 (B, 1, 28, 28) and int64 (B,).

    Brightness and contrast factors are uniform in 1 ± `jitter`, angles in ± `rotation` degrees, one of each an image.
    All of them come from `generator`, on the CPU, so that they do not depend on the device; the last batch may be
    smaller.
    """
    images, labels = split
    count, device = len(labels), labels.device
    order = torch.randperm(count, generator=generator)
    brightness, contrast = (1 + jitter * _uniform(count, generator) for _ in range(2))
    angles = rotation * _uniform(count, generator)
    brightness, contrast = brightness.to(device), contrast.to(device)
    for start in range(0, count, batch_size):
        part = slice(start, start + batch_size)
        chosen = order[part].to(device)
        batch = images[chosen]
        if jitter:
            batch = adjust_contrast(adjust_brightness(batch, brightness[part]), contrast[part])
        yield normalise(rotate(batch, angles[part])), labels[chosen]


def _grey(images: Tensor) -> Tensor:
    """A float32 copy, for what follows to work in place."""
    return images.to(torch.float32, copy=True)


def _uniform(count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator).mul_(2).sub_(1)
