"""Full covariances of scale and shift against per-case gradients."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support import oracles
from support.networks import RMSNorm
from support.oracles import LIKELIHOODS, Bernoulli, Categorical, Likelihood, Measure, Normal, close
from torch import Tensor, nn

import kfac_fx
from kfac_fx.ops.thresholds import THRESHOLDS

pytestmark = pytest.mark.usefixtures("float64")
both_fishers = pytest.mark.parametrize("fisher", ["exact", "empirical"])
every_likelihood = pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=lambda one: one.name)


class Net(nn.Module):
    """A normalisation in the middle, its scale and shift away from (1, 0)."""

    def __init__(self, norm: nn.Module, head: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = norm
        self.head = nn.LazyLinear(3) if head is None else head
        for parameter in norm.parameters():
            parameter.data = torch.rand_like(parameter) + 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(x)).flatten(1))


NORMS = {
    "layer": (lambda: nn.LayerNorm(5), (5,)),
    "layer tokens": (lambda: nn.LayerNorm(5), (3, 5)),
    "layer two axes": (lambda: nn.LayerNorm((3, 4)), (2, 3, 4)),
    "layer scale only": (lambda: nn.LayerNorm(5, bias=False), (3, 5)),
    "group": (lambda: nn.GroupNorm(2, 4), (4, 3, 2)),
    "group vectors": (lambda: nn.GroupNorm(2, 4), (4,)),
    "instance 1d": (lambda: nn.InstanceNorm1d(3, affine=True), (3, 6)),
    "instance 2d": (lambda: nn.InstanceNorm2d(3, affine=True), (3, 3, 2)),
    "rms": (lambda: nn.RMSNorm(5), (3, 5)),
    "rms two axes": (lambda: nn.RMSNorm((2, 3)), (2, 3)),
    "rms by hand": (lambda: RMSNorm(5), (3, 5)),
    "batch eval": (lambda: nn.BatchNorm1d(4).eval(), (4,)),
    "batch2d eval": (lambda: nn.BatchNorm2d(3).eval(), (3, 2, 2)),
}


def names_of(norm: nn.Module) -> list[str]:
    return [f"norm.{name}" for name, _ in norm.named_parameters()]


@both_fishers
@every_likelihood
@pytest.mark.parametrize("kind", NORMS)
def test_independent_cases(
    measure: Measure, kind: str, likelihood: Likelihood, fisher: str
) -> None:
    """Norms in which no case sees another."""
    build, shape = NORMS[kind]
    model, x = Net(build()), torch.randn(5, *shape)
    y = likelihood.draw(model(x))
    net = kfac_fx.transform(model)
    names = names_of(model.norm)
    factors = measure(net, x, y, likelihood, fisher).factors
    block = net.curvature.blocks["norm"]
    assert list(block.parameters) == names and block.approximation == "full"
    close(factors["norm"], (oracles.covariance(model, names, x, y, likelihood, fisher),))


BATCH_NORMS = {
    "1d": (lambda: nn.BatchNorm1d(4), (4,)),
    "1d positions": (lambda: nn.BatchNorm1d(4), (4, 3)),
    "2d": (lambda: nn.BatchNorm2d(3), (3, 2, 4)),
    "3d": (lambda: nn.BatchNorm3d(2), (2, 2, 2, 2)),
    "untracked": (lambda: nn.BatchNorm2d(3, track_running_stats=False), (3, 2, 2)),
}


@pytest.mark.parametrize(
    "likelihood, fisher",
    [(one, "empirical") for one in LIKELIHOODS] + [(Normal(), "exact"), (Bernoulli(), "exact")],
    ids=lambda one: one if isinstance(one, str) else one.name,
)
@pytest.mark.parametrize("kind", BATCH_NORMS)
def test_batch_norm_in_training(
    measure: Measure, kind: str, likelihood: Likelihood, fisher: str
) -> None:
    build, shape = BATCH_NORMS[kind]
    model, x = Net(build()), torch.randn(6, *shape)
    y = likelihood.draw(model(x))
    factors = measure(kfac_fx.transform(model), x, y, likelihood, fisher).factors
    want = oracles.batch_norm_covariance(model, "norm", x, y, likelihood, fisher)
    close(factors["norm"], (want,))


@pytest.mark.parametrize("kind", [*NORMS, *BATCH_NORMS])
def test_some_cases_at_once(measure: Measure, kind: str) -> None:
    """As large batches are read: parts of two cases, and a rest."""
    _, shape = (NORMS | BATCH_NORMS)[kind]
    check = test_independent_cases if kind in NORMS else test_batch_norm_in_training
    with THRESHOLDS.changed(at_once=2 * math.prod(shape)):
        check(measure, kind, likelihood=Categorical(), fisher="empirical")


class FunctionalNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.rand(4) + 1), nn.Parameter(torch.rand(4))
        self.c, self.d = nn.Parameter(torch.rand(4) + 1), nn.Parameter(torch.rand(4))
        self.e = nn.Parameter(torch.rand(2, 3) + 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(F.layer_norm(x, (4,), self.a, self.b))
        x = torch.tanh(F.group_norm(x.transpose(1, 2), 2, self.c, self.d))
        return F.rms_norm(x.reshape(-1, 2, 6)[..., :3], (2, 3), self.e).flatten(1)


@both_fishers
def test_functional(measure: Measure, fisher: str) -> None:
    """F.layer_norm and its like, and scales that are written out."""
    model, x, likelihood = FunctionalNorms(), torch.randn(5, 3, 4), Categorical()
    y = likelihood.draw(model(x))
    net = kfac_fx.transform(model)
    factors = measure(net, x, y, likelihood, fisher).factors
    for names in (["a", "b"], ["c", "d"], ["e"]):
        want = oracles.covariance(model, names, x, y, likelihood, fisher)
        close(factors[names[0]], (want,))


@pytest.mark.parametrize("frozen, trained", [("weight", "bias"), ("bias", "weight")])
@pytest.mark.parametrize("kind", ["layer tokens", "group", "batch2d eval"])
def test_half_frozen(measure: Measure, kind: str, frozen: str, trained: str) -> None:
    """A frozen half leaves the covariance of the other half."""
    build, shape = NORMS[kind]
    model, x = Net(build()), torch.randn(5, *shape)
    model(x)
    model.norm.get_parameter(frozen).requires_grad_(False)
    net = kfac_fx.transform(model)
    (name,) = (n for n, b in net.curvature.blocks.items() if f"norm.{trained}" in b.parameters)
    want = oracles.covariance(model, [f"norm.{trained}"], x, None, Categorical())
    close(measure(net, x, None, Categorical()).factors[name], (want,))


@pytest.mark.parametrize("channels", [512, 513])
def test_size_limit(measure: Measure, channels: int) -> None:
    """Above 2C = 1024 the covariance is cut to the pairs (gamma_c, beta_c)."""
    model = Net(nn.LayerNorm(channels), nn.Linear(channels, 1))
    x, likelihood = torch.randn(3, channels), Normal()
    net = kfac_fx.transform(model)
    (found,) = measure(net, x, None, likelihood).factors["norm"]
    full = oracles.covariance(model, ["norm.weight", "norm.bias"], x, None, likelihood)
    if channels == 512:
        close((found,), (full,))
        return
    rows = torch.stack([torch.arange(channels), torch.arange(channels) + channels], dim=1)
    close((found,), (full[rows[:, :, None], rows[:, None, :]],))
    assert net.curvature.blocks["norm"].approximation == "pairs"


@pytest.mark.parametrize("channels, approximation", [(1024, "full"), (1025, "diagonal")])
def test_size_limit_of_a_scale(measure: Measure, channels: int, approximation: str) -> None:
    model = Net(nn.RMSNorm(channels), nn.Linear(channels, 1))
    x, likelihood = torch.randn(3, channels), Normal()
    net = kfac_fx.transform(model)
    assert net.curvature.blocks["norm"].approximation == approximation
    want = oracles.covariance(model, ["norm.weight"], x, None, likelihood)
    found = measure(net, x, None, likelihood).factors["norm"]
    close(found, (want if approximation == "full" else want.diag(),))


@both_fishers
def test_duplicated_batch_and_reduction(measure: Measure, fisher: str) -> None:
    """Batch statistics do not change when the batch is repeated, nor may the factors."""
    model, likelihood, x = Net(nn.BatchNorm2d(3)), Normal(), torch.randn(5, 3, 2, 2)
    y = likelihood.draw(model(x))
    net = kfac_fx.transform(model)
    want = measure(net, x, y, likelihood, fisher).factors
    mean = measure(net, x, y, likelihood, fisher, reduction="mean").factors
    close(mean["norm"], want["norm"])
    if fisher == "empirical":
        twice = measure(net, torch.cat([x, x]), torch.cat([y, y]), likelihood, fisher).factors
        close(twice["norm"], want["norm"])


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_layer_above_batch_norm(measure: Measure, fisher: str) -> None:
    """A layer whose output meets other cases takes g at its own output."""
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2))
    x, likelihood = torch.randn(6, 4), Bernoulli()
    y = likelihood.draw(model(x))
    factors = measure(kfac_fx.transform(model), x, y, likelihood, fisher).factors
    _, gradients, terms = oracles.output_gradients(model, "0", x, y, likelihood, fisher)
    close((factors["0"][1],), (sum(g.T @ g for g in gradients) / terms,))


class FlattenedTokens(nn.Module):
    """Tokens become rows before the normalisation, and cases again after it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.scale, self.head = (
            nn.LayerNorm(4),
            nn.Parameter(torch.rand(4)),
            nn.Linear(4, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.tanh(self.norm(x.reshape(-1, 4)) * self.scale)
        return self.head(rows).reshape(-1, 3, 3).sum(1)


@pytest.mark.parametrize(
    "name, names", [("norm", ["norm.weight", "norm.bias"]), ("scale", ["scale"])]
)
def test_flattened_tokens(measure: Measure, name: str, names: list[str]) -> None:
    """Tokens that were flattened into cases before the norm."""
    model, x, likelihood = FlattenedTokens(), torch.randn(5, 3, 4), Normal()
    found = measure(kfac_fx.transform(model), x, None, likelihood).factors[name]
    close(found, (oracles.covariance(model, names, x, None, likelihood),))
