"""torch.compile of the net and of the preconditioner program."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from support.networks import BY_NAME, NETWORKS, Network
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch.compiler import config as compiler

import kfac_fx
from kfac_fx.codegen import graphed
from kfac_fx.ops import library
from kfac_fx.ops.library import cache_tag

pytestmark = pytest.mark.usefixtures("float64", "fresh")
every_network = pytest.mark.parametrize("network", NETWORKS, ids=str)


def arm(net: nn.Module, recording: bool) -> list[Tensor]:
    buffers = [b for group in kfac_fx.ops.factor_buffers(net).values() for b in group]
    kfac_fx.ops.switch(net, buffers, recording)
    for buffer in buffers:
        buffer.grad = None
    return buffers


def results(run: Callable[..., Any], net: nn.Module, network: Network) -> dict[str, Tensor]:
    """Outputs, gradients of the parameters, and statistics if they are recorded."""
    net.zero_grad()
    torch.manual_seed(7)
    inputs, kwargs = network.inputs(5), network.kwargs(5)
    outputs = network.pick(run(*inputs, **kwargs))
    outputs.sin().sum().backward()
    found = {"outputs": outputs.detach()}
    found |= {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    for name, group in kfac_fx.ops.factor_buffers(net).items():
        found |= {f"{name}/{k}": b.grad for k, b in enumerate(group) if b.grad is not None}
    return found


def compare(compiled: Callable[..., Any], net: nn.Module, network: Network) -> int:
    """The number of statistics that were found, and equal."""
    want = results(net, net, network)
    for group in kfac_fx.ops.factor_buffers(net).values():
        for buffer in group:
            buffer.grad = None
    found = results(compiled, net, network)
    assert found.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-9, msg=name)
    return sum("/" in name for name in found)


@every_network
def test_compiled_equals_eager(network: Network) -> None:
    """Recording off, on, off and on again: two graphs in all, and no graph break."""
    net = kfac_fx.transform(network.build(), **network.captured_with())
    dropout = any(isinstance(module, nn.Dropout) for module in net.modules())
    if dropout or "modes" in network.name:
        net.eval()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    found = []
    for recording in (False, True, False, True):
        arm(net, recording)
        found.append(compare(compiled, net, network))
    assert found == [0, found[1], 0, found[1]]
    assert counters["stats"]["unique_graphs"] == (2 if found[1] else 1)


def test_results_of_a_cuda_graph_are_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes to the same memory whenever it runs."""
    memory, given = torch.zeros(3), []

    def compile(module: Any, **options: Any) -> Any:
        given.append(options["options"])
        return lambda x: [memory.copy_(x)]

    monkeypatch.setattr(torch, "compile", compile)
    run = graphed(fx.symbolic_trace(nn.Identity()), True, {"fallback_random": True})
    first, second = run(torch.ones(3)), run(torch.full((3,), 2.0))
    assert first[0].tolist() == [1.0] * 3 and second[0].tolist() == [2.0] * 3
    assert given == [{"fallback_random": True, "triton.cudagraphs": True}]


class Ops:
    """A compiler that runs the graphs as they are and remembers their operators."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()

    def __call__(self, graph: fx.GraphModule, inputs: Any) -> Any:
        self.found.update(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return make_boxed_func(graph.forward)

    def of(self, module: nn.Module, x: Tensor) -> Counter[str]:
        torch._dynamo.reset()
        self.found = Counter()
        torch.compile(module, backend=aot_autograd(fw_compiler=self), fullgraph=True)(
            x
        ).sum().backward()
        return self.found


@pytest.mark.parametrize("name", ["mlp", "conv2d", "layer_norm", "residual", "batch_norm"])
def test_off_is_the_plain_model(name: str) -> None:
    """Compiled without recording, forward and backward hold the operators of the model, no more."""
    network = BY_NAME[name]
    model = network.build()
    (x,) = network.inputs(5)
    plain = Ops().of(copy.deepcopy(model), x)
    net = kfac_fx.transform(model)
    arm(net, False)
    off = Ops().of(net, x)
    arm(net, True)
    on = Ops().of(net, x)
    ignored = {"aten.alias.default", "aten.view.default", "aten.detach.default"}
    assert {k: v for k, v in off.items() if k not in ignored} == {
        k: v for k, v in plain.items() if k not in ignored
    }
    assert not any("kfac" in target for target in off)
    assert sum(on.values()) > sum(off.values())


@pytest.mark.parametrize("name", ["mlp", pytest.param("conv2d", marks=pytest.mark.slow)])
def test_inductor(name: str) -> None:
    """Outputs, gradients and statistics under inductor, recording or not."""
    network = BY_NAME[name]
    net = kfac_fx.transform(network.build())
    compiled = torch.compile(net, fullgraph=True)
    for recording in (False, True):
        buffers = arm(net, recording)
        assert compare(compiled, net, network) == (len(buffers) if recording else 0)


@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
def test_observe_after_compiled_forward(fisher: str) -> None:
    """A whole step on a compiled net gives eager's factors and updates, or a typed error.

    The sampled estimator needs two backwards of one forward, which compiled graphs refuse; it asks
    for the inputs, as in tests/statistics/test_statistics_program.py.
    """
    network = BY_NAME["mlp"]
    net = kfac_fx.transform(network.build())
    twin = copy.deepcopy(net)
    x, y = torch.randn(6, 6), torch.randint(4, (6,))

    def step(run: Callable[..., Any], module: nn.Module) -> kfac_fx.Preconditioner:
        preconditioner = kfac_fx.Preconditioner(
            module,
            likelihood="categorical",
            damping=1e-2,
            fisher=fisher,
            generator=torch.Generator().manual_seed(0),
        )
        outputs = run(x)
        loss = nn.functional.cross_entropy(outputs, y)
        preconditioner.observe(outputs, y)
        loss.backward()
        preconditioner.step()
        return preconditioner

    want = step(twin, twin).factors
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    try:
        found = step(compiled, net).factors
    except kfac_fx.errors.ObservationError as error:
        assert fisher == "sampled" and "inputs=" in str(error)
        return
    for name, factors in want.items():
        for one, other in zip(found[name], factors, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "conv2d", "layer_norm", "embedded"])
def test_compiled_program(name: str) -> None:
    """Preconditioner(compile=True) refreshes and applies as the eager program does."""
    network = BY_NAME[name]
    net = kfac_fx.transform(network.build(), **network.captured_with())
    inputs = network.inputs(6)

    def updates(compile: bool) -> dict[str, Tensor]:
        net.zero_grad()
        preconditioner = kfac_fx.Preconditioner(
            net,
            likelihood="normal",
            damping=1e-2,
            fisher="exact",
            compile=compile,
            generator=torch.Generator().manual_seed(0),
        )
        outputs = net(*inputs)
        preconditioner.observe(outputs)
        outputs.sin().sum().backward()
        preconditioner.step()
        return {n: p.grad.clone() for n, p in net.named_parameters()}

    want, found = updates(False), updates(True)
    for key, value in want.items():
        torch.testing.assert_close(found[key], value, rtol=1e-8, atol=1e-9, msg=key)


def test_compiled_graphs_on_the_disk_are_this_version_s(tmp_path: Path) -> None:
    """torch finds them by names of operators, whatever those are made of."""
    source = tmp_path / "tap.py"
    source.write_text("one")
    before = cache_tag([source])
    source.write_text("another")
    assert cache_tag([source]) != before
    assert {path.parent.name for path in library.SOURCES} == {"ops", "linalg"}
    assert cache_tag(library.SOURCES) in compiler.cache_key_tag
