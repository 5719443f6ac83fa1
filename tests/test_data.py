import errno
import gzip
import re
import shutil
import struct
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision.transforms.v2.functional as torchvision_functional
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchvision.datasets import KMNIST, MNIST, FakeData, FashionMNIST
from torchvision.transforms import v2

from s6lib.data import (
    CLASS_NAMES,
    DATA,
    STD,
    Augmentation,
    ImageDataset,
    adjust_brightness,
    adjust_contrast,
    affine,
    batches,
    hold_out,
    load_data,
    load_mnist,
    normalise,
    rotate,
)
from s6lib.errors import DataError, SettingError

RAW = DATA / "MNIST" / "raw"
ARCHIVES = [name for name, _ in MNIST.resources]


def assert_same_images(loaded, expected):
    for ours, theirs in zip(loaded, expected, strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.labels, theirs.labels)


# --- MNIST's files ---------------------------------------------------------------------------------------------------


@pytest.fixture
def archives(tmp_path, monkeypatch):
    """A data folder with the four archives, not yet unpacked, and no network."""
    monkeypatch.setattr(MNIST, "mirrors", ["file:///nowhere/"])
    return shutil.copytree(RAW, tmp_path / "MNIST" / "raw", ignore=shutil.ignore_patterns("*-ubyte"))


def test_an_unpacked_file_takes_the_place_of_its_archive_if_it_is_sound(archives):
    """Torchvision, which would be asked next, knows such files by their names alone."""
    archive = archives / "t10k-labels-idx1-ubyte.gz"
    unpacked = archive.with_suffix("")
    unpacked.write_bytes(gzip.decompress(archive.read_bytes()))
    archive.unlink()
    assert len(load_mnist(archives.parents[1])[1]) == 10_000
    damaged = unpacked.read_bytes()[:-1] + b"\x0b"
    unpacked.write_bytes(damaged)
    with pytest.raises(DataError, match=f"^damaged: {unpacked}; delete what is damaged"):
        load_mnist(archives.parents[1])
    assert unpacked.read_bytes() == damaged


def test_mnist_has_the_official_counts_and_its_last_10_000_training_images_are_held_out(mnist):
    train, test = mnist
    assert (train.images.shape, test.images.shape) == ((60_000, 28, 28), (10_000, 28, 28))
    assert train.labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert test.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert [f"{number} - {name}" for number, name in enumerate(CLASS_NAMES)] == MNIST.classes
    assert_same_images(hold_out(train), [train.part(slice(50_000)), train.part(slice(50_000, None))])


def test_archives_are_read_in_the_users_folder_and_those_that_are_missing_are_named(archives, mnist, monkeypatch):
    """Damaged archives are in faults/test_damage.py."""
    root = archives.parents[1]
    monkeypatch.setenv("HOME", str(root.parent))
    assert_same_images(load_mnist(f"~/{root.name}"), mnist)
    assert sorted(path.name for path in archives.iterdir()) == sorted(ARCHIVES)
    for name in ARCHIVES[2:]:
        (archives / name).unlink()
    named = re.escape(", ".join(str(archives / name) for name in ARCHIVES[2:]))
    with pytest.raises(DataError, match=rf"missing or damaged, .*failed: {named}\. Restore it with `git checkout"):
        load_mnist(root)
    monkeypatch.setattr("s6lib.data.FileLock", Mock(side_effect=OSError(errno.EROFS, "it cannot be written")))
    with pytest.raises(DataError, match=rf"failed: {named}\. .*\(.*it cannot be written"):
        load_mnist(root)


def test_missing_and_damaged_archives_are_downloaded(archives, mnist, monkeypatch):
    (archives / ARCHIVES[1]).unlink()
    (archives / ARCHIVES[3]).write_bytes(gzip.compress(b"not MNIST"))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=RAW)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        downloaded = load_mnist(archives.parents[1])
        server.shutdown()
    assert_same_images(downloaded, mnist)
    assert downloaded[1].class_names == CLASS_NAMES


