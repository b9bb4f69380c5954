"""The training steps that tests repeat, and what a preconditioner holds after them, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import kfac_fx
from support.networks import Network

Groups = dict[str, tuple[Tensor, ...]]
"""Factors of a block, updates of a parameter, or other tensors under one name."""


def one_step(
    pre: kfac_fx.Preconditioner,
    net: nn.Module,
    inputs: Tensor | tuple[Any, ...],
    loss: Callable[[Any], Tensor],
    y: Any = None,
) -> Any:
    """One cycle of forward, observe, backward and step, from gradients of zero; the outputs.

    Args:
        loss: From the outputs to the number whose gradient is preconditioned.
        y: The targets that the preconditioner observes; None for a Fisher that needs none.
    """
    net.zero_grad()
    outputs = net(*inputs) if isinstance(inputs, tuple) else net(inputs)
    pre.observe(outputs, y)
    loss(outputs).backward()
    pre.step()
    return outputs


def numbered_batch(step: int, cases: int, width: int) -> tuple[Tensor, Tensor]:
    """Inputs [cases, width] in float64 with classes of three, the same in every process."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(cases, width, generator=generator, dtype=torch.float64)
    return x, x[:, :3].argmax(1)


def cloned_factors(pre: kfac_fx.Preconditioner) -> Groups:
    """Copies of the factors: the preconditioner goes on in its own tensors."""
    return {name: tuple(f.clone() for f in group) for name, group in pre.factors.items()}


def named_factors(pre: kfac_fx.Preconditioner) -> dict[str, Tensor]:
    """Every factor and cross factor under a name of its own: block/0, (child, parent)/1."""
    groups = dict(pre.factors) | {str(pair): group for pair, group in pre.cross_factors.items()}
    return {f"{name}/{k}": f for name, group in groups.items() for k, f in enumerate(group)}


def step_on_fixed_data(net: Any, network: Network) -> Groups:
    """Outputs, factors, cross factors and updates of one step on fixed data, batch size 5."""
    pre = kfac_fx.Preconditioner(net, "normal", damping=1e-2, fisher="exact")
    torch.manual_seed(7)
    outputs = network.pick(net(*network.inputs(5), **network.kwargs(5)))
    pre.observe(outputs)
    net.zero_grad()
    outputs.sin().sum().backward()
    pre.step()
    found = dict(pre.factors)
    found |= {str(pair): group for pair, group in pre.cross_factors.items()}
    updates = {n: (p.grad.clone(),) for n, p in net.named_parameters() if p.grad is not None}
    return found | updates | {"outputs": (outputs.detach(),)}
