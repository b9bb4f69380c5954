"""The tap operators and the statistics of each kind of use."""

from typing import Any

from torch import Tensor

from kfac_fx.ops import cases, convolution, linear, scale_shift
from kfac_fx.ops.tap import only, pause, resume

STORE = "_kfac_fx"
"""Name of the submodule that holds the factor buffers of an instrumented module."""


def factor_buffers(net: Any) -> dict[str, tuple[Tensor, ...]]:
    """Block name -> the factor buffers of the block, in the order of ``block.factors``."""
    store = getattr(net, STORE)
    return {
        block.name: tuple(
            getattr(getattr(store, block.slot), factor.name) for factor in block.factors
        )
        for block in net.meta["kfac_fx"].blocks.values()
    }


__all__ = [
    "STORE",
    "cases",
    "convolution",
    "factor_buffers",
    "linear",
    "only",
    "pause",
    "resume",
    "scale_shift",
]
