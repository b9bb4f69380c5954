"""Options of taps: one dataclass, and the ways to schema, arguments and text."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import kfac_fx
from kfac_fx.ir.curvature_graph import CurvatureGraph
from kfac_fx.ops.convolution import ConvolutionOptions, ConvolutionSide
from kfac_fx.ops.embedding import EmbeddingOptions
from kfac_fx.ops.kronecker import LinearOptions, ShiftOptions
from kfac_fx.ops.linear import LinearSide, ProjectionOptions, ProjectionSide
from kfac_fx.ops.options import TapOptions
from kfac_fx.ops.scale_shift import ScaleShiftOptions
from kfac_fx.ops.sides import coupling_operators, side_of, side_text

OPTIONS: dict[str, TapOptions] = {
    "linear": LinearOptions((-1,), (1, -1), (), (), True, False),
    "table": LinearOptions((-1,), (-1,), (0,), (0,), False, True),
    "projection": ProjectionOptions(4, 4, bias=True, reduce=False),
    "convolution": ConvolutionOptions(
        (3, 2), (1, 2), (1, 1), (1, 1, 0, 0), "reflect", 1, bias=True, reduce=False
    ),
    "embedding": EmbeddingOptions(-(2**31)),
    "shift": ShiftOptions((1,)),
    "scale_shift": ScaleShiftOptions("batch", (), (1,), True, 1e-5, shift=True),
}


def every_kind() -> Iterator[type[TapOptions]]:
    kinds = list(TapOptions.__subclasses__())
    while kinds:
        kind = kinds.pop()
        yield kind
        kinds += kind.__subclasses__()


@pytest.mark.parametrize("name", OPTIONS)
def test_round_trips(name: str) -> None:
    options = OPTIONS[name]
    kind = type(options)
    assert kind.from_args(options.to_args()) == options
    # torch hands lists to an operator, and JSON has nothing else.
    as_lists = [list(v) if isinstance(v, tuple) else v for v in options.to_args()]
    assert kind.from_args(as_lists) == options
    assert kind.from_text(options.to_text()) == options
    assert kind.from_args(json.loads(json.dumps(as_lists))) == options


@pytest.mark.parametrize("name", OPTIONS)
def test_an_operator_has_them_last(name: str) -> None:
    """In the order of the fields: what ``to_args`` gives fits the end of the schema."""
    schema = getattr(torch.ops.kfac_fx, name).default._schema
    wanted = [entry.split(" ")[1] for entry in type(OPTIONS[name]).schema().split(", ")]
    assert [argument.name for argument in schema.arguments][-len(wanted) :] == wanted


def test_every_class_has_a_schema() -> None:
    kinds = list(every_kind())
    assert len(kinds) >= 12
    for kind in kinds:
        assert "None" not in kind.schema()


def test_too_many_arguments() -> None:
    with pytest.raises(TypeError):
        EmbeddingOptions.from_args([1, 2])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("name", ["linear", "projection", "convolution"])
def test_sides(name: str, interleaved: bool) -> None:
    """What a graph holds of a side is what the operator's options are, and no more."""
    options = OPTIONS[name]
    side = side_of(side_text(name, options.to_args(), interleaved=interleaved))
    kind = {"linear": LinearSide, "projection": ProjectionSide, "convolution": ConvolutionSide}
    assert type(side) is kind[name] and side.options == options
    assert side.interleaved == (interleaved and name == "linear")
    assert side_of(side_text(name, options.to_args(), interleaved=interleaved)) is side


def test_what_couples() -> None:
    assert set(coupling_operators()) == {"linear", "projection", "convolution"}


class Many(nn.Module):
    """Uses of several kinds, one of which reads a flag of its module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2)
        self.ids, self.linear = nn.Embedding(7, 32), nn.Linear(32, 3)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        y: Tensor = self.linear(self.norm(self.conv(x)).flatten(1) + self.ids(ids))
        return y


def test_a_graph_is_plain_values_and_back() -> None:
    curvature = kfac_fx.transform(Many()).curvature
    plain = json.loads(json.dumps(curvature.to_plain()))
    found = CurvatureGraph.from_plain(plain)
    assert found == curvature
    (use,) = found.blocks["linear"].uses
    assert use.tap is not None
    assert LinearOptions.from_args(use.tap.options) == LinearOptions(
        (-1,), (-1,), (), (), True, False
    )


def test_an_earlier_name_of_a_record_is_read() -> None:
    """Views of a layout were called Step."""
    curvature = kfac_fx.transform(nn.Bilinear(2, 3, 4)).curvature
    text = json.dumps(curvature.to_plain())
    assert '"ViewStep"' in text
    assert CurvatureGraph.from_plain(json.loads(text.replace("ViewStep", "Step"))) == curvature
