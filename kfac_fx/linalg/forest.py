"""Products with Xi = I - Psi of a forest of blocks, and with its inverse.

The mathematics is that of docs/explanation/mathematics.md, section 7.

(Psi v)_i = Psi_i v_p for a child i with the parent p, and zero for a root. Fhat^-1 = Xi^T Lambda Xi
gives Fhat = Xi^-1 Lambda^-1 Xi^-T: Xi^-1 goes from the roots to the leaves, Xi^-T back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

Blocks = dict[str, Tensor]
"""The array [..., g, a] of each block, by its name."""


@dataclass(frozen=True)
class Forest:
    """The parents, and Psi_i = Psi^A_i (x) Psi^G_i of each child.

    Attributes:
        parent: child -> parent.
        psi: child -> (Psi^A, Psi^G), child's dimension by parent's.
    """

    parent: Mapping[str, str]
    psi: Mapping[str, tuple[Tensor, Tensor]]

    def _downwards(self) -> list[str]:
        """Return the children, each after its parent."""

        def depth(name: str) -> int:
            return 1 + depth(self.parent[name]) if name in self.parent else 0

        return sorted(self.parent, key=depth)

    def _given(self, child: str, V: Tensor) -> Tensor:
        """Return Psi_i times what the parent has."""
        A, G = self.psi[child]
        return G @ V @ A.mT

    def _back(self, child: str, V: Tensor) -> Tensor:
        """Return Psi_i^T times what the child has."""
        A, G = self.psi[child]
        return G.mT @ V @ A

    def product(self, v: Blocks) -> Blocks:
        """Return Xi v."""
        return v | {i: v[i] - self._given(i, v[p]) for i, p in self.parent.items()}

    def transposed_product(self, v: Blocks) -> Blocks:
        """Return Xi^T v."""
        # Xi is one step down the forest, so products read v alone and their order does not matter.
        result = dict(v)
        for i, p in self.parent.items():
            result[p] = result[p] - self._back(i, v[i])
        return result

    def solution(self, v: Blocks) -> Blocks:
        """Return Xi^-1 v."""
        # Solutions go on from results: from the roots down here, from the leaves up below.
        result = dict(v)
        for i in self._downwards():
            result[i] = v[i] + self._given(i, result[self.parent[i]])
        return result

    def transposed_solution(self, v: Blocks) -> Blocks:
        """Return Xi^-T v."""
        result = dict(v)
        for i in reversed(self._downwards()):
            p = self.parent[i]
            result[p] = result[p] + self._back(i, result[i])
        return result
