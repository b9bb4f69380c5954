"""Attributes that tensors and functions have been given, and code in the place of other code."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfac_fx
from kfac_fx.errors import CaptureError

Value = Any
ROUTES = ["none", "inputs", "export", "eager"]
every_route = pytest.mark.parametrize("route", ROUTES)


class Net(nn.Module):
    """What it computes is said by the function ``read`` of the tests below."""

    read: Callable[[Net, Tensor, Tensor], Value]

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.fc(x))
        out: Tensor = self.head(h) * self.read(x, h)
        return out


def built(read: Value, route: str, before: Value = None) -> tuple[Value, Net, Net]:
    torch.manual_seed(0)
    model: Net = type("Model", (Net,), {"read": read})()
    if before is not None:
        before(model)
    twin = copy.deepcopy(model)
    if before is not None:
        before(twin)  # copies of parameters lose what was attached
    options: dict[str, Value] = {"structure": "block_diagonal"}
    if route != "none":
        options["example_inputs"] = (torch.randn(5, 4),)
    if route in ("export", "eager"):
        options["capture"] = route
    return kfac_fx.transform(model, **options), model, twin


def agree(net: Value, twin: Net, x: Tensor) -> None:
    torch.testing.assert_close(net(x), twin(x))


# ----------------------------------------------------------------------------------- of tensors
def of_input(self: Net, x: Tensor, h: Tensor) -> Value:
    return getattr(x, "gain", 1.0)


@pytest.mark.parametrize("route", ROUTES[1:])
def test_an_attribute_of_an_input(route: str, caplog: pytest.LogCaptureFixture) -> None:
    net, _, twin = built(of_input, route)
    plain, tagged = torch.randn(5, 4), torch.randn(5, 4)
    tagged.gain = 3.0  # type: ignore[attr-defined]
    marked = torch.randn(5, 4)
    torch._dynamo.mark_dynamic(marked, 0)  # torch's own, which no forward reads
    for x in (plain, tagged, plain, marked):
        told = len(caplog.records)
        agree(net, twin, x)
        words = " ".join(record.getMessage() for record in caplog.records[told:])
        assert ("attribute 'gain'" in words) is (x is tagged and route != "eager")


def test_an_attribute_of_an_input_without_an_example() -> None:
    net, _, twin = built(of_input, "none")
    x = torch.randn(5, 4)
    x.gain = 3.0  # type: ignore[attr-defined]
    agree(net, twin, x)  # the graph asks for it
    with pytest.raises(CaptureError, match="the graph of Model fails where the model does not"):
        net(torch.randn(5, 4))


def of_weight(self: Net, x: Tensor, h: Tensor) -> Value:
    return getattr(self.fc.weight, "gain", 1.0)


@every_route
def test_an_attribute_of_a_parameter(route: str) -> None:
    def attach(model: Net, gain: float) -> None:
        model.fc.weight.gain = gain  # type: ignore[union-attr]

    # Those that are there already are lost to torch.export, which the comparison finds.
    before = None if route == "export" else lambda m: attach(m, 2.0)
    net, model, twin = built(of_weight, route, before)
    x = torch.randn(5, 4)
    agree(net, twin, x)
    for gain in (3.0, 2.0):
        attach(model, gain), attach(twin, gain)
        agree(net, twin, x)
    del model.fc.weight.gain, twin.fc.weight.gain
    agree(net, twin, x)


def test_attributes_that_no_forward_names_cost_no_graph() -> None:
    net, model, _ = built(of_weight, "inputs")
    net(torch.randn(5, 4))
    for p in model.parameters():
        p.main_grad = torch.zeros_like(p)  # type: ignore[attr-defined]
    assert net.stands()


# --------------------------------------------------------------------------------- of functions
def counted(function: Value) -> Value:
    @functools.wraps(function)
    def wrapper(self: Net, x: Tensor, h: Tensor) -> Value:
        wrapper.calls += 1  # type: ignore[attr-defined]
        return 1.0 if wrapper.calls < 3 else 2.0  # type: ignore[attr-defined]

    wrapper.calls = 0  # type: ignore[attr-defined]
    return wrapper


def test_a_function_that_counts_its_calls() -> None:
    torch.manual_seed(0)
    kinds = [type("Model", (Net,), {"read": counted(of_weight)}) for _ in range(2)]
    model, twin = (kind() for kind in kinds)
    twin.load_state_dict(model.state_dict())
    x = torch.randn(5, 4)
    with pytest.raises(CaptureError, match=r"writes Model\.read\.calls"):
        kfac_fx.transform(model)
    assert model.read.__func__.calls == 0
    net = kfac_fx.transform(model, (x,))
    assert net.curvature.route == "eager" and model.read.__func__.calls == 0
    for _ in range(4):
        agree(net, twin, x)


def flagged(self: Net, x: Tensor, h: Tensor) -> Value:
    return flagged.gain  # type: ignore[attr-defined]


@every_route
def test_an_attribute_of_a_function(route: str) -> None:
    flagged.gain = 1.0  # type: ignore[attr-defined]
    net, _, twin = built(flagged, route)
    for gain in (1.0, 2.0):
        flagged.gain = gain  # type: ignore[attr-defined]
        agree(net, twin, torch.randn(5, 4))


# ------------------------------------------------------------------------------------- replaced
def scale(h: Tensor) -> Tensor:
    return h.square().mean()


class Helper:
    scale = staticmethod(torch.mean)


class Other:
    scale = staticmethod(torch.amax)


REPLACED: dict[str, tuple[Value, Value]] = {
    "a function": (lambda self, x, h: scale(h), {"scale": lambda h: h.abs().mean()}),
    "a class": (lambda self, x, h: Helper.scale(h), {"Helper": Other}),
}


@pytest.fixture
def module_as_it_was() -> Iterator[None]:
    before = {"scale": scale, "Helper": Helper}
    yield
    globals().update(before)
    Helper.scale = staticmethod(torch.mean)


@pytest.mark.usefixtures("module_as_it_was")
@every_route
@pytest.mark.parametrize("what", REPLACED)
def test_code_in_the_place_of_other_code(what: str, route: str) -> None:
    read, change = REPLACED[what]
    net, _, twin = built(read, route)
    agree(net, twin, torch.randn(5, 4))
    globals().update(change)
    agree(net, twin, torch.randn(5, 4))


@pytest.mark.usefixtures("module_as_it_was")
@every_route
def test_a_builtin_function_in_the_place_of_another(route: str) -> None:
    net, _, twin = built(lambda self, x, h: Helper.scale(h), route)
    agree(net, twin, torch.randn(5, 4))
    Helper.scale = staticmethod(torch.amax)
    agree(net, twin, torch.randn(5, 4))
