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

from kfac_fx.ops.gram import Statistic
from kfac_fx.ops.modes import functional
from kfac_fx.ops.parts import case_parts
from kfac_fx.ops.positions import case_covariance, case_rows
from kfac_fx.ops.tap import define, recording, tapped


def _within_cases(x: Tensor, family: str, shape: Sequence[int], eps: float) -> Tensor:
    """xhat of a norm that looks at each case alone: with a scale of one and no shift."""
    if family == "layer":
        return F.layer_norm(x, list(shape), eps=eps)
    if family == "rms":
        return F.rms_norm(x, list(shape), eps=eps if eps >= 0 else None)
    if family == "group":
        return F.group_norm(x, shape[0], eps=eps)
    return F.instance_norm(x, eps=eps)


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
        x, *moments = tensors
        gradients = []
        if self.scale:
            assert x is not None
            running = self.family == "instance" and not self.training
            if running or self.family == "batch":
                gradients.append(self._by_channels(g, x, *moments, dtype=dtype))
            else:
                gradients.append(self._by_cases(g, x, dtype))
        if self.shift:
            gradients.append(self._sums(g, dtype))
        return [case_covariance(torch.stack(gradients, 1), self.dim)]

    def _by_cases(self, g: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[N, C]: sums over positions of g * xhat."""
        one_case = 0 in [dim % x.dim() for dim in self.channels]  # the first dimension is a feature
        found = []
        for by, some in [(g, x)] if one_case else case_parts(g, x):
            u = _within_cases(some.to(dtype), self.family, self.shape, self.eps)
            found.append(self._sums(_times(u, by), dtype))
        return torch.cat(found)

    def _by_channels(
        self, g: Tensor, x: Tensor, mean: Tensor | None, var: Tensor | None, *, dtype: torch.dtype
    ) -> Tensor:
        """The same of a norm by moments of whole channels; in training, of the batch's."""
        if self.training:
            means = [_lines(some).mean(-1, dtype=dtype) for _, some in case_parts(g, x)]
            mean = torch.cat(means).mean(0)
        assert mean is not None
        sums, squares = [], []
        for by, some in case_parts(g, x):
            centred = _lines(some).to(dtype) - mean.to(dtype).unsqueeze(-1)
            if self.training:  # by the norm: quicker than the kernels of batch_norm
                squared = torch.linalg.vector_norm(centred, dim=-1).square() / centred.shape[-1]
                # Traced by torch 2.11, it keeps a dimension of length one.
                squares.append(squared.reshape(some.shape[:2]))
            sums.append(self._sums(_times(centred.reshape(some.shape), by), dtype))
        if self.training:
            var = torch.cat(squares).mean(0)
        assert var is not None
        return torch.cat(sums) * torch.rsqrt(var.to(dtype) + self.eps)

    def _sums(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """[N, C]: over positions."""
        return case_rows(t, self.channels).sum(1, dtype=dtype)


def _lines(x: Tensor) -> Tensor:
    """[N, C, positions]."""
    return x.reshape(*x.shape[:2], -1)


def _times(own: Tensor, other: Tensor) -> Tensor:
    """The product, in the memory of the first, which nobody else needs, where that may be."""
    other = other.to(own.dtype)
    return own * other if functional(own) or functional(other) else own.mul_(other)


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
