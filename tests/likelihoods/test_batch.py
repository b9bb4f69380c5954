"""What a likelihood says of one batch: against autograd and the oracles' dense Fishers.

An objective is a mean over terms; derivatives of ``exact`` and ``root`` are columns of a root of
the Fisher of the outputs, and the mean of ``sampled`` over all signs is that Fisher.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import oracles
from support.asserts import assert_near
from torch import Tensor
from torch import distributions as D

from kfac_fx import likelihoods
from kfac_fx.errors import LikelihoodError
from kfac_fx.likelihoods.batch import (
    BatchLikelihood,
    batch_likelihood,
    root_columns,
    signs_of,
    wide,
)
from kfac_fx.likelihoods.named import Custom
from kfac_fx.parallel import Agreement
from kfac_fx.statistics.user_graph import derivatives

pytestmark = pytest.mark.usefixtures("float64")
assert_close = functools.partial(assert_near, rtol=1e-9)
CASES = 4
KINDS = {
    "categorical": (likelihoods.Categorical(), oracles.Categorical()),
    "bernoulli": (likelihoods.Bernoulli(), oracles.Bernoulli()),
    "normal": (likelihoods.Normal(variance=0.5), oracles.Normal(0.5)),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def outputs(*shape: int) -> Tensor:
    return torch.randn(CASES, *shape).requires_grad_()


def gram_of_columns(batch: BatchLikelihood, f: Tensor) -> Tensor:
    """The sum of g g^T over what ``exact`` yields, a matrix for each case: [cases, n, n]."""
    total = 0
    for scalar in batch.exact():
        (g,) = torch.autograd.grad(scalar, f, retain_graph=True)
        g = g.flatten(1)
        total = total + g[:, :, None] * g[:, None, :]
    return total


@every_kind
@pytest.mark.parametrize("shape", [(3,), (2, 3)], ids=["vectors", "tokens"])
def test_nll_is_a_sum_over_terms(kind: str, shape: tuple[int, ...]) -> None:
    """A class is a term; of the other likelihoods all outputs of a case are one."""
    given, reference = KINDS[kind]
    f = outputs(*shape)
    y = reference.draw(f.detach())
    batch = batch_likelihood(given, f, y)
    terms = CASES * 2 if kind == "categorical" and len(shape) > 1 else CASES
    assert batch.count == terms and batch.has_targets
    (found,) = torch.autograd.grad(batch.nll(), f)
    (expected,) = torch.autograd.grad(reference.nll(f, y), f)
    assert_close(found, expected)
    assert_close(batch_likelihood(given, f, y).mean_nll() * batch.count, batch.nll())


@every_kind
@pytest.mark.parametrize("shape", [(3,), (2, 3)], ids=["vectors", "tokens"])
def test_exact_columns_are_a_root_of_each_case_s_fisher(kind: str, shape: tuple[int, ...]) -> None:
    given, reference = KINDS[kind]
    f = outputs(*shape)
    found = gram_of_columns(batch_likelihood(given, f), f)
    for n in range(CASES):
        assert_close(found[n], reference.fisher(f[n : n + 1], None))


@every_kind
def test_a_selected_column_is_one_of_them(kind: str) -> None:
    """What a traced pass does, where a Python loop over the columns has no place."""
    given, _ = KINDS[kind]
    f = outputs(3)
    batch = batch_likelihood(given, f)
    columns = [torch.autograd.grad(one, f, retain_graph=True)[0] for one in batch.exact()]
    for index, column in enumerate(columns):
        select = torch.eye(len(columns))[index]
        scalar = sum(batch.exact(select))
        assert_close(torch.autograd.grad(scalar, f, retain_graph=True)[0], column)


@every_kind
def test_the_root_s_jacobian_gives_the_fisher(kind: str) -> None:
    given, reference = KINDS[kind]
    f = outputs(3)
    root = batch_likelihood(given, f).root()
    J = torch.stack([torch.autograd.grad(r, f, retain_graph=True)[0].flatten() for r in root])
    blocks = [reference.fisher(f[n : n + 1], None) for n in range(CASES)]
    assert_close(J.T @ J, torch.block_diag(*blocks))


@every_kind
@pytest.mark.parametrize("shape", [(3,), (2, 2)], ids=["vectors", "tokens"])
def test_the_mean_over_all_signs_is_the_fisher(kind: str, shape: tuple[int, ...]) -> None:
    """Not an estimate: every choice of signs is made once."""
    given, reference = KINDS[kind]
    f = outputs(*shape)
    batch = batch_likelihood(given, f)
    (signs,) = (signs_of(distribution) for distribution in batch.distributions)
    assert signs is not None and signs.shape[0] == CASES
    choices = list(itertools.product((1.0, -1.0), repeat=signs.shape[1:].numel()))
    total = 0
    for choice in choices:
        noise = torch.tensor(choice).reshape(signs.shape[1:]).expand(signs.shape)
        (g,) = derivatives(batch.sampled([noise]), [f])
        g = g.flatten(1)
        total = total + g[:, :, None] * g[:, None, :]
    for n in range(CASES):
        assert_close(total[n] / len(choices), reference.fisher(f[n : n + 1], None))


@every_kind
def test_signs_depend_on_the_seed_alone(kind: str) -> None:
    """Torch's own stream is left where it was, and a seed gives what the signs of it give."""
    given, _ = KINDS[kind]
    f = outputs(3)
    batch = batch_likelihood(given, f)
    before = torch.random.get_rng_state()

    def derivative(noise: int | list[Tensor]) -> Tensor:
        return derivatives(batch.sampled(noise), [f])[0]

    assert torch.equal(derivative(1), derivative(1))
    assert not torch.equal(derivative(1), derivative(2))
    signs = signs_of(batch.distributions[0])
    assert signs is not None and set(signs.sample(1).unique().tolist()) == {-1.0, 1.0}
    assert_close(derivative([signs.sample(1)]), derivative(1))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_closed_form_of_a_softmax_is_what_autograd_makes_of_its_columns(
    dtype: torch.dtype,
) -> None:
    f = torch.randn(50, 2, 7, dtype=dtype).requires_grad_()
    batch = batch_likelihood(likelihoods.Categorical(), f)
    signs = signs_of(batch.distributions[0])
    assert signs is not None
    (columns,) = root_columns(batch.distributions[0])
    (want,) = torch.autograd.grad(columns, f, grad_outputs=signs.sample(5))
    (found,) = derivatives(batch.sampled(5), [f])
    assert found is not None and torch.equal(found, want)


