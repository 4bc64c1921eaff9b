//! The Llama of the examples against transformers; the goldens are made by `tests/golden/llama/generate.py`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{DType, Device, FloatDType, Int, Tensor, TensorData};
use burn_peft::PeftError;
use burn_peft::format::{BaseOptions, IndexFault};
use burn_peft::model::{PeftModel, TargetConfig};
use burn_peft::nf4::Nf4Config;
use burn_peft::objective::{HeadChunks, sft_loss};
use burn_peft::rollout::{Sampler, Stop, generate};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use tempfile::TempDir;

use llama::attention::Layout;
use llama::config::{Llama3Scaling, LlamaConfig, RopeConfig};
use llama::error::LlamaError;
use llama::model::LlamaForCausalLm;
use llama::rope::{Rotation, inverse_frequencies};
use llama::save::SavedType;

const MODELS: [&str; 2] = ["untied", "tied"];

/// Logits of these models reach 13, where one ulp of f32 is 9.5e-7. Each is the end of a chain of some ten sums of 32
/// to 64 terms whose order differs from PyTorch's, which moves it by a few ulp (seen: 8e-6).
const LOGITS: f32 = 2e-5;

fn golden(path: &str) -> PathBuf {
    crate::golden("llama").join(path)
}

/// The tensors of a file.
fn read(path: &Path) -> BTreeMap<String, TensorData> {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    file.iter()
        .map(|(name, view)| {
            let dtype = match view.dtype() {
                Dtype::F32 => DType::F32,
                Dtype::BF16 => DType::BF16,
                Dtype::I64 => DType::I64,
                other => panic!("{name}: {other}"),
            };
            let data =
                TensorData::from_bytes_vec(view.data().to_vec(), view.shape().to_vec(), dtype);
            (name.to_owned(), data)
        })
        .collect()
}

