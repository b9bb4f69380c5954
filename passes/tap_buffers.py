"""The buffers that taps fill, and how a graph reads them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx, nn

from kfac_fx.ir.use import FactorSpec
from kfac_fx.ops.sides import coupling_operators
from kfac_fx.passes.annotations import annotation


def add_slot(store: nn.Module, name: str, factors: Iterable[FactorSpec], like: Tensor) -> nn.Module:
    """A submodule of zeros without memory in the dtype and on the device of ``like``.

    Their gradients are the statistics; they are not in the state_dict. A slot of the same kind that
    is there already stays.
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
    slot = nn.Module()
    for factor in factors:
        zero = torch.zeros((), dtype=like.dtype, device=like.device)
        slot.register_buffer(factor.name, zero.expand(factor.shape), persistent=False)
    store.add_module(name, slot)
    return slot


def read_attribute(graph: fx.Graph, path: str) -> fx.Node:
    """Reads a buffer or a flag; ``graph.get_attr`` would warn of flags."""
    return graph.create_node("get_attr", path, name=path.replace(".", "_"))


def plain_taps(graph: fx.Graph) -> dict[str, fx.Node]:
    """Block -> the tap of its use, for the kinds of use that have sides."""
    plain = [getattr(torch.ops.kfac_fx, name).default for name in coupling_operators()]
    taps = (node for node in graph.nodes if node.op == "call_function" and node.target in plain)
    return {annotation(tap)["blocks"][0]: tap for tap in taps}
