"""Statistics as one compiled program of parameters, buffers, inputs and noise."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.inside import compiled_passes, fold, forget, observing
from support.networks import BY_NAME, NETWORKS, Network
from support.steps import named_factors
from torch import Tensor, fx, nn
from torch import distributions as D

import kfac_fx
from kfac_fx.statistics import pass_cache as compiled

pytestmark = pytest.mark.usefixtures("float64", "fresh")

FISHERS = ("sampled", "exact", "empirical")


def normal(network: Network) -> Any:
    """Of the output that the network is about, whatever its structure."""

    def distribution(outputs: Any) -> D.Distribution:
        mean = network.pick(outputs)
        return D.Independent(D.Normal(mean, torch.ones_like(mean)), mean.dim() - 1)

    return distribution


def preconditioner(net: nn.Module, **options: Any) -> kfac_fx.Preconditioner:
    generator = torch.Generator().manual_seed(3)
    return kfac_fx.Preconditioner(net, damping=1e-2, generator=generator, **options)


def recorded(net: nn.Module, batch: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """The factors and cross factors after one step, by name."""
    pre = preconditioner(net, **options)
    torch.manual_seed(5)
    pre.observe(**batch)
    fold(pre)
    if options.get("compile"):
        assert None not in compiled_passes(pre), "it was run node by node"
    return named_factors(pre)


def assert_equal(found: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert found.keys() == want.keys()
    for name, value in want.items():
        assert value.abs().sum() > 0 or "unused" in name, name
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-14, msg=name)


FEW = ("conv2d", "batch_norm", "functional_modes", "class_token", "recurrent", "tied", "encoder")


def cases() -> Iterator[Any]:
    for network in NETWORKS:
        for fisher in FISHERS:
            if network.kwargs(5) or network.name == "dict_outputs":
                continue
            short = network.name in FEW and (fisher == "sampled" or network.name == "class_token")
            marks = () if short else pytest.mark.slow
            yield pytest.param(network, fisher, id=f"{network}-{fisher}", marks=marks)


@pytest.mark.parametrize(("network", "fisher"), list(cases()))
def test_program_equals_taps(network: Network, fisher: str) -> None:
    """The traced graph, the same pass node by node, and the training forward's own taps."""
    net = kfac_fx.transform(network.build(), **network.captured_with())
    inputs = network.inputs(5)
    options = {"likelihood": normal(network), "fisher": fisher}
    targets = torch.zeros_like(network.pick(net(*inputs)))
    before = copy.deepcopy(net.state_dict())
    batch = {"inputs": inputs, "targets": targets}
    found = recorded(net, batch, compile="eager", **options)
    assert_equal(found, recorded(net, batch, **options))
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    random = any(isinstance(m, nn.Dropout) for m in net.modules()) or "modes" in network.name
    if fisher != "empirical" and not random:
        torch.manual_seed(5)
        pre = preconditioner(net, **options)
        pre.observe(net(*inputs), targets)
        fold(pre)
        assert_equal(found, named_factors(pre))


@pytest.mark.parametrize("fisher", ["sampled", "exact"])
@pytest.mark.parametrize("name", ["categorical", "bernoulli", "normal"])
def test_likelihoods(name: str, fisher: str) -> None:
    """One noise gives one draw, in the program and in the pass that runs."""
    net = kfac_fx.transform(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)))
    options: dict[str, Any] = {"likelihood": name, "fisher": fisher}
    batch = {"inputs": torch.randn(7, 6)}
    assert_equal(recorded(net, batch, compile="eager", **options), recorded(net, batch, **options))


@pytest.mark.parametrize("fisher", FISHERS)
def test_weights_and_ignored_targets(fisher: str) -> None:
    net = kfac_fx.transform(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)))
    likelihood = kfac_fx.likelihoods.Categorical(weight=torch.rand(4), ignore_index=2)
    x, y = torch.randn(9, 5, 6), torch.randint(4, (9, 5))
    options: dict[str, Any] = {"likelihood": likelihood, "fisher": fisher}
    batch = {"inputs": x, "targets": y}
    assert_equal(recorded(net, batch, compile="eager", **options), recorded(net, batch, **options))
    nothing = {"inputs": x, "targets": torch.full_like(y, 2)}
    with pytest.raises(kfac_fx.errors.LikelihoodError, match="no likelihood term"):
        recorded(net, nothing, compile="eager", **options)


