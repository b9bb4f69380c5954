"""Make the buffers that taps fill, and let a graph read them.

A buffer holds no statistic: it is a zero without memory, and the gradient that a backward pass
gives it is the statistic.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx, nn

from kfac_fx.ir.use import FactorSpec


def add_slot(store: nn.Module, name: str, factors: Iterable[FactorSpec], like: Tensor) -> nn.Module:
    """Return a submodule of zeros without memory, which is added where none fits yet.

    The buffers are not in the state_dict, which stays the model's. A slot of the same factors that
    is there already stays, so that a Preconditioner that holds its buffers goes on.

    Args:
        store: the submodule that holds all slots.
        name: the name of the slot, an identifier.
        factors: one buffer each.
        like: its dtype and device are those of the buffers.
    """
    factors = tuple(factors)
    wanted = {f.name: (f.shape, like.dtype, like.device) for f in factors}
    there = store._modules.get(name)
    if there is not None:
        held = {n: (tuple(b.shape), b.dtype, b.device) for n, b in there.named_buffers()}
        if {key: held.get(key) for key in wanted} == wanted:
            # Copies that fx makes of a module make all its buffers persistent.
            there._non_persistent_buffers_set.update(held)
            return there
    # An expanded scalar has the shape of the factor and the memory of one number: autograd asks for
    # the shape of the gradient, and nobody reads the value.
    slot = nn.Module()
    for factor in factors:
        zero = torch.zeros((), dtype=like.dtype, device=like.device)
        slot.register_buffer(factor.name, zero.expand(factor.shape), persistent=False)
    store.add_module(name, slot)
    return slot


def read_attribute(graph: fx.Graph, path: str) -> fx.Node:
    """Make a node that reads a buffer or a flag; ``graph.get_attr`` would warn of flags."""
    return graph.create_node("get_attr", path, name=path.replace(".", "_"))
