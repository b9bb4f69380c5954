"""Recurrent layers of a PackedSequence: sequences of several lengths, against their steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import oracles
from support.oracles import Bernoulli, Categorical, Likelihood, Measure, Normal, close
from support.recurrent_oracle import IN, KINDS, H, N, Steps, T, expected
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import kfac_fx

pytestmark = pytest.mark.usefixtures("float64")
both_fishers = pytest.mark.parametrize("fisher", ["exact", "empirical"])
both_routes = pytest.mark.parametrize("route", ["symbolic_trace", "eager"])
every_kind = pytest.mark.parametrize("kind", KINDS)
BIG = {"num_layers": 2, "bidirectional": True}
MIXED, FALLING, EQUAL = (torch.tensor(one) for one in ([2, T, 1], [T, 2, 2], [T, T, T]))


class Sentences(nn.Module):
    """Its outputs are those of all steps in rows, the same padded, or of the final states."""

    def __init__(
        self,
        kind: str,
        out: str = "rows",
        given: bool = False,
        falling: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self.kind, self.out, self.given, self.falling = kind, out, given, falling
        self.rnn = KINDS[kind](IN, H, **options)
        directions = 2 if self.rnn.bidirectional else 1
        self.count = self.rnn.num_layers * directions
        self.states = 2 if kind == "LSTM" else 1
        # A state of its own for every case, so that a wrong order would show.
        self.first = torch.randn(self.count, N, H) if given else torch.zeros(self.count, N, H)
        width = H * (self.states * self.count if out == "final" else directions)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        first = self.rnn.batch_first
        packed = pack_padded_sequence(x, lengths, first, enforce_sorted=self.falling)
        state = (self.first, self.first) if self.kind == "LSTM" else self.first
        y, final = self.rnn(packed, state if self.given else None)
        if self.out == "rows":
            return self.head(y.data)
        if self.out == "padded":
            return self.head(pad_packed_sequence(y, batch_first=True)[0])
        finals = [final[0], final[1]] if self.kind == "LSTM" else [final]
        return self.head(torch.cat([f.transpose(0, 1).flatten(1) for f in finals], -1))

    def inputs(self, lengths: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.randn(N, T, IN)
        return (x if self.rnn.batch_first else x.transpose(0, 1)), lengths

    def case(self, inputs: tuple[Tensor, Tensor], n: int) -> tuple[Tensor, Steps]:
        """The same from steps, for one case."""
        x, lengths = inputs
        row = (x[n] if self.rnn.batch_first else x[:, n])[: int(lengths[n])]
        steps = Steps(self.kind, self.rnn, "rnn.")
        y, finals = steps.layers(list(row), [self.first[:, n]] * self.states)
        if self.out == "final":
            return self.head(torch.cat([f.flatten() for f in finals]))[None], steps
        return self.head(torch.stack(y))[None], steps


def of_cases(rows: Tensor, lengths: Tensor) -> list[Tensor]:
    """The rows of a packed batch, case by case."""
    numbers = torch.arange(N)[:, None].expand(N, T)
    owners = pack_padded_sequence(numbers, lengths, batch_first=True, enforce_sorted=False).data
    return [rows[owners == n] for n in range(N)]


def recurrent_blocks(net: nn.Module) -> set[str]:
    return {name for name, block in net.curvature.blocks.items() if block.kind == "recurrent"}


def transformed(model: nn.Module, inputs: Any, route: str, **options: Any) -> nn.Module:
    """Symbolic tracing has no example here."""
    if route == "eager":
        net = kfac_fx.transform(model, inputs, capture="eager", **options)
    else:
        net = kfac_fx.transform(model, **options)
    assert net.curvature.route == route and not net.curvature.fallbacks
    return net


def check(
    measure: Measure,
    model: Sentences,
    lengths: Tensor,
    likelihood: Likelihood,
    fisher: str,
    route: str,
) -> None:
    inputs = model.inputs(lengths)
    y = likelihood.draw(model(*inputs))
    net = transformed(model, inputs, route)
    factors = measure(net, inputs, y, likelihood, fisher).factors
    targets = of_cases(y, lengths) if model.out == "rows" else [y[n : n + 1] for n in range(N)]
    want = expected(lambda n: model.case(inputs, n), N, targets, likelihood, fisher)
    assert recurrent_blocks(net) == set(want)
    for name, value in want.items():
        close(factors[name][:2], value)


@both_routes
@every_kind
@pytest.mark.parametrize("falling", [False, True], ids=["mixed", "falling"])
@pytest.mark.parametrize("options", [{}, BIG, {"bias": False}], ids=["plain", "big", "no bias"])
def test_rows(measure: Measure, kind: str, options: Any, falling: bool, route: str) -> None:
    """Both weights of every layer and direction; steps after a sequence's end are no positions."""
    model = Sentences(kind, falling=falling, **options)
    check(measure, model, FALLING if falling else MIXED, Categorical(), "empirical", route)


