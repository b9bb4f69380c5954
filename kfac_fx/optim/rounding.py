"""Which blocks multiply in bfloat16: those whose updates that hardly changes, as measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kfac_fx.codegen.forms import FORMS
from kfac_fx.config import within
from kfac_fx.errors import UnknownOptionError
from kfac_fx.ir import CurvatureBlock
from kfac_fx.linalg.damping import damped, mean_eigenvalue, trace_ratio
from kfac_fx.ops import round_products
from kfac_fx.optim.arrays import gathered
from kfac_fx.optim.averages import Averages, Entry

SMALLEST = 64
"""Of a block with smaller sides, casts cost what products save."""


class Rounding:
    """Blocks whose statistics, and whose inverses times gradients, are products in bfloat16.

    These are Kronecker blocks without couplings, with factored damping and the same positions at
    every call, whose update U changes by no more than the tolerance, relative and in the norm of
    the damped block F: |U' - U|_F / |U|_F, by rounding the gradient and the inverses, and A and G.
    A step along U' instead of U gains the quadratic model at least 1 - tolerance^2 of what U does.

    It is measured at refreshes 1, 2, 4, 8 and every 16th, on the gradient that comes next. A block
    that was over the tolerance comes back at half of it.

    Args:
        tolerance: 0 for no blocks.

    Attributes:
        errors: block -> what was measured last, of the blocks that may be rounded.
        blocks: names of those that are.

    Raises:
        UnknownOptionError: the tolerance is not in [0, 1), or the factors are in float64.
    """

    def __init__(
        self, blocks: Mapping[str, CurvatureBlock], averages: Averages, tolerance: float
    ) -> None:
        self._tolerance = within("bfloat16_error", tolerance, 0.0, 1.0)
        paired = {name for pair in averages.pairs for name in pair}
        self._blocks = {
            name: block
            for name, block in blocks.items()
            if tolerance and name not in paired and _suits(block, averages.blocks[name])
        }
        self._entries = {name: averages.blocks[name] for name in self._blocks}
        self.errors: dict[str, float] = {}
        self.blocks: set[str] = set()
        self._pending = False

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters of blocks that may be rounded."""
        return tuple(name for block in self._blocks.values() for name in block.parameters)

    def of_refresh(self, inverses: dict[str, Tensor], count: int) -> dict[str, Tensor]:
        """What a refresh made, as it is kept: in full precision where it is to be measured.

        Args:
            count: of refreshes so far.
        """
        self._pending = bool(self._blocks) and (not count & (count - 1) or count % 16 == 0)
        return inverses if self._pending else self._rounded(inverses)

    @torch.no_grad()
    def of_apply(
        self, inverses: dict[str, Tensor], gradients: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The inverses for these gradients, by parameter name, on which the error is measured."""
        if not self._pending:
            return inverses
        self._pending = False
        found = {
            name: rounding_error(
                self._entries[name].factors,
                [inverses[key] for key in _inverses(block)],
                gathered(block, gradients),
                inverses["damping"],
            )
            for name, block in self._blocks.items()
            if self._entries[name].recorded
        }
        errors = torch.stack(list(found.values())).tolist() if found else ()
        for name, error in zip(found, errors, strict=True):
            if not math.isnan(error):  # of a gradient of zero nothing is learnt
                self._take(name, error)
        return self._rounded(inverses)

    def _take(self, name: str, error: float) -> None:
        was_over = name in self.errors and name not in self.blocks
        small = error <= self._tolerance / (2 if was_over else 1)
        self.errors[name] = error
        (self.blocks.add if small else self.blocks.discard)(name)
        round_products(self._entries[name].buffers, small)

    def _rounded(self, inverses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverses, with those of ``blocks`` in bfloat16."""
        low = {key for name in self.blocks for key in _inverses(self._blocks[name])}
        return {key: v.bfloat16() if key in low else v for key, v in inverses.items()}

    def state(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "errors": dict(self.errors),
            "blocks": sorted(self.blocks),
            "pending": self._pending,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restores ``state``; of blocks that may not be rounded here, nothing."""
        errors = state.get("errors", {}).items()
        self.errors = {name: error for name, error in errors if name in self._blocks}
        self.blocks = self._blocks.keys() & set(state.get("blocks", ()))
        self._pending = state.get("pending", False)
        for name, entry in self._entries.items():
            round_products(entry.buffers, name in self.blocks)


def rounding_error(
    factors: Sequence[Tensor], inverses: Sequence[Tensor], V: Tensor, damping: Tensor
) -> Tensor:
    """[], the relative error of G_i V A_i by products in bfloat16, in the norm of the damped block.

    Rounding A and G changes the update by F^-1 W to first order, with W the change of F times it.

    Args:
        factors: (A, G), undamped.
        inverses: (A_i, G_i) of the damped factors.
        V: [..., g, a]; NaN results where it is zero.
        damping: [], lambda.
    """
    (A, G), (A_i, G_i) = factors, inverses
    V, gamma = V.to(A_i.dtype), damping.sqrt()
    pi = trace_ratio(mean_eigenvalue(A), mean_eigenvalue(G))
    A_damped, G_damped = damped(A, pi * gamma), damped(G, gamma / pi)
    U = G_i @ V @ A_i
    E = (G_i.bfloat16() @ V.bfloat16() @ A_i.bfloat16()).to(U.dtype) - U
    W = G_damped @ U @ _lost(A) + _lost(G) @ U @ A_damped
    squared = (E * (G_damped @ E @ A_damped)).sum() + (W * (G_i @ W @ A_i)).sum()
    return (squared / (U * V).sum()).abs().sqrt()


def _lost(matrix: Tensor) -> Tensor:
    """What rounding changes."""
    return matrix.bfloat16().to(matrix.dtype) - matrix


def _inverses(block: CurvatureBlock) -> tuple[str, ...]:
    return FORMS[block.approximation].inverses(block)


def _suits(block: CurvatureBlock, entry: Entry) -> bool:
    """Whether the block is a product of two whole matrices that are large enough."""
    if block.approximation != "kronecker" or not block.tapped:
        return False
    if any(spec.diagonal or spec.cut or spec.role == "count" for spec in block.factors):
        return False
    if entry.like.dtype == torch.float64:
        raise UnknownOptionError(
            "bfloat16_error would keep 8 of the 53 bits of float64: give 0, or parameters in "
            "float32"
        )
    real = not any(buffer.is_complex() for buffer in entry.buffers)
    return real and max(spec.shape[-1] for spec in block.factors) >= SMALLEST
