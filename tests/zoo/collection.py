"""All models of the zoo that can be imported here."""

from __future__ import annotations

import importlib
from contextlib import suppress

from harness import Entry

# torchvision first: transformers and timm import it themselves.
COLLECTIONS = {
    "torchvision": "torchvision_models",
    "timm": "timm_models",
    "transformers": "transformers_models",
}


def entries() -> list[Entry]:
    """Every entry of every collection whose library can be imported."""
    with suppress(ImportError):
        importlib.import_module("torchvision_import")
    found: list[Entry] = []
    for name, module in COLLECTIONS.items():
        try:
            importlib.import_module(name)
        except ImportError:
            continue
        found += importlib.import_module(module).ENTRIES
    return found