@both_routes
@both_fishers
@every_kind
@pytest.mark.parametrize("given", [False, True])
def test_final_states(measure: Measure, kind: str, given: bool, fisher: str, route: str) -> None:
    """Every sequence's own last states, from first states that are given or zeros."""
    model = Sentences(kind, "final", given, batch_first=True, **BIG)
    check(measure, model, MIXED, Bernoulli(), fisher, route)


@both_routes
@both_fishers
@every_kind
@pytest.mark.parametrize("options", [{}, BIG], ids=["plain", "big"])
def test_padded_outputs(measure: Measure, kind: str, options: Any, fisher: str, route: str) -> None:
    """The loss leaves padding out."""
    model, likelihood = Sentences(kind, "padded", batch_first=True, **options), Categorical()
    inputs = model.inputs(MIXED)
    y = likelihood.draw(model(*inputs))
    y[torch.arange(T) >= MIXED[:, None]] = -100
    net = transformed(model, inputs, route)
    factors = measure(net, inputs, y, likelihood, fisher).factors
    targets = [y[n, : int(MIXED[n])] for n in range(N)]
    want = expected(lambda n: model.case(inputs, n), N, targets, likelihood, fisher)
    assert recurrent_blocks(net) == set(want)
    for name, value in want.items():
        close(factors[name][:2], value)


