"""Bilinear forms: y_o = x1^T W_o x2 is dense in the outer product of x1 and x2."""

from __future__ import annotations

from kfac_fx.capture.dialect import Call
from kfac_fx.ir.use import NodeRef, ParameterUse, Tap
from kfac_fx.passes.rules.base import (
    Answer,
    Refusal,
    Site,
    kronecker_factors,
    shift_use,
    too_wide,
)


class BilinearRule:
    """F.bilinear and nn.Bilinear; weight [out, in1, in2]."""

    kind = "bilinear"
    operations = frozenset({"bilinear"})

    def match(self, call: Call, site: Site) -> Answer:
        weight, bias = site.parameter(call.get("weight")), site.parameter(call.get("bias"))
        if weight is None:
            return None if bias is None else shift_use(call, site, bias, (-1,))
        if len(weight.layout.shape) != 3:
            return Refusal(f"bilinear: the weight is seen as {weight.layout.shape}")
        inputs = (call.get("input"), call.get("other"))
        if not all(site.view.depends_on_data(x) for x in inputs):
            return Refusal("bilinear: an input is no activation")
        outputs, first, second = weight.layout.shape
        extra: list[ParameterUse] = []
        if bias is not None and weight.name in site.alone:
            extra, bias = [shift_use(call, site, bias, (-1,))], None
        layouts = [weight.layout.reshape((outputs, first * second))]
        factors = kronecker_factors(site, first * second, outputs, bias=bias is not None)
        use = ParameterUse(
            kind=self.kind,
            node=call.node.name,
            parameters=(weight.name,) if bias is None else (weight.name, bias.name),
            layouts=tuple(layouts if bias is None else [*layouts, bias.layout]),
            factors=factors,
            approximation="kronecker",
            tap=Tap(
                "bilinear",
                call.node.name,
                tuple(NodeRef(x.name) for x in inputs),
                (bias is not None, site.reduce),
            ),
            path=(*weight.path, call.operation),
            reason=too_wide(site, factors),
        )
        return [use, *extra]
