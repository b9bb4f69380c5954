"""K-FAC as a preconditioner of gradients, in front of any torch.optim optimizer."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, Literal
from weakref import ref

import torch
from torch import Tensor, fx

from kfac_fx.config import (
    FISHERS,
    CurvatureOptions,
    FactorStorage,
    Fisher,
    Structure,
    Tikhonov,
    choice,
    period_or_ours,
    positive,
    within,
)
from kfac_fx.curvature.estimate import DECAY, REFRESHES, STATISTICS, is_due
from kfac_fx.curvature.inverses import InverseFisher
from kfac_fx.curvature.mean_eigenvalue import NOTHING_LAGS
from kfac_fx.curvature.parameters import transformed
from kfac_fx.errors import (
    DampingError,
    GradientError,
    ObservationError,
    ParameterChangedError,
    StatisticsError,
)
from kfac_fx.likelihoods.named import (
    Given,
    check_described,
    described,
    is_quadratic,
    likelihood_of,
)
from kfac_fx.likelihoods.sampling import forked, fresh_generator
from kfac_fx.optim.bounds import AdaptiveLength, NaturalLength
from kfac_fx.optim.layer_bounds import LayerBounds
from kfac_fx.optim.taken_step import LARGEST_STEP, TakenStep
from kfac_fx.parallel import ALONE, Net, Workers
from kfac_fx.reading.inspection import HasCurvature
from kfac_fx.statistics.forward import Forward, run_network
from kfac_fx.statistics.recorder import Recorder
from kfac_fx.torch_internals import foreach

log = logging.getLogger("kfac_fx")

VERSION = 2
"""Of the layout of ``state_dict``; raised when an older one can no longer be read."""


class Preconditioner(HasCurvature):
    """Replaces gradients by Fhat^-1 gradient, with Fhat from the statistics of the taps.

    A step of training: ``outputs = net(x)``, ``observe(outputs)``, ``loss.backward()``, ``step()``,
    then the optimizer's own step. The mathematics is in docs/explanation/mathematics.md.

    Several of them on one module may take turns, whole step by whole step, with statistics in each
    (``statistics_every=1``): a module's taps serve one step at a time, and are off after one whose
    next step records nothing. Where another one has come between, the error says so.

    Args:
        net: what ``kfac_fx.transform`` returned, any GraphModule that carries its annotations, or a
            model compiled with ``kfac_fx.backend`` that has run once.
        likelihood: what the outputs mean, and so which Fisher it is: "categorical" (logits),
            "bernoulli" (logits), "normal" (means), "residual", an object of
            ``kfac_fx.likelihoods``, or a callable from outputs to a
            ``torch.distributions.Distribution``.
        damping: lambda > 0, in the units of the Fisher of one likelihood term; factored Tikhonov
            uses gamma = sqrt(lambda). None for a fifth of the mean eigenvalue of the curvature,
            taken anew at each refresh, and less where steps agree: it follows the Fisher, which
            shrinks with the loss. Too small a value makes long steps in directions that few cases
            have shown; a large one gives the gradient, scaled by 1 / lambda.
        tikhonov: "factored", (A + pi gamma I) (x) (G + gamma / pi I); "exact", A (x) G + lambda I
            (sums of two Kronecker products stay factored); or "ekfac", the same with estimated
            eigenvalues. The last two need structure="block_diagonal".
        structure: "block_diagonal" leaves the couplings out, "block_tridiagonal" has those that the
            transform found, at about one and a half times the cost of a refresh and of statistics.
            None for what the transform was asked for, and else block-diagonal.
        fisher: "exact" takes every column of the output Fisher's square root (a
            backward for each block of columns);
            "sampled" all of them at once with random signs (one backward, the same mean), or draws
            targets from the model where the root is not known; "empirical" reuses the training
            backward and needs targets.
        ema_decay: in [0, 1), the largest weight of the old average. Early averages weigh every
            batch alike.
        statistics_every: period of the statistics, counted in calls of ``step``; the first call
            always has some. None for calls 1, 2, 3, 5, 9, 11 and every tenth from there on.
        refresh_every: period of the inverses, counted in calls of ``step``. None for calls 1, 2, 3,
            5, 9 and 17, as the first averages change fast, and every twentieth from there on.
            Between two refreshes inverses are older than the averages, which costs accuracy and
            saves time.
        trust_region: how long a preconditioned gradient is. "adaptive" looks at gradients alone:
            its length in Fhat, (grad^T Fhat^-1 grad)^(1/2), is 0.1 at most, times a factor that
            grows as long as gradients agree with the steps before and shrinks where noise has the
            upper hand; a layer's part is a tenth of its weights at most; and where lambda follows
            the curvature, averages that have fallen behind a shrinking Fisher are made up for. A
            number is the largest squared length, and no more than that (KFC's bound). None for the
            gradient times Fhat^-1 as it is.
        largest_step: largest step of the optimizer, in units of the length of a layer's weights: a
            longer one, momentum and learning rate included, is shortened after it. It is the step
            of any torch.optim optimizer that follows ``step()``. While steps have to be shortened,
            adaptive lengths wear down, so that a rate that is too large is made up for. None for no
            limit.
        generator: the generator of the draws, on the CPU; its state is part of ``state_dict``. None
            for one that torch's global stream seeds.
        workers: the processes that share a batch (``kfac_fx.distributed.DataParallel``). The
            gradients are averaged over them before ``step()``, as DistributedDataParallel does.
        forward: for ``observe(inputs=...)``: from (network, inputs) to the likelihood's outputs,
            where they are not what the network returns for ``inputs``.
        factor_storage: the storage of the averages between folds. None: as they are computed, in
            float32 at least. "bfloat16": half of that, rounded stochastically with draws of
            ``generator``; not for float64. "host": in CPU memory, pinned; without CUDA as None.
        compile: run the program, and passes for ``observe(inputs=...)``, through torch.compile; a
            name is that of its backend. On a GPU such a pass is a CUDA graph. ``net`` may be
            compiled whatever this says.

    Attributes:
        curvature: the blocks and couplings of ``net``.
        structure: the one in use.
        skipped_statistics: how often a non-finite value kept a step's statistics out of the
            averages.
        skipped_gradients: how often a non-finite value made all gradients of a step zero.

    Raises:
        UnknownOptionError, DampingError: an argument is wrong.
        KFACError: ``net`` carries no annotations.
    """

    def __init__(
        self,
        net: fx.GraphModule,
        likelihood: Given = "categorical",
        *,
        damping: float | None = None,
        tikhonov: Tikhonov = "factored",
        structure: Structure | None = None,
        fisher: Fisher = "sampled",
        ema_decay: float = DECAY,
        statistics_every: int | None = None,
        refresh_every: int | None = None,
        trust_region: float | Literal["adaptive"] | None = "adaptive",
        largest_step: float | None = LARGEST_STEP,
        generator: torch.Generator | None = None,
        workers: Workers = ALONE,
        forward: Forward = run_network,
        factor_storage: FactorStorage | None = None,
        compile: bool | str = False,
    ) -> None:
        inner = workers.unwrapped(net)
        owner = _recorded_module(inner)
        # A model compiled with our backend keeps its taps in graphs that are recorded as they are;
        # any other compiled module is one graph from whose outputs no second backward is possible.
        net_is_compiled = hasattr(net, "_orig_mod") and owner is inner
        net = owner
        curvature, structure = transformed(net, structure)
        self.curvature = curvature
        self.structure = structure
        self.likelihood = likelihood_of(likelihood)
        self.fisher = choice("fisher", fisher, FISHERS)
        self._damping: float | None = None
        self.damping = damping
        self.ema_decay = within("ema_decay", ema_decay, 0.0, 1.0)
        self.statistics_every = period_or_ours("statistics_every", statistics_every)
        self.refresh_every = period_or_ours("refresh_every", refresh_every)
        self._length = _length(trust_region, is_quadratic(self.likelihood))
        self.generator = generator or fresh_generator()
        self.skipped_statistics = 0
        self.skipped_gradients = 0
        self._steps = 0
        self._calls = 0  # of step(); unlike the steps they are no state, and never go back
        self._workers = workers
        options = CurvatureOptions(
            structure=structure, tikhonov=tikhonov, factor_storage=factor_storage, compile=compile
        )
        self.inverse = InverseFisher(net, curvature, options, self.generator, workers)
        # From here on all processes draw from the first one's stream; before it nothing was drawn.
        workers.begin("Preconditioner", self.inverse.covered.parameters, self.generator)
        layers = [block.parameters for block in curvature.blocks.values()]
        self._layers = LayerBounds(self.inverse.covered.parameters, layers, workers)
        self._taken: TakenStep | None = None
        largest_step = positive("largest_step", largest_step)
        if largest_step is not None:
            own = ref(self)  # no cycle: a preconditioner goes as soon as nobody has it
            self._taken = TakenStep(
                self.inverse.covered.parameters,
                layers,
                largest_step,
                workers,
                lambda: 0 if (found := own()) is None else found._calls,
                lambda kept: None if (found := own()) is None else found._length.cut(kept),
            )
        # Read by ``TrainingStep``. Like ``inverse`` it is the library's, and not in the docstring.
        self.recorder = Recorder(
            net,
            self.inverse.estimate.holders,
            self.likelihood,
            self.fisher,
            self.generator,
            workers,
            forward=forward,
            compile=compile,
            # A compiled backward runs once, and that is the training's: sampled and exact
            # statistics take a pass of their own. Empirical ones are of that very backward.
            by_inputs=net_is_compiled and self.fisher != "empirical",
        )
        self.recorder.switch(self.due)

    @property
    def damping(self) -> float | None:
        """Return the lambda in force; a new value, or None, takes effect at the next refresh.

        One that follows the curvature is None before the first statistics.
        """
        if self._damping is None and not self.inverse.estimate.recorded:
            return None
        return self._in_force()

    @damping.setter
    def damping(self, value: float | None) -> None:
        given = isinstance(value, (int, float)) and math.isfinite(value) and value > 0
        if value is not None and not given:
            raise DampingError(f"damping must be a finite number above zero or None, got {value!r}")
        self._damping = None if value is None else float(value)

    def _in_force(self) -> float:
        return self.inverse.damping(self._damping)

    @property
    def trust_region(self) -> float | Literal["adaptive"] | None:
        """Return the rule for lengths: a largest squared length in Fhat, or the adaptive one."""
        return "adaptive" if isinstance(self._length, AdaptiveLength) else self._length.largest

    @trust_region.setter
    def trust_region(self, value: float | Literal["adaptive"] | None) -> None:
        if value != self.trust_region:
            self._length = _length(value, is_quadratic(self.likelihood))

    # One step of training.

    def observe(self, outputs: Any = None, targets: Any = None, *, inputs: Any = None) -> None:
        """Record statistics if this step is due; after the forward, before loss.backward().

        Where a step has several micro-batches (accumulated gradients), it is called for each.

        With ``inputs``, the statistics come from a pass of their own, in one compiled graph if
        ``compile``, and the forward need not be recorded. So the forward may be compiled, a part
        of the batch will do, and the call may come anywhere before ``step``. Parameters, buffers
        and torch's random stream stay as they are; dropout has masks of its own.

        Args:
            outputs: what the likelihood is about (logits, mean), as ``net`` returned them; not
                looked at if there are inputs.
            targets: needed by fisher="empirical", and where some targets are ignored or weighted.
            inputs: what ``net`` is called with: a tensor, a tuple of positional arguments or a
                mapping of keywords; under the forward's autocast. Or a closure from the network to
                the likelihood's outputs, ``lambda net: ...``.

        Raises:
            LikelihoodError: outputs or targets do not fit the likelihood.
            ObservationError: called twice a forward, after the backward, or with other outputs; or
                without inputs after a call with them or where ``net`` is compiled; or the last
                micro-batch's backward is no use, see ``step``.
            TapsTakenError: another object on the module is in the middle of a step, or has switched
                off taps that this one needs.
        """
        if outputs is None and inputs is None:
            raise ObservationError("observe() needs the outputs, or the inputs, of a forward")
        if not self.due:
            return
        if inputs is None:
            finite = self.recorder.observe(outputs, targets)
        else:
            # The pass draws (dropout): the user's next forward must not see that it ran.
            with forked(self.inverse.covered.parameters.values()):
                finite = self.recorder.observe_inputs(inputs, targets)
        if not finite:
            self.skip_statistics("outputs")

    def step(self) -> None:
        """Fold statistics, refresh when due, and precondition ``.grad``; after loss.backward().

        Non-finite statistics stay out of the averages; non-finite gradients are replaced by zeros,
        so that the optimizer's step changes nothing but its momentum. Both are counted and logged.

        Raises:
            GradientError: no covered parameter has a gradient.
            StatisticsError: nothing was ever observed.
            ObservationError: of empirical statistics, no backward has come to the outputs, or
                several have.
            ParameterChangedError: a parameter was replaced, reshaped, cast or moved, or one that
                was frozen at the transform trains now.
            TapsTakenError: another object was made or used on the module since ``observe``.
        """
        # With a check: a parameter that was moved would get an update of another device.
        given = self.inverse.covered.gradients()
        # All processes are in the same step here, or the error says which are not; a sum would wait
        # for the missing one.
        if self._workers.size > 1:
            self._workers.agree("step")
        if not given:
            raise GradientError("no parameter has a gradient: call loss.backward() before step()")
        estimate = self.inverse.estimate
        none_yet = not estimate.recorded and self.skipped_statistics == 0
        if none_yet and not self.recorder.observing:
            # A skipped batch is a reason to have none; a missing call is a mistake to be told of.
            # The next forward is recorded, for the call may be there by then.
            self.recorder.switch(self.due)
            raise StatisticsError(
                "no statistics yet: call observe(outputs) between the forward and loss.backward()"
            )
        if self.due:  # else nothing was observed
            found = self.recorder.take()
            follows = self._damping is None
            if found and not self.inverse.fold(found, self.ema_decay, follows=follows):
                self.skip_statistics("statistics")
        # Inverses are missing after the first fold, and where a block got its first statistic.
        missing = self.inverse.refreshed is None
        if estimate.recorded and (missing or is_due(self._steps, self.refresh_every, REFRESHES)):
            self.inverse.refresh(self._damping, self._length.damping_divisor, if_moved=True)
        self._precondition(given)
        self._steps += 1
        self._calls += 1
        self.recorder.switch(self.due)  # the next forward records if its step is due

    def refresh(self) -> None:
        """Compute the inverses from the present factors and damping.

        Raises:
            StatisticsError: there are no factors yet.
        """
        self.inverse.refresh(self._damping, self._length.damping_divisor)

    def apply(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return Fhat^-1 times the given gradients, by parameter name, with the inverses at hand.

        Args:
            gradients: gradients by name, in the parameters' shapes. Covered parameters that are not
                given count as zero, and do not appear in the result. A block without statistics
                (code that never ran) leaves its gradients as they are.

        Raises:
            GradientError: a name is not covered, or a shape is not its parameter's.
            StatisticsError: there are no inverses yet.
        """
        return self.inverse.apply(gradients)

    # What a step consists of.

    @property
    def due(self) -> bool:
        """Say whether the statistics of this step are wanted."""
        return is_due(self._steps, self.statistics_every, STATISTICS)

    def skip_statistics(self, what: str) -> None:
        # For ``TrainingStep`` too. No docstring, as what has one here is promised to users.
        self.skipped_statistics += 1
        log.warning("step %d: non-finite %s, nothing is recorded", self._steps, what)

    @torch.no_grad()
    def _precondition(self, given: Mapping[str, Tensor]) -> None:
        """Replace gradients in their place by the preconditioned ones, or by zeros."""
        # Statistics may all have been skipped: a plain gradient would be a step of another size.
        # Of one process the gradients are whole as they are.
        # A single process may have sharded parameters too, as FSDP2 makes them on one device.
        several = self._workers.size > 1 or any(hasattr(g, "full_tensor") for g in given.values())
        whole = self._workers.whole(given) if several else given
        finite = self.inverse.refreshed is not None
        if finite:
            layers = self._layers[tuple(whole)]
            updates = self.inverse.precondition(whole)
            made = layers.pack([updates[name] for name in whole])
            # A gradient that is not finite has no finite length, so one number serves for both.
            # It is of whole gradients: one process must not zero what the others keep.
            # A lambda that stays where it is makes the inverses stay with it: they do not lag.
            scale = self.inverse.scale() if self._damping is None else NOTHING_LAGS
            share = self._length.share(layers.pack(list(whole.values())), made, tuple(whole), scale)
            finite = math.isfinite(share)
        if finite:
            largest = self._length.widest
            if several:
                foreach.mul_(list(updates.values()), share)
                self._workers.put(updates, given)
                if largest < math.inf:
                    self._layers.shorten(given, largest)
            else:
                excess = None
                if largest < math.inf:
                    weights = [self.inverse.covered.parameters[n] for n in whole]
                    excess = layers.excess(made, weights, largest / share, packed=False)
                foreach.copy_(list(given.values()), layers.unpack(made, excess, share))
        if not finite:
            self.skipped_gradients += 1
            log.warning("step %d: no finite preconditioned gradient; it is zero", self._steps)
            foreach.zero_(list(given.values()))

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Return averages, inverses, counters and the generator, to go on from.

        Tensors and plain values only, so that ``torch.load(weights_only=True)`` reads it.
        """
        return {
            "version": VERSION,
            "steps": self._steps,
            "damping": self._damping,
            "length": self._length.state(),
            "likelihood": described(self.likelihood),
            "skipped_statistics": self.skipped_statistics,
            "skipped_gradients": self.skipped_gradients,
            "generator": self.generator.get_state(),
            "inverse": self.inverse.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``; nothing changes if the blocks do not fit.

        Raises:
            ParameterChangedError: the state belongs to other blocks.
            LikelihoodError: it is of another likelihood.
        """
        if state.get("version") != VERSION:
            raise ParameterChangedError("this is no state_dict of a Preconditioner of this version")
        check_described(self.likelihood, state.get("likelihood"))
        self.inverse.load(state["inverse"])
        self._steps = int(state["steps"])
        self.damping = state["damping"]
        self._length.load(state.get("length") or {}, self.inverse.estimate.like.device)
        self.skipped_statistics = int(state["skipped_statistics"])
        self.skipped_gradients = int(state["skipped_gradients"])
        self.generator.set_state(state["generator"].cpu())  # trainers load onto the GPU
        self.recorder.switch(self.due)


def _length(trust_region: float | Literal["adaptive"] | None, quadratic: bool) -> NaturalLength:
    """Return the rule for the length of a preconditioned gradient."""
    if isinstance(trust_region, str):
        choice("trust_region", trust_region, ("adaptive",))
        return AdaptiveLength(quadratic)
    return NaturalLength(positive("trust_region", trust_region))


def _recorded_module(net: Net) -> Net:
    """Return the module that owns the factor buffers.

    Most nets are what ``transform`` returned, compiled or not, and know nothing of Dynamo; what
    reads the graphs of "kfac_fx" as a backend is imported for the others alone.
    """
    inner = getattr(net, "_orig_mod", net)
    if isinstance(inner, fx.GraphModule):
        return inner
    from kfac_fx.dynamo.compiled_model import recorded_module

    return recorded_module(inner)
