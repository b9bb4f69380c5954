"""What a likelihood says about a batch: distributions of outputs, targets, weights of the terms.

With one likelihood the objective is the mean over its terms. A ``Sum`` of likelihoods is
sum_k w_k mean_k; written as one mean over all terms, those of part k weigh w_k C / c_k, with c_k
the number of terms of the part and C that of all.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.utils import _pytree as pytree

from kfac_fx.errors import LikelihoodError
from kfac_fx.likelihoods.builtin import Likelihood, Sum
from kfac_fx.likelihoods.fisher_root import (
    exact_rows,
    exact_scalars,
    root,
    sampled_nll,
    sampled_scalar,
    term_count,
)
from kfac_fx.parallel import Workers


@dataclass(frozen=True)
class Part:
    """One distribution with its targets.

    Attributes:
        targets: fit for ``log_prob``; None where none were given.
        weights: of the terms; None where all count once.
        share: what all of them are multiplied with.
    """

    distribution: Distribution
    targets: Any
    weights: Tensor | None
    share: Any = 1.0

    @functools.cached_property
    def count(self) -> float:
        """Number of terms, or the sum of their weights, which a GPU is waited for."""
        return term_count(self.distribution, self.weights)


@dataclass(frozen=True)
class BatchLikelihood:
    """The objective is a sum over terms, divided by ``count``.

    Attributes:
        parts: of this process.
        weighted: whether the parts are those of a ``Sum``.
        count: number of terms, or the sum of their weights.
    """

    parts: tuple[Part, ...]
    weighted: bool
    count: float

    def of_all(
        self, workers: Workers, call: str, good: bool = True
    ) -> tuple[bool, BatchLikelihood]:
        """Whether all processes say good, and the same with the terms of all counted.

        Raises:
            LikelihoodError: no process has a likelihood term.
        """
        counts = []
        for part in self.parts:
            every, count = workers.agree(call, good, part.count)
            good = good and every
            counts.append(count)
        total = sum(counts)
        if total <= 0:
            raise LikelihoodError(
                "no likelihood term counts: the batch is empty, or every target is ignored"
            )
        if not self.weighted:
            return good, replace(self, count=total)
        scaled = [
            replace(part, share=part.share * total / count)
            for part, count in zip(self.parts, counts, strict=True)
            if count > 0
        ]
        return good, replace(self, parts=tuple(scaled), count=total)

    @property
    def has_targets(self) -> bool:
        """Whether every part has some."""
        return all(part.targets is not None for part in self.parts)

    def nll(self) -> Tensor:
        """The summed negative log-likelihood of the targets, weighted."""
        total: Tensor | float = 0.0
        for part in self.parts:
            nll = -part.distribution.log_prob(part.targets)
            nll = nll if part.weights is None else nll * part.weights
            total = total + _times(nll.sum(), part.share)
        assert isinstance(total, Tensor)
        return total

    def sampled(self, seed: int) -> Tensor:
        """A scalar whose derivatives are those of the NLL of targets drawn from the model.

        Every term's derivative is scaled with the square root of its weight.
        """
        scalars = [
            _times(sampled_scalar(part.distribution, part.weights, seed + k), part.share**0.5)
            for k, part in enumerate(self.parts)
        ]
        return torch.stack(scalars).sum() if len(scalars) > 1 else scalars[0]

    def sampled_by(self, draws: Sequence[Tensor]) -> Tensor:
        """``sampled`` for targets that are drawn already."""
        scalars = [
            _times(sampled_nll(part.distribution, part.weights, drawn), part.share**0.5)
            for part, drawn in zip(self.parts, draws, strict=True)
        ]
        return torch.stack(scalars).sum() if len(scalars) > 1 else scalars[0]

    def exact_by(self, select: Tensor) -> Tensor:
        """The sum of the scalars of ``exact``, each times its entry of ``select``."""
        total: list[Tensor] = []
        start = 0
        for part in self.parts:
            for rows in exact_rows(part.distribution, part.weights):
                chosen = rows * select[start : start + rows.shape[1]]
                total.append(_times(chosen.sum(), part.share**0.5))
                start += rows.shape[1]
        return torch.stack(total).sum()

    def exact(self) -> Iterator[Tensor]:
        """Scalars whose statistics add up to the exact Fisher's; see ``exact_scalars``."""
        for part in self.parts:
            for scalar in exact_scalars(part.distribution, part.weights):
                yield _times(scalar, part.share**0.5)

    def root(self) -> Tensor:
        """S^T f, flat: ``count`` times the Fisher is the Gram matrix of its derivatives."""
        found = []
        for part in self.parts:
            terms = root(part.distribution)
            if part.weights is not None:
                terms = terms * part.weights.sqrt().unsqueeze(-1)
            found.append(_times(terms.flatten(), part.share**0.5))
        return torch.cat(found) if len(found) > 1 else found[0]


def _times(value: Tensor, factor: Any) -> Tensor:
    plain = isinstance(factor, float) and factor == 1.0
    return value if plain else value * factor


def predictive(likelihood: Likelihood | Sum, outputs: Any, targets: Any) -> BatchLikelihood:
    """The terms of this process's batch; ``of_all`` makes the parts of a sum comparable.

    Raises:
        LikelihoodError: outputs or targets do not fit.
    """
    parts = tuple(
        Part(one.distribution(given), *one.terms(given, known), share=weight)
        for one, given, known, weight in singles(likelihood, outputs, targets)
    )
    return BatchLikelihood(parts, isinstance(likelihood, Sum), sum(part.count for part in parts))


class Single(NamedTuple):
    """One likelihood with its outputs and targets, and its weight in sums."""

    likelihood: Likelihood
    outputs: Any
    targets: Any
    weight: float = 1.0


def singles(
    likelihood: Likelihood | Sum, outputs: Any, targets: Any, path: str = ""
) -> tuple[Single, ...]:
    """The likelihoods that are no sums, in order.

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


def _by_key(values: Any, likelihood: Sum, what: str) -> dict[Any, Any]:
    """The outputs or targets of the parts; by name or by place, as the parts are."""
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


def _kind(values: Any) -> str:
    if isinstance(values, Mapping):
        return f"a mapping with {', '.join(map(repr, values))}"
    many = isinstance(values, (tuple, list))
    return f"a {type(values).__name__} of {len(values)}" if many else type(values).__name__


def wide(outputs: Any) -> Any:
    """Outputs in float32 where their own precision is too low for a likelihood."""

    def one(leaf: Any) -> Any:
        low = isinstance(leaf, Tensor) and leaf.dtype in (torch.float16, torch.bfloat16)
        return leaf.float() if low else leaf

    return pytree.tree_map(one, outputs)


def output_tensors(outputs: Any) -> list[Tensor]:
    """The floating-point tensors among the outputs of the likelihood."""
    leaves = pytree.tree_leaves(outputs)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
