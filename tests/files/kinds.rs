//! Adapters of PEFT for every kind of layer and parameter: outputs, gradients and merges are PEFT's, and what was read is
//! written as it was.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Device, Gradients, Int, Tensor, TensorData};
use burn_peft::adapter::LoraConfig;
use burn_peft::format::{LoadOptions, SaveOptions, WEIGHTS_FILE};
use burn_peft::layer::ExpertLayout;
use burn_peft::model::{PeftConfig, PeftModel, TargetConfig, TrainableTokens};
use safetensors::{Dtype, SafeTensors};

use super::kinds_model::Kinds;
use llama::model::LlamaForCausalLm;

/// The cases on the small model, and whether their experts are `[E, in, out]`.
const CASES: [(&str, bool); 22] = [
    ("embedding", false),
    ("embedding-rslora", false),
    ("embedding-dora", false),
    ("conv1d", false),
    ("conv2d", false),
    ("conv-dora", false),
    ("grouped", false),
    ("lora-bias", false),
    ("bias-lora-only", false),
    ("bias-all", false),
    ("modules-to-save", false),
    ("saved-bias", false),
    ("tokens-list", false),
    ("tokens-dict", false),
    ("tokens-with-lora", false),
    ("experts-one", false),
    ("experts-two", false),
    ("experts-transposed", true),
    ("experts-bare", false),
    ("experts-patterns", false),
    ("everything", false),
    ("everything-bias", false),
];

/// Those that are no changes of weights: a bias of B, or an `A` that sees the channels of all groups.
const FACTORED_ONLY: [&str; 4] = ["lora-bias", "grouped", "everything", "everything-bias"];

fn dir(case: &str) -> PathBuf {
    crate::golden("kinds").join(case)
}

fn model(transposed: bool, device: &Device) -> PeftModel<Kinds> {
    let layout = match transposed {
        true => ExpertLayout::InOut,
        false => ExpertLayout::OutIn,
    };
    let model = Kinds::load(&crate::golden("kinds"), transposed, device).unwrap();
    PeftModel::new(model)
        .with_expert_layout(layout)
        .with_conv_groups("grouped", 3)
}

fn loaded(case: &str, transposed: bool, device: &Device) -> PeftModel<Kinds> {
    let mut model = model(transposed, device);
    let options = LoadOptions::new().with_trainable(true);
    let report = model.load_adapter("default", dir(case), &options);
    report.unwrap_or_else(|error| panic!("{case}: {error}"));
    model
}

/// The tensors of a file.
pub(super) struct Tensors(pub(super) BTreeMap<String, TensorData>);

impl Tensors {
    pub(super) fn read(path: &Path) -> Self {
        let bytes = fs::read(path).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let tensors = file.tensors().into_iter().map(|(name, view)| {
            let shape = view.shape().to_vec();
            let data = match view.dtype() {
                Dtype::F32 => {
                    let values = view.data().chunks_exact(4);
                    let values = values.map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()));
                    TensorData::new(values.collect::<Vec<_>>(), shape)
                }
                Dtype::I64 => {
                    let values = view.data().chunks_exact(8);
                    let values = values.map(|bytes| i64::from_le_bytes(bytes.try_into().unwrap()));
                    TensorData::new(values.collect::<Vec<_>>(), shape)
                }
                other => panic!("{name}: {other:?}"),
            };
            (name, data)
        });
        Self(tensors.collect())
    }

    pub(super) fn get(&self, name: &str) -> &TensorData {
        &self.0[name]
    }
}

/// `|found - expected|` at most `bound` times the largest of `expected`.
pub(super) fn check(what: &str, found: &TensorData, expected: &TensorData, bound: f32) {
    assert_eq!(found.shape(), expected.shape(), "{what}");
    let largest = expected
        .iter::<f32>()
        .fold(0f32, |most, x| most.max(x.abs()));
    let pairs = found.iter::<f32>().zip(expected.iter::<f32>());
    let error = pairs.fold(0f32, |most, (a, b)| most.max((a - b).abs()));
    assert!(error <= bound * largest, "{what}: {error} of {largest}");
}

/// Sums of at most 360 products of f32, in another order than torch's, through eight layers.
const BOUND: f32 = 1e-5;

