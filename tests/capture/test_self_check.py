"""Which route captures a model, and the comparison of the capture with the model."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_fx
from kfac_fx import errors


def batch() -> Tensor:
    return torch.randn(5, 4)


class Branch(nn.Module):
    """No tracer follows it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.other = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if x.sum() > 0 else self.other(x)


class Straight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def test_route_can_be_chosen() -> None:
    model, x = Straight(), batch()
    for route in ("symbolic_trace", "export", "eager"):
        assert kfac_fx.transform(model, x, capture=route).curvature.route == route
    with pytest.raises(errors.CaptureError, match="sum"):
        kfac_fx.transform(Branch(), x, capture="export")
    with pytest.raises(errors.CaptureError, match="example_inputs"):
        kfac_fx.transform(model, capture="eager")
    with pytest.raises(errors.UnknownOptionError, match="eager"):
        kfac_fx.transform(model, x, capture="dynamo")


class Shifting(nn.Module):
    """Python that tracing freezes: it looks right and computes something else."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        traced = isinstance(x, torch.fx.Proxy)
        return self.fc(x) * (2.0 if traced else 1.0)


def test_a_wrong_capture_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    model, x = Shifting(), batch()
    caplog.set_level(logging.INFO, logger="kfac_fx")
    assert kfac_fx.transform(model, x).curvature.route == "export"
    assert any("output 0 differs" in record.getMessage() for record in caplog.records)
    assert kfac_fx.transform(model, x, check=False).curvature.route == "symbolic_trace"
    with pytest.raises(errors.CaptureError, match="output 0 differs"):
        kfac_fx.transform(model, x, capture="symbolic_trace")


class Detached(Shifting):
    """The same outputs with other gradients."""

    def forward(self, x: Tensor) -> Tensor:
        traced = isinstance(x, torch.fx.Proxy)
        weight = self.fc.weight.detach() if traced else self.fc.weight
        return F.linear(x, weight, self.fc.bias)


def test_wrong_gradients_are_noticed() -> None:
    with pytest.raises(errors.CaptureError, match=r"gradient of fc\.weight"):
        kfac_fx.transform(Detached(), batch(), capture="symbolic_trace")


class Noisy(Shifting):
    """Does not repeat itself: there is nothing to compare with."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.fc(x) * self.calls


def test_a_model_that_does_not_repeat_itself() -> None:
    assert kfac_fx.transform(Noisy(), batch()).curvature.blocks


class Counting(Straight):
    """Only counts: outputs and gradients never differ."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.fc(x)


def test_what_a_call_leaves_is_compared() -> None:
    model = Counting()
    net = kfac_fx.transform(model, batch())
    assert net.curvature.route == "eager"
    assert model.calls == 0
    net(batch())
    assert model.calls == 1


class Freezing(Straight):
    """Its first layer asks for gradients in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.fc.requires_grad_(self.training)
        return self.head(torch.tanh(self.fc(x)))


class FreezingOne(Freezing):
    """Its first layer's weight has no gradients, which it says in one of torch's ways.

    Args:
        way: what it says.
    """

    def __init__(self, way: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        self.way(self.fc.weight)
        return self.head(torch.tanh(self.fc(x)))


FREEZING: dict[str, Callable[[], nn.Module]] = {
    "a layer by mode": Freezing,
    "by the attribute": lambda: FreezingOne(lambda w: setattr(w, "requires_grad", False)),
    "by the method": lambda: FreezingOne(lambda w: w.requires_grad_(False)),
    "by name": lambda: FreezingOne(lambda w: w.requires_grad_(requires_grad=False)),
}


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("way", list(FREEZING)[1:])
def test_an_export_does_not_freeze(way: str, check: bool) -> None:
    model = FREEZING[way]().eval()
    with pytest.raises(errors.CaptureError, match="changes requires_grad of a parameter"):
        kfac_fx.transform(model, batch(), capture="export", check=check)
    assert all(p.requires_grad for p in model.parameters())
    # Asking for what is so already changes nothing.
    same = FreezingOne(lambda w: w.requires_grad_())
    assert kfac_fx.transform(same, batch(), capture="export", check=check)


@pytest.mark.parametrize("check", [True, False])
def test_what_the_evaluation_freezes_trains_again(check: bool) -> None:
    model, twin, x = Freezing(), Freezing(), batch()
    net = kfac_fx.transform(model, x, capture="export", check=check)
    assert "changes requires_grad of a parameter" in net.untraced
    for training in (True, False, True, True):
        net.train(training)(x).sum().backward(), twin.train(training)(x).sum().backward()
        for one, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert (one.grad is None) is (other.grad is None)
            one.grad = other.grad = None


@pytest.mark.parametrize("capture", ["symbolic_trace", "export", "eager"])
def test_what_is_frozen_from_outside_trains_again(capture: str) -> None:
    model, x = FreezingOne(lambda w: w.requires_grad_()), batch()
    net = kfac_fx.transform(model, x, capture=capture)  # type: ignore[arg-type]
    model.fc.weight.requires_grad_(False)
    net(x).sum().backward()
    assert model.fc.weight.requires_grad and model.fc.weight.grad is not None


@pytest.mark.parametrize("way", list(FREEZING)[1:])
def test_the_models_own_code_freezes(way: str) -> None:
    model, x = FREEZING[way](), batch()
    net = kfac_fx.transform(model, x, capture="eager")
    assert all(p.requires_grad for p in model.parameters())
    net(x).sum().backward()
    assert [p.grad is not None for p in model.parameters()] == [False, True, True, True]


@pytest.mark.parametrize("capture", ["symbolic_trace", "eager"])
def test_a_forward_that_freezes_is_followed(capture: str) -> None:
    model, x = Freezing(), batch()
    net = kfac_fx.transform(model, x, capture=capture)  # type: ignore[arg-type]
    assert net.curvature.blocks["fc"].approximation == "kronecker"
    for training in (False, True):
        net.train(training)(x).sum().backward()
        assert (model.fc.weight.grad is not None) is training


def test_error_of_the_model_itself() -> None:
    for check in (True, False):
        with pytest.raises(errors.CaptureError, match="shapes") as caught:
            kfac_fx.transform(Branch(), torch.randn(2, 7), check=check)
        cause: BaseException | None = caught.value
        while cause is not None and type(cause) is errors.CaptureError:
            cause = cause.__cause__
        assert type(cause) is RuntimeError


class Marks(Straight):
    """Writes on its input what no operator sees."""

    def forward(self, x: Tensor, seen: list[int]) -> Tensor:
        x.seen = True
        return super().forward(x)


class Counts(Straight):
    def forward(self, x: Tensor, seen: list[int]) -> Tensor:
        seen.append(len(seen))
        return super().forward(x)


@pytest.mark.parametrize("kind", [Marks, Counts])
def test_what_is_written_on_an_input_is_noticed(kind: type[Straight]) -> None:
    with pytest.raises(errors.CaptureError, match="it leaves its inputs as"):
        kfac_fx.transform(kind(), (batch(), []), capture="export")
    x, seen = batch(), [7]
    kfac_fx.transform(kind(), (batch(), []))(x, seen)
    assert getattr(x, "seen", kind is Counts)
    assert seen == ([7, 1] if kind is Counts else [7])
