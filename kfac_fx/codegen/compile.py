"""Run graphs and networks through torch.compile, with the options that the library needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, fx, nn

from kfac_fx.codegen.leaf import Value

Options = Mapping[str, bool]
"""Options of Inductor by name; those that the library needs are switches."""


def compiled(
    module: fx.GraphModule, compile: bool | str, options: Options | None = None
) -> Callable[..., Value]:
    """Return the module as one graph for the shapes that come, or itself.

    Shapes are not dynamic: factors and parameters never change theirs, and a graph for all shapes
    is slower for each.

    Args:
        module: the graph.
        compile: False, True for torch's default backend, or the name of a backend.
        options: the options of the default backend.
    """
    if not compile:
        return module
    if compile is True or compile == "inductor":
        given: dict[str, str | int | bool | Callable[..., Value]] = {**(options or {})}
        return torch.compile(module, fullgraph=True, dynamic=False, options=given or None)
    return torch.compile(module, fullgraph=True, dynamic=False, backend=compile)


def compiled_network(net: nn.Module, compile: Literal[True] | str) -> Callable[..., Value]:
    """Return a network, compiled as ``compiled`` says but in as many graphs as it takes.

    Dropout draws what it would draw uncompiled.

    Args:
        net: any module.
        compile: True for torch's default backend, or the name of a backend.
    """
    if compile is True or compile == "inductor":
        return torch.compile(net, options={"fallback_random": True})
    return torch.compile(net, backend=compile)


def graphed(
    module: fx.GraphModule, compile: bool | str, options: Options | None = None
) -> Callable[..., list[Tensor]]:
    """Return ``compiled`` for a function of a GPU's tensors: by Inductor, in a CUDA graph.

    A CUDA graph launches all kernels at once, where a pass of small layers would wait for each. It
    overwrites its results when it runs again, so copies are handed out.

    Args:
        module: the module to run; it maps tensors to a list of tensors.
        compile: the same as for ``compiled``.
        options: the options of the default backend.
    """
    if compile not in (True, "inductor"):
        return compiled(module, compile, options)
    run = compiled(module, compile, {**(options or {}), "triton.cudagraphs": True})
    return lambda *arguments: [result.clone() for result in run(*arguments)]
