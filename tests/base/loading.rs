//! Dense values: every layer's layout, every cast, one file or several, any threads and any buffer.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use burn::module::Module;
use burn::nn::{LinearConfig, LinearLayout};
use burn::tensor::{DType, Device, FloatDType, Tensor};
use burn_peft::adapter::LoraConfig;
use burn_peft::format::{BASE_FILE, BaseCheckpoint, BaseOptions, Dtype, LoadProgress, NameMap};
use burn_peft::model::{Base, PeftConfig, PeftModel, TargetConfig};

use crate::base::files::{self, Dir};
use crate::base::model::{
    Net, content, dtype_of, initialized, names, plain, tensor, tensors, with_threads,
};

const FLOATS: [Dtype; 3] = [Dtype::F32, Dtype::BF16, Dtype::F16];

/// Paths in Burn, where norms have other names.
fn path(name: &str) -> String {
    match name {
        "norm.weight" => "norm.gamma".into(),
        "norm.bias" => "norm.beta".into(),
        "batch.weight" => "batch.gamma".into(),
        "batch.bias" => "batch.beta".into(),
        name => name.into(),
    }
}

fn dir_of(tensors: &[files::Tensor]) -> Dir {
    let dir = Dir::new();
    dir.tensors(BASE_FILE, tensors);
    dir
}

#[test]
fn every_layer_gets_the_file_s_values_in_its_own_layout() {
    for stored in FLOATS {
        let tensors = tensors(stored);
        let dir = dir_of(&tensors);
        for dtype in [
            None,
            Some(FloatDType::F32),
            Some(FloatDType::BF16),
            Some(FloatDType::F16),
        ] {
            let mut net = Net::new(&Device::flex());
            let options = BaseOptions::new().with_dtype(dtype);
            let report = dir.open().unwrap().load_into(&mut net, &options).unwrap();
            assert_eq!(report.loaded.len(), tensors.len());
            let content = content(&net);
            assert_eq!(content.floats.len(), tensors.len());
            let expected_dtype = dtype.map_or(dtype_of(stored), DType::from);
            for (tensor, (name, _, transposed)) in tensors.iter().zip(names()) {
                let found = &content.floats[&path(name)];
                let expected = plain(tensor, expected_dtype, transposed);
                assert_eq!(found, &expected, "{name} of {stored:?} as {dtype:?}");
            }
            let values: usize = names()
                .iter()
                .map(|(_, s, _)| s.iter().product::<usize>())
                .sum();
            let bytes = |dtype: DType| (values * dtype.size()) as u64;
            assert_eq!(report.read_bytes, bytes(dtype_of(stored)));
            assert_eq!(report.dense_bytes, bytes(expected_dtype));
        }
    }
}

#[test]
fn one_file_and_several_any_threads_and_any_buffer_give_the_same() {
    let tensors = tensors(Dtype::BF16);
    let single = dir_of(&tensors);
    let sharded = Dir::new();
    let (one, rest) = tensors.split_at(3);
    let (two, three) = rest.split_at(9);
    sharded.sharded(&[
        ("b.safetensors", one.to_vec()),
        ("c.safetensors", two.to_vec()),
        ("a.safetensors", three.to_vec()),
    ]);
    let load = |dir: &Dir, options: &BaseOptions| {
        let mut net = Net::new(&Device::flex());
        dir.open().unwrap().load_into(&mut net, options).unwrap();
        content(&net)
    };
    let expected = load(&single, &BaseOptions::new()).floats;
    for threads in [1, 3] {
        for buffer in [0, 1 << 20, usize::MAX] {
            let options = BaseOptions::new().with_buffer(buffer);
            let found = with_threads(threads, || load(&sharded, &options));
            assert_eq!(found.floats, expected);
        }
    }
}

