"""Gram matrices of stride-1 convolutions' patches, without the patches.

Summed over all integer positions t, x(t + k) y(t + l) depends on l - k alone, so one correlation of
x with y, or with itself, holds every block of the matrix; then the few positions are taken off at
which both windows touch their inputs but which are no outputs.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from contextlib import nullcontext
from types import EllipsisType

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_fx.linalg.precision import products_are_rounded, unrounded
from kfac_fx.ops.parts import case_parts
from kfac_fx.ops.patches import Axis
from kfac_fx.torch_internals.onlookers import traced

Axes = Sequence[Axis]
Touched = tuple[int, int, int]


def _outside(one: Axis, two: Axis) -> Sequence[tuple[Touched, Touched]]:
    """Return what both windows touch at positions that are no outputs."""
    known = all(type(value) is int for value in (*one, *two))  # symbols have no hash
    return _outside_of(one, two) if known else _outside_of.__wrapped__(one, two)


@functools.lru_cache(maxsize=1024)
def _outside_of(one: Axis, two: Axis) -> Sequence[tuple[Touched, Touched]]:
    """Return the same, kept for the next step: shapes seldom change."""
    found = []
    for t in range(min(one.low, two.low) - max(one.reach, two.reach), one.size + one.low):
        here, there = one.touched(t), two.touched(t)
        if not 0 <= t < one.outputs and here[0] < here[1] and there[0] < there[1]:
            found.append((here, there))
    return tuple(found)


def _anywhere(one: Axis, two: Axis) -> tuple[Axis, Axis]:
    """Return both with all positions for outputs at which both windows can touch their inputs."""
    first = max(one.low - one.reach, two.low - two.reach)
    count = one.size + min(one.low, two.low) - first

    def moved(axis: Axis) -> Axis:
        low = axis.low - first
        return axis._replace(low=low, high=count + axis.reach - axis.size - low)

    return moved(one), moved(two)


ASSEMBLY = 700
"""What an entry of the result costs beyond products, in multiply-adds."""

CORRELATION = 2
"""Time of a multiply-add of the correlation, relative to one of a matrix product."""

COPY = 50
"""Time of an entry of a patch, in multiply-adds."""


def _saves(cases: int, axes: Axes, others: Axes, lags: int, copies: float) -> bool:
    """Tell whether a correlation takes less time, by its multiply-adds an entry of the result.

    Args:
        cases: N.
        axes: the axes of the one input; with ``others``, of the other.
        lags: number of lags that are formed.
        copies: what the copies of patches cost beside their product, as a share of it.
    """
    kernel = math.prod(axis.kernel for axis in axes)
    pairs = kernel * math.prod(axis.kernel for axis in others)
    direct = cases * math.prod(axis.outputs for axis in axes)
    everywhere = cases * math.prod(axis.size for axis in axes) * lags / pairs
    outside = 0.0
    for one, two in zip(axes, others, strict=True):
        line = direct / one.outputs
        taps = (
            (here[1] - here[0]) / one.kernel * (there[1] - there[0]) / two.kernel
            for here, there in _outside(one, two)
        )
        outside += line * sum(taps)
    return pairs > 1 and CORRELATION * everywhere + outside + ASSEMBLY < direct * (1 + copies)


def is_cheaper(cases: int, axes: Axes) -> bool:
    """Tell whether ``patch_gram`` takes less time than the product of the patches themselves."""
    lags = axes[0].kernel * math.prod(2 * axis.kernel - 1 for axis in axes[1:])
    return _saves(cases, axes, axes, lags, 0.0)


def is_cheaper_crossed(x: Tensor, axes: Axes, other: Tensor, others: Axes) -> bool:
    """Tell the same of ``cross_patch_gram``; never where that does not hold."""
    same = [
        (one.size, one.dilation, one.outputs) == (two.size, two.dilation, two.outputs)
        and max(one.low, one.high) <= one.reach
        and max(two.low, two.high) <= two.reach
        for one, two in zip(axes, others, strict=True)
    ]
    pairs = list(zip(axes, others, strict=True))
    lags = math.prod(one.kernel + two.kernel - 1 for one, two in pairs)
    widths = (
        t.shape[1] * math.prod(axis.kernel for axis in each)
        for t, each in ((x, axes), (other, others))
    )
    copies = COPY * sum(1 / width for width in widths)
    return all(same) and _saves(len(x), axes, others, lags, copies)


def suits(x: Tensor) -> bool:
    """Tell whether a correlation can be as precise as a matrix product, and quicker.

    On a GPU: TF32, which cuDNN may round to, errs by 7e-4, and cannot be forbidden inside of a
    compiler's program. Matrix products in it err by 2e-5 and are quicker (measured on an H200).
    """
    if not x.is_cuda or x.dtype == torch.float64:
        return True
    return not traced() and not products_are_rounded()


def patch_gram(x: Tensor, axes: Axes, groups: int) -> Tensor:
    """Return the sum over cases and output positions of p p^T, p a patch of one group's channels.

    Args:
        x: [N, C, *space].
        axes: its spatial axes, as the convolution reads them.
        groups: number of independent convolutions.

    Returns:
        [groups, C / groups * kernel, the same], channels before kernel.
    """
    found = (_autocorrelation(part, axes, groups) for (part,) in case_parts(x))
    lags = functools.reduce(Tensor.add_, found)
    return _at_outputs(_everywhere(lags, axes, axes), (x, x), (axes, axes), groups)


def cross_patch_gram(x: Tensor, axes: Axes, other: Tensor, others: Axes) -> Tensor:
    """Return the sum over cases and output positions of p q^T, patches of two inputs.

    Args:
        x: [N, C, *space].
        axes: its spatial axes.
        other: [N, D, *space].
        others: its spatial axes, with the same sizes, dilations and numbers of outputs as ``axes``;
            the paddings of both are at most their reach.

    Returns:
        [C * kernel, D * other kernel], channels before kernel.
    """
    if x.shape[1] > other.shape[1]:  # kernels are slower the other way round
        return cross_patch_gram(other, others, x, axes).mT
    lags = _crosscorrelation(x, axes, other, others)
    return _at_outputs(_everywhere(lags, axes, others), (x, other), (axes, others), 1)[0]


def _at_outputs(
    A: Tensor, given: tuple[Tensor, Tensor], pair: tuple[Axes, Axes], groups: int
) -> Tensor:
    """Return [groups, C, *kernel, D, *kernel] of all integer positions as a matrix of the outputs'.

    Positions that are no outputs, but touch the input with both windows, lie along its borders:
    one axis after the other, their products are taken off.
    """
    x, other = given
    axes, others = pair
    dims = len(axes)
    for at, (one, two) in enumerate(zip(axes, others, strict=True)):
        # Earlier axes are at outputs already; later ones are anywhere.
        later = [_anywhere(a, b) for a, b in zip(axes[at + 1 :], others[at + 1 :], strict=True)]
        spaces = [*axes[:at], *(a for a, _ in later)], [*others[:at], *(b for _, b in later)]
        for here, there in _outside(one, two):
            rows = _lines(x, at, here, one.dilation, spaces[0], groups)
            same = other is x and there == here and spaces[0] == spaces[1]
            columns = rows if same else _lines(other, at, there, two.dilation, spaces[1], groups)
            found = rows.flatten(1, 1 + dims) @ columns.flatten(1, 1 + dims).mT
            found = found.unflatten(2, columns.shape[1:-1]).unflatten(1, rows.shape[1:-1])
            block = A.narrow(2 + at, here[0], here[1] - here[0])
            block.narrow(3 + dims + at, there[0], there[1] - there[0]).sub_(found)
    return A.reshape(groups, A.shape[1 : 2 + dims].numel(), -1)


def _lines(
    x: Tensor, at: int, touched: Touched, dilation: int, others: Axes, groups: int
) -> Tensor:
    """Return patches at one place of an axis, where only some taps touch.

    [groups, C, *kernel, N * S].
    """
    first, last, start = touched
    lines = x.narrow(2 + at, start, (last - first - 1) * dilation + 1)
    lines = lines.movedim(2 + at, 2)[:, :, ::dilation]
    rows = _line_patches(lines, others)  # [C, taps, N * S, *others' taps]
    grouped: Tensor = rows.movedim(2, -1).unflatten(0, (groups, -1)).movedim(2, 2 + at)
    return grouped


def _everywhere(R: Tensor, axes: Axes, others: Axes) -> Tensor:
    """Return correlations [groups, a, b, *lags] as sums over all integer positions.

    [groups, a, *k, b, *l], for the taps k and l of both kernels.

    Lags are those of the tap of a, less that of b, from the lowest on.
    """
    kernel, other = ([axis.kernel for axis in each] for each in (axes, others))
    groups, a, b = R.shape[:3]
    result = R.new_empty(groups, a, *kernel, b, *other)
    order = (0, 1, *range(3, R.dim()), 2)
    # A copy for each tap of b takes a tenth of the time of an index by all lags.
    for taps in itertools.product(*map(range, other)):
        lowest = [n - 1 - l for n, l in zip(other, taps, strict=True)]
        lags = (slice(low, low + k) for low, k in zip(lowest, kernel, strict=True))
        place: tuple[int | EllipsisType, ...] = (..., *taps)
        there: tuple[slice | EllipsisType, ...] = (..., *lags)
        result[place] = R[there].permute(order)
    return result


def _autocorrelation(x: Tensor, axes: Axes, groups: int) -> Tensor:
    """Return R[a, b, lag] = sum over u of x_a(u + lag) x_b(u), of one group's channels."""
    dims = len(axes)
    # R[a, b, -lag] = R[b, a, lag], so half of the lags of the first axis are enough.
    pad = [0] * (2 * dims - 2) + [0, axes[0].reach]
    taps = [axes[0].kernel, *(2 * a.kernel - 1 for a in axes[1:])]
    padding = [0, *(axis.reach for axis in axes[1:])]
    half = _correlation(x, F.pad(x, pad), taps, padding, axes, groups)
    half = half.unflatten(0, (groups, -1)).transpose(1, 2)  # [groups, a, b, *lags]
    negative = half.transpose(1, 2).flip(list(range(3, 3 + dims))).narrow(3, 0, taps[0] - 1)
    found = torch.cat([negative, half], 3)
    return found.to(torch.promote_types(found.dtype, torch.float32))  # parts are added up


