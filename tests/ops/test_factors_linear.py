"""Kronecker factors of linear uses against loops over cases."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support import oracles
from support.networks import Conv1D
from support.oracles import LIKELIHOODS, Bernoulli, Categorical, Likelihood, Measure, Normal, close
from torch import Tensor, nn

import kfac_fx

pytestmark = pytest.mark.usefixtures("float64")
every_likelihood = pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=lambda one: one.name)
both_fishers = pytest.mark.parametrize("fisher", ["exact", "empirical"])
both_sharings = pytest.mark.parametrize("sharing", ["expand", "reduce"])


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=False))


@both_fishers
@every_likelihood
@pytest.mark.parametrize("shape", [(6, 4), (5, 3, 4)], ids=["vectors", "tokens"])
def test_mlp(measure: Measure, shape: tuple[int, ...], likelihood: Likelihood, fisher: str) -> None:
    """Both layers, on vectors and on tokens."""
    model, x = two_layers(), torch.randn(shape)
    y = likelihood.draw(model(x))
    factors = measure(kfac_fx.transform(model), x, y, likelihood, fisher).factors
    for name in ("0", "2"):
        close(factors[name], oracles.kronecker(model, [name], x, y, likelihood, fisher))


@both_fishers
@every_likelihood
def test_reduce(measure: Measure, likelihood: Likelihood, fisher: str) -> None:
    """Positions of a case are summed before the outer product."""
    model, x = two_layers(), torch.randn(5, 3, 4)
    y = likelihood.draw(model(x))
    net = kfac_fx.transform(model, weight_sharing="reduce")
    factors = measure(net, x, y, likelihood, fisher).factors
    for name in ("0", "2"):
        close(factors[name], oracles.kronecker(model, [name], x, y, likelihood, fisher, "reduce"))


@both_sharings
@pytest.mark.parametrize("shape", [(4, 4), (4, 2, 3, 4)], ids=["vectors", "two axes"])
def test_sharing_modes_on_other_axes(
    measure: Measure, shape: tuple[int, ...], sharing: str
) -> None:
    model, x = two_layers(), torch.randn(shape)
    net = kfac_fx.transform(model, weight_sharing=sharing)
    factors = measure(net, x, None, Normal()).factors
    close(factors["0"], oracles.kronecker(model, ["0"], x, None, Normal(), "exact", sharing))


class Pooled(nn.Module):
    """A linear layer over tokens, and one likelihood term a case."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.fc(x)).mean(1))


@both_sharings
@both_fishers
@every_likelihood
def test_positions_without_terms(
    measure: Measure, likelihood: Likelihood, fisher: str, sharing: str
) -> None:
    model, x = Pooled(), torch.randn(5, 3, 4)
    y = likelihood.draw(model(x))
    net = kfac_fx.transform(model, weight_sharing=sharing)
    factors = measure(net, x, y, likelihood, fisher).factors
    for name in ("fc", "out"):
        close(factors[name], oracles.kronecker(model, [name], x, y, likelihood, fisher, sharing))


# ------------------------------------------------------------------------- ways to say linear
Way = Callable[[Tensor, Tensor, Tensor], Tensor]
WAYS: dict[str, Way] = {
    "F.linear": lambda x, W, b: F.linear(x, W, b),
    "F.linear + b": lambda x, W, b: F.linear(x, W) + b,
    "x @ W.T + b": lambda x, W, b: x @ W.T + b,
    "b + x @ W.t()": lambda x, W, b: b + x @ W.t(),
    "x @ W.mT": lambda x, W, b: x @ W.mT + b,
    "x @ W.transpose": lambda x, W, b: x @ W.transpose(0, 1) + b,
    "matmul permute": lambda x, W, b: torch.matmul(x, W.permute(1, 0)) + b,
    "mm": lambda x, W, b: torch.mm(x, W.t()) + b,
    "addmm": lambda x, W, b: torch.addmm(b, x, W.t()),
    "einsum": lambda x, W, b: torch.einsum("ni,oi->no", x, W) + b,
    "einsum swapped": lambda x, W, b: torch.einsum("oi,ni->no", W, x) + b,
    "inner": lambda x, W, b: torch.inner(x, W) + b,
    "tensordot": lambda x, W, b: torch.tensordot(x, W, ([1], [1])) + b,
    "tensordot, from the right": lambda x, W, b: torch.tensordot(x, W, dims=([-1], [-1])) + b,
    "(tensordot of W and x).T": lambda x, W, b: torch.tensordot(W, x, ([1], [1])).T + b,
    "(W @ x.T).T": lambda x, W, b: (W @ x.T).T + b,
}
TRANSPOSED_WAYS: dict[str, Way] = {
    "x @ W": lambda x, W, b: x @ W + b,
    "torch.matmul": lambda x, W, b: torch.matmul(x, W).add(b),
    "mm transposed": lambda x, W, b: x.mm(W) + b,
    "addmm transposed": lambda x, W, b: torch.addmm(b, x, W),
    "einsum transposed": lambda x, W, b: torch.einsum("ni,io->no", x, W) + b,
    "tensordot by number": lambda x, W, b: torch.tensordot(x, W, 1) + b,
    "F.linear of W.t()": lambda x, W, b: F.linear(x, W.t(), b),
}


