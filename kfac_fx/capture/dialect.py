"""One vocabulary over torch-level and ATen-level targets.

A row names an operation once and lists its targets with the order of their arguments, so rules
ask for "linear" or "matmul" and never for a function, a method or an overload.
"""

from __future__ import annotations

import builtins
import operator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import fx

aten = torch.ops.aten

Argument = Any
"""An argument of a call: a node, a number, a dtype or a setting, a nesting of those, or None."""

Target = Any
"""What a node calls: a function, an overload of an operator, or the name of a method."""

Default = TypeVar("Default")

_OVERLOAD = type(aten.mm.default)
_PACKET = type(aten.mm)


class Row(NamedTuple):
    """A canonical operation and the names of a target's arguments.

    Attributes:
        operation: the word that rules ask for, the same for all targets that do it.
        arguments: names in the order of the target's parameters; one that starts with a star takes
            all arguments that remain.
    """

    operation: str
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Call:
    """An operation of the vocabulary with its arguments by name.

    Attributes:
        operation: the word of the vocabulary.
        node: the call in the graph.
        arguments: those that were given, by the names of the vocabulary.
    """

    operation: str
    node: fx.Node
    arguments: dict[str, Argument]

    @property
    def aten(self) -> bool:
        """Tell whether the target is an ATen operator rather than a function of torch's surface."""
        return isinstance(self.node.target, _OVERLOAD)

    def get(self, name: str, default: Argument = None) -> Argument:
        """Return the argument, or the default where it was not given."""
        return self.arguments.get(name, default)


FUNCTIONS: dict[Target, Row] = {}
"""Rows by function, by overload, and by qualified name for operators that may not be there."""

METHODS: dict[str, Row] = {}
"""Rows by the name of a method of tensors."""


def _add(operation: str, arguments: str, *targets: Target) -> None:
    """Give targets a row; ``arguments`` are names separated by spaces."""
    row = Row(operation, tuple(arguments.split()))
    for target in targets:
        _table(target)[target] = row


def _table(target: Target) -> dict[Target, Row]:
    """Return the table that holds a target; an operator's qualified name has colons in it."""
    return METHODS if isinstance(target, str) and "::" not in target else FUNCTIONS


_add("linear", "input weight bias", F.linear, aten.linear.default)
_add(
    "matmul",
    "input other",
    torch.matmul,
    operator.matmul,
    "matmul",
    "__matmul__",
    aten.matmul.default,
    torch.mm,
    "mm",
    aten.mm.default,
    torch.mv,
    "mv",
    aten.mv.default,
    torch.bmm,
    "bmm",
    aten.bmm.default,
)
_add("addmm", "bias input other", torch.addmm, "addmm", aten.addmm.default)
_add("baddbmm", "bias input other", torch.baddbmm, "baddbmm", aten.baddbmm.default)
_add("einsum", "equation *operands", torch.einsum, torch.functional.einsum, aten.einsum.default)

_CONVOLUTION = "input weight bias stride padding dilation groups"
for _dims in (1, 2, 3):
    _overloads = getattr(aten, f"conv{_dims}d")
    _functions = (getattr(F, f"conv{_dims}d"), getattr(torch, f"conv{_dims}d"))
    _add(f"conv{_dims}d", _CONVOLUTION, *_functions, _overloads.default, _overloads.padding)

