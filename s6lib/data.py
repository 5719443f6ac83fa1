"""Data sets as uint8 tensors on a device, batched augmentation, and the batches of an epoch."""

import gzip
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor

from s6lib.errors import S6Error

# A checkout holds the archives and the published results; an installed package uses the current folder.
_CHECKOUT = Path(__file__).resolve().parents[1]
PROJECT = _CHECKOUT if (_CHECKOUT / "pyproject.toml").is_file() else Path()
DATA = PROJECT / "data"

MEAN, STD = 0.1307, 0.3081  # of the training pixels, on the scale 0 to 1
FILL = 1  # the grey level, of 255, that rotation brings in from outside the image
CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

DATASETS = ("mnist", "fashion-mnist", "kmnist")  # each has 60,000 training and 10,000 test images
HELD_OUT = 6  # the last sixth of the training images is for choices, which must not be made on test images

# The archives, and the CRC-32 of each one's content, which a gzip file stores in its last eight bytes (RFC 1952).
_CRC32 = {
    "train-images-idx3-ubyte.gz": 0xE9F4D8B3,
    "train-labels-idx1-ubyte.gz": 0xE0CB4AD2,
    "t10k-images-idx3-ubyte.gz": 0x91373BDF,
    "t10k-labels-idx1-ubyte.gz": 0x4AB9EFF9,
}


class DataError(S6Error):
    """A missing, damaged or unsuitable data set; the message says what to do."""


