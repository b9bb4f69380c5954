"""Tell where a call leaves the dimension that counts the cases, from where its inputs have it.

What cannot be told is None: a guess would make statistics those of positions, with no word of it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import torch
from torch import fx, nn

from kfac_fx.capture.dialect import Argument
from kfac_fx.passes.case_order import (
    ORDERING,
    Cases,
    dim_of,
    name_of,
    numbers,
    reorders,
    repeats,
    shape_of,
)

_SWAPS = frozenset({"transpose", "swapaxes", "swapdims"})
_TURNS = frozenset({"permute", "movedim", "moveaxis", "T", "mT", "t", "einsum"})
_REDUCTIONS = frozenset(
    {"mean", "sum", "amax", "amin", "max", "min", "prod", "std", "var", "norm", "logsumexp"}
    | {"argmax", "argmin", "any", "all", "median", "select"}
)
_ROWS = frozenset({"reshape", "view", "flatten", "_unsafe_view"})
_PADDING = frozenset({"pad_packed_sequence", "_pad_packed_sequence"})
_JOINS = frozenset({"cat", "concat", "concatenate", "repeat", "tile", "repeat_interleave"})
_KEPT = frozenset({"narrow", "slice", "split", "chunk", "split_with_sizes", "index_select"})
_BY_DIM = frozenset({"narrow", "slice", "index_select"})
_ITEMS = frozenset({"getitem", "__getitem__"})

_SPLITS = frozenset({"unbind", "expand", "squeeze", "unsqueeze", "unflatten"})

ONE_SOURCE = (_SWAPS | _TURNS | _REDUCTIONS | _ROWS | _KEPT | _ITEMS | ORDERING | _SPLITS) - {
    "einsum"
}
"""Calls that change or choose from their first argument; others only say how."""

_CONTRACTIONS = frozenset({"tensordot", "inner"})
_RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})
_TUPLES = (
    frozenset({"split", "chunk", "split_with_sizes", "tensor_split", "unsafe_chunk", "unbind"})
    | frozenset({"max", "min", "median", "mode", "sort", "topk", "kthvalue", "cummax", "cummin"})
    | frozenset({"var_mean", "std_mean", "aminmax", "multi_head_attention_forward"})
    | _RECURRENT
    | _PADDING
)
"""Calls whose result is a tuple: an entry is none of a tensor's first dimension."""

MOVING = (
    _SWAPS
    | _TURNS
    | _ROWS
    | _JOINS
    | _PADDING
    | _RECURRENT
    | _SPLITS
    | {"stack"}
    | _ITEMS
    | ORDERING
    | _CONTRACTIONS
)
"""Calls after which the cases may be elsewhere, or may not be told from other rows."""


def cases_after(
    node: fx.Node, data: Sequence[fx.Node], found: Mapping[fx.Node, Cases], module: nn.Module
) -> Cases | None:
    """Return where the cases of a call's value are, None where it cannot be told.

    Args:
        node: the call.
        data: the nodes that it reads and whose cases are known.
        found: where those are.
        module: owns the layers that the graph calls.
    """
    first = found[data[0]]
    name = name_of(node)
    arguments = node.args[1:]
    if node.op == "call_module":
        layer = _layer(node, module)
        folds = isinstance(layer, nn.Flatten) and layer.start_dim == 0
        return _in_rows(first, data[0], surely=True) if folds else first
    if name in _ITEMS:
        return _item(data[0], first, node.args[1], module)
    if name in _SWAPS:
        return _swapped(first, arguments, len(shape_of(data[0])))
    if name == "einsum":
        return _contracted(node, found)
    if name in _TURNS:
        return _permuted(first, name, arguments, len(shape_of(data[0])))
    if name in _PADDING:
        return Cases(0)  # of the tuple that it returns
    if name in _RECURRENT:
        return first  # of its outputs; states that it is given have the cases second
    if name in _ROWS:
        return _reshaped(node, first, data[0], found)
    if name in _REDUCTIONS:
        return _reduced(first, node)
    if name in _JOINS:
        return _joined(node, name, data, found)
    if name in _CONTRACTIONS:
        # What is left of the first operand comes first.
        return first if node.args[:1] == (data[0],) and not first.dim else None
    if name == "unbind":
        return _without(first, dim_of(node, 1, 0))
    if name == "expand":
        return _expanded(first, arguments, len(shape_of(data[0])))
    if name == "squeeze":
        return _squeezed(first, arguments, shape_of(data[0]))
    if name == "unflatten":
        return _unflattened(first, arguments, len(shape_of(data[0])), found)
    if name in ("unsqueeze", "stack"):
        dim = arguments[0] if arguments else node.kwargs.get("dim", 0)
        moved = isinstance(dim, int) and 0 <= dim <= first.dim
        return first._replace(dim=first.dim + 1) if moved else first
    if name in ORDERING and reorders(node, data[0], first):
        # Of rows that positions are folded into, those of a case are no longer side by side.
        return None if first.merged or repeats(node) else first
    if name in _KEPT:
        # Some of the rows that positions are folded into are not all of some cases.
        return None if first.merged and not _keeps_rows(node, name) else first
    if len({found[n].dim for n in data}) == 1:
        return next((found[n] for n in data if found[n].merged), first)
    return None


