"""Statistics of a scale and a shift: the covariance of their per-case gradients.

y = gamma * xhat + beta, so the gradients of a case are the sums over its positions of g * xhat
and of g. The normalised input xhat is formed again in the backward rather than kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_fx.ops.positions import case_covariance, case_rows
from kfac_fx.ops.rows import Statistic
from kfac_fx.ops.tap import define, recording, tapped


def normalised(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    family: str,
    shape: Sequence[int],
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    """xhat, what the layer would return with a scale of one and no shift; by parts, if it pays.

    Args:
        family: "batch", "layer", "group", "instance" or "rms".
        shape: the normalised shape, or the number of groups.
        training: statistics of the batch (instance) rather than the running ones.

    Returns:
        u and c [C] with xhat = c u, c for each channel; None for c = 1.
    """
    if family == "layer":
        return F.layer_norm(x, list(shape), eps=eps), None
    if family == "rms":
        return F.rms_norm(x, list(shape), eps=eps if eps >= 0 else None), None
    if family == "group":
        return F.group_norm(x, shape[0], eps=eps), None
    if family == "instance" and training:
        return F.instance_norm(x, eps=eps), None
    lines = x.reshape(*x.shape[:2], -1)
    if training:
        mean = lines.mean(-1).mean(0)
    assert mean is not None
    centred = lines - mean.unsqueeze(-1)
    if training:  # by the norm of what is centred: quicker than the kernels of batch_norm
        squares = torch.linalg.vector_norm(centred, dim=-1).square()
        # Traced by torch 2.11, the norm keeps a dimension of length one.
        var = squares.reshape(lines.shape[:2]).mean(0) / lines.shape[-1]
    assert var is not None
    return centred.reshape(x.shape), torch.rsqrt(var + eps)


@dataclass(frozen=True)
class ScaleShiftStatistics:
    """(C,): the summed outer product of per-case gradients of (scale, shift)."""

    dim: int
    family: str
    shape: Sequence[int]
    channels: Sequence[int]
    training: bool
    eps: float
    scale: bool
    shift: bool

    def __call__(
        self,
        g: Tensor,
        tensors: Sequence[Tensor | None],
        wanted: Sequence[bool],
        dtype: torch.dtype,
    ) -> list[Statistic | None]:
        x, mean, var = tensors
        g = g.to(dtype)
        gradients = []
        if self.scale:
            assert x is not None
            mean, var = (None if t is None else t.to(dtype) for t in (mean, var))
            u, scale = normalised(
                x.to(dtype), mean, var, self.family, self.shape, self.training, self.eps
            )
            sums = case_rows(g * u, self.channels).sum(1)
            gradients.append(sums if scale is None else sums * scale)
        if self.shift:
            gradients.append(case_rows(g, self.channels).sum(1))
        return [case_covariance(torch.stack(gradients, 1), self.dim)]


def _tap(
    y: Tensor,
    x: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    C: Tensor,
    family: str,
    shape: list[int],
    channels: list[int],
    training: bool,
    eps: float,
    scale: bool,
    shift: bool,
) -> Tensor:
    if not recording([C]):
        return y
    statistics = ScaleShiftStatistics(C.dim(), family, shape, channels, training, eps, scale, shift)
    # In-place updates of running statistics must not invalidate what the backward reads.
    moments = [None, None] if training else [mean, var]
    return tapped(y, statistics, [x if scale else None, *moments], [C])


define(
    "scale_shift(Tensor y, Tensor? x, Tensor? mean, Tensor? var, Tensor C, str family, "
    "int[] shape, int[] channels, bool training, float eps, bool scale, bool shift) -> Tensor",
    _tap,
)
