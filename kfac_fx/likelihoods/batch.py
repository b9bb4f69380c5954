"""A likelihood on one batch: distributions of outputs, targets, and the weights of the terms.

With one likelihood the objective is the mean over its terms. A ``Sum`` of likelihoods is
sum_k w_k mean_k; written as one mean over all terms, those of part k weigh w_k C / c_k, with c_k
the number of terms of the part and C that of all.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent

from kfac_fx.errors import LikelihoodError
from kfac_fx.likelihoods.builtin import (
    Fitting,
    Likelihood,
    OutputFisher,
    Signs,
    Softmax,
    Tree,
    UnknownRootError,
    has_known_fisher,
    known_root,
)
from kfac_fx.likelihoods.named import Sum
from kfac_fx.likelihoods.sampling import WeightedSum, seeded
from kfac_fx.torch_internals import pytree

if TYPE_CHECKING:
    from kfac_fx.parallel import Workers


class Terms(NamedTuple):
    """The terms of one likelihood in a batch: what is known of them without the outputs' values.

    Attributes:
        targets: fit for ``log_prob``; None where none were given.
        weights: one weight a term, in the distribution's batch shape; None where all terms count
            once.
        amount: number of terms, or the sum of their weights, which a GPU is waited for. It is 0.0
            and not looked at in a traced pass, whose batches differ in it.
        share: what all of the terms are multiplied with; a tensor in a traced pass.
    """

    targets: Tree
    weights: Tensor | None
    amount: float
    share: float | Tensor = 1.0


@dataclass(frozen=True)
class BatchTerms:
    """The terms of all likelihoods of a batch.

    Attributes:
        parts: one for each likelihood that is no sum; None for one without any term.
        weighted: whether they are the parts of a ``Sum``.
        count: number of terms, or the sum of their weights.
    """

    parts: tuple[Terms | None, ...]
    weighted: bool
    count: float

    def agreed(self, workers: Workers, call: str, good: bool = True) -> tuple[bool, BatchTerms]:
        """Return whether all processes say good, and the same with the terms of all counted.

        Args:
            workers: the processes.
            call: what the processes are doing; all must say the same.
            good: what this process has to say.

        Raises:
            LikelihoodError: no process has a likelihood term.
        """
        # Part by part, in the same order everywhere: a process may have no term of one part, and
        # must still count that of the others.
        counts = []
        for part in self.parts:
            count = 0.0 if part is None else part.amount
            if workers.size > 1:
                every, count = workers.agree(call, good, count)
                good = good and every
            counts.append(count)
        total = sum(counts)
        if total <= 0:
            raise LikelihoodError(
                "no likelihood term counts: the batch is empty, or every target is ignored"
            )
        # With one likelihood the division by ``count`` makes the mean. Of a sum each part has to
        # be a mean of its own, whatever the sizes of the others.
        if not self.weighted:
            return good, self if total == self.count else replace(self, count=total)
        scaled = tuple(
            part._replace(share=part.share * total / count)
            if part is not None and count > 0
            else None
            for part, count in zip(self.parts, counts, strict=True)
        )
        return good, replace(self, parts=scaled, count=total)


@dataclass(frozen=True)
class BatchLikelihood:
    """The objective is a sum over terms, divided by ``count``.

    Attributes:
        distributions: one for each likelihood that is no sum.
        terms: their terms, in the same order.
        ones: what they were made of, in the same order.
    """

    distributions: tuple[Distribution, ...]
    terms: BatchTerms
    ones: tuple[Single, ...] = ()

    @property
    def count(self) -> float:
        """Number of terms, or the sum of their weights."""
        return self.terms.count

    @property
    def parts(self) -> list[tuple[Distribution, Terms]]:
        """Return the distributions that have terms, with these."""
        pairs = zip(self.distributions, self.terms.parts, strict=True)
        return [(distribution, terms) for distribution, terms in pairs if terms is not None]

    def of_all(
        self, workers: Workers, call: str, good: bool = True
    ) -> tuple[bool, BatchLikelihood]:
        """Return whether all processes say good, and the same with the terms of all counted.

        Raises:
            LikelihoodError: no process has a likelihood term.
        """
        good, terms = self.terms.agreed(workers, call, good)
        return good, replace(self, terms=terms)

    @property
    def has_targets(self) -> bool:
        """Say whether every part has some."""
        return all(terms.targets is not None for _, terms in self.parts)

    def nll(self) -> Tensor:
        """Return the summed negative log-likelihood of the targets, weighted."""
        total: Tensor | float = 0.0
        for distribution, terms in self.parts:
            nll = -distribution.log_prob(terms.targets)
            nll = nll if terms.weights is None else nll * terms.weights
            total = total + self._shared(nll.sum(), terms.share)
        assert isinstance(total, Tensor)
        return total

    def mean_nll(self) -> Tensor:
        """Return ``nll`` of a term; they are counted as tensors, so that it can be traced."""
        counts = (
            distribution.batch_shape.numel() if terms.weights is None else terms.weights.sum()
            for distribution, terms in self.parts
        )
        return self.nll() / sum(counts)

    def sampled(self, noise: int | Sequence[Tensor | None]) -> WeightedSum:
        """Return a sum whose statistics have the exact Fisher's for their mean.

        Its derivatives in the outputs are S s, with S S^T the output Fisher and random signs s: the
        mean of S s s^T S^T is S S^T. Drawn targets have the same mean, but near a perfect fit
        hardly any of them differs from what the model says, and the few that do are enormous. Where
        S is not known, it is the NLL of targets that are drawn from the model.

        Every term's derivative is scaled with the square root of its weight, so that its square is
        scaled with the weight.

        Args:
            noise: a seed, of which part k takes ``seed + k``; or what ``signs_of`` asked for, part
                by part, with None for a distribution that draws by itself.
        """
        found = WeightedSum([], [])
        for distribution, terms in zip(self.distributions, self.terms.parts, strict=True):
            if terms is None:
                continue
            k = len(found.tensors)
            given = noise + k if isinstance(noise, int) else noise[k]
            base, root = known_root(distribution, draws=True)
            # There are as many columns as outputs, and S s has a closed form.
            closed = base if isinstance(base, Softmax) and root is not None else None
            if closed is not None:
                tensor = closed.given
            elif root is None:
                tensor, given = -distribution.log_prob(drawn(distribution, given)), None
            else:
                columns = list(root(base))
                tensor = torch.cat(columns, -1) if len(columns) > 1 else columns[0]
            if isinstance(given, int):
                given = Signs(tensor.shape, tensor.dtype, tensor.device).sample(given)
            # The weights of the sum, which is not formed: the signs are where S s begins.
            weights = torch.ones_like(tensor) if given is None else given
            if terms.weights is not None:
                # What belongs to one term: its outputs, and the columns of each.
                inner = (1,) * (tensor.dim() - terms.weights.dim())
                weights = weights * terms.weights.sqrt().reshape(terms.weights.shape + inner)
            weights = weights * terms.share**0.5 if self.terms.weighted else weights
            found.tensors.append(tensor)
            found.weights.append(weights if closed is None else closed.root_times(weights))
        return found

    def exact(self, select: Tensor | None = None) -> Iterator[Tensor]:
        """Yield scalars whose statistics add up to the exact Fisher's.

        The derivative of each in the outputs is one column of the root of one case's Fisher, for
        all cases at once. The first dimension of the batch shape counts the cases; the terms of a
        case are taken one at a time, so that their derivatives do not mix.

        Args:
            select: [columns], one where a column is wanted and zero elsewhere, for a traced pass:
                then the scalars add up to that column's.
        """
        # A traced pass cannot have as many backwards as columns: its graph would grow with them.
        # One column is selected at run time, and the program is run for each.
        start = 0
        for rows in self.rows():
            end = start + rows.shape[1]
            columns = rows.unbind(-1) if select is None else [rows * select[start:end]]
            for column in columns:
                yield column.sum()
            start = end

    def rows(self) -> Iterator[Tensor]:
        """Yield the columns of the root as rows [cases, columns], scaled for the objective.

        The derivatives of a column's sum over the cases are what ``exact`` is about.
        """
        for distribution, terms in self.parts:
            for rows in root_rows(distribution, terms.weights):
                yield self._shared(rows, terms.share**0.5)

    def known_fisher(self) -> tuple[Tensor, OutputFisher] | None:
        """Return outputs and their Fisher in closed form; None where none is known."""
        if len(self.ones) != 1 or self.terms.weighted or self.terms.parts[0] is None:
            return None
        (one,) = self.ones
        if not (has_known_fisher(one.likelihood) and isinstance(one.outputs, Tensor)):
            return None
        weights = self.terms.parts[0].weights
        return one.outputs, one.likelihood.output_fisher(one.outputs.detach(), weights)

    def root(self) -> Tensor:
        """Return S^T f, flat: ``count`` times the Fisher is the Gram matrix of its derivatives."""
        found = []
        for distribution, terms in self.parts:
            columns = torch.cat(list(root_columns(distribution)), -1)
            if terms.weights is not None:
                columns = columns * terms.weights.sqrt().unsqueeze(-1)
            found.append(self._shared(columns.flatten(), terms.share**0.5))
        return torch.cat(found) if len(found) > 1 else found[0]

    def _shared(self, value: Tensor, factor: float | Tensor) -> Tensor:
        """Return a part's value times its share; without a sum of likelihoods that is one."""
        return value * factor if self.terms.weighted else value


