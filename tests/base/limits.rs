//! Models of as many modules as the largest have: what is written is read, in time that grows as they do.

use std::time::{Duration, Instant};

use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::tensor::Device;
use burn_peft::format::{
    BASE_FILE, BaseOptions, Dtype, MAX_HEADER_BYTES, NameMap, SafetensorsFile, SaveBaseOptions,
};
use burn_peft::model::{PeftModel, TargetConfig};
use burn_peft::nf4::Nf4Config;

use crate::base::files::{self, Dir};

#[derive(Module, Debug)]
struct Layer {
    experts: Vec<Linear>,
}

#[derive(Module, Debug)]
struct Experts {
    layers: Vec<Layer>,
}

/// Layers of 400 experts.
fn experts(layers: usize) -> Experts {
    let device = &Device::flex();
    let linear = |_| LinearConfig::new(8, 8).with_bias(false).init(device);
    let layer = |_| Layer {
        experts: (0..400).map(linear).collect(),
    };
    Experts {
        layers: (0..layers).map(layer).collect(),
    }
}

fn names() -> NameMap {
    NameMap::new()
        .with_prefix("model.language_model", "")
        .with_renames([("mlp.experts", "experts")])
}

/// How long saving, loading dense, loading packed on the way, saving packed and loading packed take.
fn times(layers: usize) -> [Duration; 5] {
    let count = layers * 400;
    let options = BaseOptions::new().with_names(names());
    let save = SaveBaseOptions::new().with_names(names());
    let nf4 = Nf4Config::new().with_double_quant(true);
    let (dense, packed) = (Dir::new(), Dir::new());
    let mut times = [Duration::ZERO; 5];
    let model = PeftModel::new(experts(layers));
    let start = Instant::now();
    assert_eq!(model.save_base(dense.path(), &save).unwrap().tensors, count);
    times[0] = start.elapsed();
    let mut model = PeftModel::new(experts(layers));
    let start = Instant::now();
    let report = model.load_base(dense.path(), &options).unwrap();
    assert_eq!(report.loaded.len(), count);
    times[1] = start.elapsed();
    let mut model = PeftModel::new(experts(layers));
    let packing = options.clone().with_nf4(TargetConfig::all_linear(), nf4);
    let start = Instant::now();
    assert_eq!(
        model.load_base(dense.path(), &packing).unwrap().packed,
        count
    );
    times[2] = start.elapsed();
    let start = Instant::now();
    assert_eq!(
        model.save_base(packed.path(), &save).unwrap().tensors,
        6 * count
    );
    times[3] = start.elapsed();
    let mut model = PeftModel::new(experts(layers));
    let start = Instant::now();
    assert_eq!(
        model
            .load_base(packed.path(), &options)
            .unwrap()
            .four_bit
            .len(),
        count
    );
    times[4] = start.elapsed();
    times
}

/// Kimi-K2 has 69,000 experts' matrices, Qwen3-235B 36,000.
#[test]
fn forty_thousand_modules_are_saved_and_loaded_dense_and_packed_in_linear_time() {
    let (few, many) = (times(10), times(100));
    println!("4,000 modules: {few:?}\n40,000 modules: {many:?}");
    for (few, many) in few.iter().zip(&many) {
        // Ten times as many; a hundred times would be quadratic. What is very short is not measured.
        let few = (*few).max(Duration::from_millis(100));
        assert!(*many < 40 * few, "{few:?} {many:?}");
    }
}

/// The tensors of an adapter with a magnitude on 40,000 modules, with names as long as they get.
#[test]
fn a_file_of_120_000_tensors_is_read() {
    let names = (0..40_000).flat_map(|i| {
        let module = format!(
            "base_model.model.model.language_model.layers.{}.mlp.experts.{}.gate_proj",
            i / 400,
            i % 400
        );
        ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"]
            .map(|end| format!("{module}.{end}"))
    });
    let tensors: Vec<_> = names
        .map(|name| files::tensor(&name, Dtype::BF16, &[1]))
        .collect();
    let dir = Dir::new();
    dir.tensors(BASE_FILE, &tensors);
    let start = Instant::now();
    let file = SafetensorsFile::open(dir.file(BASE_FILE), u64::MAX).unwrap();
    assert_eq!(file.shapes().len(), 120_000);
    println!("opened in {:?}", start.elapsed());
    let bytes = std::fs::read(dir.file(BASE_FILE)).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    assert!(
        header > 16 << 20 && header < MAX_HEADER_BYTES / 3,
        "{header}"
    );
}

/// A name above the limits of reading is refused before anything is written. `src/format/base/shards.rs` tests the other limits.
#[test]
fn nothing_is_written_that_would_not_be_read() {
    let long = "x".repeat(5000);
    let names = NameMap::new().with_segments(&format!("{long}.experts"), "experts");
    let dir = Dir::new();
    let model = PeftModel::new(experts(1));
    let save = SaveBaseOptions::new().with_names(names);
    let error = model.save_base(dir.path(), &save).unwrap_err().to_string();
    assert!(error.contains("bytes: at most 4096 are read"), "{error}");
    assert!(std::fs::read_dir(dir.path()).unwrap().next().is_none());
}
