"""Graph passes: from parameter uses to an instrumented graph.

Classes are passes over a GraphModule (torch.fx.passes.infra), functions work on one graph.
"""

from kfac_fx.passes.analyses import CheckCoverage, Covered, FindCouplings, FindMoments, FindUses
from kfac_fx.passes.annotations import is_tap, read_curvature
from kfac_fx.passes.base import Analysis, GraphPass
from kfac_fx.passes.chain import KFACTransform
from kfac_fx.passes.compiled import recorded_module
from kfac_fx.passes.eager_taps import EagerTaps, placeable
from kfac_fx.passes.every_piece import every_piece
from kfac_fx.passes.find_couplings import find_couplings
from kfac_fx.passes.find_uses import find_uses
from kfac_fx.passes.gather_blocks import gather_blocks
from kfac_fx.passes.inline_calls import InlineCalls
from kfac_fx.passes.insert_moments import find_moments
from kfac_fx.passes.insert_taps import InsertTaps, insert_taps
from kfac_fx.passes.manager import PassManager, PassReport
from kfac_fx.passes.programs import instrument_program
from kfac_fx.passes.strip_taps import StripTaps, strip_taps

__all__ = [
    "Analysis",
    "CheckCoverage",
    "Covered",
    "EagerTaps",
    "FindCouplings",
    "FindMoments",
    "FindUses",
    "GraphPass",
    "InlineCalls",
    "InsertTaps",
    "KFACTransform",
    "PassManager",
    "PassReport",
    "StripTaps",
    "every_piece",
    "find_couplings",
    "find_moments",
    "find_uses",
    "gather_blocks",
    "insert_taps",
    "instrument_program",
    "is_tap",
    "placeable",
    "read_curvature",
    "recorded_module",
    "strip_taps",
]
