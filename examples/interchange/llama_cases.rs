//! The cases on a small Llama: every option of LoRA on linear layers.

use burn::tensor::FloatDType;
use burn_peft::adapter::{Combination, LoraConfig, LoraInit, Slices, Truncation};
use burn_peft::model::{DEFAULT_ADAPTER, PeftConfig, PeftModel, TargetConfig};

use super::{Outcome, trained_as};
use llama::model::LlamaForCausalLm;

type Model = PeftModel<LlamaForCausalLm>;

/// A case: its name, what it shows, the adapter's name, and how it comes to be in a model.
pub type Case = (
    &'static str,
    &'static str,
    &'static str,
    fn(&mut Model) -> Outcome<()>,
);

pub const CASES: [Case; 26] = [
    (
        "lora",
        "LoRA on q and v, `α ≠ r`",
        DEFAULT_ADAPTER,
        |model| {
            let lora = LoraConfig::new(4).with_alpha(10.0);
            trained(
                model,
                DEFAULT_ADAPTER,
                lora,
                TargetConfig::list(["q_proj", "v_proj"]),
            )
        },
    ),
    (
        "fraction",
        "a fractional `α`, and dropout",
        DEFAULT_ADAPTER,
        |model| {
            let lora = LoraConfig::new(3).with_alpha(4.5).with_dropout(0.25);
            trained(
                model,
                DEFAULT_ADAPTER,
                lora,
                TargetConfig::list(["o_proj", "down_proj"]),
            )
        },
    ),
    (
        "rslora",
        "rsLoRA on all linear layers",
        DEFAULT_ADAPTER,
        |model| {
            let lora = LoraConfig::new(4).with_alpha(3.0).with_rslora(true);
            trained(model, DEFAULT_ADAPTER, lora, TargetConfig::all_linear())
        },
    ),
    (
        "dora",
        "DoRA on all linear layers",
        DEFAULT_ADAPTER,
        |model| {
            let lora = LoraConfig::new(4).with_dora(true);
            trained(model, DEFAULT_ADAPTER, lora, TargetConfig::all_linear())
        },
    ),
    (
        "dora-rslora",
        "DoRA with rsLoRA's scale",
        DEFAULT_ADAPTER,
        |model| {
            let lora = LoraConfig::new(2).with_dora(true).with_rslora(true);
            trained(
                model,
                DEFAULT_ADAPTER,
                lora,
                TargetConfig::list(["up_proj", "k_proj"]),
            )
        },
    ),
    ("bf16", "factors in bf16", DEFAULT_ADAPTER, |model| {
        let lora = LoraConfig::new(4).with_dtype(FloatDType::BF16);
        trained(
            model,
            DEFAULT_ADAPTER,
            lora,
            TargetConfig::list(["q_proj", "gate_proj"]),
        )
    }),
    (
        "patterns",
        "`rank_pattern` and `alpha_pattern`",
        DEFAULT_ADAPTER,
        |model| {
            let targets = TargetConfig::list(["q_proj", "k_proj", "down_proj"])
                .with_rank_pattern("down_proj", 2)
                .with_rank_pattern(r"layers\.1\.self_attn\.q_proj", 6)
                .with_alpha_pattern("k_proj", 1.5);
            trained(model, DEFAULT_ADAPTER, LoraConfig::new(4), targets)
        },
    ),
    (
        "expression",
        "`target_modules` as an expression, with look-ahead",
        DEFAULT_ADAPTER,
        |model| {
            let targets = TargetConfig::regex(r".*\.(?!o_proj)\w_proj");
            trained(model, DEFAULT_ADAPTER, LoraConfig::new(4), targets)
        },
    ),
    ("exclude", "`exclude_modules`", DEFAULT_ADAPTER, |model| {
        let targets = TargetConfig::list(["q_proj", "v_proj"])
            .with_exclude_modules(["layers.0.self_attn.v_proj"]);
        trained(model, DEFAULT_ADAPTER, LoraConfig::new(4), targets)
    }),
    (
        "layers",
        "`layers_to_transform`",
        DEFAULT_ADAPTER,
        |model| {
            let targets = TargetConfig::list(["q_proj", "v_proj"]).with_layers_to_transform([1]);
            trained(model, DEFAULT_ADAPTER, LoraConfig::new(4), targets)
        },
    ),
    ("head", "the output head", DEFAULT_ADAPTER, |model| {
        let targets = TargetConfig::list(["lm_head", "q_proj"]);
        trained(model, DEFAULT_ADAPTER, LoraConfig::new(4), targets)
    }),
    (
        "random",
        "`init_lora_weights: false`, untrained",
        DEFAULT_ADAPTER,
        |model| {
            let lora = LoraConfig::new(4).with_init(LoraInit::Random);
            let config = PeftConfig::new(lora, TargetConfig::list(["q_proj"]));
            model.add_adapter(DEFAULT_ADAPTER, &config)?;
            Ok(())
        },
    ),
    (
        "named",
        "an adapter of another name, in its folder",
        "second",
        |model| {
            let lora = LoraConfig::new(4);
            trained(model, "second", lora, TargetConfig::list(["q_proj"]))
        },
    ),
    (
        "cat",
        "two adapters concatenated, of ranks and modules that differ",
        "both",
        |model| {
            two(model)?;
            Ok(model.add_weighted_adapter(
                "both",
                &[("one", 0.5), ("two", -1.5)],
                Combination::Cat,
            )?)
        },
    ),
    (
        "linear",
        "two adapters combined factor by factor",
        "both",
        |model| {
            two(model)?;
            let adapters = [("one", 0.5), ("third", 1.5)];
            Ok(model.add_weighted_adapter("both", &adapters, Combination::Linear)?)
        },
    ),
    (
        "svd",
        "two adapters combined by SVD, of ranks and modules that differ",
        "both",
        |model| {
            two(model)?;
            let adapters = [("one", 0.5), ("two", -1.5)];
            model.add_weighted_adapter_svd(
                "both",
                &adapters,
                Combination::Linear,
                Truncation::Rank(5),
            )?;
            Ok(())
        },
    ),
    (
        "ties-svd",
        "TIES on the changes, then SVD within 10 %",
        "both",
        |model| {
            two(model)?;
            let ties = Combination::Ties {
                density: 0.5,
                sign: Default::default(),
            };
            let adapters = [("one", 1.0), ("third", 1.0)];
            model.add_weighted_adapter_svd("both", &adapters, ties, Truncation::Within(0.1))?;
            Ok(())
        },
    ),
    (
        "dora-as-lora",
        "a DoRA as the plain LoRA nearest to it",
        "plain",
        |model| {
            let targets = TargetConfig::list(["q_proj", "down_proj"]);
            trained(model, "dora", LoraConfig::new(4).with_dora(true), targets)?;
            model.add_lora_of("plain", &[("dora", 1.0)], Truncation::Within(0.2))?;
            Ok(())
        },
    ),
    (
        "slices",
        "LoRA on two of four slices of the outputs",
        DEFAULT_ADAPTER,
        |model| {
            let lora = LoraConfig::new(2).with_slices(Slices::equal([true, false, true, false]));
            trained(
                model,
                DEFAULT_ADAPTER,
                lora,
                TargetConfig::list(["q_proj", "up_proj"]),
            )
        },
    ),
    (
        "freeze-a",
        "LoRA-FA: a frozen `A`",
        DEFAULT_ADAPTER,
        |model| {
            let lora = LoraConfig::new(4).with_freeze_a(true);
            trained(model, DEFAULT_ADAPTER, lora, TargetConfig::list(["q_proj"]))
        },
    ),
    (
        "digest",
        "a digest of both files in the metadata",
        DEFAULT_ADAPTER,
        |model| {
            trained(
                model,
                DEFAULT_ADAPTER,
                LoraConfig::new(4),
                TargetConfig::list(["v_proj", "o_proj"]),
            )
        },
    ),
    (
        "gaussian",
        "`init_lora_weights: \"gaussian\"`",
        DEFAULT_ADAPTER,
        |model| begun(model, LoraInit::Gaussian),
    ),
    (
        "orthogonal",
        "orthogonal initialisation",
        DEFAULT_ADAPTER,
        |model| begun(model, LoraInit::Orthogonal),
    ),
    ("pissa", "PiSSA, converted", DEFAULT_ADAPTER, |model| {
        begun(model, LoraInit::Pissa)
    }),
    (
        "pissa-fast",
        "PiSSA by a randomised SVD, converted",
        DEFAULT_ADAPTER,
        |model| begun(model, LoraInit::PissaFast { iterations: 4 }),
    ),
    ("olora", "OLoRA, converted", DEFAULT_ADAPTER, |model| {
        begun(model, LoraInit::Olora)
    }),
];

/// Adds an adapter whose values are as if it had been trained.
fn trained(model: &mut Model, name: &str, lora: LoraConfig, targets: TargetConfig) -> Outcome<()> {
    trained_as(model, name, &PeftConfig::new(lora, targets), true)
}

/// An adapter that began with this initialisation and has moved a little since.
fn begun(model: &mut Model, init: LoraInit) -> Outcome<()> {
    let lora = LoraConfig::new(4).with_init(init);
    let config = PeftConfig::new(lora, TargetConfig::list(["q_proj", "down_proj"]));
    trained_as(model, DEFAULT_ADAPTER, &config, false)
}

/// Adapters to combine: `one` and `third` of one rank, `two` of another and on other modules.
fn two(model: &mut Model) -> Outcome<()> {
    let list = |names: [&str; 2]| TargetConfig::list(names);
    trained(
        model,
        "one",
        LoraConfig::new(4).with_alpha(2.0),
        list(["q_proj", "v_proj"]),
    )?;
    trained(
        model,
        "two",
        LoraConfig::new(2).with_rslora(true),
        list(["v_proj", "up_proj"]),
    )?;
    trained(
        model,
        "third",
        LoraConfig::new(4),
        list(["v_proj", "up_proj"]),
    )
}
