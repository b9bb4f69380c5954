"""Capture by torch.export with example inputs: follows Python code that tracing cannot."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from kfac_fx.capture.symbolic import user_line
from kfac_fx.errors import CaptureError


def exported(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.GraphModule:
    """The model in its present mode, at ATen level, with a dynamic batch where it allows one.

    Raises:
        CaptureError: torch.export refuses the model; names the user's line and its reason.
    """
    shapes = torch.export.ShapesCollection()
    seen: set[int] = set()
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, torch.Tensor) and leaf.dim() and id(leaf) not in seen:
            seen.add(id(leaf))
            shapes[leaf] = {0: torch.export.Dim.AUTO}
    try:
        program = torch.export.export(
            model,
            args,
            kwargs,
            dynamic_shapes=shapes.dynamic_shapes(model, args, kwargs),
            strict=False,
        )
        module = program.module(check_guards=False)
    except Exception as error:  # any code of the user's may run here
        reason = str(error).strip().splitlines()
        raise CaptureError(f"{user_line(error)}: {reason[0] if reason else error!r}") from error
    assert isinstance(module, fx.GraphModule)
    # Checks of dtype and device behind every cast; they would count as uses of what they look at.
    for node in list(module.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            module.graph.erase_node(node)
    return module
