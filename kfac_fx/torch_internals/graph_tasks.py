"""Ask which run of autograd's engine the code is in.

Why: hooks of one backward pass must not be taken for those of another: a penalty's
``torch.autograd.grad`` inside the loss is a run of the engine as well. No public way: the engine's
number of its run has no public name. Seen on torch 2.11 and 2.13.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

current_graph_task: Callable[[], int] = torch._C._current_graph_task_id
"""Return the number of the engine's run, -1 outside of backward passes."""
