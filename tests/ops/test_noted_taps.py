"""Taps without nodes, and second moments that stay rows until they enter an average."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.inside import estimate_of, fold
from support.networks import NETWORKS, Network
from support.processes import run_in_world
from support.steps import named_factors
from torch import Tensor, nn
from torch import distributions as D
from torch.utils.checkpoint import checkpoint

import kfac_fx
from kfac_fx.config import FactorStorage
from kfac_fx.curvature import estimate
from kfac_fx.curvature.estimate import Average, fold_in_place
from kfac_fx.distributed import DataParallel
from kfac_fx.linalg.packing import mirror
from kfac_fx.ops import gram, kronecker, tap
from kfac_fx.ops.gram import Rows, second_moment, stay
from kfac_fx.ops.state import Collection, collecting
from kfac_fx.ops.thresholds import THRESHOLDS
from kfac_fx.optim import KFACOptions

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture
def all_stay() -> Iterator[None]:
    """All that can stay unmultiplied does."""
    with THRESHOLDS.changed(slab=1):
        yield


@pytest.fixture
def no_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tap may have any."""

    def fail(*_: Any) -> None:
        raise AssertionError("a tap has nodes")

    monkeypatch.setattr(tap, "_zero", fail)


def normal(pick: Callable[[Any], Tensor]) -> Any:
    def distribution(outputs: Any) -> D.Distribution:
        mean = pick(outputs)
        return D.Independent(D.Normal(mean, torch.ones_like(mean)), mean.dim() - 1)

    return distribution


def made(net: nn.Module, likelihood: Any = "normal", **options: Any) -> kfac_fx.Preconditioner:
    generator = torch.Generator().manual_seed(3)
    return kfac_fx.Preconditioner(net, likelihood, damping=1e-2, generator=generator, **options)


def recorded(
    net: nn.Module, batches: list[Any], targets: Any = None, **options: Any
) -> dict[str, Tensor]:
    """The factors after as many folds."""
    pre = made(net, **options)
    for inputs in batches:
        torch.manual_seed(5)
        pre.observe(inputs=inputs, targets=targets)
        fold(pre)
    return named_factors(pre)


def assert_close(found: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert found.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-14, msg=name)


@pytest.mark.parametrize("network", [n for n in NETWORKS if not n.kwargs(5)], ids=str)
@pytest.mark.usefixtures("all_stay")
def test_as_taps_with_nodes(network: Network) -> None:
    """Two statistics each, of few cases and of more."""
    net = kfac_fx.transform(network.build(), **network.captured_with())
    batches = [network.inputs(2), network.inputs(5)]
    found = recorded(net, batches, likelihood=normal(network.pick))
    with THRESHOLDS.changed(noted=-1, slab=10**6):
        assert_close(found, recorded(net, batches, likelihood=normal(network.pick)))


@pytest.mark.usefixtures("no_nodes")
def test_small_taps_have_no_nodes() -> None:
    net = kfac_fx.transform(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)))
    recorded(net, [torch.randn(5, 3)])
    recorded(net, [torch.randn(5, 3)], fisher="empirical", targets=torch.randn(5, 2))
    with THRESHOLDS.changed(noted=5 * 4 - 1), pytest.raises(AssertionError, match="has nodes"):
        recorded(net, [torch.randn(5, 3)])


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(self.layer(x).tanh()).tanh())


@pytest.mark.usefixtures("all_stay")
def test_checkpoints() -> None:
    """What a checkpoint saves and computes again has nodes."""
    net, x = kfac_fx.transform(Twice()), torch.randn(4, 6)
    found = recorded(net, [lambda net: checkpoint(net, x, use_reentrant=False)])
    assert_close(found, recorded(net, [x]))
    assert found["layer/1"].abs().sum() > 0


