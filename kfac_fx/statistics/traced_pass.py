"""A pass of a network as one traced, functional and compiled program (two for the exact Fisher)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from kfac_fx.codegen.compile import compiled, graphed
from kfac_fx.codegen.functional import (
    Lifted,
    NotFunctionalError,
    drop_copies,
    functional_errors,
    is_random,
    lift_random,
    no_autocast,
    random_nodes,
    split_at_last,
    traced,
)
from kfac_fx.codegen.replay import replayable
from kfac_fx.ir.use import StatisticKey
from kfac_fx.likelihoods.batch import (
    BatchTerms,
    Terms,
    batch_likelihood,
    fitted_singles,
    output_tensors,
    root_rows,
    signs_of,
    wide,
)
from kfac_fx.likelihoods.builtin import Signs, Tree
from kfac_fx.likelihoods.named import Sum
from kfac_fx.likelihoods.sampling import seeded
from kfac_fx.ops.gram import multiplied
from kfac_fx.statistics.buffers import Statistics
from kfac_fx.statistics.loss_scale import scale_of
from kfac_fx.statistics.own_pass import OwnPass, Result
from kfac_fx.statistics.sampled import Collected
from kfac_fx.torch_internals import foreach, pytree
from kfac_fx.torch_internals.dispatch_modes import TorchDispatchMode
from kfac_fx.torch_internals.fake_tensors import FakeTensorMode


@dataclass(frozen=True)
class Facts:
    """The facts about a pass that shapes alone tell.

    Attributes:
        outputs: stands in for the outputs; its values are NaN, so that nobody relies on them.
        shapes: the shape of the terms of each part of the likelihood.
        noises: the signs of each part's columns; None for a distribution that draws by itself.
        columns: the number of columns of the output Fisher's root.
        masks: random operators in the forward.
    """

    outputs: Tree
    shapes: tuple[torch.Size, ...]
    noises: tuple[Signs | None, ...]
    columns: int
    masks: int


class _CountRandom(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += is_random(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def facts_of(own: OwnPass, inputs: Tree, targets: Tree, *, real: bool = False) -> Facts:
    """Return what a pass without values tells.

    Args:
        own: the pass.
        inputs: the inputs of a batch; only shapes and dtypes of its tensors count.
        targets: the targets of the batch, of which the same holds.
        real: whether the pass is run with copies of the values, which takes less time for a small
            network; it draws from torch's streams.

    Raises:
        LikelihoodError: the outputs do not fit the likelihood.
        NotFunctionalError: the code asks for values.
    """
    # Shapes cost no arithmetic, and are needed before the trace: noise has the shape of the
    # distribution, and the trace is one for each number of columns and masks.
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    copied = torch.clone if real else fake.from_tensor
    mode = nullcontext() if real else fake
    state, batch = pytree.tree_map_only(Tensor, copied, (own.state(), inputs))
    distributions, columns = [], 0
    with functional_errors(), torch.no_grad(), mode, _CountRandom() as random:
        outputs = own.outputs(own.leaves(state), batch)
        masks = random.count
        # A root has columns for what depends on the outputs, as derivatives tell: a scale that a
        # network returns has some, a constant has none.
        with torch.enable_grad():
            if own.uses_terms:
                found = fitted_singles(own.likelihood, _differentiable(wide(outputs)), targets)
                distributions = [one.likelihood.distribution(one.outputs) for one in found]
            if own.columns:
                rows = (r for d in distributions for r in root_rows(d, None))
                columns = sum(r.shape[1] for r in rows)
            noises = tuple(signs_of(d) for d in distributions) if own.draws else ()
    stand_ins = pytree.tree_map_only(Tensor, _stand_in, wide(outputs))
    return Facts(stand_ins, tuple(d.batch_shape for d in distributions), noises, columns, masks)


def _differentiable(outputs: Tree) -> Tree:
    def leaf(value: Tensor) -> Tensor:
        return value.detach().requires_grad_(value.is_floating_point())

    return pytree.tree_map_only(Tensor, leaf, outputs)


def _stand_in(like: Tensor) -> Tensor:
    if not like.is_floating_point():
        return torch.zeros((), dtype=like.dtype, device=like.device).expand(like.shape)
    return torch.full((), float("nan"), dtype=like.dtype, device=like.device).expand(like.shape)


@dataclass(frozen=True)
class Arguments:
    """The arguments of a program, but for noise.

    Attributes:
        state: the state of the network.
        inputs: the inputs as ``forward`` takes them.
        targets: for the loss, as they were given.
        terms: the terms of each part of the likelihood, None for a part that no process has terms
            of. Their shares are tensors where they depend on the batch, and their counts are not
            given.
    """

    state: Mapping[str, Tensor]
    inputs: Tree
    targets: Tree
    terms: tuple[Terms | None, ...]

    def flat(self, noises: Sequence[Tensor | None], select: Tensor | None) -> FlatArguments:
        """Return the leaves and their tree; ``select`` comes last."""
        batch = self.inputs, self.targets, self.terms
        flat = pytree.tree_flatten((dict(self.state), *batch, tuple(noises), select))
        return FlatArguments(flat[0], flat[1])

    def tensors(self, noises: Sequence[Tensor | None]) -> list[Tensor]:
        """Return the tensors among the leaves of ``flat``, without a column, in the same order."""
        # At every call: the tree is walked only where the user's batch is one.
        found = [*self.state.values()]
        for part in (self.inputs, self.targets):
            found += [part] if isinstance(part, Tensor) else _tensors(pytree.tree_leaves(part))
        for terms in self.terms:
            found += _tensors(pytree.tree_leaves(terms) if terms is not None else ())
        return found + _tensors(noises)


class Filled(NamedTuple):
    """All arguments of a pass that is being traced, as ``FlatArguments`` puts them together.

    Attributes:
        state, inputs, targets, terms: see ``Arguments``.
        noises: the signs of each part's columns.
        select: the column of the exact Fisher's root; None for a pass without.
    """

    state: dict[str, Tensor]
    inputs: Tree
    targets: Tree
    terms: tuple[Terms | None, ...]
    noises: tuple[Tensor | None, ...]
    select: Tensor | None


class FlatArguments(NamedTuple):
    """The leaves of ``Arguments``, of noise and a column, and their tree."""

    leaves: list[object]
    tree: pytree.TreeSpec

    def filled(self, tensors: Iterator[Tensor]) -> Filled:
        """Return the arguments with other tensors.

        Args:
            tensors: those in the place of the tensors among the leaves; no more are taken of it.
        """
        values = [next(tensors) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        return Filled._make(pytree.tree_unflatten(values, self.tree))


class Extra(NamedTuple):
    """The arguments of a pass beside the batch.

    Attributes:
        seed: of the draws; 0 if there are none.
        tensors: others, whose number and shapes belong to the form.
    """

    seed: int = 0
    tensors: Sequence[Tensor] = ()


def arguments(
    own: OwnPass, facts: Facts, inputs: Tree, targets: Tree, agreed: BatchTerms
) -> Arguments:
    """Return the arguments of a batch.

    Args:
        own: the pass.
        facts: the facts of a batch of this form.
        inputs, targets: the batch.
        agreed: its terms, with those of all processes counted.
    """
    shares: Sequence[float | Tensor] = [1.0 for _ in agreed.parts]
    if agreed.weighted:
        like = output_tensors(facts.outputs)[0]
        known = [0.0 if part is None else part.share for part in agreed.parts]
        shares = torch.tensor(known, dtype=like.dtype, device=like.device).unbind()
    needed = own.uses_targets
    terms = tuple(
        part and Terms(part.targets if needed else None, part.weights, 0.0, share)
        for part, share in zip(agreed.parts, shares, strict=True)
    )
    return Arguments(own.state(), inputs, targets if callable(own.loss) else None, terms)


@dataclass
class _Outputs:
    """The meanings of a program's outputs, after the flag of finite outputs.

    Attributes:
        statistics: their names.
        compared: whether a comparison of the loss with the likelihood follows.
        gradients, buffers: their names; the loss comes before them, if there is one.
    """

    statistics: list[StatisticKey]
    compared: bool
    gradients: list[str]
    buffers: list[str]


class PassProgram:
    """One pass, traced for one form of arguments, and compiled or run as it is.

    Args:
        own: the pass.
        facts: the facts of a batch of this form.
        given: such a batch.
        compile: True, or the name of a backend of torch.compile. False runs the operators of the
            pass one by one: what they write into stays, and they draw from torch's own stream.

    Attributes:
        once, each: the graphs. ``each`` runs for every column of the exact Fisher, on what
            ``once`` hands on; None for the other Fishers, where ``once`` is all.
        lifted: random operators of the forward, whose results are the first arguments.

    Raises:
        NotFunctionalError: there is no such graph.
    """

    def __init__(self, own: OwnPass, facts: Facts, given: Arguments, compile: bool | str) -> None:
        self._own = own
        self._compile = compile
        self._facts = facts
        # Parts without terms are left out of the program, and of its draws.
        kinds = zip(facts.noises, given.terms, strict=False)
        self._kinds = [noise for noise, terms in kinds if terms is not None]
        flat = given.flat(self._noises(0), self._column(0) if own.columns else None)

        def function(*tensors: Tensor) -> list[Tensor]:
            return self._compute(flat.filled(iter(tensors)))

        # All tensors are arguments: what the trace found elsewhere would be a constant of the
        # program, and a parameter's present value would stay in it for ever.
        if not compile:
            self._run_as_it_is(replayable(function, _tensors(flat.leaves)))
            return
        module = traced(function, _tensors(flat.leaves))
        buffers = self._outputs.buffers
        changed = zip(buffers, drop_copies(module, len(buffers)), strict=True)
        self._outputs.buffers = [name for name, stays in changed if stays]
        self.lifted: list[Lifted] = lift_random(module, facts.masks)
        # Masks of the forward have been lifted: what still draws is a distribution that does so by
        # itself. One of these is run under its seed; of several, the seeds would be mixed.
        self._seeded = bool(random_nodes(module.graph))
        if self._seeded and self._kinds != [None]:
            raise NotFunctionalError("random numbers are drawn after the forward")
        self.once: fx.GraphModule = module
        self.each: fx.GraphModule | None = None
        if own.columns:
            parts = split_at_last(module)
            self.once = parts.once
            self.each = parts.each
            self._places = parts.places
            self._check_summed()
        options = {"fallback_random": True} if self._seeded else None
        # No CUDA graph that draws for itself: it would replay the same numbers. None of two
        # programs either, where one reads results of the other that are overwritten.
        on_gpu = any(tensor.is_cuda for tensor in output_tensors(facts.outputs))
        whole = on_gpu and self.each is None and not self._seeded
        self._once = (graphed if whole else compiled)(self.once, compile, options)
        self._each = None if self.each is None else compiled(self.each, compile)

    def _run_as_it_is(self, module: fx.GraphModule) -> None:
        """Take the trace of the pass for the program."""
        if self._own.columns or None in self._kinds:
            # A graph that writes into its tensors has no parts, and a distribution that draws by
            # itself does so under a seed of its own.
            raise NotFunctionalError("its draws or its columns are not arguments")
        self.lifted = []
        self._seeded = False
        self.once = module
        self.each = None
        # Without the wrapper of nn.Module, which costs as much as a few operators.
        self._once = partial(type(module).forward, module)
        self._each = None

    def _compute(self, given: Filled) -> list[Tensor]:
        """Run the pass on tensors that stand for values; its results are the program's outputs."""
        own = self._own
        made = None
        with torch.enable_grad():
            leaves = own.leaves(given.state)
            outputs = own.outputs(leaves, given.inputs)
            if own.uses_terms:
                known = BatchTerms(given.terms, isinstance(own.likelihood, Sum), 0.0)
                with no_autocast():
                    made = batch_likelihood(own.likelihood, outputs, terms=known)
            values = own.evaluate(
                leaves, outputs, given.targets, made, given.noises, select=given.select
            )
        # The trace runs this once, so what it notes of the outputs holds for all later runs.
        buffers = own.buffers(leaves)
        compared = values.comparison is not None
        self._outputs = _Outputs([*values.statistics], compared, [*values.gradients], [*buffers])
        finite = self._finite(output_tensors(outputs))
        statistics = [multiplied(value) for value in values.statistics.values()]
        numbers = [number for number in (values.comparison, values.loss) if number is not None]
        return [finite, *statistics, *numbers, *values.gradients.values(), *buffers.values()]

    def _finite(self, outputs: Sequence[Tensor]) -> Tensor:
        """Return a number that is finite if the outputs are, or a flag for a compiler to fuse."""
        if self._compile:
            return torch.stack([t.isfinite().all() for t in outputs]).all()
        # One operator for the five that tell an entry's.
        return torch.stack([torch.linalg.vector_norm(t) for t in outputs]).sum()

    @torch.no_grad()
    def __call__(self, given: Arguments, seed: int, count: float, total: float) -> Result:
        """Run the program on a batch of its form.

        Args:
            given: the batch, and the state of the network.
            seed: the seed of the draws.
            count, total: numbers of likelihood terms here and in all processes, for the result.
        """
        # In the order of the forward, from torch's own stream, as the pass that runs would draw.
        masks = [lifted() for lifted in self.lifted]
        arguments = [*masks, *given.tensors(self._noises(seed))]
        streams = seeded(seed, arguments) if self._seeded else nullcontext()
        with no_autocast(), streams:
            if self._each is None:
                results = list(self._once(*arguments))
            else:
                results = self._all_columns(arguments)
        return self._result(results, count, total)

    def _noises(self, seed: int) -> list[Tensor | None]:
        return [noise and noise.sample(seed + k) for k, noise in enumerate(self._kinds)]

    def _all_columns(self, arguments: list[Tensor]) -> list[Tensor]:
        """Run the part that depends on the column for all of them, and add their results up."""
        assert self._each is not None
        free = sum(not tied for tied, _ in self._places)
        first = self._once(*arguments)
        handed = first[free:]
        total: list[Tensor] = []
        for column in range(self._facts.columns):
            found = list(self._each(*handed, self._column(column)))
            if total:
                foreach.add_(total, found)
            else:
                total = found
        return [total[place] if tied else first[place] for tied, place in self._places]

    def _check_summed(self) -> None:
        """Check that only what is quadratic in the derivative is summed over the columns."""
        # A sum over the columns would count the inputs once a column. They do not depend on it
        # unless user code makes the forward's values depend on ``select``, which it never sees.
        named = self._own.sources.names.tapped
        quadratic = {one.key for one in named if one.role == "gradient"}
        pairs = zip(self._outputs.statistics, self._places[1:], strict=False)  # after the flag
        tapped = {one.key for one in named}
        if any(tied and key in tapped - quadratic for key, (tied, _) in pairs):
            raise NotFunctionalError("statistics of inputs depend on the derivative")

    def _column(self, index: int) -> Tensor:
        like = output_tensors(self._facts.outputs)[0]
        select = torch.zeros(self._facts.columns, dtype=like.dtype, device=like.device)
        select[index] = 1.0
        return select

    def _result(self, results: list[Tensor], count: float, total: float) -> Result:
        """Return what the outputs of the program are."""
        names = self._outputs
        finite, *rest = results
        statistics: Statistics = dict(zip(names.statistics, rest, strict=False))
        rest = rest[len(statistics) :]
        scale = scale_of(rest.pop(0)) if names.compared else 1.0
        loss = None if self._own.loss is None else rest.pop(0)
        gradients = dict(zip(names.gradients, rest, strict=False))
        buffers = dict(zip(names.buffers, rest[len(gradients) :], strict=True))
        fine = not self._own.statistics or (bool(finite) if self._compile else isfinite(finite))
        collected = Collected(fine, statistics, count, total, scale)
        return Result(collected, loss, gradients, buffers)


def _tensors(leaves: Iterable[object]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
