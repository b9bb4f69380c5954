"""Recurrent layers of a PackedSequence on every route: graphs, models that run, compilers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.oracles import Measure, Normal, close
from support.packed_sequences import (
    BIG,
    EQUAL,
    FALLING,
    MIXED,
    Sentences,
    arm,
    of_cases,
    recurrent_blocks,
    run,
    transformed,
)
from support.recurrent_oracle import IN, KINDS, H, N, Steps, T, expected
from torch import Tensor, nn
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
)
from torch.nn.utils.rnn import pack_padded_sequence as pack
from torch.nn.utils.rnn import pad_packed_sequence as unpack

import kfac_fx

pytestmark = pytest.mark.usefixtures("float64")
both_routes = pytest.mark.parametrize("route", ["symbolic_trace", "eager"])
every_kind = pytest.mark.parametrize("kind", KINDS)


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


@both_routes
def test_stacked_layers(measure: Measure, route: str) -> None:
    """A layer reads the PackedSequence of another one, as it is or with other data."""

    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.LSTM(IN, H, bidirectional=True)
            self.two, self.three = nn.GRU(2 * H, H), nn.RNN(H, H)
            self.head = nn.Linear(H, 2)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
            y, _ = self.two(self.one(packed)[0])
            return self.head(self.three(y._replace(data=y.data.sin()))[1][0])

        def case(self, x: Tensor, n: int) -> tuple[Tensor, Steps]:
            found: dict[str, Any] = {}
            y = list(x[: int(MIXED[n]), n])
            for kind, name in (("LSTM", "one"), ("GRU", "two"), ("RNN_TANH", "three")):
                steps = Steps(kind, getattr(self, name), f"{name}.")
                y, final = steps.layers(y, [torch.zeros(2, H)] * 2)
                y = [h.sin() for h in y] if name == "two" else y
                found |= steps.found
            steps.found = found
            return self.head(final[0][0])[None], steps

    model = Stacked()
    x = torch.randn(T, N, IN)
    net = transformed(model, (x, MIXED), route)
    factors = measure(net, (x, MIXED), None, Normal()).factors
    want = expected(lambda n: model.case(x, n), N, None, Normal(), "exact")
    assert recurrent_blocks(net) == set(want)
    for name, value in want.items():
        close(factors[name][:2], value)


@every_kind
def test_strip_taps_gives_the_layer_back(kind: str) -> None:
    model = Sentences(kind, "final", given=True, **BIG)
    inputs = model.inputs(MIXED)
    net = kfac_fx.transform(model)
    before = net.curvature.blocks.keys()
    again = kfac_fx.transform(net)
    assert again.curvature.blocks.keys() == before
    for graph in net.graphs:
        assert kfac_fx.passes.strip_taps(graph)
        calls = [n for n in graph.nodes if n.op not in ("get_attr", "placeholder", "output")]
        assert not any("kfac_fx" in f"{n.target} {n.target!r}" for n in calls)
        assert [n.args[0].target for n in calls if n.op == "call_module" and n.target == "rnn"] == [
            pack_padded_sequence
        ]
    net.recompile()
    for module in (net, again, copy.deepcopy(again)):
        torch.testing.assert_close(run(module, *inputs), run(model, *inputs), rtol=0, atol=1e-12)


def test_compiled() -> None:
    """Dynamo leaves the layer and what stands in its place to Python, while it records too."""
    model = Sentences("LSTM", "final", batch_first=True)
    net = kfac_fx.transform(model)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager")
    for recording in (False, True):
        arm(net, recording)
        for lengths in (MIXED, FALLING):
            inputs = model.inputs(lengths)
            buffers = [b for group in kfac_fx.ops.factor_buffers(net).values() for b in group]
            found = []
            for module in (net, compiled):
                for buffer in buffers:
                    buffer.grad = None
                found.append([*run(module, *inputs), *(b.grad for b in buffers if recording)])
            torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
    torch._dynamo.reset()


def test_packing_under_another_name() -> None:
    """Symbolic tracing finds torch's functions where the model's code has them."""

    class Renamed(Sentences):
        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            first = super().forward(x, lengths)  # a base class in another file
            packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
            y, _ = self.rnn(packed)
            y = self.rnn(pack(unpack(y)[0][..., :IN], lengths, enforce_sorted=False))[1]
            return first + y[0].sum() + pack_sequence([x[:, 0], x[:, 1]]).data.sum()

    model = Renamed("GRU", "final", bidirectional=True)
    model.rnn = nn.GRU(IN, H, bidirectional=True)
    net = kfac_fx.transform(model)
    assert net.curvature.route == "symbolic_trace" and not net.curvature.fallbacks
    inputs = model.inputs(MIXED)
    assert torch.equal(net(*inputs), model(*inputs))
    for function in (pack, unpack, torch.nn.utils.rnn.pack_padded_sequence):
        assert function.__module__ == "torch.nn.utils.rnn"


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
