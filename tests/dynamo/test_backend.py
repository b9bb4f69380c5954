"""torch.compile(model, backend=kfac_fx.backend(...)): factors are those of transform()."""

from __future__ import annotations

import copy
import gc
import logging
import sys
import weakref
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from support.networks import BY_NAME, NETWORKS, Network
from support.processes import ROOT, run_python
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters

import kfac_fx
from kfac_fx import passes
from kfac_fx.errors import CoverageError, KFACError, ObservationError, UnknownOptionError

pytestmark = pytest.mark.usefixtures("float64", "fresh")


# ------------------------------------------------------------------------- models with graph breaks
class Broken(nn.Module):
    """A break between layers, each part with a coupling of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5))
        self.last = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.last(torch.tanh(x))


class ByValue(Broken):
    """A branch on a value; the layer after it is in two graphs, of which one runs."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if x.sum() > 1e6:
            x = self.other(x)
        return self.last(x)


class AcrossBreaks(nn.Module):
    """One weight on both sides of a break, with a bias and without."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.fc(x))
        torch._dynamo.graph_break()
        return self.out(torch.tanh(self.fc(x)))


class Head(nn.Module):
    """Layers of torch.nn that Python calls by themselves are not compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 5), nn.Linear(5, 6)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Tower(nn.Module):
    """A break in a loop: Dynamo compiles the block, one graph for all that look alike."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.head = Head()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            torch._dynamo.graph_break()
        return self.head(x)


class Repeated(Tower):
    """The same block three times in a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block()])

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.blocks[0](x)
            torch._dynamo.graph_break()
        return self.head(x)


class Rounded(Broken):
    """A value leaves torch and comes back."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        scale = 1.0 + float(x.detach().abs().max().item() > 0)
        return self.last(x * scale)


class ScaledBySize(nn.Module):
    """A weight that is scaled by a size, which Dynamo hands over as an input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.out = nn.Parameter(torch.randn(5, 6) / 3), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(nn.functional.linear(x, self.weight * (2.0 / x.shape[0]))))


