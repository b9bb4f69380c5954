"""The forest of couplings that statistics choose: most mutual information (Chow & Liu 1968)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from kfac_fx.curvature.averages import Averages
from kfac_fx.ir import Coupling, CurvatureGraph, couplings_of
from kfac_fx.linalg.conditional import correlation, mutual_information
from kfac_fx.linalg.damping import damped, factored_amounts, mean_eigenvalue
from kfac_fx.linalg.positive import floored_whitener

ADVANTAGE = 1.01
"""How much more information another forest must have: below, a new program does not pay."""


@torch.no_grad()
def mutual_informations(averages: Averages, damping: float) -> dict[tuple[str, str], float]:
    """Of each recorded pair (earlier, later), with factored Tikhonov damping.

    The formula is in docs/explanation/mathematics.md, section 7.
    """
    names = {name for pair in averages.pairs for name in pair}
    white = {name: whiteners(averages.blocks[name].factors, damping) for name in names}
    found = {
        (one, two): mutual_information(
            *(
                torch.linalg.eigvalsh(_squared(correlation(W, cross, W_later))).clamp_min(0.0)
                for W, cross, W_later in zip(white[one], entry.averages, white[two], strict=True)
            )
        )
        for (one, two), entry in averages.pairs.items()
    }
    if not found:
        return {}
    return dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True))


def chosen_couplings(
    curvature: CurvatureGraph,
    averages: Averages,
    damping: float,
    present: Sequence[Coupling],
) -> tuple[Coupling, ...]:
    """The maximum spanning forest, or the present one where that has about as much."""
    weights = mutual_informations(averages, damping)
    best = couplings_of(weights, list(curvature.blocks))
    if total(weights, best) > ADVANTAGE * total(weights, present):
        return best
    return tuple(present)


def total(weights: dict[tuple[str, str], float], couplings: Iterable[Coupling]) -> float:
    """The mutual information of a forest."""
    return sum(
        weights.get((c.child, c.parent), weights.get((c.parent, c.child), 0.0)) for c in couplings
    )


def whiteners(factors: Sequence[Tensor], damping: float) -> list[Tensor]:
    """Of A and G with factored Tikhonov damping; eigenvalues at rounding level are raised."""
    A, G = factors
    amounts = factored_amounts(mean_eigenvalue(A), mean_eigenvalue(G), damping**0.5)
    pairs = zip((A, G), amounts, strict=True)
    return [floored_whitener(damped(factor, amount))[0] for factor, amount in pairs]


def _squared(Q: Tensor) -> Tensor:
    """The smaller of Q Q^T and Q^T Q; their other eigenvalues are zero."""
    return Q @ Q.mT if Q.shape[0] <= Q.shape[1] else Q.mT @ Q
