"""K-FAC as a preconditioner of gradients, in front of any torch.optim optimizer."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx
from torch.distributions import Distribution

from kfac_fx.codegen import Program
from kfac_fx.config import FISHERS, STRUCTURES, choice, period, within
from kfac_fx.errors import (
    DampingError,
    GradientError,
    KFACError,
    ParameterChangedError,
    StatisticsError,
    UnknownOptionError,
)
from kfac_fx.ir import CurvatureGraph
from kfac_fx.ops import factor_buffers
from kfac_fx.optim.averages import Entry, all_finite, fold
from kfac_fx.optim.guard import ParameterGuard
from kfac_fx.optim.likelihoods import Likelihood, likelihood_of
from kfac_fx.optim.recorder import Recorder

log = logging.getLogger("kfac_fx")


class Preconditioner:
    """Replaces gradients by Fhat^-1 gradient, with Fhat from statistics of the taps.

    A step of training: ``outputs = net(x)``, ``observe(outputs)``, ``loss.backward()``, ``step()``,
    then the optimizer's own step.

    Args:
        net: what ``kfac_fx.transform`` returned (or any GraphModule that carries its annotations).
        likelihood: "categorical", "bernoulli", "normal", an object of ``kfac_fx.likelihoods``, or a
            callable from outputs to a ``torch.distributions.Distribution``.
        damping: lambda; factored Tikhonov uses gamma = sqrt(lambda).
        structure: None for the transform's own.
        fisher: "sampled" draws targets from the model (one more backward), "exact" takes every
            column of the output Fisher's square root (one backward each), "empirical" reuses the
            training backward and needs targets.
        ema_decay: largest weight of the old average.
        statistics_every, refresh_every: periods, counted in calls of ``step``.
        trust_region: largest squared length (in Fhat) of a preconditioned gradient; longer ones are
            shortened: the step sqrt(trust_region / (grad^T Fhat^-1 grad)) of KFC.
        generator: of the draws; its state is part of ``state_dict``.
        compile: run the program through torch.compile.

    Attributes:
        skipped_statistics, skipped_gradients: how often a non-finite value kept a step's statistics
            out of the averages, or zeroed its gradients.

    Raises:
        UnknownOptionError, DampingError, UnsupportedStructureError: an argument is wrong.
    """

    def __init__(
        self,
        net: fx.GraphModule,
        likelihood: str | Likelihood | Callable[[Any], Distribution] = "categorical",
        *,
        damping: float = 1e-3,
        structure: str | None = None,
        fisher: str = "sampled",
        ema_decay: float = 0.95,
        statistics_every: int = 1,
        refresh_every: int = 10,
        trust_region: float | None = None,
        generator: torch.Generator | None = None,
        compile: bool = False,
    ) -> None:
        net = getattr(net, "_orig_mod", net)
        if "kfac_fx" not in getattr(net, "meta", {}):
            raise KFACError(
                "Preconditioner needs the module that kfac_fx.transform(model) returned"
            )
        self.curvature: CurvatureGraph = net.meta["kfac_fx"]
        if structure is not None and choice("structure", structure, STRUCTURES) != (
            self.curvature.structure
        ):
            raise UnknownOptionError(
                f"structure={structure!r}, but the module was transformed with "
                f"structure={self.curvature.structure!r}"
            )
        self.likelihood = likelihood_of(likelihood)
        self.fisher = choice("fisher", fisher, FISHERS)
        self.damping = damping
        self.ema_decay = within("ema_decay", ema_decay, 0.0, 1.0)
        self.statistics_every = period("statistics_every", statistics_every)
        self.refresh_every = period("refresh_every", refresh_every)
        if trust_region is not None and not trust_region > 0:
            raise UnknownOptionError(f"trust_region must be positive or None, got {trust_region}")
        self.trust_region = trust_region
        self.generator = generator or _fresh_generator()
        self.skipped_statistics = 0
        self.skipped_gradients = 0
        self._bind(net)
        low = (torch.float16, torch.bfloat16)
        cast = [name for name, p in self._guard.parameters.items() if p.dtype in low]
        self.program = Program(self.curvature, cast, compile=compile)
        self._inverses: dict[str, Tensor] = {}
        self._steps = 0
        self._silent: set[str] = set()
        self._recorder = Recorder(self._entries, self.likelihood, self.fisher, self.generator)
        self._arm()

    def _bind(self, net: fx.GraphModule) -> None:
        """Looks up buffers and parameters of every block."""
        buffers = factor_buffers(net)
        self._guard = ParameterGuard(net, self.curvature.covered)
        parameters = self._guard.parameters
        self._entries = [
            Entry.zero(b, tuple(parameters[n] for n in b.parameters), buffers[b.name])
            for b in self.curvature.blocks.values()
        ]

    @property
    def damping(self) -> float:
        """lambda; takes effect at the next refresh."""
        return self._damping

    @damping.setter
    def damping(self, value: float) -> None:
        if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
            raise DampingError(f"damping must be a finite number above zero, got {value!r}")
        self._damping = float(value)

    @property
    def factors(self) -> Mapping[str, tuple[Tensor, ...]]:
        """Block name -> running averages, undamped, in the scale of curvature.md section 2.

        Kronecker blocks have (A, G), the homogeneous coordinate last and the groups of a grouped
        convolution first; a side that ``large_factors="blocks"`` cuts is [k, b, b], zeros behind
        its end. Other blocks have (C,), the covariance of per-case gradients.
        """
        return MappingProxyType(
            {
                entry.block.name: tuple(
                    average
                    for spec, average in zip(entry.block.factors, entry.averages, strict=True)
                    if spec.role != "count"
                )
                for entry in self._entries
            }
        )

    # One step of training.

    def observe(self, outputs: Tensor, targets: Tensor | None = None) -> None:
        """After the forward, before loss.backward(): records when this step is due.

        With several micro-batches a step (accumulated gradients), once for each.

        Args:
            outputs: what the likelihood is about (logits, mean), as ``net`` returned them.
            targets: needed by fisher="empirical", and where some targets are ignored or weighted.

        Raises:
            LikelihoodError: outputs or targets do not fit the likelihood.
            ObservationError: called twice a forward, after the backward, or with other outputs.
        """
        if self._due(self.statistics_every) and not self._recorder.observe(outputs, targets):
            self._skip_statistics("outputs")

    def step(self) -> None:
        """After loss.backward(): folds statistics, refreshes when due, preconditions ``.grad``.

        Non-finite statistics stay out of the averages; non-finite gradients are replaced by zeros.
        Both are counted and logged.

        Raises:
            GradientError: no covered parameter has a gradient.
            StatisticsError: nothing was ever observed.
            ParameterChangedError: see there.
        """
        self._guard.check()
        given = {n: p.grad for n, p in self._guard.parameters.items() if p.grad is not None}
        if not given:
            raise GradientError("no parameter has a gradient: call loss.backward() before step()")
        if self._recorder.observing:
            self._fold()
        elif not self._recorded and self.skipped_statistics == 0:
            self._arm()
            raise StatisticsError(
                "no statistics yet: call observe(outputs) between the forward and loss.backward()"
            )
        if self._recorded and (self._due(self.refresh_every) or not self._inverses):
            self.refresh()
        self._precondition(given)
        self._steps += 1
        self._arm()

    def refresh(self) -> None:
        """Computes the inverses from the present factors and damping.

        Raises:
            StatisticsError: there are no factors yet.
        """
        if not self._recorded:
            raise StatisticsError("no statistics yet: nothing to invert")
        factors = [factor for pair in self.factors.values() for factor in pair]
        damping = torch.tensor(self.damping, dtype=factors[0].dtype, device=factors[0].device)
        self._inverses = self.program.refresh(damping, factors)

    def apply(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Fhat^-1 times the given gradients, by parameter name, with the inverses at hand.

        Covered parameters that are not given count as zero; the result has the names given. A block
        without statistics (code that never ran) leaves its gradients as they are.

        Raises:
            GradientError: a name is not covered, or a shape is not its parameter's.
            StatisticsError: there are no inverses yet.
        """
        if not self._inverses:
            raise StatisticsError("no inverses yet: step() or refresh() computes them")
        parameters = self._guard.parameters
        for name, gradient in gradients.items():
            if name not in parameters:
                raise GradientError(f"{name!r} is no covered parameter")
            if gradient.shape != parameters[name].shape:
                raise GradientError(
                    f"the gradient of {name} has shape {tuple(gradient.shape)}, "
                    f"the parameter has {tuple(parameters[name].shape)}"
                )
        filled = [
            gradients[n] if n in gradients else torch.zeros_like(p) for n, p in parameters.items()
        ]
        updates = dict(self.program.apply(self._inverses, filled))
        for entry in self._entries:
            if entry.recorded == 0:  # nothing is known of its curvature
                updates |= {n: gradients[n] for n in entry.block.parameters if n in gradients}
        return {name: updates[name] for name in gradients}

    # What a step consists of.

    @property
    def _recorded(self) -> bool:
        return any(entry.recorded for entry in self._entries)

    def _due(self, period: int) -> bool:
        return self._steps % period == 0

    def _arm(self) -> None:
        """Lets the next forward record if its step is due."""
        self._recorder.switch(self._due(self.statistics_every))

    def _fold(self) -> None:
        found = self._recorder.take()
        if not found:
            return
        new = [entry.statistics(found) for entry in self._entries]
        if not all_finite([value for values in new for value in values or ()]):
            self._skip_statistics("statistics")
            return
        silent = {e.block.name for e, s in zip(self._entries, new, strict=True) if s is None}
        if silent - self._silent:
            log.warning("no statistics came for %s", ", ".join(sorted(silent - self._silent)))
        self._silent |= silent
        if fold(self._entries, new, self.ema_decay):
            self._inverses = {}  # a block got its first statistic

    def _skip_statistics(self, what: str) -> None:
        self.skipped_statistics += 1
        log.warning("step %d: non-finite %s, nothing is recorded", self._steps, what)

    @torch.no_grad()
    def _precondition(self, given: Mapping[str, Tensor]) -> None:
        updates: Mapping[str, Tensor] = {}
        finite = all_finite(list(given.values()))
        if finite and self._inverses:
            updates = self.apply(given)
            finite = all_finite(list(updates.values()))
        if not finite or not self._inverses:
            self.skipped_gradients += 1
            log.warning("step %d: no finite preconditioned gradient; it is zero", self._steps)
            torch._foreach_zero_(list(given.values()))
            return
        if self.trust_region is not None:
            names = list(given)
            length = torch.stack([(given[n] * updates[n]).sum().double() for n in names]).sum()
            scale = float((self.trust_region / length.clamp_min(1e-300)).sqrt().clamp_max(1.0))
            torch._foreach_mul_([updates[n] for n in names], scale)
        for name, gradient in given.items():
            gradient.copy_(updates[name])

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only, so that ``torch.load(weights_only=True)`` reads it."""
        return {
            "version": 1,
            "steps": self._steps,
            "recorded": {entry.block.name: entry.recorded for entry in self._entries},
            "damping": self.damping,
            "skipped_statistics": self.skipped_statistics,
            "skipped_gradients": self.skipped_gradients,
            "generator": self.generator.get_state(),
            "factors": {name: [f.clone() for f in fs] for name, fs in self.factors.items()},
            "inverses": {name: value.clone() for name, value in self._inverses.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores ``state_dict``; nothing changes if the blocks do not fit.

        Raises:
            ParameterChangedError: the state belongs to other blocks.
        """
        if state.get("version") != 1:
            raise ParameterChangedError("this is no state_dict of a Preconditioner of this version")
        own = self.factors
        shapes = {name: [f.shape for f in fs] for name, fs in state["factors"].items()}
        if shapes != {name: [f.shape for f in fs] for name, fs in own.items()}:
            raise ParameterChangedError("the state_dict belongs to other blocks than this module's")
        for name, factors in own.items():
            for factor, value in zip(factors, state["factors"][name], strict=True):
                factor.copy_(value)
        device = next(iter(own.values()))[0].device
        self._inverses = {name: v.to(device).clone() for name, v in state["inverses"].items()}
        self._steps = int(state["steps"])
        for entry in self._entries:
            entry.recorded = int(state["recorded"][entry.block.name])
        self.damping = state["damping"]
        self.skipped_statistics = int(state["skipped_statistics"])
        self.skipped_gradients = int(state["skipped_gradients"])
        self.generator.set_state(state["generator"])
        self._arm()


def _fresh_generator() -> torch.Generator:
    """Seeded by torch's global stream, so that runs repeat and preconditioners differ."""
    return torch.Generator().manual_seed(int(torch.randint(2**62, ())))
