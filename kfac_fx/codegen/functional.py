"""A function of tensors, with automatic differentiation inside, as one functional graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, fx
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from kfac_fx.errors import KFACError
from kfac_fx.torch_internals.dispatch_modes import enable_python_dispatcher
from kfac_fx.torch_internals.distributions import arguments_unchecked
from kfac_fx.torch_internals.pytree import tree_leaves

Argument: TypeAlias = Any
"""An argument of an operator: a tensor or a node, a number, a list or a dtype."""


class NotFunctionalError(Exception):
    """The function cannot be one graph; the text says why."""


def traced(
    function: Callable[..., Sequence[Tensor]], arguments: Sequence[Tensor]
) -> fx.GraphModule:
    """Return the ATen graph of a function from tensors to tensors, for the arguments' shapes.

    Nothing in it mutates, and dead values are dropped. It is traced twice: the first time records
    the backward passes inside, the second one replaces what mutates.

    Args:
        function: has no other inputs, and no outputs that it does not return.
        arguments: tensors of the shapes, dtypes and devices that the graph is for; their values do
            not matter.

    Raises:
        NotFunctionalError: the code depends on the tensors' values, or has no graph.
    """
    with functional_errors(), enable_python_dispatcher():
        module = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*arguments)
        pure = functionalize(module, remove="mutations")
        with no_autocast():  # its casts are in the graph
            module = make_fx(pure, tracing_mode="fake", _allow_non_fake_inputs=True)(*arguments)
    # Random operators count as impure, but one that nobody reads draws for nobody.
    module.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    module.recompile()
    return module


def drop_copies(module: fx.GraphModule, count: int) -> list[bool]:
    """Drop those of the last ``count`` outputs that copy an argument; return which stay.

    A pass returns the buffers that it may change; most stay as they are, and a copy of each would
    cost as much as a small layer.
    """
    output = module.graph.output_node()
    values = tree_leaves(output.args[0])
    start = len(values) - count
    stay = [not _is_copy(value) for value in values[start:]]
    kept = [value for value, wanted in zip(values[start:], stay, strict=True) if wanted]
    output.args = ([*values[:start], *kept],)
    module.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    module.recompile()
    return stay


def _is_copy(node: fx.Node) -> bool:
    copies = (torch.ops.aten.clone.default, torch.ops.aten.view.default)
    while node.target in copies:
        node = node.args[0]  # type: ignore[assignment]
    return node.op == "placeholder"


@contextmanager
def functional_errors() -> Iterator[None]:
    """Turn what goes wrong inside into a NotFunctionalError, but for errors of the library's own.

    Distributions do not check their arguments meanwhile: a check reads values, which have none.
    """
    with arguments_unchecked():
        try:
            yield
        except KFACError:
            raise
        except Exception as error:  # whatever the user's code or a kernel without a fake raises
            first = (str(error).strip() or repr(error)).splitlines()[0]
            raise NotFunctionalError(f"{type(error).__name__}: {first}") from error


@contextmanager
def no_autocast() -> Iterator[None]:
    """Let operators inside run in the precision of what they are given."""
    # Most passes are under none, and entering the contexts costs as much as several operators.
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    if not kinds:
        yield
        return
    with ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


# Random numbers.


class _Like(NamedTuple):
    """A tensor whose values a random operator does not read, only its shape."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def empty(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class Lifted:
    """A random operator that was taken out of a graph; a call draws what it would have drawn."""

    target: Callable[..., Argument]
    args: tuple[Argument, ...]
    kwargs: dict[str, Argument]

    def __call__(self) -> Tensor:
        args = [a.empty() if isinstance(a, _Like) else a for a in self.args]
        found = self.target(*args, **self.kwargs)
        result: Tensor = found[1] if self.target is _DROPOUT else found
        return result


_ATEN = torch.ops.aten
_DROPOUT = _ATEN.native_dropout.default
_LIFTABLE = {
    packet
    for name in (
        "bernoulli",
        "uniform",
        "normal_functional",
        "exponential",
        "native_dropout",
        "rand",
        "randn",
        "randint",
        "randperm",
        "rand_like",
        "randn_like",
        "randint_like",
    )
    if (packet := getattr(_ATEN, name, None)) is not None
}
"""Operators whose random numbers do not depend on the values of their tensor argument."""


def is_random(
    target: fx.node.Target, args: Sequence[Argument], kwargs: Mapping[str, Argument]
) -> bool:
    """Return whether a call of an operator reads a random stream.

    Attention has the tag of those that do; without dropout it draws nothing.
    """
    if torch.Tag.nondeterministic_seeded not in getattr(target, "tags", ()):
        return False
    schema: Argument = getattr(target, "_schema", None)
    for place, argument in enumerate(schema.arguments):
        if argument.name == "dropout_p":
            given = args[place] if place < len(args) else kwargs.get("dropout_p", 0.0)
            return bool(given != 0.0)
    return True


