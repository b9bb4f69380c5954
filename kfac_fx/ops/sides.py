"""The two sides of a use that couples: rows of its input and of its derivative, by position."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from kfac_fx.ops.autocorrelation import Axis
from kfac_fx.ops.convolution import (
    TRANSPOSED,
    ConvolutionStatistics,
    TransposedWindow,
    Window,
)
from kfac_fx.ops.positions import case_rows


class Side(Protocol):
    """Reads a use that has one weight matrix for all positions."""

    @property
    def bias(self) -> bool:
        """Whether the homogeneous coordinate is an input."""

    @property
    def reduce(self) -> bool:
        """Whether positions are reduced rather than expanded."""

    @property
    def interleaved(self) -> bool:
        """Whether what counts as cases are positions by cases."""

    def positions(self, shape: Sequence[int]) -> tuple[int, ...]:
        """(cases, *positions) of an output of this shape."""

    def inputs(self, x: Tensor, positions: Sequence[int]) -> Tensor:
        """[cases, S, d_in]: what the weight multiplies."""

    def derivatives(self, g: Tensor) -> Tensor:
        """[cases, S, d_out]."""


@dataclass(frozen=True)
class LinearSide:
    """A dense use; features are the dimensions ``x_dims`` of x and ``y_dims`` of y.

    ``interleaved``: rows are positions by cases, flattened; the cases alternate.
    """

    x_dims: tuple[int, ...]
    y_dims: tuple[int, ...]
    bias: bool
    reduce: bool
    interleaved: bool = False

    def positions(self, shape: Sequence[int]) -> tuple[int, ...]:
        features = {dim % len(shape) for dim in self.y_dims}
        rest = tuple(size for dim, size in enumerate(shape) if dim not in features)
        return rest or (1,)

    def inputs(self, x: Tensor, positions: Sequence[int]) -> Tensor:
        return case_rows(x, self.x_dims)

    def derivatives(self, g: Tensor) -> Tensor:
        return case_rows(g, self.y_dims)


@dataclass(frozen=True)
class ProjectionSide:
    """``length`` outputs of attention's packed projection, of x [positions, cases, features]."""

    start: int
    length: int
    bias: bool
    reduce: bool
    interleaved = False

    def positions(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(reversed(shape[:-1]))

    def inputs(self, x: Tensor, positions: Sequence[int]) -> Tensor:
        return case_rows(x.transpose(0, -2), [-1])

    def derivatives(self, g: Tensor) -> Tensor:
        return case_rows(g.narrow(-1, self.start, self.length).transpose(0, -2), [-1])


@dataclass(frozen=True)
class ConvolutionSide:
    """A convolution without groups: patches are its inputs (KFC)."""

    window: Window | TransposedWindow
    bias: bool
    reduce: bool
    interleaved = False

    def positions(self, shape: Sequence[int]) -> tuple[int, ...]:
        spatial = len(self.window.kernel)
        lead = (1,) if len(shape) == spatial + 1 else (shape[0],)
        return (*lead, *shape[len(shape) - spatial :])

    def inputs(self, x: Tensor, positions: Sequence[int]) -> Tensor:
        statistics = ConvolutionStatistics(self.window, 1, self.bias, self.reduce)
        return statistics.patches(self.batched(x), positions[1:]).squeeze(0)

    def batched(self, x: Tensor) -> Tensor:
        """[N, C, *space], where one case may come without its batch dimension."""
        return x.unsqueeze(0) if x.dim() == len(self.window.kernel) + 1 else x

    def axes(self, x: Tensor) -> list[Axis] | None:
        """The spatial axes of a batch, where a Gram matrix of patches can do without them."""
        if self.reduce or not isinstance(self.window, Window):
            return None
        return self.window.axes(x) if x.dim() == len(self.window.kernel) + 2 else None

    def pooled_inputs(
        self, x: Tensor, positions: Sequence[int], grid: Sequence[int]
    ) -> Tensor | None:
        """``pooled`` of the patches, as the patches of the sums over cells: [cases, *grid, d].

        None where cells are uneven, or the window is that of a transposed convolution.
        """
        window = self.window
        pairs = list(zip(positions[1:], grid, strict=True))
        if not isinstance(window, Window) or any(size % cells for size, cells in pairs):
            return None
        each = [size // cells for size, cells in pairs]
        x = window.padded(self.batched(x))
        for axis, count in enumerate(each):
            x = _sums(x, 2 + axis, count, window.stride[axis])
        x = x / prod(each) ** 0.5 if prod(each) > 1 else x
        stride = [step * count for step, count in zip(window.stride, each, strict=True)]
        coarse = Window(window.kernel, stride, window.dilation, [0] * len(window.padding), "zeros")
        rows: Tensor = coarse.patches(x, 1).squeeze(0).unflatten(1, grid)
        return rows

    def derivatives(self, g: Tensor) -> Tensor:
        return self.batched(g).flatten(2).mT


def _sums(x: Tensor, dim: int, count: int, step: int) -> Tensor:
    """At each place the sum of ``count`` entries from there on, ``step`` apart."""
    if count == 1:
        return x
    size = x.shape[dim] - (count - 1) * step
    half = _sums(x, dim, count // 2, step)
    total = half.narrow(dim, 0, size) + half.narrow(dim, count // 2 * step, size)
    return total + x.narrow(dim, (count - 1) * step, size) if count % 2 else total


@cache
def side_of(text: str) -> Side:
    """The side that a literal describes: its kind, then the options of its class."""
    kind, *options = ast.literal_eval(text)
    if kind == "linear":
        return LinearSide(*options)
    if kind == "projection":
        return ProjectionSide(*options)
    kernel, stride, dilation, padding, mode, bias, reduce = options
    window: Any
    if mode == TRANSPOSED:
        window = TransposedWindow(kernel, stride, dilation, padding)
    else:
        window = Window(kernel, stride, dilation, padding, mode)
    return ConvolutionSide(window, bias, reduce)


def derivative_rows(side: Side, g: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """g by position, [cases, *positions, d], and 1 / sqrt(S); reduce: the sum, [cases, d], and 1.

    Their product is what the cross factor is a second moment of.
    """
    rows = side.derivatives(g).to(dtype)
    if side.reduce:
        return rows.sum(1), 1.0
    positions = side.positions(g.shape)[1:]
    scale: float = rows.shape[1] ** -0.5
    return rows.unflatten(1, positions) if positions else rows.squeeze(1), scale


def row_shape(side: Side, shape: Sequence[int]) -> tuple[int, ...]:
    """(cases, *positions) of the rows above, for an output of this shape."""
    positions = side.positions(shape)
    return positions[:1] if side.reduce else positions
