"""Statistics of bags of embeddings: a dense use of each bag's vector of token weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_fx.ops.gram import Statistic, gram
from kfac_fx.ops.positions import gradient_factor
from kfac_fx.ops.tap import define, recording, tapped


@dataclass(frozen=True)
class EmbeddingBagStatistics:
    """(A, G), and the positions where the block has several uses.

    y_b = W^T x_b, where x_b [V] sums the weights of the bag's tokens: 1, the weight given with
    the token, or 1 / n for the mean of n. A = sum over bags of x_b x_b^T / B, or its diagonal; what
    a bag holds of padding has the weight 0.
    """

    rows: int
    mean: bool
    padding_idx: int
    diagonal: tuple[bool, bool]

    def __call__(
        self,
        g: Tensor,
        tensors: Sequence[Tensor | None],
        wanted: Sequence[bool],
        dtype: torch.dtype,
    ) -> list[Statistic | None]:
        ids, offsets, weights = tensors
        assert ids is not None
        result: list[Statistic | None] = [None] * len(wanted)
        if wanted[0]:
            places, amounts = self._entries(g.shape[0], ids, offsets, weights, dtype)
            moment = self._squares if self.diagonal[0] else self._gram
            result[0] = moment(g.shape[0], places, amounts) / g.shape[0]
        if wanted[1]:
            rows = g.to(dtype).unsqueeze(1)
            result[1] = gradient_factor(rows, reduce=True, divide=False, diagonal=self.diagonal[1])
        if len(wanted) > 2 and wanted[2]:
            result[2] = torch.ones((), dtype=dtype, device=g.device)
        return result

    def _entries(
        self,
        bags: int,
        ids: Tensor,
        offsets: Tensor | None,
        weights: Tensor | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """Per token, its place bag * V + token in x [bags, V], and what it adds there."""
        flat = ids.reshape(-1).long()
        number = torch.arange(flat.shape[0], device=ids.device)
        if offsets is None:
            bag = number // max(ids.shape[-1], 1)
        else:
            bag = torch.bucketize(number, offsets.long(), right=True) - 1
        counted = (flat != self.padding_idx) & (bag < bags)
        bag = bag.clamp_max(bags - 1)
        amount = counted.to(dtype)
        if weights is not None:
            amount = amount * weights.reshape(-1).to(dtype)
        if self.mean:
            sizes = torch.zeros(bags, dtype=dtype, device=ids.device).index_add(0, bag, amount)
            amount = amount / sizes.clamp_min(1.0)[bag]
        return bag * self.rows + flat, amount

    def _gram(self, bags: int, places: Tensor, amounts: Tensor) -> Tensor:
        x = amounts.new_zeros(bags * self.rows).index_add(0, places, amounts)
        return gram(x.unflatten(0, (bags, self.rows)))

    def _squares(self, bags: int, places: Tensor, amounts: Tensor) -> Tensor:
        """The diagonal of ``_gram`` without x: entries at one place are added before the square."""
        places, order = places.sort()
        new = torch.cat([places.new_zeros(1), (places[1:] != places[:-1]).long()])
        run = new[: places.shape[0]].cumsum(0)
        sums = torch.zeros_like(amounts).index_add(0, run, amounts[order])
        token = torch.zeros_like(places).scatter(0, run, places % self.rows)
        return amounts.new_zeros(self.rows).index_add(0, token, sums.square())


def _tap(
    y: Tensor,
    ids: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    A: Tensor,
    G: Tensor,
    positions: Tensor | None,
    mean: bool,
    padding_idx: int,
) -> Tensor:
    factors = [A, G] if positions is None else [A, G, positions]
    if not recording(factors):
        return y
    diagonal = (A.dim() == 1, G.dim() == 1)
    statistics = EmbeddingBagStatistics(A.shape[0], mean, padding_idx, diagonal)
    return tapped(y, statistics, [ids, offsets, weights], factors)


define(
    "embedding_bag(Tensor y, Tensor ids, Tensor? offsets, Tensor? weights, Tensor A, Tensor G, "
    "Tensor? positions, bool mean, int padding_idx) -> Tensor",
    _tap,
)
