"""Online statistics: epsilon_k = min(1 - 1/k, decay) (curvature.md section 8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kfac_fx.ir import CurvatureBlock


@dataclass
class Entry:
    """A block with its parameters, the buffers that its taps fill, and its running averages.

    Attributes:
        recorded: number of statistics in the averages.
    """

    block: CurvatureBlock
    parameters: tuple[nn.Parameter, ...]
    buffers: tuple[Tensor, ...]
    averages: tuple[Tensor, ...]
    recorded: int = 0

    @classmethod
    def zero(
        cls,
        block: CurvatureBlock,
        parameters: tuple[nn.Parameter, ...],
        buffers: tuple[Tensor, ...],
    ) -> Entry:
        """An entry without statistics, in the parameters' precision but at least float32."""
        like = parameters[0]
        dtype = torch.promote_types(like.dtype, torch.float32)
        averages = (torch.zeros(f.shape, dtype=dtype, device=like.device) for f in block.factors)
        return cls(block, parameters, buffers, tuple(averages))

    def statistics(self, found: Mapping[int, Tensor]) -> list[Tensor] | None:
        """New statistics in the scale of one likelihood term, or None where none came.

        Args:
            found: the same by id of buffer or parameter.
        """
        if not self.block.tapped:
            squares = [found.get(id(p)) for p in self.parameters]
            if any(square is None for square in squares):
                return None
            flat = torch.cat([s.reshape(-1) for s in squares if s is not None])
            return [flat.to(self.averages[0].dtype)]
        new = [found.get(id(buffer)) for buffer in self.buffers]
        if any(value is None for value in new):
            return None
        result = [value for value in new if value is not None]
        # Several uses of one form: their positions are counted together (section 4).
        specs = self.block.factors
        positions = {s.form: v for s, v in zip(specs, result, strict=True) if s.role == "count"}
        return [
            value / positions[spec.form]
            if spec.role == "gradient" and spec.form in positions
            else value
            for spec, value in zip(specs, result, strict=True)
        ]


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no entry is NaN or infinite; one synchronisation for all."""
    tensors = [tensor for tensor in tensors if tensor.numel()]
    if not tensors:
        return True
    norms = torch._foreach_norm(tensors, ord=float("inf"))
    return bool(torch.stack([norm.double() for norm in norms]).isfinite().all())


@torch.no_grad()
def fold(
    entries: Sequence[Entry], new: Sequence[Sequence[Tensor] | None], decay: float
) -> list[Entry]:
    """S <- epsilon S + (1 - epsilon) S_new with epsilon = min(1 - 1/k, decay), k of the block.

    Blocks without a new statistic keep theirs. Returns the blocks that got their first.
    """
    by_weight: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
    first = []
    for entry, statistics in zip(entries, new, strict=True):
        if statistics is None:
            continue
        first += [entry] if entry.recorded == 0 else []
        entry.recorded += 1
        weight = 1 - min(1 - 1 / entry.recorded, decay)
        averages, values = by_weight.setdefault(weight, ([], []))
        averages += entry.averages
        values += statistics
    for weight, (averages, values) in by_weight.items():
        torch._foreach_lerp_(averages, values, weight)
    return first
