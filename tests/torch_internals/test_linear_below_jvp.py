"""Linear layers under torch.func.jvp are computed on plain tensors, to the same numbers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import FrameType

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

import kfac_fx
from kfac_fx.torch_internals.linear_below_jvp import LinearBelowJvp

Net = Callable[[Tensor], Tensor]


def network(bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(2, 5, bias), nn.Tanh(), nn.Linear(5, 1, bias)]
    return nn.Sequential(*layers).double()


def second_derivative(net: Net, x: Tensor) -> Tensor:
    along = torch.ones_like(x)

    def first(z: Tensor) -> Tensor:
        return jvp(net, (z,), (along,))[1]

    return jvp(first, (x,), (along,))[1]


def by_parameters(net: nn.Module, x: Tensor) -> Tensor:
    loss = second_derivative(net, x).square().sum()
    found = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
    return torch.cat([g.reshape(-1) for g in found if g is not None])


def along_parameters(net: nn.Module, x: Tensor, scale: float = 1.0) -> Tensor:
    values = {name: p.detach() for name, p in net.named_parameters()}

    def residuals(given: dict[str, Tensor]) -> Tensor:
        return second_derivative(lambda z: functional_call(net, given, (z,)), x) + net(x)

    return jvp(residuals, (values,), ({n: scale * p.cos() for n, p in values.items()},))[1]


def along_many(net: nn.Module, x: Tensor) -> Tensor:
    return vmap(lambda scale: along_parameters(net, x, scale))(torch.tensor([1.0, 3.0]).double())


def along_one_of_two(net: nn.Module, x: Tensor) -> Tensor:
    """The bias alone has a tangent, then the weight alone."""
    layer = net[0]
    assert isinstance(layer, nn.Linear)
    b, w = torch.ones(5).double(), layer.weight.detach()
    by_bias = jvp(lambda b: nn.functional.linear(x, w, b), (b,), (b,))[1]
    return by_bias + jvp(lambda w: nn.functional.linear(x, w, bias=b), (w,), (w,))[1]


def through_grad(net: nn.Module, x: Tensor) -> Tensor:
    def total(z: Tensor) -> Tensor:
        return net(z).sum()

    return jvp(grad(total), (x,), (x.cos(),))[1]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "what",
    [
        second_derivative,
        by_parameters,
        along_parameters,
        along_many,
        along_one_of_two,
        through_grad,
        lambda net, x: net(x),
    ],
)
def test_the_numbers_are_the_same(what: Callable[[nn.Module, Tensor], Tensor], bias: bool) -> None:
    net = network(bias)
    x = torch.rand(7, 2, dtype=torch.float64)
    expected = what(net, x)
    with LinearBelowJvp():
        found = what(net, x)
    torch.testing.assert_close(found, expected)
    assert torch._C._functorch.peek_interpreter_stack() is None


def test_in_the_precision_of_autocast() -> None:
    net = network().float()
    layer = net[0]
    assert isinstance(layer, nn.Linear)
    x, b = torch.rand(7, 2), torch.ones(5)
    with LinearBelowJvp(), torch.autocast("cpu", torch.bfloat16):
        second = second_derivative(net, x)
        shift = jvp(lambda b: nn.functional.linear(x, layer.weight, b), (b,), (b,))[1]
    torch.testing.assert_close(
        second, second_derivative(net, x), atol=0.1, rtol=0.1, check_dtype=False
    )
    assert shift.dtype == torch.bfloat16
    assert bool((shift == 1).all())


def test_an_error_leaves_the_levels_as_they_are() -> None:
    net = network()
    x = torch.rand(7, 3, dtype=torch.float64)
    with LinearBelowJvp(), pytest.raises(RuntimeError, match="shapes"):
        second_derivative(net, x)
    assert torch._C._functorch.peek_interpreter_stack() is None


def in_python(run: Callable[[], object]) -> int:
    """Count calls of torch's rules for shapes that are written in Python."""
    found = 0

    def count(frame: FrameType, event: str, _: object) -> None:
        nonlocal found
        found += event == "call" and frame.f_code.co_filename.endswith("_refs/__init__.py")

    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.parametrize("mode", [nullcontext, LinearBelowJvp])
def test_no_sum_with_zeros(mode: type) -> None:
    net = network()
    x = torch.rand(7, 2, dtype=torch.float64)
    second_derivative(net, x)  # imports
    with mode(), torch.no_grad():
        calls = in_python(lambda: second_derivative(net, x))
    if mode is nullcontext and not calls:
        pytest.skip("this version of torch works out no shapes in Python")
    assert (calls > 0) == (mode is nullcontext)


def test_nets_take_it_by_themselves() -> None:
    model = network()
    x = torch.rand(7, 2, dtype=torch.float64)
    net = kfac_fx.transform(network(), x)
    torch.testing.assert_close(by_parameters(net, x), by_parameters(model, x), rtol=1e-12, atol=0)
    with torch.no_grad():
        assert in_python(lambda: second_derivative(net, x)) == 0


@pytest.mark.parametrize("orders", [1, 2, 3])
def test_the_same_uses_count(orders: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tangent that is zero is a use all the same, where factors stand beside cross factors."""
    found = []
    for torchs in (False, True):
        if torchs:
            monkeypatch.setattr("kfac_fx.capture.guard.innermost_jvp", lambda: None)
        net = kfac_fx.transform(network(), structure="block_tridiagonal")
        preconditioner = kfac_fx.Preconditioner(net, "residual", fisher="exact")
        x = torch.rand(7, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        outputs = nth_derivative(net, x, orders)
        preconditioner.observe(outputs)
        outputs.square().sum().backward()
        preconditioner.step()
        factors = [f for fs in preconditioner.factors.values() for f in fs]
        found.append(factors + [f for fs in preconditioner.cross_factors.values() for f in fs])
    assert len(found[0]) > 4
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-14)


def nth_derivative(net: Net, x: Tensor, orders: int) -> Tensor:
    along = torch.ones_like(x)
    if not orders:
        return net(x)
    derivative: Tensor = jvp(lambda z: nth_derivative(net, z, orders - 1), (x,), (along,))[1]
    return derivative