def test_distribution_that_draws_by_itself() -> None:
    """A Poisson has no noise of a standard form; its draws stay in the graph, with one seed."""
    net = kfac_fx.transform(nn.Sequential(nn.Linear(6, 8), nn.Dropout(), nn.Linear(8, 3)))

    def poisson(outputs: Tensor) -> D.Distribution:
        return D.Independent(D.Poisson(outputs.exp()), 1)

    options: dict[str, Any] = {"likelihood": poisson}
    batch = {"inputs": torch.randn(7, 6)}
    assert_equal(recorded(net, batch, compile="eager", **options), recorded(net, batch, **options))


def test_a_learnt_scale_is_drawn_alike() -> None:
    """Its columns are counted without values: by what would have a derivative."""
    net = kfac_fx.transform(nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)))

    def normal(outputs: Tensor) -> D.Distribution:
        return D.Normal(outputs[:, 0], outputs[:, 1].exp())

    batch = {"inputs": torch.randn(7, 6)}
    for fisher in ("sampled", "exact"):
        options: dict[str, Any] = {"likelihood": normal, "fisher": fisher}
        assert_equal(
            recorded(net, batch, compile="eager", **options), recorded(net, batch, **options)
        )


def products(graph: fx.Graph) -> Counter[str]:
    named = ("mm", "addmm", "bmm", "convolution", "convolution_backward")
    packets = (getattr(node.target, "overloadpacket", None) for node in graph.nodes)
    return Counter(p.__name__ for p in packets if p is not None and p.__name__ in named)


def test_no_weight_gradient_is_formed() -> None:
    """Products of an MLP of L layers: L forward, L - 1 of the derivative, two factors a layer."""
    layers = 4
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(layers)))
    net = kfac_fx.transform(model, structure="block_diagonal")
    pre = preconditioner(net, likelihood="normal", compile="eager")
    pre.observe(inputs=torch.randn(5, 6))
    (program,) = compiled_passes(pre)
    assert products(program.once.graph).total() == layers + (layers - 1) + 2 * layers


def test_no_weight_gradient_of_convolutions() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Conv2d(3, 4, 3))
    net = kfac_fx.transform(model, structure="block_diagonal")
    pre = preconditioner(net, likelihood="normal", compile="eager")
    pre.observe(inputs=torch.randn(5, 2, 8, 8))
    (program,) = compiled_passes(pre)
    nodes = list(program.once.graph.nodes)
    masks = [n.args[-1] for n in nodes if n.target is torch.ops.aten.convolution_backward.default]
    assert masks == [[True, False, False]]  # the first layer has no derivative to hand on
    assert not any(n.target._schema.is_mutable for n in nodes if hasattr(n.target, "_schema"))


def test_exact_fisher_is_two_programs() -> None:
    """Forward and A once; a backward and G for every column."""
    net = kfac_fx.transform(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)))
    pre = preconditioner(net, fisher="exact", compile="eager")
    pre.observe(inputs=torch.randn(5, 6))
    (program,) = compiled_passes(pre)
    forward = torch.ops.aten.tanh.default
    assert forward in [node.target for node in program.once.graph.nodes]
    assert forward not in [node.target for node in program.each.graph.nodes]
    inputs = len(pre.recorder.sources.inputs)
    tied = [tied for tied, _ in program._places[1:]]  # after the flag of finite outputs
    assert not any(tied[:inputs]) and all(tied[inputs:])


