"""Kronecker factors of convolutions against patches cut by a loop over output positions."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from support import oracles
from support.oracles import Bernoulli, Categorical, Likelihood, Measure, Normal, close
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import kfac_fx
from kfac_fx.ops.convolution import ConvolutionOptions, ConvolutionStatistics, PaddingMode
from kfac_fx.ops.kronecker import FactorForm

pytestmark = pytest.mark.usefixtures("float64")


class Net(nn.Module):
    """A convolution between nonlinearities, two outputs a case."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv
        self.head = nn.LazyLinear(2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(x)).flatten(1))


def check(
    measure: Measure,
    conv: nn.Module,
    size: Sequence[int],
    likelihood: Likelihood,
    fisher: str = "exact",
) -> None:
    model, x = Net(conv), torch.randn(3, conv.in_channels, *size)
    y = likelihood.draw(model(x))
    factors = measure(kfac_fx.transform(model), x, y, likelihood, fisher).factors
    close(factors["conv"], oracles.kronecker(model, ["conv"], x, y, likelihood, fisher))


CONV2D = [
    # kernel, stride, padding, dilation, groups, height and width
    (1, 1, 0, 1, 1, (3, 4)),
    (1, 2, 0, 1, 1, (5, 4)),
    (1, 2, 1, 1, 2, (4, 5)),
    (2, 1, 0, 1, 1, (4, 5)),
    (2, 2, 1, 1, 1, (5, 4)),
    (3, 1, 0, 1, 1, (5, 5)),
    (3, 1, 1, 1, 1, (4, 5)),
    (3, 2, 1, 1, 1, (6, 5)),
    (3, 3, 1, 1, 1, (7, 6)),
    (3, 1, 2, 2, 1, (5, 6)),
    (3, 2, 2, 2, 1, (7, 6)),
    (3, 1, 0, 2, 1, (6, 5)),
    (3, 1, 1, 1, 2, (4, 5)),
    (3, 2, 1, 2, 2, (7, 6)),
    (3, 1, 1, 1, 4, (4, 3)),
    ((1, 3), 1, (0, 1), 1, 1, (3, 4)),
    ((3, 2), (2, 1), (1, 0), (1, 2), 1, (6, 5)),
    ((2, 3), (1, 2), (2, 1), (2, 1), 2, (4, 5)),
    (5, 1, 2, 1, 1, (3, 3)),
    (3, 1, 3, 1, 1, (2, 3)),
    (4, 4, 0, 1, 1, (8, 4)),
    (3, 1, "same", 1, 1, (4, 5)),
    (4, 1, "same", 1, 1, (5, 4)),
    ((2, 3), 1, "same", (3, 2), 2, (5, 6)),
    (3, 2, "valid", 1, 1, (6, 5)),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kernel, stride, padding, dilation, groups, size", CONV2D)
def test_conv2d(
    measure: Measure,
    kernel: int | tuple[int, int],
    stride: int | tuple[int, int],
    padding: int | tuple[int, int] | str,
    dilation: int | tuple[int, int],
    groups: int,
    size: tuple[int, int],
    bias: bool,
) -> None:
    """Every geometry, with and without a bias."""
    conv = nn.Conv2d(4, 4, kernel, stride, padding, dilation, groups, bias)
    check(measure, conv, size, Categorical())


@pytest.mark.parametrize("mode", ["reflect", "circular", "replicate"])
@pytest.mark.parametrize("padding", [1, (2, 1), "same"])
@pytest.mark.parametrize("groups", [1, 2])
def test_padding_modes(
    measure: Measure, mode: str, padding: int | tuple[int, int] | str, groups: int
) -> None:
    """Borders that are no zeros are inputs like others."""
    conv = nn.Conv2d(2, 4, 3, padding=padding, padding_mode=mode, groups=groups)
    check(measure, conv, (4, 5), Categorical())


@pytest.mark.parametrize("groups, channels", [(1, 2), (2, 4), (3, 3)])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("likelihood", oracles.LIKELIHOODS, ids=lambda one: one.name)
def test_estimators(
    measure: Measure, likelihood: Likelihood, fisher: str, groups: int, channels: int
) -> None:
    """Every likelihood, exact and empirical."""
    conv = nn.Conv2d(channels, 2 * channels, 3, padding=1, groups=groups)
    check(measure, conv, (4, 3), likelihood, fisher)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 2, "same"])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_conv1d(
    measure: Measure, stride: int, padding: int | str, dilation: int, groups: int
) -> None:
    """Every geometry in one dimension."""
    if padding == "same" and stride != 1:
        pytest.skip("torch refuses the combination")
    conv = nn.Conv1d(4, 4, 3, stride, padding, dilation, groups)
    check(measure, conv, (7,), Normal())