fn write(path: &Path, tensors: &BTreeMap<String, TensorData>) {
    let views = tensors.iter().map(|(name, data)| {
        let dtype = match data.dtype() {
            DType::F32 => Dtype::F32,
            DType::BF16 => Dtype::BF16,
            DType::I64 => Dtype::I64,
            other => panic!("{name}: {other:?}"),
        };
        let view = TensorView::new(dtype, data.shape().to_vec(), data.as_bytes()).unwrap();
        (name.as_str(), view)
    });
    std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

fn load(name: &str) -> (LlamaConfig, LlamaForCausalLm) {
    LlamaForCausalLm::from_pretrained(golden(name), &Device::default()).unwrap()
}

fn largest_difference(a: &TensorData, b: &TensorData) -> f32 {
    assert_eq!(a.shape(), b.shape());
    assert!(a.num_elements() > 0);
    a.iter::<f32>()
        .zip(b.iter::<f32>())
        .map(|(a, b)| (a - b).abs())
        // Not `f32::max`, which drops NaN.
        .fold(0.0, |largest, difference| {
            if difference <= largest {
                largest
            } else {
                difference
            }
        })
}

fn tokens(data: &TensorData) -> Vec<u32> {
    data.iter::<i64>().map(|token| token as u32).collect()
}

fn batch(rows: &[&[u32]]) -> Tensor<2, Int> {
    let values: Vec<i64> = rows
        .iter()
        .flat_map(|row| row.iter().map(|&token| token.into()))
        .collect();
    Tensor::from_data(
        TensorData::new(values, [rows.len(), rows[0].len()]),
        &Device::default(),
    )
}

/// The continuations of prompts, one each, without the stop token.
fn texts(
    model: &LlamaForCausalLm,
    prompts: &[Vec<u32>],
    sampler: &Sampler,
    stop: Stop,
    seed: u64,
) -> Vec<Vec<u32>> {
    let completions = generate(&mut model.decoder(), prompts, 1, sampler, &stop, seed).unwrap();
    let texts = completions.iter().map(|own| own.without_stop_token(&stop));
    texts.map(<[u32]>::to_vec).collect()
}

fn greedy(model: &LlamaForCausalLm, prompts: &[Vec<u32>], stop: Stop) -> Vec<Vec<u32>> {
    texts(model, prompts, &Sampler::greedy(), stop, 0)
}

/// The golden prompts and their greedy continuations, each made alone and without a cache.
fn continuations(name: &str) -> (Vec<Vec<u32>>, Vec<Vec<u32>>) {
    let golden = read(&golden(name).join("golden.safetensors"));
    (0..3)
        .map(|i| {
            (
                tokens(&golden[&format!("prompt.{i}")]),
                tokens(&golden[&format!("continuation.{i}")]),
            )
        })
        .unzip()
}

#[test]
fn rotation_equals_transformers() {
    let golden = read(&golden("rope.safetensors"));
    let device = Device::default();
    let tensor = |name: &str| Tensor::<4>::from_data(golden[name].clone(), &device);
    let positions = Tensor::<2, Int>::from_data(golden["positions"].clone(), &device);
    let plain = RopeConfig {
        theta: 10_000.0,
        scaling: None,
    };
    // Head width 16 gives wavelengths on both sides of the ramp and one on it.
    let stretched = RopeConfig {
        theta: 500_000.0,
        scaling: Some(Llama3Scaling {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 64,
        }),
    };
    for (name, config) in [("default", plain), ("llama3", stretched)] {
        let rotation = Rotation::new(&inverse_frequencies(&config, 16), positions.clone());
        for part in ["q", "k"] {
            let rotated = rotation.apply(tensor(part)).into_data();
            let difference = largest_difference(&rotated, &golden[&format!("{name}.{part}")]);
            // An ulp more or less in a frequency of 0.3 moves the angle at position 127 by 4e-6; values reach 4.
            assert!(difference <= 2e-5, "{name}.{part}: {difference}");
            // The rotation is not the identity, and the frequencies matter.
            assert!(largest_difference(&rotated, &golden[part]) > 1.0);
        }
    }
    assert!(largest_difference(&golden["default.q"], &golden["llama3.q"]) > 0.1);
}

#[test]
fn logits_equal_transformers() {
    for name in MODELS {
        let golden = read(&golden(name).join("golden.safetensors"));
        let (_, model) = load(name);
        let input = Tensor::<2, Int>::from_data(golden["input_ids"].clone(), &Device::default());
        let difference = largest_difference(&model.forward(input).into_data(), &golden["logits"]);
        println!("{name}: {difference:e}");
        assert!(difference <= LOGITS, "{name}: {difference}");
    }
}

#[test]
fn a_token_does_not_see_later_ones() {
    for name in MODELS {
        let (_, model) = load(name);
        let one = model.forward(batch(&[&[5, 6, 7, 8, 9]])).narrow(1, 0, 3);
        let other = model.forward(batch(&[&[5, 6, 7, 80, 90]])).narrow(1, 0, 3);
        // The same operations on the same numbers.
        assert_eq!(one.into_data(), other.into_data());
    }
}

#[test]
fn a_layout_says_where_tokens_stand_and_what_they_see() {
    let device = Device::default();
    // Two new tokens after one cached: the first row has no padding, the second two tokens of it.
    let layout = Layout::left_padded(&[0, 2], 2, 1, &device);
    let positions: Vec<i64> = layout.positions.into_data().iter().collect();
    assert_eq!(positions, [1, 2, 0, 0]);
    let hidden = layout.visible.hidden(&device);
    assert_eq!(hidden.dims(), [2, 1, 2, 3]);
    let hidden: Vec<bool> = hidden.into_data().iter().collect();
    let expected = [
        [false, false, true],
        [false, false, false],
        [true, true, true],
        [true, true, false],
    ];
    assert_eq!(hidden, expected.concat());
    // A single new token of a row without padding sees everything.
    let layout = Layout::causal(1, 5, &device);
    assert_eq!(layout.visible.of_row(0).first(), Some(&(0..6)));
}

#[test]
fn left_padding_changes_no_logit() {
    for name in MODELS {
        let (_, model) = load(name);
        let plain = model.forward(batch(&[&[5, 6, 7]])).into_data();
        let layout = Layout::left_padded(&[2, 0], 5, 0, &Device::default());
        let padded = model.forward_with(
            batch(&[&[33, 44, 5, 6, 7], &[1, 2, 3, 4, 5]]),
            &layout,
            None,
        );
        let padded = padded.narrow(0, 0, 1).narrow(1, 2, 3).into_data();
        let difference = largest_difference(&plain, &padded);
        // Masked scores become exact zeros, so that only the order of sums differs.
        assert!(difference <= LOGITS, "{name}: {difference}");
    }
}

#[test]
fn greedy_text_equals_transformers_one_by_one_and_batched() {
    for name in MODELS {
        let (_, model) = load(name);
        let (prompts, expected) = continuations(name);
        for (prompt, expected) in prompts.iter().zip(&expected) {
            let stop = Stop::new(expected.len());
            let text = greedy(&model, std::slice::from_ref(prompt), stop);
            assert_eq!(text, std::slice::from_ref(expected), "{name}");
        }
        assert_eq!(prompts.iter().map(Vec::len).collect::<Vec<_>>(), [9, 3, 6]);
        let texts = greedy(&model, &prompts, Stop::new(expected[0].len()));
        assert_eq!(texts, expected, "{name}");
    }
}

#[test]
fn generation_ends_at_eos_row_by_row() {
    let (_, model) = load("untied");
    let (prompts, expected) = continuations("untied");
    // A token that the first row meets in its middle: rows end where they first meet it, if at all.
    let eos = expected[0][5];
    let until = |text: &Vec<u32>| {
        text.iter()
            .copied()
            .take_while(|&token| token != eos)
            .collect()
    };
    let shortened: Vec<Vec<u32>> = expected.iter().map(until).collect();
    assert!(shortened[0].len() < 6 && shortened.iter().any(|text| text.len() == 12));
    let stop = Stop::new(12).with_tokens([eos]);
    assert_eq!(greedy(&model, &prompts, stop), shortened);
    assert!(greedy(&model, &[], Stop::new(12)).is_empty());
}

#[test]
fn sampling_follows_the_distribution_of_the_k_best() {
    let (_, model) = load("tied");
    let prompt = vec![3, 14, 15];
    let logits: Vec<f32> = model
        .forward(batch(&[&prompt]))
        .narrow(1, 2, 1)
        .into_data()
        .iter()
        .collect();
    let mut ranked: Vec<usize> = (0..logits.len()).collect();
    ranked.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    let (k, temperature, draws) = (3, 4.0, 600);
    let weights: Vec<f64> = ranked[..k]
        .iter()
        .map(|&i| (f64::from(logits[i]) / temperature).exp())
        .collect();
    let rows = vec![prompt.clone(); draws];
    let best = |k| Sampler::new().with_top_k(k).with_temperature(temperature);
    let drawn = texts(&model, &rows, &best(k), Stop::new(1), 7);
    for (rank, weight) in weights.iter().enumerate() {
        let p = weight / weights.iter().sum::<f64>();
        let count = drawn
            .iter()
            .filter(|text| text[0] as usize == ranked[rank])
            .count();
        // The seed is fixed, so this is no gamble; 4 standard deviations of a binomial share.
        let share = count as f64 / draws as f64;
        let bound = 4.0 * (p * (1.0 - p) / draws as f64).sqrt();
        assert!(
            (share - p).abs() < bound,
            "rank {rank}: {share}, expected {p} ± {bound}"
        );
        assert!(
            (0.05..0.9).contains(&p),
            "a flat enough distribution to tell: {p}"
        );
    }
    assert!(
        drawn
            .iter()
            .all(|text| ranked[..k].contains(&(text[0] as usize)))
    );

    // The seed decides the text; the single best token is the greedy one.
    let prompt = [prompt];
    let text = |seed, k| texts(&model, &prompt, &best(k), Stop::new(8), seed);
    assert_eq!(text(1, 20), text(1, 20));
    assert_ne!(text(1, 20), text(2, 20));
    assert_eq!(text(1, 1), greedy(&model, &prompt, Stop::new(8)));
}

#[test]
fn weights_are_packed_and_cast_as_they_are_read() {
    let device = Device::default();
    let targets = TargetConfig::all_linear();
    let nf4 = Nf4Config::new().with_double_quant(true);
    for name in MODELS {
        let options = BaseOptions::new().with_nf4(targets.clone(), nf4);
        let options = options.with_dtype(FloatDType::F32);
        let loaded = LlamaForCausalLm::from_pretrained_with(golden(name), &device, options);
        let mut afterwards = PeftModel::new(load(name).1);
        afterwards.quantize_nf4(&targets, &nf4).unwrap();
        let input = || batch(&[&[1, 2, 3, 95]]);
        assert_eq!(
            loaded.unwrap().1.forward(input()).into_data(),
            afterwards.module().forward(input()).into_data()
        );
        // As in the file.
        let options = BaseOptions::new();
        let (_, model) =
            LlamaForCausalLm::from_pretrained_with(golden(name), &device, options).unwrap();
        let dtype = model.forward(input()).dtype();
        assert_eq!(dtype == DType::BF16, name == "untied", "{dtype:?}");
    }
}

/// A copy of a golden model's directory.
fn copy(name: &str) -> TempDir {
    let dir = TempDir::new().unwrap();
    for entry in std::fs::read_dir(golden(name)).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    dir
}

fn load_error(dir: &TempDir) -> LlamaError {
    LlamaForCausalLm::from_pretrained(dir, &Device::default()).unwrap_err()
}

fn index_faults(dir: &TempDir) -> Vec<IndexFault> {
    match load_error(dir) {
        LlamaError::Base(PeftError::Index { faults, .. }) => faults,
        other => panic!("{other}"),
    }
}

#[test]
fn missing_unexpected_and_misshapen_tensors_are_named() {
    let dir = copy("tied");
    let path = dir.path().join("model.safetensors");
    let whole = read(&path);

    let mut tensors = whole.clone();
    let moved = tensors
        .remove("model.layers.1.self_attn.k_proj.weight")
        .unwrap();
    tensors.insert("model.layers.1.self_attn.k_proj.extra".into(), moved);
    write(&path, &tensors);
    match load_error(&dir) {
        LlamaError::Base(PeftError::BaseMismatch { report, .. }) => {
            let (missing, unexpected) = (report.missing, report.unexpected);
            assert_eq!(missing, ["model.layers.1.self_attn.k_proj.weight"]);
            assert_eq!(unexpected, ["model.layers.1.self_attn.k_proj.extra"]);
        }
        other => panic!("{other}"),
    }
    let message = load_error(&dir).to_string();
    assert!(
        message.contains("model.layers.1.self_attn.k_proj.weight"),
        "{message}"
    );

    // One too many and none too few.
    let mut tensors = whole.clone();
    tensors.insert(
        "model.layers.2.input_layernorm.weight".into(),
        TensorData::zeros::<f32, _>([32]),
    );
    write(&path, &tensors);
    let message = load_error(&dir).to_string();
    assert!(
        message.contains("model.layers.2.input_layernorm.weight"),
        "{message}"
    );

    // A matrix in Burn's layout instead of PyTorch's.
    let mut tensors = whole.clone();
    let name = "model.layers.0.mlp.gate_proj.weight";
    tensors.insert(name.into(), TensorData::zeros::<f32, _>([32, 40]));
    write(&path, &tensors);
    match load_error(&dir) {
        LlamaError::Base(PeftError::BaseMismatch { report, .. }) => {
            let [shape] = &report.shapes[..] else {
                panic!("{report}");
            };
            assert_eq!(
                (shape.tensor.as_str(), &shape.expected, &shape.found),
                (name, &vec![40, 32], &vec![32, 40])
            );
        }
        other => panic!("{other}"),
    }

    let mut tensors = whole.clone();
    tensors.insert(
        "model.norm.weight".into(),
        TensorData::zeros::<i64, _>([32]),
    );
    write(&path, &tensors);
    let error = load_error(&dir).to_string();
    assert!(
        error.contains("`model.norm.weight`") && error.contains("I64"),
        "{error}"
    );

    // As in transformers, a tied head is ignored and so is the table of old checkpoints.
    let mut tensors = whole;
    tensors.insert(
        "lm_head.weight".into(),
        TensorData::zeros::<f32, _>([96, 32]),
    );
    tensors.insert(
        "model.layers.0.self_attn.rotary_emb.inv_freq".into(),
        TensorData::zeros::<f32, _>([4]),
    );
    write(&path, &tensors);
    let (_, model) = LlamaForCausalLm::from_pretrained(&dir, &Device::default()).unwrap();
    let plain = load("tied").1.forward(batch(&[&[1, 2]])).into_data();
    assert_eq!(model.forward(batch(&[&[1, 2]])).into_data(), plain);
}

#[test]
fn an_untied_model_needs_its_head() {
    let dir = copy("tied");
    let path = dir.path().join("config.json");
    let config = std::fs::read_to_string(&path).unwrap();
    let untied = config.replace(
        "\"tie_word_embeddings\": true",
        "\"tie_word_embeddings\": false",
    );
    std::fs::write(&path, untied).unwrap();
    match load_error(&dir) {
        LlamaError::Base(PeftError::BaseMismatch { report, .. }) => {
            assert_eq!(report.missing, ["lm_head.weight"]);
            assert!(report.unexpected.is_empty());
        }
        other => panic!("{other}"),
    }
}

#[test]
fn broken_files_are_named() {
    let shard = "model-00002-of-00002.safetensors";
    let index = "model.safetensors.index.json";

    let dir = copy("untied");
    std::fs::remove_file(dir.path().join(shard)).unwrap();
    let fault = IndexFault::MissingShard { file: shard.into() };
    assert_eq!(index_faults(&dir), [fault]);

    // Every proper prefix of a shard is broken, wherever it is cut.
    let dir = copy("untied");
    let bytes = std::fs::read(golden("untied").join(shard)).unwrap();
    for length in (0..64)
        .chain((64..bytes.len()).step_by(997))
        .chain([bytes.len() - 1])
    {
        std::fs::write(dir.path().join(shard), &bytes[..length]).unwrap();
        match load_error(&dir) {
            LlamaError::Base(PeftError::Malformed { path, .. }) => assert!(path.ends_with(shard)),
            other => panic!("{length}: {other}"),
        }
    }

    let dir = copy("untied");
    let path = dir.path().join(index);
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace(shard, &format!("../{shard}"))).unwrap();
    let faults = index_faults(&dir);
    let leads_elsewhere = |fault: &IndexFault| matches!(fault, IndexFault::NotAFileName { .. });
    assert!(!faults.is_empty() && faults.iter().all(leads_elsewhere));

    // The same tensors under another file's name.
    let dir = copy("untied");
    std::fs::copy(
        dir.path().join("model-00001-of-00002.safetensors"),
        dir.path().join(shard),
    )
    .unwrap();
    let faults = index_faults(&dir);
    let duplicate = |fault: &IndexFault| matches!(fault, IndexFault::Duplicate { .. });
    assert!(faults.iter().any(duplicate), "{faults:?}");
}

