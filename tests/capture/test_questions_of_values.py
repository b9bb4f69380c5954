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


@pytest.mark.parametrize("ask", [by_dispatch, lambda x: 0.5 * issubclass(x.__class__, Tensor)])
def test_the_class_is_answered(ask: Callable[[Tensor], float]) -> None:
    model, x = Asking(ask), torch.randn(5, 3)
    net = kfac_fx.transform(model)
    assert torch.equal(net(x), 0.5 * model.layer(x))


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
