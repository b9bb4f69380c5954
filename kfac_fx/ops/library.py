"""The namespace of the library's operators, ``torch.ops.kfac_fx``."""

import hashlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.compiler.config as compiler

LIBRARY = torch.library.Library("kfac_fx", "DEF")


def cache_tag(sources: Iterable[Path]) -> str:
    """Name what the operators are made of."""
    code = b"".join(path.read_bytes() for path in sorted(sources))
    return f"kfac_fx-{hashlib.sha256(code).hexdigest()[:16]}"


# torch finds compiled graphs on the disk by the names of the operators in them. It would run what
# it once made of another version's taps.
SOURCES = [
    path
    for folder in ("ops", "linalg", "torch_internals")
    for path in (Path(__file__).parents[1] / folder).glob("*.py")
]
compiler.cache_key_tag = " ".join(filter(None, (compiler.cache_key_tag, cache_tag(SOURCES))))


def left_to_python(body: Callable[..., Any]) -> Callable[..., Any]:
    """Return the body of an operator as a function that Dynamo runs and does not compile.

    What Dynamo leaves to Python (networks with recurrent layers) calls operators from there, and
    Dynamo goes on to what they call: bodies, whose autograd functions it cannot follow.

    Args:
        body: what an operator does.
    """
    disabled: list[Callable[..., Any]] = []

    def run(*args: Any) -> Any:
        # Switching Dynamo off imports it, which takes a second; where it is not, nothing compiles.
        if "torch._dynamo" not in sys.modules:
            return body(*args)
        if not disabled:
            disabled.append(torch.compiler.disable(body))
        return disabled[0](*args)

    return run
