//! Whisper.

use burn::module::{Module, Param};
use burn::nn::conv::{Conv1d, Conv1dConfig};
use burn::nn::{Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig};
use burn::tensor::{Device, Tensor};
use burn_peft::format::Family;

use super::Lies::{self, Same, Transposed};
use super::{check, check_saved, load};

#[derive(Module, Debug)]
struct Attention {
    query: Linear,
    key: Linear,
    value: Linear,
    out: Linear,
}

#[derive(Module, Debug)]
struct EncoderBlock {
    attention_norm: LayerNorm,
    attention: Attention,
    mlp_norm: LayerNorm,
    inner: Linear,
    outer: Linear,
}

#[derive(Module, Debug)]
struct DecoderBlock {
    attention_norm: LayerNorm,
    attention: Attention,
    cross_norm: LayerNorm,
    cross: Attention,
    mlp_norm: LayerNorm,
    inner: Linear,
    outer: Linear,
}

#[derive(Module, Debug)]
struct AudioEncoder {
    conv1: Conv1d,
    conv2: Conv1d,
    positions: Param<Tensor<2>>,
    blocks: Vec<EncoderBlock>,
    norm: LayerNorm,
}

#[derive(Module, Debug)]
struct TextDecoder {
    tokens: Embedding,
    positions: Param<Tensor<2>>,
    blocks: Vec<DecoderBlock>,
    norm: LayerNorm,
}

#[derive(Module, Debug)]
struct Whisper {
    audio: AudioEncoder,
    text: TextDecoder,
}

fn net() -> Whisper {
    let device = &Device::flex();
    let linear = |from, to| LinearConfig::new(from, to).init(device);
    let norm = || LayerNormConfig::new(8).init(device);
    let attention = || Attention {
        query: linear(8, 8),
        key: LinearConfig::new(8, 8).with_bias(false).init(device),
        value: linear(8, 8),
        out: linear(8, 8),
    };
    let positions = |n| Param::from_tensor(Tensor::zeros([n, 8], device));
    Whisper {
        audio: AudioEncoder {
            conv1: Conv1dConfig::new(4, 8, 3).init(device),
            conv2: Conv1dConfig::new(8, 8, 3).init(device),
            positions: positions(6),
            blocks: vec![EncoderBlock {
                attention_norm: norm(),
                attention: attention(),
                mlp_norm: norm(),
                inner: linear(8, 12),
                outer: linear(12, 8),
            }],
            norm: norm(),
        },
        text: TextDecoder {
            tokens: EmbeddingConfig::new(13, 8).init(device),
            positions: positions(5),
            blocks: vec![DecoderBlock {
                attention_norm: norm(),
                attention: attention(),
                cross_norm: norm(),
                cross: attention(),
                mlp_norm: norm(),
                inner: linear(8, 12),
                outer: linear(12, 8),
            }],
            norm: norm(),
        },
    }
}

fn family() -> Family {
    Family::whisper()
        .with_renames([
            ("encoder", "audio"),
            ("decoder", "text"),
            ("layers", "blocks"),
            ("layer_norm", "norm"),
            ("embed_tokens", "tokens"),
            ("self_attn", "attention"),
            ("self_attn_layer_norm", "attention_norm"),
            ("encoder_attn", "cross"),
            ("encoder_attn_layer_norm", "cross_norm"),
            ("final_layer_norm", "mlp_norm"),
            ("q_proj", "query"),
            ("k_proj", "key"),
            ("v_proj", "value"),
            ("out_proj", "out"),
            ("fc1", "inner"),
            ("fc2", "outer"),
        ])
        .with_parameter("embed_positions.weight", "positions")
}

