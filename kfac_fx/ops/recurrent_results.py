"""What an operator of recurrent layers returns, as the layer of torch.nn returns it."""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

Final: TypeAlias = Tensor | tuple[Tensor, ...]
"""The states that a layer ends with: h, or of an LSTM (h, c)."""


def nested(result: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return (output, h, c) of the operator as nn.LSTM returns them: (output, (h, c))."""
    output, h, c = result
    return output, (h, c)


def in_packed_order(
    hx: Tensor | tuple[Tensor, ...], packed: PackedSequence
) -> Tensor | list[Tensor] | tuple[Tensor, ...]:
    """Return states [layers * directions, N, H] in the order of a packed batch, longest first."""
    order = packed.sorted_indices
    if order is None:
        return hx
    if isinstance(hx, Tensor):
        return hx.index_select(1, order)
    return [s.index_select(1, order) for s in hx]


def repacked(result: tuple[Tensor, ...], packed: PackedSequence) -> tuple[PackedSequence, Final]:
    """Return an operator's (output, h) or (output, h, c) as the layer does for a PackedSequence."""
    output, *states = result
    order = packed.unsorted_indices
    if order is not None:
        states = [s.index_select(1, order) for s in states]
    made = PackedSequence(output, packed.batch_sizes, packed.sorted_indices, order)
    return made, tuple(states) if len(states) == 2 else states[0]
