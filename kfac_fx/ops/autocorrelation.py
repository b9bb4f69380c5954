"""The Gram matrix of a stride-1 convolution's patches, without the patches.

Summed over all integer positions t, x(t + k) x(t + l) depends on l - k alone, so one correlation of
x with itself holds every block of the matrix; then the few positions are taken off at which the
window touches x but which are no outputs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Axis(NamedTuple):
    """A spatial axis: input size, taps of the kernel, their distance, and zeros on both sides.

    Output t reads the inputs t + dilation * k - low, k = 0 ... kernel - 1.
    """

    size: int
    kernel: int
    dilation: int
    low: int
    high: int

    @property
    def reach(self) -> int:
        """Distance from the first tap to the last."""
        return (self.kernel - 1) * self.dilation

    @property
    def outputs(self) -> int:
        """Number of output positions."""
        return self.size + self.low + self.high - self.reach

    def outside(self) -> Iterator[tuple[int, int, int]]:
        """(first tap, last tap + 1, input of the first) at positions that are no outputs."""
        for t in range(self.low - self.reach, self.size + self.low):
            start = t - self.low
            first = max(0, -(start // self.dilation))
            last = min(self.kernel, (self.size - 1 - start) // self.dilation + 1)
            if not 0 <= t < self.outputs and first < last:
                yield first, last, start + first * self.dilation


ASSEMBLY = 700
"""What an entry of the result costs beyond products, in multiply-adds."""

CORRELATION = 2
"""Time of a multiply-add of the correlation, relative to one of a matrix product."""


def is_cheaper(cases: int, axes: Sequence[Axis]) -> bool:
    """Whether ``patch_gram`` takes less time than the product of the patches themselves.

    Multiply-adds are counted an entry of the result.
    """
    kernel = math.prod(axis.kernel for axis in axes)
    direct = cases * math.prod(axis.outputs for axis in axes)
    lags = axes[0].kernel * math.prod(2 * axis.kernel - 1 for axis in axes[1:])
    everywhere = cases * math.prod(axis.size for axis in axes) * lags / kernel**2
    outside = 0.0
    for axis in axes:
        line = direct / axis.outputs
        taps = ((last - first) / axis.kernel for first, last, _ in axis.outside())
        outside += line * sum(part**2 for part in taps)
    return kernel > 1 and CORRELATION * everywhere + outside + ASSEMBLY < direct


def keeps_precision(x: Tensor) -> bool:
    """Whether the correlation is as precise as a matrix product: cuDNN may round to TF32."""
    return not x.is_cuda or x.dtype == torch.float64 or not torch.backends.cudnn.allow_tf32


def patch_gram(x: Tensor, axes: Sequence[Axis], groups: int) -> Tensor:
    """Sum over cases and output positions of p p^T, p the patch of one group's channels.

    Args:
        x: [N, C, *space].

    Returns:
        [groups, C / groups * kernel, the same], channels before kernel.
    """
    dims = len(axes)
    kernel = [axis.kernel for axis in axes]
    A = _everywhere(x, axes, groups)
    for at, axis in enumerate(axes):
        # Earlier axes are at outputs already; later ones are anywhere.
        others = [*axes[:at], *(a._replace(low=a.reach, high=a.reach) for a in axes[at + 1 :])]
        for first, last, start in axis.outside():
            lines = x.narrow(2 + at, start, (last - first - 1) * axis.dilation + 1)
            lines = lines.movedim(2 + at, 2)[:, :, :: axis.dilation]
            rows = _line_patches(lines, others)  # [C, taps, N * S, *others' taps]
            rows = rows.movedim(2, -1).unflatten(0, (groups, -1)).movedim(2, 2 + at)
            flat = rows.flatten(1, 1 + dims)
            found = (flat @ flat.mT).unflatten(2, rows.shape[1:-1]).unflatten(1, rows.shape[1:-1])
            block = A.narrow(2 + at, first, last - first)
            block.narrow(3 + dims + at, first, last - first).sub_(found)
    size = A.shape[1] * math.prod(kernel)
    return A.reshape(groups, size, size)


def _everywhere(x: Tensor, axes: Sequence[Axis], groups: int) -> Tensor:
    """The sum over all integer positions, [groups, C, *kernel, C, *kernel]."""
    dims = len(axes)
    channels = x.shape[1] // groups
    # As the gradient of a weight: sum over u of x_a(u + lag) x_b(u). R[a, b, -lag] = R[b, a, lag],
    # so half of the lags of the first axis are enough.
    pad = [0] * (2 * dims - 2) + [0, axes[0].reach]
    taps = [axes[0].kernel, *(2 * a.kernel - 1 for a in axes[1:])]
    half = torch.ops.aten.convolution_backward(
        x,
        F.pad(x, pad),
        x.new_empty(x.shape[1], channels, *taps),
        None,
        [1] * dims,
        [0, *(axis.reach for axis in axes[1:])],
        [axis.dilation for axis in axes],
        False,
        [0] * dims,
        groups,
        [False, True, False],
    )[1]
    half = half.unflatten(0, (groups, channels)).transpose(1, 2)  # [groups, a, b, *lags]
    negative = half.transpose(1, 2).flip(list(range(3, 3 + dims))).narrow(3, 0, taps[0] - 1)
    R = torch.cat([negative, half], 3)
    return _by_taps(R, [axis.kernel for axis in axes])


def _by_taps(R: Tensor, kernel: Sequence[int]) -> Tensor:
    """R [groups, a, b, *lags] -> [groups, a, *k, b, *l]: the entry of the lag k - l."""
    groups, a, b = R.shape[:3]
    result = R.new_empty(groups, a, *kernel, b, *kernel)
    whole = (slice(None),) * 3
    order = (0, 1, *range(3, R.dim()), 2)
    for taps in itertools.product(*map(range, kernel)):
        there = tuple(slice(n - 1 - l, 2 * n - 1 - l) for n, l in zip(kernel, taps, strict=True))
        result[(..., *taps)] = R[(*whole, *there)].permute(order)
    return result


def _line_patches(lines: Tensor, others: Sequence[Axis]) -> Tensor:
    """[N, C, taps, *space] -> [C, taps, N * S, *kernel of the other axes]."""
    pad = [amount for axis in reversed(others) for amount in (axis.low, axis.high)]
    lines = F.pad(lines, pad)
    for at, axis in enumerate(others):
        lines = lines.unfold(3 + at, axis.reach + 1, 1)[..., :: axis.dilation]
    space = 3 + len(others)
    return lines.movedim(0, 2).flatten(2, space - 1)
