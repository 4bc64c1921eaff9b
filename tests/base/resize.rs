//! Files and models with different numbers of tokens: on loading, and of a model that is there with its adapters.

use burn::module::{Module, Param};
use burn::nn::{Embedding, EmbeddingConfig, Linear, LinearConfig, LinearLayout};
use burn::tensor::{DType, Device, FloatDType, Int, Tensor, TensorData};
use burn_peft::PeftError;
use burn_peft::adapter::{Change, LoraConfig, Slices};
use burn_peft::format::{
    BASE_FILE, BaseOptions, BaseReport, Dtype, LoadOptions, SaveBaseOptions, SaveOptions,
};
use burn_peft::model::{
    NewRows, PeftConfig, PeftForward, PeftModel, TargetConfig, TrainableTokens,
};
use burn_peft::nf4::Nf4Config;

use crate::base::files::{self, Dir};
use crate::base::model::{content, plain, tensor};

/// Tokens, positions, a layer and a head.
#[derive(Module, Debug)]
struct Words {
    wte: Embedding,
    wpe: Embedding,
    up: Linear,
    lm_head: Linear,
}

impl Words {
    fn new(tokens: usize, layout: LinearLayout) -> Self {
        let device = &Device::flex();
        Self {
            wte: EmbeddingConfig::new(tokens, 8).init(device),
            wpe: EmbeddingConfig::new(7, 8).init(device),
            up: LinearConfig::new(8, 8).with_bias(false).init(device),
            lm_head: LinearConfig::new(8, tokens)
                .with_layout(layout)
                .init(device),
        }
    }

    fn forward(&self, tokens: Tensor<2, Int>) -> Tensor<3> {
        let x = self.wte.forward_peft(tokens);
        let x = self.up.forward_peft(x.clone()) + x;
        self.lm_head.forward_peft(x)
    }
}

fn given(tokens: usize, dtype: Dtype) -> Vec<files::Tensor> {
    [
        ("wte.weight", vec![tokens, 8]),
        ("wpe.weight", vec![7, 8]),
        ("up.weight", vec![8, 8]),
        ("lm_head.weight", vec![tokens, 8]),
        ("lm_head.bias", vec![tokens]),
    ]
    .into_iter()
    .map(|(name, shape)| tensor(name, dtype, &shape))
    .collect()
}

fn load_into(
    net: &mut Words,
    tensors: &[files::Tensor],
    options: &BaseOptions,
) -> Result<BaseReport, PeftError> {
    let dir = Dir::new();
    dir.tensors(BASE_FILE, tensors);
    dir.open()?.load_into(net, options)
}

fn resizing(new_rows: NewRows) -> BaseOptions {
    BaseOptions::new().with_resized_vocabulary(new_rows)
}

/// The rows of a table of a model, `[tokens, columns]`.
fn rows<M: Module>(model: &M, path: &str) -> Vec<Vec<f32>> {
    let data = content(model).floats[path].clone();
    let dims = data.shape().to_vec();
    let values: Vec<f32> = data.iter().collect();
    match (path, &dims[..]) {
        (_, [tokens]) => (0..*tokens).map(|i| vec![values[i]]).collect(),
        ("lm_head.weight", [columns, tokens]) => (0..*tokens)
            .map(|i| (0..*columns).map(|c| values[c * tokens + i]).collect())
            .collect(),
        (_, [_, columns]) => values.chunks(*columns).map(<[f32]>::to_vec).collect(),
        _ => panic!("{dims:?}"),
    }
}

const TABLES: [&str; 3] = ["wte.weight", "lm_head.weight", "lm_head.bias"];

