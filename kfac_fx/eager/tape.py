"""Record the torch functions that a running model calls, one at a time, as an fx graph.

The graph is what symbolic tracing would have made of the path that this run takes. A call is added
to it before it runs, so that the rules can say where its taps go.
"""

from __future__ import annotations

import operator
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from kfac_fx.capture.graph_view import GraphView
from kfac_fx.eager.recordable_uses import CHOSEN
from kfac_fx.eager.torch_calls import (
    Function,
    Value,
    activation_checkpoint,
    function_transform,
    hidden_by,
    in_reentrant_checkpoint,
    is_composed,
    is_in_place,
    made_by,
    mapped,
    reads_property,
    renormed,
    spelled,
    tensors_of,
)
from kfac_fx.errors import CaptureError
from kfac_fx.passes.case_order import DTYPE, SIZES
from kfac_fx.passes.find_cases import GrowingCases
from kfac_fx.torch_internals.rebuilt_functions import without_override_question

if TYPE_CHECKING:
    from kfac_fx.eager.eager_taps import EagerTaps, Placement

_HERE = str(Path(__file__).parent.parent)


class Seen(torch.autograd.Function):
    """The identity on a parameter that goes into a recorded call.

    Its node in autograd's graph tells recorded uses from those that no torch function shows.
    """

    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g

    @classmethod
    def made(cls, node: Node) -> bool:
        """Tell whether a node of autograd's graph comes from this function."""
        return isinstance(node, cls._backward_cls)


