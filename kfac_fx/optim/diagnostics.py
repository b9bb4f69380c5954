"""What an optimizer's last step was like, as plain numbers by name."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

SHOWN = ("loss", "damping", "gamma", "rho", "alpha", "mu")


class Diagnostics(dict[str, float]):
    """Numbers by name; seconds are those of a stage of the step."""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time inside to ``seconds_<name>``."""
        start = time.perf_counter()
        yield
        key = f"seconds_{name}"
        self[key] = self.get(key, 0.0) + time.perf_counter() - start

    def summary(self) -> str:
        """A line for progress bars."""
        return ", ".join(f"{key} {self[key]:.3g}" for key in SHOWN if key in self)
