"""The worked example of a compile pipeline runs, and compares what it says it compares."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_pipeline_example() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(ROOT / "examples" / "pipeline.py")]
    done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    names = [line.split(":")[0].strip() for line in lines[1:9]]
    assert names.count("KFACTransform") == 2 and "split_in_two" in names
    compared = [line for line in lines if "8 factors, largest relative difference" in line]
    assert len(compared) == 4
