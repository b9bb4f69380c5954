"""A network whose factors are above ``max_factor_dim``, and its sub-blocks as whole matrices."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Sides of the head below are 6 + 1 and 9: whole, in equal parts, or filled up.
LIMITS = {3: ((3, 3, 3), (3, 3, 3)), 4: ((2, 4, 4), (3, 3, 3)), 7: ((7, 7), (2, 5, 5))}


def head(bias: bool = True) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 9, bias=bias))


def kept(factor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The part of a whole factor that sub-blocks keep, as a whole matrix."""
    if len(shape) == 2:
        return factor
    mask = torch.block_diag(*torch.ones(shape))[: len(factor), : len(factor)]
    return factor * mask


def joined(blocks: Tensor, side: int) -> Tensor:
    """Sub-blocks as a whole matrix; what fills them up must be zero."""
    whole = torch.block_diag(*blocks) if blocks.dim() == 3 else blocks
    assert not whole[side:].any() and not whole[:, side:].any()
    return whole[:side, :side]
