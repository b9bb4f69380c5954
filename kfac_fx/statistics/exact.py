"""Statistics of the exact Fisher: those of all columns of the root of the output Fisher.

A column costs a backward pass. Blocks of columns take one batched pass each, which stops at the
taps; where the network's backward cannot be batched, columns take passes of their own.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kfac_fx.likelihoods.batch import BatchLikelihood
from kfac_fx.ops.columns import RecordedUse, recorded_uses, tapped_by
from kfac_fx.ops.gram import Statistic
from kfac_fx.ops.tap import added
from kfac_fx.statistics.buffers import Statistics, StatisticSources
from kfac_fx.statistics.derivatives import batched_derivatives, derivatives

log = logging.getLogger("kfac_fx")

Noise = int | Sequence[Tensor | None]
"""What draws are made from: a seed, or noise that was made before (``BatchLikelihood.sampled``)."""

AT_ONCE = {"cpu": 2**20, "cuda": 2**27}
"""Entries of derivatives that a block of columns has: those of a CPU stay in its caches."""


def exact_statistics(
    sources: StatisticSources, made: BatchLikelihood, noise: Noise, select: Tensor | None = None
) -> Statistics:
    """Return the statistics of all columns of the output Fisher's root, or of a selected one.

    A block without a tap has the gradient of the whole batch, whose cases mix: it is sampled.

    Args:
        sources: the tensors that the pass recorded into.
        made: what the likelihood says of its outputs.
        noise: the noise of the draws for blocks without a tap.
        select: the column that a traced pass takes; see ``BatchLikelihood.exact``.
    """
    tapped: Sequence[Statistic | None] = [None] * len(sources.factors)
    if sources.factors and select is not None:
        tapped = derivatives(torch.stack(list(made.exact(select))).sum(), sources.factors)
    elif sources.factors:
        with sources.only(sources.gradients):
            gradients = _gradients(sources.gradients, made) if sources.gradients else ()
        inputs: Sequence[Tensor | None] = ()
        with sources.only(sources.inputs):
            # Inputs do not depend on the derivative, but every use must be reached.
            if sources.inputs:
                total = torch.stack([each.sum() for each in made.rows()]).sum()
                inputs = derivatives(total, sources.inputs)
        tapped = [*inputs, *gradients]
    untapped: Sequence[Tensor | None] = ()
    if sources.parameters:
        untapped = derivatives(made.sampled(noise), sources.parameters)
    return sources.statistics(tapped, untapped)


def _gradients(factors: Sequence[Tensor], made: BatchLikelihood) -> list[Statistic | None]:
    """Return the statistics that are quadratic in the derivative, summed over all columns.

    Args:
        factors: their buffers.
        made: what the likelihood says of the outputs.
    """
    try:
        return _by_blocks(factors, made)
    except RuntimeError as error:
        # Operators that cannot be batched, checkpoints that compute their part again, too little
        # memory. What is wrong in itself is so for single columns, and raised from there.
        log.info("one backward pass for each column of the exact Fisher: %s", error)
    total: list[Statistic | None] = [None] * len(factors)
    for column in made.exact():
        more = derivatives(column, factors)
        total = [added(one, other) for one, other in zip(total, more, strict=True)]
    return total


def _by_blocks(factors: Sequence[Tensor], made: BatchLikelihood) -> list[Statistic | None]:
    """Return the same by one batched backward for each block of columns."""
    rows = list(made.rows())
    uses, rest = recorded_uses(rows, factors)
    asked = set(factors).difference(rest)
    total: dict[Tensor, Statistic | None] = dict.fromkeys(factors)
    known = _last_factor(uses, made, asked)
    if known is not None:
        total[known.factor] = known.G
        uses.remove(known.use)
    edges = [edge for use in uses for edge in use.edges]
    for each, picked in _blocks(rows, uses) if edges or rest else ():
        came = iter(batched_derivatives(each, [*edges, *rest], picked))
        for use in uses:
            g = [one for one in [next(came) for _ in use.edges] if one is not None]
            if len(g) == len(use.edges):
                wanted = [factor in asked for factor in use.factors]
                for factor, value in zip(use.factors, use.form(g, wanted), strict=True):
                    if factor in asked:
                        total[factor] = added(total[factor], value)
        for factor in rest:
            value = next(came)
            total[factor] = added(total[factor], None if value is None else value.sum(0))
    return list(total.values())


class _Known(NamedTuple):
    """The last layer, whose G follows from the Fisher of the outputs without derivatives.

    Attributes:
        use: its use.
        factor: the buffer of G.
        G: its statistic.
    """

    use: RecordedUse
    factor: Tensor
    G: Tensor


def _last_factor(
    uses: Sequence[RecordedUse], made: BatchLikelihood, asked: Collection[Tensor]
) -> _Known | None:
    """Return G of the use whose result the outputs are, if their Fisher has a closed form.

    That G is the largest, C x C for C classes, and a sum of as many products: most of the work
    where outputs are many.
    """
    found = made.known_fisher()
    if found is None:
        return None
    outputs, fisher = found
    nodes = tapped_by(outputs)
    for use in uses:
        if use.edges[0].node in nodes and (G := use.last_factor(fisher.along)) is not None:
            factor = use.factors[1]
            return _Known(use, factor, G.to(factor.dtype)) if factor in asked else None
    return None


def _blocks(rows: Sequence[Tensor], uses: Sequence[RecordedUse]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield rows [cases, columns], and what picks K columns of them: [K, cases, columns]."""
    entries = sum(math.prod(shape) for use in uses for shape in use.shapes)
    for each in rows:
        count = each.shape[1]
        size = AT_ONCE.get(each.device.type, AT_ONCE["cuda"]) // max(1, entries + each.numel())
        size = min(max(size, 1), count)
        for start in range(0, count, size):
            end = min(start + size, count)
            picked = torch.zeros(end - start, count, dtype=each.dtype, device=each.device)
            picked[:, start:end].fill_diagonal_(1.0)
            yield each, picked.unsqueeze(1).expand(-1, each.shape[0], -1)
