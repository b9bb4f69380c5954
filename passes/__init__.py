"""Graph passes: from parameter uses to an instrumented graph.

Every class here is a pass over a GraphModule (torch.fx.passes.infra) and stands in one file with
the function that does its work on one graph. This file gathers the names for people; the library
itself imports the files. The names in ``_ROOMS_ABOVE`` belong to models that run, to torch.compile
and to torch.export; users know them as passes, so they are found here too.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from kfac_fx.passes.annotations import is_tap, read_curvature
from kfac_fx.passes.base import Analysis, GraphPass
from kfac_fx.passes.check_coverage import CheckCoverage
from kfac_fx.passes.covered_parameters import Covered
from kfac_fx.passes.find_couplings import FindCouplings, find_couplings
from kfac_fx.passes.find_moments import FindMoments, find_moments
from kfac_fx.passes.find_uses import FindUses, find_uses
from kfac_fx.passes.gather_blocks import gather_blocks
from kfac_fx.passes.inline_calls import InlineCalls
from kfac_fx.passes.insert_taps import InsertTaps, insert_taps
from kfac_fx.passes.kfac_transform import KFACTransform
from kfac_fx.passes.manager import PassManager, PassReport
from kfac_fx.passes.options import TransformOptions
from kfac_fx.passes.strip_taps import StripTaps, strip_taps

if TYPE_CHECKING:
    from kfac_fx.dynamo.compiled_model import recorded_module
    from kfac_fx.eager.eager_taps import EagerTaps
    from kfac_fx.eager.recordable_uses import every_piece, placeable
    from kfac_fx.export.instrument_program import instrument_program

_ROOMS_ABOVE = {
    "EagerTaps": "kfac_fx.eager.eager_taps",
    "every_piece": "kfac_fx.eager.recordable_uses",
    "instrument_program": "kfac_fx.export.instrument_program",
    "placeable": "kfac_fx.eager.recordable_uses",
    "recorded_module": "kfac_fx.dynamo.compiled_model",
}
"""Public name -> the file above this room that defines it."""


def __getattr__(name: str) -> object:
    """Return a name of a room above this one.

    Those rooms import files of this one, and Python runs this file before any of them: an import at
    the top would ask for a name of a file that is still being read.
    """
    if name in _ROOMS_ABOVE:
        return getattr(import_module(_ROOMS_ABOVE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
    "TransformOptions",
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
