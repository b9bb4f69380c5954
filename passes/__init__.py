"""Graph passes: from parameter uses to an instrumented graph."""

from kfac_fx.passes.eager_taps import EagerTaps, placeable
from kfac_fx.passes.every_piece import every_piece
from kfac_fx.passes.find_couplings import find_couplings
from kfac_fx.passes.find_uses import find_uses
from kfac_fx.passes.gather_blocks import gather_blocks
from kfac_fx.passes.insert_moments import find_moments
from kfac_fx.passes.insert_taps import insert_taps, instrument, is_tap
from kfac_fx.passes.strip_taps import strip_taps

__all__ = [
    "EagerTaps",
    "every_piece",
    "find_couplings",
    "find_moments",
    "find_uses",
    "gather_blocks",
    "insert_taps",
    "instrument",
    "is_tap",
    "placeable",
    "strip_taps",
]