#[test]
fn sixteen_rows_load_into_eighteen_and_eighteen_into_sixteen() {
    for (dtype, layout) in [
        (Dtype::F32, LinearLayout::Row),
        (Dtype::F32, LinearLayout::Col),
        (Dtype::BF16, LinearLayout::Row),
    ] {
        for (from, to) in [(16, 18), (18, 16), (16, 16)] {
            let tensors = given(from, dtype);
            let mut net = Words::new(to, layout);
            let report = load_into(&mut net, &tensors, &resizing(NewRows::default())).unwrap();
            assert_eq!(report.resized.len(), if from == to { 0 } else { 3 });
            for name in TABLES {
                let file = tensors.iter().find(|tensor| tensor.name == name).unwrap();
                let old: Vec<f32> = plain(file, DType::F32, false).iter().collect();
                let old: Vec<&[f32]> = old.chunks(old.len() / from).collect();
                let found = rows(&net, name);
                assert_eq!(found.len(), to);
                let both = from.min(to);
                assert!(
                    found[..both].iter().zip(&old).all(|(a, b)| a == b),
                    "{name}"
                );
                for row in &found[both..] {
                    for (column, value) in row.iter().enumerate() {
                        let mean =
                            old.iter().map(|row| f64::from(row[column])).sum::<f64>() / from as f64;
                        // Values are up to 30, of which √1e-9 is 1e-3.
                        let tolerance = if dtype == Dtype::F32 { 5e-3 } else { 0.1 };
                        assert!(
                            (f64::from(*value) - mean).abs() < tolerance,
                            "{name}: {value} {mean}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn new_rows_are_zeros_or_normal_or_near_the_mean_and_follow_from_their_seed() {
    let tensors = given(16, Dtype::F32);
    let new = |new_rows| {
        let mut net = Words::new(40, LinearLayout::Row);
        load_into(&mut net, &tensors, &resizing(new_rows)).unwrap();
        TABLES.map(|name| rows(&net, name)[16..].concat())
    };
    assert!(
        new(NewRows::Zeros)
            .concat()
            .iter()
            .all(|value| *value == 0.0)
    );
    let normal = new(NewRows::Normal { std: 0.02, seed: 1 });
    let variance: f32 = normal[0].iter().map(|v| v * v).sum::<f32>() / normal[0].len() as f32;
    assert!((variance.sqrt() / 0.02 - 1.0).abs() < 0.25, "{variance}");
    assert!(normal[2].iter().all(|value| *value == 0.0));
    let mean = |seed| new(NewRows::Mean { seed });
    assert_eq!(mean(3), mean(3));
    assert_ne!(mean(3), mean(4));
}

#[test]
fn only_tables_of_tokens_are_resized_and_only_when_asked() {
    let error = |tensors: &[files::Tensor], options: &BaseOptions| {
        let mut net = Words::new(18, LinearLayout::Row);
        load_into(&mut net, tensors, options)
            .unwrap_err()
            .to_string()
    };
    let text = error(&given(16, Dtype::F32), &BaseOptions::new());
    assert!(
        text.contains("3 of another shape") && text.contains("`with_resized_vocabulary`"),
        "{text}"
    );
    // Positions are no tokens, unless they are named.
    let mut tensors = given(16, Dtype::F32);
    tensors[1] = tensor("wpe.weight", Dtype::F32, &[5, 8]);
    let text = error(&tensors, &resizing(NewRows::Zeros));
    assert!(text.contains("1 of another shape: `wpe.weight`"), "{text}");
    let mut net = Words::new(18, LinearLayout::Row);
    let named = resizing(NewRows::Zeros).with_resized(["wpe.weight"]);
    assert_eq!(
        load_into(&mut net, &tensors, &named).unwrap().resized.len(),
        4
    );
    // Another width is another model.
    tensors[0] = tensor("wte.weight", Dtype::F32, &[16, 9]);
    let text = error(&tensors, &named);
    assert!(
        text.contains("`wte.weight` (expected [18, 8], found [16, 9])"),
        "{text}"
    );
}

#[test]
fn what_is_tied_gets_the_same_rows() {
    let mut tensors = given(16, Dtype::F32);
    tensors.retain(|tensor| tensor.name != "lm_head.weight");
    let options = resizing(NewRows::default()).with_tied("lm_head.weight", "wte.weight");
    let mut net = Words::new(18, LinearLayout::Row);
    load_into(&mut net, &tensors, &options).unwrap();
    assert_eq!(rows(&net, "lm_head.weight"), rows(&net, "wte.weight"));
    // A copy in the file, of a model whose head is its embedding, is compared as it is there.
    crate::base::families::tied_llama::check(&crate::golden("families/sharded"), 2, |options| {
        options.with_resized_vocabulary(NewRows::default())
    });
}

#[test]
fn a_resized_head_is_packed_as_the_dense_one_would_be() {
    let head = TargetConfig::list(["lm_head"]);
    for (from, to) in [(16, 18), (18, 16)] {
        let tensors = given(from, Dtype::F32);
        let saved = |options: &BaseOptions, pack: bool| {
            let mut net = Words::new(to, LinearLayout::Row);
            load_into(&mut net, &tensors, options).unwrap();
            let mut model = PeftModel::new(net);
            if pack {
                model.quantize_nf4(&head, &Nf4Config::new()).unwrap();
            }
            let dir = Dir::new();
            model
                .save_base(dir.path(), &SaveBaseOptions::new())
                .unwrap();
            (std::fs::read(dir.file(BASE_FILE)).unwrap(), dir)
        };
        let dense = resizing(NewRows::default());
        let (expected, dir) = saved(&dense, true);
        let packed = dense.clone().with_nf4(head.clone(), Nf4Config::new());
        assert!(saved(&packed, false).0 == expected);
        // One that is packed in the files has no rows to add.
        let mut other = Words::new(20, LinearLayout::Row);
        let error = dir
            .open()
            .unwrap()
            .load_into(&mut other, &dense)
            .unwrap_err();
        assert!(error.to_string().contains("`lm_head.weight`"), "{error}");
    }
}

fn tokens(values: &[i64]) -> Tensor<2, Int> {
    let data = TensorData::new(values.to_vec(), [1, values.len()]);
    Tensor::from_data(data, &Device::flex())
}

/// A model of 16 tokens with an adapter on everything that has a row for each, moved away from its beginning.
fn adapted(config: &PeftConfig) -> PeftModel<Words> {
    let mut net = Words::new(16, LinearLayout::Row);
    load_into(&mut net, &given(16, Dtype::F32), &BaseOptions::new()).unwrap();
    let mut model = PeftModel::new(net);
    model.add_adapter("default", config).unwrap();
    let changes = model.changes("default").unwrap().into_iter();
    let moved = changes
        .map(|(path, change)| (path, moved(change)))
        .collect();
    model.swap_changes("default", config, moved).unwrap();
    model
}

/// A change whose values are not those it began with.
fn moved(change: Change) -> Change {
    fn moved<const D: usize>(param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|value| value * 0.7 + 0.1)
    }
    match change {
        Change::Lora(mut lora) => {
            (lora.a, lora.b) = (moved(lora.a), moved(lora.b));
            lora.magnitude = lora.magnitude.map(moved);
            lora.into()
        }
        Change::Copy(mut copy) => {
            copy.values = moved(copy.values);
            copy.into()
        }
        Change::Rows(mut rows) => {
            rows.rows = moved(rows.rows);
            rows.into()
        }
    }
}

fn lora(targets: &[&str]) -> PeftConfig {
    PeftConfig::new(
        LoraConfig::new(2),
        TargetConfig::list(targets.iter().copied()),
    )
}

fn close(a: Tensor<3>, b: Tensor<3>) {
    let (a, b) = (a.into_data(), b.into_data());
    assert_eq!(a.shape(), b.shape());
    let largest = a
        .iter::<f32>()
        .zip(b.iter::<f32>())
        .map(|(a, b)| (a - b).abs());
    assert!(largest.fold(0.0, f32::max) < 1e-3);
}

#[test]
fn a_model_with_adapters_is_resized_and_old_tokens_stay_what_they_are() {
    let all = tokens(&(0..16).collect::<Vec<_>>());
    let dora = PeftConfig::new(
        LoraConfig::new(2).with_dora(true),
        TargetConfig::list(["lm_head", "up"]),
    );
    let pissa = {
        let init = burn_peft::adapter::LoraInit::Pissa;
        PeftConfig::new(
            LoraConfig::new(2).with_init(init),
            TargetConfig::list(["lm_head"]),
        )
    };
    for config in [
        lora(&["wte", "up", "lm_head"]),
        lora(&["up"]).with_modules_to_save(["wte", "lm_head"]),
        lora(&["up"]).with_trainable_tokens(TrainableTokens::Input(vec![3, 9])),
        dora,
        pissa,
    ] {
        let model = adapted(&config);
        let logits = model.module().forward(all.clone());
        let base = model.disabled().module().forward(all.clone());
        let ids = |model: &PeftModel<Words>| -> Vec<(String, u64, bool)> {
            let params = content(model.module()).params.into_iter();
            params
                .map(|(path, (id, trains))| (path, id, trains))
                .collect()
        };
        // More tokens.
        let mut more = model.clone();
        let report = more.resize_vocabulary(18, &NewRows::default()).unwrap();
        let tables: Vec<&str> = report
            .tables
            .iter()
            .map(|table| table.path.as_str())
            .collect();
        assert_eq!(tables, TABLES);
        assert_eq!(ids(&more), ids(&model));
        let found = more.module().forward(all.clone());
        assert_eq!(found.dims(), [1, 16, 18]);
        close(found.clone().narrow(2, 0, 16), logits.clone());
        close(
            more.disabled()
                .module()
                .forward(all.clone())
                .narrow(2, 0, 16),
            base.clone(),
        );
        // Of a new token the adapter changes nothing but what comes between.
        let new = tokens(&[16, 17]);
        let changes = more.changes("default").unwrap();
        for (path, change) in changes {
            if let Change::Copy(copy) = change {
                let base = rows(more.module(), &path)[16..].to_vec();
                let values: Vec<f32> = copy.values.val().into_data().iter().collect();
                assert_eq!(copy.shape().iter().product::<usize>(), values.len());
                if path == "wte.weight" {
                    assert_eq!(values[16 * 8..], base.concat());
                }
            }
        }
        assert_eq!(more.module().forward(new).dims(), [1, 2, 18]);
        // And back: the model that it was.
        let mut back = more.clone();
        back.resize_vocabulary(16, &NewRows::Zeros).unwrap();
        assert_eq!(
            content(back.module()).floats,
            content(model.module()).floats
        );
        close(back.module().forward(all.clone()), logits);
        // A file of it fits a model that is resized, and no other.
        let dir = Dir::new();
        let saved = more
            .save_adapter("default", dir.path(), &SaveOptions::default())
            .unwrap();
        let mut other = PeftModel::new(Words::new(16, LinearLayout::Row));
        let mut same = PeftModel::new(more.clone().unload().unwrap());
        assert_eq!(rows(same.module(), "wte.weight").len(), 18);
        same.load_adapter("default", &saved, &LoadOptions::default())
            .unwrap();
        close(same.module().forward(all.clone()), found);
        // Trained tokens are as many in both.
        let resizes = config.trainable_tokens.is_none();
        let error = other.load_adapter("default", &saved, &LoadOptions::default());
        assert_eq!(error.is_err(), resizes);
    }
}

#[test]
fn what_cannot_follow_is_refused_and_nothing_changes() {
    let slices = LoraConfig::new(2).with_slices(Slices::equal([true, false]));
    let head = TargetConfig::list(["lm_head"]);
    let dora = LoraConfig::new(2).with_dora(true);
    for (config, tokens, expected) in [
        (PeftConfig::new(slices, head), 18, "LoRA on slices"),
        (
            PeftConfig::new(dora, TargetConfig::list(["wte"])),
            18,
            "DoRA on an embedding",
        ),
        (
            lora(&["up"]).with_trainable_tokens(TrainableTokens::Input(vec![3, 9])),
            9,
            "adapter `default` trains token 9",
        ),
        (lora(&["up"]), 0, "at least one token"),
    ] {
        let mut model = adapted(&config);
        let before = content(model.module());
        let error = model
            .resize_vocabulary(tokens, &NewRows::Zeros)
            .unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
        assert_eq!(content(model.module()), before);
    }
    let mut model = adapted(&lora(&["up"]));
    model
        .quantize_nf4(&TargetConfig::list(["lm_head"]), &Nf4Config::new())
        .unwrap();
    let error = model.resize_vocabulary(18, &NewRows::Zeros).unwrap_err();
    assert!(
        error.to_string().contains("`lm_head.weight`")
            && error.to_string().contains("packed in NF4"),
        "{error}"
    );
    // The embedding alone can be.
    let report = model.resize_rows("wte", 18, &NewRows::Zeros).unwrap();
    assert_eq!(report.to_string(), "`wte.weight`: 16 to 18 tokens");
    let error = model
        .resize_rows("nowhere", 18, &NewRows::Zeros)
        .unwrap_err();
    assert!(matches!(error, PeftError::UnknownModule { .. }), "{error}");
    assert!(
        model
            .resize_rows("wte", 18, &NewRows::Zeros)
            .unwrap()
            .tables
            .is_empty()
    );
}

#[test]
fn the_dtype_and_the_layout_of_a_table_stay() {
    for layout in [LinearLayout::Row, LinearLayout::Col] {
        let mut net = Words::new(16, layout);
        let options = BaseOptions::new().with_dtype(FloatDType::BF16);
        load_into(&mut net, &given(16, Dtype::BF16), &options).unwrap();
        let mut model = PeftModel::new(net);
        let before = content(model.module()).floats;
        model.resize_vocabulary(19, &NewRows::default()).unwrap();
        let after = content(model.module()).floats;
        assert_eq!(after["lm_head.weight"].shape().as_slice(), [8, 19]);
        assert_eq!(after["lm_head.weight"].dtype(), DType::BF16);
        model.resize_vocabulary(16, &NewRows::default()).unwrap();
        assert_eq!(content(model.module()).floats, before);
    }
}
