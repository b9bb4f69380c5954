"""Transposed convolutions: KFC seen from the output side (kfac_fx/ops/convolution.py)."""

from __future__ import annotations

from math import prod

from torch import fx

from kfac_fx.capture.dialect import Call
from kfac_fx.ir.use import NodeRef, ParameterUse, Tap
from kfac_fx.ops.convolution import TRANSPOSED
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
from kfac_fx.passes.rules.convolution import spread
from kfac_fx.passes.rules.derived import apart, through_derivation, weight_of


class TransposedConvolutionRule:
    """F.conv_transpose1d to 3d and their modules; weight [in, out / groups, *kernel]."""

    kind = "transposed_convolution"
    operations = frozenset({"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"})

    def match(self, call: Call, site: Site) -> Answer:
        dims = int(call.operation[-2])
        weight, bias = weight_of(call.get("weight"), site), site.parameter(call.get("bias"))
        if weight is None:
            return None if bias is None else shift_use(call, site, bias, (1,))
        if not plain(weight.layout):
            return Refusal(f"{call.operation}: the weight is reshaped or permuted on its way")
        if not isinstance(call.get("input"), fx.Node):
            return Refusal(f"{call.operation}: the input is no tensor of the graph")
        table = not site.view.is_per_case(call.get("input"))
        channels, outputs, *kernel = weight.layout.shape
        numbers = (call.get("stride", 1), call.get("dilation", 1), call.get("padding", 0))
        stride, dilation, padding = (spread(value, dims) for value in numbers)
        groups = call.get("groups", 1)
        if stride is None or dilation is None or padding is None or not isinstance(groups, int):
            return Refusal(f"{call.operation}: its geometry is computed at run time")
        lead = (groups,) if groups > 1 else ()
        inputs = channels // groups * prod(kernel)
        layout = weight.layout.reshape((groups, channels // groups, outputs, prod(kernel)))
        layouts = [layout.permute(0, 2, 1, 3).reshape((*lead, outputs, inputs))]
        extra: list[ParameterUse] = []
        if bias is not None and apart(weight, site):
            extra, bias = [shift_use(call, site, bias, (1,))], None
        if bias is not None:
            layouts.append(bias.layout.reshape((*lead, outputs)))
        factors = kronecker_factors(site, inputs, outputs, bias=bias is not None, lead=lead)
        geometry = (tuple(kernel), stride, dilation, padding, TRANSPOSED, groups)
        options = (*geometry, bias is not None, site.reduce)
        operator = "table_convolution" if table else "convolution"
        use = ParameterUse(
            kind=self.kind,
            node=call.node.name,
            parameters=(weight.name,) if bias is None else (weight.name, bias.name),
            layouts=tuple(layouts),
            factors=factors,
            approximation="kronecker",
            tap=Tap(operator, call.node.name, (NodeRef(call.get("input").name),), options),
            path=(*weight.path, call.operation),
            reason=joined(too_wide(site, factors), ONE_CASE if table else None),
        )
        return [through_derivation(use, weight), *extra]
