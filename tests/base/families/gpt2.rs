//! GPT-2, whose linear layers are `Conv1D`.

use burn::module::Module;
use burn::nn::{
    Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig, LinearLayout,
};
use burn::tensor::{Device, Int, Tensor};
use burn_peft::format::{BaseOptions, Family};
use burn_peft::model::{PeftModel, TargetConfig};
use burn_peft::nf4::Nf4Config;

use super::Lies::{self, Same};
use super::{
    assert_logits, attend, causal, check, check_saved, content, golden, ids, join, load, open,
    split, tied_head,
};
use crate::base::files::Dir;

#[derive(Module, Debug)]
struct Attention {
    qkv: Linear,
    output: Linear,
}

#[derive(Module, Debug)]
struct Mlp {
    inner: Linear,
    outer: Linear,
}

#[derive(Module, Debug)]
struct Block {
    norm_1: LayerNorm,
    attention: Attention,
    norm_2: LayerNorm,
    mlp: Mlp,
}

#[derive(Module, Debug)]
struct Gpt2 {
    tokens: Embedding,
    positions: Embedding,
    blocks: Vec<Block>,
    norm: LayerNorm,
}

impl Gpt2 {
    fn new(layout: LinearLayout) -> Self {
        let device = &Device::flex();
        let linear = |from, to| LinearConfig::new(from, to).with_layout(layout).init(device);
        let norm = || LayerNormConfig::new(8).init(device);
        let block = |_| Block {
            norm_1: norm(),
            attention: Attention {
                qkv: linear(8, 24),
                output: linear(8, 8),
            },
            norm_2: norm(),
            mlp: Mlp {
                inner: linear(8, 32),
                outer: linear(32, 8),
            },
        };
        Self {
            tokens: EmbeddingConfig::new(13, 8).init(device),
            positions: EmbeddingConfig::new(16, 8).init(device),
            blocks: (0..2).map(block).collect(),
            norm: norm(),
        }
    }

    fn forward(&self, tokens: Tensor<2, Int>) -> Tensor<3> {
        let [batch, length] = tokens.dims();
        let positions = Tensor::arange(0..length as i64, &tokens.device());
        let positions = positions.unsqueeze::<2>().repeat_dim(0, batch);
        let mut x = self.tokens.forward(tokens) + self.positions.forward(positions);
        for block in &self.blocks {
            let h = block.attention.qkv.forward(block.norm_1.forward(x.clone()));
            let qkv = h.chunk(3, 2).into_iter().map(|part| split(part, 2));
            let [q, k, v]: [Tensor<4>; 3] = qkv.collect::<Vec<_>>().try_into().unwrap();
            let h = attend(q, k, v, 0.5, Some(causal(length)));
            x = x + block.attention.output.forward(join(h));
            let h = block.mlp.inner.forward(block.norm_2.forward(x.clone()));
            x = x + block.mlp.outer.forward(gelu_new(h));
        }
        tied_head(self.norm.forward(x), &self.tokens)
    }
}

/// GELU by a hyperbolic tangent.
fn gelu_new(x: Tensor<3>) -> Tensor<3> {
    let cubed = x.clone().powi_scalar(3).mul_scalar(0.044_715);
    let inner = (x.clone() + cubed).mul_scalar((2.0 / std::f64::consts::PI).sqrt());
    x.mul_scalar(0.5) * inner.tanh().add_scalar(1.0)
}

const RENAMES: [(&str, &str); 11] = [
    ("wte", "tokens"),
    ("wpe", "positions"),
    ("h", "blocks"),
    ("ln_1", "norm_1"),
    ("ln_2", "norm_2"),
    ("ln_f", "norm"),
    ("attn", "attention"),
    ("c_attn", "qkv"),
    ("attn.c_proj", "attention.output"),
    ("c_fc", "inner"),
    ("mlp.c_proj", "mlp.outer"),
];

fn family() -> Family {
    Family::gpt2().with_renames(RENAMES)
}

/// `Conv1D` lies as Burn's layers of row layout do, so nothing is transposed.
const TABLE: [(&str, &str, Lies); 16] = [
    ("tokens.weight", "transformer.wte.weight", Same),
    ("positions.weight", "transformer.wpe.weight", Same),
    ("blocks.#.norm_1.gamma", "transformer.h.#.ln_1.weight", Same),
    ("blocks.#.norm_1.beta", "transformer.h.#.ln_1.bias", Same),
    (
        "blocks.#.attention.qkv.weight",
        "transformer.h.#.attn.c_attn.weight",
        Same,
    ),
    (
        "blocks.#.attention.qkv.bias",
        "transformer.h.#.attn.c_attn.bias",
        Same,
    ),
    (
        "blocks.#.attention.output.weight",
        "transformer.h.#.attn.c_proj.weight",
        Same,
    ),
    (
        "blocks.#.attention.output.bias",
        "transformer.h.#.attn.c_proj.bias",
        Same,
    ),
    ("blocks.#.norm_2.gamma", "transformer.h.#.ln_2.weight", Same),
    ("blocks.#.norm_2.beta", "transformer.h.#.ln_2.bias", Same),
    (
        "blocks.#.mlp.inner.weight",
        "transformer.h.#.mlp.c_fc.weight",
        Same,
    ),
    (
        "blocks.#.mlp.inner.bias",
        "transformer.h.#.mlp.c_fc.bias",
        Same,
    ),
    (
        "blocks.#.mlp.outer.weight",
        "transformer.h.#.mlp.c_proj.weight",
        Same,
    ),
    (
        "blocks.#.mlp.outer.bias",
        "transformer.h.#.mlp.c_proj.bias",
        Same,
    ),
    ("norm.gamma", "transformer.ln_f.weight", Same),
    ("norm.beta", "transformer.ln_f.bias", Same),
];