#[test]
fn configurations_that_change_the_arithmetic_are_refused() {
    let text = std::fs::read_to_string(golden("tied").join("config.json")).unwrap();
    let path = Path::new("config.json");
    assert!(LlamaConfig::from_json(&text, path).is_ok());
    for (from, to, named) in [
        ("\"llama3\"", "\"yarn\"", "rope_type"),
        ("\"silu\"", "\"gelu\"", "hidden_act"),
        (
            "\"model_type\": \"llama\"",
            "\"model_type\": \"gemma\"",
            "model_type",
        ),
        (
            "\"num_key_value_heads\": 1",
            "\"num_key_value_heads\": 3",
            "num_key_value_heads",
        ),
        (
            "\"num_key_value_heads\": 1",
            "\"num_key_value_heads\": 0",
            "num_key_value_heads",
        ),
        ("\"head_dim\": 8", "\"head_dim\": 7", "head_dim"),
        ("\"factor\": 8.0,", "", "factor"),
        ("\"vocab_size\": 96", "\"vocab\": 96", "vocab_size"),
    ] {
        assert!(text.contains(from), "{from}");
        let error = LlamaConfig::from_json(&text.replace(from, to), path)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains(named) && error.contains("config.json"),
            "{error}"
        );
    }
}

#[test]
fn a_configuration_of_transformers_4_reads_the_same() {
    let text = std::fs::read_to_string(golden("tied").join("config.json")).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let map = json.as_object_mut().unwrap();
    let mut rope = map.remove("rope_parameters").unwrap();
    let theta = rope.as_object_mut().unwrap().remove("rope_theta").unwrap();
    map.insert("rope_theta".into(), theta);
    map.insert("rope_scaling".into(), rope);
    let path = Path::new("config.json");
    let old = LlamaConfig::from_json(&json.to_string(), path).unwrap();
    assert_eq!(old, LlamaConfig::from_json(&text, path).unwrap());
    assert_eq!(old.rope.theta, 500_000.0);
    assert!(old.rope.scaling.is_some());
}