def _keeps_rows(node: fx.Node, name: str) -> bool:
    """Tell whether a call that takes pieces leaves the first dimension whole."""
    if dim_of(node, 1 if name in _BY_DIM else 2, 0) != 0:
        return True
    # Of ``aten.slice``: start, end and step.
    return name == "slice" and node.args[2:] in ((), (0,), (0, sys.maxsize))


def _layer(node: fx.Node, module: nn.Module) -> nn.Module | None:
    return module.get_submodule(str(node.target)) if node.op == "call_module" else None


def _swapped(cases: Cases, arguments: Sequence[Argument], rank: int) -> Cases | None:
    dims = numbers(arguments)
    if dims is None or len(dims) != 2:
        return None
    if rank:
        dims = [dim % rank for dim in dims]
    if min(dims) < 0:
        # From the right: without the number of dimensions, only the first one is surely no part.
        return cases if max(dims) < 0 and not cases.dim else None
    if cases.dim not in dims:
        return cases
    moved = dims[1] if cases.dim == dims[0] else dims[0]
    return None if cases.merged else Cases(moved)


def _permuted(cases: Cases, name: str, arguments: Sequence[Argument], rank: int) -> Cases | None:
    if name in ("T", "t"):
        return Cases(1 - cases.dim) if cases.dim < 2 and not cases.merged else None
    if name == "mT":
        return cases if not cases.dim else None
    if name in ("movedim", "moveaxis"):
        return _moved(cases, arguments, rank)
    dims = numbers(arguments)
    if dims is None:
        return None
    dims = [dim % len(dims) for dim in dims]
    if cases.merged:
        return cases if dims[:1] == [0] else None
    return Cases(dims.index(cases.dim)) if cases.dim in dims else None


def _moved(cases: Cases, arguments: Sequence[Argument], rank: int) -> Cases | None:
    """Return where the cases are after one dimension has moved to another place."""
    dims = numbers(arguments)
    if dims is None or len(dims) != 2:
        return None
    source, target = (dim % rank for dim in dims) if rank else dims
    if min(source, target) < 0 or cases.merged:
        return cases if max(source, target) < 0 and not cases.dim else None
    if source == cases.dim:
        return Cases(target)
    left = cases.dim - (source < cases.dim)
    return Cases(left + (target <= left))


def _contracted(node: fx.Node, found: Mapping[fx.Node, Cases]) -> Cases | None:
    """Return where an einsum leaves the cases: their letter says it."""
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    if not isinstance(equation, str) or "->" not in equation:
        return None
    inputs, _, output = equation.replace(" ", "").partition("->")
    places: set[int] = set()
    for letters, operand in zip(inputs.split(","), operands, strict=False):
        cases = found.get(operand) if isinstance(operand, fx.Node) else None
        if cases is None:
            continue
        before = letters[: cases.dim + 1]
        if cases.merged or len(before) <= cases.dim or "." in before:
            # ``...i,oi->...o`` leaves the dimensions under the dots in their places.
            if letters.startswith("...") and output.startswith("..."):
                return cases
            return None
        places.add(output.find(before[-1]) if "." not in output.split(before[-1])[0] else -1)
    return Cases(places.pop()) if len(places) == 1 and -1 not in places else None


def _in_rows(cases: Cases, source: fx.Node, *, surely: bool) -> Cases | None:
    """Return where the cases are once the first dimension may be folded with others."""
    if cases.dim or cases.inner:
        return None
    return Cases(0, cases.merged or source, surely)


def _reshaped(
    node: fx.Node, cases: Cases, source: fx.Node, found: Mapping[fx.Node, Cases]
) -> Cases | None:
    """Return where a change of shape leaves the cases."""
    if name_of(node) == "flatten":
        start = node.args[1] if len(node.args) > 1 else node.kwargs.get("start_dim", 0)
        if start != 0 and not cases.dim:
            return cases
    before, after = shape_of(source), shape_of(node)
    kept = cases.dim + 1
    if before and after:
        if list(map(str, before[:kept])) == list(map(str, after[:kept])):
            return cases
        if cases.dim == 1 and str(before[0] * before[1]) == str(after[0]):  # type: ignore[operator]
            return Cases(0, source, folded=True, inner=True)
        if cases.inner and cases.merged is not None:
            whole = shape_of(cases.merged)
            return Cases(1) if list(map(str, whole[:2])) == list(map(str, after[:2])) else None
        if _fewer(before[0], after[0]):
            return None  # several cases in a row
    elif _reads_sizes(node.args[1:], cases, found):
        return Cases(cases.dim)
    elif name_of(node) != "flatten" and _first_is_fixed(node.args[1:]):
        return None
    surely = name_of(node) == "flatten" or _is_product(node.args[1:])
    return _in_rows(cases, source, surely=surely)


