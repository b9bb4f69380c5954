"""The derivatives of a batch's outputs, row by row, for networks of linear layers.

A row is one output of one case, scaled by the root of the output Fisher. With J the derivatives of
the rows and T the number of likelihood terms, F = J^T J / T is the exact Fisher of the batch. J is
formed from what one backward pass for each column of outputs leaves at the layers: where cases do
not depend on each other, the gradient of a column's sum has the gradient of each case in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kfac_fx.likelihoods.batch import BatchLikelihood, root_rows
from kfac_fx.torch_internals.jvp_levels import on_plain_tensors

MOST_ENTRIES = 2**26
"""Rows times parameters up to which J is formed: half a gigabyte."""

MOST_WORK = 2**34
"""Rows, once more rows, times parameters up to which it is: products of all pairs of rows take
a second then."""

AGREES = 1e-3
"""Largest difference of J^T e / T and the gradient, as a part of it, where J is right. The parts
that it is otherwise wrong by are of order one; rounding is below 1e-5."""


class NoRowsError(Exception):
    """Steps cannot be made from the rows of this batch, for the reason that the message says."""


@dataclass(frozen=True)
class CaseRows:
    """J of a batch, and how far its outputs are from their targets.

    Attributes:
        jacobian: J by parameter name, [rows, entries of the parameter] each, in float64.
        residuals: e of the loss ||e||^2 / (2 T), [rows] in float64.
        terms: T.
    """

    jacobian: dict[str, Tensor]
    residuals: Tensor
    terms: float

    def along(self, direction: Mapping[str, Tensor]) -> Tensor:
        """Return J v, [rows], of a direction v."""
        found = torch.zeros_like(self.residuals)
        for name, J in self.jacobian.items():
            found.addmv_(J, direction[name].reshape(-1).to(J.dtype))
        return found

    def check(self, gradient: Mapping[str, Tensor]) -> None:
        """Compare J^T e / T with the gradient of the loss, which it is where J is right.

        Raises:
            NoRowsError: it is something else, for some parameter.
        """
        total = math.sqrt(sum(float(g.double().square().sum()) for g in gradient.values()))
        for name, J in self.jacobian.items():
            found = J.T @ self.residuals / self.terms
            # "not <=" rather than ">": what is no number is not right.
            if not float((found - gradient[name].reshape(-1)).norm()) <= AGREES * total:
                raise NoRowsError(
                    f"{name} is used elsewhere than in linear layers that take cases one by one"
                )


class _Use(NamedTuple):
    """One call of a linear layer: the names of its parameters, its input and its output."""

    weight: str
    bias: str | None
    input: Tensor
    output: Tensor


class _LinearUses(TorchFunctionMode):
    """Within the context, note the calls of linear layers, below the levels of jvp that are on.

    Args:
        parameters: those whose layers are wanted, by name.

    Attributes:
        found: the calls.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        # By their memory: a parameter that comes from below a level of jvp is another object.
        self._names = {_memory(p): name for name, p in parameters.items()}
        self.found: list[_Use] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run a call as it is."""
        made = func(*args, **(kwargs or {}))
        if func is F.linear and on_plain_tensors():
            self._note(made, *args, **(kwargs or {}))
        return made

    def _note(
        self, output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> None:
        name = self._names.get(_memory(weight))
        if name is not None and output.requires_grad:
            shift = None if bias is None else self._names.get(_memory(bias))
            self.found.append(_Use(name, shift, input.detach(), output))


def _memory(tensor: Tensor) -> tuple[int, torch.Size]:
    return tensor.data_ptr(), tensor.shape


class _Part(NamedTuple):
    """The rows of one likelihood, and how far they are from those of the targets.

    Attributes:
        rows: [cases, columns], with a derivative.
        residuals: e, of the same shape, without one.
    """

    rows: Tensor
    residuals: Tensor


def _parts(made: BatchLikelihood) -> Iterator[_Part]:
    """Yield the rows of each likelihood of a batch; the loss is the sum of e^2, over 2 T."""
    zipped = zip(made.distributions, made.terms.parts, made.ones, strict=True)
    for distribution, terms, one in zipped:
        if terms is None:
            continue
        share = terms.share**0.5 if made.terms.weighted else 1.0
        targets = root_rows(one.likelihood.distribution(terms.targets), terms.weights)
        for rows, at in zip(root_rows(distribution, terms.weights), targets, strict=True):
            yield _Part(rows * share, (rows.detach() - at.detach()) * share)


def case_rows(
    run: Callable[[], BatchLikelihood], parameters: Mapping[str, Tensor], most: int
) -> CaseRows:
    """Return the rows of a batch, which nobody has compared with the gradient yet.

    Args:
        run: runs the network with its own parameters and returns what its likelihood says. The loss
            has to be quadratic in the outputs.
        parameters: those that J is of, by name.
        most: so many rows are made at most.

    Raises:
        NoRowsError: there are more, or parameters of no linear layer.
    """
    uses = _LinearUses(parameters)
    with torch.enable_grad(), uses:
        made = run()
        parts = list(_parts(made))
        columns = [column for part in parts for column in part.rows.unbind(1)]
        sums = [column.sum() for column in columns]
    sizes = [len(column) for column in columns]
    rows = sum(sizes)
    entries = sum(p.numel() for p in parameters.values())
    if rows > most or rows * entries > MOST_ENTRIES or rows * rows * entries > MOST_WORK:
        raise NoRowsError(f"{rows} rows of {entries} parameters are too many")
    covered = {name for use in uses.found for name in (use.weight, use.bias)}
    if missing := parameters.keys() - covered:
        raise NoRowsError(f"{min(missing)} is a parameter of no linear layer")
    jacobian = {
        name: torch.zeros(rows, p.numel(), dtype=torch.float64, device=p.device)
        for name, p in parameters.items()
    }
    outputs = [use.output for use in uses.found]
    start = 0
    for total, cases in zip(sums, sizes, strict=True):
        # None of the columns' graphs is freed: they have the layers below in common.
        found = torch.autograd.grad(total, outputs, retain_graph=True, allow_unused=True)
        for weight, calls in _by_layer(uses.found, found).items():
            _write(jacobian, slice(start, start + cases), weight, calls)
        start += cases
    residuals = torch.cat([part.residuals.mT.flatten() for part in parts]).double()
    return CaseRows(jacobian, residuals, made.count)


_Call = tuple[_Use, Tensor]
"""A call of a linear layer, and the gradient of its output."""


def _by_layer(uses: Iterable[_Use], gradients: Sequence[Tensor | None]) -> dict[str, list[_Call]]:
    """Return the calls that a column depends on, by the name of their weight."""
    calls: dict[str, list[_Call]] = {}
    for use, gradient in zip(uses, gradients, strict=True):
        if gradient is not None:
            calls.setdefault(use.weight, []).append((use, gradient))
    return calls


def _write(
    jacobian: Mapping[str, Tensor], rows: slice, weight: str, calls: Sequence[_Call]
) -> None:
    """Write the derivatives of some rows by the parameters of one layer."""
    g, x = [], []
    for use, gradient in calls:
        of_rows = _of_cases(rows.stop - rows.start, gradient.detach(), use.input)
        if of_rows is None:
            continue
        g.append(of_rows[0].double())
        x.append(of_rows[1].double())
        if use.bias is not None:
            jacobian[use.bias][rows].add_(g[-1].sum(1))
    if g:
        # All calls of the layer in one product: J is large, and written once.
        into = jacobian[weight][rows].unflatten(1, (g[0].shape[-1], x[0].shape[-1]))
        torch.bmm(torch.cat(g, 1).mT, torch.cat(x, 1), out=into)


def _of_cases(cases: int, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return gradient and input as [cases, positions, features]; None where the gradient is zero.

    Raises:
        NoRowsError: the layer's rows are not those of the cases.
    """
    if g.dim() > 1 and len(g) != cases:
        # Other rows are there as well, where points of several kinds are put into one batch.
        ours = g.flatten(1).any(1).nonzero().squeeze(1)
        if not len(ours):
            return None
        g, x = g[ours], x[ours]
    if g.dim() < 2 or len(g) != cases:
        raise NoRowsError("a linear layer is called with other cases than there are outputs")
    return g.reshape(cases, -1, g.shape[-1]), x.reshape(cases, -1, x.shape[-1])
