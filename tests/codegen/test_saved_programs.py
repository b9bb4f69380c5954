"""Saved programs run without kfac_fx; none has graph breaks, or waits for a device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.inside import estimate_of, refreshed
from support.networks import BY_NAME
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

import kfac_fx

pytestmark = pytest.mark.usefixtures("float64", "fresh")

NAMES = ("mlp", "conv2d", "batch_norm", "embedded", "tied", "class_token", "nested")
FORMS = (
    ("factored", "block_diagonal"),
    ("factored", "block_tridiagonal"),
    ("exact", "block_diagonal"),
    ("ekfac", "block_diagonal"),
)
NO_PLAIN_LAYER = ("tied", "class_token")
CASES = [
    (name, *form)
    for name in NAMES
    for form in FORMS
    if form[0] != "ekfac" or name not in NO_PLAIN_LAYER
]
every_case = pytest.mark.parametrize(("name", "tikhonov", "structure"), CASES)


def trained(
    name: str, tikhonov: str, structure: str, **options: Any
) -> tuple[kfac_fx.Preconditioner, dict[str, Tensor]]:
    """After two steps, and a gradient."""
    network = BY_NAME[name]
    net = kfac_fx.transform(
        network.build(), **network.captured_with(), structure=structure, ekfac=tikhonov == "ekfac"
    )
    generator = torch.Generator().manual_seed(0)
    pre = kfac_fx.Preconditioner(
        net, "normal", damping=1e-2, tikhonov=tikhonov, generator=generator, **options
    )
    for _ in range(2):
        net.zero_grad()
        outputs = net(*network.inputs(7))
        pre.observe(outputs)
        outputs.sin().sum().backward()
        pre.step()
    parameters = dict(net.named_parameters())
    return pre, {n: torch.randn_like(parameters[n]) for n in pre.curvature.covered}


def factors_of(pre: kfac_fx.Preconditioner) -> list[Tensor]:
    """In the order of the arguments of a refresh."""
    groups = [*pre.factors.values(), *pre.cross_factors.values()]
    return [factor for group in groups for factor in group]


ALONE = """
import importlib.util, sys
import torch