def _crosscorrelation(x: Tensor, axes: Axes, other: Tensor, others: Axes) -> Tensor:
    """Return R[0, a, b, lag] = sum over u of x_a(u + lag) other_b(u)."""
    pairs = list(zip(axes, others, strict=True))
    taps = [one.kernel + two.kernel - 1 for one, two in pairs]
    lows = [two.reach + one.low - two.low for one, two in pairs]
    highs = [one.reach + two.reach - low for (one, two), low in zip(pairs, lows, strict=True)]
    padding = [max(0, min(both)) for both in zip(lows, highs, strict=True)]
    pad = [
        side - common
        for low, high, common in reversed(list(zip(lows, highs, padding, strict=True)))
        for side in (low, high)
    ]
    x = F.pad(x, pad) if any(pad) else x
    return _correlation(other, x, taps, padding, axes, 1).transpose(0, 1).unsqueeze(0)


def _correlation(
    by: Tensor, x: Tensor, taps: list[int], padding: list[int], axes: Axes, groups: int
) -> Tensor:
    """Return the sum over u of by_b(u) x_a(u + tap), [b, a, *taps].

    That is the gradient of a convolution's weight, which libraries have tuned kernels for.
    """
    dims = len(axes)
    with unrounded() if x.is_cuda else nullcontext():
        found: Tensor = torch.ops.aten.convolution_backward(
            by,
            x,
            x.new_empty(by.shape[1], x.shape[1] // groups, *taps),
            None,
            [1] * dims,
            padding,
            [axis.dilation for axis in axes],
            False,
            [0] * dims,
            groups,
            [False, True, False],
        )[1]
    return found


def _line_patches(lines: Tensor, others: Sequence[Axis]) -> Tensor:
    """Return [N, C, taps, *space] as [C, taps, N * S, *kernel of the other axes]."""
    pad = [amount for axis in reversed(others) for amount in (axis.low, axis.high)]
    lines = F.pad(lines, pad)
    for at, axis in enumerate(others):
        lines = lines.unfold(3 + at, axis.reach + 1, 1)[..., :: axis.dilation]
    space = 3 + len(others)
    return lines.movedim(0, 2).flatten(2, space - 1)