#[test]
fn a_row_longer_than_the_buffer_is_read_in_parts() {
    // 280,000 bytes a row, and a buffer of 65,536; rows that fill no tile, one tile, and more.
    for d_out in [1, 31, 32, 45] {
        let weight = tensor("weight", Dtype::F32, &[d_out, 70_000]);
        let dir = dir_of(std::slice::from_ref(&weight));
        for (stored, layout) in [
            (DType::F32, LinearLayout::Row),
            (DType::BF16, LinearLayout::Row),
            (DType::BF16, LinearLayout::Col),
        ] {
            let config = LinearConfig::new(70_000, d_out).with_bias(false);
            let mut linear = config.with_layout(layout).init(&Device::flex());
            let dtype = FloatDType::from(stored);
            let options = BaseOptions::new().with_buffer(0).with_dtype(dtype);
            let checkpoint = dir.open().unwrap();
            with_threads(3, || checkpoint.load_into(&mut linear, &options)).unwrap();
            let found = linear.weight.base().into_data();
            assert_eq!(found, plain(&weight, stored, true), "{d_out} {layout:?}");
        }
    }
}

#[test]
fn tall_weights_are_turned_some_rows_at_a_time() {
    for [d_out, d_in] in [[50_000, 3], [4100, 33], [700, 1000], [20_000, 1]] {
        let weight = tensor("weight", Dtype::BF16, &[d_out, d_in]);
        let dir = dir_of(std::slice::from_ref(&weight));
        let config = LinearConfig::new(d_in, d_out).with_bias(false);
        let mut linear = config.init(&Device::flex());
        let options = BaseOptions::new().with_buffer(0);
        let checkpoint = dir.open().unwrap();
        with_threads(3, || checkpoint.load_into(&mut linear, &options)).unwrap();
        let found = linear.weight.base().into_data();
        assert_eq!(found, plain(&weight, DType::BF16, true), "{d_out} {d_in}");
    }
}

#[test]
fn empty_tensors_are_tensors() {
    for shape in [[0, 5], [5, 0]] {
        let dir = dir_of(&[tensor("weight", Dtype::F16, &shape)]);
        let [d_out, d_in] = shape;
        let mut linear = LinearConfig::new(1, 1)
            .with_bias(false)
            .init(&Device::flex());
        let values = Tensor::<2>::zeros([d_in, d_out], &Device::flex());
        linear.weight = burn::module::Param::from_tensor(values);
        let checkpoint = dir.open().unwrap();
        checkpoint
            .load_into(&mut linear, &BaseOptions::new())
            .unwrap();
        let found = linear.weight.base();
        assert_eq!((found.dims(), found.dtype()), ([d_in, d_out], DType::F16));
    }
}

#[test]
fn a_name_map_finds_the_tensors() {
    let mut renamed = tensors(Dtype::F32);
    for tensor in &mut renamed {
        if !tensor.name.starts_with("lm_head") {
            tensor.name = format!("model.{}", tensor.name.replace("layers", "h"));
        }
    }
    let dir = dir_of(&renamed);
    let names = NameMap::new()
        .with_prefix("model", "")
        .with_prefix("lm_head", "lm_head")
        .with_segments("h", "layers");
    let load = |dir: &Dir, names: NameMap| {
        let mut net = Net::new(&Device::flex());
        let options = BaseOptions::new().with_names(names);
        let report = dir.open().unwrap().load_into(&mut net, &options).unwrap();
        (content(&net).floats, report)
    };
    let (found, report) = load(&dir, names);
    assert_eq!(found, load(&dir_of(&tensors(Dtype::F32)), NameMap::new()).0);
    assert!(report.loaded.contains(&"model.h.3.weight".to_owned()));
}