/// Rows of the table for a stack of blocks.
macro_rules! block {
    ($path:literal, $name:literal) => {
        [
            (
                concat!($path, ".attention_norm.gamma"),
                concat!($name, ".self_attn_layer_norm.weight"),
                Same,
            ),
            (
                concat!($path, ".attention_norm.beta"),
                concat!($name, ".self_attn_layer_norm.bias"),
                Same,
            ),
            (
                concat!($path, ".attention.query.weight"),
                concat!($name, ".self_attn.q_proj.weight"),
                Transposed,
            ),
            (
                concat!($path, ".attention.query.bias"),
                concat!($name, ".self_attn.q_proj.bias"),
                Same,
            ),
            (
                concat!($path, ".attention.key.weight"),
                concat!($name, ".self_attn.k_proj.weight"),
                Transposed,
            ),
            (
                concat!($path, ".attention.value.weight"),
                concat!($name, ".self_attn.v_proj.weight"),
                Transposed,
            ),
            (
                concat!($path, ".attention.value.bias"),
                concat!($name, ".self_attn.v_proj.bias"),
                Same,
            ),
            (
                concat!($path, ".attention.out.weight"),
                concat!($name, ".self_attn.out_proj.weight"),
                Transposed,
            ),
            (
                concat!($path, ".attention.out.bias"),
                concat!($name, ".self_attn.out_proj.bias"),
                Same,
            ),
            (
                concat!($path, ".mlp_norm.gamma"),
                concat!($name, ".final_layer_norm.weight"),
                Same,
            ),
            (
                concat!($path, ".mlp_norm.beta"),
                concat!($name, ".final_layer_norm.bias"),
                Same,
            ),
            (
                concat!($path, ".inner.weight"),
                concat!($name, ".fc1.weight"),
                Transposed,
            ),
            (
                concat!($path, ".inner.bias"),
                concat!($name, ".fc1.bias"),
                Same,
            ),
            (
                concat!($path, ".outer.weight"),
                concat!($name, ".fc2.weight"),
                Transposed,
            ),
            (
                concat!($path, ".outer.bias"),
                concat!($name, ".fc2.bias"),
                Same,
            ),
        ]
    };
}

fn table() -> Vec<(&'static str, &'static str, Lies)> {
    let mut table = vec![
        ("audio.conv1.weight", "model.encoder.conv1.weight", Same),
        ("audio.conv1.bias", "model.encoder.conv1.bias", Same),
        ("audio.conv2.weight", "model.encoder.conv2.weight", Same),
        ("audio.conv2.bias", "model.encoder.conv2.bias", Same),
        (
            "audio.positions",
            "model.encoder.embed_positions.weight",
            Same,
        ),
        ("audio.norm.gamma", "model.encoder.layer_norm.weight", Same),
        ("audio.norm.beta", "model.encoder.layer_norm.bias", Same),
        (
            "text.tokens.weight",
            "model.decoder.embed_tokens.weight",
            Same,
        ),
        (
            "text.positions",
            "model.decoder.embed_positions.weight",
            Same,
        ),
        ("text.norm.gamma", "model.decoder.layer_norm.weight", Same),
        ("text.norm.beta", "model.decoder.layer_norm.bias", Same),
        (
            "text.blocks.#.cross_norm.gamma",
            "model.decoder.layers.#.encoder_attn_layer_norm.weight",
            Same,
        ),
        (
            "text.blocks.#.cross_norm.beta",
            "model.decoder.layers.#.encoder_attn_layer_norm.bias",
            Same,
        ),
        (
            "text.blocks.#.cross.query.weight",
            "model.decoder.layers.#.encoder_attn.q_proj.weight",
            Transposed,
        ),
        (
            "text.blocks.#.cross.query.bias",
            "model.decoder.layers.#.encoder_attn.q_proj.bias",
            Same,
        ),
        (
            "text.blocks.#.cross.key.weight",
            "model.decoder.layers.#.encoder_attn.k_proj.weight",
            Transposed,
        ),
        (
            "text.blocks.#.cross.value.weight",
            "model.decoder.layers.#.encoder_attn.v_proj.weight",
            Transposed,
        ),
        (
            "text.blocks.#.cross.value.bias",
            "model.decoder.layers.#.encoder_attn.v_proj.bias",
            Same,
        ),
        (
            "text.blocks.#.cross.out.weight",
            "model.decoder.layers.#.encoder_attn.out_proj.weight",
            Transposed,
        ),
        (
            "text.blocks.#.cross.out.bias",
            "model.decoder.layers.#.encoder_attn.out_proj.bias",
            Same,
        ),
    ];
    table.extend(block!("audio.blocks.#", "model.encoder.layers.#"));
    table.extend(block!("text.blocks.#", "model.decoder.layers.#"));
    table
}

#[test]
fn every_tensor_is_loaded_and_saved() {
    let (model, report) = load(&family(), "whisper", net());
    assert_eq!(report.loaded.len(), 50);
    check(model.module(), "whisper", 1, &table());
    check_saved(&model, &family(), "whisper");
}
