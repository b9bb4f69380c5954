"""Statistics of a convolution (KFC, Grosse & Martens 2016): patches for inputs."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_fx.ops.autocorrelation import Axis, is_cheaper, patch_gram, suits
from kfac_fx.ops.gram import bordered, multiplied
from kfac_fx.ops.library import LIBRARY
from kfac_fx.ops.modes import functional, traced
from kfac_fx.ops.positions import gradient_factor, input_factor
from kfac_fx.ops.tap import define, recording, tapped

AT_ONCE = {"cpu": 2**19, "cuda": 2**28}
"""Entries of patches that are copied at once, where there are many: few stay in a CPU's caches,
many take few launches.
"""

TRANSPOSED = "transposed"
"""In place of a padding mode: the call is a transposed convolution."""


@dataclass(frozen=True)
class Window:
    """Where a convolution reads: kernel, stride and dilation a spatial dimension.

    ``padding`` is in the order of ``torch.nn.functional.pad`` (last dimension first, low and high).
    """

    kernel: Sequence[int]
    stride: Sequence[int]
    dilation: Sequence[int]
    padding: Sequence[int]
    padding_mode: str

    def patches(self, x: Tensor, groups: int) -> Tensor:
        """x [N, C, *space] -> [groups, N, S, C / groups * kernel], channels before kernel."""
        dims = len(self.kernel)
        x = self._windows(x).unflatten(1, (groups, -1))  # [N, groups, C, *space, *kernel]
        space, kernel = range(3, 3 + dims), range(3 + dims, 3 + 2 * dims)
        # Positions lie innermost in memory, where the copy reads runs of x.
        x = x.permute(1, 2, *kernel, 0, *space).flatten(1, 1 + dims).flatten(3)
        return x.movedim(1, -1)

    def mean_patch(self, x: Tensor, groups: int) -> Tensor:
        """The mean of ``patches`` over positions: [groups, N, C / groups * kernel]."""
        dims = len(self.kernel)
        means: Tensor = self._windows(x).mean(list(range(2, 2 + dims)))  # [N, C, *kernel]
        rows: Tensor = means.unflatten(1, (groups, -1)).flatten(2).transpose(0, 1)
        return rows

    def padded(self, x: Tensor) -> Tensor:
        """x with its padding around it."""
        if not any(self.padding):
            return x
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x, list(self.padding), mode=mode)

    def _windows(self, x: Tensor) -> Tensor:
        """A view of what every position reads: [N, C, *space, *kernel]."""
        x = self.padded(x)
        for axis in range(len(self.kernel)):
            reach = (self.kernel[axis] - 1) * self.dilation[axis] + 1
            x = x.unfold(2 + axis, reach, self.stride[axis])[..., :: self.dilation[axis]]
        return x

    def axes(self, x: Tensor) -> list[Axis] | None:
        """The spatial axes if this is a convolution of stride 1 among zeros, else None."""
        if any(step != 1 for step in self.stride) or self.padding_mode != "zeros":
            return None
        sides = zip(self.padding[-2::-2], self.padding[::-2], strict=True)
        sizes = zip(x.shape[2:], self.kernel, self.dilation, sides, strict=True)
        return [Axis(size, kernel, step, *side) for size, kernel, step, side in sizes]


@dataclass(frozen=True)
class TransposedWindow:
    """What an output position of a transposed convolution reads, seen from the output side.

    y[t] = sum over kernel positions k and input positions s with s * stride + k * dilation
    - padding = t of W[:, :, k]^T x[s]. That is a convolution of stride 1 over x with stride - 1
    zeros between its entries, whose window runs backwards: the patch entry of kernel position k at
    t is the stuffed x at t + padding - k * dilation. A is therefore over (input channel, k).
    """

    kernel: Sequence[int]
    stride: Sequence[int]
    dilation: Sequence[int]
    padding: Sequence[int]

    def patches(self, x: Tensor, groups: int, outputs: Sequence[int]) -> Tensor:
        """x [N, C, *space] -> [groups, N, S, C / groups * kernel] for S output positions."""
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
        backwards = rows.unflatten(-1, (-1, *self.kernel)).flip(list(range(-dims, 0)))
        result: Tensor = backwards.flatten(-dims - 1)
        return result


def _stuffed(x: Tensor, dim: int, stride: int) -> Tensor:
    """x with stride - 1 zeros between neighbours along a dimension."""
    if stride == 1:
        return x
    zeros = x.new_zeros(())
    wide = torch.stack([x, *(zeros.expand_as(x) for _ in range(stride - 1))], dim + 1)
    length = (x.shape[dim] - 1) * stride + 1
    return wide.flatten(dim, dim + 1).narrow(dim, 0, length)


@dataclass(frozen=True)
class ConvolutionStatistics:
    """(A, G), with a leading axis for the groups, and positions where there are several uses."""

    window: Window | TransposedWindow
    groups: int
    bias: bool
    reduce: bool
    diagonal: tuple[bool, bool] = (False, False)
    one: float = 1.0

    def tangent(self) -> ConvolutionStatistics:
        """Of the derivative in a direction: without the homogeneous coordinate."""
        return replace(self, one=0.0)

    def patches(self, x: Tensor, outputs: Sequence[int]) -> Tensor:
        """What each output position reads: [groups, N, S, C / groups * kernel]."""
        if isinstance(self.window, TransposedWindow):
            return self.window.patches(x, self.groups, outputs)
        return self.window.patches(x, self.groups)

    def _gradient_factor(self, g: Tensor, divide: bool) -> Tensor:
        """G [groups, C / groups, the same] from g [N, C, *space]."""
        grouped = g.flatten(2).unflatten(1, (self.groups, -1))  # [N, groups, C / groups, S]
        channels, positions = grouped.shape[2:]
        if self.reduce or self.diagonal[1] or positions < channels:
            if self.reduce:
                grouped = grouped.sum(-1, keepdim=True)
            rows = grouped.permute(1, 2, 0, 3).contiguous().movedim(1, -1)
            factor = gradient_factor(
                rows, reduce=self.reduce, divide=divide, diagonal=self.diagonal[1]
            )
            return multiplied(factor)
        # Long lines of positions: a product for each case costs less than the copy of all in order.
        total: Tensor = (grouped @ grouped.mT).sum(0)
        return total / positions if divide else total

    def _input_factor(self, x: Tensor, outputs: Sequence[int]) -> Tensor:
        if not traced() or x.device.type != "cpu":
            return self.formed(x, outputs)
        # A compiler's own loops over patches are no faster, and take minutes to compile.
        operator = torch.ops.kfac_fx.convolution_inputs.default
        found: Tensor = operator(x, list(outputs), *self._literals())
        return found

    def formed(self, x: Tensor, outputs: Sequence[int]) -> Tensor:
        """A [groups, ...] for these output positions, operator by operator."""
        axes = self.window.axes(x) if isinstance(self.window, Window) else None
        plain = not self.reduce and not self.diagonal[0] and suits(x)
        if axes is None or not plain or not is_cheaper(len(x), axes):
            return self._by_patches(x, outputs)
        total = patch_gram(x, axes, self.groups)
        if self.bias:
            sums = self.one * self.patches(x.sum(0, keepdim=True), outputs).sum((1, 2))
            total = bordered(total, sums, self.one**2 * len(x) * math.prod(outputs))
        return total / len(x)

    def _by_patches(self, x: Tensor, outputs: Sequence[int]) -> Tensor:
        """A by copies of what positions read, of so many cases at once that they stay in caches."""
        if self.reduce and isinstance(self.window, Window):
            return self._of_rows(self.window.mean_patch(x, self.groups).unsqueeze(-2))
        side, positions = x.shape[1] * math.prod(self.window.kernel), math.prod(outputs)
        # The products of the parts are added up: that is little work beside many rows alone.
        entries = AT_ONCE.get(x.device.type, AT_ONCE["cuda"])
        at_once = max(entries // (side * positions), 4 * side // positions, 1)
        if functional(x) or at_once >= len(x):
            return self._of_rows(self.patches(x, outputs))
        parts = x.split(at_once)
        wide = torch.promote_types(x.dtype, torch.float32)  # parts are small beside their sum
        found = (
            self._of_rows(self.patches(p, outputs)).to(wide).mul_(len(p) / len(x)) for p in parts
        )
        return functools.reduce(Tensor.add_, found)

    def _of_rows(self, rows: Tensor) -> Tensor:
        factor = input_factor(
            rows, bias=self.bias, reduce=self.reduce, diagonal=self.diagonal[0], one=self.one
        )
        return multiplied(factor)

    def __call__(
        self,
        g: Tensor,
        tensors: Sequence[Tensor | None],
        wanted: Sequence[bool],
        dtype: torch.dtype,
    ) -> list[Tensor | None]:
        (x,) = tensors
        assert x is not None
        spatial = len(self.window.kernel)
        if g.dim() == spatial + 1:  # one case without its batch dimension
            g, x = g.unsqueeze(0), x.unsqueeze(0)
        one_use = len(wanted) == 2
        result: list[Tensor | None] = [None] * len(wanted)
        if wanted[0]:
            A = self._input_factor(x.to(dtype), g.shape[2:])
            result[0] = A if self.groups > 1 else A.squeeze(0)
        if wanted[1]:
            G = self._gradient_factor(g.to(dtype), one_use)
            result[1] = G if self.groups > 1 else G.squeeze(0)
        if not one_use and wanted[2]:
            positions = 1 if self.reduce else g.shape[2:].numel()
            result[2] = torch.full((), positions, dtype=dtype, device=g.device)
        return result

    def _literals(self) -> tuple[Any, ...]:
        """What ``_statistics`` takes, as an operator's arguments."""
        window = self.window
        mode = TRANSPOSED if isinstance(window, TransposedWindow) else window.padding_mode
        reads = (window.kernel, window.stride, window.dilation, window.padding)
        options = self.groups, self.bias, self.reduce, list(self.diagonal), self.one
        return (*map(list, reads), mode, *options)


