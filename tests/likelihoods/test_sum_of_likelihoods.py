"""Networks with several outputs, each with a likelihood and a weight of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import oracles
from support.oracles import Categorical, Joint, Normal, close
from support.steps import cloned_factors, one_step
from torch import Tensor, nn

import kfac_fx
from kfac_fx import errors, likelihoods

pytestmark = pytest.mark.usefixtures("float64")
JOINT = Joint(((Categorical(), 1.0, (2, 3)), (Normal(0.5), 0.3, (2,))))
TUPLE = likelihoods.Sum((("categorical", 1.0), (likelihoods.Normal(0.5), 0.3)))
NAMED = likelihoods.Sum({"words": ("categorical", 1.0), "box": (likelihoods.Normal(0.5), 0.3)})
LAYERS = ("trunk", "words", "box")


class Heads(nn.Module):
    """Two classifications and a regression a case."""

    def __init__(self, form: str = "flat") -> None:
        super().__init__()
        self.form = form
        self.trunk, self.words, self.box = nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.trunk(x))
        words, box = self.words(h), self.box(h)
        if self.form == "flat":
            return torch.cat([words, box], 1)
        if self.form == "tuple":
            return words.unflatten(1, (2, 3)), box
        return {"words": words.unflatten(1, (2, 3)), "box": box, "hidden": h}


def twins(form: str) -> tuple[Heads, Heads]:
    one, other = Heads(), Heads(form)
    other.load_state_dict(one.state_dict())
    return one, other


def factors(
    net: nn.Module, likelihood: likelihoods.Sum, x: Tensor, fisher: str, **options: Any
) -> dict[str, tuple[Tensor, ...]]:
    preconditioner = kfac_fx.Preconditioner(net, likelihood, damping=1e-2, fisher=fisher, **options)

    def total(outputs: Any) -> Tensor:
        tensors = outputs.values() if isinstance(outputs, dict) else outputs
        return sum(tensor.sum() for tensor in tensors)

    one_step(preconditioner, net, x, total)
    return cloned_factors(preconditioner)


@pytest.mark.parametrize(("form", "likelihood"), [("tuple", TUPLE), ("dict", NAMED)])
def test_exact_factors(form: str, likelihood: likelihoods.Sum) -> None:
    """Those of the weighted sum of the mean NLLs, outputs in tuples and in dictionaries."""
    flat, model = twins(form)
    x = torch.randn(6, 4)
    found = factors(kfac_fx.transform(model), likelihood, x, "exact")
    for name in LAYERS:
        close(found[name], oracles.kronecker(flat, [name], x, None, JOINT))


def test_sampled_factors_of_a_sum_have_the_exact_mean() -> None:
    """The mean of 32 independent estimates, each of 200 draws a case, within 5 standard errors."""
    flat, model = twins("tuple")
    x, net = torch.randn(2, 4), kfac_fx.transform(model)
    generator = torch.Generator().manual_seed(0)
    runs = [
        factors(net, TUPLE, x.repeat(200, 1), "sampled", generator=generator) for _ in range(32)
    ]
    for name in LAYERS:
        A, want = oracles.kronecker(flat, [name], x, None, JOINT)
        close((runs[0][name][0],), (A,))
        draws = torch.stack([run[name][1] for run in runs])
        error = draws.std(0) / len(draws) ** 0.5
        assert ((draws.mean(0) - want).abs() <= 5 * error + 1e-12).all(), name


def test_sums_of_sums_and_parts_without_terms() -> None:
    """Weights multiply; a part whose targets are all ignored leaves the others as they are."""
    flat, model = twins("tuple")
    x, net = torch.randn(6, 4), kfac_fx.transform(model)
    nested = likelihoods.Sum([(likelihoods.Sum([("categorical", 0.5)]), 2.0), ("normal", 0.6)])
    outputs = net(x)
    made = kfac_fx.Preconditioner(net, nested, fisher="exact")
    outputs = net(x)
    made.observe(((outputs[0],), outputs[1]))
    F.mse_loss(outputs[1], torch.zeros(6, 2)).backward()
    made.step()
    for name in LAYERS:
        close(made.factors[name], oracles.kronecker(flat, [name], x, None, JOINT))
    ignored = torch.full((6, 2), -100)
    made = kfac_fx.Preconditioner(net, TUPLE, fisher="exact")
    outputs = net(x)
    made.observe(outputs, (ignored, torch.zeros(6, 2)))
    F.mse_loss(outputs[1], torch.zeros(6, 2)).backward()
    made.step()
    only = Joint(((Categorical(), 0.0, (2, 3)), JOINT.parts[1]))
    for name in ("trunk", "box"):
        close(made.factors[name], oracles.kronecker(flat, [name], x, None, only))


def test_training() -> None:
    """The loss of a step is the weighted sum; both tasks are learnt."""
    _, model = twins("dict")
    optimizer = kfac_fx.KFAC(kfac_fx.transform(model), NAMED, damping=1e-1)
    x = torch.randn(256, 4)
    y = {
        "words": torch.stack([x[:, 0] > 0, x[:, 1] > x[:, 2]], 1).long(),
        "box": torch.stack([x[:, 0] * x[:, 1], x[:, 3].cos()], 1),
    }
    f = model(x)
    want = F.cross_entropy(f["words"].flatten(0, 1), y["words"].flatten())
    want = want + 0.3 * (f["box"] - y["box"]).square().sum(1).mean()
    first = optimizer.step(x, y)
    torch.testing.assert_close(first, want.detach(), rtol=1e-12, atol=1e-12)
    losses = [optimizer.step(x, y).item() for _ in range(60)]
    assert losses[-1] < 0.1 * first


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "one tensor": (lambda: torch.zeros(2, 5), "tuple of 2, got Tensor"),
    "three outputs": (lambda: (torch.zeros(2, 3),) * 3, "tuple of 3"),
    "a mapping": (lambda: {"box": torch.zeros(2, 3)}, "mapping with 'box'"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_outputs_that_do_not_fit(kind: str) -> None:
    outputs, text = WRONG[kind]
    net = kfac_fx.transform(Heads("tuple"))
    with pytest.raises(errors.LikelihoodError, match=text):
        kfac_fx.Preconditioner(net, TUPLE).observe(outputs())


def test_wrong_sums() -> None:
    """No part, a weight that is not positive, an unknown name, and the empirical Fisher."""
    for parts in (
        [],
        [("normal", 0.0)],
        [("normal", -1.0)],
        ["normal"],
        [("normal", float("nan"))],
    ):
        with pytest.raises(errors.LikelihoodError):
            likelihoods.Sum(parts)
    with pytest.raises(errors.UnknownOptionError, match="norml"):
        likelihoods.Sum([("norml", 1.0)])
    with pytest.raises(errors.UnknownOptionError, match="empirical"):
        kfac_fx.Preconditioner(kfac_fx.transform(Heads("tuple")), TUPLE, fisher="empirical")
    optimizer = kfac_fx.KFAC(kfac_fx.transform(Heads("tuple")), TUPLE)
    with pytest.raises(errors.LikelihoodError, match="targets"):
        optimizer.step(torch.randn(3, 4), (torch.zeros(3, 2, dtype=torch.long), None))
