"""Statistics by backward passes of the recorder's own, from what the likelihood says of a batch.

``fisher_statistics`` is the one function from a forward pass, a likelihood and noise to
statistics. It is run on the user's recorded forward (``SampledStatistics``) and on passes of the
recorder's own, as they are or while they are traced (``own_pass.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from kfac_fx.config import Fisher
from kfac_fx.likelihoods.batch import BatchLikelihood, batch_likelihood, output_tensors, wide
from kfac_fx.likelihoods.builtin import Likelihood, Tree
from kfac_fx.likelihoods.named import Sum
from kfac_fx.linalg.precision import all_finite
from kfac_fx.ops.gram import Statistic
from kfac_fx.ops.state import Collection
from kfac_fx.ops.tap import added, noted_statistics
from kfac_fx.parallel import Workers
from kfac_fx.statistics.buffers import Statistics, StatisticSources
from kfac_fx.statistics.derivatives import derivatives
from kfac_fx.statistics.exact import Noise, exact_statistics
from kfac_fx.statistics.user_graph import check_recorded


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
    """

    finite: bool
    statistics: Statistics
    count: float
    total: float
    scale: float | None = 1.0


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
    edges = [] if collection is None else collection.edges
    found = derivatives(scalar, [*sources.wanted, *edges, *also], last=bool(also))
    split = len(sources.factors)
    end = split + len(sources.parameters)
    tapped: Sequence[Statistic | None] = found[:split]
    if collection is not None and edges:
        noted = noted_statistics(collection, found[end : end + len(edges)])
        tapped = [added(one, other) for one, other in zip(tapped, noted, strict=True)]
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
        fisher: "sampled" differentiates at targets from the model, "empirical" at those given, and
            "exact" once for each column of the root of the output Fisher.
        noise: the noise of the draws.
        collection: the noted taps of the pass. Notes serve one backward, so "exact" takes none.
        select: the column that a traced pass takes; see ``BatchLikelihood.exact``.
    """
    if fisher == "exact":
        return exact_statistics(sources, made, noise, select)
    scalar = made.nll() if fisher == "empirical" else made.sampled(noise)
    return statistics_of(sources, scalar, collection)[0]


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
        check_recorded(tensors, self.sources.state_by_buffer)
        finite = all_finite([tensor.detach() for tensor in tensors])
        finite, agreed = made.terms.agreed(self.workers, "observe", finite)
        if not finite:
            return Collected(False, {}, count, agreed.count)
        # Of a batch that is skipped nothing is drawn, so the next one has the same draws.
        seed = self.seed()
        found: Statistics = {}
        if count > 0:  # else the other processes have terms
            made = replace(made, terms=agreed)
            found = fisher_statistics(self.sources, made, self.fisher, seed)
        self.sources.pause()
        return Collected(True, found, count, agreed.count)
