"""Programs of Kronecker blocks: A (x) G, and the sum of two for a weight used in two ways."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kfac_fx.codegen.builder import ProgramBuilder
from kfac_fx.codegen.form import Damping, Invert, named_inverse
from kfac_fx.ir import CurvatureBlock, FactorSpec
from kfac_fx.linalg.damping import damped, mean_eigenvalue, trace_ratio
from kfac_fx.linalg.kronecker import common_basis, kronecker_product, sum_inverse_product


def _sides(block: CurvatureBlock) -> list[FactorSpec]:
    return [factor for factor in block.factors if factor.role != "count"]


def _tikhonov(
    build: ProgramBuilder, slot: str, pair: Sequence[Any], specs: Sequence[FactorSpec], gamma: Any
) -> list[Any]:
    """(A + pi gamma I, G + gamma / pi I); a diagonal side stays a vector."""
    a, g = (
        mean_eigenvalue(factor, diagonal=spec.diagonal)
        for factor, spec in zip(pair, specs, strict=True)
    )
    pi = build.name(trace_ratio(a, g), f"pi_{slot}")
    amounts = (pi * gamma, gamma / pi)
    return [
        build.name(
            factor + amount.unsqueeze(-1) if spec.diagonal else damped(factor, amount),
            f"{spec.name}_{slot}_damped",
        )
        for factor, spec, amount in zip(pair, specs, amounts, strict=True)
    ]


class Kronecker:
    """A (x) G with factored Tikhonov damping: (A + pi gamma I) (x) (G + gamma / pi I)."""

    def inverses(self, block: CurvatureBlock) -> tuple[str, ...]:
        return tuple(f"{spec.name}_{block.slot}_inverse" for spec in _sides(block))

    def refresh(
        self,
        build: ProgramBuilder,
        block: CurvatureBlock,
        factors: Sequence[Any],
        damping: Damping,
        invert: Invert,
    ) -> dict[str, Any]:
        specs = _sides(block)
        pair = _tikhonov(build, block.slot, factors, specs, damping.gamma)
        result: dict[str, Any] = {}
        for spec, matrix in zip(specs, pair, strict=True):
            name = f"{spec.name}_{block.slot}"
            if spec.diagonal:
                inverse = build.name(torch.reciprocal(matrix), f"{name}_inverse")
                result[f"{name}_inverse"] = inverse
            else:
                result |= named_inverse(build, name, *invert(matrix))
        return result

    def gather(self, build: ProgramBuilder, block: CurvatureBlock, gradients: Sequence[Any]) -> Any:
        V, *rest = gradients
        return torch.cat([V, rest[0].unsqueeze(-1)], -1) if rest else V

    def apply(
        self, build: ProgramBuilder, block: CurvatureBlock, inverses: Sequence[Any], V: Any
    ) -> Any:
        A_inverse, G_inverse = inverses
        first, second = (spec.diagonal for spec in _sides(block))
        return kronecker_product(A_inverse, G_inverse, V, diagonal=(first, second))

    def scatter(self, build: ProgramBuilder, block: CurvatureBlock, U: Any) -> Sequence[Any]:
        return [U] if len(block.layouts) == 1 else [U[..., :-1], U[..., -1]]


class KroneckerSum:
    """A (x) G + A_2 (x) G_2, the second pair damped: exact in the common bases of both sides.

    Sides that are diagonal in both pairs stay vectors.
    """

    def inverses(self, block: CurvatureBlock) -> tuple[str, ...]:
        names = ("A_basis", "A_scale", "G_basis", "G_scale")
        return tuple(f"{name}_{block.slot}" for name in names)

    def refresh(
        self,
        build: ProgramBuilder,
        block: CurvatureBlock,
        factors: Sequence[Any],
        damping: Damping,
        invert: Invert,
    ) -> dict[str, Any]:
        slot, specs = block.slot, _sides(block)
        second = _tikhonov(build, slot, factors[2:], specs[2:], damping.gamma)
        result: dict[str, Any] = {}
        for side, plain, other in zip("AG", factors[:2], second, strict=True):
            here = [spec.diagonal for spec in specs if spec.name[0] == side]
            if all(here):
                basis, scale = torch.rsqrt(other), plain / other
            else:
                plain = torch.diag_embed(plain) if here[0] else plain
                other = torch.diag_embed(other) if here[1] else other
                basis, scale = common_basis(other, plain)
            result[f"{side}_basis_{slot}"] = build.name(basis, f"{side}_basis_{slot}")
            result[f"{side}_scale_{slot}"] = build.name(scale, f"{side}_scale_{slot}")
        return result

    def gather(self, build: ProgramBuilder, block: CurvatureBlock, gradients: Sequence[Any]) -> Any:
        return gradients[0]

    def apply(
        self, build: ProgramBuilder, block: CurvatureBlock, inverses: Sequence[Any], V: Any
    ) -> Any:
        K_A, s_A, K_G, s_G = inverses
        specs = _sides(block)
        diagonal = tuple(all(s.diagonal for s in specs if s.name[0] == side) for side in "AG")
        return sum_inverse_product(K_A, K_G, s_A, s_G, V, diagonal=(diagonal[0], diagonal[1]))

    def scatter(self, build: ProgramBuilder, block: CurvatureBlock, U: Any) -> Sequence[Any]:
        return [U]
