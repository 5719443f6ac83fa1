"""Data sets as uint8 images on a device, batched augmentation, and the batches of an epoch."""

import gzip
import random
import reprlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.data
from filelock import FileLock
from torch import Tensor

from s6lib.errors import DataError, S6Error, SettingError

# A checkout holds the archives and the published results; an installed package uses the current folder.
_CHECKOUT = Path(__file__).resolve().parents[1]
PROJECT = _CHECKOUT if (_CHECKOUT / "pyproject.toml").is_file() else Path()
DATA = PROJECT / "data"

MEAN, STD = 0.1307, 0.3081  # of the training pixels, on the scale 0 to 1
FILL = 1  # the grey level, of 255, that rotation brings in from outside the image
CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# The names of torchvision's; each data set has 60,000 training and 10,000 test images.
DATASETS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}
HELD_OUT = 6  # the last sixth of the training images is for choices, which must not be made on test images

# The archives, and the CRC-32 of each one's content, which a gzip file stores in its last eight bytes (RFC 1952).
_CRC32 = {
    "train-images-idx3-ubyte.gz": 0xE9F4D8B3,
    "train-labels-idx1-ubyte.gz": 0xE0CB4AD2,
    "t10k-images-idx3-ubyte.gz": 0x91373BDF,
    "t10k-labels-idx1-ubyte.gz": 0x4AB9EFF9,
}
Transform = Callable[[Tensor], Tensor]  # from one image (1, H, H), uint8, to one image


@dataclass(frozen=True, eq=False, repr=False)
class ImageDataset(torch.utils.data.Dataset):
    """Images and their labels; item `i` is a pair of a network's input, float32 (1, H, H), and a label.

    images: uint8 (N, H, H), 0 = background; tensors, arrays or lists of them.
    labels: whole numbers (N,), kept as int64: indices into `class_names`.
    mean, std: of the pixels, on the scale 0 to 1; they normalise the network's input.

    Raises DataError if images and labels are not as described.
    """

    images: Any  # once made, a tensor
    labels: Any
    class_names: tuple[str, ...] = CLASS_NAMES
    mean: float = MEAN
    std: float = STD

    def __post_init__(self) -> None:
        images, labels = _as_tensor(self.images, "images"), _as_tensor(self.labels, "labels")
        names = tuple(map(str, self.class_names)) if isinstance(self.class_names, Iterable) else ()
        square = images.dim() == 3 and images.shape[1] == images.shape[2]
        if images.dtype != torch.uint8 or not square or not images.numel():
            raise DataError(
                f"images must be uint8 (N, H, H), grey levels of 0 to 255, not {_describe(images)}: use "
                "transforms.Grayscale() for colours, Resize for other shapes, and leave out Normalize"
            )
        if not 2 <= len(names) <= 256:
            raise DataError(f"class_names must be 2 to 256 names, one per class, not {reprlib.repr(self.class_names)}")
        whole = not labels.is_floating_point() and not labels.is_complex() and labels.shape == images.shape[:1]
        if not whole or not 0 <= int(labels.long().min()) <= int(labels.long().max()) < len(names):
            raise DataError(
                f"labels must be whole numbers ({len(images)},) from 0 to {len(names) - 1}, indices into class_names, "
                f"not {_describe(labels)}"
            )
        vars(self).update(images=images, labels=labels.long(), class_names=names)

    def __repr__(self) -> str:
        return f"ImageDataset({len(self):,} images of {tuple(self.images.shape[1:])}, {len(self.class_names)} classes)"

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return normalise(self.images[index].unsqueeze(0), self.mean, self.std)[0], int(self.labels[index])

    def part(self, index: slice | Tensor) -> "ImageDataset":
        """Select images, with their labels, by an index."""
        return replace(self, images=self.images[index], labels=self.labels[index])

    def to(self, device: str | torch.device) -> "ImageDataset":
        """Move the images and labels to a device."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))


def _as_tensor(values: Any, name: str) -> Tensor:
    """Convert an array, a list or a Series to a tensor; views and foreign byte orders are copied."""
    if isinstance(values, Tensor):
        return values
    try:
        array = np.asarray(values)
        return torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ["C", "W"]))
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{name} must be numbers of one shape, such as a tensor or an array, not {type(values).__name__} "
            f"({str(error).partition(chr(10))[0]})"
        ) from None


def _describe(values: Tensor) -> str:
    kind = f"{values.dtype} {tuple(values.shape)}"
    if values.is_complex() or not values.numel():
        return kind
    numbers = values if values.is_floating_point() else values.long()  # torch compares no uint16
    return f"{kind} from {numbers.min()} to {numbers.max()}"


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


NO_AUGMENTATION = Augmentation()


def load_data(data: str | Callable[[], Any]) -> tuple[ImageDataset, ImageDataset]:
    """Load the training and the test images of a data set, normalised by the mean and SD of the training pixels.

    `data` is one of DATASETS, or a function that gives two data sets of (image, label), each read once into memory: a
    torch Dataset whose images are grey and square, from PIL, of uint8 or from 0 to 1, or an ImageDataset. The class
    names are its `classes`, or numbers. Such training images are shuffled once, by a fixed seed, since images often
    come class by class.

    Raises DataError if the data cannot be downloaded or read.
    """
    if data == "mnist":
        return load_mnist()
    if callable(data):
        train, test = _call_dataset(data)
        train = train.part(torch.randperm(len(train), generator=torch.Generator().manual_seed(0)))
    elif data not in DATASETS:
        raise DataError(f"data must be a function or one of {', '.join(DATASETS)}, not {data!r}")
    else:
        failed = (
            f"the data set {data!r} could not be downloaded to, or read from, {DATA / DATASETS[data]}; try again with "
            "a network, and if a file there is damaged, delete the folder first"
        )
        train, test = _load_from_torchvision(DATASETS[data], DATA, failed)
    levels, counts = np.unique(train.images.numpy(), return_counts=True)
    mean = round(float(np.average(levels / 255, weights=counts)), 4)
    std = round(float(np.cov(levels / 255, fweights=counts)) ** 0.5, 4) or 1.0  # 1.0: every pixel is equal
    return replace(train, mean=mean, std=std), replace(test, mean=mean, std=std)


def _load_from_torchvision(kind: str, root: Path, failed: str) -> tuple[ImageDataset, ImageDataset]:
    """Load a data set of torchvision's, and download what is missing. Raises DataError with the sentence `failed`."""
    from torchvision import datasets  # takes as long to import as torch does

    try:
        (root / kind).mkdir(parents=True, exist_ok=True)
        with FileLock(root / kind / ".lock"):  # one process at a time
            train, test = (getattr(datasets, kind)(root, train=train, download=True) for train in (True, False))
    except Exception as error:  # torchvision raises a dozen kinds, for faults of network, disk or file
        raise DataError(f"{failed} ({' '.join(str(error).split())[:300]})") from None
    names = tuple(name.rpartition(" - ")[2] for name in train.classes)  # MNIST has "0 - zero" for zero
    return ImageDataset(train.data, train.targets, names), ImageDataset(test.data, test.targets, names)


