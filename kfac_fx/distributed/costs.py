"""What the refresh of a block costs, modelled from the sizes of its factors."""

from __future__ import annotations

import statistics
import time
from collections.abc import Collection
from math import prod

import torch
from torch.utils.flop_counter import FlopCounterMode

from kfac_fx.codegen import Program
from kfac_fx.codegen.conditional import Pairs
from kfac_fx.codegen.part import inverse_shapes
from kfac_fx.errors import StatisticsError
from kfac_fx.ir import Coupling, CurvatureBlock, CurvatureGraph, parents
from kfac_fx.optim import Preconditioner

INVERSE = 1.0
"""n^3 of a Cholesky inverse, in units of n^3 of it."""

WHITENER = 0.8
EIGEN = 5.0
PRODUCT = 1.0
"""The same of a whitener, of an eigendecomposition and of a product, measured with one thread on
matrices of 400 to 2000.
"""

TRIANGLE = 5 / 8
"""What products of triangles by four parts multiply, of all."""


def refresh_costs(
    curvature: CurvatureGraph, couplings: Collection[Coupling], tikhonov: str = "factored"
) -> dict[str, float]:
    """Block -> cost of its inverses, in operations of a Cholesky inverse.

    A child's includes the whiteners of its parent, which another process may have.
    """
    blocks, parent = curvature.blocks, parents(couplings)
    coupled, within = {*parent, *parent.values()}, Pairs(blocks, couplings).within
    found = {}
    for name, block in blocks.items():
        if name not in coupled:
            found[name] = _alone(block, tikhonov)
            continue
        # A block that is complete in a pair has no inverse of its own.
        own = 0.0 if name in within else TRIANGLE * PRODUCT
        found[name] = (WHITENER + own) * _cubes(block)
        if name in parent:
            found[name] += _conditional(block, blocks[parent[name]])
    return found


def apply_operations(program: Program) -> float:
    """Multiplications and additions in the products of an apply, counted by their shapes."""
    blocks, shapes = program.curvature.blocks.values(), inverse_shapes(program)
    starts = {n: at.start for b in blocks for n, at in zip(b.parameters, b.layouts, strict=True)}
    gradients = (starts[name] for name in program.curvature.covered)
    given = (*(shapes[name] for name in program.inverse_names), *gradients)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        program.apply_module(*(torch.empty(shape, device="meta") for shape in given))
    return float(counter.get_total_flops())


def measured_costs(preconditioner: Preconditioner, repeats: int = 5) -> dict[str, float]:
    """Block -> seconds of its refresh on this machine, the median of some; for ``costs=``.

    Raises:
        StatisticsError: there are no statistics yet.
    """
    inverse = preconditioner._inverse
    if not inverse.averages.recorded:
        raise StatisticsError("no statistics yet: observe a batch and call step() first")
    factors = inverse.refresh_factors(inverse.program.couplings)
    damping = inverse.amount(preconditioner.damping)
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


def _alone(block: CurvatureBlock, tikhonov: str) -> float:
    summed = block.approximation == "kronecker_sum"
    eigen = summed or (block.approximation == "kronecker" and tikhonov != "factored")
    return (EIGEN if eigen else INVERSE) * _cubes(block) + block.parameter_count


def _cubes(block: CurvatureBlock) -> float:
    """Sum of n^3 over the matrices of a block."""
    return sum(
        float(prod(f.shape)) * f.shape[-1]
        for f in block.factors
        if f.role != "count" and not f.diagonal and len(f.shape) > 1
    )


def _conditional(child: CurvatureBlock, above: CurvatureBlock) -> float:
    """The whiteners of the parent, the correlations of both sides, and their eigenvectors."""
    total = WHITENER * _cubes(above)
    for (n, *_), (m, *_) in zip(child.dimensions, above.dimensions, strict=True):
        k, wide = min(n, m), max(n, m)
        triangles = 2 * wide**2 * k + wide * k**2 + k**3
        products = TRIANGLE * triangles + 1.5 * wide * k**2
        total += EIGEN * k**3 + PRODUCT * products
    return total
