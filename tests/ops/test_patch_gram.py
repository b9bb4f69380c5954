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
from kfac_fx.ops import cross_input as crossed
from kfac_fx.ops.alignment import pooled
from kfac_fx.ops.autocorrelation import (
    cross_patch_gram,
    is_cheaper,
    is_cheaper_crossed,
    patch_gram,
)
from kfac_fx.ops.convolution import ConvolutionOptions, ConvolutionSide, PaddingMode
from kfac_fx.ops.patches import Axis, Window
from kfac_fx.ops.thresholds import THRESHOLDS


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


def patches(x: Tensor, axes: list[Axis]) -> Tensor:
    """[N * positions, C * kernel]"""
    padding = [amount for axis in reversed(axes) for amount in (axis.low, axis.high)]
    kernel, dilation = [axis.kernel for axis in axes], [axis.dilation for axis in axes]
    window = Window(kernel, [1] * len(axes), dilation, padding, "zeros")
    return window.patches(x, 1).flatten(0, 2)


def crossed_axes(draw: random.Random, dims: int) -> tuple[list[Axis], list[Axis]]:
    """Two windows with as many outputs: what one has in taps, it has in zeros too."""
    pairs = []
    while len(pairs) < dims:
        one = random_axis(draw)
        two = one._replace(kernel=draw.randint(1, 4), low=draw.randint(0, 4))
        two = two._replace(high=one.outputs - two.size - two.low + two.reach)
        if two.high >= 0 and all(max(a.low, a.high) <= a.reach for a in (one, two)):
            pairs.append((one, two))
    return [one for one, _ in pairs], [two for _, two in pairs]


@pytest.mark.parametrize("seed", range(40))
def test_crossed_against_the_patches(seed: int) -> None:
    draw = random.Random(seed)
    axes, others = crossed_axes(draw, 1 + seed % 3)
    torch.manual_seed(seed)
    sizes = [axis.size for axis in axes]
    x, other = (torch.randn(2, draw.randint(1, 3), *sizes).double() for _ in range(2))
    expected = patches(x, axes).mT @ patches(other, others)
    found = cross_patch_gram(x, axes, other, others)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    found = cross_patch_gram(x, axes, x, others)  # siblings
    expected = patches(x, axes).mT @ patches(x, others)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_crossed_only_where_it_holds() -> None:
    x, axis = torch.empty(64, 16, 32, 32), Axis(32, 3, 1, 1, 1)
    assert is_cheaper_crossed(x, [axis] * 2, x, [axis] * 2)
    few, short = x[:1, :, :4, :4], axis._replace(size=4)
    assert not is_cheaper_crossed(few, [short] * 2, few, [short] * 2)
    for other in (
        axis._replace(dilation=2, low=2, high=2),
        axis._replace(high=0),
        axis._replace(kernel=1, low=1, high=-1),
    ):
        assert not is_cheaper_crossed(x, [axis, axis], x, [axis, other])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kernel", [1, 3])
def test_coupled_layers_take_it(bias: bool, kernel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1, bias=bias),
        nn.Tanh(),
        nn.Conv2d(4, 5, kernel, padding=kernel // 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    taken = []

    def counted(*given: object) -> Tensor:
        taken.append(given)
        return cross_patch_gram(*given)

    def recorded() -> Tensor:
        torch.manual_seed(0)
        net = kfac_fx.transform(model.double())
        pre = kfac_fx.Preconditioner(net, "categorical", structure="block_tridiagonal")
        pre.observe(outputs := net(torch.randn(8, 4, 16, 16).double()))
        outputs.sum().backward()
        pre.step()
        return pre.cross_factors["0", "2"][0]

    monkeypatch.setattr(crossed, "cross_patch_gram", counted)
    found = recorded()
    assert len(taken) == 1
    monkeypatch.setattr(crossed, "is_cheaper_crossed", lambda *_: False)
    torch.testing.assert_close(found, recorded(), rtol=1e-12, atol=1e-12)
    assert len(taken) == 1


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
@pytest.mark.parametrize("stride", [(1, 1), (2, 3)])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 1)])
def test_averages_of_patches_are_patches_of_averages(
    mode: PaddingMode, stride: tuple[int, int], dilation: tuple[int, int]
) -> None:
    padding = (1, 0, 2, 1)
    side = ConvolutionSide(
        ConvolutionOptions((3, 2), stride, dilation, padding, mode, 1, bias=True, reduce=False)
    )
    x = torch.randn(2, 3, 20, 25, dtype=torch.float64)
    *_, height, width = torch.nn.functional.conv2d(
        F.pad(x, (1, 0, 2, 1)), torch.ones(1, 3, 3, 2).double(), None, stride, 0, dilation
    ).shape
    positions = (2, height, width)
    rows = side.inputs(x, positions).unflatten(1, positions[1:])
    grids = [
        (a, b)
        for a, b in itertools.product(range(1, height + 1), range(1, width + 1))
        if height % a == 0 and width % b == 0
    ]
    assert len(grids) > 3
    for grid in grids:
        found = side.pooled_inputs(x, positions, grid)
        torch.testing.assert_close(found, pooled(rows, grid), rtol=1e-12, atol=1e-12)
    assert side.pooled_inputs(x, positions, (height - 1, width)) is None


def test_many_cases_are_correlated_some_at_once() -> None:
    """In float32 at least, where the parts are added up."""
    x, axes = torch.randn(7, 4, 5, 6), [Axis(5, 3, 1, 1, 1), Axis(6, 3, 1, 1, 1)]
    whole = patch_gram(x, axes, 2)
    with THRESHOLDS.changed(at_once=2 * x[0].numel()):
        found = patch_gram(x, axes, 2)
        low = patch_gram(x.bfloat16(), axes, 2)
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-4)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, whole, rtol=2e-2, atol=0.5)
