"""Small taps leave notes in the graph of the user's own forward; large ones have nodes."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from support.inside import fold
from support.networks import NETWORKS, Network, mlp
from support.steps import named_factors
from torch import Tensor, nn
from torch import distributions as D
from torch.utils.checkpoint import checkpoint

import kfac_fx
from kfac_fx.ops import tap
from kfac_fx.ops.state import Collection, FactorState, leave_note
from kfac_fx.ops.thresholds import THRESHOLDS

pytestmark = pytest.mark.usefixtures("float64")

Factors = dict[str, Tensor]


def made(net: nn.Module, likelihood: Any = "normal", **options: Any) -> kfac_fx.Preconditioner:
    generator = torch.Generator().manual_seed(3)
    return kfac_fx.Preconditioner(
        net, likelihood, damping=1e-2, generator=generator, statistics_every=1, **options
    )


def observed(net: nn.Module, batches: list[Any], run: Any = None, **options: Any) -> Factors:
    """The factors after the forward passes of as many steps, and the training backwards."""
    pre = made(net, **options)
    for inputs in batches:
        torch.manual_seed(5)
        outputs = run(net, *inputs) if run else net(*inputs)
        pre.observe(outputs)
        fold(pre)
        (outputs if isinstance(outputs, Tensor) else outputs["logits"]).sum().backward()
    return named_factors(pre)


def assert_same(found: Factors, want: Factors) -> None:
    assert found.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-14, msg=name)


def normal(network: Network) -> Any:
    def distribution(outputs: Any) -> D.Distribution:
        mean = network.pick(outputs)
        return D.Independent(D.Normal(mean, torch.ones_like(mean)), mean.dim() - 1)

    return distribution


@pytest.mark.parametrize("structure", ["block_diagonal", "block_tridiagonal"])
@pytest.mark.parametrize("network", [n for n in NETWORKS if not n.kwargs(5)], ids=str)
def test_notes_say_what_nodes_say(network: Network, structure: Any) -> None:
    net = kfac_fx.transform(network.build(), structure=structure, **network.captured_with())
    batches = [network.inputs(2), network.inputs(5)]
    found = observed(net, batches, likelihood=normal(network))
    with THRESHOLDS.changed(noted=-1):
        assert_same(found, observed(net, batches, likelihood=normal(network)))


def test_small_taps_have_no_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("a tap has nodes")

    monkeypatch.setattr(tap, "_zero", fail)
    net = kfac_fx.transform(mlp(), structure="block_diagonal")
    observed(net, [(torch.randn(4, 6),)])
    for fisher in ("exact", "empirical"):
        with pytest.raises(AssertionError, match="has nodes"):
            observed(net, [(torch.randn(4, 6),)], fisher=fisher)


def test_both_kinds_in_one_graph() -> None:
    net, x = kfac_fx.transform(mlp()), torch.randn(4, 6)
    want = observed(net, [(x,)])
    with THRESHOLDS.changed(noted=4 * 4):  # the last layer's is noted, the first one's is not
        assert_same(observed(net, [(x,)]), want)


def test_checkpoints_have_nodes() -> None:
    net, x = kfac_fx.transform(mlp()), torch.randn(4, 6)

    def run(net: nn.Module, x: Tensor) -> Tensor:
        found: Tensor = checkpoint(net, x, use_reentrant=False)
        return found

    assert_same(observed(net, [(x,)], run), observed(net, [(x,)]))


def test_several_forwards_are_observed_at_once() -> None:
    """And one that is not observed says nothing."""
    net, x = kfac_fx.transform(mlp(), structure="block_diagonal"), torch.randn(6, 6)

    def run(net: nn.Module, x: Tensor) -> Tensor:
        parts = [net(x[:2]), net(x[2:])]
        net(3 * x)
        return torch.cat(parts)

    found = observed(net, [(x,)], run)
    with THRESHOLDS.changed(noted=-1):
        assert_same(found, observed(net, [(x,)], run))


def test_two_networks_in_one_graph() -> None:
    """Each takes its own notes, whoever is asked first."""
    nets = [kfac_fx.transform(mlp(6, 6), structure="block_diagonal") for _ in range(2)]
    pres = [made(net) for net in nets]
    x = torch.randn(5, 6)
    outputs = nets[1](nets[0](x).tanh())
    for pre in reversed(pres):
        pre.observe(outputs)
        fold(pre)
    want = torch.cat([x, torch.ones(5, 1)], 1)
    torch.testing.assert_close(named_factors(pres[0])["0/0"], want.T @ want / 5)
    assert all(factor.abs().sum() > 0 for pre in pres for factor in named_factors(pre).values())


class WritesInPlace(nn.Module):
    """Changes a layer's result after the layer, as a whole and through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y.mul_(2.0).add_(1.0)
        y[:, 0] = y[:, 1].neg()
        out: Tensor = self.last(y.tanh())
        return out