#[test]
fn outputs_and_merges_are_those_of_peft_in_both_ways() {
    let device = Device::flex();
    for (case, transposed) in CASES {
        let golden = Tensors::read(&dir(case).join("outputs.safetensors"));
        let tokens = Tensor::<2, Int>::from_data(golden.get("tokens").clone(), &device);
        let model = loaded(case, transposed, &device);
        let expected = golden.get("adapted");
        let factored = model.forward_peft(tokens.clone()).into_data();
        check(case, &factored, expected, BOUND);
        if !FACTORED_ONLY.contains(&case) {
            let composed = model.forward(tokens.clone()).into_data();
            check(&format!("{case} composed"), &composed, expected, BOUND);
        }
        let base = model.disabled().forward_peft(tokens.clone()).into_data();
        check(&format!("{case} base"), &base, golden.get("base"), BOUND);
        if let Some(expected) = golden.0.get("merged") {
            let (merged, _) = model.merged().unwrap();
            let merged = merged.forward(tokens).into_data();
            check(&format!("{case} merged"), &merged, expected, BOUND);
        }
    }
}

/// The gradients of all parameters that train, as a file of PEFT holds those parameters: by what they become when the
/// gradients are put in the parameters' places and saved.
pub(super) fn saved_gradients<M: Module>(model: PeftModel<M>, gradients: &Gradients) -> Tensors {
    struct Replace<'a>(&'a Gradients);

    impl burn::module::ModuleMapper for Replace<'_> {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let id = param.id;
            let value = param.val();
            let gradient = value.grad(self.0).expect("a gradient of what trains");
            Param::initialized(id, gradient)
        }
    }

    let model = model
        .adapters_only()
        .map(&mut Replace(gradients))
        .into_inner();
    let scratch = tempfile::tempdir().unwrap();
    let dir = model.save_adapter("default", scratch.path(), &SaveOptions::default());
    Tensors::read(&dir.unwrap().join(WEIGHTS_FILE))
}

#[test]
fn gradients_are_those_of_peft_in_both_ways() {
    let device = Device::flex().autodiff();
    for (case, transposed) in CASES {
        let golden = Tensors::read(&dir(case).join("gradients.safetensors"));
        let tokens = Tensors::read(&dir(case).join("outputs.safetensors"));
        let tokens = Tensor::<2, Int>::from_data(tokens.get("tokens").clone(), &device);
        let weights = Tensor::<2>::from_data(golden.get("weights").clone(), &device);
        for composed in [false, true] {
            if composed && FACTORED_ONLY.contains(&case) {
                continue;
            }
            let model = loaded(case, transposed, &device);
            let y = match composed {
                true => model.forward(tokens.clone()),
                false => model.forward_peft(tokens.clone()),
            };
            let gradients = (y * weights.clone()).sum().backward();
            let found = saved_gradients(model, &gradients);
            for (name, expected) in &golden.0 {
                if name != "weights" {
                    let what = format!("{case} {name}, composed {composed}");
                    let found = found.0.get(name).unwrap_or_else(|| panic!("{what}: none"));
                    check(&what, found, expected, 2.0 * BOUND);
                }
            }
            assert_eq!(found.0.len(), golden.0.len() - 1, "{case}");
        }
    }
}

/// What each case of a Llama is: its name, and whether its head is its embedding.
const LLAMAS: [(&str, bool); 8] = [
    ("llama-modules-to-save", false),
    ("llama-bias", false),
    ("llama-tokens-tied", true),
    ("llama-tokens-untied", false),
    ("llama-tied-weights", true),
    ("llama-tied-lora", true),
    ("llama-embedding-lora", false),
    ("llama-embedding-lora-base", false),
];

#[test]
fn embeddings_heads_and_tied_weights_of_a_llama_are_as_in_peft() {
    let device = Device::flex();
    for (case, tied) in LLAMAS {
        let base = crate::golden("llama").join(if tied { "tied" } else { "untied" });
        let (_, base) = LlamaForCausalLm::from_pretrained(&base, &device).unwrap();
        let golden = Tensors::read(&dir(case).join("outputs.safetensors"));
        let tokens = Tensor::<2, Int>::from_data(golden.get("tokens").clone(), &device);
        let mut model = PeftModel::new(base.clone());
        let options = LoadOptions::default();
        let report = model.load_adapter("default", dir(case), &options);
        let report = report.unwrap_or_else(|error| panic!("{case}: {error}"));
        let files = Tensors::read(&dir(case).join(WEIGHTS_FILE));
        assert_eq!(report.loaded.len(), files.0.len(), "{case}");
        let found = model.forward(tokens.clone()).into_data();
        // Logits of two layers; those of other goldens differ by as much.
        check(case, &found, golden.get("adapted"), 1e-5);
        if let Some(expected) = golden.0.get("merged") {
            let (merged, _) = model.merged().unwrap();
            check(
                case,
                &merged.forward(tokens.clone()).into_data(),
                expected,
                1e-5,
            );
        }
        // And out again, with the same tensors.
        let scratch = tempfile::tempdir().unwrap();
        let saved = model.save_adapter("default", scratch.path(), &SaveOptions::default());
        let saved = saved.unwrap_or_else(|error| panic!("{case}: {error}"));
        let written = Tensors::read(&saved.join(WEIGHTS_FILE));
        assert_eq!(written.0, files.0, "{case}");
    }
}

