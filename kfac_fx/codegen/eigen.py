"""Programs of Kronecker blocks with exact damping (docs/explanation/mathematics.md, section 5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from kfac_fx.codegen.builder import ProgramBuilder
from kfac_fx.codegen.calls import damped_scale, eigen_product, eigenbasis, moment_scale
from kfac_fx.codegen.form import Damping, Invert
from kfac_fx.codegen.kronecker import Kronecker, cut_of, sides
from kfac_fx.ir import CurvatureBlock, CurvatureGraph
from kfac_fx.linalg.kronecker import filled_up, without_filling


def emit_scales(curvature: CurvatureGraph) -> fx.GraphModule:
    """damping and the moments S_X -> scale_X, which take the place of those of a refresh."""
    build = ProgramBuilder()
    damping = build.input("damping")
    blocks = [curvature.blocks[moment.block] for moment in curvature.moments]
    moments = {block.slot: build.input(f"S_{block.slot}") for block in blocks}
    outputs: dict[str, Any] = {}
    for block in blocks:
        with build.section(block.slot, f"{block.name}: moments"):
            name = f"scale_{block.slot}"
            outputs[name] = build.name(moment_scale(moments[block.slot], damping), name)
    return build.finish(outputs, "Scales")


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
            if spec.diagonal:
                spectra.append(factor)
                continue
            values, basis = eigenbasis(factor)
            values = build.name(values, f"s_{spec.name}_{slot}")
            spectra.append(values.flatten() if spec.cut else values)
            name = f"{spec.name}_basis_{slot}"
            result[name] = build.name(basis, name)
        (s_A, s_G), name = spectra, f"scale_{slot}"
        return result | {name: build.name(damped_scale(s_A, s_G, damping.lam), name)}

    def apply(
        self, build: ProgramBuilder, block: CurvatureBlock, inverses: Sequence[Any], V: Any
    ) -> Any:
        *bases, scale = inverses
        specs, cut = sides(block), cut_of(sides(block))
        found = iter(bases)
        U_A, U_G = (None if spec.diagonal else next(found) for spec in specs)
        V = filled_up(V, cut.missing)
        options = {"cut": cut.parts} if any(cut.parts) else {}
        U = eigen_product(U_A, U_G, scale, V, **options)
        return without_filling(U, cut.missing)
