"""Taps in an ExportedProgram: the chain on its graph, factor buffers as lifted inputs."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, TensorArgument

from kfac_fx.capture.captured_module import captured_module
from kfac_fx.ops import STORE
from kfac_fx.passes.graph_inputs import placeholders, read_members, reads_below, take_inputs
from kfac_fx.passes.kfac_transform import KFACTransform
from kfac_fx.torch_internals.fake_tensors import detect_fake_mode


def instrument_program(
    program: ExportedProgram, transform: KFACTransform | None = None
) -> ExportedProgram:
    """The program with taps; it can be saved, and loaded wherever ``kfac_fx`` is imported.

    ``program.module()`` of the result is what ``Preconditioner`` takes. Parameters are shared with
    the program given, which stays as it is; the mode is that in which it was exported.

    Args:
        transform: what to run on its graph; ``KFACTransform()`` by default.

    Raises:
        KFACError: as ``transform`` does.
    """
    transform = transform or KFACTransform(route="export")
    graph = copy.deepcopy(program.graph)
    signature = program.graph_signature
    paths = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    net = captured_module(program.module(check_guards=False), graph, None)
    read_members(net.graph, paths)
    transform(net)
    inputs = {node.name: node for node in placeholders(net.graph)}
    take_inputs(net.graph, {path: inputs[name] for name, path in paths.items()})
    buffers = {path: _tensor(net, path) for path in reads_below(net.graph, STORE)}
    specs = _renamed(signature.input_specs, placeholders(net.graph))
    place = sum(spec.kind != InputKind.USER_INPUT for spec in specs)
    made = _new_inputs(net.graph, place, buffers)
    specs[place:place] = [
        InputSpec(InputKind.BUFFER, TensorArgument(name=node.name), path, persistent=False)
        for path, node in made.items()
    ]
    take_inputs(net.graph, made)
    returned = net.graph.output_node().args[0]
    assert isinstance(returned, (list, tuple))
    outputs = _renamed(signature.output_specs, returned)
    root = fx.GraphModule(program.graph_module, net.graph)
    root.meta.update(program.graph_module.meta)
    return ExportedProgram(
        root=root,
        graph=root.graph,
        graph_signature=ExportGraphSignature(specs, outputs),
        state_dict=program.state_dict,
        range_constraints=dict(program.range_constraints),
        module_call_graph=copy.deepcopy(program.module_call_graph),
        example_inputs=program.example_inputs,
        constants={**program.constants, **buffers},
        verifiers=program.verifiers,
    )


def _renamed(specs: Iterable[Any], nodes: Iterable[Any]) -> list[Any]:
    """Specs with the names that their nodes have now."""
    return [
        replace(spec, arg=replace(spec.arg, name=node.name)) if isinstance(node, fx.Node) else spec
        for spec, node in zip(specs, nodes, strict=True)
    ]


def _tensor(module: Any, path: str) -> Tensor:
    for part in path.split("."):
        module = getattr(module, part)
    assert isinstance(module, Tensor)
    return module


def _new_inputs(graph: fx.Graph, place: int, buffers: dict[str, Tensor]) -> dict[str, fx.Node]:
    """Placeholders for buffers, from the given place on, as torch.export would have made them."""
    found = placeholders(graph)
    mode = detect_fake_mode([node.meta.get("val") for node in found])
    following = found[place] if place < len(found) else found[-1].next
    made = {}
    with graph.inserting_before(following):
        for path, buffer in buffers.items():
            name = "b_" + path.replace(".", "_").lower()
            made[path] = node = graph.placeholder(name)
            if mode is not None:
                with mode:
                    scalar = torch.empty((), dtype=buffer.dtype, device=buffer.device)
                    node.meta["val"] = scalar.expand(buffer.shape)
    return made
