"""The factor buffers of an instrumented module, ``net._kfac_fx.<slot>.<factor>``.

They are zeros without memory: statistics are their gradients, averages are kept elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor, nn

STORE = "_kfac_fx"
"""Name of the submodule that holds the factor buffers of an instrumented module."""


class HasSlot(Protocol):
    """A block, pair or moment; ``kfac_fx.ir`` is not imported here."""

    @property
    def slot(self) -> str:
        """Return its name as an identifier."""


def factor_buffers(net: nn.Module) -> dict[str, tuple[Tensor, ...]]:
    """Return block name -> the buffers whose gradients are the statistics.

    They are in the order of the block's factors; a block that has no tap has none.
    """
    store = getattr(net, STORE)
    meta = getattr(net, "meta")  # noqa: B009  # an attribute of GraphModules, which nets here are
    return {
        block.name: tuple(
            getattr(getattr(store, block.slot), factor.name)
            for factor in (block.factors if block.tapped else ())
        )
        for block in meta["kfac_fx"].blocks.values()
    }


def all_buffers(net: nn.Module) -> list[Tensor]:
    """Return all buffers whose gradients are statistics, and the bases of moments."""
    return list(getattr(net, STORE).buffers())


def recording_slots(net: nn.Module) -> tuple[str, ...]:
    """Return the slots of an instrumented module that taps have something to record into."""
    # A look at every buffer rather than a flag: other tensors may have taken their places for the
    # time of a call, and this is less than one tap costs.
    found: list[str] = []
    store = net._modules.get(STORE)
    for name, slot in () if store is None else store._modules.items():
        if slot is not None:
            for buffer in slot._buffers.values():
                if buffer is not None and buffer.requires_grad:
                    found.append(name)
                    break
    return tuple(found)


def moment_buffers(net: nn.Module, of: HasSlot) -> tuple[Tensor, Tensor, Tensor]:
    """Return (U_A, U_G, S) of a ``Moment``: the bases that taps read, and a buffer."""
    slot = getattr(getattr(net, STORE), of.slot)
    return slot.U_A, slot.U_G, slot.S


def switch(net: nn.Module, factors: Iterable[Tensor], on: bool) -> None:
    """Let forward passes from now on record into these buffers, or not.

    Buffers that change are bound anew: where ``use_recursive_dict_tags_for_guards`` holds, as in
    torch before 2.13, a compiled network looks again only at modules that were written to.

    Args:
        net: the instrumented module.
        factors: buffers of it.
        on: whether they record.
    """
    changed = [factor for factor in factors if factor.requires_grad != on]
    for factor in changed:
        factor.requires_grad_(on)
    if not changed:
        return
    wanted = set(changed)  # tensors are hashed by identity
    for module in getattr(net, STORE).modules():
        for name, buffer in list(module._buffers.items()):
            if buffer in wanted:
                module._buffers[name] = None
                module._buffers[name] = buffer
