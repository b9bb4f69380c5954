"""The Fisher of a data set without training: its means, and operators with any damping."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.networks import mlp
from torch import Tensor, nn

import kfac_fx
from kfac_fx.errors import (
    DampingError,
    OperatorError,
    StatisticsError,
    TapsTakenError,
    UnknownOptionError,
)
from kfac_fx.linalg import spectral

pytestmark = pytest.mark.usefixtures("float64")

CASES = 10


@pytest.fixture
def model() -> nn.Module:
    return mlp(3, 4, 3)


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    return torch.randn(CASES, 3), torch.randint(3, (CASES,))


def batches(data: tuple[Tensor, Tensor], size: int = 6) -> list[tuple[Tensor, ...]]:
    """Two batches of unequal sizes."""
    return list(zip(*(part.split(size) for part in data), strict=True))


def test_uneven_batches_are_one_mean(model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    net = kfac_fx.transform(model, structure="block_tridiagonal")
    found = kfac_fx.estimate(net, batches(data), fisher="exact")
    pre = kfac_fx.Preconditioner(net, fisher="exact", structure="block_tridiagonal")
    outputs = net(data[0])
    pre.observe(outputs)
    outputs.sum().backward()
    pre.step()
    assert found.terms == CASES
    for got, want in ((found.factors, pre.factors), (found.cross_factors, pre.cross_factors)):
        assert got.keys() == want.keys()
        for name, group in want.items():
            torch.testing.assert_close(got[name], group)


@pytest.mark.parametrize("scale", ["mean", "sum"])
def test_operators_are_sums_with_any_damping(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    scale: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = kfac_fx.estimate(kfac_fx.transform(model), batches(data), fisher="exact")
    calls = []
    whole = torch.linalg.eigh
    monkeypatch.setattr(spectral.torch.linalg, "eigh", lambda m: calls.append(1) or whole(m))
    F = found.operator(scale=scale)
    decompositions = len(calls)
    eye = torch.eye(F.shape[0])
    dense = F.dense()
    A, G = found.factors["0"]
    weight = torch.kron(G, A).unflatten(0, (4, 4)).unflatten(2, (4, 4))[:, :3, :, :3]
    factor = CASES if scale == "sum" else 1
    torch.testing.assert_close(dense[:12, :12], factor * weight.reshape(12, 12))
    torch.testing.assert_close(F.trace(), dense.trace())
    torch.testing.assert_close(F.frobenius_norm(), dense.norm())
    values = torch.cat(list(F.eigenvalues().values())).sort()[0]
    torch.testing.assert_close(values, torch.linalg.eigvalsh(dense))
    calls.clear()
    for damping in (0.3, 2.0, {"0": 0.3, "2": 2.0}):
        operator = found.operator(damping, scale=scale)
        amounts = damping if isinstance(damping, dict) else {"0": damping, "2": damping}
        added = torch.cat([torch.full((16,), amounts["0"]), torch.full((15,), amounts["2"])])
        want = dense + torch.diag(added)
        torch.testing.assert_close(operator.dense(), want)
        torch.testing.assert_close(operator.logdet(), torch.logdet(want))
        V = torch.randn(F.shape[0], 5)
        torch.testing.assert_close(operator.solve(V), torch.linalg.solve(want, V))
        torch.testing.assert_close(operator @ V[:, 0], want @ V[:, 0])
        torch.testing.assert_close(operator @ V, want @ V)
    assert decompositions and not calls
    assert len(eye) == 31


def test_couplings_have_factored_damping(model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    """Of the sum it is the operator of the mean with the damping of a term, times the terms."""
    net = kfac_fx.transform(model, structure="block_tridiagonal")
    found = kfac_fx.estimate(net, batches(data), fisher="exact")
    of_sum = found.operator(0.5, scale="sum", couplings=True)
    mean = found.operator(0.5 / CASES, couplings=True)
    torch.testing.assert_close(of_sum.dense(), CASES * mean.dense())
    torch.testing.assert_close(of_sum.logdet(), torch.logdet(of_sum.dense()))
    for damping in (0.0, {"0": 1.0}):
        with pytest.raises(OperatorError, match="damping is factored"):
            found.operator(damping, couplings=True)


def test_ekfac_in_one_call(model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    """Eigenvalues are second moments of per-case gradients in the bases of the factors."""
    net = kfac_fx.transform(model, ekfac=True)
    found = kfac_fx.estimate(net, batches(data), fisher="exact", ekfac=True)
    x, _ = data
    want = torch.zeros(3, 5)
    U_A, U_G = (torch.linalg.eigh(factor)[1] for factor in found.factors["2"])
    for case in range(CASES):
        logp = net(x[case : case + 1]).log_softmax(-1)[0]
        for value in logp:
            W, b = torch.autograd.grad(value, [model[2].weight, model[2].bias], retain_graph=True)
            g = torch.cat([W, b[:, None]], 1)
            want += value.detach().exp() * (U_G.T @ g @ U_A).square() / CASES
    torch.testing.assert_close(found.eigenvalues["2"], want)
    with pytest.raises(StatisticsError, match="second time it was empty"):
        kfac_fx.estimate(net, iter(batches(data)), ekfac=True)


def test_several_draws_of_a_forward(model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    net = kfac_fx.transform(model)
    exact = kfac_fx.estimate(net, batches(data), fisher="exact").factors
    off = []
    for draws in (1, 400):
        got = kfac_fx.estimate(net, batches(data), draws=draws).factors
        torch.testing.assert_close(got["0"][0], exact["0"][0])  # A does not depend on the draw
        off.append(float((got["0"][1] - exact["0"][1]).norm() / exact["0"][1].norm()))
    assert off[1] < 0.1 < off[0]
    with pytest.raises(UnknownOptionError, match="draws nothing"):
        kfac_fx.estimate(net, batches(data), fisher="exact", draws=2)


def test_nothing_else_changes(data: tuple[Tensor, Tensor]) -> None:
    """Parameters, gradients, buffers, random stream, and an optimizer between two of its steps."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 3))
    net = kfac_fx.transform(model, ekfac=True, structure="block_diagonal")
    pre = kfac_fx.Preconditioner(net, tikhonov="ekfac", damping=0.1)

    def step() -> None:
        outputs = net(data[0])
        pre.observe(outputs)
        outputs.square().sum().backward()
        pre.step()

    step()
    model[0].weight.grad.fill_(7.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bases = [buffer.clone() for buffer in net.buffers()]
    state = torch.get_rng_state()
    seed = torch.Generator().manual_seed(1)
    seen = []
    for ekfac in (False, True):
        kfac_fx.estimate(
            net,
            batches(data),
            ekfac=ekfac,
            generator=seed,
            progress=lambda *numbers: seen.append(numbers),
        )
    assert seen == [(1, 2), (2, 2)] * 3
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), bases, strict=True))
    assert (model[0].weight.grad == 7.0).all() and model[3].weight.grad is not None
    step()
    net(data[0])
    outputs = net(data[0])
    pre.observe(outputs)
    with pytest.raises(TapsTakenError, match=r"middle of a step: call step\(\) before estimate"):
        kfac_fx.estimate(net, batches(data))


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.head(x * scale)


def test_batches_of_any_form(data: tuple[Tensor, Tensor]) -> None:
    net = kfac_fx.transform(Named())
    want = kfac_fx.estimate(net, batches(data), fisher="empirical").factors["head"]
    named = [{"x": x, "y": y} for x, y in batches(data)]
    got = kfac_fx.estimate(net, named, fisher="empirical", targets="y").factors["head"]
    torch.testing.assert_close(got, want)
    alone = kfac_fx.estimate(net, [x for x, _ in batches(data)], fisher="exact")
    assert alone.terms == CASES

    def empty() -> Iterator[Tensor]:
        yield from ()

    with pytest.raises(StatisticsError, match="no batch"):
        kfac_fx.estimate(net, empty())
    with pytest.raises(UnknownOptionError, match="got 3 items"):
        kfac_fx.estimate(net, [(data[0], data[0], data[1])])
    found = kfac_fx.estimate(net, batches(data))
    with pytest.raises(DampingError):
        found.operator(-1.0)
    with pytest.raises(OperatorError, match="no block 'tail'"):
        found.operator({"tail": 1.0})
