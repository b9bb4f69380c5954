"""Capture by torch.fx.symbolic_trace: no inputs needed, torch.nn modules stay whole."""

from __future__ import annotations

import inspect
import operator
import types
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields, is_dataclass
from typing import Any, NoReturn

import torch
from torch import fx, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from kfac_fx.capture.autograd_calls import FunctionCall
from kfac_fx.capture.dialect import row_of
from kfac_fx.capture.identities import identities_heard
from kfac_fx.capture.in_place import update_of, written_in_place
from kfac_fx.capture.input_forms import fixed_arguments
from kfac_fx.capture.layer_calls import has_parameters, translate
from kfac_fx.capture.match_patterns import functions_of, patterns_heard
from kfac_fx.capture.mode_regions import GradMode, Regions
from kfac_fx.capture.object_states import version
from kfac_fx.capture.packed_calls import kept_whole
from kfac_fx.capture.parameter_paths import ancestors
from kfac_fx.capture.proxies import WatchedMember, WatchedProxy
from kfac_fx.capture.remade import Remade, makes_itself
from kfac_fx.capture.types_answered import types_answered
from kfac_fx.capture.undisturbed import undisturbed
from kfac_fx.capture.user_lines import NOWHERE, running_line, user_line
from kfac_fx.capture.value_kinds import ExpectKind, Kind, expect_value, kind_of_call
from kfac_fx.capture.watching import watched
from kfac_fx.errors import CaptureError
from kfac_fx.torch_internals.modes import Modes
from kfac_fx.torch_internals.operators import runs_nested_graph
from kfac_fx.torch_internals.parametrizations import is_untraceable, is_weight_norm

Value = Any
"""What fx hands to a tracer's hooks: a proxy, a tensor, or any argument of the user's."""


