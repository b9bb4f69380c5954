"""Name the parametrizations of torch.nn.utils that tracing must treat in a way of its own.

Why: weight normalisation can be traced through, while spectral and orthogonal parametrizations ask
for the mode or for values of tensors. No public way: ``torch.nn.utils.parametrizations`` has public
functions that register them, and private classes. Seen on torch 2.11, 2.13 and 2.14.
"""

from __future__ import annotations

from torch import nn
from torch.nn.utils.parametrizations import _Orthogonal, _SpectralNorm, _WeightNorm


def is_untraceable(module: nn.Module) -> bool:
    """Tell whether a parametrization branches on its mode or on values (spectral, orthogonal)."""
    return isinstance(module, (_SpectralNorm, _Orthogonal))


def is_weight_norm(module: nn.Module) -> bool:
    """Tell whether a parametrization computes the weight from a direction and a length."""
    return isinstance(module, _WeightNorm)
