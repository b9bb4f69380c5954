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
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from kfac_fx.likelihoods.batch import BatchLikelihood, Single, Terms, root_rows
from kfac_fx.optim.traced_loss import double
from kfac_fx.torch_internals import pytree
from kfac_fx.torch_internals.jvp_levels import below_a_jvp, on_plain_tensors

MOST_ENTRIES = 2**26
"""Rows times parameters up to which J is formed: half a gigabyte."""

MOST_WORK = 2**32
"""Multiplications up to which it is: the products of all pairs of rows take a third of a second
then. Of four times as many a step tells more, and fewer are made."""

PASSES, PLAIN, CALL = 32, 128, 10**6
"""The same as a multiple of what a pass through the layers takes, with derivatives in it and
without. A call counts as so many multiplications by itself. A step of blocks takes five to ten
passes; walkers of a wave function, which are plain batches, take many more to be drawn."""

FEWEST, SPARED = 256, 8
"""So many rows are drawn of a batch at least, and its rows are at most so many times those: what no
drawn row sees has no curvature. Plain batches have as many at least: the first steps of whole
batches of fewer cases fit them too well, and what follows is slow to mend it."""

AGREES = 1e-3
"""Largest difference of J^T e / T and the gradient, as a part of it, where J is right. The parts
that it is otherwise wrong by are of order one; rounding is below 1e-5."""

ROUNDING = 30.0
"""So many roundings of the terms e_n J_n may the difference have in any case: at a minimum they
cancel, and the gradient itself is nothing but their rounding. Measured: up to 4."""

COARSEST = 2.0**-23
"""The rounding reckoned with at most, that of float32: with bfloat16 anything would pass."""

LINEAR = (F.linear, torch.ops.aten.linear.default)
"""Linear layers as modules call them, and as exported graphs do."""


class NoRowsError(Exception):
    """Steps cannot be made from the rows of this batch, for the reason that the message says."""


@dataclass(frozen=True)
class CaseRows:
    """J of a batch or of some rows of it, and how far its outputs are from their targets.

    Rows that are drawn from a batch are scaled, J and e alike, so that J^T J / T has the mean F.

    Attributes:
        jacobian: J by parameter name, [rows, entries of the parameter] each, in float64.
        residuals: e of the loss ||e||^2 / (2 T), [rows] in float64.
        terms: T, those of the whole batch.
        whole: whether all rows of the batch are there.
        plain: whether no derivatives by torch.func.jvp are in them.
    """

    jacobian: dict[str, Tensor]
    residuals: Tensor
    terms: float
    whole: bool
    plain: bool

    def along(self, direction: Mapping[str, Tensor]) -> Tensor:
        """Return J v, [rows], of a direction v."""
        found = torch.zeros_like(self.residuals)
        for name, J in self.jacobian.items():
            found.addmv_(J, direction[name].reshape(-1).to(J.dtype))
        return found

    def gradient(self) -> dict[str, Tensor]:
        """Return J^T e / T by parameter name, flat: the part of the loss's gradient of the rows."""
        weights = self.residuals / self.terms
        return {name: J.T @ weights for name, J in self.jacobian.items()}

    def check(self, expected: Mapping[str, Tensor]) -> None:
        """Compare ``gradient`` with what it has to be.

        Raises:
            NoRowsError: it is something else, for some parameter.
        """
        total = math.sqrt(sum(float(g.double().square().sum()) for g in expected.values()))
        for name, found in self.gradient().items():
            wanted = expected[name]
            error = float((found - wanted.reshape(-1)).norm())
            # "not <=" rather than ">": what is no number is not right.
            if not (error <= AGREES * total or error <= self._rounding(name, wanted.dtype)):
                raise NoRowsError(
                    f"{name} is used elsewhere than in linear layers that take cases one by one"
                )

    def _rounding(self, name: str, dtype: torch.dtype) -> float:
        """Return how far J^T e / T and what it has to be may be apart by rounding."""
        sizes = torch.linalg.vector_norm(self.jacobian[name], dim=1)
        terms = float(self.residuals.abs() @ sizes) / self.terms
        return ROUNDING * min(torch.finfo(dtype).eps, COARSEST) * terms