class WatchingTracer(fx.Tracer):
    """fx's tracer, which records what fx forgets and refuses what it would get wrong.

    Parametrizations, named outputs and buffers are followed; gradient and autocast regions,
    in-place operators, random numbers and custom autograd functions are nodes.

    Args:
        given: classes of the example inputs by the name of the argument.
        constants: those of earlier traces of the model, by their names in the graphs; this one's
            are added.
        held: names of the tensors that the model holds and that are no members, by identity.

    Attributes:
        regions: where the model switches modes.
        read: the names of those whose values the graph has, since the code computes with them.
        missed: attributes that the code has asked tensors for, and that these do not have.
    """

    record_stack_traces = True

    def __init__(
        self,
        given: Mapping[str, type],
        constants: dict[str, torch.Tensor],
        held: Mapping[int, str] = types.MappingProxyType({}),
    ) -> None:
        # Code that branches on the shape of a weight takes its branch while it is traced.
        super().__init__(param_shapes_constant=True)
        self.regions = Regions(self._region_node, self.refuse)
        self.read: set[str] = set()
        self.missed: set[str] = set()
        self._held = held
        self._given = given
        self._constants = constants
        self._refused: list[str] = []
        self._members: dict[int, str] = {}
        self._cached: dict[int, WatchedMember] = {}
        self._constant_nodes: dict[int, tuple[fx.Node, torch.Tensor, int]] = {}
        self._kinds: dict[fx.Node, Kind] = {}
        self._assumed: dict[fx.Node, type] = {}
        self._modes = Modes()
        self._trained: dict[nn.Module, bool] = {}

    def trace(self, root: nn.Module, concrete_args: dict[str, Value] | None = None) -> fx.Graph:  # type: ignore[override]
        """Return the graph of a module.

        Raises:
            CaptureError: it does what no graph can follow, also where its own code hid the error.
        """
        named = [*root.named_parameters(), *root.named_buffers()]
        self._members = {id(tensor): name for name, tensor in named}
        self._modules = dict(root.named_modules(remove_duplicate=False))
        self._modes = Modes()
        self._trained = {module: module.training for module in root.modules()}
        functions = functions_of(root)
        with ExitStack() as stack:
            patterns = stack.enter_context(patterns_heard(functions))
            stack.enter_context(watched(self))
            stack.enter_context(kept_whole(self, root))
            stack.enter_context(types_answered(functions))
            stack.enter_context(identities_heard(functions, self))
            graph = super().trace(root, concrete_args)
        if patterns:
            raise CaptureError(
                f"{next(iter(patterns))}: a `match` asks for a class or a length, which a symbolic "
                "value does not have"
            )
        if self._refused:
            raise CaptureError(f"{self._refused[0]} (the code caught the error)")
        self._finish(graph)
        return graph

    def refuse(self, reason: str) -> NoReturn:
        """Stop the trace; it fails too where the user's code catches the error.

        Raises:
            CaptureError: always.
        """
        self._refused.append(f"{running_line()}: {reason}")
        raise CaptureError(reason)

    # What Python asks of proxies.

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return WatchedProxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        self.refuse("symbolically traced variables cannot be used as inputs to control flow")

    def iter(self, obj: fx.Proxy) -> Iterator[fx.Proxy]:
        self.refuse("a symbolic value is iterated over, and its length is not known")

    def keys(self, obj: fx.Proxy) -> fx.Proxy:
        self.refuse("the keys of a symbolic value are asked for")

    def known(self, value: Value) -> Kind:
        """Return the class of a value where it is certain without an assumption."""
        if not isinstance(value, fx.Node):
            return type(value)
        if value not in self._kinds:
            if value.op == "placeholder":
                self._kinds[value] = self._given.get(str(value.target))
            else:
                self._kinds[value] = kind_of_call(value, self.known, self._modules)
        return self._kinds[value]

    def kind(self, node: fx.Node) -> Kind:
        """Return the class of a value, None where it is not known.

        An input without an example is taken for a tensor; the graph then checks that it is one.
        """
        for source in ancestors(node):
            if source.op == "placeholder" and not str(source.target).startswith("*"):
                known = self.known(source)
                default = source.args[0] if source.args else None
                plain = type(default) if isinstance(default, (int, float)) else torch.Tensor
                self._assumed[source] = known or plain
                if known is None:
                    self._kinds = {source: plain}  # what was asked before knew less
        return self.known(node)

    # Nodes.

    def create_node(self, kind: str, *args: Value, **kwargs: Value) -> fx.Node:
        if kind not in ("placeholder", "get_attr"):
            self.regions.before_node()
            changed = Modes().difference(self._modes) if kind != "output" else None
            if changed is not None:
                self.refuse(f"{changed} is set in the forward, which no graph records")
        return super().create_node(kind, *args, **kwargs)

    def call(self, func: Value, args: tuple[Value, ...], kwargs: dict[str, Value]) -> fx.Proxy:
        """Return the proxy of a call of a torch function, as fx spells it."""
        if torch.overrides.is_tensor_method_or_property(func):
            return self.create_proxy("call_method", func.__name__, args, kwargs)
        return self.create_proxy("call_function", func, args, kwargs)

    def create_arg(self, a: Value) -> Value:
        """Return an argument of a node; its class stays, or it is refused."""
        kind = type(a)
        if issubclass(kind, fx.Proxy):
            return a.node
        if issubclass(kind, torch.Tensor):
            return self._tensor_node(a)
        if issubclass(kind, dict) and kind is not dict:
            return self._mapping_node(a)
        plain = kind in (list, tuple, torch.Size) or hasattr(a, "_fields")
        if issubclass(kind, (list, tuple)) and not plain:
            self.refuse(f"a container of class {kind.__name__} would become a plain one")
        if is_dataclass(a) and not isinstance(a, type):
            self._check_fields(a)
            held = [f.name for f in fields(a) if hasattr(a, f.name)]
            return self._remade(kind, held, [getattr(a, name) for name in held])
        if hasattr(a, "_fields") and makes_itself(kind):
            if getattr(a, "__dict__", None):
                self.refuse(f"attributes that are no fields are set on a {kind.__name__}")
            return self._remade(kind, a._fields, a)
        return super().create_arg(a)

    def _remade(self, kind: type, names: Sequence[str], items: Iterable[Value]) -> fx.Node:
        """Return a node that makes a record of the same class."""
        held = tuple(self.create_arg(item) for item in items)
        return self.create_node("call_function", Remade(kind, tuple(names)), held, {})

    def reads(self, tensor: torch.Tensor) -> None:
        """Take note of a tensor whose values are computed with while the graph is made."""
        if id(tensor) in self._held:
            self.read.add(self._held[id(tensor)])

    def is_member(self, tensor: torch.Tensor) -> bool:
        """Tell whether a tensor is a parameter or buffer of the model."""
        return id(tensor) in self._members

    def member(self, tensor: torch.Tensor) -> WatchedMember:
        """Return the proxy of a parameter or buffer of the model."""
        if id(tensor) not in self._cached:
            node = self.create_node("get_attr", self._members[id(tensor)], (), {})
            self._cached[id(tensor)] = WatchedMember(self, node, tensor)
        return self._cached[id(tensor)]

    def getattr(self, attr: str, attr_val: Value, parameter_proxy_cache: dict[str, Value]) -> Value:
        """Make nodes of parameters and buffers: updates would else run now and never again."""
        tensor = isinstance(attr_val, torch.Tensor)
        return self.member(attr_val) if tensor and self.is_member(attr_val) else attr_val

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Look into a weight's parametrization, unless it tells modes and gradients apart."""
        # A layer that the graph calls has the mode of the moment; the forward may put it back.
        if m.training is not self._trained.get(m, m.training):
            self.refuse(f"the forward changes the mode of {module_qualified_name}")
        if isinstance(m, torch.jit.ScriptModule):
            return True  # its code is no Python: it is kept, so that its parameters have a use
        # fx would keep a parametrized nn.Linear whole, as it is a class of torch.nn; its weight is
        # then computed out of sight. Some parametrizations cannot be traced and stay whole.
        if is_parametrized(m):
            found = m.parametrizations.modules()  # type: ignore[union-attr]
            return any(map(is_untraceable, found))
        if isinstance(m, ParametrizationList) or is_weight_norm(m):
            return False
        return super().is_leaf_module(m, module_qualified_name)

    def _region_node(self, function: Value, args: tuple[Value, ...]) -> fx.Node:
        return self.create_node("call_function", function, args, {})

    def _tensor_node(self, tensor: torch.Tensor) -> fx.Node:
        """Return the node that reads a real tensor."""
        if self.is_member(tensor):
            return self.member(tensor).node
        if tensor.requires_grad:
            self.refuse("a tensor that requires gradients is used, which no module holds")
        if id(tensor) not in self._constant_nodes:
            name = self.tensor_attrs.get(tensor)
            if name is None:
                name = self._name_of(tensor)
                self._constants[name] = tensor
            node = self.create_node("get_attr", name, (), {})
            self._constant_nodes[id(tensor)] = node, tensor, version(tensor)
        return self._constant_nodes[id(tensor)][0]

    def _name_of(self, constant: torch.Tensor) -> str:
        """Return the name of a constant, that of an equal one in the graph of the other mode."""
        number = 0
        while True:
            name = f"_tensor_constant{number}"
            held = self._constants.get(name)
            if held is not None and same_constant(held, constant):
                return name
            if held is None and not hasattr(self.root, name):
                return name
            number += 1

    def updates(self, node: fx.Node, tensor: torch.Tensor | None) -> bool:
        """Tell whether a node returns a parameter or buffer that it has changed in place."""
        if tensor is None:
            return False
        source = update_of(node)
        return source is not node and source is self.member(tensor).node

    def _mapping_node(self, mapping: Value) -> fx.Node:
        """Return a node that makes a mapping of the same class."""
        keys = set(mapping)
        if is_dataclass(mapping):
            # The class of a model's named outputs: a key that is no field has no place in it.
            self._check_fields(mapping)
            names = [f.name for f in fields(mapping) if f.init]
            if not keys <= set(names):
                self.refuse(f"keys that are no fields are added to a {type(mapping).__name__}")
            held = {name: self.create_arg(getattr(mapping, name)) for name in names}
            return self.create_node("call_function", type(mapping), (), held)
        if type(mapping) is not OrderedDict or vars(mapping):
            self.refuse(f"a mapping of class {type(mapping).__name__} would become a plain one")
        pairs = [self.create_arg(pair) for pair in mapping.items()]
        return self.create_node("call_function", OrderedDict, (pairs,), {})

    def _check_fields(self, value: Value) -> None:
        """Refuse a data class with attributes that are no fields: a new one would lack them."""
        extra = set(getattr(value, "__dict__", ())) - {f.name for f in fields(value)}
        if extra:
            self.refuse(f"attributes that are no fields are set on a {type(value).__name__}")

    def _finish(self, graph: fx.Graph) -> None:
        """Give every run constants of its own, and let the graph check what was assumed."""
        for node, tensor, made in self._constant_nodes.values():
            if version(tensor) != made:
                raise CaptureError(f"a constant is changed in place after its use ({node.name})")
            if node.target in self._constants and written_in_place(node):
                with graph.inserting_after(node):
                    copied = graph.call_method("clone", (node,))
                node.replace_all_uses_with(copied)
                copied.args = (node,)
        _replace_asserts(graph)
        last = [node for node in graph.nodes if node.op == "placeholder"][-1:]
        for source, kind in self._assumed.items():
            with graph.inserting_after(last[0]):
                graph.call_function(ExpectKind(kind), (source, str(source.target)))


