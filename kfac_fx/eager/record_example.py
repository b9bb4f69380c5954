"""Record what a model does with its example inputs, as a graph that the passes can read."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import Node

from kfac_fx.capture.layer_calls import translate
from kfac_fx.capture.train_and_eval import all_in_mode
from kfac_fx.capture.undisturbed import fresh, tensors_in, undisturbed
from kfac_fx.capture.user_lines import user_line
from kfac_fx.eager.tape import Seen, Tape, compilers_off
from kfac_fx.eager.torch_calls import Value
from kfac_fx.errors import CaptureError

log = logging.getLogger("kfac_fx")


def record(model: nn.Module, args: tuple[Value, ...], kwargs: dict[str, Value]) -> fx.Graph:
    """Return what the model does with the example inputs in training, as a graph.

    Layers that these inputs do not reach are called at its beginning, so that they have uses too.

    Args:
        model: runs once; its buffers, modes and random state are put back.
        args: positional example inputs; they are copied, since a model may write to them.
        kwargs: keyword example inputs, likewise.

    Raises:
        CaptureError: the model fails; names the user's line.
    """
    tape = Tape(model, mark=True)
    args, kwargs = fresh((args, kwargs))
    with undisturbed(model, runs=True), all_in_mode(model, True), compilers_off():
        try:
            with tape:
                outputs = model(*args, **kwargs)
        except Exception as error:  # any code of the user's may run here
            raise CaptureError(f"{user_line(error)}: {error}") from error
    returned = list(tensors_in(outputs))
    # A parameter may reach the outputs through something that is no torch function. It must not
    # seem unused: the generic rule gives it the block that needs no tap.
    for name in _used_unseen(returned, tape):
        tape.consume(name, untraced_operation)
    hidden = _used_detached(returned, tape)
    if hidden:
        log.warning("a custom autograd.Function hides the uses of %s: no block", ", ".join(hidden))
    # An expert that the example inputs did not choose has a use all the same: it stands on an input
    # of its own and leads nowhere, so no edge begins or ends at it.
    for path in _unreached(model, tape.touched):
        tape.graph.call_module(path, (tape.placeholder("unreached"),))
    tape.graph.output(tuple(tape.node(tensor) for tensor in returned))
    return tape.graph


def untraced_operation() -> None:
    """Stand in a recorded graph for what is no torch function (an autograd.Function, say)."""


def _used_unseen(outputs: list[Tensor], tape: Tape) -> list[str]:
    """Return parameters with a path to the outputs that no recorded call begins."""
    names = {id(p): name for name, p in tape.view.parameters.items()}
    found: dict[str, None] = {}
    for node in _autograd_nodes(outputs):
        for following, _ in node.next_functions:
            name = names.get(id(getattr(following, "variable", None)))
            if name is not None and not Seen.made(node):
                found[name] = None
    return list(found)


def _autograd_nodes(outputs: list[Tensor]) -> Iterator[Node]:
    """Yield the nodes of the graph that backward would walk, each once."""
    # A stack and not a recursion: graphs of long sequences are deeper than Python's limit.
    todo = [t.grad_fn for t in outputs if t.grad_fn is not None]
    seen = set(todo)
    while todo:
        node = todo.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                todo.append(following)


def _used_detached(outputs: list[Tensor], tape: Tape) -> list[str]:
    """Return parameters without a recorded use that a custom autograd.Function may have used.

    Its forward runs without gradients; a reversible layer runs itself again in the backward.
    """
    functions = {type(node) for node in _autograd_nodes(outputs) if not Seen.made(node)}
    if not any(issubclass(one, torch.autograd.function.BackwardCFunction) for one in functions):
        return []
    return [name for name in sorted(tape.touched) if not tape.view.consumers(name)]


def _unreached(model: nn.Module, touched: set[str]) -> list[str]:
    """Return layers of torch.nn that could be used, had the inputs led to them."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [
        path
        for path, module in model.named_modules()
        if (own := {names[id(p)] for p in module.parameters()})
        and not own & touched
        and translate(module, path) is not None
    ]
