"""Tiny configurations of transformers architectures: tables from a name to what is not usual.

A configuration starts from SMALL (every key that its class has, and the same for the nested ones)
and from zero for every dropout; a table's row names the class of the model, the kind of inputs and
the keys that differ. Weights are random, nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from harness import Entry, Inputs
from torch import Tensor, nn

transformers.logging.set_verbosity_error()

Options = Mapping[str, Any]

SMALL: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "d_model": 32,
    "dim": 32,
    "n_embd": 32,
    "embed_dim": 32,
    "embedding_size": 32,
    "projection_dim": 24,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "hidden_dim": 48,
    "ffn_dim": 48,
    "d_ff": 48,
    "d_kv": 8,
    "d_inner": 48,
    "n_inner": 48,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "head_dim": 8,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 64,
    "max_sequence_length": 64,
    "n_positions": 64,
    "n_ctx": 64,
    "max_source_positions": 64,
    "max_target_positions": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "image_size": 32,
    "patch_size": 8,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "num_labels": 5,
}


@dataclass(frozen=True)
class Model:
    """A row: the model's class, its inputs' kind and the configuration's own keys."""

    cls: str
    inputs: str = "tokens"
    main: str | int | None = None
    options: Options = field(default_factory=dict)
    call: Options = field(default_factory=dict)  # options of forward, and of the inputs ("length")
    likelihood: str | None = None


def row(
    cls: str,
    inputs: str = "tokens",
    main: str | int | None = None,
    call: Options | None = None,
    likelihood: str | None = None,
    **options: Any,
) -> Model:
    return Model(cls, inputs, main, options, call or {}, likelihood)


