"""Statistics of a look-up: A is the diagonal of token counts, kept as a vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_fx.ops.cases import over_cases
from kfac_fx.ops.gram import Statistic, multiplied
from kfac_fx.ops.positions import gradient_factor
from kfac_fx.ops.tap import define, recording, tapped


@dataclass(frozen=True)
class EmbeddingStatistics:
    """(A, G), and the positions where the block has several uses; always in the expand form.

    A one-hot input makes A = sum over cases and positions of a a^T / N a diagonal of counts / N.
    Padding contributes to neither factor and is no position.
    """

    padding_idx: int
    rows: int
    diagonal: bool

    def __call__(
        self,
        g: Tensor,
        tensors: Sequence[Tensor | None],
        wanted: Sequence[bool],
        dtype: torch.dtype,
    ) -> list[Statistic | None]:
        (ids,) = tensors
        assert ids is not None
        cases = ids.shape[0] if ids.dim() else 1
        counted = (ids != self.padding_idx).to(dtype).reshape(-1)
        positions = counted.sum().clamp_min(1.0) / cases
        result: list[Statistic | None] = [None] * len(wanted)
        if wanted[0]:
            zeros = torch.zeros(self.rows, dtype=dtype, device=g.device)
            result[0] = zeros.index_add(0, ids.reshape(-1), counted) / cases
        if wanted[1]:
            rows = g.to(dtype).reshape(1, counted.shape[0], g.shape[-1]) * counted.unsqueeze(-1)
            G = gradient_factor(rows, reduce=False, divide=False, diagonal=self.diagonal)
            result[1] = multiplied(G) / positions if len(wanted) == 2 else G
        if len(wanted) > 2 and wanted[2]:
            result[2] = positions
        return result


def _tap(
    y: Tensor,
    ids: Tensor,
    like: Tensor | None,
    A: Tensor,
    G: Tensor,
    positions: Tensor | None,
    padding_idx: int,
) -> Tensor:
    factors = [A, G] if positions is None else [A, G, positions]
    if not recording(factors):
        return y
    if like is not None and (y.dim() != like.dim() or y.shape[0] != like.shape[0]):
        y, _ = over_cases(y, like)
    if y.shape[:-1] != ids.shape:
        missing = y.dim() - 1 - ids.dim()
        ids = ids.reshape((1,) * missing + ids.shape).expand(y.shape[:-1])
    statistics = EmbeddingStatistics(padding_idx, A.shape[0], G.dim() == 1)
    return tapped(y, statistics, [ids], factors)


def _table(
    y: Tensor, ids: Tensor, A: Tensor, G: Tensor, positions: Tensor | None, padding_idx: int
) -> Tensor:
    """Rows that are the same for all cases are the positions of one case."""
    factors = [A, G] if positions is None else [A, G, positions]
    if not recording(factors):
        return y
    statistics = EmbeddingStatistics(padding_idx, A.shape[0], G.dim() == 1)
    return tapped(y, statistics, [ids.unsqueeze(0)], factors)


define(
    "embedding(Tensor y, Tensor ids, Tensor? like, Tensor A, Tensor G, Tensor? positions, "
    "int padding_idx) -> Tensor",
    _tap,
)
define(
    "table_embedding(Tensor y, Tensor ids, Tensor A, Tensor G, Tensor? positions, "
    "int padding_idx) -> Tensor",
    _table,
)
