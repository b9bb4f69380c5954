"""Programs of coupled Kronecker blocks: what a pair of them adds to each by itself.

The mathematics is that of docs/explanation/mathematics.md, section 7. Fhat^-1 is the sum of the
inverses of all pairs, less those of the blocks that pairs share: either end of a pair may be the
child. The smaller one has canonical coordinates that are complete.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from kfac_fx.codegen.approximations.base import (
    EIGEN_COST,
    PRODUCT_COST,
    WHITENER_COST,
    Damping,
    Emitted,
    FlagKey,
    InverseKey,
    cubes,
    matrices_of,
)
from kfac_fx.codegen.approximations.two_sided import damp
from kfac_fx.codegen.leaf import Value, leaf
from kfac_fx.linalg import conditional, positive

if TYPE_CHECKING:
    from kfac_fx.codegen.builder import ProgramBuilder
    from kfac_fx.ir.coupling import Coupling
    from kfac_fx.ir.curvature_graph import CurvatureBlock
    from kfac_fx.linalg.positive import Factorise

conditional_side = leaf(conditional.conditional_side)
conditional_scale = leaf(conditional.conditional_scale)
symmetric_product = leaf(positive.symmetric_product)

Gathered = Callable[["CurvatureBlock"], Value]
"""A block -> its gradients as the one array that its inverse acts on."""

TRIANGLE = 5 / 8
"""Share of the entries that products of triangles by four parts multiply."""


def cross_names(blocks: Mapping[str, CurvatureBlock], coupling: Coupling) -> list[str]:
    """Return the arguments' names of A and G, child by parent."""
    child, parent = blocks[coupling.child].slot, blocks[coupling.parent].slot
    return [f"A_{child}_{parent}", f"G_{child}_{parent}"]


class CoupledPair(NamedTuple):
    """A child and its parent."""

    child: CurvatureBlock
    parent: CurvatureBlock

    @property
    def from_child(self) -> tuple[bool, bool]:
        """Return, of A and of G, whether eigenvectors are taken of the child's side.

        They are taken of the smaller side, which costs less. Where the child is larger on one side
        and equal on the other, both are taken of the parent, so that it is complete.
        """
        # Eigenvectors cost five times a Cholesky inverse of their side.
        one, two = ([side[0] for side in block.dimensions] for block in self)
        smaller = one[0] <= two[0], one[1] <= two[1]
        larger = one[0] >= two[0] and one[1] >= two[1]
        return (False, False) if larger and not all(smaller) else smaller

    @property
    def complete(self) -> CurvatureBlock | None:
        """Return the block of which both sides are taken, if there is one."""
        of_A, of_G = self.from_child
        return None if of_A != of_G else self.child if of_A else self.parent

    @property
    def values(self) -> tuple[InverseKey, ...]:
        """Return the keys of coordinates and of 1 / (1 - s_G s_A^T).

        Where neither block is complete, s_A and s_G follow.
        """
        slot = self.child.slot
        keys = (
            InverseKey(slot, "L", "A"),
            InverseKey(slot, "L", "G"),
            InverseKey(slot, "R", "A"),
            InverseKey(slot, "R", "G"),
            InverseKey(slot, "scale"),
        )
        if self.complete:
            return keys
        return (*keys, InverseKey(slot, "s", "A"), InverseKey(slot, "s", "G"))

    @property
    def refresh_cost(self) -> float:
        """Return the cost of the pair's refresh, in operations of a Cholesky inverse.

        The parent's whiteners are counted, as another process may have them: then they are made
        twice. The rest are the correlations of both sides, and their eigenvectors.
        """
        total = WHITENER_COST * cubes(self.parent)
        for (n, *_), (m, *_) in zip(self.child.dimensions, self.parent.dimensions, strict=True):
            k, wide = min(n, m), max(n, m)
            triangles = 2 * wide**2 * k + wide * k**2 + k**3
            products = TRIANGLE * triangles + 1.5 * wide * k**2
            total += EIGEN_COST * k**3 + PRODUCT_COST * products
        return total


