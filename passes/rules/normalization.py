"""Scale and shift of a normalisation layer: the full covariance of their per-case gradients."""

from __future__ import annotations

from typing import cast

from kfac_fx.capture.dialect import Call
from kfac_fx.ir.use import Argument, ParameterUse, Tap
from kfac_fx.ops.options import Flag
from kfac_fx.ops.scale_shift import Family, ScaleShiftOptions
from kfac_fx.passes.rules.base import (
    ROWS_AS_CASES,
    Answer,
    Refusal,
    Site,
    covariance_factor,
    joined,
    layer_kind,
    node_ref,
    plain,
    shift_use,
    too_large,
)


@layer_kind()
class NormalizationRule:
    """Batch, layer, group, instance and RMS normalisation."""

    kind = "normalization"
    operations = frozenset({"batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"})

    def match(self, call: Call, site: Site) -> Answer:
        """Return the use of scale and shift, or of whichever there is."""
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
        elif isinstance(counted := call.get("channels"), int):  # of nn.InstanceNorm1d and the like
            channels = (counted,)
        if weight is None and bias is not None:
            return shift_use(call, site, bias, channels)
        # A shape of several dimensions (layer_norm over [C, H, W]) has a scale for each entry.
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
                self._options(call, shape, channels, shift=bias is not None).to_args(),
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
        """Return the normalised shape, or (groups,); None where it is computed."""
        shape = call.get("normalized_shape", call.get("num_groups", ()))
        shape = (shape,) if isinstance(shape, int) else shape
        if not isinstance(shape, (list, tuple)) or not all(isinstance(s, int) for s in shape):
            return None
        return tuple(shape)

    @staticmethod
    def _tensors(call: Call) -> tuple[Argument, ...]:
        """Return what the tap saves to form the normalised input again."""
        return tuple(node_ref(call.get(name)) for name in ("input", "running_mean", "running_var"))

    @staticmethod
    def _options(
        call: Call, shape: tuple[int, ...], channels: tuple[int, ...], *, shift: bool
    ) -> ScaleShiftOptions:
        """Return the tap's options; eps of RMSNorm may be left to the input's precision."""
        family = cast(Family, call.operation.removesuffix("_norm"))
        # instance_norm looks at its input unless told otherwise, batch_norm does not.
        training = cast(Flag, node_ref(call.get("training", family == "instance")))
        eps = call.get("eps")
        if eps is None:
            eps = -1.0 if family == "rms" else 1e-5
        return ScaleShiftOptions(family, shape, channels, training, float(eps), shift)