#[test]
fn a_saved_model_loads_again() {
    for name in MODELS {
        let (config, model) = load(name);
        let dir = TempDir::new().unwrap();
        let target = dir.path().join("new");
        model
            .save_pretrained(&target, &config, SavedType::F32)
            .unwrap();
        let (again, loaded) =
            LlamaForCausalLm::from_pretrained(&target, &Device::default()).unwrap();
        assert_eq!(again, config);
        let input = || batch(&[&[1, 2, 3, 95]]);
        assert_eq!(
            model.forward(input()).into_data(),
            loaded.forward(input()).into_data()
        );

        // The file is the one transformers wrote: same names, layout and values.
        if name == "tied" {
            assert_eq!(
                read(&target.join("model.safetensors")),
                read(&golden("tied").join("model.safetensors"))
            );
        }

        model
            .save_pretrained(&target, &config, SavedType::BF16)
            .unwrap();
        for (key, data) in read(&target.join("model.safetensors")) {
            assert_eq!(data.dtype(), DType::BF16, "{key}");
        }
        if name == "untied" {
            // Its weights were bf16 to begin with.
            let (_, loaded) =
                LlamaForCausalLm::from_pretrained(&target, &Device::default()).unwrap();
            assert_eq!(
                model.forward(input()).into_data(),
                loaded.forward(input()).into_data()
            );
        }
    }
}