#[test]
fn ids_and_what_trains_stay_and_nothing_is_initialised_at_random() {
    let dir = dir_of(&tensors(Dtype::F32));
    let device = Device::flex().autodiff();
    let mut net = Net::new(&device);
    // Parameters only: the state of a batch norm is always there.
    let lazy = initialized(&net);
    assert_eq!(lazy.len(), 2, "{lazy:?}");
    let mut before = net.clone();
    let checkpoint = dir.open().unwrap();
    checkpoint.load_into(&mut net, &BaseOptions::new()).unwrap();
    assert_eq!(initialized(&before).len(), 2, "the clone was not touched");
    let after = content(&net);
    before = before.no_grad();
    let mut frozen = before.clone();
    checkpoint
        .load_into(&mut frozen, &BaseOptions::new())
        .unwrap();
    let frozen = content(&frozen);
    let ids = |params: &std::collections::BTreeMap<String, (u64, bool)>| {
        params.values().map(|(id, _)| *id).collect::<Vec<_>>()
    };
    assert_eq!(ids(&after.params), ids(&frozen.params));
    assert_eq!(after.floats, frozen.floats);
    for (path, (_, trains)) in &after.params {
        assert_eq!(*trains, !path.contains("running"), "{path}");
        assert!(!frozen.params[path].1, "{path}");
    }
}

#[test]
fn adapters_stay_and_act_on_the_new_base() {
    let dir = dir_of(&tensors(Dtype::F32));
    let device = Device::flex();
    let mut model = PeftModel::new(Net::new(&device));
    let lora = LoraConfig::new(2);
    let config = PeftConfig::new(lora, TargetConfig::list(["row", "layers.0"]));
    model.add_adapter("default", &config).unwrap();
    let factors = |model: &PeftModel<Net>| -> Vec<_> {
        let factors = model.factors("default").unwrap().into_iter();
        factors
            .map(|(path, lora)| (path, lora.a.id, lora.a.val().into_data()))
            .collect()
    };
    let before = factors(&model);
    assert_eq!(before.len(), 2);
    // Packed on the way, below one of the adapters.
    let options = BaseOptions::new().with_nf4(TargetConfig::list(["row"]), Default::default());
    model.load_base(dir.path(), &options).unwrap();
    assert_eq!(factors(&model), before);
    assert_eq!(model.active_adapter(), Some("default"));
    // It looks like the dense weight, and is packed.
    assert_eq!(
        content(&model).floats["row.weight"].shape().as_slice(),
        [70, 37]
    );
    let report = model.report();
    let row = report.weights.iter().find(|weight| weight.path == "row");
    assert_eq!(row.unwrap().base, Base::Nf4);
    let error = model.load_base(dir.path(), &options).unwrap_err();
    let expected = "`row.weight` is quantised already: leave it out by `TargetConfig::with_exclude_modules`, or quantise once only";
    assert_eq!(error.to_string(), expected);
}

#[test]
fn progress_counts_tensors_and_bytes() {
    let tensors = tensors(Dtype::BF16);
    let bytes: usize = tensors.iter().map(|tensor| tensor.bytes.len()).sum();
    let dir = dir_of(&tensors);
    let last: Arc<Mutex<Option<LoadProgress>>> = Arc::default();
    let calls = Arc::new(AtomicU64::new(0));
    let (seen, counted) = (last.clone(), calls.clone());
    let options = BaseOptions::new().with_progress(move |progress| {
        counted.fetch_add(1, Ordering::Relaxed);
        assert!(progress.bytes <= progress.total_bytes);
        assert!(progress.tensors <= progress.total_tensors);
        *seen.lock().unwrap() = Some(*progress);
    });
    let checkpoint = BaseCheckpoint::open(dir.path()).unwrap();
    let mut net = Net::new(&Device::flex());
    let report = checkpoint.load_into(&mut net, &options).unwrap();
    let last = last.lock().unwrap().unwrap();
    assert_eq!(last.tensors, tensors.len());
    assert_eq!(last.total_tensors, tensors.len());
    assert_eq!((last.bytes, last.total_bytes), (bytes as u64, bytes as u64));
    assert_eq!(report.read_bytes, bytes as u64);
    assert!(last.bytes_per_second() > 0.0);
    assert!(calls.load(Ordering::Relaxed) >= 2 * tensors.len() as u64);
    let text = report.to_string();
    assert!(text.starts_with("20 tensors, 0.000 GB in "), "{text}");
}
