"""Models with one kind of block each, and the updates of their blocks by dense inverses."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from support import oracles
from support.networks import Conv1D

Gradients = dict[str, Tensor]


def kronecker_linear(
    g: Gradients, name: str, factors: tuple[Tensor, ...], damping: float
) -> Gradients:
    weight, bias = g[f"{name}.weight"], g.get(f"{name}.bias")
    V = weight if bias is None else torch.cat([weight, bias[:, None]], dim=1)
    u = oracles.solve_kronecker(*factors, V, damping)
    if bias is None:
        return {f"{name}.weight": u}
    return {f"{name}.weight": u[:, :-1], f"{name}.bias": u[:, -1]}


def kronecker_transposed(
    g: Gradients, name: str, factors: tuple[Tensor, ...], damping: float
) -> Gradients:
    turned = {key: value.T if value.dim() == 2 else value for key, value in g.items()}
    u = kronecker_linear(turned, name, factors, damping)
    return {key: value.T if value.dim() == 2 else value for key, value in u.items()}


def kronecker_conv(
    g: Gradients, name: str, factors: tuple[Tensor, ...], damping: float
) -> Gradients:
    """Each group is a block of its own, with its own pi."""
    A, G = (f if f.dim() == 3 else f[None] for f in factors)
    weight, bias = g[f"{name}.weight"], g.get(f"{name}.bias")
    given = weight.reshape(len(A), -1, weight[0].numel())
    if bias is not None:
        given = torch.cat([given, bias.reshape(len(A), -1, 1)], dim=2)
    parts = zip(A, G, given, strict=True)
    groups = [oracles.solve_kronecker(a, b, V, damping) for a, b, V in parts]
    u = torch.stack(groups)
    if bias is None:
        return {f"{name}.weight": u.reshape(weight.shape)}
    return {
        f"{name}.weight": u[..., :-1].reshape(weight.shape),
        f"{name}.bias": u[..., -1].reshape(bias.shape),
    }


def full(g: Gradients, name: str, factors: tuple[Tensor, ...], damping: float) -> Gradients:
    """One covariance (or its diagonal) of the parameters of the block, concatenated."""
    keys = [key for key in g if key == name or key.startswith(f"{name}.")]
    u = oracles.solve_full(factors[0], torch.cat([g[key].flatten() for key in keys]), damping)
    parts = u.split([g[key].numel() for key in keys])
    return {key: part.reshape(g[key].shape) for key, part in zip(keys, parts, strict=True)}


def rows(g: Gradients, name: str, factors: tuple[Tensor, ...], damping: float) -> Gradients:
    """Rows as embeddings: A is the diagonal of a matrix."""
    A, G = factors
    return {name: oracles.solve_kronecker(torch.diag(A), G, g[name].T, damping).T}


def pairs(g: Gradients, name: str, factors: tuple[Tensor, ...], damping: float) -> Gradients:
    v = torch.stack([g[f"{name}.weight"].flatten(), g[f"{name}.bias"].flatten()], dim=1)
    found = zip(factors[0], v, strict=True)
    u = torch.stack([oracles.solve_full(C, row, damping) for C, row in found])
    return {f"{name}.weight": u[:, 0], f"{name}.bias": u[:, 1]}


class Elementwise(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.rand(size, 4))
        self.q = nn.Parameter(torch.rand(4))
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(x[:, None] + self.p).sum(1) * self.q.cumsum(0))


Solver = Callable[[Gradients, str, tuple[Tensor, ...], float], Gradients]


class Model(NamedTuple):
    """A model, the shape of one case, and (approximation, dense solver) of each of its blocks."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    blocks: dict[str, tuple[str, Solver]]


MODELS: dict[str, Model] = {
    "linear": Model(
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)),
        (4,),
        {"0": ("kronecker", kronecker_linear), "2": ("kronecker", kronecker_linear)},
    ),
    "one by one": Model(
        lambda: nn.Sequential(nn.Linear(1, 1, bias=False), nn.Tanh(), nn.Linear(1, 1)),
        (1,),
        {"0": ("kronecker", kronecker_linear), "2": ("kronecker", kronecker_linear)},
    ),
    "transposed": Model(
        lambda: nn.Sequential(Conv1D(4, 5), nn.Tanh(), Conv1D(5, 3)),
        (4,),
        {"0": ("kronecker", kronecker_transposed), "2": ("kronecker", kronecker_transposed)},
    ),
    "convolution": Model(
        lambda: nn.Sequential(nn.Conv2d(2, 3, (2, 3)), nn.Tanh(), nn.Flatten(), nn.Linear(6, 2)),
        (2, 3, 3),
        {"0": ("kronecker", kronecker_conv), "3": ("kronecker", kronecker_linear)},
    ),
    "grouped": Model(
        lambda: nn.Sequential(nn.Conv1d(4, 6, 2, groups=2), nn.Tanh(), nn.Flatten()),
        (4, 3),
        {"0": ("kronecker", kronecker_conv)},
    ),
    "depthwise": Model(
        lambda: nn.Sequential(nn.Conv2d(3, 3, 2, groups=3, bias=False), nn.Tanh(), nn.Flatten()),
        (3, 3, 2),
        {"0": ("kronecker", kronecker_conv)},
    ),
    "norms": Model(
        lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 5), nn.BatchNorm1d(5), nn.RMSNorm(5)),
        (4,),
        {"0": ("full", full), "1": ("kronecker", kronecker_linear), "2": ("full", full),
         "3": ("full", full)},
    ),
    "wide norms": Model(
        lambda: nn.Sequential(nn.LayerNorm(600), nn.Tanh(), nn.RMSNorm(600), nn.Linear(600, 2)),
        (600,),
        {"0": ("pairs", pairs), "2": ("full", full)},
    ),
    "diagonal norm": Model(
        lambda: nn.Sequential(nn.RMSNorm(1200), nn.Linear(1200, 1)),
        (1200,),
        {"0": ("diagonal", full)},
    ),
    "elementwise": Model(
        lambda: Elementwise(3),
        (4,),
        {"p": ("full", full), "q": ("diagonal", full), "out": ("kronecker", kronecker_linear)},
    ),
    "large elementwise": Model(lambda: Elementwise(300), (4,), {"p": ("kronecker", rows)}),
}  # fmt: skip