def _statistics(
    kernel: list[int],
    stride: list[int],
    dilation: list[int],
    padding: list[int],
    padding_mode: str,
    groups: int,
    bias: bool,
    reduce: bool,
    diagonal: Sequence[bool],
    one: float = 1.0,
) -> ConvolutionStatistics:
    window: Window | TransposedWindow
    if padding_mode == TRANSPOSED:
        window = TransposedWindow(kernel, stride, dilation, padding)
    else:
        window = Window(kernel, stride, dilation, padding, padding_mode)
    inputs, gradients = diagonal
    return ConvolutionStatistics(window, groups, bias, reduce, (inputs, gradients), one)


def _formed(x: Tensor, outputs: Sequence[int], *options: Any) -> Tensor:
    return _statistics(*options).formed(x, outputs).contiguous()


LIBRARY.define(
    "convolution_inputs(Tensor x, SymInt[] outputs, int[] kernel, int[] stride, int[] dilation, "
    "int[] padding, str padding_mode, int groups, bool bias, bool reduce, bool[] diagonal, "
    "float one) -> Tensor"
)
LIBRARY.impl("convolution_inputs", _formed, "CPU")
torch.library.register_fake("kfac_fx::convolution_inputs", _formed, lib=LIBRARY)


def _tap(
    y: Tensor, x: Tensor, A: Tensor, G: Tensor, positions: Tensor | None, *options: Any
) -> Tensor:
    factors = [A, G] if positions is None else [A, G, positions]
    if not recording(factors):
        return y
    *_, groups, _, _ = options
    vector = 1 + (groups > 1)
    diagonal = (A.dim() == vector, G.dim() == vector)
    statistics = _statistics(*[*options, diagonal])
    return tapped(y, statistics, [x], factors)


_ARGUMENTS = (
    "(Tensor y, Tensor x, Tensor A, Tensor G, Tensor? positions, int[] kernel, int[] stride, "
    "int[] dilation, int[] padding, str padding_mode, int groups, bool bias, bool reduce) -> Tensor"
)
define("convolution" + _ARGUMENTS, _tap)
# The same of an input that no case has a part in: told apart for those who align cases.
define("table_convolution" + _ARGUMENTS, _tap)
