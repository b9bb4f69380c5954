"""Limits of floating point: products that are rounded to TF32, and values that are not finite."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from kfac_fx.torch_internals import foreach

AT_ONCE = 2**14
"""Entries that are copied together rather than looked at one tensor after another."""


class _Setting(Protocol):
    """One of torch's switches for the precision of float32 products."""

    fp32_precision: str


_SETTINGS: tuple[_Setting, _Setting] = (
    torch.backends.cuda.matmul,
    torch.backends.cudnn.conv,  # type: ignore[attr-defined]
)


@contextmanager
def unrounded() -> Iterator[None]:
    """Run what is inside without rounding float32 products and convolutions to TF32.

    TF32 keeps 10 bits of the mantissa. A second moment that is rounded so need not be positive, and
    its small eigenvalues, which decide the longest steps, are noise. So statistics and refreshes
    are exempt from what the user allows for the training.

    The settings are those of the whole process: threads must not differ in them. Programs of
    torch.compile take those that hold when they are called.
    """
    before = [setting.fp32_precision for setting in _SETTINGS]
    for setting in _SETTINGS:
        setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        for setting, precision in zip(_SETTINGS, before, strict=True):
            setting.fp32_precision = precision


def products_are_rounded() -> bool:
    """Return whether a GPU rounds float32 products to TF32 under the present settings."""
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Return whether no entry is NaN, infinite or so large that its square is.

    Entries whose square overflows would make the next second moment infinite, so they count as
    infinite already. The answer is computed on the device and read once: one synchronisation.

    Args:
        tensors: the tensors of any shapes, dtypes and devices; empty ones are finite.
    """
    # foreach.norm takes one dtype a call, and reads low precisions as float32.
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
    # Norms are not negative, so their sum is finite where all of them are: a finite norm is so much
    # smaller than the largest number that no sum of them overflows.
    sums = []
    for dtype, group in by_dtype.items():
        wide = torch.promote_types(dtype, torch.float32)
        # Of small tensors one norm of all in a row: each call costs more than the copy.
        small = len(group) > 2 and sum(tensor.numel() for tensor in group) <= AT_ONCE
        if small and len({tensor.device for tensor in group}) == 1:
            group = [torch.cat([t if t.dim() == 1 else t.reshape(-1) for t in group])]
        if len(group) == 1:
            sums.append(torch.linalg.vector_norm(group[0], dtype=wide))
        else:
            sums.append(torch.stack(foreach.norm(group, 2, wide)).sum())
    return all(math.isfinite(total) for total in sums)
