"""Insert what records second moments in the bases of Kronecker blocks (EKFAC).

The moment of a block is a second tap on the same output. It reads the eigenbases U_A and U_G of the
block's factors, which a refresh writes into buffers (docs/explanation/mathematics.md, section 5).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx, nn

from kfac_fx.ir.curvature_graph import CurvatureBlock, CurvatureGraph
from kfac_fx.ops.net_buffers import STORE
from kfac_fx.passes.annotations import take_over
from kfac_fx.passes.coupled_uses import taps_of_couplings, text_of_side
from kfac_fx.passes.tap_buffers import add_slot, read_attribute

_MOMENT = torch.ops.kfac_fx.moment.default


def add_moment_buffers(module: nn.Module, curvature: CurvatureGraph) -> None:
    """Add buffers of the bases, and of S, a zero without memory whose gradient is the statistic.

    The bases are identities until the first refresh: S is then the plain second moment.

    Args:
        module: has the slots of the blocks' factors.
        curvature: says which blocks have moments.
    """
    store = module.get_submodule(STORE)
    for moment in curvature.moments:
        block = curvature.blocks[moment.block]
        like = next(store.get_submodule(block.slot).buffers())
        slot = add_slot(store, moment.slot, moment.factors, like)
        for factor in block.factors:
            basis = torch.eye(factor.shape[0], dtype=like.dtype, device=like.device)
            slot.register_buffer(f"U_{factor.name}", basis, persistent=False)


def insert_moments(
    module: nn.Module,
    graph: fx.Graph,
    blocks: Mapping[str, CurvatureBlock],
    curvature: CurvatureGraph,
) -> None:
    """Insert one more tap after that of each block's factors.

    Args:
        module: whose graph it is.
        graph: a graph with taps; is changed in place.
        blocks: the blocks as found in this graph; those of another form are left out.
        curvature: the blocks that have buffers, and their moments.
    """
    taps = taps_of_couplings(graph)
    for moment in curvature.moments:
        y, block = taps.get(moment.block), blocks.get(moment.block)
        if y is None or block is None or block.factors != curvature.blocks[moment.block].factors:
            continue
        users = list(y.users)
        place = y
        reads = []
        for name in ("U_A", "U_G", "S"):
            with graph.inserting_after(place):
                place = read_attribute(graph, f"{STORE}.{moment.slot}.{name}")
            reads.append(place)
        with graph.inserting_after(place):
            call = graph.call_function(_MOMENT, (y, y.args[1], *reads, text_of_side(module, block)))
        take_over(call, y, same_value=True, moment=moment.block)
        for user in users:
            user.replace_input_with(y, call)
