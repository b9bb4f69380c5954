"""The places where tests look into a preconditioner: each once, so that a change is mended once.

What a public name gives is read by that name. These are for what has none, as it is nobody's
business but the tests'.
"""

from __future__ import annotations

from typing import Any

import kfac_fx


def fold(pre: kfac_fx.Preconditioner) -> None:
    """Take what was observed into the averages.

    ``step()`` does it too, but also needs gradients, and makes and compiles the inverses.
    """
    pre._fold()


def forget(pre: kfac_fx.Preconditioner) -> None:
    """Begin a step anew, as ``step()`` does at its end."""
    pre._recorder.switch(True)


def observing(pre: kfac_fx.Preconditioner) -> bool:
    """Whether something was observed that was not folded yet."""
    return pre._recorder.observing


def compiled_passes(pre: kfac_fx.Preconditioner) -> list[Any]:
    """The programs of passes by inputs, one for each kind of call; None where one could not be."""
    return list(pre._recorder._pass.programs.values())
