"""EKFAC: eigenvalues by second moments of per-case gradients, against dense covariances."""

from __future__ import annotations

import logging

import pytest
import torch
from support import oracles
from support.asserts import assert_near
from support.dense_blocks import assembled, indices, matrices
from support.inside import eigenbasis, estimate_of, refreshed
from support.oracles import Categorical, Likelihood, Normal
from support.steps import one_step
from torch import Tensor, nn

import kfac_fx
from kfac_fx.codegen.approximations.base import InverseKey
from kfac_fx.errors import StatisticsError, UnknownOptionError

pytestmark = pytest.mark.usefixtures("float64")
DAMPING = 1e-2
SCALE = InverseKey("0", "scale")


class Tokens(nn.Module):
    """Layers whose weight is shared over positions, with and without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x))).mean(1)


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 2, stride=2), nn.Tanh(), nn.Conv2d(3, 2, 2), nn.Flatten(), nn.Linear(2, 3)
    )


def vectors() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))


MODELS = {
    "vectors": (vectors, (4,), ("0", "3")),
    "tokens": (Tokens, (3, 3), ("one", "two")),
    "convolutions": (convolutions, (2, 5, 5), ("0", "2", "4")),
}


def prepared(model: nn.Module, inputs: Tensor | None = None, **options: object) -> object:
    net = kfac_fx.transform(model, inputs, ekfac=True)
    options = {"fisher": "exact", "damping": DAMPING, "ema_decay": 0.0} | options
    return net, kfac_fx.Preconditioner(
        net, "normal", structure="block_diagonal", tikhonov="ekfac", **options
    )


def cycle(net: nn.Module, pre: object, x: Tensor, y: Tensor | None = None) -> None:
    def loss(outputs: Tensor) -> Tensor:
        return Normal().nll(outputs, torch.zeros_like(outputs) if y is None else y)

    one_step(pre, net, x, loss, y)


def dense_moments(
    model: nn.Module, name: str, x: Tensor, y: Tensor | None, likelihood: Likelihood, fisher: str
) -> Tensor:
    """Second moment of the per-case gradient of a layer, columns of [W b] stacked."""
    names = [n for n, _ in model.named_parameters() if n.startswith(f"{name}.")]
    own = {n: model.get_parameter(n).numel() for n in names}
    C = oracles.covariance(model, names, x, y, likelihood, fisher)
    places, start = {}, 0
    for n, count in own.items():
        places[n] = torch.arange(start, start + count).reshape(model.get_parameter(n).shape)
        start += count
    index = oracles.column_stacked(matrices(model, name, places)[0])
    return C[index[:, None], index]


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_against_dense_covariance(kind: str, fisher: str, sharing: str) -> None:
    """S is the diagonal of the block's own covariance in the bases; the inverse is built of it."""
    build, shape, layers = MODELS[kind]
    model, x = build(), torch.randn(6, *shape)
    net = kfac_fx.transform(model, ekfac=True, weight_sharing=sharing)
    options = {"structure": "block_diagonal", "tikhonov": "ekfac", "ema_decay": 0.0}
    pre = kfac_fx.Preconditioner(net, "normal", fisher=fisher, damping=DAMPING, **options)
    y = torch.randn_like(model(x))
    for _ in range(2):  # the first finds the bases
        cycle(net, pre, x, y)
    at, placed, differ = indices(model), [], False
    for name in layers:
        A, G = pre.factors[name]
        U = torch.kron(torch.linalg.eigh(A)[1], torch.linalg.eigh(G)[1])
        C = dense_moments(model, name, x, y, Normal(), fisher)
        S = (U.T @ C @ U).diagonal()
        found = eigenbasis(pre, name)[2]
        assert_near(oracles.column_stacked(found), S, 1e-9)
        kronecker = (U.T @ torch.kron(A, G) @ U).diagonal()
        differ |= not torch.allclose(S, kronecker, rtol=0.05)
        index = oracles.column_stacked(matrices(model, name, at)[0])
        placed.append((index, U @ torch.diag(S + DAMPING) @ U.T))
    assert differ  # a last layer's do not: its g does not depend on its input
    if "1" in pre.factors:
        norm = torch.cat([at["1.weight"], at["1.bias"]])
        placed.append((norm, pre.factors["1"][0] + DAMPING * torch.eye(10)))
    dense = assembled(placed, sum(p.numel() for p in model.parameters()))
    operator = pre.curvature_operator()
    v = torch.randn(len(dense))
    assert_near(operator.flat(pre.apply(operator.split(v))), torch.linalg.solve(dense, v))
    assert_near(operator.dense(), dense)
    assert_near(operator.diagonal(), dense.diagonal())
    assert_near(operator.logdet(), torch.linalg.slogdet(dense)[1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0].mean(1)


def test_attention() -> None:
    """q, k and v are plain layers; the output's rows do not tell the cases apart."""
    model, x, y = Attention(), torch.randn(5, 3, 4), torch.randn(5, 4)
    net, pre = prepared(model, x, fisher="empirical")
    for _ in range(2):
        cycle(net, pre, x, y)
    names = ["attention.in_proj_weight", "attention.in_proj_bias"]
    C = oracles.covariance(model, names, x, y, Normal(), "empirical")
    at = [torch.arange(48).reshape(12, 4), torch.arange(48, 60)]
    moments = [moment.block for moment in net.curvature.moments]
    assert len(moments) == 3 and not any("out_proj" in name for name in moments)
    for name in moments:
        layouts = pre.curvature.blocks[name].layouts
        W, b = (layout.apply(i) for layout, i in zip(layouts, at, strict=True))
        index = oracles.column_stacked(torch.cat([W, b[:, None]], 1))
        U_A, U_G, S = eigenbasis(pre, name)
        U = torch.kron(U_A, U_G)
        want = (U.T @ C[index[:, None], index] @ U).diagonal()
        assert_near(oracles.column_stacked(S), want)


def test_sampled_fisher_is_unbiased() -> None:
    """The mean over draws approaches the exact second moments."""
    model, x = vectors(), torch.randn(40, 4)
    net, pre = prepared(model, fisher="sampled", ema_decay=0.999, refresh_every=10_000)
    for _ in range(600):
        cycle(net, pre, x)
    U_A, U_G, S = eigenbasis(pre, "0")
    U = torch.kron(U_A, U_G)
    want = (U.T @ dense_moments(model, "0", x, None, Normal(), "exact") @ U).diagonal()
    error = (oracles.column_stacked(S) - want).abs().sum() / want.sum()
    assert error < 0.05


def test_closer_than_kronecker_eigenvalues() -> None:
    """In Frobenius norm the diagonal is the best in these bases (the paper's proposition 1)."""
    model, x = Tokens(), torch.randn(20, 3, 3)
    net, pre = prepared(model)
    for _ in range(2):
        cycle(net, pre, x)
    for name in ("one", "two"):
        C = dense_moments(model, name, x, None, Normal(), "exact")
        U_A, U_G, S = eigenbasis(pre, name)
        U = torch.kron(U_A, U_G)
        ours = U @ torch.diag(oracles.column_stacked(S)) @ U.T
        kronecker = torch.kron(*pre.factors[name])
        assert (C - ours).norm() < (C - kronecker).norm()


def test_starts_with_kronecker_eigenvalues_and_follows_between_refreshes() -> None:
    model, x = vectors(), torch.randn(8, 4)
    net, pre = prepared(model, refresh_every=100)
    cycle(net, pre, x)
    U_A, U_G, S = (value.clone() for value in eigenbasis(pre, "0"))
    A, G = pre.factors["0"]
    assert_near(S, (U_G.T @ G @ U_G).diagonal().outer((U_A.T @ A @ U_A).diagonal()))
    before = refreshed(pre).inverses[SCALE]
    cycle(net, pre, 3 * x)
    bases = eigenbasis(pre, "0")[:2]
    assert torch.equal(bases[0], U_A) and torch.equal(bases[1], U_G)
    after = refreshed(pre).inverses[SCALE]
    assert not torch.allclose(before, after)
    assert_near(after, 1 / (eigenbasis(pre, "0")[2] + DAMPING))


def test_new_bases_keep_the_diagonal() -> None:
    """S becomes the diagonal, in the new bases, of what it was in the old."""
    model = vectors()
    net, pre = prepared(model, ema_decay=0.9, refresh_every=1)
    cycle(net, pre, torch.randn(8, 4))
    cycle(net, pre, torch.randn(8, 4))
    U_A, U_G, S = (value.clone() for value in eigenbasis(pre, "0"))
    old = torch.kron(U_A, U_G)
    A, G = pre.factors["0"]
    A.add_(torch.diag(torch.rand(5)))
    G.add_(torch.diag(torch.rand(5)))
    pre.refresh()
    U_A, U_G, found = eigenbasis(pre, "0")
    new = torch.kron(U_A, U_G)
    whole = old @ torch.diag(oracles.column_stacked(S)) @ old.T
    assert_near(oracles.column_stacked(found), (new.T @ whole @ new).diagonal())


def test_state_survives() -> None:
    """Training goes on bitwise from a state: bases, eigenvalues and averages are in it."""
    model, x = vectors(), torch.randn(8, 4)
    net, pre = prepared(model, ema_decay=0.9)
    for _ in range(3):
        cycle(net, pre, x)
    state = pre.state_dict()
    again_net, again = prepared(model, ema_decay=0.9)
    again.load_state_dict(state)
    for _ in range(2):
        cycle(net, pre, x)
        want = [p.grad.clone() for p in model.parameters()]
        cycle(again_net, again, x)
        for p, value in zip(model.parameters(), want, strict=True):
            assert torch.equal(p.grad, value)


def test_blocks_without_moments_are_named(caplog: pytest.LogCaptureFixture) -> None:
    """Grouped convolutions and embeddings keep the eigenvalues of A and G."""
    model = nn.Sequential(nn.Conv1d(4, 4, 2, groups=2), nn.Flatten(), nn.Linear(8, 2))
    net = kfac_fx.transform(model, ekfac=True)
    assert [moment.block for moment in net.curvature.moments] == ["2"]
    options = {"structure": "block_diagonal", "tikhonov": "ekfac"}
    with caplog.at_level(logging.WARNING, "kfac_fx"):
        pre = kfac_fx.Preconditioner(net, "normal", **options)
    assert "Kronecker eigenvalues for 0: no plain layers" in caplog.text
    cycle(net, pre, torch.randn(6, 4, 3))
    assert all(p.grad.isfinite().all() for p in model.parameters())
    cycle(net, pre, torch.randn(6, 4, 3))  # the moments have bases now
    pre.refresh()
    given = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    applied, solved = pre.apply(given), pre.curvature_operator().solve(given)
    for name, value in applied.items():
        assert_near(solved[name], value)
    assert pre.report().blocks["0"].damping == pytest.approx(pre.damping)


def test_taps_cost_nothing_else() -> None:
    """Outputs, gradients and the state_dict are the model's; "exact" skips the moments."""
    model, x = vectors(), torch.randn(8, 4)
    net = kfac_fx.transform(model, ekfac=True)
    assert net.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(net(x), model(x))
    results = []
    for other in (net, kfac_fx.transform(model)):
        options = {"structure": "block_diagonal", "tikhonov": "exact", "fisher": "exact"}
        pre = kfac_fx.Preconditioner(other, "normal", **options)
        cycle(other, pre, x)
        assert not estimate_of(pre).moments
        results.append([p.grad.clone() for p in model.parameters()])
    for one, two in zip(*results, strict=True):
        assert_near(one, two, 1e-12)


def test_what_ekfac_cannot_do_is_an_error() -> None:
    """Taps without moments, couplings, running models, and operators without statistics."""
    net = kfac_fx.transform(vectors())
    with pytest.raises(UnknownOptionError, match=r"transform\(..., ekfac=True\)"):
        kfac_fx.Preconditioner(net, structure="block_diagonal", tikhonov="ekfac")
    net = kfac_fx.transform(vectors(), ekfac=True)
    with pytest.raises(UnknownOptionError, match="structure='block_diagonal'"):
        kfac_fx.Preconditioner(net, tikhonov="ekfac", structure="block_tridiagonal")
    with pytest.raises(UnknownOptionError, match="capture='eager' has none"):
        kfac_fx.transform(vectors(), torch.randn(2, 4), capture="eager", ekfac=True)
    _, pre = prepared(vectors())
    with pytest.raises(StatisticsError):
        pre.curvature_operator()


@pytest.mark.parametrize("lr", [None, 0.1])
def test_kfac_takes_it(lr: float | None) -> None:
    model, x, y = vectors(), torch.randn(64, 4), torch.randint(3, (64,))
    net = kfac_fx.transform(model, ekfac=True, structure="block_diagonal")
    optimizer = kfac_fx.KFAC(net, "categorical", lr=lr, damping=1.0, tikhonov="ekfac")
    losses = [float(optimizer.step(x, y)) for _ in range(25)]
    assert losses[-1] < 0.9 * losses[0]
    made, gamma = refreshed(optimizer), optimizer._choice.form.rule.gamma
    if lr is None:
        assert_near(made.damping, torch.tensor(gamma**2))
    S = eigenbasis(optimizer, "0")[2]
    assert_near(made.inverses[SCALE], 1 / (S + made.damping))


def test_compiled_network() -> None:
    """The extra tap is traced with the others."""
    model, x = vectors(), torch.randn(8, 4)
    found = []
    for compiled in (False, True):
        net = kfac_fx.transform(model, ekfac=True)
        run = torch.compile(net, backend="aot_eager", fullgraph=True) if compiled else net
        options = {"structure": "block_diagonal", "tikhonov": "ekfac", "fisher": "empirical"}
        pre = kfac_fx.Preconditioner(net, "categorical", damping=DAMPING, **options)
        for _ in range(2):
            model.zero_grad()
            outputs = run(x)
            y = torch.arange(8) % 3
            pre.observe(outputs, y)
            Categorical().nll(outputs, y).backward()
            pre.step()
        found.append([p.grad.clone() for p in model.parameters()])
    for one, two in zip(*found, strict=True):
        assert_near(one, two)
