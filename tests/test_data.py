import errno
import gzip
import shutil
import struct
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as torchvision_functional
from conftest import needs_fake_gpu
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torchvision.datasets import KMNIST, MNIST, FashionMNIST

from s6lib.data import (
    CLASS_NAMES,
    DATA,
    STD,
    Augmentation,
    DataError,
    Digits,
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

ARCHIVES = [name for name, _ in MNIST.resources]
UNPACKED = [name.removesuffix(".gz") for name in ARCHIVES]


@pytest.fixture
def archives(tmp_path):
    """A data folder with the four archives, not yet unpacked."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ARCHIVES:
        shutil.copy(DATA / "MNIST" / "raw" / name, raw)
    return raw


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setattr(MNIST, "mirrors", ["file:///nowhere/"])


def test_mnist_has_the_official_counts(mnist):
    train, test = mnist
    assert train.images.shape == (60_000, 28, 28)
    assert test.images.shape == (10_000, 28, 28)
    assert train.images.dtype == torch.uint8
    assert train.labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert test.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert [f"{digit} - {name}" for digit, name in enumerate(CLASS_NAMES)] == MNIST.classes


def assert_same_digits(loaded, mnist):
    for digits, others in zip(loaded, mnist, strict=True):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(digits[:2], others[:2], strict=True))


def test_archives_unpack_offline(archives, no_network, mnist):
    assert_same_digits(load_mnist(archives.parents[1]), mnist)
    assert sorted(path.name for path in archives.iterdir()) == sorted([*ARCHIVES, *UNPACKED])
    theirs = [MNIST(archives.parents[1], train=train) for train in (True, False)]
    assert_same_digits([Digits(digits.data, digits.targets) for digits in theirs], mnist)


def test_unpacked_files_need_no_archives(archives, no_network, mnist):
    load_mnist(archives.parents[1])
    for name in ARCHIVES:
        (archives / name).unlink()
    assert_same_digits(load_mnist(archives.parents[1]), mnist)


def test_damaged_unpacked_files_without_archives_are_kept(archives, no_network):
    load_mnist(archives.parents[1])
    for name in ARCHIVES:
        (archives / name).unlink()
    for name in UNPACKED:
        with (archives / name).open("ab") as file:
            file.write(b"more")
    with pytest.raises(DataError, match=", ".join(str(archives / name) for name in ARCHIVES)):
        load_mnist(archives.parents[1])
    assert sorted(path.name for path in archives.iterdir()) == sorted(UNPACKED)


READ_ONLY = """\
set -e
mount -t tmpfs none {folder}
cp -r {source} {folder}
mount -o remount,ro {folder}
if touch {folder}/file 2>/dev/null; then exit 1; fi
echo mounted
{python} -c "from s6lib.data import load_mnist; print(*(len(digits.labels) for digits in load_mnist('{folder}')))"
"""


@pytest.mark.slow
@pytest.mark.parametrize("kept", ["*.gz", "*-ubyte", "*"])
def test_a_read_only_folder_will_do(archives, tmp_path, kept):
    load_mnist(archives.parents[1])
    for path in set(archives.iterdir()) - set(archives.glob(kept)):
        path.unlink()
    script = READ_ONLY.format(folder=tmp_path / "disk", source=tmp_path / "MNIST", python=sys.executable)
    (tmp_path / "disk").mkdir()
    try:
        done = subprocess.run(["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("unshare is not here")
    if "mounted" not in done.stdout:
        pytest.skip("this user may not mount a tmpfs")
    assert done.stdout == "mounted\n60000 10000\n", done.stderr


def test_a_missing_archive_in_a_read_only_folder_is_named(archives, monkeypatch):
    def read_only(path):
        raise OSError(errno.EROFS, "Read-only file system", path)

    (archives / ARCHIVES[2]).unlink()
    monkeypatch.setattr("s6lib.data.FileLock", read_only)
    with pytest.raises(DataError, match=rf"failed: {archives / ARCHIVES[2]}\. .*What failed: .*Read-only file system"):
        load_mnist(archives.parents[1])


def test_a_full_disk_hinders_the_unpacking_alone(archives, monkeypatch, mnist):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device", path)

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    assert_same_digits(load_mnist(archives.parents[1]), mnist)
    assert not list(archives.glob("*-ubyte"))


def test_damaged_unpacked_file_is_unpacked_again(archives, no_network, mnist):
    load_mnist(archives.parents[1])
    unpacked = archives / "t10k-images-idx3-ubyte"
    damaged = bytearray(unpacked.read_bytes())
    damaged[5000] ^= 255
    unpacked.write_bytes(damaged)
    assert torch.equal(load_mnist(archives.parents[1])[1].images, mnist[1].images)


@pytest.mark.parametrize(
    ("name", "damage"),  # faults/test_damage.py flips and truncates the other archives too
    [*((name, "missing") for name in ARCHIVES), (ARCHIVES[0], "flipped"), (ARCHIVES[0], "truncated")],
)
def test_damaged_archive_is_named_with_the_remedy(archives, no_network, name, damage):
    content = bytearray((archives / name).read_bytes())
    content[len(content) // 2] ^= 255
    (archives / name).unlink()
    if damage != "missing":
        (archives / name).write_bytes(content if damage == "flipped" else content[:100])
    with pytest.raises(DataError, match=rf"{name}\. Restore it with `git checkout"):
        load_mnist(archives.parents[1])


class _Mirror(SimpleHTTPRequestHandler):
    def __init__(self, *args):
        super().__init__(*args, directory=DATA / "MNIST" / "raw")

    def log_message(self, *args):
        pass


@pytest.fixture
def mirror(monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), _Mirror) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        yield
        server.shutdown()


def test_missing_and_damaged_archives_are_downloaded(archives, mirror, mnist):
    (archives / ARCHIVES[1]).unlink()
    (archives / ARCHIVES[3]).write_bytes(gzip.compress(b"not MNIST"))
    assert_same_digits(load_mnist(archives.parents[1]), mnist)


def test_the_home_folder_may_be_written_short(archives, no_network, mnist, monkeypatch):
    root = archives.parents[1]
    monkeypatch.setenv("HOME", str(root.parent))
    monkeypatch.chdir(root)
    assert torch.equal(load_mnist(f"~/{root.name}")[1].images, mnist[1].images)
    assert not (root / "~").exists()


@pytest.mark.parametrize("function", [normalise, rotate, adjust_brightness, adjust_contrast])
def test_images_are_left_as_they_were(mnist, function):
    images = mnist[0].images[:4].float()
    before = images.clone()
    changed = function(images) if function is normalise else function(images, torch.full((4,), 9.0))
    assert torch.equal(images, before)
    assert not torch.equal(changed.squeeze(1), before)


def test_normalise_gives_mean_zero_and_deviation_one(mnist):
    images = normalise(mnist[0].images)
    assert images.shape == (60_000, 1, 28, 28)
    assert abs(float(images.mean())) < 1e-3
    assert abs(float(images.std()) - 1) < 1e-3


@settings(max_examples=30)
@given(st.integers(0, 59_990), st.lists(st.floats(-180, 180, width=32), min_size=1, max_size=5))
def test_rotate_is_torchvisions_image_by_image(mnist, first, angles):
    images = mnist[0].images[first : first + len(angles)]
    angles = torch.tensor(angles)
    rotated = rotate(images, angles)
    for image, angle, ours in zip(images, angles.tolist(), rotated, strict=True):
        if angle % 90:  # torchvision turns right angles by another rule
            assert torch.equal(ours, torchvision_functional.rotate(image[None], angle, fill=[1])[0].float())


amounts = st.tuples(
    st.floats(-180, 180, width=32), st.floats(0.5, 2, width=32), st.floats(-9, 9, width=32), st.floats(-9, 9, width=32)
)


@settings(max_examples=30)
@given(st.integers(0, 59_990), st.lists(amounts, min_size=1, max_size=5))
def test_affine_is_torchvisions_image_by_image(mnist, first, drawn):
    images = mnist[0].images[first : first + len(drawn)]
    angles, scales, right, down = torch.tensor(drawn).T
    moved = affine(images, angles, scales, torch.stack([right, down], dim=1))
    for image, (angle, scale, *shift), ours in zip(images, drawn, moved, strict=True):
        bilinear = torchvision_functional.InterpolationMode.BILINEAR
        theirs = torchvision_functional.affine(image[None].float(), -angle, shift, scale, [0.0, 0.0], bilinear)
        assert torch.allclose(ours, theirs[0], atol=0.05)  # of 255 grey levels


def test_affine_turns_as_rotate_does_and_shifts_right_and_down(mnist):
    images, ones = mnist[0].images[:3], torch.ones(3)
    turned = affine(images, 90 * ones, ones, torch.zeros(3, 2))
    assert torch.allclose(turned, rotate(images, 90 * ones, fill=0), atol=0.05)
    shifted = affine(images, 0 * ones, ones, torch.tensor([[2.0, 3.0]]).expand(3, 2))
    assert torch.allclose(shifted[:, 3:, 2:], images[:, :-3, :-2].float(), atol=0.05)


def test_rotate_brings_in_the_fill(mnist):
    corner = rotate(mnist[0].images[:1], torch.tensor([15.0]))[0, 0, 0]
    assert corner == 1
    assert rotate(mnist[0].images[:1], torch.tensor([15.0]), fill=7)[0, 0, 0] == 7


@settings(max_examples=30)
@given(st.integers(0, 59_990), st.lists(st.floats(0, 3, width=32), min_size=1, max_size=5))
def test_jitter_is_torchvisions_image_by_image(mnist, first, factors):
    images = mnist[0].images[first : first + len(factors)]
    brighter, stretched = (change(images, torch.tensor(factors)) for change in (adjust_brightness, adjust_contrast))
    for i, factor in enumerate(factors):
        one = images[i][None]
        assert torch.equal(brighter[i], torchvision_functional.adjust_brightness(one, factor)[0].float())
        difference = stretched[i] - torchvision_functional.adjust_contrast(one, factor)[0].float()
        # An image's mean may round otherwise when taken in a batch: a grey level then falls on the other side.
        assert difference.abs().max() <= 1
        assert difference.count_nonzero() <= 4


def test_the_last_10_000_training_digits_are_held_out(mnist):
    rest, held_out = hold_out(mnist[0])
    assert (len(rest.images), len(held_out.images)) == (50_000, 10_000)
    together = Digits(*(torch.cat(parts) for parts in zip(rest[:2], held_out[:2], strict=True)))
    assert_same_digits([together], [mnist[0]])


def squares(size=12, classes=3, count=60):
    """Images with a bright square whose place is the class."""
    labels = np.arange(count) % classes
    images = np.zeros((count, size, size), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[label : label + 3, label : label + 3] = 200
    names = [f"square {number}" for number in range(classes)]
    return images, labels, torch.from_numpy(images[:20]), torch.from_numpy(labels[:20]), names


@pytest.mark.parametrize(("size", "classes"), [(12, 3), (64, 12)])
def test_a_callable_gives_a_data_set_of_any_size(size, classes):
    train, test = load_data(lambda: squares(size, classes))
    assert train.images.shape == (60, size, size)
    assert (test.labels.dtype, len(test.labels), len(test.class_names)) == (torch.int64, 20, classes)
    (images, _), *_ = batches(train, 60, Augmentation(rotation=0.0), torch.Generator().manual_seed(1))
    assert images.shape == (60, 1, size, size)
    assert float(images.mean()) == pytest.approx(0, abs=0.05)
    assert float(images.std()) == pytest.approx(1, abs=0.05)


def test_a_data_set_of_one_grey_level_is_no_division_by_zero():
    images, labels = torch.zeros(4, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
    train, _ = load_data(lambda: (images, labels, images, labels, ("a", "b")))
    assert normalise(train.images, train.mean, train.std).abs().sum() == 0


IMAGES, LABELS, _, _, NAMES = squares()


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (None, "data must return train_images, train_labels, test_images, test_labels, class_names, not NoneType"),
        ((IMAGES, LABELS), "data must return train_images"),
        ((IMAGES / 255, LABELS, IMAGES, LABELS, NAMES), "train_images must be uint8 .* not torch.float64"),
        ((IMAGES, LABELS, IMAGES[:, None], LABELS, NAMES), r"test_images must be uint8 .* \(60, 1, 12, 12\)"),
        ((IMAGES[:, :8], LABELS, IMAGES, LABELS, NAMES), r"train_images must be uint8 .* \(60, 8, 12\)"),
        ((IMAGES, LABELS, IMAGES[:, :8, :8], LABELS, NAMES), r"test_images must be of the size of train_images"),
        ((IMAGES[:0], LABELS[:0], IMAGES, LABELS, NAMES), "train_images must be uint8"),
        ((IMAGES, LABELS[:9], IMAGES, LABELS, NAMES), "train_labels must be whole numbers"),
        ((IMAGES, LABELS + 1, IMAGES, LABELS, NAMES), "from 0 to 2, an index .* from 1 to 3"),
        ((IMAGES, LABELS * 1.0, IMAGES, LABELS, NAMES), "train_labels must be whole numbers"),
        ((IMAGES, LABELS, IMAGES, LABELS, NAMES[:1]), "data must have 2 to 256 class_names, not 1"),
    ],
)
def test_what_is_no_data_set_is_said(made, said):
    with pytest.raises(DataError, match=said):
        load_data(lambda: made)


def test_data_that_cannot_be_made_is_said():
    with pytest.raises(DataError, match="the data cannot be made: ZeroDivisionError: division by zero"):
        load_data(lambda: 1 / 0)


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


def test_batches_hold_every_image_once_with_its_label(mnist):
    digits = Digits(mnist[0].images[:150], torch.arange(150))
    parts = list(batches(digits, 64, Augmentation(), torch.Generator().manual_seed(1)))
    assert [len(labels) for _, labels in parts] == [64, 64, 22]
    images, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    assert labels.sort().values.tolist() == list(range(150))
    assert labels.tolist() != list(range(150))
    assert torch.equal(images, normalise(digits.images[labels]))


def test_batches_come_from_the_generator_alone(mnist):
    def drawn(seed):
        digits = Digits(mnist[0].images[:100], mnist[0].labels[:100])
        every = Augmentation(15.0, 0.1, 2.0, 0.1)
        return torch.cat([images for images, _ in batches(digits, 64, every, torch.Generator().manual_seed(seed))])

    torch.manual_seed(1)
    first = drawn(3)
    torch.manual_seed(2)
    assert torch.equal(first, drawn(3))
    assert not torch.equal(first, drawn(4))


def test_what_the_published_recipes_draw_is_settled(mnist):
    """Order, brightness, contrast, angles, in this order: whatever else is drawn comes after them."""
    digits, generator = mnist[0].part(slice(150)), torch.Generator().manual_seed(5)
    order = torch.randperm(150, generator=generator)
    brightness, contrast, angles = (torch.rand(150, generator=generator).mul_(2).sub_(1) for _ in range(3))
    expected = adjust_brightness(digits.images[order], 1 + 0.1 * brightness)
    expected = normalise(rotate(adjust_contrast(expected, 1 + 0.1 * contrast), 7.0 * angles))
    drawn = list(batches(digits, 64, Augmentation(7.0, 0.1), torch.Generator().manual_seed(5)))
    assert torch.equal(torch.cat([labels for _, labels in drawn]), digits.labels[order])
    images = torch.cat([images for images, _ in drawn])
    # A mean, in the contrast, may round otherwise in another batch: a pixel is then one grey level off.
    assert (images - expected).abs().max() <= 1.01 / (255 * STD)
    assert (images != expected).sum() <= 150


def test_each_image_of_a_batch_has_its_own_augmentation(mnist):
    same = Digits(mnist[0].images[:1].expand(64, -1, -1), torch.zeros(64, dtype=torch.int64))
    for name, most in zip(Augmentation._fields, (15.0, 0.1, 2.0, 0.1), strict=True):
        ((images, _),) = batches(same, 64, Augmentation(**{name: most}), torch.Generator().manual_seed(1))
        assert len(images.flatten(1).unique(dim=0)) > 40  # small angles may agree to the pixel


@needs_fake_gpu
def test_batches_stay_on_the_device_of_the_digits():
    """A GPU of which torch computes shapes and devices alone."""
    with FakeTensorMode():
        images = torch.zeros(100, 28, 28, dtype=torch.uint8, device="cuda")
        digits = Digits(images, torch.zeros(100, dtype=torch.int64, device="cuda"))
        augmentations = (Augmentation(15.0, 0.1), Augmentation(15.0, 0.0, 2.0, 0.1))
        parts = [part for each in augmentations for part in batches(digits, 64, each, torch.Generator())]
        parts += [(function(images, torch.ones(100, device="cuda")),) for function in (rotate, adjust_brightness)]
    assert [tuple(images.shape) for images, *_ in parts[:4]] == 2 * [(64, 1, 28, 28), (36, 1, 28, 28)]
    assert {tensor.device.type for part in parts for tensor in part} == {"cuda"}
