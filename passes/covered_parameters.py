"""Divide a model's parameters into those that get curvature blocks and those that do not."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase

from torch import nn

from kfac_fx.errors import NoParametersError


class Covered:
    """Sort the parameters of a model by what becomes of them.

    Args:
        model: its ``named_parameters()`` are sorted; nothing is changed.
        exclude: globs of parameters, or of modules that hold them; one string counts as one glob.

    Attributes:
        names: those that get blocks, in the model's order.
        frozen: those that do not require a gradient.
        excluded: those that the caller left out.
        sizes: the number of entries of every parameter, frozen and excluded ones too.

    Raises:
        NoParametersError: there is nothing to precondition.
    """

    def __init__(self, model: nn.Module, exclude: Collection[str]) -> None:
        self.sizes = {name: p.numel() for name, p in model.named_parameters()}
        self.frozen = tuple(n for n, p in model.named_parameters() if not p.requires_grad)
        trained = [name for name in self.sizes if name not in self.frozen]
        self.excluded = tuple(name for name in trained if _matches(name, exclude))
        self.names = [name for name in trained if name not in self.excluded]
        if not self.names:
            raise NoParametersError(
                f"{type(model).__name__} has no parameter that requires a gradient and is not "
                "excluded"
            )


def _matches(name: str, patterns: Collection[str]) -> bool:
    """Tell whether a parameter, or a module that holds it, matches one of the globs."""
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    # A glob of a module holds for all that is inside of it: "encoder.*" and "encoder" alike.
    parts = name.split(".")
    paths = [".".join(parts[: index + 1]) for index in range(len(parts))]
    return any(fnmatchcase(path, pattern) for path in paths for pattern in patterns)
