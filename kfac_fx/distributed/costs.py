"""What the refresh of a block costs, modelled from the sizes of its factors."""

from __future__ import annotations

import statistics
import time
from collections.abc import Collection
from math import prod

from kfac_fx.errors import StatisticsError
from kfac_fx.ir import Coupling, CurvatureBlock, CurvatureGraph, parents
from kfac_fx.optim import Preconditioner

INVERSE = 1.0
"""n^3 of a Cholesky inverse, in units of n^3 of it."""

WHITENER = 0.7
EIGEN = 12.0
PRODUCT = 0.7
"""The same of a whitener, of an eigendecomposition and of a product: LAPACK's operation counts,
and the speeds relative to each other that one thread of this kind of machine reaches."""


def refresh_costs(
    curvature: CurvatureGraph, couplings: Collection[Coupling], tikhonov: str = "factored"
) -> dict[str, float]:
    """Block -> cost of its inverses, in operations of a Cholesky inverse.

    A child's includes the whiteners of its parent, which another process may have.
    """
    blocks, parent = curvature.blocks, parents(couplings)
    coupled = {*parent, *parent.values()}
    found = {}
    for name, block in blocks.items():
        if name not in coupled:
            found[name] = _alone(block, tikhonov)
            continue
        found[name] = (WHITENER + PRODUCT) * _cubes(block)
        if name in parent:
            found[name] += _conditional(block, blocks[parent[name]])
    return found


def apply_operations(curvature: CurvatureGraph, couplings: Collection[Coupling]) -> float:
    """Multiplications and additions of an apply; a coupled layer has four times as many."""
    parent = parents(couplings)
    total = 0.0
    for name, block in curvature.blocks.items():
        sides = [f.shape[-1] for f in block.factors if f.role != "count" and not f.diagonal]
        own = 2.0 * block.parameter_count * sum(sides)
        total += 4 * own if name in parent else own
    return total


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
        k = min(n, m)
        products = n * n * m + n * m * m + k * n * m + k * n * n + k * n * m + k * m * m
        total += EIGEN * k**3 + PRODUCT * products
    return total
