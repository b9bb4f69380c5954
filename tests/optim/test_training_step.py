"""Loss, gradients and statistics in one graph equal the separate ones."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

import kfac_fx
from kfac_fx.statistics.traced_pass import PassProgram

pytestmark = pytest.mark.usefixtures("float64", "fresh")


class Network(nn.Module):
    """With running statistics, dropout, a tap on every kind of layer, and a diagonal block."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(4, 3)
        self.table = nn.Parameter(torch.randn(40))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.convolution(x)))
        x = x * self.table.view(4, 10).cumsum(1).mean(1).view(4, 1, 1)
        result: Tensor = self.head(self.drop(x.mean((2, 3))))
        return result


def batches(steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x = torch.randn(6, 2, 5, 5, generator=generator)
        yield x, torch.randint(3, (6,), generator=generator)


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, label_smoothing=0.1)


def train(fisher: str, fused: bool, loss: Any, compile: bool | str, steps: int = 4) -> Any:
    """State and losses after some steps; statistics in every second of them."""
    torch.manual_seed(1)
    net = kfac_fx.transform(Network())
    generator = torch.Generator().manual_seed(0)
    pre = kfac_fx.Preconditioner(
        net, fisher=fisher, statistics_every=2, generator=generator, compile=compile
    )
    run = kfac_fx.TrainingStep(pre, loss) if fused else None
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    losses = []
    torch.manual_seed(2)
    for x, y in batches(steps):
        optimizer.zero_grad()
        if run is not None:
            value = run(x, y)
        else:
            outputs = net(x)
            value = (loss or F.cross_entropy)(outputs, y)
            pre.observe(outputs, y)
            value.backward()
        losses.append(value.detach().clone())
        pre.step()
        optimizer.step()
    return net.state_dict(), losses, run


@pytest.mark.parametrize("compile", [False, "eager"])
@pytest.mark.parametrize("loss", [None, cross_entropy], ids=["likelihood", "own"])
@pytest.mark.parametrize("fisher", ["sampled", "exact", "empirical"])
def test_one_graph_equals_separate(fisher: str, loss: Any, compile: bool | str) -> None:
    if fisher == "empirical" and loss is not None:
        pytest.skip("the separate form compares the loss with the likelihood")
    want, want_losses, _ = train(fisher, False, loss, False)
    found, losses, _ = train(fisher, True, loss, compile)
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(losses, want_losses, rtol=1e-10, atol=1e-12)


def empirical(loss: Any, compile: bool | str, own_pass: bool = False) -> Any:
    """Two steps without dropout; the factors, the gradients and the first step's run."""
    torch.manual_seed(1)
    net = kfac_fx.transform(Network().eval())
    pre = kfac_fx.Preconditioner(net, fisher="empirical", compile=compile)
    run = None if own_pass else kfac_fx.TrainingStep(pre, loss)
    for x, y in batches(2):
        net.zero_grad()
        if run is not None:
            run(x, y)
        else:
            pre.observe(inputs=x, targets=y)
            loss(net(x), y).backward()
        gradients = {n: p.grad.clone() for n, p in net.named_parameters()}
        pre.step()
    return pre.factors, gradients, run


def few_weigh_more(outputs: Tensor, targets: Tensor) -> Tensor:
    """A case in the middle that a sample of the cases would miss."""
    weights = torch.ones(len(targets))
    weights[1] = 30.0
    return (weights * F.cross_entropy(outputs, targets, reduction="none")).mean()


