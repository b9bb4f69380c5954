"""Parameters of elementwise operations, and the fallback for uses that no rule knows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support import oracles
from support.oracles import LIKELIHOODS, Categorical, Likelihood, Measure, Normal, close
from torch import Tensor, nn

import kfac_fx

pytestmark = pytest.mark.usefixtures("float64")
both_fishers = pytest.mark.parametrize("fisher", ["exact", "empirical"])


class Net(nn.Module):
    """A parameter p used in one way on [N, 3, 4], under a nonlinear head."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.use = use
        self.p = nn.Parameter(torch.rand(shape) + 0.5)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.use(x, self.p)).mean(1))


Use = Callable[[Tensor, Tensor], Tensor]
ELEMENTWISE: dict[str, tuple[Use, tuple[int, ...]]] = {
    "addcmul scale": (lambda x, p: torch.addcmul(x, p, x), (4,)),
    "addcmul shift": (lambda x, p: torch.addcmul(p, x, x.tanh()), (4,)),
    "x + p": (lambda x, p: x + p, (3, 4)),
    "p + x": (lambda x, p: p + x, (1, 3, 4)),
    "x * p": (lambda x, p: x * p, (4,)),
    "p * x": (lambda x, p: p * x, (3, 1)),
    "scalar": (lambda x, p: x * p, ()),
    "one": (lambda x, p: x * p, (1,)),
    "x - p": (lambda x, p: x - p, (4,)),
    "p - x": (lambda x, p: p - x, (4,)),
    "x / p": (lambda x, p: x / p, (4,)),
    "p / x": (lambda x, p: p / (2 + x * x), (4,)),
    "torch.add": (lambda x, p: torch.add(x, p, alpha=2), (3, 4)),
    "x.mul": (lambda x, p: x.mul(p), (3, 4)),
    "torch.sub": (lambda x, p: torch.sub(x, p), (4,)),
    "p[None]": (lambda x, p: x + p[None], (3, 4)),
    "p.view": (lambda x, p: x * p.view(1, 1, -1), (4,)),
    "p.unsqueeze": (lambda x, p: x + p.unsqueeze(-1), (3,)),
    "p.expand": (lambda x, p: x + p.expand(x.shape[0], -1, -1), (1, 3, 4)),
    "p.repeat": (lambda x, p: x + p.repeat(x.shape[0], 1, 1), (3, 4)),
}


@both_fishers
@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=lambda one: one.name)
@pytest.mark.parametrize("kind", ELEMENTWISE)
def test_elementwise(measure: Measure, kind: str, likelihood: Likelihood, fisher: str) -> None:
    """A full covariance of the per-case gradients."""
    model, x = Net(*ELEMENTWISE[kind]), torch.randn(5, 3, 4)
    y = likelihood.draw(model(x))
    net = kfac_fx.transform(model)
    block = net.curvature.blocks["p"]
    assert block.approximation == "full" and tuple(block.parameters) == ("p",)
    want = oracles.covariance(model, ["p"], x, y, likelihood, fisher)
    close(measure(net, x, y, likelihood, fisher).factors["p"], (want,))