class Tape(TorchFunctionMode):
    """Make every call on tensors a node of ``graph``, within the context.

    Parameters, buffers and other tensors that the model holds are ``get_attr`` nodes; tensors that
    come from elsewhere are placeholders, so they count as data.

    Args:
        model: the model that is about to run.
        taps: for the calls that read parameters; they record at once.
        mark: parameters pass through ``Seen``, and nodes get the user's line.

    Attributes:
        graph: grows as the model runs.
        view: reads it.
        touched: names of the parameters that any call has read.
    """

    def __init__(
        self, model: nn.Module, taps: EagerTaps | None = None, *, mark: bool = False
    ) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.view = GraphView(model, self.graph)
        self.touched: set[str] = set()
        self._taps = taps
        self._cases = GrowingCases(self.view)
        self._mark = mark
        self._parameters = {id(p): name for name, p in self.view.parameters.items()}
        self._constants = dict(_held_tensors(model))
        # Tensors are known by identity: while the tape lives, none of these may be freed and give
        # its address to another.
        self._alive = [*self.view.parameters.values(), *self._constants.values()]
        self._names = {id(t): name for name, t in self._constants.items()} | self._parameters
        self._nodes: Any = WeakIdKeyDictionary()
        self._inside: list[Function] = []

    def __torch_function__(
        self,
        func: Function,
        types: object,
        args: tuple[Value, ...] = (),
        kwargs: Mapping[str, Value] | None = None,
    ) -> Value:
        """Run a call and add it to the graph; torch calls this for every torch function."""
        kwargs = dict(kwargs or {})
        tensors = list(tensors_of((args, kwargs)))
        if not any(self._reads_parameter(t) for t in tensors):
            return self._bind(func(*args, **kwargs), func, args, kwargs)
        # Without gradients a parameter is used as a constant (a target network, a running norm):
        # no block, and no tap. A reentrant checkpoint looks the same and is not.
        if not torch.is_grad_enabled():
            if self._mark and in_reentrant_checkpoint():
                for name in self._read_by(tensors):
                    self.consume(name, activation_checkpoint)
            return self._bind(func(*args, **kwargs), func, args, kwargs, detached=True)
        # F.cross_entropy and its like are Python: what they call is recorded, not they themselves,
        # for the rules know the parts. The mode is off within this method, so it is entered anew.
        if is_composed(func) and func not in self._inside:
            # Some hand on to a part that asks for an override in their name (F.max_pool2d): the
            # second time such a function comes it is taken as it is.
            self._inside.append(func)
            try:
                with self:
                    return without_override_question(func)(*args, **kwargs)
            finally:
                self._inside.pop()
        # A derivative is asked for by the very tensors that the loss was made of, and is itself no
        # use of them: what made the loss is.
        if func in (torch.autograd.grad, torch.autograd.backward):
            return self._bind(func(*args, **kwargs), func, args, kwargs, detached=True)
        return self._use(func, args, kwargs, tensors)

    def node(self, tensor: Tensor, *, detached: bool = False) -> fx.Node:
        """Return the node of a tensor; one that no call made is read from the model or is an input.

        Args:
            tensor: any tensor of the run.
            detached: return another node for a parameter, one that is none.
        """
        found: fx.Node | None = self._nodes.get(tensor)
        if found is None:
            name = self._names.get(id(tensor))
            found = self.placeholder("data") if name is None else self._new("get_attr", name)
            self._nodes[tensor] = found
            found.meta.update({SIZES: tuple(tensor.shape), DTYPE: tensor.dtype})
        if id(tensor) in self._parameters:
            self.touched.add(self._parameters[id(tensor)])
        if detached and self.view.reference(found) is not None:
            return self._new("get_attr", "_detached")
        return found

    def placeholder(self, name: str) -> fx.Node:
        """Return a new input, in front of all other nodes."""
        with self.graph.inserting_before():
            return self._new("placeholder", name)

    def consume(self, name: str, by: Callable[[], None]) -> None:
        """Note a use of a parameter that no rule can look into.

        Args:
            name: the name of the parameter.
            by: stands for what uses it; its name is shown as the reason.
        """
        self._new("call_function", by, (self._new("get_attr", name),))

    # A call.

    def _use(
        self,
        func: Function,
        args: tuple[Value, ...],
        kwargs: dict[str, Value],
        tensors: list[Tensor],
    ) -> Value:
        """Run a call that reads parameters while gradients are on, with its taps.

        Args:
            func: the torch function.
            args: its positional arguments.
            kwargs: its keyword arguments.
            tensors: all tensors among them.
        """
        if any(tensor.is_nested for tensor in tensors):
            raise CaptureError(
                "a nested tensor meets parameters: its cases are of different sizes, and no tap "
                "records that. Pad it, or give a mask"
            )
        node = self._call(func, args, kwargs, detached=False)
        plans: Sequence[Placement] = ()
        if hidden := hidden_by():
            for name in self._names_read(node):
                self.consume(name, hidden)
        elif self._taps is not None:
            plans = self._taps.place(self.view, node, self._cases)
        values = {self.node(t).name: t for t in tensors}
        swap: dict[int, Tensor] = {}
        # Some taps stand on an input of the call (a scale that is multiplied with the data), others
        # on its output; an operator with slots runs instead of the call.
        for plan in plans:
            if plan.tap.consumer is not None:
                tapped = values[plan.tap.node]
                swap[id(tapped)] = plan.record(tapped, values)
        if self._mark and hidden is not function_transform and not reads_property(func):
            args, kwargs = renormed(func, args, kwargs)
            swap |= {id(t): Seen.apply(t) for t in tensors if id(t) in self._parameters}
        if swap:
            args, kwargs = mapped(lambda t: swap.get(id(t), t), (args, kwargs))
        if plans and plans[0].tap.slots and self._taps is not None:
            result = self._taps.instead(plans, values)
        else:
            result = func(*args, **kwargs)
        made = made_by(func, args, result)
        if not any(t.requires_grad for t in made):
            self._replace_by_detached(node)
        # A call that returns what the model holds (an in-place update of a buffer) makes no value.
        if all(id(t) in self._names for t in made):
            self.graph.erase_node(node)
            return result
        self._report(node, plans)
        for plan in plans:
            on_output = plan.tap.consumer is None and not plan.tap.slots
            if on_output and _differentiable(result):
                result = plan.record(result, values)
        self._results(made[0] if result is None else result, node)
        return result

    def _bind(
        self,
        result: Value,
        func: Function,
        args: tuple[Value, ...],
        kwargs: dict[str, Value],
        *,
        detached: bool = False,
    ) -> Value:
        """Add the node of a call that has run and reads no parameter with gradients.

        Args:
            result: what the call returned; it is handed on.
            func: the torch function.
            args: its positional arguments.
            kwargs: its keyword arguments.
            detached: whether parameters among them count as constants.
        """
        made = made_by(func, args, result)
        if not all(id(t) in self._names for t in made):
            node = self._call(func, args, kwargs, detached=detached)
            self._results(made[0] if result is None else result, node)
        return result

    def _results(self, result: Value, node: fx.Node) -> None:
        """Bind the tensors that a call returned to its node, or to nodes that take them out."""
        if isinstance(result, Tensor):
            if id(result) not in self._names:
                self._nodes[result] = node
                node.meta.update({SIZES: tuple(result.shape), DTYPE: result.dtype})
                self._written(result, node)
        elif isinstance(result, (tuple, list)):
            for index, item in enumerate(result):
                if isinstance(item, (Tensor, tuple, list)):
                    args = (node, index)
                    self._results(item, self._new("call_function", operator.getitem, args))

    def _written(self, tensor: Tensor, node: fx.Node) -> None:
        """Let what a view is of follow a write to it: ``batch[i].copy_(x[i])`` makes a batch."""
        base = tensor._base
        if base is None or not is_in_place(node.target) or id(base) in self._names:
            return
        known = self._nodes.get(base)
        if known is not None:
            self._nodes[base] = self._new("call_method", "__setitem__", (known, 0, node))

    def _report(self, node: fx.Node, plans: Sequence[Placement]) -> None:
        """Report parameters that a call uses, is no view of, and no tap records."""
        if self._taps is None or self.view.reference(node) is not None or self.view.is_split(node):
            return
        missed = self._names_read(node).difference(*(plan.parameters for plan in plans))
        if not self.view.depends_on_data(node):
            missed -= self._taps.computed  # recorded where what is computed here is used
        if missed:
            self._taps.missed(missed, node)

    # Nodes.

    def _call(
        self, func: Function, args: tuple[Value, ...], kwargs: dict[str, Value], *, detached: bool
    ) -> fx.Node:
        """Return a new node for a call."""
        op, target, args = spelled(func, args)
        chosen = self._chosen(target, args)
        args = args if chosen is None else (args[0], chosen)

        def argument(value: Value) -> Value:
            if isinstance(value, Tensor):
                return self.node(value, detached=detached)
            # fx takes plain values only; the rules read no others, so a text stands for them.
            return value if isinstance(value, _PLAIN) else repr(value)

        args, kwargs = mapped(argument, (args, kwargs), plain=True)
        node = self._new(op, target, args, kwargs)
        if chosen is not None:
            node.meta[CHOSEN] = True
        return node

    def _chosen(self, target: Function, args: tuple[Value, ...]) -> int | None:
        """Return which matrix the data choose, of a parameter that is a stack of them (experts)."""
        if target not in ("__getitem__", operator.getitem) or not isinstance(args[1], Tensor):
            return None
        stack, index = args
        # A mask or a vector of indices chooses several at once, which is the use of a table.
        if index.dim() or index.dtype in (torch.bool, torch.uint8):
            return None
        seen = self.view.reference(self.node(stack)) if self._reads_parameter(stack) else None
        return int(index) if seen is not None and len(seen.layout.shape) > 2 else None

    def _new(
        self,
        op: str,
        target: Function,
        args: tuple[Value, ...] = (),
        kwargs: dict[str, Value] | None = None,
    ) -> fx.Node:
        """Return a new node, which the view has read."""
        node = self.graph.create_node(op, target, tuple(args), kwargs or {})
        self.view.read(node)
        if self._mark and self._names_read(node):
            node.meta["stack_trace"] = _user_stack()
        return node

    def _names_read(self, node: fx.Node) -> set[str]:
        """Return names of the parameters that a node reads, whole or in pieces."""
        found = map(self.view.reference, node.all_input_nodes)
        return {reference.name for reference in found if reference is not None}

    def _replace_by_detached(self, node: fx.Node) -> None:
        """Let a node read constants in place of parameters: no derivative comes back to them.

        A comparison or a call of ``detach`` reads a parameter, and is no use of it.
        """
        for source in node.all_input_nodes:
            if self.view.reference(source) is not None:
                with self.graph.inserting_before(node):
                    node.replace_input_with(source, self._new("get_attr", "_detached"))
        self.view.read(node)

    def _read_by(self, tensors: Sequence[Tensor]) -> list[str]:
        """Return names of the parameters among tensors, each once."""
        found = (self.view.reference(self.node(t)) for t in tensors if self._reads_parameter(t))
        return list(dict.fromkeys(reference.name for reference in found if reference is not None))

    def _reads_parameter(self, tensor: Tensor) -> bool:
        """Tell whether a tensor is a parameter, or computed from some and from no data."""
        if id(tensor) in self._parameters:
            return True
        node = self._nodes.get(tensor)
        return node is not None and self.view.is_computed(node)


