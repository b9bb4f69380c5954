"""Statistics of many derivatives at once: the exact Fisher has one for each column of a root.

A graph is differentiated for a block of columns by one batched backward pass, which stops at the
taps. Their derivatives [K, ...] come out of the engine as plain tensors, and are summed up here:
inside of the engine every statistic would have a copy for each column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from kfac_fx.ops.coupling import cross_columns, link_of
from kfac_fx.ops.gram import Statistic
from kfac_fx.ops.kronecker import Along
from kfac_fx.ops.tap import Context, Statistics, added, is_identity, source_of


@runtime_checkable
class ColumnStatistics(Protocol):
    """Statistics that form the sum over columns by fewer calls than one for each."""

    def columns(
        self,
        g: Tensor,
        tensors: Sequence[Tensor | None],
        wanted: Sequence[bool],
        dtype: torch.dtype,
    ) -> Sequence[Statistic | None]:
        """Return the sums over the columns of what a call gives for one of them.

        Args:
            g: derivatives by columns, [K, ...].
            tensors, wanted, dtype: see ``kfac_fx.ops.tap.Statistics``; only factors that are
                quadratic in the derivative are wanted.
        """


@runtime_checkable
class OutputStatistics(Protocol):
    """Statistics of a layer that may be the last: G follows from the Fisher of the outputs."""

    def of_outputs(self, shape: Sequence[int], along: Along, *, divide: bool) -> Tensor | None:
        """Return G of derivatives whose products are summed up already.

        Args:
            shape: the shape of a derivative.
            along: gives the sums.
            divide: whether to divide by the positions.

        Returns:
            None where G is of another form.
        """


def of_columns(
    statistics: Statistics,
    g: Tensor,
    tensors: Sequence[Tensor | None],
    wanted: Sequence[bool],
    dtype: torch.dtype,
) -> Sequence[Statistic | None]:
    """Return the sums over columns of statistics of any kind; the arguments are as above."""
    if isinstance(statistics, ColumnStatistics):
        return statistics.columns(g, tensors, wanted, dtype)
    # Always right: the statistics of one column after the other. Kinds whose statistics do not
    # depend on which case a row is of have a shorter way.
    total: list[Statistic | None] = [None] * len(wanted)
    for column in g:
        found = statistics(column, tensors, wanted, dtype)
        total = [added(one, other) for one, other in zip(total, found, strict=True)]
    return total


class RecordedUse(NamedTuple):
    """A node of a recorded graph that makes statistics of derivatives.

    Attributes:
        edges: where the derivatives arrive.
        factors: the buffers whose statistics it makes.
        shapes: those of the derivatives of one column.
        form: from the derivatives at the edges, [K, ...] each, and whether each factor is wanted,
            to one statistic a factor.
    """

    edges: tuple[GradientEdge, ...]
    factors: Sequence[Tensor]
    shapes: Sequence[Sequence[int]]
    form: Callable[[Sequence[Tensor], Sequence[bool]], Sequence[Statistic | None]]

    def last_factor(self, along: Along) -> Tensor | None:
        """Return G of the layer that gives the outputs, whose Fisher is known in sums.

        Args:
            along: see ``OutputStatistics``.

        Returns:
            None where it must be formed of derivatives.
        """
        source = source_of(self.edges[0].node)
        if source is None or not isinstance(source.statistics, OutputStatistics):
            return None
        return source.statistics.of_outputs(self.shapes[0], along, divide=len(self.factors) == 2)


class FoundUses(NamedTuple):
    """The uses in a graph that record into given buffers.

    Attributes:
        uses: those that can be asked for columns.
        rest: the buffers that other nodes deliver to, too; the engine has to serve these. Such are
            weights that are computed row by row, whose statistics pass through one more operator.
    """

    uses: list[RecordedUse]
    rest: list[Tensor]


def recorded_uses(roots: Sequence[Tensor], buffers: Sequence[Tensor]) -> FoundUses:
    """Return the uses in the graph of some tensors.

    Args:
        roots: tensors with their graph.
        buffers: those whose statistics are wanted.
    """
    wanted = set(buffers)
    found = FoundUses([], [])
    for node in _nodes(roots):
        use = _use_of(node)
        leaves = {getattr(following, "variable", None) for following, _ in node.next_functions}
        reached = wanted & leaves
        if not reached:
            continue
        if use is None:
            found.rest.extend(reached.difference(found.rest))
        else:
            found.uses.append(use)
    return found


def _use_of(node: Node) -> RecordedUse | None:
    """Return what a node records; None if it is no use, or one that records into no leaf."""
    source, link = source_of(node), link_of(node)
    if source is not None:
        factors, form = source.factors, partial(_of_source, source)
    elif link is not None:
        factors, form = (link.G,), partial(_of_link, link)
    else:
        return None
    shapes = [each.shape for each in node._input_metadata]
    edges = tuple(GradientEdge(node, place) for place in range(len(shapes)))
    return RecordedUse(edges, factors, shapes, form)


def tapped_by(y: Tensor) -> set[Node]:
    """Return the nodes that make statistics of the derivative of y as it is."""
    found: set[Node] = set()
    node = y.grad_fn
    while is_identity(node):
        assert node is not None
        (node, _), (side, _) = node.next_functions[:2]
        if side is not None:
            found.add(side)
    return found


def _of_source(
    source: Context, g: Sequence[Tensor], wanted: Sequence[bool]
) -> Sequence[Statistic | None]:
    dtype = source.factors[0].dtype
    return of_columns(source.statistics, g[0], source.saved_tensors, wanted, dtype)


def _of_link(
    link: Context, g: Sequence[Tensor], wanted: Sequence[bool]
) -> Sequence[Statistic | None]:
    own, later = g
    return [cross_columns(link.side, own, later, link.G.dtype)]


def _nodes(roots: Sequence[Tensor]) -> Iterator[Node]:
    """Yield all nodes of a graph, each once."""
    todo = [root.grad_fn for root in roots]
    seen = set(todo)
    while todo:
        node = todo.pop()
        if node is None:
            continue
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                todo.append(following)