def row_factors(covariance: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """A, and the mean over rows of the rows' own blocks of a covariance."""
    blocks = covariance.unflatten(0, (rows, -1)).unflatten(-1, (rows, -1))
    return torch.ones(rows), torch.einsum("tktl->kl", blocks) / rows


@both_fishers
@pytest.mark.parametrize("size, approximation", [(256, "full"), (257, "kronecker")])
def test_size_limit(measure: Measure, size: int, approximation: str, fisher: str) -> None:
    """Above the limit rows are taken as embeddings that every case looks up."""
    model, x = Net(lambda x, p: (x * p).sum(-2, keepdim=True), (size, 4)), torch.randn(3, 1, 4)
    likelihood = Normal()
    y = likelihood.draw(model(x))
    net = kfac_fx.transform(model)
    block = net.curvature.blocks["p"]
    assert block.approximation == approximation
    assert (block.reason is None) == (approximation == "full")
    want = oracles.covariance(model, ["p"], x, y, likelihood, fisher)
    found = measure(net, x, y, likelihood, fisher).factors["p"]
    close(found, (want,) if approximation == "full" else row_factors(want, size))


def test_rows_of_a_running_model(measure: Measure) -> None:
    model, x = Net(lambda x, p: (x * p).sum(-2, keepdim=True), (300, 4)), torch.randn(3, 1, 4)
    net = kfac_fx.transform(model, (x,), capture="eager")
    want = oracles.covariance(model, ["p"], x, None, Normal())
    close(measure(net, x, None, Normal()).factors["p"][:2], row_factors(want, 300))


def test_rows_behind_slopes(measure: Measure) -> None:
    model, x = Net(lambda x, p: (x * p.exp()).sum(1, keepdim=True), (300, 4)), torch.randn(3, 1, 4)
    net = kfac_fx.transform(model)
    want = oracles.covariance(model, ["p"], x, None, Normal())
    close(measure(net, x, None, Normal()).factors["p"], row_factors(want, 300))


@both_fishers
def test_a_long_vector_is_a_diagonal(measure: Measure, fisher: str) -> None:
    model, x = Net(lambda x, p: (x * p)[..., :4], (1025,)), torch.randn(3, 1, 1025)
    y = Normal().draw(model(x))
    net = kfac_fx.transform(model)
    assert net.curvature.blocks["p"].approximation == "diagonal"
    want = oracles.covariance(model, ["p"], x, y, Normal(), fisher)
    close(measure(net, x, y, Normal(), fisher).factors["p"], (want.diag(),))


@pytest.mark.parametrize("route", ["symbolic_trace", "export"])
def test_a_matrix_that_is_computed_with_before_the_data(measure: Measure, route: str) -> None:
    """The batch counts as one case, and its rows as uncorrelated positions of it."""
    model, x = Net(lambda x, p: torch.tanh(x + p.cumsum(0)), (6, 4)), torch.randn(5, 6, 4)
    y = Normal().draw(model(x))
    net = kfac_fx.transform(model, (x,), capture=route)
    reason = net.curvature.blocks["p"].reason
    assert reason is not None and "the batch counts as one case" in reason
    found = measure(net, x, y, Normal(), "empirical").factors["p"]
    (g,) = torch.autograd.grad(Normal().nll(model(x), y), model.p)
    close(found, (torch.ones(6), g.T @ g / 6 / 5))


@both_fishers
def test_used_twice(measure: Measure, fisher: str) -> None:
    """Two elementwise uses of one parameter: the covariance of the whole per-case gradient."""
    model, x = Net(lambda x, p: torch.tanh(x + p) * p, (4,)), torch.randn(5, 3, 4)
    likelihood = Categorical()
    y = likelihood.draw(model(x))
    net = kfac_fx.transform(model)
    want = oracles.covariance(model, ["p"], x, y, likelihood, fisher)
    if net.curvature.blocks["p"].approximation == "diagonal":
        pytest.skip("counted as a use without a rule")
    close(measure(net, x, y, likelihood, fisher).factors["p"], (want,))


COPIES: dict[str, tuple[Use, tuple[int, ...]]] = {
    "expand": (lambda x, p: p.expand(x.shape[0], -1, -1), (1, 2, 4)),
    "repeat": (lambda x, p: p.repeat(x.shape[0], 1, 1), (1, 2, 4)),
    "repeat to one more dimension": (lambda x, p: p.repeat(x.size(0), 1, 1), (2, 4)),
}


@both_fishers
@pytest.mark.parametrize("kind", COPIES)
def test_copies_for_all_cases(measure: Measure, kind: str, fisher: str) -> None:
    """Class tokens and queries of attention: what is not entry by entry takes the copies."""
    copies, shape = COPIES[kind]
    model = Net(lambda x, p: torch.cat([copies(x, p), x], dim=1).cumsum(1), shape)
    x, likelihood = torch.randn(5, 3, 4), Categorical()
    y = likelihood.draw(model(x))
    net = kfac_fx.transform(model, strict=True)
    want = oracles.covariance(model, ["p"], x, y, likelihood, fisher)
    close(measure(net, x, y, likelihood, fisher).factors["p"], (want,))


def test_copies_of_entries_are_no_cases() -> None:
    model = Net(lambda x, p: torch.cat([p.repeat(x.shape[0], 3, 1), x], 1).cumsum(1), (1, 1, 4))
    block = kfac_fx.transform(model).curvature.blocks["p"]
    assert block.approximation == "diagonal" and "repeat" in str(block.reason)


UNKNOWN: dict[str, Use] = {
    "exp(p)": lambda x, p: x * p.exp(),
    "linear of a function of p": lambda x, p: F.linear(x, torch.outer(p, p)),
    "where": lambda x, p: torch.where(x > 0, x, p),
    "class token": lambda x, p: torch.cat([p.expand(x.shape[0], 1, -1), x], dim=1).cumsum(1),
    "gather": lambda x, p: x * p[torch.tensor([0, 1, 1, 3])],
    "prelu": lambda x, p: F.prelu(x.transpose(1, 2), p).transpose(1, 2),
}


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=lambda one: one.name)
@pytest.mark.parametrize("kind", UNKNOWN)
def test_other_uses(measure: Measure, kind: str, likelihood: Likelihood) -> None:
    """Without a rule: the squared gradient of the summed NLL over the terms, and a reason.

    A rule that knows one of these uses must give the covariance instead.
    """
    model, x = Net(UNKNOWN[kind], (4,)), torch.randn(5, 3, 4)
    y = likelihood.draw(model(x))
    net = kfac_fx.transform(model)
    block = net.curvature.blocks["p"]
    (found,) = measure(net, x, y, likelihood, "empirical").factors["p"]
    if block.approximation == "full":
        close((found,), (oracles.covariance(model, ["p"], x, y, likelihood, "empirical"),))
        return
    assert block.approximation == "diagonal" and block.reason
    outputs = model(x)
    (gradient,) = torch.autograd.grad(likelihood.nll(outputs, y), model.p)
    close((found,), (gradient.square() / likelihood.terms(outputs, y),))


