"""How long a preconditioned gradient is: by its length in Fhat, and by what gradients agree on.

docs/explanation/mathematics.md, section 9, derives the rules; bounds in units of the weights are in
kfac_fx/optim/bounds.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kfac_fx.torch_internals import foreach

RADIUS = 1e-2
"""Largest squared length of a preconditioned gradient in Fhat, times ``AdaptiveLength.factor``."""

WIDE = 0.1
NARROW = 0.02
"""Largest length of a layer's preconditioned gradient, in units of the length of its weights: where
averages are as new as the statistics, and at least, however far they have fallen behind."""

RESPONSE = 0.1
"""How fast the factor of all lengths follows the agreement of gradients with the steps before."""

PAST = 0.9
"""Weight of the older gradients in the direction of the steps before."""

SMALLEST_FACTOR, LARGEST_FACTOR = 0.2, 10.0
"""Limits of that factor: batches of one epoch, of which each has the cases that the others lack,
seem to disagree more than they do, and steps would come to rest."""


class NaturalLength:
    """Says how much of a preconditioned gradient to take, by its length in Fhat (KFC's bound).

    Args:
        largest: the trust region: the largest squared length; None for no limit.
    """

    certainty = 1.0

    def __init__(self, largest: float | None) -> None:
        self.largest = largest

    def share(self, gradient: Sequence[Tensor], updates: Sequence[Tensor]) -> float:
        """Return the factor, at most 1, that a preconditioned gradient is taken with.

        Its squared length is gradient^T Fhat^-1 gradient, so that no product with Fhat is needed.

        Args:
            gradient: the gradient of each parameter.
            updates: Fhat^-1 times it, in the same order.

        Returns:
            NaN where an entry of either is not finite; one synchronisation for that, too.
        """
        squared = sum((u.mul(g).sum().item() for g, u in _vectors(gradient, updates)), 0.0)
        if not math.isfinite(squared):
            wide = widened([gradient, updates])
            # The sum may have overflowed where all entries are finite: once more, with room.
            return self.share(wide[0], wide[1]) if wide else math.nan
        if squared <= 0 or self.largest is None:  # rounding may leave it below zero
            return 1.0
        return math.sqrt(min(1.0, self.largest / squared))


class AdaptiveLength:
    """Says how much of a preconditioned gradient to take, from gradients alone.

    Four things are put together (docs/explanation/mathematics.md, section 9):

    - Averages behind a Fisher that shrinks are too large, and their inverses too small, by ``lag``.
    - The length in Fhat, of the present scale, is at most the root of ``RADIUS``.
    - A factor follows the agreement of each gradient with the steps before: as long as it points
      the same way steps grow, and where noise has the upper hand they shrink.
    - A layer's part is no longer than a share of its weights, ``WIDE`` to ``NARROW``: what the
      Fisher of well-fitted cases says of long steps is not true.

    Attributes:
        factor: the third.
    """

    def __init__(self) -> None:
        self.factor = 1.0
        self._names: tuple[str, ...] = ()
        self._past: list[Tensor] = []  # sum of PAST^k times gradients, as long vectors
        self._squared = 0.0  # its squared length in the inverse of Fhat

    def share(
        self,
        names: Sequence[str],
        gradient: Sequence[Tensor],
        updates: Sequence[Tensor],
        lag: float,
    ) -> float:
        """Return the factor that a preconditioned gradient is taken with, but for single layers.

        Args:
            names: of the parameters; where they are others than in the last step, agreement with it
                is not asked for.
            gradient: the gradient of each.
            updates: Fhat^-1 times it, in the same order.
            lag: see ``InverseFisher.lag``.

        Returns:
            NaN where an entry is not finite: then nothing is remembered of this step.
        """
        pairs = _vectors(gradient, updates)
        if self._names != tuple(names):
            self._names, self._past = tuple(names), []
        dots = [u.mul(g).sum() for g, u in pairs]
        dots += [u.mul(past).sum() for (_, u), past in zip(pairs, self._past, strict=False)]
        # One synchronisation, not two: what they are of may be on a GPU.
        same = len(pairs) == 1
        read = torch.stack(dots if same else [d.double().to(dots[0].device) for d in dots]).tolist()
        squared, along = sum(read[: len(pairs)]), sum(read[len(pairs) :])
        if not math.isfinite(squared):
            # The sum may have overflowed where all entries are finite: once more, with room.
            wide = widened([gradient, updates])
            self._past = []
            return self.share(names, wide[0], wide[1], lag) if wide else math.nan
        if squared <= 0:  # rounding may leave it below zero
            return 1.0
        self._follow(squared, along, [g for g, _ in pairs])
        return lag * math.sqrt(min(1.0, RADIUS / (lag * squared))) * self.factor

    def _follow(self, squared: float, along: float, gradient: list[Tensor]) -> None:
        """Move the factor by the cosine between a gradient and those before, in Fhat^-1."""
        if not self._past:
            self._past = [vector.clone() for vector in gradient]
            self._squared = squared
            return
        cosine = along / math.sqrt(max(squared * self._squared, 1e-300))
        moved = self.factor * math.exp(RESPONSE * min(max(cosine, -1.0), 1.0))
        self.factor = min(max(moved, SMALLEST_FACTOR), LARGEST_FACTOR)
        # Of older gradients by the newest inverse: it changes little within the ten that count.
        self._squared = max(PAST**2 * self._squared + 2 * PAST * along + squared, squared)
        for past, vector in zip(self._past, gradient, strict=True):
            past.mul_(PAST).add_(vector)

    @property
    def certainty(self) -> float:
        """Return by how much less damping will do: where gradients agree, noise need not be."""
        return max(self.factor, 1.0) ** 2

    def widest(self, lag: float) -> float:
        """Return the largest length of a layer's part, in units of the length of its weights."""
        return max(NARROW, WIDE / math.sqrt(lag))

    def state(self) -> dict[str, Any]:
        """Return tensors and plain values that ``load`` restores."""
        return {
            "factor": self.factor,
            "names": list(self._names),
            "past": [vector.clone() for vector in self._past],
            "squared": self._squared,
        }

    def load(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore a ``state``."""
        self.factor = float(state["factor"])
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


def widened(lists: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """Return tensors in precisions in which sums of squares do not overflow; none if they are."""
    wide = (torch.float64, torch.complex128)
    if all(tensor.dtype in wide for tensor in lists[0]):
        return []
    return [[tensor.to(wide[tensor.is_complex()]) for tensor in tensors] for tensors in lists]
