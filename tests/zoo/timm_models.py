"""Narrow and shallow members of timm's families: a table from a family to a model and its sizes."""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import timm
import torch
from harness import Entry, Inputs
from timm.models import byobnet, cspnet, metaformer, mlp_mixer, mvitv2, regnet
from torch import nn


class Model(NamedTuple):
    """A row: timm's name of the model, or module.callable below timm.models; the side of the image;
    and what differs from timm's definition."""

    name: str
    side: int
    options: Mapping[str, Any]


def row(name: str, side: int = 32, **options: Any) -> Model:
    return Model(name, side, options)


VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
MIXER = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_blocks": 2}
FOUR: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
NARROW = {"channels": (8, 16, 24, 32), "layers": (1, 1, 1, 1)}

REGNET = regnet.RegNetCfg(depth=4, w0=16, wa=8.0, wm=1.4, group_size=8, stem_width=8)


def plain(kind: str) -> byobnet.ByoModelCfg:
    """Two stages of one kind of block."""
    blocks = tuple(byobnet.ByoBlockCfg(type=kind, d=1, c=c, s=2, gs=0, br=1.0) for c in (16, 24))
    return byobnet.ByoModelCfg(blocks=blocks, stem_type=kind, stem_chs=8)


def attending(layer: str, **options: Any) -> byobnet.ByoModelCfg:
    """A bottleneck stage and one with spatial self-attention."""
    blocks = (
        byobnet.ByoBlockCfg(type="bottle", d=1, c=32, s=2, gs=0, br=0.5),
        byobnet.ByoBlockCfg(type="self_attn", d=2, c=64, s=2, gs=0, br=0.5),
    )
    return byobnet.ByoModelCfg(
        blocks=blocks,
        stem_chs=16,
        stem_type="tiered",
        stem_pool="",
        fixed_input_size=True,
        self_attn_layer=layer,
        self_attn_kwargs=options,
    )


def crossing(stage: str, block: str) -> cspnet.CspModelCfg:
    """Two cross-stage partial stages."""
    stages = cspnet.CspStagesCfg(
        depth=(1, 2),
        out_chs=(16, 32),
        stage_type=stage,
        block_type=block,
        block_ratio=0.5 if stage == "csp" else 1.0,
    )
    return cspnet.CspModelCfg(stem=cspnet.CspStemCfg(out_chs=8), stages=stages)


