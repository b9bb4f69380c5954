"""Whether tensors are finite, with one synchronisation for many of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Return whether no entry is NaN, infinite or so large that its square is.

    Entries whose square overflows would make the next second moment infinite, so they count as
    infinite already. The answer is computed on the device and read once: one synchronisation.

    Args:
        tensors: of any shapes, dtypes and devices; empty ones are finite.
    """
    # torch._foreach_norm takes one dtype a call, and reads low precisions as float32.
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
    finite = [
        torch.stack(
            torch._foreach_norm(group, 2, torch.promote_types(dtype, torch.float32))
        ).isfinite()
        for dtype, group in by_dtype.items()
    ]
    return not finite or bool(torch.cat(finite).all())