def load(path):
    spec = importlib.util.spec_from_file_location("program", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

sys.modules["kfac_fx"] = None  # an import of it fails, wherever it is installed
for folder in sys.argv[1:]:
    program = load(f"{folder}/program.py")
    given = torch.load(f"{folder}/given.pt")
    inverses = program.refresh(given["damping"], *given["factors"])
    if given["moments"]:
        inverses |= program.scales(given["damping"], *given["moments"])
    torch.save(program.precondition(inverses, given["gradients"]), f"{folder}/updates.pt")
assert not any(name.startswith("kfac_fx.") for name in sys.modules)
"""


def test_saved_programs_run_alone(tmp_path: Path) -> None:
    """In one process, which cannot import the library."""
    wanted = {}
    for name, tikhonov, structure in CASES:
        pre, gradients = trained(name, tikhonov, structure)
        pre.refresh()
        folder = tmp_path / f"{name}-{tikhonov}-{structure}"
        folder.mkdir()
        pre.program.save(folder / "program.py")
        moments = [e.read()[0] for e in estimate_of(pre).moments.values()]
        given = {
            "damping": torch.tensor(pre.damping),
            "factors": factors_of(pre),
            "moments": moments if tikhonov == "ekfac" else [],
            "gradients": gradients,
        }
        torch.save(given, folder / "given.pt")
        wanted[folder] = pre.apply(gradients)
    script = tmp_path / "alone.py"
    script.write_text(ALONE, encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-I", str(script), *map(str, wanted)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for folder, want in wanted.items():
        found = torch.load(folder / "updates.pt")
        assert found.keys() == want.keys()
        for key, value in want.items():
            message = f"{folder.name} {key}"
            torch.testing.assert_close(found[key], value, rtol=1e-12, atol=1e-14, msg=message)


@every_case
def test_programs_have_no_graph_breaks(name: str, tikhonov: str, structure: str) -> None:
    pre, gradients = trained(name, tikhonov, structure)
    inverses = [refreshed(pre).inverses[key] for key in pre.program.inverses]
    calls: list[tuple[nn.Module, list[Tensor]]] = [
        (pre.program.refresh_module, [torch.tensor(1e-2), *factors_of(pre)]),
        (pre.program.apply_module, [*inverses, *gradients.values()]),
    ]
    for module, arguments in calls:
        explained = torch._dynamo.explain(module)(*arguments)
        assert explained.graph_break_count == 0 and explained.graph_count == 1


@pytest.mark.parametrize("recording", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_net_has_no_graph_breaks(name: str, recording: bool) -> None:
    network = BY_NAME[name]
    net = kfac_fx.transform(network.build(), **network.captured_with())
    for group in kfac_fx.ops.factor_buffers(net).values():
        for buffer in group:
            buffer.requires_grad_(recording)
    explained = torch._dynamo.explain(net)(*network.inputs(5))
    assert explained.graph_break_count == 0 and explained.graph_count == 1


class NoWaiting(TorchDispatchMode):
    """Refuses whatever makes the host wait for a device: a CUDA graph could not hold it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique", "masked_select")
        name = func.overloadpacket.__name__
        assert name not in waits, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


def test_the_check_can_fail() -> None:
    with NoWaiting(), pytest.raises(AssertionError, match="waits"):
        torch.ones(()).item()


@every_case
def test_apply_does_not_wait(name: str, tikhonov: str, structure: str) -> None:
    """No value is read in ``apply``, nor in the program of a refresh; its flags are read once."""
    pre, gradients = trained(name, tikhonov, structure)
    with NoWaiting(), torch.no_grad():
        pre.apply(gradients)
        pre.program.refresh_module(torch.tensor(1e-2), *factors_of(pre))


@pytest.mark.parametrize(("tikhonov", "structure"), FORMS)
def test_damping_is_an_argument(tikhonov: str, structure: str) -> None:
    """One graph for the refresh and one for the apply, whatever the damping."""
    pre, gradients = trained("mlp", tikhonov, structure, compile="eager")
    pre.apply(gradients)
    assert counters["stats"]["unique_graphs"] == 2
    for damping in (1e-4, 1.0, 3.0, 150.0):
        pre.damping = damping
        pre.refresh()
        pre.apply(gradients)
    assert counters["stats"]["unique_graphs"] == 2


STEPS = {"sampled": 200, "exact": 30, "empirical": 30}
BATCHES = (8, 12, 16)


def train(fisher: str, backend: str, steps: int, batches: tuple[int, ...]) -> int:
    """The number of graphs of a loop in which damping, periods and batch sizes change."""
    net = kfac_fx.transform(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)))
    run: Any = torch.compile(net, fullgraph=True, dynamic=False, backend=backend)
    pre = kfac_fx.Preconditioner(run, fisher=fisher, compile=backend)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for step in range(steps):
        cases = batches[step % len(batches)]
        x, y = torch.randn(cases, 6), torch.randint(4, (cases,))
        optimizer.zero_grad()
        outputs = run(x)
        loss = nn.functional.cross_entropy(outputs, y)
        pre.observe(outputs, y, inputs=None if fisher == "empirical" else x)
        loss.backward()
        pre.damping = 0.99**step
        pre.statistics_every, pre.refresh_every = 1 + step % 7, 1 + step % 11
        pre.step()
        optimizer.step()
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("fisher", ["sampled", "exact", "empirical"])
def test_recompilations(fisher: str) -> None:
    """Three batch sizes: three forwards and three statistics, a refresh and an apply.

    The exact Fisher's statistics are two graphs; the empirical ones are in the recorded forwards.
    """
    sizes = len(BATCHES)
    expected = sizes + (2 * sizes if fisher == "exact" else sizes) + 2
    assert train(fisher, "eager", STEPS[fisher], BATCHES) == expected


@pytest.mark.slow
def test_recompilations_of_inductor() -> None:
    assert train("sampled", "inductor", 20, BATCHES[:1]) == 4
