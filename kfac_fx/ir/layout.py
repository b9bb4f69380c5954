"""How a parameter's tensor is laid out as the matrix of a curvature block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch


class Step(NamedTuple):
    """One view of a tensor: its kind, the argument of the view, and the shape it starts from.

    ``narrow`` has the argument (dimension, start, length).
    """

    view: Literal["permute", "reshape", "narrow"]
    argument: tuple[int, ...]
    start: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """A chain of views from ``start`` (the parameter's shape) to ``shape`` (the block's).

    ``apply`` and ``embed`` work on tensors and on ``torch.fx`` proxies.
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
        if last.view == "narrow":
            dim, _, length = last.argument
            return (*last.start[:dim], length, *last.start[dim + 1 :])
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

    def narrow(self, dim: int, start: int, length: int) -> Layout:
        """This chain followed by a slice of one dimension."""
        shape = self.shape
        dim = dim % len(shape)
        start = start + shape[dim] if start < 0 else start
        if not 0 <= start <= start + length <= shape[dim]:
            raise ValueError(f"cannot narrow dimension {dim} of {shape} to [{start}, +{length}]")
        if length == shape[dim]:
            return self
        steps = self.steps
        if steps and steps[-1].view == "narrow" and steps[-1].argument[0] == dim:  # two are one
            shape, start = steps[-1].start, steps[-1].argument[1] + start
            steps = steps[:-1]
        return Layout(self.start, (*steps, Step("narrow", (dim, start, length), shape)))

    def select(self, dim: int, index: int) -> Layout:
        """This chain followed by the choice of one entry of a dimension, which goes."""
        dim = dim % len(self.shape)
        piece = self.narrow(dim, index, 1)
        return piece.reshape((*piece.shape[:dim], *piece.shape[dim + 1 :]))

    @property
    def whole(self) -> bool:
        """Whether the chain keeps every entry."""
        return all(step.view != "narrow" for step in self.steps)

    def apply(self, value: Any) -> Any:
        """``value`` of shape ``start``, viewed along the chain."""
        for step in self.steps:
            value = _view(step, value)
        return value

    def embed(self, value: Any, into: Any) -> Any:
        """``into`` of shape ``start`` with the entries that the chain keeps replaced by ``value``.

        ``into`` is not read where the chain keeps every entry.
        """
        bases = [into]
        for step in self.steps[:-1] if not self.whole else ():
            bases.append(_view(step, bases[-1]))
        for index in reversed(range(len(self.steps))):
            step = self.steps[index]
            if step.view == "reshape":
                value = value.reshape(step.start)
            elif step.view == "permute":
                back = sorted(range(len(step.argument)), key=step.argument.__getitem__)
                value = value.permute(tuple(back))
            else:
                dim, start, length = step.argument
                value = torch.slice_scatter(bases[index], value, dim, start, start + length)
        return value


def _view(step: Step, value: Any) -> Any:
    if step.view == "narrow":
        return value.narrow(*step.argument)
    return getattr(value, step.view)(step.argument)
