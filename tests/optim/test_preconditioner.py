"""The cycle of the preconditioner: averages, periods, state, and a training loop."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.inside import estimate_of
from support.oracles import Categorical, Measure, Measured, Normal, close
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kfac_fx

pytestmark = pytest.mark.usefixtures("float64")


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))


def batches(count: int) -> list[Tensor]:
    """Of different sizes; each counts once in the averages."""
    return [torch.randn(6 + k % 3, 4) for k in range(count)]


def step(
    preconditioner: kfac_fx.Preconditioner, net: nn.Module, x: Tensor, observe: bool = True
) -> dict[str, Tensor]:
    """One cycle under the normal likelihood; the new gradients."""
    net.zero_grad()
    outputs = net(x)
    if observe:
        preconditioner.observe(outputs)
    (outputs - 1).square().sum().div(2).backward()
    preconditioner.step()
    return {name: p.grad.clone() for name, p in net.named_parameters()}


def make(net: nn.Module, **options: Any) -> kfac_fx.Preconditioner:
    given = {"likelihood": "normal", "damping": 1e-2, "fisher": "exact"} | options
    return kfac_fx.Preconditioner(net, **given)


def single_factors(measure: Measure, net: nn.Module, xs: list[Tensor]) -> list[dict[str, Tensor]]:
    """The factors of each batch alone, the blocks concatenated."""
    return [flat(measure(net, x, None, Normal())) for x in xs]


def flat(one: kfac_fx.Preconditioner | Measured) -> Tensor:
    factors = one.factors
    return torch.cat([f.flatten() for name in sorted(factors) for f in factors[name]])


@pytest.mark.parametrize("decay", [0.95, 0.6, 0.0])
def test_running_average(measure: Measure, decay: float) -> None:
    """S <- eps S + (1 - eps) S_new, eps = min(1 - 1/k, decay)."""
    net, xs = kfac_fx.transform(model()), batches(5)
    preconditioner = make(net, ema_decay=decay, statistics_every=1)
    average = 0.0
    for k, (x, new) in enumerate(zip(xs, single_factors(measure, net, xs), strict=True), start=1):
        step(preconditioner, net, x)
        eps = min(1 - 1 / k, decay)
        average = eps * average + (1 - eps) * new
        close((flat(preconditioner),), (average,))


def test_statistics_period(measure: Measure) -> None:
    """Batches between the due ones leave no trace, observed or not."""
    net, xs = kfac_fx.transform(model()), batches(7)
    preconditioner = make(net, statistics_every=3)
    single = single_factors(measure, net, xs)
    expected = [single[0]] * 3 + [(single[0] + single[3]) / 2] * 3
    expected.append((single[0] + single[3] + single[6]) / 3)
    for k, x in enumerate(xs):
        step(preconditioner, net, x, observe=k != 1)
        close((flat(preconditioner),), (expected[k],))


def refreshes(steps: int, **options: Any) -> list[int]:
    """The steps, counted from 0, after which equal gradients give other updates than before."""
    net = kfac_fx.transform(model())
    preconditioner = make(net, **options)
    probe = {name: torch.randn_like(p) for name, p in net.named_parameters()}
    seen = [torch.zeros(())]
    for x in batches(steps):
        step(preconditioner, net, x)
        seen.append(preconditioner.apply(probe)["0.weight"])
    preconditioner.refresh()
    assert not torch.equal(preconditioner.apply(probe)["0.weight"], seen[-1])
    return [k for k in range(steps) if not torch.equal(seen[k], seen[k + 1])]


def test_refresh_period() -> None:
    """Between refreshes the inverses are stale."""
    assert refreshes(5, statistics_every=1, refresh_every=3) == [0, 3]


def test_early_refreshes() -> None:
    """The first averages change fast: a period of twenty begins with shorter ones."""
    assert refreshes(44, statistics_every=1) == [0, 1, 2, 4, 8, 16, 20, 40]


def test_early_statistics() -> None:
    """With the first refreshes, then every tenth."""
    net = kfac_fx.transform(model())
    preconditioner = make(net)
    due = []
    for k, x in enumerate(batches(30)):
        if preconditioner.due:
            due.append(k)
        step(preconditioner, net, x)
    assert due == [0, 1, 2, 4, 8, 10, 20]
    assert estimate_of(preconditioner).recorded == 7


def test_refresh_uses_the_average(measure: Measure) -> None:
    net, xs = kfac_fx.transform(model()), batches(3)
    stale, eager = make(net, statistics_every=1, refresh_every=10), make(net, statistics_every=1)
    for x in xs:
        step(stale, net, x)
    eager.load_state_dict(stale.state_dict())
    probe = {name: torch.randn_like(p) for name, p in net.named_parameters()}
    stale.refresh()
    eager.refresh()
    close(tuple(stale.apply(probe).values()), tuple(eager.apply(probe).values()))


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_state_dict_round_trip(steps: int) -> None:
    """Saved, loaded with weights_only, continued: bitwise the same run."""
    net, xs = kfac_fx.transform(model()), batches(9)
    twin = copy.deepcopy(net)
    options = {"statistics_every": 2, "refresh_every": 3}
    first, second = make(net, **options), make(twin, **options)
    for x in xs[:steps]:
        step(first, net, x)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(flat(first), flat(second))
    for x in xs[steps:]:
        want, found = step(first, net, x), step(second, twin, x)
        assert all(torch.equal(found[name], want[name]) for name in want)


def test_state_dict_is_a_copy() -> None:
    net = kfac_fx.transform(model())
    preconditioner = make(net, statistics_every=1)
    step(preconditioner, net, torch.randn(6, 4))
    state, before = preconditioner.state_dict(), flat(preconditioner)
    step(preconditioner, net, torch.randn(6, 4))
    other = make(net)
    other.load_state_dict(state)
    assert torch.equal(flat(other), before)


def test_two_preconditioners_of_one_net() -> None:
    """Each keeps its own averages."""
    net, xs = kfac_fx.transform(model()), batches(2)
    first, second = make(net), make(net)
    step(first, net, xs[0])
    before = flat(first)
    step(second, net, xs[1])
    assert torch.equal(flat(first), before)
    assert not torch.equal(flat(second), before)


def test_copy_of_a_net() -> None:
    net, x = kfac_fx.transform(model()), torch.randn(6, 4)
    twin = copy.deepcopy(net)
    want, found = step(make(net), net, x), step(make(twin), twin, x)
    assert all(torch.equal(found[name], want[name]) for name in want)


def test_statistics_leave_gradients_and_parameters_alone() -> None:
    """observe() writes no gradient of a parameter; step() no parameter."""
    net, x = kfac_fx.transform(model()), torch.randn(6, 4)
    preconditioner = make(net, fisher="sampled")
    before = copy.deepcopy(net.state_dict())
    outputs = net(x)
    preconditioner.observe(outputs)
    assert all(p.grad is None for p in net.parameters())
    outputs.sum().backward()
    preconditioner.step()
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())


def test_evaluation_between_steps_records_nothing(measure: Measure) -> None:
    net, x = kfac_fx.transform(model()), torch.randn(6, 4)
    for fisher in ("sampled", "exact", "empirical"):
        preconditioner = make(net, fisher=fisher, generator=torch.Generator().manual_seed(0))
        generator = torch.Generator().manual_seed(0)
        y = torch.randn(6, 3)
        want = flat(measure(net, x, y, Normal(), fisher, generator=generator))
        net.zero_grad()
        outputs = net(x)
        preconditioner.observe(outputs, y)
        with torch.no_grad():
            net(torch.randn(3, 4))
        Normal().nll(outputs, y).backward()
        net(torch.randn(3, 4))
        preconditioner.step()
        net(torch.randn(3, 4)).sum().backward()
        close((flat(preconditioner),), (want,))


@pytest.mark.parametrize("fisher", ["sampled", "exact", "empirical"])
def test_other_backwards_between_steps(measure: Measure, fisher: str) -> None:
    """Adversarial examples, penalties and the like differentiate the net too; not observed."""
    net, x, y = kfac_fx.transform(model()), torch.randn(6, 4), torch.randn(6, 3)
    options = {"fisher": fisher, "generator": torch.Generator().manual_seed(0)}
    preconditioner = make(net, statistics_every=1, **options)
    options = {"fisher": fisher, "generator": torch.Generator().manual_seed(0)}
    want = flat(measure(net, x, y, Normal(), **options))
    for _ in range(2):
        probe = torch.randn(5, 4, requires_grad=True)
        net(probe).square().sum().backward()
        net.zero_grad()
        outputs = net(x)
        preconditioner.observe(outputs, y)
        Normal().nll(outputs, y).backward()
        preconditioner.step()
        if fisher != "sampled":
            close((flat(preconditioner),), (want,))


def test_checkpointed_forward(measure: Measure) -> None:
    """Activations computed again in the backward count once."""
    net, x = kfac_fx.transform(model()), torch.randn(6, 4)
    want = flat(measure(net, x, None, Normal()))
    preconditioner = make(net)
    outputs = checkpoint(net, x, use_reentrant=False)
    preconditioner.observe(outputs)
    outputs.sum().backward()
    preconditioner.step()
    close((flat(preconditioner),), (want,))


def test_autocast() -> None:
    """Layers run in bfloat16; the statistics are kept in float32 and close to the exact ones."""
    inner = model().float()
    net, x = kfac_fx.transform(inner), torch.randn(32, 4, dtype=torch.float32)
    found = []
    for enabled in (False, True):
        preconditioner = make(net)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            outputs = net(x)
        preconditioner.observe(outputs)
        outputs.float().sum().backward()
        preconditioner.step()
        found.append(flat(preconditioner).clone())
    assert found[1].dtype == torch.float32
    torch.testing.assert_close(found[1], found[0], rtol=0.1, atol=0.02)


def test_gradient_accumulation_of_other_losses(measure: Measure) -> None:
    """A penalty on the parameters changes the gradient, not an exact statistic."""
    net, x = kfac_fx.transform(model()), torch.randn(6, 4)
    want = flat(measure(net, x, None, Normal()))
    preconditioner = make(net)
    outputs = net(x)
    preconditioner.observe(outputs)
    penalty = sum(p.square().sum() for p in net.parameters())
    (outputs.square().sum() + penalty).backward()
    preconditioner.step()
    close((flat(preconditioner),), (want,))


def test_parameter_without_gradient(measure: Measure) -> None:
    """A covered parameter that the loss does not reach keeps no gradient, or gets a zero one."""
    net, x = kfac_fx.transform(TwoHeads()), torch.randn(6, 4)
    preconditioner = kfac_fx.Preconditioner(
        net, likelihood="categorical", damping=1e-2, fisher="exact"
    )
    outputs, _ = net(x)
    preconditioner.observe(outputs)
    F.cross_entropy(outputs, torch.randint(3, (6,))).backward()
    preconditioner.step()
    grad = net.get_parameter("second.weight").grad
    assert grad is None or not grad.any()
    assert net.get_parameter("first.weight").grad.any()


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x), self.second(x)


@pytest.mark.parametrize("fisher", ["sampled", "exact", "empirical"])
def test_training_loop(fisher: str) -> None:
    """The loop of the design, on the model's own parameters; a classifier learns."""
    inner = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
    net = kfac_fx.transform(inner)
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.05, momentum=0.9)
    preconditioner = kfac_fx.Preconditioner(
        net, likelihood="categorical", damping=1e-2, fisher=fisher
    )
    x = torch.randn(128, 4)
    y = (x @ torch.randn(4, 3)).argmax(-1)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        outputs = net(x)
        loss = F.cross_entropy(outputs, y)
        preconditioner.observe(outputs, y)
        loss.backward()
        preconditioner.step()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.2 < 0.8 < losses[0]


