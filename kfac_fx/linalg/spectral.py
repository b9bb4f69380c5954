"""Blocks that are diagonal in known coordinates: products, solutions, roots, determinants.

F = (J_A (x) J_G) diag(d) (J_A (x) J_G)^T. With K = J^-T on either side F^-1 is the same with K and
1/d, and S = (K_A (x) K_G) diag(d)^-1/2 has S S^T = F^-1. The coordinates are eigenvectors, or make
one of two matrices the identity and the other diagonal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_fx.linalg.positive import raised


@dataclass(frozen=True)
class SideMatrix:
    """A square matrix that acts on one side of a block.

    Attributes:
        parts: one matrix [..., n, n], or several: sub-blocks along the diagonal.
        diagonal: whether the one part is a diagonal [..., n].
    """

    parts: tuple[Tensor, ...]
    diagonal: bool = False

    @classmethod
    def kept(cls, factor: Tensor, *, diagonal: bool, cut: int) -> SideMatrix:
        """Return the side that a factor is, without the zeros that fill up its sub-blocks.

        Args:
            factor: [..., n, n], a diagonal [..., n], or sub-blocks [k, b, b].
            diagonal: whether it is a diagonal.
            cut: n where the factor is kept as sub-blocks, else 0.
        """
        if not cut:
            return cls((factor,), diagonal)
        # Sub-blocks that only fill up are left out: their zeros would be eigenvalues of the block.
        size = factor.shape[-1]
        left = [min(size, cut - size * index) for index in range(len(factor))]
        parts = [part[:n, :n] for part, n in zip(factor, left, strict=True) if n > 0]
        return cls(tuple(parts))

    def times(self, V: Tensor) -> Tensor:
        """Return M V, of V [..., n, m]."""
        if self.diagonal:
            return self.parts[0].unsqueeze(-1) * V
        if len(self.parts) == 1:
            return self.parts[0] @ V
        pieces = V.split([part.shape[-1] for part in self.parts], -2)
        return torch.cat([M @ piece for M, piece in zip(self.parts, pieces, strict=True)], -2)

    def each(self, function: Callable[[Tensor], Tensor]) -> SideMatrix:
        """Return the side with a function applied to each of its parts."""
        return SideMatrix(tuple(map(function, self.parts)), self.diagonal)

    @property
    def mT(self) -> SideMatrix:
        """Return the transpose."""
        return self if self.diagonal else self.each(lambda part: part.mT)

    def entries(self) -> Tensor:
        """Return the diagonal, [..., n]."""
        if self.diagonal:
            return self.parts[0]
        return torch.cat([torch.diagonal(part, 0, -2, -1) for part in self.parts], -1)

    def log_determinant(self) -> Tensor:
        """Return log |det M|, summed over leading dimensions."""
        if self.diagonal:
            return self.parts[0].abs().log().sum()
        return torch.stack([torch.linalg.slogdet(part)[1].sum() for part in self.parts]).sum()

    def as_matrices(self, like: SideMatrix) -> SideMatrix:
        """Return the side; a diagonal as matrices that are cut as ``like`` is, unless both are."""
        if not self.diagonal or like.diagonal:
            return self
        pieces = self.parts[0].split([part.shape[-1] for part in like.parts], -1)
        return SideMatrix(tuple(map(torch.diag_embed, pieces)))


def kept_pair(
    factors: tuple[Tensor, Tensor], diagonal: tuple[bool, bool], cut: tuple[int, int]
) -> tuple[SideMatrix, SideMatrix]:
    """Return the sides (A, G) that two factors are; see ``SideMatrix.kept``."""
    A, G = factors
    return (
        SideMatrix.kept(A, diagonal=diagonal[0], cut=cut[0]),
        SideMatrix.kept(G, diagonal=diagonal[1], cut=cut[1]),
    )


def outer_diagonal(sides: tuple[SideMatrix, SideMatrix]) -> Tensor:
    """Return the diagonal of A (x) G as [..., g, a]."""
    A, G = sides
    return G.entries().unsqueeze(-1) * A.entries().unsqueeze(-2)


@dataclass(frozen=True)
class Spectral:
    """A block that is diagonal in known coordinates, or its inverse; see the module.

    Attributes:
        d: its eigenvalues in the coordinates, [..., g, a], all above zero.
        J: the coordinates of the block, of A and of G.
        K: those of its inverse, J^-T; the same as J where it is orthonormal.
    """

    d: Tensor
    J: tuple[SideMatrix, SideMatrix]
    K: tuple[SideMatrix, SideMatrix]

    def product(self, V: Tensor) -> Tensor:
        """Return F vec(V), of V [..., g, a]."""
        return _from(self.J, self.d * _to(self.J, V))

    def solution(self, V: Tensor) -> Tensor:
        """Return F^-1 vec(V)."""
        return _from(self.K, _to(self.K, V) / self.d)

    def root_solution(self, V: Tensor) -> Tensor:
        """Return S vec(V) with S S^T = F^-1."""
        return _from(self.K, V * self.d.rsqrt())

    def log_determinant(self) -> Tensor:
        """Return log det F."""
        J_A, J_G = self.J
        g, a = self.d.shape[-2:]
        both = g * J_A.log_determinant() + a * J_G.log_determinant()
        return self.d.log().sum() + 2 * both


def _to(sides: tuple[SideMatrix, SideMatrix], V: Tensor) -> Tensor:
    """Return (M_A (x) M_G)^T vec(V), M_G^T V M_A."""
    A, G = sides
    return A.mT.times(G.mT.times(V).mT).mT


def _from(sides: tuple[SideMatrix, SideMatrix], V: Tensor) -> Tensor:
    """Return (M_A (x) M_G) vec(V), M_G V M_A^T."""
    A, G = sides
    return A.times(G.times(V).mT).mT


def eigenvectors(matrix: SideMatrix) -> tuple[Tensor, SideMatrix]:
    """Return eigenvalues [..., n], at least zero, and orthonormal eigenvectors of a side."""
    if matrix.diagonal:
        return matrix.parts[0].clamp_min(0.0), matrix.each(torch.ones_like)
    spectra = [torch.linalg.eigh(part) for part in matrix.parts]
    values = torch.cat([spectrum[0] for spectrum in spectra], -1).clamp_min(0.0)
    return values, SideMatrix(tuple(spectrum[1] for spectrum in spectra))


def diagonalised(A: SideMatrix, G: SideMatrix, added: Tensor | float = 0.0) -> Spectral:
    """Return A (x) G + added I in the eigenvectors of both.

    Args:
        A, G: positive sides.
        added: lambda. Without it eigenvalues are raised to rounding level, as nothing else keeps
            the inverse finite.
    """
    # Eigenvectors once: from then on products, solutions and roots are products with them.
    s_A, U_A = eigenvectors(A)
    s_G, U_G = eigenvectors(G)
    if isinstance(added, float) and added == 0.0:
        s_A, s_G = raised(s_A), raised(s_G)
    d = s_G.unsqueeze(-1) * s_A.unsqueeze(-2) + added
    return Spectral(d, (U_A, U_G), (U_A, U_G))


def summed(first: tuple[SideMatrix, SideMatrix], second: tuple[SideMatrix, SideMatrix]) -> Spectral:
    """Return A (x) G + A_2 (x) G_2, the second pair positive, in coordinates common to both."""
    (s_A, J_A, K_A), (s_G, J_G, K_G) = (
        _common(other, plain) for plain, other in zip(first, second, strict=True)
    )
    return Spectral(1.0 + s_G.unsqueeze(-1) * s_A, (J_A, J_G), (K_A, K_G))


def _common(one: SideMatrix, other: SideMatrix) -> tuple[Tensor, SideMatrix, SideMatrix]:
    """Return (s, J, K) with one = J J^T, other = J diag(s) J^T and K = J^-T."""
    one, other = one.as_matrices(other), other.as_matrices(one)
    if one.diagonal:  # and so is the other, after the line above
        scale = one.each(lambda part: raised(part).sqrt())
        return other.parts[0] / one.parts[0], scale, scale.each(torch.reciprocal)
    found = [
        common_coordinates(one_part, other_part)
        for one_part, other_part in zip(one.parts, other.parts, strict=True)
    ]
    s, J, K = zip(*found, strict=True)
    return torch.cat(s, -1), SideMatrix(J), SideMatrix(K)


def common_coordinates(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (s, J, K) as above, of two matrices [n, n]; s is at least zero."""
    # Whiten ``one``, then rotate: in white coordinates every rotation keeps it the identity.
    values, U = torch.linalg.eigh(one)
    length = raised(values).sqrt()
    white = U / length
    s, E = torch.linalg.eigh(white.mT @ other @ white)
    return s.clamp_min(0.0), (U * length) @ E, white @ E
