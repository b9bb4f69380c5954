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
from kfac_fx.likelihoods.sampling import drawn


@singledispatch
def root_columns(distribution: D.Distribution) -> Iterator[Tensor]:
    """Columns of S, as tensors of batch shape + [columns]; their gradients in the outputs are S's.

    Any distribution with finite support has the columns sqrt(p(y)) * grad log p(y).
    """
    if not distribution.has_enumerate_support:
        raise LikelihoodError(
            f"fisher='exact' does not know {type(distribution).__name__}; "
            "use fisher='sampled', or a categorical, bernoulli or normal likelihood"
        )
    for value in distribution.enumerate_support():
        log_p = distribution.log_prob(value).unsqueeze(-1)
        yield (0.5 * log_p.detach()).exp() * log_p


@root_columns.register
def _(distribution: D.Categorical) -> Iterator[Tensor]:
    # diag(sqrt p) - p sqrt(p)^T: column c is sqrt(p_c) (e_c - p), the gradient of log p(c).
    yield (0.5 * distribution.logits.detach()).exp() * distribution.logits


@root_columns.register
def _(distribution: D.Bernoulli) -> Iterator[Tensor]:
    p = distribution.probs.detach()
    yield ((p * (1 - p)).sqrt() * distribution.logits).unsqueeze(-1)


@root_columns.register
def _(distribution: D.Normal) -> Iterator[Tensor]:
    sigma = distribution.scale.detach()
    yield (distribution.loc / sigma).unsqueeze(-1)
    if distribution.scale.requires_grad:
        yield (2**0.5 * distribution.scale / sigma).unsqueeze(-1)


@root_columns.register(D.Independent)
def _(distribution: D.Independent[D.Distribution]) -> Iterator[Tensor]:
    events = distribution.reinterpreted_batch_ndims
    for columns in root_columns(distribution.base_dist):
        yield columns.flatten(columns.dim() - 1 - events)


def root(distribution: D.Distribution) -> Tensor:
    """All columns at once, batch shape + [columns]: S^T applied to what the outputs depend on."""
    return torch.cat(list(root_columns(distribution)), -1)


def exact_scalars(distribution: D.Distribution, weights: Tensor | None) -> Iterator[Tensor]:
    """Scalars whose statistics add up to the exact Fisher's.

    The first dimension of the batch shape counts the cases; the terms of a case are taken one at a
    time, so that their derivatives do not mix.

    Args:
        weights: of the terms; the Fisher of a term is weighted.
    """
    for rows in exact_rows(distribution, weights):
        for column in rows.unbind(-1):
            yield column.sum()


def exact_rows(distribution: D.Distribution, weights: Tensor | None) -> Iterator[Tensor]:
    """[cases, ...] each; the sums over the cases of their columns are the scalars."""
    for columns in root_columns(distribution):
        if weights is not None:
            columns = columns * weights.sqrt().unsqueeze(-1)
        cases = columns.shape[0] if columns.dim() > 1 else 1
        yield columns.reshape(cases, -1)


def sampled_scalar(distribution: D.Distribution, weights: Tensor | None, seed: int) -> Tensor:
    """The summed negative log-likelihood of targets drawn from the model.

    Args:
        weights: of the terms; derivatives scale with their square roots.
        seed: of the draw; torch's own random stream is left as it was.
    """
    return sampled_nll(distribution, weights, drawn(distribution, seed))


def sampled_nll(distribution: D.Distribution, weights: Tensor | None, targets: Tensor) -> Tensor:
    """The same for given draws."""
    nll = -distribution.log_prob(targets)
    return (nll if weights is None else nll * weights.sqrt()).sum()


def term_count(distribution: D.Distribution, weights: Tensor | None) -> float:
    """Number of likelihood terms, or the sum of their weights."""
    if weights is not None:
        return float(weights.sum())
    return float(distribution.batch_shape.numel())
