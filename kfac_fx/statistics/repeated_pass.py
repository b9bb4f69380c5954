"""A pass of the network that runs as its trace once it has come a few times in one form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

from torch import Tensor, fx

from kfac_fx.codegen.functional import NotFunctionalError
from kfac_fx.likelihoods.batch import Terms, batch_terms, fitted_singles
from kfac_fx.likelihoods.builtin import Tree
from kfac_fx.likelihoods.named import Sum
from kfac_fx.ops.gram import Statistic
from kfac_fx.statistics.own_pass import OwnPass, Result
from kfac_fx.statistics.replays import Form, Replays
from kfac_fx.statistics.traced_pass import (
    Arguments,
    Extra,
    Facts,
    PassProgram,
    arguments,
    facts_of,
)
from kfac_fx.torch_internals import pytree

Found = TypeVar("Found")
FoundOut = TypeVar("FoundOut", covariant=True)


class Traced(Protocol[FoundOut]):
    """The trace of a pass.

    Attributes:
        once: the graph.
    """

    once: fx.GraphModule

    def __call__(self, given: Arguments, extra: Extra, count: float) -> FoundOut:
        """Run it on a batch of its form.

        Args:
            given: the batch, and the state of the network.
            extra: further arguments of the pass.
            count: the number of likelihood terms.
        """


Make = Callable[[OwnPass, Facts, Arguments, Extra], Traced[Found]]
"""Traces a pass on a batch. It raises NotFunctionalError where there is no such trace."""


class RepeatedPass(Generic[Found]):
    """A pass of one process, which may run as a trace.

    Args:
        own: says what the pass is a function of.
        replays: the traces of its network.
        make: traces it.
        results: the tensors of what it returns, in an order that does not depend on how it ran.

    Attributes:
        own: the same as given.
    """

    def __init__(
        self,
        own: OwnPass,
        replays: Replays,
        make: Make[Found],
        results: Callable[[Found], Sequence[Statistic]],
    ) -> None:
        self.own = own
        self._replays = replays
        self._make = make
        self._results = results
        self._facts: dict[Form, Facts] = {}
        self._traced: dict[Form, Traced[Found]] = {}

    def __call__(
        self, inputs: Tree, targets: Tree, extra: Extra, plain: Callable[[], Found]
    ) -> Found:
        """Return what the pass gives: by its trace, or as it is.

        Args:
            inputs, targets: the batch, as ``OwnPass.run`` takes it.
            extra: further arguments.
            plain: runs the pass as it is; its draws from torch's stream are the trace's as well.
        """
        form = None if callable(inputs) else self._form(inputs, targets, extra)
        facts = None if form is None else self._facts_of(form, inputs, targets)
        if form is None or facts is None:
            return plain()
        # Targets are checked before the trace runs, which cannot raise.
        ones = fitted_singles(self.own.likelihood, facts.outputs, targets)
        terms = batch_terms(ones, facts.shapes, isinstance(self.own.likelihood, Sum))
        _, agreed = terms.agreed(self.own.workers, "observe")
        given = arguments(self.own, facts, inputs, targets, agreed)
        form = form._replace(what=(form.what, _kinds(given.terms)))
        if self._replays.proven(form):
            return self._traced[form](given, extra, agreed.count)
        if not self._trace(form, facts, given, extra):
            return plain()
        # Both draw what torch's stream has at present; the pass comes last, and is what counts.
        with self._replays.drawing_alike(form):
            found = self._traced[form](given, extra, agreed.count)
        wanted = plain()
        if not self._replays.prove(form, self._results(found), self._results(wanted)):
            del self._traced[form]
        return wanted

    def _form(self, inputs: Tree, targets: Tree, extra: Extra) -> Form | None:
        state = self.own.state()
        tensors = [*state.values(), *_leaves(inputs), *_leaves(targets), *extra.tensors]
        return self._replays.form((id(self), _structure(inputs, targets)), tensors)

    def _facts_of(self, form: Form, inputs: Tree, targets: Tree) -> Facts | None:
        """Return the facts of a form that has come a few times; None before that."""
        if form not in self._facts and self._replays.ready(form):
            if not self._replays.takes(inputs):
                self._replays.refuse(form, "the graph is for other inputs")
                return None
            try:
                with self._replays.tracing():
                    self._facts[form] = facts_of(self.own, inputs, targets, real=True)
            except NotFunctionalError as error:
                self._replays.refuse(form, str(error))
        return self._facts.get(form)

    def _trace(self, form: Form, facts: Facts, given: Arguments, extra: Extra) -> bool:
        """Trace a form; return whether there is a trace."""
        if form in self._traced:
            return True
        if not self._replays.begin(form):
            return False
        try:
            with self._replays.tracing():
                made = self._make(self.own, facts, given, extra)
        except NotFunctionalError as error:
            self._replays.refuse(form, str(error))
            return False
        self._replays.traced(form, made.once)
        self._traced[form] = made
        return True


class _TracedPass:
    """The trace of an ``OwnPass``; see ``Traced``."""

    def __init__(self, own: OwnPass, facts: Facts, given: Arguments, _: Extra) -> None:
        self._program = PassProgram(own, facts, given, compile=False)
        self.once = self._program.once

    def __call__(self, given: Arguments, extra: Extra, count: float) -> Result:
        return self._program(given, extra.seed, count, count)


def repeated(own: OwnPass, replays: Replays) -> RepeatedPass[Result]:
    """Return an ``OwnPass`` as a ``RepeatedPass``."""
    return RepeatedPass(own, replays, _TracedPass, _results)


def _results(result: Result) -> list[Statistic]:
    found = [value for _, value in sorted(result.collected.statistics.items())]
    found += [] if result.loss is None else [result.loss]
    for named in (result.gradients, result.buffers):
        found += [named[name] for name in sorted(named)]
    return found


def _kinds(terms: Sequence[Terms | None]) -> tuple[tuple[bool, bool] | None, ...]:
    """Return which tensors the terms of a batch have: weights may depend on the targets' values."""
    return tuple([t and (t.targets is None, t.weights is None) for t in terms])


def _leaves(tree: Tree) -> list[Tensor]:
    if tree is None or isinstance(tree, Tensor):
        return [] if tree is None else [tree]
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _structure(inputs: Tree, targets: Tree) -> str:
    """Return what a batch has besides its tensors."""
    if isinstance(inputs, Tensor) and (targets is None or isinstance(targets, Tensor)):
        return "" if targets is None else "targets"
    leaves, spec = pytree.tree_flatten((inputs, targets))
    return f"{spec}{[leaf for leaf in leaves if not isinstance(leaf, Tensor)]}"
