"""BatchLikelihood distributions of the outputs, and the likelihood terms of a batch.

A likelihood turns outputs into a ``torch.distributions.Distribution``. A *term* is one element of
its batch shape: a case, or a token where the likelihood factorises over tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch import distributions as D
from torch.distributions import Distribution, Independent

from kfac_fx.config import choice
from kfac_fx.errors import LikelihoodError


@runtime_checkable
class Likelihood(Protocol):
    """p(y | outputs), with a weight for each term of the batch."""

    def distribution(self, outputs: Tensor) -> Distribution:
        """The predictive distribution; LikelihoodError where the outputs do not fit."""

    def terms(self, outputs: Tensor, targets: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Targets fit for ``log_prob`` and weights of the terms (None where all count once)."""


def _floating(outputs: Tensor, name: str) -> None:
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        kind = getattr(outputs, "dtype", type(outputs).__name__)
        raise LikelihoodError(f"likelihood {name} needs a floating-point tensor, got {kind}")
    if outputs.dim() == 0:
        raise LikelihoodError(
            f"likelihood {name} needs outputs with a batch dimension, got a scalar"
        )


def _fitting(targets: Tensor | None, shape: torch.Size, name: str) -> None:
    if targets is not None and targets.shape != shape:
        raise LikelihoodError(
            f"likelihood {name}: targets have shape {tuple(targets.shape)}, "
            f"the outputs ask for {tuple(shape)}"
        )


