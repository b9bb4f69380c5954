"""Make a likelihood of what a user gives: a name, a callable, or a sum of several.

A new likelihood with a name is one more line of ``NAMED``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.distributions import Distribution

from kfac_fx.config import choice
from kfac_fx.errors import LikelihoodError
from kfac_fx.likelihoods.builtin import Bernoulli, Categorical, Likelihood, Normal, Tree


@dataclass(frozen=True)
class Custom:
    """Any callable from outputs to a Distribution; wrap in Independent what is one event.

    Signs and exact Fishers work for the families of ``builtin`` and ``roots``; exact Fishers also
    for distributions with a finite support, and draws for all that have ``sample``.
    """

    function: Callable[[Tree], Distribution]

    def distribution(self, outputs: Tree) -> Distribution:
        result = self.function(outputs)
        if not isinstance(result, Distribution):
            raise LikelihoodError(
                "the likelihood must return a torch.distributions.Distribution, "
                f"got {type(result).__name__}"
            )
        return result

    def terms(self, outputs: Tree, targets: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        # What the targets have to look like, only the distribution's log_prob knows.
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

    parts: Mapping[str, tuple[Given, float]] | Sequence[tuple[Given, float]]

    def __post_init__(self) -> None:
        for key, part in self.items():
            if not (isinstance(part, tuple) and len(part) == 2):
                raise LikelihoodError(f"part {key!r} of a sum must be (likelihood, weight)")
        # Names are replaced by likelihoods once: every batch asks for the parts.
        found = {key: (likelihood_of(part), _weight(w)) for key, (part, w) in self.items()}
        if not any(weight for _, weight in found.values()):
            raise LikelihoodError("a sum of likelihoods needs a part with a weight above zero")
        object.__setattr__(self, "parts", found if self.named else tuple(found.values()))

    @property
    def named(self) -> bool:
        """Say whether the parts have names rather than places."""
        return isinstance(self.parts, Mapping)

    def items(self) -> list[tuple[str | int, tuple[Any, float]]]:
        """Return (name or place, (likelihood, weight)) of the parts."""
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


def is_quadratic(likelihood: Likelihood | Sum) -> bool:
    """Say whether the loss is known to be quadratic in the outputs, in all parts that count."""
    if isinstance(likelihood, Sum):
        return all(is_quadratic(part) for _, (part, weight) in likelihood.items() if weight)
    # Of the class itself: a subclass may have another distribution.
    return bool(vars(type(likelihood)).get("quadratic", False))


def described(likelihood: Likelihood | Sum) -> str:
    """Return a likelihood as text that differs where the Fisher does, as far as it can be told.

    A checkpoint holds it. Of a callable nothing is known but that it is one.
    """
    if isinstance(likelihood, Sum):
        parts = (f"{key!r}: {w} {described(part)}" for key, (part, w) in likelihood.items())
        return f"Sum({', '.join(parts)})"
    # The fields of a dataclass; a callable among them (``Custom``) says nothing.
    plain = {
        name: value.tolist() if isinstance(value, Tensor) else value
        for name, value in vars(likelihood).items()
    }
    said = (f"{n}={v!r}" for n, v in plain.items() if isinstance(v, (str, int, float, list)))
    return f"{type(likelihood).__name__}({', '.join(said)})"


def check_described(likelihood: Likelihood | Sum, saved: object) -> None:
    """Raise LikelihoodError where a checkpoint was written for another likelihood.

    Args:
        likelihood: the one in use.
        saved: what ``described`` returned for the other; None from before it was saved.
    """
    own = described(likelihood)
    if saved is not None and saved != own:
        raise LikelihoodError(
            f"the state_dict is of the likelihood {saved}, and this one is {own}: its averages are "
            "of another Fisher. Make it with the likelihood that was saved"
        )


Given = str | Likelihood | Sum | Callable[[Tree], Distribution]
"""A name, an object of this module, or a callable from outputs to a distribution."""


def likelihood_of(value: Given) -> Likelihood | Sum:
    """Return the likelihood that a user means.

    Args:
        value: one of the names in ``NAMED``, an object with the methods of ``Likelihood``, a
            ``Sum``, or a callable from outputs to a distribution.

    Raises:
        UnknownOptionError: no likelihood has that name.
        LikelihoodError: the value is none of these.
    """
    if isinstance(value, str):
        return NAMED[choice("likelihood", value, NAMED)]()
    # Before callables: a likelihood may well have __call__ (an nn.Module, say).
    if isinstance(value, (Sum, Likelihood)):
        return value
    if callable(value):
        return Custom(value)
    raise LikelihoodError(
        f"likelihood must be one of {', '.join(map(repr, NAMED))}, a kfac_fx.likelihoods.Sum or a "
        "callable from outputs to a torch.distributions.Distribution, got "
        f"{type(value).__name__}"
    )
