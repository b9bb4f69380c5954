"""The objective on a batch: outputs, likelihood, gradient; every pass of a step sees one mask."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kfac_fx.codegen.compile import compiled_network
from kfac_fx.errors import CaptureError, KFACError, LikelihoodError
from kfac_fx.likelihoods.batch import BatchLikelihood, batch_likelihood, drawn_seed, output_tensors
from kfac_fx.likelihoods.builtin import Bernoulli, Categorical, Likelihood, Normal, Tree
from kfac_fx.likelihoods.named import Sum, is_quadratic
from kfac_fx.likelihoods.sampling import seeded
from kfac_fx.ops.net_buffers import STORE
from kfac_fx.optim.case_rows import CaseRows, case_rows
from kfac_fx.optim.products import Direction, Parameters, root_derivatives
from kfac_fx.optim.repeats import Repeats
from kfac_fx.optim.traced_loss import Evaluated, double
from kfac_fx.parallel import WholeParameters, Workers, share_of
from kfac_fx.statistics.forward import Forward, outputs_of
from kfac_fx.torch_internals import foreach, pytree
from kfac_fx.torch_internals.error_texts import refuses_derivative, refuses_values

log = logging.getLogger("kfac_fx")

Found = TypeVar("Found")

MOST_WIDENED = 2**22
"""Outputs of a batch whose loss is summed in float64; the copies of more would take much memory."""


class Batch(NamedTuple):
    """The inputs and targets that ``KFAC.step`` is given.

    Attributes:
        inputs: what the network is called with, or a closure from the network to its outputs.
        targets: the targets as the likelihood takes them.
    """

    inputs: Tree
    targets: Tree


class Objective:
    """The mean negative log-likelihood of a network, and what else a step needs of its passes.

    A step runs the network several times: for the gradient, the statistics, products with the
    Fisher, the reduction ratio. Dropout has to drop the same units in all of them, else they would
    be of different functions; and only the gradient's pass may move running statistics.

    Args:
        whole: the parameters with all their entries, and the network to run with them.
        likelihood: what the outputs mean.
        forward: a function from (network, inputs) to the likelihood's outputs.
        generator: the generator of the masks' seeds; torch's global random stream is left alone.
        workers: the processes that share a batch.
        compile: run the pass of the gradient through torch.compile, unless parameters are sharded;
            a name is that of a backend.

    Attributes:
        cases: number of cases of the batch, in all processes.
        terms: sum of the weights of the terms of the last loss: a case is one, or one a position.
        start: what ``value`` would return at the parameters of the last gradient, [] in all
            processes.
    """

    def __init__(
        self,
        whole: WholeParameters,
        likelihood: Likelihood | Sum,
        forward: Forward,
        generator: torch.Generator,
        workers: Workers,
        compile: bool | str,
    ) -> None:
        self.net = whole.net
        self.likelihood = likelihood
        self.forward = forward
        self.cases = 0
        self.terms = 0.0
        self.start = torch.zeros(())
        self._whole = whole
        self._precise = precise(likelihood)
        self._workers = workers
        self._generator = generator
        self._seed = 0
        net = whole.net
        # Parameters that are gathered are given by functional_call, which a compiled network lacks.
        own = whole.given is None
        self._compiled = compiled_network(net, compile) if compile and own else None
        # Factor buffers are the taps': copying them each step would cost as much as the parameters.
        names = [name for name, _ in net.named_buffers() if not name.startswith(STORE)]
        self._buffers = {name: net.get_buffer(name) for name in names}
        self._parameters = list(net.parameters())
        self._alone = own and workers.size == 1 and not compile
        self._repeats: Repeats | None = None
        self._differentiates = False
        self._indivisible = False

    def _repeat(self, names: tuple[str, ...]) -> Repeats | None:
        """Return the passes that may run as traces.

        Args:
            names: of the parameters that derivatives are asked for.
        """
        if self._alone and (self._repeats is None or self._repeats.names != names):
            self._repeats = Repeats(
                self.net, names, self.likelihood, self.forward, self._workers, self._widened
            )
        return self._repeats

    def begin(self, batch: Batch) -> None:
        """Draw new masks for the passes that follow, and count the batch's cases."""
        # One seed a batch, for all its passes: each of them starts from it (same_masks).
        self._seed = drawn_seed(self._generator, self._workers)
        self.cases = int(self._workers.agree("a batch", amount=case_count(batch)).amount)

    def of_first(
        self, batch: Batch, fraction: float, least: int, run: Callable[[Batch], Found]
    ) -> Found:
        """Return what a pass finds with this process's share of the first cases.

        Args:
            batch: the batch of this process.
            fraction: the share of the cases of all processes, in (0, 1].
            least: so many cases are kept at least, where there are as many.
            run: the pass, a function of a batch.
        """
        kept = min(self.cases, max(least, round(fraction * self.cases)))
        # A closure has its batch inside.
        whole = kept == self.cases or callable(batch.inputs) or self._indivisible
        if whole or points_past(batch.inputs, kept):
            return run(batch)
        part: Batch = first_cases(batch, share_of(kept, self._workers))
        if self._workers.size > 1:  # all processes have to agree, and only some may fail
            return run(part)
        try:
            return run(part)
        except Exception as error:  # of the user's network, or of a graph for other sizes
            if isinstance(error, KFACError) and not isinstance(error, CaptureError):
                raise
            # The nodes of a graph have an adjacency that was not cut with them. What fails with
            # the whole batch, too, is another matter, and goes to the user as it is.
            found = run(batch)
            self._indivisible = True
            log.warning(
                "the network does not take the first %d of %d cases of a batch (%s: %s): "
                "statistics and steps are of whole batches from here on",
                kept,
                self.cases,
                type(error).__name__,
                str(error).partition("\n")[0],
            )
            return found

    @contextmanager
    def same_masks(self) -> Iterator[None]:
        """Draw inside the random numbers that every pass of the step draws."""
        with seeded(self._seed, self._parameters):
            yield

    def snapshot(self) -> dict[str, Tensor]:
        """Return copies of the buffers (running statistics)."""
        return {name: buffer.clone() for name, buffer in self._buffers.items()}

    def with_buffers(self, parameters: Parameters) -> Direction:
        """Return parameters and the buffers of ``snapshot``, themselves, by name."""
        return {**parameters, **self._buffers}

    @torch.no_grad()
    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        """Put the buffers back."""
        for name, value in snapshot.items():
            self._buffers[name].copy_(value)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Run passes inside that leave no trace in buffers and random streams."""
        kept = self.snapshot()
        try:
            with self.same_masks():
                yield
        finally:
            self.restore(kept)

    def outputs(self, inputs: Tree, parameters: Mapping[str, Tensor] | None = None) -> Tree:
        """Return the likelihood's outputs.

        Args:
            inputs: the same as in ``Batch``.
            parameters: the parameters by name, in place of the module's own; None for those.
        """
        if self._differentiates and not torch.is_grad_enabled():
            with torch.enable_grad():
                return self.outputs(inputs, parameters)
        net: Callable[..., Tree] = self.net
        given = self._whole.given if parameters is None else dict(parameters)
        try:
            if given is None:
                return outputs_of(self.forward, net, inputs)
            if self._alone and self._repeats is not None and self._repeats.names == tuple(given):
                # The walk of functional_call through the module costs as much as a small network.
                with self._repeats.places.swapped(self._repeats.named(given)):
                    return outputs_of(self.forward, self.net, inputs)
            run = partial(_called_with, self.net, given)
            return outputs_of(self.forward, run, inputs)
        except RuntimeError as error:
            if torch.is_grad_enabled() or not refuses_derivative(error):
                raise
        # The network takes derivatives on its way (the forces of an energy), which it cannot
        # without a graph. Only such a one pays for that, and in its first pass alone twice.
        self._differentiates = True
        with self.aside():
            return self.outputs(inputs, parameters)

    def likelihood_of_all(self, outputs: Tree, targets: Tree) -> BatchLikelihood:
        """Return the likelihood of this process's outputs; its terms are counted in all processes.

        Every process divides by the same count, so that the sum of their losses is the mean.
        """
        made = batch_likelihood(self.likelihood, outputs, targets)
        _, agreed = made.of_all(self._workers, "outputs")
        return agreed

    def loss(self, outputs: Tree, targets: Tree) -> Tensor:
        """Return this process's share of the mean negative log-likelihood of a term, [].

        Raises:
            LikelihoodError: targets are missing, or do not fit the outputs.
        """
        made = self.likelihood_of_all(outputs, targets)
        if not made.has_targets:
            raise LikelihoodError("step() needs the targets of the batch")
        self.terms = made.count
        return made.nll() / made.count

    def gradient(
        self, batch: Batch, parameters: Mapping[str, Tensor], compared: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the loss and its gradients, dense, of all processes.

        Args:
            batch: the batch of this process.
            parameters: the module's own, or those that it is run with; a gradient each, in order.
            compared: whether ``start`` is wanted.
        """
        repeats = self._repeat(tuple(parameters))
        names = tuple(parameters) if repeats is None else repeats.held
        own = dict(zip(names, parameters.values(), strict=True))
        plain = partial(self._gradient, batch, own, compared)
        with self.same_masks():
            if repeats is None:
                found = plain()
            else:
                found = repeats.gradient(batch.inputs, batch.targets, compared, plain)
        self.terms = found.terms
        self.start = found.start
        self._take_buffers(found.buffers)
        # A parameter that the batch does not reach has a gradient of zero, to which the l2 term is
        # added.
        dense = []
        for name, parameter in own.items():
            gradient = found.gradients.get(name)
            dense.append(torch.zeros_like(parameter) if gradient is None else gradient)
        self._workers.sum_([found.loss, self.start, *dense])
        return found.loss, dense

    def _gradient(self, batch: Batch, parameters: Parameters, compared: bool) -> Evaluated:
        """Run the pass of the gradient as it is; the network's buffers change."""
        with torch.enable_grad():
            if self._compiled is None:
                outputs = self.outputs(batch.inputs)
            else:
                outputs = outputs_of(self.forward, self._compiled, batch.inputs, compiled=True)
            loss = self.loss(outputs, batch.targets)
            # Not loss.backward(): the user's .grad stays as it is.
            found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        value = loss.detach()
        terms = self.terms
        start = value.clone()
        if compared:
            with torch.no_grad():
                start = self._compared(outputs, batch.targets, start)
        gradients = {
            name: g.to_dense() if g.is_sparse else g
            for name, g in zip(parameters, found, strict=True)
            if g is not None
        }
        return Evaluated(value, start, terms, gradients, self._buffers)

    @torch.no_grad()
    def _take_buffers(self, buffers: Mapping[str, Tensor]) -> None:
        """Give the network the buffers that a trace has left; a pass has changed them itself."""
        if buffers and buffers is not self._buffers:
            foreach.copy_([self._buffers[name] for name in buffers], list(buffers.values()))

    def fisher_gram(
        self, part: Batch, parameters: Parameters, directions: Sequence[Direction]
    ) -> Tensor:
        """Return the products of directions with the exact Fisher, [n, n] in float64.

        Args:
            part: the cases of this process.
            parameters: where derivatives are taken.
            directions: v_1 to v_n, by the names of the parameters.
        """

        def run(given: Parameters) -> BatchLikelihood:
            # Each product runs the network once more, with the same masks and no trace in buffers.
            with self.aside():
                outputs = self.outputs(part.inputs, given)
            return self.likelihood_of_all(outputs, part.targets)

        each = [[one[name].to(p.dtype) for name, p in parameters.items()] for one in directions]
        plain = partial(root_derivatives, run, parameters, each)
        repeats = self._repeat(tuple(parameters))
        if repeats is None:
            return plain().gram()
        with self.same_masks():
            return repeats.products(part.inputs, part.targets, each, plain).gram()

    @property
    def has_rows(self) -> bool:
        """Say whether the rows of a batch can be told apart, as far as is known without one."""
        return self._alone and is_quadratic(self.likelihood)

    def rows(
        self, batch: Batch, parameters: Parameters, gradient: Parameters, most: int
    ) -> CaseRows:
        """Return the rows of a batch.

        Args:
            batch: the batch.
            parameters: the module's own.
            gradient: of the loss, without l2 term.
            most: so many rows are made at most, of those of a larger batch.

        Raises:
            NoRowsError: there are many more, or they cannot be told apart.
        """

        def run() -> BatchLikelihood:
            return self.likelihood_of_all(self.outputs(batch.inputs), batch.targets)

        with self.aside():
            return case_rows(run, parameters, gradient, most)

    def value(self, batch: Batch, parameters: Mapping[str, Tensor] | None = None) -> float:
        """Return the mean negative log-likelihood of a term, of all processes.

        It is NaN where a distribution of torch does not take what the network gives for its
        parameters: a step may be so long that a scale overflows, and a shorter one is asked for.

        Args:
            batch: the batch of this process, whose targets have been checked.
            parameters: the parameters by name, in place of the module's own; None for those.
        """
        try:
            total = self._compared(self.outputs(batch.inputs, parameters), batch.targets).detach()
        except ValueError as error:
            if not self.refused(error):
                raise
            return math.nan
        self._workers.sum_([total])
        return float(total)

    def refused(self, error: ValueError) -> bool:
        """Say whether an error of a pass means that its parameters have no loss."""
        # With several processes the others wait for this one's terms: all of them have to fail.
        return self._workers.size == 1 and refuses_values(error)

    def _compared(self, outputs: Tree, targets: Tree, loss: Tensor | None = None) -> Tensor:
        """Return this process's share of a loss that is compared with others of the same batch.

        Args:
            outputs, targets: those of the batch.
            loss: the loss in the outputs' own precision, where it is known.
        """
        # In float32 the loss of a good fit, and what is constant in it, swallow what a step
        # changes. The outputs themselves are precise enough; of very many the mean is, too.
        if self._widened(sum(leaf.numel() for leaf in output_tensors(outputs))):
            return self.loss(*pytree.tree_map_only(Tensor, double, (outputs, targets)))
        return self.loss(outputs, targets) if loss is None else loss

    def _widened(self, size: int) -> bool:
        """Say whether losses of so many outputs are compared in float64."""
        return self._precise and size <= MOST_WIDENED


