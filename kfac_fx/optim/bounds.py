"""How long a preconditioned gradient is: in Fhat, by what gradients agree on, and beside weights.

docs/explanation/mathematics.md, section 9, derives the rules. The step that an optimizer makes of
it is bounded in kfac_fx/optim/taken_step.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfac_fx.parallel import Workers
from kfac_fx.torch_internals import foreach

RADIUS = 1e-2
"""Largest squared length of a preconditioned gradient in Fhat, before ``AdaptiveLength.factor``."""

WIDE = 0.1
NARROW = 0.02
"""Largest length of a layer's preconditioned gradient, in units of the length of its weights: where
averages are as new as the statistics, and at least, however far they have fallen behind."""

RESPONSE = 0.1
"""How fast the factor of all lengths follows the agreement of gradients with the steps before."""

PAST = 0.9
"""Weight of the older gradients in the direction of the steps before."""

WEAR = 0.05
"""How fast all lengths get smaller while the steps that are made of them have to be cut."""

SMALLEST_FACTOR, LARGEST_FACTOR = 0.2, 10.0
"""Limits of that factor: batches of one epoch, of which each has the cases that the others lack,
seem to disagree more than they do, and steps would come to rest."""

SMALL_WEIGHT = 1e-2
"""Root mean square that weights count as at least: layers that start at zero must be able to."""


class NaturalLength:
    """Says how much of a preconditioned gradient to take, by its length in Fhat (KFC's bound).

    Args:
        largest: the trust region: the largest squared length; None for no limit.

    Attributes:
        factor: of all lengths; see ``AdaptiveLength``, here it stays 1.
        widest: the largest length of a layer's part, in units of its weights' length.
    """

    def __init__(self, largest: float | None) -> None:
        self.largest = largest
        self.factor = 1.0
        self.widest = math.inf

    def share(
        self,
        gradient: Sequence[Tensor],
        updates: Sequence[Tensor],
        names: Sequence[str] = (),
        lag: float = 1.0,
    ) -> float:
        """Return the factor, at most 1, that a preconditioned gradient is taken with.

        Its squared length is gradient^T Fhat^-1 gradient, so that no product with Fhat is needed.

        Args:
            gradient: the gradient of each parameter.
            updates: Fhat^-1 times it, in the same order.
            names: of the parameters; not looked at here.
            lag: see ``InverseFisher.lag``; not looked at here.

        Returns:
            NaN where an entry of either is not finite; one synchronisation for that, too.
        """
        squared = sum((u.mul(g).sum().item() for g, u in _vectors(gradient, updates)), 0.0)
        if not math.isfinite(squared):
            wide = _widened([gradient, updates])
            # The sum may have overflowed where all entries are finite: once more, with room.
            return self.share(wide[0], wide[1]) if wide else math.nan
        if squared <= 0 or self.largest is None:  # rounding may leave it below zero
            return 1.0
        return math.sqrt(min(1.0, self.largest / squared))

    def cut(self, kept: float | Tensor) -> None:
        """Take note of which part of the last step's length was taken, of all layers together."""

    def state(self) -> dict[str, Any]:
        """Return tensors and plain values that ``load`` restores."""
        return {}

    def load(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore a ``state`` of the same rule; one of another rule changes nothing."""


class AdaptiveLength(NaturalLength):
    """Says how much of a preconditioned gradient to take, from gradients alone.

    Five things are put together (docs/explanation/mathematics.md, section 9):

    - Averages behind a Fisher that shrinks are too large, and their inverses too small, by ``lag``.
    - The length in Fhat, of the present scale, is at most the root of ``RADIUS``.
    - ``factor`` follows the agreement of each gradient with the steps before: as long as it points
      the same way steps grow, and where noise has the upper hand they shrink.
    - A layer's part is no longer than a share of its weights, ``WIDE`` to ``NARROW``: what the
      Fisher of well-fitted cases says of long steps is not true.
    - ``restraint`` gets smaller with every step that was cut for being too long, for a learning
      rate that is too large would have all steps as long as the bound, in any direction.

    Attributes:
        restraint: how much less than by the other four is taken.
    """

    def __init__(self) -> None:
        super().__init__(RADIUS)
        self.widest = WIDE
        self.restraint = 1.0
        self._cuts: list[float | Tensor] = []
        self._names: tuple[str, ...] = ()
        self._past: list[Tensor] = []  # sum of PAST^k times gradients, as long vectors
        self._squared = 0.0  # its squared length in the inverse of Fhat

    def share(
        self,
        gradient: Sequence[Tensor],
        updates: Sequence[Tensor],
        names: Sequence[str] = (),
        lag: float = 1.0,
    ) -> float:
        """Return the factor that a preconditioned gradient is taken with, but for single layers.

        Args:
            gradient: the gradient of each parameter.
            updates: Fhat^-1 times it, in the same order.
            names: of the parameters; where they are others than in the last step, agreement with it
                is not asked for.
            lag: see ``InverseFisher.lag``.

        Returns:
            NaN where an entry is not finite: then nothing is remembered of this step.
        """
        pairs = _vectors(gradient, updates)
        if self._names != tuple(names) or len(self._past) != len(pairs):
            self._names, self._past = tuple(names), []
        dots = [u.mul(g).sum() for g, u in pairs]
        if self._past:
            dots += [u.mul(past).sum() for (_, u), past in zip(pairs, self._past, strict=True)]
        # One synchronisation, not two: what they are of may be on a GPU.
        if len(pairs) > 1:
            dots = [dot.double().to(dots[0].device) for dot in dots]
        read = torch.stack(dots).tolist()
        squared, along = sum(read[: len(pairs)]), sum(read[len(pairs) :])
        if not math.isfinite(squared):
            # The sum may have overflowed where all entries are finite: once more, with room.
            wide = _widened([gradient, updates])
            self._past = []
            return self.share(wide[0], wide[1], names, lag) if wide else math.nan
        if squared <= 0:  # rounding may leave it below zero
            return 1.0
        if self._past and math.isfinite(along):
            cosine = along / math.sqrt(max(squared * self._squared, 1e-300))
            moved = self.factor * math.exp(RESPONSE * min(max(cosine, -1.0), 1.0))
            self.factor = min(max(moved, SMALLEST_FACTOR), LARGEST_FACTOR)
            # Of older gradients by the newest inverse: it changes little within the ten that count.
            so_far = PAST**2 * self._squared + 2 * PAST * along + squared
            self._squared = max(so_far, squared)
            for past, (vector, _) in zip(self._past, pairs, strict=True):
                past.mul_(PAST).add_(vector)
        else:
            self._past = [vector.clone() for vector, _ in pairs]
            self._squared = squared
        if self._cuts:
            self._wear()
        self.widest = max(NARROW, WIDE / math.sqrt(lag)) * self.restraint
        taken = lag * math.sqrt(min(1.0, RADIUS / (lag * squared)))
        return taken * self.factor * self.restraint

    def cut(self, kept: float | Tensor) -> None:
        """Take note of which part of the last step's length was taken, of all layers together."""
        if isinstance(kept, Tensor) or kept < 1:
            self._cuts.append(kept)

    def _wear(self) -> None:
        # Here and not where it is noted: the number may be on a GPU, which is waited for anyway.
        for kept in self._cuts:
            self.restraint *= max(float(kept), 1e-6) ** WEAR
        self._cuts.clear()

    def state(self) -> dict[str, Any]:
        """Return tensors and plain values that ``load`` restores."""
        self._wear()
        return {
            "factor": self.factor,
            "restraint": self.restraint,
            "names": list(self._names),
            "past": [vector.clone() for vector in self._past],
            "squared": self._squared,
        }

    def load(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore a ``state`` of the same rule; one of another rule changes nothing."""
        if not state:
            return
        self.factor = float(state["factor"])
        self.restraint = float(state["restraint"])
        self._names = tuple(state["names"])
        self._past = [vector.to(device).clone() for vector in state["past"]]
        self._squared = float(state["squared"])


def _vectors(first: Sequence[Tensor], second: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return the entries of two lists as pairs of long vectors, one for each precision and device.

    One product of long vectors takes the place of three small operations a parameter. No torch.dot
    of them: its last bit depends on where in memory the vectors lie, and a run that goes on from a
    checkpoint would drift away from the one that was not interrupted.
    """
    found = []
    for kind in dict.fromkeys((tensor.dtype, tensor.device) for tensor in first):
        both = zip(first, second, strict=True)
        pairs = [(a, b) for a, b in both if kind == (a.dtype, a.device)]
        if kind[0].is_complex:
            pairs = [(torch.view_as_real(a), torch.view_as_real(b)) for a, b in pairs]
        a, b = (foreach.flattened(list(side)) for side in zip(*pairs, strict=True))
        low = a.dtype in (torch.float16, torch.bfloat16)
        found.append((a.float(), b) if low else (a, b))
    return found


def _widened(lists: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """Return tensors in precisions in which sums of squares do not overflow; none if they are."""
    wide = (torch.float64, torch.complex128)
    if all(tensor.dtype in wide for tensor in lists[0]):
        return []
    return [[tensor.to(wide[tensor.is_complex()]) for tensor in tensors] for tensors in lists]


class Excess(NamedTuple):
    """How much too long a step is.

    Attributes:
        parts: the part of each parameter's step that is too much: 0 for most; floats, or tensors
            where lengths are not read.
        kept: the part of the length of the whole step that is not.
    """

    parts: Sequence[float | Tensor]
    kept: float | Tensor


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
        plain: whether parameters are whole and real, and so their own entries.
        reads: whether lengths are read on the host, which costs nothing where that computes them.
    """

    def __init__(
        self, parameters: Sequence[Tensor], layers: Sequence[int], workers: Workers
    ) -> None:
        here = [own_entries(parameter) for parameter in parameters]
        self._workers = workers
        self._sharded = [is_sharded(parameter) for parameter in parameters]
        self.plain = not any(self._sharded) and not any(p.is_complex() for p in parameters)
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

    def excess(self, steps: Sequence[Tensor], weights: Sequence[Tensor], largest: float) -> Excess:
        """Return which part of each step is too much.

        Args:
            steps: by parameter.
            weights: by parameter, from before the steps.
            largest: the largest length of a layer's step, in units of its weights' length.
        """
        norms = list(foreach.norm([*steps, *weights], 2, self._dtype))
        if not self.reads:
            return self._unread(norms, steps, largest)
        lengths = torch.stack(norms).tolist()
        count = len(self._rows)
        moved, lasting = [0.0] * len(self._least), [0.0] * len(self._least)
        for row, step, weight in zip(self._rows, lengths, lengths[count:], strict=False):
            moved[row] += step * step
            lasting[row] += weight * weight
        # A step that is not finite is not made up for.
        excess = [
            max(0.0, 1 - largest * math.sqrt(max(weight, least) / step))
            if 0 < step < math.inf
            else 0.0
            for step, weight, least in zip(moved, lasting, self._least, strict=True)
        ]
        kept = 1.0
        if any(excess):
            left = sum((1 - e) ** 2 * step for e, step in zip(excess, moved, strict=True))
            kept = math.sqrt(left / sum(moved))
        return Excess([excess[row] for row in self._rows], kept)

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

    def _unread(self, norms: list[Tensor], like: Sequence[Tensor], largest: float) -> Excess:
        if self._sums is None:
            self._sums = self._layer_sums()
        members, least, rows = self._sums
        squares = torch.stack([norm.to(self._device) for norm in norms]).square_()
        sums = squares.view(2, -1) @ members.mT
        if any(self._sharded):
            self._workers.sum_([sums])
        excess = (1 - largest * (torch.maximum(sums[1], least) / sums[0]).sqrt_()).clamp_min_(0.0)
        excess = torch.where(sums[0].isfinite(), excess, 0.0)
        left = ((1 - excess).square() * sums[0]).sum() / sums[0].sum()
        pairs = zip(excess[rows].unbind(), like, strict=True)
        parts = [part.to(tensor.device, tensor.dtype) for part, tensor in pairs]
        return Excess(parts, left.nan_to_num(1.0).sqrt_())


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
    ) -> float | Tensor:
        """Shorten steps in place; return which part of all their length is left.

        Args:
            steps: by name of the parameter.
            weights: the parameters of these names.
            largest: the largest length of a layer's step, in units of its weights' length.
        """
        names = tuple(steps)
        here, before = list(steps.values()), [weights[name] for name in names]
        layers = self._steps.get(names)
        if layers is None:  # parameters may be added, frozen, or get no gradient
            numbers = [self._numbers[name] for name in names]
            layers = self._steps[names] = LayerSteps(before, numbers, self._workers)
        if not layers.plain:
            here, before = [[own_entries(t) for t in tensors] for tensors in (here, before)]
        excess = layers.excess(here, before, largest)
        for one, much in zip(here, excess.parts, strict=True):
            if isinstance(much, Tensor) or much > 0:
                one.mul_(1 - much)
        return excess.kept


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


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether a tensor is divided among processes."""
    # By its method: torch.distributed is not imported for those who train in one process.
    return hasattr(tensor, "to_local")


def own_entries(tensor: Tensor) -> Tensor:
    """Return this process's entries of a tensor, in their place, as real numbers."""
    local: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return torch.view_as_real(local) if local.is_complex() else local
