"""Conditionals of coupled blocks as linear algebra, as the program leaves them or takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kfac_fx.codegen.approximations.base import BlockSpectrum
from kfac_fx.errors import OperatorError
from kfac_fx.linalg.conditional import conditional_scale, conditional_side
from kfac_fx.linalg.positive import floored_whitener
from kfac_fx.linalg.spectral import SideMatrix, Spectral

Sides = tuple[SideMatrix, SideMatrix]
"""A and G of a block, damped."""


class Conditional(NamedTuple):
    """A child given its parent: Sigma, and Psi = Psi^A (x) Psi^G."""

    sigma: Spectral
    psi: tuple[Tensor, Tensor]


def conditional(child: Sides, parent: Sides, cross: Sequence[Tensor]) -> Conditional | None:
    """Return a child's conditional (docs/explanation/mathematics.md, section 7).

    Args:
        child, parent: their damped A and G.
        cross: A and G of the pair, child by parent.

    Returns:
        None where Sigma is not positive: there the program leaves the coupling out, too.
    """
    # Side by side: A and G of a pair have conditionals of their own, and only the scale joins them.
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
    forward, back = (
        (SideMatrix((J_A,)), SideMatrix((J_G,))),
        (SideMatrix((K_A,)), SideMatrix((K_G,))),
    )
    return Conditional(Spectral(torch.reciprocal(scale), forward, back), (psi_A, psi_G))


def conditionals(
    parent: Mapping[str, str],
    blocks: Mapping[str, BlockSpectrum],
    cross: Mapping[tuple[str, str], Sequence[Tensor]],
) -> dict[str, Conditional]:
    """Return the conditional of every child where it is positive.

    Args:
        parent: child -> parent.
        blocks: the damped blocks.
        cross: A and G by (child, parent), child by parent.

    Raises:
        OperatorError: a coupled block has no damped sides to take a conditional of.
    """
    found = {}
    for child, above in parent.items():
        own, given = blocks[child].sides, blocks[above].sides
        if own is None or given is None:
            raise OperatorError(f"block {child}: no operator is known of its coupling to {above}")
        if (made := conditional(own, given, cross[child, above])) is not None:
            found[child] = made
    return found
