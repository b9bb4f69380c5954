"""Bounds in units of the weights: of a layer's part, and of the step that is taken.

The lengths of whole gradients, in Fhat, are in kfac_fx/optim/lengths.py
(docs/explanation/mathematics.md, section 9).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from kfac_fx.parallel import Workers
from kfac_fx.torch_internals import foreach

LARGEST_STEP = 0.1
"""Largest step that is taken, in units of the length of a layer's weights."""

SMALL_WEIGHT = 1e-2
"""Root mean square that weights count as at least: layers that start at zero must be able to."""


class _LayerSums(NamedTuple):
    """Layers as tensors: their members [layers, parameters], floors, and each parameter's row."""

    members: Tensor
    least: Tensor
    rows: Tensor


class LayerSteps:
    """Compares the lengths of steps, layer by layer, with those of the weights.

    Args:
        parameters: in the order in which steps and weights are given; sharded ones as local parts.
        layers: the number of each one's layer, in any numbering.
        workers: the processes that share sharded parameters.

    Attributes:
        reads: whether lengths are read on the host, which costs nothing where that computes them.
    """

    def __init__(
        self, parameters: Sequence[Tensor], layers: Sequence[int], workers: Workers
    ) -> None:
        here = [own_entries(parameter) for parameter in parameters]
        self._workers = workers
        self._sharded = [_is_sharded(parameter) for parameter in parameters]
        self._device = here[0].device
        self.reads = not any(self._sharded) and all(t.device.type == "cpu" for t in here)
        self._dtype = torch.float32
        for tensor in here:
            self._dtype = torch.promote_types(self._dtype, tensor.dtype)
        numbers = {layer: row for row, layer in enumerate(dict.fromkeys(layers))}
        self._rows = [numbers[layer] for layer in layers]
        self._least = [0.0] * len(numbers)
        for row, parameter in zip(self._rows, parameters, strict=True):
            self._least[row] += SMALL_WEIGHT**2 * parameter.numel()
        self._sums = None if self.reads else self._layer_sums()

    def excess(
        self, steps: Sequence[Tensor], weights: Sequence[Tensor], largest: float
    ) -> Sequence[float | Tensor]:
        """Return which part of each step is too much: 0 for most; floats, or tensors on a GPU.

        Args:
            steps: by parameter.
            weights: by parameter, from before the steps.
            largest: the largest length of a layer's step, in units of its weights' length.
        """
        norms = list(foreach.norm([*steps, *weights], 2, self._dtype))
        return self._read(norms, largest) if self.reads else self._unread(norms, steps, largest)

    def _read(self, norms: list[Tensor], largest: float) -> list[float]:
        lengths = torch.stack(norms).tolist()
        count = len(self._rows)
        moved, weights = [0.0] * len(self._least), [0.0] * len(self._least)
        for row, step, weight in zip(self._rows, lengths, lengths[count:], strict=False):
            moved[row] += step * step
            weights[row] += weight * weight
        # A step that is not finite is not made up for.
        excess = [
            max(0.0, 1 - largest * math.sqrt(max(weight, least) / step))
            if 0 < step < math.inf
            else 0.0
            for step, weight, least in zip(moved, weights, self._least, strict=True)
        ]
        return [excess[row] for row in self._rows]

    def _layer_sums(self) -> _LayerSums:
        """Return what sums over layers need on a device, made once: copies to it are waited for."""
        members = torch.zeros(len(self._least), len(self._rows), dtype=self._dtype)
        for column, (row, sharded) in enumerate(zip(self._rows, self._sharded, strict=True)):
            # Whole tensors among sharded ones are in every process, and count once in all.
            whole = any(self._sharded) and not sharded
            members[row, column] = 1.0 / self._workers.size if whole else 1.0
        made = members, torch.tensor(self._least, dtype=self._dtype), torch.tensor(self._rows)
        on_device = [tensor.to(self._device) for tensor in made]
        return _LayerSums(on_device[0], on_device[1], on_device[2])

    def _unread(self, norms: list[Tensor], like: Sequence[Tensor], largest: float) -> list[Tensor]:
        if self._sums is None:
            self._sums = self._layer_sums()
        members, least, rows = self._sums
        squares = torch.stack([norm.to(self._device) for norm in norms]).square_()
        sums = squares.view(2, -1) @ members.mT
        if any(self._sharded):
            self._workers.sum_([sums])
        excess = (1 - largest * (torch.maximum(sums[1], least) / sums[0]).sqrt_()).clamp_min_(0.0)
        excess = torch.where(sums[0].isfinite(), excess, 0.0)[rows]
        pairs = zip(excess.unbind(), like, strict=True)
        return [weight.to(tensor.device, tensor.dtype) for weight, tensor in pairs]


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
        self._plain = not any(_is_sharded(p) or p.is_complex() for p in parameters)
        self._before = [torch.empty_like(tensor) for tensor in self._now()]
        self._layers = LayerSteps(self._parameters, layers, workers)

    def _now(self) -> list[Tensor]:
        return self._parameters if self._plain else [own_entries(p) for p in self._parameters]

    def copy(self) -> None:
        """Keep the parameters as they are."""
        foreach.copy_(self._before, self._now())

    def shorten(self, largest: float) -> None:
        """Move the parameters of each layer that went too far back along its step.

        Args:
            largest: the largest length of a layer's step, in units of its weights' length.
        """
        now = self._now()
        excess = self._layers.excess(foreach.sub(now, self._before), self._before, largest)
        for parameter, before, back in zip(now, self._before, excess, strict=True):
            # Nobody waits for a GPU's answer: all are moved there, most of them by nothing, which
            # leaves them as they are bit by bit.
            if isinstance(back, Tensor) or back > 0:
                parameter.lerp_(before, back)


