//! The Whisper encoder and decoder, from transformers' `WhisperForConditionalGeneration`.

use bunsen::burner::module::ModuleInit;
use bunsen::kits::speech::whisper::{Whisper, WhisperApiConfig};
use burn::tensor::{Device, FloatDType};
use burn_peft::format::{BaseOptions, NameMap};

/// The model that `models.py` makes.
pub fn model(device: &Device) -> Whisper {
    WhisperApiConfig::new(8, 48, 32, 24, 1, 16, 1)
        .with_d_head(16)
        .init(device)
}

// What a user writes.
pub fn names() -> NameMap {
    NameMap::new()
        .with_prefix("model", "")
        .with_segments("encoder.layer_norm", "encoder.ln_post")
        .with_segments("decoder.layer_norm", "decoder.ln")
        .with_segments("embed_tokens", "token_embedding")
        .with_segments("layers", "blocks")
        .with_segments("conv1", "head.blocks.0.conv")
        .with_segments("conv2", "head.blocks.1.conv")
        .with_segments("self_attn_layer_norm", "attn_norm")
        .with_segments("encoder_attn_layer_norm", "cross_attn_norm")
        .with_segments("final_layer_norm", "mlp_norm")
        .with_segments("self_attn", "attn")
        .with_segments("encoder_attn", "cross_attn")
        .with_segments("q_proj", "query")
        .with_segments("k_proj", "key")
        .with_segments("v_proj", "value")
        .with_segments("out_proj", "output")
        .with_segments("fc1", "mlp.linear1")
        .with_segments("fc2", "mlp.linear2")
}

pub fn options() -> BaseOptions {
    BaseOptions::new()
        .with_names(names())
        .with_dtype(FloatDType::F32)
}
// Until here.
