"""The tap of bags of embeddings: a dense use of each bag's vector of token weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_fx.ops.gram import Statistic, gram
from kfac_fx.ops.kronecker import (
    WHOLE,
    ColumnKroneckerStatistics,
    FactorForm,
    form_of,
    gradient_factor,
)
from kfac_fx.ops.options import TapOptions
from kfac_fx.ops.tap import define_tap, tapped


@dataclass(frozen=True)
class EmbeddingBagOptions(TapOptions):
    """Options of the tap of bags.

    Attributes:
        mean: whether a bag averages its tokens; else it sums them.
        padding_idx: the token that counts for nothing, or ``kfac_fx.ops.embedding.NO_PADDING``.
    """

    mean: bool
    padding_idx: int


@dataclass(frozen=True)
class EmbeddingBagStatistics(ColumnKroneckerStatistics):
    """(A, G) of bags, y_b = W^T x_b: every bag is a case with one position.

    x_b [V] sums the weights of the bag's tokens: 1, the weight given with the token, or 1 / n for
    the mean of n. A = sum over bags of x_b x_b^T / B, [V, V], or its diagonal; G = sum over bags of
    g_b g_b^T, [D, D]. What a bag holds of padding has the weight 0.
    docs/explanation/mathematics.md, section 4, "linear", with x_b for the input.

    Attributes:
        options: what the tap was called with.
        rows: V.
        A: how A is kept.
        G: how G is kept.
    """

    options: EmbeddingBagOptions
    rows: int
    A: FactorForm = WHOLE
    G: FactorForm = WHOLE

    def inputs(self, g: Tensor, tensors: Sequence[Tensor | None], dtype: torch.dtype) -> Statistic:
        """Return A over the tokens of a bag."""
        ids, offsets, weights = tensors
        assert ids is not None
        bags = g.shape[0]
        # Tokens of one bag are summed before the product with g, so they are correlated by design:
        # A is a matrix where the table is small enough, unlike that of single look-ups.
        places, amounts = self._entries(bags, ids, offsets, weights, dtype)
        moment = self._squares if self.A.diagonal else self._gram
        return moment(bags, places, amounts) / bags

    def gradients(
        self, g: Tensor, tensors: Sequence[Tensor | None], dtype: torch.dtype, *, divide: bool
    ) -> Statistic:
        """Return G over the entries of a row of the table."""
        return gradient_factor(g.to(dtype).unsqueeze(1), reduce=True, divide=False, form=self.G)

    def column_gradients(
        self, g: Tensor, tensors: Sequence[Tensor | None], dtype: torch.dtype, *, divide: bool
    ) -> Statistic:
        """Return G summed over columns, which are further bags of it."""
        return self.gradients(g.flatten(0, 1), tensors, dtype, divide=divide)

    def _entries(
        self,
        bags: int,
        ids: Tensor,
        offsets: Tensor | None,
        weights: Tensor | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """Return each token's place bag * V + token in x [bags, V], and what it adds there."""
        flat = ids.reshape(-1).long()
        number = torch.arange(flat.shape[0], device=ids.device)
        if offsets is None:
            bag = number // max(ids.shape[-1], 1)
        else:
            bag = torch.bucketize(number, offsets.long(), right=True) - 1
        # What comes after the last offset belongs to no bag, with include_last_offset.
        counted = (flat != self.options.padding_idx) & (bag < bags)
        bag = bag.clamp_max(bags - 1)
        amount = counted.to(dtype)
        if weights is not None:
            amount = amount * weights.reshape(-1).to(dtype)
        if self.options.mean:
            # The number of tokens that count, and not of all: torch leaves padding out of the mean.
            # Empty bags have none, and divide nothing.
            sizes = torch.zeros(bags, dtype=dtype, device=ids.device).index_add(0, bag, amount)
            amount = amount / sizes.clamp_min(1.0)[bag]
        return bag * self.rows + flat, amount

    def _gram(self, bags: int, places: Tensor, amounts: Tensor) -> Tensor:
        """Return the sum over bags of x x^T."""
        x = amounts.new_zeros(bags * self.rows).index_add(0, places, amounts)
        return gram(x.unflatten(0, (bags, self.rows)))

    def _squares(self, bags: int, places: Tensor, amounts: Tensor) -> Tensor:
        """Return the diagonal of ``_gram`` without forming x, which has bags * V entries.

        A token may stand in a bag several times: entries at one place of x must be added before
        they are squared, so they are sorted by place first.
        """
        places, order = places.sort()
        new = torch.cat([places.new_zeros(1), (places[1:] != places[:-1]).long()])
        run = new[: places.shape[0]].cumsum(0)
        sums = torch.zeros_like(amounts).index_add(0, run, amounts[order])
        token = torch.zeros_like(places).scatter(0, run, places % self.rows)
        return amounts.new_zeros(self.rows).index_add(0, token, sums.square())


def _record(
    y: Tensor,
    tensors: Sequence[Tensor | None],
    factors: Sequence[Tensor],
    options: EmbeddingBagOptions,
) -> Tensor:
    A, G = factors[:2]
    statistics = EmbeddingBagStatistics(options, A.shape[0], form_of(A), form_of(G))
    return tapped(y, statistics, tensors, factors)


define_tap("embedding_bag", EmbeddingBagOptions, _record, tensors=("ids", "offsets?", "weights?"))