def random_nodes(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes whose operator reads a random stream."""
    return [node for node in graph.nodes if is_random(node.target, node.args, node.kwargs)]


def lift_random(module: fx.GraphModule, count: int) -> list[Lifted]:
    """Make the first ``count`` random operators arguments, before those that there are.

    A compiled graph draws from a stream of its own. With the noise as arguments it is drawn
    outside, so that a compiled pass draws what the same pass would draw uncompiled.

    Args:
        module: changed in place.
        count: random operators of the forward; those after it belong to the statistics.

    Returns:
        what draws the noise, in the order of the new arguments.

    Raises:
        NotFunctionalError: one of them depends on values, or there are fewer.
    """
    nodes = random_nodes(module.graph)
    if len(nodes) < count:
        raise NotFunctionalError("random operators of the forward are not in the graph")
    first = next(iter(module.graph.nodes))
    lifted = []
    for index, node in enumerate(nodes[:count]):
        lifted.append(_lifted(node))
        with module.graph.inserting_before(first):
            noise = module.graph.placeholder(f"noise_{index}")
        noise.meta["val"] = node.meta["val"][1] if node.target is _DROPOUT else node.meta["val"]
        _replace_by_noise(module.graph, node, noise)
    module.graph.lint()
    module.recompile()
    return lifted


def _lifted(node: fx.Node) -> Lifted:
    packet = getattr(node.target, "overloadpacket", None)
    # bernoulli without a p draws by its argument's values; so do overloads that take tensors.
    overload = getattr(node.target, "_overloadname", None)
    by_value = overload in ("Tensor", "Tensor_float", "float_Tensor", "Tensor_Tensor")
    by_value |= node.target is _ATEN.bernoulli.default
    if isinstance(node.target, str) or packet not in _LIFTABLE or by_value:
        raise NotFunctionalError(f"{node.target} draws by the values of a tensor")

    def plain(argument: fx.Node) -> _Like:
        value = argument.meta["val"]
        return _Like(tuple(value.shape), tuple(value.stride()), value.dtype, value.device)

    args = fx.map_arg(node.args, plain)
    return Lifted(node.target, tuple(args), dict(fx.map_arg(node.kwargs, plain)))


def _replace_by_noise(graph: fx.Graph, node: fx.Node, noise: fx.Node) -> None:
    """Replace a random operator by its noise; dropout by its input times its mask, scaled."""
    if node.target is not _DROPOUT:
        node.replace_all_uses_with(noise)
        graph.erase_node(node)
        return
    x, p = node.args[0], node.args[1]
    assert isinstance(x, fx.Node) and isinstance(p, float)
    for user in list(node.users):  # its two outputs, taken apart
        with graph.inserting_before(user):
            masked = graph.call_function(_ATEN.mul.Tensor, (x, noise))
            scaled = graph.call_function(_ATEN.mul.Tensor, (masked, 1 / (1 - p) if p < 1 else 0.0))
        masked.meta["val"] = scaled.meta["val"] = x.meta["val"]
        user.replace_all_uses_with(noise if user.args[1] == 1 else scaled)
        graph.erase_node(user)
    graph.erase_node(node)


# A part that runs once, and a part that runs for every value of one argument.


class Parts(NamedTuple):
    """A graph in two.

    Attributes:
        once: the arguments but for the last -> its outputs, then what the other part needs of it.
        each: what it needs, then the last argument -> its outputs.
        places: for every output of the whole, whether it is of ``each``, and its place there.
    """

    once: fx.GraphModule
    each: fx.GraphModule
    places: tuple[tuple[bool, int], ...]


def split_at_last(module: fx.GraphModule) -> Parts:
    """Cut a graph into what depends on its last argument and what does not.

    The exact Fisher runs one backward a column of a square root: the forward need not run again.
    """
    nodes = list(module.graph.nodes)
    dependent: set[fx.Node] = {[node for node in nodes if node.op == "placeholder"][-1]}
    for node in nodes:
        if node.op != "output" and not dependent.isdisjoint(node.all_input_nodes):
            dependent.add(node)
    outputs = tree_leaves(module.graph.output_node().args[0])
    free = [node for node in outputs if node not in dependent]
    tied = [node for node in outputs if node in dependent]
    inputs = (given for node in nodes if node in dependent for given in node.all_input_nodes)
    # In order and each once: what the dependent part needs of the other.
    handed = list(dict.fromkeys(given for given in inputs if given not in dependent))
    once, each = fx.Graph(), fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if node.op != "output" and node not in dependent:
            copies[node] = once.node_copy(node, copies.__getitem__)
    once.output(tuple(copies[node] for node in (*free, *handed)))
    inside = {node: each.placeholder(node.name) for node in handed}
    for node in nodes:
        if node in dependent:
            inside[node] = each.node_copy(node, inside.__getitem__)
    each.output(tuple(inside[node] for node in tied))
    places = tuple(
        (True, tied.index(node)) if node in dependent else (False, free.index(node))
        for node in outputs
    )
    return Parts(fx.GraphModule(module, once), fx.GraphModule(module, each), places)
