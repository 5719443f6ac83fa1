import re
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchsummary import summary
from torchvision.models.feature_extraction import get_graph_node_names

from s6lib.errors import SettingError
from s6lib.models import BottleneckNet, Dropout, PlainNet, SeparableNet
from s6lib.norm import GhostBatchNorm

PLAIN_LAYERS = """
Conv 10x28x28 90 - ReLU - BN 20 - Dropout - Conv 10x28x28 900 - ReLU - BN 20 - Dropout - MaxPool 10x14x14 -
Conv 10x12x12 900 - ReLU - BN 20 - Dropout - Conv 12x10x10 1,080 - ReLU - BN 24 - Dropout - Conv 16x8x8 1,728 -
ReLU - BN 32 - Dropout - Conv 16x6x6 2,304 - ReLU - BN 32 - Dropout - Conv 16x4x4 2,304 - ReLU - BN 32 -
AvgPool 16x1x1 - Conv 10x1x1 160"""
BOTTLENECK_LAYERS = """
Conv 10x26x26 90 - ReLU - BN 20 - Conv 16x24x24 1,440 - ReLU - BN 32 - Conv 10x24x24 160 - BN 20 - ReLU -
MaxPool 10x12x12 - Conv 10x10x10 900 - ReLU - BN 20 - Conv 32x10x10 320 - BN 64 - ReLU - Conv 10x10x10 320 - ReLU -
BN 20 - Conv 10x8x8 900 - ReLU - BN 20 - Conv 32x8x8 320 - BN 64 - ReLU - Conv 10x8x8 320 - ReLU - BN 20 -
Conv 14x6x6 1,260 - ReLU - BN 28 - Conv 16x4x4 2,016 - ReLU - BN 32 - AvgPool 16x1x1 - Conv 10x1x1 160"""
SEPARABLE_LAYERS = (
    "Conv 18x28x28 162 - MaxPool 18x14x14 - BN 36 - SiLU"
    + "".join(f" - Conv 18x{side}x{side} 162 - Conv 18x{side}x{side} 324 - BN 36" for side in (12, 10, 8, 6))
    + " - AvgPool 18x1x1 - Conv 10x1x1 180"
)
LONG = {"Conv": "Conv2d", "BN": "BatchNorm2d", "MaxPool": "MaxPool2d", "AvgPool": "AvgPool2d"}


def expected_layers(text):
    """(type, output shape, parameters) a layer, from the design's shorthand: shapes and zeros are left out there."""
    shape = ""
    for kind, changed, parameters in re.findall(r"([A-Z]\w+)(?: (\d+x\d+x\d+))?(?: ([\d,]+))?", text):
        shape = changed.replace("x", ", ") or shape
        yield LONG.get(kind, kind), shape, parameters or "0"


@pytest.mark.parametrize(
    ("network", "text", "parameters"),
    [
        (PlainNet, PLAIN_LAYERS, "9,646"),
        (BottleneckNet, BOTTLENECK_LAYERS, "8,546"),
        (SeparableNet, SEPARABLE_LAYERS, "2,466"),
    ],
)
def test_torchsummary_prints_the_layer_table(network, text, parameters, capsys):
    summary(network(), (1, 28, 28), device="cpu")
    printed = capsys.readouterr().out
    assert f"Total params: {parameters}\n" in printed
    rows = re.findall(r"(\w+)-\d+ +\[-1, ([\d, ]+)\] +([\d,]+)", printed)
    assert rows == list(expected_layers(text))


