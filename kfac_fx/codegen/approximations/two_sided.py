"""The base of blocks that act on matrices [g, a]: a side G of derivatives, A of inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kfac_fx.codegen.approximations.base import (
    BlockApproximation,
    DampingReport,
    matrices_of,
)
from kfac_fx.codegen.leaf import Value, leaf
from kfac_fx.linalg import positive

if TYPE_CHECKING:
    from kfac_fx.codegen.builder import ProgramBuilder
    from kfac_fx.ir.curvature_graph import CurvatureBlock
    from kfac_fx.ir.use import FactorSpec

damped_factors = leaf(positive.damped_factors)


class Cut(NamedTuple):
    """The cuts of a block's sides (A, G) along their diagonals.

    Attributes:
        parts: numbers of sub-blocks; 0 for a side that is whole.
        missing: entries that fill up the last sub-blocks.
    """

    parts: tuple[int, int]
    missing: tuple[int, int]


def on_sides(block: CurvatureBlock) -> tuple[list[FactorSpec], list[FactorSpec]]:
    """Return the factors on side A and those on side G, one for each Kronecker product."""
    specs = matrices_of(block)
    return [s for s in specs if s.side == "A"], [s for s in specs if s.side == "G"]


def cut_of(block: CurvatureBlock) -> Cut:
    """Return how a block's sides are cut: as the first factor of a side that is cut says."""
    a, g = (_parts(specs) for specs in on_sides(block))
    return Cut((a[0], g[0]), (a[1], g[1]))


def _parts(specs: Sequence[FactorSpec]) -> tuple[int, int]:
    """Return the number of sub-blocks on a side, and the entries that fill up the last one."""
    # Of a sum one product may have a diagonal on this side, and be cut up with the other.
    found = next((spec for spec in specs if spec.cut), None)
    if found is None:
        return 0, 0
    parts, size = found.shape[:2]
    return parts, parts * size - found.cut


def diagonals(A: FactorSpec, G: FactorSpec) -> tuple[bool, bool]:
    """Return which of two factors are kept as vectors."""
    return A.diagonal, G.diagonal


def damp(
    build: ProgramBuilder,
    slot: str,
    pair: Sequence[Value],
    specs: Sequence[FactorSpec],
    gamma: Value,
) -> tuple[Value, Value]:
    """Emit the factored Tikhonov damping of A and G, and name the results.

    Args:
        build: the builder of the program.
        slot: the slot of the block, for names.
        pair: A and G; a diagonal one is a vector and stays one.
        specs: the records of both factors.
        gamma: the square root of lambda.
    """
    A, G = specs
    options = {"diagonal": diagonals(A, G), "cut": (A.cut, G.cut)}
    # A program reads better without the options that say nothing.
    given: dict[str, Value] = {name: both for name, both in options.items() if any(both)}
    first, second = damped_factors(pair[0], pair[1], gamma, **given)
    build.name(first, f"{A.name}_{slot}_damped")
    build.name(second, f"{G.name}_{slot}_damped")
    return first, second


class TwoSided(BlockApproximation):
    """Blocks that act on one matrix V [g, a]: a weight, and its bias as the last column."""

    two_sided = True

    def gather(self, block: CurvatureBlock, gradients: Sequence[Value]) -> Value:
        # The homogeneous coordinate comes last in A, so the bias is V's last column.
        V = gradients[0]
        if len(gradients) == 1:
            return V
        return torch.cat([V, gradients[1].unsqueeze(-1)], -1)

    def scatter(self, block: CurvatureBlock, U: Value) -> Sequence[Value]:
        return [U] if len(block.layouts) == 1 else [U[..., :-1], U[..., -1]]

    def damping(
        self, block: CurvatureBlock, factors: Sequence[Tensor], gamma: float
    ) -> DampingReport:
        # Of a sum of products the last one is damped, which makes the sum positive.
        A, G = matrices_of(block)[-2:]
        pi, for_A, for_G = positive.factored_amounts(
            factors[-2].double(),
            factors[-1].double(),
            gamma,
            diagonal=diagonals(A, G),
            cut=(A.cut, G.cut),
        )
        none = [torch.zeros_like(pi).cpu()] * (len(factors) - 2)
        return DampingReport((*none, for_A.cpu(), for_G.cpu()), pi.cpu())
