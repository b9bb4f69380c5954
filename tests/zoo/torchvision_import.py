"""Makes torchvision importable beside a CPU build of torch that lacks its compiled operators."""

from __future__ import annotations

import torch

_library = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    try:
        _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    except RuntimeError:  # the real one is there
        pass

import torchvision  # noqa: E402

__all__ = ["torchvision"]
