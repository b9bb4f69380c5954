"""Ask which run of autograd's engine the code is in, and be called at its end.

Why: hooks of one backward pass must not be taken for those of another: a penalty's
``torch.autograd.grad`` inside the loss is a run of the engine as well; and what comes after the run
that was waited for must not be counted. No public way: the engine's number of its run has no public
name, nor has the end of a run a hook. Seen on torch 2.11, 2.13 and 2.14.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import Variable

current_graph_task: Callable[[], int] = torch._C._current_graph_task_id
"""Return the number of the engine's run, -1 outside of backward passes; later runs have larger."""


def at_end_of_run(function: Callable[[], None]) -> None:
    """Call a function when the run that the code is in has ended; not if it fails."""
    Variable._execution_engine.queue_callback(function)
