"""Taps in the graphs that torch.compile has captured of a model; their blocks are the model's."""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from kfac_fx.capture.captured_module import CapturedModule, captured_module
from kfac_fx.dynamo.captured_graphs import (
    Binding,
    CompiledGraph,
    bindings_of,
    call_for_new_bindings,
    sizes_from_inputs,
)
from kfac_fx.dynamo.open_attention import OpenAttention
from kfac_fx.errors import KFACError, ObservationError
from kfac_fx.ir.curvature_graph import CurvatureBlock, CurvatureGraph
from kfac_fx.ops import STORE
from kfac_fx.ops.tap import recording
from kfac_fx.passes.annotations import write_curvature
from kfac_fx.passes.base import META
from kfac_fx.passes.graph_inputs import placeholders, read_members, reads_below, take_inputs
from kfac_fx.passes.inline_calls import InlineCalls
from kfac_fx.passes.insert_taps import add_buffers, instrument
from kfac_fx.passes.kfac_transform import analyses
from kfac_fx.passes.manager import PassManager
from kfac_fx.torch_internals.dynamo_frames import DONATED_BUFFER_ADVICE
from kfac_fx.torch_internals.generated_forward import set_forward

log = logging.getLogger("kfac_fx")

_nets: weakref.WeakKeyDictionary[nn.Module, CompiledModel] = weakref.WeakKeyDictionary()


def recorded_module(net: Any) -> Any:
    """The module that owns the factor buffers: what torch.compile wraps, or what its graphs make.

    Args:
        net: what ``transform`` returned, that compiled, or any model that was compiled with the
            backend "kfac_fx" and has run.
    """
    inner = getattr(net, "_orig_mod", net)
    if not isinstance(inner, nn.Module) or isinstance(inner, fx.GraphModule):
        return inner
    bindings = bindings_of(inner)
    if not bindings:
        return inner
    _nets[inner] = CompiledModel(inner, bindings)
    return _nets[inner].net


class _Part:
    """One binding's graph, with names of nodes that no other graph has.

    Attributes:
        module: reads the model's tensors rather than getting them.
        paths: input -> name in the model.
        inputs: name in the model -> node.
    """

    def __init__(self, binding: Binding, model: nn.Module) -> None:
        graph = binding.graph
        self.binding = binding
        self.module = fx.GraphModule(graph.module, copy.deepcopy(graph.module.graph))
        self.paths = binding.names(model)
        inputs = dict(zip(graph.sources, placeholders(self.module.graph), strict=True))
        sizes_from_inputs(self.module.graph, graph.sources)
        paths = {inputs[name].name: path for name, path in self.paths.items()}
        read_members(self.module.graph, paths)
        for one in (InlineCalls(), OpenAttention()):
            one(self.module)
        for node in self.module.graph.nodes:
            node._rename(f"g{binding.serial}_{node.name}")
        self.inputs = {path: inputs[name].name for name, path in self.paths.items()}

    @property
    def nodes(self) -> set[str]:
        """Names of its nodes."""
        return {node.name for node in self.module.graph.nodes}

    def copy_into(self, graph: fx.Graph, constants: dict[str, Any]) -> None:
        """Appends its nodes, but for the output, to another graph.

        Args:
            constants: gets what the graph owns and the model lacks, under names of its own.
        """
        values: dict[fx.Node, fx.Node] = {}
        model_paths = set(self.paths.values())
        for node in self.module.graph.nodes:
            if node.op == "output":
                continue
            values[node] = made = graph.node_copy(node, values.__getitem__)
            if node.op == "placeholder":
                made.target = node.name
            elif node.op == "get_attr" and node.target not in model_paths:
                made.target = f"_g{self.binding.serial}_{str(node.target).replace('.', '_')}"
                constants[made.target] = _attribute(self.module, str(node.target))


def _attribute(module: Any, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part)
    return module


