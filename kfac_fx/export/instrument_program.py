"""Put taps into an ExportedProgram: the passes run on its graph, factor buffers become inputs.

A program takes every parameter and buffer as an input of its graph, and a signature says which is
which. The passes want members that are read, so inputs are read, and taken again afterwards.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputSpec,
    TensorArgument,
)

from kfac_fx.capture.captured_module import captured_module
from kfac_fx.capture.dialect import Argument
from kfac_fx.ops.net_buffers import STORE
from kfac_fx.passes.graph_inputs import placeholders, read_members, reads_below, take_inputs
from kfac_fx.passes.kfac_transform import KFACTransform
from kfac_fx.torch_internals.fake_tensors import detect_fake_mode


def instrument_program(
    program: ExportedProgram, transform: KFACTransform | None = None
) -> ExportedProgram:
    """Return the program with taps; it can be saved, and loaded where ``kfac_fx`` is imported.

    ``program.module()`` of the result is what ``Preconditioner`` takes. Parameters are shared with
    the program given, which stays as it is; the mode is that in which it was exported.

    Args:
        program: at ATen level, of torch.export; it is not changed.
        transform: what to run on its graph; ``KFACTransform()`` by default.

    Raises:
        KFACError: as ``transform`` does.
    """
    transform = transform or KFACTransform(route="export")
    graph = copy.deepcopy(program.graph)
    signature = program.graph_signature
    paths = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    # The passes run on a module that owns the members; the program's graph itself takes inputs.
    net = captured_module(program.module(check_guards=False), graph, None)
    read_members(net.graph, paths)
    transform(net)
    inputs = {node.name: node for node in placeholders(net.graph)}
    take_inputs(net.graph, {path: inputs[name] for name, path in paths.items()})
    buffers = {path: _tensor(net, path) for path in reads_below(net.graph, STORE)}
    # The new inputs stand after all parameters and buffers and before the user's own: the order
    # that torch.export keeps and its verifier checks.
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


Spec = TypeVar("Spec", InputSpec, OutputSpec)


def _renamed(specs: Iterable[Spec], nodes: Iterable[Argument]) -> list[Spec]:
    """Return specs with the names that their nodes have now; others stay as they are."""
    return [
        replace(spec, arg=_named(spec.arg, node.name)) if isinstance(node, fx.Node) else spec
        for spec, node in zip(specs, nodes, strict=True)
    ]


def _named(argument: Argument, name: str) -> Argument:
    """Return the argument of a spec with another name; its class is one of several of torch's."""
    return replace(argument, name=name)


def _tensor(module: Argument, path: str) -> Tensor:
    """Return a tensor of a module by its path."""
    for part in path.split("."):
        module = getattr(module, part)
    assert isinstance(module, Tensor)
    return module


def _new_inputs(graph: fx.Graph, place: int, buffers: dict[str, Tensor]) -> dict[str, fx.Node]:
    """Insert placeholders for buffers, as torch.export would have made them.

    Args:
        graph: is changed in place.
        place: number of the input before which they are inserted.
        buffers: the buffers by path in the module.

    Returns:
        Path -> placeholder.
    """
    found = placeholders(graph)
    # A program's verifier wants a value for every input, made by the mode of its graph.
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
