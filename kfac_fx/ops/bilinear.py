"""Statistics of a bilinear form: dense in the outer product of its two inputs."""

from __future__ import annotations

from torch import Tensor

from kfac_fx.ops.linear import LinearStatistics
from kfac_fx.ops.tap import define, recording, tapped


class BilinearStatistics(LinearStatistics):
    """(A, G) with A over the pairs of entries of both inputs, the second running fastest."""

    def tangent(self) -> None:
        """None: the product rule gives two terms, which are no use of the weight each."""

    def inputs(self, tensors: list[Tensor]) -> Tensor:
        first, second = tensors
        return (first.unsqueeze(-1) * second.unsqueeze(-2)).flatten(-2)


def _tap(
    y: Tensor,
    first: Tensor,
    second: Tensor,
    A: Tensor,
    G: Tensor,
    positions: Tensor | None,
    bias: bool,
    reduce: bool,
) -> Tensor:
    factors = [A, G] if positions is None else [A, G, positions]
    if not recording(factors):
        return y
    diagonal = (A.dim() == 1, G.dim() == 1)
    statistics = BilinearStatistics([-1], [-1], [], [], bias, reduce, diagonal)
    return tapped(y, statistics, [first, second], factors)


define(
    "bilinear(Tensor y, Tensor first, Tensor second, Tensor A, Tensor G, Tensor? positions, "
    "bool bias, bool reduce) -> Tensor",
    _tap,
)
