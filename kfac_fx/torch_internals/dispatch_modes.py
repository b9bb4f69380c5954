"""See every operator that runs, and tell whether somebody else does.

Why: a program is traced by running the code under a mode that sees every operator; and taps take
shorter ways that no such mode may miss. No public way: ``TorchDispatchMode`` is documented for
extending torch and lives in a private module; nothing public says which modes are on. Seen on torch
2.11 and 2.13.
"""

from __future__ import annotations

from torch._dispatch.python import enable_python_dispatcher
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

__all__ = ["TorchDispatchMode", "dispatch_mode_active", "enable_python_dispatcher"]


def dispatch_mode_active() -> bool:
    """Tell whether a mode sees the operators that run now."""
    return _get_current_dispatch_mode() is not None
