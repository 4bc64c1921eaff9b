//! T5, encoder and decoder.

use burn::module::Module;
use burn::nn::{Embedding, EmbeddingConfig, Linear, LinearConfig, RmsNorm, RmsNormConfig};
use burn::tensor::activation::relu;
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_peft::format::Family;

use super::Lies::{self, Same, Transposed};
use super::{assert_logits, attend, causal, check, check_saved, ids, join, load, split, tied_head};

#[derive(Module, Debug)]
struct Attention {
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    /// Of the first block only.
    distances: Option<Embedding>,
}

#[derive(Module, Debug)]
struct FeedForward {
    inner: Linear,
    outer: Linear,
}

#[derive(Module, Debug)]
struct Block {
    attention_norm: RmsNorm,
    attention: Attention,
    cross_norm: Option<RmsNorm>,
    cross: Option<Attention>,
    mlp_norm: RmsNorm,
    mlp: FeedForward,
}

#[derive(Module, Debug)]
struct Stack {
    blocks: Vec<Block>,
    norm: RmsNorm,
}

#[derive(Module, Debug)]
struct T5 {
    embedding: Embedding,
    encoder: Stack,
    decoder: Stack,
}

impl Stack {
    fn new(is_decoder: bool) -> Self {
        let device = &Device::flex();
        let linear = |from, to| LinearConfig::new(from, to).with_bias(false).init(device);
        let norm = || RmsNormConfig::new(8).with_epsilon(1e-6).init(device);
        let attention = |distances: bool| Attention {
            query: linear(8, 8),
            key: linear(8, 8),
            value: linear(8, 8),
            output: linear(8, 8),
            distances: distances.then(|| EmbeddingConfig::new(8, 2).init(device)),
        };
        let block = |layer| Block {
            attention_norm: norm(),
            attention: attention(layer == 0),
            cross_norm: is_decoder.then(norm),
            cross: is_decoder.then(|| attention(false)),
            mlp_norm: norm(),
            mlp: FeedForward {
                inner: linear(8, 12),
                outer: linear(12, 8),
            },
        };
        Self {
            blocks: (0..2).map(block).collect(),
            norm: norm(),
        }
    }

    fn forward(&self, mut x: Tensor<3>, memory: Option<&Tensor<3>>) -> Tensor<3> {
        let length = x.dims()[1];
        let distances = self.blocks[0].attention.distances.as_ref().unwrap();
        let mut added = bias(distances, length, memory.is_none());
        if memory.is_some() {
            added = added + causal(length);
        }
        for block in &self.blocks {
            let h = block.attention_norm.forward(x.clone());
            x = x + block.attention.forward(h.clone(), h, Some(added.clone()));
            if let (Some(norm), Some(cross), Some(memory)) =
                (&block.cross_norm, &block.cross, memory)
            {
                x = x.clone() + cross.forward(norm.forward(x), memory.clone(), None);
            }
            let h = block.mlp.inner.forward(block.mlp_norm.forward(x.clone()));
            x = x + block.mlp.outer.forward(relu(h));
        }
        self.norm.forward(x)
    }
}

impl Attention {
    fn forward(&self, x: Tensor<3>, memory: Tensor<3>, added: Option<Tensor<4>>) -> Tensor<3> {
        let q = split(self.query.forward(x), 2);
        let [k, v] =
            [&self.key, &self.value].map(|linear| split(linear.forward(memory.clone()), 2));
        self.output.forward(join(attend(q, k, v, 1.0, added)))
    }
}

/// What the distance of a query and a key adds to their scores: `[1, heads, length, length]`.
fn bias(distances: &Embedding, length: usize, both_ways: bool) -> Tensor<4> {
    let pairs = (0..length * length).map(|i| {
        let distance = (i % length) as i64 - (i / length) as i64;
        bucket(distance, both_ways)
    });
    let data = TensorData::new(pairs.collect::<Vec<i64>>(), [length, length]);
    let buckets = Tensor::<2, Int>::from_data(data, &Device::flex());
    distances.forward(buckets).permute([2, 0, 1]).unsqueeze()
}

/// T5's bucket of a distance from a query to a key, of 8, distances of 12 and more sharing the last.
fn bucket(distance: i64, both_ways: bool) -> i64 {
    let (mut buckets, mut bucket, mut distance) = (8_i64, 0, -distance);
    if both_ways {
        buckets /= 2;
        bucket += if distance < 0 { buckets } else { 0 };
        distance = distance.abs();
    } else {
        distance = distance.max(0);
    }
    let exact = buckets / 2;
    if distance < exact {
        return bucket + distance;
    }
    let log = (distance as f64 / exact as f64).ln() / (12.0 / exact as f64).ln();
    let large = exact + (log * (buckets - exact) as f64) as i64;
    bucket + large.min(buckets - 1)
}

impl T5 {
    fn new() -> Self {
        Self {
            embedding: EmbeddingConfig::new(13, 8).init(&Device::flex()),
            encoder: Stack::new(false),
            decoder: Stack::new(true),
        }
    }

    fn forward(&self, tokens: Tensor<2, Int>, decoder_tokens: Tensor<2, Int>) -> Tensor<3> {
        let memory = self.encoder.forward(self.embedding.forward(tokens), None);
        let x = self
            .decoder
            .forward(self.embedding.forward(decoder_tokens), Some(&memory));
        tied_head(x.mul_scalar(8_f64.powf(-0.5)), &self.embedding)
    }
}