class Softmax(D.Categorical):
    """Categorical whose logits are normalised by one operator, with one for the derivative.

    torch's own takes two or three each, over all classes of all terms.
    """

    def __init__(self, logits: Tensor) -> None:
        self.logits = torch.log_softmax(logits, -1)
        self._param, self._num_events = self.logits, logits.shape[-1]
        Distribution.__init__(self, logits.shape[:-1], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> D.Categorical:
        plain = D.Categorical(logits=self.logits, validate_args=False)
        expanded: D.Categorical = plain.expand(batch_shape, _instance)
        return expanded


@dataclass(frozen=True)
class Categorical:
    """Classes with logits along ``dim``: outputs [N, C] or [N, T, C], targets [N] or [N, T].

    Attributes:
        weight: [C], the weight of a term by its target's class (needs targets in ``observe``); the
            Fisher is that of the weighted mean of the terms.
        ignore_index: targets of this value contribute nothing and are not counted.
        dim: the dimension of the classes; 1 for images of logits [N, C, H, W].
    """

    weight: Tensor | None = None
    ignore_index: int = -100
    dim: int = -1

    def distribution(self, outputs: Tensor) -> Distribution:
        _floating(outputs, "categorical")
        if outputs.dim() < 2:
            raise LikelihoodError(
                f"likelihood categorical needs logits [N, C] or [N, T, C], got "
                f"{tuple(outputs.shape)}; for one logit a case use 'bernoulli'"
            )
        logits = outputs.movedim(self.dim, -1)
        if logits.shape[-1] < 2:
            raise LikelihoodError(
                "likelihood categorical needs at least two classes, got outputs of shape "
                f"{tuple(outputs.shape)}; for one logit a case use 'bernoulli'"
            )
        return Softmax(logits)

    def terms(self, outputs: Tensor, targets: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if targets is None:
            if self.weight is not None:
                raise LikelihoodError("class weights need observe(outputs, targets)")
            return None, None
        shape = outputs.movedim(self.dim, -1).shape[:-1]
        if targets.is_floating_point() or targets.dtype == torch.bool:
            raise LikelihoodError(
                f"likelihood categorical needs integer class targets, got {targets.dtype}"
            )
        _fitting(targets, shape, "categorical")
        classes = outputs.shape[self.dim]
        counted = targets != self.ignore_index
        if bool(((targets < 0) | (targets >= classes)).logical_and(counted).any()):
            raise LikelihoodError(f"a target lies outside the {classes} classes of the outputs")
        targets = targets.where(counted, 0)
        weights = counted.to(outputs.dtype)
        if self.weight is not None:
            weights = weights * self.weight.to(outputs)[targets]
        return targets, weights


@dataclass(frozen=True)
class Bernoulli:
    """Independent bits with logits ``outputs``; all but the first dimension are one event."""

    def distribution(self, outputs: Tensor) -> Distribution:
        _floating(outputs, "bernoulli")
        bits = D.Bernoulli(logits=outputs, validate_args=False)
        return Independent(bits, outputs.dim() - 1)

    def terms(self, outputs: Tensor, targets: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        _fitting(targets, outputs.shape, "bernoulli")
        return None if targets is None else targets.to(outputs.dtype), None


class _SquaredError(D.Normal):
    """A normal whose ``log_prob`` leaves out the constant: small errors keep their digits."""

    def log_prob(self, value: Tensor) -> Tensor:
        return -0.5 * ((value - self.loc) / self.scale).square()


@dataclass(frozen=True)
class Normal:
    """Means ``outputs`` and a fixed variance; all but the first dimension are one event.

    The loss of a case is half its squared error over the variance, without the constant of the
    density: with variance=0.5 the squared error itself.

    Attributes:
        target: what the targets are where none are given; 0.0 for residuals of an equation.
    """

    variance: float = 1.0
    target: float | None = None

    def distribution(self, outputs: Tensor) -> Distribution:
        _floating(outputs, "normal")
        scale = torch.full_like(outputs, self.variance**0.5)
        return Independent(_SquaredError(outputs, scale, validate_args=False), outputs.dim() - 1)

    def terms(self, outputs: Tensor, targets: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if targets is None and self.target is not None:
            targets = torch.full_like(outputs, self.target)
        _fitting(targets, outputs.shape, "normal")
        return None if targets is None else targets.to(outputs.dtype), None


@dataclass(frozen=True)
class Custom:
    """Any callable from outputs to a Distribution; wrap in Independent what is one event."""

    function: Callable[[Any], Distribution]

    def distribution(self, outputs: Any) -> Distribution:
        result = self.function(outputs)
        if not isinstance(result, Distribution):
            raise LikelihoodError(
                "the likelihood must return a torch.distributions.Distribution, "
                f"got {type(result).__name__}"
            )
        return result

    def terms(self, outputs: Any, targets: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        return targets, None


@dataclass(frozen=True)
class Sum:
    """Several likelihoods, the objective sum_k weight_k * (mean NLL of a term of part k).

    The parts are (likelihood, weight) by name or by place; outputs and targets are mappings with
    these names, or tuples in this order. The Fisher is the weighted sum of the parts' Fishers.

    ``Sum({"label": ("categorical", 1.0), "box": ("normal", 0.3)})``

    Attributes:
        parts: each likelihood as for ``Preconditioner``, or another sum.

    Raises:
        LikelihoodError: there is no part, or a weight is no finite number of at least zero.
    """

    parts: Mapping[str, tuple[Any, float]] | Sequence[tuple[Any, float]]

    def __post_init__(self) -> None:
        for key, part in self.items():
            if not (isinstance(part, tuple) and len(part) == 2):
                raise LikelihoodError(f"part {key!r} of a sum must be (likelihood, weight)")
        found = {key: (likelihood_of(part), _weight(w)) for key, (part, w) in self.items()}
        if not any(weight for _, weight in found.values()):
            raise LikelihoodError("a sum of likelihoods needs a part with a weight above zero")
        object.__setattr__(self, "parts", found if self.named else tuple(found.values()))

    @property
    def named(self) -> bool:
        """Whether the parts have names rather than places."""
        return isinstance(self.parts, Mapping)

    def items(self) -> list[tuple[Any, tuple[Any, float]]]:
        """(name or place, (likelihood, weight)) of the parts."""
        if isinstance(self.parts, Mapping):
            return list(self.parts.items())
        return list(enumerate(self.parts))


def _weight(value: float) -> float:
    if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
        raise LikelihoodError(
            f"the weight of a likelihood must be a finite number of at least zero, got {value!r}"
        )
    return float(value)


NAMED: dict[str, Callable[[], Likelihood]] = {
    "categorical": Categorical,
    "bernoulli": Bernoulli,
    "normal": Normal,
    "residual": partial(Normal, target=0.0),
}

Given = str | Likelihood | Sum | Callable[[Any], Distribution]
"""A name, an object of this module, or a callable from outputs to a distribution."""


def likelihood_of(value: Given) -> Likelihood | Sum:
    """The likelihood behind what was given.

    Raises:
        UnknownOptionError: no likelihood has that name.
    """
    if isinstance(value, str):
        return NAMED[choice("likelihood", value, NAMED)]()
    if isinstance(value, (Sum, Likelihood)):
        return value
    if callable(value):
        return Custom(value)
    raise LikelihoodError(
        f"likelihood must be one of {', '.join(map(repr, NAMED))}, a kfac_fx.likelihoods.Sum or a "
        "callable from outputs to a torch.distributions.Distribution, got "
        f"{type(value).__name__}"
    )


def fresh_generator() -> torch.Generator:
    """Seeded by torch's global stream, so that runs repeat and preconditioners differ."""
    return torch.Generator().manual_seed(int(torch.randint(2**62, ())))
