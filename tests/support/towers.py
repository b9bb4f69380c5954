"""A network of equal residual branches, for pictures that fold repetition."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Branch(nn.Module):
    """A residual branch of two layers after a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Tower(nn.Module):
    """Equal branches between a stem and a head."""

    def __init__(self, depth: int, width: int = 4) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, width), nn.Linear(width, 2)
        self.branches = nn.ModuleList(Branch(width) for _ in range(depth))
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for branch in self.branches:
            x = branch(x)
        return self.head(x * torch.cumsum(self.gain, 0))
