"""Capture a model in training and in evaluation, as one graph where that is possible.

A tracer follows ``if self.training`` once, and dropout's flag becomes a constant. Two captures show
what depends on the mode: where only flags differ, one graph reads them from the modules again. Code
that no graph can repeat (a cache that is filled in evaluation alone) costs the graph of that mode.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import fx, nn

from kfac_fx.capture.dialect import Argument
from kfac_fx.errors import CaptureError


class Graphs(NamedTuple):
    """The graphs of a model.

    Attributes:
        training: what it runs in training.
        evaluation: what it runs in evaluation; None where it is the same graph, or none.
        untraced: why there is no graph of the evaluation, in which the model's own code runs then;
            "" where there is one.
    """

    training: fx.Graph
    evaluation: fx.Graph | None
    untraced: str = ""


@contextmanager
def all_in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Within the context every submodule is in one mode; its own mode comes back afterwards."""
    before = {module: module.training for module in model.modules()}
    for module in before:
        module.training = training
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


class ModeReads:
    """Whether the flag ``training`` of any module was read.

    Attributes:
        any: whether it was, or could have been without being noticed; reads of torch's dropout
            layers and batch norms do not count.
        layers: whether these have read their own, which they hand on as a flag.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = False
        classes = {kind for module in model.modules() for kind in type(module).__mro__}
        own = any("training" in vars(kind) for kind in classes)
        self.any = own or any(isinstance(m, torch.jit.ScriptModule) for m in model.modules())


_TRACERS = tuple(str(Path(torch.__file__).parent / name) for name in ("fx", "export", "_export"))
"""Where torch reads the flag for itself, to copy it."""
_DROPOUT = nn.Dropout.forward.__code__.co_filename
_NORM = nn.BatchNorm1d.forward.__code__


@contextmanager
def mode_reads(model: nn.Module) -> Iterator[ModeReads]:
    """Note within the context whether code asks any module for its mode.

    Code that never asks does the same in both modes, and one capture serves both: of large models
    with open sizes each takes half a minute. Functions without a module (``F.dropout(x)``) have a
    flag of their own, which is the same in both modes too.

    Args:
        model: is going to be captured. Classes with a flag of their own count as asked.
    """
    found = ModeReads(model)
    if found.any:  # also of a capture within this one
        yield found
        return

    def read(module: nn.Module) -> bool:
        reader = sys._getframe(1).f_code.co_filename
        if reader == _DROPOUT or (reader == _NORM.co_filename and _is_norm(module)):
            found.layers = True
        else:
            found.any = found.any or not reader.startswith(_TRACERS)
        try:
            flag: bool = module.__dict__["training"]
        except KeyError:
            raise AttributeError("training") from None
        return flag

    def write(module: nn.Module, flag: bool) -> None:
        module.__dict__["training"] = flag

    # A property of the class comes before the entry of an instance, which stays where it is.
    nn.Module.training = property(read, write)  # type: ignore[assignment]
    try:
        yield found
    finally:
        del nn.Module.training


def in_evaluation(model: nn.Module, graph: fx.Graph) -> fx.Graph | None:
    """Return a copy of an exported graph of the training, as the export in evaluation would be.

    Args:
        model: its code has asked for no mode but in torch's dropout layers and batch norms.
        graph: what those layers call is a node of their own each, of which the flag is an argument.

    Returns:
        None where it is not certain which nodes are theirs.
    """
    owners = dict(model.named_modules(remove_duplicate=False))
    layers = [m for m in owners.values() if _is_dropout(m) or _is_norm(m)]
    # A hook of such a layer, or a forward of its own, could ask for noise that stays in evaluation.
    if any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in layers):
        return None
    # A norm without momentum computes with the number of batches in training.
    if any(_is_norm(m) and m.momentum is None for m in layers):
        return None
    copied = copy.deepcopy(graph)  # with the form of its outputs
    flipped = False
    for node in list(copied.nodes):
        stack = [*(node.meta.get("nn_module_stack") or {}).values()]
        owner = owners.get(stack[-1][0]) if stack else None
        if owner is None or owner not in layers or node.op != "call_function":
            continue
        flag = len(node.args) - 1
        if _is_norm(owner):
            if node.target is torch.ops.aten.add_.Tensor and not node.users:
                copied.erase_node(node)  # the number of batches
                continue
            # Without running averages a norm takes those of the batch in evaluation too.
            known = node.target is torch.ops.aten.batch_norm.default
            if not known or node.args[_AVERAGE] is None:
                continue
            flag = _AVERAGE + 2
        if node.args[flag : flag + 1] == (True,):
            node.update_arg(flag, False)
            flipped = True
    return copied if flipped else None


_AVERAGE = 3
"""The place of the running mean among a batch norm's arguments."""


