"""Symbolic tracing records what a model's Python does, or refuses it; the model stays as it is."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_fx
from kfac_fx import errors

Forward = Callable[[Any, Tensor], Any]


class Net(nn.Module):
    """Two layers, a buffer, and a forward that is given."""

    forward_of_test: Forward

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("count", torch.zeros(()))
        self.w = nn.Parameter(torch.randn(4, 4) / 2)
        self.calls = 0
        self.aux: Any = None
        self.kept: list[Any] = []
        self.generator = torch.Generator().manual_seed(3)


def model_of(forward: Forward) -> nn.Module:
    torch.manual_seed(0)
    return type("Model", (Net,), {"forward": forward})()


def run(net: nn.Module, model: nn.Module, seed: int, rows: int, training: bool) -> dict[str, Any]:
    net.train(training)
    torch.manual_seed(seed)
    x = torch.randn(rows, 4, requires_grad=True)
    model.zero_grad()
    out = net(x * 1)
    total = out.float().square().sum() + out.float().sum()
    if total.requires_grad:
        total.backward()
    return {
        "out": out.detach(),
        "differentiable": torch.tensor(out.requires_grad),
        "x": torch.zeros(()) if x.grad is None else x.grad,
        **{n: torch.zeros(()) if p.grad is None else p.grad for n, p in model.named_parameters()},
        **{n: b.clone() for n, b in model.named_buffers() if "kfac" not in n},
        **{f"value of {n}": p.detach().clone() for n, p in model.named_parameters()},
        "generator": torch.get_rng_state(),
    }


def assert_same(net: nn.Module, model: nn.Module, twin: nn.Module) -> None:
    for index, training in enumerate((True, True, False, True)):
        got = run(net, model, index, 5 - index, training)
        want = run(twin, twin, index, 5 - index, training)
        assert got.keys() == want.keys()
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, msg=lambda m, name=name: f"{name}: {m}")


# ------------------------------------------------------------------------ what becomes a graph


def no_grad_branch(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        target = torch.tanh(self.b(x))
    return self.head(torch.tanh(self.a(x)) * target)


def enable_grad_within(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = self.b(x)
        with torch.enable_grad():
            h = h + torch.tanh(self.a(x))
        h = h * 2
    return self.head(h + self.a(x))


@torch.no_grad()
def _frozen(self: Any, x: Tensor) -> Tensor:
    return torch.tanh(self.b(x))


def decorated(self: Any, x: Tensor) -> Tensor:
    return self.head(self.a(x) + _frozen(self, x))


def set_by_mode(self: Any, x: Tensor) -> Tensor:
    with torch.set_grad_enabled(not self.training):
        h = torch.tanh(self.a(x))
    return self.head(h + self.b(x))


def set_by_function(self: Any, x: Tensor) -> Tensor:
    before = torch.set_grad_enabled(False)
    h = torch.tanh(self.a(x))
    torch.set_grad_enabled(before.prev)
    return self.head(h + self.b(x))


def autocast(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        h = torch.tanh(self.a(x))
    return self.head(torch.tanh(self.b(h.float())))


def autocast_nested(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        h = self.a(x)
        with torch.autocast("cpu", enabled=False):
            h = self.b(h.float())
        h = self.b(h)
    return self.head(h.float())


def running_mean(self: Any, x: Tensor) -> Tensor:
    h = self.a(x)
    if self.training:
        with torch.no_grad():
            self.mean.mul_(0.9).add_(0.1 * h.mean(0))
            self.mean += 0.01
            self.count += 1
    return self.head(torch.tanh(h - self.mean) / (1 + self.count))


def renormed(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        self.a.weight.copy_(torch.renorm(self.a.weight, 2, 0, 0.3))
    return self.head(torch.tanh(self.a(x)))


def momentum_encoder(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        for p, q in zip(self.a.parameters(), self.b.parameters(), strict=True):
            q.mul_(0.9).add_(p, alpha=0.1)
    return self.head(self.a(x) - self.b(x).detach())


def view_in_place(self: Any, x: Tensor) -> Tensor:
    h = self.a(x)
    part = h[:, :2]
    part *= 3
    h[:, 3] = h[:, 0] + 1
    h -= x
    return self.head(torch.tanh(h))


def alias_in_place(self: Any, x: Tensor) -> Tensor:
    h = torch.tanh(self.a(x))
    y = h * 1
    kept = y
    y += x
    return self.head(kept)


def input_in_place(self: Any, x: Tensor) -> Tensor:
    x += 1
    x[:, 0] = 0
    return self.head(torch.tanh(self.a(x)))


def constant_in_place(self: Any, x: Tensor) -> Tensor:
    table = torch.arange(4.0)
    kept = table
    table += self.a(x).mean(0)
    return self.head(self.b(x) + kept)


def noise(self: Any, x: Tensor) -> Tensor:
    scale = torch.outer(torch.randn(4), torch.randn(4))
    mask = F.dropout(torch.ones(4), 0.5, self.training)
    order = torch.randperm(4)
    return self.head(F.linear(x, self.w + 0.1 * scale)[:, order] * mask + torch.rand(()))


def flat_parameters(self: Any, x: Tensor) -> Tensor:
    flat = nn.utils.parameters_to_vector(self.b.parameters())
    h = F.linear(x, flat[:16].view(4, 4), flat[16:])
    weight = self.a._parameters["weight"] + self.state_dict()["w"]
    penalty = sum(p.square().sum() for p in self.head.parameters())
    return self.head(torch.tanh(h @ weight)) + 0.01 * penalty


def classes(self: Any, x: Tensor) -> Tensor:
    if not isinstance(x, Tensor):
        return x
    n = x.shape[0]
    x = x * 2 if isinstance(x, (list, tuple)) else x / 2
    x = x + 1 if isinstance(n, int) and isinstance(x.shape, tuple) else x
    h = torch.tanh(self.a(x))
    return self.head(h if torch.is_tensor(h) and not isinstance(h, nn.Parameter) else x)


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return -ctx.scale * g, None


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        return x.round(), x.sign()

    @staticmethod
    def backward(ctx: Any, g: Tensor, h: Tensor) -> Tensor:
        return g * (ctx.saved_tensors[0].abs() < 2)


def functions(self: Any, x: Tensor) -> Tensor:
    h = Reverse.apply(torch.tanh(self.a(x)), 0.5)
    rounded, sign = Rounded.apply(3 * self.b(h))
    return self.head(rounded + sign)


def powers(self: Any, x: Tensor) -> Tensor:
    """torch's C++ asks for the class of a proxy here, and must not be told that it is a tensor."""
    h = self.a(x) if isinstance(x, Tensor) else x
    return self.head(h + 0.1 * torch.pow(h, 3.0) + torch.pow(2.0, h))