# Draws and roots of any distribution.


@torch.no_grad()
def drawn(distribution: Distribution, noise: int | Tensor | None) -> Tensor:
    """Return targets y ~ p from a seed; torch's own random stream is left as it was.

    Args:
        distribution: that is drawn from.
        noise: a seed. Else the draw is from torch's stream as it stands: of a traced pass it stays
            in the graph, which is run under the seed as a whole.
    """
    if not isinstance(noise, int):
        return distribution.sample()
    with seeded(noise, _parameters(distribution)):
        return distribution.sample()


def signs_of(distribution: Distribution) -> Signs | None:
    """Return the signs that ``BatchLikelihood.sampled`` needs; None where targets are drawn.

    Only shapes are looked at, so that compiled passes can make the signs before.
    """
    base, root = known_root(distribution, draws=True)
    if root is None:
        return None
    columns = list(root(base))
    count = sum(column.shape[-1] for column in columns)
    first = columns[0]
    return Signs(torch.Size((*first.shape[:-1], count)), first.dtype, first.device)


def _parameters(distribution: Distribution) -> list[Tensor]:
    """Return the tensors that a distribution holds, or the ones inside of it do."""
    held = list(vars(distribution).values())
    inner = [t for d in held if isinstance(d, Distribution) for t in _parameters(d)]
    return [value for value in held if isinstance(value, Tensor)] + inner