class Digits(NamedTuple):
    """Images and their labels: the training or the test part of a data set.

    images: uint8 (N, H, H), 0 = background.
    labels: int64 (N,), indices into `class_names`.
    mean, std: of the pixels, on the scale 0 to 1; they normalise the network's input.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...] = CLASS_NAMES
    mean: float = MEAN
    std: float = STD

    def part(self, index: slice | Tensor) -> "Digits":
        """Select images, with their labels, by an index."""
        return self._replace(images=self.images[index], labels=self.labels[index])

    def to(self, device: str | torch.device) -> "Digits":
        """Move the images and labels to a device."""
        return self._replace(images=self.images.to(device), labels=self.labels.to(device))


class Dataset(NamedTuple):
    """The return value of a callable given as a recipe's `data`; a plain tuple of the five is accepted too.

    Images are uint8 (N, H, H), tensors or arrays, of the same size in both parts. Labels are whole numbers (N,),
    indices into `class_names`.
    """

    train_images: Tensor | np.ndarray
    train_labels: Tensor | np.ndarray
    test_images: Tensor | np.ndarray
    test_labels: Tensor | np.ndarray
    class_names: tuple[str, ...]


class Augmentation(NamedTuple):
    """The limits of the random changes to each image, uniform on both sides of zero; 0 means no change.

    rotation: degrees.
    jitter: relative change of brightness, and of contrast.
    shift: pixels, horizontally and vertically.
    scale: relative change of size.
    """

    rotation: float = 0.0
    jitter: float = 0.0
    shift: float = 0.0
    scale: float = 0.0


def load_data(data: str | Callable[[], Dataset], device: str | torch.device = "cpu") -> tuple[Digits, Digits]:
    """Load the training and the test images of a data set: one of DATASETS, or a callable that returns a `Dataset`.

    Raises DataError if it cannot be downloaded or read, or is not as `Dataset` describes.
    """
    if data == "mnist":
        return load_mnist(device=device)
    train, test = _download_dataset(data) if isinstance(data, str) else _call_dataset(data)
    pixels = train.images.double() / 255
    mean, std = round(float(pixels.mean()), 4), round(float(pixels.std()), 4) or 1.0  # 1.0: every pixel is equal
    train, test = (part._replace(mean=mean, std=std).to(device) for part in (train, test))
    return train, test


def _download_dataset(name: str) -> tuple[Digits, Digits]:
    """Load Fashion-MNIST (arXiv:1708.07747) or Kuzushiji-MNIST (arXiv:1812.01718) through torchvision."""
    from torchvision.datasets import KMNIST, FashionMNIST

    kind = {"fashion-mnist": FashionMNIST, "kmnist": KMNIST}[name]
    try:
        (DATA / kind.__name__).mkdir(parents=True, exist_ok=True)
        with FileLock(DATA / kind.__name__ / ".lock"):  # one process at a time
            train, test = (kind(DATA, train=train, download=True) for train in (True, False))
    except Exception as error:  # torchvision raises a dozen kinds, for faults of network, disk or file
        raise DataError(
            f"the data set {name!r} could not be downloaded to, or read from, {DATA / kind.__name__}; try again with a "
            f"network, and if a file there is damaged, delete the folder first ({str(error).partition(chr(10))[0]})"
        ) from None
    class_names = tuple(train.classes)
    return Digits(train.data, train.targets, class_names), Digits(test.data, test.targets, class_names)


def _call_dataset(data: Callable[[], Dataset]) -> tuple[Digits, Digits]:
    """Call the user's `data`, and check what it returns. Raises DataError if it is not a data set."""
    try:
        dataset = data()
    except S6Error:  # known from run.json alone
        raise
    except Exception as error:  # the user's own code: any
        raise DataError(f"the data cannot be made: {type(error).__name__}: {error}") from None
    if not isinstance(dataset, tuple | list) or len(dataset) != len(Dataset._fields):
        raise DataError(f"data must return {', '.join(Dataset._fields)}, not {type(dataset).__name__}")
    *arrays, class_names = dataset
    train_images, train_labels, test_images, test_labels = map(torch.as_tensor, arrays)
    names = tuple(map(str, class_names))
    if not 2 <= len(names) <= 256:
        raise DataError(f"data must have 2 to 256 class_names, not {len(names)}")
    for part, images, labels in (("train", train_images, train_labels), ("test", test_images, test_labels)):
        size = train_images.shape[1:]
        if images.dtype != torch.uint8 or images.dim() != 3 or images.shape[1] != images.shape[2] or not len(images):
            raise DataError(
                f"{part}_images must be uint8 (N, H, H), grey levels of 0 to 255, not {images.dtype} "
                f"{tuple(images.shape)}"
            )
        if images.shape[1:] != size:
            raise DataError(f"test_images must be of the size of train_images, {tuple(size)}, not {images.shape[1:]}")
        whole = not labels.is_floating_point() and not labels.is_complex() and labels.shape == images.shape[:1]
        if not whole or int(labels.min()) < 0 or int(labels.max()) >= len(names):
            raise DataError(
                f"{part}_labels must be whole numbers ({len(images)},) from 0 to {len(names) - 1}, an index into "
                f"class_names each, not {labels.dtype} {tuple(labels.shape)}"
                + (f" from {labels.min()} to {labels.max()}" if labels.numel() else "")
            )
    return Digits(train_images, train_labels.long(), names), Digits(test_images, test_labels.long(), names)


def load_mnist(root: str | Path = DATA, device: str | torch.device = "cpu") -> tuple[Digits, Digits]:
    """Load the training and the test digits of MNIST, 60,000 and 10,000 images, on `device`.

    Each of the four files in `root`/MNIST/raw is read unpacked. If the unpacked file is missing or damaged, its archive
    is read, and unpacked beside it where the folder is writable. Missing or damaged archives that are needed are
    downloaded. Raises DataError if a download fails.
    """
    raw = Path(root).expanduser() / "MNIST" / "raw"
    contents = {raw / name: _content(raw / name) for name in _CRC32}
    missing = [archive for archive, content in contents.items() if content is None]
    if missing:
        _download(missing)
        contents.update((archive, _content(archive)) for archive in missing)
    train_images, train_labels, test_images, test_labels = map(_tensor, filter(None, contents.values()))
    train, test = Digits(train_images, train_labels.long()), Digits(test_images, test_labels.long())
    return train.to(device), test.to(device)