TABLE = {
    "beit": row("beit_base_patch16_224", **VIT),
    "botnet": row("byobnet.ByobNet", 64, cfg=attending("bottleneck"), img_size=64),
    "halonet": row(
        "byobnet.ByobNet", 64, cfg=attending("halo", block_size=4, halo_size=1), img_size=64
    ),
    "lambdanet": row("byobnet.ByobNet", 64, cfg=attending("lambda", r=3), img_size=64),
    "byobnet": row("test_byobnet", 64),
    "repvgg": row("byobnet.ByobNet", cfg=plain("rep")),
    "mobileone": row("byobnet.ByobNet", cfg=plain("one")),
    "cait": row("cait_xs24_384", **VIT),
    "coat_lite": row(
        "coat_lite_tiny",
        img_size=32,
        embed_dims=(8, 16, 24, 32),
        serial_depths=(1, 1, 1, 1),
        num_heads=8,
    ),
    "convit": row("convit_tiny", **VIT),
    "convmixer": row("convmixer.ConvMixer", dim=32, depth=2, kernel_size=5, patch_size=4),
    "convnext": row("convnext_atto", **FOUR),
    "convnextv2": row("convnextv2_atto", **FOUR),
    "test_convnext": row("test_convnext"),
    "crossvit": row(
        "crossvit.CrossVit",
        48,
        img_size=48,
        img_scale=(1.0, 2 / 3),
        patch_size=(12, 16),
        embed_dim=(16, 32),
        depth=((1, 1, 0), (1, 1, 0)),
        num_heads=(2, 2),
        mlp_ratio=(2.0, 2.0, 1.0),
    ),
    "cspnet": row("cspnet.CspNet", cfg=crossing("csp", "dark")),
    "darknet": row("cspnet.CspNet", cfg=crossing("dark", "dark")),
    "davit": row(
        "davit_tiny",
        64,
        depths=(1, 1, 1, 1),
        embed_dims=(8, 16, 24, 32),
        num_heads=(2, 2, 2, 2),
        window_size=2,
    ),
    "deit": row("deit_tiny_distilled_patch16_224", **VIT),
    "deit3": row("deit3_small_patch16_224", **VIT),
    "densenet": row("densenet121", growth_rate=4, block_config=(2, 2, 2, 2)),
    "dla": row("dla34", channels=[8, 8, 8, 16, 16, 32]),
    "dpn": row(
        "dpn68",
        64,
        k_sec=(1, 1, 1, 1),
        inc_sec=(4, 4, 4, 4),
        k_r=16,
        groups=4,
        num_init_features=8,
    ),
    "edgenext": row(
        "edgenext_xx_small",
        64,
        depths=(1, 2, 2, 2),
        dims=(8, 16, 24, 32),
        heads=(2, 2, 2, 2),
    ),
    "efficientformer": row(
        "efficientformer_l1", 224, depths=(1, 1, 1, 2), embed_dims=(8, 16, 24, 32), num_vit=1
    ),
    "efficientformerv2": row(
        "efficientformerv2_s0",
        64,
        depths=(1, 1, 1, 2),
        embed_dims=(8, 16, 24, 32),
        num_vit=1,
        mlp_ratios=((4,), (4,), (4,), (4, 4)),
        img_size=64,
    ),
    "efficientnet": row("test_efficientnet"),
    "efficientnet_groupnorm": row("test_efficientnet_gn"),
    "mobilenetv2": row("mobilenetv2_035"),
    "efficientvit_mit": row(
        "efficientvit_b0",
        64,
        widths=(8, 8, 16, 24, 32),
        depths=(1, 1, 1, 1, 1),
        head_dim=8,
        head_widths=(32, 48),
    ),
    "efficientvit_msra": row(
        "efficientvit_m0",
        64,
        img_size=64,
        embed_dim=(16, 24, 32),
        key_dim=(4, 4, 4),
        num_heads=(2, 2, 2),
        depth=(1, 1, 1),
        window_size=(2, 2, 2),
    ),
    "eva": row("eva02_tiny_patch14_224", **VIT),
    "fasternet": row("fasternet_t0", embed_dim=8, depths=(1, 1, 1, 1), feature_dim=32),
    "fastvit": row("fastvit_t8", 64, layers=(1, 1, 1, 1), embed_dims=(8, 16, 32, 64)),
    "focalnet": row("focalnet.FocalNet", embed_dim=8, depths=(1, 1, 1, 1), layerscale_value=0.1),
    "gcvit": row(
        "gcvit.GlobalContextVit",
        64,
        img_size=64,
        embed_dim=8,
        depths=(1, 1, 1, 1),
        num_heads=(2, 2, 2, 2),
    ),
    "ghostnet": row("ghostnet._create_ghostnet", variant="ghostnet_050", width=0.2),
    "ghostnetv2": row(
        "ghostnet._create_ghostnet", 64, variant="ghostnetv2_100", width=0.2, version="v2"
    ),
    "hgnet": row(
        "hgnet.HighPerfGpuNet",
        cfg={
            "stem_type": "v2",
            "stem_chs": [8, 8],
            "stage1": [8, 8, 16, 1, False, False, 3, 3],
            "stage2": [16, 8, 24, 1, True, False, 3, 3],
            "stage3": [24, 12, 32, 2, True, True, 5, 3],
            "stage4": [32, 12, 48, 1, True, True, 5, 3],
        },
        head_hidden_size=48,
        use_lab=True,
    ),
    "hiera": row("hiera_tiny_224", 64, img_size=64, embed_dim=8, stages=(1, 1, 1, 1)),
    "inception_next": row("inception_next_atto", **FOUR),
    "levit": row("levit_128s", 64, img_size=64, embed_dim=(16, 24, 32), key_dim=8, depth=(1, 1, 1)),
    "mambaout": row("test_mambaout"),
    "coatnet": row("test_coatnet", 64, img_size=64),
    "maxvit": row("test_maxvit", 64, img_size=64),
    "poolformer": row(
        "metaformer.MetaFormer",
        **FOUR,
        norm_layers=metaformer.GroupNorm1,
        layer_scale_init_values=0.1,
        res_scale_init_values=None,
        mlp_bias=True,
        use_mlp_head=False,
    ),
    "caformer": row(
        "metaformer.MetaFormer",
        depths=(1, 1, 1, 1),
        dims=(8, 16, 32, 64),
        token_mixers=[metaformer.SepConv] * 2 + [metaformer.Attention] * 2,
        norm_layers=[metaformer.LayerNorm2dNoBias] * 2 + [metaformer.LayerNormNoBias] * 2,
    ),
    "convformer": row(
        "metaformer.MetaFormer",
        **FOUR,
        token_mixers=metaformer.SepConv,
        norm_layers=metaformer.LayerNorm2dNoBias,
    ),
    "mixer": row("mlp_mixer.MlpMixer", **MIXER),
    "gmlp": row(
        "mlp_mixer.MlpMixer",
        **MIXER,
        mlp_ratio=4,
        block_layer=mlp_mixer.SpatialGatingBlock,
        mlp_layer=timm.layers.GatedMlp,
    ),
    "resmlp": row(
        "mlp_mixer.MlpMixer",
        **MIXER,
        mlp_ratio=4,
        block_layer=mlp_mixer.ResBlock,
        norm_layer=mlp_mixer.Affine,
    ),
    "mobilenetv3": row("mobilenetv3_small_050"),
    "lcnet": row("lcnet_035"),
    "mobilevit": row("mobilevit_xxs", 32),
    "mobilevitv2": row("mobilevitv2_050", 32),
    "mvitv2": row(
        "mvitv2.MultiScaleVit",
        64,
        cfg=mvitv2.MultiScaleVitCfg(depths=(1, 1, 1, 1), embed_dim=8),
        img_size=64,
    ),
    "nest": row(
        "nest.Nest",
        img_size=32,
        patch_size=4,
        embed_dims=(8, 16, 32),
        num_heads=(2, 2, 2),
        depths=(1, 1, 1),
    ),
    "nfnet": row("test_nfnet"),
    "pit": row(
        "pit_ti_224",
        img_size=32,
        patch_size=8,
        stride=4,
        base_dims=(8, 8, 8),
        depth=(1, 1, 1),
    ),
    "pvt_v2": row(
        "pvt_v2_b0", depths=(1, 1, 1, 1), embed_dims=(8, 16, 24, 32), num_heads=(1, 2, 2, 4)
    ),
    "regnet": row("regnet.RegNet", cfg=REGNET),
    "regnety": row("regnet.RegNet", cfg=dataclasses.replace(REGNET, se_ratio=0.25)),
    "repvit": row("repvit_m1", embed_dim=(8, 16, 24, 32), depth=(1, 1, 1, 1)),
    "res2net": row(
        "res2net50_26w_4s", layers=(1, 1, 1, 1), base_width=32, channels=NARROW["channels"]
    ),
    "resnest": row("resnest14d", 64, stem_width=8, base_width=64, channels=NARROW["channels"]),
    "resnet": row("resnet18", **NARROW),
    "resnet_bottleneck": row("resnet26", **NARROW),
    "resnet_se": row("seresnet18", **NARROW),
    "resnet_eca": row("ecaresnet26t", **NARROW),
    "test_resnet": row("test_resnet"),
    "resnetv2": row("resnetv2_50", channels=(16, 24, 32, 48), layers=(1, 1, 1, 1), stem_chs=8),
    "resnetv2_bit": row(
        "resnetv2.ResNetV2",
        channels=(64, 64, 128, 128),
        layers=(1, 1, 1, 1),
        stem_chs=32,
        stem_type="fixed",
        bottle_ratio=0.5,
    ),
    "rexnet": row("rexnet_100", width_mult=0.2, depth_mult=0.3),
    "sequencer": row(
        "sequencer2d_s",
        56,
        img_size=56,
        layers=(1, 1, 1, 1),
        embed_dims=(16, 24, 24, 24),
        hidden_sizes=(4, 6, 6, 6),
    ),
    "skresnet": row("skresnet18", channels=(16, 16, 32, 32), layers=(1, 1, 1, 1)),
    "starnet": row("starnet_s050", base_dim=8, depths=[1, 1, 1, 1]),
    "swiftformer": row("swiftformer_xs", 64, layers=[1, 1, 1, 1], embed_dims=[8, 16, 24, 32]),
    "swin": row(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        embed_dim=8,
        depths=(2, 1, 1),
        num_heads=(2, 2, 2),
        window_size=4,
    ),
    "swinv2": row(
        "swinv2_tiny_window8_256",
        img_size=32,
        embed_dim=8,
        depths=(2, 1, 1),
        num_heads=(2, 2, 2),
        window_size=4,
    ),
    "swinv2_cr": row(
        "swinv2_cr_tiny_224",
        img_size=32,
        embed_dim=8,
        depths=(2, 1, 1),
        num_heads=(2, 2, 2),
        window_size=4,
    ),
    "tiny_vit": row(
        "tiny_vit_5m_224",
        64,
        depths=(1, 1, 1, 1),
        embed_dims=(8, 16, 24, 32),
        num_heads=(2, 2, 2, 2),
        window_sizes=(2, 2, 2, 2),
    ),
    "tnt": row(
        "tnt_s_patch16_224",
        img_size=32,
        embed_dim=32,
        inner_dim=8,
        depth=2,
        num_heads_inner=2,
        num_heads_outer=4,
    ),
    "twins_pcpvt": row(
        "twins_pcpvt_small",
        64,
        img_size=64,
        embed_dims=(8, 16, 24, 32),
        num_heads=(1, 2, 2, 4),
        depths=(1, 1, 1, 1),
    ),
    "twins_svt": row(
        "twins_svt_small",
        64,
        img_size=64,
        embed_dims=(8, 16, 24, 32),
        num_heads=(1, 2, 2, 4),
        depths=(1, 1, 1, 1),
        wss=(2, 2, 2, 2),
    ),
    "visformer": row(
        "visformer_tiny",
        64,
        img_size=64,
        init_channels=8,
        embed_dim=32,
        depth=(1, 1, 1),
        num_heads=2,
    ),
    "vit": row("vit_tiny_patch16_224", **VIT),
    "vit_test": row("test_vit2", img_size=32),
    "vit_siglip": row("vit_base_patch16_siglip_224", **VIT),
    "vit_registers": row("vit_small_patch14_reg4_dinov2", **VIT),
    "vit_parallel": row("vit_small_patch16_18x2_224", **VIT),
    "vit_relpos": row("vit_relpos_small_patch16_224", **VIT),
    "vit_sam": row("samvit_base_patch16_224", **VIT, window_size=2, global_attn_indexes=(1,)),
    "volo": row(
        "volo.VOLO",
        img_size=32,
        layers=(1, 1, 1, 1),
        embed_dims=(16, 16, 16, 16),
        num_heads=(2, 2, 2, 2),
        stem_hidden_dim=8,
        use_aux_head=False,
    ),
    "vovnet": row(
        "vovnet.VovNet",
        cfg={
            "stem_chs": [8, 8, 8],
            "stage_conv_chs": [8, 12, 16, 16],
            "stage_out_chs": [16, 24, 32, 48],
            "layer_per_block": 2,
            "block_per_stage": [1, 1, 1, 1],
            "residual": True,
            "depthwise": True,
            "attn": "ese",
        },
    ),
    "xcit": row("xcit_nano_12_p16_224", **VIT),
}


def _build(model: Model) -> nn.Module:
    module, _, name = model.name.rpartition(".")
    if module:
        make = getattr(importlib.import_module(f"timm.models.{module}"), name)
    else:
        make = partial(timm.create_model, name, pretrained=False)
    built: nn.Module = make(num_classes=10, **model.options).train()
    for module in built.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    return built


def _inputs(model: Model, batch: int) -> Inputs:
    generator = torch.Generator().manual_seed(8)
    return (torch.randn(batch, 3, model.side, model.side, generator=generator),), {}


ENTRIES = [
    Entry(f"timm/{name}", partial(_build, model), partial(_inputs, model))
    for name, model in TABLE.items()
]
