"""What a CUDA device finds is what the CPU finds, and its programs and options work there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.asserts import assert_same
from support.networks import NETWORKS, Network
from torch import Tensor, nn

import kfac_fx
from kfac_fx.linalg.positive import cholesky_inverse, cholesky_whitener
from kfac_fx.linalg.precision import unrounded
from kfac_fx.ops.gram import gram, homogeneous_gram

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
BOTH = ("cpu", "cuda")
Found = dict[str, Tensor]


def conv_net() -> nn.Module:
    """Convolutions of equal shapes, so that programs stack them; a stride, and a wide kernel."""
    body = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(3))
    layers = [layer for conv in body for layer in (conv, nn.BatchNorm2d(8), nn.ReLU())]
    ends = nn.Conv2d(8, 6, 5, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)
    return nn.Sequential(nn.Conv2d(2, 8, 3, dilation=2), nn.ReLU(), *layers, *ends)


def images(n: int) -> Tensor:
    return torch.randn(n, 2, 12, 12)


def moved(value: Any, device: str) -> Any:
    return value.to(device, torch.float64 if value.is_floating_point() else None)


def preconditioned(
    network: Network, device: str, structure: str, **options: Any
) -> tuple[Found, Found]:
    """Factors by block and side, and preconditioned gradients, after two steps."""
    torch.manual_seed(0)
    model = network.build().double().eval()
    calls = [
        (
            [moved(x, device) for x in network.inputs(5)],
            {key: moved(x, device) for key, x in network.kwargs(5).items()},
        )
        for _ in range(2)
    ]
    examples = {}
    if network.needs_examples:
        examples = {"example_inputs": tuple(calls[0][0]), "example_kwargs": calls[0][1]}
    net = kfac_fx.transform(model.to(device), structure=structure, **examples)
    options = {"fisher": "exact", "damping": 1e-2} | options
    preconditioner = kfac_fx.Preconditioner(net, "normal", **options)
    for args, kwargs in calls:
        net.zero_grad()
        outputs = network.pick(net(*args, **kwargs))
        preconditioner.observe(outputs)
        outputs.sin().sum().backward()
        preconditioner.step()
    found = preconditioner.factors.items()
    factors = {f"{n} {k}": f.cpu() for n, own in found for k, f in enumerate(own)}
    updates = {n: p.grad.cpu() for n, p in net.named_parameters() if p.grad is not None}
    return factors, updates


@pytest.mark.parametrize("structure", ["block_diagonal", "block_tridiagonal"])
@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_every_network(network: Network, structure: str) -> None:
    cpu, gpu = (preconditioned(network, device, structure) for device in BOTH)
    assert_same(gpu[0], cpu[0], 1e-9, 1e-11)
    assert_same(gpu[1], cpu[1], 1e-7, 1e-9)


@pytest.mark.parametrize("tikhonov", ["factored", "exact", "ekfac"])
def test_equal_blocks(tikhonov: str) -> None:
    """Programs on a GPU serve them together; a second step has other statistics.

    So many cases, and this likelihood, leave no two eigenvalues equal, whose basis is arbitrary.
    """
    options = {"fisher": "exact", "damping": 1e-2, "refresh_every": 1, "tikhonov": tikhonov}
    torch.manual_seed(0)
    model, found = conv_net().double(), []
    batches = [images(100).double() for _ in range(3)]
    for device in BOTH:
        net = kfac_fx.transform(
            copy.deepcopy(model).to(device), structure="block_diagonal", ekfac=tikhonov == "ekfac"
        )
        preconditioner = kfac_fx.Preconditioner(net, "categorical", **options)
        for x in batches:
            net.zero_grad()
            outputs = net(x.to(device))
            preconditioner.observe(outputs)
            outputs.square().sum().backward()
            preconditioner.step()
        found.append({n: p.grad.cpu() for n, p in net.named_parameters()})
    assert_same(found[1], found[0], 1e-6, 1e-9)


@pytest.mark.parametrize("tikhonov", ["factored", "exact"])
def test_the_operator(tikhonov: str) -> None:
    structure = "block_tridiagonal" if tikhonov == "factored" else "block_diagonal"
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, v, found = torch.randn(8, 4, dtype=torch.float64), torch.randn(53, dtype=torch.float64), []
    for device in BOTH:
        net = kfac_fx.transform(copy.deepcopy(model).to(device), structure=structure)
        preconditioner = kfac_fx.Preconditioner(net, "normal", fisher="exact", tikhonov=tikhonov)
        outputs = net(x.to(device))
        preconditioner.observe(outputs)
        outputs.square().sum().backward()
        preconditioner.step()
        operator = preconditioner.curvature_operator()
        drawn = operator.flat(operator.sample(torch.Generator().manual_seed(0)))
        values = operator @ v, operator.solve(v), operator.logdet(), operator.diagonal(), drawn
        found.append([value.cpu() for value in values])
    for cpu, gpu in zip(found[0][:4], found[1][:4], strict=True):
        torch.testing.assert_close(gpu, cpu, rtol=1e-7, atol=1e-8)
    assert found[1][4].isfinite().all()  # eigenvectors differ by signs, so draws do


def losses(device: str, make: Callable[[nn.Module], Callable[[Tensor, Tensor], Any]]) -> list[Any]:
    """Of a few steps of an optimizer on one batch."""
    torch.manual_seed(0)
    net, x, y = conv_net().double().to(device), images(32).double(), torch.randint(5, (32,))
    step = make(net)
    return [float(step(x.to(device), y.to(device))) for _ in range(6)]


@pytest.mark.parametrize(
    "options", [{"lr": 0.1}, {}, {"lr": 0.1, "structure": "block_tridiagonal"}], ids=str
)
def test_kfac(options: dict[str, Any]) -> None:
    """Whole trajectories: the sizes of steps, damping and momentum by the exact quadratic too."""

    def make(net: nn.Module) -> Callable[[Tensor, Tensor], Any]:
        net = kfac_fx.transform(net)
        given = {"structure": "block_diagonal"} | options
        optimizer = kfac_fx.KFAC(net, "categorical", fisher="exact", damping=1e-1, **given)
        return optimizer.step

    cpu, gpu = (losses(device, make) for device in BOTH)
    assert gpu == pytest.approx(cpu, rel=1e-6) and gpu[-1] < gpu[0]


@pytest.mark.slow
@pytest.mark.parametrize("fisher", ["empirical", "exact"])
def test_compiled(fisher: str) -> None:
    """TrainingStep and the programs, by Triton."""

    def make(net: nn.Module, compile: bool) -> Callable[[Tensor, Tensor], Any]:
        net = kfac_fx.transform(net, structure="block_diagonal")
        preconditioner = kfac_fx.Preconditioner(
            net, "categorical", fisher=fisher, damping=1e-1, refresh_every=2, compile=compile
        )
        run = kfac_fx.TrainingStep(preconditioner, nn.functional.cross_entropy)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

        def step(x: Tensor, y: Tensor) -> Any:
            optimizer.zero_grad()
            loss = run(x, y)
            preconditioner.step()
            optimizer.step()
            return loss

        return step

    plain, compiled = (losses("cuda", lambda net, c=c: make(net, c)) for c in (False, True))
    assert compiled == pytest.approx(plain, rel=1e-5) and plain[-1] < plain[0]


def test_autocast_and_scaler() -> None:
    """float16 in the forward, a scaled loss: factors are those of float32 to float16's rounding."""
    found = []
    for low in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 10)).cuda()
        x, y = torch.randn(256, 64, device="cuda"), torch.randint(10, (256,), device="cuda")
        net = kfac_fx.transform(model)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cuda", enabled=low)
        preconditioner = kfac_fx.Preconditioner(net, "categorical", fisher="empirical")
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.float16, enabled=low):
                outputs = net(x)
                preconditioner.observe(outputs, y)
                loss = nn.functional.cross_entropy(outputs, y)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            preconditioner.step()
            scaler.step(optimizer)
            scaler.update()
        assert preconditioner.skipped_statistics == preconditioner.skipped_gradients == 0
        found.append([f for group in preconditioner.factors.values() for f in group])
    for full, half in zip(*found, strict=True):
        assert float((full - half).norm() / full.norm()) < 1e-2


