"""The tap operators and the statistics of each kind of use."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from kfac_fx.config import STORE
from kfac_fx.ops import (
    bilinear,
    cases,
    convolution,
    coupling,
    embedding,
    embedding_bag,
    grouped,
    linear,
    moment,
    recurrent,
    row_scale,
    scale_shift,
)
from kfac_fx.ops.modes import traced
from kfac_fx.ops.notes import Note, noting
from kfac_fx.ops.rows import Rows, Statistic, multiplied
from kfac_fx.ops.same_input import forget_input
from kfac_fx.ops.tap import (
    forget_passes,
    noted_statistics,
    only,
    passes,
    pause,
    resume,
)


def factor_buffers(net: Any) -> dict[str, tuple[Tensor, ...]]:
    """Block name -> the buffers whose gradients are the statistics, in the order of its factors.

    A block that has no tap has none.
    """
    store = getattr(net, STORE)
    return {
        block.name: tuple(
            getattr(getattr(store, block.slot), factor.name)
            for factor in (block.factors if block.tapped else ())
        )
        for block in net.meta["kfac_fx"].blocks.values()
    }


def all_buffers(net: Any) -> list[Tensor]:
    """All buffers whose gradients are statistics."""
    return list(getattr(net, STORE).buffers())


def switch(net: Any, factors: Iterable[Tensor], on: bool) -> None:
    """Lets forward passes from now on record into these buffers, or not.

    Buffers that change are bound anew: where ``use_recursive_dict_tags_for_guards`` holds, as in
    torch before 2.13, a compiled network looks again only at modules that were written to.
    """
    changed = [factor for factor in factors if factor.requires_grad != on]
    for factor in changed:
        factor.requires_grad_(on)
    ids = {id(factor) for factor in changed}
    for module in getattr(net, STORE).modules() if ids else ():
        for name, buffer in list(module._buffers.items()):
            if id(buffer) in ids:
                module._buffers[name] = None
                module._buffers[name] = buffer


def cross_buffers(net: Any, pairs: Iterable[Any]) -> list[tuple[Tensor, Tensor]]:
    """The buffers of A and G of each ``kfac_fx.ir.Pair``."""
    slots = [getattr(getattr(net, STORE), pair.slot) for pair in pairs]
    return [(slot.A, slot.G) for slot in slots]


def moment_buffers(net: Any, of: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(U_A, U_G, S) of a ``kfac_fx.ir.Moment``."""
    slot = getattr(getattr(net, STORE), of.slot)
    return slot.U_A, slot.U_G, slot.S


__all__ = [
    "STORE",
    "Note",
    "Rows",
    "Statistic",
    "all_buffers",
    "bilinear",
    "cases",
    "convolution",
    "coupling",
    "cross_buffers",
    "embedding",
    "embedding_bag",
    "factor_buffers",
    "forget_input",
    "forget_passes",
    "grouped",
    "linear",
    "moment",
    "moment_buffers",
    "multiplied",
    "noted_statistics",
    "noting",
    "only",
    "passes",
    "pause",
    "recurrent",
    "resume",
    "row_scale",
    "scale_shift",
    "switch",
    "traced",
]
