"""The forest of couplings that statistics choose: most mutual information (Chow & Liu 1968)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from kfac_fx.curvature.estimate import Estimate
from kfac_fx.ir.coupling import Coupling, couplings_of
from kfac_fx.ir.curvature_graph import CurvatureGraph
from kfac_fx.linalg.conditional import correlation, mutual_information
from kfac_fx.linalg.positive import damped_factors, floored_whitener

ADVANTAGE = 1.01
"""How much more information another forest must have: below, a new program does not pay."""


@torch.no_grad()
def mutual_informations(estimate: Estimate, damping: float) -> dict[tuple[str, str], float]:
    """Return the mutual information of each recorded pair (earlier, later), in nats.

    Both blocks have factored Tikhonov damping (docs/explanation/mathematics.md, section 7): without
    it, pairs of almost singular blocks would look infinitely informative.

    Args:
        estimate: the running averages.
        damping: lambda.
    """
    names = {name for pair in estimate.pairs for name in pair}
    white = {name: whiteners(estimate.blocks[name].read(), damping) for name in names}
    found: dict[tuple[str, str], Tensor] = {}
    for (one, two), cross in estimate.pairs.items():
        squares = [
            # Eigenvalues of the smaller square are the squared singular values that are not zero.
            torch.linalg.eigvalsh(_squared(correlation(W, C, W_later))).clamp_min(0.0)
            for W, C, W_later in zip(white[one], cross.read(), white[two], strict=True)
        ]
        found[one, two] = mutual_information(squares[0], squares[1])
    if not found:
        return {}
    # One synchronisation for all pairs.
    return dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True))


def chosen_couplings(
    curvature: CurvatureGraph, estimate: Estimate, damping: float, present: Sequence[Coupling]
) -> tuple[Coupling, ...]:
    """Return the maximum spanning forest, or the present one where that has about as much.

    Args:
        curvature: the blocks, in the order of the forward pass.
        estimate: the running averages.
        damping: lambda.
        present: the couplings in use.
    """
    weights = mutual_informations(estimate, damping)
    # Mutual information of a forest is the sum over its edges, so the best forest is a maximum
    # spanning one (Chow & Liu 1968); no search over forests is needed.
    best = couplings_of(weights, list(curvature.blocks))
    if total(weights, best) > ADVANTAGE * total(weights, present):
        return best
    return tuple(present)


def total(weights: Mapping[tuple[str, str], float], couplings: Iterable[Coupling]) -> float:
    """Return the mutual information of a forest; pairs that are not in ``weights`` count as 0."""
    return sum(
        weights.get((c.child, c.parent), weights.get((c.parent, c.child), 0.0)) for c in couplings
    )


def whiteners(factors: Sequence[Tensor], damping: float) -> list[Tensor]:
    """Return whiteners of A and G with factored damping; tiny eigenvalues are raised."""
    A, G = damped_factors(factors[0], factors[1], damping**0.5)
    return [floored_whitener(A)[0], floored_whitener(G)[0]]


def _squared(Q: Tensor) -> Tensor:
    """Return the smaller of Q Q^T and Q^T Q; their other eigenvalues are zero."""
    return Q @ Q.mT if Q.shape[0] <= Q.shape[1] else Q.mT @ Q
