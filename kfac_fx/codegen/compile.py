"""Graphs as torch.compile runs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn


def compiled(
    module: fx.GraphModule, compile: bool | str, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """The module as one graph for the shapes that come, or itself.

    Args:
        compile: False, True for torch's default backend, or the name of a backend.
        options: of the default backend.
    """
    if not compile:
        return module
    if compile is True or compile == "inductor":
        return torch.compile(module, fullgraph=True, dynamic=False, options=options)
    return torch.compile(module, fullgraph=True, dynamic=False, backend=compile)


def compiled_network(net: nn.Module, compile: Literal[True] | str) -> Callable[..., Any]:
    """A network, compiled as ``compiled`` says but in as many graphs as it takes.

    Dropout draws what it would draw uncompiled.
    """
    if compile is True or compile == "inductor":
        return torch.compile(net, options={"fallback_random": True})
    return torch.compile(net, backend=compile)


def graphed(
    module: fx.GraphModule, compile: bool | str, options: dict[str, Any] | None = None
) -> Callable[..., list[Tensor]]:
    """``compiled``, of a GPU's tensors to a list of them: by Inductor, in a CUDA graph.

    A CUDA graph overwrites its results when it runs again, so copies are handed out.
    """
    if compile not in (True, "inductor"):
        return compiled(module, compile, options)
    run = compiled(module, compile, {**(options or {}), "triton.cudagraphs": True})
    return lambda *arguments: [result.clone() for result in run(*arguments)]
