"""Run a model once without leaving a trace in it, and read what it returned."""

from __future__ import annotations

import collections
import contextlib
import copy
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kfac_fx.capture.object_states import Slots
from kfac_fx.capture.run_state import RunState, TensorValues, is_plain_object
from kfac_fx.torch_internals.pytree import tree_leaves, tree_map

Nested = Any
"""Inputs or outputs of a user's model: tensors in any nesting of containers and objects."""

_BAGS = (types.SimpleNamespace, collections.UserDict, collections.UserList)
"""Those of ``BAGS`` that a copy can stand for: no thread and no other object's life has a part."""

_DEPTH = 4
"""How many objects within objects of the example inputs are copied."""


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
    """Return the inputs with tensors and objects of their own, since a model may write to them.

    A cache of keys and values, say, is longer after each run.
    """
    return _fresh(inputs, {}, _DEPTH)


def _fresh(inputs: Nested, copies: dict[int, Nested], depth: int) -> Nested:
    """Return ``fresh`` inputs.

    Args:
        inputs: a value or a nesting of values.
        copies: of objects that were met already, by identity; is added to.
        depth: how many objects one within the other are looked into.
    """

    def of_leaf(leaf: Nested) -> Nested:
        if isinstance(leaf, Tensor):
            return leaf.detach().clone().requires_grad_(leaf.requires_grad)
        if not depth or not (isinstance(leaf, _BAGS) or is_plain_object(leaf)):
            return leaf
        if id(leaf) not in copies:
            copies[id(leaf)] = leaf
            with contextlib.suppress(Exception):  # an object may refuse to be copied
                made = copy.copy(leaf)
                held = {**getattr(leaf, "__dict__", {}), **Slots(leaf).get()}
                for name, value in held.items():
                    object.__setattr__(made, name, _fresh(value, copies, depth - 1))
                copies[id(leaf)] = made
        return copies[id(leaf)]

    return tree_map(of_leaf, inputs)


def tensors_in(outputs: Nested) -> Iterator[Tensor]:
    """Yield all tensors of a model's outputs, in data classes and plain objects too."""
    for leaf in tree_leaves(outputs):
        if isinstance(leaf, Tensor):
            yield leaf
        elif type(leaf).__module__ != "builtins" and hasattr(leaf, "__dict__"):
            yield from tensors_in(list(vars(leaf).values()))
