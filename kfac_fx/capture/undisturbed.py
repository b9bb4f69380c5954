"""Run a model once without leaving a trace in it, and read what it returned."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kfac_fx.capture.run_state import RunState, TensorValues
from kfac_fx.torch_internals.pytree import tree_leaves, tree_map_only

Nested = Any
"""Inputs or outputs of a user's model: tensors in any nesting of containers and objects."""


class Before(NamedTuple):
    """A model as it was before a run.

    Attributes:
        state: its attributes and what they hold.
        values: of its tensors.
    """

    state: RunState
    values: TensorValues


@contextmanager
def undisturbed(model: nn.Module, *, runs: bool = False) -> Iterator[Before]:
    """Put a model and all random generators back to what they were when the context ends.

    A capture runs the user's code: running means would move, counters would count, a cache would
    keep a symbolic value, and dropout would draw other masks in the training that follows.

    Args:
        model: attributes, buffers and what they hold are put back in place, also after an error.
        runs: the model's own code runs on real tensors and may change parameters, which are kept
            too; symbolic values and fake tensors never do.
    """
    state = RunState(model)
    values = TensorValues(model, parameters=runs, others=state.plain_tensors(model))
    threads = torch.get_num_threads()
    devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.is_cuda}
    try:
        with torch.random.fork_rng([d.index for d in devices]), torch.enable_grad():
            yield Before(state, values)
    finally:
        state.restore()
        values.restore()
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


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
