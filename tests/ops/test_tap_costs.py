"""What the taps cost: nobody pays for products that were not asked for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.dense_updates import MODELS
from support.inside import estimate_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import kfac_fx
from kfac_fx.passes.strip_taps import FewerTaps

aten = torch.ops.aten
PRODUCTS = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.matmul.default,
    aten.mv.default,
    aten.dot.default,
    aten.convolution.default,
    aten.convolution_backward.default,
}
# every size is different, so the shape of a product says what it is
ROWS, SIZES = 11, (5, 7, 3)
WEIGHTS = {(7, 5), (5, 7), (3, 7), (7, 3)}
STATISTICS = {(n, n) for size in SIZES for n in (size, size + 1)}


class Products(TorchDispatchMode):
    """The shapes of the results of all matrix products, and the calls of convolution_backward."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        self.weight_gradients = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is aten.convolution_backward.default:
            self.weight_gradients += bool(args[-1][1])
        if func in PRODUCTS:
            first = next(
                one for one in (out if isinstance(out, tuple) else (out,)) if one is not None
            )
            self.shapes.append(tuple(first.shape))
        return out


def products(run: Callable[[], Any]) -> Products:
    with Products() as mode:
        run()
    return mode


def normalised() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 3), nn.LayerNorm(3)
    )


def recorded(net: nn.Module, recording: bool = True) -> list[Tensor]:
    buffers = [b for group in kfac_fx.ops.factor_buffers(net).values() for b in group]
    for buffer in buffers:
        buffer.requires_grad_(recording)
    return buffers


def loss_of(net: nn.Module, x: Tensor) -> Tensor:
    return net(x).square().sum()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(ROWS, SIZES[0])


def test_statistics_run_no_weight_gradient(x: Tensor) -> None:
    net = kfac_fx.transform(normalised())
    buffers = recorded(net)
    loss = loss_of(net, x)
    found = products(lambda: torch.autograd.grad(loss, buffers))
    assert not WEIGHTS & set(found.shapes)
    assert STATISTICS & set(found.shapes)


def test_gradients_run_no_statistics(x: Tensor) -> None:
    model = normalised()
    plain = products(lambda: torch.autograd.grad(loss_of(model, x), list(model.parameters())))
    net = kfac_fx.transform(model)
    recorded(net)
    found = products(lambda: torch.autograd.grad(loss_of(net, x), list(net.parameters())))
    assert sorted(found.shapes) == sorted(plain.shapes)
    assert not STATISTICS & set(found.shapes)


def test_one_backward_gives_both(x: Tensor) -> None:
    net = kfac_fx.transform(normalised())
    buffers = recorded(net)
    loss = loss_of(net, x)
    found = products(loss.backward)
    assert WEIGHTS & set(found.shapes) and STATISTICS & set(found.shapes)
    assert all(buffer.grad is not None for buffer in buffers)


@pytest.mark.parametrize("recording", [False, True], ids=["off", "on"])
def test_forward_runs_no_statistics(x: Tensor, recording: bool) -> None:
    model = normalised()
    plain = products(lambda: model(x))
    net = kfac_fx.transform(model)
    recorded(net, recording)
    assert products(lambda: net(x)).shapes == plain.shapes


def test_off_is_the_plain_model(x: Tensor) -> None:
    model = normalised()
    plain = products(lambda: loss_of(model, x).backward())
    net = kfac_fx.transform(model)
    buffers = recorded(net, False)
    assert products(lambda: loss_of(net, x).backward()).shapes == plain.shapes
    assert all(buffer.grad is None for buffer in buffers)


def cycle(
    net: nn.Module, preconditioner: kfac_fx.Preconditioner, x: Tensor
) -> tuple[Products, Products]:
    """The products of observe() and of loss.backward() in one step."""
    net.zero_grad()
    outputs = net(x)
    targets = torch.randint(outputs.shape[-1], outputs.shape[:-1])
    loss = nn.functional.cross_entropy(outputs, targets)
    observed = products(lambda: preconditioner.observe(outputs, targets))
    backward = products(loss.backward)
    preconditioner.step()
    return observed, backward


@pytest.mark.parametrize("fisher", ["sampled", "exact"])
def test_training_backward_runs_no_statistics(x: Tensor, fisher: str) -> None:
    """The draws are differentiated in observe(), without weight gradients; then it is over."""
    model = normalised()
    plain = products(lambda: loss_of(model, x).backward())
    # Cross factors of G have the shapes of weight gradients.
    net = kfac_fx.transform(model, structure="block_diagonal")
    preconditioner = kfac_fx.Preconditioner(
        net, likelihood="categorical", damping=1e-2, fisher=fisher
    )
    observed, backward = cycle(net, preconditioner, x)
    assert not WEIGHTS & set(observed.shapes)
    assert STATISTICS & set(observed.shapes)
    forward = products(lambda: model(x))
    assert len(backward.shapes) == len(plain.shapes) - len(forward.shapes)
    assert not STATISTICS & set(backward.shapes)


