"""Taps of a scale and a shift: the covariance of their per-case gradients.

y = gamma * xhat + beta, so the gradients of a case are the sums over its positions of g * xhat
and of g. The normalised input xhat is formed again in the backward rather than kept: it is as large
as the activations, and the model's own backward keeps it in another form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_fx.ops.gram import Statistic, functional
from kfac_fx.ops.kronecker import ShiftOptions, ShiftStatistics, case_covariance, case_rows
from kfac_fx.ops.options import Flag, TapOptions
from kfac_fx.ops.parts import case_parts
from kfac_fx.ops.tap import define_tap, tapped

Family = Literal["batch", "layer", "group", "instance", "rms"]
"""What a normalisation takes its moments over."""


@dataclass(frozen=True)
class ScaleShiftOptions(TapOptions):
    """Options of a normalisation layer's tap.

    Attributes:
        family: which normalisation.
        shape: the normalised shape of "layer" and "rms", (groups,) of "group"; else ().
        channels: dimensions of the input that scale and shift are along.
        training: whether moments are those of the batch rather than running ones ("batch",
            "instance"); the name of a flag in a graph whose mode may change.
        eps: added to the variance; -1 stands for the machine epsilon that "rms" takes by itself.
        shift: whether the block has a shift beside its scale.
    """

    family: Family
    shape: tuple[int, ...]
    channels: tuple[int, ...]
    training: Flag
    eps: float
    shift: bool


def _within_cases(x: Tensor, family: str, shape: Sequence[int], eps: float) -> Tensor:
    """Return xhat of a norm that looks at each case alone: with a scale of one and no shift."""
    if family == "layer":
        return F.layer_norm(x, list(shape), eps=eps)
    if family == "rms":
        return F.rms_norm(x, list(shape), eps=eps if eps >= 0 else None)
    if family == "group":
        return F.group_norm(x, shape[0], eps=eps)
    return F.instance_norm(x, eps=eps)


@dataclass(frozen=True)
class ScaleShiftStatistics:
    """(C,): the summed outer product of per-case gradients of (scale, shift).

    C = sum over cases of u u^T, u [2 c] the gradients of a case with respect to scale and shift of
    c channels: [2c, 2c], or c blocks [c, 2, 2]. docs/explanation/mathematics.md, section 4, "scale
    and shift of a normalisation layer".

    Attributes:
        options: what the tap was called with.
        dim: dimensions of C, see ``kfac_fx.ops.kronecker.case_covariance``.
    """

    options: ScaleShiftOptions
    dim: int

    def __call__(
        self,
        g: Tensor,
        tensors: Sequence[Tensor | None],
        wanted: Sequence[bool],
        dtype: torch.dtype,
    ) -> list[Statistic | None]:
        """Return (C,) from the input and running moments; see ``ops.columns.Statistics``."""
        x, mean, var = tensors
        assert x is not None
        if 0 in [dim % x.dim() for dim in self.options.channels]:
            # One case without a batch dimension. torch takes the first dimension for the cases.
            channels = tuple(dim + (dim >= 0) for dim in self.options.channels)
            lifted = replace(self, options=replace(self.options, channels=channels))
            return lifted(g.unsqueeze(0), [x.unsqueeze(0), mean, var], wanted, dtype)
        return [case_covariance(self.of_rows(g, tensors, dtype), self.dim)]

    def of_rows(self, g: Tensor, tensors: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
        """Return the gradients of scale and shift, or of the scale, of each row, [N, K, C]."""
        x, mean, var = tensors
        assert x is not None
        family = self.options.family
        if family == "batch" or (family == "instance" and not self.options.training):
            gradients = [self._by_channels(g, x, mean, var, dtype)]
        else:
            gradients = [self._by_cases(g, x, dtype)]
        if self.options.shift:
            gradients.append(self._sums(g, dtype))
        return torch.stack(gradients, 1)

    def _by_cases(self, g: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the sums over positions of g * xhat, [N, C]."""
        given = self.options
        found = []
        # Some cases at a time: the normalised inputs of a whole batch would be fresh memory of the
        # size of the activations.
        for by, some in case_parts(g, x):
            u = _within_cases(some.to(dtype), given.family, given.shape, given.eps)
            found.append(self._sums(_times(u, by), dtype))
        return torch.cat(found)

    def _by_channels(
        self, g: Tensor, x: Tensor, mean: Tensor | None, var: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """Return the same of a norm by moments of whole channels; in training, of the batch's.

        The channel's deviation is one number for all cases, so it is divided by at the end, which
        saves a pass over the activations.
        """
        training = self.options.training
        if training:
            means = [_lines(some).mean(-1, dtype=dtype) for _, some in case_parts(g, x)]
            mean = torch.cat(means).mean(0)
        assert mean is not None
        sums, squares = [], []
        for by, some in case_parts(g, x):
            centred = _lines(some).to(dtype) - mean.to(dtype).unsqueeze(-1)
            if training:  # by the norm: quicker than the kernels of batch_norm
                squared = torch.linalg.vector_norm(centred, dim=-1).square() / centred.shape[-1]
                # Traced by torch 2.11, it keeps a dimension of length one.
                squares.append(squared.reshape(some.shape[:2]))
            sums.append(self._sums(_times(centred.reshape(some.shape), by), dtype))
        if training:
            var = torch.cat(squares).mean(0)
        assert var is not None
        return torch.cat(sums) * torch.rsqrt(var.to(dtype) + self.options.eps)

    def _sums(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the sums over positions, [N, C]."""
        return case_rows(t, self.options.channels).sum(1, dtype=dtype)


def _lines(x: Tensor) -> Tensor:
    """Return x as [N, C, positions]."""
    return x.reshape(*x.shape[:2], -1)


def _times(own: Tensor, other: Tensor) -> Tensor:
    """Return the product, in the memory of the first, which nobody else needs, where it may be."""
    other = other.to(own.dtype)
    return own * other if functional(own) or functional(other) else own.mul_(other)


def _scale_shift(
    y: Tensor,
    tensors: Sequence[Tensor | None],
    factors: Sequence[Tensor],
    options: ScaleShiftOptions,
) -> Tensor:
    x, mean, var = tensors
    # In-place updates of running statistics must not invalidate what the backward reads.
    moments = [None, None] if options.training else [mean, var]
    return tapped(y, ScaleShiftStatistics(options, factors[0].dim()), [x, *moments], factors)


@dataclass(frozen=True)
class FoldedStatistics:
    """The same where positions are folded into the rows that a norm looks at one by one (frames).

    Attributes:
        norm: the statistics of rows.
    """

    norm: ScaleShiftStatistics

    def __call__(
        self,
        g: Tensor,
        tensors: Sequence[Tensor | None],
        wanted: Sequence[bool],
        dtype: torch.dtype,
    ) -> list[Statistic | None]:
        """Return (C,); the last tensor counts the cases by its first dimension."""
        *own, like = tensors
        assert like is not None
        u = self.norm.of_rows(g, own, dtype)
        cases = like.shape[0]
        if cases and u.shape[0] % cases == 0:
            u = u.reshape(cases, -1, *u.shape[1:]).sum(1)
        return [case_covariance(u, self.norm.dim)]


def _folded_scale_shift(
    y: Tensor,
    tensors: Sequence[Tensor | None],
    factors: Sequence[Tensor],
    options: ScaleShiftOptions,
) -> Tensor:
    x, mean, var, like = tensors
    assert like is not None
    moments = [None, None] if options.training else [mean, var]
    # Only its size is read: a view of no entries keeps nothing of it.
    count = like.detach().new_empty(like.shape[0], 0)
    norm = ScaleShiftStatistics(options, factors[0].dim())
    return tapped(y, FoldedStatistics(norm), [x, *moments, count], factors)


def _shift(
    y: Tensor,
    tensors: Sequence[Tensor | None],
    factors: Sequence[Tensor],
    options: ShiftOptions,
) -> Tensor:
    return tapped(y, ShiftStatistics(options.channels, factors[0].dim()), [], factors)


define_tap(
    "scale_shift",
    ScaleShiftOptions,
    _scale_shift,
    tensors=("x", "mean?", "var?"),
    factors=("C",),
)
define_tap(
    "folded_scale_shift",
    ScaleShiftOptions,
    _folded_scale_shift,
    tensors=("x", "mean?", "var?", "like"),
    factors=("C",),
)
define_tap("shift", ShiftOptions, _shift, tensors=(), factors=("C",))
