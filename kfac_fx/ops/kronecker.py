"""Second moments of cases and positions, and what every Kronecker use records: A, G, positions.

The formulas are those of docs/explanation/mathematics.md, section 2: A (x) G is the Fisher of the
mean negative log-likelihood of a case, with likelihood terms left for the averages to count.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from kfac_fx.ops.columns import Along
from kfac_fx.ops.gram import (
    Rows,
    Statistic,
    cut_gram,
    formed_once,
    homogeneous_gram,
    second_moment,
    stay,
)
from kfac_fx.ops.options import TapOptions
from kfac_fx.ops.state import Stream, collecting_now


def case_rows(t: Tensor, features: Sequence[int], groups: Sequence[int] = ()) -> Tensor:
    """Return t as [N, S, features]: cases, positions that share the weight, flattened features.

    Args:
        t: any tensor; the first dimension that is neither feature nor group counts the cases, the
            others are positions. There may be none: a vector of features is one case.
        features: dimensions of t that hold the features, in order.
        groups: dimensions that count independent matrices; where there are any, they are flattened
            to a first dimension of the result.
    """
    if len(features) == 1 and not groups and t.dim() > 1 and features[0] % t.dim() == t.dim() - 1:
        return t.reshape(t.shape[0], -1, t.shape[-1])  # most uses, in one call
    last = [dim % t.dim() for dim in features]
    first = [dim % t.dim() for dim in groups]
    rest = [dim for dim in range(t.dim()) if dim not in last and dim not in first]
    t = t.permute(first + rest + last)
    split = len(first), len(first) + len(rest)
    lead = t.shape[split[0] : split[1]]
    sizes = (lead[0] if rest else 1, lead[1:].numel(), t.shape[split[1] :].numel())
    return t.reshape(t.shape[: split[0]].numel(), *sizes) if first else t.reshape(sizes)


def positioned_rows(
    t: Tensor, features: Sequence[int], groups: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Return ``case_rows`` in a dtype, or as they are rows [N, features] without positions."""
    # Most layers of a small network, where each view costs about as much as a product.
    plain = t.dim() == 2 and not groups and len(features) == 1 and features[0] in (-1, 1)
    rows = t if plain else case_rows(t, features, groups)
    return rows if rows.dtype == dtype else rows.to(dtype)


def over_cases(p: Tensor, like: Tensor) -> tuple[Tensor, bool]:
    """Return p viewed with one copy for each case of ``like``, and whether it is broadcast so.

    The consumer's backward then returns one gradient a case, before they are summed.
    """
    missing = like.dim() - p.dim()
    if missing > 0:
        lead = (like.shape[0],) + (1,) * (missing - 1)
        return p.expand(*lead, *p.shape), True
    if missing == 0 and p.dim() > 0 and p.shape[0] == 1:
        return p.expand(like.shape[0], *p.shape[1:]), True
    return p, False


class FactorForm(NamedTuple):
    """The form in which one factor is kept; the buffer's shape says it, so no tap's option does.

    Attributes:
        diagonal: whether the factor is kept as its diagonal alone.
        blocks: the number of sub-blocks along the diagonal that are kept; 1 for a whole matrix.
    """

    diagonal: bool = False
    blocks: int = 1


WHOLE = FactorForm()


def form_of(factor: Tensor, *, grouped: bool = False) -> FactorForm:
    """Return the form of a factor from its buffer.

    Args:
        grouped: whether the first dimension counts independent blocks, which are never cut.
    """
    if factor.dim() == 1 + grouped:
        return FactorForm(diagonal=True)
    return FactorForm(blocks=factor.shape[0]) if factor.dim() == 3 and not grouped else WHOLE


