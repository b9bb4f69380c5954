"""A_ij of two uses: the inputs of both on their common grid, by the cheapest way.

Averages of patches are patches of averages, and equal grids of two stride-1 convolutions need no
patches at all. The homogeneous coordinate is never stored: its row and column of A_ij are sums of
the other side's inputs. docs/explanation/mathematics.md, section 7.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from kfac_fx.ops.alignment import Common, by_case, pooled
from kfac_fx.ops.autocorrelation import cross_patch_gram, is_cheaper_crossed, suits
from kfac_fx.ops.sides import Side


class Input(NamedTuple):
    """The input of a use, and how it is laid on the grid.

    Attributes:
        side: reads the use.
        x: its input.
        positions: (cases, *positions) of the use's output.
        parts: its positions as they are pooled, see ``Common``.
    """

    side: Side
    x: Tensor
    positions: tuple[int, ...]
    parts: tuple[int, ...]


def cross_input(earlier: Input, later: Input, common: Common, one: float) -> Tensor:
    """Return A_ij, the sum over the grid of abar_i abar_j^T / sqrt(N_i N_j).

    Args:
        earlier: the use i.
        later: the use j.
        common: the grid of both.
        one: the homogeneous coordinate.

    Returns:
        [d_i (+ 1), d_j (+ 1)], with one more for a side that has a bias.
    """
    uses, biases = (earlier, later), (earlier.side.options.bias, later.side.options.bias)
    product, rows = _without_patches(earlier, later, common), None
    if product is None:
        rows = [_rows(use, common) for use in uses]
        product = rows[0].flatten(0, -2).mT @ rows[1].flatten(0, -2)
    total = F.pad(product, (0, biases[1], 0, biases[0]))
    weights = [_ones(use, common) for use in uses] if any(biases) else []
    for at, use in enumerate(uses):
        if not biases[1 - at]:
            continue
        if rows is None:
            sums = use.side.inputs(use.x.sum(0, keepdim=True), use.positions)[0]
        else:
            sums = rows[at].sum(0).reshape(-1, rows[at].shape[-1])
        line = total[:, -1] if at == 0 else total[-1]
        line[: sums.shape[-1]] = (sums * weights[1 - at].unsqueeze(-1)).sum(0) * one
    if all(biases):
        total[-1, -1] = (weights[0] * weights[1]).sum() * (one**2 * common.cases)
    cases: float = (earlier.positions[0] * later.positions[0]) ** 0.5
    return total / cases


def _ones(use: Input, common: Common) -> Tensor:
    """Return the constant one of a case, pooled: [positions of the grid].

    Uneven cells have different norms, so it is not the same number everywhere.
    """
    return pooled(use.x.new_ones(1, *use.parts, 1), common.grid).flatten()


def _rows(use: Input, common: Common) -> Tensor:
    """Return the inputs on the grid, [cases, *grid, d]; reduce: the mean over positions."""
    side = use.side
    if not side.options.reduce and use.positions[0] == common.cases:
        grid = common.grid
        if len(grid) < len(use.positions) - 1 and grid == (1,):
            grid = (1,) * (len(use.positions) - 1)
        if len(grid) == len(use.positions) - 1:
            found = side.pooled_inputs(use.x, use.positions, grid)
            if found is not None:
                return found.reshape(common.cases, *common.grid, -1)
    rows = side.inputs(use.x, use.positions)
    rows = rows.mean(1) if side.options.reduce else rows
    return pooled(by_case(rows, common.cases, use.parts, side.interleaved), common.grid)


def _without_patches(earlier: Input, later: Input, common: Common) -> Tensor | None:
    """Return the sum over an equal grid of p_i p_j^T where patches cost more, else None."""
    axes = [
        each.side.axes(each.x) if each.positions == (common.cases, *common.grid) else None
        for each in (earlier, later)
    ]
    if axes[0] is None or axes[1] is None or not suits(earlier.x):
        return None
    if not is_cheaper_crossed(earlier.x, axes[0], later.x, axes[1]):
        return None
    return cross_patch_gram(earlier.x, axes[0], later.x, axes[1])
