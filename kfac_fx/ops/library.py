"""The namespace of the library's operators, ``torch.ops.kfac_fx``."""

import torch

LIBRARY = torch.library.Library("kfac_fx", "DEF")
