"""The objective on a batch: outputs, likelihood, gradient; every pass of a step sees one mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils import _pytree as pytree

from kfac_fx.codegen import compiled_network
from kfac_fx.errors import LikelihoodError
from kfac_fx.likelihoods.batch import BatchLikelihood, batch_likelihood
from kfac_fx.likelihoods.builtin import Likelihood
from kfac_fx.likelihoods.named import Sum
from kfac_fx.likelihoods.sampling import seeded
from kfac_fx.ops import STORE
from kfac_fx.parallel import Held, Workers, drawn_seed, share_of
from kfac_fx.statistics.forward import Forward, outputs_of


class Task:
    """The network with its likelihood.

    Args:
        seed: of the masks (dropout); torch's global random stream is left alone.
        workers: the processes that share a batch.
        compile: the pass of the gradient, unless parameters are sharded.

    Attributes:
        cases: of the batch, in all processes.
        terms: of the last loss: a term a case, or one a position, each with its weight.
    """

    def __init__(
        self,
        held: Held,
        likelihood: Likelihood | Sum,
        forward: Forward,
        seed: torch.Generator,
        workers: Workers,
        compile: bool | str,
    ) -> None:
        self.net, self.likelihood, self.forward = held.net, likelihood, forward
        self._held, self._workers = held, workers
        self._generator, self._seed, self.cases, self.terms = seed, 0, 0, 0.0
        net = held.net
        whole = held.given is None
        self._compiled = compiled_network(net, compile) if compile and whole else None
        names = [name for name, _ in net.named_buffers() if not name.startswith(STORE)]
        self._buffers = {name: net.get_buffer(name) for name in names}

    def begin(self, batch: Any) -> None:
        """New masks for the passes on a batch that follow."""
        self._seed = drawn_seed(self._generator, self._workers)
        self.cases = int(self._workers.agree("a batch", amount=case_count(batch))[1])

    def first(self, batch: Any, fraction: float, least: int) -> Any:
        """This process's share of the first cases; ``least`` of all are kept where there are."""
        kept = min(self.cases, max(least, round(fraction * self.cases)))
        whole = kept == self.cases or callable(batch[0])  # a closure has its batch inside
        return batch if whole else first_cases(batch, share_of(kept, self._workers))

    @contextmanager
    def same_masks(self) -> Iterator[None]:
        """Random numbers inside are those of every pass of the step."""
        with seeded(self._seed, self.net.parameters()):
            yield

    def snapshot(self) -> dict[str, Tensor]:
        """Copies of the buffers (running statistics)."""
        return {name: buffer.clone() for name, buffer in self._buffers.items()}

    @torch.no_grad()
    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        """Puts the buffers back."""
        for name, value in snapshot.items():
            self._buffers[name].copy_(value)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """A pass that leaves no trace in buffers and random streams."""
        kept = self.snapshot()
        try:
            with self.same_masks():
                yield
        finally:
            self.restore(kept)

    def outputs(self, inputs: Any, parameters: Mapping[str, Tensor] | None = None) -> Any:
        """Outputs, with the module's own parameters or the given ones."""
        net: Callable[..., Any] = self.net
        parameters = self._held.given if parameters is None else parameters
        if parameters is not None:
            given = dict(parameters)

            def net(*args: Any, **kwargs: Any) -> Any:
                return functional_call(self.net, given, args, kwargs)

        return outputs_of(self.forward, net, inputs)

    def predictive(self, outputs: Any, targets: Any) -> BatchLikelihood:
        """What the likelihood says; the number of terms is that of all processes."""
        made = batch_likelihood(self.likelihood, outputs, targets)
        return made.of_all(self._workers, "outputs")[1]

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """This process's share of the mean negative log-likelihood of a term."""
        made = self.predictive(outputs, targets)
        if not made.has_targets:
            raise LikelihoodError("step() needs the targets of the batch")
        self.terms = made.count
        return made.nll() / made.count

    def gradient(
        self, inputs: Any, targets: Any, parameters: Mapping[str, Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """The loss and its gradients by the module's own parameters, dense, of all processes."""
        with torch.enable_grad(), self.same_masks():
            if self._compiled is None:
                outputs = self.outputs(inputs)
            else:
                outputs = outputs_of(self.forward, self._compiled, inputs)
            loss = self.loss(outputs, targets)
            wrt = list(parameters.values())
            found = torch.autograd.grad(loss, wrt, allow_unused=True, materialize_grads=True)
        loss, dense = loss.detach(), [g.to_dense() if g.is_sparse else g for g in found]
        self._workers.sum_([loss, *dense])
        return loss, dense

    def value(self, inputs: Any, targets: Any, parameters: Any = None) -> float:
        """The mean negative log-likelihood of a term, of all processes."""
        total = self.loss(self.outputs(inputs, parameters), targets).detach()
        self._workers.sum_([total])
        return float(total)


def case_count(batch: Any) -> int:
    """The first dimension of the batch's first tensor that has any."""
    sized = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()]
    return sized[0].shape[0] if sized else 1


def first_cases(batch: Any, kept: int) -> Any:
    """The first part of every tensor of a batch whose first dimension counts the cases."""
    cases = case_count(batch)

    def cut(leaf: Any) -> Any:
        counted = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == cases
        return leaf[:kept] if counted else leaf

    return pytree.tree_map(cut, batch)
