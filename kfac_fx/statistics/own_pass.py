"""A pass of the network and its likelihood as a function: nothing of the module is changed.

From parameters, buffers, a batch and noise to the statistics that taps leave, and where a loss is
asked for, to the loss, its gradients and the buffers that the forward changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from kfac_fx.codegen.functional import no_autocast
from kfac_fx.likelihoods.batch import BatchLikelihood, output_tensors
from kfac_fx.likelihoods.builtin import Likelihood, Sum
from kfac_fx.ops import STORE, Note, multiplied, noting
from kfac_fx.parallel import Workers
from kfac_fx.statistics.buffers import Sources, Statistics, by_calls
from kfac_fx.statistics.forward import Forward, outputs_of
from kfac_fx.statistics.loss_scale import compared, scale_of
from kfac_fx.statistics.observation import Observation, squared
from kfac_fx.statistics.swap_tensors import Places

LIKELIHOOD = "likelihood"

Loss = Callable[[Any, Any], Tensor]
"""From the network's outputs and the targets to a scalar."""


@dataclass(frozen=True)
class Result:
    """What a pass found.

    Attributes:
        statistics: by id of the module's factor buffer or parameter; empty if they were not asked
            for, or the outputs are not finite.
        count: number of likelihood terms, or the sum of their weights.
        total: the same of all processes.
        finite: whether the outputs are; where a program was run, those of this process.
        loss, gradients, buffers: of a pass with a loss; by name.
        scale: of the loss whose derivatives the statistics are of, relative to the summed negative
            log-likelihood; None if it is not seen to be proportional, and they are of no use.
    """

    statistics: Statistics
    count: float
    total: float
    finite: bool
    loss: Tensor | None = None
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    scale: float | None = 1.0


@dataclass
class Leaves:
    """The tensors of one pass.

    Attributes:
        state: by name.
        sources: what statistics are gradients of, in the order of the module's own.
    """

    state: dict[str, Tensor]
    sources: Sources

    @property
    def wanted(self) -> list[Tensor]:
        return [*self.sources.factors, *self.sources.parameters]


