//! BERT, also from files that call the parameters of norms `gamma` and `beta`.

use burn::module::{Module, Param};
use burn::nn::{Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig};
use burn::tensor::activation::{gelu, tanh};
use burn::tensor::{Device, Int, Tensor};
use burn_peft::format::{BaseOptions, Family};
use burn_peft::model::PeftModel;

use super::Lies::{self, Same, Transposed};
use super::{
    assert_logits, attend, check, check_saved, content, golden, ids, join, load, split, tied_head,
};

#[derive(Module, Debug)]
struct Embeddings {
    words: Embedding,
    positions: Embedding,
    segments: Embedding,
    norm: LayerNorm,
}

#[derive(Module, Debug)]
struct Attention {
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    norm: LayerNorm,
}

#[derive(Module, Debug)]
struct Block {
    attention: Attention,
    inner: Linear,
    outer: Linear,
    norm: LayerNorm,
}

#[derive(Module, Debug)]
struct Bert {
    embeddings: Embeddings,
    blocks: Vec<Block>,
    pooler: Linear,
    head_transform: Linear,
    head_norm: LayerNorm,
    head_bias: Param<Tensor<1>>,
    next_sentence: Linear,
}

impl Bert {
    fn new() -> Self {
        let device = &Device::flex();
        let linear = |from, to| LinearConfig::new(from, to).init(device);
        let norm = || LayerNormConfig::new(8).with_epsilon(1e-12).init(device);
        let embedding = |n| EmbeddingConfig::new(n, 8).init(device);
        let block = |_| Block {
            attention: Attention {
                query: linear(8, 8),
                key: linear(8, 8),
                value: linear(8, 8),
                output: linear(8, 8),
                norm: norm(),
            },
            inner: linear(8, 12),
            outer: linear(12, 8),
            norm: norm(),
        };
        Self {
            embeddings: Embeddings {
                words: embedding(13),
                positions: embedding(16),
                segments: embedding(2),
                norm: norm(),
            },
            blocks: (0..2).map(block).collect(),
            pooler: linear(8, 8),
            head_transform: linear(8, 8),
            head_norm: norm(),
            head_bias: Param::from_tensor(Tensor::zeros([13], device)),
            next_sentence: linear(8, 2),
        }
    }

    /// Logits of masked tokens, of the first segment alone.
    fn forward(&self, tokens: Tensor<2, Int>) -> Tensor<3> {
        let [batch, length] = tokens.dims();
        let embeddings = &self.embeddings;
        let positions = Tensor::arange(0..length as i64, &tokens.device());
        let positions = positions.unsqueeze::<2>().repeat_dim(0, batch);
        let x = embeddings.words.forward(tokens.clone())
            + embeddings.positions.forward(positions)
            + embeddings.segments.forward(tokens.zeros_like());
        let mut x = embeddings.norm.forward(x);
        for block in &self.blocks {
            let attention = &block.attention;
            let [q, k, v] = [&attention.query, &attention.key, &attention.value]
                .map(|linear| split(linear.forward(x.clone()), 2));
            let h = join(attend(q, k, v, 0.5, None));
            x = attention.norm.forward(x + attention.output.forward(h));
            let h = block.outer.forward(gelu(block.inner.forward(x.clone())));
            x = block.norm.forward(x + h);
        }
        let h = self.head_norm.forward(gelu(self.head_transform.forward(x)));
        tied_head(h, &self.embeddings.words) + self.head_bias.val().unsqueeze()
    }

    /// The pooled first token.
    fn pooled(&self, x: Tensor<3>) -> Tensor<2> {
        let first = x.narrow(1, 0, 1).squeeze_dim(1);
        self.next_sentence.forward(tanh(self.pooler.forward(first)))
    }
}