# ------------------------------------------------------------------------------------ the tables
DECODERS = {
    "gpt2": row("GPT2LMHeadModel"),
    "gpt2_masked": row("GPT2LMHeadModel", "masked"),
    "gpt_neo": row("GPTNeoForCausalLM", attention_types=[[["global", "local"], 1]], window_size=4),
    "gpt_neox": row("GPTNeoXForCausalLM"),
    "gptj": row("GPTJForCausalLM", rotary_dim=4),
    "gpt_bigcode": row("GPTBigCodeForCausalLM"),
    "codegen": row("CodeGenForCausalLM", rotary_dim=4),
    "openai_gpt": row("OpenAIGPTLMHeadModel"),
    "ctrl": row("CTRLLMHeadModel", dff=48),
    "opt": row("OPTForCausalLM", word_embed_proj_dim=16),
    "bloom": row("BloomForCausalLM"),
    "mpt": row("MptForCausalLM", max_seq_len=64, expansion_ratio=2),
    "falcon": row("FalconForCausalLM"),
    "llama": row("LlamaForCausalLM"),
    "llama_masked": row("LlamaForCausalLM", "masked"),
    "mistral": row("MistralForCausalLM", sliding_window=4),
    "mixtral": row("MixtralForCausalLM"),
    "qwen2": row("Qwen2ForCausalLM"),
    "qwen2_moe": row("Qwen2MoeForCausalLM"),
    "qwen3": row("Qwen3ForCausalLM"),
    "qwen3_moe": row("Qwen3MoeForCausalLM", num_local_experts=4),
    "qwen3_next": row(
        "Qwen3NextForCausalLM",
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        layer_types=["linear_attention", "full_attention"],
    ),
    "gemma": row("GemmaForCausalLM"),
    "gemma2": row("Gemma2ForCausalLM", sliding_window=4),
    "gemma3": row("Gemma3ForCausalLM", sliding_window=4),
    "phi": row("PhiForCausalLM"),
    "phi3": row("Phi3ForCausalLM"),
    "phimoe": row("PhimoeForCausalLM"),
    "stablelm": row("StableLmForCausalLM"),
    "starcoder2": row("Starcoder2ForCausalLM"),
    "olmo": row("OlmoForCausalLM"),
    "olmo2": row("Olmo2ForCausalLM"),
    "olmoe": row("OlmoeForCausalLM"),
    "cohere": row("CohereForCausalLM"),
    "granite": row("GraniteForCausalLM"),
    "granitemoe": row("GraniteMoeForCausalLM"),
    "deepseek_v2": row(
        "DeepseekV2ForCausalLM",
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=1,
        num_key_value_heads=4,
        n_group=2,
        topk_group=1,
    ),
    "deepseek_v3": row(
        "DeepseekV3ForCausalLM",
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=1,
        num_key_value_heads=4,
        n_group=2,
        topk_group=1,
    ),
    "gpt_oss": row("GptOssForCausalLM"),
    "dbrx": row(
        "DbrxForCausalLM",
        max_seq_len=64,
        ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
        attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
    ),
    "glm": row("GlmForCausalLM"),
    "nemotron": row("NemotronForCausalLM"),
    "persimmon": row("PersimmonForCausalLM"),
    "smollm3": row("SmolLM3ForCausalLM"),
    "biogpt": row("BioGptForCausalLM"),
    "xglm": row("XGLMForCausalLM", attention_heads=4),
    "mamba": row("MambaForCausalLM", state_size=8),
    "mamba2": row("Mamba2ForCausalLM", state_size=8, head_dim=8, num_heads=8, n_groups=2),
    "falcon_mamba": row("FalconMambaForCausalLM", state_size=8),
    "rwkv": row("RwkvForCausalLM", attention_hidden_size=32, context_length=64),
    "recurrent_gemma": row(
        "RecurrentGemmaForCausalLM", lru_width=32, attention_window_size=8, num_hidden_layers=3
    ),
    "jamba": row(
        "JambaForCausalLM",
        num_hidden_layers=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=8,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    "bamba": row(
        "BambaForCausalLM",
        attn_layer_indices=[1],
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_n_groups=1,
        mamba_d_state=8,
        mamba_expand=2,
    ),
    "diffllama": row("DiffLlamaForCausalLM"),
    "lfm2": row(
        "Lfm2ForCausalLM", layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False
    ),
}

ENCODERS = {
    "bert": row("BertForMaskedLM"),
    "bert_masked": row("BertForMaskedLM", "masked"),
    "bert_classifier": row("BertForSequenceClassification"),
    "roberta": row("RobertaForMaskedLM"),
    "roberta_prelayernorm": row("RobertaPreLayerNormForMaskedLM"),
    "xlm_roberta_xl": row("XLMRobertaXLForMaskedLM"),
    "distilbert": row("DistilBertForMaskedLM"),
    "albert": row("AlbertForMaskedLM", embedding_size=16),
    "electra": row("ElectraForMaskedLM", embedding_size=16),
    "deberta": row(
        "DebertaForMaskedLM",
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        max_relative_positions=16,
    ),
    "deberta_v2": row(
        "DebertaV2ForMaskedLM",
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
    ),
    "mobilebert": row(
        "MobileBertForMaskedLM",
        intra_bottleneck_size=16,
        true_hidden_size=16,
        embedding_size=16,
        num_feedforward_networks=2,
    ),
    "squeezebert": row("SqueezeBertForMaskedLM"),
    "funnel": row("FunnelForMaskedLM", block_sizes=[1, 1], num_decoder_layers=1, d_head=8),
    "xlnet": row("XLNetLMHeadModel"),
    "longformer": row("LongformerForMaskedLM", attention_window=4, max_position_embeddings=66),
    "big_bird": row("BigBirdForMaskedLM", block_size=4),
    "convbert": row("ConvBertForMaskedLM", embedding_size=16, conv_kernel_size=5),
    "fnet": row("FNetForMaskedLM"),
    "nystromformer": row("NystromformerForMaskedLM", num_landmarks=4, segment_means_seq_len=12),
    "roformer": row("RoFormerForMaskedLM", embedding_size=16),
    "rembert": row("RemBertForMaskedLM", input_embedding_size=16, output_embedding_size=24),
    "mpnet": row("MPNetForMaskedLM"),
    "ibert": row("IBertForMaskedLM"),
    "esm": row("EsmForMaskedLM", mask_token_id=3, position_embedding_type="rotary"),
    "layoutlm": row("LayoutLMForMaskedLM", max_2d_position_embeddings=64),
    "modernbert": row("ModernBertForMaskedLM", local_attention=8),
    "megatron_bert": row("MegatronBertForMaskedLM"),
    "canine": row(
        "CanineForTokenClassification",
        num_hash_functions=2,
        num_hash_buckets=16,
        local_transformer_stride=4,
        downsampling_rate=4,
        upsampling_kernel_size=4,
        call={"length": 16},
    ),
    "xlm": row("XLMWithLMHeadModel", emb_dim=32),
    "splinter": row("SplinterModel"),
    "yoso": row("YosoForMaskedLM", use_expectation=True),
    "mra": row("MraModel"),
    "reformer": row(
        "ReformerForMaskedLM",
        attn_layers=["local", "local"],
        axial_pos_shape=[4, 4],
        axial_pos_embds_dim=[16, 16],
        feed_forward_size=48,
        local_attn_chunk_length=4,
        attention_head_size=8,
        is_decoder=False,
        call={"length": 16},
    ),
    "luke": row("LukeForMaskedLM", entity_vocab_size=20, entity_emb_size=16),
    "nomic_bert": row("NomicBertForMaskedLM"),
    "tapas": row("TapasForMaskedLM"),
}

SEQUENCE_TO_SEQUENCE = {
    "t5": row("T5ForConditionalGeneration", "pairs"),
    "t5_gated": row("T5ForConditionalGeneration", "pairs", feed_forward_proj="gated-gelu"),
    "mt5": row("MT5ForConditionalGeneration", "pairs"),
    "umt5": row("UMT5ForConditionalGeneration", "pairs"),
    "longt5": row("LongT5ForConditionalGeneration", "pairs", local_radius=3),
    "switch_transformers": row("SwitchTransformersForConditionalGeneration", "pairs"),
    "bart": row("BartForConditionalGeneration", "pairs"),
    "mbart": row("MBartForConditionalGeneration", "pairs"),
    "pegasus": row("PegasusForConditionalGeneration", "pairs"),
    "marian": row("MarianMTModel", "pairs", decoder_vocab_size=99),
    "blenderbot": row("BlenderbotForConditionalGeneration", "pairs"),
    "m2m_100": row("M2M100ForConditionalGeneration", "pairs"),
    "plbart": row("PLBartForConditionalGeneration", "pairs"),
    "led": row(
        "LEDForConditionalGeneration",
        "pairs",
        attention_window=4,
        max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=64,
    ),
    "bigbird_pegasus": row("BigBirdPegasusForConditionalGeneration", "pairs", block_size=4),
    "prophetnet": row(
        "ProphetNetForConditionalGeneration",
        "pairs",
        num_encoder_layers=1,
        num_encoder_attention_heads=4,
        num_decoder_attention_heads=4,
        disable_ngram_loss=False,
    ),
    "fsmt": row(
        "FSMTForConditionalGeneration",
        "pairs",
        src_vocab_size=99,
        tgt_vocab_size=99,
        langs=["en", "de"],
        main=0,
    ),
    "nllb_moe": row("NllbMoeForConditionalGeneration", "pairs", encoder_sparse_step=2),
}

VISION = {
    "vit": row("ViTForImageClassification", "image"),
    "deit": row("DeiTForImageClassification", "image"),
    "beit": row(
        "BeitForImageClassification",
        "image",
        use_relative_position_bias=True,
        use_absolute_position_embeddings=True,
    ),
    "swin": row(
        "SwinForImageClassification",
        "image",
        patch_size=4,
        embed_dim=16,
        depths=[1, 1],
        num_heads=[2, 4],
        window_size=4,
    ),
    "swinv2": row(
        "Swinv2ForImageClassification",
        "image",
        patch_size=4,
        embed_dim=16,
        depths=[1, 1],
        num_heads=[2, 4],
        window_size=4,
    ),
    "convnext": row(
        "ConvNextForImageClassification",
        "image",
        hidden_sizes=[16, 24, 32, 48],
        depths=[1] * 4,
        call={"side": 64},
    ),
    "convnextv2": row(
        "ConvNextV2ForImageClassification",
        "image",
        hidden_sizes=[16, 24, 32, 48],
        depths=[1] * 4,
        call={"side": 64},
    ),
    "resnet": row(
        "ResNetForImageClassification",
        "image",
        embedding_size=16,
        hidden_sizes=[16, 24, 32, 48],
        depths=[1] * 4,
    ),
    "regnet": row(
        "RegNetForImageClassification",
        "image",
        embedding_size=16,
        hidden_sizes=[16, 24, 32, 48],
        depths=[1] * 4,
        groups_width=8,
    ),
    "bit": row(
        "BitForImageClassification",
        "image",
        embedding_size=16,
        hidden_sizes=[32, 32, 64, 64],
        depths=[1] * 4,
        num_groups=4,
    ),
    "mobilenet_v1": row("MobileNetV1ForImageClassification", "image", depth_multiplier=0.125),
    "mobilenet_v2": row("MobileNetV2ForImageClassification", "image", depth_multiplier=0.2),
    "mobilevit": row(
        "MobileViTForImageClassification",
        "image",
        patch_size=2,
        hidden_sizes=[16, 24, 32],
        neck_hidden_sizes=[8, 8, 16, 16, 16, 24, 32],
        num_attention_heads=2,
    ),
    "mobilevitv2": row(
        "MobileViTV2ForImageClassification",
        "image",
        patch_size=2,
        width_multiplier=0.25,
        call={"side": 64},
    ),
    "segformer": row(
        "SegformerForSemanticSegmentation",
        "image",
        hidden_sizes=[8, 16, 24, 32],
        depths=[1] * 4,
        num_attention_heads=[1, 2, 2, 4],
        patch_sizes=[7, 3, 3, 3],
        decoder_hidden_size=16,
    ),
    "poolformer": row(
        "PoolFormerForImageClassification",
        "image",
        patch_size=16,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1] * 4,
    ),
    "pvt": row(
        "PvtForImageClassification",
        "image",
        hidden_sizes=[8, 16, 24, 32],
        depths=[1] * 4,
        num_attention_heads=[1, 2, 2, 4],
    ),
    "pvt_v2": row(
        "PvtV2ForImageClassification",
        "image",
        hidden_sizes=[8, 16, 24, 32],
        depths=[1] * 4,
        num_attention_heads=[1, 2, 2, 4],
        patch_size=4,
    ),
    "efficientnet": row(
        "EfficientNetForImageClassification",
        "image",
        width_coefficient=0.125,
        depth_coefficient=0.2,
        hidden_dim=160,
        initializer_range=0.3,  # with less, signals sink below the eps of its BatchNorms
        call={"side": 64},
    ),
    "levit": row(
        "LevitForImageClassification",
        "image",
        image_size=64,
        patch_size=16,
        hidden_sizes=[16, 24, 32],
        num_attention_heads=[2, 2, 4],
        depths=[1, 1, 1],
        key_dim=[8, 8, 8],
    ),
    "cvt": row(
        "CvtForImageClassification",
        "image",
        embed_dim=[8, 16, 32],
        depth=[1, 2, 3],
        num_heads=[1, 2, 4],
        patch_sizes=[7, 3, 3],
    ),
    "dinov2": row("Dinov2ForImageClassification", "image"),
    "dinov3_vit": row("DINOv3ViTModel", "image", main="pooler_output"),
    "focalnet": row(
        "FocalNetForImageClassification",
        "image",
        patch_size=4,
        embed_dim=16,
        hidden_sizes=[16, 32],
        depths=[1, 1],
        focal_levels=[2, 2],
        focal_windows=[3, 3],
        use_layerscale=True,
    ),
    "hiera": row(
        "HieraForImageClassification",
        "image",
        embed_dim=16,
        image_size=[64, 64],
        patch_size=[7, 7],
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 4, 8],
        call={"side": 64},
    ),
    "swiftformer": row(
        "SwiftFormerForImageClassification",
        "image",
        depths=[1, 1, 1, 1],
        embed_dims=[8, 16, 24, 32],
        call={"side": 64},
    ),
    "ijepa": row("IJepaForImageClassification", "image"),
    "vit_mae": row(
        "ViTMAEForPreTraining",
        "image",
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=24,
    ),
    "vit_msn": row("ViTMSNForImageClassification", "image"),
    "yolos": row("YolosForObjectDetection", "image", num_detection_tokens=4, image_size=[32, 32]),
    "detr": row(
        "DetrForObjectDetection",
        "image",
        num_queries=4,
        backbone_config={
            "model_type": "resnet",
            "embedding_size": 8,
            "hidden_sizes": [8, 16, 24, 32],
            "depths": [1] * 4,
            "layer_type": "basic",
            "out_features": ["stage4"],
        },
        call={"side": 64},
    ),
    "dpt": row(
        "DPTForDepthEstimation",
        "image",
        num_hidden_layers=4,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=16,
        is_hybrid=False,
    ),
    "glpn": row(
        "GLPNForDepthEstimation",
        "image",
        hidden_sizes=[8, 16, 24, 32],
        depths=[1] * 4,
        num_attention_heads=[1, 2, 2, 4],
        patch_sizes=[7, 3, 3, 3],
        decoder_hidden_size=16,
    ),
    "perceiver": row(
        "PerceiverForMaskedLM",
        "perceiver",
        num_latents=8,
        d_latents=16,
        num_blocks=1,
        num_self_attends_per_block=2,
        num_self_attention_heads=2,
        num_cross_attention_heads=2,
        qk_channels=16,
        v_channels=16,
    ),
    "textnet": row(
        "TextNetForImageClassification",
        "image",
        stem_out_channels=8,
        hidden_sizes=[8, 8, 16, 16, 16],
        call={"side": 64},
    ),
    "sam_vision": row(
        "SamVisionModel",
        "image",
        output_channels=16,
        mlp_dim=48,
        num_pos_feats=8,
        window_size=2,
        global_attn_indexes=[1],
        initializer_range=0.02,  # its own 1e-10 leaves derivatives whose squares are zero
    ),
    "timesformer": row("TimesformerForVideoClassification", "video", num_frames=2),
    "videomae": row("VideoMAEForVideoClassification", "video", num_frames=2, tubelet_size=2),
}

