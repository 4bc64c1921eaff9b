//! Llama and what has its form: Mistral, Qwen2, Qwen3, Gemma 2, Gemma 3, Phi-3.

use burn::module::Module;
use burn::nn::{Embedding, EmbeddingConfig, Linear, LinearConfig, RmsNorm, RmsNormConfig};
use burn::tensor::activation::silu;
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_peft::format::Family;

use super::Lies::{self, Same, Transposed};
use super::{assert_logits, attend, causal, check, check_saved, ids, join, load, split};

#[derive(Module, Debug)]
pub struct Attention {
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    query_norm: Option<RmsNorm>,
    key_norm: Option<RmsNorm>,
}

#[derive(Module, Debug)]
pub struct FeedForward {
    gate: Linear,
    up: Linear,
    down: Linear,
}

#[derive(Module, Debug)]
pub struct Block {
    attention_norm: RmsNorm,
    attention: Attention,
    after_attention_norm: Option<RmsNorm>,
    feed_forward_norm: RmsNorm,
    feed_forward: FeedForward,
    after_feed_forward_norm: Option<RmsNorm>,
}

#[derive(Module, Debug)]
pub struct Decoder {
    embedding: Embedding,
    blocks: Vec<Block>,
    norm: RmsNorm,
    head: Option<Linear>,
}

/// What the families differ in.
#[derive(Default)]
struct Form {
    layers: usize,
    qkv_bias: bool,
    head_norms: bool,
    four_norms: bool,
    head: bool,
    two_kv_heads: bool,
    /// Beside 13.
    more_tokens: usize,
}

impl Decoder {
    fn new(form: &Form) -> Self {
        let device = &Device::flex();
        let norm = |n| RmsNormConfig::new(n).with_epsilon(1e-6).init(device);
        let linear = |from, to, bias| LinearConfig::new(from, to).with_bias(bias).init(device);
        let block = |_| Block {
            attention_norm: norm(8),
            attention: Attention {
                query: linear(8, 8, form.qkv_bias),
                key: linear(8, if form.two_kv_heads { 8 } else { 4 }, form.qkv_bias),
                value: linear(8, if form.two_kv_heads { 8 } else { 4 }, form.qkv_bias),
                output: linear(8, 8, false),
                query_norm: form.head_norms.then(|| norm(4)),
                key_norm: form.head_norms.then(|| norm(4)),
            },
            after_attention_norm: form.four_norms.then(|| norm(8)),
            feed_forward_norm: norm(8),
            feed_forward: FeedForward {
                gate: linear(8, 12, false),
                up: linear(8, 12, false),
                down: linear(12, 8, false),
            },
            after_feed_forward_norm: form.four_norms.then(|| norm(8)),
        };
        Self {
            embedding: EmbeddingConfig::new(13 + form.more_tokens, 8).init(device),
            blocks: (0..form.layers).map(block).collect(),
            norm: norm(8),
            head: form.head.then(|| linear(8, 13, false)),
        }
    }

    /// Logits of a Llama of 2 heads of 4.
    pub fn forward(&self, tokens: Tensor<2, Int>) -> Tensor<3> {
        let length = tokens.dims()[1];
        let mut x = self.embedding.forward(tokens);
        for block in &self.blocks {
            let h = block.attention_norm.forward(x.clone());
            let attention = &block.attention;
            let q = rotate(split(attention.query.forward(h.clone()), 2));
            let k = attention.key.forward(h.clone());
            let kv_heads = k.dims()[2] / 4;
            let k = rotate(split(k, kv_heads)).repeat_dim(1, 2 / kv_heads);
            let v = split(attention.value.forward(h), kv_heads).repeat_dim(1, 2 / kv_heads);
            let h = attend(q, k, v, 0.5, Some(causal(length)));
            x = x + attention.output.forward(join(h));
            let h = block.feed_forward_norm.forward(x.clone());
            let mlp = &block.feed_forward;
            let h = silu(mlp.gate.forward(h.clone())) * mlp.up.forward(h);
            x = x + mlp.down.forward(h);
        }
        let x = self.norm.forward(x);
        match &self.head {
            Some(head) => head.forward(x),
            None => super::tied_head(x, &self.embedding),
        }
    }
}

