"""The Gram matrix of patches without the patches, against the patches one by one."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_fx
from kfac_fx.ops import convolution
from kfac_fx.ops.autocorrelation import Axis, is_cheaper, patch_gram


def oracle(x: Tensor, axes: list[Axis], groups: int) -> Tensor:
    """Sum over cases and outputs of p p^T, entry by entry of the definition."""
    channels = x.shape[1] // groups
    taps = list(itertools.product(*(range(axis.kernel) for axis in axes)))
    total = torch.zeros(groups, channels * len(taps), channels * len(taps), dtype=x.dtype)
    for n, group in itertools.product(range(len(x)), range(groups)):
        image = x[n, group * channels : (group + 1) * channels]
        for output in itertools.product(*(range(axis.outputs) for axis in axes)):
            patch = torch.zeros(channels, len(taps), dtype=x.dtype)
            for column, tap in enumerate(taps):
                at = [t + a.dilation * k - a.low for t, k, a in zip(output, tap, axes, strict=True)]
                if all(0 <= u < a.size for u, a in zip(at, axes, strict=True)):
                    patch[:, column] = image[(slice(None), *at)]
            total[group] += patch.flatten().outer(patch.flatten())
    return total


def random_axis(draw: random.Random) -> Axis:
    axis = Axis(
        draw.randint(1, 6),
        draw.randint(1, 4),
        draw.randint(1, 2),
        draw.randint(0, 4),
        draw.randint(0, 4),
    )
    return axis if axis.outputs > 0 else axis._replace(low=axis.reach)


@pytest.mark.parametrize("seed", range(40))
def test_against_the_patches(seed: int) -> None:
    draw = random.Random(seed)
    dims = 1 + seed % 3
    axes = [random_axis(draw) for _ in range(dims)]
    groups = draw.choice([1, 1, 2])
    torch.manual_seed(seed)
    x = torch.randn(2, 2 * groups, *(axis.size for axis in axes), dtype=torch.float64)
    expected = oracle(x, axes, groups) if dims < 3 else None
    if expected is None:  # too many positions to take one by one
        pad = [amount for axis in reversed(axes) for amount in (axis.low, axis.high)]
        grouped = F.pad(x, pad).unflatten(1, (groups, -1))
        for at, axis in enumerate(axes):
            grouped = grouped.unfold(3 + at, axis.reach + 1, 1)[..., :: axis.dilation]
        rows = grouped.permute(1, 2, 6, 7, 8, 0, 3, 4, 5).flatten(1, 4).flatten(2)
        expected = rows @ rows.mT
    found = patch_gram(x, axes, groups)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_layer_that_is_large_enough_takes_it(
    bias: bool, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, 3, padding=1, groups=groups, bias=bias).double()
    x, g = torch.randn(8, 4, 16, 16).double(), torch.randn(8, 4, 16, 16).double()
    assert is_cheaper(8, [Axis(16, 3, 1, 1, 1)] * 2)
    found = recorded_input_factor(conv, x, g)
    monkeypatch.setattr(convolution, "is_cheaper", lambda *_: False)
    torch.testing.assert_close(found, recorded_input_factor(conv, x, g), rtol=1e-12, atol=1e-12)


def recorded_input_factor(conv: nn.Conv2d, x: Tensor, g: Tensor) -> Tensor:
    net = kfac_fx.transform(nn.Sequential(conv, nn.Flatten()), structure="block_diagonal")
    preconditioner = kfac_fx.Preconditioner(net, "normal", fisher="sampled")
    outputs = net(x)
    preconditioner.observe(outputs)
    outputs.backward(g.flatten(1))
    preconditioner.step()
    return preconditioner.factors[next(iter(net.curvature.blocks))][0]


def test_small_and_pointwise_convolutions_do_not() -> None:
    assert not is_cheaper(1, [Axis(8, 3, 1, 1, 1)] * 2)
    assert not is_cheaper(10**6, [Axis(8, 1, 1, 0, 0)] * 2)
