"""torch.export in and out: taps survive, are inserted in programs, and record elsewhere."""

from __future__ import annotations

import copy
import functools
import warnings
from pathlib import Path

import pytest
import torch
from support.asserts import assert_same
from support.networks import BY_NAME, Network
from support.processes import run_python
from support.steps import step_on_fixed_data as step
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import kfac_fx
from kfac_fx import passes
from kfac_fx.errors import CaptureError, KFACError, NoParametersError, ObservationError

assert_equal = functools.partial(assert_same, rtol=1e-9, atol=1e-12)
pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
]

NAMES = ["mlp", "mlp_tokens", "conv2d", "batch_norm", "layer_norm", "embedded", "tied", "keywords"]
NAMES += ["residual", "unused", "class_token"]
several = pytest.mark.parametrize("name", NAMES)


def lstm() -> nn.Module:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.out = nn.LSTM(6, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.rnn(x)[0][:, -1])

    return Last()


def exported(module: nn.Module, network: Network) -> ExportedProgram:
    """With the batch size open."""
    inputs, kwargs = network.inputs(4), network.kwargs(4)
    shapes = torch.export.ShapesCollection()
    for leaf in (*inputs, *kwargs.values()):
        shapes[leaf] = {0: Dim.AUTO}
    dynamic = shapes.dynamic_shapes(module, inputs, kwargs)
    return torch.export.export(module, inputs, kwargs, dynamic_shapes=dynamic)


def tap_count(graph: torch.fx.Graph) -> int:
    return sum(map(passes.is_tap, graph.nodes))


@pytest.mark.parametrize("name", [*NAMES, "encoder"])
def test_export_keeps_the_taps(name: str) -> None:
    network = BY_NAME[name]
    net = kfac_fx.transform(network.build(), **network.captured_with())
    program = exported(net, network)
    assert tap_count(program.graph) == tap_count(net.graph) > 0
    assert passes.read_curvature(program.module()) == net.curvature
    assert_equal(step(program.module(), network), step(copy.deepcopy(net), network))


@several
def test_a_pass_inserts_taps_into_a_program(name: str) -> None:
    network = BY_NAME[name]
    model = network.build()
    program = exported(model, network)
    before = str(program)
    instrumented = passes.instrument_program(program)
    instrumented.validate()
    assert str(program) == before and tap_count(program.graph) == 0
    assert tap_count(instrumented.graph) > 0
    shared = dict(instrumented.module().named_parameters())
    assert all(shared[n] is p for n, p in program.module().named_parameters())
    want = step(kfac_fx.transform(copy.deepcopy(model), **network.captured_with()), network)
    assert_equal(step(instrumented.module(), network), want)


@several
def test_transform_takes_programs(name: str) -> None:
    network = BY_NAME[name]
    model = network.build()
    twin = kfac_fx.transform(copy.deepcopy(model), **network.captured_with())
    program = exported(model, network)
    net = kfac_fx.transform(program)
    assert net.curvature.route == "export"
    assert all(p is model.get_parameter(n) for n, p in net.named_parameters())
    want = step(twin, network)
    assert_equal(step(net, network), want)
    again = kfac_fx.transform(passes.instrument_program(program))
    assert tap_count(again.graph) == tap_count(net.graph)


def test_programs_keep_their_sizes() -> None:
    """A size that was fixed is refused in another, where broadcasting could hide it."""
    net = kfac_fx.transform(torch.export.export(nn.Linear(6, 4), (torch.randn(4, 6),)))
    net(torch.randn(4, 6))
    with pytest.raises(CaptureError, match="fixed to 4"):
        net(torch.randn(5, 6))


def test_programs_keep_their_mode() -> None:
    net = kfac_fx.transform(exported(BY_NAME["batch_norm"].build(), BY_NAME["batch_norm"]))
    with pytest.raises(NotImplementedError):
        net.eval()
    frozen = nn.Linear(6, 4).requires_grad_(False)
    with pytest.raises(NoParametersError):
        kfac_fx.transform(exported(frozen, BY_NAME["mlp"]))


