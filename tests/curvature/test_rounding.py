"""Products in bfloat16: the measured error, which blocks are chosen by it, and what stays exact."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from support.networks import NETWORKS, Network
from support.processes import run_in_world
from torch import Tensor, nn

import kfac_fx
from kfac_fx.curvature.rounding import rounding_error
from kfac_fx.distributed import DataParallel
from kfac_fx.ops import all_buffers, convolution, is_rounded, notes
from kfac_fx.curvature import rounding


def batch(seed: int, cases: int = 96, features: int = 70) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(cases, features, generator=draws)
    return x, torch.randint(5, (cases,), generator=draws)


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(70, 96), nn.LayerNorm(96), nn.Tanh(), nn.Linear(96, 5))


def images(seed: int, cases: int = 16) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(cases, 8, 9, 9, generator=draws), batch(seed, cases)[1]


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24 * 16, 5),
    )


CASES = {"perceptron": (perceptron, batch), "convolutions": (convolutions, images)}


def made(
    name: str = "perceptron", error: float = 0.1, **options: Any
) -> tuple[Any, kfac_fx.Preconditioner]:
    build, data = CASES[name]
    given = {"structure": "block_diagonal", "damping": 0.1, "refresh_every": 1} | options
    net = kfac_fx.transform(build(), (data(0)[0],))
    generator = torch.Generator().manual_seed(0)
    return net, kfac_fx.Preconditioner(net, bfloat16_error=error, generator=generator, **given)


def step(net: Any, pre: kfac_fx.Preconditioner, data: Any, seed: int, by_inputs: bool) -> None:
    x, y = data(seed)
    net.zero_grad()
    if by_inputs:
        pre.observe(inputs=x)
    outputs = net(x)
    if not by_inputs:
        pre.observe(outputs, y)
    nn.functional.cross_entropy(outputs, y).backward()
    pre.step()


def run(
    name: str = "perceptron", steps: int = 3, by_inputs: bool = False, **options: Any
) -> tuple[Any, kfac_fx.Preconditioner]:
    net, pre = made(name, **options)
    for seed in range(steps):
        step(net, pre, CASES[name][1], seed, by_inputs)
    return net, pre


def damped_block(factors: tuple[Tensor, ...], damping: float) -> Tensor:
    """(A + pi gamma I) (x) (G + gamma / pi I), for the columns of V stacked; float64."""
    A, G = (factor.double() for factor in factors)
    gamma = math.sqrt(damping)
    pi = torch.sqrt(A.trace() / len(A) / (G.trace() / len(G)))
    A = A + pi * gamma * torch.eye(len(A), dtype=A.dtype)
    return torch.kron(A, G + gamma / pi * torch.eye(len(G), dtype=G.dtype))


def stacked(matrix: Tensor) -> Tensor:
    return matrix.double().T.flatten()


def wishart(size: int, seed: int) -> Tensor:
    rows = torch.randn(2 * size, size, generator=torch.Generator().manual_seed(seed))
    rows = rows * torch.linspace(0.03, 3, size)
    return rows.T @ rows / len(rows)


@pytest.mark.parametrize("damping", [1.0, 1e-2, 1e-4])
def test_measured_error_is_that_of_the_dense_block(damping: float) -> None:
    A, G = wishart(24, 1), wishart(15, 2)
    V = torch.randn(15, 24, generator=torch.Generator().manual_seed(3))
    F = damped_block((A, G), damping)
    pi = math.sqrt(A.trace() / len(A) / (G.trace() / len(G)))
    gamma = math.sqrt(damping)
    A_i = torch.linalg.inv(A.double() + pi * gamma * torch.eye(24)).float()
    G_i = torch.linalg.inv(G.double() + gamma / pi * torch.eye(15)).float()
    U = torch.linalg.solve(F, stacked(V))
    by_products = stacked(G_i.bfloat16() @ V.bfloat16() @ A_i.bfloat16()) - U
    rounded = damped_block((A.bfloat16().float(), G.bfloat16().float()), damping)
    by_factors = torch.linalg.solve(rounded, stacked(V)) - U
    squares = [E @ F @ E for E in (by_products, by_factors)]
    expected = float(torch.sqrt(sum(squares) / (U @ F @ U)))
    found = float(rounding_error((A, G), (A_i, G_i), V, torch.tensor(damping)))
    assert found == pytest.approx(expected, rel=0.05)  # of first order in the factors' change


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("by_inputs", [False, True])
def test_updates_differ_by_no_more_than_what_is_allowed(name: str, by_inputs: bool) -> None:
    net, pre = run(name, by_inputs=by_inputs, error=0.05)
    same, full = run(name, by_inputs=by_inputs, error=0.0)
    rounding = pre._inverse.rounding
    assert len(rounding.blocks) >= 2
    found, exact = (dict(n.named_parameters()) for n in (net, same))
    for block in rounding.blocks:
        names = pre.curvature.blocks[block].parameters
        if full.factors[block][0].dim() > 2:
            continue  # groups
        U, expected = (
            torch.cat(
                [p[n].grad.flatten(1) if p[n].dim() > 1 else p[n].grad[:, None] for n in names], 1
            )
            for p in (found, exact)
        )
        F = damped_block(full.factors[block], 0.1)
        E, U = stacked(U - expected), stacked(expected)
        relative = float(torch.sqrt((E @ F @ E) / (U @ F @ U)))
        assert 1e-4 < relative < 0.05


@pytest.mark.parametrize("by_inputs", [False, True])
def test_statistics_of_chosen_blocks_are_rounded_products(
    by_inputs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notes, "SMALL", -1)
    _, pre = run(steps=2, by_inputs=by_inputs)
    _, full = run(steps=2, error=0.0, by_inputs=by_inputs)
    assert pre._inverse.rounding.blocks == {"0", "3"}
    low = {n for n, value in pre._inverse.inverses.items() if value.dtype == torch.bfloat16}
    assert low == {"A_0_inverse", "G_0_inverse", "A_3_inverse", "G_3_inverse"}
    for block in ("0", "3"):
        for rounded, exact in zip(pre.factors[block], full.factors[block], strict=True):
            assert rounded.dtype == torch.float32
            assert not torch.equal(rounded, exact)
            assert (rounded - exact).norm() < 5e-3 * exact.norm()
    torch.testing.assert_close(pre.factors["1"], full.factors["1"], rtol=0.02, atol=1e-6)


def test_small_statistics_are_not_rounded() -> None:
    _, pre = run(steps=2, by_inputs=True)
    x = [batch(seed)[0] for seed in range(2)]
    bar = torch.cat([torch.cat(x), torch.ones(192, 1)], 1)
    torch.testing.assert_close(pre.factors["0"][0], bar.T @ bar / 192)
    assert pre._inverse.rounding.blocks == {"0", "3"}


def special(factor: Any) -> bool:
    return bool(factor.diagonal or factor.cut or factor.role == "count")


@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_every_kind_of_use(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of any size; averages of three steps, of which two are rounded."""
    monkeypatch.setattr(rounding, "SMALLEST", 1)
    made = []
    for error in (0.999, 0.0):
        torch.manual_seed(0)
        net = kfac_fx.transform(
            network.build().eval(), structure="block_diagonal", **network.captured_with()
        )
        pre = kfac_fx.Preconditioner(
            net, "normal", fisher="exact", damping=10.0, bfloat16_error=error
        )
        for _ in range(3):
            args, kwargs = network.inputs(5), network.kwargs(5)
            net.zero_grad()
            outputs = network.pick(net(*args, **kwargs))
            pre.observe(outputs)
            outputs.sin().sum().backward()
            pre.step()
        made.append(pre)
    pre, full = made
    kronecker = (b for b in pre.curvature.blocks.values() if b.approximation == "kronecker")
    plain = {b.name for b in kronecker if not any(map(special, b.factors))}
    assert set(pre._inverse.rounding.errors) == plain
    for block in pre._inverse.rounding.blocks:
        for found, exact in zip(pre.factors[block], full.factors[block], strict=True):
            assert (found - exact).norm() <= 1e-2 * exact.norm()


