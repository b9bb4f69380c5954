"""Likelihoods: draws, class weights, ignored targets, other axes, variances, distributions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import oracles
from support.oracles import Bernoulli, Categorical, Likelihood, Measure, Normal, close
from torch import Tensor, nn
from torch import distributions as D

import kfac_fx
from kfac_fx import likelihoods
from kfac_fx.likelihoods.builtin import Softmax

pytestmark = pytest.mark.usefixtures("float64")
both_fishers = pytest.mark.parametrize("fisher", ["exact", "empirical"])


class Net(nn.Module):
    """One block of each kind: Kronecker, full covariance of a norm, elementwise."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.out = nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.rand(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.norm(torch.tanh(self.fc(x))) * self.scale))


PARAMETERS = {"norm": ["norm.weight", "norm.bias"], "scale": ["scale"]}


def check(
    model: nn.Module,
    factors: dict[str, tuple[Tensor, ...]],
    x: Tensor,
    y: Tensor | None,
    likelihood: Likelihood,
    fisher: str,
) -> None:
    for name in ("fc", "out"):
        close(factors[name], oracles.kronecker(model, [name], x, y, likelihood, fisher))
    for name, parameters in PARAMETERS.items():
        want = oracles.covariance(model, parameters, x, y, likelihood, fisher)
        close(factors[name], (want,))


# --------------------------------------------------------------------------------- sampled draws
WEIGHT = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
SAMPLED: dict[str, tuple[Likelihood, object, tuple[int, ...]]] = {
    "categorical": (Categorical(), "categorical", (2, 4)),
    "categorical tokens": (Categorical(), "categorical", (2, 3, 4)),
    "weighted": (Categorical(WEIGHT), likelihoods.Categorical(weight=WEIGHT), (2, 4)),
    "weighted tokens": (Categorical(WEIGHT), likelihoods.Categorical(weight=WEIGHT), (2, 3, 4)),
    "bernoulli": (Bernoulli(), "bernoulli", (2, 4)),
    "bernoulli tokens": (Bernoulli(), "bernoulli", (2, 3, 4)),
    "normal": (Normal(), "normal", (2, 4)),
    "normal variance": (Normal(0.25), likelihoods.Normal(variance=0.25), (2, 4)),
    "distribution": (Categorical(), lambda f: D.Categorical(logits=f), (2, 4)),
    "distribution of events": (
        Bernoulli(),
        lambda f: D.Independent(D.Bernoulli(logits=f), 1),
        (2, 4),
    ),
}


@pytest.mark.parametrize("kind", SAMPLED)
def test_sampled_factors_have_the_exact_mean(measure: Measure, kind: str) -> None:
    """The mean of 32 independent estimates, each of 200 draws a case, within 5 standard errors."""
    likelihood, given, shape = SAMPLED[kind]
    model, x = Net(), torch.randn(shape)
    y = likelihood.draw(model(x)) if "weighted" in kind else None
    net, many = kfac_fx.transform(model), repeated(x)
    labels = None if y is None else repeated(y)
    generator = torch.Generator().manual_seed(0)
    options = {"given": given, "generator": generator}
    runs = [measure(net, many, labels, likelihood, "sampled", **options) for _ in range(32)]
    for name in ("fc", "out", "norm", "scale"):
        if name in PARAMETERS:
            want = oracles.covariance(model, PARAMETERS[name], x, y, likelihood)
        else:
            A, want = oracles.kronecker(model, [name], x, y, likelihood)
            close((runs[0].factors[name][0],), (A,))
        draws = torch.stack([run.factors[name][-1] for run in runs])
        error = draws.std(0) / len(draws) ** 0.5
        assert ((draws.mean(0) - want).abs() <= 5 * error + 1e-12).all(), name


def repeated(x: Tensor) -> Tensor:
    return x.repeat(200, *(1 for _ in x.shape[1:]))


