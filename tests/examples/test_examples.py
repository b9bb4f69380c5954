"""Every script of examples/ runs to its end, and prints and writes what its page says.

How well it trains in seconds says nothing. Each runs in a process of its own, in an empty folder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.processes import ROOT, free_port, run_python

EXAMPLES = ROOT / "examples"
SHARED = {"common"}
"""Imported by the others; there is nothing to run."""


@dataclass(frozen=True)
class Example:
    """A script, its arguments, the files it must write, and what its lines must say."""

    script: str
    arguments: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    check: Callable[[list[str]], None] = lambda lines: None
    processes: int = 1

    def __str__(self) -> str:
        return self.script


def starts(*beginnings: str) -> Callable[[list[str]], None]:
    """A check: a line begins with each of these, in this order."""

    def check(lines: list[str]) -> None:
        found = iter(lines)
        for beginning in beginnings:
            assert any(line.startswith(beginning) for line in found), (beginning, lines)

    return check


def poisson(lines: list[str]) -> None:
    rows = [line.split() for line in lines if line.startswith(("K-FAC", "Adam"))]
    assert len(rows) == 4
    losses = [float(row[-2]) for row in rows]
    assert all(0 < loss < 100 for loss in losses)


def pipeline(lines: list[str]) -> None:
    names = [line.split(":")[0].strip() for line in lines[1:9]]
    assert names.count("KFACTransform") == 2 and "split_in_two" in names
    compared = [line for line in lines if "8 factors, largest relative difference" in line]
    assert len(compared) == 4


QUICK = ("--quick",)
METHODS = ("K-FAC", "SGD", "Adam")
FAST = [
    Example(
        "autoencoders",
        QUICK,
        ("autoencoders_digits.png",),
        starts("Equal processor time", *METHODS, "Muon", "SGD's best", "saved"),
    ),
    Example(
        "batch_scaling",
        QUICK,
        ("batch_scaling.png",),
        starts("training error at the start", "error left", "K-FAC", "SGD", "saved"),
    ),
    Example("curves", (), ("curves.png",), starts("saved curves.png")),
    Example("laplace", QUICK, (), starts("60 cases, 42 weights", "precision", " distance")),
    Example("influence", QUICK, (), starts("90 cases", "mean influence", "of the")),
    Example(
        "curves_autoencoder",
        QUICK,
        ("curves_autoencoder.png",),
        starts("Grid", "Equal wall time", "K-FAC", "SGD", "saved"),
    ),
    Example(
        "curves_structures",
        QUICK,
        check=starts("iterations", "block_diagonal", "block_tridiagonal", "block_diagonal:"),
    ),
    Example("pipeline", check=pipeline),
    Example("poisson", QUICK, check=poisson),
]
SLOW = [
    Example("digits", QUICK, ("digits.png",), starts(*METHODS)),
    Example(
        "distributed",
        (*QUICK, "--folder", "checkpoints"),
        check=starts("epoch 2", "MiB in messages", "batch", "K-FAC", "SGD"),
        processes=2,
    ),
    Example(
        "distributed_scaling",
        files=("distributed_scaling.png",),
        check=starts("ResNet-50", "   1024", "7B transformer", "   1024"),
    ),
    Example(
        "fisher_figures",
        (*QUICK, "--save", "fisher.png"),
        ("fisher.png",),
        starts("chain, accuracy", "block-tridiagonal", "residual network", "forest of the data"),
    ),
    Example(
        "pictures",
        files=("transformer.svg", "transformer.html", "unet.svg", "experts.svg"),
    ),
]


def command(example: Example) -> list[str]:
    script = [str(EXAMPLES / f"{example.script}.py"), *example.arguments]
    if example.processes == 1:
        return script
    launcher = ["-m", "torch.distributed.run", f"--master-port={free_port()}"]
    return [*launcher, f"--nproc-per-node={example.processes}", *script]


@pytest.mark.parametrize(
    "example", [*FAST, *(pytest.param(one, marks=pytest.mark.slow) for one in SLOW)], ids=str
)
def test_runs_to_its_end(example: Example, tmp_path: Path) -> None:
    done = run_python(*command(example), folder=tmp_path, timeout=600)
    example.check(done.stdout.splitlines())
    for name in example.files:
        assert (tmp_path / name).stat().st_size > 1000, name


def test_every_script_is_run() -> None:
    """A new example is added to one of the two lists above."""
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    assert scripts - SHARED == {example.script for example in [*FAST, *SLOW]}