class Attending(nn.Module):
    """Self- and cross-attention, with weights and without, masks of three kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0)
        self.self = nn.MultiheadAttention(6, 3, batch_first=True)
        self.cross = nn.MultiheadAttention(6, 2, bias=False, batch_first=True)
        self.mixed = nn.MultiheadAttention(6, 2, kdim=4, vdim=5, batch_first=True)
        self.out = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        causal = torch.triu(torch.ones(3, 3, dtype=torch.bool), 1)
        x = x + self.self(x, x, x, attn_mask=causal)[0]
        hidden = torch.zeros(x.shape[:2], dtype=torch.bool)
        hidden[:, -1] = True
        y, weights = self.cross(x, x.flip(1), x.flip(1), key_padding_mask=hidden)
        z = self.mixed(y, x[..., :4], x[..., :5], need_weights=False)[0]
        z = self.layer(z, src_mask=torch.zeros(len(z), len(z)))
        return self.out((z * weights.sum(-1, keepdim=True)).mean(1))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Linear(6, 6), Block(), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.utils.checkpoint.checkpoint(self.block, self.stem(x), use_reentrant=False)
        return self.head(x)


def six(n: int) -> tuple[Tensor, ...]:
    return (torch.randn(n, 6),)


WITH_BREAKS = [
    Network(kind.__name__, kind, six)
    for kind in (Broken, ByValue, AcrossBreaks, Tower, Repeated, Rounded)
]
MODELS = [network for network in NETWORKS if network.name != "graph_module"]
MODELS += WITH_BREAKS
MODELS += [Network(kind.__name__, kind, six) for kind in (Checkpointed, ScaledBySize)]
MODELS.append(Network("Attending", Attending, lambda n: (torch.randn(n, 3, 6),)))


def outputs_of(run: Any, network: Network, n: int) -> Tensor:
    torch.manual_seed(7)
    return network.pick(run(*network.inputs(n), **network.kwargs(n)))


class Runner:
    """A model, and the steps of its Preconditioner."""

    def __init__(self, run: Any, network: Network, **options: Any) -> None:
        self.run, self.network = run, network
        options = {"likelihood": "normal", "damping": 1e-2, "fisher": "empirical"} | options
        self.pre = kfac_fx.Preconditioner(run, **options)

    def step(self, n: int) -> Tensor:
        outputs = outputs_of(self.run, self.network, n)
        targets = torch.linspace(-1, 1, outputs.numel()).reshape(outputs.shape)
        self.pre.observe(outputs, targets)
        for parameter in self.run.parameters():
            parameter.grad = None
        (outputs - targets).square().sum().div(2).backward()
        self.pre.step()
        return outputs.detach()


def compiled_and_reference(
    network: Network, inner: Any, dynamic: bool | None = None, **options: Any
) -> tuple[Runner, Runner]:
    """Both have run once before, so that running statistics agree."""
    model = network.build()
    twin = copy.deepcopy(model)
    if any(isinstance(module, nn.Dropout) for module in model.modules()) or "modes" in network.name:
        model.eval(), twin.eval()
    compiled = torch.compile(model, backend=kfac_fx.backend(inner), dynamic=dynamic)
    outputs_of(compiled, network, 4)
    outputs_of(twin, network, 4)
    given = network.captured_with()
    if network in WITH_BREAKS or network.name == "Attending":
        given |= {"example_inputs": network.inputs(4)}
    net = kfac_fx.transform(twin, **given)
    return Runner(compiled, network, **options), Runner(net, network, **options)


def assert_same_step(got: Runner, want: Runner) -> None:
    found, wanted = got.pre.factors, dict(want.pre.factors)
    if want.network.name == "ByValue":
        del wanted["other"]  # did not run
    assert found.keys() == wanted.keys()
    for name, group in wanted.items():
        for one, other in zip(found[name], group, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12, msg=name)
            assert float(other.abs().max()) > 0
    crossed = got.pre.cross_factors
    for pair, group in crossed.items() if want.pre.cross_factors else ():
        for one, other in zip(group, want.pre.cross_factors[pair], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12, msg=str(pair))
    if crossed.keys() == want.pre.cross_factors.keys():
        named = dict(want.run.named_parameters())
        for name, parameter in got.run.named_parameters():
            name = name.removeprefix("_orig_mod.")
            torch.testing.assert_close(parameter.grad, named[name].grad, rtol=1e-8, atol=1e-10)


OFTEN = ["mlp", "hf_conv1d", "conv2d", "batch_norm", "layer_norm", "embedded", "class_token"]
OFTEN += ["tied", "keywords", "encoder", "Checkpointed", "Attending", "ScaledBySize"]
OFTEN += [network.name for network in WITH_BREAKS]


@pytest.mark.parametrize(
    "network",
    [pytest.param(n, marks=() if n.name in OFTEN else pytest.mark.slow) for n in MODELS],
    ids=str,
)
def test_factors_are_those_of_transform(network: Network) -> None:
    """Two batch sizes, the second of which makes Dynamo compile anew."""
    dynamic = True if network.name in ("class_token", "ScaledBySize") else None
    got, want = compiled_and_reference(network, "eager", dynamic)
    for n in (4, 6):
        torch.testing.assert_close(got.step(n), want.step(n), rtol=1e-9, atol=1e-12)
    assert_same_step(got, want)


@pytest.mark.parametrize(
    "name",
    [
        "Broken",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("mlp", "conv2d", "residual", "Tower")),
    ],
)
def test_compiled_by_aot(name: str) -> None:
    network = next(network for network in MODELS if network.name == name)
    got, want = compiled_and_reference(network, "aot_eager")
    for n in (4, 6, 3):
        torch.testing.assert_close(got.step(n), want.step(n), rtol=1e-9, atol=1e-12)
    assert_same_step(got, want)


# ------------------------------------------------------------------------------ its own behaviour
MLP = BY_NAME["mlp"]


def compiled_mlp(inner: Any = "eager", **options: Any) -> Any:
    return torch.compile(MLP.build(), backend=kfac_fx.backend(inner, **options))


def test_before_a_preconditioner_the_inner_backend_gets_the_plain_graph() -> None:
    seen: list[fx.GraphModule] = []

    def inner(module: fx.GraphModule, inputs: list[Any]) -> Any:
        seen.append(module)
        return module.forward

    compiled = compiled_mlp(inner)
    compiled(*six(4))
    assert len(seen) == 1 and not any(map(passes.is_tap, seen[0].graph.nodes))
    Runner(compiled, MLP).step(4)
    assert len(seen) == 2 and not any(map(passes.is_tap, seen[0].graph.nodes))


def test_specialisations() -> None:
    """30 steps, statistics every third, three batch sizes, other damping each: six graphs.

    Dynamo's own two (one size, then any), and as many that record, each compiled once.
    """
    compiled = compiled_mlp("aot_eager")
    compiled(*six(4))
    runner = Runner(compiled, MLP, statistics_every=3, refresh_every=5)
    for index in range(30):
        runner.pre.damping = 1e-2 * 0.9**index
        runner.step((4, 6, 3)[index % 3])
        if index == 8:
            known = counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == known <= 6
    assert not counters["graph_break"]


def test_graphs_are_shown() -> None:
    shown: list[fx.GraphModule] = []
    model = Broken()
    compiled = torch.compile(model, backend=kfac_fx.backend("eager", on_graph=shown.append))
    compiled(*six(4))
    assert not shown
    pre = kfac_fx.Preconditioner(compiled, "normal", fisher="empirical")
    assert len(shown) == 2
    assert all(module.meta["kfac_fx"] is pre.curvature for module in shown)
    assert [sum(map(passes.is_tap, m.graph.nodes)) for m in shown] == [4, 4]
    assert passes.read_curvature(shown[1]) == pre.curvature
    assert pre.curvature.route == "dynamo"
    assert set(pre.curvature.covered) == {name for name, _ in model.named_parameters()}


def test_options() -> None:
    """Options of the backend are those of transform()."""
    compiled = compiled_mlp(structure="block_diagonal", exclude=("2",))
    compiled(*six(4))
    curvature = kfac_fx.Preconditioner(compiled, "normal").curvature
    assert list(curvature.blocks) == ["0"] and curvature.excluded == ("2.weight", "2.bias")
    with pytest.raises(UnknownOptionError):
        kfac_fx.backend(structure="x")

    class Odd(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x @ torch.linalg.matrix_exp(self.weight)

    compiled = torch.compile(Odd(6, 6), backend=kfac_fx.backend("eager", strict=True))
    compiled(*six(4))
    with pytest.raises(CoverageError, match="weight"):
        kfac_fx.Preconditioner(compiled, "normal")


def test_not_run_yet() -> None:
    compiled = compiled_mlp()
    with pytest.raises(KFACError, match="must have run once"):
        kfac_fx.Preconditioner(compiled)
    with torch.no_grad():
        compiled(*six(4))
    with pytest.raises(KFACError, match="without gradients"):
        kfac_fx.Preconditioner(compiled)


def test_layers_that_dynamo_leaves_to_python_are_named(caplog: pytest.LogCaptureFixture) -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = Block(), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(1):
                x = self.body(x)
                torch._dynamo.graph_break()
            return self.head(x)

    compiled = torch.compile(Part(), backend=kfac_fx.backend("eager"))
    compiled(*six(4))
    with caplog.at_level(logging.WARNING, "kfac_fx"):
        pre = kfac_fx.Preconditioner(compiled, "normal")
    assert "head.weight has no block: no compiled graph uses it" in caplog.text
    assert pre.curvature.unused == ("head.weight", "head.bias")


@pytest.mark.parametrize("donated", [True, False])
@pytest.mark.parametrize("fisher", ["sampled", "exact"])
def test_second_backwards(fisher: str, donated: bool) -> None:
    """A compiled graph refuses them, unless torch was told not to reuse its buffers."""
    with torch._functorch.config.patch(donated_buffer=donated):
        seeds = [torch.Generator().manual_seed(0) for _ in range(2)]
        got, want = compiled_and_reference(MLP, "aot_eager", fisher=fisher)
        got.pre.generator.set_state(seeds[0].get_state())
        want.pre.generator.set_state(seeds[1].get_state())
        try:
            for n in (4, 6):
                got.step(n), want.step(n)
        except ObservationError as error:
            assert donated and "donated_buffer" in str(error)
        else:
            assert_same_step(got, want)


def test_passes_from_inputs_are_refused() -> None:
    """The graphs record the user's own forward passes; there is no other that could."""
    compiled = compiled_mlp()
    compiled(*six(4))
    pre = kfac_fx.Preconditioner(compiled, "normal")
    with pytest.raises(ObservationError, match="its own forward passes"):
        pre.observe(inputs=six(4))