class Noisy(nn.Module):
    """Every kind of state that a pass could disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop, self.drops = nn.Dropout(0.3), nn.Dropout2d(0.2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drops(torch.tanh(self.norm(self.convolution(x))))
        result: Tensor = self.head(self.drop(x.mean((2, 3))))
        return result


@pytest.mark.parametrize("compile", [False, "eager"])
def test_nothing_is_disturbed(compile: bool | str) -> None:
    net = kfac_fx.transform(Noisy())
    pre = preconditioner(net, compile=compile)
    state, stream = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    pre.observe(inputs=torch.randn(6, 2, 5, 5, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(net.state_dict(), state, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(p.grad is None for p in net.parameters())
    assert len(compiled_passes(pre)) == (1 if compile else 0)
    assert all(len(program.lifted) == 2 for program in compiled_passes(pre))


@pytest.mark.parametrize(
    "backend", ["eager", "aot_eager", pytest.param(True, marks=pytest.mark.slow)]
)
def test_same_masks_in_kfac(backend: bool | str) -> None:
    """The whole optimizer with dropout and running statistics: compiled equals not compiled."""
    runs = []
    for compile in (False, backend):
        torch.manual_seed(0)
        net = kfac_fx.transform(Noisy())
        generator = torch.Generator().manual_seed(0)
        optimizer = kfac_fx.KFAC(net, generator=generator, compile=compile)
        for _ in range(4):
            optimizer.step(torch.randn(12, 2, 5, 5), torch.randint(3, (12,)))
        runs.append(net.state_dict())
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-9, atol=1e-12)


class Mixed(nn.Module):
    """Random operators that follow on each other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.alpha = nn.Linear(6, 8), nn.Linear(8, 4), nn.AlphaDropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(self.a(x), 0.3, self.training)
        x = nn.functional.dropout(x + 0.1 * torch.randn_like(x), 0.3, self.training)
        return self.b(self.alpha(x))


def test_random_operators_on_results_of_others(caplog: pytest.LogCaptureFixture) -> None:
    runs = []
    for compile in (False, "eager"):
        torch.manual_seed(0)
        net = kfac_fx.transform(Mixed())
        pre = preconditioner(net, compile=compile)
        pre.observe(inputs=torch.randn(9, 6))
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        pre.step()
        runs.append(pre.factors)
    assert "not compiled" not in caplog.text
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-9, atol=1e-12)


def test_the_exact_fisher_of_a_convolution_is_a_program() -> None:
    """Its A does not depend on the derivative, of which there are several."""
    net = kfac_fx.transform(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(27, 3)))
    pre = preconditioner(net, fisher="exact", compile="eager")
    pre.observe(inputs=torch.randn(4, 2, 5, 5))
    assert None not in compiled_passes(pre) and compiled_passes(pre)


def test_the_gradient_of_kfac_is_compiled() -> None:
    """As one graph of the network, that serves all steps."""
    graphs: list[fx.GraphModule] = []

    @torch._dynamo.register_backend(name="kept")  # type: ignore[untyped-decorator]
    def kept(graph: fx.GraphModule, _: Any) -> fx.GraphModule:
        graphs.append(graph)
        return graph

    optimizer = kfac_fx.KFAC(kfac_fx.transform(nn.Linear(6, 4)), lr=0.1, compile="kept")
    for _ in range(3):
        optimizer.step(torch.randn(9, 6), torch.randint(4, (9,)))
    of_network = [g for g in graphs if any("linear" in str(n.target) for n in g.graph.nodes)]
    assert len(of_network) == 1


@pytest.mark.parametrize("fisher", FISHERS)
def test_compiled_forward(fisher: str) -> None:
    """A loop on torch.compile(net) is the loop on net, with one graph of the forward."""
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4))
    torch._dynamo.config.error_on_recompile = fisher != "empirical"
    runs = []
    try:
        for whole in (False, True):
            net = kfac_fx.transform(copy.deepcopy(model))
            run: Any = torch.compile(net, backend="aot_eager", fullgraph=True) if whole else net
            pre = preconditioner(run, fisher=fisher, statistics_every=2, compile="eager")
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
            torch.manual_seed(0)
            for _ in range(4):
                x, y = torch.randn(9, 6), torch.randint(4, (9,))
                optimizer.zero_grad()
                outputs = run(x)
                loss = nn.functional.cross_entropy(outputs, y)
                pre.observe(outputs, y, inputs=x if whole and fisher != "empirical" else None)
                loss.backward()
                pre.step()
                optimizer.step()
            runs.append(net.state_dict())
    finally:
        torch._dynamo.config.error_on_recompile = False
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_inductor() -> None:
    """The default compiler, on every factor of a chain with couplings."""
    network = BY_NAME["mlp"]
    net = kfac_fx.transform(network.build())
    batch = {"inputs": network.inputs(5)}
    want = recorded(net, batch, fisher="exact")
    assert_equal(recorded(net, batch, fisher="exact", compile=True), want)


