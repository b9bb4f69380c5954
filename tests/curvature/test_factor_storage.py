"""Averages in bfloat16 and on the host: rounding, accuracy, state, bytes."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.inside import estimate_of
from support.processes import run_in_world
from support.steps import one_step
from torch import Tensor, nn

import kfac_fx
from kfac_fx.curvature.factor_storage import Bfloat16, Host, rounded, storage_of
from kfac_fx.distributed import DataParallel
from kfac_fx.optim import KFACOptions

OPTIONS: list[dict[str, Any]] = [
    {},
    {"structure": "block_tridiagonal"},
    {"structure": "block_diagonal", "tikhonov": "exact"},
    {"structure": "block_diagonal", "tikhonov": "ekfac"},
]
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_CUDA])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trained(
    storage: str | None, steps: int = 100, device: str = "cpu", **options: Any
) -> tuple[kfac_fx.Preconditioner, Tensor]:
    """After so many batches of 64, the same for every storage; with the last gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, 5))
    periods = {"statistics_every": 1, "refresh_every": 10}
    given = {"fisher": "exact", "damping": 1e-2, "generator": seeded()} | periods | options
    net = kfac_fx.transform(model.to(device), ekfac=True)
    preconditioner = kfac_fx.Preconditioner(net, "normal", factor_storage=storage, **given)
    step(preconditioner, net, steps, device)
    return preconditioner, gradient(net)


def step(preconditioner: kfac_fx.Preconditioner, net: nn.Module, steps: int, device: str) -> None:
    draws = seeded(1)
    for _ in range(steps):
        x = torch.randn(64, 6, generator=draws).to(device)
        one_step(preconditioner, net, x, lambda outputs: (outputs - 1).square().sum().div(128))


def gradient(net: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def bytes_kept(preconditioner: kfac_fx.Preconditioner) -> int:
    entries = estimate_of(preconditioner).all
    return sum(average.stored.nbytes for entry in entries for average in entry.all)


# Rounding.


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_rounding_keeps_the_mean(device: str) -> None:
    """Within five standard errors, and always to one of the two neighbours."""
    count = 100_000
    noise = torch.Generator(device).manual_seed(0)
    for value in (1.003, -0.3, 1.9999, 7e-5, -1e-20, 3e8, 0.5, 0.0):
        x = torch.full((count,), value, device=device)
        exact = float(x[0])
        found = rounded(x, noise)
        assert found.dtype == torch.bfloat16
        low, high = (float(end) for end in found.double().aminmax())
        assert low <= exact <= high
        share = 0.0 if low == high else (exact - low) / (high - low)
        error = (high - low) * math.sqrt(share * (1 - share) / count)
        assert abs(float(found.double().mean()) - exact) <= 5 * error + 1e-12 * abs(exact)
        assert high - low <= abs(exact) * 2**-7


def test_torchs_own_stream_is_left_alone() -> None:
    before = torch.get_rng_state()
    storage = Bfloat16(seeded())
    average = storage.make((7, 7), torch.zeros(()), True)
    storage.fold([average], [torch.ones(7, 7)], 0.05)
    assert torch.equal(torch.get_rng_state(), before)


def test_symmetric_averages_stay_symmetric() -> None:
    storage = Bfloat16(seeded())
    for shape in ((8, 8), (3, 5, 5), (1, 1)):
        average = storage.make(shape, torch.zeros(()), True)
        for _ in range(5):
            X = torch.randn(shape)
            storage.fold([average], [X @ X.mT], 0.3)
        assert torch.equal(average.stored, average.stored.mT)


def test_a_first_statistic_is_exact_up_to_rounding() -> None:
    value = torch.randn(500)
    storage = Bfloat16(seeded())
    average = storage.make((500,), torch.zeros(()), False)
    average.stored.fill_(1e9)  # what was there before does not matter
    storage.fold([average], [value], 1.0)
    assert bool(((average.read() - value).abs() <= value.abs() * 2**-7).all())


def test_averages_follow_a_drift() -> None:
    """A statistic that grows by 1 % a step."""
    storage = Bfloat16(seeded())
    average, exact = storage.make((4096,), torch.zeros(()), False), torch.zeros(4096)
    for k in range(100):
        new, weight = torch.full((4096,), 1.01**k), 1.0 if k == 0 else 0.05
        storage.fold([average], [new], weight)
        exact.lerp_(new, weight)
    mean, want = float(average.read().mean()), float(exact[0])
    assert want > 2 and abs(mean / want - 1) < 1e-3


def test_changes_of_less_than_half_a_place_count() -> None:
    """0.05 of 2 % is a quarter of what rounding to nearest would need to see it."""
    storage = Bfloat16(seeded())
    average, nearest = storage.make((4096,), torch.zeros(()), False), torch.ones(4096).bfloat16()
    for k in range(200):
        new, weight = torch.full((4096,), 1.02 if k else 1.0), 0.05 if k else 1.0
        storage.fold([average], [new], weight)
        nearest = nearest.float().lerp_(new, weight).bfloat16()
    assert bool((nearest == 1).all())
    assert abs(float(average.read().mean()) - 1.02) < 1e-3


def test_memory_counts_the_storage() -> None:
    net = kfac_fx.transform(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    small = kfac_fx.Preconditioner(net, factor_storage="bfloat16")
    elements = net.curvature.factor_elements
    assert net.curvature.memory(stored=2) == bytes_kept(small) + 4 * elements == 6 * elements


# In training.


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_bfloat16_is_close_to_float32(options: dict[str, Any]) -> None:
    exact, want = trained(None, **options)
    small, found = trained("bfloat16", **options)
    for name, factors in exact.factors.items():
        for full, factor in zip(factors, small.factors[name], strict=True):
            assert factor.dtype == torch.float32
            assert float((factor - full).norm() / full.norm()) < 0.01
    assert float(torch.cosine_similarity(want, found, dim=0)) > 0.999
    assert bytes_kept(exact) == 2 * bytes_kept(small)
    assert small.curvature_operator().logdet().isfinite()
    assert len(small.report().blocks) == len(exact.report().blocks)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_state_continues_bitwise(options: dict[str, Any]) -> None:
    given = {"fisher": "sampled", "refresh_every": 3} | options
    once, _ = trained("bfloat16", 4, **given)
    state = copy.deepcopy(once.state_dict())
    stored = [f for fs in state["inverse"]["averages"]["factors"].values() for f in fs]
    assert {f.dtype for f in stored} == {torch.bfloat16}
    other, _ = trained("bfloat16", 1, **given | {"generator": seeded(5)})
    other.load_state_dict(state)
    found = []
    for preconditioner in (once, other):
        net = preconditioner.recorder.net
        step(preconditioner, net, 7, "cpu")
        found.append((gradient(net), [f for fs in preconditioner.factors.values() for f in fs]))
    assert torch.equal(found[0][0], found[1][0])
    for one, two in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(one, two)


def test_state_of_another_storage_is_taken() -> None:
    exact, _ = trained(None, 5)
    small, _ = trained("bfloat16", 1)
    small.load_state_dict(exact.state_dict())
    for name, factors in exact.factors.items():
        for full, factor in zip(factors, small.factors[name], strict=True):
            assert torch.equal(full.bfloat16().float(), factor)


def test_a_compiled_refresh_is_the_same() -> None:
    _, plain = trained("bfloat16", 5)
    _, compiled = trained("bfloat16", 5, compile="aot_eager")
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-6)


def test_kfac_trains_with_bfloat16() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
    options = KFACOptions(factor_storage="bfloat16")
    optimizer = kfac_fx.KFAC(kfac_fx.transform(model), damping=1.0, options=options)
    x = torch.randn(256, 6)
    y = x[:, :3].argmax(1)
    losses = [float(optimizer.step(x, y)) for _ in range(20)]
    assert losses[-1] < 0.7 * losses[0]
    assert all(a.stored.dtype == torch.bfloat16 for e in estimate_of(optimizer).all for a in e.all)


def in_a_process() -> list[Tensor]:
    """Factors and gradients after some batches, of which each process has half."""
    torch.manual_seed(0)
    net = kfac_fx.transform(nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 5)))
    given = {"workers": DataParallel(memory_fraction=0.5), "factor_storage": "bfloat16"}
    preconditioner = kfac_fx.Preconditioner(net, "normal", damping=1e-2, **given)
    for _ in range(12):
        net.zero_grad()
        outputs = net(torch.randn(64, 6)[dist.get_rank() :: 2])
        preconditioner.observe(outputs)
        (outputs - 1).square().sum().div(128).backward()
        for p in net.parameters():
            dist.all_reduce(p.grad)
        preconditioner.step()
    return [gradient(net), *(f for fs in preconditioner.factors.values() for f in fs)]


