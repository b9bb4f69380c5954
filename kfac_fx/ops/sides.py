"""The two sides of a use that couples: rows of its input and of its derivative, by position.

An operator that couples registers its side under its own name, in its own file. A graph holds a
side as one string, since torch's operator schemas know no records: ``side_text`` writes it and
``side_of`` reads it, both with the options class of the operator.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from kfac_fx.ops.options import TapOptions
from kfac_fx.ops.patches import Axis


class _Shared(Protocol):
    """The options that all uses that couple have."""

    @property
    def bias(self) -> bool:
        """Say whether the homogeneous coordinate is an input."""

    @property
    def reduce(self) -> bool:
        """Say whether positions are reduced rather than expanded."""


class Side(ABC):
    """Reads a use that has one weight matrix for all positions.

    Cross factors need the rows of both uses apart from their products, since positions are matched
    in between (docs/explanation/mathematics.md, section 7).
    """

    options: _Shared
    """The options of the use's tap; a subclass says which."""

    interleaved: bool = False
    """Whether what the use counts as cases are positions by cases, so that cases alternate."""

    @abstractmethod
    def positions(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return (cases, *positions) of an output of this shape."""

    @abstractmethod
    def inputs(self, x: Tensor, positions: Sequence[int]) -> Tensor:
        """Return what the weight multiplies: [cases, S, d_in].

        Args:
            x: the use's input.
            positions: (cases, *positions) of its output.
        """

    @abstractmethod
    def derivatives(self, g: Tensor) -> Tensor:
        """Return the derivative with respect to the output by rows: [cases, S, d_out]."""

    def axes(self, x: Tensor) -> list[Axis] | None:
        """Return the spatial axes where a Gram matrix of patches can do without patches."""
        return None

    def pooled_inputs(
        self, x: Tensor, positions: Sequence[int], grid: Sequence[int]
    ) -> Tensor | None:
        """Return ``inputs`` averaged to a coarser grid where that needs none of them, else None."""
        return None


_Options = TypeVar("_Options", bound=TapOptions)


class _Kind(NamedTuple):
    """The options and the side that an operator registered.

    Attributes:
        options: the class of its options.
        side: makes a side of the options and of whether cases alternate.
    """

    options: type[TapOptions]
    side: Callable[..., Side]


# Filled by the operators' files as they are imported, so that a new kind with cross factors changes
# no file but its own.
_KINDS: dict[str, _Kind] = {}


def register_side(
    operator: str, options: type[_Options], side: Callable[[_Options, bool], Side]
) -> None:
    """Let the uses that a tap operator records have cross factors with others.

    Args:
        operator: the tap's name.
        options: the class of its options, with ``bias`` and ``reduce`` among them.
        side: makes the side from the options and from whether the cases of its rows alternate
            (``Side.interleaved``).
    """
    _KINDS[operator] = _Kind(options, side)


def coupling_operators() -> tuple[str, ...]:
    """Return the names of the tap operators whose uses can have cross factors."""
    return tuple(_KINDS)


def side_text(operator: str, args: Sequence[object], *, interleaved: bool) -> str:
    """Return a side as a string, for the operators of couplings and moments.

    Args:
        operator: name of the use's tap.
        args: the tap's options, in the order of the operator's schema.
        interleaved: whether its rows are positions by cases, flattened.
    """
    options = _KINDS[operator].options.from_args(args)
    return json.dumps([operator, interleaved, options.to_text()])


# Operators read their sides in every forward pass; the text is parsed once.
@cache
def side_of(text: str) -> Side:
    """Return the side that ``side_text`` wrote; the same object for the same text."""
    operator, interleaved, options = json.loads(text)
    kind = _KINDS[operator]
    return kind.side(kind.options.from_text(options), interleaved)


def derivative_rows(side: Side, g: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Return g by position, and what to multiply it by.

    Returns:
        [cases, *positions, d_out] and 1 / sqrt(S); where positions are reduced their sum,
        [cases, d_out], and 1. The product of the two is what the cross factor is a second moment
        of, so that G_ii would be the factor G of the use.
    """
    # 1 / sqrt(S) on either side: G_ii then has its 1 / S, and G_ij the geometric mean of both, as a
    # joint Gram matrix must have to stay positive.
    rows = side.derivatives(g).to(dtype)
    if side.options.reduce:
        return rows.sum(1), 1.0
    positions = side.positions(g.shape)[1:]
    scale: float = rows.shape[1] ** -0.5
    # Not unflatten, which cannot be batched over the columns of an exact Fisher.
    return rows.reshape(rows.shape[0], *positions, rows.shape[-1]), scale


def row_shape(side: Side, shape: Sequence[int]) -> tuple[int, ...]:
    """Return (cases, *positions) of what ``derivative_rows`` makes of an output of this shape."""
    positions = side.positions(shape)
    return positions[:1] if side.options.reduce else positions