def hold_out(train: Digits) -> tuple[Digits, Digits]:
    """Split the training images into the first five sixths and the last (of MNIST, 50,000 and 10,000)."""
    rest = len(train.labels) - len(train.labels) // HELD_OUT
    return train.part(slice(rest)), train.part(slice(rest, None))


def _content(archive: Path) -> bytes | None:
    """Read an archive's content, from the unpacked file beside it or the archive; None if both are damaged."""
    unpacked = archive.with_suffix("")
    if unpacked.is_file():
        content = unpacked.read_bytes()
        if zlib.crc32(content) == _CRC32[archive.name]:
            return content
    if not _is_whole(archive):
        return None
    content = gzip.decompress(archive.read_bytes())
    with suppress(OSError):  # in a read-only folder or on a full disk, the next load unpacks again
        unpacked.write_bytes(content)
    return content


def _is_whole(archive: Path) -> bool:
    # torchvision takes as long to import as torch does, and unpacked digits do not need it.
    from torchvision.datasets import MNIST
    from torchvision.datasets.utils import check_integrity

    return check_integrity(archive, dict(MNIST.resources)[archive.name])


def _tensor(content: bytes) -> Tensor:
    """Parse an idx file: its fourth byte is the number of dimensions; their sizes, 4 bytes each, follow."""
    dimensions = content[3]
    values = torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=4 + 4 * dimensions)
    return values.view(-1, 28, 28) if dimensions == 3 else values


def _download(archives: list[Path]) -> None:
    raw = archives[0].parent
    try:
        raw.mkdir(parents=True, exist_ok=True)
        with FileLock(raw.parent / ".lock"):
            for archive in archives:
                _download_from_a_mirror(archive)
    except (RuntimeError, OSError, EOFError) as error:
        damaged = [archive for archive in archives if not _is_whole(archive)]
        if not damaged:
            raise
        raise DataError(
            f"MNIST archive missing or damaged, and the download failed: {', '.join(map(str, damaged))}. "
            "Restore it with `git checkout -- data/MNIST/raw`, or delete it and try again with a network. "
            f"What failed: {error}"
        ) from None


def _download_from_a_mirror(archive: Path) -> None:
    """Download an archive, unless another process has already done so."""
    from torchvision.datasets import MNIST
    from torchvision.datasets.utils import download_url

    md5 = dict(MNIST.resources)[archive.name]
    for mirror in MNIST.mirrors:
        try:
            return download_url(f"{mirror}{archive.name}", archive.parent, archive.name, md5)
        except (RuntimeError, OSError, EOFError) as error:
            failure = error
    raise failure


def normalise(images: Tensor, mean: float = MEAN, std: float = STD) -> Tensor:
    """Turn grey levels 0 to 255, (N, H, H), into network input: float32 (N, 1, H, H) of mean 0 and SD 1."""
    return _grey(images).unsqueeze(1).sub_(255 * mean).div_(255 * std)


def rotate(images: Tensor, angles: Tensor, fill: int = FILL) -> Tensor:
    """Rotate each square image (N, H, H) by its own angle (N,), in degrees counter-clockwise, to the nearest pixel.

    Returns grey levels as float32. Equals `torchvision.transforms.v2.functional.rotate` pixel for pixel.
    """
    centres = _pixel_centres(images)
    sources = torch.view_as_real(centres * _turns(angles).to(centres))
    # Grid sampling pads with zeros: shift the grey levels so that zero is the fill.
    shifted = _grey(images).unsqueeze(1).sub_(fill)
    return F.grid_sample(shifted, sources, mode="nearest", align_corners=False).squeeze(1).add_(fill)


def affine(images: Tensor, angles: Tensor, scales: Tensor, shifts: Tensor) -> Tensor:
    """Rotate, scale, then shift each square image (N, H, H) by its own amounts, with bilinear interpolation.

    Angles (N,) are in degrees counter-clockwise, scales (N,) are factors, shifts (N, 2) are pixels right and down. The
    border is filled with background. Returns grey levels as float32. Agrees with
    `torchvision.transforms.v2.functional.affine`, which rotates clockwise.
    """
    centres = _pixel_centres(images)
    moved = centres - torch.view_as_complex(shifts * (2 / images.shape[-1])).to(centres).view(-1, 1, 1)
    sources = torch.view_as_real(moved * (_turns(angles) / scales.cpu().view(-1, 1, 1)).to(centres))
    return F.grid_sample(_grey(images).unsqueeze(1), sources, mode="bilinear", align_corners=False).squeeze(1)