def _replace_asserts(graph: fx.Graph) -> None:
    """Let inputs that the trace fixed be checked with an error of this library."""
    for node in list(graph.nodes):
        text = node.args[1] if node.op == "call_function" and len(node.args) > 1 else None
        if not isinstance(text, str) or "has been specialized to have value" not in text:
            continue
        checked: Value = node.args[0]
        value: Value = None
        if node.target is torch._assert:
            if checked.target is not operator.eq or checked.args[0].op != "placeholder":
                continue
            checked, value = checked.args
        if checked.op == "placeholder":
            name = str(checked.target).rpartition("_")[0]
            with graph.inserting_before(node):
                graph.call_function(expect_value, (checked, value, name))
            graph.erase_node(node)


def same_constant(one: Value, other: Value) -> bool:
    """Tell whether two constants are one, so that the graphs of both modes can share it."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return one is other


def trace(
    model: nn.Module,
    given: Mapping[str, Value] = types.MappingProxyType({}),
    constants: dict[str, torch.Tensor] | None = None,
    read: set[str] | None = None,
    missed: set[str] | None = None,
) -> fx.Graph:
    """Return the graph of ``model`` in its present mode.

    The model is afterwards as it was, also after an error.

    Args:
        model: its ``forward`` is run once, on symbolic values.
        given: example inputs by the name of their argument; the other arguments that default to
            None, a flag or a name are fixed at their default, since Python may branch on them.
        constants: gets the tensors that the graph reads and the model has not, by name; None where
            the caller has no use for them.
        read: gets the names of tensors that are no members and whose values the graph has.
        missed: gets the names of attributes that tensors were asked for and do not have.

    Raises:
        CaptureError: symbolic values cannot follow the code; names the user's line.
    """
    fixed = fixed_arguments(inspect.signature(model.forward), given)
    kinds = {name: type(value) for name, value in given.items()}
    with undisturbed(model) as before:
        held = {id(tensor): name for name, tensor in before.state.plain_tensors(model)}
        tracer = WatchingTracer(kinds, {} if constants is None else constants, held)
        try:
            graph = tracer.trace(model, fixed or None)
        except Exception as error:  # any code of the user's may run here
            line = user_line(error)
            told = isinstance(error, CaptureError) and line == NOWHERE  # it names the line itself
            raise CaptureError(f"{error}" if told else f"{line}: {error}") from error
        if found := before.state.changes():
            who = f"the forward of {type(model).__name__}"
            raise CaptureError(f"{who} {found[0]}, which a graph would not do again")
    if read is not None:
        read |= tracer.read
    if missed is not None:
        missed |= tracer.missed
    return graph


def opaque_calls(model: nn.Module, graph: fx.Graph) -> list[str]:
    """Return names of what reads parameters and no rule can look into.

    These are modules that the trace kept whole, nested graphs, and functions that were wrapped.

    Args:
        model: the captured model.
        graph: its capture.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, None] = {}
    mode = GradMode()
    # The order is that of the graph, and a module that is called twice is named once.
    for node in graph.nodes:
        mode.read(node)
        if mode.off:  # what has no derivative is no use, whoever looks into it
            continue
        path = str(node.target)
        if node.op == "call_module" and path in modules:
            if has_parameters(modules[path]) and translate(modules[path], path) is None:
                found[path] = None
        elif (runs_nested_graph(node.target) or _is_foreign(node)) and any(
            _is_parameter(model, argument) for argument in node.all_input_nodes
        ):
            found[node.name] = None
    return list(found)


def _is_foreign(node: fx.Node) -> bool:
    """Tell whether the node calls a Python function that was wrapped to stay whole."""
    target = node.target
    if isinstance(target, FunctionCall):
        return False  # its backward is its own, so no route sees more of it
    if not isinstance(target, types.FunctionType) or row_of(node.op, target) is not None:
        return False
    return not target.__module__.startswith("torch.")


def _is_parameter(model: nn.Module, node: fx.Node) -> bool:
    """Tell whether the node reads a parameter of the model."""
    if node.op != "get_attr":
        return False
    owner, _, name = str(node.target).rpartition(".")
    module = dict(model.named_modules(remove_duplicate=False)).get(owner)
    return module is not None and name in module._parameters
