"""What an approximation of a block contributes to the programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from kfac_fx.codegen.builder import ProgramBuilder
from kfac_fx.ir import CurvatureBlock

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
        """The gradients, in the shapes of the layouts, as the one array the inverse acts on."""

    def apply(
        self, build: ProgramBuilder, block: CurvatureBlock, inverses: Sequence[Any], V: Any
    ) -> Any:
        """The inverse block times V."""

    def scatter(self, build: ProgramBuilder, block: CurvatureBlock, U: Any) -> Sequence[Any]:
        """U as one array a parameter, in the shapes of the layouts."""


def named_inverse(build: ProgramBuilder, name: str, inverse: Any, failed: Any) -> dict[str, Any]:
    return {
        f"{name}_inverse": build.name(inverse, f"{name}_inverse"),
        f"failed_{name}": build.name(failed, f"failed_{name}"),
    }
