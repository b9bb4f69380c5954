"""Views of a parameter: what it may pass through on its way to a use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kfac_fx.capture.dialect import Call
from kfac_fx.ir.layout import Layout

_ATTRIBUTES = {"T": "numpy_T", "mT": "mT"}
_UNKNOWN = (IndexError, KeyError, TypeError, ValueError)  # sizes known only at run time


def seen_through(call: Call, layout: Layout) -> Layout | None:
    """The layout after a view with constant arguments, or None where the call is none."""
    operation = call.operation
    if operation == "attribute":
        operation = _ATTRIBUTES.get(call.get("name"), "")
    view = _VIEWS.get(operation)
    try:
        return None if view is None else view(layout, call.arguments)
    except _UNKNOWN:
        return None


def split_layouts(call: Call, layout: Layout) -> list[Layout] | None:
    """The layouts of the pieces that chunk, split and unbind return."""
    if call.operation not in ("chunk", "split", "unbind"):
        return None
    dim = call.get("dim", 0)
    try:
        size = layout.shape[dim]
        if call.operation == "unbind":
            return [layout.select(dim, index) for index in range(size)]
        if call.operation == "chunk":
            sizes: Any = -(-size // call.arguments["chunks"])
        else:
            sizes = call.get("sizes", call.get("split_size_or_sections"))
        if isinstance(sizes, int):
            sizes = [min(sizes, size - start) for start in range(0, size, sizes)]
        starts = [sum(sizes[:index]) for index in range(len(sizes))]
        return [layout.narrow(dim, start, n) for start, n in zip(starts, sizes, strict=True)]
    except _UNKNOWN:
        return None


def _transpose_matrix(layout: Layout, arguments: dict[str, Any]) -> Layout:
    return layout if len(layout.shape) < 2 else layout.transpose(0, 1)


def _unsqueeze(layout: Layout, arguments: dict[str, Any]) -> Layout:
    shape = list(layout.shape)
    shape.insert(arguments["dim"] % (len(shape) + 1), 1)
    return layout.reshape(shape)


def _squeeze(layout: Layout, arguments: dict[str, Any]) -> Layout:
    shape, dim = layout.shape, arguments.get("dim")
    axes = range(len(shape)) if dim is None else [dim % len(shape)]
    return layout.reshape([s for i, s in enumerate(shape) if i not in axes or s != 1])


def _flatten(layout: Layout, arguments: dict[str, Any]) -> Layout:
    shape = layout.shape
    start = arguments.get("start_dim", 0) % len(shape)
    end = arguments.get("end_dim", -1) % len(shape)
    return layout.reshape((*shape[:start], -1, *shape[end + 1 :]))


def _slice(layout: Layout, dim: int, index: slice) -> Layout:
    if index.step not in (None, 1):
        raise ValueError("a slice with steps is no piece")
    start, stop, _ = index.indices(layout.shape[dim])
    return layout.narrow(dim, start, max(stop - start, 0))


def _getitem(layout: Layout, arguments: dict[str, Any]) -> Layout:
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


def _shifted(layout: Layout, arguments: dict[str, Any]) -> Layout | None:
    """c + p and c - p have the curvature of p."""
    numbers = [v for v in arguments.values() if isinstance(v, (int, float))]
    return layout if len(numbers) == len(arguments) - 1 else None


_VIEWS: dict[str, Callable[[Layout, dict[str, Any]], Layout | None]] = {
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
