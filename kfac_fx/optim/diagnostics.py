"""Numbers about an optimizer's last step, by name."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

SHOWN = ("loss", "damping", "gamma", "rho", "alpha", "mu", "rows")
"""What a progress bar has room for."""


class Diagnostics(dict[str, float]):
    """Numbers by name; ``seconds_<stage>`` are those of a stage of the step.

    A dict of plain numbers, so that a list of them is a record that can be saved and drawn.
    """

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the seconds that pass inside to ``seconds_<name>``."""
        # Of a GPU these are seconds until work was handed over, except in stages that wait for it.
        start = time.perf_counter()
        yield
        key = f"seconds_{name}"
        self[key] = self.get(key, 0.0) + time.perf_counter() - start

    def summary(self) -> str:
        """Return the numbers that matter most in one line."""
        return ", ".join(f"{key} {self[key]:.3g}" for key in SHOWN if key in self)
