"""Views that no table of names knows, recognised by what they do to a tensor without memory.

torch gives one view many names, and new versions give it others: ``weight.T`` is an attribute in
one graph and ``numpy_T`` in the next, ``weight.H`` is ``matrix_H``. A parameter whose path goes
through a name that is in no table would fall to a diagonal. So an operation of torch that reads one
tensor is run on the meta device: if it returns its input's own memory, sizes and strides say which
view it is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from kfac_fx.ir.layout import Layout
from kfac_fx.torch_internals.aliases import is_view_of

# "expand" copies a parameter, and the rules must see where, since that tells over which cases the
# copies' derivatives are summed.
_NEVER = frozenset({"expand", "expand_as", "broadcast_to"})

_OVERLOAD = type(torch.ops.aten.mm.default)
_PACKET = type(torch.ops.aten.mm)


class Views(NamedTuple):
    """The views that one operation returns.

    Attributes:
        layouts: one for each tensor of the result.
        several: whether the result is a tuple, also one of a single tensor.
    """

    layouts: tuple[Layout, ...]
    several: bool


def unnamed_views(node: fx.Node, layout: Layout) -> Views | None:
    """Return what a call makes of a parameter, where it makes views of it and nothing else.

    Args:
        node: a call whose only tensor is the parameter, seen through ``layout``.
        layout: the views from the parameter's shape to what the call reads.

    Returns:
        None where the call is no view, changes its input, needs values, or makes a view that no
        ``Layout`` describes (rows that are steps apart).
    """
    if len(node.all_input_nodes) != 1 or not _is_of_torch(node):
        return None
    root = torch.empty(layout.start, device="meta", requires_grad=True)
    try:
        given = layout.apply(root)
        result = _called(node, given)
    except Exception:  # it needs values, or memory: whatever it says, it is no plain view
        return None
    several = isinstance(result, (tuple, list))
    tensors = tuple(result) if several else (result,)
    # What no longer requires a gradient (detach) is cut off from the parameter. An operation in
    # place returns its input too, and the version tells that it wrote.
    if root._version or not all(isinstance(t, Tensor) and t.requires_grad for t in tensors):
        return None
    layouts = tuple(_layout_of(root, tensor) for tensor in tensors)
    known = tuple(found for found in layouts if found is not None)
    return Views(known, several) if len(known) == len(layouts) else None


def _is_of_torch(node: fx.Node) -> bool:
    """Tell whether a call is one of torch's own: anybody else's may do more than return."""
    target = node.target
    if node.op == "call_method":
        return target not in _NEVER
    if node.op != "call_function":
        return False
    name = getattr(target, "__name__", "")
    if isinstance(target, _PACKET):  # an operator whose overload the arguments choose
        return str(target).startswith("aten.") and name not in _NEVER
    if isinstance(target, _OVERLOAD):
        return target.namespace == "aten" and name.split(".")[0] not in _NEVER
    return target is getattr or (getattr(torch, name, None) is target and name not in _NEVER)


def _called(node: fx.Node, given: Tensor) -> Any:
    """Return what the node's target makes of a tensor, with the node's other arguments."""
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda _: given)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _layout_of(root: Tensor, view: Tensor) -> Layout | None:
    """Return the layout of a view from its sizes and strides; None where it is in other memory.

    A view whose dimensions are put in the order of their strides is the parameter, reshaped, of
    which at most one dimension is cut: where a stride is not the product of what is inside of it.
    """
    if not is_view_of(view, root) or view.dtype != root.dtype or not view.numel():
        return None
    strides = view.stride()
    order = sorted(range(view.dim()), key=lambda dim: (-strides[dim], -view.shape[dim], dim))
    sizes = [view.shape[dim] for dim in order]
    full = list(sizes)
    cut = None
    inside = 1  # the entries inside of the dimension at hand, all of them
    for index in reversed(range(len(order))):
        outer = strides[order[index - 1]] if index else root.numel()
        if sizes[index] * inside != outer:
            if cut is not None or outer % inside:
                return None
            cut = index
            full[index] = outer // inside
        inside = outer
    layout = Layout(tuple(root.shape))
    try:
        layout = layout.reshape(full)
        if cut is not None:
            step = max(strides[order[cut]], 1)
            layout = layout.narrow(cut, view.storage_offset() // step, sizes[cut])
        layout = layout.permute(*(order.index(dim) for dim in range(view.dim())))
        found = layout.apply(root)
    except (RuntimeError, ValueError):
        return None
    # Sizes of 1 have strides that mean nothing, and copies have strides of 0: the layout counts
    # only if it gives the same entries in the same places.
    same = found.storage_offset() == view.storage_offset() and found.shape == view.shape
    return layout if same and _strides(found) == _strides(view) else None


def _strides(tensor: Tensor) -> list[int]:
    return [s for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1]