fn family() -> Family {
    Family::t5().with_renames([
        ("shared", "embedding"),
        ("final_layer_norm", "norm"),
        ("block.*.layer.0.SelfAttention", "blocks.*.attention"),
        ("block.*.layer.0.layer_norm", "blocks.*.attention_norm"),
        (
            "decoder.block.*.layer.1.EncDecAttention",
            "decoder.blocks.*.cross",
        ),
        (
            "decoder.block.*.layer.1.layer_norm",
            "decoder.blocks.*.cross_norm",
        ),
        (
            "encoder.block.*.layer.1.DenseReluDense",
            "encoder.blocks.*.mlp",
        ),
        (
            "encoder.block.*.layer.1.layer_norm",
            "encoder.blocks.*.mlp_norm",
        ),
        (
            "decoder.block.*.layer.2.DenseReluDense",
            "decoder.blocks.*.mlp",
        ),
        (
            "decoder.block.*.layer.2.layer_norm",
            "decoder.blocks.*.mlp_norm",
        ),
        ("relative_attention_bias", "distances"),
        ("q", "query"),
        ("k", "key"),
        ("v", "value"),
        ("o", "output"),
        ("wi", "inner"),
        ("wo", "outer"),
    ])
}

fn table() -> Vec<(&'static str, &'static str, Lies)> {
    vec![
        ("embedding.weight", "shared.weight", Same),
        (
            "encoder.norm.gamma",
            "encoder.final_layer_norm.weight",
            Same,
        ),
        (
            "decoder.norm.gamma",
            "decoder.final_layer_norm.weight",
            Same,
        ),
        (
            "encoder.blocks.0.attention.distances.weight",
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            Same,
        ),
        (
            "decoder.blocks.0.attention.distances.weight",
            "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            Same,
        ),
        (
            "encoder.blocks.#.attention_norm.gamma",
            "encoder.block.#.layer.0.layer_norm.weight",
            Same,
        ),
        (
            "encoder.blocks.#.attention.query.weight",
            "encoder.block.#.layer.0.SelfAttention.q.weight",
            Transposed,
        ),
        (
            "encoder.blocks.#.attention.key.weight",
            "encoder.block.#.layer.0.SelfAttention.k.weight",
            Transposed,
        ),
        (
            "encoder.blocks.#.attention.value.weight",
            "encoder.block.#.layer.0.SelfAttention.v.weight",
            Transposed,
        ),
        (
            "encoder.blocks.#.attention.output.weight",
            "encoder.block.#.layer.0.SelfAttention.o.weight",
            Transposed,
        ),
        (
            "encoder.blocks.#.mlp_norm.gamma",
            "encoder.block.#.layer.1.layer_norm.weight",
            Same,
        ),
        (
            "encoder.blocks.#.mlp.inner.weight",
            "encoder.block.#.layer.1.DenseReluDense.wi.weight",
            Transposed,
        ),
        (
            "encoder.blocks.#.mlp.outer.weight",
            "encoder.block.#.layer.1.DenseReluDense.wo.weight",
            Transposed,
        ),
        (
            "decoder.blocks.#.attention_norm.gamma",
            "decoder.block.#.layer.0.layer_norm.weight",
            Same,
        ),
        (
            "decoder.blocks.#.attention.query.weight",
            "decoder.block.#.layer.0.SelfAttention.q.weight",
            Transposed,
        ),
        (
            "decoder.blocks.#.attention.key.weight",
            "decoder.block.#.layer.0.SelfAttention.k.weight",
            Transposed,
        ),
        (
            "decoder.blocks.#.attention.value.weight",
            "decoder.block.#.layer.0.SelfAttention.v.weight",
            Transposed,
        ),
        (
            "decoder.blocks.#.attention.output.weight",
            "decoder.block.#.layer.0.SelfAttention.o.weight",
            Transposed,
        ),
        (
            "decoder.blocks.#.cross_norm.gamma",
            "decoder.block.#.layer.1.layer_norm.weight",
            Same,
        ),
        (
            "decoder.blocks.#.cross.query.weight",
            "decoder.block.#.layer.1.EncDecAttention.q.weight",
            Transposed,
        ),
        (
            "decoder.blocks.#.cross.key.weight",
            "decoder.block.#.layer.1.EncDecAttention.k.weight",
            Transposed,
        ),
        (
            "decoder.blocks.#.cross.value.weight",
            "decoder.block.#.layer.1.EncDecAttention.v.weight",
            Transposed,
        ),
        (
            "decoder.blocks.#.cross.output.weight",
            "decoder.block.#.layer.1.EncDecAttention.o.weight",
            Transposed,
        ),
        (
            "decoder.blocks.#.mlp_norm.gamma",
            "decoder.block.#.layer.2.layer_norm.weight",
            Same,
        ),
        (
            "decoder.blocks.#.mlp.inner.weight",
            "decoder.block.#.layer.2.DenseReluDense.wi.weight",
            Transposed,
        ),
        (
            "decoder.blocks.#.mlp.outer.weight",
            "decoder.block.#.layer.2.DenseReluDense.wo.weight",
            Transposed,
        ),
    ]
}

#[test]
fn values_and_logits_are_python_s() {
    let (model, report) = load(&family(), "t5", T5::new());
    assert_eq!(report.loaded.len(), 47);
    check(model.module(), "t5", 2, &table());
    let logits = model
        .module()
        .forward(ids("t5", "input_ids"), ids("t5", "decoder_input_ids"));
    assert_logits("t5", logits);
    check_saved(&model, &family(), "t5");
}
