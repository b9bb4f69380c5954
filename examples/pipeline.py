"""K-FAC in a compile pipeline: a pass of one's own, passes of torch, export, files, torch.compile.

    python examples/pipeline.py

A network of convolutions runs through eight passes, ours among them, is exported, saved and loaded
in another process, and is compiled with a graph break. Each time the Kronecker factors of one batch
are compared with those of ``kfac_fx.transform(model)``; the script fails if they differ.
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.const_fold import split_const_subgraphs
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.fx.passes.shape_prop import ShapeProp
from torch.fx.passes.split_module import split_module

import kfac_fx
from kfac_fx import passes

Factors = dict[str, tuple[Tensor, ...]]


class Network(nn.Module):
    """Two convolutions and two linear layers; a table of constants, and something nobody reads."""

    def __init__(self, breaks: bool = False) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2))
        self.fc, self.out = nn.Linear(72, 16), nn.Linear(16, 10)
        self.register_buffer("angles", torch.linspace(0.0, 1.0, 16))
        self.breaks = breaks

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.conv(x))
        h.exp()
        h = torch.tanh(self.fc(h.flatten(1))) * self.angles.cos()
        if self.breaks:
            torch._dynamo.graph_break()
        return self.out(h)


class SwishForReLU(PassBase):
    """A pass of one's own: torch.relu becomes F.silu."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        found = graph_module.graph.find_nodes(op="call_function", target=torch.relu)
        for node in found:
            node.target = F.silu
        graph_module.recompile()
        return PassResult(graph_module, bool(found))


def fold_constants(module: fx.GraphModule) -> fx.GraphModule:
    """torch's constant folding; what is computed from parameters is no constant."""
    trained = {name for name, _ in module.named_parameters()}

    def from_parameters(node: fx.Node) -> bool:
        read = node.op == "get_attr" and node.target in trained
        return read or any(map(from_parameters, node.all_input_nodes))

    return split_const_subgraphs(module, skip_folding_node_fn=from_parameters)


def remove_dead_code(module: fx.GraphModule) -> PassResult:
    changed = module.graph.eliminate_dead_code()
    module.recompile()
    return PassResult(module, changed)


def infer_shapes(module: fx.GraphModule) -> PassResult:
    ShapeProp(module).propagate(torch.randn(4, 1, 9, 9))
    return PassResult(module, False)


def split_in_two(module: fx.GraphModule) -> fx.GraphModule:
    nodes = list(module.graph.nodes)
    cut = next(index for index, node in enumerate(nodes) if node.target == "flatten")
    return split_module(module, module, lambda node: int(nodes.index(node) >= cut))


def factors(net: nn.Module) -> Factors:
    """Of one batch, by the empirical Fisher."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(32, 1, 9, 9, generator=generator), torch.arange(32) % 10
    preconditioner = kfac_fx.Preconditioner(net, "categorical", fisher="empirical", damping=1e-2)
    outputs = net(x)
    preconditioner.observe(outputs, y)
    F.cross_entropy(outputs, y).backward()
    preconditioner.step()
    return {name: tuple(f.clone() for f in group) for name, group in preconditioner.factors.items()}


def compare(what: str, found: Factors, wanted: Factors) -> None:
    """By order: a split module has other names for its parameters."""
    pairs = zip(found.values(), wanted.values(), strict=True)
    errors = [float((a - b).norm() / b.norm()) for f, w in pairs for a, b in zip(f, w, strict=True)]
    print(f"{what:58s} {len(errors)} factors, largest relative difference {max(errors):.1e}")
    assert max(errors) < 1e-4, f"{what}: the factors differ"


def record_saved(folder: Path) -> None:
    """What the other process does with saved programs."""
    for path in folder.glob("*.pt2"):
        program = torch.export.load(path)
        torch.save(factors(program.module()), path.with_suffix(".factors"))


def in_another_process(programs: dict[str, torch.export.ExportedProgram]) -> dict[str, Factors]:
    """Saves programs and lets a fresh process load and record them."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.export about its own files
        for name, program in programs.items():
            torch.export.save(program, Path(folder, f"{name}.pt2"))
        command = [sys.executable, __file__, "--record", folder]
        subprocess.run(command, check=True, env=environment)
        return {name: torch.load(Path(folder, f"{name}.factors")) for name in programs}


def main() -> None:
    torch.manual_seed(0)
    model = Network()

    print("passes:")
    manager = passes.PassManager(
        [
            *(SwishForReLU(), infer_shapes, passes.KFACTransform(), fold_constants),
            *(remove_dead_code, infer_shapes, split_in_two, passes.KFACTransform()),
        ],
        on_pass=lambda report: print("   ", report),
    )
    net = manager(fx.symbolic_trace(model)).graph_module
    by_hand = SwishForReLU()(fx.symbolic_trace(model)).graph_module
    wanted = factors(kfac_fx.transform(by_hand))
    compare("eight passes, ours twice", factors(net), wanted)

    wanted = factors(kfac_fx.transform(model))
    example = (torch.randn(4, 1, 9, 9),)
    shapes = ({0: torch.export.Dim.AUTO},)
    tapped = torch.export.export(kfac_fx.transform(model), example, dynamic_shapes=shapes)
    plain = torch.export.export(model, example, dynamic_shapes=shapes)
    programs = {"tapped": tapped, "by a pass": passes.instrument_program(plain)}
    found = in_another_process(programs)
    compare("exported with taps, recorded in another process", found["tapped"], wanted)
    compare("a program that got its taps by a pass, likewise", found["by a pass"], wanted)

    broken = copy.deepcopy(model)
    broken.breaks = True
    compiled = torch.compile(broken, backend=kfac_fx.backend("aot_eager"))
    compiled(*example)
    compare("compiled with a graph break", factors(compiled), wanted)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.record:
        record_saved(arguments.record)
    else:
        main()