def test_a_layers_result_may_be_written_into() -> None:
    """Its own node keeps the derivative of what it was."""
    net, x = kfac_fx.transform(WritesInPlace(), structure="block_diagonal"), torch.randn(5, 6)
    found = observed(net, [(x,)])
    with THRESHOLDS.changed(noted=-1):
        assert_same(found, observed(net, [(x,)]))


def test_two_taps_of_one_result_leave_two_notes() -> None:
    """A node has room for one, so that the second tap has an alias; and so has a view."""
    y = nn.Linear(3, 2)(torch.randn(5, 3))
    states = [FactorState(), FactorState()]
    result = y
    for state in states:
        result = leave_note(result, None, (), (), [state], lambda g: g)
    assert notes_of([states[0]], result) and notes_of([states[1]], result)
    view = leave_note(y[1:], None, (), (), [states[0]], lambda g: g)
    assert not view._is_view() and notes_of([states[0]], view)


def notes_of(states: list[FactorState], result: Tensor) -> bool:
    collection = Collection.of_graph(states, [result])
    return [note.states for note in collection.notes] == [states]


def test_notes_go_with_the_graph() -> None:
    """And out of it, once they are read: the training needs none of what they hold."""
    net = kfac_fx.transform(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    pre = made(net)

    def leave() -> tuple[Tensor, weakref.ref[Any]]:
        x = torch.randn(5, 3)
        return net(x), weakref.ref(x.untyped_storage())

    outputs, _ = leave()
    nodes = [outputs.grad_fn]
    kept = 0
    while nodes:
        node = nodes.pop()
        if node is not None:
            kept += "kfac_fx" in node.metadata
            nodes += [following for following, _ in node.next_functions]
    assert kept == 2
    states = len(gc.get_objects())
    del outputs, node
    for _ in range(5):
        leave()
    gc.collect()
    assert len(gc.get_objects()) < states + 50
    outputs, _ = leave()
    pre.observe(outputs)
    assert "kfac_fx" not in outputs.grad_fn.metadata  # type: ignore[union-attr]


def test_after_the_backward() -> None:
    net, x = kfac_fx.transform(mlp()), torch.randn(4, 6)
    pre = made(net)
    outputs = net(x)
    outputs.sum().backward()
    with pytest.raises(kfac_fx.errors.ObservationError, match=r"before loss\.backward"):
        pre.observe(outputs)


def test_inputs_that_are_overwritten() -> None:
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = nn.Linear(3, 4), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            y = self.layer(x).sum(-1, keepdim=True)
            return self.last(x.mul(2.0)) * y

    net = kfac_fx.transform(Overwrites())
    pre, x = made(net), torch.randn(5, 3)
    outputs = net(x)
    pre.observe(outputs)  # a copy was changed, out of place
    fold(pre)
    own = kfac_fx.transform(nn.Linear(3, 2))
    pre = made(own)
    outputs = own(x)
    x.zero_()
    with pytest.raises(kfac_fx.errors.ObservationError, match="in-place"):
        pre.observe(outputs)


def test_a_derivative_inside_of_the_forward_is_refused() -> None:
    net = kfac_fx.transform(nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)))
    made(net)
    x = torch.randn(4, 2, requires_grad=True)
    (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    pre = made(net)
    (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    with pytest.raises(kfac_fx.errors.ObservationError, match=r"torch\.autograd\.grad"):
        pre.observe(slope)


def test_whoever_asks_by_hand_gets_nodes() -> None:
    """Buffers that require gradients without a recorder deliver them to any backward."""
    net = kfac_fx.transform(mlp())
    made(net).recorder.switch(False)
    buffers = [b for group in kfac_fx.ops.factor_buffers(net).values() for b in group]
    for buffer in buffers:
        buffer.requires_grad_()
    found = torch.autograd.grad(net(torch.randn(4, 6)).sum(), buffers)
    assert all(value.abs().sum() > 0 for value in found)