def test_parts_of_a_convolution_are_added_up_in_full_precision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(convolution.AT_ONCE, "cpu", 1)
    window = convolution.Window([3, 3], [2, 2], [1, 1], [0, 0, 0, 0], "zeros")
    statistics = convolution.ConvolutionStatistics(window, 1, False, False)
    x = torch.rand(600, 4, 9, 9)
    g = torch.zeros(600, 1, 4, 4)
    rounded, exact = (
        statistics(g, [x], [True, False], dtype)[0].double()
        for dtype in (torch.bfloat16, torch.float64)
    )
    assert (rounded - exact).norm() < 2e-3 * exact.norm()


def test_nothing_changes_unless_it_is_asked_for() -> None:
    net, pre = run(error=0.0)
    assert not any(map(is_rounded, all_buffers(net)))
    assert all(value.dtype == torch.float32 for value in pre._inverse.inverses.values())
    assert not pre._inverse.rounding.errors
    assert "bfloat16" not in str(pre.report())


def test_what_is_rounded_is_in_the_report() -> None:
    _, pre = run()
    report = pre.report()
    assert set(report.rounded) == {"0", "3"}
    assert all(0 < error <= 0.1 for error in report.rounded.values())
    assert f"products in bfloat16 (error of the update): 0 ({report.rounded['0']:.2g})" in str(
        report
    )
    assert report.plain()["rounded"] == report.rounded


