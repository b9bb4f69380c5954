"""What a module does with given inputs, and in which words two of them differ."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfac_fx.capture.object_states import SCALARS

TOLERANCE = 1e-4
"""Largest difference, relative to the largest entry; low precisions are allowed more."""

Value = Any
"""An output of the user's model: a tensor, or any nesting of containers and objects."""

Form = Any
"""What stays of an output without the values of its tensors: classes, keys, numbers, dtypes."""

_PLAIN = (*SCALARS, torch.dtype, torch.device)


class Behaviour(NamedTuple):
    """What one run did.

    Attributes:
        form: containers, classes and plain values of the outputs.
        inputs: the same of the inputs after the call.
        tensors: outputs, inputs after the call, and the state of torch's generator, by name.
        gradients: those of a fixed combination of the outputs, of parameters and inputs by name;
            None where autograd refuses or they were not asked for.
    """

    form: Form
    inputs: Form
    tensors: dict[str, Tensor]
    gradients: dict[str, Tensor] | None


class Aftermath(NamedTuple):
    """What the runs left in the model.

    Attributes:
        tensors: parameters and buffers that have other values than before, by name.
        written: attributes that were written and generators that have moved, in words.
    """

    tensors: dict[str, Tensor]
    written: tuple[str, ...]


def form_of(value: Value, depth: int = 0) -> Form:
    """Return an output without the values of its tensors."""
    if isinstance(value, Tensor):
        kind = Tensor if type(value) is torch.nn.Parameter else type(value)
        # What the user's code has written on it; a graph makes a tensor without.
        tags = tuple(getattr(value, "__dict__", ())) if kind is Tensor else ()
        return (kind, value.dtype, value.requires_grad, *tags)
    if isinstance(value, _PLAIN) or depth > 6:
        return type(value), value if value == value else "nan"
    held: list[tuple[Value, Value]] = []
    if isinstance(value, Mapping):
        held += [(key, item) for key, item in value.items()]
    elif isinstance(value, (tuple, list)):
        held += list(enumerate(value))
    held += list(getattr(value, "__dict__", {}).items())
    return type(value), [(key, form_of(item, depth + 1)) for key, item in held]


def difference(got: Behaviour, want: Behaviour) -> str | None:
    """Return the first difference in words, None where there is none.

    Args:
        got: what the capture did.
        want: what the model did.
    """
    if got.tensors.keys() != want.tensors.keys():
        return f"it returns {len(got.tensors)} tensors, the model {len(want.tensors)}"
    found = tensor_difference(got.tensors, want.tensors)
    if found is not None:
        return found
    if got.form != want.form:
        return f"it returns {_shown(got.form)}, the model {_shown(want.form)}"
    # Code may write on what it is given (`x.seen = True`), and an export is made of other tensors.
    if got.inputs != want.inputs:
        return f"it leaves its inputs as {_shown(got.inputs)}, the model as {_shown(want.inputs)}"
    if want.gradients is None:
        return None
    if got.gradients is None:
        return "its backward pass fails, and the model's does not"
    return _gradient_difference(got.gradients, want.gradients)


def tensor_difference(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> str | None:
    """Return the first difference between tensors of the same names, None where there is none."""
    for name, expected in want.items():
        if name not in got:
            return f"{name} is left as it was"
        if got[name].shape != expected.shape:
            return f"the shape of {name} is {got[name].shape}, not {expected.shape}"
        found = _distance(got[name], expected, 0.0)
        if found is not None:
            return f"{name} differs from the model's by {found:.2g} of its size"
    extra = next((name for name in got if name not in want), None)
    return None if extra is None else f"{extra} is changed"


def _gradient_difference(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> str | None:
    # A gradient that is zero up to rounding is compared on the scale of the largest one: relative
    # to its own size, any two such gradients differ.
    largest = max((float(g.abs().max()) for g in want.values() if g.numel()), default=0.0)
    for name in dict.fromkeys((*got, *want)):
        like = want.get(name, got.get(name))
        assert like is not None
        one = got.get(name, torch.zeros_like(like))
        other = want.get(name, torch.zeros_like(like))
        found = _distance(one, other, 1e-2 * largest)
        if found is not None:
            return f"the {name} differs from the model's by {found:.2g} of its size"
    return None


def _plain(tensor: Tensor) -> Tensor:
    """Return the entries of a tensor of any layout, on the CPU."""
    if tensor.is_nested:
        return torch.cat([part.flatten() for part in tensor.unbind()]).cpu()
    if tensor.is_quantized:
        return tensor.dequantize().cpu()
    return tensor.cpu() if tensor.layout is torch.strided else tensor.cpu().to_dense()


def _shown(form: Form) -> str:
    """Return a form in short words."""
    if isinstance(form, tuple) and form and isinstance(form[0], type):
        if issubclass(form[0], Tensor):
            grad = "with" if form[2] else "without"
            tags = "".join(f" and an attribute {name}" for name in form[3:])
            return f"a {form[0].__name__} of {form[1]} {grad} gradients{tags}"
        if isinstance(form[1], list):
            inner = ", ".join(f"{key}: {_shown(item)}" for key, item in form[1][:4])
            return f"a {form[0].__name__} ({inner})"
        return f"{form[1]!r}"
    return repr(form)


def _distance(got: Tensor, want: Tensor, floor: float) -> float | None:
    """Return the largest difference relative to the largest entry, None where it is tolerated.

    Args:
        got: what the capture made.
        want: what the model made.
        floor: the least value to which a difference is relative.
    """
    if not want.numel():
        return None
    if got.layout is not want.layout:
        return math.inf
    tolerance = TOLERANCE
    if want.is_floating_point() or want.is_complex():
        # Eight units in the last place: sums in another order differ by about that.
        tolerance = max(TOLERANCE, 8 * torch.finfo(want.dtype).eps)
    kind = torch.complex128 if want.is_complex() else torch.float64
    got = _plain(got).to(kind)
    want = _plain(want).to(kind)
    equal = (got == want) | (got.isnan() & want.isnan())
    if bool(equal.all()):
        return None
    scale = float(want[want.isfinite()].abs().max()) if bool(want.isfinite().any()) else 0.0
    distance = float((got - want)[~equal].abs().max()) / max(scale, floor, 1e-30)
    return None if distance <= tolerance else distance
