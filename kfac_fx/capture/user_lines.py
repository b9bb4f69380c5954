"""Find the line of the user's own code in a stack: what torch and this library do is left out."""

from __future__ import annotations

import contextlib
import linecache
import sys
import traceback
from pathlib import Path

import torch

_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent.parent)
_AROUND = (str(Path(_TORCH, "_compile.py")), str(Path(_TORCH, "_dynamo", "eval_frame.py")))
"""Files of torch whose functions call what they were given."""

NOWHERE = "in torch"
"""What stands for a line where none is the user's."""


def running_line() -> str:
    """Return the line of the user's own code that runs at present, with file and number."""
    return _line(traceback.extract_stack())


def user_line(error: BaseException) -> str:
    """Return the last line of the user's own code on an error's traceback, with file and number."""
    return _line(traceback.extract_tb(error.__traceback__))


def users_code_asks(depth: int) -> bool:
    """Tell whether user's code calls what stands ``depth`` frames above; torch asks as well."""
    first = frame = sys._getframe(depth + 1)
    between = (torch.random.__file__, contextlib.__file__)
    # torch.export enters modes of its own, which hand on what the user's code calls. Once Dynamo is
    # imported it stands around torch.manual_seed, and asks on its own account besides.
    while frame.f_back is not None and (
        frame.f_code.co_filename in between
        or frame.f_code.co_name == "__torch_function__"
        or (frame is not first and frame.f_code.co_filename in _AROUND)
    ):
        frame = frame.f_back
    return not frame.f_code.co_filename.startswith((_TORCH, _HERE))


def _line(stack: traceback.StackSummary) -> str:
    """Return the last line of a stack that is the user's own."""
    # What torch and this library do in between is of no use to who reads the message.
    frames = [frame for frame in stack if not frame.filename.startswith((_TORCH, _HERE, "<"))]
    if not frames:
        return NOWHERE
    frame = frames[-1]
    line = (frame.line or linecache.getline(frame.filename, frame.lineno or 0)).strip()
    return f"{frame.filename}:{frame.lineno}: `{line}`"