@both_routes
@every_kind
@pytest.mark.parametrize("out", ["final", "padded"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_equal_lengths_are_a_plain_batch(
    measure: Measure, kind: str, sharing: str, out: str, route: str
) -> None:
    """The factors are those of the same layer without packing."""

    class Plain(Sentences):
        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            y, final = self.rnn(x)
            if self.out == "padded":
                return self.head(y)
            finals = [final[0], final[1]] if self.kind == "LSTM" else [final]
            return self.head(torch.cat([f.transpose(0, 1).flatten(1) for f in finals], -1))

    model, plain = (one(kind, out, batch_first=True, **BIG) for one in (Sentences, Plain))
    plain.load_state_dict(model.state_dict())
    inputs = model.inputs(EQUAL)
    y = Normal().draw(model(*inputs))
    found = []
    for one in (model, plain):
        net = transformed(one, inputs, route, weight_sharing=sharing)
        found.append(measure(net, inputs, y, Normal(), "empirical").factors)
    for name in recurrent_blocks(net):
        close(found[0][name][:2], found[1][name][:2])


@both_routes
@every_kind
def test_reduce(measure: Measure, kind: str, route: str) -> None:
    """The mean of the inputs and the sum of the derivatives over a sequence's own steps."""
    model, likelihood = Sentences(kind, "final", batch_first=True, **BIG), Normal()
    inputs = model.inputs(MIXED)
    net = transformed(model, inputs, route, weight_sharing="reduce")
    factors = measure(net, inputs, None, likelihood).factors
    want: dict[str, list[Any]] = {}
    for n in range(N):
        outputs, steps = model.case(inputs, n)
        for name, rows in steps.found.items():
            mean = torch.stack([a for a, _ in rows]).mean(0)
            moment = oracles.case_moment(likelihood, "exact", outputs, None, [s for _, s in rows])
            sides = (len(rows), len(rows[0][1])) * 2
            A, G = want.setdefault(name, [0.0, 0.0])
            summed = moment.reshape(sides).sum((0, 2))
            want[name] = [A + torch.outer(mean, mean) / N, G + summed / N]
    assert recurrent_blocks(net) == set(want)
    for name, value in want.items():
        close(factors[name][:2], value)


@both_routes
@both_fishers
def test_bias_alone(measure: Measure, fisher: str, route: str) -> None:
    """The covariance of the sums over a sequence's own steps."""
    model, likelihood = Sentences("GRU", "final", batch_first=True, **BIG), Normal()
    inputs = model.inputs(MIXED)
    y = likelihood.draw(model(*inputs))
    weights = [name for name, _ in model.named_parameters() if "weight_" in name]
    net = transformed(model, inputs, route, exclude=weights)
    factors = measure(net, inputs, y, likelihood, fisher).factors
    for name in ("rnn.bias_ih_l0", "rnn.bias_hh_l1_reverse"):
        assert net.curvature.blocks[name].kind == "shift"
        C: Any = 0.0
        for n in range(N):
            # Its derivative is the sum of those of its steps.
            outputs, _ = model.case(inputs, n)
            sums = [model.get_parameter(name)]
            C = C + oracles.case_moment(likelihood, fisher, outputs, y[n : n + 1], sums) / N
        close(factors[name], (C,))


@both_routes
def test_layer_called_twice(measure: Measure, route: str) -> None:
    """The steps of both calls are counted together, whatever their lengths."""

    class Twice(Sentences):
        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            return super().forward(x, lengths) * super().forward(2 * x, FALLING)

        def case(self, inputs: tuple[Tensor, Tensor], n: int) -> tuple[Tensor, Steps]:
            x = inputs[0]
            one, steps = super().case(inputs, n)
            two, more = super().case((2 * x, FALLING), n)
            for name, rows in more.found.items():
                steps.found[name] += rows
            return one * two, steps

    check(measure, Twice("LSTM", "final"), MIXED, Normal(), "exact", route)


@both_routes
@pytest.mark.parametrize("first", [False, True])
def test_norm_after_padding(measure: Measure, first: bool, route: str) -> None:
    """What is padded again has its cases where the call puts them, and a norm's are those."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.norm = nn.GRU(IN, H, batch_first=True), nn.LayerNorm(H)
            self.head = nn.Linear(H, 2)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = pack_padded_sequence(x, lengths, True, enforce_sorted=False)
            y, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=first)
            return self.head(self.norm(y).sum(1 if first else 0))

    model, likelihood = Normed(), Normal()
    x = torch.randn(N, T, IN)
    net = transformed(model, (x, MIXED), route)
    factors = measure(net, (x, MIXED), None, likelihood).factors
    # Padding is normalised too, so every case of the reference keeps the length of the batch.
    padded = torch.zeros(N, T, H)
    for n, length in enumerate(MIXED.tolist()):
        padded[n, :length] = model.rnn(x[n : n + 1, :length])[0][0].detach()
    tail = nn.Sequential(model.norm, SumSteps(), model.head)
    C = oracles.covariance(tail, ["0.weight", "0.bias"], padded, None, likelihood)
    close(factors["norm"], (C,))


class SumSteps(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(1)


def test_no_coupling_goes_through_packing() -> None:
    """Before it rows are cases by steps, in it steps alone."""

    class Stemmed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.rnn, self.one = nn.Linear(IN, IN), nn.GRU(IN, IN), nn.Linear(IN, IN)
            self.two, self.three = nn.Linear(IN, IN), nn.Linear(IN, 2)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = pack_padded_sequence(self.stem(x), lengths, enforce_sorted=False)
            y, _ = pad_packed_sequence(self.rnn(packed)[0])
            return self.three(self.two(y)) + self.one(packed.data).sum()

    net = kfac_fx.transform(Stemmed())
    assert [(pair.earlier, pair.later) for pair in net.curvature.pairs] == [("two", "three")]
    inputs = torch.randn(T, N, IN), MIXED
    optimizer = kfac_fx.KFAC(net, "normal")
    optimizer.step(inputs, torch.randn(T, N, 2))


# ------------------------------------------------------------------------- a drop-in as ever
def arm(net: nn.Module, recording: bool) -> None:
    for buffers in kfac_fx.ops.factor_buffers(net).values():
        kfac_fx.ops.switch(net, buffers, recording)


def run(module: nn.Module, x: Tensor, lengths: Tensor) -> list[Tensor]:
    """Outputs and gradients, with the same dropout masks in every call."""
    torch.manual_seed(5)
    x = x.detach().clone().requires_grad_()
    out = module(x, lengths)
    module.zero_grad()
    out.sin().sum().backward()
    return [out.detach(), x.grad, *(p.grad.clone() for p in module.parameters())]


@both_routes
@every_kind
@pytest.mark.parametrize("out", ["rows", "padded", "final"])
def test_drop_in(kind: str, out: str, route: str) -> None:
    """Outputs and gradients of the model itself, in both modes, for all lengths."""
    model = Sentences(kind, out, given=True, dropout=0.4, batch_first=True, **BIG)
    reference = copy.deepcopy(model)
    inputs = model.inputs(MIXED)
    net = transformed(model, inputs, route)
    for lengths in (MIXED, FALLING, EQUAL, torch.tensor([1, 1, 1])):
        for training in (True, False):
            net.train(training), reference.train(training)
            want = run(reference, inputs[0], lengths)
            for recording in (False, True):
                arm(net, recording)
                got = run(net, inputs[0], lengths)
                torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@both_routes
def test_passes_are_not_replayed(route: str) -> None:
    """A whole optimizer runs traces of its passes, which would keep the lengths of a batch."""
    results = []
    for replayed in (True, False):
        torch.manual_seed(3)
        model = Sentences("LSTM", "final", batch_first=True)
        net = transformed(model, model.inputs(MIXED), route)
        optimizer = kfac_fx.KFAC(net, "normal")
        if not replayed:  # a hook keeps every pass as it is
            model.head.register_forward_hook(lambda *_: None)
        for step in range(16):
            # The same lengths until a trace would have proved itself, then others of one total.
            lengths = torch.tensor([4, 1, 2] if step < 12 else [2, 3, 2])
            optimizer.step(model.inputs(lengths), torch.randn(N, 3))
        results.append([p.detach().clone() for p in model.parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------- other routes
class InGraph(nn.Module):
    """What a graph holds of a layer that was given a PackedSequence."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.name, self.rnn = kind.lower(), KINDS[kind](IN, H, num_layers=2, bidirectional=True)

    def forward(self, x: Tensor, sizes: Tensor, h: Tensor) -> Tensor:
        weights = [getattr(self.rnn, name) for name in self.rnn._flat_weights_names]
        operator = getattr(torch.ops.aten, self.name).data
        state = [h, h] if self.name == "lstm" else h
        return operator(x, sizes, state, weights, True, 2, 0.0, True, True)[0]


@every_kind
def test_operator_in_a_graph(measure: Measure, kind: str) -> None:
    """A traced call of ATen's operator has the factors of the layer, and is given back."""
    model = InGraph(kind)
    net = kfac_fx.transform(model)
    assert net.curvature.route == "symbolic_trace" and not net.curvature.fallbacks
    x = torch.randn(T, N, IN)
    y: list[Tensor] = []
    for lengths in (FALLING, EQUAL):
        packed = pack_padded_sequence(x, lengths)
        inputs = (packed.data, packed.batch_sizes, torch.zeros(4, N, H))
        want = model(*inputs)
        for recording in (False, True):
            arm(net, recording)
            torch.testing.assert_close(net(*inputs), want, rtol=0, atol=1e-12)
        y.append(torch.randn_like(want))
        factors = measure(net, inputs, y[-1], Normal(), "empirical").factors
        steps = Sentences(kind, **BIG)
        steps.rnn, steps.head = model.rnn, nn.Identity()
        want = expected(
            lambda n, lengths=lengths, steps=steps: steps.case((x, lengths), n),
            N,
            of_cases(y[-1], lengths),
            Rows(),
            "empirical",
        )
        for name, value in want.items():
            close(factors[name], value)
    arm(net, False)
    assert kfac_fx.passes.strip_taps(net.graph)
    called = [n.target for n in net.graph.nodes if n.op == "call_function"]
    assert getattr(torch.ops.aten, model.name).data in called
    net.recompile()
    assert torch.equal(net(*inputs), model(*inputs))


class Rows(Normal):
    """Every row is a term."""

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().nll(outputs.flatten(0, -2), targets)

    def terms(self, outputs: Tensor, targets: Tensor | None) -> float:
        return outputs.shape[-2]


@pytest.mark.parametrize("example", [False, True])
def test_packed_input(measure: Measure, example: bool) -> None:
    """A model that is given the PackedSequence itself, foreseen by its example or not."""

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.GRU(IN, H), nn.Linear(H, 3)

        def forward(self, packed: PackedSequence) -> Tensor:
            return self.head(self.rnn(packed)[1][0])

    model = Reader()
    x = torch.randn(T, N, IN)
    packed = pack_padded_sequence(x, MIXED, enforce_sorted=False)
    net = kfac_fx.transform(model, (packed,) if example else None)
    assert net.curvature.route == ("eager" if example else "symbolic_trace")
    assert not net.curvature.fallbacks
    assert torch.equal(net(packed), model(packed))
    factors = measure(net, (packed,), None, Normal()).factors
    steps = Sentences("GRU", "final")
    steps.rnn, steps.head = model.rnn, model.head
    want = expected(lambda n: steps.case((x, MIXED), n), N, None, Normal(), "exact")
    for name, value in want.items():
        close(factors[name][:2], value)


def test_layer_left_alone() -> None:
    """A net whose only recurrent layer has no block takes a PackedSequence too."""
    packed = pack_padded_sequence(torch.randn(T, N, IN), FALLING)
    model = nn.Sequential(nn.GRU(IN, H), nn.Identity())
    model.register_parameter("scale", nn.Parameter(torch.ones(1)))
    net = kfac_fx.transform(model, exclude=["0"])
    assert torch.equal(net(packed)[0].data, model(packed)[0].data)


# --------------------------------------------------------------------------- what falls back
def test_projected_states_fall_back() -> None:
    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(IN, 4, proj_size=2)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            return self.rnn(pack_padded_sequence(x, lengths))[0].data

    net = kfac_fx.transform(Projected(), (torch.randn(T, N, IN), FALLING))
    assert {block.kind for block in net.curvature.blocks.values()} == {"generic"}
    assert all("proj_size" in (b.reason or "") for b in net.curvature.blocks.values())
