"""Layers whose input is the same for all cases: tables of positions, learned queries."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import oracles
from support.oracles import Bernoulli, Measure, Normal, close
from torch import Tensor, nn

import kfac_fx

pytestmark = pytest.mark.usefixtures("float64")
both_fishers = pytest.mark.parametrize("fisher", ["exact", "empirical"])
ONE_CASE = "the batch counts as one case"


class Relative(nn.Module):
    """A bias of attention computed from a table of coordinates, as Swin v2 has it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(3, 4, 2))
        self.mlp = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x + self.mlp(self.table))


def check_table(
    measure: Measure, model: nn.Module, name: str, x: Tensor, fisher: str, **options: object
) -> None:
    """A = sum over rows of a a^T; G = mean over rows of g g^T, g summed over the cases."""
    y = Bernoulli().draw(model(x))
    net = kfac_fx.transform(model, **options)
    reason = net.curvature.blocks[name].reason
    assert reason is not None and ONE_CASE in reason
    A, G = measure(net, x, y, Bernoulli(), fisher).factors[name]
    use, gradients, terms = oracles.output_gradients(model, name, x, y, Bernoulli(), fisher)
    a = oracles.input_rows(use.layer, use.x).squeeze(1)
    if isinstance(use.layer, nn.Conv2d):
        gradients = [g.flatten(2).mT for g in gradients]
    g = torch.cat([g.reshape(-1, g.shape[-1]) for g in gradients])
    close((A, G), (a.T @ a, g.T @ g / len(a) / terms))


@both_fishers
@pytest.mark.parametrize("name", ["mlp.0", "mlp.2"])
def test_linear_on_a_table(measure: Measure, name: str, fisher: str) -> None:
    check_table(measure, Relative(), name, torch.randn(5, 3, 4, 4), fisher)


@pytest.mark.parametrize("route", ["export", "eager"])
def test_other_routes(measure: Measure, route: str) -> None:
    """Exported and running models."""
    x = torch.randn(5, 3, 4, 4)
    check_table(measure, Relative(), "mlp.0", x, "exact", example_inputs=(x,), capture=route)


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(1, 2, 3, 3))
        self.conv = nn.Conv2d(2, 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x + self.conv(self.table))


@both_fishers
def test_convolution_on_a_table(measure: Measure, fisher: str) -> None:
    check_table(measure, Positions(), "conv", torch.randn(5, 4, 2, 2), fisher)


