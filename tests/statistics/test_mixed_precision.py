"""Low precisions, scaled losses, micro-batches and checkpoints, for every kind of use.

The reference is the same model in float64 with its whole batch at once. Factors stay in float32
whatever the layers run in, and how the loss is scaled is none of their business.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from support.networks import RMSNorm
from support.steps import one_step
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kfac_fx

N, T, D = 16, 4, 8


@dataclass(frozen=True)
class Kind:
    """A layer from [N, T, D] (or ids [N, T]) to [N, T, D], and its inputs."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor] = lambda: torch.randn(N, T, D)


class Call(nn.Module):
    """A layer whose call needs a few words more."""

    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor], layer: nn.Module) -> None:
        super().__init__()
        self.call, self.layer = call, layer

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.layer, x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind()
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Elementwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.position, self.scale = nn.Parameter(torch.randn(T, D)), nn.Parameter(torch.rand(D))

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.position) * self.scale


class Generic(nn.Module):
    """A use that no rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.cumsum(self.weight, 0)


def convolved(layer: nn.Module) -> nn.Module:
    return Call(lambda m, x: m(x.transpose(1, 2)).transpose(1, 2), layer)


KINDS = {
    "linear": Kind(lambda: nn.Linear(D, D)),
    "convolution": Kind(lambda: convolved(nn.Conv1d(D, D, 3, padding=1))),
    "grouped": Kind(lambda: convolved(nn.Conv1d(D, D, 3, padding=1, groups=4))),
    "transposed": Kind(lambda: convolved(nn.ConvTranspose1d(D, D, 3, padding=1))),
    "layer_norm": Kind(lambda: nn.LayerNorm(D)),
    "rms_norm": Kind(lambda: RMSNorm(D)),
    "group_norm": Kind(lambda: convolved(nn.GroupNorm(2, D))),
    "embedding": Kind(lambda: nn.Embedding(11, D), lambda: torch.randint(11, (N, T))),
    "lstm": Kind(lambda: Call(lambda m, x: m(x)[0], nn.LSTM(D, D, batch_first=True))),
    "bilinear": Kind(lambda: Call(lambda m, x: m(x, x), nn.Bilinear(D, D, D))),
    "attention": Kind(Attention),
    "elementwise": Kind(Elementwise),
    "generic": Kind(Generic),
}
kinds = pytest.mark.parametrize("kind", KINDS)


class Net(nn.Module):
    """The layer between a stem and a head, one likelihood term a case."""

    def __init__(self, kind: str, keep: bool = True) -> None:
        super().__init__()
        self.stem = nn.Linear(D, D) if kind != "embedding" else nn.Identity()
        self.layer, self.head, self.keep = KINDS[kind].build(), nn.Linear(D, 3), keep

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.layer(x) if self.keep else checkpoint(self.layer, x, use_reentrant=False)
        return self.head(torch.tanh(x).mean(1))


Factors = dict[str, tuple[Tensor, ...]]


def in_double(model: nn.Module, x: Tensor, y: Tensor, fisher: str) -> Factors:
    """The factors that are expected, from one batch in float64."""
    x = x.double() if x.is_floating_point() else x
    net = kfac_fx.transform(copy.deepcopy(model).double())
    return step(net, x, y, fisher).factors


def step(net: nn.Module, x: Tensor, y: Tensor, fisher: str) -> kfac_fx.Preconditioner:
    preconditioner = kfac_fx.Preconditioner(net, fisher=fisher, damping=1e-2)
    one_step(preconditioner, net, x, lambda outputs: F.cross_entropy(outputs, y), y)
    return preconditioner


def near(found: Factors, want: Factors, tolerance: float) -> None:
    """Float32, and of the expected values up to a share of each factor's norm."""
    assert set(found) == set(want)
    for name, factors in want.items():
        for got, expected in zip(found[name], factors, strict=True):
            assert got.dtype == torch.float32, name
            distance = (got - expected).norm() / expected.norm()
            assert distance < tolerance, f"{name}: {float(distance)}"


def prepared(kind: str) -> tuple[nn.Module, Tensor, Tensor]:
    return Net(kind), KINDS[kind].inputs(), torch.randint(3, (N,))


def known(kind: str, fisher: str) -> None:
    if kind == "generic" and fisher == "exact":
        pytest.skip("what has no tap is sampled: two runs draw other targets")


def takes_autocast(model: nn.Module, x: Tensor, dtype: torch.dtype) -> bool:
    """torch's own bilinear refuses it on a CPU."""
    try:
        with torch.autocast("cpu", dtype=dtype):
            model(x)
    except RuntimeError:
        return False
    return True


# ------------------------------------------------------------------------------- low precision
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@kinds
def test_autocast(kind: str, dtype: torch.dtype, fisher: str) -> None:
    """Near the factors of the same model in float64."""
    known(kind, fisher)
    model, x, y = prepared(kind)
    if not takes_autocast(model, x, dtype):
        pytest.skip("the model itself fails")
    want = in_double(model, x, y, fisher)
    net = kfac_fx.transform(model)
    preconditioner = kfac_fx.Preconditioner(net, fisher=fisher, damping=1e-2)
    with torch.autocast("cpu", dtype=dtype):
        outputs = net(x)
        loss = F.cross_entropy(outputs, y)
    preconditioner.observe(outputs, y)
    loss.backward()
    preconditioner.step()
    assert outputs.dtype == dtype
    near(preconditioner.factors, want, 0.1 if dtype == torch.bfloat16 else 0.02)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@kinds
