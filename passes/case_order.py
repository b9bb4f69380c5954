"""Tell which calls give the cases of a batch another order, or make one of several.

A sum over cases does not depend on their order. Rows that are folded, and two layers whose rows
are paired, do.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import fx

from kfac_fx.capture.dialect import Argument


class Cases(NamedTuple):
    """Where the cases of a node's value are.

    Attributes:
        dim: the dimension that counts them, from the left.
        merged: the value before it was reshaped to rows, each of one position of a case; its first
            dimension counts the cases. None where ``dim`` counts nothing else.
        folded: whether it surely was, though no sizes are known.
        inner: whether rows are those of one position after another; the second dimension of
            ``merged`` counts the cases then.
    """

    dim: int
    merged: fx.Node | None = None
    folded: bool = False
    inner: bool = False


SIZES, DTYPE = "kfac_fx_sizes", "kfac_fx_dtype"
"""Keys in the meta of a node of a model that runs: the sizes and the dtype of its tensor."""

ITEMS = frozenset({"getitem", "__getitem__", "index"})

_COPIES = frozenset({"cat", "concat", "concatenate", "repeat", "tile"})

_PLACES = {
    **dict.fromkeys(("flip", "flipud", "sort", "argsort", "msort", "gather", "index_select"), 1),
    **dict.fromkeys(("roll", "topk", "take_along_dim"), 2),
}
"""Calls that give rows another order, or choose among them, and the place of their dimension."""

ORDERING = frozenset({*_PLACES, "index"})

MIXERS = {
    **dict.fromkeys(("sort", "msort", "gather", "cumsum", "cumprod", "cummax", "cummin"), 1),
    **dict.fromkeys(("logcumsumexp", "softmax", "_softmax", "log_softmax", "_log_softmax"), 1),
    "take_along_dim": 2,
}
"""Calls that make an entry of several along a dimension, or choose another for each entry."""

_FROM_THE_LEFT = frozenset({"flipud", "msort"})
_LAST = frozenset({"sort", "argsort", "topk"})
"""Calls that work along the last dimension unless they are told."""


def shape_of(node: fx.Node) -> Sequence[object]:
    """Return the sizes of a node's value as far as the graph knows them, () otherwise."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return value.shape
    sizes: Sequence[object] = node.meta.get(SIZES, ())
    return sizes


def name_of(node: fx.Node) -> str:
    """Return the name of what a node calls, of an operator without its overload."""
    if node.target is getattr and len(node.args) > 1:
        return str(node.args[1])
    if node.target is operator.getitem:
        return "getitem"
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return str(name).split(".")[0]


def numbers(arguments: Sequence[Argument]) -> list[int] | None:
    """Return dimensions that are given one by one or as a sequence, None for what is computed."""
    if len(arguments) == 1 and isinstance(arguments[0], (list, tuple)):
        arguments = tuple(arguments[0])
    found = [a for a in arguments if isinstance(a, int) and not isinstance(a, bool)]
    return found if len(found) == len(arguments) else None


def dim_of(node: fx.Node, place: int, default: int | None) -> Argument:
    """Return the argument ``dim`` of a call, by name or by place."""
    given = node.kwargs.get("dim", node.kwargs.get("axis", default))
    return node.args[place] if len(node.args) > place else given


def reorders(node: fx.Node, source: fx.Node, cases: Cases) -> bool:
    """Tell whether a call may give the cases of what it reads first another order.

    Args:
        node: the call.
        source: what it reads.
        cases: where the cases of that are.
    """
    if name_of(node) in ITEMS:
        return _by_numbers(node, cases)
    return name_of(node) in _PLACES and _along(node, source, cases, _PLACES)


def repeats(node: fx.Node) -> bool:
    """Tell whether a call that gives rows another order may take one twice, or leave one out."""
    if name_of(node) == "index_select":
        return not _is_order(node.args[2] if len(node.args) > 2 else node.kwargs.get("index"))
    return name_of(node) in {"topk", *ITEMS}


