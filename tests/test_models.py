import re
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn
from torchsummary import summary
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from s6lib.models import BottleneckNet, Dropout, PlainNet, SeparableNet, receptive_fields
from s6lib.norm import GhostBatchNorm
from s6lib.recipes import CONDITIONS, PLAIN, RECIPES, build_model

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
    for word in " ".join(text.split()).split(" - "):
        kind, *numbers = word.split()
        parameters = "0"
        for number in numbers:
            if "x" in number:
                shape = ", ".join(number.split("x"))
            else:
                parameters = number
        yield LONG.get(kind, kind), shape, parameters


@pytest.mark.parametrize(
    ("network", "text", "totals"),
    [
        (PlainNet, PLAIN_LAYERS, ["9,646", "0.63", "0.04", "0.67"]),
        (BottleneckNet, BOTTLENECK_LAYERS, ["8,546", "0.72", "0.03", "0.76"]),
        (SeparableNet, SEPARABLE_LAYERS, ["2,466", "0.33", "0.01", "0.34"]),
    ],
)
def test_torchsummary_prints_the_layer_table(network, text, totals, capsys):
    summary(network(), (1, 28, 28), device="cpu")
    printed = capsys.readouterr().out
    rows = re.findall(r"(\w+)-\d+ +\[-1, ([\d, ]+)\] +([\d,]+)", printed)
    assert rows == list(expected_layers(text))
    sizes = [
        re.search(rf"{name}: ([\d.,]+)", printed)[1]
        for name in ("Total params", "pass size \\(MB\\)", "Params size \\(MB\\)", "Total Size \\(MB\\)")
    ]
    assert sizes == totals


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("condition", CONDITIONS, ids=lambda condition: condition.slug)
def test_every_condition_gives_logits(recipe, condition):
    model = build_model(recipe, condition)
    assert model(torch.randn(9, 1, 28, 28)).shape == (9, 10)
    assert all(layer.bias is None for layer in model.modules() if isinstance(layer, nn.Conv2d))


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


def test_summary_names_the_ghost_layers(capsys):
    summary(build_model(PLAIN, CONDITIONS[3]), (1, 28, 28), device="cpu")
    assert capsys.readouterr().out.count("GhostBatchNorm-") == 7


@pytest.mark.parametrize("network", [PlainNet, BottleneckNet])
def test_receptive_fields_are_where_gradients_reach(network):
    layers = [m for m in network().modules() if isinstance(m, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d)]
    fields = receptive_fields(network())
    assert len(fields) == len(layers)
    for count, (_, size) in enumerate(fields, 1):
        chain = nn.Sequential(*layers[:count])
        for layer in chain:
            if isinstance(layer, nn.Conv2d):
                nn.init.ones_(layer.weight)
            if isinstance(layer, nn.MaxPool2d):
                chain[list(chain).index(layer)] = nn.AvgPool2d(2)  # a maximum sends its gradient to one pixel only
        images = torch.zeros(1, 1, 64, 64, requires_grad=True)
        output = chain(images)
        output[0, 0, output.shape[2] // 2, output.shape[3] // 2].backward()
        assert int((images.grad[0, 0] != 0).any(0).sum()) == size


@pytest.mark.parametrize("network", [PlainNet, BottleneckNet])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, partial(GhostBatchNorm, num_splits=4)], ids=["batch", "ghost"])
class TestFeatures:
    """torchvision's feature extractors, which trace a network in both modes."""

    def test_nodes_are_the_layers_and_features_those_of_hooks(self, network, norm):
        torch.manual_seed(1)
        model = network(norm).eval()
        names = [f"layers.{number}" for number in range(len(model.layers))]
        assert get_graph_node_names(model) == (["images", *names, "flatten"],) * 2
        # What an in-place ReLU is given is gone after it, for an extractor as for a hook without a copy.
        names = [name for name, following in pairwise([*names, ""]) if not is_relu(model, following)]
        extractor = create_feature_extractor(model, names)
        hooked = {}
        for name in names:
            hook = partial(lambda name, layer, args, output: hooked.update({name: output}), name)
            model.get_submodule(name).register_forward_hook(hook)
        images = torch.randn(5, 1, 28, 28)
        model(images)
        features = extractor(images)
        assert all(torch.equal(features[name], hooked[name]) for name in names)

    @pytest.mark.parametrize("samples", [9, 64])
    def test_an_extractor_trains_as_the_network(self, network, norm, samples):
        torch.manual_seed(1)
        model = network(norm)
        extractor = create_feature_extractor(model, ["flatten"])
        extractor.load_state_dict(model.state_dict())
        images, outputs = torch.randn(samples, 1, 28, 28), []
        for part, call in ((model, model), (extractor, lambda images: extractor(images)["flatten"])):
            torch.manual_seed(2)
            outputs.append(call(images))
            outputs[-1].square().sum().backward()
            assert part.training
        assert torch.equal(*outputs)
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), extractor.buffers(), strict=True))
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), extractor.parameters(), strict=True))


