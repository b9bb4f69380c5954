"""Makes torchvision importable beside a CPU build of torch that lacks its compiled operators."""

from __future__ import annotations

from contextlib import suppress

import torch

_library = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    with suppress(RuntimeError):  # the real one is there
        _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import torchvision  # noqa: E402

__all__ = ["torchvision"]