@pytest.mark.parametrize("compile", [False, "eager"])
@pytest.mark.parametrize("loss", [cross_entropy, few_weigh_more])
def test_empirical_statistics_of_another_loss(loss: Any, compile: bool | str) -> None:
    """Those of the likelihood; the loss has its own part in the gradients alone."""
    want = empirical(loss, False, own_pass=True)
    found = empirical(loss, compile)
    torch.testing.assert_close(found[:2], want[:2], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("compile", [False, "eager"])
def test_a_perfect_fit_hides_no_other_part_of_the_loss(compile: bool | str) -> None:
    model = nn.Linear(5, 5, bias=False)
    model.weight.data = 60 * torch.eye(5)
    y = torch.arange(64) % 5
    pre = kfac_fx.Preconditioner(
        kfac_fx.transform(nn.Sequential(model)), fisher="empirical", compile=compile
    )
    run = kfac_fx.TrainingStep(
        pre, lambda o, t: F.cross_entropy(o, t) + 1e-4 * o.logsumexp(-1).square().mean()
    )
    run(F.one_hot(y, 5).double(), y)
    pre.step()
    ((_, G),) = pre.factors.values()
    assert float(G.trace()) < 1e-20


def test_one_bad_loss_changes_nothing_for_the_next() -> None:
    """The loss is called once a step, and its value is what it was."""
    factors = iter([1.0, torch.inf, 1.0])
    pre = kfac_fx.Preconditioner(kfac_fx.transform(Network().eval()), fisher="empirical")
    run = kfac_fx.TrainingStep(pre, lambda o, t: F.cross_entropy(o, t) * next(factors))
    values = [float(run(x, y)) for x, y in batches(2)]
    assert values[1] == torch.inf
    with Backwards() as backwards:
        run(*next(batches(1)))
    assert backwards.count == 1


def test_outputs_of_which_one_depends_on_another() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(6, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            h = torch.tanh(self.body(x))
            return {"h": h, "logits": self.head(h)}

    class Logits(kfac_fx.likelihoods.Categorical):
        def distribution(self, outputs: Any) -> Any:
            return super().distribution(outputs["logits"])

        def terms(self, outputs: Any, targets: Any) -> Any:
            return super().terms(outputs["logits"], targets)

    pre = kfac_fx.Preconditioner(kfac_fx.transform(Both()), Logits(), fisher="empirical")
    run = kfac_fx.TrainingStep(pre, lambda o, t: F.cross_entropy(o["logits"], t))
    with Backwards() as backwards:
        run(torch.randn(7, 6), torch.randint(3, (7,)))
    assert backwards.count == 1


class Backwards(TorchDispatchMode):
    """Counts those of tanh."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.tanh_backward.default
        return func(*args, **(kwargs or {}))


def scaled(factor: float) -> Any:
    return lambda outputs, targets: factor * F.cross_entropy(outputs, targets, reduction="sum")


@pytest.mark.parametrize("compile", [False, "eager"])
@pytest.mark.parametrize("factor", [1.0, 1e-4, 2.0**16])
def test_empirical_statistics_of_any_reduction(factor: float, compile: bool | str) -> None:
    want = empirical(scaled(factor), False, own_pass=True)
    found = empirical(scaled(factor), compile)
    torch.testing.assert_close(found[:2], want[:2], rtol=1e-9, atol=1e-12 * factor)


def test_one_backward_brings_empirical_statistics_and_gradients() -> None:
    *_, run = empirical(scaled(0.5), False)
    with Backwards() as backwards:
        run(*next(batches(1)))
    assert backwards.count == 1


def test_one_backward_in_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[PassProgram] = []

    def kept(*arguments: Any) -> PassProgram:
        made.append(PassProgram(*arguments))
        return made[-1]

    monkeypatch.setattr("kfac_fx.statistics.pass_cache.PassProgram", kept)
    empirical(scaled(0.5), "eager")
    (program,) = made
    nodes = program.once.graph.find_nodes(
        op="call_function", target=torch.ops.aten.tanh_backward.default
    )
    assert len(nodes) == 1


def test_a_loss_that_stops_to_be_the_likelihood_s() -> None:
    """Its first steps are; statistics of the later ones are the likelihood's all the same."""
    smoothing = [0.0]

    def changing(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, label_smoothing=smoothing[0])

    torch.manual_seed(1)
    pre, other = (
        kfac_fx.Preconditioner(kfac_fx.transform(Network().eval()), fisher="empirical")
        for _ in range(2)
    )
    other._recorder.net.load_state_dict(pre._recorder.net.state_dict())
    run, plain = kfac_fx.TrainingStep(pre, changing), kfac_fx.TrainingStep(other)
    for smoothing[0], (x, y) in zip((0.0, 0.3, 0.3), batches(3), strict=True):
        run(x, y), plain(x, y)
        pre.step(), other.step()
    torch.testing.assert_close(pre.factors, other.factors, rtol=1e-9, atol=1e-12)


def test_number_of_graphs() -> None:
    """With statistics and without, a refresh and an apply."""
    train("sampled", True, None, "eager")
    assert counters["stats"]["unique_graphs"] == 4


@pytest.mark.slow
def test_inductor() -> None:
    """Three steps under inductor end where three plain ones end."""
    want, _, _ = train("sampled", False, None, False, steps=3)
    found, _, _ = train("sampled", True, None, True, steps=3)
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)


def test_sum_of_likelihoods_and_ignored_targets() -> None:
    likelihood = kfac_fx.likelihoods.Sum([("categorical", 1.0), ("normal", 0.3)])
    body = nn.Linear(6, 5)

    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = copy.deepcopy(body)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.body(x)
            return y[:, :3], y[:, 3:]

    x, y, z = torch.randn(7, 6), torch.randint(3, (7,)), torch.randn(7, 2)
    y[:3] = -100
    net = kfac_fx.transform(TwoHeads())
    step = kfac_fx.TrainingStep(kfac_fx.Preconditioner(net, likelihood, compile="eager"))
    loss = step(x, (y, z))
    label, box = net(x)
    want = F.cross_entropy(label, y) + 0.3 * 0.5 * (box - z).square().sum(1).mean()
    torch.testing.assert_close(loss, want.detach(), rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(want, [net.get_parameter("body.weight")])
    torch.testing.assert_close(net.get_parameter("body.weight").grad, gradient)


def test_gradients_accumulate() -> None:
    """As loss.backward() does: nothing is set to zero."""
    net = kfac_fx.transform(Network())
    net.eval()
    pre = kfac_fx.Preconditioner(net, compile="eager")
    step = kfac_fx.TrainingStep(pre)
    (x, y), *_ = batches(1)
    step(x, y)
    once = {n: p.grad.clone() for n, p in net.named_parameters()}
    step(x, y)
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * once[name])


def test_wrong_targets_are_an_error_and_leave_no_gradient() -> None:
    net = kfac_fx.transform(Network())
    (x, y), *_ = batches(1)
    with pytest.raises(kfac_fx.errors.LikelihoodError, match="targets"):
        kfac_fx.TrainingStep(kfac_fx.Preconditioner(net))(x)
    step = kfac_fx.TrainingStep(kfac_fx.Preconditioner(net, compile="eager"))
    with pytest.raises(kfac_fx.errors.LikelihoodError):
        step(x, y.fill_(7))
    assert all(p.grad is None for p in net.parameters())


def test_in_float16_statistics_have_a_backward_of_their_own() -> None:
    """At the scale of the sum of the terms, where small derivatives do not vanish."""
    pre = kfac_fx.Preconditioner(kfac_fx.transform(Network().eval().float()), fisher="empirical")
    run = kfac_fx.TrainingStep(pre)
    (x, y), *_ = batches(1)
    with torch.autocast("cpu", torch.float16), Backwards() as backwards:
        run(x.float(), y)
    assert backwards.count == 2
