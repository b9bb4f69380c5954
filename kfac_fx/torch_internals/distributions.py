"""Switch off the checks of torch.distributions for a while.

Why: a distribution that is made in a traced function would look at values to check its arguments.
No public way: ``Distribution.set_default_validate_args`` sets the switch, and nothing reads it, so
it could not be put back to what it was. Seen on torch 2.11, 2.13 and 2.14.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributions import Distribution


@contextmanager
def arguments_unchecked() -> Iterator[None]:
    """Within the context, distributions do not look at the values of their arguments."""
    # The switch is the class's, for the whole process: users may have set it either way.
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)
