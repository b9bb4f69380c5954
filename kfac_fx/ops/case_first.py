"""Show a tap its tensors with the cases first, where a model keeps them elsewhere.

Statistics read cases from the first dimension. Inside a model they may be the second one
([positions, cases, features]), or be folded with positions into one dimension of rows.
"""

from __future__ import annotations

import logging

from torch import Tensor

from kfac_fx.ops.library import LIBRARY

log = logging.getLogger("kfac_fx")

_said: list[bool] = []
"""Whether the warning was given; this is in every recorded pass."""

LIBRARY.define("cases_first(Tensor(a) y, int dim, Tensor? like) -> Tensor(a)")
LIBRARY.define("dims_of(Tensor(a) y, Tensor like) -> Tensor(a)")
LIBRARY.define("each_row(Tensor(a) y, Tensor like) -> Tensor(a)")
LIBRARY.define("cases_back(Tensor(a) y, int dim, Tensor like) -> Tensor(a)")


POSITIONS_FIRST = -2
"""Stands for rows of one position after another, in the place of a dimension."""

WITHIN = -3
"""Stands for a tap that looks at whole rows, and puts those of a case together by itself."""


def cases_first(y: Tensor, dim: int, like: Tensor | None) -> Tensor:
    """Return a view of y whose first dimension counts the cases.

    Args:
        y: what a tap stands on or reads.
        dim: the dimension that counts the cases now. Where they are folded with positions, 0 puts
            the positions behind the cases and -1 at the end; -2 puts them behind the cases where
            rows are those of one position after another.
        like: where cases are folded, a tensor whose first dimension counts them, for -2 its second.
    """
    if like is None:
        return y.movedim(dim, 0) if dim else y.view_as(y)
    cases = like.shape[1 if dim == POSITIONS_FIRST else 0]
    if cases and y.shape[0] != cases and y.shape[0] % cases == 0:
        if dim == POSITIONS_FIRST:
            return y.reshape(y.shape[0] // cases, cases, *y.shape[1:]).transpose(0, 1)
        rows = y.reshape(cases, y.shape[0] // cases, *y.shape[1:])
        return rows.movedim(1, -1) if dim else rows
    if 1 < y.shape[0] < cases:
        _warn_of_fewer()
    return y.view_as(y)


def _warn_of_fewer() -> None:
    """Say once that rows hold several cases: no size was known when the graph was analysed."""
    if not _said:
        _said.append(True)
        log.warning(
            "a reshape put several cases into each row, as x.view(-1, 2, d) does to pairs: norms "
            "and parameters that are broadcast behind it take rows for cases"
        )


def cases_back(y: Tensor, dim: int, like: Tensor) -> Tensor:
    """Return what ``cases_first`` was given, in its shape.

    Args:
        y: the view, after the tap.
        dim: that of ``cases_first``.
        like: has the shape that y had.
    """
    if dim > 0:
        return y.movedim(0, dim)
    if dim and y.dim() > like.dim():
        y = y.transpose(0, 1) if dim == POSITIONS_FIRST else y.movedim(-1, 1)
    return y.reshape(like.shape)


def dims_of(y: Tensor, like: Tensor) -> Tensor:
    """Return a view of a parameter with as many dimensions as what it is broadcast with."""
    return y.reshape((1,) * (like.dim() - y.dim()) + y.shape)


def each_row(y: Tensor, like: Tensor) -> Tensor:
    """Return a parameter, of which a tap has made a copy for each case, with one for each row.

    Args:
        y: the parameter after the tap, with a dimension more where there are copies.
        like: what it is broadcast with, whose rows are cases and positions.
    """
    if y.dim() == like.dim():
        return y.view_as(y)  # nothing was recorded, or rows were cases
    copies = y.expand(y.shape[0], like.shape[0] // y.shape[0], *y.shape[2:])
    return copies.reshape(like.shape[0], *y.shape[2:])


LIBRARY.impl("each_row", each_row, "CompositeImplicitAutograd")
LIBRARY.impl("dims_of", dims_of, "CompositeImplicitAutograd")
LIBRARY.impl("cases_first", cases_first, "CompositeImplicitAutograd")
LIBRARY.impl("cases_back", cases_back, "CompositeImplicitAutograd")
