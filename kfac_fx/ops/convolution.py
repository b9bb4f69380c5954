"""Taps of convolutions (KFC, Grosse & Martens 2016): patches in the place of inputs."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from kfac_fx.ops.autocorrelation import is_cheaper, patch_gram, suits
from kfac_fx.ops.columns import Along
from kfac_fx.ops.gram import Statistic, bordered, functional, multiplied
from kfac_fx.ops.kronecker import (
    WHOLE,
    ColumnKroneckerStatistics,
    FactorForm,
    form_of,
    gradient_factor,
    input_factor,
    known_factor,
)
from kfac_fx.ops.library import LIBRARY
from kfac_fx.ops.options import TapOptions
from kfac_fx.ops.patches import Axis, TransposedWindow, Window
from kfac_fx.ops.sides import Side, register_side
from kfac_fx.ops.tap import define_tap, tapped
from kfac_fx.torch_internals.onlookers import traced

AT_ONCE = {"cpu": 2**19, "cuda": 2**28}
"""Entries of patches that are copied at once, where there are many: few stay in a CPU's caches,
many take few launches.
"""

PaddingMode = Literal["zeros", "reflect", "replicate", "circular", "transposed"]
"""What lies around the input; "transposed" says that the call is a transposed convolution."""


@dataclass(frozen=True)
class ConvolutionOptions(TapOptions):
    """Options of a convolution's tap.

    Attributes:
        kernel: taps along each spatial dimension.
        stride: one number a dimension.
        dilation: one number a dimension.
        padding: in the order of ``torch.nn.functional.pad``, low and high side of the last
            dimension first; of a transposed convolution one number a dimension, in their order.
        padding_mode: what lies around the input, or "transposed".
        groups: number of independent convolutions, each with factors of its own.
        bias: whether the block has a bias, and A the homogeneous coordinate.
        reduce: whether positions are reduced rather than expanded.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    padding_mode: PaddingMode
    groups: int
    bias: bool
    reduce: bool

    @functools.cached_property
    def window(self) -> Window | TransposedWindow:
        """Return what an output position reads."""
        if self.padding_mode == "transposed":
            return TransposedWindow(self.kernel, self.stride, self.dilation, self.padding)
        return Window(self.kernel, self.stride, self.dilation, self.padding, self.padding_mode)

    def patches(self, x: Tensor, outputs: Sequence[int]) -> Tensor:
        """Return what each output position reads: [groups, N, S, C / groups * kernel].

        Args:
            x: the input, [N, C, *space].
            outputs: the output's spatial shape, S positions.
        """
        if isinstance(self.window, TransposedWindow):
            return self.window.patches(x, self.groups, outputs)
        return self.window.patches(x, self.groups)


