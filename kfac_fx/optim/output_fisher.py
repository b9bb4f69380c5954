"""Square roots S of the output Fisher, S S^T = F_out, as scalars to differentiate.

Each scalar's derivative with respect to the outputs is one column of S for one event dimension,
so the factors of the exact Fisher are sums over the scalars of the recorded statistics.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import singledispatch

import torch
from torch import Tensor
from torch import distributions as D

from kfac_fx.errors import LikelihoodError


@singledispatch
def root_terms(distribution: D.Distribution) -> Iterator[Tensor]:
    """For each column of S, a tensor over the batch shape; its gradient in the outputs is S's.

    Any distribution with finite support has the columns sqrt(p(y)) * grad log p(y).
    """
    if not distribution.has_enumerate_support:
        raise LikelihoodError(
            f"fisher='exact' does not know {type(distribution).__name__}; "
            "use fisher='sampled', or a categorical, bernoulli or normal likelihood"
        )
    for value in distribution.enumerate_support():
        log_p = distribution.log_prob(value)
        yield (0.5 * log_p.detach()).exp() * log_p


@root_terms.register
def _(distribution: D.Categorical) -> Iterator[Tensor]:
    # diag(sqrt p) - p sqrt(p)^T: column c is sqrt(p_c) (e_c - p), the gradient of log p(c).
    for column in range(distribution.logits.shape[-1]):
        log_p = distribution.logits[..., column]
        yield (0.5 * log_p.detach()).exp() * log_p


@root_terms.register
def _(distribution: D.Bernoulli) -> Iterator[Tensor]:
    p = distribution.probs.detach()
    yield (p * (1 - p)).sqrt() * distribution.logits


@root_terms.register
def _(distribution: D.Normal) -> Iterator[Tensor]:
    sigma = distribution.scale.detach()
    yield distribution.loc / sigma
    if distribution.scale.requires_grad:
        yield 2**0.5 * distribution.scale / sigma


@root_terms.register(D.Independent)
def _(distribution: D.Independent[D.Distribution]) -> Iterator[Tensor]:
    events = distribution.reinterpreted_batch_ndims
    for terms in root_terms(distribution.base_dist):
        flat = terms.flatten(terms.dim() - events) if events else terms.unsqueeze(-1)
        yield from flat.unbind(-1)


def root(distribution: D.Distribution) -> Tensor:
    """All columns at once, batch shape + [columns]: S^T applied to what the outputs depend on."""
    if isinstance(distribution, D.Categorical):
        return (0.5 * distribution.logits.detach()).exp() * distribution.logits
    return torch.stack(list(root_terms(distribution)), -1)


def exact_scalars(distribution: D.Distribution, weights: Tensor | None) -> Iterator[Tensor]:
    """Scalars whose statistics add up to the exact Fisher's.

    The first dimension of the batch shape counts the cases; the terms of a case are taken one at a
    time, so that their derivatives do not mix.

    Args:
        weights: of the terms; the Fisher of a term is weighted.
    """
    for terms in root_terms(distribution):
        if weights is not None:
            terms = terms * weights.sqrt()
        rows = terms.reshape(terms.shape[0], -1) if terms.dim() else terms.reshape(1, 1)
        for column in rows.unbind(-1):
            yield column.sum()


def sampled_scalar(
    distribution: D.Distribution, weights: Tensor | None, generator: torch.Generator
) -> Tensor:
    """The summed negative log-likelihood of targets drawn from the model.

    Args:
        weights: of the terms; derivatives scale with their square roots.
        generator: seeds the draw; torch's own random stream is left as it was.
    """
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        targets = distribution.sample()
    nll = -distribution.log_prob(targets)
    return (nll if weights is None else nll * weights.sqrt()).sum()


def term_count(distribution: D.Distribution, weights: Tensor | None) -> float:
    """Number of likelihood terms, or the sum of their weights."""
    if weights is not None:
        return float(weights.sum())
    return float(distribution.batch_shape.numel())