SPEECH_LAYERS = {"conv_dim": [16, 16], "conv_kernel": [5, 3], "conv_stride": [4, 2]}
POSITION_CONVOLUTION = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
WAVE = SPEECH_LAYERS | POSITION_CONVOLUTION | {"mask_time_prob": 0.0, "mask_feature_prob": 0.0}

AUDIO = {
    "wav2vec2": row("Wav2Vec2ForCTC", "wave", **WAVE),
    "wav2vec2_layer_norm": row(
        "Wav2Vec2ForCTC", "wave", feat_extract_norm="layer", do_stable_layer_norm=True, **WAVE
    ),
    "wav2vec2_conformer": row("Wav2Vec2ConformerForCTC", "wave", **WAVE),
    "hubert": row("HubertForCTC", "wave", **WAVE),
    "wavlm": row("WavLMForCTC", "wave", num_buckets=8, max_bucket_distance=16, **WAVE),
    "unispeech": row("UniSpeechForCTC", "wave", **WAVE),
    "data2vec_audio": row("Data2VecAudioForCTC", "wave", conv_pos_kernel_size=3, **WAVE),
    "sew": row("SEWForCTC", "wave", squeeze_factor=2, **WAVE),
    "whisper": row("WhisperForConditionalGeneration", "mel", num_mel_bins=8, call={"length": 128}),
    "speech_to_text": row(
        "Speech2TextForConditionalGeneration",
        "mel_last",
        input_feat_per_channel=8,
        conv_channels=16,
        num_mel_bins=8,
        call={"length": 32},
    ),
    "moonshine": row(
        "MoonshineForConditionalGeneration",
        "wave_to_text",
        encoder_num_hidden_layers=2,
        decoder_num_hidden_layers=2,
        encoder_num_attention_heads=4,
        decoder_num_attention_heads=4,
        call={"length": 1600},
    ),
    "audio_spectrogram_transformer": row(
        "ASTForAudioClassification",
        "spectrogram",
        num_mel_bins=16,
        max_length=32,
        time_stride=8,
        frequency_stride=8,
        call={"length": 32},
    ),
    "encodec": row(
        "EncodecModel",
        "codec",
        main="audio_values",
        num_filters=4,
        codebook_size=16,
        codebook_dim=16,
        hidden_size=16,
        upsampling_ratios=[4, 2],
        num_lstm_layers=1,
        call={"length": 320},
    ),
    "speecht5": row(
        "SpeechT5ForTextToSpeech",
        "speecht5",
        speaker_embedding_dim=8,
        speech_decoder_prenet_units=16,
        speech_decoder_postnet_units=16,
        num_mel_bins=8,
        encoder_max_relative_position=8,
        max_speech_positions=64,
        max_text_positions=64,
    ),
    "vits": row(
        "VitsModel",
        "tokens",
        main="waveform",
        flow_size=8,
        spectrogram_bins=9,
        prior_encoder_num_flows=1,
        upsample_initial_channel=16,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1]],
        duration_predictor_num_flows=1,
    ),
}

