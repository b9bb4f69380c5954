"""Programs of coupled Kronecker blocks: a root, or a child given its parent (section 7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kfac_fx.codegen.builder import ProgramBuilder
from kfac_fx.codegen.form import Damping
from kfac_fx.codegen.kronecker import sides, tikhonov
from kfac_fx.ir import Coupling, CurvatureBlock
from kfac_fx.linalg.conditional import conditional_scale, conditional_side
from kfac_fx.linalg.kronecker import sandwich
from kfac_fx.linalg.positive import Factorise


def cross_names(blocks: Mapping[str, CurvatureBlock], coupling: Coupling) -> list[str]:
    """Names of A and G, child by parent."""
    child, parent = blocks[coupling.child].slot, blocks[coupling.parent].slot
    return [f"{factor}_{child}_{parent}" for factor in "AG"]


def inverses(block: CurvatureBlock) -> tuple[str, ...]:
    """What a child's refresh hands to the apply: K^T Sigma K = diag(1 / scale), and K^T Psi."""
    names = ("K_A", "K_G", "Psi_A", "Psi_G", "scale")
    return tuple(f"{name}_{block.slot}" for name in names)


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


def root(build: ProgramBuilder, block: CurvatureBlock, whiteners: Sequence[Any]) -> dict[str, Any]:
    """The inverses of a block without a parent."""
    names = [f"{spec.name}_{block.slot}_inverse" for spec in sides(block)]
    return {name: build.name(W.mT @ W, name) for name, W in zip(names, whiteners, strict=True)}


def refresh(
    build: ProgramBuilder,
    child: CurvatureBlock,
    whiteners: Sequence[Any],
    above: Sequence[Any],
    cross: Sequence[Any],
) -> dict[str, Any]:
    """A child's conditional; of one that is not positive, the coupling is left out."""
    slot = child.slot
    K_A, s_A, Psi_A = conditional_side(whiteners[0], cross[0], above[0])
    K_G, s_G, Psi_G = conditional_side(whiteners[1], cross[1], above[1])
    form = conditional_scale(s_A, s_G)
    clamped, indefinite = form[1], form[2]
    found = {
        "K_A": K_A,
        "K_G": K_G,
        "Psi_A": torch.where(indefinite, 0.0, Psi_A),
        "Psi_G": torch.where(indefinite, 0.0, Psi_G),
        "scale": torch.where(indefinite, 1.0, form[0]),
        "clamped": clamped,
        "indefinite": indefinite,
    }
    return {f"{key}_{slot}": build.name(value, f"{key}_{slot}") for key, value in found.items()}


def given(
    child: CurvatureBlock, parent: CurvatureBlock, inverse: Sequence[Any], V: Any, above: Any
) -> Any:
    """z: K^T (v_i - Psi v_p), divided by the conditional's eigenvalues."""
    K_A, K_G, Psi_A, Psi_G, scale = inverse
    order = _right_first(child, parent)
    inner = sandwich(K_G.mT, V, K_A) - sandwich(Psi_G, above, Psi_A.mT, right_first=order)
    return inner * scale


def back(inverse: Sequence[Any], z: Any) -> Any:
    """K z: the child's own part of the result."""
    K_A, K_G, *_ = inverse
    return sandwich(K_G, z, K_A.mT)


def share(child: CurvatureBlock, parent: CurvatureBlock, inverse: Sequence[Any], z: Any) -> Any:
    """Psi^T K z: what the parent's part loses."""
    _, _, Psi_A, Psi_G, _ = inverse
    return sandwich(Psi_G.mT, z, Psi_A, right_first=_right_first(parent, child))


def _right_first(to: CurvatureBlock, of: CurvatureBlock) -> bool:
    """Whether [g_to, g_of] [g_of, a_of] [a_of, a_to] takes fewer products from the right."""
    (a_to, _), (g_to, _) = to.dimensions
    (a_of, _), (g_of, _) = of.dimensions
    right = g_of * a_of * a_to + g_to * g_of * a_to
    return right < g_to * g_of * a_of + g_to * a_of * a_to
