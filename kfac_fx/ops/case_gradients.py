"""Factors of whole per-case gradients, for calls of a layer in forward mode.

A call under torch.func.jvp uses the weight once for the value and once for each derivative, and all
of these *streams* belong to the same rows. The gradient of a row is the sum over its streams,
J_n = sum_s g_ns abar_ns^T, and its terms are anything but uncorrelated: in the residual of an
equation they cancel. So these calls have the factors of the matrices J_n themselves,

    A = sum_n J_n^T J_n,   G = sum_n J_n J_n^T,   F = A (x) G / tr A,

as of a matrix that is normally distributed (Ren and Goldfarb 2021, arXiv:2106.02925). See
docs/explanation/mathematics.md, section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor

from kfac_fx.errors import ObservationError
from kfac_fx.ops.columns import Statistics
from kfac_fx.ops.state import FactorState, Stream


@runtime_checkable
class CallStatistics(Statistics, Protocol):
    """Statistics of a kind of use whose calls have per-case gradients."""

    def of_call(self, call: object) -> CallStatistics:
        """Return the same for one call; those of its derivatives (``tangent``) are for it, too."""

    def stream(
        self, g: Tensor, tensors: Sequence[Tensor | None], dtype: torch.dtype
    ) -> Stream | None:
        """Return the stream of a use, None where its form has none.

        Args:
            g, tensors, dtype: see ``kfac_fx.ops.columns.Statistics``.
        """


def join(
    statistics: Statistics,
    g: Tensor,
    tensors: Sequence[Tensor | None],
    wanted: Sequence[bool],
    dtype: torch.dtype,
    states: Sequence[FactorState],
) -> bool:
    """Leave the stream of a use with the others of its call; return whether it has one.

    Args:
        statistics: of the use.
        g, tensors, wanted, dtype: see ``kfac_fx.ops.columns.Statistics``.
        states: those of the factors.
    """
    state = states[0]
    made = statistics.stream(g, tensors, dtype) if joinable(statistics, states) else None
    if made is None:
        return False
    # A pass that asks for inputs alone counts, and leaves A to the one that brings derivatives.
    state.streamed += wanted[0]
    if wanted[1]:
        first = state.column == 0  # what does not depend on the derivative comes once
        asked = [first, True, first][: len(wanted)]
        alone = partial(statistics, g, tensors, asked, dtype)
        state.streams.append(made._replace(column=state.column, alone=alone))
    return True


def joinable(statistics: Statistics, states: Sequence[FactorState]) -> TypeGuard[CallStatistics]:
    """Say whether the derivatives of a call in forward mode are joined with its values."""
    # G of a weight that is computed goes on to another buffer, which is none of these.
    both = len(states) > 1 and None not in (states[0].gathering, states[1].gathering)
    return both and isinstance(statistics, CallStatistics)


def of_tangents(statistics: Statistics, states: Sequence[FactorState]) -> Statistics:
    """Return the statistics of the use that the tangents of a use are.

    Args:
        statistics, states: of the use.

    Raises:
        ObservationError: there are none.
    """
    made: Statistics | None = statistics.tangent() if hasattr(statistics, "tangent") else None
    if made is None:
        raise ObservationError(
            f"{type(statistics).__name__.removesuffix('Statistics')} statistics record no "
            "derivatives of the network by torch.func.jvp; those of linear and convolution layers "
            "do: leave parameters out with transform(..., exclude=...), moments with ekfac=False"
        )
    if joinable(made, states):
        states[0].joined = 2
    return made


class CaseFactors(NamedTuple):
    """(A, G) of per-case gradients, in the scales of ``input_factor`` and ``gradient_factor``."""

    A: Tensor
    G: Tensor


@torch.no_grad()
def case_factors(streams: Sequence[Stream]) -> CaseFactors:
    """Return the factors of the calls whose streams have come, added up.

    J_n is never formed: with S streams, J_n^T J_n = sum_st (g_s . g_t) a_s a_t^T takes rows of
    inputs and a small matrix a row.

    Args:
        streams: of one block, in any order.
    """
    calls: dict[object, dict[int, list[Stream]]] = {}
    for stream in streams:
        calls.setdefault(stream.call, {}).setdefault(stream.column, []).append(stream)
    sums: list[CaseFactors] = []
    sizes: list[Tensor] = []
    for columns in calls.values():
        for found in columns.values():
            a = torch.stack([stream.a for stream in found], 1)
            g = torch.stack([stream.g for stream in found], 1)
            of_a = a @ a.mT
            sums.append(CaseFactors(_weighted_gram(a, g @ g.mT), _weighted_gram(g, of_a)))
            # Inputs are those of the call, and come once with each column.
            sizes.append(of_a.diagonal(0, -2, -1).sum() / (found[0].cases * len(columns)))
    A, G = (torch.stack(each).sum(0) for each in zip(*sums, strict=True))
    size = torch.stack(sizes).sum()
    # Both sums have the trace of the block, the squares of all J_n, and a block has it once. A gets
    # the trace that inputs alone would have: then it does not depend on the scale of the loss,
    # which only G is divided by, and averages weigh all batches alike.
    numbers = torch.finfo(A.dtype)
    least = numbers.tiny / numbers.eps
    # Where all J_n are zero, as of layers before one that is zero, nothing is known of their rows.
    trace = A.diagonal().sum()
    known = A * (size / trace.clamp_min(least))
    unknown = torch.eye(len(A), dtype=A.dtype, device=A.device) * (size / len(A))
    A = torch.where(trace <= least, unknown, known)
    return CaseFactors(A, G / size.clamp_min(numbers.tiny))


def _weighted_gram(rows: Tensor, weights: Tensor) -> Tensor:
    """Return sum_n R_n^T W_n R_n, of rows [N, S, d] and symmetric weights [N, S, S]."""
    total = (weights @ rows).flatten(0, 1).mT @ rows.flatten(0, 1)
    # Products round both halves apart, and factors are taken for symmetric.
    return (total + total.mT) / 2