/// Rotary embedding of heads of 4.
fn rotate(x: Tensor<4>) -> Tensor<4> {
    let length = x.dims()[2];
    let angles = (0..length).flat_map(|position| {
        [0, 1, 0, 1].map(|i| position as f32 * 10_000_f32.powf(-2.0 * i as f32 / 4.0))
    });
    let data = TensorData::new(angles.collect::<Vec<_>>(), [1, 1, length, 4]);
    let angles = Tensor::<4>::from_data(data, &Device::flex());
    let halves = x.clone().chunk(2, 3);
    let turned = Tensor::cat(vec![halves[1].clone().neg(), halves[0].clone()], 3);
    x * angles.clone().cos() + turned * angles.sin()
}

/// How the model above calls what transformers calls otherwise.
pub fn family(family: Family) -> Family {
    common(family).with_renames([("post_attention_layernorm", "feed_forward_norm")])
}

fn common(family: Family) -> Family {
    family.with_renames([
        ("embed_tokens", "embedding"),
        ("layers", "blocks"),
        ("self_attn", "attention"),
        ("q_proj", "query"),
        ("k_proj", "key"),
        ("v_proj", "value"),
        ("o_proj", "output"),
        ("q_norm", "query_norm"),
        ("k_norm", "key_norm"),
        ("input_layernorm", "attention_norm"),
        ("mlp", "feed_forward"),
        ("gate_proj", "gate"),
        ("up_proj", "up"),
        ("down_proj", "down"),
        ("lm_head", "head"),
    ])
}

/// Gemma has a norm after each part as well as before it.
fn gemma(family: Family) -> Family {
    common(family).with_renames([
        ("post_attention_layernorm", "after_attention_norm"),
        ("post_feedforward_layernorm", "after_feed_forward_norm"),
        ("pre_feedforward_layernorm", "feed_forward_norm"),
    ])
}

const LLAMA: [(&str, &str, Lies); 11] = [
    ("embedding.weight", "model.embed_tokens.weight", Same),
    (
        "blocks.#.attention_norm.gamma",
        "model.layers.#.input_layernorm.weight",
        Same,
    ),
    (
        "blocks.#.attention.query.weight",
        "model.layers.#.self_attn.q_proj.weight",
        Transposed,
    ),
    (
        "blocks.#.attention.key.weight",
        "model.layers.#.self_attn.k_proj.weight",
        Transposed,
    ),
    (
        "blocks.#.attention.value.weight",
        "model.layers.#.self_attn.v_proj.weight",
        Transposed,
    ),
    (
        "blocks.#.attention.output.weight",
        "model.layers.#.self_attn.o_proj.weight",
        Transposed,
    ),
    (
        "blocks.#.feed_forward.gate.weight",
        "model.layers.#.mlp.gate_proj.weight",
        Transposed,
    ),
    (
        "blocks.#.feed_forward.up.weight",
        "model.layers.#.mlp.up_proj.weight",
        Transposed,
    ),
    (
        "blocks.#.feed_forward.down.weight",
        "model.layers.#.mlp.down_proj.weight",
        Transposed,
    ),
    ("norm.gamma", "model.norm.weight", Same),
    (
        "blocks.#.feed_forward_norm.gamma",
        "model.layers.#.post_attention_layernorm.weight",
        Same,
    ),
];
const HEAD: (&str, &str, Lies) = ("head.weight", "lm_head.weight", Transposed);
const HEAD_NORMS: [(&str, &str, Lies); 2] = [
    (
        "blocks.#.attention.query_norm.gamma",
        "model.layers.#.self_attn.q_norm.weight",
        Same,
    ),
    (
        "blocks.#.attention.key_norm.gamma",
        "model.layers.#.self_attn.k_norm.weight",
        Same,
    ),
];

fn table(
    without: usize,
    more: &[(&'static str, &'static str, Lies)],
) -> Vec<(&'static str, &'static str, Lies)> {
    [&LLAMA[..LLAMA.len() - without], more].concat()
}

pub fn llama_net() -> Decoder {
    let form = Form {
        layers: 2,
        head: true,
        ..Form::default()
    };
    Decoder::new(&form)
}

/// One block, two key and value heads, and the embedding for a head.
pub fn tied_llama(more_tokens: usize) -> Decoder {
    let form = Form {
        layers: 1,
        two_kv_heads: true,
        more_tokens,
        ..Form::default()
    };
    Decoder::new(&form)
}