def asserts(self: Any, x: Tensor) -> Tensor:
    torch._assert(x.shape[-1] == 4, f"{x.shape[-1]} features")
    return self.head(self.a(x))


def temporary_attribute(self: Any, x: Tensor) -> Tensor:
    self.aux = self.a(x)
    h = torch.tanh(self.aux)
    self.aux = None
    return self.head(h)


GRAPHS = [
    *(no_grad_branch, enable_grad_within, decorated, set_by_mode, set_by_function, autocast),
    *(autocast_nested, running_mean, renormed, momentum_encoder, view_in_place, alias_in_place),
    *(input_in_place, constant_in_place, noise, flat_parameters, classes, functions),
    *(temporary_attribute, powers, asserts),
]


@pytest.mark.parametrize("forward", GRAPHS, ids=lambda f: f.__name__)
def test_is_a_graph_that_does_the_same(forward: Forward) -> None:
    model, twin = model_of(forward), model_of(forward)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    net = kfac_fx.transform(model, structure="block_diagonal")
    assert net.curvature.route == "symbolic_trace"
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not [name for name in vars(model) if name.startswith("_tensor_constant")]
    assert_same(net, model, twin)
    kfac_fx.ops.switch(net, kfac_fx.ops.all_buffers(net), True)
    assert_same(net, model, twin)


# ------------------------------------------------------------------------- what is refused


def counts(self: Any, x: Tensor) -> Tensor:
    self.calls += 1
    return self.head(self.a(x))


def keeps(self: Any, x: Tensor) -> Tensor:
    h = self.a(x)
    self.aux = h.square().mean()
    return self.head(h)


def appends(self: Any, x: Tensor) -> Tensor:
    h = self.a(x)
    self.kept.append(h)
    return self.head(h)


def keeps_in_a_child(self: Any, x: Tensor) -> Tensor:
    self.a.seen = x.shape[0]
    return self.head(self.a(x))


def python_random(self: Any, x: Tensor) -> Tensor:
    return self.head(self.a(x)) * random.uniform(0.5, 1.5)


def numpy_random(self: Any, x: Tensor) -> Tensor:
    return self.head(self.a(x)) * float(np.random.uniform(0.5, 1.5))


def own_generator(self: Any, x: Tensor) -> Tensor:
    return self.head(self.a(x)) + torch.randn(3, generator=self.generator)


def seeded(self: Any, x: Tensor) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        noise = torch.randn_like(x)
    return self.head(self.a(x + noise))


def seeded_behind_dynamo(self: Any, x: Tensor) -> Tensor:
    # As it is in every process that has imported torch._dynamo.
    torch._disable_dynamo(torch.random.manual_seed)(0)
    return self.head(self.a(x + torch.randn_like(x)))


def drawn_in_place(self: Any, x: Tensor) -> Tensor:
    noise = torch.empty(4)
    noise.normal_()
    return self.head(self.a(x) + noise)


def branch_on_noise(self: Any, x: Tensor) -> Tensor:
    return self.head(self.a(x) if torch.rand(()) < 0.5 else self.b(x))


def data_assigned(self: Any, x: Tensor) -> Tensor:
    self.a.weight.data = self.a.weight.data / 2
    return self.head(self.a(x))


def buffer_replaced(self: Any, x: Tensor) -> Tensor:
    self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
    return self.head(self.a(x) - self.mean)


def asks_grad(self: Any, x: Tensor) -> Tensor:
    return self.head(self.a(x) if torch.is_grad_enabled() else self.b(x))