def _call_dataset(data: Callable[[], Any]) -> tuple[ImageDataset, ImageDataset]:
    """Call the user's `data`, and read the two data sets that it gives. Raises DataError if they are none."""
    torch.manual_seed(0)  # what it draws is the same for every run
    np.random.seed(0)  # noqa: NPY002 - the user's code may draw from the global generator
    random.seed(0)
    try:
        parts = data()
        count = len(parts) if isinstance(parts, tuple | list) else type(parts).__name__
        if count != 2:
            raise DataError(
                "data must give two data sets of (image, label), the training and the test set, such as two of "
                f"torchvision's or two of s6lib.ImageDataset(images, labels, class_names), not {count}"
            )
        train, test = map(_read_dataset, parts)
    except S6Error:
        raise
    except Exception as error:  # the user's own code: any
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"the data cannot be made: {type(error).__name__}: {reason}") from None
    one, other = (tuple(part.images.shape[1:]) for part in (train, test))
    if one != other:
        raise DataError(f"training and test images must be of one size, not {one} and {other}: resize them")
    names = max(train.class_names, test.class_names, key=len)
    for own in (train.class_names, test.class_names):
        if own != tuple(map(str, range(len(own)))) and own != names[: len(own)]:
            raise DataError(f"training and test set must number the classes alike, not as {names} and {own}")
    return replace(train, class_names=names), replace(test, class_names=names)


def _read_dataset(dataset: Any) -> ImageDataset:
    if isinstance(dataset, ImageDataset):  # or a subclass, whose own __init__ may take something else
        if type(dataset).__getitem__ is not ImageDataset.__getitem__:
            raise DataError("a subclass of ImageDataset must keep its __getitem__: change the images or labels instead")
        return ImageDataset(dataset.images, dataset.labels, dataset.class_names)
    item = dataset[0] if hasattr(dataset, "__getitem__") and len(dataset) else dataset
    if not isinstance(item, tuple | list) or len(item) != 2:
        found = "and is empty" if hasattr(dataset, "__len__") and not len(dataset) else f"not {type(item).__name__}"
        raise DataError(f"a data set must hold pairs (image, label), {found}")
    items = (dataset[index] for index in range(len(dataset)))
    images, labels = zip(*((_grey_levels(image), np.squeeze(label)) for image, label in items), strict=True)
    if any(not np.array_equal(image, _grey_levels(dataset[index][0])) for index, image in enumerate(images[:50])):
        raise DataError("an image of the data set differs each time: give what draws at random as `transform`")
    whole = dataset
    while not hasattr(whole, "classes") and hasattr(whole, "dataset"):  # a Subset
        whole = whole.dataset
    numbers = _as_tensor(labels, "labels")
    names = getattr(whole, "classes", None)
    names = range(max(2, 1 + int(numbers.long().max()))) if names is None or not len(names) else names
    return ImageDataset(images, numbers, tuple(map(str, names)))


