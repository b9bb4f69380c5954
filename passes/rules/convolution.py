"""Convolutions of one to three dimensions with padding, stride, dilation and groups (KFC)."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import fx

from kfac_fx.capture.dialect import Call
from kfac_fx.ir.use import NodeRef, ParameterUse, Tap
from kfac_fx.passes.rules.base import (
    ONE_CASE,
    Answer,
    Refusal,
    Site,
    joined,
    kronecker_factors,
    plain,
    shift_use,
    too_wide,
)
from kfac_fx.passes.rules.derived import apart, through_derivation, weight_of


def spread(value: Any, dims: int) -> tuple[int, ...] | None:
    """One number a spatial dimension, or None where they are not known."""
    values = (value,) if isinstance(value, int) else tuple(value)
    if not all(isinstance(entry, int) for entry in values):
        return None
    return values * dims if len(values) == 1 else values


def _padding(
    value: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Low and high padding in the order of F.pad, the last dimension first."""
    if value == "valid":
        pairs = [(0, 0)] * len(kernel)
    elif value == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        pairs = [(total // 2, total - total // 2) for total in totals]
    else:
        both = spread(value, len(kernel))
        if both is None:
            return None
        pairs = [(entry, entry) for entry in both]
    return tuple(entry for pair in reversed(pairs) for entry in pair)


class ConvolutionRule:
    """F.conv1d to conv3d and their modules; grouped ones get one Kronecker block a group."""

    kind = "convolution"
    operations = frozenset({"conv1d", "conv2d", "conv3d"})

    def match(self, call: Call, site: Site) -> Answer:
        dims = int(call.operation[4])
        weight, bias = weight_of(call.get("weight"), site), site.parameter(call.get("bias"))
        if weight is None:
            return None if bias is None else shift_use(call, site, bias, (1,))
        if not plain(weight.layout):
            return Refusal("convolution: the weight is reshaped or permuted on its way")
        if not isinstance(call.get("input"), fx.Node):
            return Refusal(f"{call.operation}: the input is no tensor of the graph")
        table = not site.view.is_per_case(call.get("input"))
        outputs, channels, *kernel = weight.layout.shape
        stride, dilation = (spread(call.get(name, 1), dims) for name in ("stride", "dilation"))
        groups = call.get("groups", 1)
        if stride is None or dilation is None or not isinstance(groups, int):
            return Refusal("convolution: stride, dilation or groups are computed at run time")
        padding = _padding(call.get("padding", 0), tuple(kernel), dilation)
        if padding is None:
            return Refusal("convolution: the padding is computed at run time")
        sides = (outputs // groups, channels * prod(kernel))
        lead = (groups,) if groups > 1 else ()
        extra: list[ParameterUse] = []
        if bias is not None and apart(weight, site):
            extra, bias = [shift_use(call, site, bias, (1,))], None
        layouts = [weight.layout.reshape((*lead, *sides))]
        if bias is not None:
            layouts.append(bias.layout.reshape((*lead, sides[0])))
        factors = kronecker_factors(site, sides[1], sides[0], bias=bias is not None, lead=lead)
        mode = call.get("padding_mode", "zeros")
        geometry = (tuple(kernel), stride, dilation, padding, mode, groups)
        use = ParameterUse(
            kind=self.kind,
            node=call.node.name,
            parameters=(weight.name,) if bias is None else (weight.name, bias.name),
            layouts=tuple(layouts),
            factors=factors,
            approximation="kronecker",
            tap=Tap(
                "table_convolution" if table else "convolution",
                call.node.name,
                (NodeRef(call.get("input").name),),
                (*geometry, bias is not None, site.reduce),
            ),
            path=(*weight.path, call.operation),
            reason=joined(too_wide(site, factors), ONE_CASE if table else None),
        )
        return [through_derivation(use, weight), *extra]