def is_relu(model, name):
    return bool(name) and isinstance(model.get_submodule(name), nn.ReLU)


class TestDropout:
    def masks(self, p, shape, count):
        torch.manual_seed(5)
        layer = Dropout(p)
        ones = torch.ones(shape).to(memory_format=torch.channels_last)
        return torch.stack([layer(ones) for _ in range(count)])

    @pytest.mark.parametrize("p", [0.04, 0.3, 0.9])
    def test_rate_and_mean(self, p):
        masks = self.masks(p, (64, 10, 28, 28), 20)
        deviation = (p * (1 - p) / masks.numel()) ** 0.5
        assert abs(float((masks == 0).double().mean()) - p) < 5 * deviation
        assert abs(float(masks.double().mean()) - 1) < 5 * deviation / (1 - p)
        assert set(masks.unique().tolist()) == {0.0, float(torch.tensor(1 / (1 - p)))}

    def test_every_element_is_dropped_at_the_rate(self):
        dropped = (self.masks(0.3, (4, 3, 5, 5), 4000) == 0).double()
        deviation = (0.3 * 0.7 / 4000) ** 0.5
        assert float((dropped.mean(0) - 0.3).abs().max()) < 5 * deviation

    def test_elements_and_steps_are_independent(self):
        dropped = (self.masks(0.3, (4, 3, 5, 5), 4000) == 0).double().flatten(1)
        dropped -= dropped.mean()
        covariances = dropped.T @ dropped / len(dropped)  # between the elements of a mask
        covariances.fill_diagonal_(0)
        assert float(covariances.abs().max()) < 5.5 * 0.21 / 4000**0.5
        between_steps = (dropped[:-1] * dropped[1:]).mean()
        assert abs(float(between_steps)) < 5 * 0.21 / dropped[1:].numel() ** 0.5

    def test_gaps_between_drops_are_geometric(self):
        positions = (self.masks(0.04, (64, 10, 28, 28), 1).flatten() == 0).nonzero().flatten()
        # channels_last memory order is another order of the same independent elements
        gaps = positions.diff()
        observed = torch.stack([(gaps == gap).double().mean() for gap in (1, 2, 3)])
        expected = 0.04 * 0.96 ** torch.arange(3, dtype=torch.float64)
        assert torch.allclose(observed, expected, atol=5 * (0.04 / len(gaps)) ** 0.5)

    def test_gradient_is_the_mask(self):
        torch.manual_seed(1)
        images = torch.randn(8, 3, 6, 6, requires_grad=True)
        output = Dropout(0.5)(images)
        output.sum().backward()
        assert torch.equal(images.detach() * images.grad, output)

    @pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
    def test_evaluation_and_extremes_are_torchs(self, p):
        images = torch.randn(4, 3, 5, 5)
        assert torch.equal(Dropout(p).eval()(images), images)
        if p != 0.5:
            assert torch.equal(Dropout(p)(images), nn.Dropout(p)(images))
        assert repr(Dropout(p)).startswith("Dropout(p=")

    def test_keeps_the_memory_format_and_takes_any_strides(self):
        images = torch.randn(4, 3, 5, 5)
        last = images.to(memory_format=torch.channels_last)
        assert Dropout(0.5)(last).is_contiguous(memory_format=torch.channels_last)
        expanded = torch.ones(1).expand(1000)
        assert set(Dropout(0.5)(expanded).tolist()) == {0.0, 2.0}
        assert Dropout(0.5)(torch.ones(0)).shape == (0,)