def input_factor(
    rows: Tensor, *, bias: bool, reduce: bool, form: FactorForm = WHOLE, one: float = 1.0
) -> Statistic:
    """Return A of docs/explanation/mathematics.md, section 2, from inputs [..., N, S, d] or [N, d].

    expand: A = sum over cases and positions of abar abar^T / N;
    reduce: A = sum over cases of abar abar^T / N, abar of the mean over positions.

    Args:
        rows: the inputs of N cases at S positions.
        bias: whether the homogeneous coordinate is an input, so that A is [d + 1, d + 1].
        reduce: which of the two; it must be that of ``gradient_factor``.
        form: how A is kept.
        one: the homogeneous coordinate; 0 for the derivative in a direction, where it is constant.
    """
    # A is divided by the cases here and not by its caller: the caller knows the number of
    # likelihood terms, and the input factor does not depend on those.
    cases = rows.shape[max(-3, -rows.dim())]
    flat = rows
    if rows.dim() > 2:
        flat = rows.mean(-2) if reduce else rows.flatten(-3, -2)
    # Sub-blocks are cut through the features, so the homogeneous coordinate must be one of them.
    if form.blocks > 1:
        flat = torch.cat([flat, torch.full_like(flat[..., :1], one)], -1) if bias else flat
        return cut_gram(flat, form.blocks) / cases
    if form.diagonal:
        squares = flat.square().sum(-2)
        if bias:
            ones = torch.full_like(squares[..., :1], one * flat.shape[-2])
            squares = torch.cat([squares, ones], -1)
        return squares / cases
    if not bias:
        return second_moment(flat, 1 / cases)
    # Few rows of a large factor stay rows until they are added to the average where that lies: a
    # product of its own would be written and read once more.
    if collecting_now.forming and flat.shape[-2] < flat.shape[-1] and stay(flat):
        return Rows(pad(flat, (0, 1), value=one), 1 / cases)
    return homogeneous_gram(flat, 1 / cases, one)


def gradient_factor(
    rows: Tensor, *, reduce: bool, divide: bool, form: FactorForm = WHOLE
) -> Statistic:
    """Return G of docs/explanation/mathematics.md, section 2, from g [..., N, S, d] or [N, d].

    expand: G = sum over cases and positions of g g^T / S;
    reduce: G = sum over cases of (sum over positions of g) (the same)^T.
    Neither is divided by the number of cases or of likelihood terms: only the loss knows them.

    Args:
        rows: derivatives of the summed loss for N cases at S positions.
        reduce: which of the two.
        divide: whether to divide by S. A block of several uses counts the positions of all of them
            together and divides once, by their sum (section 4, parameters used several times).
        form: how G is kept.
    """
    flat, scale = rows, 1.0
    if rows.dim() > 2:
        flat = rows.sum(-2) if reduce else rows.flatten(-3, -2)
        # The scale goes into the product, which multiplies anyway; a pass over G for it would cost
        # as much as reading G once more.
        scale = 1 / rows.shape[-2] if divide and not reduce else 1.0
    if form.blocks > 1:
        return cut_gram(flat, form.blocks) * scale
    return flat.square().sum(-2) * scale if form.diagonal else second_moment(flat, scale)


def case_covariance(u: Tensor, dim: int) -> Statistic:
    """Return C, the sum over cases of the outer product of per-case gradients.

    See docs/explanation/mathematics.md, section 4 (scale and shift, and parameters of their own).

    Args:
        u: [N, K, d]: K gradients (of scale and shift, say) of d entries a case.
        dim: dimensions of the factor: 2 for the full [K d, K d] matrix, 3 for [d, K, K], one small
            matrix an entry, 1 for the diagonal [K d].
    """
    if dim == 2:
        return second_moment(u.flatten(1))
    if dim == 3:
        return torch.einsum("nkd,nld->dkl", u, u)
    return u.flatten(1).square().sum(0)