def _is_order(index: Argument) -> bool:
    """Tell whether an index surely holds every row once: sorting gives it, or it is an inverse.

    Sequences are packed, and put back, by such an index and its inverse.
    """
    if not isinstance(index, fx.Node) or not index.all_input_nodes:
        return False
    name, sources = name_of(index), index.all_input_nodes
    if name in ("to", "_to_copy", "long"):
        return _is_order(sources[0])
    if name in ("scatter", "scatter_"):
        numbers_in_order = any(name_of(source) == "arange" for source in sources)
        return numbers_in_order and any(_is_order(source) for source in sources)
    return name == "argsort" or (
        name == "getitem" and index.args[1:] == (1,) and name_of(sources[0]) == "sort"
    )


def mixed_later(graph: fx.Graph, found: Mapping[fx.Node, Cases]) -> set[fx.Node]:
    """Return the nodes from which a call is computed whose entries are of several cases.

    Args:
        graph: a graph.
        found: where the cases of its nodes are.
    """
    before: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node in before or _mixes(node, found):
            before.update(node.all_input_nodes)
    return before


def _mixes(node: fx.Node, found: Mapping[fx.Node, Cases]) -> bool:
    """Tell whether an entry of a call's value is made of several cases, or is that of another."""
    read = _read(node, found)
    if read is None or name_of(node) not in MIXERS:
        return False
    source, cases = read
    return _may_have_derivative(source) and _along(node, source, cases, MIXERS)


def _read(node: fx.Node, found: Mapping[fx.Node, Cases]) -> tuple[fx.Node, Cases] | None:
    """Return what a call reads first, and where its cases are; None where that is not known."""
    source = next(iter(node.all_input_nodes), None)
    return None if source is None or source not in found else (source, found[source])


def _may_have_derivative(node: fx.Node) -> bool:
    """Tell whether a value may have one: numbers of experts that are sorted, say, have none."""
    value = node.meta.get("val")
    dtype = value.dtype if isinstance(value, torch.Tensor) else node.meta.get(DTYPE)
    return not isinstance(dtype, torch.dtype) or dtype.is_floating_point or dtype.is_complex


def shuffled(graph: fx.Graph, found: Mapping[fx.Node, Cases]) -> set[fx.Node]:
    """Return the calls after which row n surely is not, or may not be, of the case of row n before.

    Args:
        graph: a graph.
        found: where the cases of its nodes are.
    """
    result: set[fx.Node] = set()
    for node in graph.nodes:
        read = _read(node, found)
        # Batches one after the other have no cases that could be found.
        apart = name_of(node) in _COPIES and node not in found
        if read is not None and (apart or reorders(node, *read)):
            result.add(node)
    return result


def may_shuffle(graph: fx.Graph) -> bool:
    """Tell whether a graph has any call that ``shuffled`` could name."""
    return any(name_of(node) in ORDERING | ITEMS | _COPIES for node in graph.nodes)


def _by_numbers(node: fx.Node, cases: Cases) -> bool:
    """Tell whether an index chooses cases by a tensor."""
    index = node.args[1] if len(node.args) > 1 else None
    entries = tuple(index) if isinstance(index, (list, tuple)) else (index,)
    place = cases.dim
    for at, entry in enumerate(entries):
        if entry is Ellipsis:
            return False
        if at >= place:
            return isinstance(entry, fx.Node)
        place += entry is None
    return False


def _along(node: fx.Node, source: fx.Node, cases: Cases, places: Mapping[str, int]) -> bool:
    """Tell whether a call works along the dimension that counts the cases.

    Args:
        node: the call.
        source: what it works on.
        cases: where the cases of that are.
        places: where the dimension is among the arguments, by the name of the call.
    """
    name = name_of(node)
    if name in _FROM_THE_LEFT:
        return not cases.dim
    given = node.kwargs.get("dims", dim_of(node, places[name], -1 if name in _LAST else None))
    if name == "flip" and "dims" not in node.kwargs:
        given = node.args[1:]
    if not isinstance(given, (int, list, tuple)) or given == ():
        return name == "roll"  # of all entries, as they lie in memory
    dims = numbers(given if isinstance(given, tuple) else (given,)) or []
    rank = len(shape_of(source))
    return cases.dim in [dim % rank if rank else dim for dim in dims]