@pytest.mark.parametrize(("name", "kind"), [("fashion-mnist", FashionMNIST), ("kmnist", KMNIST)])
def test_torchvisions_data_sets(name, kind, tmp_path, monkeypatch):
    """Small files in their format stand for the archives, which cannot be downloaded here."""
    monkeypatch.setattr("s6lib.data.DATA", tmp_path)
    monkeypatch.setattr(kind, "mirrors", ["file:///nowhere/"], raising=False)
    with pytest.raises(DataError, match=f"the data set '{name}' could not be downloaded to, or read from, .*network"):
        load_data(name)
    raw = tmp_path / kind.__name__ / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, 2, 28, 28) + bytes(range(98)) * 16)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, 2) + bytes([0, 9]))
    train, test = load_data(name)
    assert (train.images.shape, test.labels.tolist()) == ((2, 28, 28), [0, 9])
    assert train.class_names == tuple(kind.classes)
    assert train.mean == round(float((train.images / 255).mean()), 4)


# --- a data set of images --------------------------------------------------------------------------------------------


def test_an_image_data_set_is_a_torch_data_set(mnist):
    train, _ = mnist
    image, label = train[0]
    assert len(train) == 60_000
    assert (image.shape, image.dtype, label, type(label)) == ((1, 28, 28), torch.float32, 5, int)
    assert torch.equal(train[-1][0], normalise(train.images[-1:])[0])
    images, labels = next(iter(DataLoader(Subset(train, range(100)), 100)))
    assert torch.equal(images, normalise(train.images[:100]))
    assert torch.equal(labels, train.labels[:100])
    assert len(list(train.part(slice(3)))) == 3  # iteration ends


def test_a_part_keeps_what_belongs_to_the_data_set():
    whole = ImageDataset(X, Y, NAMES, mean=0.5, std=0.25)
    part = whole.part(torch.tensor([7, 2])).to("cpu")
    assert_same_images([part], [ImageDataset(X[[7, 2]], Y[[7, 2]])])
    assert (part.class_names, part.mean, part.std) == (tuple(NAMES), 0.5, 0.25)
    assert torch.allclose(part[0][0], (torch.tensor(X[7:8]) / 255 - 0.5) / 0.25, atol=1e-6)


random = np.random.default_rng(0)


class Halved(ImageDataset):
    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image, label // 2


X, Y = random.integers(0, 256, (40, 12, 12), dtype=np.uint8), random.integers(0, 10, 40)
NAMES = [f"class {number}" for number in range(10)]
SERIES = pd.Series(Y)
FIXED = X.copy()
FIXED.setflags(write=False)


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (X, Y), (torch.tensor(X), torch.tensor(Y)), (list(X), list(Y)), (list(torch.tensor(X)), Y.tolist()),
        (X[:, ::-1], Y[::-1]), (np.broadcast_to(X[:1], X.shape), Y), (X, Y.astype(">i4")), (X, Y.astype(np.uint16)),
        (X, SERIES.sample(frac=1, random_state=1)), (X, SERIES.astype("category")), (X, Y > 4), (FIXED, Y),
    ],
)  # fmt: skip
def test_arrays_of_any_layout_are_kept_as_they_are(images, labels):
    dataset = ImageDataset(images, labels, NAMES)
    assert (dataset.images.dtype, dataset.labels.dtype) == (torch.uint8, torch.int64)
    assert np.array_equal(dataset.images, np.stack([np.asarray(image) for image in images]))
    assert dataset.labels.tolist() == [int(label) for label in labels]


# --- a user's data ---------------------------------------------------------------------------------------------------