class Overwrites(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(3, 4), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        y = self.layer(x).sum(-1, keepdim=True)
        x.mul_(2.0)
        return self.last(x) * y


def test_input_that_is_overwritten() -> None:
    net = kfac_fx.transform(Overwrites())
    with pytest.raises(kfac_fx.errors.ObservationError, match="in-place"):
        recorded(net, [torch.randn(5, 3)])


def test_derivative_inside_of_the_forward() -> None:
    net = kfac_fx.transform(nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)))
    x = torch.randn(4, 2, requires_grad=True)

    def slope(net: Any) -> Tensor:
        (found,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        return found

    with pytest.raises(kfac_fx.errors.ObservationError, match=r"torch\.autograd\.grad"):
        recorded(net, [slope])


@pytest.mark.usefixtures("all_stay")
def test_inputs_may_change_before_the_step() -> None:
    net = kfac_fx.transform(nn.Linear(6, 5, bias=False))
    pre, x = made(net), torch.randn(3, 6)
    want = x.T @ x / 3
    pre.observe(inputs=x)
    x.zero_()
    fold(pre)
    torch.testing.assert_close(next(iter(pre.factors.values()))[0], want)


@pytest.mark.usefixtures("all_stay")
def test_micro_batches() -> None:
    net = kfac_fx.transform(nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 9)))
    x, options = torch.randn(5, 6), {"fisher": "empirical"}
    y = torch.randn(5, 9)
    whole, parts = made(net, **options), made(net, **options)
    whole.observe(inputs=x, targets=y)
    fold(whole)
    for part in (slice(0, 2), slice(2, 5)):
        parts.observe(inputs=x[part], targets=y[part])
    fold(parts)
    assert_close(named_factors(parts), named_factors(whole))


@pytest.mark.usefixtures("all_stay")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e200])
def test_not_finite(bad: float) -> None:
    net = kfac_fx.transform(nn.Linear(6, 5))
    pre = made(net)
    for value in (1.0, bad):
        pre.observe(inputs=torch.full((2, 6), value))
        fold(pre)
    assert pre.skipped_statistics == 1
    torch.testing.assert_close(next(iter(pre.factors.values()))[0], torch.ones(7, 7))


@pytest.mark.usefixtures("all_stay")
def test_state_is_whole() -> None:
    """Averages of which one half is up to date are not seen from outside."""
    net = kfac_fx.transform(nn.Linear(6, 9))
    pre, other = made(net), made(net)
    for _ in range(3):
        pre.observe(inputs=torch.randn(4, 6))
        fold(pre)
    other.load_state_dict(pre.state_dict())
    for A in (*named_factors(pre).values(), *named_factors(other).values()):
        torch.testing.assert_close(A, A.T, rtol=0, atol=0)
    assert_close(named_factors(other), named_factors(pre))


def trained(slab: int, lr: float | None, factor_storage: FactorStorage | None) -> list[Tensor]:
    """Parameters after three steps of KFAC, which compares statistics with their averages."""
    torch.manual_seed(0)
    net = kfac_fx.transform(nn.Sequential(nn.Linear(80, 90), nn.Tanh(), nn.Linear(90, 9)))
    optimizer = kfac_fx.KFAC(
        net,
        "normal",
        lr=lr,
        generator=torch.Generator().manual_seed(0),
        options=KFACOptions(statistics_fraction=0.5, factor_storage=factor_storage),
    )
    with THRESHOLDS.changed(slab=slab):
        for _ in range(3):
            optimizer.step(torch.randn(128, 80), torch.randn(128, 9))
    return [p.detach() for p in net.parameters()]


@pytest.mark.parametrize("factor_storage", [None, "bfloat16"])
@pytest.mark.parametrize("lr", [None, 0.1])
def test_optimizer(lr: float | None, factor_storage: FactorStorage | None) -> None:
    if factor_storage:
        torch.set_default_dtype(torch.float32)
    rough = {"rtol": 1e-3, "atol": 1e-4} if factor_storage else {"rtol": 1e-9, "atol": 1e-11}
    found = trained(1, lr, factor_storage)
    other = trained(10**6, lr, factor_storage)
    torch.testing.assert_close(found, other, **rough)


def test_swollen_averages_start_anew(all_stay: None, caplog: pytest.LogCaptureFixture) -> None:
    net = kfac_fx.transform(nn.Linear(6, 5))
    pre = made(net)
    for value in (1e6, 1.0):
        pre.observe(inputs=torch.full((2, 6), value))
        assert pre.inverse.fold(pre.recorder.take(), 0.95, outlier=100.0)
    assert "start anew" in caplog.text
    torch.testing.assert_close(next(iter(pre.factors.values()))[0], torch.ones(7, 7))


