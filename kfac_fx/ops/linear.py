"""Taps of dense uses s = W abar: plain ones, those of a table, and projections of attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kfac_fx.ops.columns import Along
from kfac_fx.ops.gram import Statistic
from kfac_fx.ops.kronecker import LinearOptions, LinearStatistics, case_rows, form_of
from kfac_fx.ops.options import TapOptions
from kfac_fx.ops.sides import Side, register_side
from kfac_fx.ops.tap import define_tap, tapped


class TableStatistics(LinearStatistics):
    """(A, G) where the input is the same for all cases: its rows are the positions of one case.

    What reaches it of the derivative is summed over the cases, which is one draw of the same
    second moment where the cases are independent draws of mean zero (the sampled Fisher, see
    docs/explanation/mathematics.md, section 3). With data targets it is not, so reports say that
    the batch counts as one case.
    """

    def __call__(
        self,
        g: Tensor,
        tensors: Sequence[Tensor | None],
        wanted: Sequence[bool],
        dtype: torch.dtype,
    ) -> list[Statistic | None]:
        """Return those of both with a first dimension for the one case."""
        lifted = [None if t is None else t.unsqueeze(0) for t in tensors]
        return super().__call__(g.unsqueeze(0), lifted, wanted, dtype)

    def columns(
        self,
        g: Tensor,
        tensors: Sequence[Tensor | None],
        wanted: Sequence[bool],
        dtype: torch.dtype,
    ) -> list[Statistic | None]:
        """Return G summed over columns, with a dimension for the one case."""
        return super().columns(g.unsqueeze(1), tensors, wanted, dtype)

    def of_outputs(self, shape: Sequence[int], along: Along, *, divide: bool) -> None:
        """Return None: outputs that are the same for all cases are no network's."""

    def stream(self, g: Tensor, tensors: Sequence[Tensor | None], dtype: torch.dtype) -> None:
        """Return None: its rows are those of no case."""


@dataclass(frozen=True)
class ProjectionOptions(TapOptions):
    """Options of one projection of attention's packed ``in_proj_weight``.

    Attributes:
        start: first output feature that belongs to the projection.
        length: number of output features.
        bias: whether the block has a bias.
        reduce: whether positions are reduced rather than expanded.
    """

    start: int
    length: int
    bias: bool
    reduce: bool


@dataclass(frozen=True)
class ProjectionStatistics(LinearStatistics):
    """(A, G) of ``length`` output features, x [positions, cases, features] or without cases.

    nn.MultiheadAttention projects with the cases in the second dimension whatever its
    ``batch_first`` says, so the first two are exchanged before rows are read.

    Attributes:
        start: first output feature.
        length: number of output features.
    """

    start: int = 0
    length: int = 0

    def __call__(
        self,
        g: Tensor,
        tensors: Sequence[Tensor | None],
        wanted: Sequence[bool],
        dtype: torch.dtype,
    ) -> list[Statistic | None]:
        """Return those of this projection's derivatives and of the input, cases first."""
        (x,) = tensors
        assert x is not None
        # All projections read one input and one derivative: each takes its own features of g, so
        # that the packed layer has three blocks and A of the shared input is formed once.
        g = g.narrow(-1, self.start, self.length)
        if x.dim() == 3:
            x, g = x.transpose(0, 1), g.transpose(0, 1)
        return super().__call__(g, [x], wanted, dtype)

    def columns(
        self,
        g: Tensor,
        tensors: Sequence[Tensor | None],
        wanted: Sequence[bool],
        dtype: torch.dtype,
    ) -> list[Statistic | None]:
        """Return G of this projection's derivatives, summed over columns."""
        (x,) = tensors
        assert x is not None
        g = g.narrow(-1, self.start, self.length)
        g = g.transpose(1, 2) if x.dim() == 3 else g
        return super().columns(g, tensors, wanted, dtype)

    def of_outputs(self, shape: Sequence[int], along: Along, *, divide: bool) -> None:
        """Return None: attention comes after it."""

    def stream(self, g: Tensor, tensors: Sequence[Tensor | None], dtype: torch.dtype) -> None:
        """Return None: attention keeps to uses."""


