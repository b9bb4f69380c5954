"""Float32 products as precise as float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_SETTINGS: Any = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]


@contextmanager
def unrounded() -> Iterator[None]:
    """No product or convolution of float32 inside is rounded to TF32, whatever is allowed outside.

    The settings are those of the whole process: threads must not differ in them. Programs of
    torch.compile take those of their call.
    """
    held = [setting.fp32_precision for setting in _SETTINGS]
    for setting in _SETTINGS:
        setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        for setting, precision in zip(_SETTINGS, held, strict=True):
            setting.fp32_precision = precision


def products_are_rounded() -> bool:
    """Whether a GPU rounds float32 products to TF32."""
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")
