"""Programs of coupled Kronecker blocks: what a pair of them adds to each by itself.

The mathematics is that of docs/explanation/mathematics.md, section 7.

Fhat^-1 is the sum of the inverses of all pairs, less those of the blocks that pairs share: either
end of a pair may be the child. The smaller one has canonical coordinates that are complete.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from kfac_fx.codegen.builder import ProgramBuilder
from kfac_fx.codegen.calls import conditional_scale, conditional_side, symmetric_product
from kfac_fx.codegen.form import Damping
from kfac_fx.codegen.kronecker import sides, tikhonov
from kfac_fx.ir import Coupling, CurvatureBlock
from kfac_fx.linalg.positive import Factorise


def cross_names(blocks: Mapping[str, CurvatureBlock], coupling: Coupling) -> list[str]:
    """Names of A and G, child by parent."""
    child, parent = blocks[coupling.child].slot, blocks[coupling.parent].slot
    return [f"{factor}_{child}_{parent}" for factor in "AG"]


class Pair(NamedTuple):
    """A child and its parent."""

    child: CurvatureBlock
    parent: CurvatureBlock

    @property
    def from_child(self) -> tuple[bool, bool]:
        """Of A and of G, whether eigenvectors are taken of the child's side: the smaller one."""
        one, two = ([side[0] for side in block.dimensions] for block in self)
        smaller = one[0] <= two[0], one[1] <= two[1]
        larger = one[0] >= two[0] and one[1] >= two[1]
        return (False, False) if larger and not all(smaller) else smaller

    @property
    def complete(self) -> CurvatureBlock | None:
        """The block of which both sides are taken, if there is one."""
        of_A, of_G = self.from_child
        return None if of_A != of_G else self.child if of_A else self.parent

    @property
    def values(self) -> list[str]:
        """Coordinates and 1 / (1 - s_G s_A^T), and where neither block is complete s_A and s_G."""
        names = ["L_A", "L_G", "R_A", "R_G", "scale"]
        return names if self.complete else [*names, "s_A", "s_G"]


class Pairs:
    """All pairs of a forest, and what a refresh hands to the apply for each.

    Attributes:
        of: child -> pair.
        within: block -> the child of the pair in which it is complete, which holds its own part
            too. Not so of roots: they would be left without inverses.
    """

    def __init__(
        self, blocks: Mapping[str, CurvatureBlock], couplings: Collection[Coupling]
    ) -> None:
        self.of = {c.child: Pair(blocks[c.child], blocks[c.parent]) for c in couplings}
        complete = {child: pair.complete for child, pair in self.of.items()}
        self.within = {b.name: child for child, b in complete.items() if b and b.name in self.of}
        self.within |= {child: child for child, b in complete.items() if b and b.name == child}

    def inverses(self, child: str) -> tuple[str, ...]:
        """Of the child's pair, then its own ones unless they are in a pair."""
        block, _ = pair = self.of[child]
        own_names = [] if child in self.within else _own(block)
        return (*(f"{name}_{block.slot}" for name in pair.values), *own_names)


def _own(block: CurvatureBlock) -> list[str]:
    return [f"{spec.name}_{block.slot}_inverse" for spec in sides(block)]


def whiten(
    build: ProgramBuilder,
    block: CurvatureBlock,
    factors: Sequence[Any],
    damping: Damping,
    factorise: Factorise,
) -> tuple[list[Any], dict[str, Any]]:
    """Whiteners of both damped sides, and the flags of their factorisations."""
    specs = sides(block)
    found: list[Any] = []
    flags: dict[str, Any] = {}
    pair = tikhonov(build, block.slot, factors, specs, damping.gamma)
    for spec, matrix in zip(specs, pair, strict=True):
        name = f"{spec.name}_{block.slot}"
        whitener, failed = factorise.whitener(matrix)
        found.append(build.name(whitener, f"W_{name}"))
        flags[f"failed_{name}"] = build.name(failed, f"failed_{name}")
    return found, flags


def own(build: ProgramBuilder, block: CurvatureBlock, whiteners: Sequence[Any]) -> dict[str, Any]:
    """The inverses of a block by itself."""
    found = zip(_own(block), whiteners, strict=True)
    return {name: build.name(symmetric_product(W, triangular=True), name) for name, W in found}


