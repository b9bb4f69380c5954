"""Statistics of many derivatives at once: the exact Fisher has one for each column of a root.

A graph is differentiated for a block of columns by one batched backward pass, which stops at the
taps. Their derivatives [K, ...] come out of the engine as plain tensors, and are summed up here:
inside of the engine every statistic would have a copy for each column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

if TYPE_CHECKING:
    from kfac_fx.ops.gram import Statistic


Context: TypeAlias = Any
"""What autograd hands from a forward to its backward, and the node of the graph; attributes are set
on it freely."""


class Statistics(Protocol):
    """Computes the statistics of one kind of use."""

    def __call__(
        self,
        g: Tensor,
        tensors: Sequence[Tensor | None],
        wanted: Sequence[bool],
        dtype: torch.dtype,
    ) -> Sequence[Statistic | None]:
        """Return one statistic a factor buffer, None where not wanted.

        Args:
            g: derivative with respect to the tapped tensor.
            tensors: what the tap saved of the forward pass.
            wanted: per factor buffer, whether its statistic is asked for.
            dtype: the dtype of the factors; products are formed in it.
        """


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
            tensors, wanted, dtype: see ``Statistics``; only factors that are
                quadratic in the derivative are wanted.
        """


class Along(Protocol):
    """The sums of g g^T of derivatives whose products are known."""

    def __call__(self, dim: int, *, summed: bool, parts: int = 1) -> Tensor | None:
        """Return the sum as a matrix over the entries of one dimension of the derivatives.

        Args:
            dim: the dimension; the sum is over all others, and over the columns.
            summed: whether derivatives are added up over the positions first.
            parts: into how many equal parts the entries are cut, the last filled up with zeros; of
                several only the blocks on the diagonal are formed.

        Returns:
            [d, d], or [parts, b, b] where there are several; None where that is not known.
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


Form: TypeAlias = "Callable[[Sequence[Tensor], Sequence[bool]], Sequence[Statistic | None]]"
"""From derivatives by columns, [K, ...] each, and whether each factor is wanted, to one statistic a
factor, summed over the columns."""


class Recorded(NamedTuple):
    """The statistics that a node of a graph makes.

    Attributes:
        factors: the buffers that they are for.
        form: makes them of the derivatives that arrive at the node.
        statistics: the object that does, of a tap.
    """

    factors: Sequence[Tensor]
    form: Form
    statistics: object = None


_MAKERS: dict[type, Callable[[Context], Recorded]] = {}
"""By the class of the node; the files of the functions fill it, so that this one needs none."""


def node_class(function: type[torch.autograd.Function]) -> type:
    """Return the class that the nodes of an autograd function have in a graph."""
    made: type = getattr(function, "_backward_cls")  # noqa: B009  # torch's metaclass sets it
    return made


def register_use(
    function: type[torch.autograd.Function], recorded: Callable[[Context], Recorded]
) -> None:
    """Let the nodes of a function be asked for columns.

    Args:
        function: the autograd function.
        recorded: from a node, which is what its ``backward`` gets for ctx, to what it records.
    """
    _MAKERS[node_class(function)] = recorded


class RecordedUse(NamedTuple):
    """A node of a recorded graph that makes statistics of derivatives.

    Attributes:
        edges: where the derivatives arrive.
        shapes: those of the derivatives of one column.
        recorded: what the node makes of them.
    """

    edges: tuple[GradientEdge, ...]
    shapes: Sequence[Sequence[int]]
    recorded: Recorded

    def last_factor(self, along: Along) -> Tensor | None:
        """Return G of the layer that gives the outputs, whose Fisher is known in sums.

        Args:
            along: gives the sums.

        Returns:
            None where it must be formed of derivatives.
        """
        _, _, known = self.recorded
        if not isinstance(known, OutputStatistics):
            return None
        divide = len(self.recorded.factors) == 2
        return known.of_outputs(self.shapes[0], along, divide=divide)


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
    """Return what a node records; None if it is none that can be asked for columns."""
    maker = _MAKERS.get(type(node))
    if maker is None:
        return None
    shapes = [each.shape for each in node._input_metadata]
    edges = tuple(GradientEdge(node, place) for place in range(len(shapes)))
    return RecordedUse(edges, shapes, maker(node))


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
