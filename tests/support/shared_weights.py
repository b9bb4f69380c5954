"""Networks in which one parameter serves two layers, or three layers share one parameter."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Tied(nn.Module):
    """An embedding whose table is the output head."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4, padding_idx=2)
        self.mid = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=bias)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mid(self.embedding(ids))))


class Packed(nn.Module):
    """Three projections whose weights are slices of one parameter."""

    def __init__(self, split: str) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(12, 4)), nn.Parameter(torch.randn(12))
        self.split = split

    def forward(self, x: Tensor) -> Tensor:
        if self.split == "chunk":
            q, k, v = self.weight.chunk(3)
        else:
            q, k, v = self.weight[:4], self.weight[4:8], self.weight[8:]
        b = self.bias.view(3, 4)
        return F.linear(x, q, b[0]) * F.linear(x, k, b[1]) + F.linear(x, v, b[2])


class Unpacked(nn.Module):
    def __init__(self, packed: Packed) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        with torch.no_grad():
            for part, w, b in zip(
                self.parts, packed.weight.chunk(3), packed.bias.chunk(3), strict=True
            ):
                part.weight.copy_(w)
                part.bias.copy_(b)

    def forward(self, x: Tensor) -> Tensor:
        return self.parts[0](x) * self.parts[1](x) + self.parts[2](x)