class CoupledPairs:
    """All pairs of a forest, and what a refresh hands to the apply for each.

    Attributes:
        of: child -> pair.
        within: block -> the child of the pair in which it is complete, whose product already holds
            the block's own inverse. Roots keep one of their own: no refresh is theirs otherwise.
    """

    def __init__(
        self, blocks: Mapping[str, CurvatureBlock], couplings: Collection[Coupling]
    ) -> None:
        self.of = {c.child: CoupledPair(blocks[c.child], blocks[c.parent]) for c in couplings}
        # A block in several pairs belongs to one of them: its own as a child, if it is complete
        # there, since the last line wins.
        complete = {child: pair.complete for child, pair in self.of.items()}
        self.within = {b.name: child for child, b in complete.items() if b and b.name in self.of}
        self.within |= {child: child for child, b in complete.items() if b and b.name == child}

    def inverses(self, child: str) -> tuple[InverseKey, ...]:
        """Return the keys of the child's pair, then its own ones unless they are in a pair."""
        pair = self.of[child]
        return (*pair.values, *(() if child in self.within else own_keys(pair.child)))

    def own_cost(self, block: CurvatureBlock) -> float:
        """Return the cost of a coupled block's whiteners, and of its own inverse if it has one."""
        own = 0.0 if block.name in self.within else TRIANGLE * PRODUCT_COST
        return (WHITENER_COST + own) * cubes(block)


def own_keys(block: CurvatureBlock) -> tuple[InverseKey, ...]:
    """Return the keys of the inverses of a coupled block by itself: those of its factors."""
    return tuple(InverseKey(block.slot, "inverse", spec.name) for spec in matrices_of(block))


def whiten(
    build: ProgramBuilder,
    block: CurvatureBlock,
    factors: Sequence[Value],
    damping: Damping,
    factorise: Factorise,
) -> tuple[list[Value], dict[FlagKey, Value]]:
    """Emit whiteners of both damped sides, and the flags of their factorisations."""
    specs = matrices_of(block)
    found: list[Value] = []
    flags: dict[FlagKey, Value] = {}
    pair = damp(build, block.slot, factors, specs, damping.gamma)
    for spec, matrix in zip(specs, pair, strict=True):
        whitener, failed = factorise.whitener(matrix)
        found.append(build.name(whitener, f"W_{spec.name}_{block.slot}"))
        flags[FlagKey(block.slot, "failed", spec.name)] = failed
    return found, flags


def own(block: CurvatureBlock, whiteners: Sequence[Value]) -> dict[InverseKey, Value]:
    """Emit the inverses of a block by itself."""
    found = zip(own_keys(block), whiteners, strict=True)
    return {key: symmetric_product(W, triangular=True) for key, W in found}


def refresh(
    pair: CoupledPair, child: Sequence[Value], parent: Sequence[Value], cross: Sequence[Value]
) -> Emitted:
    """Emit what a pair adds; of one that is not positive, the coupling is left out.

    Args:
        pair: child and parent.
        child, parent: their whiteners of A and of G.
        cross: A and G, child by parent.
    """
    of_A, of_G = pair.from_child
    L_A, s_A, R_A = conditional_side(child[0], cross[0], parent[0], from_child=of_A)
    L_G, s_G, R_G = conditional_side(child[1], cross[1], parent[1], from_child=of_G)
    # Both pairs of factors are Gram matrices, so Sigma is positive but for rounding. Where it is
    # not, the scale 1 (or 0) leaves each block with what it has by itself.
    reciprocal, clamped, indefinite = conditional_scale(s_A, s_G)
    scale = torch.where(indefinite, 1.0 if pair.complete else 0.0, reciprocal)
    if pair.complete and of_A:
        R_G = torch.where(indefinite, 0.0, R_G)
    elif pair.complete:
        L_G = torch.where(indefinite, 0.0, L_G)
    made = (L_A, L_G, R_A, R_G, scale) if pair.complete else (L_A, L_G, R_A, R_G, scale, s_A, s_G)
    slot = pair.child.slot
    return Emitted(
        dict(zip(pair.values, made, strict=True)),
        {FlagKey(slot, "clamped"): clamped, FlagKey(slot, "indefinite"): indefinite},
    )


class Contribution(NamedTuple):
    """A pair's contribution to a block: ``sign`` times a product of two matrices."""

    block: str
    sign: int
    factors: tuple[Value, Value]