def _called_with(
    net: nn.Module, parameters: Mapping[str, Tensor], *args: Tree, **kwargs: Tree
) -> Tree:
    """Return what a network gives with other parameters than its own."""
    return functional_call(net, dict(parameters), args, kwargs)


def precise(likelihood: Likelihood | Sum) -> bool:
    """Say whether a likelihood takes outputs of any precision; a user's own may not."""
    if isinstance(likelihood, Sum):
        return all(precise(part) for _, (part, _) in likelihood.items())
    return isinstance(likelihood, (Categorical, Bernoulli, Normal))


def case_count(batch: Tree) -> int:
    """Return the first dimension of the batch's first tensor that has any."""
    sized = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()]
    return sized[0].shape[0] if sized else 1


def points_past(inputs: Tree, kept: int) -> bool:
    """Say whether indices that stay whole, as the edges of a graph, name rows that would be cut.

    A GPU stops for good at an index that is out of range, so this is not left to the network.

    Args:
        inputs: of the network.
        kept: the number of cases that would stay.
    """
    cases = case_count(inputs)
    for leaf in pytree.tree_leaves(inputs):
        if not isinstance(leaf, Tensor) or leaf.dtype not in (torch.int64, torch.int32):
            continue
        if not leaf.dim() or leaf.shape[0] == cases or not leaf.numel():
            continue
        # Larger numbers, such as of tokens, are none of rows.
        if kept <= int(leaf.max()) < cases:
            return True
    return False


def first_cases(batch: Tree, kept: int) -> Tree:
    """Return a batch of the first ``kept`` cases.

    Every tensor is cut whose first dimension counts the cases; masks and tables of another length
    stay whole.
    """
    cases = case_count(batch)

    def cut(leaf: Tree) -> Tree:
        counted = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == cases
        return leaf[:kept] if counted else leaf

    return pytree.tree_map(cut, batch)
