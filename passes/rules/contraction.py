"""Contractions with one parameter, by torch.tensordot and torch.inner: dense, as einsum is."""

from __future__ import annotations

from math import prod

import torch

from kfac_fx.capture.dialect import Call
from kfac_fx.passes.rules.base import Answer, Refusal, Site, layer_kind
from kfac_fx.passes.rules.linear import dense_use

aten = torch.ops.aten


@layer_kind(
    {
        torch.tensordot: "tensordot input other dims out",
        aten.tensordot.default: "tensordot input other dims dims_of_other",
        torch.inner: "inner input other",
        "inner": "inner input other",
        aten.inner.default: "inner input other",
    }
)
class ContractionRule:
    """tensordot(x, W, dims) and inner(x, W), with the parameter on either side."""

    kind = "linear"
    operations = frozenset({"tensordot", "inner"})

    def match(self, call: Call, site: Site) -> Answer:
        """Return the dense use of the one operand that is a parameter."""
        operands = (call.get("input"), call.get("other"))
        weights = [site.weight(operand) for operand in operands]
        held = [weight for weight in weights if weight is not None]
        if not held:
            return None
        if len(held) != 1 or call.get("out") is not None:
            return Refusal(f"{call.operation}: not one parameter and one activation")
        weight, right = held[0], weights[1] is not None
        axes = len(weight.layout.shape)
        dims = _contracted(call)
        if dims is None:
            return Refusal(f"{call.operation}: the dimensions that are summed are computed")
        x_dims, w_dims = (dims[0], dims[1]) if right else (dims[1], dims[0])
        inputs = [dim % axes for dim in w_dims]
        outputs = [dim for dim in range(axes) if dim not in inputs]
        if not inputs or not outputs:
            return Refusal(f"{call.operation}: it leaves the matrix without a side")
        sizes = weight.layout.shape
        shape = tuple(prod(sizes[dim] for dim in some) for some in (outputs, inputs))
        matrix = weight.layout.permute(*outputs, *inputs).reshape(shape)
        # The result has what is left of the first operand, then what is left of the second.
        count = len(outputs)
        y_dims = tuple(range(-count, 0)) if right else tuple(range(count))
        return dense_use(call, site, operands[not right], weight, matrix, (tuple(x_dims), y_dims))


def _contracted(call: Call) -> tuple[list[int], list[int]] | None:
    """Return the dimensions of both operands that are summed over, in the order of each other.

    None where they are computed.
    """
    if call.operation == "inner":
        return [-1], [-1]
    dims, others = call.get("dims", 2), call.get("dims_of_other")
    if isinstance(dims, int) and not isinstance(dims, bool):
        # The last ones of the first operand, the first ones of the second.
        return list(range(-dims, 0)), list(range(dims))
    if others is None:
        if not isinstance(dims, (list, tuple)) or len(dims) != 2:
            return None
        dims, others = dims
    found = []
    for one in (dims, others):
        one = [one] if isinstance(one, int) else one
        if not isinstance(one, (list, tuple)) or any(type(dim) is not int for dim in one):
            return None
        found.append(list(one))
    return found[0], found[1]