#[test]
fn saving_refuses_a_model_that_is_not_the_configuration() {
    let (mut config, model) = load("tied");
    config.intermediate_size = 48;
    let dir = TempDir::new().unwrap();
    let error = model
        .save_pretrained(&dir, &config, SavedType::F32)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("model.layers.0.mlp.down_proj.weight"),
        "{error}"
    );
    assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 0);
}

#[test]
fn a_model_made_in_code_has_every_parameter_trainable() {
    let device = Device::default().autodiff();
    let mut config = LlamaConfig::new(11, 8, 12, 2, 4, 2);
    config.attention_bias = true;
    let model = config.init(&device);
    let input = Tensor::<2, Int>::from_data(TensorData::from([[1_i64, 2, 3], [4, 5, 6]]), &device);
    let loss = model.forward(input).powf_scalar(2.0).sum();
    let grads = loss.backward();
    struct Check<'a>(&'a burn::tensor::Gradients, usize);
    impl ModuleVisitor for Check<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let grad = param.val().grad(self.0).expect("a gradient");
            let sum: f32 = grad.abs().sum().into_scalar();
            // A key's bias adds the same to every score of a query, but for the rotation; the rest is plainly moved.
            assert!(sum.is_finite() && sum > 0.0);
            self.1 += 1;
        }
    }
    let mut check = Check(&grads, 0);
    model.visit(&mut check);
    assert_eq!(check.1, 2 * (4 * 2 + 3 + 2) + 2);
}

/// The loss in chunks is that of the logits, with a head and with a tied one.
#[test]
fn the_loss_needs_no_logits() {
    let device = Device::default();
    for tied in [false, true] {
        let mut config = LlamaConfig::new(50, 32, 48, 2, 4, 2);
        config.tie_word_embeddings = tied;
        let model = config.init(&device);
        let tokens = Tensor::<1, Int>::arange(0..22, &device).reshape([2, 11]);
        let (input, targets) = (tokens.clone().narrow(1, 0, 10), tokens.narrow(1, 1, 10));
        let mask = targets.clone().remainder_scalar(3).greater_equal_elem(1);
        let expected = sft_loss(model.forward(input.clone()), targets.clone(), mask.clone());
        let chunks = HeadChunks::new(3, 16).unwrap();
        let found = model.loss(input, targets, mask, &chunks).unwrap();
        let expected = expected.unwrap();
        assert_eq!(found.count, expected.count);
        let [found, expected] = [found, expected].map(|loss| loss.sum.into_scalar::<f32>());
        // Sums in f32 of a few dozen terms.
        assert!(
            (found - expected).abs() < 1e-5 * expected,
            "{found}, not {expected}"
        );
    }
}
