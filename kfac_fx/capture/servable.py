"""Refuse at the transform what could only fail later, with an error of torch's."""

from __future__ import annotations

import io
import operator
import queue
import types
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from kfac_fx.capture.object_states import entries
from kfac_fx.errors import CaptureError
from kfac_fx.torch_internals.pytree import tree_leaves

Value = Any
"""What a caller gives as a model, or as an example input of it."""


def check_servable(model: Value, inputs: Value) -> None:
    """Refuse models that no route can run, before any work is done.

    Args:
        model: what ``transform`` was given.
        inputs: the example inputs, None without any.

    Raises:
        CaptureError: says what stands in the way, and what to do.
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"transform takes an nn.Module, a GraphModule or an ExportedProgram, and this is of "
            f"class {type(model).__name__}"
        )
    _check_uncompiled(model)
    name = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            f"{name} is a ScriptModule, whose code runs outside of Python where no tap can stand: "
            "transform the module that it was made from"
        )
    for path, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise CaptureError(
                f"{path} is not initialised, so its shape is not known: run the model once on a "
                "batch before you transform it"
            )
        if tensor.is_inference():
            raise CaptureError(
                f"{path} was made under torch.inference_mode(), and autograd records nothing of "
                "it: build the model outside of that mode"
            )
        if inputs is not None and tensor.is_meta:
            raise CaptureError(
                f"{path} is on the meta device and has no values, so nothing can be run: transform "
                "the model without example inputs, or after model.to_empty(device=...)"
            )
    _check_walkable(model)
    _check_rewindable(model)
    for leaf in tree_leaves(inputs):
        if isinstance(leaf, Tensor) and leaf.is_nested:
            raise CaptureError(
                "the example inputs hold a nested tensor, whose cases are of different sizes and "
                "which no tap records: pad it, or give a mask"
            )
        if _moves_on(leaf):
            raise CaptureError(
                f"the example inputs hold an iterator ({type(leaf).__name__}), which the first of "
                "the runs that a capture makes uses up: pass a list or a tuple"
            )


def _check_walkable(model: nn.Module) -> None:
    """Refuse a model that hides some of its own parts from who goes through them.

    Blocks are found by the names of parameters, and one that is hidden would have none.
    """
    for name in ("named_parameters", "named_buffers", "named_modules"):
        told = [(key, id(one)) for key, one in getattr(model, name)()]
        held = [(key, id(one)) for key, one in getattr(nn.Module, name)(model)]
        if told != held:
            raise CaptureError(
                f"{type(model).__name__} has a {name}() of its own, which does not name what the "
                "module holds: give it another name, or leave parameters out by "
                "requires_grad_(False) or exclude="
            )


def _check_rewindable(model: nn.Module) -> None:
    """Refuse a model that holds an iterator: a capture runs the code, and cannot take a step back.

    Generators can be put back, files are not the model's state.
    """
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if _moves_on(value):
                what = "is an iterator" if isinstance(value, Iterator) else "holds what is used up"
                raise CaptureError(
                    f"{path}.{name}".strip(".") + f" {what} ({type(value).__name__}), "
                    "which cannot be put back where it was after the runs that a capture makes: "
                    "keep a number or a list in its place, or set it after the transform"
                )


def _moves_on(value: Value) -> bool:
    """Tell whether a value, or one in it, gives away what it holds and cannot be read otherwise."""
    if isinstance(value, (list, tuple)):
        return any(map(_moves_on, entries(value)))
    if isinstance(value, dict):
        return any(map(_moves_on, dict.values(value)))
    # What stands for another object has the methods of all classes, whatever that object is.
    if type(value) in weakref.ProxyTypes or isinstance(value, io.IOBase):
        return False
    if isinstance(value, Iterator):
        return not _is_used_up(value)
    return isinstance(value, queue.SimpleQueue)


def _is_used_up(value: Iterator[Value]) -> bool:
    """Tell whether an iterator has nothing more to give: one that a model was built with."""
    if isinstance(value, types.GeneratorType):
        return value.gi_frame is None
    # A class of the user's may count something else.
    return type(value).__module__ == "builtins" and operator.length_hint(value, 1) == 0


def _check_uncompiled(model: nn.Module) -> None:
    """Refuse a model that torch.compile has wrapped, in whole or in part.

    Its graph is compiled without taps, and would be run as one opaque call.
    """
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod"):
            where = f"its part {name}" if name else "it"
            raise CaptureError(
                f"the model is compiled already: {where} is what torch.compile returned, and taps "
                "have to be there before. Transform the module that was compiled (its _orig_mod), "
                "then compile the result: net = torch.compile(kfac_fx.transform(model))"
            )


def is_packed(value: Value) -> bool:
    """Tell whether an input keeps the cases of all steps in one dimension, or is nested."""
    if isinstance(value, PackedSequence):
        return True
    return isinstance(value, Tensor) and value.is_nested