def _is_dropout(module: nn.Module) -> bool:
    """Tell whether a module runs the code of one of torch's dropout layers."""
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and code.co_filename == _DROPOUT


def _is_norm(module: nn.Module) -> bool:
    """Tell whether a module runs the code of torch's batch norms, which SyncBatchNorm does not."""
    return getattr(type(module).forward, "__code__", None) is _NORM


def capture_both(model: nn.Module, capture: Callable[[nn.Module], fx.Graph]) -> Graphs:
    """Return one graph that follows train() and eval(), or one for each mode where they differ.

    Args:
        model: is captured twice, in training first.
        capture: makes the graph of the model in its present mode.

    Raises:
        CaptureError: the model cannot be captured in training.
    """
    with all_in_mode(model, True):
        training = capture(model)
    try:
        with all_in_mode(model, False):
            evaluation = capture(model)
    except CaptureError as error:
        # Blocks and statistics are those of the training. Without this, a table of attention biases
        # that is kept from one evaluation to the next would cost a vision model all of its graph.
        return Graphs(training, None, str(error))
    # Most models differ in the flags of dropout and of batch norm alone.
    flags = _differing_flags(training, evaluation)
    if flags is None:
        return Graphs(training, evaluation)
    for node, key in flags:
        _read_flag(training, node, key)
    return Graphs(training, None)


def _differing_flags(
    training: fx.Graph, evaluation: fx.Graph
) -> list[tuple[fx.Node, int | str]] | None:
    """Return the arguments that are True in training and False in evaluation, by node and key.

    None where the graphs differ in anything else, so that neither can stand for both.
    """
    if len(training.nodes) != len(evaluation.nodes):
        return None
    matching: dict[fx.Node, fx.Node] = {}
    flags: list[tuple[fx.Node, int | str]] = []
    for here, there in zip(training.nodes, evaluation.nodes, strict=True):
        matching[there] = here
        if (here.op, here.target) != (there.op, there.target):
            return None
        if len(here.args) != len(there.args) or here.kwargs.keys() != there.kwargs.keys():
            return None
        mapped = [fx.node.map_arg(arg, matching.__getitem__) for arg in there.args]
        named = {k: fx.node.map_arg(arg, matching.__getitem__) for k, arg in there.kwargs.items()}
        positional = enumerate(zip(here.args, mapped, strict=True))
        pairs: dict[int | str, tuple[Argument, Argument]] = dict(positional)
        pairs |= {key: (here.kwargs[key], named[key]) for key in here.kwargs}
        for key, (a, b) in pairs.items():
            if a is True and b is False:
                flags.append((here, key))
            elif type(a) is not type(b) or a != b:
                return None
    return flags


def _read_flag(graph: fx.Graph, node: fx.Node, key: int | str) -> None:
    """Replace a frozen flag by the ``training`` attribute of the module whose code made it.

    A submodule may be frozen in evaluation while the model trains, so the flag is the innermost
    module's own and not the model's.
    """
    stack = node.meta.get("nn_module_stack") or {}
    owners = [entry[0] for entry in stack.values()]
    owner = owners[-1] if owners else ""
    path = f"{owner}.training" if owner else "training"
    with graph.inserting_before(node):
        flag = graph.create_node("get_attr", path, name="training")
    if isinstance(key, int):
        node.update_arg(key, flag)
    else:
        node.update_kwarg(key, flag)
