"""K-FAC as a whole optimizer: Algorithm 2 of Martens & Grosse (2015), and KFC's stochastic form.

An iteration is read here; its parts are in objective.py (passes of the network),
batch_statistics.py (statistics), choose_form.py and updates.py (the update), batch_trust.py (which
batches are believed) and last_step.py (undoing).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.optim import Optimizer

from kfac_fx.config import CurvatureOptions, Fisher, Structure, Tikhonov, choice, period_or_ours
from kfac_fx.curvature.inverses import InverseFisher
from kfac_fx.curvature.parameters import transformed
from kfac_fx.errors import ParameterChangedError, UnknownOptionError
from kfac_fx.likelihoods.builtin import Tree
from kfac_fx.likelihoods.named import Given, check_described, described, likelihood_of
from kfac_fx.likelihoods.sampling import fresh_generator
from kfac_fx.linalg.precision import all_finite
from kfac_fx.optim.batch_statistics import BatchStatistics
from kfac_fx.optim.batch_trust import BatchTrust, warn_rarely
from kfac_fx.optim.choose_form import FormChoice
from kfac_fx.optim.diagnostics import Diagnostics
from kfac_fx.optim.failed_steps import EARLY, STUCK, TRIES, FailedSteps
from kfac_fx.optim.groups import Groups
from kfac_fx.optim.kfac_options import KFACOptions
from kfac_fx.optim.last_step import Buffers, LastStep
from kfac_fx.optim.objective import Batch, Objective
from kfac_fx.optim.products import Direction, NoProductsError
from kfac_fx.optim.situation import Situation
from kfac_fx.optim.updates import RATE, Forms
from kfac_fx.parallel import ALONE, Workers
from kfac_fx.reading.inspection import HasCurvature
from kfac_fx.statistics.recorder import Recorder
from kfac_fx.torch_internals import foreach
from kfac_fx.torch_internals.modes import weights_cast_anew

log = logging.getLogger("kfac_fx")

VERSION = 2
"""Of the layout of ``state_dict``; raised when an older one can no longer be read."""


class KFAC(HasCurvature, Optimizer):
    """Trains a transformed module; one call of ``step(inputs, targets)`` is one iteration.

    With ``lr=None`` steps minimise the quadratic model with the exact Fisher, along the proposal
    and the last update, or as a whole where a batch has few rows (``KFACOptions.exact_rows``).
    lambda adapts itself; nothing needs tuning. With an ``lr``, for any scheduler, steps are KFC's:
    update = momentum * previous - lr * proposal, bounded as ``Preconditioner`` does. A run without
    goes on with these, at 0.1, if they get further, batches disagree, or there are no steps of the
    model (docs/howto/whole_optimizer.md). docs/explanation/mathematics.md, section 9, has both.

    Args:
        net: what ``kfac_fx.transform`` returned. Parameters that it left alone are not updated.
        likelihood: what the outputs mean, and so the objective; as for ``Preconditioner``.
        params: groups of covered parameters with options of their own (``lr``, ``momentum``,
            ``weight_decay``); by default one group of all.
        lr: learning rate of the stochastic form; None for the adaptive one.
        momentum: the momentum of the stochastic form, in units of the previous update.
        weight_decay: eta, of the l2 term eta / 2 ||theta||^2 of the objective.
        damping: lambda_0 > 0, in the units of the Fisher of one likelihood term. None for the mean
            eigenvalue of the first batch's Fisher; with an ``lr`` as for ``Preconditioner``.
        statistics_every: period of the statistics, in iterations. None for each iteration, of
            closures for those with a refresh; with an ``lr`` as for ``Preconditioner``.
        refresh_every: T3, the period of the inverses, in iterations; besides, the first three. None
            for 5; where gamma is searched for its period, with an ``lr`` as for ``Preconditioner``.
        tikhonov: how Kronecker blocks are damped; as for ``Preconditioner``.
        structure: "block_diagonal" leaves the couplings out, "block_tridiagonal" has those that the
            transform found. None for what the transform was asked for; else for block-diagonal, and
            with the paper's rule for the couplings.
        fisher: "sampled" or "exact"; the gradient's pass gives no empirical statistics here.
        generator: of sampled statistics and of masks; its state is part of ``state_dict``.
        workers: the processes that share a batch; gradients are averaged over them here.
        compile: run the program and the passes of statistics and gradient through torch.compile
            (the gradient's unless parameters are sharded); a name is that of a backend.
        options: rates of the adaptation, shares of the batch, and guards against bad batches;
            ``KFACOptions.paper()`` for the constants of the paper.

    Attributes:
        curvature: the blocks and couplings of ``net``.
        structure: the one in use.
        diagnostics: those of the last step, plain numbers by name.
        skipped_batches, rejected_steps: how many were left out, and undone or not made.
        skipped_statistics: how many batches gave statistics that were not finite, or outliers.

    Raises:
        UnknownOptionError, DampingError: an argument is wrong.
        KFACError: ``net`` carries no annotations.
    """

    def __init__(
        self,
        net: fx.GraphModule,
        likelihood: Given = "categorical",
        params: Iterable[Any] | None = None,
        *,
        lr: float | None = None,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        damping: float | None = None,
        statistics_every: int | None = None,
        refresh_every: int | None = None,
        tikhonov: Tikhonov = "factored",
        structure: Structure | None = None,
        fisher: Fisher = "sampled",
        generator: torch.Generator | None = None,
        workers: Workers = ALONE,
        compile: bool | str = False,
        options: KFACOptions | None = None,
    ) -> None:
        net = workers.unwrapped(net)
        options = options or KFACOptions()
        # Couplings win where batches are all the cases, and lose where they are noisy.
        paper = lr is None and options.damping_every is not None
        curvature, self.structure = transformed(net, structure, coupled=paper)
        self.curvature = curvature
        self.generator = generator or fresh_generator()
        recording = period_or_ours("statistics_every", statistics_every)
        refreshing = period_or_ours("refresh_every", refresh_every)
        choice("fisher", fisher, ("sampled", "exact"))
        known = likelihood_of(likelihood)

        # Which inverse Fisher, of which parameters.
        how = CurvatureOptions(
            structure=self.structure,
            tikhonov=tikhonov,
            factor_storage=options.factor_storage,
            compile=compile,
        )
        self.inverse = InverseFisher(net, curvature, how, self.generator, workers)
        parameters = self.inverse.covered.parameters
        defaults = {
            "lr": 1.0 if lr is None else lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
        }
        super().__init__(list(parameters.values()) if params is None else params, defaults)
        workers.begin("KFAC", parameters, self.generator)
        self._whole = workers.hold(net, parameters)
        self._groups = Groups(self, parameters, self._whole)

        # Passes of the network: of the objective, and of the statistics.
        self._objective = Objective(
            self._whole, known, options.forward, self.generator, workers, compile
        )
        self.recorder = Recorder(
            net,
            self.inverse.estimate.holders,
            known,
            fisher,
            self.generator,
            workers,
            forward=options.forward,
            compile=compile,
            by_inputs=self._whole.given is None,
            owner="KFAC",
        )
        # The taps stay off in every pass but the one of the statistics: recording takes time.
        self.recorder.switch(False)

        # From gradient to update.
        of = (self.inverse, self._objective, workers)
        forms = Forms(*of, options, damping, weight_decay, recording, refreshing, self.structure)
        form = forms.adaptive() if lr is None else forms.scheduled()
        self._choice = FormChoice(form, forms.without_rate_given)
        self._trust = BatchTrust(options.outlier)
        self._statistics = BatchStatistics(
            self.recorder, self.inverse, self._objective, self._trust
        )
        self._last = LastStep()
        self._failed = FailedSteps()
        self._iteration = 0
        self.diagnostics = Diagnostics()
        self.skipped_batches = 0
        self.rejected_steps = 0
        self.skipped_statistics = 0

    @torch.no_grad()
    def step(self, inputs: Tree, targets: Tree = None) -> Tensor:  # type: ignore[override]
        """Do one iteration on a batch; return its loss before the update.

        Args:
            inputs: the inputs as ``observe`` of ``Preconditioner`` takes them. A closure is called
                several times, with other parameters too; tau1 and tau2 cannot shorten its batch.
            targets: the targets as the likelihood takes them.

        Returns:
            The mean negative log-likelihood of a term, [], without the l2 term.

        Raises:
            LikelihoodError, ObservationError, StatisticsError: the outputs do not fit, cannot be
                recorded, or bring no statistics at all; nothing has changed.
            ParameterChangedError: a parameter was replaced, reshaped, cast or moved.
            UnknownOptionError: the paper's form cannot be used; see docs/howto/whole_optimizer.md.
        """
        self.recorder.take_turn()
        self.inverse.covered.check()
        buffers = self._objective.snapshot()
        iteration = self._iteration
        draws = self.generator.get_state()
        choice = self._choice.copied()
        # A step changes the weights between its passes, and autocast would not notice.
        with weights_cast_anew(), self._whole.open():
            try:
                return self._iterate(Batch(inputs, targets), buffers)
            except BaseException:
                # Also an interrupt from the keyboard: the next step repeats this one bit by bit.
                self.recorder.switch(False)
                self._choice.put_back(self._held())
                self._objective.restore(buffers)
                self._choice = choice
                self._iteration = iteration
                self.generator.set_state(draws)
                raise

    def _iterate(self, batch: Batch, buffers: Buffers) -> Tensor:
        """Do one iteration; ``buffers`` are copies from before it."""
        self.diagnostics = Diagnostics()
        self._objective.begin(batch)
        try:
            loss, gradient = self._gradient(batch)
        except ValueError as error:
            # The step before may be to blame, if a distribution refuses what it has made.
            if not (self._objective.refused(error) and self._undo_if_worse(batch, math.nan)):
                raise
            buffers = self._objective.snapshot()
            loss, gradient = self._gradient(batch)
        compares = self._choice.form.compares_batches
        trusted = self._trust.believes(loss, gradient.values(), compares)
        if not trusted and self._undo_if_worse(batch, float(loss)):
            # The step before the batch was bad; the batch gets a second chance.
            buffers = self._objective.snapshot()
            loss, gradient = self._gradient(batch)
            trusted = self._trust.believes(loss, gradient.values(), compares)
        if not trusted:
            self._skip(buffers, "loss or gradient")
            return loss
        if self._undo_if_held_out_fails(batch) or self._tries_other_form():
            buffers = self._objective.snapshot()
            loss, gradient = self._gradient(batch)
        self._iteration += 1
        if not self._statistics.record(batch, self._iteration, self._choice.form, self.diagnostics):
            self._iteration -= 1
            self.skipped_statistics += 1
            self._skip(buffers, "statistics")
            return loss
        if self.inverse.estimate.recorded:
            self._advance(batch, gradient, buffers)
        self._trust.accept(self._objective.cases)
        self.diagnostics |= {
            "iteration": self._iteration,
            "loss": float(loss),
            **self._choice.form.rule.numbers(),
            "clamped": self.inverse.clamped,
            **self._counters(),
        }
        return loss

    def _advance(self, batch: Batch, gradient: Direction, buffers: Buffers) -> None:
        """Make the step, and judge it where that is due; a step that fails may be tried again."""
        at = Situation(
            self._iteration,
            batch,
            self._groups.parameters(),
            gradient,
            self._last.update,
            self._groups.options("lr"),
            self._groups.options("momentum"),
            self._groups.options("weight_decay"),
        )
        if (rule := self._choice.form.held_out) is None:
            self._attempt(at, buffers)
            return
        damping = None
        for tried in range(TRIES):
            if self._attempt(replace(at, again=tried > 0), buffers):
                if damping is not None:
                    rule.settle(damping)
                return
            # Lambda of the first iteration is found by its first attempt.
            damping = damping or rule.damping
            rule.raised(first=self._iteration == 1)
        self.rejected_steps += 1
        if self._failed.none_made(self._iteration):
            self._take_rate(f"{STUCK} batches in a row had no step that lowers their loss")

    def _attempt(self, at: Situation, buffers: Buffers) -> bool:
        """Make a step; return False if it was put back, as the batch's loss grew."""
        with self.diagnostics.stage("update"):
            try:
                made = self._choice.form.make(at)
            except NoProductsError as error:
                self._take_rate(f"steps of the model take products with the Fisher, and {error}")
                made = self._choice.form.make(replace(at, previous={}))
        self.diagnostics.update(made.numbers)
        if not all_finite(list(made.step.values())):
            self._last.forget_update()
            self._reject("the update is not finite")
            return True
        worth = self._trust.share(self._objective.cases)
        if self._choice.form.held_out:
            worth *= self._choice.form.held_out.fraction
        if worth < 1:
            foreach.mul_(list(made.step.values()), worth)
            self.diagnostics["share"] = worth
        before = float(self._objective.start) + self._groups.l2() if made.judged else 0.0
        self._last.take(at.parameters, buffers, made.step)
        # The model of a share w of its best step is w (2 - w) times that of the whole.
        predicted = made.predicted * worth * (2 - worth)
        try:
            return not made.judged or self._judge(at.batch, before, predicted)
        except BaseException:
            # Nobody has found this step good: the user's code failed, or was interrupted.
            self._last.put_back(at.parameters)
            raise

    def _judge(self, batch: Batch, before: float, predicted: float) -> bool:
        """Compare the change of the objective with the model's; return False to try again.

        Batch and masks are those of the model. On other cases the ratio would say how much the
        cases differ, not how far the model can be believed.
        """
        self._failed.begin(before)
        with self.diagnostics.stage("ratio"), self._objective.aside():
            after = self._objective.value(batch) + self._groups.l2()
        if self._choice.form.held_out:
            # "not <=" rather than ">": a loss that is not a number is no good.
            if not after <= before:
                self._last.put_back(self._groups.parameters())
                self._failed.raised(before, after)
                return False
            self._failed.made()
        elif self._trust.grew(before, after):
            self._undo()
            return True
        self._last.objectives = before, after
        self.diagnostics["rho"] = self._choice.form.rule.judge(after - before, predicted)
        return True

    def _undo_if_held_out_fails(self, batch: Batch) -> bool:
        """Judge the last step on this batch, which it has not seen; return whether it is undone."""
        rule = self._choice.form.held_out
        if rule is None or not self._last.parameters:
            return False
        after = float(self._objective.start) + self._groups.l2()
        if (before := self._last.began_at(after)) is None:
            # Masks of both passes are this batch's, and so are the moments that BatchNorm takes.
            with self.diagnostics.stage("ratio"), self._objective.aside():
                before = self._objective.value(batch, self._last.parameters)
            before += self._groups.l2(self._last.parameters)
        if not math.isfinite(before):  # nothing to compare with: averages would be NaN for ever
            return False
        if self._trust.grew(before, after):
            self._undo()
            return True
        self.diagnostics["rho_held_out"] = rule.judge_held_out(after - before, before)
        if why := rule.why_not:
            self._begin_form(settled=True)
            log.info("iteration %d: %s, steps have a rate from here", self._iteration, why)
        return False

    def _take_rate(self, why: str) -> None:
        """Go on with steps of a rate, as there are none of the model; say why.

        Raises:
            UnknownOptionError: the steps are to be the paper's.
        """
        if self._choice.form.held_out is None:
            raise UnknownOptionError(f"KFACOptions.paper() does not work here: {why}; pass lr=")
        self._begin_form(settled=True)
        text = "iteration %d: %s; steps have a rate of %g from here, pass lr= to choose it"
        log.warning(text, self._iteration, why, RATE)

    def _tries_other_form(self) -> bool:
        if not self._choice.open:  # with an lr nobody has to wait for the loss
            return False
        objective = float(self._objective.start) + self._groups.l2()
        if turned := self._choice.judge(objective, self._held()):
            self._begin_form()
        return turned

    def _begin_form(self, settled: bool = False) -> None:
        """Start the steps of another form from nothing; with a rate for good if that is settled."""
        if settled:
            self._choice.settle()
        # Its steps are of another length, and inverses of another lambda.
        self._last = LastStep()
        self.inverse.use(None)

    def _gradient(self, batch: Batch) -> tuple[Tensor, Direction]:
        """Return the loss, and the gradient of the loss with its l2 term."""
        parameters = self._groups.parameters()
        decay = self._groups.options("weight_decay")
        with self.diagnostics.stage("gradient"):
            modelled = not self._choice.form.scheduled
            loss, dense = self._objective.gradient(batch, parameters, modelled)
        pairs = zip(parameters.items(), dense, strict=True)
        return loss, {n: g.add(p, alpha=decay[n]) if decay[n] else g for (n, p), g in pairs}

    # Batches and steps that are no good.

    def _undo_if_worse(self, batch: Batch, loss: float) -> bool:
        """Undo the last step if it made this batch's loss what it is; return whether it did."""
        if not self._last.parameters:
            return False
        # At the parameters from before that step. If the batch is bad there too, it is the batch.
        with self._objective.aside():
            before = self._objective.value(batch, self._last.parameters)
        if not self._trust.grew(before, loss):
            return False
        self._undo()
        return True

    def _undo(self) -> None:
        """Put parameters and buffers back to before the last step; lambda grows."""
        self._objective.restore(self._last.undo(self._groups.parameters()))
        self._choice.form.rule.rejected()
        searching = not self._choice.form.scheduled and self._iteration <= EARLY
        self._reject("the loss grew too much, the last step is undone", quiet=searching)

    def _reject(self, why: str, quiet: bool = False) -> None:
        """Count a step that was undone or not made."""
        self.rejected_steps += 1
        self._failed.tell(self._iteration, why, quiet)

    def _skip(self, buffers: Buffers, what: str) -> None:
        """Put the buffers back to before a batch of which nothing is used, and count it."""
        self._objective.restore(buffers)
        self.skipped_batches += 1
        text = "iteration %d: a batch is left out for its %s"
        warn_rarely(self.skipped_batches, text, self._iteration, what)

    # What a step was like, and state.

    def _held(self) -> Direction:
        return self._objective.with_buffers(self._groups.parameters())

    def _in_force(self) -> float:
        return self._choice.form.make.damping

    def _counters(self) -> dict[str, int]:
        return {
            "skipped_batches": self.skipped_batches,
            "rejected_steps": self.rejected_steps,
            "skipped_statistics": self.skipped_statistics,
        }

    def summary(self) -> str:
        """Return the last step in a line, for progress bars."""
        return self.diagnostics.summary()

    def state_dict(self) -> dict[str, Any]:
        """Return groups as torch has them, and plain values and tensors under "kfac"."""
        return {
            "state": {},
            "param_groups": super().state_dict()["param_groups"],
            "kfac": {
                "version": VERSION,
                "likelihood": described(self._objective.likelihood),
                "iteration": self._iteration,
                "trust": self._trust.state(),
                "failed": self._failed.state(),
                **self._choice.state(),
                "previous": self._last.update_copy(),
                "before": self._last.before(),
                "inverse": self.inverse.state(),
                "generator": self.generator.get_state(),
                "counters": self._counters(),
            },
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore ``state_dict``, random generator included; nothing changes if it does not fit.

        Raises:
            ParameterChangedError, LikelihoodError: it is of other blocks, of another optimizer or
                of another likelihood.
        """
        if (own := state_dict.get("kfac", {})).get("version") != VERSION:
            raise ParameterChangedError("this is no state_dict of a KFAC of this version")
        check_described(self._objective.likelihood, own.get("likelihood"))
        self.inverse.load(own["inverse"])
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        self._choice.load(own, self.inverse.estimate.like.device)
        self._iteration = own["iteration"]
        self._trust.load(own["trust"])
        self._failed.load(own.get("failed", (None, 0, 0)))
        self._last.load(own["previous"], own["before"])
        self.generator.set_state(own["generator"].cpu())
        for name in self._counters():
            setattr(self, name, own["counters"][name])