class KroneckerStatistics(ABC):
    """(A, G), and the number of positions where a block has several uses.

    A subclass reads what its tap saved and forms one factor a method. What a use counts as its
    positions must fit its G: G is divided by it where the use is the block's only one.
    """

    def __call__(
        self,
        g: Tensor,
        tensors: Sequence[Tensor | None],
        wanted: Sequence[bool],
        dtype: torch.dtype,
    ) -> list[Statistic | None]:
        """Return one statistic a factor buffer; see ``kfac_fx.ops.columns.Statistics``."""
        # A third buffer, the count of positions, is there only where uses are counted together.
        one_use = len(wanted) == 2
        found: list[Statistic | None] = [None] * len(wanted)
        if wanted[0]:
            found[0] = self.inputs(g, tensors, dtype)
        if wanted[1]:
            found[1] = self.gradients(g, tensors, dtype, divide=one_use)
        if not one_use and wanted[2]:
            found[2] = self.count(g, tensors, dtype)
        return found

    @abstractmethod
    def inputs(self, g: Tensor, tensors: Sequence[Tensor | None], dtype: torch.dtype) -> Statistic:
        """Return A, formed in ``dtype``."""

    @abstractmethod
    def gradients(
        self, g: Tensor, tensors: Sequence[Tensor | None], dtype: torch.dtype, *, divide: bool
    ) -> Statistic:
        """Return G, formed in ``dtype``, divided by the positions where ``divide``."""

    def count(self, g: Tensor, tensors: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
        """Return the number of positions as a tensor."""
        return torch.full((), self.positions(g, tensors), dtype=dtype, device=g.device)

    def positions(self, g: Tensor, tensors: Sequence[Tensor | None]) -> float:
        """Return the number of positions of a case; 1 unless a subclass knows better."""
        return 1.0


class ColumnKroneckerStatistics(KroneckerStatistics):
    """(A, G) of a kind that forms G of many columns at once; see ``ColumnStatistics``."""

    def columns(
        self,
        g: Tensor,
        tensors: Sequence[Tensor | None],
        wanted: Sequence[bool],
        dtype: torch.dtype,
    ) -> list[Statistic | None]:
        """Return G summed over columns; A and the positions are those of any one of them."""
        G = self.column_gradients(g, tensors, dtype, divide=len(wanted) == 2)
        return [None, G, None][: len(wanted)]

    @abstractmethod
    def column_gradients(
        self, g: Tensor, tensors: Sequence[Tensor | None], dtype: torch.dtype, *, divide: bool
    ) -> Statistic:
        """Return G summed over columns.

        Args:
            g: derivatives by columns, [K, ...].
            tensors, dtype, divide: see ``gradients``.
        """


def known_factor(
    along: Along,
    shape: Sequence[int],
    dim: int,
    *,
    reduce: bool,
    positions: float,
    form: FactorForm,
) -> Tensor | None:
    """Return G from the sums of g g^T over all derivatives; None where they are not known.

    Args:
        along: gives the sums.
        shape: the shape of a derivative.
        dim: the dimension of the features.
        reduce: whether derivatives are added up over the positions first.
        positions: S, which the sum is divided by.
        form: how G is kept.
    """
    # A diagonal is as many parts as there are features: the whole matrix would be thrown away.
    parts = shape[dim] if form.diagonal else form.blocks
    total = along(dim, summed=reduce, parts=parts)
    if total is None:
        return None
    return (total.flatten() if form.diagonal else total) / positions


@dataclass(frozen=True)
class LinearOptions(TapOptions):
    """Options of a dense use.

    Attributes:
        x_dims: the feature dimensions of the input, in the order of the weight's columns.
        y_dims: the feature dimensions of the output, in the order of the weight's rows.
        x_groups: dimensions of the input that count independent matrices; there may be none.
        y_groups: the same of the output.
        bias: whether the block has a bias, and A the homogeneous coordinate.
        reduce: whether positions that share the weight are reduced rather than expanded.
    """

    x_dims: tuple[int, ...]
    y_dims: tuple[int, ...]
    x_groups: tuple[int, ...]
    y_groups: tuple[int, ...]
    bias: bool
    reduce: bool


@dataclass(frozen=True)
class LinearStatistics(ColumnKroneckerStatistics):
    """(A, G) of a dense use s = W abar: A over inputs a [N, S, in], G over derivatives g.

    A [in + 1, in + 1] and G [out, out] are ``input_factor`` and ``gradient_factor``; with groups
    there is one of each a group, along a first dimension. docs/explanation/mathematics.md, section
    4, "linear".

    Attributes:
        options: what the tap was called with.
        A: how A is kept.
        G: how G is kept.
        one: the homogeneous coordinate.
        call: stands for the call of the layer, where it may have derivatives in forward mode.
    """

    options: LinearOptions
    A: FactorForm = WHOLE
    G: FactorForm = WHOLE
    one: float = 1.0
    call: object | None = None

    def tangent(self) -> LinearStatistics | None:
        """Return the statistics of W x', the derivative in a direction x'.

        It is a use of W too, but of W alone: the bias is constant in every direction.
        """
        return replace(self, one=0.0)

    def of_call(self, call: object) -> LinearStatistics:
        """Return the statistics of a use in a call; see ``CallStatistics``."""
        return replace(self, call=call)

    def stream(
        self, g: Tensor, tensors: Sequence[Tensor | None], dtype: torch.dtype
    ) -> Stream | None:
        """Return the rows of the use; see ``CallStatistics``."""
        (x,) = tensors
        given = self.options
        if x is None or given.x_groups or given.y_groups or (self.A, self.G) != (WHOLE, WHOLE):
            return None
        a = positioned_rows(x, given.x_dims, (), dtype)
        g = positioned_rows(g, given.y_dims, (), dtype)
        cases = len(a)
        if a.dim() > 2:
            # Positions that are reduced have one input and one derivative a case, of which a
            # stream knows nothing.
            if given.reduce and a.shape[1] > 1:
                return None
            a, g = a.flatten(0, 1), g.flatten(0, 1)
        if len(a) != len(g):
            return None
        a = torch.cat([a, torch.full_like(a[:, :1], self.one)], 1) if given.bias else a
        return Stream(object() if self.call is None else self.call, cases, a, g, self.one == 0.0)

    def inputs(self, g: Tensor, tensors: Sequence[Tensor | None], dtype: torch.dtype) -> Statistic:
        """Return A; the last one again where another use has read the same input."""
        x = tensors[0]
        assert x is not None
        given, form, one = self.options, self.A, self.one
        # The experts of a batched product may share one input, which then has no axis for them,
        # or one of a single entry: products broadcast over the groups.
        if given.x_groups:
            missing = max(0, *(-dim - x.dim() for dim in given.x_groups))
            sizes = [1] * missing + [*x.shape]
            for own, of in zip(given.x_groups, given.y_groups, strict=True):
                sizes[own] = g.shape[of]
            x = x if sizes == [*x.shape] else x.expand(sizes)

        def formed() -> Statistic:
            rows = positioned_rows(x, given.x_dims, given.x_groups, dtype)
            return input_factor(rows, bias=given.bias, reduce=given.reduce, form=form, one=one)

        # Queries, keys and values read one tensor after the other. What A depends on besides is in
        # the key, so that another option or precision never gets this A.
        key = (given.x_dims, given.x_groups, dtype, given.bias, given.reduce, form, one)
        return formed_once(x, key, formed)

    def gradients(
        self, g: Tensor, tensors: Sequence[Tensor | None], dtype: torch.dtype, *, divide: bool
    ) -> Statistic:
        """Return G over the features of the output."""
        rows = positioned_rows(g, self.options.y_dims, self.options.y_groups, dtype)
        return gradient_factor(rows, reduce=self.options.reduce, divide=divide, form=self.G)

    def column_gradients(
        self, g: Tensor, tensors: Sequence[Tensor | None], dtype: torch.dtype, *, divide: bool
    ) -> Statistic:
        """Return G summed over columns, over the features of the output."""
        given = self.options
        rows = torch.vmap(lambda one: case_rows(one, given.y_dims, given.y_groups))(g).to(dtype)
        # G sums over cases, so columns are further cases: one product of many rows.
        rows = rows.movedim(0, -4).flatten(-4, -3)
        return gradient_factor(rows, reduce=given.reduce, divide=divide, form=self.G)

    def of_outputs(self, shape: Sequence[int], along: Along, *, divide: bool) -> Tensor | None:
        """Return G from sums that are known; see ``kfac_fx.ops.columns.OutputStatistics``."""
        given = self.options
        if len(given.y_dims) != 1 or given.y_groups:
            return None
        positions = self.positions(torch.empty(shape, device="meta"), ()) if divide else 1
        dim, reduce = given.y_dims[0], given.reduce
        return known_factor(along, shape, dim, reduce=reduce, positions=positions, form=self.G)

    def positions(self, g: Tensor, tensors: Sequence[Tensor | None]) -> float:
        """Return S, or 1 where positions are reduced."""
        given = self.options
        return 1 if given.reduce else case_rows(g, given.y_dims, given.y_groups).shape[-2]


@dataclass(frozen=True)
class ShiftOptions(TapOptions):
    """Options of the tap of a bias alone.

    Attributes:
        channels: dimensions of the output that the bias is along.
    """

    channels: tuple[int, ...]


@dataclass(frozen=True)
class ShiftStatistics:
    """(C,) of a bias alone: the covariance of its per-case gradients, the sums of g over positions.

    docs/explanation/mathematics.md, section 4, "bias alone".

    Attributes:
        channels: dimensions of the output that the bias is along.
        dim: dimensions of C, see ``case_covariance``.
    """

    channels: tuple[int, ...]
    dim: int

    def __call__(
        self,
        g: Tensor,
        tensors: Sequence[Tensor | None],
        wanted: Sequence[bool],
        dtype: torch.dtype,
    ) -> list[Statistic | None]:
        """Return (C,); see ``kfac_fx.ops.columns.Statistics``."""
        sums = case_rows(g, self.channels).sum(1, dtype=dtype)
        return [case_covariance(sums.unsqueeze(1), self.dim)]

    def columns(
        self,
        g: Tensor,
        tensors: Sequence[Tensor | None],
        wanted: Sequence[bool],
        dtype: torch.dtype,
    ) -> list[Statistic | None]:
        """Return C summed over columns; see ``kfac_fx.ops.columns.ColumnStatistics``."""
        sums = torch.vmap(lambda one: case_rows(one, self.channels).sum(1, dtype=dtype))(g)
        return [case_covariance(sums.flatten(0, 1).unsqueeze(1), self.dim)]