#[test]
fn llama_has_python_s_values_and_logits() {
    let family = family(Family::llama());
    let (model, report) = load(&family, "llama", llama_net());
    assert_eq!(report.loaded.len(), 21);
    check(model.module(), "llama", 2, &table(0, &[HEAD]));
    assert_logits("llama", model.module().forward(ids("llama", "input_ids")));
    check_saved(&model, &family, "llama");
}

#[test]
fn mistral_qwen2_and_qwen3_are_loaded_whole() {
    let form = Form {
        layers: 1,
        head: true,
        ..Form::default()
    };
    let (model, _) = load(&family(Family::mistral()), "mistral", Decoder::new(&form));
    check(model.module(), "mistral", 1, &table(0, &[HEAD]));

    let form = Form {
        layers: 1,
        qkv_bias: true,
        ..Form::default()
    };
    let (model, _) = load(&family(Family::qwen2()), "qwen2", Decoder::new(&form));
    let biases = [
        (
            "blocks.#.attention.query.bias",
            "model.layers.#.self_attn.q_proj.bias",
            Same,
        ),
        (
            "blocks.#.attention.key.bias",
            "model.layers.#.self_attn.k_proj.bias",
            Same,
        ),
        (
            "blocks.#.attention.value.bias",
            "model.layers.#.self_attn.v_proj.bias",
            Same,
        ),
    ];
    check(model.module(), "qwen2", 1, &table(0, &biases));

    let form = Form {
        layers: 1,
        head_norms: true,
        ..Form::default()
    };
    let (model, _) = load(&family(Family::qwen3()), "qwen3", Decoder::new(&form));
    check(model.module(), "qwen3", 1, &table(0, &HEAD_NORMS));
}

#[test]
fn a_head_of_its_own_gets_the_embedding_where_the_configuration_ties_them() {
    let form = Form {
        layers: 1,
        qkv_bias: true,
        head: true,
        ..Form::default()
    };
    let (model, report) = load(&family(Family::qwen2()), "qwen2", Decoder::new(&form));
    let pair = (
        "lm_head.weight".to_owned(),
        "model.embed_tokens.weight".to_owned(),
    );
    assert_eq!(report.tied, [pair]);
    let floats = super::content(model.module()).floats;
    let [embedding, head] = ["embedding.weight", "head.weight"].map(|name| floats[name].clone());
    let head = Tensor::<2>::from_data(head, &Device::flex());
    assert_eq!(head.transpose().into_data(), embedding);
    // The same files with another word in their configuration.
    let dir = super::Dir::new();
    let config = std::fs::read_to_string(super::golden("qwen2").join("config.json")).unwrap();
    let tied = "\"tie_word_embeddings\": true";
    assert!(config.contains(tied));
    dir.write(
        "config.json",
        config.replace(tied, "\"tie_word_embeddings\": false"),
    );
    let file = super::golden("qwen2").join("model.safetensors");
    std::fs::copy(file, dir.file("model.safetensors")).unwrap();
    let mut other = burn_peft::model::PeftModel::new(Decoder::new(&form));
    let options = family(Family::qwen2()).load_options();
    let error = other.load_base(dir.path(), &options).unwrap_err();
    assert!(
        error.to_string().contains("1 missing: `lm_head.weight`"),
        "{error}"
    );
}

#[test]
fn gemma_2_and_3_have_four_norms_a_block() {
    let norms = [
        (
            "blocks.#.after_attention_norm.gamma",
            "model.layers.#.post_attention_layernorm.weight",
            Same,
        ),
        (
            "blocks.#.feed_forward_norm.gamma",
            "model.layers.#.pre_feedforward_layernorm.weight",
            Same,
        ),
        (
            "blocks.#.after_feed_forward_norm.gamma",
            "model.layers.#.post_feedforward_layernorm.weight",
            Same,
        ),
    ];
    let form = Form {
        layers: 1,
        four_norms: true,
        ..Form::default()
    };
    let (model, _) = load(&gemma(Family::gemma2()), "gemma2", Decoder::new(&form));
    check(model.module(), "gemma2", 1, &table(1, &norms));

    let form = Form {
        head_norms: true,
        ..form
    };
    let (model, _) = load(&gemma(Family::gemma3()), "gemma3", Decoder::new(&form));
    check(
        model.module(),
        "gemma3",
        1,
        &table(1, &[&norms[..], &HEAD_NORMS].concat()),
    );
    // The files with a vision model have another prefix.
    let (other, report) = load(
        &gemma(Family::gemma3()),
        "gemma3_vision",
        Decoder::new(&form),
    );
    assert_eq!(report.ignored.len(), 2);
    let floats = |model| super::content(model).floats;
    assert_eq!(floats(other.module()), floats(model.module()));
}

