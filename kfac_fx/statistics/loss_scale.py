"""Find how a loss is reduced: its factor to the summed negative log-likelihood of the targets."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kfac_fx.likelihoods.batch import batch_likelihood, output_tensors, wide
from kfac_fx.likelihoods.builtin import Likelihood, Tree
from kfac_fx.likelihoods.named import Sum
from kfac_fx.torch_internals import pytree

log = logging.getLogger("kfac_fx")

COMPARED = 4096
"""Outputs whose derivatives are compared, and at least 4 cases, of more."""


class Comparison(NamedTuple):
    """The loss's derivatives s in the outputs, beside those of the likelihood, n.

    Attributes:
        power, dot, seen: n.n, s.n and s.s.
        rest: |s - ratio n|^2.
    """

    power: float
    dot: float
    seen: float
    rest: float

    @property
    def ratio(self) -> float:
        """Return the factor that brings n nearest to s: the loss's, if they are proportional."""
        return self.dot / self.power if self.power else 0.0

    def proportional(self, tolerance: float) -> bool:
        """Return whether s = c n with c above zero, up to a share of the length of s."""
        return self.ratio > 0 and self.rest <= tolerance**2 * self.seen

    def reduction(self, count: float) -> float:
        """Return the nearer of a sum (1) and a mean (1 / count), for a loss that is another one."""
        return 1.0 if self.ratio * count**0.5 > 1 else 1 / count


def tells(power: float, terms: float) -> bool:
    """Return whether the likelihood's derivatives are more than rounding errors of a perfect fit.

    Args:
        power: their squared length.
        terms: how many terms they are of.
    """
    return power > 1e-6 * terms


def compared(loss: Tensor, nll: Tensor, outputs: Tree) -> Tensor:
    """Return the numbers of a ``Comparison``, [4], without a look at values: it can be traced.

    Args:
        loss: a scalar function of the outputs.
        nll: the summed negative log-likelihood of the same outputs.
        outputs: that both are differentiated by.
    """
    wrt = [output for output in output_tensors(outputs) if output.requires_grad]
    s, n = (
        torch.autograd.grad(
            scalar, wrt, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for scalar in (loss, nll)
    )
    return _products(_flat(s), _flat(n))


def scale_of(numbers: Tensor) -> float | None:
    """Return the factor c with loss = c * summed negative log-likelihood, from ``compared``.

    None where it is not seen: the loss has parts of its own, or both are rounding errors. The
    tolerance is tighter than ``LossScale``'s, as statistics of such a loss are of no use at all:
    a pass of the recorder's own can take others.
    """
    comparison = Comparison(*numbers.tolist())
    return comparison.ratio if comparison.proportional(1e-3) else None


class _Expected(NamedTuple):
    """The derivative of the summed negative log-likelihood in some cases, and their terms."""

    cases: slice
    derivative: Tensor
    terms: float

    @property
    def tells(self) -> bool:
        """Return ``tells``'s answer; see there."""
        return tells(float(self.derivative.square().sum()), self.terms)


class LossScale:
    """Compares the loss's derivatives in the outputs with those of the likelihood.

    Args:
        likelihood: whose derivatives the loss's are compared with.
        outputs: the outputs of the forward, whose own graph is left alone.
        targets: the targets as the likelihood takes them.
        count: number of likelihood terms, or the sum of their weights.
    """

    def __init__(
        self, likelihood: Likelihood | Sum, outputs: Tree, targets: Tree, count: float
    ) -> None:
        self._likelihood = likelihood
        self._outputs = outputs
        self._targets = targets
        self._count = count
        self._expected = self._derivative(self._some_cases())

    def __call__(self, seen: Mapping[int, Tensor | None]) -> float:
        """Return the factor, from the loss's derivatives by place of the output.

        Where the loss is another one, it counts as a sum or as a mean, whatever is nearer; near a
        perfect fit, where both derivatives are rounding errors, without a warning.
        """
        comparison, terms = self._compare(seen)
        # One per cent: a loss in half precision has rounding errors of that size.
        if comparison.proportional(0.01):
            return comparison.ratio
        # The Fisher is of derivatives of the loss all the same: scaled wrongly it would be off by
        # the square of the batch's size, so a guess is better than none, but it must be said.
        if tells(comparison.power, terms):
            difference = (comparison.rest / max(comparison.seen, 1e-300)) ** 0.5
            log.warning(
                "the factors are of derivatives of the loss, which is not proportional to the "
                "negative log-likelihood (relative difference of derivatives %.2g)",
                difference,
            )
        return comparison.reduction(self._count)

    def _compare(self, seen: Mapping[int, Tensor | None]) -> tuple[Comparison, float]:
        """Return the comparison, and the number of terms in it."""
        expected = self._expected
        # The cases that were taken may all be ignored ones; then all are compared. That cannot be
        # found out earlier without waiting for a GPU in every step.
        if expected.cases.step and not expected.tells:
            expected = self._derivative(slice(None))
        outputs = enumerate(output_tensors(self._outputs))
        found = [torch.zeros_like(o) if (g := seen.get(i)) is None else g for i, o in outputs]
        s = _flat(_some(found, expected.cases)).double()
        products = _products(s, expected.derivative)
        return Comparison(*products.tolist()), expected.terms

    def _some_cases(self) -> slice:
        """Return cases that tell the reduction; all where terms may depend on other cases.

        Comparing all outputs would cost as much as the loss itself, for a number that a few cases
        have, too.
        """
        tensors = pytree.tree_leaves((self._outputs, self._targets))
        sizes = {t.shape[0] if isinstance(t, Tensor) and t.dim() else 0 for t in tensors}
        (cases,) = sizes if len(sizes) == 1 else (0,)
        outputs = sum(tensor.numel() for tensor in output_tensors(self._outputs))
        # Every step-th case rather than the first ones: batches may be sorted.
        step = min(cases // 4, outputs // COMPARED)
        casewise = getattr(self._likelihood, "casewise", False)
        return slice(None, None, step if casewise and step > 1 else None)

    def _derivative(self, cases: slice) -> _Expected:
        """Return the likelihood's derivative in the outputs of some cases."""

        def leaf(output: Tree) -> Tree:
            differentiable = isinstance(output, Tensor) and output.is_floating_point()
            return output.detach().requires_grad_() if differentiable else output

        outputs, targets = _some((self._outputs, self._targets), cases)
        outputs = pytree.tree_map(leaf, wide(outputs))
        made = batch_likelihood(self._likelihood, outputs, targets)
        wrt = output_tensors(outputs)
        found = torch.autograd.grad(made.nll(), wrt, allow_unused=True, materialize_grads=True)
        return _Expected(cases, _flat(found).double(), made.count)


def _some(tree: Tree, cases: slice) -> Tree:
    """Return the cases of every tensor in a tree."""
    return pytree.tree_map(lambda leaf: leaf[cases], tree) if cases.step else tree


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """Return all entries in one vector, in float32 at least."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    return flat.to(torch.promote_types(flat.dtype, torch.float32))


def _products(s: Tensor, n: Tensor) -> Tensor:
    """Return the numbers of a ``Comparison``, [4]."""
    # Four numbers are all that is read back: one synchronisation with a GPU, and a traced pass can
    # return them. The rest is formed from the difference, as s.s - dot^2 / power would cancel.
    power, dot = n @ n, s @ n
    ratio = torch.where(power > 0, dot / power, 0.0)
    return torch.stack([power, dot, s @ s, (s - ratio * n).square().sum()])
