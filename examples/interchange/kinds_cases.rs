//! The cases on models with layers and parameters of every kind.

use std::path::Path;

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_peft::adapter::LoraConfig;
use burn_peft::format::{LoadOptions, SaveOptions};
use burn_peft::layer::ExpertLayout;
use burn_peft::model::{
    BiasMode, DEFAULT_ADAPTER, PeftConfig, PeftModel, TargetConfig, TrainableTokens,
};

use super::kinds::Kinds;
use super::{Outcome, trained_as, write, write_json};
use llama::model::LlamaForCausalLm;

/// What a case is made of: its name, what it shows, its base, and the adapter's configuration.
type Case = (&'static str, &'static str, &'static str, PeftConfig);

fn cases() -> Vec<Case> {
    let lora = || LoraConfig::new(3).with_alpha(5.0);
    let on = |names: &[&str]| PeftConfig::new(lora(), TargetConfig::list(names.iter().copied()));
    let with = |lora: LoraConfig, names: &[&str]| {
        PeftConfig::new(lora, TargetConfig::list(names.iter().copied()))
    };
    let tokens = |named: &[(&str, &[usize])]| {
        let named = named
            .iter()
            .map(|(name, of)| (name.to_string(), of.to_vec()));
        TrainableTokens::Named(named.collect())
    };
    vec![
        ("embedding", "LoRA on an embedding", "kinds", on(&["embed"])),
        (
            "embedding-rslora",
            "rsLoRA on an embedding",
            "kinds",
            with(lora().with_rslora(true), &["embed"]),
        ),
        (
            "embedding-dora",
            "DoRA on an embedding",
            "kinds",
            with(lora().with_dora(true), &["embed"]),
        ),
        (
            "conv1d",
            "LoRA on a one-dimensional convolution",
            "kinds",
            on(&["conv1"]),
        ),
        (
            "conv2d",
            "LoRA on a two-dimensional convolution with stride and padding",
            "kinds",
            with(lora().with_dropout(0.1), &["conv2"]),
        ),
        (
            "conv-dora",
            "DoRA on both convolutions",
            "kinds",
            with(lora().with_dora(true), &["conv1", "conv2"]),
        ),
        (
            "grouped",
            "a change of the weight of a convolution of 3 groups, in PEFT's form of 3 times the rank",
            "kinds",
            on(&["grouped"]),
        ),
        (
            "lora-bias",
            "`lora_bias` on linear layers and convolutions",
            "kinds",
            with(
                lora().with_bias(true),
                &["conv1", "grouped", "up", "conv2", "head"],
            ),
        ),
        (
            "bias-lora-only",
            "`bias: \"lora_only\"`",
            "kinds",
            on(&["up", "conv2"]).with_bias(BiasMode::LoraOnly),
        ),
        (
            "bias-all",
            "`bias: \"all\"`",
            "kinds",
            on(&["up", "conv2"]).with_bias(BiasMode::All),
        ),
        (
            "modules-to-save",
            "`modules_to_save`: a linear layer, a norm and an embedding",
            "kinds",
            on(&["up"]).with_modules_to_save(["head", "norm", "embed"]),
        ),
        (
            "tokens-list",
            "trained tokens, as a list",
            "kinds",
            on(&["up"]).with_trainable_tokens(TrainableTokens::Input(vec![7, 2, 9])),
        ),
        (
            "tokens-dict",
            "trained tokens, by the module's name",
            "kinds",
            on(&["conv1"]).with_trainable_tokens(tokens(&[("embed", &[4, 0])])),
        ),
        (
            "experts-one",
            "`target_parameters`: one tensor of experts",
            "kinds",
            on(&[]).with_target_parameters(["experts.weight"]),
        ),
        (
            "experts-two",
            "`target_parameters`: two tensors of one module, and a linear layer",
            "kinds",
            with(lora().with_rslora(true), &["up"])
                .with_target_parameters(["experts.gate", "experts.weight"]),
        ),
        (
            "experts-transposed",
            "`target_parameters` of experts stored as [E, in, out]",
            "kinds-transposed",
            on(&[]).with_target_parameters(["experts.gate", "experts.weight"]),
        ),
        (
            "everything",
            "LoRA on every layer and on experts, trained biases, a saved norm, ranks by pattern",
            "kinds",
            PeftConfig::new(
                lora(),
                TargetConfig::list(["embed", "conv1", "grouped", "up", "conv2", "head"])
                    .with_rank_pattern("up", 5)
                    .with_alpha_pattern("conv1", 7.0),
            )
            .with_target_parameters(["experts.weight"])
            .with_modules_to_save(["norm"])
            .with_bias(BiasMode::LoraOnly),
        ),
        (
            "llama-modules-to-save",
            "the head and a norm saved whole",
            "untied",
            on(&["q_proj"]).with_modules_to_save(["lm_head", "model.norm"]),
        ),
        (
            "llama-bias",
            "`bias: \"all\"`",
            "untied",
            on(&["q_proj"]).with_bias(BiasMode::All),
        ),
        (
            "llama-embedding-lora",
            "LoRA on the embedding and the head",
            "untied",
            on(&["embed_tokens", "lm_head"]),
        ),
        (
            "llama-tokens-tied",
            "trained tokens, which the tied head shares",
            "tied",
            on(&["q_proj"]).with_trainable_tokens(TrainableTokens::Input(vec![3, 1])),
        ),
        (
            "llama-tokens-untied",
            "trained tokens of the embedding and of the head",
            "untied",
            on(&["q_proj"])
                .with_trainable_tokens(tokens(&[("embed_tokens", &[3, 1]), ("lm_head", &[5])])),
        ),
        (
            "llama-tied-weights",
            "`ensure_weight_tying` of a saved embedding",
            "tied",
            on(&["q_proj"])
                .with_modules_to_save(["embed_tokens"])
                .with_ensure_weight_tying(true),
        ),
        (
            "llama-tied-lora",
            "`ensure_weight_tying` of LoRA on the embedding",
            "tied",
            on(&["q_proj", "embed_tokens"]).with_ensure_weight_tying(true),
        ),
    ]
}

/// Writes every case, in the form that `scripts/check_kinds.py` reads, and returns how many there are.
pub fn write_all(kinds: &Path, out: &Path, device: &Device) -> Outcome<usize> {
    let mut written = Vec::new();
    for (name, what, base, config) in cases() {
        let dir = out.join(name);
        let run = |error: Box<dyn std::error::Error>| format!("{name}: {error}");
        match base {
            "tied" | "untied" => {
                let tokens = tokens(8, device);
                let base = kinds.join("../llama").join(base);
                let (_, base) = LlamaForCausalLm::from_pretrained(&base, device)?;
                let model = base.into_peft();
                write_case(&dir, model, &config, tokens, |model, x| {
                    model.forward(x).into_data()
                })
                .map_err(run)?;
            }
            base => {
                let transposed = base == "kinds-transposed";
                let layout = match transposed {
                    true => ExpertLayout::InOut,
                    false => ExpertLayout::OutIn,
                };
                let tokens = tokens(7, device);
                let model = PeftModel::new(Kinds::load(kinds, transposed, device)?);
                write_case(
                    &dir,
                    model
                        .with_expert_layout(layout)
                        .with_conv_groups("grouped", 3),
                    &config,
                    tokens,
                    |model, x| model.forward_peft(x).into_data(),
                )
                .map_err(run)?;
            }
        }
        written
            .push(serde_json::json!({ "name": name, "what": what, "adapter": name, "base": base }));
    }
    write_json(&out.join("kinds.json"), &written)?;
    Ok(written.len())
}

/// Three rows of tokens of the smallest vocabulary.
fn tokens(length: usize, device: &Device) -> Tensor<2, Int> {
    let tokens: Vec<i64> = (0..3 * length as i64)
        .map(|place| (place * 7 + 3) % 11)
        .collect();
    Tensor::from_data(TensorData::new(tokens, [3, length]), device)
}

fn write_case<M: Module>(
    dir: &Path,
    fresh: PeftModel<M>,
    config: &PeftConfig,
    tokens: Tensor<2, Int>,
    forward: impl Fn(&PeftModel<M>, Tensor<2, Int>) -> TensorData,
) -> Outcome<()> {
    let mut model = fresh.clone();
    trained_as(&mut model, DEFAULT_ADAPTER, config, true)?;
    let outputs = forward(&model, tokens.clone());
    let at = model.save_adapter(DEFAULT_ADAPTER, dir, &SaveOptions::default())?;
    let mut read = fresh;
    read.load_adapter(DEFAULT_ADAPTER, &at, &LoadOptions::default())?;
    let again = forward(&read, tokens.clone());
    let pairs = outputs.iter::<f32>().zip(again.iter::<f32>());
    let error = pairs.fold(0f32, |most, (a, b)| most.max((a - b).abs()));
    if error.is_nan() || error > 1e-4 {
        return Err(format!("read again, the outputs differ by {error}").into());
    }
    let tokens = tokens.into_data().convert::<i64>();
    write(
        &dir.join("outputs.safetensors"),
        &[("tokens", &tokens), ("adapted", &again)],
    )
}
