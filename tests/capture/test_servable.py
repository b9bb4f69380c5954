"""Models and inputs of other makes are served, or refused at the transform in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.oracles import close
from torch import Tensor, nn

import kfac_fx
from kfac_fx.errors import CaptureError, CoverageError


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


class Around(nn.Module):
    """A part of another make, and a layer of its own."""

    def __init__(self, part: Any) -> None:
        super().__init__()
        self.part, self.head = part, nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.part(x))


def under_inference() -> nn.Module:
    with torch.inference_mode():
        return layers()


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return layers()


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "scripted": (lambda: torch.jit.script(layers()), "is a ScriptModule"),
    "traced": (lambda: torch.jit.trace(layers(), torch.randn(2, 4)), "is a ScriptModule"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3)), "0.weight is not initialised"),
    "inference": (under_inference, "inference_mode"),
    "a function": (lambda: torch.tanh, "takes an nn.Module"),
}


@pytest.mark.parametrize("example", [None, torch.randn(5, 4)], ids=["without", "with"])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_route_can_run_is_refused(kind: str, example: Tensor | None) -> None:
    make, message = REFUSED[kind]
    with pytest.raises(CaptureError, match=message):
        kfac_fx.transform(make(), example)


def test_a_model_without_values_is_captured_without_running_it() -> None:
    with pytest.raises(CaptureError, match="meta device"):
        kfac_fx.transform(on_meta(), torch.randn(5, 4))
    model = on_meta()
    net = kfac_fx.transform(model, structure="block_diagonal")
    model.to_empty(device="cpu")
    model.load_state_dict(layers().state_dict())
    x = torch.randn(5, 4)
    close((net(x),), (layers()(x),))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_parts_are_named() -> None:
    model = Around(torch.jit.script(layers()))
    for example in (None, torch.randn(5, 4)):
        net = kfac_fx.transform(model, example)
        assert not net.curvature.unused
        assert {n for b in net.curvature.blocks.values() for n in b.parameters} == {
            name for name, _ in model.named_parameters()
        }
        with pytest.raises(CoverageError, match=r"part\.0\.weight"):
            kfac_fx.transform(model, example, strict=True)
        x = torch.randn(6, 4)
        preconditioner = kfac_fx.Preconditioner(net, "normal")
        outputs = net(x)
        preconditioner.observe(outputs)
        outputs.mean().backward()
        before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        preconditioner.step()
        assert not any(map(torch.equal, before, (p.grad for p in model.parameters())))
        model.zero_grad()


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x: Any) -> Tensor:
        hidden: Tensor = self.head(self.rnn(x)[1][0][-1])
        return hidden


def packed() -> Any:
    x = torch.randn(3, 6, 4)
    return nn.utils.rnn.pack_padded_sequence(x, [6, 4, 2], batch_first=True)


def test_a_packed_sequence_goes_to_the_model() -> None:
    model, x = Packed(), packed()
    for example in ((torch.randn(3, 6, 4),), (x,)):
        net = kfac_fx.transform(model, example, structure="block_diagonal")
        for recording in (False, True):
            kfac_fx.ops.switch(net, kfac_fx.ops.all_buffers(net), recording)
            close((net(x),), (model(x),))


class Ragged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x).to_padded_tensor(0.0)  # type: ignore[no-any-return]


def test_nested_tensors_are_refused() -> None:
    cases = [torch.randn(i + 1, 4) for i in range(3)]
    x = torch.nested.nested_tensor(cases, layout=torch.jagged)
    model = Ragged()
    with pytest.raises(CaptureError, match="nested tensor"):
        kfac_fx.transform(model, x)
    net = kfac_fx.transform(model)
    close((net(x),), (model(x),))
    kfac_fx.ops.switch(net, kfac_fx.ops.all_buffers(net), True)
    with pytest.raises(CaptureError, match="nested tensor"):
        net(x)


class TwoTowers(nn.Module):
    """Either of two inputs, or both, as CLIP takes them."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(4, 3), nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, image: Tensor | None = None, text: Tensor | None = None) -> list[Tensor]:
        found = [] if image is None else [self.image(image)]
        return [*found, *([] if text is None else [self.text(text)]), self.scale.exp()]


def test_optional_arguments_alone_need_example_inputs() -> None:
    """The graph of no arguments would leave all towers without blocks, and without a word."""
    model, image, text = TwoTowers(), torch.randn(2, 4), torch.randn(2, 5)
    with pytest.raises(CaptureError, match="are optional, and without any"):
        kfac_fx.transform(model)
    net = kfac_fx.transform(model, (image, text))
    assert not net.curvature.unused
    close(tuple(net(image, text)), tuple(model(image, text)))
    # One that is used without arguments is none of these.
    assert not kfac_fx.transform(Prior()).curvature.unused


class Prior(nn.Module):
    """A mean that may be shifted."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(3))

    def forward(self, shift: Tensor | None = None) -> Tensor:
        return self.mean.exp() if shift is None else self.mean.exp() + shift
