"""The statistics of one step at a time: switches the taps, and gathers what passes leave."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from kfac_fx.config import Fisher
from kfac_fx.errors import ObservationError, UnknownOptionError
from kfac_fx.likelihoods.batch import output_tensors
from kfac_fx.likelihoods.builtin import Likelihood
from kfac_fx.likelihoods.named import Sum
from kfac_fx.ops.gram import Rows
from kfac_fx.ops.net_buffers import switch
from kfac_fx.ops.tap import added
from kfac_fx.parallel import StatisticSlot, Values, Workers, drawn_seed
from kfac_fx.statistics.buffers import Block, Statistics, StatisticSources, sources_of
from kfac_fx.statistics.empirical import EmpiricalStatistics
from kfac_fx.statistics.forward import Forward, run_network
from kfac_fx.statistics.own_pass import OwnPass
from kfac_fx.statistics.pass_cache import CompiledPass
from kfac_fx.statistics.sampled import Collected, SampledStatistics
from kfac_fx.statistics.swap_tensors import Places
from kfac_fx.statistics.user_graph import BackwardWatch


class StepStatistics:
    """Statistics of one step, from one or several micro-batches and processes.

    Each weighs by its number of likelihood terms, as if they had been one batch.

    Args:
        sources: the tensors that the statistics are gradients of.
        workers: the processes whose statistics are added up.
    """

    def __init__(self, sources: StatisticSources, workers: Workers) -> None:
        self._workers = workers
        self._keys = [one.key for one in sources.names.tapped]
        self._inputs = set(self._keys[: sources.names.inputs])
        pairs = zip(sources.names.tapped, sources.factors, strict=True)
        self._places = [StatisticSlot(factor, one.symmetric) for one, factor in pairs]
        parameters = iter(sources.parameters)
        for block in sources.names.untapped:
            own = [next(parameters) for _ in block.names]
            flat = torch.zeros((), dtype=own[0].dtype, device=own[0].device)
            self._keys.append(block.key)
            self._places.append(StatisticSlot(flat.expand(sum(p.numel() for p in own)), False))
        self._sums: list[tuple[Callable[[], Values], float]] = []
        self._count = 0.0

    def add(self, collected: Collected) -> None:
        """Take over the statistics of one pass; their sum over the processes starts.

        Derivatives are of a sum over the terms of this process: those of a mean over the terms of
        all, squared and summed over the cases, are 1 / total of it. Statistics of inputs are means
        over this process's cases.
        """
        assert collected.scale is not None
        found = collected.statistics
        squares = 1 / (collected.scale**2 * collected.total)
        means = collected.count / collected.total
        for factor, inputs in ((squares, False), (means, True)):
            keys = [key for key in found if (key in self._inputs) == inputs]
            if factor == 1.0 or not keys:
                continue
            tensors = []
            for key in keys:
                value = found[key]
                if isinstance(value, Rows):
                    found[key] = value * factor
                else:
                    tensors.append(value)
            if tensors:
                torch._foreach_mul_(tensors, factor)
        values = [found.get(key) for key in self._keys]
        self._sums.append((self._workers.start_sum(self._places, values), collected.total))
        self._count += collected.total

    @property
    def empty(self) -> bool:
        """Whether nothing was added."""
        return not self._sums

    def take(self) -> Statistics:
        """Return the statistics in the scale of one likelihood term, and start anew.

        It waits for the sums.
        """
        mean: Statistics = {}
        for finished, count in self._sums:
            weight = count / self._count
            for key, value in zip(self._keys, finished(), strict=True):
                more = value if value is None or weight == 1.0 else value * weight
                total = added(mean.get(key), more)
                if total is not None:
                    mean[key] = total
        self.forget()
        return mean

    def forget(self) -> None:
        """Start anew."""
        self._sums = []
        self._count = 0.0


class Recorder:
    """The statistics of one step at a time.

    ``observe`` takes the user's own forward, ``observe_inputs`` runs a pass of the recorder's own;
    ``take`` ends the step.

    Args:
        net: carries the taps.
        blocks: whose statistics are wanted: diagonal blocks, then pairs and moments of them.
        likelihood: of the outputs.
        fisher: "sampled", "exact" or "empirical".
        generator: of the draws.
        workers: the processes whose statistics are added up.
        forward: from (network, inputs) to outputs, of passes of the recorder's own.
        compile: those passes; a name is that of a backend of torch.compile.
        by_inputs: whether statistics come from passes of the recorder's own from the first on.

    Attributes:
        sources: the tensors that statistics are gradients of.
        by_inputs: whether statistics come from passes of its own: the taps stay off in others.
        own: such a pass, node by node.
        compile: as given.

    Raises:
        UnknownOptionError: the empirical Fisher of a sum of likelihoods.
    """

    def __init__(
        self,
        net: nn.Module,
        blocks: Iterable[Block],
        likelihood: Likelihood | Sum,
        fisher: Fisher,
        generator: torch.Generator,
        workers: Workers,
        *,
        forward: Forward = run_network,
        compile: bool | str = False,
        by_inputs: bool = False,
    ) -> None:
        if fisher == "empirical" and isinstance(likelihood, Sum):
            raise UnknownOptionError(
                "fisher='empirical' reuses the training backward, which mixes the gradients of the "
                "parts of a sum of likelihoods: use 'sampled' or 'exact'"
            )
        self.net = net
        self.by_inputs = by_inputs
        self.compile = compile
        self.sources = sources_of(net, blocks)
        self._generator = generator
        self._workers = workers
        self.own = OwnPass(net, self.sources, likelihood, fisher, forward, workers, Places(net))
        self._pass = CompiledPass(self.own, compile)
        self._sampled = SampledStatistics(self.sources, likelihood, fisher, workers, self.seed)
        self._empirical = EmpiricalStatistics(self.sources, likelihood, workers)
        self._backward: BackwardWatch | None = None
        self._step = StepStatistics(self.sources, workers)

    @property
    def observing(self) -> bool:
        """Whether a pass was observed since the taps were switched."""
        return self._backward is not None or not self._step.empty

    def switch(self, on: bool) -> None:
        """Let the forward passes from now on record or not; what was not taken is forgotten."""
        self._end_step()
        on = on and not self.by_inputs
        if any(factor.requires_grad != on for factor in self.sources.factors):
            switch(self.net, self.sources.factors, on)

    def observe(self, outputs: Any, targets: Any) -> bool:
        """Record a forward pass, or prepare to; False if some outputs are not finite.

        Raises:
            LikelihoodError, ObservationError: see ``Preconditioner.observe``.
        """
        if self.by_inputs:
            raise ObservationError(
                "statistics come from the inputs, because the net is compiled or inputs were "
                "given before: call observe(outputs, targets, inputs=...)"
            )
        if self._backward is not None and not self._backward.passed:
            raise ObservationError("observe() was called twice before loss.backward()")
        self._finish()
        self.sources.forget()  # what backward passes left that nobody observed
        self._check_targets(targets)
        if self.own.fisher == "empirical":
            watch = self._empirical.watch(outputs, targets)
            self._backward = watch or BackwardWatch(output_tensors(outputs))
            return watch is not None
        collected = self._sampled.collect(outputs, targets)
        if collected.finite:
            self._step.add(collected)
        self._backward = BackwardWatch(output_tensors(outputs))
        return collected.finite

    def observe_inputs(self, inputs: Any, targets: Any) -> bool:
        """Record a pass of the recorder's own; False if some outputs are not finite.

        Raises:
            LikelihoodError, ObservationError: see ``Preconditioner.observe``.
        """
        self._check_targets(targets)
        return self.add(self._pass(inputs, targets, self.seed()).collected)

    def take(self) -> Statistics:
        """Return the step's statistics in the scale of one likelihood term, and end the step.

        They are empty if there are none. They are the caller's alone: a refresh that follows has
        their memory.

        Raises:
            ObservationError: of empirical statistics, no backward has come to the outputs, or
                several have.
        """
        self._finish()
        found = self._step.take()
        self._end_step()
        return found

    # What passes with a loss need (``TrainingStep``).

    def only_own_passes(self) -> OwnPass:
        """Return the recorder's own pass, from which alone statistics come from now on."""
        self.by_inputs = True
        self.switch(False)
        return self.own

    def seed(self) -> int:
        """Return the seed of the draws of the next pass; 0 if there are none."""
        return drawn_seed(self._generator, self._workers) if self.own.draws else 0

    def add(self, collected: Collected) -> bool:
        """Add the statistics of a pass of the recorder's own; False if it was not finite.

        Raises:
            ObservationError: no tap was passed.
        """
        self.by_inputs = True
        self.sources.pause()  # of a training forward that was recorded
        if collected.finite:
            wanted = bool(self.sources.factors) and collected.count > 0
            tapped = (one.key for one in self.sources.names.tapped)
            if wanted and not any(key in collected.statistics for key in tapped):
                raise ObservationError(
                    "the pass came to no layer that is recorded: a closure must return what the "
                    "network that it is given computes, lambda net: net(x)"
                )
            self._step.add(collected)
        return collected.finite

    def _check_targets(self, targets: Any) -> None:
        if self.own.fisher == "empirical" and targets is None:
            raise ObservationError("fisher='empirical' needs observe(outputs, targets)")

    def _finish(self) -> None:
        """Take what the last observed backward left; another micro-batch may follow."""
        if self._backward is not None:
            self._backward.close()
            self._backward = None
        try:
            collected = self._empirical.finish()
        except ObservationError:
            self._end_step()  # half of a step is none
            raise
        if collected is not None:
            self._step.add(collected)

    def _end_step(self) -> None:
        """Forget all that the step has left."""
        if self._backward is not None:
            self._backward.close()
            self._backward = None
        self._empirical.stop()
        self._step.forget()
        self.sources.forget()
