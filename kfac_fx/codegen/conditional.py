"""Programs of coupled Kronecker blocks: a root, or a child given its parent (section 7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kfac_fx.codegen.builder import ProgramBuilder
from kfac_fx.codegen.calls import conditional_scale, conditional_side
from kfac_fx.codegen.form import Damping
from kfac_fx.codegen.kronecker import sides, tikhonov
from kfac_fx.ir import Coupling, CurvatureBlock
from kfac_fx.linalg.positive import Factorise


def cross_names(blocks: Mapping[str, CurvatureBlock], coupling: Coupling) -> list[str]:
    """Names of A and G, child by parent."""
    child, parent = blocks[coupling.child].slot, blocks[coupling.parent].slot
    return [f"{factor}_{child}_{parent}" for factor in "AG"]


Pair = tuple[CurvatureBlock, CurvatureBlock]
"""A child and its parent."""


def from_child(pair: Pair) -> tuple[bool, bool]:
    """Of A and of G, whether the child's side is the smaller: its coordinates are complete."""
    (A, G), (A_parent, G_parent) = (block.dimensions for block in pair)
    return A[0] <= A_parent[0], G[0] <= G_parent[0]


def inverses(pair: Pair) -> tuple[str, ...]:
    """What a child's refresh hands to the apply: coordinates, 1 / (1 - s_G s_A^T), s_A and s_G.

    Where the child's coordinates are not complete, its own inverses too.
    """
    child, slot = pair[0], pair[0].slot
    names = [f"{name}_{slot}" for name in ("L_A", "L_G", "R_A", "R_G", "scale")]
    if not all(from_child(pair)):
        names += [f"s_A_{slot}", f"s_G_{slot}", *_own(child)]
    return tuple(names)


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
    return {name: build.name(W.mT @ W, name) for name, W in found}


def refresh(
    build: ProgramBuilder,
    pair: Pair,
    whiteners: Sequence[Any],
    above: Sequence[Any],
    cross: Sequence[Any],
) -> dict[str, Any]:
    """A child's conditional; of one that is not positive, the coupling is left out."""
    child, slot = pair[0], pair[0].slot
    of_A, of_G = from_child(pair)
    L_A, s_A, R_A = conditional_side(whiteners[0], cross[0], above[0], from_child=of_A)
    L_G, s_G, R_G = conditional_side(whiteners[1], cross[1], above[1], from_child=of_G)
    complete = of_A and of_G
    form = conditional_scale(s_A, s_G)
    found = {
        "L_A": L_A,
        "L_G": L_G,
        "R_A": R_A,
        "R_G": torch.where(form[2], 0.0, R_G),
        "scale": torch.where(form[2], 1.0 if complete else 0.0, form[0]),
        "clamped": form[1],
        "indefinite": form[2],
    }
    found |= {} if complete else {"s_A": s_A, "s_G": s_G}
    named = {f"{key}_{slot}": build.name(v, f"{key}_{slot}") for key, v in found.items()}
    return named if complete else named | own(build, child, whiteners)


def apply(pair: Pair, inverse: Sequence[Any], V: Any, above: Any) -> tuple[Any, tuple[Any, Any]]:
    """The child's result, and what its parent's loses, as two matrices to be multiplied.

    c and d are the gradients of child and parent in canonical coordinates; with complete
    coordinates z is that of section 7, and Sigma^-1 = L diag(scale) L^T.
    """
    L_A, L_G, R_A, R_G, scale, *rest = inverse
    of_A, of_G = from_child(pair)
    (A, G), (A_parent, G_parent) = ([side[0] for side in b.dimensions] for b in pair)
    k_A, k_G = min(A, A_parent), min(G, G_parent)
    c = torch.mm(*_halves(L_G.mT, V, L_A, (k_G, G, A, k_A)))
    d = _halves(R_G, above, R_A.mT, (k_G, G_parent, A_parent, k_A))
    if of_A and of_G:
        z = y = torch.addmm(c, *d, alpha=-1) * scale
        U = torch.mm(*_halves(L_G, z, L_A.mT, (G, k_G, k_A, A)))
    else:
        s_A, s_G, A_inverse, G_inverse = rest
        product = torch.mm(*d)
        z = (_weighted(c, s_A, s_G, of_A, of_G) - product) * scale
        y = (c - _weighted(product, s_A, s_G, not of_A, not of_G)) * scale
        own = G_inverse @ V @ A_inverse
        U = torch.addmm(own, *_halves(L_G, z, L_A.mT, (G, k_G, k_A, A)))
    return U, _halves(R_G.mT, y, R_A, (G_parent, k_G, k_A, A_parent))


def _halves(L: Any, V: Any, R: Any, sizes: tuple[int, int, int, int]) -> tuple[Any, Any]:
    """L V and R, or L and V R, whichever makes L [p, q] V [q, r] R [r, t] cheaper.

    Args:
        sizes: (p, q, r, t).
    """
    p, q, r, t = sizes
    right = q * r * t + p * q * t < p * q * r + p * r * t
    return (L, V @ R) if right else (L @ V, R)


def _weighted(value: Any, s_A: Any, s_G: Any, by_A: bool, by_G: bool) -> Any:
    """Times the s of the sides asked for, along the columns (A) and rows (G)."""
    value = value * s_A if by_A else value
    return value * s_G.unsqueeze(-1) if by_G else value


def _right_first(to: CurvatureBlock, of: CurvatureBlock) -> bool:
    """Whether [g_to, g_of] [g_of, a_of] [a_of, a_to] takes fewer products from the right."""
    (a_to, _), (g_to, _) = to.dimensions
    (a_of, _), (g_of, _) = of.dimensions
    right = g_of * a_of * a_to + g_to * g_of * a_to
    return right < g_to * g_of * a_of + g_to * a_of * a_to
