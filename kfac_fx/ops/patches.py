"""The geometry of a convolution's windows, and copies of the patches that they read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Axis(NamedTuple):
    """A spatial axis of a convolution of stride 1 among zeros.

    Output t reads the inputs t + dilation * k - low, for k = 0 ... kernel - 1.

    Attributes:
        size: the size of the input.
        kernel: number of taps of the kernel.
        dilation: distance between neighbouring taps.
        low: zeros in front of the input.
        high: zeros after it.
    """

    size: int
    kernel: int
    dilation: int
    low: int
    high: int

    @property
    def reach(self) -> int:
        """Return the distance from the first tap to the last."""
        return (self.kernel - 1) * self.dilation

    @property
    def outputs(self) -> int:
        """Number of output positions."""
        return self.size + self.low + self.high - self.reach

    def touched(self, t: int) -> tuple[int, int, int]:
        """Return (first tap, last tap + 1, input of the first) at any integer position."""
        start = t - self.low
        first = max(0, -(start // self.dilation))
        last = min(self.kernel, (self.size - 1 - start) // self.dilation + 1)
        return first, max(first, last), start + first * self.dilation


@dataclass(frozen=True)
class Window:
    """The windows in which a convolution reads.

    Attributes:
        kernel: taps along each spatial dimension.
        stride: distance of neighbouring output positions, along each.
        dilation: distance of neighbouring taps, along each.
        padding: in the order of ``torch.nn.functional.pad``: the last dimension first, of each the
            low side and the high side.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
    """

    kernel: Sequence[int]
    stride: Sequence[int]
    dilation: Sequence[int]
    padding: Sequence[int]
    padding_mode: str

    def patches(self, x: Tensor, groups: int) -> Tensor:
        """Return x [N, C, *space] as [groups, N, S, C / groups * kernel], channels before kernel.

        S is the number of output positions.
        """
        dims = len(self.kernel)
        x = self._windows(x).unflatten(1, (groups, -1))  # [N, groups, C, *space, *kernel]
        space, kernel = range(3, 3 + dims), range(3 + dims, 3 + 2 * dims)
        # Positions lie innermost in memory, where the copy reads runs of x. With the patch's
        # entries innermost, as the result's shape says, the copy reads single numbers and takes
        # several times as long; products read the transposed layout just as well.
        x = x.permute(1, 2, *kernel, 0, *space).flatten(1, 1 + dims).flatten(3)
        return x.movedim(1, -1)

    def mean_patch(self, x: Tensor, groups: int) -> Tensor:
        """Return the mean of ``patches`` over positions: [groups, N, C / groups * kernel].

        No patches are copied: the mean is taken of a view of x.
        """
        dims = len(self.kernel)
        means: Tensor = self._windows(x).mean(list(range(2, 2 + dims)))  # [N, C, *kernel]
        rows: Tensor = means.unflatten(1, (groups, -1)).flatten(2).transpose(0, 1)
        return rows

    def padded(self, x: Tensor) -> Tensor:
        """Return x with its padding around it."""
        if not any(self.padding):
            return x
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x, list(self.padding), mode=mode)

    def _windows(self, x: Tensor) -> Tensor:
        """Return a view of what every position reads: [N, C, *space, *kernel]."""
        x = self.padded(x)
        for axis in range(len(self.kernel)):
            reach = (self.kernel[axis] - 1) * self.dilation[axis] + 1
            x = x.unfold(2 + axis, reach, self.stride[axis])[..., :: self.dilation[axis]]
        return x

    def axes(self, x: Tensor) -> list[Axis] | None:
        """Return the spatial axes if this is a convolution of stride 1 among zeros, else None."""
        if any(step != 1 for step in self.stride) or self.padding_mode != "zeros":
            return None
        sides = zip(self.padding[-2::-2], self.padding[::-2], strict=True)
        sizes = zip(x.shape[2:], self.kernel, self.dilation, sides, strict=True)
        return [Axis(size, kernel, step, *side) for size, kernel, step, side in sizes]


@dataclass(frozen=True)
class TransposedWindow:
    """The windows of a transposed convolution, seen from the output side.

    y[t] = sum over kernel positions k and input positions s with s * stride + k * dilation
    - padding = t of W[:, :, k]^T x[s]. That is a convolution of stride 1 over x with stride - 1
    zeros between its entries, whose window runs backwards: the patch entry of kernel position k at
    t is the stuffed x at t + padding - k * dilation. A is therefore over (input channel, k).

    Attributes:
        kernel: taps along each spatial dimension.
        stride: distance of neighbouring input positions in the output.
        dilation: distance of neighbouring taps.
        padding: output positions that are cut off on both sides, for each dimension.
    """

    kernel: Sequence[int]
    stride: Sequence[int]
    dilation: Sequence[int]
    padding: Sequence[int]

    def patches(self, x: Tensor, groups: int, outputs: Sequence[int]) -> Tensor:
        """Return x [N, C, *space] as [groups, N, S, C / groups * kernel].

        Args:
            outputs: the output's spatial shape, S positions; the input's does not tell it
                (``output_padding``).
        """
        dims = len(self.kernel)
        for axis in range(dims):
            x = _stuffed(x, 2 + axis, self.stride[axis])
            reach = (self.kernel[axis] - 1) * self.dilation[axis]
            low = reach - self.padding[axis]
            high = outputs[axis] + reach - low - x.shape[2 + axis]
            pad = [0] * (2 * (x.dim() - 3 - axis)) + [low, high]
            x = F.pad(x, pad)
        window = Window(self.kernel, [1] * dims, self.dilation, [0] * 2 * dims, "zeros")
        rows = window.patches(x, groups)
        turned = rows.unflatten(-1, (-1, *self.kernel)).flip(list(range(-dims, 0)))
        result: Tensor = turned.flatten(-dims - 1)
        return result


def _stuffed(x: Tensor, dim: int, stride: int) -> Tensor:
    """Return x with stride - 1 zeros between neighbours along a dimension."""
    if stride == 1:
        return x
    zeros = x.new_zeros(())
    wide = torch.stack([x, *(zeros.expand_as(x) for _ in range(stride - 1))], dim + 1)
    length = (x.shape[dim] - 1) * stride + 1
    return wide.flatten(dim, dim + 1).narrow(dim, 0, length)
