"""Capture by torch.export with example inputs: follows Python code that tracing cannot."""

from __future__ import annotations

import inspect
import logging
import operator
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from kfac_fx.capture.captured_module import CapturedModule, captured_module
from kfac_fx.capture.graph_modules import from_graph_module
from kfac_fx.capture.hooks import refuse_backward_hooks
from kfac_fx.capture.in_place import update_of, writes
from kfac_fx.capture.input_forms import ExportedInputs, Guards
from kfac_fx.capture.run_state import RunState
from kfac_fx.capture.symbolic_trace import same_constant
from kfac_fx.capture.train_and_eval import capture_both, in_evaluation, mode_reads
from kfac_fx.capture.undisturbed import undisturbed
from kfac_fx.capture.user_lines import user_line
from kfac_fx.capture.watching import refusals_noted
from kfac_fx.errors import CaptureError
from kfac_fx.torch_internals.buffer_registration_hooks import no_hooks_left
from kfac_fx.torch_internals.fake_tensors import without_fake_cache
from kfac_fx.torch_internals.operators import may_share_memory
from kfac_fx.torch_internals.pytree import tree_leaves, tree_map_only

log = logging.getLogger("kfac_fx")
Value = Any
"""An input of the user's model, or what a module holds under a name."""

_GUARDS = "_guards_fn"
"""Name of the submodule in which torch.export keeps what it assumed of sizes."""

_ASKED = "kfac_fx_asked"
"""Key in an exported module's meta of what the code has asked."""

_BATCH_NORMS = frozenset({"batch_norm", "instance_norm"})
_RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})


class Asked(NamedTuple):
    """What the user's code has asked that an export takes for constants.

    Attributes:
        order: whether it was how tensors lie in memory.
        gradients: whether it was for gradients of parameters that have them already.
        values: names of tensors that are no members whose values it was.
        mode: whether it was for the flag ``training``; by dropout and batch norms does not count.
        layers: whether those layers of torch have asked.
    """

    order: bool
    gradients: bool
    values: frozenset[str]
    mode: bool
    layers: bool


class Exported(NamedTuple):
    """A model that was exported, and what that fixed.

    Attributes:
        module: the graphs, without a guard.
        inputs: what was fixed about the arguments.
        constants: whether the graphs hold tensors that the model lacks.
        read: names of tensors that are no members and whose values the graphs have.
        gradients: whether the code has asked for gradients of parameters.
        untraced: why there is no graph of the evaluation; "" where there is one.
    """

    module: CapturedModule
    inputs: ExportedInputs
    constants: bool
    read: frozenset[str]
    gradients: bool
    untraced: str


def from_export(model: nn.Module, args: tuple[Value, ...], kwargs: dict[str, Value]) -> Exported:
    """Return the model as torch.export sees it with the example inputs, in both modes.

    Args:
        model: is exported in training and in evaluation; its buffers and random state are put back.
        args: positional example inputs.
        kwargs: keyword example inputs.

    Raises:
        CaptureError: torch.export refuses the model; names the user's line and its reason.
    """
    refuse_backward_hooks(model, ())
    constants: dict[str, Value] = {}
    guards: dict[bool, Guards | None] = {}
    asked: list[Asked] = []
    graphs: list[fx.Graph] = []
    args, kwargs = doubled(args, kwargs)

    def graph_of(model: nn.Module) -> fx.Graph:
        if asked and not asked[0].mode:
            # An export takes as long as everything else together: dropout layers and batch norms do
            # not ask for another one, since all that they do with their flag is to hand it on.
            graph = in_evaluation(model, graphs[0]) if asked[0].layers else graphs[0]
            if graph is not None:
                guards[False] = guards[True]
                return graph
        # Each mode by itself: what the evaluation writes says nothing against the training's graph.
        with undisturbed(model) as before:
            module = exported(model, args, kwargs, before.state)
            if found := before.state.written():
                who = f"the forward of {type(model).__name__}"
                raise CaptureError(f"{who} {found[0]}, which a graph would not do again")
        guards[model.training] = _taken_guards(module)
        asked.append(module.meta[_ASKED])
        _lift_constants(model, module, constants)
        graphs.append(module.graph)
        return module.graph

    training, evaluation, untraced = capture_both(model, graph_of)
    module = captured_module(model, training, evaluation, constants)
    normed = any(_name(node) in _BATCH_NORMS for node in training.nodes)
    encoders = [module for module in model.modules() if isinstance(module, nn.TransformerEncoder)]
    inputs = ExportedInputs(
        inspect.signature(model.forward),
        (args, kwargs),
        guards,
        one_differs=normed,
        ordered=any(one.order for one in asked),
        packs=any(encoder.use_nested_tensor for encoder in encoders),
    )
    read = frozenset().union(*(one.values for one in asked))
    gradients = any(one.gradients for one in asked)
    return Exported(module, inputs, bool(constants), read, gradients, untraced)