MULTIMODAL = {
    "clip": row("CLIPModel", "clip"),
    "siglip": row("SiglipModel", "clip"),
    "chinese_clip": row("ChineseCLIPModel", "clip"),
    "clipseg": row("CLIPSegModel", "clip"),
    "altclip": row("AltCLIPModel", "clip", text_config={"project_dim": 24}),
    "groupvit": row(
        "GroupViTModel",
        "clip",
        vision_config={
            "depths": [1, 1, 1],
            "num_group_tokens": [4, 2, 0],
            "num_output_groups": [4, 2, 2],
        },
        projection_intermediate_dim=32,
    ),
    "owlvit": row("OwlViTModel", "clip", text_config={"max_position_embeddings": 12}),
    "align": row(
        "AlignModel",
        "clip",
        projection_dim=40,
        vision_config={"width_coefficient": 0.125, "depth_coefficient": 0.2},
    ),
    "blip": row("BlipForConditionalGeneration", "clip", text_config={"encoder_hidden_size": 32}),
    "flava": row("FlavaModel", "clip"),
    "vilt": row("ViltForQuestionAnswering", "clip"),
    "lxmert": row(
        "LxmertModel",
        "regions",
        main="language_output",
        l_layers=1,
        x_layers=1,
        r_layers=1,
        visual_feat_dim=16,
    ),
    "visual_bert": row("VisualBertModel", "visual", visual_embedding_dim=16),
    "layoutlmv3": row(
        "LayoutLMv3ForTokenClassification",
        "layout",
        input_size=32,
        max_2d_position_embeddings=64,
        coordinate_size=5,
        shape_size=6,
    ),
    "git": row("GitForCausalLM", "clip", num_image_with_embedding=None),
    "llava": row(
        "LlavaForConditionalGeneration",
        "image_tokens",
        vision_config={"model_type": "clip_vision_model"},
        text_config={"model_type": "llama"},
        image_token_index=98,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    ),
    "paligemma": row(
        "PaliGemmaForConditionalGeneration",
        "image_tokens",
        vision_config={"model_type": "siglip_vision_model"},
        text_config={"model_type": "gemma"},
        projection_dim=32,
        image_token_index=98,
    ),
    "vision_encoder_decoder": row("TrOCRForCausalLM", "tokens", cross_attention_hidden_size=32),
}

