"""Programs of Kronecker blocks with exact Tikhonov damping (curvature.md section 5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kfac_fx.codegen.builder import ProgramBuilder
from kfac_fx.codegen.form import Damping, Invert
from kfac_fx.codegen.kronecker import Kronecker, cut_of, sides
from kfac_fx.ir import CurvatureBlock
from kfac_fx.linalg.kronecker import filled_up, kronecker_product, without_filling


class EigenKronecker(Kronecker):
    """A (x) G + lambda I in the eigenbases of A and G: divide by s_G s_A^T + lambda.

    The basis of a diagonal side is the identity, and left out.
    """

    def inverses(self, block: CurvatureBlock) -> tuple[str, ...]:
        bases = [f"{spec.name}_basis_{block.slot}" for spec in sides(block) if not spec.diagonal]
        return (*bases, f"scale_{block.slot}")

    def refresh(
        self,
        build: ProgramBuilder,
        block: CurvatureBlock,
        factors: Sequence[Any],
        damping: Damping,
        invert: Invert,
    ) -> dict[str, Any]:
        slot = block.slot
        spectra: list[Any] = []
        result: dict[str, Any] = {}
        for spec, factor in zip(sides(block), factors, strict=True):
            values = factor
            if not spec.diagonal:
                pair = torch.linalg.eigh(factor)
                values, name = pair[0], f"{spec.name}_basis_{slot}"
                result[name] = build.name(pair[1], name)
            values = values.flatten() if spec.cut else values
            # Rounding makes eigenvalues of singular factors negative.
            spectra.append(build.name(values.clamp_min(0.0), f"s_{spec.name}_{slot}"))
        s_A, s_G = spectra
        eigenvalues = s_G.unsqueeze(-1) * s_A.unsqueeze(-2) + damping.lam
        name = f"scale_{slot}"
        return result | {name: build.name(torch.reciprocal(eigenvalues), name)}

    def apply(
        self, build: ProgramBuilder, block: CurvatureBlock, inverses: Sequence[Any], V: Any
    ) -> Any:
        *bases, scale = inverses
        specs, cut = sides(block), cut_of(sides(block))
        found = iter(bases)
        U_A, U_G = (None if spec.diagonal else next(found) for spec in specs)
        V = filled_up(V, cut.missing)
        inner = kronecker_product(U_A, None if U_G is None else U_G.mT, V, cut=cut.parts) * scale
        U_A = None if U_A is None else U_A.mT
        return without_filling(kronecker_product(U_A, U_G, inner, cut=cut.parts), cut.missing)