def doubled(
    args: tuple[Value, ...], kwargs: dict[str, Value]
) -> tuple[tuple[Value, ...], dict[str, Value]]:
    """Return example inputs of one case as inputs of two, others as they are.

    torch.export takes a size of one for a constant, and the graph would serve no other batch.
    """
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    if not tensors or any(not t.dim() or t.shape[0] != 1 for t in tensors):
        return args, kwargs
    twice: tuple[tuple[Value, ...], dict[str, Value]] = tree_map_only(
        torch.Tensor,
        lambda t: torch.cat([t.detach(), t.detach()]).requires_grad_(t.requires_grad),
        (args, kwargs),
    )
    return twice


def _taken_guards(module: fx.GraphModule) -> Guards | None:
    """Take the call of torch's guards out of a graph, and return what it calls.

    In the graph they would be an opaque call for every pass, and raise an AssertionError.
    """
    for node in list(module.graph.nodes):
        if node.op == "call_module" and node.target == _GUARDS:
            module.graph.erase_node(node)
            guards: Guards = getattr(module, _GUARDS).forward
            return guards
    return None


def of_program(program: ExportedProgram) -> CapturedModule:
    """Return what an exported program runs; it shares the program's parameters.

    Its mode is that of the export: train() and eval() raise, as those of ``program.module()``.
    """
    model = program.module(check_guards=False)
    assert isinstance(model, fx.GraphModule)
    check_sizes(model.graph)
    free_layouts(model.graph)
    module = from_graph_module(model)
    module.__dict__.update({name: model.__dict__[name] for name in ("train", "eval")})
    return module


def exported(
    model: nn.Module, args: tuple[Value, ...], kwargs: dict[str, Value], state: RunState
) -> fx.GraphModule:
    """Return the model in its present mode, at ATen level; batch and length are open if possible.

    The first two dimensions of every input are tried, then the first alone. A dimension that the
    graph has fixed is checked when it runs: another size could be broadcast without a word.

    Args:
        model: is exported as it is.
        args: positional example inputs.
        kwargs: keyword example inputs.
        state: of the model as it is.

    Raises:
        CaptureError: torch.export refuses the model; names the user's line and its reason.
    """
    # An open length lets one transform serve all lengths; models that branch on it refuse, and an
    # open batch alone is tried then.
    try:
        module = _export(model, args, kwargs, state, dynamic=2)
    except CaptureError:
        raise  # a refusal does not depend on sizes
    except Exception as first:  # any code of the user's may run here
        log.info("export with a dynamic length: %s", first)
        try:
            module = _export(model, args, kwargs, state, dynamic=1)
        except CaptureError:
            raise
        except Exception as error:
            reason = str(error).strip().splitlines()
            raise CaptureError(f"{user_line(error)}: {reason[0] if reason else error!r}") from error
    check_sizes(module.graph)
    free_layouts(module.graph)
    return module


def free_layouts(graph: fx.Graph) -> None:
    """Let an exported graph take tensors whose memory is laid out otherwise than at the capture.

    A ``contiguous()`` that had nothing to do there is not in the graph, and the ``view`` after it
    would raise: of other inputs, or where attention runs by another kernel, as under forward mode.
    Where a view can be had, ``reshape`` returns it.

    Args:
        graph: is changed in place.
    """
    for node in graph.nodes:
        # A copy would miss what is written to the memory later.
        if node.target is torch.ops.aten.view.default and not _memory_is_written(node):
            node.target = torch.ops.aten.reshape.default


def _memory_is_written(view: fx.Node) -> bool:
    """Return whether an operator in place writes to the memory of a view."""
    root = view
    while _shares_memory(root) and isinstance(root.args[0], fx.Node):
        root = root.args[0]
    todo, seen = [root], {root}
    while todo:
        here = todo.pop()
        for user in here.users:
            if _shares_memory(user) and user.args[0] is here and user not in seen:
                if writes(user):
                    return True
                seen.add(user)
                todo.append(user)
    return False


def _shares_memory(node: fx.Node) -> bool:
    """Return whether what a node returns may have its first argument's memory."""
    return node.target is operator.getitem or may_share_memory(node.target)


