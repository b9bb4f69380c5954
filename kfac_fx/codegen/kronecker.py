"""Programs of Kronecker blocks: A (x) G, and the sum of two for a weight used in two ways."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from kfac_fx.codegen.builder import ProgramBuilder
from kfac_fx.codegen.calls import (
    common_basis,
    damped,
    mean_eigenvalue,
    sum_inverse_product,
    trace_ratio,
)
from kfac_fx.codegen.form import Damping, Invert, named_inverse
from kfac_fx.ir import CurvatureBlock, FactorSpec
from kfac_fx.linalg.kronecker import (
    filled_up,
    kronecker_product,
    without_filling,
)


def sides(block: CurvatureBlock) -> list[FactorSpec]:
    """The block's factors without counts."""
    return [factor for factor in block.factors if factor.role != "count"]


class _Cut(NamedTuple):
    """How the sides (A, G) of a block are cut: sub-blocks, and entries that fill them up."""

    parts: tuple[int, int]
    missing: tuple[int, int]


def cut_of(specs: Sequence[FactorSpec]) -> _Cut:
    """Of the first of all factors of a side that is cut."""
    found = [next((s for s in specs if s.cut and s.name[0] == side), None) for side in "AG"]
    a, g = ((0, 0) if s is None else (s.shape[0], s.shape[0] * s.shape[1] - s.cut) for s in found)
    return _Cut((a[0], g[0]), (a[1], g[1]))


def tikhonov(
    build: ProgramBuilder, slot: str, pair: Sequence[Any], specs: Sequence[FactorSpec], gamma: Any
) -> list[Any]:
    """(A + pi gamma I, G + gamma / pi I); a diagonal side stays a vector."""
    a, g = (
        mean_eigenvalue(factor, diagonal=spec.diagonal, cut=spec.cut)
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


def _matrices(plain: Any, other: Any, specs: Sequence[FactorSpec]) -> tuple[Any, Any]:
    """Both factors of a side as matrices, or as sub-blocks where one of them is cut."""
    cut = cut_of(specs)
    parts, missing = max(cut.parts), max(cut.missing)
    result = []
    for factor, spec in zip((plain, other), specs, strict=True):
        if spec.diagonal and parts:
            factor = torch.nn.functional.pad(factor, (0, missing)).unflatten(-1, (parts, -1))
        result.append(torch.diag_embed(factor) if spec.diagonal else factor)
    return result[0], result[1]


class Kronecker:
    """A (x) G with factored Tikhonov damping: (A + pi gamma I) (x) (G + gamma / pi I)."""

    def inverses(self, block: CurvatureBlock) -> tuple[str, ...]:
        return tuple(f"{spec.name}_{block.slot}_inverse" for spec in sides(block))

    def refresh(
        self,
        build: ProgramBuilder,
        block: CurvatureBlock,
        factors: Sequence[Any],
        damping: Damping,
        invert: Invert,
    ) -> dict[str, Any]:
        specs = sides(block)
        pair = tikhonov(build, block.slot, factors, specs, damping.gamma)
        result: dict[str, Any] = {}
        for spec, matrix in zip(specs, pair, strict=True):
            name = f"{spec.name}_{block.slot}"
            if spec.diagonal:
                inverse = build.name(torch.reciprocal(matrix), f"{name}_inverse")
                result[f"{name}_inverse"] = inverse
            else:
                inverse, failed = invert(matrix)
                result |= named_inverse(build, name, inverse, failed)
        return result

    def gather(self, build: ProgramBuilder, block: CurvatureBlock, gradients: Sequence[Any]) -> Any:
        V, *rest = gradients
        return torch.cat([V, rest[0].unsqueeze(-1)], -1) if rest else V

    def apply(
        self, build: ProgramBuilder, block: CurvatureBlock, inverses: Sequence[Any], V: Any
    ) -> Any:
        A_inverse, G_inverse = inverses
        first, second = (spec.diagonal for spec in sides(block))
        cut = cut_of(sides(block))
        V = filled_up(V, cut.missing)
        U = kronecker_product(A_inverse, G_inverse, V, diagonal=(first, second), cut=cut.parts)
        return without_filling(U, cut.missing)

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
        slot, specs = block.slot, sides(block)
        second = tikhonov(build, slot, factors[2:], specs[2:], damping.gamma)
        result: dict[str, Any] = {}
        for side, plain, other in zip("AG", factors[:2], second, strict=True):
            here = [spec for spec in specs if spec.name[0] == side]
            if all(spec.diagonal for spec in here):
                basis, scale = torch.rsqrt(other), plain / other
            else:
                plain, other = _matrices(plain, other, here)
                basis, scale = common_basis(other, plain)
                scale = scale.flatten() if any(spec.cut for spec in here) else scale
            result[f"{side}_basis_{slot}"] = build.name(basis, f"{side}_basis_{slot}")
            result[f"{side}_scale_{slot}"] = build.name(scale, f"{side}_scale_{slot}")
        return result

    def gather(self, build: ProgramBuilder, block: CurvatureBlock, gradients: Sequence[Any]) -> Any:
        return gradients[0]

    def apply(
        self, build: ProgramBuilder, block: CurvatureBlock, inverses: Sequence[Any], V: Any
    ) -> Any:
        K_A, s_A, K_G, s_G = inverses
        specs = sides(block)
        first, second = (all(s.diagonal for s in specs if s.name[0] == side) for side in "AG")
        cut = cut_of(specs)
        V = filled_up(V, cut.missing)
        U = sum_inverse_product(K_A, K_G, s_A, s_G, V, diagonal=(first, second), cut=cut.parts)
        return without_filling(U, cut.missing)

    def scatter(self, build: ProgramBuilder, block: CurvatureBlock, U: Any) -> Sequence[Any]:
        return [U]
