"""Statistics of a dense use: s = W abar."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kfac_fx.ops.gram import Statistic, formed_once
from kfac_fx.ops.positions import case_rows, gradient_factor, input_factor
from kfac_fx.ops.tap import define, recording, tapped


@dataclass(frozen=True)
class LinearStatistics:
    """(A, G), and the number of positions where the block has several uses."""

    x_dims: Sequence[int]
    y_dims: Sequence[int]
    x_groups: Sequence[int]
    y_groups: Sequence[int]
    bias: bool
    reduce: bool
    diagonal: tuple[bool, bool] = (False, False)
    cut: tuple[int, int] = (1, 1)
    one: float = 1.0

    def tangent(self) -> LinearStatistics | None:
        """Of the derivative W x' in a direction: without the homogeneous coordinate."""
        return replace(self, one=0.0)

    def inputs(self, tensors: list[Tensor]) -> Tensor:
        """What the weight multiplies, from the saved tensors."""
        return tensors[0]

    def __call__(
        self,
        g: Tensor,
        tensors: Sequence[Tensor | None],
        wanted: Sequence[bool],
        dtype: torch.dtype,
    ) -> list[Statistic | None]:
        x = self.inputs([t for t in tensors if t is not None])
        if self.x_groups and x.dim() < g.dim():  # matmul broadcasts over the groups
            x = x.expand(*g.shape[: g.dim() - x.dim()], *x.shape)
        one_use = len(wanted) == 2
        result: list[Statistic | None] = [None] * len(wanted)
        if wanted[0]:
            result[0] = self._input_factor(x, dtype)
        if wanted[1]:
            rows = case_rows(g, self.y_dims, self.y_groups).to(dtype)
            result[1] = gradient_factor(
                rows,
                reduce=self.reduce,
                divide=one_use,
                diagonal=self.diagonal[1],
                cut=self.cut[1],
            )
        if not one_use and wanted[2]:
            positions = 1 if self.reduce else case_rows(g, self.y_dims, self.y_groups).shape[-2]
            result[2] = torch.full((), positions, dtype=dtype, device=g.device)
        return result

    def _input_factor(self, x: Tensor, dtype: torch.dtype) -> Statistic:
        form = (self.bias, self.one, self.reduce, self.diagonal[0], self.cut[0])

        def formed() -> Statistic:
            rows = case_rows(x, self.x_dims, self.x_groups).to(dtype)
            bias, one, reduce, diagonal, cut = form
            return input_factor(rows, bias=bias, one=one, reduce=reduce, diagonal=diagonal, cut=cut)

        return formed_once(x, (self.x_dims, self.x_groups, dtype, *form), formed)


class TableStatistics(LinearStatistics):
    """(A, G) where the input is the same for all cases: its rows are the positions of one case.

    What reaches it of the derivative is summed over the cases, which is one draw of the same
    second moment where the cases are independent draws of mean zero (the sampled Fisher).
    """

    def __call__(
        self,
        g: Tensor,
        tensors: Sequence[Tensor | None],
        wanted: Sequence[bool],
        dtype: torch.dtype,
    ) -> list[Statistic | None]:
        lifted = [None if t is None else t.unsqueeze(0) for t in tensors]
        return super().__call__(g.unsqueeze(0), lifted, wanted, dtype)


def _cut(factor: Tensor) -> int:
    """The number of sub-blocks that a factor without groups keeps."""
    return factor.shape[0] if factor.dim() == 3 else 1


def _record(
    statistics: type[LinearStatistics],
    y: Tensor,
    x: Tensor,
    A: Tensor,
    G: Tensor,
    positions: Tensor | None,
    *options: Any,
) -> Tensor:
    factors = [A, G] if positions is None else [A, G, positions]
    if not recording(factors):
        return y
    return tapped(y, statistics(*_options(A, G, *options)), [x], factors)


def _tap(y: Tensor, *arguments: Any) -> Tensor:
    return _record(LinearStatistics, y, *arguments)


def _table(
    y: Tensor, x: Tensor, A: Tensor, G: Tensor, positions: Tensor | None, *options: Any
) -> Tensor:
    *dims, bias, reduce = options
    if x.dim() == 1:  # a matrix times a vector
        dims[:2] = [-1], [-1]
    lifted = ([dim + (dim >= 0) for dim in each] for each in dims)
    return _record(TableStatistics, y, x, A, G, positions, *lifted, bias, reduce)


def _options(A: Tensor, G: Tensor, *options: Any) -> tuple[Any, ...]:
    """The fields of ``LinearStatistics``: what the tap was called with, and the factors' forms."""
    _, _, _, y_groups, _, _ = options
    vector = 1 + (len(y_groups) > 0)
    diagonal = (A.dim() == vector, G.dim() == vector)
    return (*options, diagonal, (1, 1) if y_groups else (_cut(A), _cut(G)))


_ARGUMENTS = (
    "(Tensor y, Tensor x, Tensor A, Tensor G, Tensor? positions, int[] x_dims, int[] y_dims, "
    "int[] x_groups, int[] y_groups, bool bias, bool reduce) -> Tensor"
)
define("linear" + _ARGUMENTS, _tap)
define("table" + _ARGUMENTS, _table)


@dataclass(frozen=True)
class ProjectionStatistics(LinearStatistics):
    """(A, G) of ``length`` output features, x [positions, cases, features] or without cases."""

    start: int = 0
    length: int = 0

    def __call__(
        self,
        g: Tensor,
        tensors: Sequence[Tensor | None],
        wanted: Sequence[bool],
        dtype: torch.dtype,
    ) -> list[Statistic | None]:
        (x,) = tensors
        assert x is not None
        g = g.narrow(-1, self.start, self.length)
        if x.dim() == 3:
            x, g = x.transpose(0, 1), g.transpose(0, 1)
        return super().__call__(g, [x], wanted, dtype)


def _projection_tap(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    G: Tensor,
    positions: Tensor | None,
    start: int,
    length: int,
    bias: bool,
    reduce: bool,
) -> Tensor:
    factors = [A, G] if positions is None else [A, G, positions]
    if not recording(factors):
        return y
    diagonal = (A.dim() == 1, G.dim() == 1)
    statistics = ProjectionStatistics(
        [-1], [-1], [], [], bias, reduce, diagonal, (_cut(A), _cut(G)), start=start, length=length
    )
    return tapped(y, statistics, [x], factors)


define(
    "projection(Tensor y, Tensor x, Tensor A, Tensor G, Tensor? positions, "
    "int start, int length, bool bias, bool reduce) -> Tensor",
    _projection_tap,
)