GREY = v2.Grayscale()
FLOATS = v2.Compose([GREY, v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
PAIRS = TensorDataset(torch.tensor(X)[:, None], torch.tensor(Y))


def fake(count, transform=GREY):
    return FakeData(count, (3, 12, 12), num_classes=4, transform=transform)


@pytest.mark.parametrize("transform", [GREY, FLOATS, v2.Compose([GREY, v2.PILToTensor()])])
def test_torchs_data_sets_are_read_as_grey_levels_with_the_names_of_their_classes(transform):
    train, test = load_data(lambda: (fake(30, transform), Subset(fake(40, transform), range(30, 40))))
    assert (len(train), len(test), train.class_names) == (30, 10, ("0", "1", "2", "3"))
    named = fake(20, transform)
    named.classes = np.array(["shirt", "shoe", "bag", "hat"])
    for part in load_data(lambda: (Subset(Subset(named, range(15)), range(9)), fake(9, transform))):
        assert part.class_names == ("shirt", "shoe", "bag", "hat")
    expected = [(np.asarray(image), label) for image, label in fake(40)]
    assert np.array_equal(test.images, np.stack([image for image, _ in expected[30:]]))
    assert test.labels.tolist() == [label for _, label in expected[30:]]


@pytest.mark.parametrize(
    "part", [PAIRS, [(image, int(label)) for image, label in PAIRS], [(X[i] / 255, Y[i]) for i in range(40)],
             [(X[i][..., None], Y[i : i + 1]) for i in range(40)],
             TensorDataset(torch.tensor(X) / 255, torch.tensor(Y)),
             type("Own", (ImageDataset,), {"__init__": lambda self: ImageDataset.__init__(self, X, Y)})()],
)  # fmt: skip
def test_pairs_of_image_and_label_are_a_data_set(part):
    _, test = load_data(lambda: [part, part])
    assert_same_images([test], [ImageDataset(X, Y)])
    assert len(test.class_names) == 10


def failing():
    raise ZeroDivisionError("by\nzero")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("cifar", "data must be a function or one of mnist, fashion-mnist, kmnist, not 'cifar'"),
        (failing, "the data cannot be made: ZeroDivisionError: by zero"),
        (lambda: PAIRS, "data must give two data sets .*, not TensorDataset"),
        (lambda: (X, Y, X, Y), "data must give two data sets .*, not 4"),
        (lambda: (X, Y), r"must hold pairs \(image, label\), not ndarray"),
        (lambda: ([], []), r"must hold pairs \(image, label\), and is empty"),
        (lambda: (Halved(X, Y), Halved(X, Y)), "a subclass of ImageDataset must keep its __getitem__"),
        (lambda: (1, 2), r"must hold pairs \(image, label\), not int"),
        (lambda: [TensorDataset(*PAIRS.tensors, PAIRS.tensors[1])] * 2, r"must hold pairs \(image, label\)"),
        (lambda: [fake(9, None)] * 2, r"images must be uint8 .* use transforms.Grayscale\(\)"),
        (lambda: [fake(9, v2.Compose([FLOATS, v2.Normalize([0.5], [0.5])]))] * 2, "uint8 .* leave out Normalize"),
        (lambda: [fake(9, v2.Compose([GREY, v2.RandomRotation(45)]))] * 2, "differs each time: give .* as `transform`"),
        (lambda: (PAIRS, fake(9, v2.Compose([GREY, v2.Resize(8)]))), r"of one size, not \(12, 12\) and \(8, 8\)"),
        (lambda: [[(X[0], 0.5), (X[1], 1)]] * 2, "labels must be whole numbers"),
        (lambda: [ImageDataset(X[:2], [0, 1], names) for names in ("abc", "ac")], "must number the classes alike"),
        (lambda: [ImageDataset(X[:2], [0, 1], names) for names in ("012", "02")], "must number the classes alike"),
        (lambda: ImageDataset(X / 255, Y, NAMES), "images must be uint8 .*, not torch.float64"),
        (lambda: ImageDataset(X[:, :8], Y, NAMES), r"images must be uint8 .* \(40, 8, 12\).* Resize"),
        (lambda: ImageDataset(X.astype(np.uint16), Y, NAMES), "images must be uint8 .*, not torch.uint16 .* to 255"),
        (lambda: ImageDataset(X[:0], Y[:0], NAMES), "images must be uint8"),
        (lambda: ImageDataset([X[0], X[1, :6, :6]], Y[:2], NAMES), "images must be numbers of one shape, .* not list"),
        (lambda: ImageDataset(X, Y[:9], NAMES), r"labels must be whole numbers \(40,\)"),
        (lambda: ImageDataset(X, Y + 1, NAMES), "labels must be whole numbers .* from 0 to 9, .* from 1 to 10"),
        (lambda: ImageDataset(X, Y - 1, NAMES), "labels must be whole numbers .* from -1 to 8"),
        (lambda: ImageDataset(X, Y * 1.0, NAMES), "labels must be whole numbers .*float64"),
        (lambda: ImageDataset(X, Y.astype(str), NAMES), "labels must be numbers"),
        (lambda: ImageDataset(X, Y, NAMES[:1]), "class_names must be 2 to 256 names, one per class"),
        (lambda: ImageDataset(X, Y, 10), "class_names must be .* not 10"),
    ],
)
def test_what_is_no_data_set_is_one_sentence(data, said):
    with pytest.raises(DataError, match=said) as raised:
        load_data(data)
    assert "\n" not in str(raised.value)


