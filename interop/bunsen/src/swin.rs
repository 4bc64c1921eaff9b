//! Swin Transformer V2, from transformers' `Swinv2ForImageClassification` with bunsen's differences (see `models.py`).

use bunsen::burner::module::ModuleInit;
use bunsen::kits::images::swin::v2::{
    LayerConfig, SwinTransformerV2, SwinTransformerV2ContractConfig,
};
use burn::tensor::Device;
use burn_peft::format::{BaseOptions, NameMap};

/// The model that `models.py` makes.
pub fn model(device: &Device) -> SwinTransformerV2 {
    let layers = vec![LayerConfig::new(2, 2), LayerConfig::new(1, 4)];
    SwinTransformerV2ContractConfig::new([32, 32], 4, 3, 10, 8, layers)
        .with_window_size(4)
        .with_mlp_ratio(2.0)
        .with_drop_path_rate(0.0)
        .with_enable_ape(false)
        .init(device)
}

// What a user writes.
pub fn names() -> NameMap {
    NameMap::new()
        .with_prefix("classifier", "head")
        .with_prefix("swinv2.layernorm", "grid_output_norm")
        .with_prefix("swinv2.embeddings.norm", "patch_embed.norm")
        .with_prefix("swinv2.embeddings.patch_embeddings", "patch_embed")
        .with_prefix("swinv2.encoder.layers", "grid_transformer_block_sequences")
        .with_prefix("swinv2.encoder.layers.0.downsample", "grid_merge_layers.0")
        .with_segments("layernorm_before", "norm1")
        .with_segments("layernorm_after", "norm2")
        .with_segments("intermediate.dense", "block_mlp.fc1")
        .with_segments("attention.self", "win_attn")
        .with_segments("attention.output.dense", "win_attn.proj")
        .with_segments("output.dense", "block_mlp.fc2")
        .with_segments("query", "q_linear")
        .with_segments("key", "k_linear")
        .with_segments("value", "v_linear")
        .with_segments("continuous_position_bias_mlp.0", "rpb_module.cbp.l1")
        .with_segments("continuous_position_bias_mlp.2", "rpb_module.cbp.l2")
}

pub fn options() -> BaseOptions {
    BaseOptions::new().with_names(names())
}
// Until here.
