"""Scale and shift of a normalisation layer: the full covariance of their per-case gradients."""

from __future__ import annotations

from typing import Any

from kfac_fx.capture.dialect import Call
from kfac_fx.ir.use import ParameterUse, Tap
from kfac_fx.passes.rules.base import (
    ROWS_AS_CASES,
    Answer,
    Refusal,
    Site,
    covariance_factor,
    joined,
    node_ref,
    plain,
    shift_use,
    too_large,
)


class NormalizationRule:
    """Batch, layer, group, instance and RMS normalisation."""

    kind = "normalization"
    operations = frozenset({"batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"})

    def match(self, call: Call, site: Site) -> Answer:
        weight, bias = site.parameter(call.get("weight")), site.parameter(call.get("bias"))
        held = [p for p in (weight, bias) if p is not None]
        if not held:
            return None
        if not all(plain(p.layout) for p in held):
            return Refusal(f"{call.operation}: scale or shift is reshaped on its way")
        shape = self._shape(call)
        if shape is None:
            return Refusal(f"{call.operation}: the normalised shape is computed at run time")
        size = held[0].layout.shape
        channels: tuple[int, ...] = (1,)
        if call.operation in ("layer_norm", "rms_norm"):
            channels = tuple(range(-len(size), 0))
        if weight is None and bias is not None:
            return shift_use(call, site, bias, channels)
        dim = 1
        for entry in size:
            dim *= entry
        factor, approximation = covariance_factor(dim, len(held))
        return ParameterUse(
            kind=self.kind,
            node=call.node.name,
            parameters=tuple(p.name for p in held),
            layouts=tuple(p.layout for p in held),
            factors=(factor,),
            approximation=approximation,
            tap=Tap(
                "scale_shift",
                call.node.name,
                self._tensors(call),
                self._options(call, shape, channels, shift=bias is not None),
            ),
            path=(*held[0].path, call.operation),
            # 2x2 blocks are what a large layer gets by design, a diagonal is not.
            reason=joined(
                too_large(dim) if len(factor.shape) == 1 else None,
                None if site.view.is_per_case(call.get("input")) else ROWS_AS_CASES,
            ),
        )

    @staticmethod
    def _shape(call: Call) -> tuple[int, ...] | None:
        shape = call.get("normalized_shape", call.get("num_groups", ()))
        shape = (shape,) if isinstance(shape, int) else shape
        if not isinstance(shape, (list, tuple)) or not all(isinstance(s, int) for s in shape):
            return None
        return tuple(shape)

    @staticmethod
    def _tensors(call: Call) -> tuple[Any, ...]:
        names = ("input", "running_mean", "running_var")
        return tuple(node_ref(call.get(name)) for name in names)

    @staticmethod
    def _options(
        call: Call, shape: tuple[int, ...], channels: tuple[int, ...], *, shift: bool
    ) -> tuple[Any, ...]:
        family = call.operation.removesuffix("_norm")
        # instance_norm looks at its input unless told otherwise, batch_norm does not.
        training = node_ref(call.get("training", family == "instance"))
        eps = call.get("eps")
        if eps is None:
            eps = -1.0 if family == "rms" else 1e-5
        return family, shape, channels, training, float(eps), True, shift