@pytest.mark.parametrize("fisher", ["sampled", "exact", "empirical"])
@pytest.mark.parametrize("kind", UNKNOWN)
def test_other_uses_under_every_estimator(measure: Measure, kind: str, fisher: str) -> None:
    """Finite and never negative, exact where a rule knows it; other blocks are not disturbed."""
    model, x, likelihood = Net(UNKNOWN[kind], (4,)), torch.randn(5, 3, 4), Categorical()
    y = likelihood.draw(model(x))
    factors = measure(kfac_fx.transform(model), x, y, likelihood, fisher).factors
    (found,) = factors["p"]
    if found.dim() == 2 and fisher != "sampled":
        close((found,), (oracles.covariance(model, ["p"], x, y, likelihood, fisher),))
    assert found.isfinite().all() and (found.diag() if found.dim() == 2 else found).min() >= 0
    assert found.abs().max() > 0
    if fisher != "sampled":
        close(factors["head"], oracles.kronecker(model, ["head"], x, y, likelihood, fisher))


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.out = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(torch.tanh(self.tokens(ids)).mean(1))


def test_embedding_is_covered(measure: Measure) -> None:
    """Some block of the embedding exists, and its neighbour is exact."""
    model, ids = Embedded(), torch.randint(7, (5, 3))
    net = kfac_fx.transform(model)
    assert any("tokens.weight" in block.parameters for block in net.curvature.blocks.values())
    factors = measure(net, ids, None, Categorical()).factors
    close(factors["out"], oracles.kronecker(model, ["out"], ids, None, Categorical()))


@both_fishers
def test_duplicated_batch_and_reduction(measure: Measure, fisher: str) -> None:
    model, x, likelihood = Net(lambda x, p: x * p, (3, 4)), torch.randn(5, 3, 4), Normal()
    y = likelihood.draw(model(x))
    net = kfac_fx.transform(model)
    want = measure(net, x, y, likelihood, fisher).factors["p"]
    twice = measure(net, torch.cat([x, x]), torch.cat([y, y]), likelihood, fisher).factors
    mean = measure(net, x, y, likelihood, fisher, reduction="mean").factors
    close(twice["p"], want)
    close(mean["p"], want)
