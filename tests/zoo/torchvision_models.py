"""Narrow and shallow members of torchvision's families."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from harness import Entry, Inputs
from torch import nn
from torchvision import models
from torchvision.models import convnext, efficientnet, regnet, resnet


class Model(NamedTuple):
    """A row: what makes the model, the side of the image and its arguments."""

    make: Callable[..., nn.Module]
    side: int
    options: Mapping[str, Any]


def row(make: Callable[..., nn.Module], side: int = 32, **options: Any) -> Model:
    return Model(make, side, options)


SWIN = {
    "patch_size": [4, 4],
    "embed_dim": 8,
    "depths": [2, 1],
    "num_heads": [2, 2],
    "window_size": [4, 4],
}
CONVOLUTIONS = [
    efficientnet.MBConvConfig(1, 3, 1, 8, 8, 1),
    efficientnet.MBConvConfig(4, 3, 2, 8, 16, 1),
    efficientnet.FusedMBConvConfig(2, 3, 2, 16, 24, 1),
]

TABLE = {
    "resnet": row(resnet.ResNet, block=resnet.Bottleneck, layers=[1, 1, 1, 1], width_per_group=4),
    "mobilenet_v2": row(models.mobilenet_v2, width_mult=0.125),
    "mobilenet_v3": row(models.mobilenet_v3_small, width_mult=0.25),
    "shufflenet_v2": row(
        models.ShuffleNetV2, stages_repeats=[1, 1, 1], stages_out_channels=[8, 16, 24, 32, 48]
    ),
    "squeezenet": row(models.squeezenet1_1, 64),
    "densenet": row(models.DenseNet, growth_rate=4, block_config=(2, 2, 2, 2), num_init_features=8),
    "efficientnet": row(
        models.EfficientNet,
        inverted_residual_setting=CONVOLUTIONS,
        dropout=0.0,
        stochastic_depth_prob=0.0,
        last_channel=48,
    ),
    "mnasnet": row(models.MNASNet, alpha=0.2, dropout=0.0),
    "regnet": row(
        models.RegNet,
        block_params=regnet.BlockParams([1, 1], [16, 24], [8, 8], [1.0, 1.0], [2, 2], 0.25),
        stem_width=8,
    ),
    "vit": row(
        models.VisionTransformer,
        image_size=32,
        patch_size=8,
        num_layers=2,
        num_heads=4,
        hidden_dim=32,
        mlp_dim=48,
    ),
    "swin": row(models.SwinTransformer, **SWIN, stochastic_depth_prob=0.0),
    "swin_v2": row(
        models.SwinTransformer,
        **SWIN,
        stochastic_depth_prob=0.0,
        block=models.swin_transformer.SwinTransformerBlockV2,
        downsample_layer=models.swin_transformer.PatchMergingV2,
    ),
    "convnext": row(
        models.ConvNeXt,
        block_setting=[
            convnext.CNBlockConfig(8, 16, 1),
            convnext.CNBlockConfig(16, 32, 1),
            convnext.CNBlockConfig(32, None, 1),
        ],
    ),
    "maxvit": row(
        models.MaxVit,
        64,
        input_size=(64, 64),
        stem_channels=8,
        partition_size=4,
        block_channels=[8, 16],
        block_layers=[1, 1],
        head_dim=4,
        stochastic_depth_prob=0.0,
    ),
}


def _build(model: Model) -> nn.Module:
    built = model.make(num_classes=10, **model.options).train()
    for module in built.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return built


def _inputs(model: Model, batch: int) -> Inputs:
    generator = torch.Generator().manual_seed(8)
    return (torch.randn(batch, 3, model.side, model.side, generator=generator),), {}


ENTRIES = [
    Entry(f"torchvision/{name}", partial(_build, model), partial(_inputs, model))
    for name, model in TABLE.items()
]