class LayerBounds:
    """Shortens what is too long of a layer, beside the length of its weights.

    Args:
        layers: see ``layer_numbers``.
        workers: the processes that share sharded parameters.
    """

    def __init__(self, layers: Iterable[Sequence[str]], workers: Workers) -> None:
        self._numbers = layer_numbers(layers)
        self._workers = workers
        self._steps: dict[tuple[str, ...], LayerSteps] = {}

    def shorten(
        self, steps: Mapping[str, Tensor], weights: Mapping[str, Tensor], largest: float
    ) -> None:
        """Shorten steps in place.

        Args:
            steps: by name of the parameter.
            weights: the parameters of these names.
            largest: the largest length of a layer's step, in units of its weights' length.
        """
        names = tuple(steps)
        before = [own_entries(weights[name]) for name in names]
        if names not in self._steps:  # parameters may be added, frozen, or get no gradient
            every = [weights[name] for name in names]
            numbers = [self._numbers[name] for name in names]
            self._steps[names] = LayerSteps(every, numbers, self._workers)
        here = [own_entries(steps[name]) for name in names]
        excess = self._steps[names].excess(here, before, largest)
        for one, much in zip(here, excess, strict=True):
            if isinstance(much, Tensor) or much > 0:
                one.mul_(1 - much)


def layer_numbers(layers: Iterable[Sequence[str]]) -> dict[str, int]:
    """Return the number of each parameter's layer, by name.

    Args:
        layers: names of parameters that are measured together, such as a weight and its bias;
            slices of one parameter are blocks of one layer.
    """
    found: dict[str, int] = {}
    for number, names in enumerate(layers):
        for name in names:
            found.setdefault(name, number)
    return found


def _is_sharded(tensor: Tensor) -> bool:
    # By its method: torch.distributed is not imported for those who train in one process.
    return hasattr(tensor, "to_local")


def own_entries(tensor: Tensor) -> Tensor:
    """Return this process's entries of a tensor, in their place, as real numbers."""
    local: Tensor = tensor.to_local() if _is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return torch.view_as_real(local) if local.is_complex() else local


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
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        layers: Iterable[Sequence[str]],
        largest: float,
        workers: Workers,
        steps: Callable[[], int],
    ) -> None:
        self.largest = largest
        self._workers = workers
        self._layer = {id(parameters[n]): number for n, number in layer_numbers(layers).items()}
        self._steps = steps
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
        share.shorten(self.largest)

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
