"""Networks of the problems of time_to_target.py."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def perceptron(*sizes: int) -> list[nn.Module]:
    """Return linear layers with tanh between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return layers[:-1]


def convolutional() -> nn.Module:
    """Return three convolutions with batch normalisation and a linear classifier."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, padding=1, stride=2), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(128, 10)),
    )


def sequence_convolutional() -> nn.Module:
    """Return three convolutions over time and a linear classifier of five forms."""
    return nn.Sequential(
        *(nn.Conv1d(1, 16, 5, padding=2, stride=2), nn.ReLU()),
        *(nn.Conv1d(16, 32, 5, padding=2, stride=2), nn.ReLU()),
        *(nn.Conv1d(32, 32, 5, padding=2, stride=2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(256, 5)),
    )


class RecurrentClassifier(nn.Module):
    """A GRU over the rows of an image, classified by its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.GRU(8, 48, batch_first=True)
        self.head = nn.Linear(48, 10)

    def forward(self, rows: Tensor) -> Tensor:
        states, _ = self.recurrent(rows)
        return self.head(states[:, -1])


class Attention(nn.Module):
    """Self-attention with heads of equal width."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.joint = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.joint(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """A transformer's layer with normalisation before its two parts."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal)
        self.inner, self.outer = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.outer(F.gelu(self.inner(self.norm_2(x))))


class PixelTransformer(nn.Module):
    """Two layers of width 32 over the 16 patches of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 32, 2, stride=2)
        self.positions = nn.Parameter(0.1 * torch.randn(16, 32))
        self.layers = nn.Sequential(Layer(32, 2, False), Layer(32, 2, False))
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.layers(x)).mean(1))


class TextTransformer(nn.Module):
    """Two causal layers of width 64 that predict the next character."""

    def __init__(self, characters: int, context: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(characters, 64)
        self.positions = nn.Parameter(0.1 * torch.randn(context, 64))
        self.layers = nn.Sequential(Layer(64, 4, True), Layer(64, 4, True))
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, characters)

    def forward(self, codes: Tensor) -> Tensor:
        x = self.characters(codes) + self.positions
        return self.head(self.norm(self.layers(x)))