def _in_a_world() -> dict[str, Tensor]:
    """Layers of which statistics of a few cases stay rows, as they are."""
    torch.manual_seed(0)
    net = kfac_fx.transform(nn.Sequential(nn.Linear(260, 300), nn.Tanh(), nn.Linear(300, 5)))
    workers: Any = DataParallel() if dist.is_initialized() else None
    generator = torch.Generator().manual_seed(0)
    given = {"workers": workers} if workers else {}
    pre = kfac_fx.Preconditioner(
        net, "normal", fisher="empirical", generator=generator, statistics_every=1, **given
    )
    x, y = torch.randn(8, 260), torch.randn(8, 5)
    share = slice(4 * workers.rank, 4 * workers.rank + 4) if workers else slice(None)
    pre.observe(inputs=x[share], targets=y[share])
    fold(pre)
    return named_factors(pre)


def test_two_processes_are_one() -> None:
    torch.set_default_dtype(torch.float32)
    want = _in_a_world()
    for found in run_in_world(2, _in_a_world):
        assert not isinstance(found, str), found
        for name, value in want.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


def gram_of(d: int, count: int = 3) -> tuple[Rows, Tensor]:
    R = torch.randn(count, d)
    return Rows(R, 0.7), 0.7 * R.T @ R


def test_rows_are_the_matrix() -> None:
    found, want = gram_of(11)
    with THRESHOLDS.changed(slab=4):
        torch.testing.assert_close(found.product(), want)
        torch.testing.assert_close(found.diagonal(), want.diagonal())
        torch.testing.assert_close((found * 3.0).product(), 3 * want)
    found.share()
    assert found.product() is found.product()


def test_folds_of_both_kinds() -> None:
    """Rows write one half, whatever the slabs; a matrix does not make a half whole."""
    average = Average((11, 11), torch.zeros(()), True)
    average.stored.fill_(float("nan"))
    want = torch.zeros(11, 11)
    for step, width in enumerate((4, 2, 4, 3, 4)):
        found, matrix = gram_of(11)
        if step == 4:
            found.share()
        weight = 1 / (step + 1)
        with THRESHOLDS.changed(slab=width):
            fold_in_place([average], [matrix if step == 2 else found], weight)
        want = (1 - weight) * want + weight * matrix
        torch.testing.assert_close(average.upper().triu(), want.triu())
    assert average.upper_only
    torch.testing.assert_close(average.read(), want)
    assert not average.upper_only


@pytest.mark.usefixtures("all_stay")
def test_slabs_cover_all_however_many_threads() -> None:
    """What could stay when it was recorded enters its average whatever has changed."""
    net, x = kfac_fx.transform(nn.Linear(6, 5)), torch.randn(3, 6)
    pre = made(net)
    pre.observe(inputs=x)
    with THRESHOLDS.changed(slab=10**6):
        fold(pre)
    bar = torch.cat([x, torch.ones(3, 1)], 1)
    torch.testing.assert_close(next(iter(pre.factors.values()))[0], bar.T @ bar / 3)


def test_mirror() -> None:
    M = torch.randn(2, 5, 5)
    want = M.triu() + M.triu(1).mT
    for _ in range(2):
        mirror(M)
        torch.testing.assert_close(M, want, rtol=0, atol=0)


@pytest.mark.usefixtures("all_stay")
def test_what_stays() -> None:
    """No more memory than the matrix takes, and nothing outside of noted passes."""
    assert isinstance(second_moment(torch.zeros(4, 5)), Tensor)
    with collecting(Collection([]), forming=True):
        assert stay(torch.zeros(4, 5)) and isinstance(second_moment(torch.zeros(4, 5)), Rows)
        assert not stay(torch.zeros(5, 5))
        assert not stay(torch.zeros(2, 4, 5))
        assert not stay(torch.zeros(4, 5, dtype=torch.complex64))
        assert not stay(torch.zeros(4, 5, device="meta"))


class Heads(nn.Module):
    def __init__(self, d: int = 6) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(d, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) * self.k(x) + self.v(x)