def asks_autocast(self: Any, x: Tensor) -> Tensor:
    return self.head(self.a(x) if torch.is_autocast_enabled("cpu") else self.b(x))


def inference(self: Any, x: Tensor) -> Tensor:
    with torch.inference_mode():
        h = self.b(x)
    return self.head(self.a(x) + h)


def saved_hooks(self: Any, x: Tensor) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 2, lambda t: t):
        h = self.a(x).square()
    return self.head(h)


def swallows(self: Any, x: Tensor) -> Tensor:
    try:
        h = self.a(x) if x.sum() > 0 else self.b(x)
    except Exception:
        h = x
    return self.head(h)


def tags(self: Any, x: Tensor) -> Tensor:
    h = self.a(x)
    h.tag = "features"
    return self.head(h)


def texts(self: Any, x: Tensor) -> Tensor:
    return self.head(self.a(x) if "Proxy" not in f"{x}" else self.b(x))


def foreign_parameter(self: Any, x: Tensor) -> Tensor:
    if not hasattr(type(self), "held"):
        type(self).held = [nn.Parameter(torch.randn(3))]
    return self.head(self.a(x)) + torch.sigmoid(self.held[0])


def hooked(self: Any, x: Tensor) -> Tensor:
    h = self.a(x)
    h.register_hook(lambda g: g / 2)
    return self.head(h)


REFUSED = [
    *(counts, keeps, appends, keeps_in_a_child, python_random, numpy_random, own_generator),
    *(seeded, seeded_behind_dynamo, drawn_in_place, branch_on_noise, data_assigned),
    *(buffer_replaced, asks_grad),
    *(asks_autocast, inference, saved_hooks, swallows, tags, texts, foreign_parameter, hooked),
]


@pytest.mark.parametrize("forward", REFUSED, ids=lambda f: f.__name__)
def test_is_refused_and_the_model_stays_as_it_was(forward: Forward) -> None:
    model = model_of(forward)
    before = {n: dict(vars(m)) for n, m in model.named_modules()}
    members = {n: t.clone() for n, t in model.state_dict().items()}
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    generator = model.generator.get_state()
    for _ in range(2):
        with pytest.raises(errors.CaptureError, match="example_inputs"):
            kfac_fx.transform(model)
        for name, module in model.named_modules():
            assert dict(vars(module)) == before[name]
        assert model.kept == [] and torch.equal(model.generator.get_state(), generator)
        assert all(torch.equal(t, members[n]) for n, t in model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), states[0])
        assert (random.getstate(), str(np.random.get_state())) == states[1:]
        assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def test_the_refusal_names_the_line() -> None:
    with pytest.raises(errors.CaptureError, match=r"test_watched_tracing\.py:\d+.*is_grad_enabled"):
        kfac_fx.transform(model_of(asks_grad))


def test_an_ordered_mapping_keeps_its_class() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        return OrderedDict(logits=self.head(self.a(x)), hidden=x)

    out = kfac_fx.transform(model_of(forward))(torch.randn(2, 4))
    assert type(out) is OrderedDict and list(out) == ["logits", "hidden"]


def test_an_error_in_a_region_puts_the_modes_back() -> None:
    net = kfac_fx.transform(model_of(no_grad_branch))
    cast = kfac_fx.transform(model_of(autocast_nested))
    for broken in (net, cast):
        with pytest.raises(RuntimeError):
            broken(torch.randn(2, 7))
        assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def test_a_region_keeps_the_mode_of_the_caller() -> None:
    net = kfac_fx.transform(model_of(decorated))
    with torch.no_grad():
        assert not net(torch.randn(2, 4)).requires_grad
        assert not torch.is_grad_enabled()
    forced = kfac_fx.transform(model_of(enable_grad_within))
    assert forced(torch.randn(2, 4)).requires_grad


def test_an_input_of_another_class_goes_to_the_model() -> None:
    model = model_of(classes)
    net = kfac_fx.transform(model)
    x = [torch.randn(2, 4)]
    assert net(x) is x


# ------------------------------------------------------------------------------ factors


def test_factors_leave_out_what_runs_without_gradients() -> None:
    """The layer ``b`` has one use that trains, and one that does not."""

    def forward(self: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = torch.tanh(self.b(3 * x))
        return self.head(torch.tanh(self.b(x)) + target)

    model = model_of(forward).double()
    net = kfac_fx.transform(model, structure="block_diagonal")
    block = net.curvature.blocks["b"]
    assert len(block.uses) == 1 and block.kind == "linear"
    kfac_fx.ops.switch(net, kfac_fx.ops.all_buffers(net), True)
    x = torch.randn(6, 4, dtype=torch.float64)
    net(x).square().sum().backward()
    slot = net.get_submodule("_kfac_fx").get_submodule(block.slot)
    found = next(b for b in slot.buffers() if b.shape == (5, 5))
    ones = torch.cat([x, torch.ones(6, 1, dtype=torch.float64)], 1)
    want = ones.T @ ones
    scale = float(found.grad.trace() / want.trace())
    torch.testing.assert_close(found.grad, scale * want)
