"""Rivals, each used as its documentation says; README.md here describes the environment.

A function takes a workload and a variant and returns a Method, or raises RefusedError with the
reason why the library cannot run it. Libraries are imported where they are used.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from methods import Method, RefusedError
from rival_curvature import backpack, curvlinops, nngeometry
from rival_optimizers import muon, shampoo, singd, soap
from workloads import Workload

Build = Callable[[Workload, str], Method]
RIVALS: dict[str, tuple[str, Build, tuple[str, ...]]] = {
    "singd": ("singd", singd, ("dense", "reduce", "diagonal")),
    "curvlinops": (
        "curvlinops",
        curvlinops,
        ("empirical", "empirical reduce", "sampled", "sampled reduce"),
    ),
    "nngeometry": ("nngeometry", nngeometry, ("sampled",)),
    "backpack": ("backpack", backpack, ("sampled",)),
    "soap": ("pytorch_optimizer", soap, ("",)),
    "shampoo": ("pytorch_optimizer", shampoo, ("",)),
    "muon": ("pytorch_optimizer", muon, ("",)),
}


def rivals(work: Workload, names: Sequence[str]) -> Iterator[Method | str]:
    """The methods of the rivals that are installed, or why there is none."""
    for name in names:
        package, build, variants = RIVALS[name]
        if importlib.util.find_spec(package) is None:
            yield f"{name}: not installed"
            continue
        for variant in variants:
            if "reduce" in variant and work.name == "ae":
                continue  # nothing is shared there
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    torch.manual_seed(0)
                    yield build(work, variant)
            except Exception as error:  # what a library cannot do is a result
                what = "" if isinstance(error, RefusedError) else f"{type(error).__name__}: "
                yield f"{name} {variant}: {what}{str(error)[:200]}"
