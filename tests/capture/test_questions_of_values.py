"""What code asks of a value past its methods: hashes, classes by ``match``, its making."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfac_fx
from kfac_fx.errors import CaptureError

SCALES: dict[Any, float] = {5: 0.5, (5, 3): 0.25}


def by_sequence(x: Tensor) -> float:
    match x.shape:
        case (_, _):
            return 0.5
        case _:
            return 1.0


def by_class(x: Tensor) -> float:
    match x:
        case Tensor():
            return 0.5
        case _:
            return 1.0


def by_other_class(x: Tensor) -> float:
    match x.shape[0]:
        case int(n):
            return 0.5 * n
        case _:
            return 1.0


@functools.singledispatch
def by_dispatch(x: object) -> float:
    return 1.0


@by_dispatch.register
def _(x: Tensor) -> float:
    return 0.5


class Asking(nn.Module):
    def __init__(self, ask: Callable[[Tensor], float]) -> None:
        super().__init__()
        self.layer, self.ask = nn.Linear(3, 2), ask

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.ask(x)


ASKED: dict[str, Callable[[Tensor], float]] = {
    "a size in a dictionary": lambda x: SCALES.get(x.shape[0], 1.0),
    "sizes in a dictionary": lambda x: SCALES.get((x.shape[0], x.shape[1]), 1.0),
    "a size in a set": lambda x: 0.5 if x.shape[0] in frozenset({5}) else 1.0,
    "a tensor in a dictionary": lambda x: {x: 0.5}.get(x, 1.0),
    "a sequence pattern": by_sequence,
    "a class pattern": by_class,
    "another class pattern": by_other_class,
    "grad_fn": lambda x: 0.5 if x.grad_fn is None else 1.0,
    "_base": lambda x: 0.5 if x._base is None else 1.0,
}


@pytest.mark.parametrize("kind", ASKED)
def test_without_inputs_it_is_refused_and_with_them_followed(kind: str) -> None:
    model, x = Asking(ASKED[kind]), torch.randn(5, 3)
    with pytest.raises(CaptureError, match="example_inputs"):
        kfac_fx.transform(model)
    net = kfac_fx.transform(model, x)
    for given in (x, torch.randn(7, 3)[2:], torch.randn(3, 3), x * torch.ones(3).requires_grad_()):
        assert torch.equal(net(given), model(given))


def test_a_match_of_plain_values_is_traced() -> None:
    def named(x: Tensor) -> float:
        match model.name:
            case "half":
                return 0.5
            case _:
                return 1.0

    model, x = Asking(named), torch.randn(5, 3)
    model.name = "half"  # type: ignore[assignment]
    net = kfac_fx.transform(model)
    assert net.curvature.route == "symbolic_trace" and torch.equal(net(x), model(x))


@pytest.mark.parametrize(
    "ask",
    [
        by_dispatch,
        lambda x: 0.5 * issubclass(x.__class__, Tensor),
        lambda x: 0.5 if type(x) is Tensor else 1.0,
        lambda x: 0.5 if isinstance(type(x), type) and type(x) in (Tensor,) else 1.0,
    ],
)
def test_the_class_is_answered(ask: Callable[[Tensor], float]) -> None:
    model, x = Asking(ask), torch.randn(5, 3)
    net = kfac_fx.transform(model)
    assert torch.equal(net(x), 0.5 * model.layer(x))


class Other(Tensor):
    """A tensor of a user's class."""


def test_another_class_is_another_answer() -> None:
    """``type(x)`` is no question to x: False of what stands for it, and nothing was said."""
    model, x = Asking(lambda x: 0.5 if type(x) is Tensor else 1.0), torch.randn(5, 3)
    net = kfac_fx.transform(model)
    assert net.curvature.route == "symbolic_trace" and torch.equal(net(x), model(x))
    other = x.as_subclass(Other)
    assert torch.equal(net(other).as_subclass(Tensor), model(other).as_subclass(Tensor))
    assert "type" not in globals()  # the name is the built-in one again


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: 1.0 + x.storage_offset(),
        lambda x: 1.0 + x._version,
        lambda x: 0.5 if x._base is None else 1.0,
        lambda x: 0.5 if x.is_leaf else 1.0,
    ],
)
def test_an_export_does_not_keep_where_a_tensor_came_from(ask: Callable[[Tensor], float]) -> None:
    model, x = Asking(ask), torch.randn(5, 3)
    with pytest.raises(CaptureError, match="a graph would not ask again"):
        kfac_fx.transform(model, x, capture="export")


MODES: dict[str, Callable[[Tensor], float]] = {
    "float32_matmul_precision": lambda x: len(torch.get_float32_matmul_precision()),
    "is_anomaly_enabled": lambda x: 0.5 + torch.is_anomaly_enabled(),
    "flash_sdp_enabled": lambda x: 0.5 + torch.backends.cuda.flash_sdp_enabled(),
    "a flag of torch.backends": lambda x: 0.5 + torch.backends.cudnn.benchmark,
    "warn_only": lambda x: 0.5 + torch.is_deterministic_algorithms_warn_only_enabled(),
}


@pytest.mark.parametrize("mode", MODES)
def test_modes_of_the_process_are_asked_anew(mode: str) -> None:
    model, x = Asking(MODES[mode]), torch.randn(5, 3)
    for options in ({}, {"example_inputs": x, "capture": "export"}):
        with pytest.raises(CaptureError, match=mode):
            kfac_fx.transform(model, **options)
    net = kfac_fx.transform(model, x)
    assert net.curvature.route == "eager"
    with (
        torch.autograd.set_detect_anomaly(True),
        torch.backends.cudnn.flags(benchmark=True),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        assert torch.equal(net(x), model(x))


def test_an_export_does_not_keep_the_default_dtype() -> None:
    model, x = Asking(lambda x: 0.5 * torch.get_default_dtype().itemsize), torch.randn(5, 3)
    with pytest.raises(CaptureError, match="get_default_dtype"):
        kfac_fx.transform(model, x, capture="export")
    net = kfac_fx.transform(model, x)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(net(x), model(x))
    finally:
        torch.set_default_dtype(torch.float32)


class Clearing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.zero_grad()
        return self.layer(x)


class Setting(Clearing):
    def forward(self, x: Tensor) -> Tensor:
        for parameter in self.parameters():
            parameter.grad = None
        return self.layer(x)


@pytest.mark.parametrize("kind", [Clearing, Setting])
def test_gradients_that_a_forward_takes_away(kind: type[Clearing]) -> None:
    """There are none at the capture, so that a graph would leave them there."""
    model, x = kind(), torch.randn(5, 3)
    for options in ({}, {"example_inputs": x, "capture": "export"}):
        with pytest.raises(CaptureError, match="grad"):
            kfac_fx.transform(model, **options)
    net = kfac_fx.transform(model, x)
    net(x).sum().backward()
    first = model.layer.weight.grad.clone()
    net(x).sum().backward()
    assert torch.equal(model.layer.weight.grad, first)