def _grey_levels(image: Any) -> np.ndarray:
    """Convert an image of PIL, a tensor or an array to (H, H), and levels from 0 to 1 to uint8."""
    levels = np.asarray(image)
    if levels.dtype.kind == "f" and levels.size and 0 <= levels.min() <= levels.max() <= 1:
        levels = (255 * levels).round().astype(np.uint8)
    return levels.squeeze() if levels.ndim == 3 and 1 in levels.shape else levels


def load_mnist(root: str | Path = DATA) -> tuple[ImageDataset, ImageDataset]:
    """Load the training and the test images of MNIST, 60,000 and 10,000.

    They are read from the four archives in `root`/MNIST/raw, or from torchvision's unpacked files beside them. What is
    missing or damaged is downloaded by torchvision. Raises DataError if that fails.
    """
    root = Path(root).expanduser()
    contents = {archive: _read_archive(archive) for archive in (root / "MNIST" / "raw" / name for name in _CRC32)}
    missing = [archive for archive, content in contents.items() if content is None]
    if damaged := [str(archive.with_suffix("")) for archive in missing if archive.with_suffix("").exists()]:
        raise DataError(f"damaged: {', '.join(damaged)}; delete what is damaged, and try again with a network")
    if missing:
        failed = (
            f"MNIST archive missing or damaged, and the download failed: {', '.join(map(str, missing))}. Restore it "
            "with `git checkout -- data/MNIST/raw`, or delete it and try again with a network."
        )
        return _load_from_torchvision("MNIST", root, failed)
    images, labels, test_images, test_labels = contents.values()
    return ImageDataset(images, labels), ImageDataset(test_images, test_labels)


def _read_archive(archive: Path) -> Tensor | None:
    """Read the values of an archive, or of its unpacked file; None if each is missing or damaged."""
    for path, unpack in ((archive, gzip.decompress), (archive.with_suffix(""), bytes)):
        with suppress(OSError, EOFError, zlib.error):  # BadGzipFile is an OSError
            content = unpack(path.read_bytes())
            if zlib.crc32(content) == _CRC32[archive.name]:
                start, shape = (16, (-1, 28, 28)) if "images" in archive.name else (8, (-1,))
                return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).view(shape)
    return None


def hold_out(train: ImageDataset) -> tuple[ImageDataset, ImageDataset]:
    """Split the training images into the first five sixths and the last (of MNIST, 50,000 and 10,000)."""
    rest = len(train) - len(train) // HELD_OUT
    return train.part(slice(rest)), train.part(slice(rest, None))


def normalise(images: Tensor, mean: float = MEAN, std: float = STD) -> Tensor:
    """Turn grey levels 0 to 255, (N, H, H), into network input: float32 (N, 1, H, H) of mean 0 and SD 1."""
    return (images.float().unsqueeze(1) - 255 * mean).div_(255 * std)


def rotate(images: Tensor, angles: Tensor, fill: int = FILL) -> Tensor:
    """Rotate each square image (N, H, H) by its own angle (N,), in degrees counter-clockwise, to the nearest pixel.

    Returns grey levels as float32. Equals `torchvision.transforms.v2.functional.rotate` pixel for pixel.
    """
    return affine(images, angles, torch.ones(1), torch.zeros(1, 2), "nearest", fill)


def affine(
    images: Tensor, angles: Tensor, scales: Tensor, shifts: Tensor, mode: str = "bilinear", fill: int = 0
) -> Tensor:
    """Rotate, scale, then shift each square image (N, H, H) by its own amounts, by default with bilinear interpolation.

    Angles (N,) are in degrees counter-clockwise, scales (N,) are factors, shifts (N, 2) are pixels right and down. What
    comes in from outside the image has the grey level `fill`. Returns grey levels as float32. Agrees with
    `torchvision.transforms.v2.functional.affine`, which rotates clockwise.
    """
    size = images.shape[-1]
    axis = torch.linspace(1 / size - 1, 1 - 1 / size, size, device=images.device)
    # Pixel centres from -1 to 1, (H, H), as complex numbers x + iy, so that a multiplication rotates them.
    centres = torch.complex(axis.expand(size, size), axis.unsqueeze(1).expand(size, size))
    moved = centres - torch.view_as_complex(shifts * (2 / size)).to(centres).view(-1, 1, 1)
    turns = torch.polar(1 / scales.double().cpu(), torch.deg2rad(angles.double().cpu())).view(-1, 1, 1)
    sources = torch.view_as_real(moved * turns.to(centres))
    # Grid sampling pads with zeros: shift the grey levels so that zero is the fill.
    grey = images.float().unsqueeze(1) - fill
    return F.grid_sample(grey, sources, mode=mode, align_corners=False).squeeze(1).add_(fill)