class CompiledModel:
    """A model that runs in several captured graphs, seen as one.

    Attributes:
        net: the model's members and the factor buffers, with the curvature graph in its meta; its
            graph, all captured ones side by side, is the ground of the analysis and is not run.
    """

    def __init__(self, model: nn.Module, bindings: Sequence[Binding]) -> None:
        self._model = weakref.ref(model)
        self._parts: dict[Any, _Part] = {}
        for binding in bindings:
            if binding.graph.with_gradients and binding.group not in self._parts:
                self._parts[binding.group] = _Part(binding, model)
        if not self._parts:
            raise KFACError(
                "the compiled model has only run without gradients: call it once with gradients "
                "enabled, so that the graphs of its training are known"
            )
        self._settings = bindings[0].graph.settings
        self.net = self._analysed(model, list(self._parts.values()))
        curvature = self.net.curvature
        for name in curvature.unused:
            log.warning("%s has no block: no compiled graph uses it", name)
        add_buffers(self.net, curvature)
        for binding in bindings:
            self.insert_taps(binding)
        call_for_new_bindings(self.insert_taps)

    def _analysed(self, model: nn.Module, parts: list[_Part]) -> CapturedModule:
        """The model with one graph for all parts, and what the analyses find in it."""
        graph, constants = fx.Graph(), dict[str, Any]()
        for part in parts:
            part.copy_into(graph, constants)
        graph.output(())
        net = captured_module(model, graph, None, constants)
        once = all(part.binding.in_model_itself(part.paths) for part in parts)
        if not once:
            log.info("code of submodules is compiled for itself: its runs are counted, uncoupled")
        PassManager(analyses(self._settings.options, route="dynamo", counted=not once))(net)
        set_forward(net, _refuse)
        return net

    def insert_taps(self, binding: Binding) -> None:
        """Puts taps into a graph that has run with the model's tensors."""
        model = self._model()
        if model is None or not binding.graph.with_gradients or not binding.names(model):
            return
        part = self._parts.get(binding.group)
        curvature = self.net.curvature
        found = curvature
        if part is None or part.binding is not binding:
            part = _Part(binding, model)
            parts = self._parts | {binding.group: part}
            found = self._analysed(model, list(parts.values())).curvature
        module = self._instrumented(part, found)
        binding.record_with(_Recorded(binding.graph, module))
        if self._settings.on_graph is not None:
            self._settings.on_graph(module)

    def _instrumented(self, part: _Part, found: CurvatureGraph) -> fx.GraphModule:
        """The part's module with taps, and with the model's tensors as inputs again."""
        curvature, nodes = self.net.curvature, part.nodes
        here: dict[str, CurvatureBlock] = {}
        for name, block in found.blocks.items():
            uses = tuple(use for use in block.uses if use.node in nodes)
            known = curvature.blocks.get(name)
            if uses and (known is None or known.factors != block.factors):
                log.warning(
                    "a graph that was compiled later uses %s in another way: not recorded there; a "
                    "new Preconditioner will know it",
                    ", ".join(block.parameters),
                )
            elif uses:
                here[name] = replace(block, uses=uses)
        graph = copy.deepcopy(part.module.graph)
        instrument(self.net, graph, here, curvature)
        inputs = {node.name: node for node in placeholders(graph)}
        take_inputs(graph, {path: inputs[name] for path, name in part.inputs.items()})
        part.module.add_module(STORE, self.net.get_submodule(STORE))
        module = fx.GraphModule(part.module, graph)
        module.meta[META] = curvature
        write_curvature(module, curvature)
        module.graph.lint()
        return module


def _refuse(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    raise ObservationError(
        "a model compiled with kfac_fx.backend records its own forward passes, not others: call "
        f"observe(outputs, targets) with fisher='empirical', or {DONATED_BUFFER_ADVICE}, or use "
        "torch.compile on kfac_fx.transform(model)"
    )


class _Recorded:
    """Runs the form with taps while its buffers ask for statistics, else the compiled graph."""

    def __init__(self, graph: CompiledGraph, module: fx.GraphModule) -> None:
        self._plain = graph.compiled
        read = reads_below(module.graph, STORE)
        self._factors: list[Tensor] = [_attribute(module, path) for path in read]
        inner = graph.settings.inner
        self._with_taps: Callable[..., Any] = module
        if inner != "eager":
            options: Any = {"fullgraph": True, "dynamic": True if graph.is_dynamic else None}
            self._with_taps = torch.compile(module, backend=inner, **options)

    def __call__(self, *inputs: Any) -> Any:
        on = torch.is_grad_enabled() and recording(self._factors)
        return (self._with_taps if on else self._plain)(*inputs)