#[test]
fn what_peft_does_not_have_is_refused_when_it_is_added() {
    let device = Device::flex();
    let lora = || LoraConfig::new(2);
    let dora = || lora().with_dora(true);
    let on = |lora, name: &str| PeftConfig::new(lora, TargetConfig::list([name]));
    for (config, part) in [
        (
            on(lora(), "embed").with_trainable_tokens(TrainableTokens::Input(vec![1])),
            "tokens of `embed`, which has factors too",
        ),
        (
            on(dora(), "embed").with_ensure_weight_tying(true),
            "ensure_weight_tying = true: expected false with DoRA",
        ),
        (on(dora(), "grouped"), "dora of `grouped`"),
    ] {
        let mut model = model(false, &device);
        let error = model.add_adapter("default", &config).unwrap_err();
        let error = error.to_string();
        assert!(error.contains(part), "{error}: not {part}");
        assert_eq!(model.adapters().count(), 0);
    }
}

/// Whatever a file says of groups, a forward pass has the channels that it needs.
#[test]
fn an_adapter_of_other_groups_than_the_convolution_has_does_not_fit() {
    let device = Device::flex();
    // Without a word the groups are those that the layer shows.
    let kinds = Kinds::load(&crate::golden("kinds"), false, &device).unwrap();
    let mut model = PeftModel::new(kinds);
    let report = model.load_adapter("default", dir("grouped"), &LoadOptions::default());
    assert!(report.unwrap().is_complete());
    for groups in [1, 2, 4, usize::MAX] {
        let model = Kinds::load(&crate::golden("kinds"), false, &device).unwrap();
        let mut model = PeftModel::new(model).with_conv_groups("grouped", groups);
        let error = model.load_adapter("default", dir("grouped"), &LoadOptions::default());
        let error = error.unwrap_err().to_string();
        assert!(error.contains("2 mismatched"), "{groups}: {error}");
        assert_eq!(model.adapters().count(), 0);
    }
}

#[test]
fn an_adapter_that_mixes_groups_is_neither_merged_nor_taken_for_the_base() {
    let model = loaded("grouped", false, &Device::flex());
    for error in [
        model.merged().unwrap_err(),
        model.base_reference().unwrap_err(),
    ] {
        assert!(error.to_string().contains("groups of `grouped`"), "{error}");
    }
}

struct Trainable(Vec<bool>);

impl ModuleVisitor for Trainable {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.0.push(param.is_require_grad());
    }
}

#[test]
fn what_was_read_is_written_with_the_same_tensors_and_loads_to_the_same_outputs() {
    let device = Device::flex();
    for (case, transposed) in CASES {
        let model = loaded(case, transposed, &device);
        let scratch = tempfile::tempdir().unwrap();
        let saved = model.save_adapter("default", scratch.path(), &SaveOptions::default());
        let saved = saved.unwrap_or_else(|error| panic!("{case}: {error}"));
        let written = Tensors::read(&saved.join(WEIGHTS_FILE));
        let mut golden = Tensors::read(&dir(case).join(WEIGHTS_FILE));
        // PEFT does not read these again.
        golden.0.retain(|key, _| {
            !key.contains(".original_module.") && !key.contains(".modules_to_save.")
        });
        assert_eq!(written.0, golden.0, "{case}");
        let mut again = self::model(transposed, &device);
        let options = LoadOptions::default();
        again.load_adapter("default", &saved, &options).unwrap();
        let tokens = Tensors::read(&dir(case).join("outputs.safetensors"));
        let tokens = Tensor::<2, Int>::from_data(tokens.get("tokens").clone(), &device);
        let outputs = [&model, &again].map(|model| model.forward_peft(tokens.clone()).into_data());
        assert_eq!(outputs[0], outputs[1], "{case}");
    }
}

#[test]
fn only_the_active_adapter_trains_and_the_base_never_does() {
    let device = Device::flex().autodiff();
    for (case, transposed) in CASES {
        let mut model = loaded(case, transposed, &device);
        let count = model.changes("default").unwrap().len();
        assert!(count > 0);
        let trainable = |model: &PeftModel<Kinds>| {
            let mut seen = Trainable(Vec::new());
            model.clone().adapters_only().visit(&mut seen);
            assert_eq!(
                model.report().trainable_params > 0,
                seen.0.iter().any(|trains| *trains)
            );
            seen.0.iter().filter(|trains| **trains).count()
        };
        assert!(trainable(&model) >= count, "{case}");
        model.set_adapters(&[]).unwrap();
        assert_eq!(trainable(&model), 0, "{case}");
    }
}
