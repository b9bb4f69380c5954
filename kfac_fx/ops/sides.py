"""The two sides of a use that couples: rows of its input and of its derivative, by position."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

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
        x = x.unsqueeze(0) if x.dim() == len(self.window.kernel) + 1 else x
        statistics = ConvolutionStatistics(self.window, 1, self.bias, self.reduce)
        return statistics.patches(x, positions[1:]).squeeze(0)

    def derivatives(self, g: Tensor) -> Tensor:
        spatial = len(self.window.kernel)
        g = g.unsqueeze(0) if g.dim() == spatial + 1 else g
        return g.flatten(2).mT


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


def input_rows(
    side: Side, x: Tensor, positions: Sequence[int], dtype: torch.dtype, one: float = 1.0
) -> Tensor:
    """abar by position, [cases, *positions, d]; reduce: the mean over positions, [cases, d].

    ``one`` is the homogeneous coordinate.
    """
    rows = side.inputs(x, positions).to(dtype)
    if side.reduce:
        rows = rows.mean(1)
    else:
        rows = rows.unflatten(1, positions[1:]) if len(positions) > 1 else rows.squeeze(1)
    return torch.cat([rows, torch.full_like(rows[..., :1], one)], -1) if side.bias else rows


def derivative_rows(side: Side, g: Tensor, dtype: torch.dtype) -> Tensor:
    """g / sqrt(S) by position, [cases, *positions, d]; reduce: the sum, [cases, d]."""
    rows = side.derivatives(g).to(dtype)
    if side.reduce:
        return rows.sum(1)
    positions = side.positions(g.shape)[1:]
    scaled: Tensor = rows / rows.shape[1] ** 0.5
    return scaled.unflatten(1, positions) if positions else scaled.squeeze(1)


def row_shape(side: Side, shape: Sequence[int]) -> tuple[int, ...]:
    """(cases, *positions) of the rows above, for an output of this shape."""
    positions = side.positions(shape)
    return positions[:1] if side.reduce else positions
