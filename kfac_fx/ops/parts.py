"""A batch, some cases at once."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from kfac_fx.ops.gram import functional
from kfac_fx.ops.thresholds import THRESHOLDS


def case_parts(first: Tensor, *others: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Return all of the tensors, cut alike along their cases, to be gone through once.

    They are whole on a GPU, under a compiler, and if ``first`` is small
    (``Thresholds.at_once``): nothing is gained by cutting there.

    Args:
        first: [cases, ...]; its size decides.
        others: further tensors, of as many cases.
    """
    tensors = first, *others
    most = THRESHOLDS.at_once
    if first.is_cuda or any(map(functional, tensors)) or first.numel() <= most:
        return (tensors,)
    cases = max(1, most * len(first) // first.numel())
    return zip(*(t.split(cases) for t in tensors), strict=True)
