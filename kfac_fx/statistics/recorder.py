"""Switches the taps on for a step, and gathers what its backward passes leave."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kfac_fx.errors import ObservationError, UnknownOptionError
from kfac_fx.ir.use import StatisticKey
from kfac_fx.likelihoods.batch import output_tensors
from kfac_fx.likelihoods.builtin import Likelihood, Sum
from kfac_fx.likelihoods.sampling import forked
from kfac_fx.ops import Statistic, all_buffers, forget_input, forget_passes, pause, resume, switch
from kfac_fx.parallel import Workers, drawn_seed
from kfac_fx.statistics.buffers import Holder, by_calls, sources_of
from kfac_fx.statistics.forward import Forward, run_network
from kfac_fx.statistics.observation import Observation, StepStatistics, squared
from kfac_fx.statistics.own_pass import Loss, PurePass, Result
from kfac_fx.statistics.pass_cache import CompiledPass
from kfac_fx.statistics.user_graph import calls, check_recorded

log = logging.getLogger("kfac_fx")


class Recorder:
    """The statistics of one step at a time.

    Args:
        net: carries the taps.
        holders: blocks, pairs and moments whose statistics are wanted.
        fisher: "sampled", "exact" or "empirical".
        generator: of the draws.
        workers: the processes whose statistics are added up.
        forward: from (network, inputs) to outputs, of passes of the recorder's own.
        compile: those passes; a name is that of a backend of torch.compile.

    Attributes:
        by_inputs: whether statistics come from passes of its own: the taps stay off in others.

    Raises:
        UnknownOptionError: the empirical Fisher of a sum of likelihoods.
    """

    def __init__(
        self,
        net: nn.Module,
        holders: Sequence[Holder],
        likelihood: Likelihood | Sum,
        fisher: str,
        generator: torch.Generator,
        workers: Workers,
        *,
        forward: Forward = run_network,
        compile: bool | str = False,
    ) -> None:
        if fisher == "empirical" and isinstance(likelihood, Sum):
            raise UnknownOptionError(
                "fisher='empirical' reuses the training backward, which mixes the gradients of the "
                "parts of a sum of likelihoods: use 'sampled' or 'exact'"
            )
        self._likelihood, self._fisher, self._generator = likelihood, fisher, generator
        self._workers = workers
        self._sources = sources_of(net, holders)
        self._observation: Observation | None = None
        # What recorded with these taps before may have wanted more of them.
        switch(net, all_buffers(net), False)
        for buffer in all_buffers(net):
            buffer.grad = None
        self._compared = False
        self._statistics = StepStatistics(self._sources, workers)
        self._make: Callable[..., CompiledPass] = lambda **wanted: CompiledPass(
            PurePass(net, self._sources, likelihood, fisher, forward, workers, **wanted), compile
        )
        self._pass = self._make()
        self.net, self.by_inputs = net, False

    @property
    def buffers(self) -> list[Tensor]:
        """Return the factor buffers that it records into."""
        return self._sources.factors

    @property
    def observing(self) -> bool:
        """Whether a pass was observed since the taps were switched."""
        return self._observation is not None or not self._statistics.empty

    def switch(self, on: bool) -> None:
        """Lets the forward passes from now on record or not; forgets what was not taken."""
        if self._observation is not None:
            self._observation.close()
        self._observation, self._statistics = None, StepStatistics(self._sources, self._workers)
        resume(self._sources.factors)
        self._clear()
        switch(self.net, self._sources.factors, on and not self.by_inputs)

    def observe_inputs(self, inputs: Any, targets: Any) -> bool:
        """Records a pass of its own; False if some outputs are not finite.

        Raises:
            LikelihoodError, ObservationError: see ``Preconditioner.observe``.
        """
        self._check_targets(targets)
        return self._add(self._pass(inputs, targets, self._seed()))

    def _add(self, found: Result) -> bool:
        self.by_inputs = True
        pause(self._sources.factors)  # of a training forward that was recorded
        if found.finite:
            factors = self._sources.factors if found.count > 0 else ()
            if factors and not any(id(factor) in found.statistics for factor in factors):
                raise ObservationError(
                    "the pass came to no layer that is recorded: a closure must return what the "
                    "network that it is given computes, lambda net: net(x)"
                )
            assert found.scale is not None
            self._statistics.add(found.statistics, found, found.scale)
        return found.finite

    def training(self, loss: Loss | str) -> Callable[[Any, Any, bool], tuple[Result, bool]]:
        """Passes with a loss, and with statistics if asked; the flag says if outputs were finite.

        The taps stay off from now on in passes that are not the recorder's own.
        """
        plain = self._make(loss=loss, statistics=False)
        recording = self._make(loss=loss)
        self.by_inputs = True
        self.switch(False)

        def run(inputs: Any, targets: Any, record: bool) -> tuple[Result, bool]:
            nonlocal recording
            if not record:
                return plain(inputs, targets, 0), True
            found = recording(inputs, targets, self._seed())
            if found.finite and found.scale is None:
                with forked(self.net.parameters()):
                    own = self._pass.pure.run(inputs, targets, self._seed())
                found = replace(found, statistics=own.statistics, scale=1.0)
                if found.loss is not None and bool(found.loss.isfinite()):
                    log.info("statistics take a backward of their own: the loss has other parts")
                    recording = self._make(loss=loss, one_backward=False)
            return found, self._add(found)

        return run

    def observe(self, outputs: Any, targets: Any) -> bool:
        """Records a forward pass, or prepares to; False if some outputs are not finite.

        Raises:
            LikelihoodError, ObservationError: see ``Preconditioner.observe``.
        """
        if self.by_inputs:
            raise ObservationError(
                "statistics come from the inputs, because the net is compiled or inputs were "
                "given before: call observe(outputs, targets, inputs=...)"
            )
        if self._observation is not None and not self._observation.passed:
            raise ObservationError("observe() was called twice before loss.backward()")
        self._harvest()
        self._clear()  # of backward passes that nobody observed
        self._check_targets(targets)
        observation = Observation(self._likelihood, outputs, targets, self._sources)
        check_recorded(output_tensors(outputs), self._sources.factors)
        finite = observation.agree(self._workers)
        if finite and self._fisher == "empirical":
            if not self._compared:  # once: it takes a walk through the graph
                observation.behind = calls(output_tensors(outputs), self._sources.factors)
            observation.expect()
        elif finite:
            found = observation.record(self._fisher, self._seed())
            self._statistics.add(found, observation)
            pause(self._sources.factors)  # the training backward need not record again
        observation.watch()
        self._observation = observation
        return finite

    def _check_targets(self, targets: Any) -> None:
        if self._fisher == "empirical" and targets is None:
            raise ObservationError("fisher='empirical' needs observe(outputs, targets)")

    def _seed(self) -> int:
        """Of the draws of a pass, if there are any."""
        draws = self._fisher == "sampled" or (self._fisher == "exact" and self._sources.parameters)
        return drawn_seed(self._generator, self._workers) if draws else 0

    def take(self) -> dict[StatisticKey, Statistic]:
        """The step's statistics in the scale of one likelihood term; empty if there are none.

        They are the caller's alone: a refresh that follows has their memory.
        """
        self._harvest()
        found = self._sources.keyed(self._statistics.mean())
        self._statistics = StepStatistics(self._sources, self._workers)
        self._clear()
        return found

    def _harvest(self) -> None:
        """Takes what the last observed backward left; another micro-batch may follow."""
        observation, self._observation = self._observation, None
        if observation is None:
            return
        observation.close()
        resume(self._sources.factors)
        if observation.expects:
            if observation.count <= 0:
                self._statistics.add({}, observation)
                return
            scale = self._scale_of(observation)
            found = {id(f): f.grad for f in self._sources.factors if f.grad is not None}
            found |= {key: squared(g) for key, g in observation.gradients.items()}
            self._statistics.add(by_calls(self._sources, found), observation, scale)

    def _scale_of(self, observation: Observation) -> float:
        """The loss's; what was gathered for the step is dropped if there is none."""
        try:
            scale = observation.loss_scale()
        except ObservationError:
            self._statistics = StepStatistics(self._sources, self._workers)
            self._clear()
            raise
        if observation.strays:
            log.warning(
                "loss.backward() also came through a forward whose outputs were not observed; it "
                "is in the statistics: give observe() all outputs at once, or use fisher='sampled'"
            )
        self._compared = True
        return scale

    def _clear(self) -> None:
        forget_passes(self._sources.factors)
        forget_input()
        for factor in self._sources.factors:
            factor.grad = None