def _fewer(before: object, after: object) -> bool:
    """Tell whether rows are no multiple of what they were before: not in the example, at least."""
    here, there = (
        size.node.maybe_as_int() or size.node.hint if isinstance(size, torch.SymInt) else size
        for size in (before, after)
    )
    known = isinstance(here, int) and isinstance(there, int)
    return known and here != 0 and there % here != 0  # type: ignore[operator]


def _first_is_fixed(sizes: Sequence[Argument]) -> bool:
    """Tell whether the first size of a new shape is a number, which no batch's is."""
    while sizes and isinstance(sizes[0], (list, tuple)):
        sizes = sizes[0]
    return bool(sizes) and isinstance(sizes[0], int) and sizes[0] != -1


def _is_product(sizes: Sequence[Argument]) -> bool:
    """Tell whether the first size of a new shape is a product, as of cases and positions."""
    while sizes and isinstance(sizes[0], (list, tuple)):
        sizes = sizes[0]
    return bool(sizes) and isinstance(sizes[0], fx.Node) and name_of(sizes[0]) == "mul"


def _reads_sizes(sizes: Sequence[Argument], cases: Cases, found: Mapping[fx.Node, Cases]) -> bool:
    """Tell whether a new shape begins with the sizes, up to that of the cases, of such a value."""
    while len(sizes) == 1 and isinstance(sizes[0], (list, tuple)):
        sizes = sizes[0]
    whole = sizes[0] if len(sizes) == 1 else None
    for dim in range(cases.dim + 1):
        entry = whole if whole is not None else sizes[dim] if dim < len(sizes) else None
        source = _size_of(entry, dim)
        if source is None or found.get(source) != Cases(cases.dim):
            return False
    return True


def _size_of(size: Argument, dim: int) -> fx.Node | None:
    """Return the node whose size at a dimension a value is, or is the entry of; None if another."""
    while isinstance(size, fx.Node):
        name, given = name_of(size), size.args
        if name in ("size", "shape") and isinstance(given[0], fx.Node):
            return given[0] if name == "shape" or given[1:] in ((), (dim,)) else None
        if name == "getitem":
            index = given[1]
            start = index.start in (None, 0) if isinstance(index, slice) else index == dim
            if not start:
                return None
        elif name != "add":  # of the rest of a shape, ``x.shape[:-1] + (heads, -1)``
            return None
        size = given[0]
    return None


def _joined(
    node: fx.Node, name: str, data: Sequence[fx.Node], found: Mapping[fx.Node, Cases]
) -> Cases | None:
    """Return where the cases are in what is put together of several batches, or of copies."""
    first = found[data[0]]
    if name == "repeat_interleave":
        times, dim = _dim_and_times(node)
        if not isinstance(dim, int) or dim != first.dim:
            return first if isinstance(dim, int) and dim >= 0 else None
        return _in_rows(first, data[0], surely=times > 1) if isinstance(times, int) else None
    if name in ("repeat", "tile"):
        times = numbers(node.args[1:]) or []
        return first if len(times) > first.dim and set(times[: first.dim + 1]) == {1} else None
    dim = dim_of(node, 1, 0)
    if len({found[n].dim for n in data}) > 1 or not isinstance(dim, int):
        return None
    rank = len(shape_of(data[0]))
    dim = dim % rank if rank else dim
    # Batches one after the other: two rows of the result may be of one case, or may not.
    return None if dim == first.dim else first


def _dim_and_times(node: fx.Node) -> tuple[Argument, Argument]:
    times = node.args[1] if len(node.args) > 1 else node.kwargs.get("repeats")
    return times, dim_of(node, 2, None)


def _without(cases: Cases, dim: Argument) -> Cases | None:
    """Return where the cases of the pieces are that a dimension falls apart into."""
    if not isinstance(dim, int) or dim == cases.dim:
        return None
    if dim < 0:
        return cases if not cases.dim else None
    return cases._replace(dim=cases.dim - (dim < cases.dim))


def _squeezed(cases: Cases, arguments: Sequence[Argument], sizes: Sequence[object]) -> Cases | None:
    """Return where the cases are after dimensions of length one are gone."""
    dims = numbers(arguments) if arguments else None
    rank = len(sizes)
    if dims is None:
        # All of them: those before the cases can only be told where sizes are known.
        dims = [dim for dim, size in enumerate(sizes) if isinstance(size, int) and size == 1]
        if cases.dim and not rank:
            return None
    dims = [dim % rank for dim in dims] if rank else dims
    if cases.dim and min(dims, default=0) < 0:
        return None
    gone = sum(0 <= dim < cases.dim and (not rank or sizes[dim] == 1) for dim in dims)
    return cases._replace(dim=cases.dim - gone)