@pytest.mark.parametrize("route", ["export", "eager"])
def test_a_captured_net_is_exported_again(route: kfac_fx.config.Capture) -> None:
    """Also one that runs the model: the interpreter of fx gives it no keywords."""
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh()), torch.randn(5, 4)
    net = kfac_fx.transform(model, x, capture=route)
    program = torch.export.export(net, (x,))
    torch.testing.assert_close(program.module()(x), model(x))


def test_fx_traces_an_exported_net() -> None:
    """The sizes that the export fixed are checked in that graph as well."""
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh()), torch.randn(5, 4)
    graph = torch.fx.symbolic_trace(kfac_fx.transform(model, x, capture="export"))
    torch.testing.assert_close(graph(x), model(x))
    with pytest.raises(CaptureError, match="dimension 1 was fixed to 4"):
        graph(torch.randn(5, 3))


def test_without_annotations() -> None:
    """A program without taps names the pass that inserts them."""
    program = exported(BY_NAME["mlp"].build(), BY_NAME["mlp"])
    with pytest.raises(KFACError, match="KFACTransform"):
        kfac_fx.Preconditioner(program.module())


@pytest.mark.parametrize("name", [name for name in NAMES if name != "batch_norm"])
def test_decompositions_that_leave_the_taps(name: str) -> None:
    """torch.export's own decompositions without those of the taps.

    Batch normalisation in training mode has no backward in its functional form, with taps or not.
    """
    network = BY_NAME[name]
    net = kfac_fx.transform(network.build(), **network.captured_with())
    table = torch.export.default_decompositions()
    for operator in [one for one in table if one.namespace == "kfac_fx"]:
        del table[operator]
    program = exported(net, network).run_decompositions(table)
    assert tap_count(program.graph) == tap_count(net.graph)
    assert_equal(step(program.module(), network), step(net, network))


def test_reestablished_after_all_decompositions() -> None:
    """Of the taps too: without a recording they are nothing. They are found again."""
    network = BY_NAME["mlp"]
    net = kfac_fx.transform(network.build())
    decomposed = exported(net, network).run_decompositions()
    assert tap_count(decomposed.graph) == 0
    with pytest.raises(ObservationError, match="not computed by the transformed module"):
        step(decomposed.module(), network)
    assert_equal(step(kfac_fx.transform(decomposed), network), step(net, network))


def test_strip_after_export_leaves_aten() -> None:
    """The annotation of a layer that ran as an operator does not name a module any more."""
    network = Network("lstm", lstm, lambda n: (torch.randn(n, 3, 6),))
    net = kfac_fx.transform(network.build())
    program = exported(net, network)
    again = kfac_fx.transform(program)
    assert_equal(step(again, network), step(net, network))
    passes.StripTaps()(again)
    assert not [node for node in again.graph.nodes if node.op == "call_module"]
    inputs = network.inputs(5)
    torch.testing.assert_close(again(*inputs), net(*inputs))


RUN = """
import sys, torch
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
from support.networks import BY_NAME
from support.processes import run_python
from support.steps import step_on_fixed_data
found = {}
for name in sys.argv[2:]:
    program = torch.export.load(f"{sys.argv[1]}/{name}.pt2")
    found[name] = step_on_fixed_data(program.module(), BY_NAME[name])
torch.save(found, f"{sys.argv[1]}/found.pt")
"""


def test_saved_loaded_and_recorded_in_another_process(tmp_path: Path) -> None:
    """Programs exported from a net, and programs that got their taps by a pass."""
    want, names = {}, ["mlp", "batch_norm", "embedded"]
    for name in names:
        network = BY_NAME[name]
        model = network.build()
        net = kfac_fx.transform(copy.deepcopy(model), **network.captured_with())
        if name == "batch_norm":
            program = passes.instrument_program(exported(model, network))
        else:
            program = exported(net, network)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.export.save(program, tmp_path / f"{name}.pt2")
        want[name] = step(net, network)
    run_python("-c", RUN, tmp_path, *names)
    found = torch.load(tmp_path / "found.pt")
    for name in names:
        assert_equal(found[name], want[name])
