"""CURVES: grey images of a smooth curve through three random points of the plane.

Six numbers determine an image, so an autoencoder with six code units can be near perfect.

    python examples/curves.py --output curves.png
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

SIDE = 28  # pixels a side
LOW, HIGH = 3.5, 23.5  # the box of the three points; the parabola leaves it by an eighth at most
WIDTH = 0.7  # standard deviation of the stroke's profile: 1.6 pixels wide at half height
SAMPLES = 96  # points on a curve


def curves(cases: int, seed: int) -> Tensor:
    """Return `cases` images, [cases, 784], float32 grey levels in [0, 1] (multiples of 1/255)."""
    generator = torch.Generator().manual_seed(seed)
    points = LOW + (HIGH - LOW) * torch.rand(cases, 3, 2, generator=generator)
    return torch.cat([_draw(chunk) for chunk in points.split(1000)])


def _draw(points: Tensor) -> Tensor:
    """Draw the parabola that is at the three points at times 0, 1/2 and 1."""
    first, middle, last = points[:, None].unbind(2)
    time = ((torch.arange(SAMPLES) + 0.5) / SAMPLES)[:, None]
    bend, slope = 2 * (first - 2 * middle + last), 4 * middle - 3 * first - last
    position = first + slope * time + bend * time**2
    speed = (slope + 2 * bend * time).norm(dim=2, keepdim=True)

    # A Gaussian profile integrated along the curve: a product over x and y at each time.
    pixels = torch.arange(SIDE, dtype=torch.float32)
    profile = torch.exp(-0.5 * ((position[..., None] - pixels) / WIDTH) ** 2)
    weight = speed / (SAMPLES * WIDTH * math.sqrt(2 * math.pi))
    ink = (profile[:, :, 1] * weight).transpose(1, 2) @ profile[:, :, 0]
    return (ink.clamp(max=1) * 255).round().div(255).flatten(1)


def sheet(images: Tensor, path: str | Path, rows: int = 8, columns: int = 16) -> None:
    """Save a picture of the first rows x columns images."""
    from matplotlib import image

    tiles = images[: rows * columns].detach().reshape(rows, columns, SIDE, SIDE)
    tiles = torch.nn.functional.pad(tiles, (1, 1, 1, 1), value=0.35)
    grid = tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1)
    enlarged = grid.repeat_interleave(2, 0).repeat_interleave(2, 1)
    image.imsave(path, enlarged.numpy(), cmap="gray", vmin=0, vmax=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="curves.png")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sheet(curves(128, arguments.seed), arguments.output)
    print(f"saved {arguments.output}")