def refresh(
    build: ProgramBuilder,
    pair: Pair,
    whiteners: Sequence[Any],
    above: Sequence[Any],
    cross: Sequence[Any],
) -> dict[str, Any]:
    """What a pair adds; of one that is not positive, the coupling is left out."""
    of_A, of_G = pair.from_child
    L_A, s_A, R_A = conditional_side(whiteners[0], cross[0], above[0], from_child=of_A)
    L_G, s_G, R_G = conditional_side(whiteners[1], cross[1], above[1], from_child=of_G)
    form = conditional_scale(s_A, s_G)
    scale = torch.where(form[2], 1.0 if pair.complete else 0.0, form[0])
    found = {"L_A": L_A, "L_G": L_G, "R_A": R_A, "R_G": R_G, "scale": scale}
    if pair.complete:
        larger = "R_G" if of_A else "L_G"
        found[larger] = torch.where(form[2], 0.0, found[larger])
    else:
        found |= {"s_A": s_A, "s_G": s_G}
    found |= {"clamped": form[1], "indefinite": form[2]}
    slot = pair.child.slot
    return {f"{key}_{slot}": build.name(v, f"{key}_{slot}") for key, v in found.items()}


class Part(NamedTuple):
    """What a pair contributes to a block: ``sign`` times a product of two matrices."""

    block: str
    sign: int
    factors: tuple[Any, Any]


class _End(NamedTuple):
    """A block of a pair, its gradient V, and its coordinates A [a, k_A] and G [g, k_G]."""

    block: CurvatureBlock
    V: Any
    A: Any
    G: Any
    k: tuple[int, int]

    def inward(self) -> tuple[Any, Any]:
        """G^T V A, as two matrices to be multiplied."""
        (a, *_), (g, *_) = self.block.dimensions
        return _halves(self.G.mT, self.V, self.A, (self.k[1], g, a, self.k[0]))

    def outward(self, sign: int, z: Any) -> Part:
        """G z A^T."""
        (a, *_), (g, *_) = self.block.dimensions
        factors = _halves(self.G, z, self.A.mT, (g, self.k[1], self.k[0], a))
        return Part(self.block.name, sign, factors)


def apply(
    pair: Pair, inverse: Sequence[Any], V: Any, above: Any, within: Collection[str]
) -> list[Part]:
    """What the pair adds to both blocks by themselves.

    c and d are the gradients of child and parent in canonical coordinates; of the larger side,
    times r = sqrt(s). To (c, d) the pair adds [[r^2, -r], [-r, r^2]] / (1 - r^2) times them, with
    r^2 = s_G s_A^T.

    Args:
        within: blocks whose own part is part of it.
    """
    L_A, L_G, R_A, R_G, scale, *s = inverse
    one, two = ([side[0] for side in block.dimensions] for block in pair)
    k = min(one[0], two[0]), min(one[1], two[1])
    child, parent = _End(pair.child, V, L_A, L_G, k), _End(pair.parent, above, R_A, R_G, k)
    if pair.complete:
        smaller, larger = (child, parent) if pair.complete is pair.child else (parent, child)
        c = torch.mm(*smaller.inward())
        z = torch.addmm(c, *larger.inward(), alpha=-1) * scale
        own_too = pair.complete.name in within
        return [smaller.outward(1, z if own_too else z - c), larger.outward(-1, z)]
    c, d = torch.mm(*child.inward()), torch.mm(*parent.inward())
    s_A, s_G = s[0], s[1].unsqueeze(-1)
    by_child, by_parent = (s_A, s_G) if pair.from_child[0] else (s_G, s_A)
    # d - s c and c - s d: the sign is turned.
    z = torch.addcmul(d, c, by_child, value=-1) * scale
    y = torch.addcmul(c, d, by_parent, value=-1) * scale
    return [child.outward(-1, z), parent.outward(-1, y)]


def _halves(L: Any, V: Any, R: Any, sizes: tuple[int, int, int, int]) -> tuple[Any, Any]:
    """L V and R, or L and V R, whichever makes L [p, q] V [q, r] R [r, t] cheaper.

    Args:
        sizes: (p, q, r, t).
    """
    p, q, r, t = sizes
    right = q * r * t + p * q * t < p * q * r + p * r * t
    return (L, V @ R) if right else (L @ V, R)
