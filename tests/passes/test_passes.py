"""Our passes as passes of torch.fx: truthful, idempotent, invertible, and checked after each."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.asserts import assert_same
from support.networks import BY_NAME, NETWORKS, Network
from support.processes import run_python
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.fx.passes.infra.pass_manager import PassManager as TorchPassManager

import kfac_fx
from kfac_fx import passes
from kfac_fx.errors import CoverageError, NoParametersError, PassError, UnknownOptionError

assert_equal = functools.partial(assert_same, rtol=1e-12, atol=1e-14, nonzero=True)
pytestmark = pytest.mark.usefixtures("float64")
every_network = pytest.mark.parametrize("network", NETWORKS, ids=str)


def captured(network: Network) -> fx.GraphModule:
    """A module of ours without taps."""
    net = kfac_fx.transform(network.build(), **network.captured_with())
    passes.StripTaps()(net)
    return net


def traced(name: str = "mlp") -> fx.GraphModule:
    """Somebody else's GraphModule."""
    return fx.symbolic_trace(BY_NAME[name].build())


def text(module: fx.GraphModule) -> list[str]:
    return [
        str(graph.python_code("self").src) for graph in getattr(module, "graphs", (module.graph,))
    ]


def factors(net: nn.Module, run: Callable[[Tensor], Tensor] | None = None) -> dict[str, Any]:
    """After one empirical step on fixed data; cross factors too."""
    pre = kfac_fx.Preconditioner(net, "normal", damping=1e-2, fisher="empirical")
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))
    outputs = (run or net)(x)
    targets = torch.linspace(-1, 1, outputs.numel()).reshape(outputs.shape)
    pre.observe(outputs, targets)
    (outputs - targets).square().sum().div(2).backward()
    pre.step()
    return dict(pre.factors) | dict(pre.cross_factors)


@every_network
def test_strip_taps_is_the_inverse_of_insert_taps(network: Network) -> None:
    """Code and meta before and after; and a second time."""
    net = captured(network)
    before = text(net)
    meta = [dict(node.meta) for graph in net.graphs for node in graph.nodes]
    keys = [name for name, _ in net.named_buffers()]
    chain = passes.KFACTransform()
    for _ in range(2):
        assert chain(net).modified
        assert text(net) != before
        assert passes.StripTaps()(net).modified
        assert text(net) == before
        assert [dict(node.meta) for graph in net.graphs for node in graph.nodes] == meta
        assert [name for name, _ in net.named_buffers()] == keys
        assert "kfac_fx" not in net.meta
    assert not passes.StripTaps()(net).modified


@every_network
def test_idempotent(network: Network) -> None:
    """The whole chain on its own result changes nothing, and says so."""
    net = captured(network)
    chain = passes.KFACTransform()
    chain(net)
    nodes = [node for graph in net.graphs for node in graph.nodes]
    buffers = [id(b) for b in net.buffers()]
    curvature = net.meta["kfac_fx"]
    assert not chain(net).modified
    assert [node for graph in net.graphs for node in graph.nodes] == nodes
    assert [id(b) for b in net.buffers()] == buffers
    assert net.meta["kfac_fx"] is curvature


def test_each_pass_is_idempotent_and_truthful() -> None:
    net = traced()
    for one in (
        passes.FindUses(),
        passes.FindCouplings(),
        passes.FindMoments(),
        passes.CheckCoverage(),
    ):
        before = text(net)
        for _ in range(2):
            result = one(net)
            assert isinstance(one, PassBase) and isinstance(result, PassResult)
            assert result.graph_module is net and not result.modified
            curvature = net.meta["kfac_fx"]
        assert one(net).graph_module.meta["kfac_fx"] == curvature
        assert text(net) == before
    insert = passes.InsertTaps()
    assert insert(net).modified
    after = text(net)
    assert not insert(net).modified
    assert text(net) == after


