"""Passes that run as their traces give what the passes give, to the last bit, or are not traced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.networks import NETWORKS, Network, mlp
from torch import Tensor, nn

import kfac_fx
from kfac_fx.codegen import replay
from kfac_fx.codegen.functional import NotFunctionalError
from kfac_fx.codegen.replay import replayable
from kfac_fx.optim import KFACOptions
from kfac_fx.statistics import replays
from kfac_fx.statistics.replays import BEFORE, PROOFS, Form, Replays

STEPS = BEFORE + PROOFS + 6

Batch = tuple[tuple[Tensor, ...], Tensor]


@pytest.fixture
def proven(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the trace was right, at every comparison of a trace with its pass."""
    seen: list[bool] = []
    prove = Replays.prove

    def noted(self: Replays, form: Form, found: Any, wanted: Any) -> bool:
        seen.append(prove(self, form, found, wanted))
        return seen[-1]

    monkeypatch.setattr(Replays, "prove", noted)
    return seen


def batches(network: Network, count: int = STEPS, cases: int = 6) -> list[Batch]:
    torch.manual_seed(1)
    model = network.build()
    found = []
    for _ in range(count):
        inputs = network.inputs(cases)
        found.append((inputs, torch.randn_like(model(*inputs))))
    return found


def trained(
    net: nn.Module, given: list[Batch], likelihood: Any = "normal", **options: Any
) -> Iterator[dict[str, Tensor]]:
    """The state after every step, and the loss before it."""
    torch.manual_seed(2)
    optimizer = kfac_fx.KFAC(
        net, likelihood, damping=1.0, generator=torch.Generator().manual_seed(3), **options
    )
    for inputs, targets in given:
        loss = optimizer.step(inputs, targets)
        assert optimizer.rejected_steps == optimizer.skipped_batches == 0
        yield {"loss": loss, **{n: t.clone() for n, t in net.state_dict().items()}}


def compared(
    build: Callable[[], nn.Module],
    given: list[Batch],
    monkeypatch: pytest.MonkeyPatch,
    **options: Any,
) -> None:
    """Traces on and off, from the same start and with the same draws."""
    states = []
    for largest in (replays.LARGEST, -1):
        with monkeypatch.context() as patch:
            patch.setattr(replays, "LARGEST", largest)
            torch.manual_seed(0)
            states.append(list(trained(build(), given, **options)))
    for step, (one, other) in enumerate(zip(*states, strict=True)):
        for name, value in other.items():
            assert torch.equal(one[name], value), f"step {step}: {name}"


PLAIN = [n for n in NETWORKS if not n.kwargs(5) and n.pick.__name__ == "<lambda>"]


ODD = ("recurrent", "encoder", "shape_loop")
"""Layers with kernels of their own; a layer whose uses are added up in another order."""


@pytest.mark.parametrize("lr", [None, 1e-2], ids=["adaptive", "lr"])
@pytest.mark.parametrize("network", PLAIN, ids=str)
@pytest.mark.usefixtures("float64")
def test_steps_are_the_same(
    network: Network, lr: float | None, monkeypatch: pytest.MonkeyPatch, proven: list[bool]
) -> None:
    def build() -> nn.Module:
        return kfac_fx.transform(network.build(), **network.captured_with())

    torch.manual_seed(0)
    one = build()
    compared(build, batches(network), monkeypatch, lr=lr)
    # Of some layers autograd's forward mode takes other operators where somebody looks on: their
    # traces are a rounding away from their passes, which is noticed.
    assert all(proven) or "norm" in network.name or "mode" in network.name or network.name in ODD
    if replays.is_pure(one) and network.name not in ODD:
        assert sum(proven) >= 2 * PROOFS


def noisy() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.4), nn.Linear(8, 3)
    )


@pytest.mark.usefixtures("float64")
def test_masks_and_running_statistics(monkeypatch: pytest.MonkeyPatch, proven: list[bool]) -> None:
    """One mask a step in all passes; buffers move once a step, by the gradient's pass."""
    network = Network("noisy", noisy, lambda n: (torch.randn(n, 6),))
    given = batches(network, cases=16)
    nets: list[nn.Module] = []

    def build() -> nn.Module:
        nets.append(kfac_fx.transform(noisy()))
        return nets[-1]

    compared(build, given, monkeypatch)
    assert all(proven) and len(proven) > PROOFS
    assert [int(net.get_buffer("1.num_batches_tracked")) for net in nets] == [STEPS, STEPS]


