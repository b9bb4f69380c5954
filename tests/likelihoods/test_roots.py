"""Roots of the output Fisher of torch's distributions: against sums and integrals over targets."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import pytest
import torch
from support.asserts import assert_near
from torch import Tensor, nn, optim
from torch import distributions as D
from torch.autograd import forward_ad

import kfac_fx
from kfac_fx.errors import LikelihoodError
from kfac_fx.likelihoods.batch import batch_likelihood, signs_of
from kfac_fx.likelihoods.named import Custom
from kfac_fx.statistics.user_graph import derivatives

pytestmark = pytest.mark.usefixtures("float64")
close = functools.partial(assert_near, rtol=2e-4)
Make = Callable[[Tensor], D.Distribution]
COUNTS = torch.arange(4000.0, dtype=torch.float64)
# Midpoints: derivatives of a Laplace distribution jump at zero.
LINE = (torch.arange(-400_000, 400_000, dtype=torch.float64) + 0.5) * 1e-4
POSITIVE = torch.linspace(-60, 8, 400_001, dtype=torch.float64).exp()

# From outputs [cases, 2] to a distribution, and the targets that its sum or integral is over.
KINDS: dict[str, tuple[Make, Tensor]] = {
    "Poisson": (lambda f: D.Poisson((3 * f[:, 0]).exp()), COUNTS),
    "Exponential": (lambda f: D.Exponential(f[:, 0].exp()), POSITIVE),
    "Laplace": (lambda f: D.Laplace(f[:, 0], f[:, 1].exp()), LINE),
    "a mean of Laplace": (lambda f: D.Laplace(f[:, 0], torch.ones(len(f))), LINE),
    "LogNormal": (lambda f: D.LogNormal(0.3 * f[:, 0], (0.3 * f[:, 1]).exp()), POSITIVE),
    "Gamma": (lambda f: D.Gamma((1 + f[:, 0]).exp(), f[:, 1].exp()), POSITIVE),
    "a rate of Gamma": (lambda f: D.Gamma(torch.full((len(f),), 2.0), f[:, 1].exp()), POSITIVE),
    "Chi2": (lambda f: D.Chi2((2 + f[:, 0]).exp()), POSITIVE),
    "NegativeBinomial": (lambda f: D.NegativeBinomial(5.0, logits=f[:, 0]), COUNTS),
    "by probs": (lambda f: D.NegativeBinomial(5.0, probs=f[:, 0].sigmoid()), COUNTS),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
CASES = 3


def outputs() -> Tensor:
    return torch.randn(CASES, 2).mul_(0.5).requires_grad_()


def fisher(make: Make, targets: Tensor, f: Tensor) -> Tensor:
    """The mean of g g^T over targets, g the derivative of log p: [cases, 2, 2]."""
    widths = torch.ones_like(targets) if targets is COUNTS else torch.gradient(targets)[0]
    found = []
    for case in f.detach():
        rows = case.expand(len(targets), 2).clone().requires_grad_()
        distribution = make(rows)
        inside = targets > 0 if targets is POSITIVE else torch.ones_like(targets, dtype=torch.bool)
        log_p = distribution.log_prob(targets.where(inside, torch.ones_like(targets)))
        (g,) = torch.autograd.grad(log_p.sum(), rows)
        weights = log_p.detach().exp() * widths * inside
        assert_near(weights.sum(), torch.ones(()), rtol=1e-5)
        found.append((g * weights[:, None]).T @ g)
    return torch.stack(found)


@every_kind
def test_the_mean_over_all_signs_is_the_fisher(kind: str) -> None:
    make, targets = KINDS[kind]
    f = outputs()
    batch = batch_likelihood(Custom(make), f)
    signs = signs_of(batch.distributions[0])
    assert signs is not None
    choices = list(itertools.product((1.0, -1.0), repeat=signs.shape[1]))
    total = torch.zeros(CASES, 2, 2)
    for choice in choices:
        (g,) = derivatives(batch.sampled([torch.tensor(choice).expand(signs.shape)]), [f])
        total += g[:, :, None] * g[:, None, :] / len(choices)
    close(total, fisher(make, targets, f))


@pytest.mark.parametrize("kind", [*KINDS, "Normal"])
def test_forward_mode_without_gradients_has_every_column(kind: str) -> None:
    """A scale that is an output once had none: products with the Fisher lacked its curvature."""
    make, targets = KINDS.get(kind, (lambda f: D.Normal(f[:, 0], f[:, 1].exp()), LINE))
    f, v = outputs(), torch.randn(CASES, 2)
    with torch.no_grad(), forward_ad.dual_level():
        root = batch_likelihood(Custom(make), forward_ad.make_dual(f, v)).root()
        tangent = forward_ad.unpack_dual(root).tangent
    assert tangent is not None
    want = torch.einsum("ni,nij,nj->", v, fisher(make, targets, f), v)
    close(tangent.square().sum(), want)


@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_what_under_or_overflows_gives_no_bad_numbers(scale: float) -> None:
    f = (200 * scale * torch.ones(2, 1, dtype=torch.float32)).requires_grad_()
    for make in (D.Poisson, D.Exponential):
        batch = batch_likelihood(Custom(lambda f, m=make: m(f.exp(), validate_args=False)), f)
        (g,) = derivatives(batch.sampled(0), [f])
        assert scale > 0 or bool(g.isfinite().all())
    large = torch.full((2,), 1e7, dtype=torch.float32, requires_grad=True)
    batch = batch_likelihood(Custom(lambda a: D.Gamma(a, torch.ones_like(a))), large)
    total = sum(
        derivatives(batch.sampled([torch.tensor(signs).float().expand(2, 2)]), [large])[0] ** 2 / 4
        for signs in itertools.product((1.0, -1.0), repeat=2)
    )
    assert_near(total, 1 / large.detach(), rtol=1e-5)  # the trigamma function


def test_a_learnt_count_has_no_root() -> None:
    f = outputs()
    batch = batch_likelihood(Custom(lambda f: D.NegativeBinomial(f[:, 0].exp(), logits=f[:, 1])), f)
    assert signs_of(batch.distributions[0]) is None
    (found,) = derivatives(batch.sampled(0), [f])
    assert bool(found.isfinite().all())
    with pytest.raises(LikelihoodError, match="does not know NegativeBinomial"):
        batch.root()


def test_counts_that_are_nearly_always_zero_are_fitted() -> None:
    """Of drawn targets one in a hundred would say anything about the Fisher."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    inputs = torch.randn(4096, 4)
    rates = (-4.6 + inputs[:, 0]).exp()
    targets = torch.poisson(rates)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
    net = kfac_fx.transform(model)
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def likelihood(outputs: Tensor) -> D.Distribution:
        return D.Poisson(outputs.squeeze(-1).exp())

    preconditioner = kfac_fx.Preconditioner(net, likelihood)
    for step in range(200):
        part = slice(step % 8 * 512, (step % 8 + 1) * 512)
        optimizer.zero_grad()
        outputs = net(inputs[part])
        preconditioner.observe(outputs)
        loss = -likelihood(outputs).log_prob(targets[part]).mean()
        loss.backward()
        preconditioner.step()
        optimizer.step()
    with torch.no_grad():
        found = -likelihood(net(inputs)).log_prob(targets).mean()
    best = -D.Poisson(rates).log_prob(targets).mean()
    constant = -D.Poisson(targets.mean()).log_prob(targets).mean()
    assert found < best + 0.2 * (constant - best)
