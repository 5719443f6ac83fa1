"""How network and recipe of studies/frontier.py were found: trials on the held-out digits, one seed, ten epochs.

    python -m s6lib run --study studies/frontier_search.py --out studies/search

What came out is in frontier_search.csv, in the order in which they were tried, each with the results of those before
in view, and the runs themselves in search/. No trial has seen a test digit. Two longer trials, of 25 epochs, came
before these, and ten more were stopped on the way; they are not in the table.
"""

from functools import partial

import torch.nn.functional as F
from torch import nn

from s6lib import Condition, Recipe


class Trial(nn.Module):
    """A network from a line of words, each a layer with norm and activation; with its input added where shapes allow.

    c8: a 3x3 convolution to 8 channels, padded; v8: unpadded. s8: a depthwise 3x3, padded, and a 1x1; t8: unpadded.
    r, R: the last kernel again, padded or not, with a norm of its own. m, M: a new depthwise 3x3, the last 1x1
    again. P: a maximum over 2x2. p8: c8 with that maximum before its norm.
    """

    def __init__(self, norm=nn.BatchNorm2d, plan="", activation="relu", residual=True):
        super().__init__()
        self.steps, self.kernels, self.norms = [], nn.ModuleList(), nn.ModuleList()
        self.activation, self.residual = getattr(F, activation), residual
        channels = 1
        for word in plan.split():
            kind, width = word[0], int(word[1:] or channels)
            if kind == "P":
                self.steps.append((kind, None, None))
                continue
            if kind in "cvp":
                self.kernels.append(nn.Conv2d(channels, width, 3, bias=False))
            if kind in "stmM":
                depth = nn.Conv2d(channels, channels, 3, groups=channels, bias=False)
                mix = self.kernels[-1][1] if kind in "mM" else nn.Conv2d(channels, width, 1, bias=False)
                self.kernels.append(nn.Sequential(depth, mix))
            self.norms.append(norm(width))
            self.steps.append((kind, len(self.kernels) - 1, len(self.norms) - 1))
            channels = width
        self.head = nn.Conv2d(channels, 10, 1, bias=False)

    def forward(self, x):
        for kind, kernel, norm in self.steps:
            if kind == "P":
                x = F.max_pool2d(x, 2)
                continue
            y = self.kernels[kernel](F.pad(x, [int(kind in "csrmp")] * 4))
            y = self.norms[norm](F.max_pool2d(y, 2) if kind == "p" else y)
            if self.residual and y.shape[1] == x.shape[1]:
                edge = (x.shape[2] - y.shape[2]) // 2
                y = y + F.pad(x, [-edge] * 4)
            x = self.activation(y)
        return self.head(x.mean((2, 3), keepdim=True)).flatten(1)


RECIPE = Recipe(
    "search-2",
    partial(Trial, plan="c8"),
    epochs=10,
    train_images=50_000,
    held_out=True,
    learning_rate=0.1,
    schedule="one-cycle",
    nesterov=True,
    rotation=10.0,
    shift=2.0,
    scale=0.1,
)


def _trial(slug, plan, activation="silu", residual=True, **changes):
    network = partial(Trial, plan=plan, activation=activation, residual=residual)
    return Condition(slug, network=network, **changes)


_SHARED, _SEPARABLE = "c15 P v15 R R R", "c18 P t18 t18 t18 t18"
_PLAIN = "c10 c10 P v10 v12 v16 v16 v16"
CONDITIONS = (
    _trial("v", _SHARED, "relu"),
    _trial("v-silu", _SHARED),
    _trial("plain-8", "c8 c8 P v8 v8 v8 v8", "relu", residual=False),
    _trial("m-24", "c24 P t24 M M M", "relu"),
    _trial("v-gelu", _SHARED, "gelu"),
    _trial("m-24-silu", "c24 P t24 M M M"),
    _trial("v-silu-ema", _SHARED, ema=0.999),
    _trial("v-silu-double", _SHARED, learning_rate=0.2),
    _trial("vv-15-silu", "v15 v15 P R R R"),
    _trial("v-silu-light", _SHARED, shift=1.0, scale=0.05, rotation=7.0),
    _trial("u5", "c15 P v15 R R R R"),
    _trial("two-11", "c11 P v11 R v11 R"),
    _trial("v-silu-heavy", _SHARED, shift=3.0, scale=0.15, rotation=15.0),
    _trial("t18", _SEPARABLE),
    _trial("u3", "c15 P v15 R R"),
    _trial("plain-8-silu", "c8 c8 P v8 v8 v8 v8", residual=False),
    _trial("t18-double", _SEPARABLE, learning_rate=0.2),
    _trial("t16-5", "c16 P t16 t16 t16 t16 t16"),
    _trial("t42", "c42 P t42 t42 t42 t42"),
    _trial("plain-10k", _PLAIN, residual=False),
    _trial("st-16", "c16 s16 P t16 t16 t16 t16"),
    _trial("v31", "c31 P v31 R R R"),
    _trial("v19", "c19 P v19 R R R"),
    _trial("p9", "c9 c9 P v9 v9 v9 v9"),
    _trial("t24", "c24 P t24 t24 t24 t24"),
    _trial("t24-double-ema", "c24 P t24 t24 t24 t24", learning_rate=0.2, ema=0.999),
    _trial("plain-10k-relu", _PLAIN, "relu", residual=False),
    _trial("t24-32", "c24 P t24 t24 t24 t24", batch_size=32),
    _trial("pool-18", "p18 t18 t18 t18 t18"),
    _trial("pool-24", "p24 t24 t24 t24 t24"),
)
