"""What each approximation of a block contributes to the programs: one class a form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from kfac_fx.codegen.builder import ProgramBuilder
from kfac_fx.ir import CurvatureBlock
from kfac_fx.linalg.damping import damped, trace_ratio
from kfac_fx.linalg.kronecker import kronecker_product

Invert = Callable[[Any], tuple[Any, Any]]
"""A positive definite matrix -> its inverse, and a flag that is not zero where that failed."""


class Damping(NamedTuple):
    """lambda and gamma = sqrt(lambda)."""

    lam: Any
    gamma: Any


class Form(Protocol):
    """Emits the refresh and the apply of one kind of block."""

    def inverses(self, block: CurvatureBlock) -> tuple[str, ...]:
        """Names of what the refresh hands to the apply."""

    def refresh(
        self,
        build: ProgramBuilder,
        block: CurvatureBlock,
        factors: Sequence[Any],
        damping: Damping,
        invert: Invert,
    ) -> Mapping[str, Any]:
        """Inverses by name; names that start with ``failed`` are Cholesky's flags."""

    def gather(self, build: ProgramBuilder, block: CurvatureBlock, gradients: Sequence[Any]) -> Any:
        """The gradients of the block's parameters as the one array that the inverse acts on."""

    def apply(
        self, build: ProgramBuilder, block: CurvatureBlock, inverses: Sequence[Any], V: Any
    ) -> Any:
        """The inverse block times V."""

    def scatter(self, build: ProgramBuilder, block: CurvatureBlock, U: Any) -> Sequence[Any]:
        """U as one array a parameter, in the parameters' own shapes."""


def _named_inverse(build: ProgramBuilder, name: str, inverse: Any, failed: Any) -> dict[str, Any]:
    return {
        f"{name}_inverse": build.name(inverse, f"{name}_inverse"),
        f"failed_{name}": build.name(failed, f"failed_{name}"),
    }


class Kronecker:
    """A (x) G with factored Tikhonov damping: (A + pi gamma I) (x) (G + gamma / pi I)."""

    def inverses(self, block: CurvatureBlock) -> tuple[str, ...]:
        return f"A_{block.slot}_inverse", f"G_{block.slot}_inverse"

    def refresh(
        self,
        build: ProgramBuilder,
        block: CurvatureBlock,
        factors: Sequence[Any],
        damping: Damping,
        invert: Invert,
    ) -> dict[str, Any]:
        A, G = factors[:2]
        slot = block.slot
        gamma = damping.gamma
        pi = build.name(trace_ratio(A, G), f"pi_{slot}")
        A_damped = build.name(damped(A, pi * gamma), f"A_{slot}_damped")
        G_damped = build.name(damped(G, gamma / pi), f"G_{slot}_damped")
        result: dict[str, Any] = {}
        for name, matrix in (("A", A_damped), ("G", G_damped)):
            inverse, failed = invert(matrix)
            result |= _named_inverse(build, f"{name}_{slot}", inverse, failed)
        return result

    def gather(self, build: ProgramBuilder, block: CurvatureBlock, gradients: Sequence[Any]) -> Any:
        V, *rest = (
            layout.apply(gradient)
            for layout, gradient in zip(block.layouts, gradients, strict=True)
        )
        for bias in rest:
            V = torch.cat([V, bias.unsqueeze(-1)], -1)
        return V

    def apply(
        self, build: ProgramBuilder, block: CurvatureBlock, inverses: Sequence[Any], V: Any
    ) -> Any:
        A_inverse, G_inverse = inverses
        return kronecker_product(A_inverse, G_inverse, V)

    def scatter(self, build: ProgramBuilder, block: CurvatureBlock, U: Any) -> Sequence[Any]:
        if len(block.layouts) == 1:
            return [block.layouts[0].invert(U)]
        weight, bias = block.layouts
        return [weight.invert(U[..., :-1]), bias.invert(U[..., -1])]


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
        return _named_inverse(build, f"C_{slot}", inverse, failed)

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
            part.reshape(layout.start) for part, layout in zip(parts, block.layouts, strict=True)
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


FORMS: Mapping[str, Form] = {
    "kronecker": Kronecker(),
    "full": Covariance(),
    "pairs": Covariance(),
    "diagonal": Diagonal(),
}
