//! Adapters of PEFT on GPT-2, whose `Conv1D` holds weights as `[d_in, d_out]` (`tests/golden/conv1d/generate.py`).

use std::path::PathBuf;

use burn::module::{Module, Param};
use burn::nn::{Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear};
use burn::tensor::activation::softmax;
use burn::tensor::{Bool, Device, Int, Tensor};
use burn_peft::format::{LoadOptions, SaveOptions, WEIGHTS_FILE};
use burn_peft::model::{PeftForward, PeftModel, TiedHead};

use super::kinds::{Tensors, check};

#[derive(Module, Debug)]
struct Attention {
    c_attn: Linear,
    c_proj: Linear,
}

#[derive(Module, Debug)]
struct Mlp {
    c_fc: Linear,
    c_proj: Linear,
}

#[derive(Module, Debug)]
struct Block {
    ln_1: LayerNorm,
    attn: Attention,
    ln_2: LayerNorm,
    mlp: Mlp,
}

#[derive(Module, Debug)]
struct Transformer {
    wte: Embedding,
    wpe: Embedding,
    h: Vec<Block>,
    ln_f: LayerNorm,
}

/// A GPT-2 of one block: 8 features, 2 heads. Its head is its embedding.
#[derive(Module, Debug)]
struct Gpt2 {
    transformer: Transformer,
}

impl Gpt2 {
    /// With the weights of the base, and `tokens` rows in its embedding, the new ones zero.
    fn load(tokens: usize, device: &Device) -> Self {
        let file = Tensors::read(&dir("base.safetensors"));
        let vector = |name: String| {
            Param::from_tensor(Tensor::<1>::from_data(file.get(&name).clone(), device))
        };
        let matrix = |name: &str| Tensor::<2>::from_data(file.get(name).clone(), device);
        let linear = |name: &str| {
            let name = format!("transformer.h.0.{name}");
            Linear {
                // `Conv1D`'s layout is Burn's.
                weight: Param::from_tensor(matrix(&format!("{name}.weight"))),
                bias: Some(vector(format!("{name}.bias"))),
            }
        };
        let norm = |name: &str| {
            let mut norm = LayerNormConfig::new(8).init(device);
            norm.gamma = vector(format!("transformer.{name}.weight"));
            norm.beta = Some(vector(format!("transformer.{name}.bias")));
            norm
        };
        let embedding = |weight: Tensor<2>| {
            let [rows, features] = weight.dims();
            let mut embedding = EmbeddingConfig::new(rows, features).init(device);
            embedding.weight = Param::from_tensor(weight);
            embedding
        };
        let wte = matrix("transformer.wte.weight");
        let wte = match tokens - 16 {
            0 => wte,
            more => Tensor::cat(vec![wte, Tensor::zeros([more, 8], device)], 0),
        };
        Self {
            transformer: Transformer {
                wte: embedding(wte),
                wpe: embedding(matrix("transformer.wpe.weight")),
                h: vec![Block {
                    ln_1: norm("h.0.ln_1"),
                    attn: Attention {
                        c_attn: linear("attn.c_attn"),
                        c_proj: linear("attn.c_proj"),
                    },
                    ln_2: norm("h.0.ln_2"),
                    mlp: Mlp {
                        c_fc: linear("mlp.c_fc"),
                        c_proj: linear("mlp.c_proj"),
                    },
                }],
                ln_f: norm("ln_f"),
            },
        }
    }

    fn forward(&self, tokens: Tensor<2, Int>) -> Tensor<3> {
        let Transformer { wte, wpe, h, ln_f } = &self.transformer;
        let ([batch, n], device) = (tokens.dims(), tokens.device());
        let positions = Tensor::<1, Int>::arange(0..n as i64, &device).unsqueeze::<2>();
        let mut x = wte.forward_peft(tokens) + wpe.forward_peft(positions);
        for block in h {
            let qkv = block
                .attn
                .c_attn
                .forward_peft(block.ln_1.forward(x.clone()));
            let part = |place: usize| {
                let part = qkv.clone().narrow(2, 8 * place, 8);
                part.reshape([batch, n, 2, 4]).swap_dims(1, 2)
            };
            let scores = part(0).matmul(part(1).transpose()).div_scalar(2.0);
            let hidden = Tensor::<2, Bool>::tril_mask([n, n], 0, &device).unsqueeze::<4>();
            let weights = softmax(scores.mask_fill(hidden, f32::NEG_INFINITY), 3);
            let seen = weights
                .matmul(part(2))
                .swap_dims(1, 2)
                .reshape([batch, n, 8]);
            x = x + block.attn.c_proj.forward_peft(seen);
            let wide = block.mlp.c_fc.forward_peft(block.ln_2.forward(x.clone()));
            // GPT-2's GELU.
            let inner = wide.clone() + wide.clone().powi_scalar(3).mul_scalar(0.044715);
            let gate = inner
                .mul_scalar((2.0 / std::f64::consts::PI).sqrt())
                .tanh()
                .add_scalar(1.0);
            x = x + block.mlp.c_proj.forward_peft(wide.mul_scalar(0.5) * gate);
        }
        wte.attend_peft(ln_f.forward(x))
    }
}

