"""Remove global module hooks that a failed torch.export leaves in place.

Why: where ``torch.export.export`` fails, torch 2.11 keeps a global hook that every later
``register_buffer`` in the process runs. No public way: only the caller that registered a hook has
its handle. Seen on torch 2.11; on 2.13 nothing is left, and removing nothing does no harm.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def no_hooks_left() -> Iterator[None]:
    """Within the context, global hooks of ``register_buffer`` are removed again when it ends."""
    hooks = torch.nn.modules.module._global_buffer_registration_hooks
    # Others may have hooks of their own here: only those that came meanwhile are removed, whether
    # the code in the context failed or not.
    before = set(hooks)
    try:
        yield
    finally:
        for key in set(hooks) - before:
            del hooks[key]