SERIES = {
    "time_series_transformer": row(
        "TimeSeriesTransformerModel",
        "series",
        main="last_hidden_state",
        prediction_length=4,
        context_length=8,
        lags_sequence=[1, 2],
        num_time_features=1,
    ),
    "informer": row(
        "InformerModel",
        "series",
        main="last_hidden_state",
        prediction_length=4,
        context_length=8,
        lags_sequence=[1, 2],
        num_time_features=1,
    ),
    "autoformer": row(
        "AutoformerModel",
        "series",
        main="last_hidden_state",
        prediction_length=4,
        context_length=8,
        lags_sequence=[1, 2],
        num_time_features=1,
        label_length=4,
        moving_average=3,
    ),
    "patchtst": row(
        "PatchTSTForPrediction",
        "past",
        num_input_channels=3,
        context_length=16,
        patch_length=4,
        patch_stride=4,
        prediction_length=4,
        main=0,
    ),
    "patchtsmixer": row(
        "PatchTSMixerForPrediction",
        "past",
        num_input_channels=3,
        context_length=16,
        patch_length=4,
        patch_stride=4,
        prediction_length=4,
        loss="mse",
    ),
    "decision_transformer": row(
        "DecisionTransformerModel",
        "decisions",
        main="action_preds",
        state_dim=5,
        act_dim=3,
        max_ep_len=64,
    ),
}

