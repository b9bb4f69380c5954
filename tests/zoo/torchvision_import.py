"""Makes torchvision importable beside a CPU build of torch that lacks its compiled operators."""

from __future__ import annotations

import torch

try:
    import torchvision
except RuntimeError as error:
    # Only now: where the compiled operators load, defining one a second time aborts the process.
    if "operator torchvision::" not in str(error):
        raise
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

__all__ = ["torchvision"]