def test_natural_gradient_of_a_linear_model(measure: Measure) -> None:
    """Least squares, hardly damped: one step of length one is the solution."""
    net, x = kfac_fx.transform(nn.Sequential(nn.Linear(4, 3))), torch.randn(20, 4)
    target = torch.randn(20, 3)
    preconditioner = make(net, damping=1e-16, trust_region=None)
    outputs = net(x)
    preconditioner.observe(outputs)
    ((outputs - target).square().sum() / (2 * len(x))).backward()
    preconditioner.step()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter -= parameter.grad
    ones = torch.cat([x, torch.ones(20, 1)], dim=1)
    solution = torch.linalg.lstsq(ones, target).solution
    torch.testing.assert_close(net(x), ones @ solution, rtol=1e-6, atol=1e-6)


def test_categorical_targets_are_optional(measure: Measure) -> None:
    net, x = kfac_fx.transform(model()), torch.randn(6, 4)
    want = flat(measure(net, x, None, Categorical()))
    found = flat(measure(net, x, torch.randint(3, (6,)), Categorical()))
    close((found,), (want,))


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_micro_batches_are_one_batch(measure: Measure, fisher: str, reduction: str) -> None:
    """Accumulated gradients: one observe a forward, statistics weighted by their terms."""
    net, x, y = kfac_fx.transform(model()), torch.randn(6, 4), torch.randn(6, 3)
    want = flat(measure(net, x, y, Normal(), fisher, reduction))
    preconditioner = make(net, fisher=fisher)
    for part in (slice(0, 2), slice(2, 6)):
        outputs = net(x[part])
        preconditioner.observe(outputs, y[part])
        loss = Normal().nll(outputs, y[part])
        (loss / 6 if reduction == "mean" else loss).backward()
    preconditioner.step()
    close((flat(preconditioner),), (want,))


