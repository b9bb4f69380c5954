"""Show a tap its tensors with the cases first, where a model keeps them elsewhere.

Statistics read cases from the first dimension. Inside a model they may be the second one
([positions, cases, features]), or be folded with positions into one dimension of rows.
"""

from __future__ import annotations

from torch import Tensor

from kfac_fx.ops.library import LIBRARY

LIBRARY.define("cases_first(Tensor(a) y, int dim, Tensor? like) -> Tensor(a)")
LIBRARY.define("cases_back(Tensor(a) y, int dim, Tensor like) -> Tensor(a)")


def cases_first(y: Tensor, dim: int, like: Tensor | None) -> Tensor:
    """Return a view of y whose first dimension counts the cases.

    Args:
        y: what a tap stands on or reads.
        dim: the dimension that counts the cases now.
        like: where rows are cases by positions, a tensor whose first dimension counts the cases.
    """
    if dim:
        return y.transpose(0, dim)
    if like is None:
        return y.view_as(y)
    cases = like.shape[0]
    if cases and y.shape[0] != cases and y.shape[0] % cases == 0:
        return y.reshape(cases, y.shape[0] // cases, *y.shape[1:])
    return y.view_as(y)


def cases_back(y: Tensor, dim: int, like: Tensor) -> Tensor:
    """Return what ``cases_first`` was given, in its shape.

    Args:
        y: the view, after the tap.
        dim: that of ``cases_first``.
        like: has the shape that y had.
    """
    return y.transpose(0, dim) if dim else y.reshape(like.shape)


LIBRARY.impl("cases_first", cases_first, "CompositeImplicitAutograd")
LIBRARY.impl("cases_back", cases_back, "CompositeImplicitAutograd")
