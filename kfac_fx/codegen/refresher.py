"""Runs a refresh, whole or in part, and says where it met with difficulties."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

log = logging.getLogger("kfac_fx")

FLAGS = ("failed_", "clamped_", "indefinite_")
"""How the names of outputs begin that are not inverses."""


class Refresher:
    """A refresh program with one that is run in its place where rounding makes it fail.

    Args:
        run: from the damping and the factors to inverses and flags by name.
        robust: makes the program with eigenvalues raised.
        given: the flag of a conditional -> what is said where it is not positive.

    Attributes:
        clamped: entries of conditionals that rounding had pushed to one, in the last run.
    """

    def __init__(
        self,
        run: Callable[..., Mapping[str, Tensor]],
        robust: Callable[[], fx.GraphModule],
        given: Mapping[str, str],
    ) -> None:
        self._run, self._make, self._given = run, robust, given
        self._made: Any = None
        self.clamped = 0

    @torch.no_grad()
    def __call__(self, damping: Tensor, factors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Inverses by name; see ``Program.refresh``."""
        try:
            result, flags = _split(self._run(damping, *factors))
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            log.warning("eigenvalues failed (%s): the refresh is run in float64", error)
            result, flags = _split(self._robust(damping, factors))
        failed = [name for name, count in flags.items() if count and name.startswith("failed_")]
        if failed:
            names = ", ".join(name.removeprefix("failed_") for name in failed)
            log.warning("Cholesky failed for %s: eigenvalues were raised", names)
            result, flags = _split(self._robust(damping, factors))
        self.clamped = sum(n for name, n in flags.items() if name.startswith("clamped_"))
        for flag, pair in self._given.items():
            if flags.get(flag):
                log.warning(
                    "%s is not positive: the coupling is left out until the next refresh", pair
                )
        return result

    def _robust(self, damping: Tensor, factors: Sequence[Tensor]) -> Mapping[str, Tensor]:
        """The refresh with eigenvalues raised, in float64."""
        if self._made is None:
            self._made = self._make()
        found: Mapping[str, Tensor] = self._made(
            damping.double(), *(f.to(damping.device, torch.float64) for f in factors)
        )
        return {
            name: value.to(damping.dtype) if value.is_floating_point() else value
            for name, value in found.items()
        }


def _split(outputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Inverses and flags; one synchronisation for all flags."""
    inverses = {name: value for name, value in outputs.items() if not name.startswith(FLAGS)}
    names = [name for name in outputs if name.startswith(FLAGS)]
    if not names:
        return inverses, {}
    counts = torch.stack([outputs[name].long().abs().sum() for name in names]).tolist()
    return inverses, dict(zip(names, map(int, counts), strict=True))
