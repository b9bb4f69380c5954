"""Find the line of the user's own code in a stack: what torch and this library do is left out."""

from __future__ import annotations

import linecache
import traceback
from pathlib import Path

import torch

_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent.parent)


def running_line() -> str:
    """Return the line of the user's own code that runs at present, with file and number."""
    return _line(traceback.extract_stack())


def user_line(error: BaseException) -> str:
    """Return the last line of the user's own code on an error's traceback, with file and number."""
    return _line(traceback.extract_tb(error.__traceback__))


def _line(stack: traceback.StackSummary) -> str:
    """Return the last line of a stack that is the user's own."""
    # What torch and this library do in between is of no use to who reads the message.
    frames = [frame for frame in stack if not frame.filename.startswith((_TORCH, _HERE, "<"))]
    if not frames:
        return "in torch"
    frame = frames[-1]
    line = (frame.line or linecache.getline(frame.filename, frame.lineno or 0)).strip()
    return f"{frame.filename}:{frame.lineno}: `{line}`"