@pytest.mark.parametrize("structure", [None, "block_diagonal", "block_tridiagonal"])
def test_memory_is_known_before_it_is_taken(structure: str | None) -> None:
    net = kfac_fx.transform(model(), structure=structure)
    preconditioner = make(net)
    assert bool(preconditioner.cross_factors) == (structure == "block_tridiagonal")
    groups = [*preconditioner.factors.values(), *preconditioner.cross_factors.values()]
    taken = sum(factor.numel() for group in groups for factor in group)
    assert net.curvature.factor_elements == taken
    assert net.curvature.memory(8) == 16 * taken


def test_couplings_are_for_who_asks() -> None:
    """At the transform or here; a structure that the transform leaves out is an error."""
    made = [
        (None, None, "block_diagonal"),
        (None, "block_tridiagonal", "block_tridiagonal"),
        ("block_tridiagonal", None, "block_tridiagonal"),
        ("block_tridiagonal", "block_diagonal", "block_diagonal"),
        ("block_diagonal", None, "block_diagonal"),
    ]
    for asked, here, want in made:
        net = kfac_fx.transform(model(), structure=asked)
        preconditioner = kfac_fx.Preconditioner(net, structure=here)
        assert preconditioner.structure == want
        assert bool(preconditioner.couplings) == (want == "block_tridiagonal")
    chosen = kfac_fx.transform(model(), couplings="data")
    assert kfac_fx.Preconditioner(chosen).structure == "block_tridiagonal"


def test_factors_that_have_not_moved_are_not_inverted_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Refreshes that are due before the next statistics or another damping are skipped."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    net = kfac_fx.transform(model)
    pre = kfac_fx.Preconditioner(net, statistics_every=4, refresh_every=1)
    refreshes: list[Any] = []
    original = pre.inverse._engine.refresh
    monkeypatch.setattr(
        pre.inverse._engine, "refresh", lambda *a: refreshes.append(a) or original(*a)
    )

    def step() -> int:
        outputs = net(torch.randn(8, 3))
        pre.observe(outputs)
        outputs.square().mean().backward()
        pre.step()
        return len(refreshes)

    assert [step() for _ in range(6)] == [1, 1, 1, 1, 2, 2]
    pre.damping *= 2
    assert step() == 3
    pre.refresh()  # asked for by name, it always runs
    assert len(refreshes) == 4
    pre.load_state_dict(pre.state_dict())
    assert step() == 5
