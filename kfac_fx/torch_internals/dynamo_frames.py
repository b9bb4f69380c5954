"""Ask Dynamo which Python frame it compiles, where a graph's inputs come from, and for backends.

Why: Dynamo runs one graph for all modules that look alike, and compiles one frame several times;
statistics belong to a frame and to the tensors that a run gets. No public way: a backend is given a
graph and example inputs, without the frame or the source of an input; and ``torch.compiler`` lists
the names of backends but does not look one up, and has no break with a message. Seen on torch 2.11,
2.13 and 2.14.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._guards import CompileContext

Compiler = Callable[..., Any]
"""A backend: from a graph and example inputs to what runs."""

DONATED_BUFFER_ADVICE = "set torch._functorch.config.donated_buffer = False before compiling"
"""What a user can do whose compiled backward pass must run twice; ``torch.compile`` has no option
for it."""


def frame_being_compiled() -> int | None:
    """Return the number of the frame being compiled, the same for all its recompilations."""
    # The whole id also counts recompilations; with it, two forms of one frame (two batch sizes)
    # would look like two parts of the model.
    compile_id = CompileContext.current_compile_id()
    return None if compile_id is None else compile_id.frame_id


def input_source(node: fx.Node) -> str:
    """Return where Dynamo took an input from, as a Python expression; "" where it does not say."""
    # "" and no error: an input whose source is not known is taken for data, not for a parameter.
    argument = node.meta.get("grapharg")
    return str(getattr(getattr(argument, "source", None), "name", ""))


def find_backend(name: str) -> Compiler:
    """Return the function of a backend of torch.compile.

    Raises:
        torch._dynamo.exc.InvalidBackend: no backend has that name.
    """
    # Imported when it is used: torch._dynamo takes about a second to import.
    from torch._dynamo import lookup_backend

    found: Compiler = lookup_backend(name)
    return found


def break_graph(reason: str) -> None:
    """Let torch.compile, which runs this, go on in another graph; with fullgraph=True it stops.

    Args:
        reason: what its error says then.
    """
    torch._dynamo.graph_break(msg=reason)
