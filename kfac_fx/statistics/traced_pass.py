"""A pass of a network as one traced, functional and compiled program (two for the exact Fisher)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

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
from kfac_fx.likelihoods.batch import BatchLikelihood, Part, output_tensors, singles, wide
from kfac_fx.likelihoods.fisher_root import exact_rows
from kfac_fx.likelihoods.sampling import Noise, draw, noise_of, seeded
from kfac_fx.statistics.buffers import Statistics
from kfac_fx.statistics.loss_scale import compared, scale_of
from kfac_fx.statistics.own_pass import PurePass, Result


@dataclass(frozen=True)
class Facts:
    """What shapes alone tell of a pass.

    Attributes:
        outputs: stands in for the outputs; its values are NaN, so that nobody relies on them.
        terms: of each part of the likelihood, the shape of its terms.
        noises: of each part's draw.
        columns: of the output Fisher's root.
        masks: random operators in the forward.
    """

    outputs: Any
    terms: tuple[torch.Size, ...]
    noises: tuple[Noise | None, ...]
    columns: int
    masks: int


class _CountRandom(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += is_random(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def facts_of(pure: PurePass, inputs: Any) -> Facts:
    """By a pass without values.

    Raises:
        LikelihoodError: the outputs do not fit the likelihood.
        NotFunctionalError: the code asks for values.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    state, batch = pytree.tree_map_only(Tensor, mode.from_tensor, (pure.state(), inputs))
    distributions, columns = [], 0
    with functional_errors(), torch.no_grad(), mode, _CountRandom() as random:
        outputs = pure.outputs(pure.leaves(state), batch)
        masks = random.count
        if pure.uses_terms:
            found = singles(pure.likelihood, wide(outputs), None)
            distributions = [one.likelihood.distribution(one.outputs) for one in found]
        if pure.columns:
            rows = (r for d in distributions for r in exact_rows(d, None))
            columns = sum(r.shape[1] for r in rows)
        noises = tuple(noise_of(d) for d in distributions) if pure.draws else ()
    stand_ins = pytree.tree_map_only(Tensor, _stand_in, wide(outputs))
    return Facts(stand_ins, tuple(d.batch_shape for d in distributions), noises, columns, masks)


def _stand_in(like: Tensor) -> Tensor:
    if not like.is_floating_point():
        return torch.zeros((), dtype=like.dtype, device=like.device).expand(like.shape)
    return torch.full((), float("nan"), dtype=like.dtype, device=like.device).expand(like.shape)


class Terms(NamedTuple):
    """Of each part of the likelihood; targets and weights as ``terms`` returned them.

    Attributes:
        shares: of parts of a sum, tensors because they depend on the batch; else empty.
        counted: whether a part has terms.
    """

    targets: tuple[Any, ...]
    weights: tuple[Tensor | None, ...]
    shares: tuple[Tensor, ...]
    counted: tuple[bool, ...]


@dataclass
class Arguments:
    """Of one call.

    Attributes:
        targets: for the loss, as they were given.
    """

    state: Mapping[str, Tensor]
    inputs: Any
    targets: Any
    terms: Terms

    def flat(self, noises: Sequence[Tensor | None], select: Tensor | None) -> tuple[list[Any], Any]:
        """Leaves and their tree; ``select`` comes last."""
        batch = self.inputs, self.targets, tuple(self.terms)
        return pytree.tree_flatten((dict(self.state), *batch, tuple(noises), select))


@dataclass
class _Outputs:
    """What the outputs of a program are, behind the flag of finite outputs."""

    present: list[bool]
    compared: bool
    gradients: list[str]
    buffers: list[str]


