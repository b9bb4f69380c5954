"""The steps of a recurrent layer: of sequences of one length, and of a packed batch.

A packed batch (``torch.nn.utils.rnn.PackedSequence``) holds rows without padding, step by step: the
rows of step t are those of its first ``sizes[t]`` cases, longest first. So a row's case is known,
although no dimension counts the cases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kfac_fx.ops.columns import Along
from kfac_fx.ops.gram import Statistic
from kfac_fx.ops.kronecker import LinearStatistics, ShiftStatistics


class TimeSteps(Protocol):
    """Says how the tensors of a layer hold its steps."""

    @property
    def sizes(self) -> Sequence[int]:
        """The number of cases at each step, never growing."""

    def seen(self, x: Tensor) -> Tensor:
        """Return a layer's input as its taps see it."""

    def split(self, y: Tensor) -> Sequence[Tensor]:
        """Return the steps, [cases, d] each, of what a tap stands on."""

    def joined(self, steps: Sequence[Tensor]) -> Tensor:
        """Return steps as taps see them; undoes ``split``."""

    def outputs(self, steps: Sequence[Tensor]) -> Tensor:
        """Return steps as the input of the next layer."""


@dataclass(frozen=True)
class PaddedSteps:
    """Steps of [T, N, d]; taps see [N, T, d], cases first.

    Attributes:
        sizes: N, T times.
    """

    sizes: Sequence[int]

    def seen(self, x: Tensor) -> Tensor:
        """Return [N, T, d]."""
        return x.transpose(0, 1)

    def split(self, y: Tensor) -> Sequence[Tensor]:
        """Return the steps of [N, T, d]."""
        return y.unbind(1)

    def joined(self, steps: Sequence[Tensor]) -> Tensor:
        """Return [N, T, d]."""
        return torch.stack(list(steps), 1)

    def outputs(self, steps: Sequence[Tensor]) -> Tensor:
        """Return [T, N, d]."""
        return torch.stack(list(steps))


@dataclass(frozen=True)
class PackedSteps:
    """Steps of the rows of a packed batch, [sum of sizes, d].

    Attributes:
        sizes: the number of cases at each step.
    """

    sizes: tuple[int, ...]

    def seen(self, x: Tensor) -> Tensor:
        """Return the rows as they are."""
        return x

    def split(self, y: Tensor) -> Sequence[Tensor]:
        """Return the rows of each step."""
        return torch.split(y, list(self.sizes))

    def joined(self, steps: Sequence[Tensor]) -> Tensor:
        """Return the rows of all steps."""
        return torch.cat(list(steps))

    def outputs(self, steps: Sequence[Tensor]) -> Tensor:
        """Return the rows of all steps."""
        return torch.cat(list(steps))


def by_case(rows: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return rows of a packed batch case by case, with zeros after a case's last step.

    Args:
        rows: [..., sum of sizes, d].
        sizes: the number of cases at each step.

    Returns:
        [..., N, T, d].
    """
    cases, steps = sizes[0], len(sizes)
    # The row of case n at step t goes to n T + t. Every place has one row, so the copy is the same
    # in every run, which a sum at repeated places would not be on a GPU.
    places = [
        torch.arange(t, size * steps + t, steps, device=rows.device) for t, size in enumerate(sizes)
    ]
    zeros = rows.new_zeros(*rows.shape[:-2], cases * steps, rows.shape[-1])
    copied = zeros.index_copy(-2, torch.cat(places), rows)
    return copied.reshape(*rows.shape[:-2], cases, steps, rows.shape[-1])


def lengths_of(sizes: Sequence[int]) -> list[int]:
    """Return the number of steps of each case of a packed batch."""
    ends = [size - after for size, after in zip(sizes, (*sizes[1:], 0), strict=True)]
    # The shortest cases are the last ones: those that end at step t follow those that end later.
    return [t for t, count in reversed(list(enumerate(ends, 1))) for _ in range(count)]


@dataclass(frozen=True)
class PackedLinearStatistics(LinearStatistics):
    """(A, G) of a dense use whose rows are those of a packed batch.

    Where cases have different lengths S_n, the positions of a case are their mean S: A = sum of
    abar abar^T over all rows / N and G = sum of g g^T over all rows / S, so that A (x) G counts
    every row once, and none of padding. docs/explanation/mathematics.md, section 4, "sequences of
    several lengths".

    Attributes:
        sizes: the number of cases at each step.
    """

    sizes: tuple[int, ...] = ()

    @property
    def mean_length(self) -> float:
        """Return S, the mean number of steps of a case."""
        return sum(self.sizes) / self.sizes[0]

    def inputs(self, g: Tensor, tensors: Sequence[Tensor | None], dtype: torch.dtype) -> Statistic:
        """Return A."""
        x = tensors[0]
        assert x is not None
        if not self.options.reduce:
            # The rows alone are so many cases of one position each, and their A is divided by them.
            return super().inputs(g, tensors, dtype) * self.mean_length
        # What follows takes the mean over T steps, zeros among them: a case's own is over its S_n.
        lengths = torch.tensor(lengths_of(self.sizes), dtype=dtype, device=x.device)
        means = by_case(x.to(dtype), self.sizes).sum(1) / lengths.unsqueeze(1)
        return super().inputs(g, [means], dtype)

    def gradients(
        self, g: Tensor, tensors: Sequence[Tensor | None], dtype: torch.dtype, *, divide: bool
    ) -> Statistic:
        """Return G over the features of the output."""
        return self._divided(super().gradients(self._rows(g), tensors, dtype, divide=False), divide)

    def column_gradients(
        self, g: Tensor, tensors: Sequence[Tensor | None], dtype: torch.dtype, *, divide: bool
    ) -> Statistic:
        """Return G summed over columns, over the features of the output."""
        G = super().column_gradients(self._rows(g), tensors, dtype, divide=False)
        return self._divided(G, divide)

    def of_outputs(self, shape: Sequence[int], along: Along, *, divide: bool) -> Tensor | None:
        """Return None: no product inside of a recurrent layer is the outputs."""
        return None

    def positions(self, g: Tensor, tensors: Sequence[Tensor | None]) -> float:
        """Return S, or 1 where positions are reduced."""
        return 1 if self.options.reduce else self.mean_length

    def _rows(self, g: Tensor) -> Tensor:
        """Return derivatives by case where they are summed over a case's steps, else as rows."""
        return by_case(g, self.sizes) if self.options.reduce else g

    def _divided(self, G: Statistic, divide: bool) -> Statistic:
        return G * (1 / self.mean_length) if divide and not self.options.reduce else G


@dataclass(frozen=True)
class PackedShiftStatistics(ShiftStatistics):
    """(C,) of a bias alone whose outputs are the rows of a packed batch, summed case by case.

    Attributes:
        sizes: the number of cases at each step.
    """

    sizes: tuple[int, ...] = ()

    def __call__(
        self,
        g: Tensor,
        tensors: Sequence[Tensor | None],
        wanted: Sequence[bool],
        dtype: torch.dtype,
    ) -> list[Statistic | None]:
        """Return (C,); see ``kfac_fx.ops.columns.Statistics``."""
        return super().__call__(by_case(g, self.sizes), tensors, wanted, dtype)

    def columns(
        self,
        g: Tensor,
        tensors: Sequence[Tensor | None],
        wanted: Sequence[bool],
        dtype: torch.dtype,
    ) -> list[Statistic | None]:
        """Return C summed over columns; see ``kfac_fx.ops.columns.ColumnStatistics``."""
        return super().columns(by_case(g, self.sizes), tensors, wanted, dtype)
