"""Theorem 1 and its corollaries: updates do not depend on how a layer's inputs are parametrised.

A network and its twin compute the same function with other activations. Five undamped steps later
they still do; gradient descent's functions have parted.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from support.networks import mlp
from torch import Tensor, nn

import kfac_fx
from kfac_fx.optim import KFACOptions

pytestmark = pytest.mark.usefixtures("float64")
Twins = tuple[nn.Module, nn.Module]


class Affine(nn.Module):
    """A fixed invertible map of the features, U a + c; of the channels of images, U a."""

    def __init__(self, width: int, shift: bool = True) -> None:
        super().__init__()
        self.images = not shift
        self.register_buffer("U", torch.eye(width) + 0.4 * torch.randn(width, width))
        self.register_buffer("c", torch.randn(width) if shift else torch.zeros(width))

    def forward(self, a: Tensor) -> Tensor:
        if self.images:
            return torch.einsum("ij,njhw->nihw", self.U, a)
        return a @ self.U.T + self.c

    @torch.no_grad()
    def undo_in(self, layer: nn.Linear | nn.Conv2d) -> None:
        """Changes the layer that follows so that it computes what it did without the map."""
        inverse = torch.linalg.inv(self.U)
        if isinstance(layer, nn.Linear):
            layer.weight.copy_(layer.weight @ inverse)
            layer.bias.sub_(layer.weight @ self.c)
        else:
            layer.weight.copy_(torch.einsum("oihw,ij->ojhw", layer.weight, inverse))


def with_maps(places: dict[int, int], shift: bool = True) -> Callable[[nn.Sequential], Twins]:
    """A twin with a map in front of some layers: place -> width."""

    def build(model: nn.Sequential) -> Twins:
        layers = list(copy.deepcopy(model))
        for place, width in sorted(places.items(), reverse=True):
            fixed = Affine(width, shift)
            fixed.undo_in(layers[place])
            layers.insert(place, fixed)
        return model, nn.Sequential(*layers)

    return build


def logistic(model: nn.Sequential) -> Twins:
    """tanh(s) = 2 sigmoid(2 s) - 1."""
    twin = copy.deepcopy(model)
    linear = [layer for layer in twin if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        for layer in linear[1:]:
            layer.bias.sub_(layer.weight.sum(1))
            layer.weight.mul_(2)
        for layer in linear[:-1]:
            layer.weight.mul_(2)
            layer.bias.mul_(2)
    layers = [nn.Sigmoid() if isinstance(layer, nn.Tanh) else layer for layer in twin]
    return model, nn.Sequential(*layers)


def conv_net() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 3, 3, stride=2), nn.Tanh()),
        *(nn.Flatten(), nn.Linear(12, 2)),
    )


TWINS: dict[str, tuple[Callable[[], nn.Sequential], Callable[[nn.Sequential], Twins]]] = {
    "tanh and logistic": (functools.partial(mlp, 4, 5, 4, 2), logistic),
    "whitened and centred inputs": (functools.partial(mlp, 4, 5, 4, 2), with_maps({0: 4})),
    "affine maps between layers": (functools.partial(mlp, 4, 5, 4, 2), with_maps({2: 5, 4: 4})),
    "channels of a convolution": (conv_net, with_maps({0: 2, 2: 3}, shift=False)),
}


def functions_after(models: Twins, x: Tensor, y: Tensor, train: Callable) -> float:
    """The relative difference of the functions after five steps of each."""
    start = [model(x).detach() for model in models]
    torch.testing.assert_close(*start, rtol=1e-10, atol=1e-10)
    for model in models:
        train(model, x, y)
    one, other = (model(x).detach() for model in models)
    moved = (one - start[0]).norm()
    assert moved > 1e-2 * start[0].norm()
    return float((one - other).norm() / moved)


def by_kfac(structure: str) -> Callable[[nn.Module, Tensor, Tensor], None]:
    def train(model: nn.Module, x: Tensor, y: Tensor) -> None:
        optimizer = kfac_fx.KFAC(
            kfac_fx.transform(model, structure=structure),
            "normal",
            lr=0.3,
            momentum=0.5,
            weight_decay=0.0,
            damping=1e-30,
            fisher="exact",
            options=KFACOptions(statistics_fraction=1.0, trust_region=None),
        )
        for _ in range(5):
            optimizer.step(x, y)

    return train


def by_sgd(model: nn.Module, x: Tensor, y: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    for _ in range(5):
        optimizer.zero_grad()
        (0.5 * (model(x) - y).square().sum() / len(x)).backward()
        optimizer.step()


@pytest.mark.parametrize("structure", ["block_diagonal", "block_tridiagonal"])
@pytest.mark.parametrize("name", TWINS)
def test_functions_agree(name: str, structure: str) -> None:
    """After K-FAC's updates the twins are the same function; after SGD's they are not."""
    build, twins = TWINS[name]
    model = build()
    shape = (2, 5, 5) if isinstance(model[0], nn.Conv2d) else (4,)
    x, y = torch.randn(300, *shape), torch.randn(300, 2)
    models = twins(model)
    ours = functions_after(copy.deepcopy(models), x, y, by_kfac(structure))
    theirs = functions_after(models, x, y, by_sgd)
    assert ours < 1e-6
    assert theirs > 1e3 * ours
