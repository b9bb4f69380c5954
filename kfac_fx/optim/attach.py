"""A preconditioner that rides on an optimizer, for training loops that somebody else wrote."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from kfac_fx.errors import ObservationError, ParameterChangedError
from kfac_fx.likelihoods.builtin import Tree
from kfac_fx.optim.preconditioner import Preconditioner
from kfac_fx.optim.taken_step import before_step

Value = Any
"""What the user's network is given or returns: a tensor, a mapping, an object with fields."""

KEY = "kfac_fx"
"""Where the preconditioner's state stands in the optimizer's ``state_dict``."""


def _as_returned(result: Value) -> Tree:
    return result


class Attachment:
    """The hooks of one preconditioner on its network and on an optimizer; see ``attach``.

    Args:
        preconditioner: its network is observed.
        optimizer: its steps are preceded by the preconditioner's.
        outputs: from what the network returns to what the likelihood is about.
        targets: from the arguments of the forward to the targets; None for no targets.
    """

    def __init__(
        self,
        preconditioner: Preconditioner,
        optimizer: Optimizer,
        outputs: Callable[[Value], Tree],
        targets: Callable[..., Tree] | None,
    ) -> None:
        self._preconditioner = preconditioner
        self._net = preconditioner.recorder.net
        self._outputs = outputs
        self._targets = targets
        self._handles = [
            self._net.register_forward_hook(self._observe, with_kwargs=True),
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_state_dict_post_hook(self._with_state),
            optimizer.register_load_state_dict_pre_hook(self._take_state),
        ]

    def remove(self) -> None:
        """Take the hooks off; the network and the optimizer go on as they were before."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _observe(
        self, net: nn.Module, args: tuple[Value, ...], kwargs: dict[str, Value], result: Value
    ) -> None:
        # A capture shares its hooks with the model that it was made of: a forward of the model
        # itself has no taps, and is nobody's step. Nor are validation and generation.
        if net is not self._net or not net.training or not torch.is_grad_enabled():
            return
        if not self._preconditioner.due:
            return
        targets = None if self._targets is None else self._targets(*args, **kwargs)
        self._preconditioner.observe(self._outputs(result), targets)

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Value, ...], kwargs: dict[str, Value]
    ) -> tuple[tuple[Value, ...], dict[str, Value]] | None:
        # As torch calls it: ``args`` begins with the optimizer, then the closure if it has a place.
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._preconditioner.step()
            before_step(optimizer, args, kwargs)  # what bounds the step has looked too early
            return None

        # Forward and backward are inside of the closure, so the gradients are there at its end.
        def preconditioned() -> Value:
            loss = closure()
            self._preconditioner.step()
            return loss

        if "closure" in kwargs:
            return args, kwargs | {"closure": preconditioned}
        return (optimizer, preconditioned, *args[2:]), kwargs

    def _with_state(self, optimizer: Optimizer, state: dict[str, Value]) -> dict[str, Value]:
        return state | {KEY: self._preconditioner.state_dict()}

    def _take_state(self, optimizer: Optimizer, state: dict[str, Value]) -> dict[str, Value]:
        if KEY not in state:
            raise ParameterChangedError(
                "this state_dict of the optimizer has no preconditioner in it: it was saved before "
                "attach(). Load it first, and attach the preconditioner afterwards"
            )
        rest = dict(state)
        self._preconditioner.load_state_dict(rest.pop(KEY))
        return rest


def attach(
    preconditioner: Preconditioner,
    optimizer: Optimizer,
    *,
    outputs: Callable[[Value], Tree] = _as_returned,
    targets: Callable[..., Tree] | None = None,
) -> Attachment:
    """Let a preconditioner ride on an optimizer, for training loops that are not yours.

    Trainers of other libraries call the network, ``loss.backward()`` and ``optimizer.step()``
    themselves. After this call every forward of the network in training mode is observed, every
    ``optimizer.step()`` preconditions the gradients first, and ``optimizer.state_dict()`` has the
    preconditioner's state in it, so that the trainer's own checkpoints resume a run. Accumulated
    micro-batches, steps with a closure, and a ``GradScaler`` work as they do without it.

    Args:
        preconditioner: of a network that is not compiled.
        optimizer: any of torch.optim that evaluates its closure once, the one that steps and not a
            wrapper around it.
        outputs: from what the network returns to what the likelihood is about:
            ``lambda result: result.logits``. By default it is what the network returns.
        targets: called with the arguments of the network's forward, for the targets; needed where
            ``observe`` needs them: ``lambda labels, **rest: labels``.

    Returns:
        The hooks; ``remove()`` takes them off.

    Raises:
        ObservationError: the network is compiled, so that no hook sees its outputs.
    """
    if preconditioner.recorder.by_inputs:
        raise ObservationError(
            "attach() needs a network that is not compiled: in a loop of your own, "
            "observe(inputs=...) serves compiled ones"
        )
    return Attachment(preconditioner, optimizer, outputs, targets)
