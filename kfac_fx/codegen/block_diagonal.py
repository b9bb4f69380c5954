"""The block-diagonal program: Fbreve^-1 = blockdiag(F_ii^-1) (curvature.md section 6)."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from kfac_fx.codegen.builder import ProgramBuilder
from kfac_fx.codegen.form import Damping, Invert
from kfac_fx.codegen.forms import FORMS
from kfac_fx.ir import CurvatureBlock, CurvatureGraph
from kfac_fx.linalg.positive import cholesky_inverse


def _title(block: CurvatureBlock) -> str:
    sides = " and ".join("x".join(map(str, shape)) or "1" for shape in block.dimensions)
    return f"{block.name}: {block.kind}, {block.approximation} {sides}"


def _factor_names(block: CurvatureBlock) -> list[str]:
    return [f"{factor.name}_{block.slot}" for factor in block.factors if factor.role != "count"]


def emit_refresh(curvature: CurvatureGraph, invert: Invert = cholesky_inverse) -> fx.GraphModule:
    """factors and damping (a 0-dimensional tensor) -> inverses, as a dict by name.

    For every inverse ``X_inverse`` made by ``invert`` there is a flag ``failed_X``.
    """
    build = ProgramBuilder()
    damping = build.input("damping")
    blocks = curvature.blocks.values()
    factors = {block.name: [build.input(n) for n in _factor_names(block)] for block in blocks}
    tikhonov = Damping(damping, build.name(torch.sqrt(damping), "gamma"))
    outputs: dict[str, Any] = {}
    for block in blocks:
        form = FORMS[block.approximation]
        with build.section(block.slot, _title(block)):
            outputs |= form.refresh(build, block, factors[block.name], tikhonov, invert)
    return build.finish(outputs, "Refresh")


def emit_apply(curvature: CurvatureGraph, cast: Collection[str] = ()) -> fx.GraphModule:
    """inverses and gradients -> preconditioned gradients, as a dict by parameter name.

    Args:
        cast: parameters whose dtype is not the factors'; products are formed in the latter.
    """
    build = ProgramBuilder()
    blocks = curvature.blocks.values()
    inverses = {
        block.name: [build.input(n) for n in FORMS[block.approximation].inverses(block)]
        for block in blocks
    }
    gradients = {name: build.input(f"gradient_{name}") for name in curvature.covered}
    outputs: dict[str, Any] = dict(gradients)
    for block in blocks:
        form, inverse = FORMS[block.approximation], inverses[block.name]
        with build.section(block.slot, _title(block)):
            given = [
                layout.apply(
                    gradients[name].to(inverse[0].dtype) if name in cast else gradients[name]
                )
                for name, layout in zip(block.parameters, block.layouts, strict=True)
            ]
            V = build.name(form.gather(build, block, given), f"V_{block.slot}")
            U = build.name(form.apply(build, block, inverse, V), f"U_{block.slot}")
            parts = form.scatter(build, block, U)
            for name, part, layout in zip(block.parameters, parts, block.layouts, strict=True):
                part = part.to(gradients[name].dtype) if name in cast else part
                outputs[name] = layout.embed(part, outputs[name])
    return build.finish(outputs, "Apply")