@dataclass(frozen=True)
class LinearSide(Side):
    """The rows of a dense use, for couplings.

    Attributes:
        options: those of the tap; a use with groups is not coupled.
        interleaved: rows are positions by cases, flattened, so that the cases alternate.
    """

    options: LinearOptions
    interleaved: bool = False

    def positions(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return (cases, *positions): all dimensions of the output but its features."""
        features = {dim % len(shape) for dim in self.options.y_dims}
        rest = tuple(size for dim, size in enumerate(shape) if dim not in features)
        return rest or (1,)

    def inputs(self, x: Tensor, positions: Sequence[int]) -> Tensor:
        """Return the input by rows."""
        return case_rows(x, self.options.x_dims)

    def derivatives(self, g: Tensor) -> Tensor:
        """Return the derivative by rows."""
        return case_rows(g, self.options.y_dims)


@dataclass(frozen=True)
class ProjectionSide(Side):
    """The rows of one projection of attention, for couplings; x [positions, cases, features].

    Attributes:
        options: those of the tap.
    """

    options: ProjectionOptions

    def positions(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return (cases, positions), which the output has in the other order."""
        return tuple(reversed(shape[:-1]))

    def inputs(self, x: Tensor, positions: Sequence[int]) -> Tensor:
        """Return the input by rows, cases first."""
        return case_rows(x.transpose(0, -2), [-1])

    def derivatives(self, g: Tensor) -> Tensor:
        """Return the projection's derivative by rows, cases first."""
        part = g.narrow(-1, self.options.start, self.options.length)
        return case_rows(part.transpose(0, -2), [-1])


def _linear(
    y: Tensor,
    tensors: Sequence[Tensor | None],
    factors: Sequence[Tensor],
    options: LinearOptions,
) -> Tensor:
    return tapped(y, _statistics(LinearStatistics, factors, options), tensors, factors)


def _table(
    y: Tensor,
    tensors: Sequence[Tensor | None],
    factors: Sequence[Tensor],
    options: LinearOptions,
) -> Tensor:
    (x,) = tensors
    if x is not None and x.dim() == 1:  # a matrix times a vector
        options = replace(options, x_dims=(-1,), y_dims=(-1,))
    # Dimensions are counted in the tensors with a first dimension for the one case.
    lifted = LinearOptions(
        _lifted(options.x_dims),
        _lifted(options.y_dims),
        _lifted(options.x_groups),
        _lifted(options.y_groups),
        options.bias,
        options.reduce,
    )
    return tapped(y, _statistics(TableStatistics, factors, lifted), tensors, factors)


def _lifted(dims: Sequence[int]) -> tuple[int, ...]:
    """Return dimensions as they count after ``unsqueeze(0)``; negative ones do not move."""
    return tuple(dim + (dim >= 0) for dim in dims)


def _statistics(
    kind: type[LinearStatistics], factors: Sequence[Tensor], options: LinearOptions
) -> LinearStatistics:
    """Return the statistics of a use with these buffers."""
    # A leading axis for groups looks like one for sub-blocks: only the options tell them apart.
    grouped = len(options.y_groups) > 0
    A, G = (form_of(factor, grouped=grouped) for factor in factors[:2])
    return kind(options, A, G)


def _projection(
    y: Tensor,
    tensors: Sequence[Tensor | None],
    factors: Sequence[Tensor],
    options: ProjectionOptions,
) -> Tensor:
    dense = LinearOptions((-1,), (-1,), (), (), options.bias, options.reduce)
    statistics = ProjectionStatistics(
        dense,
        form_of(factors[0]),
        form_of(factors[1]),
        start=options.start,
        length=options.length,
    )
    return tapped(y, statistics, tensors, factors)


define_tap("linear", LinearOptions, _linear)
define_tap("table", LinearOptions, _table)
define_tap("projection", ProjectionOptions, _projection)

# "table" has no side: its rows are positions of one case, which no other layer's cases match.
register_side("linear", LinearOptions, LinearSide)
register_side("projection", ProjectionOptions, lambda options, _: ProjectionSide(options))
