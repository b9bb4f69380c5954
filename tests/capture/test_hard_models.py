"""Models of unusual code: the same function, every parameter accounted for, two finite steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import hard_models, hard_weights
from support.hard_models import Hard
from support.oracles import close
from torch import Tensor, nn

import kfac_fx

pytestmark = pytest.mark.usefixtures("float64")
ENTRIES = hard_models.ENTRIES | hard_weights.ENTRIES


def behaviour(model: nn.Module, entry: Hard, inputs: Any) -> tuple[Tensor, list[Tensor | None]]:
    """Outputs, and the gradients of a fixed combination of them."""
    outputs = entry.pick(model(*copy.deepcopy(inputs)))
    weights = torch.arange(outputs.numel()).cos().reshape(outputs.shape)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return outputs, list(
        torch.autograd.grad((outputs * weights).sum(), parameters, allow_unused=True)
    )


@pytest.mark.parametrize("name", ENTRIES)
def test_same_function(name: str) -> None:
    """In both modes, on another batch size than the example's, whether it records or not."""
    entry = ENTRIES[name]
    model = entry.build()
    net = kfac_fx.transform(copy.deepcopy(model), entry.inputs(4))
    for training, cases, recording in ((True, 4, False), (False, 7, False), (True, 7, True)):
        if recording:
            kfac_fx.Preconditioner(net, "normal")
        model.train(training), net.train(training)
        inputs = entry.inputs(cases)
        outputs, gradients = behaviour(net, entry, inputs)
        want, expected = behaviour(model, entry, inputs)
        close((outputs,), (want,))
        for found, gradient in zip(gradients, expected, strict=True):
            if found is None or gradient is None:
                assert all(g is None or not g.any() for g in (found, gradient))
            else:
                close((found,), (gradient,))


def check_accounts(net: nn.Module, entry: Hard) -> None:
    """Every parameter is in one place, and what the loss depends on is in a block."""
    curvature = net.curvature
    blocks = {n for block in curvature.blocks.values() for n in block.parameters}
    rest = [*curvature.frozen, *curvature.excluded, *curvature.unused]
    assert sorted([*blocks, *rest]) == sorted(n for n, _ in net.named_parameters())
    unused = [net.get_parameter(n) for n in curvature.unused]
    if unused:
        total = sum(o.abs().sum() for o in flat(net(*entry.inputs(4))) if o.requires_grad)
        gradients = torch.autograd.grad(total, unused, allow_unused=True)
        assert all(g is None or not g.any() for g in gradients)
    for block in curvature.blocks.values():
        assert block.reason or block.approximation != "diagonal", block.name


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value or ()
    return [tensor for part in parts for tensor in flat(part)]


@pytest.mark.parametrize("name", ENTRIES)
def test_accounts_and_two_steps(name: str) -> None:
    entry = ENTRIES[name]
    net = kfac_fx.transform(entry.build(), entry.inputs(4))
    check_accounts(net, entry)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    preconditioner = kfac_fx.Preconditioner(net, "normal", fisher="sampled", damping=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        outputs = entry.pick(net(*entry.inputs(6)))
        preconditioner.observe(outputs)
        outputs.square().mean().backward()
        before = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
        preconditioner.step()
        optimizer.step()
    assert preconditioner.skipped_statistics == 0 and preconditioner.skipped_gradients == 0
    assert all(p.isfinite().all() for p in net.parameters())
    changed = [
        n for n, g in before.items() if g.any() and not torch.equal(net.get_parameter(n).grad, g)
    ]
    assert set(changed) == {n for n, g in before.items() if g.any()}
    for name, factors in preconditioner.factors.items():
        assert all(f.isfinite().all() for f in factors), name
        assert any(f.any() for f in factors), name