def check_sizes(graph: fx.Graph) -> None:
    """Let an exported graph check its inputs' sizes, and neither dtypes nor copies on its way.

    The dtype checks, one after every cast, would count as uses of what they look at.

    Args:
        graph: is changed in place.
    """
    _expect_fixed_sizes(graph)
    for node in list(graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default or _copies_itself(node):
            graph.erase_node(node)


def _copies_itself(node: fx.Node) -> bool:
    """Tell whether a node copies to a tensor what calls in place have made of that tensor.

    torch.export ends a graph so where the code says ``self.count += 1``. The values stay, but
    autograd counts a write, and refuses the backward pass of what has read the tensor.
    """
    if node.target is not torch.ops.aten.copy_.default or node.users:
        return False
    target, source = node.args[:2]
    return isinstance(source, fx.Node) and source is not target and update_of(source) is target


def _export(
    model: nn.Module,
    args: tuple[Value, ...],
    kwargs: dict[str, Value],
    state: RunState,
    dynamic: int,
) -> fx.GraphModule:
    """Return the model exported with the first ``dynamic`` dimensions of the inputs left open."""
    shapes = torch.export.ShapesCollection()
    seen: set[int] = set()
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, torch.Tensor) and leaf.dim() and id(leaf) not in seen:
            seen.add(id(leaf))
            # A size of 1 is fixed in any case; asking for it draws a warning.
            open_dims = [dim for dim, size in enumerate(leaf.shape[:dynamic]) if size > 1]
            if open_dims:
                shapes[leaf] = dict.fromkeys(open_dims, torch.export.Dim.AUTO)
    # Not strict: the model's own Python runs on fake tensors, which follows more code than Dynamo.
    held = {id(tensor): name for name, tensor in state.plain_tensors(model)}
    # torch's cache of answers about fake tensors makes an open length slower, and changes no graph.
    cacheless = without_fake_cache()
    with no_hooks_left(), refusals_noted(held) as watch, mode_reads(model) as mode, cacheless:
        program = torch.export.export(
            model,
            args,
            kwargs,
            dynamic_shapes=shapes.dynamic_shapes(model, args, kwargs),
            strict=False,
        )
    module = program.module(check_guards=True)
    assert isinstance(module, fx.GraphModule)
    module.meta[_ASKED] = Asked(
        watch.asks_order, watch.asks_gradients, frozenset(watch.read), mode.any, mode.layers
    )
    return module


def expect_sizes(value: torch.Tensor | fx.Proxy, sizes: tuple[int, ...], name: str) -> None:
    """Refuse an input whose leading sizes are not those of the capture; graphs call this.

    Args:
        value: the input.
        sizes: those of its first dimensions; -1 stands for any.
        name: the name of the input, for the message.

    Raises:
        CaptureError: names the input and both shapes.
    """
    if isinstance(value, fx.Proxy):  # a tracer makes a graph of this one, which is to check it too
        value.tracer.create_proxy("call_function", expect_sizes, (value, sizes, name), {})
        return
    for dim, size in enumerate(sizes):
        if size != -1 and value.shape[dim] != size:
            raise CaptureError(
                f"input {name} has shape {tuple(value.shape)}, but dimension {dim} was fixed to "
                f"{size} by torch.export: transform the model with example inputs of this shape"
            )


def fixes_batch(graph: fx.Graph) -> bool:
    """Tell whether an exported graph takes the batch size of its example only.

    With recurrent layers the first dimension may be the steps, whose number torch.export fixes.
    """
    if any(_name(node) in _RECURRENT for node in graph.nodes):
        return False
    # A size of 1 says nothing, for every export fixes it.
    inputs = [_fixed_sizes(node) for node in graph.nodes if node.op == "placeholder"]
    first = [sizes[0] for sizes in inputs if sizes]
    return any(size > 1 for size in first) and all(size != -1 for size in first)


def _name(node: fx.Node) -> str:
    """Return the name of the operator that a node calls, without its overload."""
    return str(getattr(node.target, "__name__", "")).split(".")[0]


def _fixed_sizes(node: fx.Node) -> tuple[int, ...]:
    """Return the sizes of an input, -1 where they are open."""
    shape = getattr(node.meta.get("val"), "shape", ())
    known = (s.node.maybe_as_int() if isinstance(s, torch.SymInt) else s for s in shape)
    return tuple(-1 if size is None else size for size in known)


def _expect_fixed_sizes(graph: fx.Graph) -> None:
    """Let the graph check the first two sizes of its inputs that it has fixed.

    A size of 1 is fixed by every export, also of models that take others: it is let through.
    """
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for node in inputs:
        sizes = tuple(size if size > 1 else -1 for size in _fixed_sizes(node)[:2])
        if any(size != -1 for size in sizes):
            with graph.inserting_after(inputs[-1]):
                graph.call_function(expect_sizes, (node, sizes, node.name))


def _lift_constants(
    model: nn.Module, captured: fx.GraphModule, constants: dict[str, Value]
) -> None:
    """Move to ``constants`` what a capture owns and the model lacks, under names of its own.

    A constant of the same place and value in an earlier capture of the model is shared.
    """
    number = 0
    names: dict[str, str] = {}
    for node in captured.graph.nodes:
        path = str(node.target)
        if node.op != "get_attr" or _attribute(model, path) is not None:
            continue
        if path not in names:
            value = _attribute(captured, path)
            # The evaluation's capture numbers its constants anew; the same value gets the same
            # name, so that one graph can still stand for both modes.
            name = f"_constant_{number}"
            while name in constants and not same_constant(constants[name], value):
                name += "_"
            constants[name] = value
            names[path], number = name, number + 1
        node.target = names[path]


def _attribute(module: nn.Module, path: str) -> Value:
    """Return what a module has at a path, None where there is nothing."""
    value: Value = module
    for part in path.split("."):
        value = getattr(value, part, None)
    return value
