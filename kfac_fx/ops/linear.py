"""Statistics of a dense use: s = W abar."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_fx.ops.positions import case_rows, gradient_factor, input_factor
from kfac_fx.ops.tap import define, recording, tapped


@dataclass(frozen=True)
class LinearStatistics:
    """(A, G), and the number of positions where the block has several uses."""

    x_dims: Sequence[int]
    y_dims: Sequence[int]
    bias: bool
    reduce: bool

    def __call__(
        self,
        g: Tensor,
        tensors: Sequence[Tensor | None],
        wanted: Sequence[bool],
        dtype: torch.dtype,
    ) -> list[Tensor | None]:
        (x,) = tensors
        assert x is not None
        one_use = len(wanted) == 2
        result: list[Tensor | None] = [None] * len(wanted)
        if wanted[0]:
            rows = case_rows(x, self.x_dims).to(dtype)
            result[0] = input_factor(rows, bias=self.bias, reduce=self.reduce)
        if wanted[1]:
            rows = case_rows(g, self.y_dims).to(dtype)
            result[1] = gradient_factor(rows, reduce=self.reduce, divide=one_use)
        if not one_use and wanted[2]:
            positions = 1 if self.reduce else case_rows(g, self.y_dims).shape[1]
            result[2] = torch.full((), positions, dtype=dtype, device=g.device)
        return result


def _tap(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    G: Tensor,
    positions: Tensor | None,
    x_dims: list[int],
    y_dims: list[int],
    bias: bool,
    reduce: bool,
) -> Tensor:
    factors = [A, G] if positions is None else [A, G, positions]
    if not recording(factors):
        return y
    return tapped(y, LinearStatistics(x_dims, y_dims, bias, reduce), [x], factors)


define(
    "linear(Tensor y, Tensor x, Tensor A, Tensor G, Tensor? positions, "
    "int[] x_dims, int[] y_dims, bool bias, bool reduce) -> Tensor",
    _tap,
)