fn dir(name: &str) -> PathBuf {
    crate::golden("conv1d").join(name)
}

const CONV1D: [&str; 3] = ["c_attn", "c_proj", "c_fc"];

/// The cases, with the rows of their embeddings.
const CASES: [(&str, usize); 7] = [
    ("factors", 16),
    ("dora", 16),
    ("copies", 16),
    ("bias", 16),
    ("lookup", 16),
    ("resized", 18),
    ("resized-lora", 18),
];

fn model(tokens: usize) -> PeftModel<Gpt2> {
    let model = PeftModel::new(Gpt2::load(tokens, &Device::flex()));
    model.with_tied_head("wte").with_conv1d(CONV1D)
}

#[test]
fn copies_factors_and_base_values_of_gpt_2_are_read_and_written_as_peft_has_them() {
    for (case, rows) in CASES {
        let golden = Tensors::read(&dir(case).join("outputs.safetensors"));
        let tokens = Tensor::<2, Int>::from_data(golden.get("tokens").clone(), &Device::flex());
        let mut loaded = model(rows);
        let report = loaded.load_adapter("default", dir(case), &LoadOptions::default());
        let report = report.unwrap_or_else(|error| panic!("{case}: {error}"));
        let logits = loaded.forward(tokens.clone()).into_data();
        check(case, &logits, golden.get("logits"), 2e-5);
        assert_eq!(
            report.base_values.len(),
            usize::from(rows == 18),
            "{case}: {report}"
        );

        let scratch = tempfile::tempdir().unwrap();
        let saved = loaded.save_adapter("default", scratch.path(), &SaveOptions::default());
        let saved = saved.unwrap_or_else(|error| panic!("{case}: {error}"));
        let [written, golden] =
            [&saved, &dir(case)].map(|dir| Tensors::read(&dir.join(WEIGHTS_FILE)).0);
        for (key, data) in &golden {
            // PEFT stores the base of the embedding once more for the head that shares it.
            if key != "base_model.model.lm_head.weight" {
                assert_eq!(Some(data), written.get(key), "{case}: {key}");
            }
        }
        let config = std::fs::read_to_string(saved.join("adapter_config.json")).unwrap();
        assert!(config.contains("\"fan_in_fan_out\": true"), "{case}");
        let mut again = model(rows);
        again
            .load_adapter("default", &saved, &LoadOptions::default())
            .unwrap();
        assert_eq!(again.forward(tokens).into_data(), logits, "{case}");
    }
}

/// Of a square weight no shape tells the layout; of others it does.
#[test]
fn a_square_copy_is_refused_unless_the_model_says_what_is_conv1d() {
    let mut undeclared = PeftModel::new(Gpt2::load(16, &Device::flex())).with_tied_head("wte");
    let error = undeclared.load_adapter("default", dir("copies"), &LoadOptions::default());
    let error = error.unwrap_err().to_string();
    assert!(
        error.contains("the layout of `transformer.h.0.attn.c_proj.weight`"),
        "{error}"
    );
    assert!(error.contains("PeftModel::with_conv1d"), "{error}");
    // Factors do not depend on it.
    undeclared
        .load_adapter("default", dir("factors"), &LoadOptions::default())
        .unwrap();
}

/// An adapter of 18 tokens on a model of 16.
#[test]
fn an_adapter_of_a_resized_vocabulary_says_what_to_do() {
    let mut small = model(16);
    for case in ["resized", "resized-lora"] {
        let error = small.load_adapter("default", dir(case), &LoadOptions::default());
        let error = error.unwrap_err().to_string();
        assert!(error.contains("has 18 rows and the model 16"), "{error}");
        assert!(error.contains("resize the model's first"), "{error}");
        assert_eq!(small.adapters().count(), 0);
    }
    // Without strictness what fits is loaded.
    let report = small
        .load_adapter(
            "default",
            dir("resized"),
            &LoadOptions::new().with_strict(false),
        )
        .unwrap();
    assert_eq!(report.mismatched.len(), 1, "{report}");
    assert_eq!(small.factors("default").unwrap().len(), 1);
}
