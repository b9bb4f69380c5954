"""Networks whose layers follow each other as chains, forks, joins and random graphs."""

from __future__ import annotations

import itertools
import random

import torch
from torch import Tensor, nn


def chain(depth: int) -> nn.Module:
    sizes = [4, *torch.randint(2, 5, (depth,)).tolist()]
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


class Residual(nn.Module):
    """A fork, a branch with a layer of its own, a join, and a skip past two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(3, 4)
        self.short, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.stem(x))
        h = self.short(h) + self.two(torch.tanh(self.one(h)))
        return self.head(torch.relu(h) + x)


class Branches(nn.Module):
    """Three branches that are concatenated, and two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.branches = nn.ModuleList([nn.Linear(4, n) for n in (2, 3, 1)])
        self.join, self.left, self.right = nn.Linear(6, 4), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.stem(x))
        h = torch.tanh(self.join(torch.cat([branch(h) for branch in self.branches], -1)))
        return torch.cat([self.left(h), self.right(h)], -1)


class RandomGraph(nn.Module):
    """Layers of equal width that each read the sum of a random set of earlier ones."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        depth = draw.randint(2, 6)
        self.layers = nn.ModuleList(nn.Linear(3, 3, draw.random() < 0.7) for _ in range(depth))
        self.reads = [
            sorted(draw.sample(range(index + 1), draw.randint(1, min(index + 1, 3))))
            for index in range(depth)
        ]
        self.reads[1] = [1]  # at least one pair

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for layer, reads in zip(self.layers, self.reads, strict=True):
            h = values[reads[0]]
            for index in reads[1:]:
                h = h + values[index]
            values.append(torch.tanh(layer(h)))
        return torch.stack(values[1:]).sum(0)