_NUMBERS: tuple[type, ...] = (int, float, complex, bool)
_SETTINGS: tuple[type, ...] = (torch.dtype, torch.device, torch.memory_format, torch.layout)
_PLAIN = (*_NUMBERS, *_SETTINGS, fx.Node, str, slice, type(None), type(Ellipsis))


def _differentiable(result: Value) -> bool:
    """Tell whether a result is one tensor with a place in autograd's graph."""
    return isinstance(result, Tensor) and result.requires_grad


def _held_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield buffers, and the tensors in plain attributes, of all modules, with a name each."""
    yield from model.named_buffers()
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            for index, leaf in enumerate(tensors_of(value) if key != "_buffers" else ()):
                if not isinstance(leaf, nn.Parameter):
                    yield f"{path}.{key}.{index}".strip("."), leaf


def compilers_off() -> AbstractContextManager[object]:
    """Return a context in which compiled parts of the model run as they are written.

    A compiled part is one opaque call; run as it is written, its torch functions are seen.
    """
    # Where torch._dynamo is not imported nothing is compiled, and importing it takes a second.
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


def _user_stack() -> str:
    """Return the stack as text, without the frames of this library."""
    frames = traceback.extract_stack()
    return "".join(traceback.format_list([f for f in frames if not f.filename.startswith(_HERE)]))
