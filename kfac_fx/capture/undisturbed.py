"""Run a model once without leaving a trace in it, and read what it returned."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kfac_fx.torch_internals.pytree import tree_leaves, tree_map_only

Nested = Any
"""Inputs or outputs of a user's model: tensors in any nesting of containers and objects."""


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put buffers and random number generators back to what they were when the context ends.

    A capture runs the user's code: running means would move and dropout would draw other masks in
    the training that follows.

    Args:
        model: whose buffers, those of its submodules too, are put back in place.
    """
    saved = [
        (module._buffers, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.is_cuda}
    state = random.getstate()
    try:
        with torch.random.fork_rng([d.index for d in devices]), torch.enable_grad():
            yield
    finally:
        random.setstate(state)
        for owner, name, buffer, value in saved:
            # The object first, since a model may have replaced it; then its values.
            owner[name] = buffer
            if not buffer.is_meta and not torch.equal(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)


def fresh(inputs: Nested) -> Nested:
    """Return the inputs with tensors of their own, since a model may write to what it is given."""
    return tree_map_only(
        Tensor, lambda t: t.detach().clone().requires_grad_(t.requires_grad), inputs
    )


def tensors_in(outputs: Nested) -> Iterator[Tensor]:
    """Yield all tensors of a model's outputs, in data classes and plain objects too."""
    for leaf in tree_leaves(outputs):
        if isinstance(leaf, Tensor):
            yield leaf
        elif type(leaf).__module__ != "builtins" and hasattr(leaf, "__dict__"):
            yield from tensors_in(list(vars(leaf).values()))
