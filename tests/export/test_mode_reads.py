"""One export serves both modes where code asks no module for its mode, and two where it does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfac_fx
from kfac_fx.capture.train_and_eval import mode_reads
from kfac_fx.export import export_model


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x).tanh())


class Functional(Plain):
    """Noise that has a flag of its own, the same in both modes."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.dropout(self.inner(x), 0.25))


class Layer(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(self.inner(x)))


class Every(Layer):
    """All of torch's layers of noise, one that stays in evaluation, and one called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha, self.none = nn.AlphaDropout(0.2), nn.Dropout(0.0)
        self.planes, self.over = nn.Dropout1d(0.3), nn.Dropout(0.1, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(self.drop(self.alpha(self.drop(self.inner(x)))), 0.25)
        h = self.none(self.planes(h[:, None]).squeeze(1))
        return self.last(self.over(2 * h))


class Always(nn.Dropout):
    """A layer of the user's, which has noise in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, True)


class Mixed(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.always = Always(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.always(self.drop(self.inner(x))))


class Normed(Layer):
    """With running averages, and without."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.bare = nn.BatchNorm1d(4), nn.BatchNorm1d(4, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.bare(self.norm(self.drop(self.inner(x)))))


class Reading(Normed):
    """Asks a norm for its mode itself."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.inner(x)) * (1.0 if self.norm.training else 2.0))


class Hooked(Layer):
    """A hook of the layer adds noise that stays."""

    def __init__(self) -> None:
        super().__init__()
        self.drop.register_forward_hook(lambda _, __, h: F.dropout(h, 0.25, True))


class Branch(Plain):
    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        return self.last(h if self.training else 2 * h)


def doubled_in_evaluation(module: nn.Module, h: Tensor) -> Tensor:
    return h if getattr(module, "training", True) else 2 * h


class Helper(Plain):
    """A function asks, and it asks a child."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(doubled_in_evaluation(self.inner, self.inner(x)))


class OwnFlag(Plain):
    """The class has a property of its own, which no read of the base class's goes through."""

    @property
    def training(self) -> bool:
        return bool(self.__dict__["training"])

    @training.setter
    def training(self, value: bool) -> None:
        self.__dict__["training"] = value

    def forward(self, x: Tensor) -> Tensor:
        return Branch.forward(self, x)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "exports"),
    [
        (Plain, 1),
        (Functional, 1),
        (Layer, 1),
        (Every, 1),
        (Mixed, 1),
        (Normed, 1),
        (Reading, 2),
        (Hooked, 2),
        (Branch, 2),
        (Helper, 2),
        (OwnFlag, 2),
    ],
)
def test_a_model_that_asks_for_no_mode_is_exported_once(
    kind: type[Plain], exports: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []
    export = export_model._export

    def counted(model: nn.Module, *args: Any, **options: Any) -> Any:
        calls.append(model.training)
        return export(model, *args, **options)

    monkeypatch.setattr(export_model, "_export", counted)
    model, x = kind(), torch.randn(6, 4)
    twin = copy.deepcopy(model)
    net = kfac_fx.transform(model, example_inputs=(x,), capture="export")
    assert calls == [True, False][:exports]
    for training in (True, False, True):
        twin.train(training)
        net.train(training)
        for rows in (x, torch.randn(9, 4)):
            torch.manual_seed(0)
            want = twin(rows)
            torch.manual_seed(0)
            assert torch.equal(net(rows), want)
        for buffer, other in zip(model.buffers(), twin.buffers(), strict=True):
            assert torch.equal(buffer, other)


def test_the_flag_is_as_it_was_afterwards() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU()).eval()
    with pytest.raises(ZeroDivisionError), mode_reads(model) as found:
        assert not found.any
        assert not model[1].training
        assert found.any
        model[1].training = True
        with mode_reads(model) as within:
            assert within.any  # nobody else's reads would be told from its own
        raise ZeroDivisionError
    assert "training" not in vars(nn.Module)
    assert (model.training, model[1].training) == (False, True)


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.encoder, self.last = nn.TransformerEncoder(layer, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.last(self.encoder(x, src_key_padding_mask=padding))


def test_padding_that_torch_drops_without_gradients() -> None:
    """In evaluation nn.TransformerEncoder packs its rows, and the padding comes back as zeros."""
    torch.manual_seed(0)
    model, x = Padded(), torch.randn(5, 4, 4)
    padding = torch.tensor([False, False, True, True]).expand(5, 4)
    net = kfac_fx.transform(model, (x, padding), structure="block_diagonal", capture="export")
    for mode in (True, False):
        net.train(mode)
        torch.testing.assert_close(net(x, padding), model(x, padding))
        with torch.no_grad():
            torch.testing.assert_close(net(x, padding), model(x, padding))


class Asking(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x)) * (2.0 if isinstance(x, nn.Parameter) else 1.0)


@pytest.mark.parametrize("example", [torch.randn(5, 4), nn.Parameter(torch.randn(5, 4))])
def test_an_input_that_is_a_parameter(example: Tensor) -> None:
    model = Asking()
    net = kfac_fx.transform(model, example, structure="block_diagonal", capture="export")
    for x in (torch.randn(3, 4), nn.Parameter(torch.randn(3, 4))):
        torch.testing.assert_close(net(x), model(x))
