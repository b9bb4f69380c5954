"""The oracles against autograd: rows multiply to the weight's gradient, Fishers to Hessians."""

from __future__ import annotations

import pytest
import torch
from support import oracles
from support.oracles import LIKELIHOODS, Categorical, Likelihood, close
from torch import nn

pytestmark = pytest.mark.usefixtures("float64")

LAYERS = {
    "linear": (lambda: nn.Linear(4, 3), (5, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, 2, 2, 2, groups=2), (4, 8)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 2), (1, 2), 2), (4, 6, 5)),
    "conv2d same": (lambda: nn.Conv2d(2, 3, (2, 3), padding="same", dilation=(3, 2)), (2, 5, 6)),
    "conv2d reflect": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 3, 4)),
    "conv2d circular": (lambda: nn.Conv2d(2, 3, 3, padding=2, padding_mode="circular"), (2, 3, 4)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2, 1, (0, 1, 2), groups=2), (2, 3, 4, 5)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("kind", LAYERS)
def test_rows_multiply_to_the_gradient(kind: str) -> None:
    build, shape = LAYERS[kind]
    layer, x = build(), torch.randn(1, *shape)
    outputs, (use,) = oracles.run(nn.Sequential(layer), ["0"], x)
    g = torch.randn_like(outputs)
    weight, bias = torch.autograd.grad(use.s, [layer.weight, layer.bias], g)
    index = torch.arange(g.numel()).reshape(g.shape)
    rows = g.flatten()[oracles.output_rows(layer, index)]
    found = torch.einsum("sgo,sgi->goi", rows, oracles.input_rows(layer, use.x))
    close((found[..., :-1].reshape(weight.shape), found[..., -1].flatten()), (weight, bias))


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=lambda one: one.name)
def test_fisher_is_the_expected_hessian(likelihood: Likelihood) -> None:
    """The Hessian of these likelihoods does not depend on the target."""
    outputs = torch.randn(1, 2, 3)
    y = likelihood.draw(outputs)
    hessian = torch.autograd.functional.hessian(lambda f: likelihood.nll(f, y), outputs)
    close((likelihood.fisher(outputs, y),), (hessian.reshape(6, 6),))


def test_ignored_targets_have_no_fisher() -> None:
    fisher = Categorical().fisher(torch.randn(1, 2, 3), torch.tensor([[1, -100]]))
    assert fisher[:3, :3].any() and not fisher[3:].any() and not fisher[:, 3:].any()


def test_tikhonov() -> None:
    """The product of the damped factors adds lambda, and balances the cross terms by pi."""
    A, G = torch.diag(torch.tensor([1.0, 3.0])), torch.diag(torch.tensor([8.0, 8.0, 8.0]))
    damped_a, damped_g = oracles.tikhonov(A, G, 0.04)
    close((damped_a, damped_g), (A + 0.1 * torch.eye(2), G + 0.4 * torch.eye(3)))
    zero_a, zero_g = oracles.tikhonov(0 * A, G, 0.04)
    close((zero_a, zero_g), (0.2 * torch.eye(2), G + 0.2 * torch.eye(3)))


def test_solve_kronecker_is_two_sided() -> None:
    A, G, V = torch.eye(3) * 2, torch.diag(torch.tensor([1.0, 4.0])), torch.randn(2, 3)
    damped_a, damped_g = oracles.tikhonov(A, G, 0.01)
    want = torch.linalg.solve(damped_g, V) @ torch.linalg.inv(damped_a)
    close((oracles.solve_kronecker(A, G, V, 0.01),), (want,))
