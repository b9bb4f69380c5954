"""The benchmark of training: its problems with known solutions, the search for a rate, resuming."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:  # their names are common ones
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


class TrappedElectrons(nn.Module):
    """log of the exact wave function of two electrons in a trap of omega = 1/2."""

    def forward(self, x: Tensor) -> Tensor:
        apart = (x[:, :3] - x[:, 3:]).square().sum(1, keepdim=True).sqrt()
        return (1 + apart / 2).log() - 0.25 * x.square().sum(1, keepdim=True)


class Gaussian(nn.Module):
    """log of a trial function whose energy has a closed form."""

    def forward(self, x: Tensor) -> Tensor:
        return -0.2 * x.square().sum(1, keepdim=True)


def test_energy_of_the_exact_wave_function_is_two() -> None:
    from problem_equations import WaveFunction

    wave = WaveFunction()
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(wave.local_energy(TrappedElectrons(), x), torch.full((20, 1), 2.0))
    assert wave.evaluate(TrappedElectrons()).train < 1e-12


def test_excess_energy_is_that_of_the_hamiltonian() -> None:
    from problem_equations import WaveFunction

    # exp(-b x^2) in six coordinates: kinetic energy 6 b / 2, trap 6 / (32 b), and a repulsion
    # of 2 sqrt(b / pi).
    b = 0.2
    energy = 6 * b / 2 + 6 / (32 * b) + 2 * (b / torch.pi) ** 0.5
    found = WaveFunction().evaluate(Gaussian())
    assert found.train == pytest.approx(energy - 2, rel=0.05)


def test_solution_of_burgers_equation_solves_it() -> None:
    from problem_equations import Burgers

    burgers = Burgers()
    grid, solution = burgers.solution()
    u = solution.reshape(20, 61)
    dt, dx = float(grid[61, 0] - grid[0, 0]), float(grid[1, 1] - grid[0, 1])
    by_time = (u[2:, 1:-1] - u[:-2, 1:-1]) / (2 * dt)
    slope = (u[1:-1, 2:] - u[1:-1, :-2]) / (2 * dx)
    second = (u[1:-1, 2:] - 2 * u[1:-1, 1:-1] + u[1:-1, :-2]) / dx**2
    residual = by_time + u[1:-1, 1:-1] * slope - burgers.viscosity * second
    assert float(residual.abs().median()) < 0.01 * float(by_time.abs().max())


def test_rate_is_bracketed_and_runs_are_kept(tmp_path: Path) -> None:
    from problems import PROBLEMS
    from target_methods import METHODS
    from time_to_target import Results, ladder, run_method

    assert [ladder(0.3, k) for k in (-1, 0, 1, 2)] == [0.1, 0.3, 1.0, 3.0]
    options = argparse.Namespace(seconds=0.02, scale=1.0, rates=None, seeds=2)
    kept = Results(tmp_path / "runs.json")
    run_method(PROBLEMS["regression"], METHODS["SGD"], options, kept)
    first = [run for run in kept.runs if run.seed == 0]
    assert len(first) >= 3
    assert len(kept.runs) == len(first) + 1
    again = Results(tmp_path / "runs.json")
    run_method(PROBLEMS["regression"], METHODS["SGD"], options, again)
    # A rate that is too large ends in NaN, which equals nothing but looks like itself.
    assert repr(again.runs) == repr(kept.runs)


def test_places_between_evaluations_are_interpolated_by_the_logarithm() -> None:
    from problems import PROBLEMS
    from target_methods import METHODS
    from target_report import choices, report, seconds_of
    from time_to_target import Run

    def run(method: str, losses: list[float]) -> Run:
        seconds = [float(k) for k in range(len(losses))]
        steps = list(range(len(losses)))
        return Run("regression", method, 0.1, 0, 2.0, seconds, steps, losses, losses)

    runs = [run("Adam", [1.0, 1e-1, 1e-2]), run("SGD", [1.0, 1e-4, 1e-6])]
    methods = [METHODS["Adam"], METHODS["SGD"]]
    slow, fast = choices(runs, PROBLEMS["regression"], methods)
    assert fast.reached(slow.final, seconds_of) == pytest.approx(0.5)
    assert "regression" in report(runs, [PROBLEMS["regression"]], methods)
