"""K-FAC as a whole optimizer: Algorithm 2 of Martens & Grosse (2015), and KFC's stochastic form."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch.optim import Optimizer

from kfac_fx.config import Fisher, choice, period, share, within
from kfac_fx.curvature.averages import terms_needed
from kfac_fx.curvature.factor_storage import storage_of
from kfac_fx.curvature.inverses import InverseFisher
from kfac_fx.curvature.parameters import transformed
from kfac_fx.errors import ParameterChangedError, UnknownOptionError
from kfac_fx.likelihoods.named import Given, likelihood_of
from kfac_fx.likelihoods.sampling import fresh_generator
from kfac_fx.linalg.precision import all_finite
from kfac_fx.optim.adapt_damping import DampingRule
from kfac_fx.optim.batch_trust import BatchTrust
from kfac_fx.optim.diagnostics import Diagnostics
from kfac_fx.optim.groups import Groups
from kfac_fx.optim.last_step import LastStep
from kfac_fx.optim.objective import Task
from kfac_fx.optim.updates import AdaptiveUpdate, Rule, ScheduledUpdate, Situation
from kfac_fx.parallel import ALONE, Workers
from kfac_fx.reading.inspection import HasCurvature
from kfac_fx.statistics.forward import Forward, run_network
from kfac_fx.statistics.recorder import Recorder

log = logging.getLogger("kfac_fx")

Direction = dict[str, Tensor]

COUNTERS = ("skipped_batches", "rejected_steps", "skipped_statistics")


class KFAC(HasCurvature, Optimizer):
    """One call of ``step(inputs, targets)`` is one iteration.

    With ``lr=None`` the step length and the momentum minimise the quadratic model with the exact
    Fisher, and lambda and gamma adapt themselves; nothing needs tuning. With an ``lr`` (which any
    scheduler of torch may change) the form is KFC's: update = momentum * previous - lr * proposal,
    shortened to the trust region, with a fixed lambda.

    Args:
        net: what ``kfac_fx.transform`` returned. Parameters that it left alone are not updated.
        likelihood: as for ``Preconditioner``.
        params: groups of covered parameters with options of their own (``lr``, ``momentum``,
            ``weight_decay``); by default one group of all.
        lr, momentum: None, or the stochastic form's.
        weight_decay: eta, of the l2 term eta / 2 ||theta||^2.
        damping: lambda_0.
        damping_every, gamma_every, refresh_every: T1, T2 and T3.
        statistics_every: period of the statistics.
        statistics_fraction, products_fraction: tau1 and tau2, the first cases of a batch for
            statistics (enough for averages over 64 likelihood terms) and for products with the
            exact Fisher (at least 512).
        smallest_damping: floor of lambda, which the paper's rule lacks.
        gamma_limit: gamma is at most this multiple of sqrt(lambda + eta), infinite in the paper:
            while lambda is large, its search prefers gradient descent and stays with it.
        ema_decay: largest weight of old statistics.
        trust_region: KFC's largest squared length of a step in Fhat (stochastic form).
        outlier: a batch whose loss is this many times the running average (gradient, statistics:
            a hundred times as many), or not finite, is not trusted: if its loss was fine before
            the last step, that step is undone exactly and lambda grows; else it is skipped.
        tikhonov, structure, fisher, generator, workers, forward, factor_storage, compile:
            as for ``Preconditioner``; the Fisher is not the empirical one, the gradients
            are averaged over the workers here, and their pass is compiled unless they are sharded.

    Attributes:
        diagnostics: of the last step, plain numbers by name.
        skipped_batches, rejected_steps, skipped_statistics: how often that happened.

    Raises:
        UnknownOptionError, DampingError: an argument is wrong.
    """

    def __init__(
        self,
        net: fx.GraphModule,
        likelihood: Given = "categorical",
        params: Iterable[Any] | None = None,
        *,
        lr: float | None = None,
        momentum: float = 0.9,
        weight_decay: float = 1e-5,
        damping: float = 150.0,
        damping_every: int = 5,
        gamma_every: int = 20,
        refresh_every: int = 20,
        statistics_every: int = 1,
        statistics_fraction: float = 1 / 8,
        products_fraction: float = 1 / 4,
        smallest_damping: float = 1e-3,
        gamma_limit: float = 1.0,
        ema_decay: float = 0.95,
        trust_region: float | None = None,
        outlier: float = 5.0,
        tikhonov: str = "factored",
        structure: str | None = None,
        fisher: Fisher = "sampled",
        generator: torch.Generator | None = None,
        forward: Forward = run_network,
        workers: Workers = ALONE,
        factor_storage: str | None = None,
        compile: bool | str = False,
    ) -> None:
        net = workers.unwrapped(net)
        self.curvature, self.structure = transformed(net, structure)
        self._fraction = share("statistics_fraction", statistics_fraction)
        products_fraction = share("products_fraction", products_fraction)
        self.generator = generator or fresh_generator()
        storage = storage_of(factor_storage, self.generator)
        how = tikhonov, workers, storage
        self._inverse = InverseFisher(net, self.curvature, self.structure, *how, compile=compile)
        parameters = self._inverse.guard.parameters
        defaults = {"lr": 1.0 if lr is None else lr, "momentum": momentum}
        defaults["weight_decay"] = weight_decay
        super().__init__(list(parameters.values()) if params is None else params, defaults)
        workers.begin("KFAC", parameters, self.generator)
        self._workers, self._held = workers, workers.hold(net, parameters)
        self._groups = Groups(self, parameters, self._held)
        known = likelihood_of(likelihood)
        self._task = Task(self._held, known, forward, self.generator, workers, compile)
        self._recorder = Recorder(
            net,
            [entry.block for entry in self._inverse.averages.entries],
            known,
            choice("fisher", fisher, ("sampled", "exact")),
            self.generator,
            workers,
            forward=forward,
            compile=compile,
            by_inputs=self._held.given is None,
        )
        self._recorder.switch(False)
        every = period("damping_every", damping_every), period("gamma_every", gamma_every)
        self._rule = DampingRule(damping, weight_decay, smallest_damping, gamma_limit, *every)
        refresh_every = period("refresh_every", refresh_every)
        self._make: Rule = ScheduledUpdate(self._inverse, self._rule, refresh_every, trust_region)
        if lr is None:
            if workers.staleness:
                raise UnknownOptionError("stale inverses need an lr: without, gamma is searched")
            self._make = AdaptiveUpdate(
                self._task, self._inverse, self._rule, products_fraction, refresh_every, workers
            )
        self._statistics_every = period("statistics_every", statistics_every)
        self._trust = BatchTrust(outlier)
        self._decay = within("ema_decay", ema_decay, 0.0, 1.0)
        self._iteration = 0
        self._last = LastStep()
        self.diagnostics = Diagnostics()
        self.skipped_batches = self.rejected_steps = self.skipped_statistics = 0

    # One iteration.

    @torch.no_grad()
    def step(self, inputs: Any, targets: Any = None) -> Tensor:  # type: ignore[override]
        """One iteration on a batch; returns its loss before the update.

        Args:
            inputs: as ``observe`` of ``Preconditioner`` takes them. A closure is called several
                times, with other parameters too; tau1 and tau2 cannot shorten its batch.
            targets: as the likelihood takes them.

        Returns:
            The mean negative log-likelihood of a term, without the l2 term.

        Raises:
            LikelihoodError, ObservationError: the outputs do not fit, or cannot be recorded;
                nothing has changed.
        """
        self._inverse.guard.check()
        running, iteration = self._task.snapshot(), self._iteration
        draws = self.generator.get_state()
        with self._held.open():
            try:
                return self._iterate(inputs, targets, running)
            except BaseException:
                self._recorder.switch(False)
                self._task.restore(running)
                self._iteration = iteration
                self.generator.set_state(draws)
                raise

    def _iterate(self, inputs: Any, targets: Any, running: Direction) -> Tensor:
        self.diagnostics = Diagnostics()
        self._task.begin((inputs, targets))
        loss, gradient = self._gradient(inputs, targets)
        trusted = self._trust.believes(loss, gradient.values())
        if not trusted and self._undo_if_worse(inputs, targets, float(loss)):
            running = self._task.snapshot()
            loss, gradient = self._gradient(inputs, targets)
            trusted = self._trust.believes(loss, gradient.values())
        if not trusted:
            self._task.restore(running)
            self._count("skipped_batches", "the batch's loss or gradient is no use")
            return loss
        self._iteration += 1
        if not self._record(inputs, targets):
            self._iteration -= 1
            self._task.restore(running)
            self._count("skipped_batches", "the batch's statistics are no use")
            return loss
        if self._inverse.averages.recorded:
            self._advance((inputs, targets), float(loss), gradient, running)
        self._trust.accept(self._task.cases)
        numbers = {"iteration": self._iteration, "loss": float(loss), **self._rule.state()}
        counters = {name: getattr(self, name) for name in COUNTERS}
        self.diagnostics.update(numbers, clamped=self._inverse.clamped, **counters)
        return loss

    def _advance(
        self, batch: tuple[Any, Any], loss: float, gradient: Direction, running: Direction
    ) -> None:
        parameters = self._groups.parameters()
        options = {key: self._groups.options(key) for key in ("lr", "momentum")}
        with self.diagnostics.stage("update"):
            made = self._make(
                Situation(self._iteration, batch, parameters, gradient, self._last.update, options)
            )
        self.diagnostics.update(made.numbers)
        if not all_finite(list(made.step.values())):
            self._last.update = {}
            self._count("rejected_steps", "the update is not finite")
            return
        worth = self._trust.share(self._task.cases)
        if worth < 1:
            torch._foreach_mul_(list(made.step.values()), worth)
            self.diagnostics["share"] = worth
        adaptive = isinstance(self._make, AdaptiveUpdate)
        judged = adaptive and self._iteration % self._rule.damping_every == 0
        objective = loss + self._groups.l2() if judged else loss
        self._last.take(parameters, running, made.step)
        if judged:
            self._judge(batch, objective, made.predicted)

    def _judge(self, batch: tuple[Any, Any], before: float, predicted: float) -> None:
        """The reduction ratio on the same batch and masks; a step that is no good is undone."""
        inputs, targets = batch
        with self.diagnostics.stage("ratio"), self._task.aside():
            after = self._task.value(inputs, targets) + self._groups.l2()
        if self._trust.grew(before, after):
            self._undo()
        else:
            self.diagnostics["rho"] = self._rule.judge(after - before, predicted)

    # The parts of an iteration.

    def _gradient(self, inputs: Any, targets: Any) -> tuple[Tensor, Direction]:
        """The loss, and the gradient of the loss with its l2 term."""
        parameters, decay = self._groups.parameters(), self._groups.options("weight_decay")
        with self.diagnostics.stage("gradient"):
            loss, dense = self._task.gradient(inputs, targets, parameters)
        pairs = zip(parameters.items(), dense, strict=True)
        return loss, {n: g.add(p, alpha=decay[n]) if decay[n] else g for (n, p), g in pairs}

    def _record(self, inputs: Any, targets: Any) -> bool:
        """Records where that is due; False if the statistics are not finite, or outliers."""
        if (self._iteration - 1) % self._statistics_every and self._inverse.averages.recorded:
            return True
        terms = terms_needed(self._inverse.averages.recorded, self._decay)
        least = math.ceil(terms * self._task.cases / self._task.terms)
        part = self._task.first((inputs, targets), self._fraction, least)
        with self.diagnostics.stage("statistics"):
            if self._recorder.by_inputs:
                with self._task.same_masks():
                    finite = self._recorder.observe_inputs(*part)
            else:  # sharded parameters, which a pass of the recorder's own does not see whole
                self._recorder.switch(True)
                with torch.enable_grad(), self._task.aside():
                    finite = self._recorder.observe(self._task.outputs(part[0]), part[1])
            found = self._recorder.take()
        self._recorder.switch(False)
        worth = self._trust.share(self._task.cases)
        if finite and self._inverse.fold(found, self._decay**worth, self._trust.widest):
            self._trust.fitted(True)
            return True
        self._trust.fitted(False)
        self.skipped_statistics += 1
        return False

    # Batches and steps that are no good.

    def _undo_if_worse(self, inputs: Any, targets: Any, loss: float) -> bool:
        """Undoes the last step if it made this batch's loss what it is."""
        if not self._last.parameters:
            return False
        with self._task.aside():
            before = self._task.value(inputs, targets, self._last.parameters)
        if not self._trust.grew(before, loss):
            return False
        self._undo()
        return True

    def _undo(self) -> None:
        """Parameters and buffers as they were before the last step; lambda grows."""
        self._task.restore(self._last.undo(self._groups.parameters()))
        self._rule.rejected()
        self._count("rejected_steps", "the loss grew too much, the last step is undone")

    def _count(self, counter: str, why: str) -> None:
        setattr(self, counter, getattr(self, counter) + 1)
        log.warning("iteration %d: %s", self._iteration, why)

    # What a step was like, and state.

    def _in_force(self) -> float:
        return self._make.damping

    def summary(self) -> str:
        """The last step in a line, for progress bars."""
        return self.diagnostics.summary()

    def state_dict(self) -> dict[str, Any]:
        """Groups as torch has them, and all else as tensors and plain values under "kfac"."""
        groups = super().state_dict()["param_groups"]
        return {
            "state": {},
            "param_groups": groups,
            "kfac": {
                "version": 1,
                "iteration": self._iteration,
                "trust": self._trust.state(),
                "rule": self._rule.state(),
                **self._last.state(),
                "inverse": self._inverse.state(),
                "generator": self.generator.get_state(),
                "counters": {name: getattr(self, name) for name in COUNTERS},
            },
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores ``state_dict``, random generator included; nothing changes if it does not fit.

        Raises:
            ParameterChangedError: the state belongs to other blocks, or to another optimizer.
        """
        own = state_dict.get("kfac", {})
        if own.get("version") != 1:
            raise ParameterChangedError("this is no state_dict of a KFAC of this version")
        self._inverse.load(own["inverse"])
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        self._rule.load(own["rule"])
        self._iteration = own["iteration"]
        self._trust.load(own["trust"])
        self._last.load(own)
        self.generator.set_state(own["generator"])
        for name, value in own["counters"].items():
            setattr(self, name, value)