@given(st.integers(1, 40))
def test_a_plain_network_of_every_width_keeps_its_proportions(width):
    model = PlainNet(width=width)
    channels = [layer.out_channels for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    assert channels == [width] * 3 + [round(1.2 * width)] + [round(1.6 * width)] * 3 + [10]
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize("width", [0, -1, 10.0, "10", True, None])
def test_a_width_that_is_none_is_refused(width):
    with pytest.raises(SettingError, match=f"width must be a whole number from 1, not {width!r}"):
        PlainNet(width=width)


@pytest.mark.parametrize("width", [14, 18, 24, 32, 42])
def test_a_separable_network_of_every_width(width):
    model = SeparableNet(width, partial(GhostBatchNorm, num_splits=4))
    count = sum(weights.numel() for weights in model.parameters())
    assert count == 4 * width**2 + 65 * width
    assert re.search(rf"\b{width} (makes )?{count:,}\b", SeparableNet.__doc__)
    assert sum(isinstance(layer, GhostBatchNorm) for layer in model.modules()) == 5
    assert model(torch.randn(9, 1, 28, 28)).shape == (9, 10)


def test_a_block_adds_to_its_input_less_the_edge():
    model = SeparableNet().eval()
    for block in model.blocks:
        nn.init.zeros_(block[2].weight)  # the block then says nothing, and features pass by
    images = torch.randn(3, 1, 28, 28)
    features = model.first(images)[:, :, 4:-4, 4:-4]
    for _ in model.blocks:
        features = nn.functional.silu(features)
    assert torch.allclose(model(images), model.last(features).flatten(1), atol=1e-6)


def test_the_gradient_of_a_block_keeps_the_memory_format_of_its_images():
    """A crop by slicing would not, and each step from there backward would take half as long again."""
    model = SeparableNet().to(memory_format=torch.channels_last)
    seen = []
    for block in model.blocks:
        block.register_full_backward_hook(lambda block, inputs, outputs: seen.append(outputs[0]))
    model(torch.randn(4, 1, 28, 28)).sum().backward()
    assert len(seen) == 4
    assert all(gradient.is_contiguous(memory_format=torch.channels_last) for gradient in seen)


def test_torchvisions_extractors_find_the_layers():
    """Each is a node, which computes by itself, whether they trace a network in training or in evaluation."""
    model = PlainNet(partial(GhostBatchNorm, num_splits=4))
    names = ["images", *(f"layers.{number}" for number in range(len(model.layers))), "flatten"]
    assert get_graph_node_names(model) == (names, names)


def dropout_masks(p, shape, count):
    layer, ones = Dropout(p), torch.ones(shape).to(memory_format=torch.channels_last)
    return torch.stack([layer(ones) for _ in range(count)])


@pytest.mark.parametrize("p", [0.04, 0.3, 0.9])
def test_dropout_has_its_rate_and_keeps_the_mean(p):
    masks = dropout_masks(p, (64, 10, 28, 28), 20)
    deviation = (p * (1 - p) / masks.numel()) ** 0.5
    assert abs(float((masks == 0).double().mean()) - p) < 5 * deviation
    assert abs(float(masks.double().mean()) - 1) < 5 * deviation / (1 - p)
    assert set(masks.unique().tolist()) == {0.0, float(torch.tensor(1 / (1 - p)))}


def test_dropout_drops_each_element_by_itself():
    dropped = (dropout_masks(0.3, (4, 3, 5, 5), 4000) == 0).double().flatten(1) - 0.3
    assert float(dropped.mean(0).abs().max()) < 5 * (0.21 / 4000) ** 0.5
    covariances = dropped.T @ dropped / len(dropped)
    covariances.fill_diagonal_(0)
    assert float(covariances.abs().max()) < 5.5 * 0.21 / 4000**0.5
    assert abs(float((dropped[:-1] * dropped[1:]).mean())) < 5 * 0.21 / dropped[1:].numel() ** 0.5  # between steps


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_dropout_in_evaluation_and_at_the_extremes_is_torchs(p):
    images = torch.randn(4, 3, 5, 5)
    assert torch.equal(Dropout(p).eval()(images), images)
    if p != 0.5:
        assert torch.equal(Dropout(p)(images), nn.Dropout(p)(images))


def test_dropout_keeps_the_memory_format_takes_any_strides_and_passes_gradients_by_its_mask():
    images = torch.randn(4, 3, 5, 5, requires_grad=True)
    last = images.to(memory_format=torch.channels_last)
    output = Dropout(0.5)(last)
    assert output.is_contiguous(memory_format=torch.channels_last)
    output.sum().backward()
    assert torch.equal(images.detach() * images.grad, output)
    assert set(Dropout(0.5)(torch.ones(1).expand(1000)).tolist()) == {0.0, 2.0}
    assert Dropout(0.5)(torch.ones(0)).shape == (0,)