@pytest.mark.parametrize("structure", ["block_tridiagonal", "block_diagonal"])
def test_cross_factors_cost_two_products_a_pair(x: Tensor, structure: str) -> None:
    """A and G of the pair where they are wanted, none where they are not."""
    counts = []
    for built in ("block_tridiagonal", "block_diagonal"):
        net = kfac_fx.transform(normalised(), structure=built)
        preconditioner = kfac_fx.Preconditioner(
            net, structure=structure if built == "block_tridiagonal" else None, damping=1e-2
        )
        observed, backward = cycle(net, preconditioner, x)
        counts.append((len(observed.shapes), len(backward.shapes)))
    (coupled, training), (alone, same) = counts
    assert coupled == alone + (2 if structure == "block_tridiagonal" else 0)
    assert training == same


def test_empirical_needs_no_backward_of_its_own(x: Tensor) -> None:
    net = kfac_fx.transform(normalised())
    preconditioner = kfac_fx.Preconditioner(
        net, likelihood="categorical", damping=1e-2, fisher="empirical"
    )
    observed, backward = cycle(net, preconditioner, x)
    assert not observed.shapes
    assert WEIGHTS & set(backward.shapes) and STATISTICS & set(backward.shapes)


@pytest.mark.parametrize("fisher", ["sampled", "exact", "empirical"])
def test_steps_that_are_not_due_are_free(x: Tensor, fisher: str) -> None:
    model = normalised()
    plain = products(lambda: torch.autograd.grad(loss_of(model, x), list(model.parameters())))
    net = kfac_fx.transform(model)
    preconditioner = kfac_fx.Preconditioner(
        net, likelihood="categorical", damping=1e-2, fisher=fisher, statistics_every=3
    )
    due = []
    for _ in range(7):
        observed, backward = cycle(net, preconditioner, x)
        due.append(bool(STATISTICS & set(observed.shapes + backward.shapes)))
        assert due[-1] or not observed.shapes
        assert due[-1] or len(backward.shapes) <= len(plain.shapes)
    assert due == [True, False, False, True, False, False, True]


def operators(run: Callable[[], Any]) -> set[str]:
    with torch.autograd.profiler.profile() as seen:
        run()
    return {event.name for event in seen.function_events if event.name.startswith("kfac_fx::")}


def test_a_recording_forward_calls_no_tap_that_is_off(x: Tensor) -> None:
    """Nor the others by torch's dispatcher, unless somebody looks on who should see operators."""
    net = kfac_fx.transform(normalised())
    recorded(net)
    pairs = [b for name, b in net.named_buffers() if "__" in name]
    assert pairs
    for on, want in ((True, {"kfac_fx::link", "kfac_fx::couple"}), (False, set())):
        for buffer in pairs:
            buffer.requires_grad_(on)
        assert operators(lambda: net(x)) == want
    seen = operators(lambda: products(lambda: net(x)))
    assert seen >= {f"kfac_fx::{name}" for name in ("linear", "link", "couple")}


@pytest.mark.parametrize("structure", ["block_tridiagonal", "block_diagonal"])
@pytest.mark.parametrize("kind", sorted(MODELS))
def test_statistics_are_those_of_the_whole_graph(
    kind: str, structure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit: a graph with the taps that are on alone computes what all of it does."""
    build, shape, _ = MODELS[kind]
    model = build()
    x = torch.randn(8, *(4,) if kind == "large elementwise" else shape)
    found = []
    for whole in (False, True):
        if whole:
            monkeypatch.setattr(FewerTaps, "form", lambda *_: None)
        net = kfac_fx.transform(copy.deepcopy(model))
        generator = torch.Generator().manual_seed(0)
        preconditioner = kfac_fx.Preconditioner(
            net, "normal", damping=1e-2, structure=structure, generator=generator
        )
        outputs = net(x)
        preconditioner.observe(outputs)
        outputs.square().sum().backward()
        preconditioner.step()
        found.append(estimate_of(preconditioner).state()["factors"])
    assert found[0].keys() == found[1].keys()
    for name, factors in found[0].items():
        assert any(factor.any() for factor in factors)
        assert all(map(torch.equal, factors, found[1][name]))


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, stride=2, groups=2),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def test_convolution_statistics_run_no_weight_gradient() -> None:
    """In the backward of the network; the statistics themselves may be convolutions of x and x."""
    net, images = kfac_fx.transform(conv_net()), torch.randn(ROWS, 2, 6, 6)
    buffers = recorded(net)
    loss = loss_of(net, images)
    assert products(lambda: torch.autograd.grad(loss, buffers)).weight_gradients == 0


def test_convolution_gradients_run_no_statistics() -> None:
    model, images = conv_net(), torch.randn(ROWS, 2, 6, 6)
    parameters = list(model.parameters())
    plain = products(lambda: torch.autograd.grad(loss_of(model, images), parameters))
    net = kfac_fx.transform(model)
    recorded(net)
    found = products(lambda: torch.autograd.grad(loss_of(net, images), parameters))
    assert found.shapes == plain.shapes
    assert found.weight_gradients == plain.weight_gradients == 2