def total(own: Value | None, parts: Sequence[Contribution]) -> Value:
    """Emit the sum of what a block has by itself, unless that is in a pair, and of what pairs add.

    Positive parts come first, so that the first term needs no product with -1.
    """
    found = own
    for part in sorted(parts, key=lambda part: -part.sign):
        left, right = part.factors
        if found is None:
            found = torch.mm(left, right) if part.sign > 0 else -torch.mm(left, right)
        elif part.sign > 0:
            found = torch.addmm(found, left, right)
        else:
            found = torch.addmm(found, left, right, alpha=-1)
    return found


class _End(NamedTuple):
    """A block of a pair, its gradient V, and its coordinates A [a, k_A] and G [g, k_G]."""

    block: CurvatureBlock
    V: Value
    A: Value
    G: Value
    k: tuple[int, int]

    def inward(self) -> tuple[Value, Value]:
        """Return G^T V A, as two matrices to be multiplied."""
        (a, *_), (g, *_) = self.block.dimensions
        return _halves(self.G.mT, self.V, self.A, (self.k[1], g, a, self.k[0]))

    def outward(self, sign: int, z: Value) -> Contribution:
        """Return G z A^T."""
        (a, *_), (g, *_) = self.block.dimensions
        factors = _halves(self.G, z, self.A.mT, (g, self.k[1], self.k[0], a))
        return Contribution(self.block.name, sign, factors)


def apply(
    pair: CoupledPair,
    inverse: Sequence[Value],
    child: Value,
    parent: Value,
    within: Collection[str],
) -> list[Contribution]:
    """Emit what the pair adds to both blocks by themselves.

    c and d are the gradients of child and parent in canonical coordinates; of the larger side,
    times r = sqrt(s). To (c, d) the pair adds [[r^2, -r], [-r, r^2]] / (1 - r^2) times them, with
    r^2 = s_G s_A^T.

    Args:
        pair: child and parent.
        inverse: the values of the pair, then others.
        child, parent: their gradients.
        within: blocks whose own part is part of it.
    """
    at = dict(zip(pair.values, inverse, strict=False))
    slot = pair.child.slot
    L_A, L_G = at[InverseKey(slot, "L", "A")], at[InverseKey(slot, "L", "G")]
    R_A, R_G = at[InverseKey(slot, "R", "A")], at[InverseKey(slot, "R", "G")]
    scale = at[InverseKey(slot, "scale")]
    one, two = ([side[0] for side in block.dimensions] for block in pair)
    k = min(one[0], two[0]), min(one[1], two[1])
    below = _End(pair.child, child, L_A, L_G, k)
    above = _End(pair.parent, parent, R_A, R_G, k)
    # The coordinates of a complete block are all of its directions: its own inverse is L L^T, and
    # joins the product.
    if pair.complete:
        smaller, larger = (below, above) if pair.complete is pair.child else (above, below)
        left, right = smaller.inward()
        c = torch.mm(left, right)
        left, right = larger.inward()
        z = torch.addmm(c, left, right, alpha=-1) * scale
        own_too = pair.complete.name in within
        return [smaller.outward(1, z if own_too else z - c), larger.outward(-1, z)]
    left, right = below.inward()
    c = torch.mm(left, right)
    left, right = above.inward()
    d = torch.mm(left, right)
    s_A, s_G = at[InverseKey(slot, "s", "A")], at[InverseKey(slot, "s", "G")].unsqueeze(-1)
    by_child, by_parent = (s_A, s_G) if pair.from_child[0] else (s_G, s_A)
    # d - s c and c - s d: the sign is turned.
    z = torch.addcmul(d, c, by_child, value=-1) * scale
    y = torch.addcmul(c, d, by_parent, value=-1) * scale
    return [below.outward(-1, z), above.outward(-1, y)]


def _halves(L: Value, V: Value, R: Value, sizes: tuple[int, int, int, int]) -> tuple[Value, Value]:
    """Return L V and R, or L and V R, whichever makes L [p, q] V [q, r] R [r, t] cheaper.

    Args:
        sizes: (p, q, r, t).
    """
    # Multiply-adds of (L V) R and of L (V R); the last product is left to an addmm.
    p, q, r, t = sizes
    right = q * r * t + p * q * t < p * q * r + p * r * t
    return (L, V @ R) if right else (L @ V, R)
