"""The empirical Fisher: which backward pass it is of, where several come through one forward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.networks import mlp
from support.oracles import close
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import kfac_fx
from kfac_fx.errors import ObservationError

pytestmark = pytest.mark.usefixtures("float64")


class Untapped(nn.Module):
    """A parameter that gets a diagonal from its whole gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(0.1 * torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.linalg.matrix_exp(self.p)


def losses(outputs: Tensor, y: Tensor) -> Tensor:
    """Neither a sum nor a mean, so that their scale must be seen."""
    return 3.0 * F.cross_entropy(outputs, y, reduction="none") / len(y)


small_mlp = functools.partial(mlp, 3, 5, 3)
Train = Callable[[Tensor, Tensor, list[nn.Parameter]], None]


def plainly(outputs: Tensor, y: Tensor, _: list[nn.Parameter]) -> None:
    losses(outputs, y).sum().backward()


def logged_before(outputs: Tensor, y: Tensor, parameters: list[nn.Parameter]) -> None:
    torch.autograd.grad(losses(outputs, y)[0], parameters, retain_graph=True)
    plainly(outputs, y, parameters)


def logged_after(outputs: Tensor, y: Tensor, parameters: list[nn.Parameter]) -> None:
    losses(outputs, y).sum().backward(retain_graph=True)
    torch.autograd.grad(losses(outputs, y)[0], parameters)


def by_halves(outputs: Tensor, y: Tensor, _: list[nn.Parameter]) -> None:
    found = losses(outputs, y)
    found[:4].sum().backward(retain_graph=True)
    found[4:].sum().backward()


def by_terms(outputs: Tensor, y: Tensor, _: list[nn.Parameter]) -> None:
    loss = losses(outputs, y).sum()
    (0.3 * loss).backward(retain_graph=True)
    (0.7 * loss).backward()


Recorded = tuple[Callable[[Tensor], Tensor], kfac_fx.Preconditioner]


def recorder(model: nn.Module, compiled: bool = False) -> Recorded:
    net = kfac_fx.transform(model)
    run = torch.compile(net, backend="aot_eager") if compiled else net
    return run, kfac_fx.Preconditioner(run, fisher="empirical")


def recorded(one: Recorded, train: Train) -> list[Tensor]:
    """The factors after a step on one batch."""
    net, pre = one
    torch.manual_seed(3)
    x, y = torch.randn(8, 3), torch.randint(3, (8,))
    outputs = net(x)
    pre.observe(outputs, y)
    train(outputs, y, [*net.parameters()])
    pre.step()
    return [factor.clone() for factors in pre.factors.values() for factor in factors]


@pytest.fixture(params=[False, True], ids=["eager", "compiled"])
def compiled(request: pytest.FixtureRequest) -> Iterator[bool]:
    with torch._functorch.config.patch(donated_buffer=False):
        yield request.param
    torch._dynamo.reset()


@pytest.mark.parametrize("build", [small_mlp, Untapped], ids=["mlp", "Untapped"])
@pytest.mark.parametrize("train", [logged_before, logged_after])
def test_gradients_for_a_log_are_no_statistics(
    build: type[nn.Module], train: Train, compiled: bool
) -> None:
    model = build()
    want = recorded(recorder(model), plainly)
    close(recorded(recorder(model, compiled), train), want)


@pytest.mark.parametrize("build", [small_mlp, Untapped], ids=["mlp", "Untapped"])
@pytest.mark.parametrize("train", [by_halves, by_terms])
def test_several_that_train_are_refused(
    build: type[nn.Module], train: Train, compiled: bool
) -> None:
    """Nothing is recorded, of an earlier micro-batch neither; the next step is as if at first."""
    model = build()
    want = recorded(recorder(model), plainly)
    net, pre = one = recorder(model, compiled)
    x, y = torch.randn(8, 3), torch.randint(3, (8,))
    outputs = net(x)
    pre.observe(outputs, y)
    losses(outputs, y).sum().backward()
    with pytest.raises(ObservationError, match="2 backward passes"):
        recorded(one, train)
    close(recorded(one, plainly), want)


class Aside(nn.Module):
    """A head beside the outputs, which is computed later, so that its backward comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head, self.other = nn.Linear(3, 5), nn.Linear(5, 3), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.tanh(self.trunk(x))
        return self.head(z), self.other(z)


def test_a_log_before_a_backward_that_comes_to_other_taps_first() -> None:
    def factors(log: bool) -> list[Tensor]:
        torch.manual_seed(2)
        net, pre = recorder(Aside())
        y = torch.randint(3, (8,))
        outputs, other = net(torch.randn(8, 3))
        pre.observe(outputs, y)
        loss = losses(outputs, y).sum()
        if log:
            torch.autograd.grad(loss, [*net.parameters()], retain_graph=True, allow_unused=True)
        (loss + other.square().mean()).backward()
        pre.step()
        return [factor for factors in pre.factors.values() for factor in factors]

    close(factors(log=True), factors(log=False))


class Twice(nn.Module):
    """Calls a layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


@pytest.mark.parametrize("build", [small_mlp, Twice], ids=["mlp", "Twice"])
@pytest.mark.parametrize("second", ["none", "evaluated", "observed", "not observed"])
@pytest.mark.parametrize("before", [0, 1], ids=["at first", "later"])
def test_a_backward_through_a_forward_that_was_not_observed_too_is_refused(
    build: type[nn.Module], second: str, before: int
) -> None:
    net, pre = one = recorder(build())
    for _ in range(before):
        recorded(one, plainly)
    outputs, y = net(torch.randn(8, 3)), torch.randint(3, (8,))
    with torch.set_grad_enabled(second != "evaluated"):
        other = outputs if second == "none" else net(torch.randn(8, 3))
    if second == "observed":
        outputs, y = torch.cat([outputs, other]), torch.cat([y, y])
    pre.observe(outputs, y)
    loss = losses(outputs, y).sum()
    if second == "not observed":
        loss = loss + other.square().sum()
    loss.backward()
    refused = pytest.raises(ObservationError, match="give observe\\(\\) all outputs at once")
    with refused if second == "not observed" else nullcontext():
        pre.step()


class Again(nn.Module):
    """Computes a part again in the backward, in a run of the engine of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = small_mlp(), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = checkpoint(self.inner, x, use_reentrant=True)
        return self.outer(found)


def recorder_of(build: type[nn.Module], model: nn.Module, compiled: bool = False) -> Recorded:
    if build is not Again:
        return recorder(model, compiled)
    net = kfac_fx.transform(model, example_inputs=(torch.randn(4, 3, requires_grad=True),))
    return net, kfac_fx.Preconditioner(net, fisher="empirical")


def parts(one: Recorded, train: list[int], observe: list[int]) -> list[Tensor]:
    """The factors after two steps, of micro-batches that are trained and of those observed."""
    net, pre = one
    torch.manual_seed(3)
    for _ in range(2):
        x, y = torch.randn(12, 3, requires_grad=True), torch.randint(3, (12,))
        for part in train:
            rows = slice(4 * part, 4 * part + 4)
            outputs = net(x[rows])
            if part in observe:
                pre.observe(outputs, y[rows])
            losses(outputs, y[rows]).sum().backward()
        pre.step()
    return [factor.clone() for factors in pre.factors.values() for factor in factors]


@pytest.mark.parametrize("observe", [[0], [1], [0, 2], [2]])
@pytest.mark.parametrize(
    "build", [small_mlp, Untapped, Twice, Again], ids=["mlp", "Untapped", "Twice", "Again"]
)
def test_micro_batches_that_are_not_observed_are_left_out(
    build: type[nn.Module], observe: list[int], compiled: bool
) -> None:
    if compiled and build is Again:
        pytest.skip("reentrant checkpoints do not compile")
    model = build()
    want = parts(recorder_of(build, model), observe, observe)
    close(parts(recorder_of(build, model, compiled), [0, 1, 2], observe), want)


@pytest.mark.parametrize("build", [small_mlp, Untapped], ids=["mlp", "Untapped"])
def test_a_backward_of_another_forward_that_comes_first_is_refused(
    build: type[nn.Module], compiled: bool
) -> None:
    model = build()
    want = recorded(recorder(model), plainly)
    net, pre = one = recorder(model, compiled)
    y = torch.randint(3, (8,))
    outputs, other = net(torch.randn(8, 3)), net(torch.randn(8, 3))
    pre.observe(outputs, y)
    other.square().sum().backward()
    losses(outputs, y).sum().backward()
    with pytest.raises(ObservationError, match="right before the backward of its outputs"):
        pre.step()
    close(recorded(one, plainly), want)


class Operators(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_no_statistics_are_formed_of_unobserved_micro_batches() -> None:
    net, pre = recorder(small_mlp())
    counts = []
    for observed in (True, False, False):
        outputs, y = net(torch.randn(8, 3)), torch.randint(3, (8,))
        if observed:
            pre.observe(outputs, y)
        loss = losses(outputs, y).sum()
        for parameter in net.parameters():
            parameter.grad = None
        with Operators() as operators:
            loss.backward()
        counts.append(operators.count)
    pre.step()
    assert counts[0] > counts[1] == counts[2]
