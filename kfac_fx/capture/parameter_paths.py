"""Follow a parameter from where the module holds it to where it meets the data.

On its way a parameter may pass through views (a transpose, a slice), which only change its layout,
and through computations: weight normalisation, standardisation and masks run operations on a
parameter V and use the result W. The rules need W's Jacobian with respect to V, so a weight's way
back to its parameter is kept as a function that can be evaluated at other values of V.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from kfac_fx.capture.dialect import Argument, Call, reads_shape_of
from kfac_fx.ir.layout import Layout

_UNKNOWN_SIZES = (IndexError, KeyError, TypeError, ValueError)
"""What a view raises whose sizes are nodes: they are known only at run time."""

Value = Any
"""What a node of the graph evaluates to: a tensor, a size, a tuple of those or a nested graph."""


_ATTRIBUTES = {"T": "numpy_T", "mT": "mT"}
"""Attributes of tensors that are views -> the operation that they are."""


def seen_through(call: Call, layout: Layout) -> Layout | None:
    """Return the layout after a view with constant arguments, None where the call is none.

    Args:
        call: what reads the parameter.
        layout: the views from the parameter's shape to what the call reads.
    """
    operation = call.operation
    if operation == "attribute":
        operation = _ATTRIBUTES.get(call.get("name"), "")
    view = _VIEWS.get(operation)
    try:
        return None if view is None else view(layout, call.arguments)
    except _UNKNOWN_SIZES:
        return None


def split_layouts(call: Call, layout: Layout) -> list[Layout] | None:
    """Return the layouts of the pieces that chunk, split and unbind make; None for other calls.

    Args:
        call: what reads the parameter.
        layout: the views from the parameter's shape to what the call reads.
    """
    if call.operation not in ("chunk", "split", "unbind"):
        return None
    dim = call.get("dim", 0)
    try:
        size = layout.shape[dim]
        if call.operation == "unbind":
            return [layout.select(dim, index) for index in range(size)]
        if call.operation == "chunk":
            # As torch does: pieces of ceil(size / chunks), the last one smaller.
            sizes: Argument = -(-size // call.arguments["chunks"])
        else:
            sizes = call.get("sizes", call.get("split_size_or_sections"))
        if isinstance(sizes, int):
            sizes = [min(sizes, size - start) for start in range(0, size, sizes)]
        starts = [sum(sizes[:index]) for index in range(len(sizes))]
        return [layout.narrow(dim, start, n) for start, n in zip(starts, sizes, strict=True)]
    except _UNKNOWN_SIZES:
        return None


def _transpose_matrix(layout: Layout, arguments: dict[str, Argument]) -> Layout:
    """Return the layout of ``p.t()``, which leaves vectors as they are."""
    return layout if len(layout.shape) < 2 else layout.transpose(0, 1)


def _unsqueeze(layout: Layout, arguments: dict[str, Argument]) -> Layout:
    """Return the layout with one more dimension of size 1."""
    shape = list(layout.shape)
    shape.insert(arguments["dim"] % (len(shape) + 1), 1)
    return layout.reshape(shape)


def _squeeze(layout: Layout, arguments: dict[str, Argument]) -> Layout:
    """Return the layout without one, or all, dimensions of size 1."""
    shape, dim = layout.shape, arguments.get("dim")
    axes = range(len(shape)) if dim is None else [dim % len(shape)]
    return layout.reshape([s for i, s in enumerate(shape) if i not in axes or s != 1])


def _flatten(layout: Layout, arguments: dict[str, Argument]) -> Layout:
    """Return the layout with several dimensions made one."""
    shape = layout.shape
    start = arguments.get("start_dim", 0) % len(shape)
    end = arguments.get("end_dim", -1) % len(shape)
    return layout.reshape((*shape[:start], -1, *shape[end + 1 :]))


def _slice(layout: Layout, dim: int, index: slice) -> Layout:
    """Return the layout of a slice; the curvature of rows that are steps apart is not kept."""
    if index.step not in (None, 1):
        raise ValueError("a slice with steps is no piece")
    start, stop, _ = index.indices(layout.shape[dim])
    return layout.narrow(dim, start, max(stop - start, 0))


def _getitem(layout: Layout, arguments: dict[str, Argument]) -> Layout:
    """Return the layout of ``p[index]`` for constant numbers, slices and None.

    A tensor as an index chooses by the data: that is a use (a table), and no view.
    """
    index = arguments["index"]
    dim = 0
    for entry in index if isinstance(index, tuple) else (index,):
        if entry is None:
            layout = _unsqueeze(layout, {"dim": dim})
            dim += 1
        elif isinstance(entry, slice):
            layout = _slice(layout, dim, entry)
            dim += 1
        elif type(entry) is int:
            layout = layout.select(dim, entry)
        else:
            raise TypeError("an index that is computed")
    return layout


def _shifted(layout: Layout, arguments: dict[str, Argument]) -> Layout | None:
    """Return the layout of c + p and c - p for a number c: they have the curvature of p."""
    numbers = [v for v in arguments.values() if isinstance(v, (int, float))]
    return layout if len(numbers) == len(arguments) - 1 else None


# "expand" is no entry: it copies a parameter, and the rules must see where, since that tells over
# which cases the copies' derivatives are summed.
_VIEWS: dict[str, Callable[[Layout, dict[str, Argument]], Layout | None]] = {
    "cast": lambda layout, _: layout,
    "t": _transpose_matrix,
    "numpy_T": lambda layout, _: layout.permute(*reversed(range(len(layout.shape)))),
    "mT": lambda layout, _: layout.transpose(-2, -1),
    "transpose": lambda layout, a: layout.transpose(a["dim0"], a["dim1"]),
    "permute": lambda layout, a: layout.permute(*a["dims"]),
    "reshape": lambda layout, a: layout.reshape(a["shape"]),
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "flatten": _flatten,
    "narrow": lambda layout, a: layout.narrow(a["dim"], a["start"], a["length"]),
    "slice": lambda layout, a: _slice(
        layout, a.get("dim", 0), slice(a.get("start"), a.get("end"), a.get("step"))
    ),
    "select": lambda layout, a: layout.select(a["dim"], a["index"]),
    "getitem": _getitem,
    "add": _shifted,
    "sub": _shifted,
    "rsub": _shifted,
    "neg": _shifted,
}


@dataclass(frozen=True)
class Derivation:
    """A tensor that is computed from a parameter, in a view of its shape, and from no data.

    Attributes:
        source: the node of the parameter, or of a view of it, that all ways begin at.
        seen: the views from the parameter's shape to the source's.
        result: the node of the computed tensor, in the source's shape.
        start: the source's value, in double precision.
        function: a function from a value of the source to the result; all else as it is now. Raises
            ValueError where the operations fail at another value.
    """

    source: fx.Node
    seen: Layout
    result: fx.Node
    start: Tensor
    function: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Reference:
    """A parameter, or a piece of one, as a node of the graph shows it.

    Attributes:
        name: the parameter's canonical name in the model.
        layout: the views from the parameter's shape to the node's.
        path: the parameter's name and the operations that it went through, for messages.
        derived: how the tensor is computed, where it is not the parameter itself seen through
            views.
    """

    name: str
    layout: Layout
    path: tuple[str, ...] = ()
    derived: Derivation | None = None


class ComputedWeights:
    """Trace weights of one graph back to the parameters that they are computed from.

    The tables are those of the ``GraphView`` that owns this object: they grow as that view reads
    more nodes, and nothing is changed here.

    Args:
        module: the module whose members the graph reads.
        calls: every node of the graph in the common vocabulary, None where that has no word for it.
        references: the nodes that show one whole parameter or a piece of one.
        data: the nodes whose values depend on the model's inputs.
        undifferentiated: those that are made while gradients are off.
    """

    def __init__(
        self,
        module: nn.Module,
        calls: Mapping[fx.Node, Call | None],
        references: Mapping[fx.Node, Reference | None],
        data: Collection[fx.Node],
        undifferentiated: Collection[fx.Node],
    ) -> None:
        self._module = module
        self._calls = calls
        self._references = references
        self._data = data
        self._undifferentiated = undifferentiated
        self._found: dict[tuple[fx.Node, frozenset[str]], Reference | None] = {}

    def reference(self, value: fx.Node, names: frozenset[str]) -> Reference | None:
        """Return the first of the named parameters that a node's value is computed from.

        The answer is kept: several rules ask about the same weight, and each answer runs the
        operations in double precision.
        """
        key = (value, names)
        if key not in self._found:
            self._found[key] = next(self._derivations(value, names), None)
        return self._found[key]

    def _derivations(self, value: fx.Node, names: frozenset[str]) -> Iterator[Reference]:
        """Yield the named parameters that ``value``, or what it is a view of, is computed from."""
        if value in self._data:
            return
        nodes = ancestors(value)
        held = [(node, self._references[node]) for node in nodes]
        sources = [(n, r) for n, r in held if r is not None and r.name in names and r.layout.whole]
        values = self._evaluate(nodes, {}) if sources else None
        for source, reference in sources if values is not None else ():
            assert values is not None
            chain = self._views_back_to(value, values, source)
            if chain is None or not self._all_ways_pass(source, reference.name, chain[-1]):
                continue
            # The weight may be used in another shape than the parameter's (a kernel made a matrix):
            # the views at its end lead from the one layout to the other.
            layout = reference.layout
            for node in reversed(chain[:-1]):
                call = self._calls[node]
                viewed = None if call is None else seen_through(call, layout)
                assert viewed is not None
                layout = viewed
            derivation = Derivation(
                source=source,
                seen=reference.layout,
                result=chain[-1],
                start=values[source].detach(),
                function=self._function(source, chain[-1]),
            )
            path = (reference.name, *self._operations(source, value))
            yield Reference(reference.name, layout, path, derivation)

    def _all_ways_pass(self, source: fx.Node, name: str, result: fx.Node) -> bool:
        """Tell whether every way from the parameter to the result goes through the source.

        A parameter that also enters past the source would keep its present value in ``function``,
        and the Jacobian would lack that part without a word.
        """
        roots = [n for n in ancestors(result, source) if n.op == "get_attr" and n is not source]
        references = [self._references[root] for root in roots]
        return all(reference is None or reference.name != name for reference in references)

    def _views_back_to(
        self, value: fx.Node, values: Mapping[fx.Node, Value], source: fx.Node
    ) -> list[fx.Node] | None:
        """Return the views from ``value`` back to a tensor of the source's shape, the last."""
        chain = [value]
        while chain[-1] is not source:
            here = values[chain[-1]]
            if not isinstance(here, Tensor) or not here.is_floating_point():
                return None
            # A tensor of the parameter's shape has rows that can be compared with the parameter's;
            # what follows it must be views, which keep the rows.
            if here.shape == values[source].shape:
                return chain
            call = self._calls[chain[-1]]
            before = None if call is None else values.get(call.get("input"))
            if call is None or not isinstance(before, Tensor):
                return None
            if seen_through(call, Layout(tuple(before.shape))) is None:
                return None
            chain.append(call.get("input"))
        return None

    def _evaluate(
        self, nodes: list[fx.Node], given: Mapping[fx.Node, Tensor]
    ) -> dict[fx.Node, Value] | None:
        """Return the nodes' values in double precision, None where they cannot be computed apart.

        Double precision, because the rules compare Jacobians with exact zeros and ones. The random
        state is put back, since the user's own code runs here (spectral norm draws vectors).
        """
        values: dict[fx.Node, Value] = {}
        try:
            with torch.random.fork_rng([]), torch.enable_grad():
                before = torch.get_rng_state()
                for node in nodes:
                    values[node] = given[node] if node in given else self._run(node, values)
                # Noise differs from run to run, so no Jacobian that is taken now is the one later.
                if not torch.equal(torch.get_rng_state(), before):
                    return None
        except Exception:  # any code of the user's may run here
            return None
        return values

    def _run(self, node: fx.Node, values: Mapping[fx.Node, Value]) -> Value:
        if node in self._undifferentiated:
            raise ValueError("derivatives do not pass what is computed without gradients")
        if node.op == "get_attr":
            held = attrgetter(str(node.target))(self._module)
            if not isinstance(held, Tensor):
                return held  # a graph that a higher-order operator runs
            held = held.detach().clone()  # what updates itself updates the copy
            return held.double() if held.is_floating_point() else held
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        raise ValueError(f"{node.op} is not run apart")

    def _function(self, source: fx.Node, result: fx.Node) -> Callable[[Tensor], Tensor]:
        nodes = ancestors(result, source)

        def function(parameter: Tensor) -> Tensor:
            values = self._evaluate(nodes, {source: parameter})
            if values is None:
                raise ValueError("the weight cannot be computed at another value of its parameter")
            computed: Tensor = values[result]
            return computed

        return function

    def _operations(self, source: fx.Node, value: fx.Node) -> list[str]:
        """Return the names of what is called on one way from a parameter to a value."""
        next_on_way: dict[fx.Node, fx.Node] = {}
        todo = [value]
        while todo:
            here = todo.pop()
            for argument in here.all_input_nodes:
                if argument not in next_on_way and not reads_shape_of(here, argument):
                    next_on_way[argument] = here
                    todo.append(argument)
        names = []
        while source is not value:
            source = next_on_way[source]
            call = self._calls[source]
            target = getattr(source.target, "__name__", str(source.target))
            names.append(target.split(".")[0] if call is None else call.operation)
        return names


def ancestors(value: fx.Node, stop: fx.Node | None = None) -> list[fx.Node]:
    """Return ``value`` and all that it is computed from, in the graph's order.

    Args:
        stop: a node whose own inputs are left out; None follows every way to its beginning.
    """
    found = {value}
    todo = [value]
    while todo:
        here = todo.pop()
        new = set() if here is stop else set(here.all_input_nodes) - found
        found |= new
        todo += new
    return sorted(found)