def test_generator_makes_draws_repeatable(measure: Measure) -> None:
    net, x, likelihood = kfac_fx.transform(Net()), torch.randn(6, 4), Categorical()

    def factor(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        torch.rand(seed)  # the global generator must not matter
        run = measure(net, x, None, likelihood, "sampled", generator=generator)
        return run.factors["fc"][1]

    assert torch.equal(factor(1), factor(1))
    assert not torch.equal(factor(1), factor(2))


def test_generator_leaves_the_global_one_alone(measure: Measure) -> None:
    net, x = kfac_fx.transform(Net()), torch.randn(6, 4)
    y, generator = torch.zeros(6, dtype=torch.long), torch.Generator()
    state = torch.get_rng_state()
    measure(net, x, y, Categorical(), "sampled", generator=generator)
    assert torch.equal(state, torch.get_rng_state())


# ---------------------------------------------------------------- class weights, ignored targets
@both_fishers
@pytest.mark.parametrize("shape", [(6, 4), (4, 3, 4)], ids=["vectors", "tokens"])
def test_ignored_targets(measure: Measure, shape: tuple[int, ...], fisher: str) -> None:
    """Ignored targets contribute nothing and are not counted."""
    model, x, likelihood = Net(), torch.randn(shape), Categorical()
    y = likelihood.draw(model(x))
    y.view(-1)[::3] = -100
    factors = measure(kfac_fx.transform(model), x, y, likelihood, fisher).factors
    check(model, factors, x, y, likelihood, fisher)


@both_fishers
def test_other_ignore_index(measure: Measure, fisher: str) -> None:
    model, x, likelihood = Net(), torch.randn(4, 3, 4), Categorical(ignore_index=1)
    y = likelihood.draw(model(x))
    given = likelihoods.Categorical(ignore_index=1)
    net = kfac_fx.transform(model)
    factors = measure(net, x, y, likelihood, fisher, given=given).factors
    check(model, factors, x, y, likelihood, fisher)


def test_sampled_ignores_the_same_targets(measure: Measure) -> None:
    """Neither the values of the other targets nor the ignored cases matter to the drawn G."""
    net, x = kfac_fx.transform(Net()), torch.randn(4, 3, 4)
    y = torch.zeros(4, 3, dtype=torch.long)
    y[0] = -100
    other_targets = y.where(y < 0, 1)
    other_inputs = torch.cat([x[:1] + 1.0, x[1:]])

    def drawn(inputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        run = measure(net, inputs, targets, Categorical(), "sampled", generator=generator)
        return tuple(run.factors[name][-1] for name in ("fc", "norm", "scale", "out"))

    close(drawn(x, other_targets), drawn(x, y))
    close(drawn(other_inputs, y), drawn(x, y))


@both_fishers
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("shape", [(6, 4), (4, 3, 4)], ids=["vectors", "tokens"])
def test_class_weights(
    measure: Measure, shape: tuple[int, ...], reduction: str, fisher: str
) -> None:
    """The mean loss over the sum of the weights; empirical gradients are those of the loss."""
    model, x, likelihood = Net(), torch.randn(shape), Categorical(WEIGHT)
    y = likelihood.draw(model(x))
    y.view(-1)[1] = -100
    given = likelihoods.Categorical(weight=WEIGHT)
    net = kfac_fx.transform(model)
    factors = measure(net, x, y, likelihood, fisher, reduction, given=given).factors
    check(model, factors, x, y, likelihood, fisher)


# ------------------------------------------------------------------------- axes, events, variance
class ClassesFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(x)).movedim(-1, 1)


@both_fishers
def test_class_axis(measure: Measure, fisher: str) -> None:
    """Classes on an axis that is not the last."""
    model, x, likelihood = ClassesFirst(), torch.randn(4, 2, 3, 4), Categorical(dim=1)
    y = likelihood.draw(model(x))
    given = likelihoods.Categorical(dim=1)
    net = kfac_fx.transform(model)
    factors = measure(net, x, y, likelihood, fisher, given=given).factors
    close(factors["fc"], oracles.kronecker(model, ["fc"], x, y, likelihood, fisher))


@both_fishers
@pytest.mark.parametrize("variance", [0.25, 4.0])
def test_variance(measure: Measure, variance: float, fisher: str) -> None:
    """A normal likelihood of known variance scales the Fisher by its inverse."""
    model, x, likelihood = Net(), torch.randn(5, 4), Normal(variance)
    y = likelihood.draw(model(x))
    given = likelihoods.Normal(variance=variance)
    net = kfac_fx.transform(model)
    factors = measure(net, x, y, likelihood, fisher, given=given).factors
    check(model, factors, x, y, likelihood, fisher)


@both_fishers
@pytest.mark.parametrize("given", [likelihoods.Bernoulli(), "bernoulli"], ids=["object", "name"])
def test_event_is_all_but_the_first_axis(measure: Measure, given: object, fisher: str) -> None:
    model, x, likelihood = Net(), torch.randn(4, 3, 4), Bernoulli()
    y = likelihood.draw(model(x))
    net = kfac_fx.transform(model)
    factors = measure(net, x, y, likelihood, fisher, given=given).factors
    check(model, factors, x, y, likelihood, fisher)


# --------------------------------------------------------- losses and distributions of one's own
LOSSES: dict[str, tuple[Likelihood, Callable[[Tensor, Tensor], Tensor]]] = {
    "cross entropy, mean": (Categorical(), nn.CrossEntropyLoss()),
    "cross entropy, sum": (Categorical(), nn.CrossEntropyLoss(reduction="sum")),
    "bce, mean": (Bernoulli(), nn.BCEWithLogitsLoss()),
    "bce, sum": (Bernoulli(), nn.BCEWithLogitsLoss(reduction="sum")),
    "mse, mean": (Normal(), nn.MSELoss()),
    "mse, sum": (Normal(), nn.MSELoss(reduction="sum")),
    "half mse": (Normal(), lambda f, y: 0.5 * (f - y).square().sum(1).mean()),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_scale_of_the_loss_is_undone(kind: str) -> None:
    """MSELoss has no 1/2 and divides by the outputs too; the empirical Fisher does not care."""
    likelihood, loss = LOSSES[kind]
    model, x = Net(), torch.randn(6, 4)
    y = likelihood.draw(model(x))
    net = kfac_fx.transform(model)
    preconditioner = kfac_fx.Preconditioner(
        net, likelihood=likelihood.name, damping=1e-2, fisher="empirical"
    )
    outputs = net(x)
    preconditioner.observe(outputs, y)
    loss(outputs, y).backward()
    preconditioner.step()
    check(model, preconditioner.factors, x, y, likelihood, "empirical")


DISTRIBUTIONS: dict[str, tuple[Likelihood, Callable[[Tensor], D.Distribution]]] = {
    "categorical": (Categorical(), lambda f: D.Categorical(logits=f)),
    "bernoulli": (Bernoulli(), lambda f: D.Independent(D.Bernoulli(logits=f), 1)),
    "normal": (Normal(4.0), lambda f: D.Independent(D.Normal(f, 2.0), 1)),
}


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_distribution(measure: Measure, kind: str) -> None:
    """A callable from outputs to a torch distribution is a likelihood."""
    likelihood, given = DISTRIBUTIONS[kind]
    model, x = Net(), torch.randn(6, 4)
    y = likelihood.draw(model(x))
    net = kfac_fx.transform(model)
    factors = measure(net, x, y, likelihood, "empirical", given=given).factors
    check(model, factors, x, y, likelihood, "empirical")


def test_terms_are_the_elements_of_the_batch_shape(measure: Measure) -> None:
    """Three independent normals a case are three terms, so the moments are of a third."""
    model, x, likelihood = Net(), torch.randn(6, 4), Normal()
    y = likelihood.draw(model(x))
    net, given = kfac_fx.transform(model), lambda f: D.Normal(f, 1.0)
    factors = measure(net, x, y, likelihood, "empirical", given=given).factors
    A, G = oracles.kronecker(model, ["fc"], x, y, likelihood, "empirical")
    close(factors["fc"], (A, G / 3))


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_exact_fisher_of_a_distribution(measure: Measure, kind: str) -> None:
    """Either known, then exact, or refused by name."""
    likelihood, given = DISTRIBUTIONS[kind]
    model, x = Net(), torch.randn(6, 4)
    net = kfac_fx.transform(model)
    try:
        factors = measure(net, x, None, likelihood, "exact", given=given).factors
    except kfac_fx.errors.LikelihoodError as error:
        assert "exact" in str(error)
    else:
        check(model, factors, x, None, likelihood, "exact")


@pytest.mark.parametrize("shape", [(3,), (2, 4), (2, 3, 4)])
def test_softmax_is_the_categorical_distribution(shape: tuple[int, ...]) -> None:
    logits = (20 * torch.randn(shape)).requires_grad_()
    found, want = Softmax(logits), D.Categorical(logits=logits)
    values = want.sample((5,))
    torch.testing.assert_close(found.log_prob(values), want.log_prob(values))
    torch.testing.assert_close(
        *(torch.autograd.grad(d.log_prob(values).sum(), logits) for d in (found, want))
    )
    for name in ("logits", "probs", "mean", "mode", "variance"):
        torch.testing.assert_close(getattr(found, name), getattr(want, name), equal_nan=True)
    torch.testing.assert_close(found.entropy(), want.entropy())
    torch.testing.assert_close(D.kl_divergence(found, want), torch.zeros(shape[:-1]))
    assert found.sample((7,)).shape == want.sample((7,)).shape
    assert torch.equal(found.enumerate_support(), want.enumerate_support())
    assert (found.batch_shape, found.event_shape) == (want.batch_shape, want.event_shape)
    wide = (6, *shape[:-1])
    torch.testing.assert_close(found.expand(wide).logits, want.expand(wide).logits)
