//! ViT, whose first parameters are in no layer.

use burn::module::{Module, Param};
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::{LayerNorm, LayerNormConfig, Linear, LinearConfig};
use burn::tensor::{Device, Tensor};
use burn_peft::format::Family;

use super::Lies::{Same, Transposed};
use super::{check, check_saved, load};

#[derive(Module, Debug)]
struct Attention {
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
}

#[derive(Module, Debug)]
struct Block {
    norm_1: LayerNorm,
    attention: Attention,
    norm_2: LayerNorm,
    inner: Linear,
    outer: Linear,
}

#[derive(Module, Debug)]
struct Vit {
    class_token: Param<Tensor<3>>,
    positions: Param<Tensor<3>>,
    patches: Conv2d,
    blocks: Vec<Block>,
    norm: LayerNorm,
    classifier: Linear,
}

#[test]
fn every_tensor_is_loaded_and_saved() {
    let device = &Device::flex();
    let linear = |from, to| LinearConfig::new(from, to).init(device);
    let norm = || LayerNormConfig::new(8).init(device);
    let net = Vit {
        class_token: Param::from_tensor(Tensor::zeros([1, 1, 8], device)),
        positions: Param::from_tensor(Tensor::zeros([1, 5, 8], device)),
        patches: Conv2dConfig::new([3, 8], [4, 4]).init(device),
        blocks: vec![Block {
            norm_1: norm(),
            attention: Attention {
                query: linear(8, 8),
                key: linear(8, 8),
                value: linear(8, 8),
                output: linear(8, 8),
            },
            norm_2: norm(),
            inner: linear(8, 12),
            outer: linear(12, 8),
        }],
        norm: norm(),
        classifier: linear(8, 3),
    };
    let family = Family::vit()
        .with_renames([
            ("embeddings.patch_embeddings.projection", "patches"),
            ("encoder.layer", "blocks"),
            ("attention.attention.query", "attention.query"),
            ("attention.attention.key", "attention.key"),
            ("attention.attention.value", "attention.value"),
            ("attention.output.dense", "attention.output"),
            ("intermediate.dense", "inner"),
            ("output.dense", "outer"),
            ("layernorm_before", "norm_1"),
            ("layernorm_after", "norm_2"),
            ("layernorm", "norm"),
        ])
        .with_parameter("vit.embeddings.cls_token", "class_token")
        .with_parameter("vit.embeddings.position_embeddings", "positions");
    let (model, report) = load(&family, "vit", net);
    assert_eq!(report.loaded.len(), 24);
    let table = [
        ("class_token", "vit.embeddings.cls_token", Same),
        ("positions", "vit.embeddings.position_embeddings", Same),
        (
            "patches.weight",
            "vit.embeddings.patch_embeddings.projection.weight",
            Same,
        ),
        (
            "patches.bias",
            "vit.embeddings.patch_embeddings.projection.bias",
            Same,
        ),
        (
            "blocks.#.norm_1.gamma",
            "vit.encoder.layer.#.layernorm_before.weight",
            Same,
        ),
        (
            "blocks.#.norm_1.beta",
            "vit.encoder.layer.#.layernorm_before.bias",
            Same,
        ),
        (
            "blocks.#.attention.query.weight",
            "vit.encoder.layer.#.attention.attention.query.weight",
            Transposed,
        ),
        (
            "blocks.#.attention.query.bias",
            "vit.encoder.layer.#.attention.attention.query.bias",
            Same,
        ),
        (
            "blocks.#.attention.key.weight",
            "vit.encoder.layer.#.attention.attention.key.weight",
            Transposed,
        ),
        (
            "blocks.#.attention.key.bias",
            "vit.encoder.layer.#.attention.attention.key.bias",
            Same,
        ),
        (
            "blocks.#.attention.value.weight",
            "vit.encoder.layer.#.attention.attention.value.weight",
            Transposed,
        ),
        (
            "blocks.#.attention.value.bias",
            "vit.encoder.layer.#.attention.attention.value.bias",
            Same,
        ),
        (
            "blocks.#.attention.output.weight",
            "vit.encoder.layer.#.attention.output.dense.weight",
            Transposed,
        ),
        (
            "blocks.#.attention.output.bias",
            "vit.encoder.layer.#.attention.output.dense.bias",
            Same,
        ),
        (
            "blocks.#.norm_2.gamma",
            "vit.encoder.layer.#.layernorm_after.weight",
            Same,
        ),
        (
            "blocks.#.norm_2.beta",
            "vit.encoder.layer.#.layernorm_after.bias",
            Same,
        ),
        (
            "blocks.#.inner.weight",
            "vit.encoder.layer.#.intermediate.dense.weight",
            Transposed,
        ),
        (
            "blocks.#.inner.bias",
            "vit.encoder.layer.#.intermediate.dense.bias",
            Same,
        ),
        (
            "blocks.#.outer.weight",
            "vit.encoder.layer.#.output.dense.weight",
            Transposed,
        ),
        (
            "blocks.#.outer.bias",
            "vit.encoder.layer.#.output.dense.bias",
            Same,
        ),
        ("norm.gamma", "vit.layernorm.weight", Same),
        ("norm.beta", "vit.layernorm.bias", Same),
        ("classifier.weight", "classifier.weight", Transposed),
        ("classifier.bias", "classifier.bias", Same),
    ];
    check(model.module(), "vit", 1, &table);
    check_saved(&model, &family, "vit");
}