def test_models_that_share_graphs() -> None:
    """Two models of one class, one backend: Dynamo compiles once, the factors are apart."""
    backend = kfac_fx.backend("eager")
    torch.manual_seed(1)
    models = [Broken(), Broken()]
    twins = copy.deepcopy(models)
    network = WITH_BREAKS[0]
    compiled = [torch.compile(model, backend=backend) for model in models]
    for run in compiled:
        run(*six(4))
    assert counters["stats"]["unique_graphs"] == 2
    runners = [Runner(run, network) for run in compiled]
    wanted = [Runner(kfac_fx.transform(twin, six(4)), network) for twin in twins]
    for runner in (*runners, *wanted):
        runner.step(4)
    for got, want in zip(runners, wanted, strict=True):
        assert_same_step(got, want)
    one, two = (runner.pre.factors["last.0"][0] for runner in runners)
    assert not torch.allclose(one, two)


def test_paths_that_come_later(caplog: pytest.LogCaptureFixture) -> None:
    """A branch taken after the Preconditioner was made: what fits is recorded, the rest named."""

    class Later(ByValue):
        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            if x.abs().sum() > 1e6:
                x = self.other(x)
            return self.last(x)

    network = Network("later", Later, six)
    compiled = torch.compile(Later(), backend=kfac_fx.backend("eager"))
    compiled(*six(4))
    runner = Runner(compiled, network)
    runner.step(4)
    before = runner.pre.factors["last.0"][0].clone()
    large = Network("large", Later, lambda n: (1e9 * torch.randn(n, 6),))
    runner.network = large
    with torch.no_grad():
        compiled.first[2].weight.mul_(1e9)
    with caplog.at_level(logging.WARNING, "kfac_fx"):
        runner.step(4)
    assert "uses other.weight, other.bias in another way" in caplog.text
    assert "uses last.0.weight, last.0.bias in another way" in caplog.text
    assert torch.equal(runner.pre.factors["last.0"][0], before)
    again = Runner(compiled, large)
    again.step(4)
    assert "other" in again.pre.factors
    torch.testing.assert_close(again.pre.factors["last.0"][0].isfinite().all(), torch.tensor(True))