@pytest.mark.usefixtures("float64")
def test_targets_that_do_not_count(monkeypatch: pytest.MonkeyPatch, proven: list[bool]) -> None:
    """Batches with and without ignored targets, in turns: their terms have other tensors."""
    given: list[Batch] = []
    for step in range(2 * STEPS):
        y = torch.randint(4, (6,))
        y[: 2 * (step % 2)] = -100
        given.append(((torch.randn(6, 6),), y))
    compared(lambda: kfac_fx.transform(mlp()), given, monkeypatch, likelihood="categorical")
    assert all(proven)


def form_after(net: nn.Module, pure: bool = True) -> Form | None:
    return Replays(net, pure).form("", [torch.randn(2)])


def test_what_is_no_function_of_its_tensors_is_not_traced() -> None:
    net = kfac_fx.transform(mlp())
    net(torch.randn(2, 6))  # its guard has seen that all is as it was
    assert form_after(net) is not None
    assert form_after(net, pure=False) is None
    made = Replays(net, True)
    before = made.form("", [])
    handle = net.get_submodule("0").register_forward_hook(lambda *_: None)
    assert made.form("", []) is None
    handle.remove()
    assert made.form("", []) == before
    hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert made.form("", []) is None
    hook.remove()
    net.eval()
    assert made.form("", []) not in (None, before)
    parameter = net.get_parameter("0.weight")
    parameter.register_hook(lambda g: g)
    assert made.form("", [parameter]) is None
    with torch.autocast("cpu"):
        assert made.form("", []) is None
    net.train()
    assert made.form("", []) == before
    net.get_submodule("0").bias = None  # the model itself runs from here on, with other code
    assert made.form("", []) is None


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x) * self.calls


def test_code_that_runs_is_not_traced() -> None:
    net = kfac_fx.transform(Counts(), example_inputs=(torch.randn(2, 3),), capture="eager")
    assert not replays.is_pure(net)


def scaled_by_a_list(factors: list[float]) -> Any:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net(x) * factors[0]

    return forward


@pytest.mark.usefixtures("float64")
def test_a_function_of_the_user_is_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    factors = [1.0]
    network = Network("mlp", mlp, lambda n: (torch.randn(n, 6),))
    options = KFACOptions(forward=scaled_by_a_list(factors))

    def losses() -> Iterator[float]:
        torch.manual_seed(0)
        given = [(inputs[0], targets) for inputs, targets in batches(network, 12)]
        net = kfac_fx.transform(mlp())
        for step, state in enumerate(trained(net, given, options=options)):
            factors[0] = 1.0 + step
            yield float(state["loss"])

    found = list(losses())
    factors[0] = 1.0
    monkeypatch.setattr(replays, "LARGEST", -1)
    assert found == list(losses())


def test_hooks_that_come_later_run() -> None:
    """A network that is traced already."""
    network = Network("mlp", mlp, lambda n: (torch.randn(n, 6),))
    net = kfac_fx.transform(mlp(), structure="block_diagonal")
    calls: list[int] = []
    for step, _ in enumerate(trained(net, batches(network), lr=1e-2)):
        if step == STEPS - 2:
            net.get_submodule("0").register_forward_hook(lambda *_: calls.append(1))
    assert calls


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
def test_training_steps_are_the_same(
    fisher: Any, monkeypatch: pytest.MonkeyPatch, proven: list[bool]
) -> None:
    """Gradients, buffers and averages of a pass with and without statistics, dropout in it."""
    states = []
    for largest in (replays.LARGEST, -1):
        monkeypatch.setattr(replays, "LARGEST", largest)
        torch.manual_seed(0)
        net = kfac_fx.transform(noisy(), structure="block_diagonal")
        pre = kfac_fx.Preconditioner(
            net,
            damping=1e-2,
            fisher=fisher,
            statistics_every=2,
            refresh_every=3,
            generator=torch.Generator().manual_seed(1),
        )
        step = kfac_fx.TrainingStep(pre)
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
        found = []
        for _ in range(2 * STEPS):
            optimizer.zero_grad()
            loss = step(torch.randn(12, 6), torch.randint(3, (12,)))
            pre.step()
            optimizer.step()
            found.append([loss, *(t.clone() for t in net.state_dict().values())])
        states.append(found)
    assert all(proven) and len(proven) >= PROOFS
    for one, other in zip(*states, strict=True):
        assert all(map(torch.equal, one, other))


