"""examples/poisson.py runs; how far it gets in a second says nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_poisson() -> None:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "ignore", str(ROOT / "examples" / "poisson.py")]
    done = subprocess.run(
        [*command, "--seconds", "1.5"],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith(("K-FAC", "Adam"))]
    assert len(rows) == 4
    losses = [float(row[-2]) for row in rows]
    assert all(0 < loss < 100 for loss in losses)
