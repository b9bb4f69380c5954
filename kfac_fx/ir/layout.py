"""How a parameter's tensor is laid out as the matrix of a curvature block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple


class Step(NamedTuple):
    """One view of a tensor: its kind, the argument of the view, and the shape it starts from."""

    view: Literal["permute", "reshape"]
    argument: tuple[int, ...]
    start: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """A chain of views from ``start`` (the parameter's shape) to ``shape`` (the block's).

    Only whole-tensor views can be undone, so a chain holds permutations and reshapes alone.
    ``apply`` and ``invert`` work on tensors and on ``torch.fx`` proxies.
    """

    start: tuple[int, ...]
    steps: tuple[Step, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape at the end of the chain."""
        if not self.steps:
            return self.start
        last = self.steps[-1]
        if last.view == "reshape":
            return last.argument
        return tuple(last.start[dim] for dim in last.argument)

    def permute(self, *dims: int) -> Layout:
        """This chain followed by a permutation; negative dimensions count from the end."""
        shape = self.shape
        dims = tuple(dim % len(shape) for dim in dims)
        steps = self.steps
        if steps and steps[-1].view == "permute":  # two permutations are one
            shape, dims = steps[-1].start, tuple(steps[-1].argument[dim] for dim in dims)
            steps = steps[:-1]
        if dims == tuple(range(len(shape))):
            return Layout(self.start, steps)
        return Layout(self.start, (*steps, Step("permute", dims, shape)))

    def transpose(self, first: int, second: int) -> Layout:
        """This chain followed by an exchange of two dimensions."""
        dims = list(range(len(self.shape)))
        dims[first], dims[second] = dims[second], dims[first]
        return self.permute(*dims)

    def reshape(self, shape: Sequence[int]) -> Layout:
        """This chain followed by a reshape; one entry may be -1."""
        here = self.shape
        known = math.prod(size for size in shape if size != -1)
        full = tuple(math.prod(here) // max(known, 1) if size == -1 else size for size in shape)
        if math.prod(full) != math.prod(here):
            raise ValueError(f"cannot reshape {here} to {tuple(shape)}")
        steps = self.steps
        if steps and steps[-1].view == "reshape":  # two reshapes are one
            here, steps = steps[-1].start, steps[:-1]
        if full == here:
            return Layout(self.start, steps)
        return Layout(self.start, (*steps, Step("reshape", full, here)))

    def apply(self, value: Any) -> Any:
        """``value`` of shape ``start``, viewed along the chain."""
        for step in self.steps:
            value = getattr(value, step.view)(step.argument)
        return value

    def invert(self, value: Any) -> Any:
        """``value`` of shape ``shape``, brought back to ``start``."""
        for step in reversed(self.steps):
            if step.view == "reshape":
                value = value.reshape(step.start)
            else:
                back = sorted(range(len(step.argument)), key=step.argument.__getitem__)
                value = value.permute(tuple(back))
        return value
