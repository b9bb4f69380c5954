"""The layout of a parameter's tensor as the matrix of a curvature block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch

Value: TypeAlias = Any
"""A tensor or a torch.fx proxy: both have the methods of views."""


class ViewStep(NamedTuple):
    """One view of a tensor.

    Attributes:
        view: its kind.
        argument: the dimensions of a "permute", the new shape of a "reshape", and of a "narrow"
            (dimension, start, length).
        start: the shape that the view starts from.
    """

    view: Literal["permute", "reshape", "narrow"]
    argument: tuple[int, ...]
    start: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """A chain of views from a parameter's shape to the shape of a curvature block's matrix.

    Equal chains are equal values, whatever the code that they were found in wrote: neighbouring
    views of one kind are merged as they are added. That is how two uses of one weight are seen to
    have the same matrix.

    Attributes:
        start: the parameter's shape.
        steps: the views, in the order in which they are taken.
    """

    start: tuple[int, ...]
    steps: tuple[ViewStep, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape at the end of the chain, which is that of the block's matrix."""
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
        """Return this chain followed by a permutation; negative dimensions count from the end."""
        shape = self.shape
        dims = tuple(dim % len(shape) for dim in dims)
        steps = self.steps
        if steps and steps[-1].view == "permute":  # two permutations are one
            shape, dims = steps[-1].start, tuple(steps[-1].argument[dim] for dim in dims)
            steps = steps[:-1]
        if dims == tuple(range(len(shape))):
            return Layout(self.start, steps)
        return Layout(self.start, (*steps, ViewStep("permute", dims, shape)))

    def transpose(self, first: int, second: int) -> Layout:
        """Return this chain followed by an exchange of two dimensions."""
        dims = list(range(len(self.shape)))
        dims[first], dims[second] = dims[second], dims[first]
        return self.permute(*dims)

    def reshape(self, shape: Sequence[int]) -> Layout:
        """Return this chain followed by a reshape.

        Args:
            shape: the new shape, of as many entries as before; one number may be -1, for the rest.

        Raises:
            ValueError: the shape has another number of entries.
        """
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
        return Layout(self.start, (*steps, ViewStep("reshape", full, here)))

    def narrow(self, dim: int, start: int, length: int) -> Layout:
        """Return this chain followed by a slice of one dimension.

        Args:
            dim: counted from the end where it is negative.
            start: first entry that is kept, counted from the end where it is negative.
            length: number of entries that are kept.

        Raises:
            ValueError: the slice goes beyond the dimension.
        """
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
        return Layout(self.start, (*steps, ViewStep("narrow", (dim, start, length), shape)))

    def select(self, dim: int, index: int) -> Layout:
        """Return this chain followed by the choice of one entry of a dimension, which goes."""
        dim = dim % len(self.shape)
        piece = self.narrow(dim, index, 1)
        return piece.reshape((*piece.shape[:dim], *piece.shape[dim + 1 :]))

    @property
    def whole(self) -> bool:
        """Tell whether the chain keeps every entry of the parameter."""
        return all(step.view != "narrow" for step in self.steps)

    def apply(self, value: Value) -> Value:
        """Return ``value`` of shape ``start`` (a tensor or a proxy), viewed along the chain."""
        for step in self.steps:
            value = _view(step, value)
        return value

    def embed(self, value: Value, into: Value) -> Value:
        """Return ``into`` with the entries that the chain keeps replaced by ``value``.

        Args:
            value: a tensor or proxy of the block's shape.
            into: one of the parameter's shape; not read where the chain keeps every entry.
        """
        # A narrow step can only be undone into the tensor that it was taken from, so the
        # intermediate views of ``into`` are formed first, down to the last step's start.
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


def _view(step: ViewStep, value: Value) -> Value:
    """Return one view of a value."""
    if step.view == "narrow":
        return value.narrow(*step.argument)
    return getattr(value, step.view)(step.argument)
