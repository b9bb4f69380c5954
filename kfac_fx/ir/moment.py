"""Blocks whose eigenvalues are estimated of their own (EKFAC)."""

from __future__ import annotations

from dataclasses import dataclass

from kfac_fx.ir.use import FactorSpec


@dataclass(frozen=True)
class Moment:
    """A Kronecker block's second moments of the per-case gradient, in the bases of A and G.

    Attributes:
        block: name of the block.
        slot: as an identifier.
        factors: S [d_out, d_in].
    """

    block: str
    slot: str
    factors: tuple[FactorSpec]

    tapped = True

    @property
    def name(self) -> str:
        """For logs, and as a key beside the blocks' own names."""
        return f"moments of {self.block}"