def test_images_that_come_class_by_class_are_shuffled_once_by_a_fixed_seed():
    labels = np.repeat(np.arange(4), 50)
    ordered = ImageDataset(np.arange(200, dtype=np.uint8).reshape(-1, 1, 1), labels, NAMES[:4])
    train, test = load_data(lambda: (ordered, ordered))
    assert_same_images([test], [ordered])
    order = train.images.flatten().long()
    assert order.sort().values.tolist() == list(range(200))
    assert torch.equal(train.labels, ordered.labels[order])
    assert min(train.labels[:60].bincount(minlength=4)) > 5  # as `train_images` takes them
    assert min(hold_out(train)[1].labels.bincount(minlength=4)) > 2


def test_what_data_draws_is_the_same_for_every_run():
    def draw():
        images = np.random.randint(0, 256, (20, 4, 4)).astype(np.uint8)  # noqa: NPY002 - as users write it
        return [TensorDataset(torch.tensor(images), torch.randint(0, 2, (20,)))] * 2

    assert_same_images(load_data(draw), load_data(draw))


@given(st.lists(st.integers(0, 255), min_size=2, max_size=50))
def test_mean_and_sd_are_those_of_the_training_pixels(pixels):
    images = torch.tensor(pixels, dtype=torch.uint8).view(-1, 1, 1)
    part = ImageDataset(images, torch.arange(len(pixels)) % 2)
    train, test = load_data(lambda: (part, part.part(slice(1))))
    expected = images.double() / 255
    assert train.mean == test.mean == round(float(expected.mean()), 4)
    assert train.std == test.std == (round(float(expected.std()), 4) or 1.0)  # of one grey level: no division by zero


# --- augmentation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [normalise, rotate, adjust_brightness, adjust_contrast])
def test_images_are_left_as_they_were(mnist, function):
    images = mnist[0].images[:4].float()
    before = images.clone()
    changed = function(images) if function is normalise else function(images, torch.full((4,), 9.0))
    assert torch.equal(images, before)
    assert not torch.equal(changed.squeeze(1), before)


firsts = st.integers(0, 59_990)


@settings(max_examples=30)
@given(firsts, st.lists(st.floats(-180, 180, width=32), min_size=1, max_size=5), st.integers(0, 9))
def test_rotate_is_torchvisions_image_by_image(mnist, first, angles, fill):
    images = mnist[0].images[first : first + len(angles)]
    angles = torch.tensor(angles)
    for image, angle, ours in zip(images, angles.tolist(), rotate(images, angles, fill), strict=True):
        if angle % 90:  # torchvision turns right angles by another rule
            assert torch.equal(ours, torchvision_functional.rotate(image[None], angle, fill=[fill])[0].float())


amounts = st.tuples(*(st.floats(*limits, width=32) for limits in ((-180, 180), (0.5, 2), (-9, 9), (-9, 9))))


@settings(max_examples=30)
@given(firsts, st.lists(amounts, min_size=1, max_size=5))
def test_affine_is_torchvisions_image_by_image(mnist, first, drawn):
    images = mnist[0].images[first : first + len(drawn)]
    angles, scales, right, down = torch.tensor(drawn).T
    moved = affine(images, angles, scales, torch.stack([right, down], dim=1))
    for image, (angle, scale, *shift), ours in zip(images, drawn, moved, strict=True):
        bilinear = torchvision_functional.InterpolationMode.BILINEAR
        theirs = torchvision_functional.affine(image[None].float(), -angle, shift, scale, [0.0, 0.0], bilinear)
        assert torch.allclose(ours, theirs[0], atol=0.05)  # of 255 grey levels


@settings(max_examples=30)
@given(firsts, st.lists(st.floats(0, 3, width=32), min_size=1, max_size=5))
def test_jitter_is_torchvisions_image_by_image(mnist, first, factors):
    images = mnist[0].images[first : first + len(factors)]
    brighter, stretched = (change(images, torch.tensor(factors)) for change in (adjust_brightness, adjust_contrast))
    for image, factor, bright, stretch in zip(images, factors, brighter, stretched, strict=True):
        assert torch.equal(bright, torchvision_functional.adjust_brightness(image[None], factor)[0].float())
        difference = stretch - torchvision_functional.adjust_contrast(image[None], factor)[0].float()
        # An image's mean may round otherwise when taken in a batch: a grey level then falls on the other side.
        assert difference.abs().max() <= 1
        assert difference.count_nonzero() <= 4


