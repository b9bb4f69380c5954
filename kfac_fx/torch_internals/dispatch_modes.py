"""See every operator that runs, and let fake tensors be traced below autograd.

Why: a program is traced by running the code under a mode that sees every operator. No public way:
``TorchDispatchMode`` is documented for extending torch and lives in a private module, as does the
dispatcher that serves fake tensors. Seen on torch 2.11, 2.13 and 2.14.
"""

from torch._dispatch.python import enable_python_dispatcher
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["TorchDispatchMode", "enable_python_dispatcher"]
