//! Loading holds the model and one bounded buffer, in live bytes counted by the allocator.
//!
//! A checkpoint of 348 MB in bf16, more than five times the most that loading may hold beside the model.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use burn::module::Module;
use burn::nn::{Embedding, EmbeddingConfig, Linear, LinearConfig, LinearLayout};
use burn::tensor::{Device, FloatDType};
use burn_peft::format::{
    BASE_FILE, BaseCheckpoint, BaseOptions, BaseReport, MAX_BUFFER_BYTES, SaveBaseOptions,
};
use burn_peft::model::{PeftModel, TargetConfig};
use burn_peft::nf4::Nf4Config;
use serde_json::{Map, json};
use tempfile::TempDir;

use crate::{ALLOCATOR, alone};

const MIB: usize = 1 << 20;
const VOCABULARY: usize = 44_000;
const WIDTH: usize = 1024;
const HIDDEN: usize = 4096;
const LAYERS: usize = 10;
/// Names, plans, reports, handles of tensors, and what each thread keeps for quantising: 16 KiB. Measured: 145 KiB at most.
const SLACK: usize = 256 << 10;
/// What is read from a device at a time in saving.
const PIECE: usize = 4 * MIB;
/// As much of a buffer as so few threads make use of, or more.
const USED: usize = 2 * MIB;
/// The scales in f32, one for 64 values, of the head and of the largest other linear layer.
const HEAD_SCALES: usize = VOCABULARY * WIDTH / 64 * 4;
const SCALES: usize = HIDDEN * WIDTH / 64 * 4;

#[derive(Module, Debug)]
struct Net {
    embed: Embedding,
    up: Vec<Linear>,
    down: Vec<Linear>,
    lm_head: Linear,
}

impl Net {
    fn new(device: &Device) -> Self {
        let linear = |d_in: usize, d_out: usize| LinearConfig::new(d_in, d_out).with_bias(false);
        let up = || linear(WIDTH, HIDDEN).init(device);
        // Every other one of Burn's column layout.
        let layouts = [LinearLayout::Row, LinearLayout::Col];
        let down = |layer: usize| {
            let config = linear(HIDDEN, WIDTH).with_layout(layouts[layer % 2]);
            config.init(device)
        };
        Self {
            embed: EmbeddingConfig::new(VOCABULARY, WIDTH).init(device),
            up: (0..LAYERS).map(|_| up()).collect(),
            down: (0..LAYERS).map(down).collect(),
            lm_head: linear(WIDTH, VOCABULARY).init(device),
        }
    }
}