class Functional(nn.Module):
    def __init__(self, way: Way, transposed: bool) -> None:
        super().__init__()
        self.way = way
        self.weight = nn.Parameter(torch.randn(4, 5) if transposed else torch.randn(5, 4))
        self.bias = nn.Parameter(torch.randn(5))
        self.head = nn.Linear(5, 3)
        self.transposed = transposed

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.way(x, self.weight, self.bias)))

    def reference(self) -> nn.Module:
        """The same function made of nn.Linear, sharing nothing."""
        first = nn.Linear(4, 5)
        weight = self.weight.T if self.transposed else self.weight
        first.weight.data, first.bias.data = weight.detach().clone(), self.bias.detach().clone()
        return nn.Sequential(first, nn.Tanh(), self.head)


def check_functional(
    measure: Measure, model: Functional, x: Tensor, fisher: str, likelihood: Likelihood
) -> None:
    """A bias of the block is the homogeneous coordinate; else it has a block of its own."""
    reference, y = model.reference(), likelihood.draw(model(x))
    net = kfac_fx.transform(model)
    factors = measure(net, x, y, likelihood, fisher).factors
    A, G = oracles.kronecker(reference, ["0"], x, y, likelihood, fisher)
    assert net.curvature.blocks["weight"].approximation == "kronecker"
    if "bias" in net.curvature.blocks["weight"].parameters:
        close(factors["weight"], (A, G))
    else:
        close(factors["weight"], (A[:-1, :-1], G))
        close(factors["bias"], (oracles.covariance(model, ["bias"], x, y, likelihood, fisher),))


@both_fishers
@pytest.mark.parametrize("way", WAYS)
def test_ways(measure: Measure, way: str, fisher: str) -> None:
    """Every way to write x W^T."""
    check_functional(
        measure, Functional(WAYS[way], False), torch.randn(6, 4), fisher, Categorical()
    )


@both_fishers
@pytest.mark.parametrize("way", TRANSPOSED_WAYS)
def test_transposed_ways(measure: Measure, way: str, fisher: str) -> None:
    """Every way to write x W."""
    model = Functional(TRANSPOSED_WAYS[way], True)
    check_functional(measure, model, torch.randn(6, 4), fisher, Bernoulli())


TOKEN_WAYS: dict[str, tuple[Way, bool]] = {
    "F.linear": (WAYS["F.linear"], False),
    "x @ W.T": (WAYS["x @ W.T + b"], False),
    "x @ W": (TRANSPOSED_WAYS["x @ W"], True),
    "einsum": (lambda x, W, b: torch.einsum("nti,oi->nto", x, W) + b, False),
    "inner": (WAYS["inner"], False),
    "inner, a method": (lambda x, W, b: x.inner(W) + b, False),
    "tensordot": (lambda x, W, b: torch.tensordot(x, W, ([2], [0])) + b, True),
    "einsum ...": (lambda x, W, b: torch.einsum("...i,io->...o", x, W) + b, True),
}


@both_fishers
@pytest.mark.parametrize("way", TOKEN_WAYS)
def test_ways_over_tokens(measure: Measure, way: str, fisher: str) -> None:
    model = Functional(*TOKEN_WAYS[way])
    check_functional(measure, model, torch.randn(5, 3, 4), fisher, Categorical())


@both_fishers
def test_tensordot_over_several_dimensions(measure: Measure, fisher: str) -> None:
    """W [3, 4, 5] sums over positions and features, in another order than the input has them."""

    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.head = nn.Parameter(torch.randn(3, 4, 5)), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(torch.tensordot(x, self.weight, ([2, 1], [0, 1]))))

    model, x, likelihood = Several(), torch.randn(6, 4, 3), Categorical()
    first = nn.Linear(12, 5, bias=False)
    first.weight.data = model.weight.detach().reshape(12, 5).T.clone()
    reference = nn.Sequential(first, nn.Tanh(), model.head)
    rows = x.transpose(1, 2).reshape(6, 12)
    y = likelihood.draw(model(x))
    close((reference(rows),), (model(x),))
    factors = measure(kfac_fx.transform(model), x, y, likelihood, fisher).factors
    close(factors["weight"], oracles.kronecker(reference, ["0"], rows, y, likelihood, fisher))


