"""Passes of a network as compiled programs, one for each form of their arguments."""

from __future__ import annotations

import logging
from collections.abc import Hashable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from kfac_fx.codegen.functional import NotFunctionalError
from kfac_fx.likelihoods.batch import BatchTerms, batch_terms, fitted_singles
from kfac_fx.likelihoods.builtin import Tree
from kfac_fx.likelihoods.named import Sum
from kfac_fx.statistics.own_pass import OwnPass, Result
from kfac_fx.statistics.repeated_pass import repeated
from kfac_fx.statistics.replays import Replays
from kfac_fx.statistics.sampled import Collected
from kfac_fx.statistics.traced_pass import Arguments, Extra, Facts, PassProgram, arguments, facts_of
from kfac_fx.torch_internals import pytree

log = logging.getLogger("kfac_fx")

MOST_PROGRAMS = 8
"""Programs of one pass; what has yet another form is run node by node."""


class CompiledPass:
    """An ``OwnPass`` whose programs are traced and compiled as forms of arguments come.

    A form is the shapes and dtypes of all tensors, other arguments, the plain attributes of the
    modules (``training``, a dropout's ``p``) and autocast. At most ``MOST_PROGRAMS`` forms are
    compiled. What cannot be traced, or comes later, runs node by node, and is logged once.

    Args:
        own: the pass.
        compile: True, or the name of a backend of torch.compile; False runs all node by node, or
            by their traces.
        replays: the traces of the network; None for none. Not looked at where passes are compiled.

    Attributes:
        programs: form -> program, or None where there is none.
    """

    def __init__(self, own: OwnPass, compile: bool | str, replays: Replays | None = None) -> None:
        self.own = own
        repeats = replays is not None and not compile and own.workers.size == 1
        self._repeated = repeated(own, replays) if repeats and replays is not None else None
        self.programs: dict[Hashable, PassProgram | None] = {}
        self._compile = compile
        self._facts: dict[Hashable, Facts | None] = {}

    def __call__(self, inputs: Tree, targets: Tree, seed: int) -> Result:
        """Return what ``OwnPass.run`` does, with the same draws of the seed and of torch's stream.

        Raises:
            LikelihoodError, ObservationError: as ``Preconditioner.observe``.
        """
        if self._repeated is not None:
            run = partial(self.own.run, inputs, targets, seed)
            return self._repeated(inputs, targets, Extra(seed), run)
        # What a closure holds would be a constant of the program: the next batch's would differ.
        closure = callable(inputs)
        facts = self._facts_of(inputs, targets) if self._compile and not closure else None
        if facts is None:
            return self.own.run(inputs, targets, seed)
        terms = agreed = BatchTerms((), False, 1.0)
        if self.own.uses_terms:
            # Targets are checked, and their weights made, before the program is run: inside of it
            # nothing may depend on their values, and it cannot raise.
            ones = fitted_singles(self.own.likelihood, facts.outputs, targets)
            terms = batch_terms(ones, facts.shapes, isinstance(self.own.likelihood, Sum))
            _, agreed = terms.agreed(self.own.workers, "observe")
        given = arguments(self.own, facts, inputs, targets, agreed)
        form = _form((given.inputs, given.targets, given.terms)), _plain_state(self.own.net)
        if form not in self.programs:
            self.programs[form] = self._made(facts, given)
        program = self.programs[form]
        if program is None:
            return self.own.run(inputs, targets, seed)
        found = Result(Collected(True, {}, 0.0, agreed.count))
        # A process without terms makes no pass, but goes on to agree with the others.
        if terms.count > 0:
            found = program(given, seed, terms.count, agreed.count)
        if not self.own.statistics:
            return found
        finite, _ = terms.agreed(self.own.workers, "observe", found.collected.finite)
        return replace(found, collected=replace(found.collected, finite=finite))

    def _facts_of(self, inputs: Tree, targets: Tree) -> Facts | None:
        form = _form((inputs, targets)), _plain_state(self.own.net)
        if form not in self._facts:
            try:
                self._facts[form] = facts_of(self.own, inputs, targets)
            except NotFunctionalError as error:
                log.warning("the pass is not compiled: %s", error)
                self._facts[form] = None
        return self._facts[form]

    def _made(self, facts: Facts, given: Arguments) -> PassProgram | None:
        # Compiling takes seconds: batches whose form changes all the time would never stop it.
        made = sum(program is not None for program in self.programs.values())
        if made >= MOST_PROGRAMS:
            log.warning("%d forms of a batch are compiled: others run as they are", made)
            return None
        try:
            return PassProgram(self.own, facts, given, self._compile)
        except NotFunctionalError as error:
            log.warning("the pass is not compiled: %s", error)
            return None


def _form(tree: Tree) -> Hashable:
    """Return what a program takes for constant of a tree: all but the values of its tensors."""
    leaves, spec = pytree.tree_flatten(tree)
    return tuple(map(_form_of, leaves)), str(spec)


def _form_of(leaf: object) -> Hashable:
    # Strides are part of it: Inductor's kernels are made for them.
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device
    return leaf if isinstance(leaf, Hashable) else repr(leaf)


def _plain_state(net: nn.Module) -> Hashable:
    """Return what a program takes for constant of the network: plain attributes, and autocast.

    Everything else that code may read is taken for constant without a look: torch.compile has
    guards for it, but a traced pass is found by its form alone.
    """
    plain = (bool, int, float, str, type(None))
    values = [v for m in net.modules() for v in vars(m).values() if isinstance(v, plain)]
    kinds = [
        (torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None)
        for kind in ("cpu", "cuda")
    ]
    return (*values, *kinds)
