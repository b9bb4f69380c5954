"""Others' passes around ours, in many orders: the same outputs, gradients and factors."""

from __future__ import annotations

import copy
import functools
import itertools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.asserts import assert_same
from torch import Tensor, fx, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.fx.experimental import optimization
from torch.fx.experimental.const_fold import split_const_subgraphs
from torch.fx.passes.infra.pass_manager import PassManager, pass_result_wrapper
from torch.fx.passes.shape_prop import ShapeProp
from torch.fx.passes.split_module import split_module

import kfac_fx
from kfac_fx import passes
from kfac_fx.errors import KFACError

assert_equal = functools.partial(assert_same, rtol=1e-8, atol=1e-11)
pytestmark = pytest.mark.usefixtures("float64")

Pass = Callable[[fx.GraphModule], fx.GraphModule]


class Network(nn.Module):
    """Something for every pass: a constant, dead code, an impure node, layers to rewrite."""

    def __init__(self, quantised: bool = False) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.fc, self.out = nn.Linear(27, 5), nn.Linear(5, 4)
        self.register_buffer("table", torch.linspace(0.1, 1.0, 5))
        self.quantised = quantised

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.conv(x)))
        torch._assert(h.ndim == 4, "images, please")
        h.sin()
        h = h.flatten(1) * 1.0
        h.add_(0.5)
        h = fake_quantised(h) if self.quantised else h
        h = torch.tanh(self.fc(h)) * self.table.cos()
        return self.out(fake_quantised(h) if self.quantised else h)


def fake_quantised(x: Tensor) -> Tensor:
    return torch.fake_quantize_per_tensor_affine(x, 0.01, 0, -128, 127)


# ------------------------------------------------------------------------------------ of others
def shapes(module: fx.GraphModule) -> fx.GraphModule:
    before = {name: b.clone() for name, b in module.named_buffers() if "running" in name}
    ShapeProp(module).propagate(torch.randn(6, 2, 3, 3))
    for name, value in before.items():
        module.get_buffer(name).copy_(value)
    return module


def fold_constants(module: fx.GraphModule) -> fx.GraphModule:
    """What is computed from parameters is none: it changes as they do."""
    trained = {name for name, _ in module.named_parameters()}

    def from_parameters(node: fx.Node) -> bool:
        mine = node.op == "get_attr" and node.target in trained
        return mine or any(map(from_parameters, node.all_input_nodes))

    return split_const_subgraphs(module, skip_folding_node_fn=from_parameters)


def remove_dead_code(module: fx.GraphModule) -> fx.GraphModule:
    def impure(node: fx.Node) -> bool:
        in_place = node.op == "call_method" and str(node.target).endswith("_")
        return node.is_impure() or in_place or node.target is torch._assert

    module.graph.eliminate_dead_code(is_impure_node=impure)
    module.recompile()
    return module


def rewrite_layers(module: fx.GraphModule) -> fx.GraphModule:
    """Calls of convolutions as functions of their parameters, relu as another function."""
    for node in list(module.graph.nodes):
        if node.op == "call_module" and isinstance(module.get_submodule(node.target), nn.Conv2d):
            with module.graph.inserting_before(node):
                names = (f"{node.target}.weight", f"{node.target}.bias")
                weight, bias = map(module.graph.get_attr, names)
                call = module.graph.call_function(F.conv2d, (*node.args, weight, bias, 1, 1))
            call.meta = dict(node.meta)
            node.replace_all_uses_with(call)
            module.graph.erase_node(node)
        elif node.target is torch.relu:
            node.target, node.args = torch.clamp_min, (*node.args, 0.0)
    module.recompile()
    return module


def split(module: fx.GraphModule) -> fx.GraphModule:
    """Behind the operation in place: a checkpoint allows none on what it is given."""
    nodes = list(module.graph.nodes)
    cut = next(index for index, node in enumerate(nodes) if node.target == "add_")
    return split_module(module, module, lambda node: int(nodes.index(node) > cut))


def checkpoint(module: fx.GraphModule) -> fx.GraphModule:
    """Around the parts of a split module, or around its linear layers."""
    for node in module.graph.find_nodes(op="call_module"):
        child = module.get_submodule(node.target)
        if isinstance(child, (fx.GraphModule, nn.Linear)):
            module.set_submodule(node.target, checkpoint_wrapper(child))
    return module


def quantise(module: fx.GraphModule) -> fx.GraphModule:
    """Fake quantisation of what linear layers read."""
    for node in list(module.graph.nodes):
        if node.op == "call_module" and isinstance(module.get_submodule(node.target), nn.Linear):
            with module.graph.inserting_before(node):
                rounded = module.graph.call_function(fake_quantised, node.args)
            node.args = (rounded,)
    module.recompile()
    return module


OTHERS: list[Pass] = [shapes, fold_constants, remove_dead_code, rewrite_layers, quantise]
LAST: list[Pass] = [split, checkpoint]
"""In this order, and after the others: they leave calls of submodules."""


def ours(module: fx.GraphModule) -> fx.GraphModule:
    return passes.KFACTransform()(module).graph_module


