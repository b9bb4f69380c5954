"""What importing the library brings, and what waits until it is asked for."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest

import kfac_fx


def test_version() -> None:
    assert kfac_fx.__version__ == version("kfac_fx")


def test_all_names_are_there() -> None:
    for name in kfac_fx.__all__:
        assert getattr(kfac_fx, name) is not None
    assert kfac_fx.optim.KFACOptions is kfac_fx.KFACOptions
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = kfac_fx.nothing  # type: ignore[attr-defined]


def test_an_import_draws_no_pictures() -> None:
    """Pictures and networkx cost as much time as all else; ``kfac_fx.viz`` brings them."""
    code = (
        "import sys, kfac_fx\n"
        "for name in ('kfac_fx.viz', 'kfac_fx.distributed', 'networkx', 'matplotlib'):\n"
        "    assert name not in sys.modules, name\n"
        "assert kfac_fx.viz.save and 'kfac_fx.viz' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