def test_chain_by_hand_is_the_transform() -> None:
    """In torch's PassManager, in ours, as one pass, and by transform(): one result."""
    model = BY_NAME["mlp"].build()
    steps = [passes.FindUses(), passes.FindCouplings(), passes.CheckCoverage(), passes.InsertTaps()]
    results = [
        TorchPassManager(steps)(fx.symbolic_trace(model)).graph_module,
        passes.PassManager(steps)(fx.symbolic_trace(model)).graph_module,
        passes.KFACTransform()(fx.symbolic_trace(model)).graph_module,
        TorchPassManager([passes.KFACTransform()])(fx.symbolic_trace(model)).graph_module,
        kfac_fx.transform(fx.symbolic_trace(model)),
    ]
    want = factors(kfac_fx.transform(model))
    for net in results:
        assert text(net) == text(results[0])
        assert net.meta["kfac_fx"] == results[0].meta["kfac_fx"]
        assert_equal(factors(net), want)


def test_options_reach_the_chain() -> None:
    net = traced()
    passes.KFACTransform(structure="block_diagonal", exclude=("2",), ekfac=True)(net)
    curvature = net.meta["kfac_fx"]
    assert curvature.structure == "block_diagonal" and not curvature.pairs
    assert list(curvature.blocks) == ["0"] and len(curvature.moments) == 1
    for wrong in ({"structure": "x"}, {"couplings": "x"}, {"weight_sharing": "x"}):
        with pytest.raises(UnknownOptionError):
            passes.KFACTransform(**wrong)


def test_meta_is_kept() -> None:
    """Of a node that is recorded, its tap says where it comes from and what its value is."""
    net = kfac_fx.transform(BY_NAME["shape_loop"].build(), (torch.randn(4, 3, 6),))
    passes.StripTaps()(net)
    for node in net.graph.nodes:
        node.meta["custom"] = {"mine": node.name}
    passes.KFACTransform()(net)
    # What weighs the rows of several uses alike stands on a buffer, and on no node of the model.
    others = ("link", "shared")
    taps = [n for n in net.graph.nodes if passes.is_tap(n) and not n.name.startswith(others)]
    assert len(taps) >= 4
    for tap in taps:
        origin = tap.args[0]
        while "kfac_fx" in (origin.meta.get("custom") or {}):
            origin = origin.all_input_nodes[0]
        assert tap.meta["custom"]["mine"] == origin.name
        for key in ("stack_trace", "nn_module_stack", "val"):
            assert tap.meta[key] is origin.meta[key], key
    stripped = copy.deepcopy(net)
    passes.StripTaps()(stripped)
    assert all(n.meta["custom"] == {"mine": n.name} for n in stripped.graph.nodes)


def test_replaced_modules_keep_meta() -> None:
    """An LSTM that runs as an operator of ours, and is given back."""
    net = kfac_fx.transform(nn.Sequential(nn.LSTM(3, 2)), capture="symbolic_trace")
    passes.StripTaps()(net)
    (node,) = (n for n in net.graph.nodes if n.op == "call_module")
    node.meta |= {"val": "a value", "custom": {"mine": 1}}
    meta = dict(node.meta)
    passes.KFACTransform()(net)
    (call,) = filter(passes.is_tap, net.graph.nodes)
    assert call.meta["custom"]["mine"] == 1 and call.meta["stack_trace"] == meta["stack_trace"]
    (nested,) = call.users
    assert nested.meta["val"] == "a value"
    passes.StripTaps()(net)
    (node,) = (n for n in net.graph.nodes if n.op == "call_module")
    assert {k: v for k, v in node.meta.items() if k != "is_wrapped"} == meta


def test_curvature_is_read_back_from_the_taps() -> None:
    """fx.Transformer drops the meta of the module; the nodes' survives."""
    net = kfac_fx.transform(BY_NAME["mlp"].build(), ekfac=True)
    want = factors(net)
    moved = fx.Transformer(net).transform()
    assert not moved.meta
    assert passes.read_curvature(moved) == net.curvature
    assert_equal(factors(moved), want)


def test_reestablished_where_another_pass_lost_taps() -> None:
    """A tap that is gone comes back; buffers stay, so the Preconditioner goes on."""
    net = kfac_fx.transform(BY_NAME["mlp"].build())
    want = factors(net)
    before, buffers = text(net), [id(b) for b in net.buffers()]
    tap = next(filter(passes.is_tap, net.graph.nodes))
    tap.replace_all_uses_with(tap.args[0])
    net.graph.erase_node(tap)
    net.recompile()
    chain = passes.KFACTransform()
    assert chain(net).modified
    assert text(net) == before and [id(b) for b in net.buffers()] == buffers
    assert_equal(factors(net), want)
    assert not chain(net).modified


