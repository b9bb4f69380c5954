"""Statistics that do not fit their averages, and averages that do not fit the statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kfac_fx.torch_internals import foreach

SETTLED = 10
"""Statistics after which an average is one that all new ones can be compared with."""

TINY = 1e-6
"""Lengths below it are not compared: what has just come to life grows by any factor."""


class Fit(NamedTuple):
    """The comparison of new statistics with the averages.

    Attributes:
        outlier: one is far longer than its average.
        swollen: one is far shorter than a young average, which an earlier batch must have spoilt.
    """

    outlier: bool
    swollen: bool


class Compared(NamedTuple):
    """A new statistic and its average, or the parts of both that show their sizes.

    Attributes:
        new: the statistic.
        known: the average, of the same shape.
        settled: whether the average is of many statistics, so that it cannot be spoilt.
    """

    new: Tensor
    known: Tensor
    settled: bool


def fit(compared: Sequence[Compared], factor: float) -> Fit:
    """Compare lengths of new statistics with those of their averages, with one synchronisation.

    Args:
        compared: what can be compared; nothing is a good fit.
        factor: what far means, above one.
    """
    if not compared:
        return Fit(False, False)
    # Lengths, not entries: good statistics differ from the average in every entry, and in length by
    # little.
    fresh = torch.stack(foreach.norm([each.new for each in compared])).tolist()
    known = torch.stack(foreach.norm([each.known for each in compared])).tolist()
    lengths = list(zip(fresh, known, strict=True))
    outlier = any(new > factor * max(old, TINY) for new, old in lengths)
    # A young average may be the one that is wrong: then the statistic replaces it.
    swollen = any(
        not each.settled and new > TINY and old > factor * new
        for each, (new, old) in zip(compared, lengths, strict=True)
    )
    return Fit(outlier, swollen)
