"""The namespace of the library's operators, ``torch.ops.kfac_fx``."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

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
