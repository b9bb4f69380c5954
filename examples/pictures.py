"""Pictures of three curvature-block graphs: a transformer, a U-Net and a mixture of experts.

Layers that repeat are folded; of the transformer, the statistics of one batch are shown too.

    python examples/pictures.py --folder .
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import use_threads
from torch import Tensor, nn
from torch.nn import functional as F

import kfac_fx


class Transformer(nn.Module):
    """Twelve layers over tokens with positions."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, width)
        self.positions = nn.Parameter(torch.randn(8, width) / 10)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.head(self.encoder(self.tokens(x) + self.positions).mean(1))


def pair(channels: int, out: int) -> nn.Module:
    """Build two convolutions."""
    first, second = nn.Conv2d(channels, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU())


class UNet(nn.Module):
    """Two resolutions, joined across."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down, self.bottom = pair(3, width), pair(width, 2 * width)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.join, self.head = pair(2 * width, width), nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits by pixel."""
        fine = self.down(x)
        coarse = self.bottom(F.max_pool2d(fine, 2))
        return self.head(self.join(torch.cat([fine, self.up(coarse)], 1)))


class Layer(nn.Module):
    """A residual mixture of four experts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 4)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, width)) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of the experts by their shares."""
        shares = self.gate(x).softmax(-1)
        parts = [shares[:, i : i + 1] * expert(x) for i, expert in enumerate(self.experts)]
        return x + torch.stack(parts).sum(0)


class Experts(nn.Module):
    """Four layers of experts, and a parameter of no kind that has a rule."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(16, width), nn.Linear(width, 10)
        self.layers = nn.Sequential(*(Layer(width) for _ in range(4)))
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.head(self.layers(self.stem(x)) * torch.cumsum(self.gain, 0))


def with_statistics(model: nn.Module, x: Tensor) -> kfac_fx.Preconditioner:
    """Record one batch."""
    net = kfac_fx.transform(model, x)
    pre = kfac_fx.Preconditioner(net, "categorical", fisher="exact", damping=1e-3)
    pre.observe(outputs := net(x))
    outputs.sum().backward()
    pre.step()
    return pre


def main() -> None:
    """Save the pictures, and the transformer's page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path())
    arguments = parser.parse_args()
    print(use_threads(1))
    torch.manual_seed(0)
    pre = with_statistics(Transformer(), torch.randint(50, (64, 8)))
    for suffix in ("svg", "html"):
        pre.curvature.save(arguments.folder / f"transformer.{suffix}", pre)
    kfac_fx.transform(UNet()).curvature.save(arguments.folder / "unet.svg")
    kfac_fx.transform(Experts()).curvature.save(arguments.folder / "experts.svg")
    print(*str(pre.report()).splitlines()[-3:], sep="\n")


if __name__ == "__main__":
    main()
