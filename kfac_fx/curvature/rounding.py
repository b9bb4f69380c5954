"""Which blocks multiply in bfloat16: those whose updates that hardly changes, as measured."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kfac_fx.codegen.forms import FORMS
from kfac_fx.config import within
from kfac_fx.curvature.averages import Averages, Entry
from kfac_fx.curvature.block_vectors import gathered
from kfac_fx.errors import UnknownOptionError
from kfac_fx.ir import CurvatureBlock
from kfac_fx.linalg.damping import damped, factored_amounts, mean_eigenvalue
from kfac_fx.ops import round_products

log = logging.getLogger("kfac_fx")

SMALLEST = 64
"""Of a block with smaller sides, casts cost what products save."""

LOST = 2**-7
"""Of the root of the mean squared eigenvalue of a factor, what rounding its entries may take from
an eigenvalue: 2^-9 of each entry, as noise of norm 4 / sqrt(d) of that.
"""

MOST_STRAIN = 0.5 / LOST
"""Of that root over the damping, where the damped factor stays positive whatever was lost."""


class Rounding:
    """Blocks whose statistics, and whose inverses times gradients, are products in bfloat16.

    These are Kronecker blocks without recorded couplings, with factored damping and the same
    positions at every call, whose update U changes by no more than the tolerance, relative and in
    the norm of the damped block F: |U' - U|_F / |U|_F, by rounding the gradient and the inverses,
    and A and G. Along such a U' the quadratic model falls by 1 - tolerance^2 of what it does along
    U.

    It is measured on the gradient that comes after refreshes 1, 2, 4, 8 and every 16th, and where
    factors have grown to twice as much over the damping. A block that was over the tolerance comes
    back at half of it. One whose damped factors may lose their definiteness leaves at once, and
    what rounding may have taken from the eigenvalues of its averages is added to them.

    Args:
        tolerance: 0 for no blocks.

    Attributes:
        errors: block -> what was measured last, of the blocks that may be rounded; infinite where
            the block had to leave.
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
        if tolerance and not self._blocks:
            log.warning("bfloat16_error: there is no Kronecker block without couplings to round")
        self._strains: dict[str, float] = {}
        self._pending = self._grown = False

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters of blocks that may be rounded."""
        return tuple(name for block in self._blocks.values() for name in block.parameters)

    @torch.no_grad()
    def before_refresh(self, damping: Tensor) -> None:
        """Looks at how the factors of ``blocks`` compare with the damping, [], of a refresh."""
        names = sorted(self.blocks)
        found = [_strain(self._entries[name].factors, damping) for name in names]
        strains = torch.stack(found).tolist() if found else ()
        for name, strain in zip(names, strains, strict=True):
            if not strain <= MOST_STRAIN:
                self._take(name, math.inf, strain)
                _make_up(self._entries[name])
            elif strain > 2 * self._strains[name]:
                self._grown = True

    def of_refresh(self, inverses: dict[str, Tensor], count: int) -> dict[str, Tensor]:
        """What a refresh made, as it is kept: in full precision where it is to be measured.

        Args:
            count: of refreshes so far.
        """
        due = self._grown or not count & (count - 1) or count % 16 == 0
        self._pending, self._grown = due and bool(self._blocks), False
        return inverses if self._pending else self._rounded(inverses)

    @torch.no_grad()
    def of_apply(
        self, inverses: dict[str, Tensor], gradients: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The inverses for these gradients, by parameter name, on which the error is measured."""
        if not self._pending:
            return inverses
        found = {
            name: self._measured(name, inverses, gradients)
            for name in self._blocks
            if self._entries[name].recorded
        }
        numbers = torch.stack(list(found.values())).tolist() if found else ()
        for name, (error, strain) in zip(found, numbers, strict=True):
            if not math.isnan(error):  # a gradient that is zero, or not finite, tells nothing
                self._take(name, error, strain)
                self._pending = False
        return inverses if self._pending else self._rounded(inverses)

    def _measured(
        self, name: str, inverses: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
    ) -> Tensor:
        """[2]: the error and the strain of a block."""
        block, factors = self._blocks[name], self._entries[name].factors
        own, damping = [inverses[key] for key in _inverses(block)], inverses["damping"]
        error = rounding_error(factors, own, gathered(block, gradients), damping)
        return torch.stack([error, _strain(factors, damping)])

    def _take(self, name: str, error: float, strain: float) -> None:
        was_over = name in self.errors and name not in self.blocks
        part = 0.5 if was_over else 1.0
        small = error <= part * self._tolerance and strain <= part * MOST_STRAIN
        self.errors[name], self._strains[name] = error, strain
        if small:
            self.blocks.add(name)
        else:
            self.blocks.discard(name)
        round_products(self._entries[name].buffers, small)

    def _rounded(self, inverses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverses, with those of ``blocks`` in bfloat16."""
        low = {key for name in self.blocks for key in _inverses(self._blocks[name])}
        return {key: v.bfloat16() if key in low else v for key, v in inverses.items()}

    def of_state(self, inverses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Inverses of a state: of what is not rounded here, or is yet to be measured, wide."""
        wide = {key: v.float() if v.dtype == torch.bfloat16 else v for key, v in inverses.items()}
        return wide if self._pending else self._rounded(wide)

    def state(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "errors": dict(self.errors),
            "strains": dict(self._strains),
            "blocks": sorted(self.blocks),
            "pending": self._pending,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restores ``state``; blocks that may not be rounded here, or so much, are not."""
        errors, strains = (state.get(key, {}).items() for key in ("errors", "strains"))
        self.errors = {name: error for name, error in errors if name in self._blocks}
        self._strains = {name: strain for name, strain in strains if name in self._blocks}
        rounded = self._blocks.keys() & set(state.get("blocks", ()))
        self.blocks = {name for name in rounded if self.errors[name] <= self._tolerance}
        self._pending = state.get("pending", False) and bool(self._blocks)
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
    (A, G), (A_i, G_i), V = factors, inverses, V.to(inverses[0].dtype)
    A_damped, G_damped = map(damped, factors, _amounts(factors, damping))
    U = G_i @ V @ A_i
    E = (G_i.bfloat16() @ V.bfloat16() @ A_i.bfloat16()).to(U.dtype) - U
    W = G_damped @ U @ _lost(A) + _lost(G) @ U @ A_damped
    squared = (E * (G_damped @ E @ A_damped)).sum() + (W * (G_i @ W @ A_i)).sum()
    return (squared / (U * V).sum()).abs().sqrt()


def _amounts(factors: Sequence[Tensor], damping: Tensor) -> tuple[Tensor, Tensor]:
    """What A and G are damped with."""
    A, G = factors
    return factored_amounts(mean_eigenvalue(A), mean_eigenvalue(G), damping.sqrt())


def _strain(factors: Sequence[Tensor], damping: Tensor) -> Tensor:
    """[]: the larger root of a mean squared eigenvalue, over what damps it."""
    pairs = zip(map(_scale, factors), _amounts(factors, damping), strict=True)
    return torch.stack([(scale / amount).max() for scale, amount in pairs]).max()


def _scale(matrix: Tensor) -> Tensor:
    """[...]: the root of the mean squared eigenvalue."""
    result: Tensor = torch.linalg.matrix_norm(matrix) / matrix.shape[-1] ** 0.5
    return result


def _make_up(entry: Entry) -> None:
    """Adds to the eigenvalues of a block's averages what rounding may have taken."""
    for average in entry.stored:
        value = entry.storage.read(average)
        entry.storage.write(average, damped(value, LOST * _scale(value)))


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
