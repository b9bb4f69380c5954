"""Eigenvalues of Kronecker blocks by second moments in their bases (George et al. 2018, EKFAC).

The bases are those of the last refresh. They start with the Kronecker eigenvalues; when the bases
change, S becomes the diagonal, in the new ones, of what it was in the old ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kfac_fx.codegen.approximations.base import BlockSpectrum, InverseKey
from kfac_fx.codegen.refresh_module import Refreshed
from kfac_fx.curvature.estimate import Average, Averages, Estimate
from kfac_fx.ir.curvature_graph import CurvatureBlock, Moment
from kfac_fx.linalg.kronecker import moment_scale
from kfac_fx.linalg.spectral import SideMatrix, Spectral
from kfac_fx.ops.net_buffers import moment_buffers


class Eigenbasis(NamedTuple):
    """A block's bases U_A [a, a] and U_G [g, g], and its second moments S [g, a] in them."""

    U_A: Tensor
    U_G: Tensor
    S: Tensor

    def spectrum(self, damping: float, dtype: torch.dtype) -> BlockSpectrum:
        """Return (U_A (x) U_G) diag(S + lambda) (U_A (x) U_G)^T, in another precision."""
        U_A, U_G, S = (value.to(dtype, copy=True) for value in self)
        sides = SideMatrix((U_A,)), SideMatrix((U_G,))
        d = S + damping
        return BlockSpectrum(Spectral(d, sides, sides), U_G.square() @ d @ U_A.square().mT)


class _Estimated(NamedTuple):
    """One block: the average of S, its factors, and what the taps project on."""

    slot: str
    moment: Average
    factors: Averages
    U_A: Tensor
    U_G: Tensor

    def bases(self, refreshed: Refreshed) -> tuple[Tensor, Tensor]:
        """Return the bases that a refresh made."""
        found = refreshed.inverses
        A, G = InverseKey(self.slot, "basis", "A"), InverseKey(self.slot, "basis", "G")
        return found[A], found[G]

    def take(self, refreshed: Refreshed) -> None:
        """Let the taps project on the bases of a refresh from now on."""
        U_A, U_G = self.bases(refreshed)
        self.U_A.copy_(U_A)
        self.U_G.copy_(U_G)


class Moments:
    """All blocks whose eigenvalues are estimated.

    Args:
        net: holds the buffers of the bases that taps project on.
        blocks: the blocks by name.
        moments: the moments of the blocks that are estimated.
        estimate: has the averages of their factors and of S.
    """

    def __init__(
        self,
        net: nn.Module,
        blocks: Mapping[str, CurvatureBlock],
        moments: Sequence[Moment],
        estimate: Estimate,
    ) -> None:
        self._blocks: dict[str, _Estimated] = {}
        for moment in moments:
            name = moment.block
            U_A, U_G, _ = moment_buffers(net, moment)
            S = estimate.moments[name].all[0]
            factors = estimate.blocks[name]
            self._blocks[name] = _Estimated(blocks[name].slot, S, factors, U_A, U_G)
        # Whether the buffers hold bases; until the first refresh they are identities.
        self._based = False

    @property
    def blocks(self) -> tuple[str, ...]:
        """Return the blocks' names."""
        return tuple(self._blocks)

    def eigenbasis(self, name: str) -> Eigenbasis | None:
        """Return a block's bases and moments; None where there are no bases yet."""
        found = self._blocks.get(name)
        if found is None or not self._based:
            return None
        return Eigenbasis(found.U_A, found.U_G, found.moment.read())

    def copied(self) -> dict[str, Eigenbasis]:
        """Return the bases and moments of all blocks in memory of their own."""
        found = {name: self.eigenbasis(name) for name in self._blocks}
        return {n: Eigenbasis(*(t.clone() for t in b)) for n, b in found.items() if b is not None}

    @torch.no_grad()
    def rebase(self, refreshed: Refreshed) -> Refreshed:
        """Take the bases of a refresh, and return it with the scales of the moments in them."""
        for block in self._blocks.values():
            U_A, U_G = block.bases(refreshed)
            if self._based:
                # Squares of the entries of a rotation carry a diagonal to the diagonal of the
                # rotated matrix; what leaves the diagonal is lost, as in every EKFAC.
                to_A, to_G = (U_A.mT @ block.U_A).square(), (U_G.mT @ block.U_G).square()
                block.moment.write(to_G @ block.moment.read() @ to_A.mT)
            else:
                # Until there are moments, S is that of a Kronecker product: of its diagonals.
                A, G = block.factors.read()
                s_A = (U_A * (A @ U_A)).sum(0).clamp_min(0.0)
                s_G = (U_G * (G @ U_G)).sum(0).clamp_min(0.0)
                block.moment.write(torch.outer(s_G, s_A))
            block.take(refreshed)
        self._based = True
        return self.scaled(refreshed)

    @torch.no_grad()
    def scaled(self, refreshed: Refreshed) -> Refreshed:
        """Return the inverses with 1 / (S + lambda) in place of their scales.

        The bases are kept until the next refresh, but the moments are as new as the last fold: that
        is what EKFAC gains over exact damping with inverses of the same age.
        """
        scales = {
            InverseKey(block.slot, "scale"): moment_scale(block.moment.read(), refreshed.damping)
            for block in self._blocks.values()
        }
        return replace(refreshed, inverses={**refreshed.inverses, **scales})

    def restore(self, refreshed: Refreshed | None) -> None:
        """Take the bases of inverses that were loaded, if there are any."""
        self._based = refreshed is not None
        if refreshed is not None:
            for block in self._blocks.values():
                block.take(refreshed)
