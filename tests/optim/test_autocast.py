"""Autocast keeps copies of weights until it ends; a step of KFAC changes weights inside of it."""

from __future__ import annotations

import torch
from support.networks import mlp
from torch import Tensor, nn

import kfac_fx


def cases() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    inputs = torch.randn(128, 6)
    return inputs, (inputs[:, 0] * inputs[:, 1] > 0).long() + (inputs[:, 2] > 1).long()


def trained(whole: bool, enabled: bool = True) -> tuple[nn.Module, list[float], list[float]]:
    """A network after 30 steps, with their losses and reduction ratios.

    Args:
        whole: whether one region of autocast is around all steps, rather than one around each.
        enabled: whether layers run in bfloat16.
    """
    inputs, targets = cases()
    torch.manual_seed(0)
    model = mlp(6, 16, 16, 3)
    optimizer = kfac_fx.KFAC(kfac_fx.transform(model))
    losses, ratios = [], []
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled and whole):
        for _ in range(30):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                losses.append(float(optimizer.step(inputs, targets)))
            ratios.append(optimizer.diagnostics.get("rho", 0.0))
    return model, losses, ratios


def test_steps_are_judged_with_the_weights_that_they_made() -> None:
    _, losses, ratios = trained(whole=False)
    assert all(ratio != 0 for ratio in ratios[:8])  # afterwards a rate is tried
    assert losses[-1] < 0.05
    _, precise, _ = trained(whole=False, enabled=False)
    torch.testing.assert_close(losses[:5], precise[:5], rtol=0.05, atol=0.0)


def test_one_region_around_all_steps_is_as_good_as_one_around_each() -> None:
    model, losses, _ = trained(whole=True)
    other, each, _ = trained(whole=False)
    assert losses == each
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_forward_after_a_step_takes_the_new_weights_and_has_gradients() -> None:
    inputs, targets = cases()
    model = mlp(6, 16, 3)
    optimizer = kfac_fx.KFAC(kfac_fx.transform(model), lr=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        model(inputs)
        optimizer.step(inputs, targets)
        inside = model(inputs)
        gradients = torch.autograd.grad(inside.float().sum(), list(model.parameters()))
        assert torch.is_autocast_cache_enabled()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(inside, model(inputs))
    assert any(gradient.any() for gradient in gradients)
