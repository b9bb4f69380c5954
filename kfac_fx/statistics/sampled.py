"""Statistics by backward passes of the recorder's own, from what the likelihood says of a batch.

``fisher_statistics`` is the one function from a forward pass, a likelihood and noise to
statistics. It is run on the user's recorded forward (``SampledStatistics``) and on passes of the
recorder's own, as they are or while they are traced (``own_pass.py``).

A column of the exact Fisher costs a backward pass. Blocks of columns take one batched pass each,
which stops at the taps; where a backward cannot be batched, columns take passes of their own.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

from kfac_fx.config import Fisher
from kfac_fx.errors import ObservationError
from kfac_fx.likelihoods.batch import BatchLikelihood, batch_likelihood, output_tensors
from kfac_fx.likelihoods.builtin import Likelihood, Tree
from kfac_fx.likelihoods.named import Sum
from kfac_fx.likelihoods.sampling import WeightedSum
from kfac_fx.linalg.precision import all_finite
from kfac_fx.ops.columns import RecordedUse, recorded_uses
from kfac_fx.ops.gram import Statistic, added, multiplied
from kfac_fx.ops.state import Collection
from kfac_fx.ops.tap import noted_statistics, tapped_by
from kfac_fx.parallel import Workers
from kfac_fx.statistics.buffers import Statistics, StatisticSources
from kfac_fx.statistics.user_graph import (
    batched_derivatives,
    check_recorded,
    derivatives,
    nearest_tap,
)

log = logging.getLogger("kfac_fx")

Noise = int | Sequence[Tensor | None]
"""What draws are made from: a seed, or signs made before (see ``BatchLikelihood.sampled``)."""

AT_ONCE = {"cpu": 2**20, "cuda": 2**27}
"""Entries of derivatives that a block of columns has: those of a CPU stay in its caches."""


@dataclass(frozen=True)
class Collected:
    """The statistics of one pass.

    Attributes:
        finite: whether the outputs are, of all processes that were asked; else there are none.
        statistics: in the scale of the derivatives that they were formed of.
        count: number of likelihood terms, or the sum of their weights.
        total: the same of all processes.
        scale: the scale of the loss whose derivatives the statistics are of, relative to the summed
            negative log-likelihood; None if it is not seen to be proportional, and they are of no
            use.
        tap: a node of the forward's graph that its training backward will come to; None where no
            forward of the user's was recorded.
    """

    finite: bool
    statistics: Statistics
    count: float
    total: float
    scale: float | None = 1.0
    tap: Node | None = None


def statistics_of(
    sources: StatisticSources,
    scalar: Tensor | WeightedSum,
    collection: Collection | None = None,
    also: Sequence[Tensor] = (),
) -> tuple[Statistics, Sequence[Tensor | None]]:
    """Return the statistics of a scalar's derivative, and more of its derivatives, by one backward.

    Args:
        sources: the sources of the pass.
        scalar: is differentiated; the statistics are in its scale.
        collection: the noted taps of the pass, if there are any.
        also: tensors whose derivatives are wanted, too. If there are any, it is the last backward.
    """
    edges = [] if collection is None else [note.edge for note in collection.notes]
    split = len(sources.factors)
    end = split + len(sources.parameters)
    sources.gathering.on = True
    try:
        found = derivatives(scalar, [*sources.wanted, *edges, *also], last=bool(also))
        tapped: Sequence[Statistic | None] = found[:split]
        if collection is not None and edges:
            tapped = noted_statistics(collection, found[end : end + len(edges)], tapped)
    finally:
        sources.gathering.on = False
    return sources.statistics(tapped, found[split:end]), found[end + len(edges) :]


def fisher_statistics(
    sources: StatisticSources,
    made: BatchLikelihood,
    fisher: Fisher,
    noise: Noise,
    collection: Collection | None = None,
    select: Tensor | None = None,
    draws: int = 1,
) -> Statistics:
    """Return the statistics of a pass, in the scale of the summed negative log-likelihood.

    Args:
        sources: the tensors that the pass recorded into.
        made: what the likelihood says of its outputs.
        fisher: "sampled" takes random columns of the output Fisher's root, "empirical" targets, and
            "exact" once for each column of the root of the output Fisher.
        noise: the noise of the draws.
        collection: the noted taps of the pass. Notes serve one backward, so "exact" takes none.
        select: the column that a traced pass takes; see ``BatchLikelihood.exact``.
        draws: how many draws of "sampled" the statistics are the mean of; the noise is a seed then.
    """
    if fisher == "exact":
        sources.gathering.on = True
        try:
            return _exact_statistics(sources, made, noise, select)
        finally:
            sources.gathering.on = False
    if draws > 1 and isinstance(noise, int):
        return _mean_of_draws(sources, made, noise, draws)
    total: Tensor | WeightedSum = made.nll() if fisher == "empirical" else made.sampled(noise)
    return statistics_of(sources, total, collection)[0]


def _exact_statistics(
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
            gradients = _gradients(sources, made) if sources.gradients else ()
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


def _gradients(sources: StatisticSources, made: BatchLikelihood) -> list[Statistic | None]:
    """Return the statistics that are quadratic in the derivative, summed over all columns.

    Args:
        sources: whose buffers they are for.
        made: what the likelihood says of the outputs.
    """
    factors = sources.gradients
    try:
        # Joint factors need each column's streams apart, which no batched pass delivers.
        if not sources.joined:
            return _by_blocks(factors, made)
    except RuntimeError as error:
        # Operators that cannot be batched, checkpoints that compute their part again, too little
        # memory. What is wrong in itself is so for single columns, and raised from there.
        log.info("one backward pass for each column of the exact Fisher: %s", error)
    total: list[Statistic | None] = [None] * len(factors)
    for place, column in enumerate(made.exact()):
        sources.begin_column(place)
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
                own, form, _ = use.recorded
                values = form(g, [factor in asked for factor in own])
                for factor, value in zip(own, values, strict=True):
                    if factor in asked:
                        total[factor] = added(total[factor], value)
        for factor in rest:
            value = next(came)
            total[factor] = added(total[factor], None if value is None else value.sum(0))
    return list(total.values())


def _mean_of_draws(
    sources: StatisticSources, made: BatchLikelihood, seed: int, draws: int
) -> Statistics:
    """Return the mean of the statistics of several draws of targets, of one forward."""
    total: Statistics = {}
    # Inputs do not depend on the draw, but where they are joined with derivatives they do.
    apart = sources.joined
    once = {one.key for one in sources.names.tapped if one.role != "gradient" and not apart}
    for draw in range(draws):
        if draw and apart:
            sources.forget()
        # The multiplier is the golden ratio's: neighbouring seeds of other passes lie far off.
        scalar = made.sampled((seed + 0x9E3779B97F4A7C15 * draw) % 2**62)
        with sources.only(sources.gradients) if draw and not apart else nullcontext():
            found, _ = statistics_of(sources, scalar)
        for key, value in found.items():
            before = total.get(key)
            more = multiplied(value)
            total[key] = more if before is None else multiplied(before) + more
    return {key: value if key in once else value * (1 / draws) for key, value in total.items()}


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
    uses: Sequence[RecordedUse], made: BatchLikelihood, asked: AbstractSet[Tensor]
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
            factor = use.recorded.factors[1]
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


@dataclass(frozen=True)
class SampledStatistics:
    """Sampled and exact statistics of the user's recorded forward.

    Attributes:
        sources: the network's factor buffers, and parameters without a tap.
        likelihood: the likelihood of the outputs.
        fisher: "sampled" or "exact".
        workers: the processes that share the batch.
        seed: gives the seed of the next draws.
    """

    sources: StatisticSources
    likelihood: Likelihood | Sum
    fisher: Fisher
    workers: Workers
    seed: Callable[[], int]

    def collect(self, outputs: Tree, targets: Tree) -> Collected:
        """Return the statistics of a forward, whose graph is kept for the training backward.

        That one does not record again: the factors are paused after this.

        Raises:
            LikelihoodError: outputs or targets do not fit the likelihood, or no process has terms.
            ObservationError: the forward was not recorded, its graph is gone, or its outputs retain
                their gradient and the Fisher is exact.
        """
        made = batch_likelihood(self.likelihood, outputs, targets)
        count = made.terms.count
        tensors = output_tensors(outputs)
        notes = None
        if self.fisher == "sampled":
            notes = Collection.of_graph(self.sources.states, tensors)
        if notes is None or not notes.notes:
            check_recorded(tensors, self.sources.state_by_buffer)
            tap = nearest_tap(tensors, self.sources.state_by_buffer)
        else:
            tap = notes.notes[-1].edge.node
        finite = all_finite([tensor.detach() for tensor in tensors])
        finite, agreed = made.terms.agreed(self.workers, "observe", finite)
        if not finite:
            return Collected(False, {}, count, agreed.count, tap=tap)
        # Of a batch that is skipped nothing is drawn, so the next one has the same draws.
        seed = self.seed()
        found: Statistics = {}
        if count > 0:  # else the other processes have terms
            made = made if agreed is made.terms else replace(made, terms=agreed)
            # What retains its gradient gets every backward's, also where derivatives of something
            # else are asked for: those of the draws would be added to the loss's.
            kept = [(tensor, tensor.grad) for tensor in tensors if tensor.retains_grad]
            # Batched ones would leave a tensor that is of no use outside of their batch.
            if kept and self.fisher == "exact":
                raise ObservationError(
                    "the outputs retain their gradient, which fisher='exact' cannot leave alone: "
                    "call outputs.retain_grad() after observe()"
                )
            found = fisher_statistics(self.sources, made, self.fisher, seed, notes)
            for tensor, before in kept:
                tensor.grad = before
        self.sources.pause()
        return Collected(True, found, count, agreed.count, tap=tap)
