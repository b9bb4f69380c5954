"""Models that no tracer follows: their own code runs, and is recorded while it does."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import oracles
from support.networks import NETWORKS, Network
from support.oracles import Categorical, Measure, Normal, close
from support.steps import cloned_factors
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kfac_fx
from kfac_fx import errors

pytestmark = pytest.mark.usefixtures("float64")


class Base(nn.Module):
    """Layers to choose from, and a head.

    Attributes:
        fixed: what the data decided, for a twin of the model that needs no data to decide.
    """

    fixed: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(4, 5)
        self.deep = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x, self.decide(x) if self.fixed is None else self.fixed))

    def decide(self, x: Tensor) -> Any:
        return None

    def body(self, x: Tensor, decision: Any) -> Tensor:
        raise NotImplementedError


class Branch(Base):
    def decide(self, x: Tensor) -> bool:
        return bool(x.sum() > 0)

    def body(self, x: Tensor, decision: bool) -> Tensor:
        return torch.tanh(self.a(x)) if decision else torch.sigmoid(self.b(x))


class CountedLoop(Base):
    """As many rounds as the data say, with the same layer."""

    def decide(self, x: Tensor) -> int:
        return int(x[:, 0].sum().sign().item()) + 2

    def body(self, x: Tensor, decision: int) -> Tensor:
        h = torch.tanh(self.a(x))
        for _ in range(decision):
            h = torch.tanh(self.deep[0](h))
        return h


class Talkative(Base):
    """Reads values in the middle of a loop."""

    def decide(self, x: Tensor) -> str:
        return f"{x.norm().item():.2f}"

    def body(self, x: Tensor, decision: str) -> Tensor:
        h = torch.tanh(self.a(x))
        for layer in self.deep:
            if self.fixed is None:
                logging.getLogger("tests").debug("norm %.3f", h.norm().item())
                print(f"{h.mean().item():.3f}")
            h = torch.tanh(layer(h))
        return h


class Numpy(Base):
    """A mask is computed elsewhere."""

    def decide(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.a(x).detach().numpy() > -0.2)

    def body(self, x: Tensor, decision: Tensor) -> Tensor:
        return torch.tanh(self.a(x)) * decision


class Routed(Base):
    """The data choose layers and their order."""

    def decide(self, x: Tensor) -> list[int]:
        order: list[int] = x[0, :3].argsort().tolist()
        return order

    def body(self, x: Tensor, decision: list[int]) -> Tensor:
        h = torch.tanh(self.a(x))
        for index in decision:
            h = torch.tanh(self.deep[index](h))
        return h


class EarlyReturn(Base):
    """Stops at a depth that what it has computed so far tells."""

    def body(self, x: Tensor, decision: int | None) -> Tensor:
        h = torch.tanh(self.a(x))
        for depth, layer in enumerate(self.deep):
            if bool(h.detach().mean() > 0) if decision is None else depth == decision:
                return h
            h = torch.tanh(layer(h)) + 0.05
        return h


class Weights(Base):
    """Parameters of its own after a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.weight = nn.Parameter(torch.rand(5)), nn.Parameter(torch.randn(5, 5))

    def decide(self, x: Tensor) -> bool:
        return bool(x.sum() > 0)

    def body(self, x: Tensor, decision: bool) -> Tensor:
        h = torch.tanh(self.a(x)) * self.scale
        return h @ self.weight.t() if decision else h @ self.weight.mT


