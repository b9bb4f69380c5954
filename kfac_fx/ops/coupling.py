"""Cross factors of two uses: A_ij from both inputs, G_ij from both derivatives.

The earlier use i makes a *link*, a zero without memory in the shape of its own positions with the
later use's features. The later use j reads it, and its backward returns its own derivatives as the
link's derivative; i's backward then holds g_i and g_j together. Keeping g_j for i in a variable
instead would need an order of backward calls that autograd does not promise, and would not survive
a compiler; a derivative that flows along an edge of the graph does both.

The formulas are those of docs/explanation/mathematics.md, section 7.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from kfac_fx.ops.alignment import (
    Common,
    by_case,
    common_grid,
    from_cases,
    pooled,
    spread,
)
from kfac_fx.ops.columns import Recorded, register_use
from kfac_fx.ops.cross_input import Input, cross_input
from kfac_fx.ops.sides import Side, derivative_rows, row_shape, side_of
from kfac_fx.ops.state import SPARSE, is_paused
from kfac_fx.ops.tap import _Unbatched, buffer_of, constant, define, joined, recording

Context: TypeAlias = Any
"""What autograd hands from a forward to its backward; attributes are set on it freely."""


class _Link(_Unbatched):
    """(y, G) -> a zero of y's shape and the link; its backward returns G_ij."""

    @staticmethod
    def forward(y: Tensor, G: Tensor, side: Side) -> tuple[Tensor, Tensor]:
        shape = (*row_shape(side, y.shape), G.shape[1])
        # Zeros without memory: only their derivatives are used.
        return y.new_zeros(()).expand(y.shape), G.new_zeros(()).expand(shape)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, G, side = inputs
        ctx.G = G
        ctx.side = side

    @staticmethod
    def jvp(ctx: Context, y: Tensor, *_: None) -> tuple[Tensor, Tensor]:
        zero, link = _Link.apply(y, ctx.G, ctx.side)
        return zero, link

    @staticmethod
    def backward(ctx: Context, g: Tensor, later: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[1] or is_paused(ctx.G):
            return None, None, None
        rows, scale = derivative_rows(ctx.side, g, ctx.G.dtype)
        # ``later`` has been multiplied by its own side's scale already.
        return None, rows.flatten(0, -2).mT @ later.flatten(0, -2) * scale, None


def _recorded(node: Context) -> Recorded:
    """Return what a link records; see ``kfac_fx.ops.columns.register_use``."""
    G: Tensor = node.G

    def form(g: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor]:
        """Return the sum over columns of G_ij, from the derivatives of both uses."""
        own, later = g
        _, scale = derivative_rows(node.side, own[0], G.dtype)
        rows = torch.vmap(lambda one: derivative_rows(node.side, one, G.dtype)[0])(own)
        return [rows.flatten(0, -2).mT @ later.flatten(0, -2) * scale]

    return Recorded((G,), form)


register_use(_Link, _recorded)


class _Sides(NamedTuple):
    """Two uses and how their rows fit together.

    Attributes:
        later: the use j.
        earlier: the use i.
        ordered: whether rows that one use counts as cases follow the other's positions.
        one: the homogeneous coordinate, the input of the bias; 0 for the derivative in a direction.
    """

    later: Side
    earlier: Side
    ordered: bool
    one: float = 1.0


class _Couple(_Unbatched):
    """(y, x_j, x_i, A, link) -> a zero of y's shape; its backward returns A_ij and g_j."""

    @staticmethod
    def forward(
        y: Tensor, x: Tensor, earlier_x: Tensor, A: Tensor, link: Tensor, sides: _Sides
    ) -> Tensor:
        return y.new_zeros(()).expand(y.shape)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, x, earlier_x, A, link, sides = inputs
        ctx.A = A
        ctx.sides = sides
        ctx.save_for_backward(x, earlier_x)
        ctx.link_shape = tuple(link.shape)

    @staticmethod
    def jvp(ctx: Context, y: Tensor, x: Tensor, earlier_x: Tensor, *others: Any) -> Tensor:
        link = others[1]
        zero: Tensor = _Couple.apply(y, x, earlier_x, ctx.A, link, ctx.sides._replace(one=0.0))
        return zero

    @staticmethod
    def backward(ctx: Context, g: Tensor) -> tuple[Tensor | None, ...]:
        there = ctx.link_shape[:-1]
        later, earlier, ordered, _ = ctx.sides
        here = row_shape(later, g.shape)
        # Rows of attention's output projection are known to be positions by cases, whatever lies
        # between.
        known = ordered or later.interleaved or earlier.interleaved
        common = common_grid(there, here, known)
        # The two are asked for apart: a pass may form A_ij while G_ij is paused, and the other way
        # round.
        A = derivative = None
        if ctx.needs_input_grad[3] and not is_paused(ctx.A):
            A = _cross_input(ctx, there, common, g.shape)
        if ctx.needs_input_grad[4]:
            derivative = _handed_back(ctx, g, there, common)
        return None, None, None, A, derivative, None


def _cross_input(
    ctx: Context, there: tuple[int, ...], common: Common | None, shape: Sequence[int]
) -> Tensor:
    """Return A_ij, the sum over the grid of abar_i abar_j^T / sqrt(N_i N_j).

    Where cases do not match, A_ij is zero: the pair then counts as independent.

    Args:
        there: (cases, *positions) of the earlier use.
        shape: the shape of the later use's output.
    """
    A: Tensor = ctx.A
    if common is None:
        return torch.zeros_like(A)
    # As in other taps, sparse inputs are made dense while their statistics are formed.
    dense = (x.to_dense() if x.layout in SPARSE else x for x in ctx.saved_tensors)
    x, earlier_x = (x.to(A.dtype) for x in dense)
    sides: _Sides = ctx.sides
    # Reduced rows have no positions, but patches need to know them.
    later = Input(sides.later, x, sides.later.positions(shape), common.second)
    earlier = Input(sides.earlier, earlier_x, there, common.first)
    return cross_input(earlier, later, common, sides.one)


def _handed_back(ctx: Context, g: Tensor, there: tuple[int, ...], common: Common | None) -> Tensor:
    """Return g_j, averaged on the common grid, at the positions of the earlier use."""
    dtype = ctx.A.dtype
    if common is None:
        return torch.zeros(ctx.link_shape, dtype=dtype, device=g.device)
    sides: _Sides = ctx.sides
    rows, scale = derivative_rows(sides.later, g, dtype)
    rows = by_case(rows, common.cases, common.second, sides.later.interleaved)
    rows = spread(pooled(rows, common.grid) * scale, common.first)
    return from_cases(rows, there, sides.earlier.interleaved)


def _link(y: Tensor, G: Tensor, side: str) -> tuple[Tensor, Tensor]:
    if not recording([G]):
        return y, y.new_empty(0)
    zero, link = _Link.apply(constant(y), buffer_of(G), side_of(side))
    return joined(y, zero), link


def _couple(
    y: Tensor,
    x: Tensor,
    earlier_x: Tensor,
    link: Tensor,
    A: Tensor,
    later: str,
    earlier: str,
    ordered: bool,
) -> Tensor:
    if not recording([A]):
        return y
    sides = _Sides(side_of(later), side_of(earlier), ordered)
    zero = _Couple.apply(constant(y), constant(x), constant(earlier_x), buffer_of(A), link, sides)
    return joined(y, zero)


define("link(Tensor y, Tensor G, str side) -> (Tensor, Tensor)", _link)
define(
    "couple(Tensor y, Tensor x, Tensor earlier_x, Tensor link, Tensor A, str later, str earlier, "
    "bool ordered) -> Tensor",
    _couple,
)