class Shifted(D.Normal):
    """Another distribution than its ancestor, as its draws say."""

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return super().sample(sample_shape) + 1.0


@pytest.mark.parametrize("kind", ["no root is known", "draws of its own"])
def test_targets_are_drawn_where_no_root_is_known(kind: str) -> None:
    f = outputs(3)
    with torch.no_grad():
        f.abs_()

    def distribution(f: Tensor) -> D.Distribution:
        return D.StudentT(3.0, f) if kind[0] == "n" else Shifted(f, torch.ones_like(f))

    batch = batch_likelihood(Custom(lambda f: D.Independent(distribution(f), 1)), f)
    assert signs_of(batch.distributions[0]) is None
    torch.manual_seed(3)
    y = distribution(f.detach()).sample()
    before = torch.random.get_rng_state()
    (found,) = derivatives(batch.sampled(3), [f])
    (want,) = torch.autograd.grad(-distribution(f).log_prob(y).sum(), f)
    assert_close(found, want)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_learnt_scale_has_columns_of_its_own() -> None:
    """A constant one has none: the number of signs follows from what depends on the outputs."""
    f = outputs(2)

    def likelihood(f: Tensor) -> D.Distribution:
        return D.Normal(f[:, 0], f[:, 1].exp())

    batch = batch_likelihood(Custom(likelihood), f)
    signs = signs_of(batch.distributions[0])
    assert signs is not None and signs.shape == (CASES, 2)
    total = 0
    for choice in itertools.product((1.0, -1.0), repeat=2):
        noise = torch.tensor(choice).expand(CASES, 2)
        (g,) = derivatives(batch.sampled([noise]), [f])
        total = total + g[:, :, None] * g[:, None, :] / 4
    variance = f[:, 1].exp().square()
    # Of (mean, log sigma): 1 / sigma^2 and 2.
    want = torch.diag_embed(torch.stack([1 / variance, torch.full_like(variance, 2.0)], 1))
    assert_close(total, want.detach())


def test_weights_and_ignored_targets_are_counted() -> None:
    """A term weighs as the class of the data's target; ignored ones have no part in anything."""
    weight = torch.tensor([1.0, 2.0, 0.5])
    given = likelihoods.Categorical(weight=weight, ignore_index=1)
    f, y = outputs(3), torch.tensor([0, 1, 2, 2])
    batch = batch_likelihood(given, f, y)
    assert batch.count == pytest.approx(1.0 + 0.5 + 0.5)
    assert_close(batch.nll(), F.cross_entropy(f, y, weight, ignore_index=1, reduction="sum"))
    reference = oracles.Categorical(weight, 1)
    found = gram_of_columns(batch, f)
    for n in range(CASES):
        want = reference.fisher(f[n : n + 1], y[n : n + 1])
        torch.testing.assert_close(found[n], want, rtol=1e-9, atol=1e-12)
    assert not found[1].any()