def adjust_brightness(images: Tensor, factors: Tensor) -> Tensor:
    """Multiply each image (N, H, W) by its own factor (N,), clamped and floored as torchvision does on uint8."""
    return (images.float() * factors.view(-1, 1, 1)).clamp_(0, 255).floor_()


def adjust_contrast(images: Tensor, factors: Tensor) -> Tensor:
    """Scale each image's contrast (N, H, W) about its mean by its own factor (N,), as torchvision does on uint8."""
    images, factors = images.float(), factors.view(-1, 1, 1)
    means = images.mean(dim=(1, 2), keepdim=True)
    return (images * factors).add_(means * (1 - factors)).clamp_(0, 255).floor_()


def batches(
    dataset: ImageDataset,
    batch_size: int,
    augmentation: Augmentation = NO_AUGMENTATION,
    generator: torch.Generator | None = None,
    transform: Transform | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the images of `dataset` once, in random order and augmented: pairs of float32 (B, 1, H, H) and int64 (B,).

    Each image gets its own random amounts. They come from `generator`, by default torch's, on the CPU, so that they do
    not depend on the device. The last batch may be smaller. Rotation alone takes the nearest pixel, as the published
    recipes do; with shift or scale, one bilinear step does all three.

    `transform` is a data set's, as torchvision's: it gets one image (1, H, H), uint8, before augmentation and
    normalisation, and gives one of the same size, of uint8 or from 0 to 1. Raises SettingError if it gives another.

    Elsewhere than on a CPU, the batches of about 6,400 images are augmented together, which changes no bit, since a GPU
    waits for the copy of their amounts.
    """
    if batch_size < 1:
        raise SettingError(f"batch_size must be a whole number from 1, not {batch_size!r}")
    count, device = len(dataset.labels), dataset.labels.device
    size = batch_size * (1 if device.type == "cpu" else max(1, 6400 // batch_size))
    order = torch.randperm(count, generator=generator).to(device)
    rotation, jitter, shift, scale = augmentation
    limits = torch.tensor([jitter, jitter, rotation, scale, shift, shift]).unsqueeze(1)
    amounts = torch.rand(6, count, generator=generator).mul_(2).sub_(1).mul_(limits)
    brightness, contrast = (1 + amounts[:2]).to(device)
    for start in range(0, count, size):
        part = slice(start, start + size)
        chosen, (angles, scales, *shifts) = order[part], amounts[2:, part]
        batch = dataset.images[chosen]
        if transform is not None:
            batch = _transformed(batch, transform)
        if jitter:
            batch = adjust_contrast(adjust_brightness(batch, brightness[part]), contrast[part])
        if shift or scale:
            batch = affine(batch, angles, 1 + scales, torch.stack(shifts, dim=1))
        elif rotation:
            batch = rotate(batch, angles)
        parts = (normalise(batch, dataset.mean, dataset.std), dataset.labels[chosen])
        yield from zip(*(part.split(batch_size) for part in parts), strict=True)


def _transformed(images: Tensor, transform: Transform) -> Tensor:
    """Transform each image (N, H, H) by itself; return grey levels from 0 to 255."""
    results = [transform(image) for image in images.unsqueeze(1)]
    wrong = [one for one in results if not isinstance(one, Tensor) or one.shape != images[:1].shape]
    if wrong:
        kind = tuple(wrong[0].shape) if isinstance(wrong[0], Tensor) else type(wrong[0]).__name__
        raise SettingError(f"`transform` must turn an image (1, H, H) into one of the same size, not {kind}")
    if len({one.dtype for one in results}) > 1:  # such as of RandomApply
        results = [one if one.is_floating_point() else one / 255 for one in results]
    levels = torch.cat(results)
    far = (levels.float() - 0.5).abs()  # filters and noise overshoot a little, in a few pixels; Normalize moves most
    if levels.is_floating_point() and far.max() < 5 and (far > 0.75).float().mean() < 0.05:
        return levels.clamp(0, 1).mul(255)
    if levels.dtype != torch.uint8 or levels.max() == 1 < images.max():  # 0 and 1 would be black
        raise SettingError(
            f"`transform` must give images of uint8 (0 to 255) or floats from 0 to 1, not {_describe(levels)}: leave "
            "out Normalize, since s6lib normalises training and test images alike"
        )
    return levels
