"""Recurrent layers of a PackedSequence: sequences of several lengths, against their steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import oracles
from support.oracles import Bernoulli, Categorical, Likelihood, Measure, Normal, close
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
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

pytestmark = pytest.mark.usefixtures("float64")
both_fishers = pytest.mark.parametrize("fisher", ["exact", "empirical"])
both_routes = pytest.mark.parametrize("route", ["symbolic_trace", "eager"])
every_kind = pytest.mark.parametrize("kind", KINDS)


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


# ------------------------------------------------------------------------- a drop-in as ever
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