def test_ill_conditioned_blocks_stay_in_full_precision() -> None:
    net, pre = run(damping=1e-9, error=0.01)
    rounding = pre._inverse.rounding
    assert set(rounding.errors) == {"0", "3"} and not rounding.blocks
    assert not any(map(is_rounded, all_buffers(net)))
    assert all(value.dtype == torch.float32 for value in pre._inverse.inverses.values())


def test_a_block_comes_back_at_half_the_tolerance() -> None:
    _, pre = made(error=0.1)
    rounding = pre._inverse.rounding
    history = {0.09: True, 0.11: False, 0.08: False, 0.05: True, 0.1: True}
    for error, expected in history.items():
        rounding._take("0", error, 1.0)
        assert ("0" in rounding.blocks) == expected
        assert is_rounded(pre._inverse.averages.blocks["0"].buffers[0]) == expected


def test_what_may_be_indefinite_leaves_at_once(caplog: pytest.LogCaptureFixture) -> None:
    """Statistics that outgrow the damping between two measurements."""
    net, pre = made(damping=0.05, error=0.5)
    for seed in range(5):
        step(net, pre, batch, seed, by_inputs=False)
    assert pre._inverse.rounding.blocks == {"0", "3"}

    def swollen(seed: int) -> tuple[Tensor, Tensor]:
        x, y = batch(seed)
        return 1e3 + 1e3 * x, y

    step(net, pre, swollen, 5, by_inputs=False)
    assert pre._inverse.rounding.blocks == {"3"}
    assert "Cholesky" not in caplog.text
    assert all(
        value.dtype == torch.float32 for n, value in pre._inverse.inverses.items() if "_0_" in n
    )
    update = net.get_parameter("0.weight").grad
    assert update.isfinite().all() and update.norm() < 10