# The graphs.


def test_the_graph_is_run_on_other_tensors() -> None:
    def function(x: Tensor, w: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            w = w.detach().requires_grad_()
            y = torch.tanh(x @ w).square().sum()
            return [y.detach(), *torch.autograd.grad(y, [w])]

    module = replayable(function, [torch.randn(3, 4), torch.randn(4, 2)])
    given = torch.randn(3, 4), torch.randn(4, 2)
    for one, other in zip(module(*given), function(*given), strict=True):
        assert torch.equal(one, other)


def test_results_are_tensors_of_their_own() -> None:
    """Equal ones, and arguments: who gets them may write into them."""
    module = replayable(lambda x: [x.exp(), x.exp(), x.detach(), x], [torch.randn(3)])
    x = torch.randn(3)
    results = module(x)
    assert len({t.data_ptr() for t in (*results, x)}) == 5
    assert torch.equal(results[0], results[1]) and torch.equal(results[3], x)


def test_equal_operators_run_once() -> None:
    module = replayable(lambda x: [x.exp() + x.exp().sum()], [torch.randn(3)])
    targets = [node.target for node in module.graph.nodes]
    assert targets.count(torch.ops.aten.exp.default) == 1


def test_what_is_written_into_stays() -> None:
    def function(x: Tensor) -> list[Tensor]:
        total = x.clone()
        view = total[1:]
        before = total.sum()
        view.mul_(2)
        total.add_(1)
        return [before, total.sum(), view * 1]

    module = replayable(function, [torch.randn(4)])
    x = torch.arange(4.0)
    for one, other in zip(module(x), function(x), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(x, torch.arange(4.0))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: [x * 2 if x.sum() > 0 else x],
        lambda x: [x * x.max().item()],
        lambda x: [x.mul_(2)],
        lambda x: [x[1:].zero_()],
        lambda x: [x[x > 0]] if len(x.nonzero()) and x.sum().item() else [x],
    ],
)
def test_what_cannot_be_traced(function: Callable[[Tensor], list[Tensor]]) -> None:
    x = torch.ones(3)
    with pytest.raises(NotFunctionalError):
        replayable(function, [x])
    assert torch.equal(x, torch.ones(3))


def test_large_tensors_are_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace keeps all of them until it is done."""
    monkeypatch.setattr(replay, "MOST_ENTRIES", 29)
    x = torch.randn(10)
    assert replayable(lambda x: [x.exp()], [x])
    with pytest.raises(NotFunctionalError, match="too large"):
        replayable(lambda x: [x.exp().sin()], [x])


def test_draws_are_those_of_the_stream() -> None:
    def function(x: Tensor) -> list[Tensor]:
        return [F.dropout(x, 0.5), torch.rand_like(x)]

    module = replayable(function, [torch.randn(50)])
    x = torch.randn(50)
    torch.manual_seed(4)
    wanted = function(x)
    torch.manual_seed(4)
    for one, other in zip(module(x), wanted, strict=True):
        assert torch.equal(one, other)


def test_views_that_mean_something_else() -> None:
    """A conjugate has the memory of what it is the conjugate of."""

    def function(x: Tensor) -> list[Tensor]:
        return [torch.conj(x) * 2, x.t() * 1, x.view(-1).view(2, 2) * 3, x.expand(2, 2) + x]

    x = torch.randn(2, 2, dtype=torch.complex128)
    module = replayable(function, [x])
    for one, other in zip(module(x), function(x), strict=True):
        assert torch.equal(one, other)