def test_forms_are_bounded(caplog: pytest.LogCaptureFixture) -> None:
    net = kfac_fx.transform(nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 4)))
    pre = preconditioner(net, compile="eager")
    for _ in range(2):
        for cases in range(2, 2 + compiled.MOST_PROGRAMS + 2):
            pre.observe(inputs=torch.randn(cases, 6))
    assert sum(p is not None for p in compiled_passes(pre)) == compiled.MOST_PROGRAMS
    assert len([r for r in caplog.records if "others run as they are" in r.message]) == 2


@pytest.mark.parametrize("what", ["nothing", "eval", "p", "structure"])
def test_other_forms_are_other_programs(what: str) -> None:
    net = kfac_fx.transform(nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 4)))
    pre = preconditioner(net, compile="eager", fisher="empirical")
    x, y = torch.randn(5, 6), torch.randint(4, (5,))
    pre.observe(inputs=x, targets=y)
    if what == "eval":
        net.eval()
    elif what == "p":
        net.get_submodule("1").p = 0.1
    pre.observe(inputs=(x,) if what == "structure" else x, targets=y)
    assert len(compiled_passes(pre)) == (1 if what == "nothing" else 2)


class Branching(nn.Module):
    """Its code asks for values."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        if y.mean() > 10:
            y = -y
        result: Tensor = self.two(y)
        return result


def test_untraceable_code_runs_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.randn(5, 6)
    net = kfac_fx.transform(Branching(), (x,))
    pre = preconditioner(net, compile="eager")
    pre.observe(inputs=x)
    fold(pre)
    assert all(program is None for program in compiled_passes(pre))
    assert any("not compiled" in record.message for record in caplog.records)
    want = recorded(net, {"inputs": x})
    found = {f"{n}/{k}": f for n, group in pre.factors.items() for k, f in enumerate(group)}
    assert_equal(found, {name: want[name] for name in found})


def test_moments() -> None:
    """EKFAC's bases are buffers that change: arguments, not constants."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    runs = []
    for compile in (False, "eager"):
        net = kfac_fx.transform(copy.deepcopy(model), structure="block_diagonal", ekfac=True)
        pre = preconditioner(net, tikhonov="ekfac", refresh_every=2, compile=compile)
        torch.manual_seed(0)
        for _ in range(4):
            net.zero_grad()
            x = torch.randn(7, 6)
            net(x).sin().sum().backward()
            pre.observe(inputs=x)
            pre.step()
        runs.append({n: p.grad for n, p in net.named_parameters()})
        assert len(compiled_passes(pre)) == (1 if compile else 0)
        for program in compiled_passes(pre):
            assert not [node for node in program.once.graph.nodes if node.op == "get_attr"]
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-10, atol=1e-12)


def test_autocast() -> None:
    """The forward as the user's autocast has it, the statistics in float32."""
    net = kfac_fx.transform(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).float())
    runs = []
    for compile in (False, "eager"):
        pre = preconditioner(net, compile=compile)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            pre.observe(inputs=torch.ones(5, 6, dtype=torch.float32))
        fold(pre)
        runs.append([f for group in pre.factors.values() for f in group])
    assert all(factor.dtype == torch.float32 for factor in runs[0])
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-6, atol=1e-8)