@pytest.mark.parametrize("rank", [1, 3, 20])
@pytest.mark.parametrize("mean", [0.0, 1.0, 10.0])
def test_averages_that_rounding_made_indefinite_are_positive_again(rank: int, mean: float) -> None:
    _, pre = made()
    entry = pre._inverse.averages.blocks["0"]
    for average in entry.stored:
        rows = mean + torch.randn(rank, len(average.kept), generator=torch.Generator())
        average.kept.copy_((rows.mT @ rows).bfloat16())
        assert torch.linalg.eigvalsh(average.kept)[0] < 0
    rounding._make_up(entry)
    for average in entry.stored:
        assert torch.linalg.eigvalsh(average.kept)[0] > 0


def test_factors_that_grow_are_measured_again() -> None:
    net, pre = made(damping=0.05, error=0.5)
    for seed in range(5):
        step(net, pre, batch, seed, by_inputs=False)
    before = dict(pre._inverse.rounding.errors)
    step(net, pre, batch, 5, by_inputs=False)
    assert pre._inverse.rounding.errors == before
    step(net, pre, lambda seed: (20 * batch(seed)[0], batch(seed)[1]), 6, by_inputs=False)
    assert pre._inverse.rounding.errors != before


def test_it_is_measured_now_and_then() -> None:
    _, pre = made()
    measured = []
    rounding = pre._inverse.rounding
    for count in range(1, 50):
        rounding.of_refresh({}, count)
        measured += [count] * rounding._pending
    assert measured == [1, 2, 4, 8, 16, 32, 48]


@pytest.mark.parametrize("value", [0.0, math.inf])
def test_a_gradient_that_tells_nothing_decides_nothing(value: float) -> None:
    net, pre = run(steps=1)
    before = dict(pre._inverse.rounding.errors)
    pre.refresh()
    pre.apply({n: torch.full_like(p, value) for n, p in net.named_parameters()})
    assert pre._inverse.rounding.errors == before
    pre.apply({n: torch.ones_like(p) for n, p in net.named_parameters()})
    assert pre._inverse.rounding.errors != before


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("pending", [False, True])
def test_a_resumed_run_goes_on_bitwise(steps: int, pending: bool) -> None:
    net, pre = run(steps=steps)
    if pending:
        pre.refresh()
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "pre": pre.state_dict()}, file)
    other, resumed = made()
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other.load_state_dict(state["net"])
    resumed.load_state_dict(state["pre"])
    given = {name: torch.ones_like(p) for name, p in net.named_parameters()}
    updates = pre.apply(given), resumed.apply(given)
    assert all(torch.equal(updates[0][name], updates[1][name]) for name in given)
    assert resumed._inverse.rounding.errors == pre._inverse.rounding.errors
    for seed in range(3):
        step(net, pre, batch, 10 + seed, by_inputs=False)
        step(other, resumed, batch, 10 + seed, by_inputs=False)
    for one, two in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)


@pytest.mark.parametrize("error", [0.0, 1e-5])
def test_a_resumed_run_may_allow_less(error: float) -> None:
    net, pre = run()
    other, resumed = made(error=error, refresh_every=10)
    resumed.load_state_dict(pre.state_dict())
    assert not resumed._inverse.rounding.blocks
    given = {name: p.grad for name, p in net.named_parameters()}
    updates = resumed.apply(given)
    for name, expected in pre.apply(given).items():
        torch.testing.assert_close(updates[name], expected, rtol=0.1, atol=0.1 * expected.std())
    step(other, resumed, batch, 3, by_inputs=False)


def test_state_without_rounding_loads() -> None:
    """As earlier versions wrote it."""
    _, pre = run(error=0.0)
    state = copy.deepcopy(pre.state_dict())
    del state["inverse"]["rounding"]
    _, other = made()
    other.load_state_dict(state)
    assert not other._inverse.rounding.blocks


def test_another_preconditioner_starts_in_full_precision() -> None:
    net, _ = run()
    assert any(map(is_rounded, all_buffers(net)))
    kfac_fx.Preconditioner(net)
    assert not any(map(is_rounded, all_buffers(net)))


def test_coupled_blocks_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    _, pre = made(structure="block_tridiagonal")
    assert pre.couplings and not pre._inverse.rounding.parameters
    assert "no Kronecker block without couplings" in caplog.text


