"""The tap of a grouped product: rows sorted by expert, one matrix an expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_fx.ops.gram import Statistic, gram
from kfac_fx.ops.kronecker import KroneckerStatistics
from kfac_fx.ops.options import TapOptions
from kfac_fx.ops.tap import define_tap, tapped


@dataclass(frozen=True)
class GroupedOptions(TapOptions):
    """Options of a grouped product's tap; it has none."""


@dataclass(frozen=True)
class GroupedStatistics(KroneckerStatistics):
    """(A, G) with a leading axis for the experts; every row is a case of its expert.

    A_e = sum over the rows of expert e of x x^T / n_e, [E, in, in]; G_e = sum of g g^T,
    [E, out, out], so that A_e (x) G_e is the expert's share of the Fisher. An expert without rows
    has none. Where the block's uses are counted, each is one position.
    docs/explanation/mathematics.md, section 4, "linear", for each expert.
    """

    def inputs(self, g: Tensor, tensors: Sequence[Tensor | None], dtype: torch.dtype) -> Statistic:
        """Return A of every expert."""
        x, offsets = tensors
        assert x is not None and offsets is not None
        return torch.stack([gram(part) / max(len(part), 1) for part in _parts(x, offsets, dtype)])

    def gradients(
        self, g: Tensor, tensors: Sequence[Tensor | None], dtype: torch.dtype, *, divide: bool
    ) -> Statistic:
        """Return G of every expert."""
        _, offsets = tensors
        assert offsets is not None
        return torch.stack([gram(part) for part in _parts(g, offsets, dtype)])


def _parts(rows: Tensor, offsets: Tensor, dtype: torch.dtype) -> Sequence[Tensor]:
    """Return the rows of each expert.

    Args:
        offsets: [E], where the rows of each expert end; what comes after the last belongs to none.
    """
    ends = offsets.tolist()
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    parts: Sequence[Tensor] = rows[: ends[-1]].to(dtype).split(sizes)
    return parts


def _record(
    y: Tensor, tensors: Sequence[Tensor | None], factors: Sequence[Tensor], _: GroupedOptions
) -> Tensor:
    return tapped(y, GroupedStatistics(), tensors, factors)


define_tap("grouped", GroupedOptions, _record, tensors=("x", "offsets"))