TABLES = (DECODERS, ENCODERS, SEQUENCE_TO_SEQUENCE, VISION, AUDIO, MULTIMODAL, SERIES)


# ------------------------------------------------------------------------------------ the inputs
def _tokens(shape: tuple[int, ...], top: int = 97) -> Tensor:
    """Token ids that are neither padding nor any other special token."""
    return torch.randint(5, top, shape, generator=torch.Generator().manual_seed(7))


def _reals(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(8))


def _mask(batch: int, length: int) -> Tensor:
    """The last case is padded at its end."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, length - 3 :] = 0
    return mask


def _boxes(batch: int, length: int) -> Tensor:
    corner = torch.randint(0, 20, (batch, length, 2), generator=torch.Generator().manual_seed(9))
    return torch.cat([corner, corner + 10], -1)


@dataclass(frozen=True)
class Shape:
    """Sizes of the inputs."""

    batch: int
    length: int = 12
    side: int = 32
    config: Any = None


INPUTS: dict[str, Callable[[Shape], dict[str, Any]]] = {
    "tokens": lambda s: {"input_ids": _tokens((s.batch, s.length))},
    "masked": lambda s: {
        "input_ids": _tokens((s.batch, s.length)),
        "attention_mask": _mask(s.batch, s.length),
    },
    "pairs": lambda s: {
        "input_ids": _tokens((s.batch, s.length)),
        "decoder_input_ids": _tokens((s.batch, 7)),
    },
    "image": lambda s: {"pixel_values": _reals(s.batch, 3, s.side, s.side)},
    "video": lambda s: {"pixel_values": _reals(s.batch, 2, 3, s.side, s.side)},
    "clip": lambda s: {
        "input_ids": _tokens((s.batch, s.length)),
        "pixel_values": _reals(s.batch, 3, s.side, s.side),
    },
    "image_tokens": lambda s: {
        "input_ids": torch.cat([torch.full((s.batch, 16), 98), _tokens((s.batch, s.length))], 1),
        "pixel_values": _reals(s.batch, 3, s.side, s.side),
    },
    "perceiver": lambda s: {"inputs": _tokens((s.batch, s.length))},
    "wave": lambda s: {"input_values": _reals(s.batch, 240)},
    "wave_to_text": lambda s: {
        "input_values": _reals(s.batch, s.length),
        "decoder_input_ids": _tokens((s.batch, 7)),
    },
    "mel": lambda s: {
        "input_features": _reals(s.batch, 8, s.length),
        "decoder_input_ids": _tokens((s.batch, 7)),
    },
    "mel_last": lambda s: {
        "input_features": _reals(s.batch, s.length, 8),
        "decoder_input_ids": _tokens((s.batch, 7)),
    },
    "spectrogram": lambda s: {"input_values": _reals(s.batch, s.length, 16)},
    "codec": lambda s: {"input_values": _reals(s.batch, 1, s.length)},
    "speecht5": lambda s: {
        "input_ids": _tokens((s.batch, s.length)),
        "decoder_input_values": _reals(s.batch, 8, 8),
        "speaker_embeddings": _reals(s.batch, 8),
    },
    "regions": lambda s: {
        "input_ids": _tokens((s.batch, s.length)),
        "visual_feats": _reals(s.batch, 5, 16),
        "visual_pos": _reals(s.batch, 5, 4),
    },
    "visual": lambda s: {
        "input_ids": _tokens((s.batch, s.length)),
        "visual_embeds": _reals(s.batch, 5, 16),
    },
    "layout": lambda s: {
        "input_ids": _tokens((s.batch, s.length)),
        "bbox": _boxes(s.batch, s.length),
        "pixel_values": _reals(s.batch, 3, s.side, s.side),
    },
    "series": lambda s: {
        "past_values": _reals(s.batch, 10),
        "past_time_features": _reals(s.batch, 10, 1),
        "past_observed_mask": torch.ones(s.batch, 10),
        "future_values": _reals(s.batch, 4),
        "future_time_features": _reals(s.batch, 4, 1),
    },
    "past": lambda s: {"past_values": _reals(s.batch, 16, 3)},
    "decisions": lambda s: {
        "states": _reals(s.batch, 6, 5),
        "actions": _reals(s.batch, 6, 3),
        "rewards": _reals(s.batch, 6, 1),
        "returns_to_go": _reals(s.batch, 6, 1),
        "timesteps": torch.arange(6).expand(s.batch, 6).contiguous(),
        "attention_mask": torch.ones(s.batch, 6, dtype=torch.long),
    },
}


# ------------------------------------------------------------------------------------ the models
def small_config(cls: Any, own: Options) -> Any:
    """A configuration with SMALL's values where the class has the key, and no dropout."""
    if "model_type" in own:  # a nested configuration that may be of any architecture
        cls = transformers.CONFIG_MAPPING[own["model_type"]]
    keys = {f.name for f in dataclasses.fields(cls)} | set(cls.attribute_map)
    values = {k: v for k, v in SMALL.items() if k in keys and k not in cls.attribute_map}
    given = {k: v for k, v in own.items() if k != "model_type"}
    for name, nested in (getattr(cls, "sub_configs", None) or {}).items():
        inner = given.pop(name, {})
        if inner is not None and (inner or nested is not transformers.AutoConfig):
            values[name] = small_config(nested, inner)
    config = cls(**(values | given))
    _without_dropout(config)
    config.use_cache = False
    return config


def _without_dropout(config: Any) -> None:
    for key, value in vars(config).items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
        elif "drop" in key and isinstance(value, list):
            setattr(config, key, [0.0] * len(value))


def _build(model: Model) -> nn.Module:
    cls = getattr(transformers, model.cls)
    built: nn.Module = cls(small_config(cls.config_class, model.options)).train()
    for module in built.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return built


def _inputs(model: Model, batch: int) -> Inputs:
    call = dict(model.call)
    sizes = {key: call.pop(key) for key in ("length", "side") if key in call}
    if "image_size" in model.options and "side" not in sizes:
        size = model.options["image_size"]
        sizes["side"] = size if isinstance(size, int) else size[0]
    return (), INPUTS[model.inputs](Shape(batch, **sizes)) | call


ENTRIES = [
    Entry(
        f"transformers/{name}",
        partial(_build, model),
        partial(_inputs, model),
        model.main,
        model.likelihood,
    )
    for table in TABLES
    for name, model in table.items()
]