/// Writes the checkpoint a MiB at a time and returns its bytes of values.
fn write(path: &Path) -> usize {
    let mut shapes = vec![("embed.weight".to_owned(), [VOCABULARY, WIDTH])];
    for layer in 0..LAYERS {
        shapes.push((format!("up.{layer}.weight"), [HIDDEN, WIDTH]));
        shapes.push((format!("down.{layer}.weight"), [WIDTH, HIDDEN]));
    }
    shapes.push(("lm_head.weight".to_owned(), [VOCABULARY, WIDTH]));
    let (mut header, mut end) = (Map::new(), 0);
    for (name, shape) in &shapes {
        let begin = end;
        end += 2 * shape[0] * shape[1];
        let info = json!({"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]});
        header.insert(name.clone(), info);
    }
    let header = serde_json::to_vec(&header).unwrap();
    let mut file = BufWriter::new(File::create(path).unwrap());
    file.write_all(&(header.len() as u64).to_le_bytes())
        .unwrap();
    file.write_all(&header).unwrap();
    // Values of either sign around 1: `0x3f..`, `0xbf..`.
    let values = (0..MIB / 2).flat_map(|i: usize| [(i * 37 % 251) as u8, [0x3f, 0xbf][i % 3 % 2]]);
    let values: Vec<u8> = values.collect();
    let mut left = end;
    while left > 0 {
        let part = left.min(values.len());
        file.write_all(&values[..part]).unwrap();
        left -= part;
    }
    file.flush().unwrap();
    end
}

#[derive(Debug)]
struct Measured {
    /// Live bytes of the loaded model.
    model: usize,
    /// The most live bytes while it was loaded.
    peak: usize,
    report: BaseReport,
}

fn measure(dir: &Path, options: &BaseOptions) -> Measured {
    let before = ALLOCATOR.current_usage();
    let mut net = Net::new(&Device::flex());
    ALLOCATOR.reset_peak_usage();
    let report = BaseCheckpoint::open(dir).unwrap();
    let report = report.load_into(&mut net, options).unwrap();
    let measured = Measured {
        model: ALLOCATOR.current_usage() - before,
        peak: ALLOCATOR.peak_usage() - before,
        report,
    };
    drop(net);
    measured
}

/// One test function: the allocator counts for the whole process.
#[test]
fn loading_holds_the_model_and_one_bounded_buffer() {
    if !alone(loading_holds_the_model_and_one_bounded_buffer) {
        return;
    }
    let dir = TempDir::new().unwrap();
    let bytes = write(&dir.path().join(BASE_FILE));
    println!("{bytes} bytes of bf16");
    assert!(bytes > 5 * MAX_BUFFER_BYTES);
    let nf4 = |double| {
        let config = Nf4Config::new().with_double_quant(double);
        BaseOptions::new().with_nf4(TargetConfig::all_linear(), config)
    };
    let with_head = {
        let config = Nf4Config::new().with_double_quant(true);
        BaseOptions::new().with_nf4(TargetConfig::regex(".*"), config)
    };
    // What threads and the standard library keep from a first call on is no model's.
    measure(dir.path(), &nf4(true));
    // Scales are kept until all of a weight are there only to be quantised themselves.
    for (name, options, scales) in [
        ("bf16", BaseOptions::new(), 0),
        ("f32", BaseOptions::new().with_dtype(FloatDType::F32), 0),
        ("f16", BaseOptions::new().with_dtype(FloatDType::F16), 0),
        ("NF4", nf4(false), 0),
        ("NF4, doubly", nf4(true), SCALES),
        ("NF4, doubly, with its head", with_head, HEAD_SCALES),
    ] {
        for (buffer, threads) in [(USED, 1), (USED, 3), (64 << 10, 3)] {
            let options = options.clone().with_buffer(buffer);
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            let pool = pool.build().unwrap();
            let measured = pool.install(|| measure(dir.path(), &options));
            let beside = measured.peak - measured.model;
            let expected = measured.report.dense_bytes + measured.report.packed_bytes;
            println!(
                "{name}, buffer of {} KiB, {threads} threads: model {} MiB, {} KiB beside it",
                buffer / 1024,
                measured.model / MIB,
                beside / 1024
            );
            assert!(beside <= buffer + scales + SLACK, "{measured:?}");
            let other = measured.model.abs_diff(expected as usize);
            assert!(other <= SLACK, "{other} bytes of {measured:?}");
        }
    }
    // A packed base is saved and loaded again without a second copy of anything: pieces of 4 MiB, or the scales of a weight as
    // they are and in the tensor's words.
    for double in [false, true] {
        let saved = TempDir::new().unwrap();
        let mut model = PeftModel::new(Net::new(&Device::flex()));
        model.load_base(dir.path(), &nf4(double)).unwrap();
        let before = ALLOCATOR.current_usage();
        ALLOCATOR.reset_peak_usage();
        let report = model.save_base(saved.path(), &SaveBaseOptions::default());
        assert_eq!(report.unwrap().packed, 2 * LAYERS);
        let beside = ALLOCATOR.peak_usage() - before;
        println!(
            "saving, doubly {double}: {} KiB beside the model",
            beside / 1024
        );
        // A piece as it comes from the device, and as bytes; the scales of a weight are less.
        assert!(beside <= 2 * PIECE + SLACK, "{beside}");
        drop(model);
        let measured = measure(saved.path(), &BaseOptions::new());
        let beside = measured.peak - measured.model;
        println!("loading it: {} KiB beside the model", beside / 1024);
        assert!(beside <= USED + SLACK, "{measured:?}");
    }
    // A model that is initialised keeps its old values no longer than until the new ones are there.
    let before = ALLOCATOR.current_usage();
    let mut net = Net::new(&Device::flex());
    let checkpoint = BaseCheckpoint::open(dir.path()).unwrap();
    checkpoint.load_into(&mut net, &BaseOptions::new()).unwrap();
    let report = checkpoint.load_into(&mut net, &nf4(true)).unwrap();
    let packed = (report.dense_bytes + report.packed_bytes) as usize;
    let model = ALLOCATOR.current_usage() - before;
    assert!(model <= packed + SLACK, "{model} against {packed}");
}