def _unflattened(
    cases: Cases, arguments: Sequence[Argument], rank: int, found: Mapping[fx.Node, Cases]
) -> Cases | None:
    """Return where the cases are after one dimension has become several."""
    dim, sizes = (*arguments, None, None)[:2]
    if not isinstance(dim, int) or not isinstance(sizes, (list, tuple)):
        return None
    dim = dim % rank if rank else dim
    if dim < 0:
        return cases if not cases.dim else None
    if dim == cases.dim:
        whole = () if cases.merged is None or cases.inner else shape_of(cases.merged)
        back = bool(whole) and str(whole[0]) == str(sizes[0])
        return Cases(0) if not dim and (back or _reads_sizes(sizes, Cases(0), found)) else None
    return cases._replace(dim=cases.dim + (dim < cases.dim) * (len(sizes) - 1))


def _expanded(cases: Cases, arguments: Sequence[Argument], rank: int) -> Cases | None:
    """Return where the cases are after an expansion; a size that is fixed is no batch's."""
    sizes: Sequence[Argument] = arguments
    if len(arguments) == 1 and isinstance(arguments[0], (list, tuple)):
        sizes = arguments[0]
    place = cases.dim + (len(sizes) - rank if rank else 0)
    if len(sizes) <= place:
        return cases
    fixed = isinstance(sizes[place], int) and sizes[place] != -1
    return None if fixed and not rank else cases._replace(dim=place)


def _item(owner: fx.Node, cases: Cases, index: Argument, module: nn.Module) -> Cases | None:
    """Return where the cases of an entry of a tuple are, or of a part of a tensor."""
    name = name_of(owner)
    if name in _PADDING:
        return Cases(_padded_cases(owner))
    layer = _layer(owner, module)
    # The states of a recurrent layer are [layers, cases, features], whatever its batches are.
    recurrent = isinstance(layer, nn.RNNBase) or name in _RECURRENT
    if recurrent and index != 0:
        return Cases(1)
    if isinstance(layer, nn.MultiheadAttention) and index == 1:
        return Cases(0)
    if isinstance(index, str) or name in _TUPLES or isinstance(layer, nn.RNNBase):
        return cases
    if isinstance(layer, nn.MultiheadAttention) or _is_state(owner, module):
        return cases
    return _indexed(cases, index, tensor=bool(shape_of(owner)))


def _is_state(node: fx.Node, module: nn.Module) -> bool:
    """Tell whether a node is the pair of states of a layer of LSTM cells."""
    source = node.args[0] if name_of(node) in _ITEMS else None
    return isinstance(source, fx.Node) and isinstance(_layer(source, module), nn.LSTM)


def _padded_cases(node: fx.Node) -> int:
    """Return where the cases are in what a call pads: it says so, however they came to it."""
    place = 1 if name_of(node) == "pad_packed_sequence" else 2
    given = node.args[place] if len(node.args) > place else node.kwargs.get("batch_first", False)
    return 0 if given else 1


def _indexed(cases: Cases, index: Argument, *, tensor: bool) -> Cases | None:
    """Return where the cases are after ``x[index]``.

    Args:
        cases: those of x.
        index: the index.
        tensor: whether x is one; what else may be a tuple, whose entries have its cases.
    """
    entries = index if isinstance(index, tuple) else (index,)
    if len(entries) == 1 and isinstance(entries[0], int) and not cases.dim and not tensor:
        return cases
    dim = 0
    moved = 0
    for entry in entries:
        if entry is Ellipsis:
            return Cases(moved + cases.dim - dim, cases.merged) if dim <= cases.dim else None
        if entry is None:
            moved += 1
            continue
        if dim == cases.dim:
            # Some of the rows that positions are folded into are not all of some cases.
            whole = entry == slice(None) or not cases.merged
            return cases._replace(dim=moved) if isinstance(entry, slice) and whole else None
        dim += 1
        moved += not isinstance(entry, int)
    return cases._replace(dim=moved + cases.dim - dim)


def _reduced(cases: Cases, node: fx.Node) -> Cases | None:
    given = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    dims = numbers((given,)) if isinstance(given, int) else numbers((given or (),))
    if not dims or cases.dim in dims:
        return None
    keeps = node.kwargs.get("keepdim", len(node.args) > 2 and node.args[2] is True)
    if keeps:
        return cases
    return cases._replace(dim=cases.dim - sum(0 <= dim < cases.dim for dim in dims))