@pytest.mark.parametrize("shape", [(4096, 1100), (64, 1100), (4096, 64), (3, 200, 600)], ids=str)
def test_grams(shape: tuple[int, ...]) -> None:
    rows = torch.randn(shape, dtype=torch.float64, device="cuda")
    ones = torch.cat([rows, torch.ones_like(rows[..., :1])], -1)
    torch.testing.assert_close(gram(rows, 0.5), rows.mT @ rows * 0.5)
    torch.testing.assert_close(homogeneous_gram(rows, 0.5), ones.mT @ ones * 0.5)


@pytest.mark.parametrize("size", [8, 33])
def test_convolution_factors_in_float32(size: int) -> None:
    """TF32, which cuDNN may take for the network's own convolutions, stays out of statistics."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 8, 3, padding=1), nn.Flatten(1))
    x, found = torch.randn(4, 16, size, size), []
    for device, dtype in (("cuda", torch.float32), ("cpu", torch.float64)):
        net = kfac_fx.transform(copy.deepcopy(model).to(device, dtype))
        preconditioner = kfac_fx.Preconditioner(net, "normal", fisher="sampled")
        preconditioner.observe(net(x.to(device, dtype)))
        net.zero_grad()
        net(x.to(device, dtype)).square().mean().backward()
        preconditioner.step()
        found.append(preconditioner.factors["0"][0].cpu().double())
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 1e-5


def damped_factors(d: int, dtype: torch.dtype) -> Tensor:
    """A stack of positive matrices whose eigenvalues are 1e-3 and more."""
    rows = torch.randn(3, d // 2, d, dtype=torch.float64, device="cuda")
    return (rows.mT @ rows / d + 1e-3 * torch.eye(d, device="cuda")).to(dtype)


@pytest.mark.parametrize("d", [5, 256, 300, 769, 1100])
def test_inverses(d: int) -> None:
    matrices = damped_factors(d, torch.float64)
    inverse, failed = cholesky_inverse(matrices)
    whitener, _ = cholesky_whitener(matrices)
    ones = torch.eye(d, dtype=torch.float64, device="cuda").expand_as(matrices)
    assert not failed.any() and torch.equal(whitener, whitener.tril())
    torch.testing.assert_close(inverse @ matrices, ones, rtol=0, atol=1e-8)
    torch.testing.assert_close(whitener @ matrices @ whitener.mT, ones, rtol=0, atol=1e-8)


def test_inverses_are_not_rounded() -> None:
    """TF32, where it is allowed, would lose what Cholesky in float32 has."""
    matrices = damped_factors(1100, torch.float32)
    want = torch.linalg.inv(matrices.double())
    held = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with unrounded():
            found = cholesky_inverse(matrices)[0]
        rounded = cholesky_inverse(matrices)[0]
    finally:
        torch.set_float32_matmul_precision(held)
    error, other = (float((x - want).norm() / want.norm()) for x in (found, rounded))
    assert error < 1e-3 and 2 * error < other