def test_hf_conv1d(measure: Measure) -> None:
    """Rows flattened inside may be counted as cases: A (x) G is the same, and is compared."""
    model = nn.Sequential(Conv1D(4, 5), nn.Tanh(), Conv1D(5, 3))
    reference = two_layers()
    reference[2] = nn.Linear(5, 3)
    for mine, theirs in ((reference[0], model[0]), (reference[2], model[2])):
        mine.weight.data, mine.bias.data = theirs.weight.data.T.clone(), theirs.bias.data.clone()
    x, likelihood = torch.randn(5, 3, 4), Categorical()
    factors = measure(kfac_fx.transform(model), x, None, likelihood).factors
    for name in ("0", "2"):
        want = oracles.kronecker(reference, [name], x, None, likelihood)
        close((torch.kron(*factors[name]),), (torch.kron(*want),))


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_half_frozen_layer(measure: Measure, part: str) -> None:
    """Only the trained half counts: no homogeneous coordinate, or a covariance of the bias."""
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(6, 4)
    frozen = "0.bias" if part == "weight" else "0.weight"
    model.get_parameter(frozen).requires_grad_(False)
    net = kfac_fx.transform(model)
    (name,) = (n for n, b in net.curvature.blocks.items() if f"0.{part}" in b.parameters)
    found = measure(net, x, None, Categorical()).factors[name]
    if part == "weight":
        A, G = oracles.kronecker(model, ["0"], x, None, Categorical())
        close(found, (A[:-1, :-1], G))
    else:
        close(found, (oracles.covariance(model, ["0.bias"], x, None, Categorical()),))


# ---------------------------------------------------------------------------- invariants of scale
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("shape", [(6, 4), (5, 3, 4)], ids=["vectors", "tokens"])
@every_likelihood
def test_duplicated_batch_and_reduction(
    measure: Measure, likelihood: Likelihood, shape: tuple[int, ...], fisher: str
) -> None:
    model, x = two_layers(), torch.randn(shape)
    y = likelihood.draw(model(x))
    net = kfac_fx.transform(model)
    want = measure(net, x, y, likelihood, fisher).factors
    twice = measure(net, torch.cat([x, x]), torch.cat([y, y]), likelihood, fisher).factors
    mean = measure(net, x, y, likelihood, fisher, reduction="mean").factors
    for name in want:
        close(twice[name], want[name])
        close(mean[name], want[name])


def test_deep_linear_network(measure: Measure) -> None:
    """Squared error and no nonlinearity: A (x) G is the exact Fisher block, and whole in depth."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 3))
    x = torch.randn(7, 4)
    factors = measure(kfac_fx.transform(model), x, None, Normal()).factors
    for name in ("0", "1", "2"):
        layer = model.get_submodule(name)
        block = oracles.covariance(model, [f"{name}.weight", f"{name}.bias"], x, None, Normal())
        flat = torch.arange(layer.weight.numel() + layer.bias.numel())
        weight, bias = flat.split([layer.weight.numel(), layer.bias.numel()])
        matrix = torch.cat([weight.reshape(layer.weight.shape), bias[:, None]], dim=1)
        order = oracles.column_stacked(matrix)
        close((torch.kron(*factors[name]),), (block[order][:, order],))


def test_block_names_and_table() -> None:
    net = kfac_fx.transform(Functional(WAYS["F.linear"], False))
    assert set(net.curvature.blocks) == {"weight", "head"}
    assert "head" in str(net.curvature) and "kronecker" in str(net.curvature)
    assert all(block.reason is None for block in net.curvature.blocks.values())


class Scores(nn.Module):
    """Attention of one query that is learned: a vector, or a layer of one feature."""

    def __init__(self, vector: bool) -> None:
        super().__init__()
        self.vector, self.body, self.out = vector, nn.Linear(6, 5), nn.Linear(6, 3)
        self.query = nn.Parameter(torch.linspace(-1, 1, 5).view(5) if vector else torch.empty(0))
        self.layer = nn.Linear(5, 1, bias=False)
        self.layer.weight.data.copy_(torch.linspace(-1, 1, 5))
        self.get_parameter("layer.weight" if vector else "query").requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(x))
        scores = hidden @ self.query if self.vector else self.layer(hidden).squeeze(-1)
        return self.out((scores.softmax(-1).unsqueeze(-1) * x).sum(1))


@both_sharings
@pytest.mark.parametrize("structure", ["block_diagonal", "block_tridiagonal"])
def test_a_vector_is_a_matrix_of_one_row(measure: Measure, structure: str, sharing: str) -> None:
    """x @ v has the factors of a layer of one feature, and takes the same steps."""
    x, y = torch.randn(4, 3, 6), torch.tensor([0, 2, 1, 1])
    found = []
    for vector in (True, False):
        torch.manual_seed(0)
        model = Scores(vector)
        net = kfac_fx.transform(model, structure=structure, weight_sharing=sharing)
        name = "query" if vector else "layer"
        assert net.curvature.blocks[name].approximation == "kronecker"
        measured = measure(net, x, y, Categorical())
        gradient = model.get_parameter("query" if vector else "layer.weight").grad
        found.append([*measured.factors[name], gradient.reshape(5)])
    for one, other in zip(*found, strict=True):
        close([one], [other])
