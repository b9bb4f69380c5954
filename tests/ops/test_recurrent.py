"""Recurrent layers and cells against steps written out case by case."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from support import oracles
from support.oracles import Bernoulli, Categorical, Likelihood, Measure, Normal, close
from support.recurrent_oracle import IN, KINDS, H, N, Steps, T, Tagger, expected
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

import kfac_fx

pytestmark = pytest.mark.usefixtures("float64")
both_fishers = pytest.mark.parametrize("fisher", ["exact", "empirical"])
both_routes = pytest.mark.parametrize("route", ["symbolic_trace", "export"])
every_route = pytest.mark.parametrize("route", ["symbolic_trace", "export", "eager"])
every_kind = pytest.mark.parametrize("kind", KINDS)
BIG = {"num_layers": 2, "bidirectional": True, "batch_first": True}


# ----------------------------------------------------------------------- steps of one case
def needs_final_states(kind: str, route: str = "export") -> None:
    """Skips what traces the final states of an LSTM where torch does it wrongly."""
    if kind == "LSTM" and route == "export" and torch.__version__.startswith("2.11."):
        pytest.skip("torch 2.11 gives the traced final states of an LSTM another shape")


# ----------------------------------------------------------------------------------- layers
def transformed(model: nn.Module, x: Any, route: str, **options: Any) -> nn.Module:
    if route == "export":
        model = Strict(model)
    if route == "eager":
        options["capture"] = "eager"
    net = kfac_fx.transform(model, None if route == "symbolic_trace" else x, **options)
    assert net.curvature.route == route
    return net


class Strict(nn.Module):
    """Symbolic tracing cannot follow it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != IN:
            raise ValueError("a feature is missing")
        return self.model(x)


def check(
    measure: Measure, model: Any, x: Tensor, likelihood: Likelihood, fisher: str, route: str
) -> None:
    y = likelihood.draw(model(x))
    net = transformed(model, x, route)
    assert not net.curvature.fallbacks
    factors = measure(net, x, y, likelihood, fisher).factors
    want = expected(lambda n: model.case(x, n), N, y, likelihood, fisher)
    prefix = "model." if route == "export" else ""
    recurrent = {n for n, b in net.curvature.blocks.items() if b.kind == "recurrent"}
    assert recurrent == {prefix + name for name in want}
    for name, value in want.items():
        close(factors[prefix + name][: len(value)], value)


@every_route
@both_fishers
@every_kind
@pytest.mark.parametrize("options", [{}, BIG, {"bias": False}], ids=["plain", "big", "no bias"])
def test_layers(measure: Measure, kind: str, options: Any, fisher: str, route: str) -> None:
    """Both weights of every layer and direction."""
    model = Tagger(kind, **options)
    check(measure, model, model.inputs(), Categorical(), fisher, route)


@both_fishers
@every_kind
@pytest.mark.parametrize("given", [False, True])
def test_final_states(measure: Measure, kind: str, given: bool, fisher: str) -> None:
    """A likelihood of the final states, from given first states and from zeros."""
    model = Tagger(kind, last=True, given=given, num_layers=2, bidirectional=True)
    check(measure, model, model.inputs(), Bernoulli(), fisher, "symbolic_trace")


