"""Statistics by backward passes of the recorder's own, from what the likelihood says of a batch.

``fisher_statistics`` is the one function from a forward pass, a likelihood and noise to
statistics. It is run on the user's recorded forward (``SampledStatistics``) and on passes of the
recorder's own, as they are or while they are traced (``own_pass.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from kfac_fx.config import Fisher
from kfac_fx.errors import ObservationError
from kfac_fx.likelihoods.batch import BatchLikelihood, batch_likelihood, output_tensors, wide
from kfac_fx.likelihoods.builtin import Likelihood, Tree
from kfac_fx.likelihoods.named import Sum
from kfac_fx.linalg.precision import all_finite
from kfac_fx.ops.gram import Statistic
from kfac_fx.ops.state import Collection
from kfac_fx.ops.tap import added, noted_statistics
from kfac_fx.parallel import Workers
from kfac_fx.statistics.buffers import Statistics, StatisticSources
from kfac_fx.statistics.user_graph import AFTER_BACKWARD, check_recorded, nearest_tap
from kfac_fx.torch_internals.error_texts import backward_refusal

Noise = int | Sequence[Tensor | None]
"""What draws are made from: a seed, or signs made before (see ``BatchLikelihood.sampled``)."""


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


def derivatives(
    scalar: Tensor, tensors: Sequence[Tensor | GradientEdge], *, last: bool = False
) -> Sequence[Tensor | None]:
    """Return the derivatives of a scalar at tensors and edges of the graph, by one backward.

    Args:
        scalar: is differentiated.
        tensors: where; None comes where the scalar does not depend on one.
        last: whether the graph may be freed.

    Raises:
        ObservationError: the graph was freed, or was not kept for this backward.
    """
    try:
        found: Sequence[Tensor | None] = torch.autograd.grad(
            scalar,
            tensors,  # type: ignore[arg-type]  # edges and tensors may be mixed
            retain_graph=not last,
            allow_unused=True,
        )
        return found
    except RuntimeError as error:
        refusal = backward_refusal(error)
        if refusal == "freed":
            raise ObservationError(AFTER_BACKWARD) from error
        if refusal == "compiled":
            raise ObservationError(
                "a compiled forward keeps no graph for a second backward: give the inputs, "
                "observe(outputs, inputs=...), use fisher='empirical', or set "
                "torch._functorch.config.donated_buffer = False before compiling"
            ) from error
        if refusal == "reentrant":
            raise ObservationError(
                "a reentrant activation checkpoint allows no backward but the training's: use "
                "checkpoint(..., use_reentrant=False) or fisher='empirical'"
            ) from error
        raise


def statistics_of(
    sources: StatisticSources,
    scalar: Tensor,
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
    found = derivatives(scalar, [*sources.wanted, *edges, *also], last=bool(also))
    split = len(sources.factors)
    end = split + len(sources.parameters)
    tapped: Sequence[Statistic | None] = found[:split]
    if collection is not None and edges:
        tapped = noted_statistics(collection, found[end : end + len(edges)], tapped)
    return sources.statistics(tapped, found[split:end]), found[end + len(edges) :]


def fisher_statistics(
    sources: StatisticSources,
    made: BatchLikelihood,
    fisher: Fisher,
    noise: Noise,
    collection: Collection | None = None,
    select: Tensor | None = None,
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
    """
    if fisher == "exact":
        return _exact_statistics(sources, made, noise, select)
    scalar = made.nll() if fisher == "empirical" else made.sampled(noise)
    return statistics_of(sources, scalar, collection)[0]


def _exact_statistics(
    sources: StatisticSources, made: BatchLikelihood, noise: Noise, select: Tensor | None
) -> Statistics:
    """Return the statistics of all columns of the output Fisher's root, or of a selected one.

    A block without a tap has the gradient of the whole batch, whose cases mix: it is sampled.
    """
    tapped: list[Statistic | None] = [None] * len(sources.factors)
    scalars = list(made.exact(select)) if sources.factors else []
    if select is not None and scalars:
        tapped = list(derivatives(torch.stack(scalars).sum(), sources.factors))
    elif scalars:
        gradients: list[Statistic | None] = [None] * len(sources.gradients)
        with sources.only(sources.gradients):
            for scalar in scalars if sources.gradients else ():
                more = derivatives(scalar, sources.gradients)
                gradients = [added(one, other) for one, other in zip(gradients, more, strict=True)]
        inputs: Sequence[Tensor | None] = ()
        with sources.only(sources.inputs):
            # Inputs do not depend on the derivative, but every use must be reached.
            if sources.inputs:
                inputs = derivatives(torch.stack(scalars).sum(), sources.inputs)
        tapped = [*inputs, *gradients]
    untapped: Sequence[Tensor | None] = ()
    if sources.parameters:
        untapped = derivatives(made.sampled(noise), sources.parameters)
    return sources.statistics(tapped, untapped)


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
            ObservationError: the forward was not recorded, or its graph is gone.
        """
        made = batch_likelihood(self.likelihood, wide(outputs), targets)
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
            made = replace(made, terms=agreed)
            found = fisher_statistics(self.sources, made, self.fisher, seed, notes)
        self.sources.pause()
        return Collected(True, found, count, agreed.count, tap=tap)
