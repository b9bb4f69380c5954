"""How a loss is reduced: its factor to the summed negative log-likelihood of the targets."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from kfac_fx.optim.likelihoods import Bernoulli, Categorical, Likelihood, Normal, Sum
from kfac_fx.optim.predictive import output_tensors, predictive, wide

log = logging.getLogger("kfac_fx")

COMPARED = 4096
"""Outputs whose derivatives are compared, and at least 4 cases, of more."""


class _Expected(NamedTuple):
    """The derivative of the summed negative log-likelihood in some cases, and their terms."""

    cases: slice
    derivative: Tensor
    terms: float

    @property
    def tells(self) -> bool:
        """Whether it is more than rounding errors of a perfect fit."""
        return float(self.derivative.square().sum()) > 1e-6 * self.terms


class LossScale:
    """Compares the loss's derivatives in the outputs with those of the likelihood.

    Args:
        count: number of likelihood terms, or the sum of their weights.
    """

    def __init__(
        self, likelihood: Likelihood | Sum, outputs: Any, targets: Any, count: float
    ) -> None:
        self._likelihood, self._outputs, self._targets = likelihood, outputs, targets
        self._count = count
        self._expected = self._derivative(self._some_cases())

    def __call__(self, seen: Mapping[int, Tensor | None]) -> float:
        """The factor, from the loss's derivatives by place of the output."""
        expected = self._expected
        if expected.cases.step and not expected.tells:  # ignored targets, say
            expected = self._derivative(slice(None))
        outputs = enumerate(output_tensors(self._outputs))
        found = [torch.zeros_like(o) if (g := seen.get(i)) is None else g for i, o in outputs]
        return self._reduction(_flat(_some(found, expected.cases)), expected)

    def _some_cases(self) -> slice:
        """Cases that tell the reduction; all where terms may depend on other cases."""
        tensors = pytree.tree_leaves((self._outputs, self._targets))
        sizes = {t.shape[0] if isinstance(t, Tensor) and t.dim() else 0 for t in tensors}
        (cases,) = sizes if len(sizes) == 1 else (0,)
        outputs = sum(tensor.numel() for tensor in output_tensors(self._outputs))
        step = min(cases // 4, outputs // COMPARED)
        known = isinstance(self._likelihood, (Categorical, Bernoulli, Normal))
        return slice(None, None, step if known and step > 1 else None)

    def _derivative(self, cases: slice) -> _Expected:
        """Of the likelihood, in the outputs of some cases."""

        def leaf(output: Any) -> Any:
            differentiable = isinstance(output, Tensor) and output.is_floating_point()
            return output.detach().requires_grad_() if differentiable else output

        outputs, targets = _some((self._outputs, self._targets), cases)
        outputs = pytree.tree_map(leaf, wide(outputs))
        made = predictive(self._likelihood, outputs, targets)
        wrt = output_tensors(outputs)
        found = torch.autograd.grad(made.nll(), wrt, allow_unused=True, materialize_grads=True)
        return _Expected(cases, _flat(found), made.count)

    def _reduction(self, seen: Tensor, expected: _Expected) -> float:
        """The factor c with seen = c * expected, as loss = c * summed negative log-likelihood.

        Near a perfect fit both are rounding errors; then the nearer of a sum (1) and a mean
        (1 / count) is taken.
        """
        nll = expected.derivative
        power = float(nll @ nll)
        ratio = float(seen @ nll) / power if power else 0.0
        residual = float((seen - ratio * nll).norm())
        if ratio > 0 and residual <= 1e-2 * float(seen.norm()):
            return ratio
        if expected.tells:
            log.warning(
                "the loss is not proportional to the likelihood's negative log-likelihood "
                "(relative difference of derivatives %.2g): factors describe the likelihood alone",
                residual / max(float(seen.norm()), 1e-300),
            )
        return 1.0 if ratio * self._count**0.5 > 1 else 1 / self._count


def _some(tree: Any, cases: slice) -> Any:
    """The cases of every tensor in a tree."""
    return pytree.tree_map(lambda leaf: leaf[cases], tree) if cases.step else tree


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in tensors])