class Vector(nn.Module):
    """A matrix times a vector that the model holds."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.register_buffer("vector", torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x + torch.mv(self.weight, self.vector))


def test_a_matrix_times_a_vector(measure: Measure) -> None:
    """One row: what is recorded is the outer product of the gradient itself."""
    model, x = Vector(), torch.randn(5, 4)
    y = Bernoulli().draw(model(x))
    A, G = measure(kfac_fx.transform(model), x, y, Bernoulli(), "empirical").factors["weight"]
    (g,) = torch.autograd.grad(Bernoulli().nll(model(x), y), model.weight)
    flat = g.flatten()
    torch.testing.assert_close(torch.kron(G, A), torch.outer(flat, flat) / 5)


class Both(nn.Module):
    """One layer on the data and on a table (DeBERTa's queries on relative positions)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.register_buffer("table", torch.randn(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) @ self.fc(self.table).t()


def test_uses_on_data_and_table_add_up(measure: Measure) -> None:
    """A is the sum of both, G the sum over all positions divided by their number."""
    model, x = Both(), torch.randn(5, 2, 3)
    y = Normal().draw(model(x))
    found = measure(kfac_fx.transform(model), x, y, Normal(), "empirical").factors["fc"]
    outputs, (data, table) = oracles.run(model, ["fc"], x)
    gradients = torch.autograd.grad(Normal().nll(outputs, y), (data.s, table.s))
    a = [oracles.input_rows(model.fc, use.x).squeeze(1) for use in (data, table)]
    A = a[0].T @ a[0] / 5 + a[1].T @ a[1]
    G = sum(torch.einsum("...i,...j->ij", g, g) for g in gradients) / (2 + 6) / 5
    close(found[:2], (A, G))


class Queries(nn.Module):
    """Learned queries, copied for each case, so the cases are apart."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.register_buffer("latent", torch.randn(1, 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        queries = self.fc(self.latent.expand(x.shape[0], -1, -1))
        return torch.tanh(queries @ x)


@both_fishers
@pytest.mark.parametrize("options", [{}, {"example_inputs": torch.randn(3, 4, 5).double()}])
def test_copies_for_each_case_are_cases(
    measure: Measure, options: dict[str, Tensor], fisher: str
) -> None:
    model, x = Queries(), torch.randn(6, 4, 5)
    y = Bernoulli().draw(model(x))
    route = {"capture": "export"} if options else {}
    net = kfac_fx.transform(model, **options, **route)
    assert net.curvature.blocks["fc"].reason is None
    found = measure(net, x, y, Bernoulli(), fisher).factors["fc"]
    close(found, oracles.kronecker(model, ["fc"], x, y, Bernoulli(), fisher))


class Bucketed(nn.Module):
    """A table of biases, looked up by an index that the model holds (Swin, T5)."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(7, 2))
        self.register_buffer("index", torch.randint(6, (3, 3)))

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias[self.index.view(-1)].view(3, 3, 2).permute(2, 0, 1)
        return torch.tanh(x + bias.unsqueeze(0))


@both_fishers
@pytest.mark.parametrize("route", ["symbolic_trace", "export", "eager"])
def test_rows_of_a_table_by_index(measure: Measure, fisher: str, route: str) -> None:
    model, x = Bucketed(), torch.randn(5, 2, 3, 3)
    y = Bernoulli().draw(model(x))
    net = kfac_fx.transform(model, (x,), capture=route)
    reason = net.curvature.blocks["bias"].reason
    assert reason is not None and ONE_CASE in reason
    A, G = measure(net, x, y, Bernoulli(), fisher).factors["bias"]
    probe = torch.zeros(9, 2, requires_grad=True)
    rows = F.embedding(model.index.view(-1), model.bias) + probe
    outputs = torch.tanh(x + rows.view(3, 3, 2).permute(2, 0, 1).unsqueeze(0))
    if fisher == "empirical":
        values = [Bernoulli().nll(outputs, y)]
    else:
        root = torch.stack([Bernoulli().fisher(f, None).diag().sqrt() for f in outputs])
        values = list((outputs.flatten(1) * root).sum(0))
    gradients = [torch.autograd.grad(v, probe, retain_graph=True)[0] for v in values]
    want = sum(g.T @ g for g in gradients) / 9 / 5
    close((A, G), (model.index.flatten().bincount(minlength=7).to(A), want))


class Steps(nn.Module):
    """Position embeddings of a model that only running follows."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(5, 4), nn.Embedding(6, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        if ids.float().mean().item() > 1e6:
            raise ValueError("no such token")
        places = self.places(torch.arange(ids.shape[1]))
        return self.out(torch.tanh(self.tokens(ids) + places))


def test_positions_of_a_running_model(measure: Measure) -> None:
    model, ids = Steps(), torch.randint(5, (4, 3))
    net = kfac_fx.transform(model, (ids,), capture="eager")
    block = net.curvature.blocks["places"]
    assert block.kind == "embedding" and block.reason is not None and ONE_CASE in block.reason
    y = Normal().draw(model(ids))
    A, G = measure(net, ids, y, Normal(), "empirical").factors["places"][:2]
    outputs, (use,) = oracles.run(model, ["places"], ids)
    (g,) = torch.autograd.grad(Normal().nll(outputs, y), use.s)
    close((A, G), (torch.tensor([1.0, 1, 1, 0, 0, 0]), g.T @ g / 3 / 4))


def test_strict_refuses_a_batch_taken_as_one_case() -> None:
    with pytest.raises(kfac_fx.errors.CoverageError, match=ONE_CASE):
        kfac_fx.transform(Relative(), strict=True)