_add(
    "embedding",
    "input weight padding_idx max_norm norm_type scale_grad_by_freq sparse",
    F.embedding,
)
# The functional form takes the indices first, torch's and ATen's operators take the table first.
_add(
    "embedding",
    "weight input padding_idx scale_grad_by_freq sparse",
    torch.embedding,
    aten.embedding.default,
)
_BAGS = "scale_grad_by_freq mode sparse per_sample_weights include_last_offset padding_idx"
_add("embedding_bag", f"input weight offsets max_norm norm_type {_BAGS}", F.embedding_bag)
_add(
    "embedding_bag_tuple",  # several results, of which the first is the bags' sums or means
    f"weight input offsets {_BAGS}",
    torch.embedding_bag,
    aten.embedding_bag.default,
    aten.embedding_bag.padding_idx,
)
_add("index", "weight indices", aten.index.Tensor)
_TRANSPOSED = "input weight bias stride padding output_padding groups dilation"
for _dims in (1, 2, 3):
    _name = f"conv_transpose{_dims}d"
    # ATen names the overload of two and three dimensions after its first argument.
    _overload = getattr(aten, _name).default if _dims == 1 else getattr(aten, _name).input
    _add(_name, _TRANSPOSED, getattr(F, _name), getattr(torch, _name), _overload)

_add(
    "layer_norm",
    "input normalized_shape weight bias eps",
    F.layer_norm,
    torch.layer_norm,
    aten.layer_norm.default,
)
_add(
    "rms_norm",
    "input normalized_shape weight eps",
    F.rms_norm,
    torch.rms_norm,
    aten.rms_norm.default,
)
_add(
    "group_norm",
    "input num_groups weight bias eps",
    F.group_norm,
    torch.group_norm,
    aten.group_norm.default,
)
_add(
    "batch_norm",
    "input running_mean running_var weight bias training momentum eps",
    F.batch_norm,
)
_add(
    "batch_norm",
    "input weight bias running_mean running_var training momentum eps cudnn_enabled",
    torch.batch_norm,
    aten.batch_norm.default,
)
_add(
    "instance_norm",
    "input running_mean running_var weight bias training momentum eps",
    F.instance_norm,
)
_add(
    "instance_norm",
    "input weight bias running_mean running_var training momentum eps cudnn_enabled",
    torch.instance_norm,
    aten.instance_norm.default,
)

_SEQUENCE = "hx params has_biases num_layers dropout train bidirectional"
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
PACKED_ROWS: dict[str, Row] = {}
"""By the name of a recurrent operation, its form for packed sequences."""
for _name in _RECURRENT:
    # A packed sequence has other arguments and no batch dimension, so it has words of its own.
    _words = f"input batch_sizes {_SEQUENCE}"
    PACKED_ROWS[_name] = Row(f"packed_{_name}", tuple(_words.split()))
    _targets = getattr(aten, _name).input, getattr(torch, _name)
    _add(_name, f"input {_SEQUENCE} batch_first", *_targets)
    _add(f"packed_{_name}", _words, getattr(aten, _name).data)
    _cell = getattr(aten, f"{_name}_cell").default
    _targets = _cell, getattr(torch, f"{_name}_cell")
    _add(f"{_name}_cell", "input hx w_ih w_hh b_ih b_hh", *_targets)

# Views of a whole tensor: what a parameter may pass through on its way to a use.
_add("t", "input", torch.t, "t", aten.t.default)
_add("attribute", "input name", builtins.getattr)
_add("numpy_T", "input", aten.numpy_T.default)
_add("mT", "input", aten.mT.default)
_add(
    "transpose",
    "input dim0 dim1",
    torch.transpose,
    "transpose",
    torch.swapaxes,
    "swapaxes",
    aten.transpose.int,
)
_add("permute", "input *dims", "permute")
_add("permute", "input dims", torch.permute, aten.permute.default)
_add("reshape", "input *shape", "view", "reshape")
_add("reshape", "input shape", torch.reshape, aten.view.default, aten.reshape.default)
_add("flatten", "input start_dim end_dim", torch.flatten, "flatten", aten.flatten.using_ints)
_add("narrow", "input dim start length", torch.narrow, "narrow", aten.narrow.default)
_add("slice", "input dim start end step", aten.slice.Tensor)
_add("select", "input dim index", torch.select, "select", aten.select.int)
_add("getitem", "input index", operator.getitem, "__getitem__")
_add("chunk", "input chunks dim", torch.chunk, "chunk", aten.chunk.default)
_add("split", "input sizes dim", torch.split, "split", torch.functional.split, aten.split.Tensor)
_add("split", "input sizes dim", aten.split.sizes, aten.split_with_sizes.default)
_add("unbind", "input dim", torch.unbind, "unbind", aten.unbind.int)
_add("unsqueeze", "input dim", torch.unsqueeze, "unsqueeze", aten.unsqueeze.default)
_add("squeeze", "input dim", torch.squeeze, "squeeze", aten.squeeze.dim)
_add(
    "cast",
    "input",
    "to",
    "type",
    "float",
    "double",
    "half",
    "bfloat16",
    "type_as",
    "contiguous",
    torch.clone,
    "clone",
    "cuda",
    "cpu",
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten.contiguous.default,
    aten.clone.default,
    aten._to_copy.default,
    aten.alias.default,
)