PARTS = ((oracles.Categorical(), 0.7, (3,)), (oracles.Normal(0.5), 2.0, (2, 2)))
JOINT = oracles.Joint(PARTS)
SUM = likelihoods.Sum([("categorical", 0.7), (likelihoods.Normal(variance=0.5), 2.0)])


def sum_of_parts(f: Tensor, y: tuple[Tensor, ...] | None = None) -> BatchLikelihood:
    """With the parts made comparable, as of one process."""
    batch = batch_likelihood(SUM, JOINT.split(f), y)
    good, batch = batch.of_all(OneOfTwo(), "observe")
    assert good
    return batch


@dataclass
class OneOfTwo:
    """One process of several, of which the others have `more` times as many terms."""

    more: float = 0.0
    others_good: bool = True
    size: int = 2

    def agree(self, call: str, good: bool, amount: float = 0.0) -> Agreement:
        assert call == "observe"
        return Agreement(good and self.others_good, amount * (1 + self.more))


def test_a_sum_is_the_weighted_sum_of_mean_nlls() -> None:
    """Written as one mean over the terms of all parts: docs/explanation/mathematics.md."""
    f = outputs(7)
    y = JOINT.draw(f.detach())
    batch = sum_of_parts(f, y)
    assert batch.count == 2 * CASES
    (found,) = torch.autograd.grad(batch.nll() / batch.count, f)
    (want,) = torch.autograd.grad(JOINT.nll(f, y) / CASES, f)
    assert_close(found, want)


def test_a_sum_s_fisher_is_the_weighted_sum_of_the_parts() -> None:
    f = outputs(7)
    batch = sum_of_parts(f)
    found = gram_of_columns(batch, f) / batch.count
    for n in range(CASES):
        assert_close(found[n], JOINT.fisher(f[n : n + 1], None) / CASES)


@pytest.mark.parametrize("kind", ["weights", "a sum"])
def test_the_mean_over_all_signs_is_what_the_columns_add_up_to(kind: str) -> None:
    """Where terms have weights, and parts have shares, the signs are multiplied with these."""
    f = outputs(7 if kind == "a sum" else 3)
    if kind == "a sum":
        batch = sum_of_parts(f)
    else:
        given = likelihoods.Categorical(weight=torch.tensor([1.0, 2.0, 0.5]), ignore_index=1)
        batch = batch_likelihood(given, f, torch.tensor([0, 1, 2, 2]))
    asked = [signs_of(distribution) for distribution in batch.distributions]
    shapes = [signs.shape for signs in asked if signs is not None]
    choices = list(itertools.product((1.0, -1.0), repeat=sum(s[1:].numel() for s in shapes)))
    total = 0
    for choice in choices:
        flat = torch.tensor(choice).split([shape[1:].numel() for shape in shapes])
        pairs = zip(flat, shapes, strict=True)
        noise = [part.reshape(shape[1:]).expand(shape) for part, shape in pairs]
        (g,) = derivatives(batch.sampled(noise), [f])
        total = total + g[:, :, None] * g[:, None, :]
    assert_close(total / len(choices), gram_of_columns(batch, f))


def test_terms_of_all_processes_are_counted() -> None:
    f, y = outputs(3), torch.randint(3, (CASES,))
    batch = batch_likelihood(likelihoods.Categorical(), f, y)
    good, counted = batch.of_all(OneOfTwo(more=2.0), "observe")
    assert good and counted.count == 3 * CASES
    assert_close(counted.nll(), batch.nll())  # of this process's terms, as before
    assert not batch.of_all(OneOfTwo(others_good=False), "observe")[0]
    nothing = torch.full((CASES,), -100)
    with pytest.raises(LikelihoodError, match="no likelihood term counts"):
        batch_likelihood(likelihoods.Categorical(), f, nothing).of_all(OneOfTwo(), "observe")


def test_outputs_of_low_precision_are_widened() -> None:
    low = {"a": torch.randn(2, dtype=torch.bfloat16), "b": (torch.randn(3), torch.arange(2))}
    found = wide(low)
    assert found["a"].dtype == torch.float32
    assert found["b"][0] is low["b"][0] and found["b"][1] is low["b"][1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"a": 1}, r"outputs to be a tuple of 2, got a mapping with 'a'"),
        ((torch.randn(2),), r"outputs to be a tuple of 2, got a tuple of 1"),
    ],
)
def test_outputs_that_are_not_those_of_the_parts(given: object, message: str) -> None:
    with pytest.raises(LikelihoodError, match=message):
        batch_likelihood(SUM, given)
