"""Model the cost of a block's refresh from the sizes of its factors."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import torch
from torch.utils.flop_counter import FlopCounterMode

from kfac_fx.codegen.conditional import CoupledPairs
from kfac_fx.codegen.program import Program
from kfac_fx.errors import StatisticsError
from kfac_fx.ir.coupling import parents

if TYPE_CHECKING:
    from kfac_fx.optim.preconditioner import Preconditioner


def refresh_costs(program: Program) -> dict[str, float]:
    """Return the cost of each block's inverses, in operations of a Cholesky inverse.

    A child's includes the whiteners of its parent, which another process may have.

    Args:
        program: its approximations and couplings say what a refresh does.
    """
    blocks, parent = program.curvature.blocks, parents(program.couplings)
    coupled, pairs = {*parent, *parent.values()}, CoupledPairs(blocks, program.couplings)
    found = {}
    for name, block in blocks.items():
        if name not in coupled:
            found[name] = program.recipe.of(block).refresh_cost(block)
            continue
        found[name] = pairs.own_cost(block)
        if name in pairs.of:
            found[name] += pairs.of[name].refresh_cost
    return found


def apply_operations(program: Program) -> float:
    """Return the multiplications and additions in the products of an apply, by their shapes."""
    blocks, shapes = program.curvature.blocks.values(), program.inverse_shapes()
    starts = {n: at.start for b in blocks for n, at in zip(b.parameters, b.layouts, strict=True)}
    gradients = (starts[name] for name in program.curvature.covered)
    given = (*(shapes[key] for key in program.inverses), *gradients)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        program.apply_module(*(torch.empty(shape, device="meta") for shape in given))
    return float(counter.get_total_flops())


def measured_costs(preconditioner: Preconditioner, repeats: int = 5) -> dict[str, float]:
    """Return the seconds of each block's refresh on this machine; for ``DataParallel(costs=...)``.

    Args:
        preconditioner: a preconditioner with statistics, of one process.
        repeats: runs of each block, of which the median counts.

    Raises:
        StatisticsError: there are no statistics yet.
    """
    inverse = preconditioner.inverse
    if not inverse.estimate.recorded:
        raise StatisticsError("no statistics yet: observe a batch and call step() first")
    factors = inverse.estimate.arguments(inverse.program.couplings)
    damping = torch.full_like(inverse.estimate.like, preconditioner.damping or 1.0)
    found = {}
    for block in inverse.curvature.blocks:
        part = inverse.program.part([block])
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            part(damping, factors)  # waits for its flags
            seconds.append(time.perf_counter() - start)
        found[block] = statistics.median(seconds)
    return found