class PassProgram:
    """One pass, traced and compiled for one form of arguments.

    Attributes:
        once, each: the graphs. ``each`` runs for every column of the exact Fisher, on what
            ``once`` hands on; None for the other Fishers, where ``once`` is all.
        lifted: random operators of the forward, whose results are the first arguments.

    Raises:
        NotFunctionalError: there is no such graph.
    """

    def __init__(self, pure: PurePass, facts: Facts, given: Arguments, compile: bool | str) -> None:
        self._pure, self._facts = pure, facts
        counted = zip(facts.noises, given.terms.counted, strict=False)
        self._kinds = [noise for noise, there in counted if there]
        leaves, tree = given.flat(self._noises(0), self._column(0) if pure.columns else None)

        def function(*tensors: Tensor) -> list[Tensor]:
            rest = iter(tensors)
            values = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            return self._compute(*pytree.tree_unflatten(values, tree))

        module = traced(function, _tensors(leaves))
        buffers = self._outputs.buffers
        changed = zip(buffers, drop_copies(module, len(buffers)), strict=True)
        self._outputs.buffers = [name for name, stays in changed if stays]
        self.lifted: list[Lifted] = lift_random(module, facts.masks)
        self._seeded = bool(random_nodes(module.graph))
        if self._seeded and self._kinds != [None]:
            raise NotFunctionalError("random numbers are drawn after the forward")
        self.once, self.each = module, None
        if pure.columns:
            self.once, self.each, self._places = split_at_last(module)
            self._check_summed()
        options = {"fallback_random": True} if self._seeded else None
        # No CUDA graph that draws for itself, or of two programs, one on results of the other.
        on_gpu = any(tensor.is_cuda for tensor in output_tensors(facts.outputs))
        whole = on_gpu and self.each is None and not self._seeded
        self._once = (graphed if whole else compiled)(self.once, compile, options)
        self._each = None if self.each is None else compiled(self.each, compile)

    def _compute(
        self,
        state: Mapping[str, Tensor],
        inputs: Any,
        targets: Any,
        terms: Any,
        noises: Sequence[Tensor | None],
        select: Tensor | None,
    ) -> list[Tensor]:
        pure = self._pure
        found: list[Tensor | None] = []
        numbers: list[Tensor] = []  # of the loss: its comparison with the likelihood, itself
        gradients: Mapping[str, Tensor] = {}
        with torch.enable_grad():
            leaves = pure.leaves(state)
            outputs = pure.outputs(leaves, inputs)
            together = pure.together(outputs)
            with no_autocast():
                made = self._predictive(outputs, Terms(*terms)) if pure.uses_terms else None
                if made is not None and together:
                    loss = pure.loss_of(outputs, targets, made)
                    numbers = [compared(loss, made.nll(), outputs), loss.detach()]
                    found, gradients = pure.found_with(leaves, loss)
                elif made is not None and pure.statistics:
                    found = pure.found(leaves, made, _draws(made, noises), select)
                if pure.loss is not None and not numbers:
                    loss = pure.loss_of(outputs, targets, made)
                    numbers = [loss.detach()]
                    gradients = pure.gradients(leaves, loss)
        buffers = pure.buffers(leaves) if pure.loss is not None else {}
        present = [value is not None for value in found]
        self._outputs = _Outputs(present, together, [*gradients], [*buffers])
        finite = torch.stack([t.isfinite().all() for t in output_tensors(outputs)]).all()
        statistics = [value for value in found if value is not None]
        return [finite, *statistics, *numbers, *gradients.values(), *buffers.values()]

    def _predictive(self, outputs: Any, terms: Terms) -> BatchLikelihood:
        pure = self._pure
        parts = tuple(
            Part(
                one.likelihood.distribution(one.outputs),
                terms.targets[k],
                terms.weights[k],
                terms.shares[k] if terms.shares else 1.0,
            )
            for k, one in enumerate(singles(pure.likelihood, wide(outputs), None))
            if terms.counted[k]
        )
        return BatchLikelihood(parts, bool(terms.shares), 1.0)

    @torch.no_grad()
    def __call__(self, given: Arguments, seed: int, count: float, total: float) -> Result:
        """Runs the program.

        Args:
            count, total: of likelihood terms, for the result.
        """
        masks = [lifted() for lifted in self.lifted]
        arguments = [*masks, *_tensors(given.flat(self._noises(seed), None)[0])]
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
        """Sums over the columns."""
        assert self._each is not None
        free = sum(not tied for tied, _ in self._places)
        first = self._once(*arguments)
        handed = first[free:]
        total: list[Tensor] = []
        for column in range(self._facts.columns):
            found = list(self._each(*handed, self._column(column)))
            if total:
                torch._foreach_add_(total, found)
            else:
                total = found
        return [total[place] if tied else first[place] for tied, place in self._places]

    def _check_summed(self) -> None:
        """Only what is quadratic in the derivative may be summed over the columns."""
        inputs = len(self._pure.sources.inputs)
        present = [k for k, there in enumerate(self._outputs.present) if there]
        pairs = zip(present, self._places[1:], strict=False)  # behind the flag
        if any(tied and k < inputs for k, (tied, _) in pairs):
            raise NotFunctionalError("statistics of inputs depend on the derivative")

    def _column(self, index: int) -> Tensor:
        like = output_tensors(self._facts.outputs)[0]
        select = torch.zeros(self._facts.columns, dtype=like.dtype, device=like.device)
        select[index] = 1.0
        return select

    def _result(self, results: list[Tensor], count: float, total: float) -> Result:
        names = self._outputs
        finite, *rest = results
        own = [t for t, there in zip(self._pure.own, names.present, strict=False) if there]
        statistics: Statistics = {id(t): value for t, value in zip(own, rest, strict=False)}
        rest = rest[len(own) :]
        scale: float | None = 1.0
        if names.compared:
            scale = scale_of(rest.pop(0))
        loss = None if self._pure.loss is None else rest.pop(0)
        gradients = dict(zip(names.gradients, rest, strict=False))
        buffers = dict(zip(names.buffers, rest[len(gradients) :], strict=True))
        fine = not self._pure.statistics or bool(finite)
        return Result(statistics, count, total, fine, loss, gradients, buffers, scale)


def _draws(made: BatchLikelihood, noises: Sequence[Tensor | None]) -> list[Tensor]:
    """Targets of each part; without noise the distribution draws by itself."""
    with torch.no_grad():
        return [
            part.distribution.sample() if noise is None else draw(part.distribution, noise)
            for part, noise in zip(made.parts, noises, strict=False)
        ]


def _tensors(leaves: Iterable[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
