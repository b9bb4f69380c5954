"""The benchmarks' parts, on networks of a few units."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:  # their names are common ones
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def tiny():
    from workloads import Workload, reconstruction

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 6))
    return Workload("ae", model, "bernoulli", reconstruction(2, 16, 6), 1e-4)


def images():
    from workloads import Workload
    from workloads import images as batches

    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 2, 3, 1, 1, bias=False), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten())
    model = nn.Sequential(*layers, nn.Linear(2 * 64, 10))
    return Workload("cnn", model, "categorical", batches(2, 5, 8, 10), 1e-3)


def test_multiply_adds_of_linear_layers() -> None:
    from counts import count

    found = count(tiny())
    assert found.forward == 16 * (24 + 24)
    assert found.training == 16 * (3 * 24 + 2 * 24)  # no derivative of the input
    assert found.sampling == 16 * 24
    assert found.covariances == 16 * (7**2 + 4**2 + 5**2 + 6**2) / 2
    assert found.refresh == (7**3 + 4**3 + 5**3 + 6**3) / 2
    assert found.apply == 7 * 4 * (7 + 4) + 5 * 6 * (5 + 6)
    passes = found.sampling + found.covariances + found.forward
    assert found.statistics("sampled", 1 / 8) == passes / 8


def test_multiply_adds_of_a_convolution() -> None:
    from counts import count

    found = count(images())
    positions = 5 * 64
    patches = min(positions * 27**2, positions * 3**2 * 25) / 2
    linear = 5 * (129**2 + 10**2) / 2
    assert found.covariances == patches + positions * 2**2 / 2 + 5 * 4**2 / 2 + linear
    assert found.apply == 27 * 2 * (27 + 2) + 4**2 + 129 * 10 * (129 + 10)


def test_medians_and_intervals() -> None:
    from timing import Interleaved, median_ratio

    ratio = median_ratio([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 100.0, 0.0])
    assert ratio.value == 5.0
    assert 0.0 < ratio.low < ratio.value < ratio.high < 100.0

    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    Interleaved(calls, warmup=1, counts={"a": 1, "b": 1}).run(2)
    assert order == ["a", "b", "a", "b", "b", "a"]  # warm-up, a round, a round backwards


def test_a_method_that_does_nothing_is_found_out() -> None:
    from methods import Method, cosine

    gradient = torch.ones(3)
    with pytest.raises(RuntimeError, match="does not precondition"):
        cosine(Method("idle", "sampled", {}, {}, lambda: (gradient, 2 * gradient)))


def test_the_report_says_where_a_rival_is_faster(tmp_path: Path) -> None:
    from report import picture, tables
    from stages import measured

    numbers = {"torch": torch.__version__, "threads": 1, "workloads": {}}
    one = measured(tiny(), ["backpack", "muon"], 3, 5.0)
    ours = one["methods"][0]
    assert ours["name"] == "kfac_fx, empirical"
    stages = {"training", "statistics", "refresh", "apply", "whole", "cholesky"}
    assert set(ours["stages"]["cpu"]) == stages | {"cholesky of layers"}
    fast = dict.fromkeys(("statistics", "refresh", "apply"), 0.0)
    rival = {**ours, "name": "rival x", "ours": False, "note": "has nothing to do"}
    one["methods"].append({**rival, "stages": {"cpu": fast, "wall": fast}})
    numbers["workloads"]["ae"] = one
    text = tables(numbers)
    assert "apply slower than rival x (0.000): has nothing to do" in text
    assert "refresh slower than rival x (0.000): torch's Cholesky inverses" in text
    assert "of GEMM rate" in text
    picture(numbers, tmp_path / "stages.png")
    assert (tmp_path / "stages.png").stat().st_size > 10_000


def test_rivals_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import rivals

    monkeypatch.setitem(rivals.RIVALS, "none", ("no_such_package", rivals.muon, ("",)))
    assert list(rivals.rivals(tiny(), ["none"])) == ["none: not installed"]


@pytest.mark.parametrize("setting", ["a", "b", "c"])
def test_a_setting_is_measured(setting: str) -> None:
    import steps

    found = steps.measured(tiny(), setting, steps.preconditioned, False, 1)
    assert float(found.split()[0]) > 0
    assert ("limit" in found) == ("ae" in steps.LIMITS[setting])


def test_a_page_says_when_on_what_and_by_which_command() -> None:
    from page import commit, machine, page

    text = page("Memory", "python tests/benchmarks/memory.py", "a  b\n1  2  \n", "memory.png")
    assert text.startswith("# Memory\n")
    assert "`python tests/benchmarks/memory.py`" in text
    assert commit() in text and machine() in text and f"torch {torch.__version__}" in text
    assert "![Memory](memory.png)" in text
    assert text.endswith("```text\na  b\n1  2\n```\n")


def test_every_page_of_a_benchmark_was_written_by_its_command() -> None:
    pages = sorted((FOLDER.parents[1] / "docs/benchmarks").glob("*.md"))
    assert pages
    for path in pages:
        text = path.read_text(encoding="utf-8")
        for row in ("command", "date", "commit", "machine"):
            assert f"\n| {row} | " in text, path
