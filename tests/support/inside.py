"""The places where tests look into a preconditioner: each once, so that a change is mended once.

What a public name gives is read by that name. These are for what has none, as it is nobody's
business but the tests'.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import kfac_fx
from kfac_fx.codegen.refresh_module import Refreshed
from kfac_fx.curvature.estimate import Estimate

Holder = kfac_fx.Preconditioner | kfac_fx.KFAC
"""What has an inverse Fisher."""


def fold(pre: kfac_fx.Preconditioner) -> None:
    """Take what was observed into the averages.

    ``step()`` does it too, but also needs gradients, and makes and compiles the inverses.
    """
    found = pre.recorder.take()
    assert not found or pre.inverse.fold(found, pre.ema_decay)


def forget(pre: kfac_fx.Preconditioner) -> None:
    """Begin a step anew, as ``step()`` does at its end."""
    pre.recorder.switch(True)


def observing(pre: kfac_fx.Preconditioner) -> bool:
    """Whether something was observed that was not folded yet."""
    return pre.recorder.observing


def compiled_passes(pre: kfac_fx.Preconditioner) -> list[Any]:
    """The programs of passes by inputs, one for each kind of call; None where one could not be."""
    return list(pre.recorder._pass.programs.values())


def taken(pre: kfac_fx.Preconditioner) -> list[Any]:
    """The new statistics of a step, in the order of the averages; they do not enter these."""
    found = pre.recorder.take()
    return [found[key] for averages in estimate_of(pre).all for key in averages.keys]


def estimate_of(holder: Holder) -> Estimate:
    """The running averages, with what is stored of them and how many statistics are in them."""
    return holder.inverse.estimate


def covered(holder: Holder) -> Mapping[str, nn.Parameter]:
    """The parameters that have a block, by name."""
    return holder.inverse.covered.parameters


def random_gradients(holder: Holder) -> dict[str, Tensor]:
    """A normal vector of every covered parameter's shape, by name."""
    return {name: torch.randn_like(p) for name, p in covered(holder).items()}


def refreshed(holder: Holder) -> Refreshed:
    """The inverses in use."""
    return holder.inverse.refreshed


def eigenbasis(holder: Holder, block: str) -> tuple[Tensor, Tensor, Tensor]:
    """(U_A, U_G, S) of a block under tikhonov="ekfac": bases, and second moments in them."""
    return holder.inverse.moments.eigenbasis(block)