@dataclass(frozen=True)
class ConvolutionStatistics(ColumnKroneckerStatistics):
    """(A, G) of a convolution, with a leading axis for the groups where there are several.

    A = Omega = sum over cases and positions t of p_t p_t^T / N over (homogeneous) patches p_t,
    [C / groups * kernel (+ 1), the same]; G = Gamma = sum over cases and positions of g_t g_t^T / T
    over T output positions. docs/explanation/mathematics.md, section 4, "convolution".

    Attributes:
        options: what the tap was called with.
        A: how A is kept.
        G: how G is kept.
        one: the homogeneous coordinate.
    """

    options: ConvolutionOptions
    A: FactorForm = WHOLE
    G: FactorForm = WHOLE
    one: float = 1.0

    def tangent(self) -> ConvolutionStatistics:
        """Return the statistics of the derivative in a direction, which knows no bias."""
        return replace(self, one=0.0)

    def __call__(
        self,
        g: Tensor,
        tensors: Sequence[Tensor | None],
        wanted: Sequence[bool],
        dtype: torch.dtype,
    ) -> list[Statistic | None]:
        """Return those of both with a batch dimension, which one case may come without."""
        (x,) = tensors
        assert x is not None
        if g.dim() == len(self.options.kernel) + 1:
            g, x = g.unsqueeze(0), x.unsqueeze(0)
        return super().__call__(g, [x], wanted, dtype)

    def column_gradients(
        self, g: Tensor, tensors: Sequence[Tensor | None], dtype: torch.dtype, *, divide: bool
    ) -> Statistic:
        """Return G summed over columns, which are further cases of it."""
        g = g.unsqueeze(1) if g.dim() == len(self.options.kernel) + 2 else g
        return self.gradients(g.flatten(0, 1), tensors, dtype, divide=divide)

    def of_outputs(self, shape: Sequence[int], along: Along, *, divide: bool) -> Tensor | None:
        """Return G from sums that are known; see ``kfac_fx.ops.columns.OutputStatistics``."""
        if self.options.groups > 1:
            return None
        space = len(self.options.kernel)
        divide = divide and not self.options.reduce
        positions = math.prod(shape[len(shape) - space :]) if divide else 1
        dim, reduce = -1 - space, self.options.reduce
        return known_factor(along, shape, dim, reduce=reduce, positions=positions, form=self.G)

    def inputs(self, g: Tensor, tensors: Sequence[Tensor | None], dtype: torch.dtype) -> Statistic:
        """Return A over patches."""
        (x,) = tensors
        assert x is not None
        x, outputs = x.to(dtype), g.shape[2:]
        if traced() and x.device.type == "cpu":
            # A compiler's own loops over patches are no faster, and take minutes to compile.
            operator = torch.ops.kfac_fx.convolution_inputs.default
            options = self.options.to_args()
            found: Tensor = operator(x, list(outputs), *self.A, self.one, *options)
        else:
            found = self.formed(x, outputs)
        return found if self.options.groups > 1 else found.squeeze(0)

    def gradients(
        self, g: Tensor, tensors: Sequence[Tensor | None], dtype: torch.dtype, *, divide: bool
    ) -> Statistic:
        """Return G over output channels, from g [N, C, *space]."""
        groups, reduce = self.options.groups, self.options.reduce
        grouped = g.to(dtype).flatten(2).unflatten(1, (groups, -1))  # [N, groups, C / groups, S]
        channels, positions = grouped.shape[2:]
        if reduce or self.G != WHOLE or positions < channels:
            if reduce:
                grouped = grouped.sum(-1, keepdim=True)
            rows = grouped.permute(1, 2, 0, 3).contiguous().movedim(1, -1)
            total = multiplied(gradient_factor(rows, reduce=reduce, divide=divide, form=self.G))
        else:
            # Long lines of positions: a product for each case costs less than the copy of all
            # cases in one order.
            total = (grouped @ grouped.mT).sum(0)
            total = total / positions if divide else total
        return total if groups > 1 else total.squeeze(0)

    def positions(self, g: Tensor, tensors: Sequence[Tensor | None]) -> float:
        """Return T, or 1 where positions are reduced."""
        return 1 if self.options.reduce else g.shape[2:].numel()

    def formed(self, x: Tensor, outputs: Sequence[int]) -> Tensor:
        """Return A [groups, ...] for these output positions, operator by operator."""
        given = self.options
        axes = given.window.axes(x) if isinstance(given.window, Window) else None
        plain = not given.reduce and self.A == WHOLE and suits(x)
        if axes is None or not plain or not is_cheaper(len(x), axes):
            return self._by_patches(x, outputs)
        # With stride 1 the entries of the Gram matrix of patches are correlations of the input
        # with itself: kernel * kernel of them differ by their lag alone, so most products are
        # formed once rather than kernel times.
        total = patch_gram(x, axes, given.groups)
        if given.bias:
            # Patches are linear in the input: the sum of all patches is the patch of the summed
            # input.
            sums = self.one * given.patches(x.sum(0, keepdim=True), outputs).sum((1, 2))
            total = bordered(total, sums, self.one**2 * len(x) * math.prod(outputs))
        return total / len(x)

    def _by_patches(self, x: Tensor, outputs: Sequence[int]) -> Tensor:
        """Return A by copies of what positions read.

        So many cases at once that their patches stay in a CPU's caches: patches of a whole batch
        are kernel times as large as its input, and would be written to memory and read back.
        """
        given = self.options
        if given.reduce and isinstance(given.window, Window):
            return self._of_rows(given.window.mean_patch(x, given.groups).unsqueeze(-2))
        side, positions = x.shape[1] * math.prod(given.kernel), math.prod(outputs)
        # The products of the parts are added up: that is little work beside many rows alone.
        entries = AT_ONCE.get(x.device.type, AT_ONCE["cuda"])
        at_once = max(entries // (side * positions), 4 * side // positions, 1)
        if functional(x) or at_once >= len(x):
            return self._of_rows(given.patches(x, outputs))
        parts = x.split(at_once)
        wide = torch.promote_types(x.dtype, torch.float32)  # parts are small beside their sum
        found = (
            self._of_rows(given.patches(p, outputs)).to(wide).mul_(len(p) / len(x)) for p in parts
        )
        return functools.reduce(Tensor.add_, found)

    def _of_rows(self, rows: Tensor) -> Tensor:
        """Return A from patches [groups, N, S, d]."""
        given = self.options
        factor = input_factor(rows, bias=given.bias, reduce=given.reduce, form=self.A, one=self.one)
        return multiplied(factor)


@dataclass(frozen=True)
class ConvolutionSide(Side):
    """The rows of a convolution without groups, for couplings: patches are its inputs (KFC).

    Attributes:
        options: those of the tap.
    """

    options: ConvolutionOptions

    def positions(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return (cases, *space) of the output; 1 case where it has no batch dimension."""
        spatial = len(self.options.kernel)
        lead = (1,) if len(shape) == spatial + 1 else (shape[0],)
        return (*lead, *shape[len(shape) - spatial :])

    def inputs(self, x: Tensor, positions: Sequence[int]) -> Tensor:
        """Return the patches."""
        return self.options.patches(self._batched(x), positions[1:]).squeeze(0)

    def _batched(self, x: Tensor) -> Tensor:
        """Return [N, C, *space], where one case may come without its batch dimension."""
        return x.unsqueeze(0) if x.dim() == len(self.options.kernel) + 1 else x

    def axes(self, x: Tensor) -> list[Axis] | None:
        """Return the spatial axes of a batch, where a Gram matrix of patches needs no patches."""
        window = self.options.window
        if self.options.reduce or not isinstance(window, Window):
            return None
        return window.axes(x) if x.dim() == len(window.kernel) + 2 else None

    def pooled_inputs(
        self, x: Tensor, positions: Sequence[int], grid: Sequence[int]
    ) -> Tensor | None:
        """Return ``pooled`` of the patches, [cases, *grid, d], as patches of sums over cells.

        The mean of the patches in a cell is the patch of the input's sums over the cell's offsets,
        read with a larger stride: one copy of patches a cell rather than one a position.

        Returns:
            None where cells are uneven, or the window is that of a transposed convolution.
        """
        window = self.options.window
        pairs = list(zip(positions[1:], grid, strict=True))
        if not isinstance(window, Window) or any(size % cells for size, cells in pairs):
            return None
        each = [size // cells for size, cells in pairs]
        x = window.padded(self._batched(x))
        for axis, count in enumerate(each):
            x = _sums(x, 2 + axis, count, window.stride[axis])
        x = x / math.prod(each) ** 0.5 if math.prod(each) > 1 else x
        stride = [step * count for step, count in zip(window.stride, each, strict=True)]
        coarse = Window(window.kernel, stride, window.dilation, [0] * len(window.padding), "zeros")
        rows: Tensor = coarse.patches(x, 1).squeeze(0).unflatten(1, grid)
        return rows

    def derivatives(self, g: Tensor) -> Tensor:
        """Return the derivative by output positions."""
        return self._batched(g).flatten(2).mT


def _sums(x: Tensor, dim: int, count: int, step: int) -> Tensor:
    """Return at each place the sum of ``count`` entries from there on, ``step`` apart."""
    if count == 1:
        return x
    size = x.shape[dim] - (count - 1) * step
    half = _sums(x, dim, count // 2, step)
    total = half.narrow(dim, 0, size) + half.narrow(dim, count // 2 * step, size)
    return total + x.narrow(dim, (count - 1) * step, size) if count % 2 else total


def _convolution(
    y: Tensor,
    tensors: Sequence[Tensor | None],
    factors: Sequence[Tensor],
    options: ConvolutionOptions,
) -> Tensor:
    grouped = options.groups > 1
    A, G = (form_of(factor, grouped=grouped) for factor in factors[:2])
    return tapped(y, ConvolutionStatistics(options, A, G), tensors, factors)


define_tap("convolution", ConvolutionOptions, _convolution)
# The same of an input that no case has a part in: told apart for those who align cases.
define_tap("table_convolution", ConvolutionOptions, _convolution)

register_side("convolution", ConvolutionOptions, lambda options, _: ConvolutionSide(options))


def _formed(
    x: Tensor, outputs: Sequence[int], diagonal: bool, blocks: int, one: float, *options: object
) -> Tensor:
    """Return A for a compiler: ``ConvolutionStatistics.formed`` as one operator."""
    given = ConvolutionOptions.from_args(options)
    statistics = ConvolutionStatistics(given, FactorForm(diagonal, blocks), one=one)
    return statistics.formed(x, outputs).contiguous()


LIBRARY.define(
    "convolution_inputs(Tensor x, SymInt[] outputs, bool diagonal, int blocks, float one, "
    f"{ConvolutionOptions.schema()}) -> Tensor"
)
LIBRARY.impl("convolution_inputs", _formed, "CPU")
torch.library.register_fake("kfac_fx::convolution_inputs", _formed, lib=LIBRARY)
