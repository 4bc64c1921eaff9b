//! The Whisper encoder and decoder, from transformers' `WhisperForConditionalGeneration`.

use bunsen::burner::module::ModuleInit;
use bunsen::kits::speech::whisper::{Whisper, WhisperApiConfig};
use burn::tensor::{Device, FloatDType};
use burn_peft::format::{BaseOptions, Family, NameMap};

/// The model that `models.py` makes.
pub fn model(device: &Device) -> Whisper {
    WhisperApiConfig::new(8, 48, 32, 24, 1, 16, 1)
        .with_d_head(16)
        .init(device)
}

// What a user writes.
pub fn family() -> Family {
    Family::whisper()
        .with_parameter("embed_positions.weight", "positional_embedding")
        .with_renames([
            ("encoder.layer_norm", "encoder.ln_post"),
            ("decoder.layer_norm", "decoder.ln"),
            ("embed_tokens", "token_embedding"),
            ("layers", "blocks"),
            ("conv1", "head.blocks.0.conv"),
            ("conv2", "head.blocks.1.conv"),
            ("self_attn_layer_norm", "attn_norm"),
            ("encoder_attn_layer_norm", "cross_attn_norm"),
            ("final_layer_norm", "mlp_norm"),
            ("self_attn", "attn"),
            ("encoder_attn", "cross_attn"),
            ("q_proj", "query"),
            ("k_proj", "key"),
            ("v_proj", "value"),
            ("out_proj", "output"),
            ("fc1", "mlp.linear1"),
            ("fc2", "mlp.linear2"),
        ])
}

pub fn names() -> NameMap {
    family().names()
}

pub fn options() -> BaseOptions {
    family().load_options().with_dtype(FloatDType::F32)
}
// Until here.
