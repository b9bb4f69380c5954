"""A pass of the network and its likelihood as a function: nothing of the module is changed.

From parameters, buffers, a batch and noise to the statistics that taps leave, and where a loss is
asked for, to the loss, its gradients and the buffers that the forward changed. ``OwnPass.run``
evaluates it node by node; ``traced_pass.py`` traces and compiles the same two steps, ``outputs``
and ``evaluate``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from kfac_fx.codegen.functional import no_autocast
from kfac_fx.config import Fisher
from kfac_fx.likelihoods.batch import BatchLikelihood, batch_likelihood, output_tensors
from kfac_fx.likelihoods.builtin import Likelihood, Tree
from kfac_fx.likelihoods.named import Sum
from kfac_fx.linalg.precision import all_finite
from kfac_fx.ops.net_buffers import STORE
from kfac_fx.ops.state import Collection, collecting
from kfac_fx.parallel import Workers
from kfac_fx.statistics.buffers import Statistics, StatisticSources
from kfac_fx.statistics.forward import Forward, outputs_of
from kfac_fx.statistics.loss_scale import compared, scale_of
from kfac_fx.statistics.sampled import Collected, Noise, fisher_statistics, statistics_of
from kfac_fx.statistics.swap_tensors import Places

LIKELIHOOD: Literal["likelihood"] = "likelihood"

Loss = Callable[[Tree, Tree], Tensor]
"""From the network's outputs and the targets to a scalar."""


@dataclass(frozen=True)
class Result:
    """The loss, gradients, buffers and statistics of a pass.

    Attributes:
        collected: the statistics; of a program, ``finite`` is first that of this process.
        loss: its value, of a pass with a loss.
        gradients, buffers: the derivatives and the new buffers of such a pass, by name.
    """

    collected: Collected
    loss: Tensor | None = None
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    buffers: Mapping[str, Tensor] = field(default_factory=dict)


class Leaves(NamedTuple):
    """The tensors of one pass.

    Attributes:
        state: in place of the module's parameters and buffers, by name.
        sources: what statistics are gradients of, among them.
    """

    state: dict[str, Tensor]
    sources: StatisticSources


class Values(NamedTuple):
    """The tensors of one evaluation of a pass; all of them may be traced.

    Attributes:
        statistics: in the scale of the loss if ``comparison`` is there, else of the summed
            negative log-likelihood.
        comparison: the loss and the likelihood; see ``loss_scale.compared``.
        loss, gradients: where a loss is asked for.
    """

    statistics: Statistics
    comparison: Tensor | None = None
    loss: Tensor | None = None
    gradients: Mapping[str, Tensor] = {}


class _Asked(NamedTuple):
    """The likelihood's answer to the outputs of a pass.

    Attributes:
        here: with the terms of this process; None if nobody asks the likelihood.
        everywhere: the same with the terms of all processes counted.
        finite: whether all outputs are finite, in every process.
    """

    here: BatchLikelihood | None
    everywhere: BatchLikelihood | None
    finite: bool