def root_columns(distribution: Distribution) -> Iterator[Tensor]:
    """Yield columns of S with S S^T = F_out, as tensors of batch shape + [columns].

    Their derivatives in the outputs are S's. Any distribution with finite support has the columns
    sqrt(p(y)) * grad log p(y) (docs/explanation/mathematics.md, section 3).

    Raises:
        UnknownRootError: neither the root nor the support is known.
    """
    # Columns of one event add up: its dimensions become columns, so that they do not mix.
    if isinstance(distribution, Independent):
        events = distribution.reinterpreted_batch_ndims
        for columns in root_columns(distribution.base_dist):
            yield columns.flatten(columns.dim() - 1 - events)
        return
    _, root = known_root(distribution, draws=False)
    if root is not None:
        yield from root(distribution)
        return
    if not distribution.has_enumerate_support:
        raise UnknownRootError(type(distribution).__name__)
    for value in distribution.enumerate_support():
        log_p = distribution.log_prob(value).unsqueeze(-1)
        yield (0.5 * log_p.detach()).exp() * log_p


def root_rows(distribution: Distribution, weights: Tensor | None) -> Iterator[Tensor]:
    """Yield the columns of S as rows [cases, columns], with the roots of the terms' weights."""
    for columns in root_columns(distribution):
        if weights is not None:
            columns = columns * weights.sqrt().unsqueeze(-1)
        cases = columns.shape[0] if columns.dim() > 1 else 1
        yield columns.reshape(cases, -1)


# From outputs and targets to terms and distributions.


def batch_likelihood(
    likelihood: Likelihood | Sum,
    outputs: Tree,
    targets: Tree = None,
    terms: BatchTerms | None = None,
) -> BatchLikelihood:
    """Return what a likelihood says about the batch of this process.

    Args:
        likelihood: the likelihood of the outputs, or a sum of several.
        outputs: what the network returned; float32 where its own precision is lower. For a sum a
            mapping or a tuple with the outputs of its parts.
        targets: in the same form; None where there are none.
        terms: what ``batch_terms`` made of the targets before. A traced pass gives it, as the
            targets' values may not be looked at in there; None takes them from ``targets``.

    Raises:
        LikelihoodError: outputs or targets do not fit.
    """
    if not isinstance(outputs, Tensor) or outputs.dtype in _LOW:
        outputs = wide(outputs)
    if isinstance(likelihood, Sum):
        ones: Sequence[Single] = singles(likelihood, outputs, targets)
    else:
        ones = [Single(likelihood, outputs, targets)]
    shaped = [one.targets for one in ones]
    if terms is not None:
        present = zip(ones, terms.parts, strict=True)
        pairs = [(one, part) for one, part in present if part is not None]
        terms = replace(terms, parts=tuple(part for _, part in pairs))
        ones = [one for one, _ in pairs]
        # A pass that needs no targets is not given them; weights have their shape.
        shaped = [p.weights if p.targets is None else p.targets for _, p in pairs]
    # Of cases and one more dimension no shape leaves anything open; a protocol is asked about last,
    # for that looks at all names of the class.
    ones = [
        one._replace(likelihood=one.likelihood.fitted(one.outputs, like))
        if getattr(one.outputs, "ndim", 3) > 2 and isinstance(one.likelihood, Fitting)
        else one
        for one, like in zip(ones, shaped, strict=True)
    ]
    # Distributions first: most errors are of outputs that do not fit, and targets are compared with
    # their shape.
    distributions = tuple(one.likelihood.distribution(one.outputs) for one in ones)
    if terms is None:
        shapes = [distribution.batch_shape for distribution in distributions]
        terms = batch_terms(ones, shapes, isinstance(likelihood, Sum))
    return BatchLikelihood(distributions, terms, tuple(ones))