class _Use(NamedTuple):
    """One call of a linear layer.

    Attributes:
        weight, bias: the names of its parameters.
        input: its input.
        output: the place of its output in autograd's graph; the tensor may be written over.
        work: multiplications of a pass through it.
        derived: whether it is one of those that derivatives by torch.func.jvp are taken of.
    """

    weight: str
    bias: str | None
    input: Tensor
    output: GradientEdge
    work: int
    derived: bool


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
        if func in LINEAR and on_plain_tensors():
            self._note(made, *args, **(kwargs or {}))
        return made

    def _note(
        self, output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> None:
        name = self._names.get(_memory(weight))
        # A weight of one dimension is an output's without one; such layers are none of ours.
        if name is not None and output.requires_grad and weight.dim() == 2:
            shift = None if bias is None else self._names.get(_memory(bias))
            edge = get_gradient_edge(output)
            work = 3 * input.numel() * len(weight) + CALL
            self.found.append(_Use(name, shift, input.detach(), edge, work, below_a_jvp()))


def _memory(tensor: Tensor) -> tuple[int, torch.Size]:
    return tensor.data_ptr(), tensor.shape


def case_rows(
    run: Callable[[], BatchLikelihood],
    parameters: Mapping[str, Tensor],
    gradient: Mapping[str, Tensor],
    most: int,
) -> CaseRows:
    """Return the rows of a batch, or as many of them as steps can be made from.

    Args:
        run: runs the network with its own parameters and returns what its likelihood says. The loss
            has to be quadratic in the outputs.
        parameters: those that J is of, by name.
        gradient: of the loss, by them.
        most: so many rows are made at most. Of batches with more they are drawn from torch's global
            stream, in each column of outputs alike.

    Raises:
        NoRowsError: there are many more, or J is more than uses of linear layers tell.
    """
    uses = _LinearUses(parameters)
    with torch.enable_grad(), uses:
        made = run()
        columns = list(_columns(made))
    covered = {name for use in uses.found for name in (use.weight, use.bias)}
    if missing := parameters.keys() - covered:
        raise NoRowsError(f"{min(missing)} is a parameter of no linear layer")
    rows = sum(len(column.rows) for column in columns)
    entries = sum(p.numel() for p in parameters.values())
    plain = not any(use.derived for use in uses.found)
    share = _share(rows, entries, sum(use.work for use in uses.found), plain, most)
    columns = [column.drawn(share) for column in columns]
    jacobian = {
        name: torch.zeros(
            sum(len(column.kept) for column in columns),
            p.numel(),
            dtype=torch.float64,
            device=p.device,
        )
        for name, p in parameters.items()
    }
    outputs = [use.output for use in uses.found]
    start = 0
    for column in columns:
        with torch.enable_grad():
            total = column.kept_rows().sum()
        # None of the columns' graphs is freed: they have the layers below in common.
        found = torch.autograd.grad(total, outputs, retain_graph=True, allow_unused=True)
        stop = start + len(column.kept)
        calls = [(use, g) for use, g in zip(uses.found, found, strict=True) if g is not None]
        _write({name: J[start:stop] for name, J in jacobian.items()}, column, calls)
        start = stop
    residuals = torch.cat([column.residuals for column in columns]).double()
    result = CaseRows(jacobian, residuals, made.count, share == 1.0, plain)
    result.check(gradient if result.whole else _gradient(columns, parameters, made.count))
    return result


def _share(rows: int, entries: int, work: int, plain: bool, most: int) -> float:
    """Return the share of a batch's rows that J has.

    Args:
        rows: of the batch.
        entries: of the parameters.
        work: multiplications of a pass through the layers.
        plain: whether no derivatives by torch.func.jvp are in it.
        most: so many rows J has at most.

    Raises:
        NoRowsError: it is too small a share for steps of the batch.
    """
    # Residuals of an equation are smooth, and some of them tell of the others. A regression's are
    # not: steps that fit some of them to the last digit take long to fit the rest.
    passes = PLAIN if plain else PASSES
    few = min(most, MOST_ENTRIES // entries, math.isqrt(min(MOST_WORK, passes * work) // entries))
    drawn = not plain and few >= FEWEST and rows <= SPARED * few
    if not (drawn or rows <= few) or (plain and rows < FEWEST):
        raise NoRowsError(f"{rows} rows of {entries} parameters are too many or too few")
    return min(1.0, few / rows) if rows else 1.0


@dataclass(frozen=True)
class _Column:
    """One output of the cases of one likelihood, as rows.

    Attributes:
        rows: [cases], with a derivative.
        residuals: e of the rows that are kept, without one.
        kept: the cases that are kept.
    """

    rows: Tensor
    residuals: Tensor
    kept: Tensor

    def drawn(self, share: float) -> _Column:
        """Return the column with a share of its cases, scaled by its root."""
        cases = len(self.rows)
        if share == 1.0 or not cases:
            return self
        # Drawn, as every other point of a grid would be a line of it.
        count = max(1, int(share * cases))
        kept = torch.randperm(cases, device=self.rows.device)[:count].sort().values
        scale = (cases / count) ** 0.5
        with torch.enable_grad():
            return _Column(self.rows * scale, self.residuals[kept] * scale, kept)

    def kept_rows(self) -> Tensor:
        """Return the rows of the cases that are kept."""
        return self.rows if len(self.kept) == len(self.rows) else self.rows[self.kept]


def _columns(made: BatchLikelihood) -> Iterator[_Column]:
    """Yield the rows of a batch, whose loss is the sum of e^2 over 2 T."""
    zipped = zip(made.distributions, made.terms.parts, made.ones, strict=True)
    for distribution, terms, one in zipped:
        # A part of no weight may have any likelihood.
        if terms is None or not one.weight:
            continue
        share = terms.share**0.5 if made.terms.weighted else 1.0
        apart = _apart(one, terms)
        for rows, residuals in zip(root_rows(distribution, terms.weights), apart, strict=True):
            cases = torch.arange(len(rows), device=rows.device)
            for column, e in zip((rows * share).unbind(1), residuals.unbind(1), strict=True):
                yield _Column(column, e * share, cases)


@torch.no_grad()
def _apart(one: Single, terms: Terms) -> list[Tensor]:
    """Return how far rows are from those of the targets: in float64, as near a fit it is little.

    Raises:
        NoRowsError: the likelihood cannot say.
    """
    both = []
    try:
        for values in (one.outputs, terms.targets):
            wide = pytree.tree_map_only(Tensor, double, values)
            both.append(list(root_rows(one.likelihood.distribution(wide), terms.weights)))
    except Exception as error:  # of a likelihood of the user's, whose outputs are of another form
        raise NoRowsError("the likelihood does not take targets in place of outputs") from error
    return [rows - targets for rows, targets in zip(*both, strict=True)]


def _gradient(
    columns: Iterable[_Column], parameters: Mapping[str, Tensor], terms: float
) -> dict[str, Tensor]:
    """Return the gradient of the part of the loss that is of the rows that are kept."""
    with torch.enable_grad():
        weighted = [(column.kept_rows() * column.residuals).sum() for column in columns]
        total = torch.stack(weighted).sum() / terms
    found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(parameters.items(), found, strict=True)
    }


_Call = tuple[_Use, Tensor]
"""A call of a linear layer, and the gradient of its output."""


def _write(into: Mapping[str, Tensor], column: _Column, calls: Sequence[_Call]) -> None:
    """Write the derivatives of a column's rows.

    Raises:
        NoRowsError: the rows of a layer are not those of the cases.
    """
    places = _places(column, calls)
    layers: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for use, gradient in calls:
        ours = places[len(gradient)]
        if len(ours):
            g, x = gradient.detach()[ours].double(), use.input[ours].double()
            g, x = (t.reshape(len(ours), -1, t.shape[-1]) for t in (g, x))
            layers.setdefault(use.weight, []).append((g, x))
            if use.bias is not None:
                into[use.bias].add_(g.sum(1))
    for weight, found in layers.items():
        g, x = (torch.cat(each, 1) for each in zip(*found, strict=True))
        # All calls of the layer in one product: J is large, and written once.
        torch.bmm(g.mT, x, out=into[weight].unflatten(1, (g.shape[-1], x.shape[-1])))


def _places(column: _Column, calls: Sequence[_Call]) -> dict[int, Tensor]:
    """Return where the kept cases are in calls of layers, by the number of rows of a call.

    Raises:
        NoRowsError: they are not there, one by one.
    """
    others: dict[int, Tensor] = {}
    places = {len(column.rows): column.kept}
    for _, gradient in calls:
        if gradient.dim() < 2:
            raise NoRowsError("a linear layer is called without a dimension of cases")
        if len(gradient) not in places:
            used = gradient.flatten(1).any(1)
            others[len(gradient)] = others.get(len(gradient), used) | used
    # Rows of other parts are there as well, where points of several kinds are put into one batch.
    # One layer alone does not tell which are this column's: units that are off have no derivative.
    for size, used in others.items():
        places[size] = used.nonzero().squeeze(1)
        if len(places[size]) not in (0, len(column.kept)):
            raise NoRowsError("a linear layer is called with other cases than there are outputs")
    return places
