"""Let all uses of a block divide by one number of cases, however many rows each of them sees.

A of a use is divided by the rows of its first dimension. Where one layer is used on a batch, and on
two batches one after the other or on some rows of one, these numbers differ, and the uses would not
weigh alike. A statistic is the gradient of its buffer, so the buffer passes through an operator
whose backward multiplies by the share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kfac_fx.ops.convolution import ConvolutionOptions
from kfac_fx.ops.kronecker import LinearOptions
from kfac_fx.ops.state import is_paused
from kfac_fx.ops.tap import define

Context: TypeAlias = Any
"""What autograd hands from a forward to its backward; attributes are set on it freely."""


class _Shared(torch.autograd.Function):
    """A zero of a factor's shape whose backward multiplies by a number."""

    @staticmethod
    def forward(factor: Tensor, share: float) -> Tensor:
        return factor.new_zeros(()).expand(factor.shape)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.factor, ctx.share = inputs

    @staticmethod
    def backward(ctx: Context, statistic: Tensor) -> tuple[Tensor | None, None]:
        return None if is_paused(ctx.factor) else statistic * ctx.share, None


def not_cases(operator: str, options: Sequence[object]) -> list[int] | None:
    """Return the dimensions of a tap's input that count no cases and no positions.

    Args:
        operator: name of the tap's operator.
        options: those of the tap.

    Returns:
        None where the kind counts its cases in another way.
    """
    if operator == "linear":
        linear = LinearOptions.from_args(options)
        return [*linear.x_dims, *linear.x_groups]
    if operator == "convolution":
        kernel = ConvolutionOptions.from_args(options).kernel
        return list(range(-len(kernel) - 1, 0))
    return [] if operator == "embedding" else None


def _count(x: Tensor, others: Sequence[int]) -> int:
    """Return the size of the first dimension that is not one of the others, 1 without any."""
    taken = {dim % x.dim() for dim in others}
    return next((size for dim, size in enumerate(x.shape) if dim not in taken), 1)


def shared(
    factor: Tensor, x: Tensor, others: Sequence[int], first: Tensor, others_of_first: Sequence[int]
) -> Tensor:
    """Return a factor's buffer, whose statistics are weighted as those of the first use.

    Args:
        factor: A, or the count of positions.
        x: what the use reads, with the cases first.
        others: the dimensions of it that are none of cases or positions.
        first: the same of the block's first use.
        others_of_first: those of that.
    """
    if not factor.requires_grad:
        return factor
    here, there = _count(x, others), _count(first, others_of_first)
    if here == there or there == 0:
        return factor
    result: Tensor = _Shared.apply(factor, here / there)
    return result


define(
    "shared(Tensor factor, Tensor x, int[] others, Tensor first, int[] others_of_first) -> Tensor",
    shared,
)