def _pixel_centres(images: Tensor) -> Tensor:
    """Pixel centres from -1 to 1, (H, H), as complex numbers x + iy, so that a multiplication rotates them."""
    size = images.shape[-1]
    axis = torch.linspace(1 / size - 1, 1 - 1 / size, size, device=images.device)
    return torch.complex(axis.expand(size, size), axis.unsqueeze(1).expand(size, size))


def _turns(angles: Tensor) -> Tensor:
    """Turn angles in degrees into complex numbers of size 1, (N, 1, 1), on the CPU."""
    angles = torch.deg2rad(angles.double().cpu())
    return torch.polar(torch.ones_like(angles), angles).view(-1, 1, 1)


def adjust_brightness(images: Tensor, factors: Tensor) -> Tensor:
    """Multiply each image (N, H, W) by its own factor (N,), clamped and floored as torchvision does on uint8."""
    return _grey(images).mul_(factors.view(-1, 1, 1)).clamp_(0, 255).floor_()


def adjust_contrast(images: Tensor, factors: Tensor) -> Tensor:
    """Scale each image's contrast (N, H, W) about its mean by its own factor (N,), as torchvision does on uint8."""
    images, factors = _grey(images), factors.view(-1, 1, 1)
    means = images.mean(dim=(1, 2), keepdim=True)
    return images.mul_(factors).add_(means * (1 - factors)).clamp_(0, 255).floor_()


def batches(
    digits: Digits,
    batch_size: int,
    augmentation: Augmentation,
    generator: torch.Generator,
    batches_at_once: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the images of `digits` once, in random order and augmented: pairs of float32 (B, 1, H, H) and int64 (B,).

    Each image gets its own random amounts. They come from `generator`, on the CPU, so that they do not depend on the
    device. The last batch may be smaller. Rotation alone takes the nearest pixel, as the published recipes do; with
    shift or scale, one bilinear step does all three.

    `batches_at_once` batches are augmented together, which changes no bit: by default one on a CPU, and about 6,400
    images elsewhere, since a GPU waits for the copy of their indices and amounts.
    """
    images, labels = digits.images, digits.labels
    count, device = len(labels), labels.device
    order = torch.randperm(count, generator=generator)
    rotation, jitter, shift, scale = augmentation
    brightness, contrast = (1 + jitter * _uniform(count, generator) for _ in range(2))
    angles = rotation * _uniform(count, generator)
    brightness, contrast = brightness.to(device), contrast.to(device)
    scales = 1 + scale * _uniform(count, generator)
    shifts = shift * torch.stack([_uniform(count, generator) for _ in range(2)], dim=1)
    if batches_at_once is None:
        batches_at_once = 1 if device.type == "cpu" else max(1, 6400 // batch_size)
    for start in range(0, count, batches_at_once * batch_size):
        part = slice(start, start + batches_at_once * batch_size)
        chosen = order[part].to(device)
        batch = images[chosen]
        if jitter:
            batch = adjust_contrast(adjust_brightness(batch, brightness[part]), contrast[part])
        if shift or scale:
            batch = affine(batch, angles[part], scales[part], shifts[part])
        else:
            batch = rotate(batch, angles[part])
        parts = (normalise(batch, digits.mean, digits.std), labels[chosen])
        yield from zip(*(part.split(batch_size) for part in parts), strict=True)


def _grey(images: Tensor) -> Tensor:
    """Copy images as float32, so that the next operations can work in place."""
    return images.to(torch.float32, copy=True)


def _uniform(count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator).mul_(2).sub_(1)