fn family() -> Family {
    Family::bert()
        .with_renames([
            ("embeddings.word_embeddings", "embeddings.words"),
            ("embeddings.position_embeddings", "embeddings.positions"),
            ("embeddings.token_type_embeddings", "embeddings.segments"),
            ("embeddings.LayerNorm", "embeddings.norm"),
            ("encoder.layer.*.attention.self", "blocks.*.attention"),
            (
                "encoder.layer.*.attention.output.LayerNorm",
                "blocks.*.attention.norm",
            ),
            (
                "encoder.layer.*.attention.output.dense",
                "blocks.*.attention.output",
            ),
            ("encoder.layer.*.intermediate.dense", "blocks.*.inner"),
            ("encoder.layer.*.output.dense", "blocks.*.outer"),
            ("encoder.layer.*.output.LayerNorm", "blocks.*.norm"),
            ("pooler.dense", "pooler"),
            ("cls.predictions.transform.dense", "head_transform"),
            ("cls.predictions.transform.LayerNorm", "head_norm"),
            ("cls.seq_relationship", "next_sentence"),
        ])
        .with_parameter("cls.predictions.bias", "head_bias")
}

const TABLE: [(&str, &str, Lies); 30] = [
    (
        "embeddings.words.weight",
        "bert.embeddings.word_embeddings.weight",
        Same,
    ),
    (
        "embeddings.positions.weight",
        "bert.embeddings.position_embeddings.weight",
        Same,
    ),
    (
        "embeddings.segments.weight",
        "bert.embeddings.token_type_embeddings.weight",
        Same,
    ),
    (
        "embeddings.norm.gamma",
        "bert.embeddings.LayerNorm.weight",
        Same,
    ),
    (
        "embeddings.norm.beta",
        "bert.embeddings.LayerNorm.bias",
        Same,
    ),
    (
        "blocks.#.attention.query.weight",
        "bert.encoder.layer.#.attention.self.query.weight",
        Transposed,
    ),
    (
        "blocks.#.attention.query.bias",
        "bert.encoder.layer.#.attention.self.query.bias",
        Same,
    ),
    (
        "blocks.#.attention.key.weight",
        "bert.encoder.layer.#.attention.self.key.weight",
        Transposed,
    ),
    (
        "blocks.#.attention.key.bias",
        "bert.encoder.layer.#.attention.self.key.bias",
        Same,
    ),
    (
        "blocks.#.attention.value.weight",
        "bert.encoder.layer.#.attention.self.value.weight",
        Transposed,
    ),
    (
        "blocks.#.attention.value.bias",
        "bert.encoder.layer.#.attention.self.value.bias",
        Same,
    ),
    (
        "blocks.#.attention.output.weight",
        "bert.encoder.layer.#.attention.output.dense.weight",
        Transposed,
    ),
    (
        "blocks.#.attention.output.bias",
        "bert.encoder.layer.#.attention.output.dense.bias",
        Same,
    ),
    (
        "blocks.#.attention.norm.gamma",
        "bert.encoder.layer.#.attention.output.LayerNorm.weight",
        Same,
    ),
    (
        "blocks.#.attention.norm.beta",
        "bert.encoder.layer.#.attention.output.LayerNorm.bias",
        Same,
    ),
    (
        "blocks.#.inner.weight",
        "bert.encoder.layer.#.intermediate.dense.weight",
        Transposed,
    ),
    (
        "blocks.#.inner.bias",
        "bert.encoder.layer.#.intermediate.dense.bias",
        Same,
    ),
    (
        "blocks.#.outer.weight",
        "bert.encoder.layer.#.output.dense.weight",
        Transposed,
    ),
    (
        "blocks.#.outer.bias",
        "bert.encoder.layer.#.output.dense.bias",
        Same,
    ),
    (
        "blocks.#.norm.gamma",
        "bert.encoder.layer.#.output.LayerNorm.weight",
        Same,
    ),
    (
        "blocks.#.norm.beta",
        "bert.encoder.layer.#.output.LayerNorm.bias",
        Same,
    ),
    ("pooler.weight", "bert.pooler.dense.weight", Transposed),
    ("pooler.bias", "bert.pooler.dense.bias", Same),
    (
        "head_transform.weight",
        "cls.predictions.transform.dense.weight",
        Transposed,
    ),
    (
        "head_transform.bias",
        "cls.predictions.transform.dense.bias",
        Same,
    ),
    (
        "head_norm.gamma",
        "cls.predictions.transform.LayerNorm.weight",
        Same,
    ),
    (
        "head_norm.beta",
        "cls.predictions.transform.LayerNorm.bias",
        Same,
    ),
    ("head_bias", "cls.predictions.bias", Same),
    (
        "next_sentence.weight",
        "cls.seq_relationship.weight",
        Transposed,
    ),
    ("next_sentence.bias", "cls.seq_relationship.bias", Same),
];

