"""Factors from a definition that needs no formula of the layer: derivatives of single outputs.

The input of a weight's row is the derivative of one output entry in that row, so A is the sum of
its outer products over cases and positions, and G that of the derivatives in the layer's output.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import kfac_fx
from support.steps import one_step


class Wrapped(nn.Module):
    """A layer, a nonlinearity and a head, with the layer's output kept."""

    def __init__(self, layer: nn.Module, features: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(features, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(x)).flatten(1))


class WrappedPair(Wrapped):
    """The same for a layer of two inputs."""

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(x, z)).flatten(1))


def oracle(
    model: Wrapped, inputs: tuple[Tensor, ...], rows: Callable[[Tensor], Tensor], channel: int
) -> tuple[Tensor, Tensor]:
    """(A, G) for a unit-variance normal likelihood, exactly; one position at a time.

    Args:
        rows: the weight as [out, in]; the first row is the one of output channel 0.
        channel: the dimension of the layer's output that holds the channels.
    """
    s = model.layer(*inputs)
    outputs = model.head(torch.tanh(s).flatten(1))
    places = s.movedim(channel, -1).flatten(1, -2) if s.dim() > 2 else s.unsqueeze(1)
    cases, positions, width = places.shape
    A = 0
    for n in range(cases):
        for t in range(positions):
            parameters = list(model.layer.parameters())
            found = torch.autograd.grad(places[n, t, 0], parameters, retain_graph=True)
            abar = torch.cat([rows(found[0])[0], *(bias[:1] for bias in found[1:])])
            A = A + torch.outer(abar, abar)
    G = torch.zeros(width, width)
    for n in range(cases):
        for o in range(outputs.shape[1]):
            (g,) = torch.autograd.grad(outputs[n, o], s, retain_graph=True)
            g = (g.movedim(channel, -1).flatten(1, -2) if g.dim() > 2 else g.unsqueeze(1))[n]
            G = G + g.T @ g
    return A / cases, G / (cases * positions)


def measured(model: nn.Module, inputs: tuple[Tensor, ...], block: str) -> tuple[Tensor, ...]:
    net = kfac_fx.transform(model)
    preconditioner = kfac_fx.Preconditioner(net, "normal", fisher="exact")
    one_step(preconditioner, net, inputs, torch.sum)
    return preconditioner.factors[block]