class PurePass:
    """A module with taps, its likelihood and what is wanted of a pass.

    Args:
        sources: the module's own factor buffers, and parameters without a tap.
        fisher: "sampled", "exact" or "empirical".
        forward: from (network, inputs) to outputs.
        loss: of the outputs and targets, or LIKELIHOOD for the mean negative log-likelihood of a
            term; None for statistics alone.
        statistics: whether they are wanted.
        one_backward: empirical statistics come from the loss's own backward.
    """

    def __init__(
        self,
        net: nn.Module,
        sources: Sources,
        likelihood: Likelihood | Sum,
        fisher: str,
        forward: Forward,
        workers: Workers,
        loss: Loss | str | None = None,
        statistics: bool = True,
        one_backward: bool = True,
    ) -> None:
        self.net, self.sources, self.likelihood, self.fisher = net, sources, likelihood, fisher
        self.forward, self.workers = forward, workers
        self.loss, self.statistics = loss, statistics
        recording = statistics and loss is not None
        self.one_backward = one_backward and recording and fisher == "empirical"
        self._places = Places(net)

    @property
    def own(self) -> list[Tensor]:
        """The module's tensors that statistics belong to."""
        return [*self.sources.factors, *self.sources.parameters]

    @property
    def draws(self) -> bool:
        """Whether targets are drawn from the model."""
        if not self.statistics:
            return False
        return self.fisher == "sampled" or (
            self.fisher == "exact" and bool(self.sources.parameters)
        )

    @property
    def columns(self) -> bool:
        """Whether there is a backward for every column of the output Fisher's root."""
        return self.statistics and self.fisher == "exact" and bool(self.sources.factors)

    @property
    def uses_terms(self) -> bool:
        """Whether the likelihood is asked."""
        return self.statistics or self.loss == LIKELIHOOD

    @property
    def uses_targets(self) -> bool:
        """Whether the likelihood is asked about given targets."""
        empirical = self.statistics and self.fisher == "empirical"
        return empirical or self.loss == LIKELIHOOD

    def state(self) -> dict[str, Tensor]:
        """Parameters and buffers, without the zeros whose gradients are statistics."""
        held = self._places.tensors().items()
        return {n: t for n, t in held if not n.startswith(STORE) or any(t.stride())}

    def leaves(self, state: Mapping[str, Tensor]) -> Leaves:
        """Copies of the state that gradients and statistics are taken of."""
        held = self._places.tensors()
        given = {
            n: t.detach().requires_grad_(held[n].requires_grad)
            if isinstance(held[n], nn.Parameter)
            else t.clone()
            for n, t in state.items()
        }
        names = {id(t): n for n, t in held.items()}
        zeros: dict[Any, Tensor] = {}  # one for all: on a GPU each is a launch
        for factor in self.sources.factors:
            kind = factor.dtype, factor.device
            if kind not in zeros:
                zeros[kind] = torch.zeros((), dtype=factor.dtype, device=factor.device)
            zero = zeros[kind].expand(factor.shape)
            given[names[id(factor)]] = zero.requires_grad_(self.statistics)

        def of(tensors: Sequence[Tensor]) -> list[Tensor]:
            return [given[names[id(t)]] for t in tensors]

        own = self.sources
        sources = Sources(of(own.inputs), of(own.gradients), of(own.parameters), set(), own.shared)
        return Leaves(given, sources)

    def outputs(self, leaves: Leaves, inputs: Any) -> Any:
        """What ``forward`` returns with the leaves in place of the module's tensors."""
        with self._places.swapped(leaves.state):
            return outputs_of(self.forward, self.net, inputs)

    def loss_of(self, outputs: Any, targets: Any, made: BatchLikelihood | None) -> Tensor:
        """The loss, a scalar."""
        if self.loss == LIKELIHOOD:
            assert made is not None
            return _mean_nll(made)
        assert callable(self.loss)
        return self.loss(outputs, targets)

    def trained(self, leaves: Leaves) -> dict[str, Tensor]:
        """The leaves that the loss is differentiated by."""
        named = self.net.named_parameters()
        return {n: leaves.state[n] for n, parameter in named if parameter.requires_grad}

    def gradients(self, leaves: Leaves, loss: Tensor) -> dict[str, Tensor]:
        """Of the loss by parameter, where there are any."""
        wrt = self.trained(leaves)
        return _there(wrt, torch.autograd.grad(loss, [*wrt.values()], allow_unused=True))

    def buffers(self, leaves: Leaves) -> dict[str, Tensor]:
        """The module's own buffers, as the forward left them."""
        names = (n for n, _ in self.net.named_buffers() if not n.startswith(STORE))
        return {n: leaves.state[n] for n in names}

    def run(self, inputs: Any, targets: Any, seed: int) -> Result:
        """The pass as it is, node by node.

        Raises:
            LikelihoodError, ObservationError: as ``Preconditioner.observe``.
        """
        with torch.enable_grad():
            leaves = self.leaves(self.state())
            several = self.fisher == "exact"  # backwards, which notes do not outlive
            with noting(() if several else leaves.sources.factors) as notes:
                outputs = self.outputs(leaves, inputs)
            together = self.together(outputs)
            with no_autocast():
                record = self._all if together else self._statistics
                result, made = record(leaves, outputs, targets, seed, notes)
                if self.loss is None:
                    return result
                if result.loss is None:
                    loss = self.loss_of(outputs, targets, made)
                    gradients = self.gradients(leaves, loss)
                    result = replace(result, loss=loss.detach(), gradients=gradients)
        return replace(result, buffers=self.buffers(leaves))

    def together(self, outputs: Any) -> bool:
        """Whether one backward brings statistics and gradients.

        In float16, what is in the scale of a mean may vanish.
        """
        kinds = {t.dtype for t in output_tensors(outputs)}
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                kinds.add(torch.get_autocast_dtype(kind))
        return self.one_backward and torch.float16 not in kinds

    def _statistics(
        self, leaves: Leaves, outputs: Any, targets: Any, seed: int, notes: Sequence[Note]
    ) -> tuple[Result, BatchLikelihood | None]:
        """The statistics, and what the likelihood says if it was asked."""
        if not self.uses_terms:
            return Result({}, 0.0, 0.0, True), None
        observation = Observation(self.likelihood, outputs, targets, leaves.sources, notes)
        if not self.statistics:
            _, made = observation.made.of_all(self.workers, "loss")
            return Result({}, 0.0, 0.0, True), made
        finite = observation.agree(self.workers)
        found = observation.record(self.fisher, seed) if finite else {}
        own = self._named(leaves, found)
        return Result(own, observation.count, observation.total, finite), observation.made

    def _all(
        self, leaves: Leaves, outputs: Any, targets: Any, seed: int, notes: Sequence[Note]
    ) -> tuple[Result, BatchLikelihood | None]:
        """``_statistics`` with loss and gradients, by one backward."""
        observation = Observation(self.likelihood, outputs, targets, leaves.sources, notes)
        finite, made = observation.agree(self.workers), observation.made
        result = Result({}, observation.count, observation.total, finite)
        if not finite:
            return result, made
        loss, wrt = self.loss_of(outputs, targets, made), self.trained(leaves)
        numbers = compared(loss, made.nll(), outputs)
        found, gradients = observation.record_with(loss, [*wrt.values()])
        result = replace(result, loss=loss.detach(), gradients=_there(wrt, gradients))
        return replace(result, statistics=self._named(leaves, found), scale=scale_of(numbers)), made

    def _named(self, leaves: Leaves, found: Statistics) -> Statistics:
        """By the module's tensors in place of the leaves."""
        pairs = zip(self.own, leaves.wanted, strict=True)
        return {id(mine): found[id(leaf)] for mine, leaf in pairs if id(leaf) in found}

    def found(
        self, leaves: Leaves, made: BatchLikelihood, draws: Sequence[Tensor], select: Tensor | None
    ) -> list[Tensor | None]:
        """The statistics for ``leaves.wanted``, as a formula without side effects.

        Args:
            draws: targets from the model, of each part.
            select: which columns of the output Fisher's root are summed.
        """
        factors, parameters = leaves.sources.factors, leaves.sources.parameters
        scalar = None
        if self.draws:
            scalar = made.sampled_by(draws)
        elif self.fisher == "empirical":
            scalar = made.nll()
        if self.columns:
            assert select is not None
            first = _derivatives(made.exact_by(select), factors)
            second = [] if scalar is None else _derivatives(scalar, parameters)
        else:
            assert scalar is not None
            both = _derivatives(scalar, leaves.wanted)
            first, second = both[: len(factors)], both[len(factors) :]
        return _delivered(leaves.sources, first, second)

    def found_with(
        self, leaves: Leaves, loss: Tensor
    ) -> tuple[list[Tensor | None], dict[str, Tensor]]:
        """``found`` in the scale of the loss, and the loss's gradients, by one backward."""
        count, wrt = len(leaves.sources.factors), self.trained(leaves)
        found = _derivatives(loss, [*leaves.wanted, *wrt.values()])
        end = len(leaves.wanted)
        statistics = _delivered(leaves.sources, found[:count], found[count:end])
        return statistics, _there(wrt, found[end:])


def _delivered(
    sources: Sources, factors: Sequence[Tensor | None], parameters: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """From derivatives to the statistics of all sources, in their order."""
    pairs = zip(sources.factors, factors, strict=True)
    known = by_calls(sources, {id(factor): g for factor, g in pairs if g is not None})
    first = [multiplied(known.get(id(factor))) for factor in sources.factors]
    return [*first, *(None if g is None else squared(g) for g in parameters)]


def _mean_nll(made: BatchLikelihood) -> Tensor:
    """Of a term; the number of terms may depend on the batch."""
    counts = (
        part.distribution.batch_shape.numel() if part.weights is None else part.weights.sum()
        for part in made.parts
    )
    return made.nll() / sum(counts)


def _there(named: Mapping[str, Tensor], found: Sequence[Tensor | None]) -> dict[str, Tensor]:
    """By name, where there are any."""
    return {name: g for name, g in zip(named, found, strict=True) if g is not None}


def _derivatives(scalar: Tensor, wanted: Sequence[Tensor]) -> list[Tensor | None]:
    return list(torch.autograd.grad(scalar, wanted, retain_graph=True, allow_unused=True))