class LateScale(Base):
    """A scale after as many other products as the data say."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(5))

    def decide(self, x: Tensor) -> int:
        return 1 if bool(x.sum() > 0) else 3

    def body(self, x: Tensor, decision: int) -> Tensor:
        h = torch.tanh(self.a(x))
        for _ in range(decision):
            h = h * 0.9
        return h * self.scale


def depth_of(model: Base, x: Tensor) -> int:
    """How many layers EarlyReturn runs."""
    return sum(is_called(model, f"deep.{index}", x) for index in range(3))


def twin_of(model: Base, x: Tensor) -> Base:
    """The same model for inputs that decide as ``x`` does; symbolic tracing follows it."""
    twin = copy.deepcopy(model)
    twin.fixed = depth_of(model, x) if isinstance(model, EarlyReturn) else model.decide(x)
    return twin


MODELS = [Branch, CountedLoop, Talkative, Numpy, Routed, EarlyReturn, Weights, LateScale]
every_model = pytest.mark.parametrize("build", MODELS)
both_fishers = pytest.mark.parametrize("fisher", ["exact", "empirical"])


def batch(sign: int = 1, n: int = 6) -> Tensor:
    x = torch.randn(n, 4)
    return x if sign * x.sum() > 0 and sign * x[:, 0].sum() > 0 else batch(sign, n)


def transformed(model: nn.Module, capture: str = "eager") -> kfac_fx.eager.EagerModule:
    net = kfac_fx.transform(model, batch(), capture=capture)
    assert isinstance(net, kfac_fx.eager.EagerModule)
    assert net.curvature.route == "eager"
    return net


def arm(net: nn.Module, recording: bool) -> None:
    for buffers in kfac_fx.ops.factor_buffers(net).values():
        kfac_fx.ops.switch(net, buffers, recording)


def assert_same_behaviour(net: nn.Module, model: nn.Module, x: Tensor) -> None:
    results = []
    for module in (net, model):
        module.zero_grad()
        torch.manual_seed(7)
        outputs = module(x)
        outputs.sin().sum().backward()
        results.append((outputs.detach(), [p.grad for p in module.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


@every_model
@pytest.mark.parametrize("recording", [False, True], ids=["off", "on"])
def test_drop_in(build: Callable[[], nn.Module], recording: bool) -> None:
    """Names, state, outputs and gradients of the model itself, on every path through it."""
    model = build()
    reference, net = copy.deepcopy(model), transformed(model)
    arm(net, recording)
    assert isinstance(net, torch.fx.GraphModule)
    assert [id(p) for p in net.parameters()] == [id(p) for p in model.parameters()]
    assert dict(net.named_parameters()).keys() == dict(model.named_parameters()).keys()
    assert net.state_dict().keys() == model.state_dict().keys()
    for x in (batch(1), batch(-1), batch(1, 3), batch(-1, 9)):
        assert_same_behaviour(net, reference, x)


@every_model
def test_every_parameter_has_a_block(build: Callable[[], nn.Module]) -> None:
    curvature = transformed(build(), capture="auto").curvature
    assert not curvature.unused and not curvature.fallbacks
    assert {block.kind for block in curvature.blocks.values()} <= {"linear", "elementwise"}


@both_fishers
@every_model
@pytest.mark.parametrize("sign", [1, -1])
def test_factors_and_gradients_of_a_traceable_twin(
    measure: Measure, build: Callable[[], Base], fisher: str, sign: int
) -> None:
    """On the branch of the example and on the other one."""
    model, likelihood = build(), Categorical()
    net, x = transformed(model), batch(sign)
    twin = twin_of(model, x)
    traced = kfac_fx.transform(twin, structure="block_diagonal")
    assert traced.curvature.route == "symbolic_trace"
    y = likelihood.draw(model(x))
    want = measure(traced, x, y, likelihood, fisher).factors
    got = measure(net, x, y, likelihood, fisher).factors
    assert want.keys() <= got.keys() and len(want) >= 2
    for name, factors in want.items():
        close(got[name], factors)
    gradients = dict(model.named_parameters())
    for name, parameter in twin.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name].grad, parameter.grad, rtol=1e-9, atol=1e-12)


def is_called(model: nn.Module, name: str, x: Tensor) -> bool:
    calls: list[str] = []
    handle = model.get_submodule(name).register_forward_hook(lambda *_: calls.append(name))
    model(x)
    handle.remove()
    return bool(calls)


@both_fishers
def test_factors_from_their_definition(measure: Measure, fisher: str) -> None:
    model, likelihood, x = Talkative(), Categorical(), batch()
    y = likelihood.draw(model(x))
    factors = measure(transformed(model), x, y, likelihood, fisher).factors
    for name in ("a", "deep.1", "head"):
        close(factors[name], oracles.kronecker(model, [name], x, y, likelihood, fisher))


@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_same_as_a_captured_graph(measure: Measure, network: Network) -> None:
    """All habits of model code: the blocks and factors of the other routes."""
    if network.name == "graph_module":
        pytest.skip("its code is its graph")
    model = network.build()
    inputs, kwargs = network.inputs(4), network.kwargs(4)
    nets = [
        kfac_fx.transform(model, inputs, example_kwargs=kwargs, capture=capture)
        for capture in ("auto", "eager")
    ]
    results = [recorded(net, network, inputs, kwargs) for net in nets]
    kinds = [{n: (b.kind, b.reason) for n, b in net.curvature.blocks.items()} for net in nets]
    for name, (kind, reason) in kinds[0].items():
        if name == "cls":  # expanded to a number of cases that only a symbolic size tells
            assert kinds[1][name][0] == "generic"
            continue
        assert kinds[1][name][0] == kind, name
        if reason is None:
            close(results[1][name], results[0][name])
    assert set(nets[1].curvature.unused) <= set(nets[0].curvature.unused)


def recorded(
    net: nn.Module, network: Network, inputs: tuple[Tensor, ...], kwargs: dict[str, Any]
) -> dict[str, tuple[Tensor, ...]]:
    """Factors of one step with the exact Fisher; the same dropout masks in every call."""
    preconditioner = kfac_fx.Preconditioner(net, "normal", fisher="exact", damping=1e-2)
    torch.manual_seed(3)
    outputs = network.pick(net(*inputs, **kwargs))
    preconditioner.observe(outputs)
    outputs.square().sum().backward()
    preconditioner.step()
    return cloned_factors(preconditioner)


# ------------------------------------------------------------------------------------- modes
class Modes(Base):
    """Batch norm, dropout as a module and as a function, and a flag of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(5), nn.Dropout(0.4)
        self.register_buffer("calls", torch.zeros(()))

    def body(self, x: Tensor, decision: Any) -> Tensor:
        self.calls = self.calls + 1  # bound anew
        h = self.drop(self.norm(self.a(x) if x.sum() > 0 else self.b(x)))
        return F.dropout(h, 0.3, self.training)


