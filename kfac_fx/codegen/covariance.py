"""Programs of covariance blocks: full, 2x2 pairs, and diagonals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kfac_fx.codegen.builder import ProgramBuilder
from kfac_fx.codegen.calls import damped
from kfac_fx.codegen.form import Damping, Invert, named_inverse
from kfac_fx.ir import CurvatureBlock


class Covariance:
    """A full covariance [d, d], or one [K, K] for each of d entries ("pairs"): C + lambda I."""

    def inverses(self, block: CurvatureBlock) -> tuple[str, ...]:
        return (f"C_{block.slot}_inverse",)

    def refresh(
        self,
        build: ProgramBuilder,
        block: CurvatureBlock,
        factors: Sequence[Any],
        damping: Damping,
        invert: Invert,
    ) -> dict[str, Any]:
        slot = block.slot
        inverse, failed = invert(damped(factors[0], damping.lam))
        return named_inverse(build, f"C_{slot}", inverse, failed)

    def gather(self, build: ProgramBuilder, block: CurvatureBlock, gradients: Sequence[Any]) -> Any:
        flat = [gradient.reshape(-1) for gradient in gradients]
        if block.approximation == "pairs":
            return torch.stack(flat, -1)
        return torch.cat(flat) if len(flat) > 1 else flat[0]

    def apply(
        self, build: ProgramBuilder, block: CurvatureBlock, inverses: Sequence[Any], V: Any
    ) -> Any:
        return (inverses[0] @ V.unsqueeze(-1)).squeeze(-1)

    def scatter(self, build: ProgramBuilder, block: CurvatureBlock, U: Any) -> Sequence[Any]:
        count = len(block.layouts)
        if block.approximation == "pairs":
            parts = [U[..., index] for index in range(count)]
        elif count == 1:
            parts = [U]
        else:
            size = block.factors[0].shape[0] // count
            parts = [U[index * size : (index + 1) * size] for index in range(count)]
        return [
            part.reshape(layout.shape) for part, layout in zip(parts, block.layouts, strict=True)
        ]


class Diagonal(Covariance):
    """A diagonal: C + lambda, entry by entry."""

    def refresh(
        self,
        build: ProgramBuilder,
        block: CurvatureBlock,
        factors: Sequence[Any],
        damping: Damping,
        invert: Invert,
    ) -> dict[str, Any]:
        name = f"C_{block.slot}_inverse"
        return {name: build.name(torch.reciprocal(factors[0] + damping.lam), name)}

    def apply(
        self, build: ProgramBuilder, block: CurvatureBlock, inverses: Sequence[Any], V: Any
    ) -> Any:
        return inverses[0] * V