def test_named_outputs_by_forward() -> None:
    network = BY_NAME["dict_outputs"]
    net = kfac_fx.transform(network.build(), **network.captured_with())
    inputs = network.inputs(5)

    def forward(net: Any, given: Any) -> Tensor:
        return network.pick(net(*given))

    options: dict[str, Any] = {"likelihood": "normal", "forward": forward}
    batch = {"inputs": inputs}
    assert_equal(recorded(net, batch, compile="eager", **options), recorded(net, batch, **options))


def test_a_part_of_the_batch() -> None:
    """Taps of the forward stay off once inputs are given: the first step had recorded in vain."""
    net = kfac_fx.transform(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)))
    pre = preconditioner(net)
    for step in range(2):
        x = torch.randn(8, 6)
        net(x).sin().sum().backward()
        pre.observe(inputs=x[:4])
        buffers = [b for group in kfac_fx.ops.factor_buffers(net).values() for b in group]
        assert any(b.requires_grad for b in buffers) == (step == 0)
        pre.step()
        assert all(b.grad is None for b in buffers)


def test_errors() -> None:
    net = kfac_fx.transform(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)))
    x = torch.randn(5, 6)
    with pytest.raises(kfac_fx.errors.ObservationError, match="outputs, or the inputs"):
        preconditioner(net).observe()
    with pytest.raises(kfac_fx.errors.ObservationError, match="targets"):
        preconditioner(net, fisher="empirical", compile="eager").observe(inputs=x)
    pre = preconditioner(net)
    pre.observe(inputs=x)
    with pytest.raises(kfac_fx.errors.ObservationError, match="inputs="):
        pre.observe(net(x))
    run = torch.compile(net, backend="eager")
    with pytest.raises(kfac_fx.errors.ObservationError, match="inputs="):
        preconditioner(run).observe(run(x))
    with pytest.raises(kfac_fx.errors.LikelihoodError):
        preconditioner(net, likelihood="categorical", compile="eager").observe(
            inputs=x, targets=torch.full((5,), 9)
        )


def test_outputs_that_are_not_finite(caplog: pytest.LogCaptureFixture) -> None:
    net = kfac_fx.transform(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)))
    pre = preconditioner(net, compile="eager")
    with caplog.at_level(logging.WARNING):
        pre.observe(inputs=torch.full((5, 6), float("nan")))
    assert pre.skipped_statistics == 1 and not observing(pre)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.label, self.box = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = torch.tanh(self.body(x))
        return {"label": self.label(y), "box": self.box(y)}


@pytest.mark.parametrize("fisher", ["sampled", "exact"])
def test_sum_of_likelihoods(fisher: str) -> None:
    """The shares of the parts depend on how many targets count, and are arguments."""
    likelihood = kfac_fx.likelihoods.Sum({"label": ("categorical", 1.0), "box": ("normal", 0.3)})
    net = kfac_fx.transform(TwoHeads())
    compiled = preconditioner(net, likelihood=likelihood, fisher=fisher, compile="eager")
    plain = preconditioner(net, likelihood=likelihood, fisher=fisher)
    for ignored in (0, 3, 9):
        x, y = torch.randn(9, 6), torch.randint(4, (9,))
        y[:ignored] = -100
        targets = {"label": y, "box": torch.randn(9, 2)}
        for pre in (compiled, plain):
            pre.observe(inputs=x, targets=targets)
            fold(pre)
            forget(pre)
    assert len(compiled_passes(compiled)) == 2 and None not in compiled_passes(
        compiled
    )  # of two parts, and one
    for name, factors in plain.factors.items():
        for one, other in zip(compiled.factors[name], factors, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_passes_leave_alone_what_another_structure_records() -> None:
    """Block-diagonal statistics of a network that carries buffers of cross factors too."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(8, 6).double()
    both, alone = (
        kfac_fx.transform(model, x, structure=structure)
        for structure in ("block_tridiagonal", "block_diagonal")
    )
    batch = {"inputs": x, "targets": torch.randint(3, (8,))}
    want = recorded(alone, batch, structure="block_diagonal", fisher="empirical")
    for compile in (False, "eager"):
        options = {"structure": "block_diagonal", "fisher": "empirical", "compile": compile}
        assert_equal(recorded(both, batch, **options), want)