@pytest.mark.usefixtures("all_stay")
@pytest.mark.parametrize("factor_storage", [None, "bfloat16"])
def test_shared_input_is_multiplied_once(
    factor_storage: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_default_dtype(torch.float32)
    formed: list[int] = []
    whole = gram.gram
    monkeypatch.setattr(gram, "gram", lambda R, s: (formed.append(R.shape[1]), whole(R, s))[1])
    x = torch.randn(2, 6)
    found = recorded(kfac_fx.transform(Heads()), [x], factor_storage=factor_storage)
    assert formed.count(7) == 1
    bar = torch.cat([x, torch.ones(2, 1)], 1)
    for name in ("q", "k", "v"):
        torch.testing.assert_close(found[f"{name}/0"], bar.T @ bar / 2, rtol=0.01, atol=0.02)


@pytest.mark.usefixtures("all_stay")
@pytest.mark.parametrize("factor_storage", [None, "bfloat16"])
def test_folds_under_autocast(factor_storage: str | None) -> None:
    torch.set_default_dtype(torch.float32)
    net = kfac_fx.transform(Heads())
    pre = made(net, factor_storage=factor_storage)
    want = made(net, factor_storage=factor_storage)
    x = torch.randn(5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        for part in (slice(0, 2), slice(2, 5)):
            pre.observe(inputs=x[part])
        fold(pre)
    for part in (slice(0, 2), slice(2, 5)):
        want.observe(inputs=x[part])
    fold(want)
    for name, value in named_factors(want).items():
        torch.testing.assert_close(named_factors(pre)[name], value, rtol=0.03, atol=0.03, msg=name)


def test_failed_folds_count_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pre = made(kfac_fx.transform(nn.Linear(6, 5)))
    pre.observe(inputs=torch.randn(3, 6))

    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(estimate, "fold_in_place", fail)
    with pytest.raises(MemoryError):
        fold(pre)
    assert estimate_of(pre).recorded == 0


def test_taps_of_other_networks_are_not_noted() -> None:
    """A generator's pass runs a discriminator that records for itself."""
    torch.manual_seed(0)
    inner, outer = kfac_fx.transform(nn.Linear(4, 3)), kfac_fx.transform(nn.Linear(6, 4))
    own, other = made(inner, fisher="empirical"), made(outer)
    x, y, z = torch.randn(5, 4), torch.randn(5, 3), torch.randn(5, 6)
    outputs = inner(x)
    own.observe(outputs, y)
    other.observe(inputs=lambda net: inner(net(z)))
    (outputs - y).square().sum().div(10).backward()
    fold(own)
    twin = kfac_fx.transform(nn.Linear(4, 3))
    twin.load_state_dict(inner.state_dict(), strict=False)
    want = recorded(twin, [x], y, fisher="empirical")
    assert_close(named_factors(own), want)


@pytest.mark.parametrize("how", ["another", "none"])
def test_closures_that_record_nothing_are_told_so(how: str) -> None:
    net, other = kfac_fx.transform(nn.Linear(6, 5)), nn.Linear(6, 5)
    x, y = torch.randn(8, 6), torch.randn(8, 5)
    optimizer = kfac_fx.KFAC(net, "normal", lr=0.1)
    with pytest.raises(kfac_fx.errors.ObservationError, match="network that it is given"):
        optimizer.step(lambda net: other(x) + (net(x).detach() if how == "another" else 0.0), y)


def test_closures_may_use_the_network_as_it_is() -> None:
    """By the name that it has outside, and with its attributes."""
    x, y, parameters = torch.randn(8, 6), torch.randn(8, 5), []
    for kind in range(3):
        torch.manual_seed(0)
        net = kfac_fx.transform(nn.Linear(6, 5))
        generator = torch.Generator().manual_seed(0)
        optimizer = kfac_fx.KFAC(net, "normal", lr=0.1, generator=generator)
        closure = (
            lambda net: net(x),
            lambda _, own=net: own(x),
            lambda net: net(x) if net.training else None,
        )[kind]
        optimizer.step(closure, y)
        parameters.append([p.detach() for p in net.parameters()])
    torch.testing.assert_close(parameters[1:], parameters[:1] * 2)


class Both(nn.Module):
    """Two layers that read one input, or each a tensor of its own."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.shared = shared
        self.first, self.second = nn.Linear(5, 4), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.first(x) + self.second(x if self.shared else x.clone())
        return out


@pytest.mark.parametrize("shared", [True, False])
def test_inputs_are_remembered_where_two_taps_have_read_one(
    shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its A is formed once; where each has its own, nothing is kept for another tap."""
    formed: list[Tensor] = []
    form = kronecker.homogeneous_gram

    def counted(rows: Tensor, *options: float) -> Tensor:
        formed.append(rows)
        return form(rows, *options)

    monkeypatch.setattr(kronecker, "homogeneous_gram", counted)
    net = kfac_fx.transform(Both(shared))
    preconditioner = kfac_fx.Preconditioner(net, "normal", structure="block_diagonal")
    preconditioner.observe(net(torch.randn(7, 5)))
    assert len(formed) == (1 if shared else 2)
    assert (gram._last is not None) == shared
    gram.forget_input()
