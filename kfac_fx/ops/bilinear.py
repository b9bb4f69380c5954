"""The tap of a bilinear form: dense in the outer product of its two inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kfac_fx.ops.kronecker import LinearOptions, LinearStatistics, form_of
from kfac_fx.ops.options import TapOptions
from kfac_fx.ops.tap import define_tap, tapped


@dataclass(frozen=True)
class BilinearOptions(TapOptions):
    """Options of a bilinear form's tap.

    Attributes:
        bias: whether the block has a bias.
        reduce: whether positions are reduced rather than expanded.
    """

    bias: bool
    reduce: bool


class BilinearStatistics(LinearStatistics):
    """(A, G) of y_o = x1^T W_o x2, which is dense in the outer product of x1 and x2.

    A [in1 * in2 (+ 1), the same] is over the pairs of entries of both inputs, the second running
    fastest; G [out, out]. docs/explanation/mathematics.md, section 4, "linear".
    """

    def tangent(self) -> None:
        """Return None: the product rule gives two terms, which are no use of the weight each."""

    def multiplied_by(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return the outer product, [..., in1 * in2]."""
        first, second = tensors
        assert first is not None and second is not None
        return (first.unsqueeze(-1) * second.unsqueeze(-2)).flatten(-2)


def _record(
    y: Tensor,
    tensors: Sequence[Tensor | None],
    factors: Sequence[Tensor],
    options: BilinearOptions,
) -> Tensor:
    dense = LinearOptions((-1,), (-1,), (), (), options.bias, options.reduce)
    statistics = BilinearStatistics(dense, form_of(factors[0]), form_of(factors[1]))
    return tapped(y, statistics, tensors, factors)


define_tap("bilinear", BilinearOptions, _record, tensors=("first", "second"))