# --- batches ---------------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.integers(1, 150), st.integers(1, 70))
def test_batches_hold_every_image_once_with_its_label(mnist, count, size):
    dataset = ImageDataset(mnist[0].images[:count], torch.arange(count), range(count + 1))
    parts = list(batches(dataset, size))
    assert [len(labels) for _, labels in parts] == [len(part) for part in torch.arange(count).split(size)]
    images, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    assert labels.sort().values.tolist() == list(range(count))
    assert torch.equal(images, normalise(dataset.images[labels]))


EVERY = Augmentation(15.0, 0.1, 2.0, 0.1)


@pytest.mark.parametrize("augmentation", [Augmentation(7.0, 0.1), EVERY], ids=["published", "every"])
def test_what_recipes_draw_is_settled_and_comes_from_the_generator_alone(mnist, augmentation):
    """The order, then brightness, contrast, angle, scale, right and down: whatever else is drawn comes after them."""
    dataset, generator = mnist[0].part(slice(150)), torch.Generator().manual_seed(5)
    order = torch.randperm(150, generator=generator)
    rotation, jitter, shift, scale = augmentation
    limits = torch.tensor([jitter, jitter, rotation, scale, shift, shift])
    amounts = [limit * (2 * torch.rand(150, generator=generator) - 1) for limit in limits]
    brightness, contrast, angles, scales, *shifts = amounts
    expected = adjust_contrast(adjust_brightness(dataset.images[order], 1 + brightness), 1 + contrast)
    moved = affine(expected, angles, 1 + scales, torch.stack(shifts, 1)) if shift else rotate(expected, angles)
    parts = batches(dataset, 64, augmentation, torch.Generator().manual_seed(5))
    images, labels = map(torch.cat, zip(*parts, strict=True))
    assert torch.equal(labels, dataset.labels[order])
    # A mean, in the contrast, may round otherwise in another batch: a pixel is then one grey level off, or four are.
    difference = (images - normalise(moved)).abs()
    assert difference.max() <= 1.01 / (255 * STD)
    assert (difference > 1e-5).sum() <= 4 * 150


@pytest.mark.parametrize("transform", [v2.RandomRotation(45), lambda image: image / 255 + 0.1 * torch.randn(28, 28)])
def test_a_transform_is_drawn_for_each_image_of_a_batch(mnist, transform):
    """Noise may overshoot in a few pixels."""
    ((images, _),) = batches(mnist[0].part(torch.zeros(64, dtype=torch.int64)), 64, transform=transform)
    assert len(images.flatten(1).unique(dim=0)) > 30


@pytest.mark.parametrize("floats", [0.0, 0.5, 1.0])
def test_a_transform_gets_one_image_before_normalisation_and_may_make_floats_of_some(mnist, floats):
    dataset, seen = ImageDataset(mnist[0].images[:50], torch.arange(50), range(50)), set()

    def invert(image):
        seen.add((image.dtype, image.shape))
        return (255 - image) / 255 * 1.0000001 if torch.rand(()) < floats else 255 - image  # and rounding may overshoot

    for images, numbers in batches(dataset, 20, transform=invert):
        assert torch.allclose(images, normalise(255 - dataset.images[numbers]), atol=1e-6)
    assert seen == {(torch.uint8, (1, 28, 28))}
    assert len(list(batches(dataset, 50, transform=torch.zeros_like))) == 1  # an image may be black


@pytest.mark.parametrize(
    ("transform", "said"),
    [
        (v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.13], [0.31])]), "leave out Normalize"),
        (v2.ToDtype(torch.float32), r"give images of uint8 \(0 to 255\) or floats from 0 to 1, not torch.float32"),
        (v2.Grayscale(3), r"of the same size, not \(3, 28, 28\)"),
        (lambda image: image / 255 * torch.nan, "not torch.float32"),
        (lambda image: None, "of the same size, not NoneType"),
    ],
)
def test_a_transform_of_another_kind_is_one_sentence(mnist, transform, said):
    with pytest.raises(SettingError, match=f"`transform` must .*{said}"):
        next(batches(mnist[0].part(slice(9)), 9, transform=transform))
