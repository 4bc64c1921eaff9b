//! Dense compositions that are not wanted, or that would leave something out, name the layer.

use std::panic::{AssertUnwindSafe, catch_unwind};

use burn::module::Module;
use burn::tensor::Tensor;
use burn_peft::adapter::LoraConfig;
use burn_peft::model::{ComposeOptions, PeftConfig, PeftModel, TargetConfig};
use burn_peft::nf4::Nf4Config;

use super::{Net, adapted, adapted_as, device, input, max_diff, moved, values};

/// What a call panics with.
fn panic_of<T>(call: impl FnOnce() -> T) -> String {
    let Err(panic) = catch_unwind(AssertUnwindSafe(call)) else {
        panic!("it did not panic")
    };
    match panic.downcast::<String>() {
        Ok(text) => *text,
        Err(panic) => (*panic.downcast::<&str>().unwrap()).to_owned(),
    }
}

fn says(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part}: {text}");
    }
}

#[test]
fn a_composition_that_is_denied_names_the_layer_and_the_way_out() {
    let device = device();
    let x = input(&device);
    for packed in [false, true] {
        let mut model = PeftModel::new(Net::new(&device));
        if packed {
            model
                .quantize_nf4(&TargetConfig::list(["down"]), &Nf4Config::new())
                .unwrap();
        } else {
            adapted(&mut model, "default", TargetConfig::list(["down"]));
        }
        let allowed = model.forward(x.clone());
        model.deny_composed();
        let text = panic_of(|| model.forward(x.clone()));
        says(
            &text,
            &["`blocks.0.down.weight`", "deny_composed", "forward_peft"],
        );
        // Factored it runs, also in what follows from the model.
        let y = model.forward_peft(x.clone());
        assert!(max_diff(&y, &allowed) < 1e-4);
        let text = panic_of(|| model.clone().fork(&device).forward(x.clone()));
        says(&text, &["`blocks.0.down.weight`"]);
        // What is added later is denied too, and it can be taken back for one call.
        adapted(&mut model, "later", TargetConfig::list(["up"]));
        let text = panic_of(|| {
            model.blocks[1]
                .up
                .forward(Tensor::<2>::ones([1, 32], &device))
        });
        says(&text, &["`blocks.1.up.weight`"]);
        let once = model.with_compose_options(ComposeOptions::new());
        once.forward(x.clone());
        assert!(!once.compose_options().deny && model.compose_options().deny);
    }
}

#[test]
fn dropout_that_a_composed_weight_has_not_is_an_error_unless_allowed() {
    let device = device();
    let x = input(&device);
    let lora = LoraConfig::new(3).with_dropout(0.5);
    let config = PeftConfig::new(lora, TargetConfig::list(["up"]));
    let mut model = PeftModel::new(Net::new(&device));
    adapted_as(&mut model, "noisy", &config);
    let text = panic_of(|| model.forward(x.clone()));
    says(
        &text,
        &[
            "`blocks.0.up.weight`",
            "`noisy`",
            "dropout",
            "allow_without_dropout",
            "forward_peft",
        ],
    );
    // Where dropout does not act there is nothing to leave out.
    let quiet = model.valid();
    let y = quiet.forward(x.clone().inner());
    assert!(max_diff(&y, &quiet.forward_peft(x.clone().inner())) < 1e-4);
    model.disabled().forward(x.clone());
    let allowed =
        model.with_compose_options(ComposeOptions::new().with_allow_without_dropout(true));
    assert!(max_diff(&allowed.forward(x.clone()).inner(), &y) < 1e-4);
}

#[test]
fn a_bias_of_b_that_a_composed_weight_has_not_is_an_error_unless_allowed() {
    let device = device();
    let x = input(&device);
    let lora = LoraConfig::new(3).with_bias(true);
    let config = PeftConfig::new(lora, TargetConfig::list(["up"]));
    let mut model = PeftModel::new(Net::new(&device));
    model.add_adapter("biased", &config).unwrap();
    let changes = model.changes("biased").unwrap().into_iter();
    let changes = changes.map(|(path, change)| (path, moved(change)));
    model
        .swap_changes("biased", &config, changes.collect())
        .unwrap();
    let text = panic_of(|| model.forward(x.clone()));
    says(
        &text,
        &[
            "`blocks.0.up.weight`",
            "`biased`",
            "bias of B",
            "allow_without_bias",
            "forward_peft",
        ],
    );
    let allowed = model.with_compose_options(ComposeOptions::new().with_allow_without_bias(true));
    // The fresh bias is zero, so that both ways agree.
    let y = allowed.forward(x.clone());
    assert!(max_diff(&y, &model.forward_peft(x.clone())) < 1e-4);
    assert_ne!(values(&y), values(&model.disabled().forward(x)));
}