def results(net: nn.Module, model: Network, run: nn.Module | None = None) -> dict[Any, Any]:
    """Outputs, gradients and factors of a step; blocks by the model's names of parameters."""
    names = {id(p): n for n, p in model.named_parameters()}
    own = {n: names[id(p)] for n, p in net.named_parameters()}
    pre = kfac_fx.Preconditioner(
        net, "normal", damping=1e-2, fisher="exact", structure="block_tridiagonal"
    )
    x = torch.randn(6, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    outputs = (run or net)(x)
    pre.observe(outputs)
    model.zero_grad()
    outputs.sin().sum().backward()
    found: dict[Any, Any] = {n: (p.grad.clone(),) for n, p in model.named_parameters()}
    pre.step()
    blocks = pre.curvature.blocks
    keys = {name: frozenset(own[p] for p in block.parameters) for name, block in blocks.items()}
    found |= {keys[name]: factors for name, factors in pre.factors.items()}
    found |= {tuple(keys[n] for n in pair): fs for pair, fs in pre.cross_factors.items()}
    return found | {"outputs": (outputs.detach(),)}


def expected(quantised: bool) -> tuple[Network, dict[Any, Any]]:
    """A model, and the results of a copy of it that is written with or without quantisation."""
    model = Network()
    twin = copy.deepcopy(model)
    twin.quantised = quantised
    found = results(kfac_fx.transform(twin), twin)
    assert len(found) == 8 + 4 + 2 + 1
    return model, found


ORDERS = [
    (*order[:at], ours, *order[at:])
    for order in list(itertools.permutations(OTHERS))[::11]
    for at in (0, 2, 5)
]


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: "-".join(p.__name__ for p in order))
def test_five_passes_in_many_orders(order: tuple[Pass, ...]) -> None:
    """With ours before, between and after them, and once more after the last."""
    model, want = expected(quantised=True)
    manager = PassManager([pass_result_wrapper(one) for one in (*order, ours)])
    net = manager(fx.symbolic_trace(model)).graph_module
    assert_equal(results(net, model), want)
    assert not passes.KFACTransform()(net).modified
    assert not [key for key in net.state_dict() if "_kfac_fx" in key]


@pytest.mark.parametrize("at", range(len(OTHERS) + len(LAST) + 1))
def test_split_and_checkpointed(at: int) -> None:
    """Seven passes: where splitting comes after ours, the parts record for the whole."""
    model, want = expected(quantised=True)
    order = [*OTHERS, *LAST]
    module = fx.symbolic_trace(model)
    whole = None
    for index, one in enumerate([*order[:at], ours, *order[at:]]):
        module = one(module)
        if at <= index <= len(OTHERS):
            # What rewrote layers may have left taps that are out of date.
            whole = module = ours(module)
    if at <= len(OTHERS):
        assert whole is not None
        assert_equal(results(whole, model, run=module), want)
        with pytest.raises(KFACError, match="that was transformed"):
            kfac_fx.Preconditioner(module)
    assert_equal(results(ours(module), model), want)


@pytest.mark.parametrize("one", [shapes, fold_constants, remove_dead_code])
def test_taps_survive(one: Pass) -> None:
    """Passes that leave layers alone need no second run of ours."""
    model, want = expected(quantised=False)
    net = one(ours(fx.symbolic_trace(model)))
    assert_equal(results(net, model), want)
    taps = [node for node in net.graph.nodes if passes.is_tap(node)]
    assert len(taps) == 8 and all("kfac_fx" in node.meta["custom"] for node in taps)
    if one is shapes:
        assert all("tensor_meta" in n.meta for n in taps if "link" not in n.name)


def test_rewriting_behind_ours_is_noticed() -> None:
    """The fake quantisation of an input makes its tap out of date, and the chain says so."""
    model, want = expected(quantised=True)
    net = quantise(ours(fx.symbolic_trace(model)))
    stale = results(net, model)
    with pytest.raises(AssertionError):
        assert_equal(stale, want)
    assert passes.KFACTransform()(net).modified
    assert_equal(results(net, model), want)


def test_convolution_and_norm_fused() -> None:
    """Before ours there is one layer; after ours the fusion finds no pair, and loses no tap."""
    model = Network().eval()
    x = torch.randn(6, 2, 3, 3)
    fused = ours(optimization.fuse(copy.deepcopy(model)))
    assert list(fused.meta["kfac_fx"].blocks) == ["conv", "fc", "out"]
    torch.testing.assert_close(fused(x), model(x))
    late = optimization.fuse(ours(fx.symbolic_trace(model)), no_trace=True)
    assert sum(map(passes.is_tap, late.graph.nodes)) == 8
    torch.testing.assert_close(late(x), model(x))


def test_checkpoints_are_looked_through(caplog: pytest.LogCaptureFixture) -> None:
    model, want = expected(quantised=False)
    with caplog.at_level(logging.INFO, "kfac_fx"):
        net = kfac_fx.transform(checkpoint(fx.symbolic_trace(model)))
    assert "checkpoint around fc is looked through" in caplog.text
    assert_equal(results(net, model), want)


def test_nested_results_of_split_parts() -> None:
    """Parts that return several values, and take keyword arguments."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor, scale: float = 2.0) -> dict[str, Any]:
            y = self.fc(x)
            return {"sum": y * scale, "parts": (x, y)}

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = fx.symbolic_trace(Part())
            self.second = fx.symbolic_trace(Part())

        def forward(self, x: Tensor) -> Tensor:
            one = self.first(x)
            two = self.second(x=one["parts"][1], scale=3.0)
            return two["sum"] + one["sum"] + one["parts"][0]

    class Leaves(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return True

    model = Whole()
    module = fx.GraphModule(model, Leaves().trace(model))
    x = torch.randn(4, 3)
    want = model(x)
    assert passes.InlineCalls()(module).modified
    assert not passes.InlineCalls()(module).modified
    module.graph.lint()
    assert torch.equal(module(x), want)
    assert list(ours(module).meta["kfac_fx"].blocks) == ["first.fc", "second.fc"]