def test_bfloat16_parameters(kind: str, fisher: str) -> None:
    """Factors and inverses in float32; gradients and what takes their place in bfloat16."""
    known(kind, fisher)
    model, x, y = prepared(kind)
    model = model.bfloat16()
    want = in_double(model, x, y, fisher)
    x = x.bfloat16() if x.is_floating_point() else x
    preconditioner = step(kfac_fx.transform(model), x, y, fisher)
    near(preconditioner.factors, want, 0.1)
    for parameter in model.parameters():
        assert parameter.grad.dtype == torch.bfloat16 and parameter.grad.isfinite().all()


# --------------------------------------------------------------------------------- scaled losses
@pytest.mark.parametrize("fisher", ["sampled", "exact", "empirical"])
@kinds
def test_loss_scale(kind: str, fisher: str) -> None:
    """With a GradScaler: unscale the gradients, then precondition them."""
    model, x, y = prepared(kind)
    found, gradients = [], []
    for scale in (1.0, 2.0**12):
        net = kfac_fx.transform(copy.deepcopy(model))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        generator = torch.Generator().manual_seed(1)
        preconditioner = kfac_fx.Preconditioner(
            net, fisher=fisher, damping=1e-2, trust_region=1e-3, generator=generator
        )
        outputs = net(x)
        preconditioner.observe(outputs, y)
        scaler.scale(F.cross_entropy(outputs, y)).backward()
        scaler.unscale_(optimizer)
        preconditioner.step()
        gradients.append([p.grad.clone() for p in net.parameters()])
        scaler.step(optimizer)
        scaler.update()
        found.append(preconditioner.factors)
    near(found[1], found[0], 1e-5)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("fisher", ["sampled", "exact", "empirical"])
def test_overflow_of_a_scaled_loss(fisher: str) -> None:
    """The scaler skips the step and lowers its scale; the averages stay finite."""
    model, x, y = prepared("linear")
    net = kfac_fx.transform(model)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1e38, backoff_factor=1e-30)
    preconditioner = kfac_fx.Preconditioner(net, fisher=fisher, damping=1e-2)
    before = copy.deepcopy(net.state_dict())
    for attempt in range(2):
        optimizer.zero_grad()
        outputs = net(x)
        preconditioner.observe(outputs, y)
        loss = F.cross_entropy(outputs, y)
        scaler.scale(1e9 * loss if attempt == 0 else loss).backward()
        scaler.unscale_(optimizer)
        preconditioner.step()
        scaler.step(optimizer)
        scaler.update()
        moved = any(not torch.equal(before[k], v) for k, v in net.state_dict().items())
        assert moved == (attempt == 1)
    for factors in preconditioner.factors.values():
        assert all(factor.isfinite().all() for factor in factors)


def test_clipped_gradients_do_not_change_the_statistics() -> None:
    """What is done to .grad before step() is no part of the empirical Fisher."""
    model, x, y = prepared("generic")
    want = in_double(model, x, y, "empirical")
    net = kfac_fx.transform(model)
    preconditioner = kfac_fx.Preconditioner(net, fisher="empirical", damping=1e-2)
    outputs = net(x)
    preconditioner.observe(outputs, y)
    F.cross_entropy(outputs, y).backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
    preconditioner.step()
    near(preconditioner.factors, want, 1e-4)


# -------------------------------------------------------------- micro-batches and checkpointing
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@kinds
def test_micro_batches(kind: str, fisher: str) -> None:
    """Gradients add up over four parts, and so do the statistics of what has a tap."""
    known(kind, fisher)
    model, x, y = prepared(kind)
    want = in_double(model, x, y, fisher)
    net = kfac_fx.transform(model)
    preconditioner = kfac_fx.Preconditioner(net, fisher=fisher, damping=1e-2)
    squares = 0
    for part, target in zip(x.split(N // 4), y.split(N // 4), strict=True):
        outputs = net(part)
        preconditioner.observe(outputs, target)
        loss = F.cross_entropy(outputs, target)
        (loss / 4).backward()
        if kind == "generic":
            again = F.cross_entropy(net(part), target, reduction="sum")
            (gradient,) = torch.autograd.grad(again, net.get_parameter("layer.weight"))
            squares = squares + gradient.square()
    preconditioner.step()
    if kind == "generic":  # the squared gradient of each part: no sum gives that of the batch
        want = dict(want) | {"layer": (squares.double() / N,)}
    near(preconditioner.factors, want, 1e-3)


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("inside", [False, True], ids=["around the net", "inside"])
@kinds
def test_checkpoint(kind: str, inside: bool, fisher: str) -> None:
    """What the backward computes again counts once."""
    known(kind, fisher)
    model, x, y = prepared(kind)
    want = in_double(model, x, y, fisher)
    model.keep = not inside
    net = kfac_fx.transform(model)
    preconditioner = kfac_fx.Preconditioner(net, fisher=fisher, damping=1e-2)
    outputs = net(x) if inside else checkpoint(net, x, use_reentrant=False)
    preconditioner.observe(outputs, y)
    F.cross_entropy(outputs, y).backward()
    preconditioner.step()
    near(preconditioner.factors, want, 1e-3)
