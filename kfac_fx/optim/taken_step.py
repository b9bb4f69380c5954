"""The bound on a step that is taken, layer by layer, in units of the weights.

It is the last of several (docs/explanation/mathematics.md, section 9); those on a preconditioned
gradient are in kfac_fx/optim/bounds.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from kfac_fx.curvature.parameters import layer_numbers
from kfac_fx.optim.bounds import LayerSteps
from kfac_fx.parallel import Workers, own_entries

LARGEST_STEP = 0.05
"""Largest step that is taken, in units of the length of a layer's weights."""


class _Share:
    """What one optimizer has of the covered parameters: copies from before its step, and layers.

    Args:
        parameters: the parameters in its groups.
        layers: the number of each one's layer; the optimizer may have a part of a layer.
        workers: the processes that share sharded parameters.

    Attributes:
        ids: identities of the parameters.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], layers: Sequence[int], workers: Workers
    ) -> None:
        self.ids = {id(parameter) for parameter in parameters}
        self._parameters: list[Tensor] = list(parameters)
        self._layers = LayerSteps(self._parameters, layers, workers)
        self._before: list[Tensor] = []

    def copy(self) -> None:
        """Keep the parameters as they are."""
        self._before = self._layers.pack(self._parameters)

    def shorten(self, largest: float) -> float | Tensor:
        """Move the parameters of each layer that went too far back along its step.

        Args:
            largest: the largest length of a layer's step, in units of its weights' length.

        Returns:
            which part of the step's length is left, of all layers together.
        """
        before = self._before
        self._before = []  # memory that nobody needs until the next step
        steps = self._layers.pack(self._parameters)
        for step, old in zip(steps, before, strict=True):
            step.sub_(old)
        excess = self._layers.excess(steps, before, largest)
        if excess is None:
            return 1.0
        there = self._layers.unpack(before)
        for parameter, old, back in zip(self._parameters, there, excess.parts, strict=True):
            # Nobody waits for a GPU's answer: all are moved there, most of them by nothing, which
            # leaves them as they are bit by bit.
            if isinstance(back, Tensor) or back > 0:
                own_entries(parameter).lerp_(own_entries(old), back)
        return excess.kept


class TakenStep:
    """Bounds the step that an optimizer takes, layer by layer, whatever the optimizer is.

    What comes after a preconditioner is not known to it: a learning rate, a momentum that adds up
    ten gradients, the lengths of Adam. So the step is measured where it is made, by torch's hooks
    of all optimizers: covered parameters are copied before, and a layer that has moved by more than
    a share of its own length is moved back along its step. Only the step that follows one of the
    owner is looked at; another one (of another phase of training, say) is left alone.

    Args:
        parameters: the covered parameters by name.
        layers: see ``layer_numbers``.
        largest: the largest length of a step, in units of the weights' length; above zero.
        workers: the processes that share sharded parameters.
        steps: gives the number of steps that the owner has made in its life; it does not keep the
            owner alive.
        tell: is told which part of each step's length is left.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        layers: Iterable[Sequence[str]],
        largest: float,
        workers: Workers,
        steps: Callable[[], int],
        tell: Callable[[float | Tensor], None],
    ) -> None:
        self.largest = largest
        self._workers = workers
        self._layer = {id(parameters[n]): number for n, number in layer_numbers(layers).items()}
        self._steps = steps
        self._tell = tell
        # The step of the owner that each parameter was last looked at in.
        self._seen = dict.fromkeys(self._layer, 0)
        self._shares: WeakKeyDictionary[Optimizer, _Share | None] = WeakKeyDictionary()
        self._groups: WeakKeyDictionary[Optimizer, tuple[int, ...]] = WeakKeyDictionary()
        self._copied = False
        _watch(self)

    @torch.no_grad()
    def before(self, optimizer: Optimizer, with_closure: bool) -> None:
        """Keep what an optimizer that is about to step has of the parameters.

        Args:
            optimizer: any.
            with_closure: whether its step runs code of the user's, which may precondition.
        """
        share = self._share(optimizer)
        self._copied = share is not None and (with_closure or self._is_next(share, self._steps()))
        if share is not None and self._copied:
            share.copy()

    @torch.no_grad()
    def after(self, optimizer: Optimizer) -> None:
        """Shorten the step that an optimizer has made."""
        share = self._share(optimizer)
        steps = self._steps()
        if share is None or not self._copied or not self._is_next(share, steps):
            return
        self._seen.update(dict.fromkeys(share.ids, steps))
        self._tell(share.shorten(self.largest))

    def _is_next(self, share: _Share, steps: int) -> bool:
        """Say whether the owner has made a step since the parameters were last looked at."""
        return all(self._seen[parameter] != steps for parameter in share.ids)

    def _share(self, optimizer: Optimizer) -> _Share | None:
        """Return what an optimizer has of the parameters; None where it has nothing."""
        # Groups are added and frozen while training goes on; what they are is a few numbers.
        groups = tuple(len(group["params"]) for group in optimizer.param_groups)
        if self._groups.get(optimizer) != groups:
            every = [p for group in optimizer.param_groups for p in group["params"]]
            own = [p for p in every if id(p) in self._layer]
            layers = [self._layer[id(p)] for p in own]
            self._shares[optimizer] = _Share(own, layers, self._workers) if own else None
            self._groups[optimizer] = groups
        return self._shares[optimizer]


_WATCHED: WeakSet[TakenStep] = WeakSet()
_HOOKS: list[RemovableHandle] = []


def _watch(bound: TakenStep) -> None:
    """Tell a bound of all optimizers' steps for as long as there is somebody who has it."""
    # One pair of hooks for all bounds, which are forgotten by the set as they go. Hooks of single
    # optimizers would be in the way of copies, and nobody says which optimizer it will be. A
    # compiled step breaks its graph here, as it does before and after every step of torch.
    if not _HOOKS:
        _HOOKS.append(register_optimizer_step_pre_hook(torch.compiler.disable(before_step)))
        _HOOKS.append(register_optimizer_step_post_hook(torch.compiler.disable(_after_step)))
    _WATCHED.add(bound)


def before_step(optimizer: Optimizer, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
    """Let all bounds look at the parameters before a step; ``args`` begins with the optimizer.

    torch calls it, before the hooks of a single optimizer. Such a hook that preconditions calls it
    once more: only then is the step one that follows a step of a bound's owner.
    """
    with_closure = len(args) > 1 or kwargs.get("closure") is not None
    for bound in list(_WATCHED):
        bound.before(optimizer, with_closure)


def _after_step(optimizer: Optimizer, args: object, kwargs: object) -> None:
    for bound in list(_WATCHED):
        bound.after(optimizer)