@pytest.mark.parametrize("adaptive", [True, False])
def test_kfac_trains(adaptive: bool) -> None:
    losses = []
    for error in (0.0, 0.1):
        net = kfac_fx.transform(perceptron(), structure="block_diagonal")
        generator = torch.Generator().manual_seed(0)
        options: dict[str, Any] = {"damping": 1.0} if adaptive else {"lr": 0.3, "damping": 0.1}
        optimizer = kfac_fx.KFAC(net, bfloat16_error=error, generator=generator, **options)
        for _ in range(25):
            loss = optimizer.step(*batch(0))
        losses.append(float(loss))
        assert bool(optimizer._inverse.rounding.blocks) == bool(error)
    assert losses[1] < 1.0
    assert losses[1] == pytest.approx(losses[0], rel=0.15, abs=0.02)


@pytest.mark.parametrize("tikhonov", ["exact", "ekfac"])
def test_other_damping_is_refused(tikhonov: str) -> None:
    net = kfac_fx.transform(perceptron(), ekfac=True)
    with pytest.raises(kfac_fx.errors.UnknownOptionError, match="tikhonov='factored'"):
        kfac_fx.Preconditioner(
            net, tikhonov=tikhonov, structure="block_diagonal", bfloat16_error=0.1
        )


def test_compiled_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their statistics stay in full precision, also of a form that comes behind the choice."""
    monkeypatch.setattr(notes, "SMALL", -1)
    same: dict[str, Any] = {"compile": "aot_eager", "fisher": "empirical"}
    made_both = [made(error=error, **same) for error in (0.1, 0.0)]
    for net, pre in made_both:
        for seed, cases in enumerate((96, 96, 40)):
            x, y = batch(seed, cases)
            net.zero_grad()
            pre.observe(inputs=x, targets=y)
            nn.functional.cross_entropy(net(x), y).backward()
            pre.step()
            assert None not in pre._recorder._pass.programs.values()
    pre, full = (pre for _, pre in made_both)
    assert pre._inverse.rounding.blocks == {"0", "3"}
    assert pre._inverse.inverses["A_0_inverse"].dtype == torch.bfloat16
    for block, factors in pre.factors.items():
        torch.testing.assert_close(factors, full.factors[block], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("error", [-0.1, 1.0, math.nan])
def test_wrong_tolerances_are_refused(error: float) -> None:
    with pytest.raises(kfac_fx.errors.UnknownOptionError, match="bfloat16_error"):
        made(error=error)


def test_double_precision_is_refused() -> None:
    net = kfac_fx.transform(perceptron().double(), structure="block_diagonal")
    with pytest.raises(kfac_fx.errors.UnknownOptionError, match="float64"):
        kfac_fx.Preconditioner(net, bfloat16_error=0.1)


def _refused_in_a_world() -> None:
    with pytest.raises(kfac_fx.errors.UnknownOptionError, match="one process"):
        made(workers=DataParallel())


def test_several_processes_are_refused() -> None:
    assert run_in_world(2, _refused_in_a_world) == [None, None]


def test_statistics_of_a_compiled_network_stay_in_full_precision() -> None:
    """What it was traced with could not follow later choices."""
    net, pre = made(fisher="empirical")
    _, full = run(error=0.0, steps=2, fisher="empirical")
    for seed in range(2):
        if seed == 1:
            torch.compiler.reset()
        x, y = batch(seed)
        net.zero_grad()
        outputs = torch.compile(net, backend="aot_eager")(x)
        pre.observe(outputs, y)
        nn.functional.cross_entropy(outputs, y).backward()
        pre.step()
    assert pre._inverse.rounding.blocks == {"0", "3"}
    for block, factors in pre.factors.items():
        torch.testing.assert_close(factors, full.factors[block], rtol=1e-5, atol=1e-6)
