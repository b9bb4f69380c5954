"""Statistics of a grouped product: rows sorted by expert, one matrix an expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_fx.ops.gram import gram
from kfac_fx.ops.tap import define, recording, tapped


@dataclass(frozen=True)
class GroupedStatistics:
    """(A, G) with a leading axis for the experts; every row is a case of its expert.

    Where the block's uses are counted, each is one position.

    A_e = sum over the rows of expert e of x x^T / n_e, G_e = sum of g g^T, so that A_e (x) G_e is
    the expert's share of the Fisher. An expert without rows has none.
    """

    def __call__(
        self,
        g: Tensor,
        tensors: Sequence[Tensor | None],
        wanted: Sequence[bool],
        dtype: torch.dtype,
    ) -> list[Tensor | None]:
        x, offsets = tensors
        assert x is not None and offsets is not None
        ends = offsets.tolist()
        sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        x, g = (t[: ends[-1]].to(dtype) for t in (x, g))
        result: list[Tensor | None] = [None] * len(wanted)
        if wanted[2:] == [True]:
            result[2] = torch.ones((), dtype=dtype, device=g.device)
        if wanted[0]:
            result[0] = torch.stack([gram(part) / max(len(part), 1) for part in x.split(sizes)])
        if wanted[1]:
            result[1] = torch.stack([gram(part) for part in g.split(sizes)])
        return result


def _tap(
    y: Tensor, x: Tensor, offsets: Tensor, A: Tensor, G: Tensor, positions: Tensor | None
) -> Tensor:
    factors = [A, G] if positions is None else [A, G, positions]
    if not recording(factors):
        return y
    return tapped(y, GroupedStatistics(), [x, offsets], factors)


define(
    "grouped(Tensor y, Tensor x, Tensor offsets, Tensor A, Tensor G, Tensor? positions) -> Tensor",
    _tap,
)