class Single(NamedTuple):
    """One likelihood with its outputs and targets, and its weight in sums."""

    likelihood: Likelihood
    outputs: Tree
    targets: Tree
    weight: float = 1.0


def batch_terms(ones: Sequence[Single], shapes: Sequence[torch.Size], weighted: bool) -> BatchTerms:
    """Return the terms of a batch's targets; ``agreed`` makes the parts of a sum comparable.

    Args:
        ones: the likelihoods with outputs and targets; of the outputs only shapes and dtypes count.
        shapes: batch shapes of their distributions.
        weighted: whether they are the parts of a sum.

    Raises:
        LikelihoodError: targets do not fit.
    """
    parts = []
    for one, shape in zip(ones, shapes, strict=True):
        targets, weights = one.likelihood.terms(one.outputs, one.targets)
        count = float(shape.numel() if weights is None else weights.sum())
        parts.append(Terms(targets, weights, count, one.weight))
    return BatchTerms(tuple(parts), weighted, sum(part.amount for part in parts))


def singles(
    likelihood: Likelihood | Sum, outputs: Tree, targets: Tree, path: str = ""
) -> tuple[Single, ...]:
    """Return the likelihoods that are no sums, in order, with their outputs and targets.

    Raises:
        LikelihoodError: outputs or targets are not those of the parts.
    """
    if not isinstance(likelihood, Sum):
        return (Single(likelihood, outputs, targets),)
    given = _by_key(outputs, likelihood, f"outputs{path}")
    known = {} if targets is None else _by_key(targets, likelihood, f"targets{path}")
    found: list[Single] = []
    for key, (part, weight) in likelihood.items():
        inner = singles(part, given[key], known.get(key), f"{path}[{key!r}]")
        found += [one._replace(weight=one.weight * weight) for one in inner]
    return tuple(found)


def fitted_singles(likelihood: Likelihood | Sum, outputs: Tree, targets: Tree) -> list[Single]:
    """Return ``singles``, each with the likelihood that the shapes of its targets tell."""
    return [
        one._replace(likelihood=one.likelihood.fitted(one.outputs, one.targets))
        if isinstance(one.likelihood, Fitting)
        else one
        for one in singles(likelihood, outputs, targets)
    ]


def _by_key(values: Tree, likelihood: Sum, what: str) -> dict[Hashable, Tree]:
    """Return the outputs or targets of the parts, by name or by place, as the parts are."""
    keys = [key for key, _ in likelihood.items()]
    if likelihood.named:
        fits = isinstance(values, Mapping) and set(keys) <= set(values)
        wanted = f"a mapping with {', '.join(map(repr, keys))}"
    else:
        fits = isinstance(values, (tuple, list)) and len(values) == len(keys)
        wanted = f"a tuple of {len(keys)}"
    if not fits:
        raise LikelihoodError(
            f"a sum of likelihoods needs {what} to be {wanted}, got {_kind(values)}"
        )
    return {key: values[key] for key in keys}


def _kind(values: Tree) -> str:
    if isinstance(values, Mapping):
        return f"a mapping with {', '.join(map(repr, values))}"
    many = isinstance(values, (tuple, list))
    return f"a {type(values).__name__} of {len(values)}" if many else type(values).__name__


_LOW = (torch.float16, torch.bfloat16)


def wide(outputs: Tree) -> Tree:
    """Return outputs in float32 where their own precision is too low for a likelihood."""
    if isinstance(outputs, Tensor):  # most often it is one tensor, and a walk costs as much as all
        return outputs.float() if outputs.dtype in _LOW else outputs
    return pytree.tree_map_only(Tensor, wide, outputs)


def output_tensors(outputs: Tree) -> list[Tensor]:
    """Return the floating-point tensors among the outputs of the likelihood, in order."""
    leaves = [outputs] if isinstance(outputs, Tensor) else pytree.tree_leaves(outputs)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def drawn_seed(generator: torch.Generator, workers: Workers) -> int:
    """Draw the next seed; processes that share one stream each get a seed of their own.

    The multiplier is the golden ratio's of 64 bits: seeds of neighbouring ranks lie far apart, and
    no rank's seed is another rank's next one.
    """
    seed = int(torch.randint(2**62, (), generator=generator))
    return (seed + 0x9E3779B97F4A7C15 * workers.rank) % 2**62