_add("add", "input other", operator.add, operator.iadd, torch.add, "add", "add_", "__add__")
_add("add", "input other", aten.add.Tensor, aten.add_.Tensor)
_add("sub", "input other", operator.sub, operator.isub, torch.sub, "sub", "sub_", aten.sub.Tensor)
_add("mul", "input other", operator.mul, operator.imul, torch.mul, "mul", "mul_", "__mul__")
_add("mul", "input other", aten.mul.Tensor, aten.mul_.Tensor)
_add("div", "input other", operator.truediv, operator.itruediv, torch.div, "div", aten.div.Tensor)
_add("addcmul", "input tensor1 tensor2", torch.addcmul, "addcmul", aten.addcmul.default)
_add("expand", "input *shape", "expand")
_add("expand", "input shape", aten.expand.default)
_add("expand", "input other", "expand_as", aten.expand_as.default)
_add("rsub", "input other", torch.rsub, aten.rsub.Scalar)
_add("neg", "input", operator.neg, torch.neg, "neg", aten.neg.default)
_add("repeat", "input *shape", "repeat", aten.repeat.default)


def add_operation(target: Target, words: str) -> Row | None:
    """Teach the vocabulary a target: its operation and the names of its arguments, in order.

    Args:
        target: a function, an operator or its qualified name ("aten::mm"), or a method's name.
        words: "operation argument argument ...".

    Returns:
        What the target stood for before, for ``remove_operation``; None if it was unknown.
    """
    operation, _, arguments = words.partition(" ")
    before = _table(target).get(target)
    _add(operation, arguments, target)
    return before


def remove_operation(target: Target, before: Row | None) -> None:
    """Undo ``add_operation``.

    Args:
        target: what the vocabulary was taught.
        before: what ``add_operation`` returned.
    """
    if before is None:
        _table(target).pop(target, None)
    else:
        _table(target)[target] = before


# Reading a shape carries no data from the input to the result. Without this set, everything that
# is made in the batch's size (masks, positions) would count as data, and a learned table that is
# cut to the length of the input would have a use at the cut.
SHAPE_READERS: frozenset[Target] = frozenset(
    {"size", "dim", "numel", "stride", "new_zeros", "new_ones", "new_empty", "new_full"}
    | {aten.sym_size.int, aten.sym_numel.default, torch.zeros_like, torch.ones_like}
    | {aten._assert_tensor_metadata.default, torch._assert}
    | {torch.empty_like, aten.zeros_like.default, aten.ones_like.default}
)
LIKE_READERS: frozenset[Target] = frozenset(
    {"reshape_as", "view_as", "expand_as", "type_as", aten.expand_as.default, aten.view_as.default}
    | {aten.type_as.default, aten.reshape_as.default}
)
"""Take only the shape or the type of their second tensor."""


def reads_shape_of(node: fx.Node, value: fx.Node) -> bool:
    """Tell whether a node takes no more than the shape or type from ``value``."""
    return node.target in LIKE_READERS and value is not node.args[0] and value in node.args


