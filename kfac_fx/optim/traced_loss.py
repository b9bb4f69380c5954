"""The trace of an objective on a batch: the loss, its gradients, and the loss to be compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kfac_fx.codegen.functional import NotFunctionalError
from kfac_fx.codegen.replay import replayable
from kfac_fx.likelihoods.batch import BatchTerms, Terms, batch_likelihood, output_tensors
from kfac_fx.likelihoods.builtin import Tree
from kfac_fx.likelihoods.named import Sum
from kfac_fx.ops.gram import Statistic
from kfac_fx.statistics.own_pass import OwnPass
from kfac_fx.statistics.traced_pass import Arguments, Extra, Facts
from kfac_fx.torch_internals import pytree


@dataclass(frozen=True)
class Evaluated:
    """What a pass says of an objective.

    Attributes:
        loss: the mean negative log-likelihood of a term, [], as gradients are of it.
        start: the same as losses of one batch are compared; see ``Objective.value``.
        terms: number of likelihood terms, or the sum of their weights.
        gradients: by the names of parameters; those that the loss does not depend on have none.
        buffers: as the pass left them.
    """

    loss: Tensor
    start: Tensor
    terms: float = 1.0
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    buffers: Mapping[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> Sequence[Statistic]:
        """Return all tensors, in an order that their names give."""
        named = [mapping[n] for mapping in (self.gradients, self.buffers) for n in sorted(mapping)]
        return [self.loss, self.start, *named]


class TracedLoss:
    """The trace of an objective for one form of a batch.

    Args:
        own: the network, its likelihood, and of which parameters gradients are wanted.
        facts: the facts of the form.
        given: a batch.
        widened: whether ``start`` is of outputs and targets in float64, by the number of outputs.

    Attributes:
        once: the graph.

    Raises:
        NotFunctionalError: there is no such graph.
    """

    def __init__(
        self,
        own: OwnPass,
        facts: Facts,
        given: Arguments,
        _: Extra,
        widened: Callable[[int], bool],
    ) -> None:
        self._own = own
        self._wide = widened(sum(leaf.numel() for leaf in output_tensors(facts.outputs)))
        self._gradients: list[str] = []
        self._buffers: list[str] = []
        flat = given.flat((), None)

        def function(*tensors: Tensor) -> list[Tensor]:
            batch = flat.filled(iter(tensors))
            return self._compute(batch.state, batch.inputs, batch.terms)

        self.once = replayable(function, given.tensors(()))
        self._forward = type(self.once).forward

    def _compute(
        self, state: Mapping[str, Tensor], inputs: Tree, terms: tuple[Terms | None, ...]
    ) -> list[Tensor]:
        own = self._own
        with torch.enable_grad():
            leaves = own.leaves(state)
            outputs = own.outputs(leaves, inputs)
            loss = _mean(own, outputs, terms)
            wanted = {name: leaves.state[name] for name in own.trained or ()}
            came = torch.autograd.grad(loss, [*wanted.values()], allow_unused=True)
        with torch.no_grad():
            start = loss
            if self._wide:
                start = _mean(own, *pytree.tree_map_only(Tensor, double, (outputs, terms)))
        found = {n: g for n, g in zip(wanted, came, strict=True) if g is not None}
        buffers = own.buffers(leaves)
        self._gradients = [*found]
        self._buffers = [*buffers]
        return [loss.detach(), start.detach(), *found.values(), *buffers.values()]

    @torch.no_grad()
    def __call__(self, given: Arguments, extra: Extra, count: float) -> Evaluated:
        """Return the values for other tensors of the same form."""
        loss, start, *rest = self._forward(self.once, *given.tensors(()))
        gradients = dict(zip(self._gradients, rest, strict=False))
        buffers = dict(zip(self._buffers, rest[len(gradients) :], strict=True))
        return Evaluated(loss, start, count, gradients, buffers)


def _mean(own: OwnPass, outputs: Tree, terms: tuple[Terms | None, ...]) -> Tensor:
    made = batch_likelihood(
        own.likelihood, outputs, terms=BatchTerms(terms, isinstance(own.likelihood, Sum), 0.0)
    )
    if any(part.targets is None for _, part in made.parts):
        raise NotFunctionalError("there are no targets")
    return made.mean_nll()


def double(value: Tensor) -> Tensor:
    """Return floating-point numbers in float64, others as they are."""
    return value.double() if value.is_floating_point() else value