class Stemmed(nn.Module):
    """A layer whose outputs only a recurrent layer reads."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.stem, self.rnn = nn.Linear(IN, IN), KINDS[kind](IN, H, batch_first=True)
        self.head = nn.Linear(H, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.stem(x))[0])


@pytest.mark.parametrize("route", ["symbolic_trace", "export"])
@pytest.mark.parametrize("kind", KINDS)
def test_layer_below(measure: Measure, kind: str, route: str) -> None:
    """Gradients go through the layer to what is below it."""
    model, x, likelihood = Stemmed(kind), torch.randn(N, T, IN), Categorical()
    net = transformed(model, x, route)
    name = "stem" if route == "symbolic_trace" else "model.stem"
    found = measure(net, x, None, likelihood).factors[name]
    close(found, oracles.kronecker(model, ["stem"], x, None, likelihood))


def test_layer_called_twice(measure: Measure) -> None:
    """The steps of both calls are counted together."""

    class Twice(Tagger):
        def forward(self, x: Tensor) -> Tensor:
            first, _ = self.rnn(x)
            second, _ = self.rnn(x * 2)
            return self.head(first * second)

        def case(self, x: Tensor, n: int) -> tuple[Tensor, Steps]:
            steps = Steps(self.kind, self.rnn, "rnn.")
            both = [
                torch.stack(steps.layers(list(row), [torch.zeros(1, H)] * 2)[0])
                for row in (x[n], 2 * x[n])
            ]
            return self.head(both[0] * both[1])[None], steps

    model = Twice("LSTM", batch_first=True)
    check(measure, model, model.inputs(), Normal(), "exact", "symbolic_trace")


# ------------------------------------------------------------------------------------ cells
class Cells(nn.Module):
    """A cell in a loop of Python."""

    def __init__(self, kind: str, bias: bool, given: bool) -> None:
        super().__init__()
        self.kind, self.given = kind, given
        options = {"nonlinearity": kind[4:].lower()} if kind.startswith("RNN") else {}
        self.cell = getattr(nn, f"{kind[:4].rstrip('_')}Cell")(IN, H, bias=bias, **options)
        self.head = nn.Linear(H, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        if self.given:
            start = x[:, 0, :H] * 0 + 0.5
            state = (start, start) if self.kind == "LSTM" else start
        for time in range(T):
            if self.kind == "LSTM":
                h, c = self.cell(x[:, time], state)
                state = (h, c)
            else:
                h = state = self.cell(x[:, time], state)
        return self.head(h)

    def case(self, x: Tensor, n: int) -> tuple[Tensor, Steps]:
        steps = Steps(self.kind, self.cell, "cell.")
        state = [torch.full((H,), 0.5 * self.given)] * 2
        for time in range(T):
            state = steps.step("", x[n, time], state)
        return self.head(state[0])[None], steps


@every_route
@both_fishers
@every_kind
@pytest.mark.parametrize("bias, given", [(True, False), (False, True)])
def test_cells(
    measure: Measure, kind: str, bias: bool, given: bool, fisher: str, route: str
) -> None:
    """Cells in a loop of the model."""
    model = Cells(kind, bias, given)
    check(measure, model, torch.randn(N, T, IN), Normal(), fisher, route)


# ------------------------------------------------------------------------- a drop-in as ever
def arm(net: nn.Module, recording: bool) -> None:
    for buffers in kfac_fx.ops.factor_buffers(net).values():
        kfac_fx.ops.switch(net, buffers, recording)


def run(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Outputs and gradients, with the same dropout masks in every call."""
    torch.manual_seed(5)
    x = x.detach().clone().requires_grad_()
    out = module(x)
    module.zero_grad()
    out.sin().sum().backward()
    return [out.detach(), x.grad, *(p.grad.clone() for p in module.parameters())]


@both_routes
@every_kind
@pytest.mark.parametrize("last", [False, True])
def test_drop_in(kind: str, last: bool, route: str) -> None:
    """Outputs, gradients, state and modes of the model itself, and of a copy."""
    if last:
        needs_final_states(kind, route)
    model = Tagger(kind, last=last, dropout=0.4, **BIG)
    reference = copy.deepcopy(model)
    x = model.inputs()
    net = transformed(model, x, route)
    twin = copy.deepcopy(net)
    assert all(a is b for a, b in zip(net.parameters(), model.parameters(), strict=True))
    assert [n.removeprefix("model.") for n in net.state_dict()] == list(reference.state_dict())
    for module in (net, twin):
        for training in (True, False, True):
            module.train(training), reference.train(training)
            want = run(reference, x)
            for recording in (False, True):
                arm(module, recording)
                got = run(module, x)
                for one, other in zip(got, want, strict=True):
                    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
            arm(module, False)
            with torch.no_grad():
                torch.manual_seed(5)
                one = module(x)
                torch.manual_seed(5)
                assert torch.equal(one, reference(x))


@every_kind
def test_unbatched_inputs(kind: str) -> None:
    """They run as in torch, and fail as in torch."""
    model = nn.Sequential(KINDS[kind](IN, H, batch_first=True))
    reference = copy.deepcopy(model)
    net = kfac_fx.transform(model)
    x = torch.randn(T, IN)
    for recording in (False, True):
        arm(net, recording)
        (y, state), (y_, state_) = net(x), reference(x)
        torch.testing.assert_close(y, y_)
        torch.testing.assert_close(state, state_)
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size"):
        net(torch.randn(T, IN + 1))


