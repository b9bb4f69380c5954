"""The tap operators and the statistics of each kind of use.

Importing this package registers the operators, ``torch.ops.kfac_fx``.
"""

from kfac_fx.ops import (
    bilinear,
    case_share,
    cases,
    convolution,
    coupling,
    embedding,
    embedding_bag,
    grouped,
    linear,
    moment,
    recurrent,
    row_scale,
    scale_shift,
)
from kfac_fx.ops.gram import Rows, Statistic, multiplied
from kfac_fx.ops.net_buffers import STORE, all_buffers, factor_buffers, moment_buffers, switch

__all__ = [
    "STORE",
    "Rows",
    "Statistic",
    "all_buffers",
    "bilinear",
    "case_share",
    "cases",
    "convolution",
    "coupling",
    "embedding",
    "embedding_bag",
    "factor_buffers",
    "grouped",
    "linear",
    "moment",
    "moment_buffers",
    "multiplied",
    "recurrent",
    "row_scale",
    "scale_shift",
    "switch",
]
