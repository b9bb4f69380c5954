"""A batch, some cases at once."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from kfac_fx.ops.modes import functional

AT_ONCE = 2**19
"""Entries that are read at once on a CPU: copies of more may be fresh memory each time, and first
touches of its pages take longer than what is done with them.
"""


def case_parts(first: Tensor, *others: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """All of them, of as many cases, cut alike along these; to be gone through once.

    Whole on a GPU, under a compiler, and if small.
    """
    tensors = first, *others
    if first.is_cuda or any(map(functional, tensors)) or first.numel() <= AT_ONCE:
        return (tensors,)
    cases = max(1, AT_ONCE * len(first) // first.numel())
    return zip(*(t.split(cases) for t in tensors), strict=True)