@pytest.mark.parametrize("recording", [False, True], ids=["off", "on"])
def test_modes(recording: bool) -> None:
    """train() and eval() reach the model, and batch normalisation counts a batch once."""
    model = Modes()
    reference = copy.deepcopy(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    net = transformed(model)
    torch.testing.assert_close(dict(net.state_dict()), before)  # nothing was counted
    arm(net, recording)
    for mode in (True, False, True):
        net.train(mode), reference.train(mode)
        assert model.training == net.training == mode
        for sign in (1, -1):
            assert_same_behaviour(net, reference, batch(sign))
    torch.testing.assert_close(dict(net.state_dict()), dict(reference.state_dict()))
    net.eval()
    assert torch.equal(net(batch_ := batch()), net(batch_))


def test_random_state_is_left_alone() -> None:
    model = Modes()
    state = torch.get_rng_state()
    kfac_fx.transform(model, torch.ones(4, 4))
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


# ---------------------------------------------------------------------- what cannot be recorded
class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g * w, (g * x).sum(0)


class Foreign(Base):
    """A parameter whose operation torch does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(5))

    def body(self, x: Tensor, decision: Any) -> Tensor:
        h = torch.tanh(self.a(x) if x.sum() > 0 else self.b(x))
        return Scale.apply(h, self.scale)


def test_operation_that_is_not_seen(measure: Measure) -> None:
    net, x = transformed(Foreign()), batch()
    block = net.curvature.blocks["scale"]
    assert block.kind == "generic" and "untraced_operation" in str(block.reason)
    assert measure(net, x, None, Normal()).preconditioner.skipped_statistics == 0


class Checkpointed(Base):
    def body(self, x: Tensor, decision: Any) -> Tensor:
        h = torch.tanh(self.a(x) if x.sum() > 0 else self.b(x))
        return checkpoint(self.deep[0], h, use_reentrant=False)


def test_activation_checkpoint(measure: Measure) -> None:
    """What is computed twice is recorded once, and the block says why it is what it is."""
    model = Checkpointed()
    reference, net, x = copy.deepcopy(model), transformed(model), batch()
    assert "activation_checkpoint" in str(net.curvature.blocks["deep.0"].reason)
    arm(net, True)
    assert_same_behaviour(net, reference, x)
    assert measure(net, x, None, Normal()).preconditioner.skipped_statistics == 0


class Teacher(Base):
    """One layer runs without gradients."""

    def body(self, x: Tensor, decision: Any) -> Tensor:
        with torch.no_grad():
            target = self.b(x)
        return torch.tanh(self.a(x) if x.sum() > 0 else x @ self.a.weight.T) - target


def test_use_without_gradients_is_none() -> None:
    assert set(transformed(Teacher()).curvature.unused) == {"b.weight", "b.bias"}


def test_constant_operand_is_no_case() -> None:
    """A plain tensor attribute times a parameter, not an activation times a parameter."""

    class Masked(Base):
        def __init__(self) -> None:
            super().__init__()
            self.mask = torch.ones(5, 5).tril()
            self.weight = nn.Parameter(torch.randn(5, 5))

        def body(self, x: Tensor, decision: Any) -> Tensor:
            return (self.a(x) if x.sum() > 0 else self.b(x)) @ (self.weight * self.mask)

    block = transformed(Masked()).curvature.blocks["weight"]
    assert block.kind == "generic" and block.reason


def test_compiled_part(measure: Measure) -> None:
    """A part of the model is compiled: it runs as it is written while it is recorded."""

    class Compiled(Base):
        def body(self, x: Tensor, decision: Any) -> Tensor:
            h = self.a(x) if x.sum() > 0 else self.b(x)
            return part(self.deep[0], h)

    @torch.compile(backend="eager")
    def part(layer: nn.Module, h: Tensor) -> Tensor:
        return torch.tanh(layer(h))

    net, x = transformed(Compiled()), batch().abs()
    factors = measure(net, x, None, Normal()).factors
    want = oracles.kronecker(net.source, ["deep.0"], x, None, Normal(), "exact")
    close(factors["deep.0"], want)


# ------------------------------------------------------------------------------- new branches
class Late(Base):
    """The other branch uses a layer without its bias, and a parameter that nothing else tells."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Parameter(torch.randn(5, 5))

    def body(self, x: Tensor, decision: Any) -> Tensor:
        if x.sum() > 0:
            return torch.tanh(self.a(x))
        return torch.tanh(x @ self.a.weight.T) @ self.extra


def test_what_does_not_fit_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    net = transformed(Late())
    assert net.curvature.unused == ("extra",)
    arm(net, True)
    caplog.set_level(logging.WARNING, logger="kfac_fx")
    caplog.clear()
    for _ in range(3):
        net(batch(-1))
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "a.weight" in messages[0] and "extra" in messages[1]


def test_training_over_both_branches() -> None:
    net = transformed(Branch())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    preconditioner = kfac_fx.Preconditioner(
        net, "normal", damping=1e-1, fisher="exact", refresh_every=1, statistics_every=2
    )
    losses = []
    for step in range(40):
        x = batch(1 if step % 4 < 2 else -1, 16)
        optimizer.zero_grad()
        outputs = net(x)
        loss = (outputs - x[:, :3]).square().sum() / 2 / len(x)
        preconditioner.observe(outputs)
        loss.backward()
        preconditioner.step()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert preconditioner.skipped_gradients == 0
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])