CONV3D = [
    (2, 1, 0, 1, 1),
    (2, 2, 1, 1, 1),
    (3, 1, 1, 1, 2),
    ((1, 2, 3), (1, 2, 1), (0, 1, 2), (1, 1, 2), 1),
    (2, 1, "same", 1, 2),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("arguments", CONV3D)
def test_conv3d(measure: Measure, arguments: tuple) -> None:
    """Every geometry in three dimensions."""
    check(measure, nn.Conv3d(2, 2, *arguments), (3, 4, 5), Bernoulli())


class Wide(nn.Module):
    """The outputs themselves have positions: C scores a pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_categorical_over_pixels(measure: Measure, fisher: str) -> None:
    model, x, likelihood = Wide(), torch.randn(3, 2, 3, 3), Categorical(dim=1)
    y = likelihood.draw(model(x))
    net, given = kfac_fx.transform(model), kfac_fx.likelihoods.Categorical(dim=1)
    factors = measure(net, x, y, likelihood, fisher, given=given).factors
    for name in ("first", "second"):
        close(factors[name], oracles.kronecker(model, [name], x, y, likelihood, fisher))


class FunctionalConv(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 4 // groups, 3, 3))
        self.shift = nn.Parameter(torch.randn(4))
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.kernel, self.shift, stride=2, padding=1, groups=self.groups)
        return torch.tanh(x).mean((2, 3))


@pytest.mark.parametrize("groups", [1, 2])
def test_functional(measure: Measure, groups: int) -> None:
    """F.conv2d with parameters of the model itself."""
    model, x = FunctionalConv(groups), torch.randn(3, 4, 5, 5)
    reference = nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1, groups=groups), nn.Tanh(), MeanOfPixels())
    reference[0].weight.data, reference[0].bias.data = model.kernel.data, model.shift.data
    net = kfac_fx.transform(model)
    factors = measure(net, x, None, Categorical()).factors
    close(factors["kernel"], oracles.kronecker(reference, ["0"], x, None, Categorical()))


class MeanOfPixels(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


@pytest.mark.parametrize("layout", ["channels_last", "strided"])
def test_memory_layouts(measure: Measure, layout: str) -> None:
    """The order of the axes in memory makes no difference."""
    model, x = Net(nn.Conv2d(2, 3, 3, padding=1)), torch.randn(3, 2, 4, 5)
    model(x)
    if layout == "channels_last":
        other = x.to(memory_format=torch.channels_last)
    else:
        other = x.transpose(2, 3).contiguous().transpose(2, 3)
    net = kfac_fx.transform(model)
    want = measure(net, x, None, Normal()).factors["conv"]
    close(measure(net, other, None, Normal()).factors["conv"], want)


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("groups", [1, 2])
def test_duplicated_batch_and_reduction(measure: Measure, fisher: str, groups: int) -> None:
    model, likelihood = Net(nn.Conv2d(2, 4, 3, padding=1, groups=groups)), Bernoulli()
    x = torch.randn(4, 2, 4, 4)
    y = likelihood.draw(model(x))
    net = kfac_fx.transform(model)
    want = measure(net, x, y, likelihood, fisher).factors["conv"]
    twice = measure(net, torch.cat([x, x]), torch.cat([y, y]), likelihood, fisher).factors
    mean = measure(net, x, y, likelihood, fisher, reduction="mean").factors
    close(twice["conv"], want)
    close(mean["conv"], want)


def options(
    stride: int, mode: PaddingMode, groups: int, bias: bool, reduce: bool
) -> ConvolutionOptions:
    """Of a 3x3 convolution with one position around it."""
    padding = (1,) * (2 if mode == "transposed" else 4)
    strides = (stride, stride)
    return ConvolutionOptions((3, 3), strides, (1, 1), padding, mode, groups, bias, reduce)


DIAGONAL = FactorForm(diagonal=True)
CUT = FactorForm(blocks=3)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("statistics", "side"),
    [
        (ConvolutionStatistics(options(1, "zeros", 1, True, False)), 9),
        (ConvolutionStatistics(options(1, "zeros", 2, True, False), G=DIAGONAL), 9),
        (ConvolutionStatistics(options(2, "reflect", 1, False, True)), 5),
        (ConvolutionStatistics(options(2, "reflect", 2, True, False), A=DIAGONAL, one=0.0), 5),
        (ConvolutionStatistics(options(2, "transposed", 1, True, False)), 17),
        (ConvolutionStatistics(options(1, "zeros", 1, True, False), A=CUT, G=CUT), 9),
    ],
)
def test_traced_a_is_one_operator(
    statistics: ConvolutionStatistics, side: int, channels_last: bool
) -> None:
    """With the result of the operators that run one by one elsewhere, and not of the derivative."""
    x, g = torch.randn(40, 4, 9, 9), torch.randn(40, 6, side, side)
    if channels_last:
        x, g = (t.contiguous(memory_format=torch.channels_last) for t in (x, g))

    def formed(g: Tensor, x: Tensor) -> list[Tensor]:
        return [v for v in statistics(g, [x], (True, True), x.dtype) if v is not None]

    module = make_fx(formed, tracing_mode="fake")(g, x)
    operator = torch.ops.kfac_fx.convolution_inputs.default
    (node,) = module.graph.find_nodes(op="call_function", target=operator)
    expected = formed(g, x)
    torch.testing.assert_close(module(g, x), expected, rtol=1e-12, atol=1e-12, check_stride=True)
    torch.library.opcheck(operator, (x, *node.args[1:]))
