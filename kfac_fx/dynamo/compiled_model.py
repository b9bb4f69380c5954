"""A model under torch.compile: all its captured graphs as one, and taps in each of them.

Dynamo cuts a model into graphs at what it cannot trace, and may run one graph for several layers.
Blocks are those of the model: its graphs are copied side by side into one graph that is analysed
and never run, and the taps that follow go into a second form of each captured graph.
"""

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
    Group,
    Value,
    bindings_of,
    call_for_new_bindings,
    sizes_from_inputs,
)
from kfac_fx.dynamo.open_attention import OpenAttention
from kfac_fx.errors import KFACError, ObservationError
from kfac_fx.ir.curvature_graph import CurvatureBlock, CurvatureGraph
from kfac_fx.ops.net_buffers import STORE
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

_compiled_models: weakref.WeakKeyDictionary[nn.Module, CompiledModel]
_compiled_models = weakref.WeakKeyDictionary()


def recorded_module(net: Any) -> Any:
    """Return the module that owns the factor buffers of a network.

    That is what torch.compile wraps, or a module that is made of the graphs of a compiled model.

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
    # A new one each time: the model may have run in more graphs since. The earlier one, and the
    # Preconditioner that holds its buffers, give up the graphs to the new one.
    _compiled_models[inner] = CompiledModel(inner, bindings)
    return _compiled_models[inner].net


class _Part:
    """One binding's graph, with names of nodes that no other graph has.

    Args:
        binding: a graph with the tensors of ``model``.
        model: the model that was compiled.

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
        InlineCalls()(self.module)
        OpenAttention()(self.module)
        # A use is known by the name of its node, so names must differ between graphs.
        for node in self.module.graph.nodes:
            node._rename(f"g{binding.serial}_{node.name}")
        self.inputs = {path: inputs[name].name for name, path in self.paths.items()}

    @property
    def nodes(self) -> set[str]:
        """Return the names of its nodes."""
        return {node.name for node in self.module.graph.nodes}

    def copy_into(self, graph: fx.Graph, constants: dict[str, Value]) -> None:
        """Append its nodes, but for the output, to another graph.

        Args:
            graph: gets the nodes under the names that they have here.
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
            # Constants of a captured graph are called alike in every graph.
            elif node.op == "get_attr" and node.target not in model_paths:
                made.target = f"_g{self.binding.serial}_{str(node.target).replace('.', '_')}"
                constants[made.target] = _attribute(self.module, str(node.target))


def _attribute(module: Value, path: str) -> Value:
    """Return a member of a module by its path."""
    for part in path.split("."):
        module = getattr(module, part)
    return module


class CompiledModel:
    """A model that runs in several captured graphs, seen as one.

    Args:
        model: what torch.compile wraps; it is held weakly.
        bindings: its graphs so far, in the order of their first run.

    Attributes:
        net: the model's members and the factor buffers, with the curvature graph in its meta; its
            graph, all captured ones side by side, is the ground of the analysis and is not run.

    Raises:
        KFACError: no graph has run with gradients.
    """

    def __init__(self, model: nn.Module, bindings: Sequence[Binding]) -> None:
        self._model = weakref.ref(model)
        self._parts: dict[Group, _Part] = {}
        # Of a frame that was compiled several times (another size, another dtype) one graph stands
        # for all in the analysis: their uses are the same.
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
        """Return the model with one graph for all parts, and what the analyses find in it."""
        graph, constants = fx.Graph(), dict[str, Value]()
        for part in parts:
            part.copy_into(graph, constants)
        graph.output(())
        net = captured_module(model, graph, None, constants)
        once = all(part.binding.in_model_itself(part.paths) for part in parts)
        # Code of a submodule may run any number of times in a pass, so its positions are counted.
        if not once:
            log.info("code of submodules is compiled for itself: its runs are counted, uncoupled")
        PassManager(analyses(self._settings.options, route="dynamo", counted=not once))(net)
        set_forward(net, _refuse)
        return net

    def insert_taps(self, binding: Binding) -> None:
        """Put taps into a graph that runs with the model's tensors for the first time.

        Args:
            binding: any graph and tensors; those of other models are left alone.
        """
        model = self._model()
        if model is None or not binding.graph.with_gradients or not binding.names(model):
            return
        part = self._parts.get(binding.group)
        curvature = self.net.curvature
        found = curvature
        # A graph that came later is analysed together with all others, since its uses may belong to
        # blocks that are known.
        if part is None or part.binding is not binding:
            part = _Part(binding, model)
            parts = self._parts | {binding.group: part}
            found = self._analysed(model, list(parts.values())).curvature
        module = self._instrumented(part, found)
        binding.record_with(_Recorded(binding.graph, module))
        if self._settings.on_graph is not None:
            self._settings.on_graph(module)

    def _instrumented(self, part: _Part, found: CurvatureGraph) -> fx.GraphModule:
        """Return a part's module with taps, and with the model's tensors as inputs again.

        Args:
            part: the graph to put taps into.
            found: the blocks that the uses of all graphs make now. The buffers are those of the
                first analysis, so a use that would need others is left out.
        """
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


def _refuse(self: nn.Module, *args: Value, **kwargs: Value) -> Value:
    """Stand in for ``forward``: the graph of all parts is no function of the model's inputs."""
    raise ObservationError(
        "a model compiled with kfac_fx.backend records its own forward passes, not others: call "
        f"observe(outputs, targets) with fisher='empirical', or {DONATED_BUFFER_ADVICE}, or use "
        "torch.compile on kfac_fx.transform(model)"
    )


class _Recorded:
    """Run the form with taps while its buffers ask for statistics, else the compiled graph.

    Args:
        graph: what Dynamo captured.
        module: the same with taps.
    """

    def __init__(self, graph: CompiledGraph, module: fx.GraphModule) -> None:
        self._plain = graph.compiled
        read = reads_below(module.graph, STORE)
        self._factors: list[Tensor] = [_attribute(module, path) for path in read]
        # "eager" runs graphs as they are, for debugging: so does the form with taps.
        inner = graph.settings.inner
        self._with_taps: Callable[..., Value] = module
        if inner != "eager":
            # An open size stays open in the second form, or it would be compiled anew for each.
            dynamic = True if graph.is_dynamic else None
            self._with_taps = torch.compile(module, backend=inner, fullgraph=True, dynamic=dynamic)

    def __call__(self, *inputs: Value) -> Value:
        """Run one of the two forms."""
        on = torch.is_grad_enabled() and recording(self._factors)
        return (self._with_taps if on else self._plain)(*inputs)
