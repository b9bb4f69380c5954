"""Statistics that do not fit their averages, and averages that do not fit the statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kfac_fx.curvature.averages import Entry, sizes
from kfac_fx.ops import Statistic

SETTLED = 10
"""Statistics after which an average is one that all new ones can be compared with."""

TINY = 1e-6
"""Lengths below it are not compared: what has just come to life grows by any factor."""


class Fit(NamedTuple):
    """How new statistics compare with the averages.

    Attributes:
        outlier: one is far longer than its average.
        swollen: one is far shorter than a young average, which an earlier batch must have spoilt.
    """

    outlier: bool
    swollen: bool


def fit(entries: Sequence[Entry], new: Sequence[Sequence[Statistic] | None], factor: float) -> Fit:
    """Compares lengths, with one synchronisation.

    Second moments of inputs are about the same from the first batch on, so theirs are compared at
    once; derivatives may start at zero and grow, so theirs are once their averages are settled.

    Args:
        factor: what far means.
    """
    fresh: list[Tensor] = []
    known: list[Tensor] = []
    young: list[bool] = []
    for entry, values in zip(entries, new, strict=True):
        settled = entry.recorded >= SETTLED
        if values is None or not entry.recorded:
            continue
        parts = (sizes(entry.block, each) for each in (values, entry.halves))
        for spec, value, average in zip(entry.block.factors, *parts, strict=True):
            if settled or spec.role == "input":
                fresh.append(value)
                known.append(average)
                young.append(not settled)
    if not fresh:
        return Fit(False, False)
    one, other = (torch.stack(torch._foreach_norm(part)).tolist() for part in (fresh, known))
    outlier = any(f > factor * max(k, TINY) for f, k in zip(one, other, strict=True))
    swollen = any(
        y and f > TINY and k > factor * f for f, k, y in zip(one, other, young, strict=True)
    )
    return Fit(outlier, swollen)