#[test]
fn values_and_logits_are_python_s_in_either_layout() {
    for layout in [LinearLayout::Row, LinearLayout::Col] {
        let (model, report) = load(&family(), "gpt2", Gpt2::new(layout));
        assert_eq!(report.loaded.len(), 28);
        check(model.module(), "gpt2", 2, &TABLE);
        assert_logits("gpt2", model.module().forward(ids("gpt2", "input_ids")));
        check_saved(&model, &family(), "gpt2");
    }
}

#[test]
fn the_hub_s_files_have_no_prefix_and_masks_beside_the_weights() {
    let (expected, _) = load(&family(), "gpt2", Gpt2::new(LinearLayout::Row));
    let (model, report) = load(&family(), "gpt2_hub", Gpt2::new(LinearLayout::Row));
    assert_eq!(report.ignored, ["h.0.attn.bias", "h.1.attn.bias"]);
    assert_eq!(
        content(model.module()).floats,
        content(expected.module()).floats
    );
}

#[test]
fn without_the_option_a_conv1d_is_an_error_that_names_it_unless_it_is_square() {
    let mut model = PeftModel::new(Gpt2::new(LinearLayout::Row));
    let options = BaseOptions::new().with_names(family().names());
    let error = model.load_base(golden("gpt2"), &options).unwrap_err();
    let text = error.to_string();
    // The outputs of attention are square: of these nothing is said.
    assert!(text.contains("6 of another shape"), "{text}");
    assert!(text.contains("`with_conv1d`"), "{text}");
}

/// In NF4 the codes are those of bitsandbytes, which packs the transpose, and the file is the one that transformers writes.
#[test]
fn packed_it_is_what_transformers_and_bitsandbytes_make_of_it() {
    let linears = TargetConfig::list(["qkv", "output", "inner", "outer"]);
    for layout in [LinearLayout::Row, LinearLayout::Col] {
        let mut model = PeftModel::new(Gpt2::new(layout));
        let options = family().load_options();
        let options = options.with_nf4(linears.clone(), Nf4Config::new());
        let report = model.load_base(golden("gpt2"), &options).unwrap();
        assert_eq!(report.packed, 8);
        let dir = Dir::new();
        model
            .save_base(dir.path(), &family().save_options())
            .unwrap();
        let bytes = |path| std::fs::read(path).unwrap();
        let expected = bytes(golden("gpt2_nf4").join("model.safetensors"));
        assert!(bytes(dir.file("model.safetensors")) == expected);

        // And so does packing what was loaded dense, and reading what is packed.
        let (mut dense, _) = load(&family(), "gpt2", Gpt2::new(layout));
        dense.quantize_nf4(&linears, &Nf4Config::new()).unwrap();
        let (read, report) = load(&family(), "gpt2_nf4", Gpt2::new(layout));
        assert_eq!(report.four_bit.len(), 8);
        for model in [dense, read] {
            let dir = Dir::new();
            model
                .save_base(dir.path(), &family().save_options())
                .unwrap();
            assert!(bytes(dir.file("model.safetensors")) == expected);
        }
    }
    let names = open(&golden("gpt2_nf4").join("model.safetensors"));
    assert_eq!(names.shapes().len(), 28 + 3 * 8);
}

/// GPT-2 with a head of its own, as a user may write it.
#[derive(Module, Debug)]
struct WithHead {
    transformer: Gpt2,
    head: Linear,
}

#[test]
fn the_head_is_known_by_its_shape_and_stays_dense() {
    let device = &Device::flex();
    let net = WithHead {
        transformer: Gpt2::new(LinearLayout::Row),
        head: LinearConfig::new(8, 13).with_bias(false).init(device),
    };
    let family = Family::gpt2().nested().with_renames(RENAMES);
    let family = family.with_renames([("lm_head", "head")]);
    let mut model = PeftModel::new(net);
    let options = family.load_options();
    let options = options.with_nf4(TargetConfig::all_linear(), Nf4Config::new());
    let report = model.load_base(golden("gpt2"), &options).unwrap();
    assert_eq!(report.tied.len(), 1);
    assert_eq!(report.packed, 8);
}