def test_compiled_in_place_and_evaluated_between_steps() -> None:
    """model.compile(), no_grad passes, and train and eval modes."""
    network = BY_NAME["shape_norm"]
    model = network.build()
    twin = copy.deepcopy(model)
    model.compile(backend=kfac_fx.backend("eager"))
    outputs_of(model, network, 4), outputs_of(twin, network, 4)
    net = kfac_fx.transform(twin, **network.captured_with())
    got, want = Runner(model, network), Runner(net, network)
    for n in (4, 6):
        got.step(n), want.step(n)
        for module in (model, want.run):
            module.eval()
            with torch.no_grad():
                outputs_of(module, network, 5)
            module.train()
    assert_same_step(got, want)


def test_nothing_is_kept_alive() -> None:
    model = MLP.build()
    compiled = torch.compile(model, backend=kfac_fx.backend("eager"))
    compiled(*six(4))
    Runner(compiled, MLP).step(4)
    gone = weakref.ref(model), weakref.ref(model[0].weight)
    del model, compiled
    torch._dynamo.reset()
    # Dynamo's graphs have finalizers: what these hold is free for the second collection only.
    gc.collect()
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


RUN = """
import torch
torch.set_num_threads(1)
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
compiled = torch.compile(model, backend="kfac_fx")
x, y = torch.randn(8, 6), torch.randn(8, 4)
compiled(x)
import kfac_fx
factors = []
for net in (compiled, kfac_fx.transform(model)):
    pre = kfac_fx.Preconditioner(net, "normal", fisher="empirical")
    outputs = net(x)
    pre.observe(outputs, y)
    (outputs - y).square().sum().div(2).backward()
    pre.step()
    factors.append({**pre.factors, **pre.cross_factors})
for name, group in factors[1].items():
    for one, other in zip(factors[0][name], group):
        torch.testing.assert_close(one, other)
print("equal", len(factors[1]))
"""


def installed(folder: Path) -> None:
    """The entry point as an installation writes it."""
    info = folder / "kfac_fx-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kfac_fx\nVersion: 0\n")
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith('kfac_fx = "kfac_fx.'))
    entry = line.replace('"', "")
    (info / "entry_points.txt").write_text(f"[torch_dynamo_backends]\n{entry}\n")


def test_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch finds the backend by the name in the package metadata."""
    installed(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    found = entry_points(group="torch_dynamo_backends", name="kfac_fx")
    assert all(entry.load() is sys.modules["kfac_fx.backend"].default for entry in found)
    assert len(found) >= 1


@pytest.mark.slow
def test_by_name_with_inductor(tmp_path: Path) -> None:
    """Nothing of ours is imported before."""
    installed(tmp_path)
    done = run_python("-c", RUN, path=(tmp_path, ROOT))
    assert done.stdout.split() == ["equal", "3"]