# --------------------------------------------------------------------------------- the module
def test_deepcopy_is_independent(measure: Measure) -> None:
    net, x = transformed(Branch()), batch().abs()
    twin = copy.deepcopy(net)
    assert twin.source is not net.source
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in net.parameters()}
    assert [id(p) for p in twin.parameters()] == [id(p) for p in twin.source.parameters()]
    for one in (twin, net):
        factors = measure(one, x, None, Normal()).factors
        close(factors["a"], oracles.kronecker(one.source, ["a"], x, None, Normal(), "exact"))


def test_pickling_is_refused() -> None:
    with pytest.raises(errors.CaptureError, match="state_dict"):
        pickle.dumps(transformed(Branch()))


def test_transform_again(measure: Measure) -> None:
    """A net that was transformed is not wrapped twice."""
    net = transformed(Branch())
    again = transformed(net)
    assert again.source is net.source
    assert again.curvature.blocks.keys() == net.curvature.blocks.keys()
    assert again.state_dict().keys() == net.state_dict().keys()
    assert "a" in measure(again, batch(), None, Normal()).factors
    with pytest.raises(errors.CaptureError, match="example_inputs"):
        kfac_fx.transform(net)


def test_functional_call_and_moves() -> None:
    model = Modes()
    net, x = transformed(model), batch()
    other = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    assert torch.equal(torch.func.functional_call(net, other, (x,)), torch.zeros(6, 3))
    net.float()
    assert {t.dtype for t in model.state_dict().values() if t.is_floating_point()} == {
        torch.float32
    }
    assert net(x.float()).dtype == torch.float32


def test_compile_runs_the_model() -> None:
    net, x = transformed(Branch()), batch()
    compiled = torch.compile(net, backend="eager")
    torch.testing.assert_close(compiled(x), net(x))
    arm(net, True)
    outputs = compiled(x)
    buffers = kfac_fx.ops.factor_buffers(net)["a"]
    assert all(g is not None for g in torch.autograd.grad(outputs.sum(), buffers))


def test_nothing_is_watched_without_need(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = transformed(Branch()), batch()

    def refuse(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(kfac_fx.eager.eager_module.Runner, "recorded", refuse)
    net(x)
    arm(net, True)
    with torch.no_grad():
        net(x)
    with pytest.raises(AssertionError):
        net(x)


def test_the_loss_of_the_graph_is_said(caplog: pytest.LogCaptureFixture) -> None:
    transformed(Branch())
    assert any("no graph of it" in record.getMessage() for record in caplog.records)


def test_compile_without_breaks_says_what_to_do() -> None:
    net, x = transformed(Branch()), batch()
    arm(net, True)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="compile the net without fullgraph=True"):
        compiled(x)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_a_table_whose_rows_are_shortened_as_they_are_read(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(kind(7, 4, max_norm=0.5), nn.Linear(4, 3))
    twin = copy.deepcopy(model)
    rows = torch.arange(6).reshape(2, 3)
    net = kfac_fx.transform(model, rows, structure="block_diagonal", capture="eager")
    for one in (net, twin):
        one(rows).square().sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)
        torch.testing.assert_close(p.grad, q.grad)