def test_processes_round_alike() -> None:
    one, two = run_in_world(2, in_a_process)
    assert not isinstance(one, str), one
    for mine, other in zip(one, two, strict=True):
        assert torch.equal(mine, other)


def test_other_options_are_refused() -> None:
    net = kfac_fx.transform(nn.Linear(3, 2))
    for make in (
        lambda value: kfac_fx.Preconditioner(net, factor_storage=value),
        lambda value: KFACOptions(factor_storage=value),
    ):
        with pytest.raises(kfac_fx.errors.UnknownOptionError, match="factor_storage='float8'"):
            make("float8")
    double = kfac_fx.transform(nn.Linear(3, 2).double())
    with pytest.raises(kfac_fx.errors.UnknownOptionError, match="float64"):
        kfac_fx.Preconditioner(double, factor_storage="bfloat16")


# On the host.


def test_host_without_cuda_is_as_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.INFO, "kfac_fx"):
        assert storage_of("host", seeded()) is None
    assert caplog.text.count("factor_storage='host' changes nothing") == 1
    assert torch.equal(trained(None, 12)[1], trained("host", 12)[1])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_host_storage_on_the_cpu(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU would run, of tensors that are on the host anyway."""
    want = trained(None, 12, **options)[1]
    monkeypatch.setattr("kfac_fx.curvature.inverses.storage_of", lambda kind, seeds: Host())
    assert torch.equal(trained("host", 12, **options)[1], want)


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_host_of_a_gpu(options: dict[str, Any]) -> None:
    _, want = trained(None, 12, "cuda", **options)
    host, found = trained("host", 12, "cuda", **options)
    averages = [a for e in estimate_of(host).all for a in e.all]
    assert all(a.stored.is_pinned() for a in averages)
    assert all(f.is_cuda for fs in host.factors.values() for f in fs)
    torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-5)
