//! The Qwen3 decoder, from transformers' `Qwen3ForCausalLM`.

use bunsen::burner::module::ModuleInit;
use bunsen::kits::gpts::qwen3::{Qwen3Config, Qwen3Model};
use burn::tensor::{Device, FloatDType};
use burn_peft::format::{BaseOptions, NameMap};

/// The model that `models.py` makes.
pub fn model(device: &Device) -> Qwen3Model {
    Qwen3Config::new(48, 32, 2, 4, 2, 16, 48)
        .with_rope_theta(10_000)
        .init(device)
}

// What a user writes.
pub fn names() -> NameMap {
    NameMap::new()
        .with_prefix("model", "")
        .with_segments("input_layernorm", "attn_norm")
        .with_segments("post_attention_layernorm", "mlp_norm")
        .with_segments("self_attn", "attn")
        .with_segments("q_proj", "c_q")
        .with_segments("k_proj", "c_k")
        .with_segments("v_proj", "c_v")
        .with_segments("o_proj", "c_proj")
}

pub fn options() -> BaseOptions {
    BaseOptions::new()
        .with_names(names())
        .with_dtype(FloatDType::F32)
}
// Until here.