_ALIASES = {
    "self": "input",
    "tensor": "input",
    "mat1": "input",
    "batch1": "input",
    "mat_a": "input",
    "mat2": "other",
    "batch2": "other",
    "vec": "other",
    "mat_b": "weight",
    "size": "shape",
    "offs": "offsets",
    "use_input_stats": "training",
}
"""Names that single targets give their arguments -> names of the vocabulary."""


def bind(row: Row, args: tuple[Argument, ...], kwargs: dict[str, Argument]) -> dict[str, Argument]:
    """Return the arguments of a call by the names of the vocabulary.

    Args:
        row: that of the call's target.
        args: positional arguments; a starred name takes those that remain, as one sequence or each
            for itself (``x.view(2, 3)`` and ``x.view((2, 3))``).
        kwargs: keyword arguments, by the target's own names.
    """
    bound: dict[str, Argument] = {}
    for index, name in enumerate(row.arguments):
        if name.startswith("*"):
            rest = args[index:]
            if len(rest) == 1 and isinstance(rest[0], (list, tuple)):
                rest = tuple(rest[0])
            bound[name[1:]] = tuple(rest)
        elif index < len(args):
            bound[name] = args[index]
    aliases = dict(_ALIASES)
    # Two families use names of the vocabulary in another sense: what ATen's embedding calls
    # "indices" is its input, and torch.addmm's "input" is what is added to the product.
    if row.operation.startswith("embedding"):
        aliases["indices"] = "input"
    if row.operation in ("addmm", "baddbmm") and "input" in kwargs:
        aliases["input"] = "bias"
    bound.update({aliases.get(name, name): value for name, value in kwargs.items()})
    return bound


def row_of(op: str, target: Target) -> Row | None:
    """Return the row of a node's target, None where the vocabulary has none.

    Args:
        op: the node's kind of call, as fx names it.
        target: the node's target.
    """
    if op == "call_method":
        return METHODS.get(target)
    if op != "call_function" or not _hashable(target):
        return None
    if isinstance(target, _PACKET) and target not in FUNCTIONS:
        return _row_of_packet(target)
    schema = getattr(target, "_schema", None)
    return FUNCTIONS.get(target) or FUNCTIONS.get(getattr(schema, "name", None))


def row_of_node(node: fx.Node) -> Row | None:
    """Return the row of a node, None where the vocabulary has none.

    Args:
        node: a call; where a function of torch's has overloads, its arguments tell which it is.
    """
    row = row_of(node.op, node.target)
    if row is None or row.operation not in _RECURRENT or len(node.args) < len(row.arguments):
        return row
    # torch.lstm is one function for padded and for packed sequences. The packed form has the sizes
    # of its steps in the second place, and so the weights in the fourth.
    weights = node.args[row.arguments.index("has_biases")]
    return PACKED_ROWS[row.operation] if isinstance(weights, (list, tuple)) else row


def _row_of_packet(packet: Target) -> Row | None:
    """Return the row of an operator whose overload is chosen by the arguments of each call.

    Dynamo puts such operators into graphs: from torch 2.14 on ``weight.T`` is ``aten.numpy_T`` of
    no overload. The row is taken where all overloads that the vocabulary knows have the same one.
    """
    known = {getattr(packet, name) for name in packet.overloads()} & FUNCTIONS.keys()
    rows = {FUNCTIONS[overload] for overload in known}
    return rows.pop() if len(rows) == 1 else None


def operation_name(node: fx.Node) -> str:
    """Return the bare name of what a node calls: "exp" for torch.exp, x.exp, aten.exp.default."""
    if node.op == "call_module":
        return str(node.target)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.split(".")[0].strip("_")


def _hashable(target: Target) -> bool:
    """Tell whether a target can be looked up; bound methods of unhashable objects cannot."""
    try:
        hash(target)
    except TypeError:
        return False
    return True
