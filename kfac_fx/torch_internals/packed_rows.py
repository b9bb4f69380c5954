"""Pack sequences by operators that have a derivative in forward mode.

Why: products with the Fisher are derivatives in forward mode, and a network that packs what a
trained layer returns (embeddings) has none: torch has not written that of its packing operator. No
public way: ``pack_padded_sequence`` calls an operator with an underscore. Should a version call
another one, torch's own error goes through. Seen on torch 2.13.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Value = Any
"""An argument or result of a function of torch's."""


class PackedByRows(TorchFunctionMode):
    """Within the context, pack by taking the rows of each step."""

    def __torch_function__(
        self,
        func: Value,
        types: object,
        args: tuple[Value, ...] = (),
        kwargs: Mapping[str, Value] | None = None,
    ) -> Value:
        """Run a call, that of torch's packing operator by other operators."""
        if func is torch._pack_padded_sequence and not kwargs:
            return _packed(*args)
        return func(*args, **(kwargs or {}))


def _packed(x: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    """Return the rows [sum of lengths, ...] of x [T, N, ...], and the number of each step.

    Args:
        x: padded sequences.
        lengths: the length of each, longest first.
        batch_first: whether x is [N, T, ...].
    """
    steps = torch.arange(int(lengths[0])).unsqueeze(1)
    sizes = (lengths > steps).sum(1)
    x = x.transpose(0, 1) if batch_first else x
    return torch.cat([x[t, :size] for t, size in enumerate(sizes.tolist())]), sizes
