"""Empirical statistics: the user's own backward pass is taken for theirs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import Tensor
from torch.autograd.graph import Node

from kfac_fx.errors import ObservationError
from kfac_fx.likelihoods.batch import batch_likelihood, output_tensors
from kfac_fx.likelihoods.builtin import Likelihood, Tree
from kfac_fx.likelihoods.named import Sum
from kfac_fx.linalg.precision import all_finite
from kfac_fx.ops.state import FactorState
from kfac_fx.parallel import Workers
from kfac_fx.statistics.buffers import StatisticSources
from kfac_fx.statistics.loss_scale import LossScale
from kfac_fx.statistics.sampled import Collected
from kfac_fx.statistics.user_graph import BackwardWatch, GradientWatch, check_recorded, tap_counts


@dataclass
class _Watched:
    """A forward whose backward pass is waited for.

    Attributes:
        backward, gradients: notice what the backward brings.
        expected: finds how the loss is reduced.
        nodes: where the graph of the outputs begins.
        count, total: numbers of likelihood terms, here and in all processes.
        brought: what the backward left in the factors; None before its end.
    """

    backward: BackwardWatch
    gradients: GradientWatch
    expected: LossScale
    nodes: list[Node | None]
    count: float
    total: float
    brought: list[Tensor | None] | None = None


class EmpiricalStatistics:
    """``watch`` at the forward, ``finish`` after the user's backward.

    Args:
        sources: the network's factor buffers, and parameters without a tap.
        likelihood: the likelihood of the outputs; the Fisher is that of its negative log-likelihood
            at the given targets, whatever multiple of it the loss is.
        workers: the processes that share the batch.
    """

    def __init__(
        self, sources: StatisticSources, likelihood: Likelihood | Sum, workers: Workers
    ) -> None:
        self._sources = sources
        self._likelihood = likelihood
        self._workers = workers
        self._watched: _Watched | None = None
        # How often each factor has got a statistic from one backward that was as it should be.
        self._usual: Counter[FactorState] = Counter()

    def watch(self, outputs: Tree, targets: Tree) -> BackwardWatch | None:
        """Prepare for the backward pass of a forward; None if some outputs are not finite.

        Raises:
            LikelihoodError: outputs or targets do not fit the likelihood, or no process has terms.
            ObservationError: the forward was not recorded, or its graph is gone.
        """
        sources = self._sources
        made = batch_likelihood(self._likelihood, outputs, targets)
        tensors = output_tensors(outputs)
        check_recorded(tensors, sources.state_by_buffer)
        finite = all_finite([tensor.detach() for tensor in tensors])
        finite, agreed = made.terms.agreed(self._workers, "observe", finite)
        if not finite:
            return None
        nodes = [tensor.grad_fn for tensor in tensors]
        expected = LossScale(self._likelihood, outputs, targets, made.count)
        backward = BackwardWatch(
            tensors,
            [*sources.gradients, *sources.parameters],
            begun=self._begin,
            brought=self._take_over,
        )
        gradients = GradientWatch(sources.parameters)
        self._watched = _Watched(backward, gradients, expected, nodes, made.count, agreed.count)
        return backward

    def _begin(self) -> None:
        self._sources.pause(False)
        self._sources.gathering.on = True

    def _take_over(self) -> None:
        """Keep what the backward has brought apart from what micro-batches that follow bring.

        They may be left unobserved: statistics of a part of a batch are often enough.
        """
        watched = self._watched
        assert watched is not None
        if watched.brought is None:
            watched.brought = [factor.grad for factor in self._sources.factors]
            watched.gradients.close()
            for factor in self._sources.factors:
                factor.grad = None
        # Their statistics need not be formed. A second backward of the same outputs, which is
        # refused, is noticed by what it brings: it ends the pause.
        self._sources.pause()
        self._sources.gathering.on = False

    def stop(self) -> None:
        """Stop watching; what was not finished is forgotten."""
        self._sources.gathering.on = False
        if self._watched is not None:
            self._watched.backward.close()
            self._watched.gradients.close()
        self._watched = None

    def finish(self) -> Collected | None:
        """Return what the backward pass has left, or None if none was waited for.

        Raises:
            ObservationError: no backward has come to the outputs, several with statistics have, or
                one came through other forwards, too.
        """
        watched = self._watched
        self.stop()
        if watched is None:
            return None
        if watched.count <= 0:  # the other processes have terms
            return Collected(True, {}, watched.count, watched.total)
        scale = self._scale(watched)
        if self._strays(watched):
            raise ObservationError(
                "loss.backward() also came through a forward whose outputs were not observed, and "
                "whose statistics cannot be told apart: give observe() all outputs at once, call "
                "the network once for all of them, or use fisher='sampled'"
            )
        tapped = watched.brought or [factor.grad for factor in self._sources.factors]
        if tapped and all(value is None for value in tapped):
            raise ObservationError(
                "loss.backward() came to the outputs and brought no statistics: backward("
                "inputs=...) and torch.autograd.grad() accumulate in nothing but what they are "
                "given. Call loss.backward() without inputs, or use fisher='sampled'"
            )
        found = self._sources.statistics(tapped, watched.gradients.gradients)
        return Collected(True, found, watched.count, watched.total, scale)

    def _scale(self, watched: _Watched) -> float:
        """Return the factor between the loss and the summed NLL of the targets."""
        seen = watched.backward.recorded()
        if None in seen.values():
            raise ObservationError(
                "loss.backward() brought no derivative to the outputs: where the loss is compiled "
                "into one graph with the network, use kfac_fx.TrainingStep, or compile the network "
                "alone"
            )
        return watched.expected(seen)

    def _strays(self, watched: _Watched) -> bool:
        """Return whether taps delivered more often than there are taps in the observed graph.

        Reentrant checkpoints hide their taps from a walk through the graph.
        """
        found = Counter({state: state.deliveries for state in self._sources.states})
        # A walk takes the whole graph, so it is for what has not been seen before.
        if watched.backward.nested or found <= self._usual:
            return False
        taps = tap_counts(watched.nodes, self._sources.state_by_buffer)
        if any(count > taps[state] > 0 for state, count in found.items()):
            return True
        self._usual |= found
        return False
