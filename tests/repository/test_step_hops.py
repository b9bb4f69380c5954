"""How many of the library's files and functions a plain training step enters."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import CodeType, FrameType

import torch
import torch.nn.functional as F
from support.networks import mlp
from support.source_tree import ROOT

import kfac_fx

FILES = 18
FUNCTIONS = 80

Entered = set[CodeType]


def is_ours(code: CodeType) -> bool:
    path = Path(code.co_filename)
    return any(path.is_relative_to(ROOT / folder) for folder in ("kfac_fx", "passes"))


def entered_by_a_step() -> Entered:
    """From observe to step, with a refresh in it; statistics come in a thread of autograd's."""
    net = kfac_fx.transform(mlp(8, 16, 5), structure="block_diagonal")
    options = {"damping": 1e-2, "statistics_every": 1, "refresh_every": 1}
    preconditioner = kfac_fx.Preconditioner(net, **options)
    x, y = torch.randn(32, 8), torch.randint(5, (32,))
    found: Entered = set()

    def look(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and is_ours(frame.f_code):
            found.add(frame.f_code)

    for step in range(3):  # the first ones make what later ones reuse
        net.zero_grad()
        outputs = net(x)
        loss = F.cross_entropy(outputs, y)
        if step == 2:
            threading.setprofile(look)
            sys.setprofile(look)
        preconditioner.observe(outputs)
        loss.backward()
        preconditioner.step()
    sys.setprofile(None)
    threading.setprofile(None)
    # Comprehensions are functions of their own in Python 3.11 and before, and are read in line.
    return {code for code in found if code.co_name == "<lambda>" or code.co_name[0] != "<"}


def test_a_plain_step_is_read_in_few_files() -> None:
    """What is switched off (couplings, EKFAC, storage, several processes) is not on the path."""
    entered = entered_by_a_step()
    files = {code.co_filename for code in entered}
    assert any(path.endswith("preconditioner.py") for path in files)
    assert len(files) <= FILES, sorted(files)
    assert len(entered) <= FUNCTIONS, sorted(f"{c.co_filename}: {c.co_name}" for c in entered)
