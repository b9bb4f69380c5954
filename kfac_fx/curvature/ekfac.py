"""Eigenvalues of Kronecker blocks by second moments in their bases (George et al. 2018, EKFAC).

The bases are those of the last refresh. They start with the Kronecker eigenvalues; when the bases
change, S becomes the diagonal, in the new ones, of what it was in the old ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kfac_fx.curvature.averages import Averages, Entry
from kfac_fx.ir import CurvatureGraph
from kfac_fx.linalg.eigen import moment_scale
from kfac_fx.ops import moment_buffers


@dataclass
class _Block:
    """Of one block: where S is averaged, its factors, what the taps read, names in the program."""

    slot: str
    entry: Entry
    factors: Entry
    bases: tuple[Tensor, Tensor]

    def names(self) -> tuple[str, str]:
        return f"A_basis_{self.slot}", f"G_basis_{self.slot}"


class Moments:
    """All blocks whose eigenvalues are estimated.

    Attributes:
        blocks: names.
    """

    def __init__(self, net: nn.Module, curvature: CurvatureGraph, averages: Averages) -> None:
        self._blocks = {}
        for moment in curvature.moments if averages.moments else ():
            block = curvature.blocks[moment.block]
            entry, factors = averages.moments[moment.block], averages.blocks[moment.block]
            bases = moment_buffers(net, moment)[:2]
            self._blocks[block.name] = _Block(block.slot, entry, factors, bases)
        self._based = False

    @property
    def blocks(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(self._blocks)

    def spectrum(self, name: str) -> tuple[Tensor, Tensor, Tensor] | None:
        """(U_A, U_G, S) of a block; None where there are no bases yet."""
        found = self._blocks.get(name)
        if found is None or not self._based:
            return None
        return (*found.bases, found.entry.averages[0])

    @torch.no_grad()
    def rebase(self, inverses: Mapping[str, Tensor]) -> None:
        """Takes the bases of a refresh."""
        for block in self._blocks.values():
            new = [inverses[name] for name in block.names()]
            (S,), (stored,) = block.entry.averages, block.entry.stored
            if self._based:
                to_A, to_G = (
                    (U.mT @ old).square() for U, old in zip(new, block.bases, strict=True)
                )
                block.entry.storage.write(stored, to_G @ S @ to_A.mT)
            else:
                s_A, s_G = (
                    (U * (factor @ U)).sum(0).clamp_min(0.0)
                    for U, factor in zip(new, block.factors.factors, strict=True)
                )
                block.entry.storage.write(stored, torch.outer(s_G, s_A))
            self._take(block, inverses)
        self._based = True

    @torch.no_grad()
    def scales(self, damping: Tensor) -> dict[str, Tensor]:
        """1 / (S + lambda) by name, in place of the Kronecker eigenvalues' own."""
        return {
            f"scale_{block.slot}": moment_scale(block.entry.averages[0], damping)
            for block in self._blocks.values()
        }

    def restore(self, inverses: Mapping[str, Tensor]) -> None:
        """The bases of inverses that were loaded, if there are any."""
        self._based = bool(inverses)
        for block in self._blocks.values() if inverses else ():
            self._take(block, inverses)

    def _take(self, block: _Block, inverses: Mapping[str, Tensor]) -> None:
        for old, name in zip(block.bases, block.names(), strict=True):
            old.copy_(inverses[name])
