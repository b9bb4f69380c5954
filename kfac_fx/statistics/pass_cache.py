"""Passes of a network as compiled programs, one for each form of their arguments."""

from __future__ import annotations

import logging
from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.utils import _pytree as pytree

from kfac_fx.codegen.functional import NotFunctionalError
from kfac_fx.likelihoods.batch import BatchLikelihood, Part, output_tensors, singles
from kfac_fx.likelihoods.builtin import Sum
from kfac_fx.statistics.own_pass import PurePass, Result
from kfac_fx.statistics.traced_pass import Arguments, Facts, PassProgram, Terms, facts_of

log = logging.getLogger("kfac_fx")

MOST_PROGRAMS = 8
"""Programs of one pass; what has yet another form is run node by node."""

_NO_TERMS = BatchLikelihood((), False, 1.0)


class CompiledPass:
    """A ``PurePass`` whose programs are traced and compiled as forms of arguments come.

    A form is the shapes and dtypes of all tensors, other arguments, the plain attributes of the
    modules (``training``, a dropout's ``p``) and autocast. At most ``MOST_PROGRAMS`` forms are
    compiled. What cannot be traced, or comes later, runs node by node, and is logged once.

    Args:
        compile: True, or the name of a backend of torch.compile; False runs all node by node.

    Attributes:
        programs: form -> program, or None where there is none.
    """

    def __init__(self, pure: PurePass, compile: bool | str) -> None:
        self.pure = pure
        self.programs: dict[Hashable, PassProgram | None] = {}
        self._compile = compile
        self._facts: dict[Hashable, Facts | None] = {}

    def __call__(self, inputs: Any, targets: Any, seed: int) -> Result:
        """As ``PurePass.run``, with the same draws of the seed and of torch's random stream."""
        closure = callable(inputs)  # what it holds would be a constant of the program
        facts = self._facts_of(inputs) if self._compile and not closure else None
        if facts is None:
            return self.pure.run(inputs, targets, seed)
        made = agreed = _NO_TERMS
        if self.pure.uses_terms:
            made = self._predictive(facts, targets)
            _, agreed = made.of_all(self.pure.workers, "observe")
        given = self._arguments(facts, inputs, targets, made, agreed)
        form = _form((given.inputs, given.targets, tuple(given.terms))), _plain_state(self.pure.net)
        if form not in self.programs:
            self.programs[form] = self._made(facts, given)
        program = self.programs[form]
        if program is None:
            return self.pure.run(inputs, targets, seed)
        found = Result({}, 0.0, agreed.count, True)
        if made.count > 0:  # else the other processes have terms
            found = program(given, seed, made.count, agreed.count)
        if not self.pure.statistics:
            return found
        finite, _ = made.of_all(self.pure.workers, "observe", found.finite)
        return replace(found, finite=finite)

    def _predictive(self, facts: Facts, targets: Any) -> BatchLikelihood:
        """The terms of the batch; their distributions know their shape alone."""
        found = singles(self.pure.likelihood, facts.outputs, targets)
        stubs = [Distribution(shape, validate_args=False) for shape in facts.terms]
        parts = tuple(
            Part(stub, *one.likelihood.terms(one.outputs, one.targets), share=one.weight)
            for one, stub in zip(found, stubs, strict=True)
        )
        weighted = isinstance(self.pure.likelihood, Sum)
        return BatchLikelihood(parts, weighted, sum(part.count for part in parts))

    def _arguments(
        self,
        facts: Facts,
        inputs: Any,
        targets: Any,
        made: BatchLikelihood,
        agreed: BatchLikelihood,
    ) -> Arguments:
        needed = self.pure.uses_targets
        known = tuple(part.targets if needed else None for part in made.parts)
        # Parts without terms are left out of the agreed ones, and of the program.
        shares = {id(part.distribution): part.share for part in agreed.parts}
        counted = tuple(id(part.distribution) in shares for part in made.parts)
        amounts: tuple[Tensor, ...] = ()
        if made.weighted:
            like = output_tensors(facts.outputs)[0]
            shared = [shares.get(id(part.distribution), 0.0) for part in made.parts]
            amounts = torch.tensor(shared, dtype=like.dtype, device=like.device).unbind()
        weights = tuple(part.weights for part in made.parts)
        terms = Terms(known, weights, amounts, counted)
        wanted = targets if callable(self.pure.loss) else None
        return Arguments(self.pure.state(), inputs, wanted, terms)

    def _facts_of(self, inputs: Any) -> Facts | None:
        form = _form(inputs), _plain_state(self.pure.net)
        if form not in self._facts:
            try:
                self._facts[form] = facts_of(self.pure, inputs)
            except NotFunctionalError as error:
                log.warning("the pass is not compiled: %s", error)
                self._facts[form] = None
        return self._facts[form]

    def _made(self, facts: Facts, given: Arguments) -> PassProgram | None:
        made = sum(program is not None for program in self.programs.values())
        if made >= MOST_PROGRAMS:
            log.warning("%d forms of a batch are compiled: others run as they are", made)
            return None
        try:
            return PassProgram(self.pure, facts, given, self._compile)
        except NotFunctionalError as error:
            log.warning("the pass is not compiled: %s", error)
            return None


def _form(tree: Any) -> Hashable:
    leaves, spec = pytree.tree_flatten(tree)
    return tuple(map(_form_of, leaves)), str(spec)


def _form_of(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device
    return leaf if isinstance(leaf, Hashable) else repr(leaf)


def _plain_state(net: nn.Module) -> Hashable:
    """What a program takes for constant: plain attributes of modules, and autocast."""
    plain = (bool, int, float, str, type(None))
    values = [v for m in net.modules() for v in vars(m).values() if isinstance(v, plain)]
    kinds = [
        (torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None)
        for kind in ("cpu", "cuda")
    ]
    return (*values, *kinds)