# ------------------------------------------------------------------------------------- the manager
def test_reports() -> None:
    """One for each pass, those inside another before it."""
    found: list[passes.PassReport] = []

    def untouched(module: fx.GraphModule) -> fx.GraphModule:
        return module

    net = traced()
    chain = passes.KFACTransform(on_pass=found.append)
    passes.PassManager([untouched, chain], on_pass=found.append)(net)
    names = [report.name for report in found]
    assert names == [
        *("untouched", "FindUses", "FindCouplings", "CheckCoverage", "InsertTaps"),
        "KFACTransform",
    ]
    assert [report.modified for report in found] == [True, False, False, False, True, True]
    assert all(report.seconds >= 0 and report.module is net for report in found)
    assert str(found[-1]).startswith("KFACTransform: ") and "changed" in str(found[-1])


def failing(module: fx.GraphModule) -> None:
    raise ZeroDivisionError("by zero")


def disorder(module: fx.GraphModule) -> None:
    """Uses a node before it is made."""
    first, *_, last, _ = module.graph.nodes
    last.append(first)


def liar(module: fx.GraphModule) -> PassResult:
    with module.graph.inserting_before(list(module.graph.nodes)[-1]):
        module.graph.call_function(torch.zeros, (1,))
    return PassResult(module, False)


def number(module: fx.GraphModule) -> Any:
    return 3


def lost_buffer(module: fx.GraphModule) -> None:
    del module.get_submodule("_kfac_fx.0").A


@pytest.mark.parametrize(
    ("one", "says"),
    [
        (failing, "by zero"),
        (disorder, "disorder"),
        (liar, "changed nothing"),
        (number, "int"),
        (lost_buffer, "disorder"),
    ],
)
def test_manager_names_the_pass_that_failed(one: Any, says: str) -> None:
    net = traced()
    passes.KFACTransform()(net)
    with pytest.raises(PassError, match=f"pass {one.__name__} .*{says}") as caught:
        passes.PassManager([one])(net)
    assert caught.value.pass_name == one.__name__


def test_errors_of_ours_keep_their_type() -> None:
    net = traced("residual")
    nothing = passes.KFACTransform(exclude=("*",))
    with pytest.raises(NoParametersError) as caught:
        passes.PassManager([nothing])(net)
    assert caught.value.pass_name == "KFACTransform"
    assert not list(filter(passes.is_tap, net.graph.nodes))

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return x @ torch.linalg.matrix_exp(self.w)

    net = fx.symbolic_trace(Odd())
    before = text(net)
    with pytest.raises(CoverageError) as caught:
        passes.KFACTransform(strict=True)(net)
    assert caught.value.pass_name == "CheckCoverage"
    assert text(net) == before


def test_passes_out_of_order() -> None:
    net = traced()
    for one in (passes.FindCouplings(), passes.InsertTaps(), passes.CheckCoverage()):
        with pytest.raises(PassError, match="FindUses first"):
            one(net)
    passes.FindUses()(net)
    for node in list(net.graph.nodes)[1:-1]:
        node._rename("other_" + node.name)
    with pytest.raises(PassError, match="has changed"):
        passes.InsertTaps()(net)
    passes.FindUses()(net)
    passes.InsertTaps()(net)
    with pytest.raises(PassError, match="StripTaps first"):
        passes.FindUses()(net)


def test_log_says_what_was_matched_and_why_not(caplog: pytest.LogCaptureFixture) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.w = nn.Linear(3, 3), nn.Parameter(torch.randn(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(x, self.fc(x), self.w, alpha=2)

    with caplog.at_level(logging.DEBUG, "kfac_fx"):
        kfac_fx.transform(Two())
    said = caplog.text
    assert "fc: linear (kronecker) block of fc.weight, fc.bias, used in fc" in said
    assert "addmm: not recorded as a layer, addmm: alpha and beta other than 1" in said
    assert "fc is coupled with none: " in said


def test_torch_logs_shows_what_was_matched() -> None:
    """As it stands in docs/howto/other_passes.md, through torch's own switch."""
    code = "import torch, kfac_fx; kfac_fx.transform(torch.nn.Linear(3, 2))"
    done = run_python("-c", code, TORCH_LOGS="+kfac_fx")
    assert "linear (kronecker) block of weight, bias, used in linear" in done.stderr
