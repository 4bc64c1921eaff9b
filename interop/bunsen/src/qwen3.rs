//! The Qwen3 decoder, from transformers' `Qwen3ForCausalLM`.

use bunsen::burner::module::ModuleInit;
use bunsen::kits::gpts::qwen3::{Qwen3Config, Qwen3Model};
use burn::tensor::{Device, FloatDType};
use burn_peft::format::{BaseOptions, Family, NameMap};

/// The model that `models.py` makes.
pub fn model(device: &Device) -> Qwen3Model {
    Qwen3Config::new(48, 32, 2, 4, 2, 16, 48)
        .with_rope_theta(10_000)
        .init(device)
}

// What a user writes.
pub fn family() -> Family {
    Family::qwen3().with_renames([
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "mlp_norm"),
        ("self_attn", "attn"),
        ("q_proj", "c_q"),
        ("k_proj", "c_k"),
        ("v_proj", "c_v"),
        ("o_proj", "c_proj"),
    ])
}

pub fn names() -> NameMap {
    family().names()
}

pub fn options() -> BaseOptions {
    family().load_options().with_dtype(FloatDType::F32)
}
// Until here.