#[test]
fn values_and_logits_are_python_s() {
    let (model, report) = load(&family(), "bert", Bert::new());
    assert_eq!(report.loaded.len(), 46);
    check(model.module(), "bert", 2, &TABLE);
    let net = model.module();
    assert_logits("bert", net.forward(ids("bert", "input_ids")));
    assert_eq!(
        net.pooled(Tensor::zeros([2, 3, 8], &Device::flex())).dims(),
        [2, 2]
    );
    check_saved(&model, &family(), "bert");
}

#[test]
fn files_of_2018_have_gamma_and_beta_and_the_tied_decoder() {
    let (expected, _) = load(&family(), "bert", Bert::new());
    let (model, report) = load(&family(), "bert_gamma", Bert::new());
    assert_eq!(
        content(model.module()).floats,
        content(expected.module()).floats
    );
    assert_eq!(
        report.equal,
        [
            "cls.predictions.decoder.bias",
            "cls.predictions.decoder.weight"
        ]
    );
    assert_eq!(report.ignored, ["bert.embeddings.position_ids"]);
    assert!(
        report
            .loaded
            .contains(&"bert.embeddings.LayerNorm.gamma".to_owned())
    );
}

/// What a map says of the names of parameters holds for saving, too.
#[test]
fn a_map_can_name_gamma_and_beta() {
    let names = family().names();
    let names = names
        .with_parameter("LayerNorm.gamma", "LayerNorm.weight")
        .with_parameter("LayerNorm.beta", "LayerNorm.bias");
    let options = BaseOptions::new()
        .with_names(names.clone())
        .with_ignored_buffers()
        .with_ignored(["cls.predictions.decoder.*"]);
    let mut model = PeftModel::new(Bert::new());
    let report = model.load_base(golden("bert_gamma"), &options).unwrap();
    assert_eq!(report.ignored.len(), 3);
    let dir = super::Dir::new();
    let options = burn_peft::format::SaveBaseOptions::new().with_names(names);
    model.save_base(dir.path(), &options).unwrap();
    let saved = super::open(&dir.file("model.safetensors"));
    let file = super::open(&golden("bert_gamma").join("model.safetensors"));
    for (name, _) in saved.shapes() {
        assert_eq!(
            saved.read(name).unwrap(),
            file.read(name).unwrap(),
            "{name}"
        );
    }
    assert_eq!(saved.shapes().len(), 46);
}

#[test]
fn an_encoder_alone_leaves_the_heads_out() {
    #[derive(Module, Debug)]
    struct Encoder {
        embeddings: Embeddings,
        blocks: Vec<Block>,
    }
    let Bert {
        embeddings, blocks, ..
    } = Bert::new();
    let options = family()
        .load_options()
        .with_ignored(["cls.*", "bert.pooler.*"]);
    let mut model = PeftModel::new(Encoder { embeddings, blocks });
    let report = model.load_base(golden("bert_gamma"), &options).unwrap();
    assert_eq!(report.loaded.len(), 37);
}