def test_state_handed_on() -> None:
    """The states of an encoder, as they are, start the decoder."""

    class Translator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.LSTM(IN, H), nn.LSTM(IN, H)

        def forward(self, x: Tensor) -> Tensor:
            _, state = self.encoder(x)
            return self.decoder(input=x, hx=state)[0]

    model = Translator()
    reference = copy.deepcopy(model)
    x = torch.randn(T, N, IN)
    net = kfac_fx.transform(model)
    assert {b.kind for b in net.curvature.blocks.values()} == {"recurrent"}
    for recording in (False, True):
        arm(net, recording)
        for one, other in zip(run(net, x), run(reference, x), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_bias_of_the_hidden_states_alone(measure: Measure) -> None:
    """The new gate's derivative comes through the reset gate."""
    model, name = Tagger("GRU", batch_first=True), "rnn.bias_hh_l0"
    x, likelihood = model.inputs(), Normal()
    net = kfac_fx.transform(model, exclude=["rnn.weight_hh_l0"])
    factors = measure(net, x, None, likelihood).factors
    assert net.curvature.blocks[name].kind == "shift"
    close(factors[name], (oracles.covariance(model, [name], x, None, likelihood),))


@pytest.mark.parametrize("how", ["frozen", "excluded"])
def test_parts_left_out(measure: Measure, how: str) -> None:
    model = Tagger("GRU", batch_first=True)
    out = ("rnn.weight_ih_l0", "rnn.bias_hh_l0")
    for name in out if how == "frozen" else ():
        model.get_parameter(name).requires_grad_(False)
    net = kfac_fx.transform(model, exclude=out if how == "excluded" else ())
    x, likelihood = model.inputs(), Categorical()
    factors = measure(net, x, None, likelihood).factors
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    want = expected(lambda n: model.case(x, n), N, None, likelihood, "exact")
    A, G = want["rnn.weight_hh_l0"]
    close(factors["rnn.weight_hh_l0"], (A[:-1, :-1], G))
    C = oracles.covariance(model, ["rnn.bias_ih_l0"], x, None, likelihood)
    close(factors["rnn.bias_ih_l0"], (C,))
    assert set(net.curvature.blocks) == {"rnn.weight_hh_l0", "rnn.bias_ih_l0", "head"}


def test_reduce_sums_over_steps(measure: Measure) -> None:
    model = Tagger("GRU", last=True, batch_first=True)
    x, likelihood = model.inputs(), Normal()
    net = kfac_fx.transform(model, weight_sharing="reduce")
    factors = measure(net, x, None, likelihood).factors
    A, G = 0.0, 0.0
    for n in range(N):
        outputs, steps = model.case(x, n)
        rows = steps.found["rnn.weight_hh_l0"]
        mean = torch.stack([a for a, _ in rows]).mean(0)
        moment = oracles.case_moment(likelihood, "exact", outputs, None, [s for _, s in rows])
        summed = moment.reshape(T, 3 * H, T, 3 * H).sum((0, 2))
        A, G = A + torch.outer(mean, mean) / N, G + summed / N
    close(factors["rnn.weight_hh_l0"], (A, G))


# --------------------------------------------------------------------------- what falls back
def test_projected_states_fall_back() -> None:
    net = kfac_fx.transform(nn.Sequential(nn.LSTM(IN, 4, proj_size=2)))
    assert {block.kind for block in net.curvature.blocks.values()} == {"generic"}
    assert all("proj_size" in (b.reason or "") for b in net.curvature.blocks.values())


# -------------------------------------------------------------------------------- the graphs
@both_routes
@every_kind
def test_strip_taps_gives_the_call_back(kind: str, route: str) -> None:
    needs_final_states(kind, route)
    model = Tagger(kind, last=True, given=True, **BIG)
    x = model.inputs()
    net = transformed(model, x, route)
    before = {name: block.parameters for name, block in net.curvature.blocks.items()}
    want = run(model, x)
    again = kfac_fx.transform(net)
    assert {n: b.parameters for n, b in again.curvature.blocks.items()} == before
    for graph in net.graphs:
        assert kfac_fx.passes.strip_taps(graph)
        called = [str(n.target) for n in graph.nodes if n.op != "get_attr"]  # constants are kept
        assert not any("kfac_fx" in target for target in called)
    net.recompile()
    for module in (net, again):
        for one, other in zip(run(module, x), want, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@every_kind
def test_compiled_around_the_layer(kind: str) -> None:
    """Dynamo leaves such layers to Python by default, with the operators in their place."""
    model = Tagger(kind)
    x = model.inputs()
    net = kfac_fx.transform(model)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager")
    buffers = [b for group in kfac_fx.ops.factor_buffers(net).values() for b in group]
    for recording in (False, True):
        arm(net, recording)
        found = []
        for module in (net, compiled):
            for buffer in buffers:
                buffer.grad = None
            found.append([*run(module, x), *(b.grad for b in buffers if recording)])
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
    torch._dynamo.reset()


@torch._dynamo.config.patch(allow_rnn=True)
@every_kind
def test_compiled(kind: str) -> None:
    """Dynamo looks at no module of this kind, ours or not, unless it is told to.

    Off, no operator of ours is left; on, the statistics are those of the eager net."""
    needs_final_states(kind)
    model = Tagger(kind, last=True, num_layers=2)
    x = model.inputs()
    net = kfac_fx.transform(model)
    seen: set[str] = set()

    def remember(graph: Any, inputs: Any) -> Any:
        seen.update(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    compiled = torch.compile(net, backend=aot_autograd(fw_compiler=remember), fullgraph=True)
    for recording in (False, True, False):
        arm(net, recording)
        buffers = [b for group in kfac_fx.ops.factor_buffers(net).values() for b in group]
        results = []
        for module in (net, compiled):
            for buffer in buffers:
                buffer.grad = None
            results.append([*run(module, x), *(b.grad for b in buffers if recording)])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)
        assert seen and not any("kfac" in target for target in seen)
    torch._dynamo.reset()
