"""How long a transform takes: seconds for large models, and in proportion to their size."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfac_fx

pytestmark = pytest.mark.slow


class Encoder(nn.Module):
    """A narrow transformer encoder that symbolic tracing follows."""

    def __init__(self, layers: int, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Layer(width) for _ in range(layers)))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x))


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        weights = (self.q(h) @ self.k(h).transpose(1, 2)).softmax(-1)
        x = x + self.out(weights @ self.v(h))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 4 * width, 1, bias=False),
            nn.BatchNorm2d(4 * width),
        )
        self.skip = nn.Conv2d(inputs, 4 * width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


def resnet() -> nn.Module:
    """Sixteen bottlenecks, 3, 4, 6 and 3 of each width, as in ResNet-50; the widths are small."""
    blocks: list[nn.Module] = [nn.Conv2d(3, 8, 7, 2, 3), nn.BatchNorm2d(8), nn.ReLU()]
    inputs = 8
    for stage, count in enumerate((3, 4, 6, 3)):
        for index in range(count):
            blocks.append(Bottleneck(inputs, 4 * 2**stage, 2 if index == 0 and stage else 1))
            inputs = 16 * 2**stage
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


def seconds(build: Callable[[], nn.Module], *inputs: Any, **options: Any) -> float:
    """Of this process alone, the best of three."""
    found = []
    for _ in range(3):
        model = build()
        start = time.process_time()
        kfac_fx.transform(model, *inputs, **options)
        found.append(time.process_time() - start)
    return min(found)


@pytest.mark.parametrize("structure, slack", [("block_diagonal", 1.6), ("block_tridiagonal", 2.2)])
def test_encoders(structure: str, slack: float) -> None:
    """Under two seconds, and at most ``slack`` times as much a layer at 48 layers as at 12.

    Along a residual stream every layer has an edge to every later one, so what lists the edges
    cannot be linear; four times as much would be all quadratic.
    """
    taken = {n: seconds(lambda n=n: Encoder(n), structure=structure) for n in (12, 24, 48)}
    print({n: round(t, 2) for n, t in taken.items()})
    assert all(t < 2.0 for t in taken.values())
    assert taken[48] / 48 < slack * taken[12] / 12


def test_resnet() -> None:
    """Two seconds, on a machine that has nothing else to do."""
    taken = seconds(resnet)
    print(round(taken, 2))
    assert taken < 2.0


def test_checked_on_example_inputs() -> None:
    """The check runs the model and the capture once each, forward and backward."""
    taken = seconds(resnet, torch.randn(2, 3, 32, 32))
    print(round(taken, 2))
    assert taken < 4.0