#[derive(Module, Debug)]
struct FusedAttention {
    qkv: Linear,
    output: Linear,
}

#[derive(Module, Debug)]
struct FusedFeedForward {
    gate_up: Linear,
    down: Linear,
}

#[derive(Module, Debug)]
struct FusedBlock {
    norm_1: RmsNorm,
    attention: FusedAttention,
    norm_2: RmsNorm,
    mlp: FusedFeedForward,
}

#[derive(Module, Debug)]
struct Phi3 {
    tokens: Embedding,
    layers: Vec<FusedBlock>,
    norm: RmsNorm,
    lm_head: Linear,
}

#[test]
fn phi_3_keeps_its_fused_layers() {
    let device = &Device::flex();
    let linear = |from, to| LinearConfig::new(from, to).with_bias(false).init(device);
    let norm = || RmsNormConfig::new(8).init(device);
    let net = Phi3 {
        tokens: EmbeddingConfig::new(13, 8).init(device),
        layers: vec![FusedBlock {
            norm_1: norm(),
            attention: FusedAttention {
                qkv: linear(8, 16),
                output: linear(8, 8),
            },
            norm_2: norm(),
            mlp: FusedFeedForward {
                gate_up: linear(8, 24),
                down: linear(12, 8),
            },
        }],
        norm: norm(),
        lm_head: linear(8, 13),
    };
    let family = Family::phi3().with_renames([
        ("embed_tokens", "tokens"),
        ("self_attn", "attention"),
        ("qkv_proj", "qkv"),
        ("o_proj", "output"),
        ("gate_up_proj", "gate_up"),
        ("down_proj", "down"),
        ("input_layernorm", "norm_1"),
        ("post_attention_layernorm", "norm_2"),
    ]);
    let (model, _) = load(&family, "phi3", net);
    let table = [
        ("tokens.weight", "model.embed_tokens.weight", Same),
        (
            "layers.#.norm_1.gamma",
            "model.layers.#.input_layernorm.weight",
            Same,
        ),
        (
            "layers.#.attention.qkv.weight",
            "model.layers.#.self_attn.qkv_proj.weight",
            Transposed,
        ),
        (
            "layers.#.attention.output.weight",
            "model.layers.#.self_attn.o_proj.weight",
            Transposed,
        ),
        (
            "layers.#.norm_2.gamma",
            "model.layers.#.post_attention_layernorm.weight",
            Same,
        ),
        (
            "layers.#.mlp.gate_up.weight",
            "model.layers.#.mlp.gate_up_proj.weight",
            Transposed,
        ),
        (
            "layers.#.mlp.down.weight",
            "model.layers.#.mlp.down_proj.weight",
            Transposed,
        ),
        ("norm.gamma", "model.norm.weight", Same),
        ("lm_head.weight", "lm_head.weight", Transposed),
    ];
    check(model.module(), "phi3", 1, &table);
    check_saved(&model, &family, "phi3");
}

/// A model that is nested as Python's.
#[derive(Module, Debug)]
struct Nested {
    model: Decoder,
}

#[test]
fn a_model_may_be_nested_as_python_s() {
    let form = Form {
        layers: 1,
        qkv_bias: true,
        ..Form::default()
    };
    let family = family(Family::qwen2().nested());
    let (model, _) = load(
        &family,
        "qwen2",
        Nested {
            model: Decoder::new(&form),
        },
    );
    let (flat, _) = load(&self::family(Family::qwen2()), "qwen2", Decoder::new(&form));
    let floats = super::content(model.module()).floats;
    let flat = super::content(flat.module()).floats;
    let nested: Vec<_> = flat
        .into_iter()
        .map(|(path, data)| (format!("model.{path}"), data))
        .collect();
    assert_eq!(floats.into_iter().collect::<Vec<_>>(), nested);
}
