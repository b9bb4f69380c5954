"""From averages to blocks that are diagonal in known coordinates, damped as the program does it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kfac_fx.errors import OperatorError
from kfac_fx.ir import CurvatureBlock, FactorSpec
from kfac_fx.linalg.conditional import conditional_scale, conditional_side
from kfac_fx.linalg.damping import damped, factored_amounts, mean_eigenvalue
from kfac_fx.linalg.positive import floored_whitener
from kfac_fx.linalg.spectral import Side, Spectral, diagonalised, summed

Pair = tuple[Side, Side]


class BlockSpectra(NamedTuple):
    """A damped diagonal block of Fhat.

    Attributes:
        spectral: the block, as [..., g, a]; covariances have a = 1.
        diagonal: its diagonal in the same shape.
        sides: the damped A and G of a block with factored damping.
    """

    spectral: Spectral
    diagonal: Tensor
    sides: Pair | None = None


def block_spectra(
    block: CurvatureBlock, factors: Sequence[Tensor], damping: float, tikhonov: str
) -> BlockSpectra:
    """The block of averages ``factors``, counts left out.

    Raises:
        OperatorError: the block's approximation is unknown here.
    """
    form = block.approximation
    if form in ("full", "pairs", "diagonal"):
        return _covariance(form, factors[0], damping)
    if form not in ("kronecker", "kronecker_sum"):
        raise OperatorError(f"block {block.name}: no operator is known for {form!r} blocks")
    specs = [spec for spec in block.factors if spec.role != "count"]
    first = _sides(factors[:2], specs[:2])
    if form == "kronecker_sum":
        second = _damped(factors[2:], specs[2:], damping)
        return BlockSpectra(summed(first, second), _diagonal(first) + _diagonal(second))
    if tikhonov == "exact":
        return BlockSpectra(diagonalised(*first, damping), _diagonal(first) + damping)
    pair = _damped(factors, specs, damping)
    return BlockSpectra(diagonalised(*pair), _diagonal(pair), pair)


def in_bases(U_A: Tensor, U_G: Tensor, d: Tensor) -> BlockSpectra:
    """(U_A (x) U_G) diag(d) (U_A (x) U_G)^T with orthonormal bases, d [g, a]."""
    sides = Side((U_A,)), Side((U_G,))
    return BlockSpectra(Spectral(d, sides, sides), U_G.square() @ d @ U_A.square().mT)


def _covariance(form: str, C: Tensor, damping: float) -> BlockSpectra:
    one = Side((C.new_ones(1),), diagonal=True)
    side = Side((C,), diagonal=form == "diagonal")
    return BlockSpectra(diagonalised(one, side, damping), side.entries().unsqueeze(-1) + damping)


def _diagonal(pair: Pair) -> Tensor:
    """Of A (x) G, [..., g, a]."""
    A, G = pair
    return G.entries().unsqueeze(-1) * A.entries().unsqueeze(-2)


def _sides(factors: Sequence[Tensor], specs: Sequence[FactorSpec]) -> Pair:
    """(A, G) as they are kept, without what fills up sub-blocks."""
    A, G = (_side(factor, spec) for factor, spec in zip(factors, specs, strict=True))
    return A, G


def _side(factor: Tensor, spec: FactorSpec) -> Side:
    if not spec.cut:
        return Side((factor,), spec.diagonal)
    size = factor.shape[-1]
    left = [min(size, spec.cut - size * index) for index in range(len(factor))]
    return Side(tuple(part[:n, :n] for part, n in zip(factor, left, strict=True) if n > 0))


def _damped(factors: Sequence[Tensor], specs: Sequence[FactorSpec], damping: float) -> Pair:
    """(A + pi gamma I, G + gamma / pi I)."""
    a, g = (
        mean_eigenvalue(factor, diagonal=spec.diagonal, cut=spec.cut)
        for factor, spec in zip(factors, specs, strict=True)
    )
    first, second = factored_amounts(a, g, damping**0.5)
    A, G = _sides(factors, specs)
    return _plus(A, first), _plus(G, second)


def _plus(side: Side, amount: Tensor) -> Side:
    if side.diagonal:
        return side.each(lambda part: part + amount.unsqueeze(-1))
    return side.each(lambda part: damped(part, amount))


class Conditional(NamedTuple):
    """A child given its parent: Sigma, and Psi = Psi^A (x) Psi^G."""

    sigma: Spectral
    psi: tuple[Tensor, Tensor]


def conditional(child: Pair, parent: Pair, cross: Sequence[Tensor]) -> Conditional | None:
    """Return Sigma and Psi of docs/explanation/mathematics.md, section 7.

    It is None where Sigma is not positive; the program leaves the coupling out there.
    """
    found = []
    for own, above, between in zip(child, parent, cross, strict=True):
        (matrix,), (other,) = own.parts, above.parts
        W, W_parent = floored_whitener(matrix)[0], floored_whitener(other)[0]
        K, s, _ = conditional_side(W, between, W_parent, from_child=True)
        # Not matrix K: factors of low precision need not be symmetric to the last place.
        J = torch.linalg.inv(K).mT
        found.append((s, K, J, between @ W_parent.mT @ W_parent))
    (s_A, K_A, J_A, psi_A), (s_G, K_G, J_G, psi_G) = found
    scale, _, indefinite = conditional_scale(s_A, s_G)
    if indefinite:
        return None
    forward, back = (Side((J_A,)), Side((J_G,))), (Side((K_A,)), Side((K_G,)))
    return Conditional(Spectral(torch.reciprocal(scale), forward, back), (psi_A, psi_G))


def conditionals(
    parent: Mapping[str, str],
    blocks: Mapping[str, BlockSpectra],
    cross: Mapping[tuple[str, str], Sequence[Tensor]],
) -> dict[str, Conditional]:
    """Of every child whose conditional is positive."""
    found = {}
    for child, above in parent.items():
        own, given = blocks[child].sides, blocks[above].sides
        if own is None or given is None:
            raise OperatorError(f"block {child}: no operator is known of its coupling to {above}")
        if (made := conditional(own, given, cross[child, above])) is not None:
            found[child] = made
    return found