@dataclass(frozen=True)
class OwnPass:
    """A module with taps, its likelihood and what is wanted of a pass.

    Attributes:
        net: the instrumented module.
        sources: its own factor buffers, and parameters without a tap.
        likelihood: the likelihood of the outputs.
        fisher: which statistics.
        forward: a function from (network, inputs) to outputs.
        workers: the processes that share a batch.
        places: where the module holds its tensors.
        loss: a function of the outputs and targets, or LIKELIHOOD for the mean negative
            log-likelihood of a term; None for statistics alone.
        statistics: whether they are wanted.
        joint: whether empirical statistics may come from the loss's own backward.
        trained: names of the parameters whose gradients are wanted; None for all that have any.
        repeats: how many draws of "sampled" a pass takes the mean of.
    """

    net: nn.Module
    sources: StatisticSources
    likelihood: Likelihood | Sum
    fisher: Fisher
    forward: Forward
    workers: Workers
    places: Places
    loss: Loss | Literal["likelihood"] | None = None
    statistics: bool = True
    joint: bool = True
    trained: tuple[str, ...] | None = None
    repeats: int = 1

    @property
    def draws(self) -> bool:
        """Say whether random numbers are drawn for the statistics."""
        if not self.statistics:
            return False
        return self.fisher == "sampled" or (
            self.fisher == "exact" and bool(self.sources.parameters)
        )

    @property
    def columns(self) -> bool:
        """Say whether there is a backward for every column of the output Fisher's root."""
        return self.statistics and self.fisher == "exact" and bool(self.sources.factors)

    @property
    def uses_terms(self) -> bool:
        """Say whether the likelihood is asked."""
        return self.statistics or self.loss == LIKELIHOOD

    @property
    def uses_targets(self) -> bool:
        """Say whether the likelihood is asked about given targets."""
        empirical = self.statistics and self.fisher == "empirical"
        return empirical or self.loss == LIKELIHOOD

    # The pass as a function: of a state, inputs, what the likelihood says, and noise.

    def state(self) -> dict[str, Tensor]:
        """Return parameters and buffers, without the zeros whose gradients are statistics."""
        held = self.places.tensors().items()
        return {n: t for n, t in held if not n.startswith(STORE) or any(t.stride())}

    def leaves(self, state: Mapping[str, Tensor]) -> Leaves:
        """Return copies of a state that gradients and statistics are taken of.

        Args:
            state: the state as ``state`` returns it; its tensors may be traced, or without values.
        """
        held = self.places.tensors()
        given = {
            n: t.detach().requires_grad_(held[n].requires_grad)
            if isinstance(held[n], nn.Parameter)
            else t.clone()  # the forward may write into buffers
            for n, t in state.items()
        }
        # Statistics are gradients of zeros that the taps never read. One number a dtype and device
        # is expanded to all shapes: no memory, and on a GPU each would be a launch.
        zeros: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        factors = []
        for one, factor in zip(self.sources.names.tapped, self.sources.factors, strict=True):
            kind = factor.dtype, factor.device
            if kind not in zeros:
                zeros[kind] = torch.zeros((), dtype=factor.dtype, device=factor.device)
            zero = zeros[kind].expand(factor.shape).requires_grad_(self.statistics)
            given[f"{STORE}.{one.key.slot}.{one.key.factor}"] = zero
            factors.append(zero)
        names = [name for block in self.sources.names.untapped for name in block.names]
        parameters = [given[name] for name in names]
        return Leaves(given, StatisticSources(self.sources.names, factors, parameters))

    def outputs(self, leaves: Leaves, inputs: Tree) -> Tree:
        """Return what ``forward`` makes of inputs, with the leaves for the net's own tensors."""
        with self.places.swapped(leaves.state):
            return outputs_of(self.forward, self.net, inputs)

    def evaluate(
        self,
        leaves: Leaves,
        outputs: Tree,
        targets: Tree,
        made: BatchLikelihood | None,
        noise: Noise,
        *,
        record: bool = True,
        collection: Collection | None = None,
        select: Tensor | None = None,
    ) -> Values:
        """Return statistics, loss and gradients of a forward. It can be traced.

        Args:
            leaves: that the forward was run with.
            outputs: the outputs of the forward, with their graph; under its autocast.
            targets: for the loss.
            made: what the likelihood says of the outputs; None if nobody asks it.
            noise: the noise of the draws.
            record: False leaves out the statistics, which would be of no use.
            collection: the noted taps of the forward.
            select: the column that a traced pass takes of the exact Fisher.
        """
        # Asked before autocast ends: it is for the forward, and would round likelihoods and
        # statistics.
        joined = self._joined(outputs)
        found: Statistics = {}
        with no_autocast():
            if record and made is not None and self.statistics:
                if joined:
                    return self._joint_values(leaves, outputs, targets, made, collection)
                found = fisher_statistics(
                    leaves.sources, made, self.fisher, noise, collection, select, self.repeats
                )
            if self.loss is None:
                return Values(found)
            loss = self._loss_of(outputs, targets, made)
            trained = self._trained(leaves)
            came = torch.autograd.grad(loss, [*trained.values()], allow_unused=True)
        return Values(found, loss=loss.detach(), gradients=_there(trained, came))

    def _joined(self, outputs: Tree) -> bool:
        """Return whether one backward brings empirical statistics and gradients.

        In float16, what is in the scale of a mean may vanish.
        """
        wanted = self.joint and self.statistics and self.loss is not None
        if not wanted or self.fisher != "empirical":
            return False
        kinds = {t.dtype for t in output_tensors(outputs)}
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                kinds.add(torch.get_autocast_dtype(kind))
        return torch.float16 not in kinds

    def _joint_values(
        self,
        leaves: Leaves,
        outputs: Tree,
        targets: Tree,
        made: BatchLikelihood,
        collection: Collection | None,
    ) -> Values:
        """Return statistics in the scale of the loss, and its gradients, by one backward."""
        # The backward that training needs brings the statistics, too, in the scale of the loss; the
        # comparison tells that scale, or that the loss is another one.
        loss = self._loss_of(outputs, targets, made)
        comparison = compared(loss, made.nll(), outputs)
        trained = self._trained(leaves)
        found, came = statistics_of(leaves.sources, loss, collection, [*trained.values()])
        return Values(found, comparison, loss.detach(), _there(trained, came))

    def _loss_of(self, outputs: Tree, targets: Tree, made: BatchLikelihood | None) -> Tensor:
        if self.loss == LIKELIHOOD:
            assert made is not None
            return made.mean_nll()
        assert callable(self.loss)
        return self.loss(outputs, targets)

    def _trained(self, leaves: Leaves) -> dict[str, Tensor]:
        """Return the leaves that the loss is differentiated by."""
        if self.trained is not None:
            return {name: leaves.state[name] for name in self.trained}
        named = self.net.named_parameters()
        return {n: leaves.state[n] for n, parameter in named if parameter.requires_grad}

    def buffers(self, leaves: Leaves) -> dict[str, Tensor]:
        """Return the module's own buffers, as the forward left them; none without a loss."""
        if self.loss is None:
            return {}
        names = (n for n, _ in self.net.named_buffers() if not n.startswith(STORE))
        return {n: leaves.state[n] for n in names}

    # The pass as it is.

    def run(self, inputs: Tree, targets: Tree, seed: int) -> Result:
        """Run the pass node by node.

        Args:
            inputs: the inputs as ``forward`` takes them, or a closure; see
                ``Preconditioner.observe``.
            targets: the targets of the likelihood and the loss; None where they need none.
            seed: the seed of the draws.

        Raises:
            LikelihoodError, ObservationError: as ``Preconditioner.observe``.
        """
        with torch.enable_grad():
            leaves = self.leaves(self.state())
            # The exact Fisher and several draws take more than one backward; notes serve one, so
            # their taps keep autograd nodes.
            several = self.fisher == "exact" or self.repeats > 1
            collection = None if several else Collection(leaves.sources.factors)
            with collecting(collection):
                outputs = self.outputs(leaves, inputs)
            asked = self._asked(outputs, targets)
            made = asked.here
            agreed = asked.everywhere
            # What is not finite would cost a backward for nothing, and without terms there is none.
            record = asked.finite and made is not None and made.count > 0
            values = self.evaluate(
                leaves, outputs, targets, agreed, seed, record=record, collection=collection
            )
        collected = Collected(True, {}, 0.0, 0.0)
        if self.statistics and made is not None and agreed is not None:
            scale = 1.0 if values.comparison is None else scale_of(values.comparison)
            collected = Collected(asked.finite, values.statistics, made.count, agreed.count, scale)
        return Result(collected, values.loss, values.gradients, self.buffers(leaves))

    def _asked(self, outputs: Tree, targets: Tree) -> _Asked:
        """Ask the likelihood, if it is needed, and the other processes."""
        if not self.uses_terms:
            return _Asked(None, None, True)
        with no_autocast():
            made = batch_likelihood(self.likelihood, outputs, targets)
            if not self.statistics:
                _, agreed = made.of_all(self.workers, "loss")
                return _Asked(made, agreed, True)
            finite = all_finite([t.detach() for t in output_tensors(outputs)])
            finite, agreed = made.of_all(self.workers, "observe", finite)
        return _Asked(made, agreed, finite)


def _there(named: Mapping[str, Tensor], found: Sequence[Tensor | None]) -> dict[str, Tensor]:
    """Return by name what came, where anything did."""
    return {name: g for name, g in zip(named, found, strict=True) if g is not None}
